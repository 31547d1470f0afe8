"""What the bridge tells the world: JSON lines (``facelane.lines``), or a live table for people.

Lines go through a bounded queue to one writer thread. When whoever reads standard output is slow
the queue fills, outcomes are not fetched any more, the stream's window closes, and the
newest-wins rule at the camera drops frames and counts them: nothing grows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import select
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import msgspec

from facelane.lines import (
    CameraTotals,
    DropLine,
    ErrorLine,
    FaceLine,
    Line,
    ResultLine,
    StateLine,
    SummaryLine,
    UpdateLine,
    face_line,
    now_utc,
    utc,
)
from facelane_bridge.config import Results

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

__all__ = [
    "CameraTotals",
    "DropLine",
    "ErrorLine",
    "FaceLine",
    "Line",
    "ResultLine",
    "StateLine",
    "SummaryLine",
    "UpdateLine",
    "face_line",
    "now_utc",
    "utc",
]

MAX_QUEUED_LINES = 1024
MAX_TRACKS_KEPT = 256
"""A camera; the newest ones."""
MAX_BATCH_LINES = 256
FLUSH_TIMEOUT = 5.0
"""Seconds that the last lines may take when the reader of standard output is stuck."""
TABLE_HZ = 4.0
PLAIN_INTERVAL = 1.0


def percentile(values: list[float], share: float) -> float | None:
    """The value below which ``share`` (0-1) of ``values`` lie; ``None`` for no values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Selection:
    """Which lines are told: all, those in which something has changed, or hardly any.

    ``events`` is for journals: a result is told when a face in it is new, or its decision,
    name or liveness is another than before; an error when its reason is. Whatever is not
    told is counted all the same.
    """

    def __init__(self, results: Results) -> None:
        self._results = results
        self._faces: dict[str, dict[int, tuple[str, str, str]]] = {}
        self._reasons: dict[str, str] = {}

    def wants(self, line: Line) -> bool:
        """Whether a line is told. Remembers what it lets pass."""
        if self._results is Results.ALL or isinstance(line, StateLine | SummaryLine):
            return True
        if self._results is Results.OFF or isinstance(line, DropLine):
            return False
        match line:
            case ResultLine():
                return self._has_changed(line)
            case ErrorLine():
                before = self._reasons.get(line.camera)
                self._reasons[line.camera] = line.reason
                return line.reason != before
            case _:
                return True

    def _has_changed(self, line: ResultLine) -> bool:
        known = self._faces.setdefault(line.camera, {})
        changed = False
        for face in line.faces:
            now = (face.decision, face.subject_id, face.liveness)
            changed = changed or known.pop(face.track_id, None) != now
            known[face.track_id] = now
        while len(known) > MAX_TRACKS_KEPT:
            del known[next(iter(known))]
        return changed


