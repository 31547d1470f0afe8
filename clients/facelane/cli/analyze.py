"""``facelane analyze``: a source through a stream."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from rich.console import Console
from rich.live import Live

import facelane
from facelane import lines, types
from facelane.cli import output
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
from facelane.cli.sources import (
    Item,
    Source,
    SourceError,
    Video,
    name_of,
    open_source,
    passed_over_words,
    without_credentials,
)

_STREAM_BUFFER = 32
"""Frames that are kept for drawing until their outcome is there, at least the window."""
_LOOK_INTERVAL = 0.25
_LOOK_TRACKS = 20
_VIDEO_REFUSALS = ("ENCODING_UNSUPPORTED", "VIDEO_UNSUPPORTED", "PICTURE_TOO_LARGE")
_WRITTEN_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_JOIN_TIMEOUT = 12.0
"""Seconds for the reading thread to end; above the read timeout of a camera."""


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
    source_id: Annotated[
        str, typer.Option(help="What the source is called in results, events and logs.")
    ] = "",
    overload: Annotated[
        types.Overload | None,
        typer.Option(help="Lossless for files, latest_wins for live sources unless given."),
    ] = None,
    video: Annotated[
        Video,
        typer.Option(
            help="H.264 and H.265 of files and RTSP cameras: as they are where the server "
            "takes them so, else as JPEG; with --out always decoded."
        ),
    ] = Video.AUTO,
    analysis_fps: Annotated[
        float, typer.Option(min=0, help="Pictures a second that are analysed; 0 = all.")
    ] = 0,
    credentials_file: Annotated[
        Path | None, typer.Option(help="Holds user:password of an RTSP camera.")
    ] = None,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Play a video at its own pace, as a camera would.")
    ] = False,
    gallery: GalleryOption = "default",
    max_faces: Annotated[int, typer.Option(min=0, help="0 = the server's limit.")] = 0,
    max_candidates: Annotated[
        int, typer.Option(min=0, max=10, help="The nearest subjects to list for each face.")
    ] = 0,
    min_face_size: Annotated[int, typer.Option(min=0, help="In pixels.")] = 0,
    false_naming: FalseNamingOption = None,
    match_threshold: MatchThresholdOption = None,
    skip_recognition: Annotated[
        bool, typer.Option("--skip-recognition", help="Do not say who.")
    ] = False,
    skip_liveness: Annotated[
        bool, typer.Option("--skip-liveness", help="Do not say whether live.")
    ] = False,
    max_frames: Annotated[int, typer.Option(min=0, help="Stop after so many; 0 = all.")] = 0,
    reconnect: Annotated[
        bool, typer.Option("--reconnect", help="Come back after a broken connection.")
    ] = False,
) -> None:
    """Find the faces of a source, and say who they are, how trustworthy, and whether live."""
    if without_credentials(source) != source:
        typer.echo(
            "facelane: the address holds a password, which every user of this machine can read "
            "while this runs; --credentials-file takes it from a file",
            err=True,
        )
    given: Any = {
        "realtime": realtime,
        "want_pixels": out is not None,
        "credentials_file": credentials_file,
    }
    opened = open_source(source, video=video, **given)
    try:
        sink = _sink(opened, source, out)
    except BaseException:
        opened.close()
        raise
    options: types.StreamOptions = {
        "source_id": source_id or name_of(source),
        "gallery": gallery,
        "max_faces": max_faces,
        "max_candidates": max_candidates,
        "min_face_size": min_face_size,
        "false_naming": false_naming,
        "match_threshold": match_threshold,
        "skip_recognition": skip_recognition,
        "skip_liveness": skip_liveness,
        "disable_tracking": opened.stills,
        "analysis_fps": analysis_fps,
        "overload": overload
        or (types.Overload.LATEST_WINS if opened.live else types.Overload.LOSSLESS),
        "buffer": _STREAM_BUFFER,
        "reconnect": facelane.Reconnect() if reconnect else None,
    }
    with contextlib.closing(sink), ctx.obj.client() as client:
        try:
            with contextlib.closing(opened):
                failed = _analyze(client, opened, options, output_format, sink, max_frames)
        except _NeedsPicturesError as why:
            if video is Video.PASS:
                raise SourceError(f"the server takes no video: {why}") from None
            typer.echo(f"facelane: the video is decoded here: {why}", err=True)
            with contextlib.closing(open_source(source, **given)) as decoded:
                failed = _analyze(client, decoded, options, output_format, sink, max_frames)
    raise typer.Exit(PARTLY if failed else OK)


class _NeedsPicturesError(Exception):
    """The server takes no access units."""


class _Sink:
    """Where annotated frames go: nowhere."""

    end = 0.0
    """Media time of the last frame that there was, in seconds."""

    def write(self, _name: str, _pixels: Any, _offset: float) -> None:
        """Takes one frame."""

    def close(self) -> None:
        """Finishes the file."""


class _PictureSink(_Sink):
    def __init__(self, path: Path, folder: bool) -> None:
        self._path = path
        self._folder = folder
        if folder:
            path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, pixels: Any, _offset: float) -> None:
        target = self._path
        if self._folder:
            target /= Path(name).name
            if target.suffix.lower() not in _WRITTEN_SUFFIXES:
                target = target.with_name(f"{target.name}.jpg")
        output.write_picture(target, pixels)


class _VideoSink(_Sink):
    def __init__(self, path: Path, fps: float) -> None:
        self._writer = output.VideoWriter(path, fps)

    def write(self, _name: str, pixels: Any, offset: float) -> None:
        self._writer.write(pixels, offset)

    def close(self) -> None:
        self._writer.close(self.end)


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
    if not folder and out.suffix.lower() not in _WRITTEN_SUFFIXES:
        raise SourceError(f"{out}: an annotated picture is written as .jpg, .png or .webp")
    return _PictureSink(out, folder)


class _Feeder:
    """The thread that reads the source and sends; keeps what the outcomes refer to.

    ``pending`` is bounded by the stream's buffer: an entry is made just before its frame
    takes a place, and taken out with its outcome.
    """

    def __init__(
        self,
        source: Source,
        stream: facelane.AnalyzeStream,
        limit: int,
        camera: str,
    ) -> None:
        self._source = source
        self._stream = stream
        self._limit = limit
        self._camera = camera
        self.pending: dict[int, Item] = {}
        self.aside: deque[lines.DropLine | lines.ErrorLine] = deque()
        """What became of frames that were not sent, in their order."""
        self.read = 0
        self.end = 0.0
        self.not_sent = 0
        self.unreadable: list[tuple[str, str]] = []
        self.unreadable_reasons: list[str] = []
        self.failure: BaseException | None = None
        self._missed = 0
        self._gap = False
        """Of video, what comes before the next key frame is worth nothing."""
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
                self.read = number
                self.end = item.stream_offset or self.end
                self._send(number, item)
                if number == self._limit:
                    break
            self._tell_missed(self.read + 1)
        except facelane.FacelaneError as error:
            if not self._stream.ended:
                self.failure = error
        except BaseException as error:
            self.failure = error
        self._stream.close_send()

    def _send(self, number: int, item: Item) -> None:
        if item.picture is None:
            self._unreadable(number, item.name, facelane.Reason.PICTURE_CORRUPT, item.error)
            return
        self._gap = self._gap and not item.is_key
        if self._gap:
            self._not_sent()
            return
        self.pending[number] = item
        given: Any = {
            "stream_offset": item.stream_offset,
            "capture_time": item.capture_time,
            "frame_id": number,
        }
        try:
            if not self._source.live:
                self._stream.send(item.picture, **given, timeout=math.inf)
                return
            sent = self._stream.try_send(item.picture, **given)
        except facelane.PictureError as error:
            del self.pending[number]
            self._unreadable(number, item.name, error.reason, error.message)
            return
        if sent is None:
            del self.pending[number]
            self._gap = item.picture.encoding.is_video
            self._not_sent()
        else:
            self._tell_missed(number)

    def _not_sent(self) -> None:
        self.not_sent += 1
        self._missed += 1

    def before(self, number: float) -> Iterator[lines.Line]:
        """Takes what became of frames before ``number``."""
        while self.aside and self.aside[0].frame_id < number:
            yield self.aside.popleft()

    def _unreadable(self, number: int, name: str, reason: str, message: str) -> None:
        self.unreadable.append((name, message))
        self.unreadable_reasons.append(str(reason))
        self.aside.append(
            lines.ErrorLine(
                time=lines.now_utc(), camera=self._camera, frame_id=number, reason=reason,
                message=message, retryable=False, source=name,
            )
        )  # fmt: skip

    def _tell_missed(self, number: int) -> None:
        """Frames before ``number`` were dropped here."""
        missed, self._missed = self._missed, 0
        if missed:
            self.aside.append(
                lines.DropLine(
                    time=lines.now_utc(), camera=self._camera, frame_id=number - missed,
                    count=missed, reason=facelane.Reason.WINDOW_FULL, where="client",
                )
            )  # fmt: skip


class _Watch:
    """What people see while a camera runs: the tracks seen last, a few times a second."""

    def __init__(self, console: Console, book: output.TrackBook) -> None:
        self._book = book
        self._due = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._live.stop()

    def look(self) -> None:
        """There may be something new."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + _LOOK_INTERVAL
            self._live.update(self._book.table(_LOOK_TRACKS), refresh=True)


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
    camera = options["source_id"]
    book = output.TrackBook()
    rows: list[tuple[str, types.Face]] = []
    failures: list[tuple[str, str]] = []
    reasons: Counter[str] = Counter()
    decisions: Counter[str] = Counter()
    started = time.monotonic()

    def tell(line: lines.Line) -> None:
        if as_lines:
            output.write_line(line)

    with client.analyze_stream(**options) as stream:
        feeder = _Feeder(source, stream, limit, camera)
        watched = source.live and not as_lines and console.is_terminal
        watch = _Watch(console, book) if watched else None
        bar, task = progress("analysing", min(source.total, limit) if limit else source.total)
        try:
            with feeder, watch or bar:
                for outcome in stream:
                    item = feeder.pending.pop(outcome.frame_id)
                    if outcome.frame_id == 1:
                        _check_takes_video(outcome, item)
                    bar.advance(task)
                    for line in feeder.before(outcome.frame_id):
                        tell(line)
                    tell(output.outcome_line(outcome, camera, item.name if source.stills else ""))
                    if outcome.error is not None:
                        reasons[outcome.error.reason] += 1
                        words = f"{outcome.error.reason}: {outcome.error.message}"
                        failures.append((item.name, words))
                        del failures[100:]
                    if outcome.result is None:
                        continue
                    decisions.update(f.identity.decision.value for f in outcome.result.faces)
                    if source.stills:
                        rows.extend((item.name, face) for face in outcome.result.faces)
                    else:
                        book.add(outcome)
                    if watch is not None:
                        watch.look()
                    if item.pixels is not None:
                        pixels = output.draw(item.pixels, outcome.result)
                        sink.write(item.name, pixels, outcome.stream_offset)
        except KeyboardInterrupt:
            # A camera has no end of its own: this is how people end it.
            if not source.live:
                raise
        sink.end = feeder.end
        summary = stream.summary
    seconds = time.monotonic() - started
    if feeder.failure is not None and not feeder.read:
        raise feeder.failure
    failures.extend(feeder.unreadable)
    for line in feeder.before(math.inf):
        tell(line)
    if as_lines:
        for name, why in source.passed_over:
            tell(lines.PassedOverLine(time=lines.now_utc(), camera=camera, source=name, why=why))
        tell(_totals(camera, summary, feeder, reasons, decisions))
    else:
        if source.stills:
            several = source.total > 1
            console.print(output.faces_table(rows, names=several) if rows else "no faces")
        else:
            console.print(book.table())
        console.print(output.summary_words(summary, seconds, feeder.not_sent))
    for name, words in failures[:10]:
        err.print(f"facelane: {name}: {words}")
    if source.passed_over:
        err.print(f"facelane: {passed_over_words(source.passed_over).removeprefix('; ')}")
    if feeder.failure is not None:
        # A file that ends in the middle, a camera that went: what was found until then is told.
        raise feeder.failure
    # What was under way when a camera was interrupted is no failure.
    return bool(failures)


