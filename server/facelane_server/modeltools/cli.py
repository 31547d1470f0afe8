"""``facelane-server models``: list, show, verify and import model packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from facelane_server import config
from facelane_server.domain import FacelaneError, Stage
from facelane_server.models.api import DeviceOptions
from facelane_server.models.catalog import Broken, Catalog
from facelane_server.models.package import Package

app = typer.Typer(no_args_is_help=True, help="Model packages: what there is, and is it sound.")

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="Take models.path from this configuration.",
        envvar="FACELANE_CONFIG",
    ),
]
DirectoryOption = Annotated[
    list[Path] | None,
    typer.Option("--directory", "-d", help="Another directory with packages; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _catalog(config_file: Path | None, directories: list[Path] | None) -> Catalog:
    try:
        configured = config.load(config_file).models.path
    except config.ConfigError as error:
        raise _failed(str(error)) from error
    return Catalog([*(Path(folder).expanduser() for folder in configured), *(directories or [])])


def _console(*, stderr: bool = False) -> Console:
    """Prints text as it is: names and messages may hold anything, `[onnx]` for one."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def _failed(message: str) -> typer.Exit:
    _console(stderr=True).print(Text.assemble(("error:", "red"), f" {message}"))
    return typer.Exit(1)


def _resolve(catalog: Catalog, reference: str) -> Package:
    try:
        return catalog.resolve(reference)
    except FacelaneError as error:
        raise _failed(error.message) from error


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


