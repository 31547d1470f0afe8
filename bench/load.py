"""The load client, on the SDK's asyncio client: streams that saturate, and streams that keep
a pace as cameras do.

Paced latency counts from the moment a frame was *due*, not from the moment it could be
sent: a server that makes its clients wait does not look fast for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import facelane
import facelane.aio
from bench.stats import Summary

DRAIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One outcome. Times are ``time.monotonic`` seconds; ``age`` is the server's figure."""

    stream: int
    at: float
    latency: float
    age: float
    kind: str
    reason: str = ""
    missing: tuple[str, ...] = ()
    faces: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds on the server by stage: waiting for a worker, and its answer."""


@dataclass(slots=True)
class Measured:
    """Everything that came back from one load, and how long it took."""

    answers: list[Answer] = field(default_factory=list)
    sent: int = 0
    held_back: int = 0
    """Paced frames that could not be sent when due, because the window was full."""
    begin: float = 0.0
    end: float = 0.0

    @property
    def results(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.kind == "result"]

    @property
    def lost(self) -> int:
        """Frames sent that have no outcome at all."""
        return self.sent - len(self.answers)

    @property
    def drops(self) -> int:
        return sum(answer.kind == "drop" for answer in self.answers)

    @property
    def errors(self) -> int:
        return sum(answer.kind == "error" for answer in self.answers)

    def summary(self, skip: int = 0) -> Summary:
        """Of the results, without the first ``skip`` (warm-up)."""
        results = self.results[skip:]
        begin = self.results[skip - 1].at if skip and len(self.results) >= skip else self.begin
        return Summary.of([answer.latency for answer in results], self.end - begin)

    def ages(self) -> list[float]:
        return [answer.age for answer in self.results]

    def counts(self) -> dict[str, Any]:
        """The figures that say whether anything was lost."""
        return {
            "frames": self.sent,
            "results": len(self.results),
            "drops": self.drops,
            "errors": self.errors,
            "lost": self.lost,
        }


async def saturate(
    target: str,
    frames: Sequence[bytes],
    *,
    streams: int,
    total: int,
    window: int = 0,
    **options: Any,
) -> Measured:
    """``total`` frames as fast as they are answered, nothing dropped (lossless).

    ``window``: frames under way a stream at one time; 0 = what the server allows.
    """
    pictures = [facelane.Picture.encoded(data) for data in frames]
    measured = Measured()
    share = total // streams
    async with facelane.aio.Client(target) as client:
        measured.begin = time.monotonic()
        await asyncio.gather(
            *(
                _lossless(client, pictures, number, share, window, options, measured)
                for number in range(streams)
            )
        )
        measured.end = max((a.at for a in measured.answers), default=time.monotonic())
    measured.answers.sort(key=lambda answer: answer.at)
    return measured


async def _lossless(
    client: facelane.aio.Client,
    pictures: Sequence[facelane.Picture],
    number: int,
    count: int,
    window: int,
    options: dict[str, Any],
    measured: Measured,
) -> None:
    room = asyncio.Semaphore(window) if window else None
    async with client.analyze_stream(overload="lossless", max_frame_age=60.0, **options) as stream:

        async def pump() -> None:
            for index in range(count):
                if room is not None:
                    await room.acquire()
                await stream.send(pictures[(number * 7 + index) % len(pictures)], timeout=DRAIN_S)
                measured.sent += 1
            stream.close_send()

        sender = asyncio.create_task(pump())
        try:
            async for outcome in stream:
                now = time.monotonic()
                measured.answers.append(_answer(number, now, outcome.round_trip, outcome))
                if room is not None:
                    room.release()
            await sender
        finally:
            sender.cancel()


async def paced(
    target: str,
    frames: Sequence[bytes | facelane.Picture],
    *,
    streams: int,
    rate_hz: float,
    seconds: float,
    **options: Any,
) -> Measured:
    """Cameras: each stream sends ``rate_hz`` frames a second, staggered, newest wins. Video is
    sent from its first access unit on, again and again."""
    pictures = [
        data if isinstance(data, facelane.Picture) else facelane.Picture.encoded(data)
        for data in frames
    ]
    measured = Measured()
    async with facelane.aio.Client(target) as client:
        # All streams are open before the clock starts.
        opened = asyncio.Barrier(streams + 1)
        tasks = [
            asyncio.create_task(
                _camera(
                    client, pictures, number, streams, rate_hz, seconds, options, measured, opened
                )
            )
            for number in range(streams)
        ]
        try:
            await asyncio.wait_for(opened.wait(), DRAIN_S)
            measured.begin = time.monotonic()
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        measured.end = time.monotonic()
    measured.answers.sort(key=lambda answer: answer.at)
    return measured


async def _camera(
    client: facelane.aio.Client,
    pictures: Sequence[facelane.Picture],
    number: int,
    streams: int,
    rate_hz: float,
    seconds: float,
    options: dict[str, Any],
    measured: Measured,
    opened: asyncio.Barrier,
) -> None:
    period = 1.0 / rate_hz
    count = max(1, round(seconds * rate_hz))
    # Cameras are not in step.
    phase = period * number / streams
    options = {"overload": "latest_wins", **options}
    async with client.analyze_stream(**options) as stream:
        await opened.wait()
        begin = time.monotonic() + phase

        async def pump() -> None:
            for index in range(count):
                due = begin + index * period
                delay = due - time.monotonic()
                if delay > 0:
                    await asyncio.sleep(delay)
                start = 0 if pictures[0].encoding.is_video else number * 7
                picture = pictures[(start + index) % len(pictures)]
                sent = stream.try_send(picture, stream_offset=index * period)
                if sent is None:
                    measured.held_back += 1
                else:
                    measured.sent += 1
            stream.close_send()

        sender = asyncio.create_task(pump())
        try:
            async for outcome in stream:
                now = time.monotonic()
                latency = now - (begin + outcome.stream_offset)
                measured.answers.append(_answer(number, now, latency, outcome))
            await sender
        finally:
            sender.cancel()


def _answer(number: int, now: float, latency: float, outcome: facelane.Outcome) -> Answer:
    if outcome.result is not None:
        return Answer(
            number,
            now,
            latency,
            outcome.age,
            "result",
            missing=tuple(str(stage) for stage in outcome.result.missing_stages),
            faces=len(outcome.result.faces),
            stages={str(t.stage): t.queue + t.service for t in outcome.result.timings},
        )
    if outcome.drop is not None:
        return Answer(number, now, latency, outcome.age, "drop", str(outcome.drop.reason))
    assert outcome.error is not None
    return Answer(number, now, latency, outcome.age, "error", str(outcome.error.reason))
