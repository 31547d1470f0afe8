"""Streams of video from the lane to the worker and back, without processes: whatever arrives, is
lost, or is done in which order, every frame has one outcome, in order, and its own picture."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.access_units import clip
from tests.fakes.scripted_pool import ScriptedPools

from facelane_server import annexb, limits, tracking
from facelane_server.annexb import Format
from facelane_server.domain import (
    DropReason,
    Encoding,
    FacelaneError,
    Frame,
    FrameDrop,
    FrameError,
    FrameResult,
    Outcome,
    Overload,
    Picture,
    Reason,
    Stage,
)
from facelane_server.ipc.channel import ProtocolError
from facelane_server.ipc.messages import (
    DetectDone,
    InferDone,
    InferFailed,
    ItemDone,
    ItemFailed,
    PictureHeld,
    VideoItem,
)
from facelane_server.lanes import Allowance, KeyFrameWanted, Lane, LaneOptions, RateChanged
from facelane_server.lanes.pace import Parts, Rhythm
from facelane_server.lanes.video import Footage
from facelane_server.pools.groups import Decoders, Group, Wanted
from facelane_server.pools.lineup import Lineup
from facelane_server.pools.schedule import HUNG, Ended, Schedule
from facelane_server.pools.slots import Codec
from facelane_server.pools.tasks import AnyTask, Job, Sender, Task, VideoRequest

S = 1_000_000_000
COUNT = 36
KEYINT = 9
CLIPS = {
    "plain": clip("h264", COUNT, size=(64, 48), keyint=KEYINT),
    "reordered": clip("h264", COUNT, size=(64, 48), keyint=KEYINT, bframes=2),
}
WIDTH = 1_000
"""Of the picture that the n-th frame is to show: this and n."""


@dataclass(eq=False)
class Seat:
    """A worker: does what a real one does, but looks at numbers instead of pictures."""

    jobs: deque[Job] = field(default_factory=deque)
    sent: deque[list[VideoItem]] = field(default_factory=deque)
    slots: deque[bytes] = field(default_factory=deque)
    batch_max: int = 3
    overlaps: bool = True
    service_ns: float = 0.0
    free_slots: int = 3
    places: int = 3
    decoders: Decoders = field(default_factory=Decoders)
    fed: dict[int, list[int]] = field(default_factory=dict)
    """For each lane, which access units of the clip its decoder has had since a key frame."""
    let_go: dict[int, int] = field(default_factory=dict)
    """The newest picture of the group that was only decoded."""

    def work(self, units: Sequence[bytes], delay: int, most: int) -> list[ItemDone]:
        """``most`` access units are decoded; the others must wait for their turn."""
        items, slot = self.sent.popleft(), self.slots.popleft()
        return [self._item(item, slot, units, delay, most) for item in items]

    def _item(
        self, item: VideoItem, slot: bytes, units: Sequence[bytes], delay: int, most: int
    ) -> ItemDone:
        if item.begins:
            self.fed[item.lane] = []
            self.let_go[item.lane] = -1
        fed = self.fed.get(item.lane)
        if fed is None or len(fed) != item.first:
            return PictureHeld(-1)
        at = item.offset
        for i, length in enumerate(item.lengths):
            fed.append(units.index(slot[at : at + length]))
            at += length
            if i + 1 >= most and len(fed) <= item.last and not item.ahead:
                return PictureHeld(len(fed) - 1)
        assert fed == list(range(fed[0], fed[0] + len(fed))), "units that do not follow each other"
        assert fed[0] % KEYINT == 0, "a group that begins with no key frame"
        if item.ahead:
            assert not item.begins
            assert not item.drain
            self.let_go[item.lane] = item.picture
            return PictureHeld(len(fed) - 1)
        assert item.picture > self.let_go[item.lane], "a picture that was let go of"
        if item.picture + delay >= len(fed) and not item.drain:
            return PictureHeld(len(fed) - 1, min(delay, len(fed)))
        if item.drain and item.last + 1 > len(fed):
            return PictureHeld(-1)
        return DetectDone(WIDTH + fed[0] + item.picture, 48, 0, 0, 0)


class Bench:
    """Two lanes, the schedule, and its workers; ``PoolPort``."""

    def __init__(
        self, kind: str, policy: Overload, *, cache: int = 1 << 20, fps: float = 0
    ) -> None:
        self.units = CLIPS[kind]
        self.now = 1
        found = annexb.examine(self.units[0], Encoding.H264, 0).format
        assert found is not None
        self.delay = found.reorder
        self.codec = Codec(Stage.DETECTOR, [8])
        self.schedule = Schedule("detector", self.codec)
        self.seats = [Seat(), Seat()]
        self.available = True
        self.released: list[int] = []
        self.blamed = 0
        pools = ScriptedPools(Stage.DETECTOR)
        pools.pipeline._detector = self
        self.lanes = [
            Lane(
                number,
                str(number),
                LaneOptions(overload=policy, max_frame_age_ns=10**15, analysis_fps=fps),
                pools.pipeline,
                window=256,
                window_bytes=1 << 30,
                tracking_params=tracking.Params(),
                video_cache_bytes=cache,
                clock=lambda: self.now,
            )
            for number in (1, 2)
        ]
        self.arrived = [0, 0]
        self.taken: list[list[Any]] = [[], []]

    # -- the pool's side ------------------------------------------------------------------

    def submit(self, task: Task[Any]) -> None:
        refusal = self.schedule.submit(task, 0, lambda _: True, self.seats)
        if refusal is not None:
            task.future.set_exception(refusal)

    def replace(self, task: Task[Any], by: Task[Any]) -> bool:
        return self.schedule.replace(task, by, 0, lambda _: True)

    def withdraw(self, task: Task[Any]) -> bool:
        return self.schedule.withdraw(task)

    def pass_by(self, task: Task[Any]) -> None:
        self.schedule.pass_by(task)

    def release(self, lane: int) -> None:
        self.schedule.release(lane)
        self.released.append(lane)

    def resolve(self, ended: Ended) -> None:
        for task, outcome in ended:
            if task.future.done():
                continue
            if isinstance(outcome, FacelaneError):
                task.future.set_exception(outcome)
            else:
                task.future.set_result(outcome)

    def dispatch(self) -> bool:
        given = self.schedule.next(self.seats)
        if given is None:
            return False
        seat, tasks = given
        self.resolve(self.schedule.without_pictures(tasks, seat))
        tasks = [task for task in tasks if not task.future.done()]
        if not tasks:
            return True
        for task in tasks:
            task.dispatched_ns = 1
        slot = bytearray(1 << 20)
        items, used = self.codec.write(
            [task.request for task in tasks], memoryview(slot), seat.decoders
        )
        for other in self.seats:
            if other is not seat:
                for task in tasks:
                    if task.lane in other.decoders:
                        other.decoders.closed(task.lane)
                        other.fed.pop(task.lane, None)
        seat.jobs.append(Job(1, 0, tasks))
        seat.sent.append([item for item in items if isinstance(item, VideoItem)])
        seat.slots.append(bytes(slot[:used]))
        seat.free_slots -= 1
        return True

    def complete(self, which: int, most: int = 10**6) -> None:
        seat = self.seats[which]
        if not seat.jobs:
            return
        job = seat.jobs.popleft()
        done = seat.work(self.units, self.delay, most)
        seat.free_slots += 1
        ended, _ = self.schedule.answered(
            job, InferDone(1, done), self.codec, memoryview(b""), self.now, seat.decoders
        )
        self.resolve(ended)

    def fail(self, which: int) -> None:
        """A job fails whole: it was not begun."""
        seat = self.seats[which]
        if not seat.jobs:
            return
        job = seat.jobs.popleft()
        seat.sent.popleft()
        seat.slots.popleft()
        seat.free_slots += 1
        self.blamed += 1
        seat.decoders.forget(task.lane for task in job.tasks)
        self.resolve(self.schedule.failed(job, InferFailed(1, "OUT_OF_MEMORY", "full", True)))

    def lose(self, which: int, reason: str) -> None:
        seat, self.seats[which] = self.seats[which], Seat()
        self.blamed += reason != "RESTARTED" and bool(seat.jobs)
        self.resolve(self.schedule.taken_back(seat.jobs, reason, 0, overlaps=True))

    # -- the streams' side ------------------------------------------------------------------

    def arrive(self, which: int) -> None:
        number = self.arrived[which]
        if number < len(self.units):
            self.arrived[which] += 1
            picture = Picture(Encoding.H264, self.units[number])
            self.lanes[which].offer(Frame(number + 1, picture, number * S // 25))

    async def settle(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0)
        for which, lane in enumerate(self.lanes):
            if lane._outbox:
                self.taken[which] += await lane.take()

    async def finish(self) -> None:
        """Everything that was begun comes to its end."""
        for lane in self.lanes:
            lane.close_input()
        for _ in range(10 * COUNT):
            await self.settle()
            while self.dispatch():
                pass
            for which in range(len(self.seats)):
                self.complete(which)
            if all(lane.settled for lane in self.lanes):
                break
        await self.settle()
        for lane in self.lanes:
            assert lane.settled
            lane.finish()

    def outcomes(self, which: int) -> list[Outcome]:
        found = [item for item in self.taken[which] if isinstance(item, Outcome)]
        assert [o.frame_id for o in found] == list(range(1, self.arrived[which] + 1))
        for outcome in found:
            if isinstance(outcome.body, FrameResult):
                assert outcome.body.width == WIDTH + outcome.frame_id - 1, "another's picture"
        return found

    def drops(self, which: int) -> list[DropReason]:
        return [o.body.reason for o in self.outcomes(which) if isinstance(o.body, FrameDrop)]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["arrive", "arrive", "thin", "all", "part"]), st.integers(0, 1)),
        st.tuples(st.sampled_from(["dispatch", "settle"]), st.just(0)),
        st.tuples(st.sampled_from(["complete", "slice", "restart"]), st.integers(0, 1)),
    ),
    max_size=120,
)
VIOLENT = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["arrive", "arrive", "complete"]), st.integers(0, 1)),
        st.tuples(st.sampled_from(["thin", "all", "part"]), st.integers(0, 1)),
        st.tuples(st.sampled_from(["dispatch", "settle", "later"]), st.just(0)),
        st.tuples(
            st.sampled_from(["slice", "fail", "crash", "hang", "restart"]), st.integers(0, 1)
        ),
    ),
    max_size=120,
)


async def play(bench: Bench, operations: Sequence[tuple[str, int]]) -> None:
    for name, which in operations:
        match name:
            case "arrive":
                bench.arrive(which)
            case "thin" | "all" if bench.lanes[which].options.overload is Overload.LATEST_WINS:
                bench.lanes[which].take_at(1.0 if name == "thin" else None)
            case "part" if bench.lanes[which].options.overload is Overload.LATEST_WINS:
                bench.lanes[which].take_at(20.0, 0.5)
            case "dispatch":
                bench.dispatch()
            case "settle":
                await bench.settle()
            case "complete":
                bench.complete(which)
            case "slice":
                bench.complete(which, most=2)
            case "later":
                bench.now += limits.BEHIND_NS
            case "restart":
                bench.lose(which, "RESTARTED")
            case "crash":
                bench.lose(which, "EXITED")
            case "hang":
                bench.lose(which, HUNG)
            case "fail":
                bench.fail(which)
    await bench.finish()


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("policy", list(Overload))
@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(operations=OPERATIONS)
def test_workers_that_leave_cost_no_picture(
    kind: str, policy: Overload, operations: list[tuple[str, int]]
) -> None:
    """Drained, reloaded, recycled: the group is decoded elsewhere, and nothing waits."""

    async def scenario() -> None:
        bench = Bench(kind, policy)
        await play(bench, operations)
        for which in (0, 1):
            drops = bench.drops(which)
            assert DropReason.WAITING_FOR_KEY_FRAME not in drops
            assert not any(isinstance(o.body, FrameError) for o in bench.outcomes(which))
            if policy is Overload.LOSSLESS:
                assert drops == []
        assert bench.released == [n for n in (1, 2) if bench.arrived[n - 1]]

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("policy", list(Overload))
@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(operations=VIOLENT)
def test_whatever_happens_every_frame_has_its_outcome(
    kind: str, policy: Overload, operations: list[tuple[str, int]]
) -> None:
    async def scenario() -> None:
        bench = Bench(kind, policy)
        await play(bench, operations)
        for which in (0, 1):
            if DropReason.WAITING_FOR_KEY_FRAME in bench.drops(which):
                assert bench.blamed >= limits.MAX_TASK_ATTEMPTS, "one loss is nobody's proof"
                wanted = [i for i in bench.taken[which] if isinstance(i, KeyFrameWanted)]
                assert wanted, "and the client is asked for a key frame"

    asyncio.run(scenario())


def run(scenario: Any) -> None:
    asyncio.run(scenario())


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("thinned", [1, 3, 5])
def test_what_is_thinned_before_a_picture_does_not_make_it_wait(
    kind: str, beside: bool, thinned: int
) -> None:
    """It is decoded when it comes, beside what its worker does for others; where that does nothing
    for others, with the picture, and the worker has nothing else to do."""

    async def scenario() -> None:
        bench = Bench(kind, Overload.LATEST_WINS)
        bench.seats = [Seat()]
        (seat,) = bench.seats
        rounds: list[dict[int, int]] = []

        async def serve() -> None:
            await bench.settle()
            while bench.dispatch():
                items = seat.sent[-1]
                assert sum(not item.ahead for item in items) <= seat.batch_max
                rounds.append({item.lane: len(item.lengths) for item in items})
                bench.complete(0)
                await bench.settle()

        for _ in range(bench.delay + 1):  # the group is begun by a picture that is wanted
            bench.arrive(0)
            bench.arrive(1)
            await serve()
        bench.lanes[0].take_at(1.0)
        for _ in range(thinned):
            bench.arrive(0)
            if beside:
                bench.arrive(1)
            await serve()
        bench.lanes[0].take_at(None)
        rounds.clear()
        bench.arrive(0)
        await serve()
        assert rounds == [{1: 1 if beside else thinned + 1}]
        await bench.finish()
        assert bench.drops(0).count(DropReason.THINNED) == thinned

    run(scenario)


def test_a_picture_that_waits_is_not_passed_over_by_those_behind_it() -> None:
    """A stream's own rhythm takes one, which waits for a worker, and not the next ones."""

    async def scenario() -> None:
        bench = Bench("plain", Overload.LOSSLESS, fps=12.5)
        bench.seats = [Seat(batch_max=1)]
        (seat,) = bench.seats
        for which in (0, 1, 0, 0, 0):
            bench.arrive(which)
            await bench.settle()
        asked = []
        while bench.dispatch():
            asked.append([(item.lane, item.picture, item.ahead) for item in seat.sent[-1]])
            bench.complete(0)
            await bench.settle()
        assert asked == [[(1, 0, False)], [(2, 0, False)], [(1, 2, False)]]
        bench.arrive(1)
        bench.arrive(1)
        await bench.settle()
        bench.dispatch()
        assert [(item.lane, item.picture, item.ahead) for item in seat.sent[-1]] == [
            (2, 2, False),
            (1, 3, True),
        ]
        bench.complete(0)
        await bench.finish()
        assert not any(isinstance(o.body, FrameError) for o in bench.outcomes(0))

    run(scenario)