def _check_takes_video(outcome: types.Outcome, item: Item) -> None:
    """The first outcome tells whether the server takes access units."""
    is_video = item.picture is not None and item.picture.encoding.is_video
    if is_video and outcome.error is not None and outcome.error.reason in _VIDEO_REFUSALS:
        raise _NeedsPicturesError(outcome.error.message)


def _totals(
    camera: str,
    summary: types.StreamSummary,
    feeder: _Feeder,
    reasons: Counter[str],
    decisions: Counter[str],
) -> lines.SummaryLine:
    drops = dict(summary.drops_by_reason)
    if feeder.not_sent:
        drops[facelane.Reason.WINDOW_FULL.value] = feeder.not_sent
    unreadable = len(feeder.unreadable)
    if summary.errors > reasons.total():
        reasons[facelane.Reason.CANCELLED.value] += summary.errors - reasons.total()
    for reason in feeder.unreadable_reasons:
        reasons[reason] += 1
    counts: Any = {
        "frames": summary.received + feeder.not_sent + unreadable,
        "results": summary.results,
        "drops": summary.drops + feeder.not_sent,
        "errors": summary.errors + unreadable,
        "faces": summary.faces,
    }
    totals = lines.CameraTotals(
        **counts,
        openings=1,
        connections=summary.connections,
        drops_by_reason=drops,
        errors_by_reason=dict(reasons),
        decisions=dict(decisions),
        state="STOPPED" if feeder.failure is None else "FAILED",
    )
    return lines.SummaryLine(time=lines.now_utc(), cameras={camera: totals}, **counts)
