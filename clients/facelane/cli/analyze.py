"""``facelane analyze``: a source through a stream."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Self

import typer

import facelane
from facelane import types
from facelane.cli import output
from facelane.cli.base import OK, PARTLY, Format, FormatOption, GalleryOption, progress
from facelane.cli.sources import (
    Item,
    Source,
    SourceError,
    open_source,
    passed_over_words,
    without_credentials,
)

_STREAM_BUFFER = 32
"""Frames that are kept for drawing until their outcome is there, at least the window."""
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
        target = self._path
        if self._folder:
            target /= Path(name).name
            if target.suffix.lower() not in _WRITTEN_SUFFIXES:
                target = target.with_name(f"{target.name}.jpg")
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
    if not folder and out.suffix.lower() not in _WRITTEN_SUFFIXES:
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
    bar, task = progress("analysing", min(source.total, limit) if limit else source.total)
    with client.analyze_stream(**options) as stream:
        feeder = _Feeder(source, stream, limit)
        try:
            with feeder, bar:
                for outcome in stream:
                    item = feeder.pending.pop(outcome.frame_id)
                    bar.advance(task)
                    if as_lines:
                        output.outcome_line(outcome, item.name if source.stills else "")
                    if outcome.error is not None:
                        words = f"{outcome.error.reason}: {outcome.error.message}"
                        failures.append((item.name, words))
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
        over = [{"source": name, "why": why} for name, why in source.passed_over]
        output.json_line(
            "summary", summary, not_sent=feeder.not_sent, seconds=seconds, passed_over=over
        )
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
    return bool(failures or summary.errors)
