"""Whatever the second stages do: one outcome a frame, in order, and no verdict of a stage
that is missing."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facelane_server import tracking
from facelane_server.domain import (
    Box,
    Candidate,
    Decision,
    DetectedFace,
    DropReason,
    Encoding,
    FacelaneError,
    Frame,
    FrameResult,
    LivenessVerdict,
    Outcome,
    Overload,
    Picture,
    Reason,
    Stage,
)
from facelane_server.gallery.decide import Thresholds
from facelane_server.lanes import Lane, LaneOptions
from facelane_server.pipeline import Pipeline
from facelane_server.pools.tasks import DetectAnswer, EmbedAnswer, LivenessAnswer

THRESHOLDS = Thresholds(match=0.5, margin=0.05, ood=0.4, live=0.8, spoof=0.2)
PICTURE = Picture(Encoding.BGR24, bytes(64 * 64 * 3), 64, 64, 192)
POINTS = ((30.0, 30.0), (50.0, 30.0), (40.0, 40.0), (33.0, 50.0), (47.0, 50.0))
FRAME_NS = 100_000_000


class ScriptedPool:
    """Holds tasks until ``answer`` or ``fail``; refuses them at once while unavailable."""

    def __init__(self, make: Any) -> None:
        self.available = True
        self.tasks: deque[Any] = deque()
        self._make = make

    def submit(self, task: Any) -> None:
        if self.available:
            task.dispatched_ns = 1
            self.tasks.append(task)
        else:
            task.future.set_exception(FacelaneError(Reason.POOL_UNAVAILABLE, "gone"))

    def withdraw(self, task: Any) -> bool:
        return False

    def pass_by(self, task: Any) -> None:
        raise AssertionError("no video here")

    def release(self, lane: int) -> None:
        raise AssertionError("no video here")

    def replace(self, task: Any, by: Any) -> bool:
        return False

    def answer(self, ok: bool) -> None:
        """The oldest task ends; the pool's own error if not ``ok``."""
        if not self.tasks:
            return
        task = self.tasks.popleft()
        if ok:
            task.future.set_result(self._make())
        else:
            task.future.set_exception(FacelaneError(Reason.WORKER_LOST, "lost"))


def face(x: float) -> DetectedFace:
    return DetectedFace(Box(x, 20.0, 40.0, 40.0), 0.99, POINTS, (b"", b""))


class Bench:
    """A lane over scripted pools; everybody is known and live as long as anybody is asked."""

    def __init__(self, faces: int, overload: Overload) -> None:
        found = tuple(face(100.0 * n) for n in range(faces))
        known = EmbedAnswer(0.9, (Candidate("known", 0.9),))
        self.pools = {
            Stage.DETECTOR: ScriptedPool(lambda: DetectAnswer(640, 480, found)),
            Stage.RECOGNIZER: ScriptedPool(lambda: known),
            Stage.LIVENESS: ScriptedPool(lambda: LivenessAnswer(1.0)),
        }
        pipeline = Pipeline(
            self.pools,
            crops={Stage.RECOGNIZER: (0,), Stage.LIVENESS: (1,)},
            thresholds=THRESHOLDS,
            max_pixels=1_000_000,
        )
        self.lane = Lane(
            1,
            "stream",
            LaneOptions(overload=overload, max_frame_age_ns=10**12),
            pipeline,
            window=256,
            window_bytes=1 << 30,
            tracking_params=tracking.Params(interval_ns=2 * FRAME_NS),
        )
        self.sent = 0

    def offer(self) -> None:
        self.sent += 1
        self.lane.offer(Frame(self.sent, PICTURE, self.sent * FRAME_NS))

    async def settle(self) -> None:
        """Until every pool has nothing more to say."""
        for _ in range(20 * (self.sent + 1)):
            await asyncio.sleep(0)
            for pool in self.pools.values():
                pool.answer(ok=True)

    async def outcomes(self) -> list[Outcome]:
        self.lane.close_input()
        taken: list[Outcome] = []
        while not self.lane.settled:
            items = await asyncio.wait_for(self.lane.take(), 30)
            taken += [item for item in items if isinstance(item, Outcome)]
        return taken


