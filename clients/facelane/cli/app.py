"""The commands. Each is a thin reading of its arguments around one use of the client."""

from __future__ import annotations

import contextlib
import enum
import math
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, Self

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from typer.core import TyperGroup

import facelane
from facelane import types
from facelane.cli import output
from facelane.cli.sources import (
    Item,
    Source,
    SourceError,
    load_picture,
    open_source,
    without_credentials,
)
from facelane.transport import read_token

OK: Final = 0
PARTLY: Final = 1
USAGE: Final = 2
REFUSED: Final = 3
UNREACHABLE: Final = 4
INTERRUPTED: Final = 130

_EPILOG = (
    "Exit codes: 0 done, 1 done in part or answered no (some pictures failed, not verified, "
    "not serving), 2 wrong usage or an unreadable file, 3 refused by the server, "
    "4 the server cannot be reached or cannot serve, 130 interrupted."
)
_STREAM_BUFFER = 32
"""Frames that are kept for drawing until their outcome is there, at least the window."""
_JOIN_TIMEOUT = 12.0
"""Seconds for the reading thread to end; above the read timeout of a camera."""


class Format(enum.StrEnum):
    table = "table"
    jsonl = "jsonl"


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"facelane: {' '.join(message.split())}\n")
    raise typer.Exit(code)


