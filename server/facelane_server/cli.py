"""``facelane-server``: run the service, and look after it.

Exit codes: 0 ended as asked · 1 failed while running · 2 usage · 69 a device, an address or
the gallery is not usable now · 78 the configuration, a model package or the gallery's file is
not usable until somebody mends it (systemd: do not restart).
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

try:
    import typer
except ImportError:  # pragma: no cover - the bare install
    sys.stderr.write("facelane-server needs the server extra: pip install 'facelane[server]'\n")
    sys.exit(2)

from facelane_server import __version__, limits
from facelane_server import config as configuration
from facelane_server.domain import FacelaneError
from facelane_server.running import EX_CONFIG, EX_UNAVAILABLE, shards_of
from facelane_server.store.cli import app as store_app

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from facelane_server.edge.auth import Key, KeysFile

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="TOML file; without it, the defaults.", envvar="FACELANE_CONFIG"
    ),
]

app = typer.Typer(
    name="facelane-server",
    help="Streaming video analytics for faces: identity, OOD score, liveness.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
gallery_app = typer.Typer(help="Galleries at rest.", no_args_is_help=True)
keys_app = typer.Typer(help="Keys that clients authenticate with.", no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


app.add_typer(keys_app, name="keys")
app.add_typer(gallery_app, name="gallery")
app.add_typer(store_app, name="store")


def _load(path: Path | None) -> configuration.Config:
    try:
        return configuration.load(path)
    except configuration.ConfigError as error:
        typer.echo(f"facelane-server: {error}", err=True)
        raise typer.Exit(EX_CONFIG) from None


@app.command()
def run(config: ConfigOption = None) -> None:
    """Run the server in the foreground until SIGTERM or SIGINT; SIGHUP reloads the config."""
    from facelane_server.running import prepare, run_server

    prepare()
    raise typer.Exit(run_server(_load(config), config))


@app.command(hidden=True)
def shard(launch: str) -> None:
    """One of several processes of a server; started by `run`."""
    from facelane_server.running import prepare, run_shard

    prepare()
    raise typer.Exit(run_shard(launch))


@app.command()
def check(config: ConfigOption = None) -> None:
    """Read the config and the files that it names, and say what would run. Exit status 78 when
    the server would not start with it."""
    loaded = _load(config)
    from facelane_server import calibrating, traces
    from facelane_server import plan as planning
    from facelane_server.edge.auth import Authenticator
    from facelane_server.edge.tls import Certificates
    from facelane_server.served import ServedModels
    from facelane_server.store.opening import key_source

    lent = loaded.lent_by_systemd
    try:
        models = ServedModels.resolve(loaded)
        if loaded.auth.keys_file not in lent:
            Authenticator.of(loaded)
        if not {loaded.tls.cert_file, loaded.tls.key_file, loaded.tls.client_ca_file} & set(lent):
            Certificates.read(loaded.tls)
        traces.check(loaded.tracing)
        source = key_source(loaded, look=True)
        if source is not None and source.path is not None and not source.made_here:
            if source.elsewhere:
                lent = (*lent, source.name)
            else:
                source.read()
    except FacelaneError as error:
        typer.echo(f"facelane-server: {error.message}", err=True)
        raise typer.Exit(EX_CONFIG) from None
    except configuration.ConfigError as error:
        typer.echo(f"facelane-server: {error}", err=True)
        raise typer.Exit(EX_CONFIG) from None
    shards = shards_of(loaded)
    devices = planning.read_devices()
    problems = planning.make_plan(loaded, models.packages, devices, shards=shards).problems
    for problem in problems:
        typer.echo(f"facelane-server: {problem}", err=True)
    if problems:
        raise typer.Exit(EX_CONFIG)
    for stage, package in models.packages.items():
        pool = loaded.stages[stage]
        typer.echo(
            f"{stage.value:<11} {package.model_id}  x{pool.workers} on {', '.join(pool.devices)}"
            f"  {pool.isolation}"
        )
    for line in calibrating.lines(loaded, models):
        typer.echo(line)
    encryption = "TLS" if loaded.tls.cert_file else "no TLS"
    keys = "keys" if loaded.wants_keys else "no keys"
    metrics = loaded.metrics.listen or "none"
    if loaded.wants_keys:
        share = loaded.quotas
        typer.echo(
            f"a key may have {share.streams} streams, {share.calls} calls, {share.watchers} "
            f"watchers, {share.held_mib} MiB of pictures; 1 in {limits.OPERATORS_PART} places is "
            "kept for admin keys"
        )
    if shards > 1:
        typer.echo(f"{shards} shards: each has pools of its own, as above")
    typer.echo(f"listens on {loaded.listen}, {encryption}, {keys}; metrics on {metrics}")
    if lent:
        typer.echo(f"not looked at: {', '.join(lent)}: systemd lends them to the running service")


@app.command()
def doctor(
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    infer: Annotated[
        bool, typer.Option(help="Start a worker of every stage and run a real inference.")
    ] = True,
) -> None:
    """Look at the machine, the config, the models, and run a real inference through real
    workers. Exit status 69 when the server could not serve."""
    import json

    from facelane_server.doctor.examine import examine
    from facelane_server.doctor.report import Status
    from facelane_server.observability.logs import configure_logging

    configure_logging(configuration.Log(level="error"))
    report = asyncio.run(examine(config, infer=infer))
    typer.echo(json.dumps(report.as_json(), indent=2) if as_json else report.as_text())
    if report.status is Status.FAIL:
        raise typer.Exit(EX_UNAVAILABLE)


@app.command()
def plan(
    config: ConfigOption = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Start one worker a pool and measure its memory.")
    ] = False,
) -> None:
    """Say what the workers take of each card, and refuse what does not fit (exit code 78)."""
    loaded = _load(config)
    from facelane_server import plan as planning
    from facelane_server.served import ServedModels

    try:
        models = ServedModels.resolve(loaded)
        measured = (
            asyncio.run(planning.measure(loaded, models.packages, models.crops)) if measure else {}
        )
    except FacelaneError as error:
        typer.echo(f"facelane-server: {error.message}", err=True)
        raise typer.Exit(EX_CONFIG) from None
    devices = planning.read_devices()
    made = planning.make_plan(loaded, models.packages, devices, measured, shards=shards_of(loaded))
    for line in made.lines():
        typer.echo(line)
    if made.problems:
        raise typer.Exit(EX_CONFIG)


@gallery_app.command("check")
def gallery_check(
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say which match threshold each gallery gets, which of its subjects are too alike to be told
    apart, and whose templates promise so little that a better picture is wanted. Reads the file
    alone, also while the server runs. Exit status 69 when it cannot."""
    import json

    loaded = _load(config)
    from facelane_server.domain import Stage
    from facelane_server.gallery.examine import examine
    from facelane_server.served import ServedModels
    from facelane_server.store.database import opening
    from facelane_server.store.gallery import Store
    from facelane_server.store.opening import open_store, place_of, unlock

    try:
        models = ServedModels.resolve(loaded)
        package = models.packages.get(Stage.RECOGNIZER)
        if package is None:
            raise configuration.ConfigError("this server runs without a recogniser")
        database = open_store(place_of(loaded), look=True)
        with opening(database):
            store = Store(database, vault=unlock(database, loaded, look=True))
        try:
            rows = store.vectors(package.model_id, package.embedding_dim)
            found = examine(rows, models.thresholds)
            others = store.counts()[1] - sum(one.templates for one in found)
        finally:
            store.close()
    except (FacelaneError, configuration.ConfigError) as error:
        typer.echo(f"facelane-server: {error}", err=True)
        raise typer.Exit(EX_UNAVAILABLE) from None
    if as_json:
        whole = {"galleries": [one.as_json() for one in found], "of_other_models": others}
        typer.echo(json.dumps(whole, indent=2))
        return
    for one in found:
        rule = (
            "match_threshold" if one.false_naming is None else f"false_naming {one.false_naming:g}"
        )
        typer.echo(
            f"{one.gallery_id}: {one.subjects} subjects, {one.templates} templates; {rule}: named "
            f"from {one.threshold:.3f} on, a look that is just trusted from "
            f"{one.worst_threshold:.3f}"
        )
        for pair in one.pairs:
            typer.echo(f"  too alike: {pair.first}, {pair.second}: {pair.similarity:.3f}")
        if one.alike > len(one.pairs):
            typer.echo(f"  and {one.alike - len(one.pairs)} more")
        for subject in one.weakest:
            typer.echo(f"  wants a better picture: {subject.subject}: {subject.quality:.3f}")
        if one.weak > len(one.weakest):
            typer.echo(f"  and {one.weak - len(one.weakest)} more")
    if others:
        typer.echo(f"{others} templates of other models are not searched: enrol them again")
    if not found:
        typer.echo("nobody is enrolled")


