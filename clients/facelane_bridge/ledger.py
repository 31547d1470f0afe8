"""One camera's books: every frame on its way, every outcome, the counters and their lines."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable

import facelane
from facelane_bridge.handover import NumberedFrame, Taken
from facelane_bridge.output import (
    CameraTotals,
    DropLine,
    ErrorLine,
    Line,
    ResultLine,
    UpdateLine,
    face_line,
    now_utc,
    percentile,
    utc,
)
from facelane_bridge.sources import Refusal

LATENCIES_KEPT = 20_000
"""For the percentiles: the newest, 13 minutes of 25 frames/s."""
UPDATES_KEPT = 256


class Ledger:
    """Counts what became of a camera's frames and tells it, a line each."""

    def __init__(self, camera: str, emit: Callable[[Line], Awaitable[None]]) -> None:
        self._camera = camera
        self._emit = emit
        self._in_flight: dict[int, NumberedFrame] = {}
        self._updates: deque[UpdateLine] = deque(maxlen=UPDATES_KEPT)
        self._results = self._faces = 0
        self._drops: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._decisions: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)

    @property
    def in_flight(self) -> int:
        """Frames that were sent and have no outcome yet."""
        return len(self._in_flight)

    @property
    def oldest_in_flight(self) -> NumberedFrame | None:
        """The first of them."""
        return next(iter(self._in_flight.values()), None)

    def totals(self, frames: int) -> CameraTotals:
        """A copy of the counters, for a camera that gave so many frames."""
        latencies = list(self._latencies)
        drops, errors = self._drops.total(), self._errors.total()
        return CameraTotals(
            frames=frames,
            results=self._results,
            drops=drops,
            errors=errors,
            faces=self._faces,
            in_flight=frames - self._results - drops - errors,
            drops_by_reason=dict(self._drops),
            errors_by_reason=dict(self._errors),
            decisions=dict(self._decisions),
            p50_ms=_rounded(percentile(latencies, 0.50)),
            p99_ms=_rounded(percentile(latencies, 0.99)),
        )

    async def taken(self, taken: Taken) -> None:
        """A frame is on its way, and so many before it were replaced."""
        if taken.frame is not None:
            # At once: who is cancelled while a line waits must not take it along.
            self._in_flight[taken.frame.frame_id] = taken.frame
        if taken.replaced:
            await self.dropped(taken.first_replaced, taken.replaced, "SUPERSEDED", where="bridge")

    async def refused(self, frame_id: int, refusal: Refusal) -> None:
        """A picture of the camera's goes no further than here."""
        del self._in_flight[frame_id]
        await self.failed(frame_id, refusal.reason, refusal.message, False)

    async def not_sent(self, frame_id: int, error: facelane.FacelaneError) -> None:
        """A frame could not be sent; the next one may."""
        del self._in_flight[frame_id]
        if isinstance(error, facelane.DeadlineExceededError):
            await self.dropped(frame_id, 1, error.reason, where="bridge")
        else:
            await self.failed(frame_id, error.reason, error.message, error.retryable)

    async def settled(self, outcome: facelane.Outcome) -> None:
        """The server's word on a frame."""
        # Before the frame is taken: who is cancelled here leaves it to be settled.
        await self.tell_updates()
        numbered = self._in_flight.pop(outcome.frame_id, None)
        if numbered is None:
            return  # settled before: the stream was given up
        match outcome.body:
            case facelane.FrameResult() as result:
                await self._result(numbered, outcome, result)
            case facelane.FrameDrop(reason):
                await self.dropped(outcome.frame_id, 1, reason.value, where="server")
            case facelane.FrameError(reason, message, retryable):
                await self.failed(outcome.frame_id, reason, message, retryable)

    async def _result(
        self, numbered: NumberedFrame, outcome: facelane.Outcome, result: facelane.FrameResult
    ) -> None:
        latency = (time.monotonic() - numbered.arrived) * 1e3
        self._latencies.append(latency)
        self._results += 1
        self._faces += len(result.faces)
        for face in result.faces:
            self._decisions[face.identity.decision.value] += 1
        await self._emit(
            ResultLine(
                time=now_utc(),
                camera=self._camera,
                frame_id=outcome.frame_id,
                offset_s=round(numbered.offset, 4),
                captured=utc(numbered.frame.captured_at),
                latency_ms=round(latency, 2),
                age_ms=round(outcome.age * 1e3, 2),
                width=result.width,
                height=result.height,
                faces=tuple(face_line(face) for face in result.faces),
                missing_stages=tuple(stage.value for stage in result.missing_stages),
                stream_id=outcome.stream_id,
            )
        )

    async def dropped(self, first: int, count: int, reason: str, *, where: str) -> None:
        """``count`` frames from ``first`` on were given up before they were analysed."""
        self._drops[reason] += count
        await self._emit(
            DropLine(
                time=now_utc(),
                camera=self._camera,
                frame_id=first,
                count=count,
                reason=reason,
                where=where,
            )
        )

    async def failed(self, frame_id: int, reason: str, message: str, retryable: bool) -> None:
        """A frame could not be analysed."""
        self._errors[reason] += 1
        await self._emit(
            ErrorLine(
                time=now_utc(),
                camera=self._camera,
                frame_id=frame_id,
                reason=reason,
                message=message,
                retryable=retryable,
            )
        )

    async def lost(self, reason: str) -> None:
        """The stream is gone: its frames without an outcome are errors."""
        for frame_id in sorted(self._in_flight):
            del self._in_flight[frame_id]
            await self.failed(frame_id, reason, "the stream ended before the outcome", True)

    def update(self, update: facelane.StreamUpdate) -> None:
        """Something about the stream; told before the next outcome."""
        self._updates.append(
            UpdateLine(
                time=now_utc(),
                camera=self._camera,
                kind=update.kind.value,
                stage="" if update.stage is facelane.Stage.UNSPECIFIED else update.stage.value,
                track_id=update.track_id,
                message=update.message,
            )
        )

    async def tell_updates(self) -> None:
        """Tell what was noted since the last outcome."""
        while self._updates:
            await self._emit(self._updates.popleft())


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
