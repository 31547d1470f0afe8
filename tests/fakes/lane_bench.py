"""A lane with a scripted pipeline."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.fakes.scripted_pool import ScriptedPools

from facelane_server import tracking
from facelane_server.domain import (
    Decision,
    Encoding,
    Frame,
    Outcome,
    Overload,
    Picture,
    Sighting,
)
from facelane_server.lanes import (
    Lane,
    LaneOptions,
    SilentObserver,
)

SECOND = 1_000_000_000


class Recorder(SilentObserver):
    """What an observer is told."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.decided: list[tuple[int, str]] = []
        self.ended: list[tuple[int, Decision]] = []
        self.last: dict[int, Decision] = {}

    def outcome(self, lane: Lane, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def sighted(self, lane: Lane, sighting: Sighting) -> None:
        said = (sighting.track_id, sighting.identity.subject_id)
        if sighting.identity.subject_id and said not in self.decided:
            self.decided.append(said)
        self.last[sighting.track_id] = sighting.identity.decision

    def track_ended(self, lane: Lane, track_id: int) -> None:
        # One whose first picture had no result was never seen.
        self.ended.append((track_id, self.last.get(track_id, Decision.NOT_EVALUATED)))


class Stream:
    """A lane with its pools, and both of its sides."""

    def __init__(
        self,
        pools: ScriptedPools | None = None,
        *,
        window: int = 8,
        window_bytes: int = 1_000,
        **options: Any,
    ) -> None:
        self.pools = pools or ScriptedPools()
        self.seen = Recorder()
        self.now = 0
        options.setdefault("overload", Overload.LOSSLESS)
        self.lane = Lane(
            1,
            "stream",
            LaneOptions(**options),
            self.pools.pipeline,
            window=window,
            window_bytes=window_bytes,
            tracking_params=tracking.Params(),
            observer=self.seen,
            clock=lambda: self.now,
        )
        self.next_id = 1

    def offer(self, count: int = 1, *, size: int = 10, step_ns: int = SECOND // 25) -> None:
        for _ in range(count):
            self.lane.offer(frame(self.next_id, size, self.next_id * step_ns))
            self.next_id += 1

    async def bodies(self) -> list[Any]:
        return [item.body for item in await self.take() if isinstance(item, Outcome)]

    async def take(self) -> list[Any]:
        """What lies ready for the writer, written."""
        await turns()
        if self.lane.settled or not self.lane._outbox:
            return []
        items = await self.lane.take()
        for item in items:
            if isinstance(item, Outcome):
                self.lane.written()
        return items


def frame(frame_id: int, size: int = 10, offset_ns: int = 0) -> Frame:
    return Frame(frame_id, Picture(Encoding.JPEG, bytes(size)), offset_ns, 77)


async def turns() -> None:
    """Lets every callback that is due run."""
    for _ in range(6):
        await asyncio.sleep(0)
