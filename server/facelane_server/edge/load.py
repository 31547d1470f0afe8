"""The load of the server: read now and then, judged by ``capacity``, and acted upon."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from functools import partial

import structlog

from facelane_server import config
from facelane_server.capacity import PERIOD_S, Capacity, Demand, Load, Reading
from facelane_server.domain import FacelaneError, Overload, Reason, Stage
from facelane_server.edge.streams import StreamRegistry
from facelane_server.lanes import Lane, LaneOptions
from facelane_server.pools.pool import Pool
from facelane_server.pools.report import Work
from facelane_server.pools.tasks import Sender
from facelane_server.standing import begun

log = structlog.get_logger(__name__)

_NEWCOMER = 0
"""No lane has this id."""


class LoadWatch:
    """Thins the streams that are open, and says which may be added. On the event loop, whose own
    time it counts as that of one more who works."""

    def __init__(self, limits: config.Limits, streams: StreamRegistry) -> None:
        self._capacity: Capacity | None = None
        if limits.age_target_ms:
            self._capacity = Capacity(limits.age_target_ms / 1e3, limits.min_fps)
        self._limits = limits
        self._streams = streams
        self._pools: Mapping[Stage, Pool] = {}
        self._works: dict[Stage, Work] = {}
        self._each_s: dict[Stage, float] = {}
        """By pool: what one item takes a worker."""
        self._task: asyncio.Task[None] | None = None

    def begin(self, pools: Mapping[Stage, Pool]) -> None:
        """Watches these pools until ``close``."""
        self._pools = pools
        if self._capacity is not None:
            self._task = begun(partial(self._watch, self._capacity), "load")

    def close(self) -> None:
        """Safe to call twice."""
        if self._task is not None:
            self._task.cancel()

    @property
    def load(self) -> Load | None:
        """``None`` where nothing is known yet, or wanted."""
        return None if self._capacity is None else self._capacity.load

    def admit(self, options: LaneOptions, sender: Sender) -> None:
        """Raises ``FacelaneError(CAPACITY)`` when one stream more leaves each with too little."""
        capacity = self._capacity
        if capacity is None or capacity.budget is None or not self._limits.min_fps:
            return
        newcomer = _demand(_NEWCOMER, options, sender, 0.0)
        there = [_demand(s.lane_id, s.options, s.sender, 0.0) for s in self._streams.lanes]
        fits = capacity.room(newcomer, there)
        if fits is None:
            return
        least = self._limits.min_fps
        raise FacelaneError(
            Reason.CAPACITY,
            f"{len(there)} streams are open, and this server can analyse {least:g} frames a second "
            f"in time of {fits} such streams; close some, add workers or another server, or lower "
            "limits.min_fps",
            retryable=True,
            metadata={
                "fits": str(fits),
                "open": str(len(there)),
                "min_fps": f"{least:g}",
            },
        )

    def opened(self, lane: Lane) -> None:
        """What the stream is given until the next reading."""
        lane.keeps_age = self._capacity is not None
        if self._capacity is not None and lane.options.overload is Overload.LATEST_WINS:
            demand = _demand(lane.lane_id, lane.options, lane.sender, 0.0)
            rate = self._capacity.first_rate(demand)
            if rate is not None:
                lane.take_at(rate)

    async def _watch(self, capacity: Capacity) -> None:
        before, used = time.monotonic(), time.thread_time()
        thinning = False
        while True:
            await asyncio.sleep(PERIOD_S)
            now, spent = time.monotonic(), time.thread_time()
            seconds = now - before
            reading = self._read(seconds, (spent - used) / seconds)
            before, used = now, spent
            rates = capacity.step(reading)
            for lane in self._streams.lanes:
                rate = rates.get(lane.lane_id)
                if rate is not None:
                    lane.take_at(rate, capacity.groups if lane.footage.is_video else 1.0)
                elif lane.taken_at is not None:
                    lane.take_at(None)
            if bool(rates) is not thinning:
                self._tell(rates)
            thinning = bool(rates)

    def _tell(self, rates: Mapping[int, float]) -> None:
        load = self.load
        if rates and load is not None:
            log.warning(
                "streams are thinned: more comes than can be served in time",
                streams=len(rates),
                offered_fps=round(load.offered, 1),
                capacity_fps=round(load.capacity, 1),
            )
        elif not rates:
            log.info("streams are taken whole again")

    def _read(self, seconds: float, front: float) -> Reading:
        demands, ages_s, answered, opening = [], [], 0, 0
        for lane in self._streams.lanes:
            tally = lane.tally()
            fps = tally.received / seconds
            group_s = tally.group / fps if fps else 0.0
            demand = _demand(
                lane.lane_id, lane.options, lane.sender, fps, video=tally.video, group_s=group_s
            )
            demands.append(demand)
            answered += tally.results
            opening += tally.opening and tally.received > 0
            if not (demand.lossless or tally.opening):
                ages_s += [age_ns / 1e9 for age_ns in tally.ages_ns]
        busy = {"front": front}
        alone_s = wait_s = decoding_s = 0.0
        for stage, pool in self._pools.items():
            work = pool.work()
            before = self._works.get(stage, work)
            self._works[stage] = work
            worked_s = max(0, work.busy_ns - before.busy_ns) / 1e9
            if work.workers:
                busy[stage.value] = min(1.0, worked_s / (seconds * work.workers))
            if (items := work.answers - before.answers) > 0:
                self._each_s[stage] = worked_s / items
                alone_s += worked_s / items
            if (jobs := work.jobs - before.jobs) > 0:
                decoding_s = max(decoding_s, (work.waited_ns - before.waited_ns) / 1e9 / jobs)
            wait_s += work.queued * self._each_s.get(stage, 0.0) / max(work.workers, 1)
        return Reading(
            seconds, demands, answered, ages_s, busy, alone_s, wait_s, opening, decoding_s
        )


def _demand(
    lane_id: int,
    options: LaneOptions,
    sender: Sender,
    fps: float,
    *,
    video: bool = False,
    group_s: float = 0.0,
) -> Demand:
    return Demand(
        lane_id,
        fps,
        sender.key,
        sender.weight,
        options.weight,
        options.overload is Overload.LOSSLESS,
        video,
        group_s,
    )