@keys_app.command("new")
def keys_new(
    name: Annotated[
        str, typer.Argument(help="Whose key it is; told in the log when it is used to administer.")
    ],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What keys had before there were roles: analyze (the default, where no role is "
            "given), gallery, admin, scores, reassign or waive-liveness; several times."
        ),
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option(help="A role that the file defines; several times."),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="A source that it may send as, * for any letters; several times."),
    ] = None,
    gallery: Annotated[
        list[str] | None,
        typer.Option(help="A gallery that it may search and change; several times."),
    ] = None,
    expires: Annotated[
        datetime | None, typer.Option(help="Until when it counts, in UTC.", formats=["%Y-%m-%d"])
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Append the entry to this keys file (made with mode 0600).")
    ] = None,
) -> None:
    """Make a key. The secret is printed once; the file holds its hash."""
    from facelane_server.edge.auth import KeysFile, new_key
    from facelane_server.edge.roles import SCOPES
    from facelane_server.naming import hint

    scopes = scope or ([] if role else ["analyze"])
    for wrong in set(scopes) - set(SCOPES):
        raise typer.BadParameter(f"unknown scope {wrong}: {hint(wrong, SCOPES)}")
    try:
        secret, key = new_key(
            name,
            tuple(s for s in SCOPES if s in scopes),
            roles=tuple(role or ()),
            sources=tuple(source or ()),
            galleries=tuple(gallery or ()),
            expires=expires and expires.replace(tzinfo=UTC),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if file is None:
        typer.echo(key.entry(), err=True)
    else:
        # An entry in a file that the server refuses would take the other keys along.
        found = _keys_file(file, may_be_empty=True) if file.exists() else KeysFile()
        present = found.keys
        there = [known.name for known in found.roles]
        for wrong in set(key.roles) - set(there):
            raise typer.BadParameter(
                f"{file} has no role {wrong}: {hint(wrong, there)}; "
                f'write it there first: [[roles]], name = "{wrong}", verbs = ["analyze"] (roles.md)'
            )
        try:
            with open(file, "a", encoding="utf-8", opener=_private) as stream:
                stream.write(("\n" if stream.tell() else "") + key.entry())
        except OSError as error:
            typer.echo(f"facelane-server: {file}: cannot be written: {error.strerror}", err=True)
            raise typer.Exit(EX_CONFIG) from None
        same = sum(other.name == name for other in present)
        if same:
            typer.echo(f"{name} has {same + 1} keys now; each counts until it is removed", err=True)
        typer.echo(f"added to {file}; it counts after {_AFTER}", err=True)
    if scopes:
        verbs = sorted(key.caller().verbs)
        typer.echo(f"its scopes stand for the verbs: {', '.join(verbs) or 'none'}", err=True)
    typer.echo(secret)


_AFTER: Final = (
    "a reload (SIGHUP) of the server, or after a restart where systemd lends it a copy of the file"
)


@keys_app.command("list")
def keys_list(file: Annotated[Path, typer.Argument(help="The keys file.")]) -> None:
    """Who has a key, for what, and until when."""
    found = _keys_file(file)
    roles = found.by_name
    names = [*(key.name for key in found.keys), *(one.name for one in found.certificates)]
    width = max(map(len, names))
    for key in found.keys:
        bounds = [
            f"{what} {', '.join(names)}"
            for what, names in (("sources", key.sources), ("galleries", key.galleries))
            if names
        ]
        if key.expires is not None:
            bounds.append(f"{'expired' if key.expired else 'until'} {key.expires:%Y-%m-%d}")
        if key.roles:
            bounds.insert(0, f"roles {', '.join(key.roles)}")
        if key.scopes:
            bounds.insert(0, f"scopes {', '.join(key.scopes)}")
        verbs = ", ".join(sorted(key.caller(roles).verbs)) or "nothing"
        line = f"{key.name:<{width}}  sha256 {key.sha256[:12]}"
        typer.echo("  ".join([line, *bounds, f"may {verbs}"]))
    for one in found.certificates:
        line = f"{one.name:<{width}}  certificate {one.san}  roles {', '.join(one.roles)}"
        verbs = ", ".join(sorted({verb for name in one.roles for verb in roles[name].verbs}))
        typer.echo(f"{line}  may {verbs or 'nothing'}")


@keys_app.command("remove")
def keys_remove(
    name: Annotated[str, typer.Argument(help="Whose keys to remove.")],
    file: Annotated[Path, typer.Argument(help="The keys file.")],
    sha256: Annotated[
        str, typer.Option(help="Only the key whose hash begins so (`keys list` shows it).")
    ] = "",
) -> None:
    """Take a key away. Its open streams end within a second of the reload."""
    keys = _keys_of(file)
    gone = [key for key in keys if key.name == name and key.sha256.startswith(sha256)]
    if not gone:
        typer.echo(f"facelane-server: {file} has no such key; see `keys list`", err=True)
        raise typer.Exit(EX_CONFIG)
    hashes = {key.sha256 for key in gone}
    # By blocks, so that what people noted beside the others stays.
    head, *blocks = re.split(r"(?m)^(?=\s*\[\[keys\]\])", file.read_text(encoding="utf-8"))
    kept = [b for b in blocks if not any(f'"{digest}"' in b for digest in hashes)]
    left = head + "".join(kept)
    fresh = file.with_name(f".{file.name}.new")
    try:
        status = file.stat()
        with open(fresh, "w", encoding="utf-8", opener=_private) as stream:
            stream.write(left)
            os.fchmod(stream.fileno(), status.st_mode & 0o777)
            if os.geteuid() == 0:
                os.fchown(stream.fileno(), status.st_uid, status.st_gid)
            os.fsync(stream.fileno())
        fresh.replace(file)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        typer.echo(f"facelane-server: {file}: cannot be written: {error.strerror}", err=True)
        raise typer.Exit(EX_CONFIG) from None
    typer.echo(f"removed {len(gone)} of {len(keys)}; gone after {_AFTER}", err=True)
    if not kept:
        typer.echo("none is left: the server refuses a file without keys", err=True)


@keys_app.command("rotate-master")
def keys_rotate_master(config: ConfigOption = None) -> None:
    """Put another master key in the place of the one that locks the store, in two steps with a
    reload of the server between them; nothing ends meanwhile."""
    loaded = _load(config)
    from facelane_server.store.opening import key_source, open_store, place_of
    from facelane_server.store.vault import locked_by

    try:
        source = key_source(loaded, look=True)
        if source is None:
            raise configuration.ConfigError("the store is not encrypted")
        with contextlib.closing(open_store(place_of(loaded), look=True)) as database:
            in_use = locked_by(database)
        if not in_use:
            raise configuration.ConfigError("the store is not encrypted")
        begun = source.rotate(in_use)
    except (configuration.ConfigError, FacelaneError) as error:
        typer.echo(f"facelane-server: {error}", err=True)
        raise typer.Exit(EX_CONFIG) from None
    if begun:
        typer.echo(
            f"{source.name} holds a new key and the old one: reload the server (SIGHUP), then call "
            "this again; keep a copy of the new key elsewhere",
            err=True,
        )
    else:
        typer.echo(f"the old key is taken out of {source.name}: destroy its copies", err=True)


@keys_app.command("deny")
def keys_deny(
    word: Annotated[
        str,
        typer.Argument(
            help="A key's name, its sha256 (12 digits are enough), or a name in a "
            "client certificate."
        ),
    ],
    file: Annotated[
        Path, typer.Argument(help="The list: auth.denied_file, or the keys file with .denied.")
    ],
) -> None:
    """Let somebody in nowhere from now on. No reload is needed: the server looks at the list twice
    a second and ends what is open, even where the keys file cannot be read."""
    if not word.strip() or not word.isprintable() or "#" in word:
        raise typer.BadParameter("a name, a hash, or a name in a certificate")
    try:
        text = file.read_bytes() if file.exists() else b""
        with open(file, "ab", opener=_readable) as stream:
            stream.write((b"\n" if text and not text.endswith(b"\n") else b"") + word.encode())
            stream.write(b"\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        typer.echo(f"facelane-server: {file}: cannot be written: {error.strerror}", err=True)
        raise typer.Exit(EX_CONFIG) from None
    typer.echo(f"denied; take the line out of {file} to undo it", err=True)


def _keys_of(file: Path) -> tuple[Key, ...]:
    return _keys_file(file).keys


def _keys_file(file: Path, *, may_be_empty: bool = False) -> KeysFile:
    from facelane_server.edge.auth import read_file

    try:
        return read_file(file, may_be_empty=may_be_empty)
    except configuration.ConfigError as error:
        typer.echo(f"facelane-server: {error}", err=True)
        raise typer.Exit(EX_CONFIG) from None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _readable(path: str, flags: int) -> int:
    # No secrets: names and hashes, which the service's own user must be able to read.
    return os.open(path, flags, 0o644)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def whole() -> typer.Typer:
    """The command with ``models``, ``audit`` and the like, which a server that runs has no need of,
    nor whoever asks for a command beside them: no torch until a model is loaded."""
    if any(group.name == "models" for group in app.registered_groups):
        return app
    from facelane_server.auditing import app as audit_app
    from facelane_server.calibrating import app as liveness_app
    from facelane_server.erasing import app as erasure_app
    from facelane_server.exporting import app as subjects_app
    from facelane_server.modeltools.cli import app as models_app

    app.add_typer(models_app, name="models")
    app.add_typer(audit_app, name="audit")
    app.add_typer(liveness_app, name="liveness")
    app.add_typer(erasure_app, name="erasure")
    app.add_typer(subjects_app, name="subjects")
    return app


def _open_standard_streams() -> None:
    """Whoever starts us may have closed them: else the next file that is opened, the gallery's
    for instance, would get their number and be written to by whatever prints."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a name that a terminal cannot show
    lines = io.BufferedWriter(_Unfailing(2, "w", closefd=False))
    told = sys.stderr.encoding
    sys.stderr = io.TextIOWrapper(lines, told, "backslashreplace", line_buffering=True)


class _Unfailing(io.FileIO):
    """Standard error: what nobody hears, as on a full disk, is lost. The exit code says it too."""

    def write(self, data: ReadableBuffer) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _of_its_own() -> set[str]:
    """What the command can do before ``whole`` has added to it."""
    commands = {
        (one.name or one.callback.__name__).replace("_", "-")
        for one in app.registered_commands
        if one.callback
    }
    return commands | {one.name for one in app.registered_groups if one.name}


def main() -> None:
    _open_standard_streams()
    command = app if _of_its_own().intersection(sys.argv[1:2]) else whole()
    command()
