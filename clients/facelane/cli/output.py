"""How results look: tables for people, JSON lines for programs, boxes on pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from facelane import lines, types
from facelane.cli.streams import speaks_unicode

_COLOURS: Final = {
    # Blue, green, red.
    types.Decision.MATCH: (80, 200, 80),
    types.Decision.AMBIGUOUS: (0, 200, 230),
    types.Decision.REJECTED_OOD: (160, 160, 160),
}
_OTHER_COLOUR: Final = (230, 160, 60)
_SPOOF_COLOUR: Final = (60, 60, 230)
_PIPE_WIDTH: Final = 1000
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_DECISION_STYLE: Final = {
    types.Decision.MATCH: "bold green",
    types.Decision.AMBIGUOUS: "yellow",
    types.Decision.REJECTED_OOD: "dim",
}


def consoles() -> tuple[Console, Console]:
    """Results go to the first (stdout), everything else to the second (stderr)."""
    return _console(stderr=False), _console(stderr=True)


class _Console(Console):
    """Prints names as they are: those of subjects, files and models may hold anything."""

    def __init__(self, *, stderr: bool) -> None:
        super().__init__(stderr=stderr, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        # A name that moves the cursor could make the terminal show anything.
        shown = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
        return super().render_str(shown, **options)

    def on_broken_pipe(self) -> None:
        # The commands know what that means; rich itself would exit with a code of its own.
        raise BrokenPipeError


def _console(*, stderr: bool) -> Console:
    console = _Console(stderr=stderr)
    if not console.is_terminal:
        # Nothing is folded for a pipe or a file: its reader looks for whole lines.
        console.width = _PIPE_WIDTH
    return console


def plain(value: object) -> Any:
    """A value of ``facelane.types`` as JSON knows it."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float):
        # Floats of the wire are single precision: further digits are noise.
        return round(value, 6)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def json_line(kind: str, value: object) -> None:
    """A value of ``facelane.types`` as one JSON line."""
    _write({"type": kind, **plain(value)})


def write_line(line: msgspec.Struct) -> None:
    """One of ``facelane.lines``."""
    _write(msgspec.to_builtins(line))


def _write(line: object) -> None:
    # Flushed: the reader may be a pipe that waits for it.
    text = json.dumps(line, ensure_ascii=not speaks_unicode(), separators=(",", ":"))
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def outcome_line(outcome: types.Outcome, camera: str, source: str) -> lines.Line:
    """The outcome of a frame; ``source`` is the file of a still."""
    common: Any = {"time": lines.now_utc(), "camera": camera, "frame_id": outcome.frame_id}
    match outcome.body:
        case types.FrameResult() as result:
            return lines.ResultLine(
                **common,
                offset_s=round(outcome.stream_offset, 3),
                captured=lines.utc(time.time() - outcome.round_trip),
                latency_ms=round(outcome.round_trip * 1e3, 2),
                age_ms=round(outcome.age * 1e3, 2),
                width=result.width,
                height=result.height,
                faces=tuple([lines.face_line(face) for face in result.faces]),
                missing_stages=tuple(stage.value for stage in result.missing_stages),
                stream_id=outcome.stream_id,
                source=source,
            )
        case types.FrameDrop(reason):
            return lines.DropLine(**common, count=1, reason=reason.value, where="server")
        case types.FrameError(reason, message, retryable):
            return lines.ErrorLine(
                **common, reason=reason, message=message, retryable=retryable, source=source
            )


