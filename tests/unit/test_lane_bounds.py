"""Bounds and ends of a lane, and anything in any order."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from tests.fakes.lane_bench import (
    SECOND,
    Stream,
    frame,
    turns,
)
from tests.fakes.scripted_pool import LIVE, LOST, embedding, faces

from facelane_server.domain import (
    Decision,
    DropReason,
    FacelaneError,
    FrameDrop,
    FrameResult,
    Identity,
    Outcome,
    Overload,
    Reason,
    Stage,
)
from facelane_server.lanes import (
    Lane,
    LaneDraining,
    RateChanged,
    TrackEnded,
)


def unwritten(lane: Lane) -> int:
    """Frames without a written outcome."""
    return len(lane._entries) + lane._unwritten


# -- bounds --------------------------------------------------------------------------------------


async def test_the_window_counts_frames_until_they_are_written() -> None:
    s = Stream(window=2)
    s.offer(2)
    assert not s.lane.can_accept
    s.pools.detector.answer(faces(0))
    s.pools.detector.answer(faces(0))
    await turns()
    assert not s.lane.can_accept, "answered, not written"
    items = await s.lane.take()
    assert len(items) == 2
    s.lane.written()
    assert s.lane.can_accept
    assert unwritten(s.lane) == 1


async def test_the_window_in_bytes_always_lets_one_frame_in() -> None:
    s = Stream(window=8, window_bytes=100)
    s.offer(size=1_000)
    assert not s.lane.can_accept
    s.pools.detector.answer(faces(0))
    await turns()
    assert s.lane.can_accept, "its bytes are let go as soon as it is detected"
    s.offer(2, size=49)
    assert s.lane.can_accept
    s.offer(size=3)
    assert not s.lane.can_accept


async def test_a_reader_that_waits_is_woken_by_the_writer_and_by_the_end() -> None:
    s = Stream(window=1)
    s.offer()
    waiting = asyncio.create_task(s.lane.wait_can_accept())
    await turns()
    assert not waiting.done()
    s.pools.detector.answer(faces(0))
    await turns()
    assert not waiting.done()
    await s.take()
    await asyncio.wait_for(waiting, 30)
    s.offer()
    waiting = asyncio.create_task(s.lane.wait_can_accept())
    await turns()
    s.lane.abort()
    await asyncio.wait_for(waiting, 30)


async def test_the_newest_frame_replaces_the_one_that_waits() -> None:
    s = Stream(overload=Overload.LATEST_WINS)
    s.offer()
    s.pools.detector.begin()
    s.offer(3)
    assert len(s.pools.detector.waiting) == 1, "one waits, whatever comes"
    assert await s.bodies() == [], "not before the first"
    s.pools.detector.answer(faces(0))
    bodies = await s.bodies()
    assert [type(b) for b in bodies] == [FrameResult, FrameDrop, FrameDrop]
    assert {b.reason for b in bodies[1:]} == {DropReason.SUPERSEDED}
    s.pools.detector.answer(faces(0))
    assert [type(b) for b in await s.bodies()] == [FrameResult]
    assert s.lane.can_accept


async def test_lossless_supersedes_nothing() -> None:
    s = Stream()
    s.offer(5)
    assert len(s.pools.detector.waiting) == 5


async def test_a_thinned_stream_gives_a_part_of_its_frames_and_each_has_its_outcome() -> None:
    s = Stream(overload=Overload.LATEST_WINS, window=64)
    s.lane.take_at(5.0)
    results = 0
    for _ in range(50):  # two seconds at 25 frames a second
        s.now += SECOND // 25
        s.offer()
        if s.pools.detector.waiting:
            s.pools.detector.answer(faces(0))
            results += 1
        await turns()
    assert 9 <= results <= 11
    told = await s.take()
    assert told[0] == RateChanged(5.0)
    outcomes = told[1:]
    assert [o.frame_id for o in outcomes] == list(range(1, 51)), "all, in order"
    reasons = Counter(o.body.reason for o in outcomes if isinstance(o.body, FrameDrop))
    assert reasons == {DropReason.THINNED: 50 - results}
    tally = s.lane.tally()
    assert (tally.received, tally.results, len(tally.ages_ns)) == (50, results, results)
    assert tally.opening, "its first results are among these"
    after = s.lane.tally()
    assert (after.received, after.opening) == (0, False)
    s.lane.take_at(None)
    s.offer()
    assert len(s.pools.detector.waiting) == 1
    assert await s.take() == [RateChanged(0.0)]


async def test_while_a_frame_waits_a_thinned_stream_puts_the_newest_in_its_place() -> None:
    s = Stream(overload=Overload.LATEST_WINS)
    s.lane.take_at(1.0)
    s.now += SECOND
    s.offer()
    s.lane.take_at(0.0)
    s.offer(3)
    (waiting,) = s.pools.detector.waiting
    s.pools.detector.answer(faces(0))
    outcomes = [item for item in await s.take() if isinstance(item, Outcome)]
    assert [o.frame_id for o in outcomes if isinstance(o.body, FrameResult)] == [4]
    assert waiting.attempts == 0
    s.offer()
    await turns()
    (dropped,) = await s.bodies()
    assert dropped.reason is DropReason.THINNED, "nothing waits, so nothing is taken on"


async def test_small_changes_of_a_rate_are_not_told() -> None:
    s = Stream(overload=Overload.LATEST_WINS)
    for at, fps in ((1, 10.0), (2, 10.5), (3, 5.0), (4, 4.9)):
        s.now = at * SECOND * 2
        s.lane.take_at(fps)
    s.lane.take_at(1.0)
    s.lane.take_at(3.0)  # at once: too soon to be told
    assert await s.take() == [RateChanged(10.0), RateChanged(5.0), RateChanged(1.0)]


# -- the end -------------------------------------------------------------------------------------


async def test_an_aborted_lane_withdraws_and_counts_the_rest() -> None:
    s = Stream()
    s.offer(5)
    s.pools.detector.begin()
    s.pools.detector.begin()
    s.pools.detector.answer(faces(1), 1)
    await turns()
    under_way = s.pools.detector.tasks
    s.lane.abort()
    s.lane.abort()
    assert all(task.future.cancelled() for task in under_way)
    assert s.pools.detector.withdrawn == 3
    totals = s.lane.totals
    assert totals.drops_by_reason == {DropReason.STREAM_CLOSED: 5}
    assert (totals.received, totals.drops, totals.results) == (5, 5, 0)
    assert unwritten(s.lane) == 0
    # What was under way may still come: nobody minds.
    s.pools.detector.answer(LOST)
    s.pools.answer_second()
    await turns()
    assert await s.lane.take() == []
    assert s.lane.totals == totals
    assert len(s.seen.outcomes) == 5


async def test_abort_while_a_face_is_being_judged() -> None:
    s = Stream()
    s.offer()
    s.pools.detector.answer(faces(2))
    await turns()
    s.lane.abort()
    s.pools.answer_second("ada")
    await turns()
    assert s.lane.totals.drops == 1
    assert s.seen.decided == []


async def test_an_aborted_lane_takes_its_faces_back_too() -> None:
    s = Stream()
    s.offer()
    s.pools.detector.answer(faces(3))
    await turns()
    s.pools.recognizer.begin()
    s.pools.liveness.answer(LIVE)
    await turns()
    under_way = [*s.pools.recognizer.tasks, *s.pools.liveness.tasks]
    s.lane.abort()
    assert all(task.future.cancelled() for task in under_way)
    assert s.pools.recognizer.waiting == s.pools.liveness.waiting == []
    assert (s.pools.recognizer.withdrawn, s.pools.liveness.withdrawn) == (2, 2)
    s.pools.answer_second("ada")
    await turns()
    assert s.lane.totals.drops == 1


async def test_who_was_deleted_is_named_no_more() -> None:
    """Not for as long as the track is not recognised again either."""
    s = Stream()

    async def decision() -> Decision:
        s.offer()
        s.pools.detector.answer(faces(1))
        (body,) = await s.bodies()
        return Decision(body.faces[0].identity.decision)

    s.offer()
    s.pools.detector.answer(faces(1))
    await turns()
    s.pools.answer_second("ada")
    await s.bodies()
    s.pools.liveness.available = False
    assert await decision() is Decision.MATCH
    s.pools.pipeline.known = lambda gallery, subject: (gallery, subject) != ("default", "ada")
    assert await decision() is Decision.NOT_EVALUATED
    # It is asked anew who this is.
    s.offer()
    s.pools.detector.answer(faces(1))
    await turns()
    assert len(s.pools.recognizer.tasks) == 1
    s.pools.answer_second()
    (body,) = await s.bodies()
    assert body.faces[0].identity == Identity(Decision.UNKNOWN)


async def test_a_writer_that_waits_ends_with_the_input() -> None:
    s = Stream()
    writer = asyncio.create_task(s.lane.take())
    await turns()
    assert not writer.done()
    s.lane.close_input()
    assert await asyncio.wait_for(writer, 30) == []
    assert s.lane.settled


async def test_draining_is_told_once_and_new_frames_are_dropped_in_order() -> None:
    s = Stream()
    s.offer()
    s.lane.drain(7)
    s.lane.drain(8)
    s.offer(2)
    assert await s.take() == [LaneDraining(7)]
    s.pools.detector.answer(faces(0))
    bodies = await s.bodies()
    assert [type(b) for b in bodies] == [FrameResult, FrameDrop, FrameDrop]
    assert bodies[1].reason is DropReason.DRAINING
    s.lane.close_input()
    assert s.lane.settled


async def test_tracks_end_after_their_gap_and_with_the_stream() -> None:
    s = Stream()
    s.offer()
    s.pools.detector.answer(faces(1))
    await turns()
    s.pools.answer_second("ada")
    await s.take()
    s.offer(step_ns=5 * SECOND)
    s.pools.detector.answer(faces(0))
    items = await s.take()
    assert TrackEnded(1) in items
    assert s.seen.ended == [(1, Decision.MATCH)]
    s.offer(step_ns=6 * SECOND)
    s.pools.detector.answer(faces(1))
    await turns()
    s.pools.answer_second()
    await s.take()
    s.lane.finish()
    s.lane.finish()
    assert [track for track, _ in s.seen.ended] == [1, 2]


async def test_a_track_that_ends_while_it_is_being_recognised_still_gets_its_name() -> None:
    s = Stream()
    s.offer()
    s.pools.detector.answer(faces(1))
    await turns()
    s.offer(step_ns=10 * SECOND)
    s.pools.detector.answer(faces(0))
    await turns()
    assert await s.take() == [], "the first frame is not complete"
    s.pools.answer_second("ada")
    first, ended, second = await s.take()
    assert first.body.faces[0].identity.subject_id == "ada"
    assert second.body.faces == ()
    assert ended == TrackEnded(1)
    assert s.seen.ended == [(1, Decision.MATCH)]


# -- anything, in any order ----------------------------------------------------------------------

WINDOW, WINDOW_BYTES = 5, 60


class AnyOrder(RuleBasedStateMachine):
    """Frames, answers, losses, slow writers, draining and the end, as hypothesis likes."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.stream: Stream
        self.offered: list[int] = []
        self.told: list[Outcome] = []
        self.unwritten = 0
        self.aborted = False

    def run(self, act: Callable[[], Any]) -> Any:
        """Acts on the loop, and lets what follows from it happen."""

        async def go() -> Any:
            value = act()
            if isinstance(value, Awaitable):
                value = await value
            await turns()
            return value

        return self.loop.run_until_complete(go())

    @initialize(overload=st.sampled_from(Overload), tracking=st.booleans())
    def begin(self, overload: Overload, tracking: bool) -> None:
        self.stream = self.run(
            lambda: Stream(
                window=WINDOW, window_bytes=WINDOW_BYTES, overload=overload, tracking=tracking
            )
        )
        self.lane = self.stream.lane
        self.pools = self.stream.pools

    @precondition(lambda self: self.lane.can_accept and not self.aborted)
    @rule(
        gap=st.integers(1, 3),
        size=st.integers(1, 80),
        late_ns=st.sampled_from([0, 0, 0, SECOND // 25, 3 * SECOND]),
        fault=st.sampled_from([None, None, None, Reason.PICTURE_EMPTY]),
    )
    def offer(self, gap: int, size: int, late_ns: int, fault: Reason | None) -> None:
        stream = self.stream
        stream.next_id += gap
        stream.now += 1 + late_ns
        error = FacelaneError(fault, "at fault") if fault else None
        self.run(lambda: self.lane.offer(frame(stream.next_id, size, stream.now), error))
        self.offered.append(stream.next_id)

    def _pick(self, data: st.DataObject, tasks: list[Any]) -> int:
        return data.draw(st.integers(0, len(tasks) - 1))

    @precondition(lambda self: self.pools.detector.waiting)
    @rule(data=st.data(), begin=st.booleans())
    def a_detector_takes_or_lets_expire(self, data: st.DataObject, begin: bool) -> None:
        pool = self.pools.detector
        at = self._pick(data, pool.waiting)
        self.run(lambda: pool.begin(at) if begin else pool.expire(at))

    @precondition(lambda self: self.pools.detector.begun)
    @rule(data=st.data(), count=st.integers(-1, 3))
    def a_detector_answers(self, data: st.DataObject, count: int) -> None:
        pool = self.pools.detector
        at = self._pick(data, pool.begun)
        self.run(lambda: pool.answer(LOST if count < 0 else faces(count), at))

    @precondition(lambda self: self.pools.recognizer.tasks or self.pools.liveness.tasks)
    @rule(data=st.data(), well=st.sampled_from([True, True, False]))
    def a_second_stage_answers(self, data: st.DataObject, well: bool) -> None:
        busy = [p for p in (self.pools.recognizer, self.pools.liveness) if p.tasks]
        pool = data.draw(st.sampled_from(busy))
        while pool.waiting:
            pool.begin()
        good = embedding("ada") if pool is self.pools.recognizer else LIVE
        at = self._pick(data, pool.begun)
        self.run(lambda: pool.answer(good if well else LOST, at))

    @rule(stage=st.sampled_from([Stage.RECOGNIZER, Stage.LIVENESS]), available=st.booleans())
    def a_stage_comes_or_goes(self, stage: Stage, available: bool) -> None:
        self.pools.by_stage[stage].available = available
        self.run(self.lane.stages_changed)

    @precondition(lambda self: self.lane._outbox)
    @rule()
    def the_writer_takes(self) -> None:
        for item in self.run(self.lane.take):
            if isinstance(item, Outcome):
                self.told.append(item)
                self.unwritten += 1

    @precondition(lambda self: self.unwritten)
    @rule()
    def the_writer_writes_one(self) -> None:
        self.run(self.lane.written)
        self.unwritten -= 1

    @rule()
    def the_server_drains(self) -> None:
        self.run(lambda: self.lane.drain(1))

    @precondition(lambda self: len(self.offered) > 4)
    @rule()
    def the_client_vanishes(self) -> None:
        self.run(self.lane.abort)
        self.aborted = True

    @invariant()
    def outcomes_are_in_order_and_once(self) -> None:
        ids = [o.frame_id for o in self.told]
        assert ids == sorted(set(ids))
        if not self.aborted:
            assert ids == self.offered[: len(ids)]

    @invariant()
    def bounds_hold(self) -> None:
        if not hasattr(self, "lane"):
            return
        tasks = self.pools.detector.tasks
        sizes = [len(task.request.picture.data) for task in tasks]
        if not self.aborted:
            assert unwritten(self.lane) <= WINDOW
            assert len(tasks) <= WINDOW
            # The last frame was let in below the bound.
            assert sum(sizes) - max(sizes, default=0) < WINDOW_BYTES
        assert len(self.pools.recognizer.tasks) <= 3 * WINDOW
        totals = self.lane.totals
        assert totals.received == len(self.offered)
        emitted = totals.results + totals.drops + totals.errors
        assert emitted == len(self.stream.seen.outcomes) <= totals.received

    def teardown(self) -> None:
        try:
            if hasattr(self, "lane"):
                self._finish()
        finally:
            self.loop.close()

    def _finish(self) -> None:
        """Everything is answered in the end, so everything is told."""
        self.run(self.lane.close_input)
        for _ in range(20):
            while self.pools.detector.tasks:
                self.run(lambda: self.pools.detector.answer(faces(1)))
            self.run(lambda: self.pools.answer_second("ada"))
        while self.lane._outbox:
            self.the_writer_takes()
        self.outcomes_are_in_order_and_once()
        totals = self.lane.totals
        assert totals.received == totals.results + totals.drops + totals.errors
        assert len(self.stream.seen.outcomes) == len(self.offered)
        assert [o.frame_id for o in self.stream.seen.outcomes] == self.offered
        self.lane.finish()
        if not self.aborted:
            assert [o.frame_id for o in self.told] == self.offered
            assert self.lane.settled
            assert self.lane._held == 0


AT_LENGTH = settings(
    max_examples=60,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


class TestAnyOrder(AnyOrder.TestCase):
    settings = settings(AT_LENGTH, max_examples=20)


@pytest.mark.slow
class TestManyOrders(AnyOrder.TestCase):
    settings = AT_LENGTH