def check(taken: list[Outcome], sent: int) -> None:
    assert [outcome.frame_id for outcome in taken] == list(range(1, sent + 1))
    for outcome in taken:
        body = outcome.body
        if not isinstance(body, FrameResult):
            continue
        if len(body.faces) != 1:
            continue  # what is missing for one face may be there for another
        if Stage.RECOGNIZER in body.missing_stages:
            assert body.faces[0].identity.decision is not Decision.MATCH
            assert not body.faces[0].identity.subject_id
            assert body.faces[0].ood_score is None
        if Stage.LIVENESS in body.missing_stages:
            assert body.faces[0].liveness.verdict is not LivenessVerdict.LIVE


STEPS = st.lists(
    st.one_of(
        st.just(("frame", None, None)),
        st.tuples(st.just("answer"), st.sampled_from(list(Stage)), st.booleans()),
        st.tuples(
            st.just("available"),
            st.sampled_from([Stage.RECOGNIZER, Stage.LIVENESS]),
            st.booleans(),
        ),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(STEPS, st.integers(1, 3), st.sampled_from(list(Overload)))
def test_a_missing_stage_says_nothing(
    steps: list[tuple[str, Any, Any]], faces: int, overload: Overload
) -> None:
    async def play() -> None:
        bench = Bench(faces, overload)
        for _ in range(5):  # known and live before anything happens
            bench.offer()
            await bench.settle()
        for what, stage, value in steps:
            if what == "frame":
                bench.offer()
            elif what == "answer":
                bench.pools[stage].answer(value)
            else:
                bench.pools[stage].available = value
                bench.lane.stages_changed()
            await asyncio.sleep(0)
        await bench.settle()
        taken = await bench.outcomes()
        check(taken, bench.sent)
        totals = bench.lane.totals
        assert totals.received == bench.sent == totals.results + totals.drops + totals.errors

    asyncio.run(play())


@pytest.mark.parametrize("stage", [Stage.RECOGNIZER, Stage.LIVENESS])
async def test_a_known_live_track_loses_its_verdict_with_its_stage(stage: Stage) -> None:
    """The reason for the rule: who steps before a known face while the pool is gone."""
    bench = Bench(1, Overload.LOSSLESS)
    for _ in range(6):
        bench.offer()
        await bench.settle()
    bench.pools[stage].available = False
    bench.offer()
    await bench.settle()
    bench.pools[stage].available = True
    bench.offer()
    await bench.settle()
    before, during, after = (o.body for o in (await bench.outcomes())[-3:])
    assert isinstance(before, FrameResult)
    assert isinstance(during, FrameResult)
    assert isinstance(after, FrameResult)
    assert before.faces[0].identity.decision is Decision.MATCH
    assert before.faces[0].liveness.verdict is LivenessVerdict.LIVE
    assert during.missing_stages == (stage,)
    if stage is Stage.RECOGNIZER:
        assert during.faces[0].identity.decision is Decision.NOT_EVALUATED
        assert during.faces[0].liveness.verdict is LivenessVerdict.LIVE
    else:
        assert during.faces[0].liveness.verdict is LivenessVerdict.UNDECIDED
        assert during.faces[0].identity.decision is Decision.MATCH
    assert after.faces[0].identity.decision is Decision.MATCH
    assert after.faces[0].liveness.verdict is LivenessVerdict.LIVE


async def test_an_aborted_lane_counts_every_frame() -> None:
    bench = Bench(1, Overload.LOSSLESS)
    for _ in range(5):
        bench.offer()
    bench.lane.abort()
    totals = bench.lane.totals
    assert (totals.received, totals.drops) == (5, 5)
    assert totals.drops_by_reason == {DropReason.STREAM_CLOSED: 5}