def table_of(*titles: str, right: Sequence[str] = ()) -> Table:
    """A plain table; on a narrow terminal long cells are folded, never cut."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, justify="right" if title in right else "left", overflow="fold")
    return table


def number(value: float | None, digits: int = 2) -> str:
    """A figure for a table; absent is a dash, never a zero."""
    return "-" if value is None else f"{value:.{digits}f}"


def faces_table(rows: Iterable[tuple[str, types.Face]], *, names: bool = False) -> Table:
    """One row a face."""
    titles = ("decision", "subject", "similarity", "OOD", "liveness", "score", "box")
    table = table_of(*(["picture"] if names else []), *titles, right=("similarity", "OOD", "score"))
    for name, face in rows:
        identity, live, box = face.identity, face.liveness, face.box
        style = _DECISION_STYLE.get(identity.decision, "")
        cells: list[str | Text] = [
            Text(identity.decision.value, style=style),
            identity.subject_id or _nearest(identity),
            number(identity.similarity, 3),
            number(face.ood_score),
            f"{live.verdict.value} {number(live.score)}",
            number(face.score),
            f"{box.x:.0f},{box.y:.0f} {box.width:.0f}x{box.height:.0f}",
        ]
        table.add_row(*([name] if names else []), *cells)
    return table


def _nearest(identity: types.Identity) -> str:
    """For a face that was not named: who would have been next, marked as a question."""
    return f"({identity.candidates[0].subject_id}?)" if identity.candidates else ""


@dataclasses.dataclass(slots=True)
class _TrackRow:
    face: types.Face
    first: float
    last: float
    frames: int = 1


class TrackBook:
    """The tracks of a video in brief. Bounded: of more tracks only the count is kept."""

    LIMIT: Final = 1000

    def __init__(self) -> None:
        self._rows: dict[int, _TrackRow] = {}
        self.uncounted = 0

    def add(self, outcome: types.Outcome) -> None:
        for face in outcome.result.faces if outcome.result else ():
            row = self._rows.get(face.track_id)
            if row is not None:
                row.frames += 1
                row.last = outcome.stream_offset
                row.face = face
            elif len(self._rows) < self.LIMIT:
                self._rows[face.track_id] = _TrackRow(
                    face, outcome.stream_offset, outcome.stream_offset
                )
            else:
                self.uncounted += 1

    def table(self, latest: int = 0) -> Table:
        """One row a track, with its last word on who it is; of ``latest`` those seen last."""
        shown = sorted(self._rows.items())
        if latest:
            shown = sorted(sorted(shown, key=lambda pair: pair[1].last)[-latest:])
        titles = ("track", "seen", "frames", "decision", "subject", "similarity", "OOD", "liveness")
        table = table_of(*titles, right=("track", "frames", "similarity", "OOD"))
        for track_id, row in shown:
            face = row.face
            table.add_row(
                str(track_id),
                f"{row.first:.1f}-{row.last:.1f} s",
                str(row.frames),
                face.identity.decision.value,
                face.identity.subject_id or _nearest(face.identity),
                number(face.identity.similarity, 3),
                number(face.ood_score),
                f"{face.liveness.verdict.value} {number(face.liveness.score)}",
            )
        return table


def summary_words(summary: types.StreamSummary, seconds: float, not_sent: int = 0) -> str:
    """One line that adds up."""
    drops = ", ".join(f"{n} {reason}" for reason, n in sorted(summary.drops_by_reason.items()))
    words = (
        f"{summary.received} frames = {summary.results} results + {summary.drops} drops"
        f"{f' ({drops})' if drops else ''} + {summary.errors} errors; {summary.faces} faces; "
        f"{summary.received / seconds if seconds else 0:.1f} frames/s"
    )
    return words + (f"; {not_sent} not sent, the window was full" if not_sent else "")


def key_values(rows: Sequence[tuple[str, object]]) -> Table:
    """Two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(key, str(value))
    return table


def draw(pixels: Any, result: types.FrameResult) -> Any:
    """A copy of BGR ``pixels`` with boxes, landmarks and words."""
    import cv2

    canvas = pixels.copy()
    unit = max(1, round(max(canvas.shape[:2]) / 640))
    for face in result.faces:
        spoof = face.liveness.verdict is types.LivenessVerdict.SPOOF
        colour = _SPOOF_COLOUR if spoof else _COLOURS.get(face.identity.decision, _OTHER_COLOUR)
        box = face.box
        left, top = round(box.x), round(box.y)
        right, bottom = round(box.x + box.width), round(box.y + box.height)
        cv2.rectangle(canvas, (left, top), (right, bottom), colour, unit, cv2.LINE_AA)
        for point in face.landmarks:
            cv2.circle(canvas, (round(point.x), round(point.y)), unit, colour, -1, cv2.LINE_AA)
        lines = [face.identity.subject_id or face.identity.decision.value.lower()]
        lines.append(f"ood {number(face.ood_score)} {face.liveness.verdict.value.lower()}")
        for index, words in enumerate(lines):
            _label(canvas, words, (left, bottom + (index + 1) * 15 * unit - unit), colour, unit)
    return canvas