@app.command("list")
def list_packages(
    config_file: ConfigOption = None, directory: DirectoryOption = None, as_json: JsonOption = False
) -> None:
    """All packages along the search path, and folders that cannot be read."""
    packages, broken = _catalog(config_file, directory).scan()
    if as_json:
        _print_json(
            {
                "packages": [_summary(package) for package in packages],
                "broken": [
                    {"folder": str(item.folder), "error": item.error.message} for item in broken
                ],
            }
        )
        return
    # Names are for copying: they are whole, whatever the terminal's width.
    console = _console()
    for package in packages:
        manifest = package.manifest
        runs_by = manifest.architecture or manifest.runtime
        if package.random_weights:
            runs_by += " (random weights)"
        console.print(f"{package.model_id}  {manifest.task.value}, {runs_by}", soft_wrap=True)
        for line in (manifest.description, f"licence: {manifest.license}"):
            console.print(Padding.indent(line, 4))
    for item in broken:
        console.print(Text.assemble(("broken:", "red"), f" {item.error.message}"))


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="Name, name@version, or path of a package.")],
    config_file: ConfigOption = None,
    directory: DirectoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Everything that one package declares."""
    package = _resolve(_catalog(config_file, directory), model)
    if as_json:
        _print_json({**_summary(package), "manifest": msgspec.to_builtins(package.manifest)})
        return
    console = _console()
    if package.random_weights:
        console.print("random weights: timings only, results mean nothing", style="yellow")
    table = Table("key", "value", title=package.model_id)
    for key, value in _flat(msgspec.to_builtins(package.manifest), ""):
        table.add_row(key, value)
    console.print(table)


@app.command()
def verify(
    model: Annotated[
        list[str] | None, typer.Argument(help="Packages; without any, all along the search path.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
    record: Annotated[
        bool,
        typer.Option("--record", help="First write the model's answers of today to check.json."),
    ] = False,
    config_file: ConfigOption = None,
    directory: DirectoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check hashes, keys and shapes, run inferences, compare them with the recorded answers
    (check.json, where a package has one). Exit status 1 if any check fails."""
    from facelane_server.modeltools import reference
    from facelane_server.modeltools.verify import verify as verify_package

    if record and not model:
        raise _failed("name the packages whose answers are to be recorded")

    catalog = _catalog(config_file, directory)
    packages = [_resolve(catalog, reference) for reference in model or []]
    broken: list[Broken] = []
    if not model:
        packages, broken = catalog.scan()
    console = _console(stderr=as_json)
    results = []
    for package in packages:
        with console.status(Text(f"verifying {package.name}")):
            if record:
                try:
                    reference.record(package, DeviceOptions(device=device))
                except FacelaneError as error:
                    raise _failed(error.message) from error
            results.append(verify_package(package, DeviceOptions(device=device)))
    if as_json:
        _print_json(
            {
                "results": [
                    {
                        "model_id": result.model_id,
                        "task": result.task,
                        "random_weights": result.random_weights,
                        "passed": result.passed,
                        "latency_ms": result.latency_ms,
                        "checks": [
                            {"name": c.name, "passed": c.passed, "detail": c.detail}
                            for c in result.checks
                        ],
                    }
                    for result in results
                ],
                "broken": [
                    {"folder": str(item.folder), "error": item.error.message} for item in broken
                ],
            }
        )
    else:
        table = Table(Column("model", no_wrap=True), "check", "result", "detail")
        for result in results:
            for check in result.checks:
                mark = Text("ok", "green") if check.passed else Text("failed", "red")
                table.add_row(result.model_id, check.name, mark, check.detail)
            if result.latency_ms is not None:
                table.add_row(result.model_id, "latency", "", f"{result.latency_ms} ms an item")
        console.print(table)
        for item in broken:
            console.print(Text.assemble(("broken:", "red"), f" {item.error.message}"))
    if broken or not all(result.passed for result in results):
        raise typer.Exit(1)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Name, name@version, or path of a package.")],
    data: Annotated[
        Path,
        typer.Option("--data", help="Folder of pictures; what it must hold depends on the task."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for report and plots.")] = Path(
        "evaluation"
    ),
    detector: Annotated[
        str, typer.Option(help="The detector that finds the faces for the other tasks.")
    ] = "facelane-detector",
    reference: Annotated[
        str, typer.Option(help="For a detector without boxes.json: the one to agree with.")
    ] = "",
    far: Annotated[
        str, typer.Option(help="False accept rates to find thresholds for, such as 1e-2,1e-3.")
    ] = "",
    aligned: Annotated[
        bool, typer.Option("--aligned", help="The pictures are aligned crops: detect nothing.")
    ] = False,
    damaged: Annotated[
        int, typer.Option(min=0, help="Faces to try the OOD score on with damage; 0: none.")
    ] = 200,
    min_face: Annotated[
        float, typer.Option(min=0, help="Smaller faces do not count for a detector; pixels.")
    ] = 24.0,
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
    plots: Annotated[bool, typer.Option(help="Draw PNG and SVG (needs matplotlib).")] = True,
    write: Annotated[
        bool,
        typer.Option(
            "--write",
            help="Put the recogniser's similarities of different people into its package.",
        ),
    ] = False,
    config_file: ConfigOption = None,
    directory: DirectoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a package on pictures of your own: error rates, thresholds, plots.

    Recogniser: subject/picture.jpg, or pairs.csv (first,second,same); groups.csv
    (subject,group) for rates within groups. Liveness: live/ and spoof/. Detector: boxes.json
    (for each path its lists of x, y, width, height), or --reference.
    """
    import msgspec

    from facelane_server.models.package import Impostors
    from facelane_server.modeltools import impostors
    from facelane_server.modeltools.evaluate import evaluate as evaluate_package
    from facelane_server.modeltools.report import markdown
    from facelane_server.modeltools.samples import Settings

    catalog = _catalog(config_file, directory)
    package = _resolve(catalog, model)
    finder = None if package.task is Stage.DETECTOR else _resolve(catalog, detector)
    judge = _resolve(catalog, reference) if reference else None
    try:
        fars = tuple(float(part) for part in far.split(",") if part.strip())
    except ValueError as error:
        raise _failed("--far takes numbers with commas between them, such as 1e-2,1e-3") from error
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=_console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"evaluating {package.name}", total=None)
            report = evaluate_package(
                package,
                data,
                out,
                detector=finder,
                reference=judge,
                options=DeviceOptions(device=device),
                settings=Settings(
                    fars=fars, aligned=aligned, damaged=damaged, min_face=min_face, plots=plots
                ),
                progress=lambda what, done, total: bar.update(
                    task, description=f"{what} {package.name}", completed=done, total=total
                ),
            )
        if write:
            rows = msgspec.convert(list(report.get("impostors", {}).values()), list[Impostors])
            if not rows:
                raise _failed(
                    "nothing was written: --write is for recognisers, and takes pictures of more "
                    "people than these, in a folder for each"
                )
            impostors.write(package, rows)
    except FacelaneError as error:
        raise _failed(error.message) from error
    if as_json:
        _print_json(report)
        return
    typer.echo(markdown(report))
    if write:
        typer.echo(f"written into {package.folder}: false_naming holds by these pictures from now")
    typer.echo(f"written to {out}: report.md, report.json, left_out.csv" + ", plots" * plots)


@app.command("import")
def import_package(
    files: Annotated[list[Path], typer.Argument(help="The public weights files.")],
    into: Annotated[Path, typer.Option("--into", help="Directory that gets the package.")],
    recipe: Annotated[
        str, typer.Option(help="Which model the files are; without it, told by their names.")
    ] = "",
    name: Annotated[str, typer.Option(help="The package's name.")] = "",
    version: Annotated[str, typer.Option(help="The package's version.")] = "1.0.0",
    replace: Annotated[bool, typer.Option(help="Replace a package of this name.")] = False,
) -> None:
    """Make a package of public weights files. Recipes: yunet, yunet-onnx, mobilefacenet-onnx,
    minifasnet (both files), rts, onnx-detector, onnx-recognizer, onnx-liveness."""
    from facelane_server.modeltools.importer import guess_recipe, import_model

    try:
        package = import_model(
            recipe or guess_recipe(files),
            files,
            into,
            name=name,
            version=version,
            replace=replace,
        )
    except FacelaneError as error:
        raise _failed(error.message) from error
    typer.echo(f"{package.model_id} in {package.folder}")


def _summary(package: Package) -> dict[str, Any]:
    manifest = package.manifest
    return {
        "model_id": package.model_id,
        "name": package.name,
        "version": manifest.version,
        "task": manifest.task.value,
        "runtime": manifest.runtime,
        "architecture": manifest.architecture,
        "license": manifest.license,
        "description": manifest.description,
        "random_weights": package.random_weights,
        "folder": str(package.folder),
    }


def _flat(value: Any, prefix: str) -> list[tuple[str, str]]:
    """A nested table as rows of dotted keys, without what is unset."""
    if isinstance(value, dict):
        rows = []
        for key, inner in value.items():
            rows += _flat(inner, f"{prefix}.{key}" if prefix else key)
        return rows
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        rows = []
        for i, item in enumerate(value):
            rows += _flat(item, f"{prefix}[{i}]")
        return rows
    return [] if value in (None, "", []) else [(prefix, str(value))]
