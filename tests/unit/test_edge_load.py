"""Streams are thinned while they have to be, those that have just come included."""

from __future__ import annotations

import pytest
from tests.fakes.scripted_pool import ScriptedPools
from tests.waiting import auntil

from facelane_server import config, standing, tracking
from facelane_server.capacity import Demand
from facelane_server.domain import FacelaneError, Overload, Reason, Stage
from facelane_server.edge.load import LoadWatch
from facelane_server.edge.streams import StreamRegistry
from facelane_server.lanes import Lane, LaneOptions
from facelane_server.pools.report import Work
from facelane_server.pools.tasks import ANYBODY


def opened(streams: StreamRegistry, **options: object) -> Lane:
    lane = Lane(
        streams.next_id(),
        "stream",
        LaneOptions(**options),  # type: ignore[arg-type]
        ScriptedPools().pipeline,
        window=8,
        window_bytes=1_000,
        tracking_params=tracking.Params(),
    )
    streams.add(lane)
    return lane


async def test_who_comes_while_others_give_way_is_taken_whole_when_nobody_has_to() -> None:
    streams = StreamRegistry()
    watch = LoadWatch(config.Limits(), streams)
    assert watch._capacity is not None
    watch._capacity.budget = 10.0
    lane, lossless = opened(streams), opened(streams, overload=Overload.LOSSLESS)
    watch.opened(lane)
    watch.opened(lossless)
    assert lane.taken_at == pytest.approx(10.0)
    assert lossless.taken_at is None, "it is held back by its window"
    watch.begin({})
    try:
        await auntil(lambda: lane.taken_at is None)  # nobody sends: nothing has to give way
    finally:
        watch.close()


async def test_a_look_that_fails_leaves_nobody_thinned_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(standing, "AGAIN_S", 0.0)
    looks: list[int] = []

    class Streams(StreamRegistry):
        @property
        def lanes(self) -> list[Lane]:
            looks.append(1)
            if len(looks) == 1:
                raise MemoryError
            return super().lanes

    streams = Streams()
    watch = LoadWatch(config.Limits(), streams)
    assert watch._capacity is not None
    watch._capacity.budget = 10.0
    lane = opened(streams)
    watch.opened(lane)
    assert lane.taken_at == pytest.approx(10.0)
    watch.begin({})
    try:
        await auntil(lambda: lane.taken_at is None)
    finally:
        watch.close()


async def test_where_each_would_have_too_little_no_more_are_let_in() -> None:
    streams = StreamRegistry()
    watch = LoadWatch(config.Limits(min_fps=3.0), streams)
    watch.admit(LaneOptions(), ANYBODY)
    assert watch._capacity is not None
    watch._capacity.budget = 7.0
    watch._capacity._led = 4
    for number in range(2):
        watch.admit(LaneOptions(), ANYBODY)
        lane = opened(streams)
        if number == 0:
            # What was learnt is of somebody who is still there; who came after is not known yet.
            watch._capacity._demands = (Demand(lane.lane_id, 10.0),)
    with pytest.raises(FacelaneError) as refused:
        watch.admit(LaneOptions(), ANYBODY)
    assert refused.value.reason is Reason.CAPACITY
    assert refused.value.metadata == {"fits": "2", "open": "2", "min_fps": "3"}


def test_how_long_video_waits_is_read_by_job_of_the_pool_where_it_waits_longest() -> None:
    class Worked:
        def __init__(self, *works: Work) -> None:
            self.works = list(works)

        def work(self) -> Work:
            return self.works.pop(0)

    watch = LoadWatch(config.Limits(), StreamRegistry())
    watch._pools = {
        Stage.DETECTOR: Worked(  # type: ignore[dict-item]
            Work(0, 0, 0, 1, 10_000_000, 2), Work(1, 1, 0, 1, 90_000_000, 6), Work(2, 2, 0, 1)
        ),
        Stage.RECOGNIZER: Worked(*[Work(0, 0, 0, 1)] * 3),  # type: ignore[dict-item]
    }
    assert watch._read(0.25, 0.1).decoding_s == 0.0, "nothing is known of before"
    assert watch._read(0.25, 0.1).decoding_s == pytest.approx(0.02)
    assert watch._read(0.25, 0.1).decoding_s == 0.0, "a pool that was begun anew"


def test_the_bound_can_be_switched_off() -> None:
    watch = LoadWatch(config.Limits(age_target_ms=0), StreamRegistry())
    watch.begin({})
    watch.admit(LaneOptions(), ANYBODY)
    lane = opened(StreamRegistry())
    watch.opened(lane)
    assert not lane.keeps_age, "its video may grow old too"
    assert watch.load is None
    watch.close()