def _label(canvas: Any, words: str, at: tuple[int, int], colour: Any, unit: int) -> None:
    import cv2

    # OpenCV's fonts know ASCII alone.
    shown = words.encode("ascii", "replace").decode()
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.42 * unit
    (width, height), _ = cv2.getTextSize(shown, font, scale, unit)
    left, baseline = at
    # Words on a plate can be read on any picture.
    corner = (left + width + 2 * unit, baseline + 4 * unit)
    cv2.rectangle(canvas, (left, baseline - height - 2 * unit), corner, colour, -1)
    cv2.putText(canvas, shown, (left + unit, baseline), font, scale, (0, 0, 0), unit, cv2.LINE_AA)


def write_picture(path: Path, pixels: Any) -> None:
    """Writes BGR pixels in the format of the suffix.

    Raises:
        OSError: the folder is missing, or the suffix is of no known format.
    """
    import cv2

    try:
        written = cv2.imwrite(str(path), pixels)
    except cv2.error:
        written = False
    if not written:
        raise OSError(f"{path} cannot be written: check the folder, and use .jpg, .png or .webp")


class VideoWriter:
    """An H.264 file, opened at the first frame since only that tells the size. Each frame lies at
    its own time: where frames are missing the one before stands, and the length stays."""

    _TICKS: Final = 90_000

    def __init__(self, path: Path, fps: float) -> None:
        self._path = path
        self._fps = fps
        self._container: Any = None
        self._stream: Any = None
        self._image: Any = None
        self._start = 0.0
        self._last = -1

    def write(self, pixels: Any, offset: float) -> None:
        """Adds a BGR frame at ``offset`` seconds; later ones are scaled to the size of the
        first. Raises OSError, after which nothing more can be added."""
        import av

        # yuv420 needs even sides.
        height, width = (side - side % 2 for side in pixels.shape[:2])
        if self._container is None:
            # A name with a colon in it is no protocol.
            self._container = av.open(f"file:{self._path.absolute()}", "w")
            self._stream = self._container.add_stream(
                "libx264", rate=Fraction(self._fps).limit_denominator(1000)
            )
            self._stream.width, self._stream.height = width, height
            self._stream.pix_fmt = "yuv420p"
            self._stream.options = {"preset": "veryfast", "crf": "21"}
            self._stream.codec_context.time_base = Fraction(1, self._TICKS)
            self._start = offset
        self._image = av.VideoFrame.from_ndarray(
            pixels[:height, :width].copy(), format="bgr24"
        ).reformat(self._stream.width, self._stream.height, "yuv420p")
        self._put(offset)

    def _put(self, offset: float) -> None:
        self._last = max(self._last + 1, round((offset - self._start) * self._TICKS))
        self._image.pts = self._last
        self._image.time_base = Fraction(1, self._TICKS)
        self._mux(self._image)

    def _mux(self, image: Any) -> None:
        """``None``: what the encoder holds back."""
        try:
            self._container.mux(self._stream.encode(image))
        except OSError:
            # FFmpeg crashes where a file whose head could not be written is written to again.
            broken, self._container = self._container, None
            with contextlib.suppress(OSError):
                broken.close()
            raise

    def close(self, end: float = 0.0) -> None:
        """Finishes the file; what was written last stands until the frame at ``end`` seconds.
        Raises OSError."""
        if self._container is not None:
            if round((end - self._start) * self._TICKS) > self._last:
                self._put(end)
            self._mux(None)
            done, self._container = self._container, None
            done.close()
