"""The commands about who can be recognised."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Self

import msgspec
import typer

import facelane
from facelane import lines, types
from facelane.cli import enrolment, output
from facelane.cli.base import (
    OK,
    PARTLY,
    FalseNamingOption,
    Format,
    FormatOption,
    GalleryOption,
    MatchThresholdOption,
    progress,
)
from facelane.cli.sources import SourceError
from facelane.cli.stills import load_picture
from facelane.cli.streams import shown

subjects_app = typer.Typer(no_args_is_help=True, help="Who can be recognised.")


def enroll(
    ctx: typer.Context,
    subject: Annotated[
        str, typer.Argument(metavar="SUBJECT|FOLDER", help="The subject's id; or a folder.")
    ],
    pictures: Annotated[
        list[Path] | None, typer.Argument(help="Pictures with the subject's face.")
    ] = None,
    display_name: Annotated[str, typer.Option(help="A name for people.")] = "",
    gallery: GalleryOption = "default",
    must_exist: Annotated[
        bool, typer.Option("--must-exist", help="Do not create the subject.")
    ] = False,
    allow_multiple_faces: Annotated[
        bool, typer.Option("--allow-multiple-faces", help="Take the largest face.")
    ] = False,
    require_live: Annotated[
        bool, typer.Option("--require-live", help="Refuse what is not judged a living face.")
    ] = False,
    skip_liveness: Annotated[bool, typer.Option("--skip-liveness", hidden=True)] = False,
    output_format: FormatOption = Format.table,
) -> None:
    """Teach the server faces. What is refused is told with its reason; the rest is kept.

    A folder alone holds one folder a subject, called as its id: FOLDER/grace/any.jpg. Done
    again, it adds what is new.
    """
    if pictures:
        plan = enrolment.plan_of(subject, display_name, pictures)
    elif not Path(subject).is_dir():
        raise SourceError(
            f"{subject} is no folder, and no pictures are given: say  facelane enroll SUBJECT "
            "PICTURE...  or  facelane enroll FOLDER  with a folder for each subject in it"
        )
    elif display_name:
        raise SourceError("--display-name is one subject's: give its id and its pictures")
    else:
        plan = enrolment.plan(Path(subject))
    bar, task = progress("enrolling", len(plan.wanted))
    report = enrolment.Report(plan, as_lines=output_format is Format.jsonl, grouped=not pictures)
    with ctx.obj.client() as client, bar:
        serving = enrolment.serving(client) if not pictures else ""
        for wanted in plan.wanted:
            report.take(
                enrolment.enrol(
                    client,
                    wanted,
                    serving,
                    create_subject=not must_exist,
                    gallery=gallery,
                    allow_multiple_faces=allow_multiple_faces,
                    skip_liveness=skip_liveness,
                    require_live=require_live,
                )
            )
            bar.advance(task)
    report.close()
    raise typer.Exit(report.exit_code)


def identify(
    ctx: typer.Context,
    pictures: Annotated[list[Path], typer.Argument(help="Pictures.")],
    gallery: GalleryOption = "default",
    candidates: Annotated[int, typer.Option(min=0, max=10, help="To list for each face.")] = 3,
    false_naming: FalseNamingOption = None,
    match_threshold: MatchThresholdOption = None,
    output_format: FormatOption = Format.table,
) -> None:
    """Say who the faces of pictures are (1:N)."""
    console, err = output.consoles()
    rows: list[tuple[str, types.Face]] = []
    failed = False
    with ctx.obj.client() as client:
        for path in pictures:
            try:
                faces = client.identify(
                    load_picture(path),
                    max_candidates=candidates,
                    gallery=gallery,
                    false_naming=false_naming,
                    match_threshold=match_threshold,
                )
            except (facelane.PictureError, OSError) as error:
                failed = True
                err.print(f"facelane: {shown(path)}: {error}")
                continue
            rows.extend((shown(path), face) for face in faces)
            if output_format is Format.jsonl:
                for face in faces:
                    flat = msgspec.structs.asdict(lines.face_line(face))
                    output.write_line(lines.IdentifiedFaceLine(source=shown(path), **flat))
    if output_format is Format.table:
        several = len(pictures) > 1
        console.print(output.faces_table(rows, names=several) if rows else "no faces")
    raise typer.Exit(PARTLY if failed else OK)


def verify(
    ctx: typer.Context,
    subject: Annotated[str, typer.Argument(help="The subject's id.")],
    picture: Annotated[Path, typer.Argument(help="A picture with one face.")],
    gallery: GalleryOption = "default",
    false_naming: FalseNamingOption = None,
    match_threshold: MatchThresholdOption = None,
    output_format: FormatOption = Format.table,
) -> None:
    """Say whether a picture shows the subject (1:1); exit code 1 when it does not."""
    console, _ = output.consoles()
    with ctx.obj.client() as client:
        answer = client.verify(
            subject,
            load_picture(picture),
            gallery=gallery,
            false_naming=false_naming,
            match_threshold=match_threshold,
        )
    if output_format is Format.jsonl:
        output.write_line(
            lines.VerificationLine(
                verified=answer.verified,
                similarity=answer.similarity,
                threshold=answer.threshold,
                face=lines.face_line(answer.face),
            )
        )
    else:
        face = answer.face
        console.print(
            f"{'verified' if answer.verified else 'not verified'}: similarity "
            f"{output.number(answer.similarity, 3)}, threshold {answer.threshold:.3f}, "
            f"OOD {output.number(face.ood_score)}, {face.identity.decision.value}, "
            f"{face.liveness.verdict.value}"
        )
    raise typer.Exit(OK if answer.verified else PARTLY)


@subjects_app.command("list")
def subjects_list(
    ctx: typer.Context,
    gallery: GalleryOption = "default",
    output_format: FormatOption = Format.table,
) -> None:
    """All subjects of a gallery."""
    console, _ = output.consoles()
    table = output.table_of(*_SUBJECT_TITLES, right=("templates",))
    count = 0
    with ctx.obj.client() as client:
        for subject in client.list_subjects(gallery=gallery):
            count += 1
            if output_format is Format.jsonl:
                output.json_line("subject", subject)
            else:
                table.add_row(*_subject_cells(subject))
    if output_format is Format.table:
        console.print(table if count else f"no subjects in gallery {gallery}")


_SUBJECT_TITLES = ("subject", "name", "templates", "updated", "labels")


def _subject_cells(subject: types.Subject) -> tuple[str, ...]:
    labels = ", ".join(f"{key}={value}" for key, value in sorted(subject.labels.items()))
    updated = subject.update_time.strftime("%Y-%m-%d %H:%M") if subject.update_time else ""
    return (
        subject.subject_id, subject.display_name, str(subject.template_count), updated, labels,
    )  # fmt: skip


@subjects_app.command("show")
def subjects_show(
    ctx: typer.Context,
    subject: Annotated[str, typer.Argument(help="The subject's id.")],
    gallery: GalleryOption = "default",
    output_format: FormatOption = Format.table,
) -> None:
    """One subject and its templates."""
    console, _ = output.consoles()
    with ctx.obj.client() as client:
        found = client.get_subject(subject, gallery=gallery)
        templates = client.list_templates(subject, gallery=gallery)
    if output_format is Format.jsonl:
        output.json_line("subject", found)
        for template in templates:
            output.json_line("template", template)
        return
    console.print(output.key_values(list(zip(_SUBJECT_TITLES, _subject_cells(found), strict=True))))
    table = output.table_of("template", "model", "OOD", "created", right=("OOD",))
    for template in templates:
        table.add_row(
            template.template_id,
            template.model_id,
            f"{template.ood_score:.2f}",
            template.create_time.strftime("%Y-%m-%d %H:%M") if template.create_time else "",
        )
    if templates:
        console.print(table)


@subjects_app.command("create")
def subjects_create(
    ctx: typer.Context,
    subject: Annotated[str, typer.Argument(help="The subject's id.")],
    display_name: Annotated[str, typer.Option(help="A name for people.")] = "",
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be given again.")
    ] = None,
    gallery: GalleryOption = "default",
) -> None:
    """A new subject without a face."""
    labels = {}
    for pair in label or []:
        key, separator, value = pair.partition("=")
        if not separator:
            raise typer.BadParameter(f"{pair!r}: give KEY=VALUE", param_hint="--label")
        labels[key] = value
    with ctx.obj.client() as client:
        made = client.create_subject(
            subject, display_name=display_name, labels=labels, gallery=gallery
        )
    typer.echo(f"created {made.subject_id}")


@subjects_app.command("delete")
def subjects_delete(
    ctx: typer.Context,
    subject: Annotated[str, typer.Argument(help="The subject's id.")],
    gallery: GalleryOption = "default",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    receipt: Annotated[
        Path | None, typer.Option(help="Keep the signed receipt in this new file.")
    ] = None,
) -> None:
    """Delete a subject and all its templates."""
    if receipt is not None and receipt.exists():
        raise typer.BadParameter(f"{receipt} is there already")
    if not yes:
        typer.confirm(f"Delete {subject} and all its templates?", abort=True)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(ctx.obj.client())
        # A receipt is given once: that there is room for it is known before.
        file = None if receipt is None else stack.enter_context(_Receipt(receipt))
        erased = client.erase_subject(subject, gallery=gallery)
        typer.echo(f"deleted {subject} and {erased.templates} templates")
        if file is not None:
            file.keep(erased.receipt)


class _Receipt:
    """A new file with room for a receipt; gone again where there is none. Raises OSError."""

    ROOM = 64 * 1024

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = False
        self._file = path.open("xb")

    def __enter__(self) -> Self:
        try:
            self._file.write(b"\n" * self.ROOM)
            self._file.flush()
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._file.close()
        if not self._kept:
            self._path.unlink(missing_ok=True)

    def keep(self, receipt: str) -> None:
        self._kept = True
        self._file.seek(0)
        self._file.write(receipt.encode() + b"\n")
        self._file.truncate()
        self._file.flush()