def test_what_is_only_decoded_is_nobodys_guilt_and_nothing_is_kept_of_it() -> None:
    async def scenario() -> None:
        bench = Bench("plain", Overload.LATEST_WINS)
        bench.seats = [Seat()]
        for which in (0, 1):
            bench.arrive(which)
        await bench.settle()
        bench.dispatch()
        bench.complete(0)
        bench.lanes[0].take_at(1.0)
        bench.arrive(0)
        bench.arrive(1)
        await bench.settle()
        bench.dispatch()
        (job,) = bench.seats[0].jobs
        assert [task.ahead for task in job.tasks] == [False, True]
        assert job.size == 1
        wanted = job.tasks[0]
        group = bench.lanes[0].footage.group
        assert group is not None
        bench.lose(0, "EXITED")
        assert group.losses == 0
        assert bench.schedule.waiting() == [wanted], "what was only decoded is not tried again"
        assert bench.schedule.retried == 1
        bench.dispatch()
        bench.complete(0)
        bench.lanes[0].abort()
        bench.lanes[0].finish()
        assert not any(own.passed for own in bench.schedule._queue._own.values())
        bench.lanes[1].close_input()
        await bench.settle()

    run(scenario)


async def begun(*, delay: int = 0) -> Bench:
    """One worker, which has decoded the key frames of both lanes; of the first no more pictures are
    looked at."""
    bench = Bench("plain", Overload.LATEST_WINS)
    bench.seats = [Seat()]
    for which in (0, 1):
        bench.arrive(which)
    await bench.settle()
    bench.dispatch()
    bench.delay = delay
    return bench