class Output(Protocol):
    """Takes the bridge's lines. Used as an async context manager around the run."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    async def emit(self, line: Line) -> None:
        """Take a line; waits while the reader is slow. Raises ``OutputClosedError``."""
        ...


class OutputClosedError(Exception):
    """Whoever read the lines has gone."""


class JsonLines:
    """Lines as JSON to a file descriptor, written in batches by one thread.

    The thread is a daemon: a reader that never reads cannot keep the process from ending.
    """

    def __init__(self, descriptor: int = 1) -> None:
        self._descriptor = descriptor
        self._lines: asyncio.Queue[Line] = asyncio.Queue(MAX_QUEUED_LINES)
        self._batches: queue.Queue[bytes | None] = queue.Queue(1)
        self._written = asyncio.Event()
        self._closed: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pump: asyncio.Task[None] | None = None
        self._error = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._write, name="output", daemon=True).start()
        self._pump = asyncio.create_task(self._run(), name="output")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pump = self._pump
        assert pump is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_TIMEOUT):
                await self._lines.join()
        pump.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await pump
        with contextlib.suppress(queue.Full):
            self._batches.put_nowait(None)

    @property
    def is_closed(self) -> bool:
        """Whether the reader of the lines has gone."""
        return self._error

    async def emit(self, line: Line) -> None:
        if self._error:
            raise OutputClosedError
        await self._lines.put(line)

    async def _run(self) -> None:
        encoder = msgspec.json.Encoder()
        while True:
            batch = [await self._lines.get()]
            while len(batch) < MAX_BATCH_LINES and not self._lines.empty():
                batch.append(self._lines.get_nowait())
            if not self._error:
                self._written.clear()
                self._batches.put_nowait(b"".join(encoder.encode(line) + b"\n" for line in batch))
                await self._written.wait()
            for _ in batch:
                self._lines.task_done()

    def _write(self) -> None:
        assert self._loop is not None
        while (batch := self._batches.get()) is not None:
            view = memoryview(batch)
            try:
                while view:
                    try:
                        view = view[os.write(self._descriptor, view) :]
                    except BlockingIOError:
                        # Whoever shares the pipe with us made it so; it is full, not closed.
                        select.select([], [self._descriptor], [])
            except (OSError, ValueError):
                self._error = True
            # The loop may have ended while a stuck reader held us: then nobody waits.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._written.set)


class Callback:
    """Lines to a function, called in the event loop; it must not block."""

    def __init__(self, function: Callable[[Line], None]) -> None:
        self._function = function

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    async def emit(self, line: Line) -> None:
        self._function(line)


class CameraView:
    """What the table knows of one camera."""

    def __init__(self) -> None:
        self.state = "CONNECTING"
        self.note = ""
        self.results = 0
        self.drops = 0
        self.errors = 0
        self.faces: tuple[FaceLine, ...] = ()
        self.offset = 0.0
        self._recent: deque[tuple[float, float]] = deque(maxlen=256)

    def take(self, line: Line, now: float) -> None:
        match line:
            case ResultLine():
                self.results += 1
                self.faces = line.faces
                self.offset = line.offset_s
                self._recent.append((now, line.latency_ms))
            case DropLine():
                self.drops += line.count
            case ErrorLine():
                self.errors += 1
                self.note = line.reason
            case StateLine():
                self.state = line.state
                self.note = line.reason
            case _:
                pass

    def rate(self, now: float) -> float:
        """Results a second over the last three seconds."""
        return sum(1 for at, _ in self._recent if now - at <= 3.0) / 3.0

    def latency(self) -> float | None:
        """Median of the newest results, milliseconds."""
        return percentile([latency for _, latency in self._recent], 0.5)

    def describe_faces(self) -> str:
        """The faces of the newest result in words."""
        return ", ".join(describe(face) for face in self.faces) or "nobody"


def describe(face: FaceLine) -> str:
    """One face in a few words: who, how near, how trustworthy, alive or not."""
    match face.decision:
        case "MATCH":
            text = (
                f"{face.subject_id} {face.similarity:.2f}" if face.similarity else face.subject_id
            )
        case "REJECTED_OOD":
            text = "not trustworthy"
        case "NOT_EVALUATED":
            text = "face"
        case decision:
            text = decision.lower()
    if face.ood_score is not None:
        text += f" (ood {face.ood_score:.2f})"
    if face.liveness in ("LIVE", "SPOOF"):
        text += f" {face.liveness.lower()}"
    return text


class Table:
    """A live table on a terminal; plain lines once a second where there is none."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console as RichConsole

        class ClosingConsole(RichConsole):
            def on_broken_pipe(self) -> None:
                # The interpreter flushes standard output once more at its end.
                with contextlib.suppress(OSError, ValueError):
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, sys.stdout.fileno())
                    os.close(null)
                raise OutputClosedError

        self._console = console or ClosingConsole(markup=False, emoji=False, highlight=False)
        self._cameras: dict[str, CameraView] = {}
        self._live: Live | None = None
        self._printed_at = 0.0
        self._drawn_at = 0.0

    async def __aenter__(self) -> Self:
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(
                self._render(), console=self._console, auto_refresh=False, transient=False
            )
            self._live.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
            self._live.stop()

    async def emit(self, line: Line) -> None:
        now = time.monotonic()
        if isinstance(line, SummaryLine):
            self._print_summary(line)
            return
        self._cameras.setdefault(line.camera, CameraView()).take(line, now)
        if self._live is not None:
            if now - self._drawn_at >= 1.0 / TABLE_HZ:
                self._drawn_at = now
                self._live.update(self._render(), refresh=True)
        elif isinstance(line, StateLine):
            change = f"{line.camera}: {line.previous} → {line.state} {line.reason} {line.message}"
            self._console.print(change.rstrip(), soft_wrap=True)
        elif now - self._printed_at >= PLAIN_INTERVAL:
            self._printed_at = now
            for name, view in self._cameras.items():
                self._console.print(plain_line(name, view, now), soft_wrap=True)

    def _render(self) -> RenderableType:
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(expand=True)
        for column in ("camera", "state", "t", "fps", "p50 ms", "results", "drops", "errors"):
            table.add_column(column, justify="left" if column in ("camera", "state") else "right")
        table.add_column("faces", ratio=1)
        now = time.monotonic()
        for name, view in sorted(self._cameras.items()):
            latency = view.latency()
            colour = {"STREAMING": "green", "FAILED": "red", "STOPPED": "dim"}.get(
                view.state, "yellow"
            )
            table.add_row(
                Text(name),
                Text(view.state, style=colour).append(f" {view.note}", style="default"),
                f"{view.offset:.1f}",
                f"{view.rate(now):.1f}",
                "-" if latency is None else f"{latency:.0f}",
                str(view.results),
                str(view.drops),
                str(view.errors),
                Text(view.describe_faces()),
            )
        return table

    def _print_summary(self, line: SummaryLine) -> None:
        for name, totals in sorted(line.cameras.items()):
            self._console.print(
                f"{name}: {totals.frames} frames = {totals.results} results + "
                f"{totals.drops} drops + {totals.errors} errors, {totals.faces} faces",
                soft_wrap=True,
            )


def plain_line(name: str, view: CameraView, now: float) -> str:
    """One camera in one line of text."""
    latency = view.latency()
    speed = "" if latency is None else f"{view.rate(now):4.1f} fps {latency:5.0f} ms  "
    return f"{name} t={view.offset:6.1f} s  {view.state:<10} {speed}{view.describe_faces()}"


def merge(totals: Mapping[str, CameraTotals]) -> SummaryLine:
    """The summary over all cameras."""
    total: Counter[str] = Counter()
    for camera in totals.values():
        for key in ("frames", "results", "drops", "errors", "faces"):
            total[key] += getattr(camera, key)
    return SummaryLine(
        time=now_utc(),
        cameras=dict(totals),
        frames=total["frames"],
        results=total["results"],
        drops=total["drops"],
        errors=total["errors"],
        faces=total["faces"],
    )