class _Commands(TyperGroup):
    """The one place where errors become a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our stdout went away (`| head`): nothing is left to say.
            sys.stdout = None
            raise typer.Exit(OK) from None
        except (facelane.UnavailableError, facelane.DeadlineExceededError) as error:
            _fail(str(error), UNREACHABLE)
        except facelane.FacelaneError as error:
            _fail(str(error), REFUSED)
        except (SourceError, OSError) as error:
            _fail(str(error), USAGE)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    epilog=_EPILOG,
    pretty_exceptions_enable=False,
    help="Faces in pictures, videos and cameras, through a facelane server.",
)
subjects_app = typer.Typer(no_args_is_help=True, help="Who can be recognised.")
server_app = typer.Typer(no_args_is_help=True, help="The server: state and administration.")
app.add_typer(subjects_app, name="subjects")
app.add_typer(server_app, name="server")


@dataclass(frozen=True, slots=True)
class _Access:
    target: str | None
    token_file: Path | None
    tls_ca: Path | None
    timeout: float

    @contextlib.contextmanager
    def client(self) -> Iterator[facelane.Client]:
        try:
            token = None if self.token_file is None else read_token(self.token_file)
            tls = None if self.tls_ca is None else facelane.Tls(ca_file=self.tls_ca)
            made = facelane.Client(self.target, token=token, tls=tls, timeout=self.timeout)
        except facelane.ArgumentError as error:
            # No server has refused anything yet.
            raise SourceError(error.message) from None
        with made as client:
            yield client


def _version(asked: bool) -> None:
    if asked:
        typer.echo(facelane.__version__)
        raise typer.Exit(OK)


@app.callback()
def _options(
    ctx: typer.Context,
    target: Annotated[
        str | None,
        typer.Option(
            envvar="FACELANE_TARGET",
            help="host:port or unix:/path of the server.",
            show_default="127.0.0.1:50151",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(envvar="FACELANE_TOKEN_FILE", help="File that holds the access token."),
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(envvar="FACELANE_TLS_CA", help="CA file (PEM); turns TLS on."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds for one call.")] = 10.0,
    _show_version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    ctx.obj = _Access(target, token_file, tls_ca, timeout)


GalleryOption = Annotated[str, typer.Option(help="The gallery.")]
FormatOption = Annotated[
    Format, typer.Option("--format", "-f", help="A table for people, JSON lines for programs.")
]


def _progress(what: str, total: int) -> tuple[Progress, Any]:
    """A bar on stderr; silent where nobody looks at it."""
    _, err = output.consoles()
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    return bar, bar.add_task(what, total=total or None)


# analyze


@app.command()
def analyze(
    ctx: typer.Context,
    source: Annotated[
        str, typer.Argument(help="A picture, video, folder of pictures, camera (0) or URL.")
    ],
    output_format: FormatOption = Format.table,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Annotated copy: .mp4, .jpg, .png; a folder for a folder."
        ),
    ] = None,
    overload: Annotated[
        types.Overload | None,
        typer.Option(help="Lossless for files, latest_wins for live sources unless given."),
    ] = None,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Play a video at its own pace, as a camera would.")
    ] = False,
    gallery: GalleryOption = "default",
    max_faces: Annotated[int, typer.Option(min=0, help="0 = the server's limit.")] = 0,
    max_candidates: Annotated[int, typer.Option(min=0, max=10)] = 0,
    min_face_size: Annotated[int, typer.Option(min=0, help="In pixels.")] = 0,
    skip_recognition: Annotated[bool, typer.Option("--skip-recognition")] = False,
    skip_liveness: Annotated[bool, typer.Option("--skip-liveness")] = False,
    max_frames: Annotated[int, typer.Option(min=0, help="Stop after so many; 0 = all.")] = 0,
    reconnect: Annotated[
        bool, typer.Option("--reconnect", help="Come back after a broken connection.")
    ] = False,
) -> None:
    """Find the faces of a source, and say who they are, how trustworthy, and whether live."""
    if without_credentials(source) != source:
        typer.echo(
            "facelane: the address holds a password, which every user of this machine can read "
            "while this runs; facelane-bridge takes it from a file",
            err=True,
        )
    opened = open_source(source, realtime=realtime, want_pixels=out is not None)
    try:
        sink = _sink(opened, source, out)
    except BaseException:
        opened.close()
        raise
    options: types.StreamOptions = {
        "gallery": gallery,
        "max_faces": max_faces,
        "max_candidates": max_candidates,
        "min_face_size": min_face_size,
        "skip_recognition": skip_recognition,
        "skip_liveness": skip_liveness,
        "disable_tracking": opened.stills,
        "overload": overload
        or (types.Overload.LATEST_WINS if opened.live else types.Overload.LOSSLESS),
        "buffer": _STREAM_BUFFER,
        "reconnect": facelane.Reconnect() if reconnect else None,
    }
    with contextlib.closing(opened), contextlib.closing(sink), ctx.obj.client() as client:
        failed = _analyze(client, opened, options, output_format, sink, max_frames)
    raise typer.Exit(PARTLY if failed else OK)


class _Sink:
    """Where annotated frames go: nowhere."""

    def write(self, _name: str, _pixels: Any) -> None:
        """Takes one frame."""

    def close(self) -> None:
        """Finishes the file."""


class _PictureSink(_Sink):
    def __init__(self, path: Path, folder: bool) -> None:
        self._path = path
        self._folder = folder
        if folder:
            path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, pixels: Any) -> None:
        target = self._path / Path(name).name if self._folder else self._path
        output.write_picture(target, pixels)


class _VideoSink(_Sink):
    def __init__(self, path: Path, fps: float) -> None:
        self._writer = output.VideoWriter(path, fps)

    def write(self, _name: str, pixels: Any) -> None:
        self._writer.write(pixels)

    def close(self) -> None:
        self._writer.close()


def _sink(source: Source, text: str, out: Path | None) -> _Sink:
    if out is None:
        return _Sink()
    if not source.stills:
        if out.suffix.lower() not in (".mp4", ".mkv", ".mov"):
            raise SourceError(f"{out}: an annotated video is written as .mp4, .mkv or .mov")
        if not out.parent.is_dir():
            raise SourceError(f"{out.parent} does not exist: create the folder first")
        return _VideoSink(out, source.fps)
    folder = Path(text).is_dir()
    if not folder and out.suffix.lower() not in (".jpg", ".jpeg", ".png", ".webp"):
        raise SourceError(f"{out}: an annotated picture is written as .jpg, .png or .webp")
    return _PictureSink(out, folder)


class _Feeder:
    """The thread that reads the source and sends; keeps what the outcomes refer to.

    ``pending`` is bounded by the stream's buffer: an entry is made just before its frame
    takes a place, and taken out with its outcome.
    """

    def __init__(self, source: Source, stream: facelane.AnalyzeStream, limit: int) -> None:
        self._source = source
        self._stream = stream
        self._limit = limit
        self.pending: dict[int, Item] = {}
        self.not_sent = 0
        self.unreadable: list[Item] = []
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="facelane-feeder", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stream.close()
        self._thread.join(_JOIN_TIMEOUT)

    def _run(self) -> None:
        try:
            for number, item in enumerate(self._source.items(), 1):
                self._send(number, item)
                if number == self._limit:
                    break
        except facelane.FacelaneError as error:
            if not self._stream.ended:
                self.failure = error
        except BaseException as error:
            self.failure = error
        self._stream.close_send()

    def _send(self, number: int, item: Item) -> None:
        if item.picture is None:
            self.unreadable.append(item)
            return
        self.pending[number] = item
        try:
            if not self._source.live:
                self._stream.send(
                    item.picture,
                    stream_offset=item.stream_offset,
                    capture_time=item.capture_time,
                    frame_id=number,
                    timeout=math.inf,
                )
                return
            sent = self._stream.try_send(
                item.picture,
                stream_offset=item.stream_offset,
                capture_time=item.capture_time,
                frame_id=number,
            )
        except facelane.PictureError as error:
            del self.pending[number]
            self.unreadable.append(Item(item.name, None, error=error.message))
            return
        if sent is None:
            del self.pending[number]
            self.not_sent += 1


def _analyze(
    client: facelane.Client,
    source: Source,
    options: types.StreamOptions,
    output_format: Format,
    sink: _Sink,
    limit: int,
) -> bool:
    """Runs a source through a stream; true when something of it failed."""
    console, err = output.consoles()
    as_lines = output_format is Format.jsonl
    book = output.TrackBook()
    rows: list[tuple[str, types.Face]] = []
    failures: list[tuple[str, str]] = []
    started = time.monotonic()
    bar, task = _progress("analysing", min(source.total, limit) if limit else source.total)
    with (
        client.analyze_stream(**options) as stream,
        _Feeder(source, stream, limit) as feeder,
        bar,
    ):
        try:
            for outcome in stream:
                item = feeder.pending.pop(outcome.frame_id)
                bar.advance(task)
                if as_lines:
                    output.outcome_line(outcome, item.name if source.stills else "")
                if outcome.error is not None:
                    failures.append((item.name, f"{outcome.error.reason}: {outcome.error.message}"))
                    del failures[100:]
                if outcome.result is None:
                    continue
                if source.stills:
                    rows.extend((item.name, face) for face in outcome.result.faces)
                else:
                    book.add(outcome)
                if item.pixels is not None:
                    sink.write(item.name, output.draw(item.pixels, outcome.result))
        except KeyboardInterrupt:
            # A camera has no end of its own: this is how people end it.
            if not source.live:
                raise
        summary = stream.summary
    seconds = time.monotonic() - started
    if feeder.failure is not None:
        raise feeder.failure
    failures.extend((item.name, item.error) for item in feeder.unreadable)
    if as_lines:
        for item in feeder.unreadable:
            output.json_line("unreadable", source=item.name, error=item.error)
        output.json_line("summary", summary, not_sent=feeder.not_sent, seconds=seconds)
    else:
        if source.stills:
            several = source.total > 1
            console.print(output.faces_table(rows, names=several) if rows else "no faces")
        else:
            console.print(book.table())
        console.print(output.summary_words(summary, seconds, feeder.not_sent))
    for name, words in failures[:10]:
        err.print(f"facelane: {name}: {words}", markup=False)
    return bool(failures or summary.errors)


# The gallery.


@app.command()
def enroll(
    ctx: typer.Context,
    subject: Annotated[str, typer.Argument(help="The subject's id.")],
    pictures: Annotated[list[Path], typer.Argument(help="Pictures with the subject's face.")],
    display_name: Annotated[str, typer.Option(help="A name for people.")] = "",
    gallery: GalleryOption = "default",
    must_exist: Annotated[
        bool, typer.Option("--must-exist", help="Do not create the subject.")
    ] = False,
    allow_multiple_faces: Annotated[
        bool, typer.Option("--allow-multiple-faces", help="Take the largest face.")
    ] = False,
    skip_liveness: Annotated[
        bool, typer.Option("--skip-liveness", help="For pictures of documents.")
    ] = False,
) -> None:
    """Teach the server a face. What is refused is told with its reason; the rest is kept."""
    console, err = output.consoles()
    refused = 0
    bar, task = _progress("enrolling", len(pictures))
    with ctx.obj.client() as client, bar:
        for path in pictures:
            try:
                done = client.enroll(
                    subject,
                    load_picture(path),
                    create_subject=not must_exist,
                    display_name=display_name,
                    gallery=gallery,
                    allow_multiple_faces=allow_multiple_faces,
                    skip_liveness=skip_liveness,
                )
            except (facelane.EnrollmentRefusedError, facelane.PictureError) as error:
                refused += 1
                err.print(f"facelane: {path}: {error}", markup=False)
            else:
                console.print(
                    f"{path}: enrolled as {done.subject.subject_id} "
                    f"(template {done.template.template_id}, OOD {done.template.ood_score:.2f}, "
                    f"{done.subject.template_count} in all)",
                    markup=False,
                )
            bar.advance(task)
    if refused:
        raise typer.Exit(PARTLY if refused < len(pictures) else REFUSED)


@app.command()
def identify(
    ctx: typer.Context,
    pictures: Annotated[list[Path], typer.Argument(help="Pictures.")],
    gallery: GalleryOption = "default",
    candidates: Annotated[int, typer.Option(min=0, max=10, help="To list for each face.")] = 3,
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
                    load_picture(path), max_candidates=candidates, gallery=gallery
                )
            except facelane.PictureError as error:
                failed = True
                err.print(f"facelane: {path}: {error}", markup=False)
                continue
            rows.extend((str(path), face) for face in faces)
            if output_format is Format.jsonl:
                for face in faces:
                    output.json_line("face", face, source=str(path))
    if output_format is Format.table:
        several = len(pictures) > 1
        console.print(output.faces_table(rows, names=several) if rows else "no faces")
    raise typer.Exit(PARTLY if failed else OK)


@app.command()
def verify(
    ctx: typer.Context,
    subject: Annotated[str, typer.Argument(help="The subject's id.")],
    picture: Annotated[Path, typer.Argument(help="A picture with one face.")],
    gallery: GalleryOption = "default",
    output_format: FormatOption = Format.table,
) -> None:
    """Say whether a picture shows the subject (1:1); exit code 1 when it does not."""
    console, _ = output.consoles()
    with ctx.obj.client() as client:
        answer = client.verify(subject, load_picture(picture), gallery=gallery)
    if output_format is Format.jsonl:
        output.json_line("verification", answer)
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
) -> None:
    """Delete a subject and all its templates."""
    if not yes:
        typer.confirm(f"Delete {subject} and all its templates?", abort=True)
    with ctx.obj.client() as client:
        count = client.delete_subject(subject, gallery=gallery)
    typer.echo(f"deleted {subject} and {count} templates")


# The server.


@server_app.command("info")
def server_info(ctx: typer.Context, output_format: FormatOption = Format.table) -> None:
    """Version, models and limits."""
    console, _ = output.consoles()
    with ctx.obj.client() as client:
        info = client.server_info()
        target = client.target
    if output_format is Format.jsonl:
        output.json_line("server", info)
        return
    limits = info.limits
    rows: list[tuple[str, object]] = [
        ("server", f"{target}, version {info.version}{', draining' if info.draining else ''}"),
        ("started", info.start_time.isoformat(" ", "seconds") if info.start_time else "-"),
        ("streams", f"{info.open_streams} of {limits.max_streams}, window {limits.window}"),
        ("frame", f"at most {limits.max_frame_bytes} bytes, {limits.max_pixels} pixels"),
    ]
    rows.extend(
        (m.task.value, f"{m.name} {m.version}{f' ({m.license})' if m.license else ''}")
        for m in info.models
    )
    console.print(output.key_values(rows))


@server_app.command("pools")
def server_pools(ctx: typer.Context, output_format: FormatOption = Format.table) -> None:
    """The pools and their workers."""
    console, _ = output.consoles()
    with ctx.obj.client() as client:
        pools = client.pools()
    if output_format is Format.jsonl:
        for pool in pools:
            output.json_line("pool", pool)
        return
    table = output.table_of(
        "pool", "state", "queued", "done", "failed", "model", right=("queued", "done", "failed")
    )
    workers = output.table_of(
        "worker", "state", "device", "pid", "restarts", "memory", "last loss",
        right=("pid", "restarts", "memory"),
    )  # fmt: skip
    for pool in pools:
        counts = (str(pool.queued), str(pool.completed), str(pool.failed))
        table.add_row(pool.pool, pool.state.value, *counts, pool.model_id)
        for worker in pool.workers:
            workers.add_row(
                worker.worker_id,
                worker.state.value,
                worker.device,
                str(worker.pid),
                str(worker.restarts),
                f"{worker.memory_bytes >> 20} MiB",
                worker.last_loss,
            )
    console.print(table)
    console.print()
    console.print(workers)


@server_app.command("health")
def server_health(
    ctx: typer.Context,
    service: Annotated[str, typer.Argument(help="A service; empty = the server in all.")] = "",
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for SERVING.")] = 0.0,
) -> None:
    """SERVING or not; exit code 1 when not."""
    with ctx.obj.client() as client:
        if wait:
            client.wait_until_serving(wait, service=service)
        status = client.health(service)
    typer.echo(status.value)
    raise typer.Exit(OK if status is types.HealthStatus.SERVING else PARTLY)


@server_app.command("drain")
def server_drain(
    ctx: typer.Context,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for open streams.")] = 30.0,
) -> None:
    """End the server; streams are told first."""
    with ctx.obj.client() as client:
        client.drain(grace)
    typer.echo(f"draining, the server ends within {grace:g} s")


@server_app.command("restart-worker")
def server_restart_worker(
    ctx: typer.Context,
    worker: Annotated[str, typer.Argument(help="pool#index, as `server pools` shows it.")],
) -> None:
    """Drain one worker and start it again."""
    with ctx.obj.client() as client:
        done = client.restart_worker(worker)
    typer.echo(f"{worker}: pid {done.old_pid} -> {done.new_pid}")


@server_app.command("reload")
def server_reload(
    ctx: typer.Context,
    pool: Annotated[str, typer.Argument(help="The pool.")],
    model: Annotated[str, typer.Argument(help="A package; empty = the present one again.")] = "",
) -> None:
    """Swap a pool's model without losing a frame."""
    with ctx.obj.client() as client:
        done = client.reload_model(pool, model)
    typer.echo(f"{pool}: {done.old_model_id} -> {done.new_model_id}")