def sent(bench: Bench) -> list[tuple[int, int, bool]]:
    return [(item.lane, item.picture, item.ahead) for item in bench.seats[0].sent[-1]]


def test_nothing_shares_a_job_with_what_may_have_ended_a_worker() -> None:
    async def scenario() -> None:
        bench = await begun()
        bench.complete(0)
        bench.arrive(1)
        await bench.settle()
        bench.dispatch()
        bench.lanes[0].take_at(1.0)
        bench.arrive(0)
        bench.fail(0)
        bench.dispatch()
        assert sent(bench) == [(2, 1, False)]
        bench.complete(0)
        bench.arrive(1)
        await bench.settle()
        bench.dispatch()
        assert sent(bench) == [(2, 2, False), (1, 1, True)]
        await bench.finish()

    run(scenario)


def test_of_some_groups_of_pictures_nothing_is_taken() -> None:
    """No key frame is asked for: the next one comes as it comes. Streams take turns."""

    async def scenario() -> None:
        bench = Bench("plain", Overload.LATEST_WINS)
        assert bench.lanes[0].tally().group == 0
        for number in range(COUNT):
            if number == KEYINT:
                for which in (0, 1):
                    bench.lanes[which].take_at(1_000.0, 0.5)
            bench.now += S // 25
            for which in (0, 1):
                bench.arrive(which)
            while bench.dispatch():
                bench.complete(0)
                bench.complete(1)
            await bench.settle()
        await bench.finish()
        taken = [
            {(o.frame_id - 1) // KEYINT for o in bench.outcomes(which) if not is_drop(o)}
            for which in (0, 1)
        ]
        assert taken == [{0, 1, 3}, {0, 2}]
        for which in (0, 1):
            assert set(bench.drops(which)) == {DropReason.THINNED}
            assert len(bench.drops(which)) == COUNT - KEYINT * len(taken[which])
            assert not any(isinstance(each, KeyFrameWanted) for each in bench.taken[which])
            assert RateChanged(1_000.0) in bench.taken[which]
            assert bench.lanes[which].tally().group == KEYINT

    run(scenario)


def is_drop(outcome: Outcome) -> bool:
    return isinstance(outcome.body, FrameDrop)


def left_out() -> tuple[Footage, Parts, Sequence[bytes]]:
    """In a group that is not taken, behind one that was."""
    parts = Parts(0)
    footage, units = Footage(1 << 20, 1 << 20, parts=parts), CLIPS["plain"]
    footage.check(Encoding.H264)
    parts.part = 0.0
    for unit in units[:KEYINT]:
        assert footage.take(unit, Encoding.H264) is not None, "nobody knows how long it is"
    for unit in units[KEYINT : KEYINT + 3]:
        assert footage.take(unit, Encoding.H264) is None
        assert footage.thinned
    return footage, parts, units


def test_what_is_broken_in_a_group_that_is_not_taken_is_told() -> None:
    footage, parts, units = left_out()
    footage.lose()
    assert (footage.thinned, footage.dry) == (True, False), "nothing was to be had of it anyway"
    with pytest.raises(FacelaneError):
        footage.take(b"\x00\x00\x00\x01", Encoding.H264)
    assert (footage.thinned, footage.dry) == (False, True), "it may have been a key frame"
    parts.part = 1.0
    assert footage.take(units[KEYINT], Encoding.H264) is not None


def test_a_group_that_is_not_taken_does_not_last_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A camera may send key frames on request alone."""
    footage, _, units = left_out()
    for _ in range(KEYINT - 3):
        assert footage.take(units[KEYINT + 3], Encoding.H264) is None
    assert (footage.thinned, footage.dry) == (True, False)
    assert footage.take(units[KEYINT + 3], Encoding.H264) is None
    assert (footage.thinned, footage.dry) == (False, True), "a key frame is asked for"
    monkeypatch.setattr("facelane_server.lanes.video._LEFT_OUT", KEYINT)
    assert footage.take(units[2 * KEYINT], Encoding.H264) is not None, "they are too far apart"


@given(st.integers(0, 1_000), st.floats(0.05, 1.0), st.integers(1, 200))
def test_a_part_of_the_groups_is_that_part_in_the_long_run(
    lane: int, part: float, count: int
) -> None:
    parts = Parts(lane)
    parts.part = part
    taken = [parts.takes() for _ in range(count)]
    assert abs(sum(taken) - part * count) <= 1.0 + 1e-6
    parts.part = 1.0
    assert all(parts.takes() for _ in range(20)), "all of them"


@pytest.mark.parametrize(("anew", "keeps_age"), [(False, True), (True, True), (False, False)])
def test_whose_decoder_falls_behind_waits_for_a_key_frame(anew: bool, keeps_age: bool) -> None:
    """More of the group would only come later and later. One that begins with all since the key
    frame (a worker was lost) catches up: that nobody waits for. Where no age is kept it may."""

    async def scenario() -> None:
        bench = await begun()
        bench.lanes[0].keeps_age = keeps_age
        bench.complete(0)
        await bench.settle()
        if anew:
            bench.lose(0, "EXITED")
        for _ in range(3):
            bench.arrive(0)
        await bench.settle()
        assert bench.dispatch()
        bench.arrive(0)
        await bench.settle()
        assert bench.dispatch(), "another one is under way"
        bench.complete(0, most=2)
        bench.now += limits.BEHIND_NS
        bench.arrive(0)
        await bench.settle()
        assert not any(isinstance(each, KeyFrameWanted) for each in bench.taken[0]), "not for long"
        bench.now += 1
        bench.arrive(0)
        await bench.settle()
        asked = [each for each in bench.taken[0] if isinstance(each, KeyFrameWanted)]
        gives_up = keeps_age and not anew
        assert len(asked) == gives_up
        while bench.arrived[0] < KEYINT + 1:
            bench.arrive(0)
        await bench.finish()
        waiting = [
            outcome.frame_id
            for outcome in bench.outcomes(0)
            if isinstance(outcome.body, FrameDrop)
            and outcome.body.reason is DropReason.WAITING_FOR_KEY_FRAME
        ]
        assert waiting == (list(range(7, KEYINT + 1)) if gives_up else [])
        assert isinstance(bench.outcomes(0)[-1].body, FrameResult)

    run(scenario)


def test_what_follows_a_picture_under_way_waits_for_its_answer() -> None:
    """Only that says how far the decoder is."""

    async def scenario() -> None:
        bench = await begun()
        bench.lanes[0].take_at(1.0)
        bench.arrive(0)
        bench.arrive(1)
        await bench.settle()
        bench.dispatch()
        assert sent(bench) == [(2, 1, False)], "staged behind the key frames"
        bench.complete(0)
        bench.arrive(1)
        await bench.settle()
        bench.dispatch()
        assert sent(bench) == [(2, 2, False), (1, 1, True)]
        await bench.finish()

    run(scenario)


def test_a_picture_that_is_held_back_is_not_passed_over() -> None:
    async def scenario() -> None:
        bench = await begun(delay=1)  # which the stream has not told
        bench.lanes[0].take_at(1.0)
        bench.arrive(0)
        bench.arrive(1)
        await bench.settle()
        bench.complete(0)
        # Before the lane hears that its picture is held back.
        bench.dispatch()
        assert sent(bench) == [(2, 1, False)]
        await bench.finish()
        assert not any(isinstance(o.body, FrameError) for o in bench.outcomes(0))

    run(scenario)


@pytest.mark.parametrize("answer", [ItemFailed("PICTURE_CORRUPT", "broken"), PictureHeld(-1)])
def test_what_could_not_be_decoded_ahead_is_told_with_the_next_picture(answer: ItemDone) -> None:
    async def scenario() -> None:
        bench = await begun()
        bench.complete(0)
        bench.lanes[0].take_at(1.0)
        bench.arrive(0)
        bench.arrive(1)
        await bench.settle()
        bench.dispatch()
        (seat,) = bench.seats
        job = seat.jobs.popleft()
        (found, _) = seat.work(bench.units, 0, 9)
        ended, _ = bench.schedule.answered(
            job, InferDone(1, [found, answer]), bench.codec, memoryview(b""), 0, seat.decoders
        )
        assert [task for task, _ in ended] == job.tasks[:1]
        seat.free_slots += 1
        bench.resolve(ended)
        bench.lanes[0].take_at(None)
        bench.arrive(0)
        await bench.settle()
        bench.dispatch()
        (item,) = seat.sent[-1]
        assert (item.begins, item.first, item.last) == (True, 0, 2), "all of it again"
        await bench.finish()
        assert bench.drops(0) == [DropReason.THINNED]

    run(scenario)


def test_a_group_that_kills_two_workers_is_given_up() -> None:
    """One picture takes over from another; they must not cost worker after worker."""

    async def scenario() -> None:
        bench = Bench("plain", Overload.LATEST_WINS)
        for _ in range(3):
            bench.arrive(0)
        losses = 0
        for _ in range(10):
            if bench.dispatch():
                bench.lose(next(i for i, s in enumerate(bench.seats) if s.jobs), "EXITED")
                losses += 1
            await bench.settle()
            if bench.arrived[0] < KEYINT:
                bench.arrive(0)
        assert losses == limits.MAX_TASK_ATTEMPTS
        while bench.arrived[0] < KEYINT + 2:
            bench.arrive(0)
        await bench.finish()
        bodies = [o.body for o in bench.outcomes(0)]
        reasons = [b.reason for b in bodies if isinstance(b, FrameError)]
        assert set(reasons) == {Reason.POISONED}, "what was in flight"
        assert DropReason.WAITING_FOR_KEY_FRAME in bench.drops(0)
        assert isinstance(bodies[-1], FrameResult), "the next key frame begins anew"

    run(scenario)


def test_a_group_that_is_too_large_waits_for_a_key_frame_after_a_loss() -> None:
    async def scenario() -> None:
        sizes = [len(unit) for unit in CLIPS["plain"]]
        bench = Bench("plain", Overload.LOSSLESS, cache=sizes[0] + 10)
        for _ in range(4):
            bench.arrive(0)
            await bench.settle()
            bench.dispatch()
            bench.complete(0)
            bench.complete(1)
        home = next(i for i, seat in enumerate(bench.seats) if len(seat.decoders))
        bench.lose(home, "RESTARTED")
        for _ in range(KEYINT):
            bench.arrive(0)
            await bench.settle()
            bench.dispatch()
            bench.complete(0)
            bench.complete(1)
        await bench.finish()
        results = [isinstance(o.body, FrameResult) for o in bench.outcomes(0)]
        assert results == [True] * 4 + [False] * (KEYINT - 4) + [True] * 4
        assert set(bench.drops(0)) == {DropReason.WAITING_FOR_KEY_FRAME}
        asked = [item for item in bench.taken[0] if isinstance(item, KeyFrameWanted)]
        assert len(asked) == 1

    run(scenario)


def test_what_is_superseded_is_decoded_for_the_next() -> None:
    async def scenario() -> None:
        bench = Bench("plain", Overload.LATEST_WINS)
        for _ in range(6):
            bench.arrive(0)
        assert bench.dispatch()
        (items,) = [seat.sent[0] for seat in bench.seats if seat.sent]
        assert (items[0].first, items[0].last, items[0].begins) == (0, 5, True)
        await bench.finish()
        assert bench.drops(0) == [DropReason.SUPERSEDED] * 5

    run(scenario)


def test_a_rate_is_kept_over_video_and_its_age_bound() -> None:
    async def scenario() -> None:
        bench = Bench("plain", Overload.LOSSLESS, fps=5)
        for _ in range(25):
            bench.arrive(0)
            await bench.settle()
        assert bench.schedule.queued == 5
        assert bench.lanes[0].tally().received == 5, "the others are no work for who thins"
        await bench.finish()
        results = [i for i, o in enumerate(bench.outcomes(0)) if isinstance(o.body, FrameResult)]
        assert results == [0, 5, 10, 15, 20]
        assert bench.drops(0) == [DropReason.SUPERSEDED] * 20

    run(scenario)


def test_a_frame_that_did_not_arrive_whole_waits_for_a_key_frame() -> None:
    async def scenario() -> None:
        bench = Bench("plain", Overload.LOSSLESS)
        bench.arrive(0)
        broken = FacelaneError(Reason.PICTURE_TOO_LARGE, "too large")
        bench.lanes[0].offer(Frame(2, Picture(Encoding.JPEG, b""), S // 25), broken)
        bench.arrived[0] = 2
        for _ in range(KEYINT):
            bench.arrive(0)
        await bench.finish()
        bodies = [o.body for o in bench.outcomes(0)]
        assert isinstance(bodies[1], FrameError)
        assert bench.drops(0) == [DropReason.WAITING_FOR_KEY_FRAME] * (KEYINT - 2)

    run(scenario)


@pytest.mark.parametrize("kind", CLIPS)
def test_a_picture_that_was_left_out_is_missed(kind: str) -> None:
    """An H.264 decoder makes something up for it, which nobody could tell from a face."""
    whole = annexb.examine(CLIPS[kind][0], Encoding.H264, 0).format
    needed = [
        number
        for number in range(1, KEYINT - 1)
        if annexb.examine(CLIPS[kind][number], Encoding.H264, 0, whole).reference
    ]
    assert needed
    for missing in needed:
        footage = Footage(0, 1 << 20)
        footage.check(Encoding.H264)
        for number, unit in enumerate(CLIPS[kind]):
            if number == missing:
                continue
            found = footage.take(unit, Encoding.H264)
            assert (found is None) is (missing < number < KEYINT), (missing, number)


def test_a_window_smaller_than_the_delay_does_not_stand_still() -> None:
    async def scenario() -> None:
        bench = Bench("reordered", Overload.LOSSLESS)
        lane = bench.lanes[0]
        lane._window = 1
        for _ in range(4):
            bench.arrive(0)
            for _ in range(3):
                await bench.settle()
                while bench.dispatch():
                    pass
                bench.complete(0)
                bench.complete(1)
            while lane._unwritten:
                lane.written()
            assert lane.can_accept
        await bench.finish()
        assert len(bench.outcomes(0)) == 4

    run(scenario)


def test_streams_that_wait_for_each_others_room_do_not_stand_still() -> None:
    """Pictures that wait for those behind them hold their key's room, and nobody may send more."""

    async def scenario() -> None:
        bench = Bench("reordered", Overload.LOSSLESS)
        allowance = Allowance(1 << 20)
        for which, lane in enumerate(bench.lanes):
            lane._allowance = allowance
            for _ in range(bench.delay):
                bench.arrive(which)
            assert len(lane._ahead) == bench.delay, "they wait for more"
        allowance.take(1 << 20)  # what other streams of the key keep
        waiting = [asyncio.create_task(lane.wait_can_accept()) for lane in bench.lanes]
        for _ in range(20):
            await bench.settle()
            while bench.dispatch():
                pass
            bench.complete(0)
            bench.complete(1)
        for lane in bench.lanes:
            while lane._unwritten:
                lane.written()
        async with asyncio.timeout(30):
            await asyncio.gather(*waiting)
        assert all(lane.can_accept for lane in bench.lanes)
        await bench.finish()

    run(scenario)


def test_a_window_smaller_than_a_delay_that_nobody_told_does_not_stand_still() -> None:
    async def scenario() -> None:
        bench = Bench("plain", Overload.LOSSLESS)
        bench.delay = 2
        lane = bench.lanes[0]
        lane._window = 1
        for _ in range(4):
            bench.arrive(0)
            for _ in range(6):
                await bench.settle()
                while bench.dispatch():
                    pass
                bench.complete(0)
                bench.complete(1)
            while lane._unwritten:
                lane.written()
            assert lane.can_accept
        await bench.finish()
        assert len(bench.outcomes(0)) == 4

    run(scenario)


def test_frames_that_are_dropped_behind_one_that_waits_fill_no_window_for_ever() -> None:
    """A key frame of an open group waits for more, and pictures that need what was before it have
    their outcome, which it holds up."""

    async def scenario() -> None:
        units = clip("h265", 30, size=(64, 48), bframes=3, keyint=10, open_gop=True)
        found = [annexb.examine(unit, Encoding.H265, 0) for unit in units]
        first = next(i for i, unit in enumerate(found) if unit.key is annexb.Key.SOFT)
        assert found[first + 1].leading
        pools = ScriptedPools(Stage.DETECTOR)
        lane = Lane(
            1,
            "1",
            LaneOptions(overload=Overload.LOSSLESS),
            pools.pipeline,
            window=2,
            window_bytes=1 << 30,
            tracking_params=tracking.Params(),
        )
        for number in (first, first + 1):
            assert lane.can_accept
            lane.offer(Frame(number, Picture(Encoding.H265, units[number]), number * S // 25))
        assert not lane.can_accept
        assert len(pools.detector.waiting) == 1, "nothing more may come: it is shown"
        lane.abort()
        lane.finish()

    run(scenario)


# -- groups and decoders ------------------------------------------------------------------

FORMAT = Format(64, 48, 8)


def group(*sizes: int, most: int = 100) -> Group:
    made = Group(Encoding.H264, FORMAT, most)
    for size in sizes:
        made.append(bytes(size))
    return made


def test_a_group_is_kept_while_it_fits() -> None:
    made = group(40, 20, 20)
    assert made.kept
    assert made.units(0, 2) == [bytes(40), bytes(20), bytes(20)]
    assert made.bytes_between(1, 2) == 40
    made.decoded(1)
    assert made.append(bytes(50))
    assert not made.kept
    assert made.units(0, 2) is None
    assert made.units(2, 3) == [bytes(20), bytes(50)]
    assert made.bytes_between(0, 3) == made.size == 70


def test_a_group_that_nobody_decodes_does_not_grow() -> None:
    made = group(40, 40)
    assert not made.append(bytes(40))
    assert made.broken
    assert made.size == 80


def test_the_first_access_unit_is_kept_whatever_its_size() -> None:
    assert group(500).size == 500


def test_what_a_decoder_is_given() -> None:
    held, made = Decoders(), group(1, 1, 1, 1, 1)

    def asks(picture: int, **more: Any) -> tuple[int, int, bool] | None:
        wanted = Wanted(7, made, picture, picture, **more)
        span = held.span(wanted)
        if span is None:
            return None
        held.sent(wanted, span)
        return span.first, span.last, span.begins

    assert asks(1) == (0, 1, True)
    assert asks(3) == (2, 3, False)
    assert asks(2) == (0, 2, True), "a picture that is past takes the group again"
    assert held.take_replayed() == 0, "no picture of it was decoded yet"
    made.decoded(2)
    held.at(7, 1)
    assert asks(3) == (2, 3, False)
    held.forget([7])
    assert asks(4) == (0, 4, True)
    assert (held.take_replayed(), held.take_replayed()) == (1, 0)
    made.broken = True
    held.forget([7])
    assert asks(4) is None
    assert 7 in held, "the worker has its decoder until it is told to close it"
    held.closed(7)
    assert (7 in held, len(held)) == (False, 0)


@pytest.mark.parametrize("tired", [0, 1])
def test_a_worker_that_never_shows_a_picture_is_lost_and_its_tasks_are_not(tired: int) -> None:
    """It may say so of any of a batch: what was put back by then is not put back twice."""
    made = Schedule("detector", Codec(Stage.DETECTOR, []))
    tasks = [task(1), task(2)]
    tasks[tired].slices = limits.MAX_GROUP_UNITS
    job = Job(1, 0, list(tasks))
    held: list[Any] = [PictureHeld(0), PictureHeld(0)]
    slot = memoryview(bytearray(64))
    with pytest.raises(ProtocolError):
        made.answered(job, InferDone(1, held), made.codec, slot, 0, Decoders())
    assert made.taken_back([job], "PROTOCOL", 0, overlaps=False) == []
    assert made.queued == 2


def test_a_worker_cannot_have_decoded_what_there_is_not() -> None:
    codec, one = Codec(Stage.DETECTOR, []), task(1)
    slot = memoryview(bytearray(64))
    assert codec.read(one.request, PictureHeld(0), slot)
    with pytest.raises(ProtocolError):
        codec.read(one.request, PictureHeld(1), slot)


# -- lanes and their workers ----------------------------------------------------------------


def task(lane: int, picture: int = 0) -> AnyTask:
    request = VideoRequest(Wanted(lane, group(1), picture, picture), 1, 0)
    future: Any = Future()
    return Task(request, lane, 1, 10**18, future)


def everything(lineup: Lineup[str], seat: str) -> list[int]:
    found = []
    while lineup.is_alone(seat) is not None:
        found += [t.lane for t in lineup.take(seat, 1, lambda _: True)]
    return found


def test_lanes_are_spread_and_stay() -> None:
    lineup: Lineup[str] = Lineup()
    for lane in range(6):
        lineup.put(task(lane), ["a", "b"])
    assert everything(lineup, "a") == [0, 2, 4]
    assert everything(lineup, "b") == [1, 3, 5]
    for lane in range(6):
        lineup.put(task(lane, 3), ["a", "b"])
    assert everything(lineup, "b") == [1, 3, 5]
    assert len(lineup) == 3


def test_a_worker_that_comes_is_given_lanes_with_their_key_frames() -> None:
    lineup: Lineup[str] = Lineup()
    for lane in range(4):
        lineup.put(task(lane), ["a"])
    assert len(everything(lineup, "a")) == 4
    for lane in range(4):
        lineup.put(task(lane, 1), ["a", "b"])
    assert everything(lineup, "b") == [], "not between key frames"
    assert len(everything(lineup, "a")) == 4
    for lane in range(4):
        lineup.put(task(lane), ["a", "b"])
    assert len(everything(lineup, "b")) == 2
    assert len(everything(lineup, "a")) == 2


def test_what_belonged_to_a_worker_that_is_gone() -> None:
    lineup: Lineup[str] = Lineup()
    for lane in range(4):
        lineup.put(task(lane), ["a", "b"])
    lineup.settle(["b"])
    assert sorted(everything(lineup, "b")) == [0, 1, 2, 3]
    lineup.settle([])
    lineup.put(task(9), [])
    assert everything(lineup, "c") == [9], "without a worker it waits for whoever comes"
    lineup.put(task(9, 1), ["c", "d"])
    assert everything(lineup, "d") == []
    assert everything(lineup, "c") == [9]


def test_what_came_back_from_a_worker_that_is_gone_waits_once() -> None:
    lineup: Lineup[str] = Lineup()
    tasks = [task(lane) for lane in range(3)]
    for one in [*tasks, task(7)]:
        lineup.put(one, ["a"])
    assert lineup.take("a", 3, lambda _: True) == tasks
    for one in reversed(tasks):
        lineup.put_back(one, alone=False)
    lineup.settle(["b"])
    assert len(lineup) == 4
    # In one batch: a queue that runs empty forgets what it had too much of.
    assert [one.lane for one in lineup.take("b", 9, lambda _: True)] == [0, 1, 2, 7]
    assert len(lineup) == 0


@given(st.data())
def test_every_task_waits_once_wherever_its_lane_goes(data: st.DataObject) -> None:
    """Tasks come, are taken, come back and lose their workers, in any order."""
    lineup: Lineup[str] = Lineup()
    names = ["a", "b", "c"]
    seats = names[:1]
    waiting: dict[int, AnyTask] = {}
    out: dict[int, AnyTask] = {}
    for _ in range(data.draw(st.integers(1, 30))):
        match data.draw(st.sampled_from(["put", "put", "take", "back", "seats", "withdraw"])):
            case "put":
                one = task(data.draw(st.integers(0, 4)), data.draw(st.integers(0, 1)))
                lineup.put(one, seats)
                waiting[id(one)] = one
            case "take" if seats and waiting:
                most = data.draw(st.sampled_from([1, 2, 9]))
                for one in lineup.take(data.draw(st.sampled_from(seats)), most, lambda _: True):
                    out[id(one)] = waiting.pop(id(one))
            case "back" if out:
                one = out.pop([*out][data.draw(st.integers(0, len(out) - 1))])
                lineup.put_back(one, alone=data.draw(st.booleans()))
                waiting[id(one)] = one
            case "seats":
                seats = data.draw(st.lists(st.sampled_from(names), unique=True))
                lineup.settle(seats)
            case "withdraw" if waiting:
                one = waiting.pop([*waiting][data.draw(st.integers(0, len(waiting) - 1))])
                assert lineup.withdraw(one)
        assert len(lineup) == len(waiting)
        assert {id(one) for one in lineup.tasks()} == waiting.keys()
    lineup.settle(["z"])
    found = []
    while lineup.is_alone("z") is not None:
        found += [id(one) for one in lineup.take("z", 99, lambda _: True)]
    assert sorted(found) == sorted(waiting)
    assert len(lineup) == 0


def test_lanes_do_not_wait_for_a_worker_that_may_hang() -> None:
    schedule = Schedule("detector", Codec(Stage.DETECTOR, [8]))
    stuck, other = Seat(), Seat()
    assert schedule.submit(task(1), 0, lambda _: True, [stuck]) is None
    given = schedule.next([stuck, other])
    assert given is not None
    assert given[0] is stuck
    stuck.jobs.append(Job(1, 0, given[1], started_ns=1))
    assert schedule.submit(task(1, 1), 0, lambda _: True, [stuck, other]) is None
    seats = [stuck, other]
    assert list(schedule.answering(seats, S // 4)) == seats
    assert list(schedule.answering([stuck], S)) == [stuck], "while there is nobody else"
    given = schedule.next(schedule.answering(seats, S))
    assert given is not None
    assert given[0] is other


def test_so_much_is_decoded_beside_a_batch_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Codec(Stage.DETECTOR, [])
    schedule, seat = Schedule("detector", codec), Seat(batch_max=limits.MAX_BATCH)
    lanes = range(1, limits.MAX_AHEAD + 6)
    groups = {lane: group(*[10] * 9) for lane in lanes}

    def asked(lane: int, last: int, **more: Any) -> AnyTask:
        ahead = more.pop("ahead", True)
        wanted = Wanted(lane, groups.get(lane, group(1)), last, last, **more)
        return Task(VideoRequest(wanted, 0, 0, ahead), lane, 1, 10**18, Future())  # type: ignore[arg-type]

    def beside() -> list[int]:
        """With a picture of a lane that begins."""
        one = asked(100, 0, ahead=False)
        assert schedule.submit(one, 0, lambda _: True, [seat]) is None
        given = schedule.next([seat])
        assert given is not None
        codec.write([t.request for t in given[1]], memoryview(bytearray(1 << 16)), seat.decoders)
        assert given[1][0] is one
        return [t.lane for t in given[1][1:]]

    for lane in lanes:
        assert schedule.submit(asked(lane, 0, ahead=False), 0, lambda _: True, [seat]) is None
    given = schedule.next([seat])
    assert given is not None
    codec.write([t.request for t in given[1]], memoryview(bytearray(1 << 16)), seat.decoders)
    for last in (1, 2):
        for lane in lanes:
            schedule.pass_by(asked(lane, last))
    assert beside() == list(lanes)[: limits.MAX_AHEAD], "those that wait longest"
    schedule.pass_by(asked(1, 3))
    assert beside() == [*list(lanes)[limits.MAX_AHEAD :], 1]
    assert beside() == []
    schedule.pass_by(asked(1, 3 + limits.MAX_AHEAD_UNITS))
    schedule.pass_by(asked(2, 2 + limits.MAX_AHEAD_UNITS + 1))
    schedule.pass_by(asked(3, 3, drains=True))
    assert beside() == [1], "more go with the next picture, and so does the end of a group"
    monkeypatch.setattr(limits, "REQUEST_SLOT_BYTES", codec.cost(asked(4, 3).request)[0])
    schedule.pass_by(asked(4, 3))
    assert beside() == [], "there is no room left beside the picture"
    monkeypatch.undo()
    assert beside() == [4]
    schedule.pass_by(asked(4, 4))
    schedule.release(4)
    assert beside() == []


def test_more_lanes_than_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_DECODERS", 2)
    lineup: Lineup[str] = Lineup()
    for lane in range(4):
        assert lineup.has_home(task(lane), ["a", "b"])
        lineup.put(task(lane), ["a", "b"])
    assert not lineup.has_home(task(9), ["a", "b"])
    lineup.release(0)
    assert lineup.has_home(task(9), ["a", "b"])


def test_the_video_of_one_key_shuts_out_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_DECODERS", 4)
    lineup: Lineup[str] = Lineup()

    def comes(key: str, lane: int) -> bool:
        one = task(lane)
        one.sender = Sender(key)
        if let_in := lineup.has_home(one, ["a", "b"]):
            lineup.put(one, ["a", "b"])
        return let_in

    assert [comes("many", lane) for lane in range(9)] == [True] * 8 + [False]
    assert [comes("few", lane) for lane in range(10, 20)] == [True] * 4 + [False] * 6
    assert [comes("many", lane) for lane in range(8)] == [True] * 4 + [False] * 4
    assert comes("third", 20)
    assert [comes("few", lane) for lane in range(10, 13)] == [True] * 3
    assert len(lineup._homes) == len(lineup._keys) == 8
    for lane in range(30):
        lineup.release(lane)
    assert not lineup._keys


# -- rhythm ---------------------------------------------------------------------------------


@given(
    fps=st.floats(0.5, 30),
    gaps=st.lists(st.integers(0, S // 10), min_size=20, max_size=200),
)
def test_a_rhythm_takes_no_more_than_its_rate(fps: float, gaps: list[int]) -> None:
    rhythm, at, taken = Rhythm(fps), 0, 0
    for gap in gaps:
        at += gap
        taken += rhythm.takes(at)
    span = sum(gaps[1:]) / S
    assert taken <= span * fps + 1.101, "a tenth of a beat early at most"
    # One picture may lie up to its own gap behind each beat.
    assert taken >= int(span / (1 / fps + 0.1))


@pytest.mark.parametrize("fps", [5, 12.5, 15, 25, 30])
def test_stamps_of_whole_milliseconds_keep_the_rhythm(fps: float) -> None:
    rhythm = Rhythm(fps)
    assert all(rhythm.takes(round(n * 1000 / fps) * 1_000_000) for n in range(300))


def test_the_allowance_of_a_key_is_given_back() -> None:
    async def scenario() -> None:
        allowance = Allowance(1 << 20)
        pools = ScriptedPools(Stage.DETECTOR)
        lane = Lane(
            1,
            "1",
            LaneOptions(overload=Overload.LOSSLESS),
            pools.pipeline,
            window=64,
            window_bytes=1 << 20,
            tracking_params=tracking.Params(),
            allowance=allowance,
        )
        for number, unit in enumerate(CLIPS["plain"][:12]):
            lane.offer(Frame(number + 1, Picture(Encoding.H264, unit), number * S // 25))
        assert allowance._held > sum(map(len, CLIPS["plain"][:12]))
        lane.abort()
        lane.finish()
        lane.finish()
        assert allowance._held == 0
        assert pools.detector.released[:1] == [1]

    run(scenario)