@app.command()
def events(
    ctx: typer.Context,
    kind: Annotated[
        list[types.EventKind] | None, typer.Option(help="Only these; may be given again.")
    ] = None,
    resume_token: Annotated[str, typer.Option(help="Go on after this event.")] = "",
    count: Annotated[int, typer.Option(min=0, help="Stop after so many; 0 = never.")] = 0,
    output_format: FormatOption = Format.table,
) -> None:
    """Events as they happen, until interrupted; a broken connection is made again."""
    told = 0
    reconnect = facelane.Reconnect(max_attempts=10)
    with ctx.obj.client() as client:
        while True:
            try:
                with client.watch_events(resume_token, kind or (), reconnect=reconnect) as stream:
                    resume_token = ""
                    for event in stream:
                        if output_format is Format.jsonl:
                            output.json_line("event", event)
                        else:
                            typer.echo(_event_words(event))
                        told += 1
                        if told == count:
                            break
                return
            except facelane.HistoryLostError as error:
                if resume_token:
                    raise  # The one that was given: the caller wants to know.
                typer.echo(f"facelane: {error.message}", err=True)


def _event_words(event: types.Event) -> str:
    when = event.event_time.astimezone().strftime("%H:%M:%S") if event.event_time else "--:--:--"
    parts = [when, event.kind.value]
    if event.source_id:
        parts.append(f"source={event.source_id}")
    if event.track_id:
        parts.append(f"track={event.track_id}")
    if event.identity.subject_id:
        parts.append(f"subject={event.identity.subject_id}")
    if event.ood_score is not None:
        parts.append(f"ood={event.ood_score:.2f}")
    if event.pool:
        parts.append(f"pool={event.pool}")
    if event.message:
        parts.append(event.message)
    return " ".join(parts)
