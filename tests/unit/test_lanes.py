"""Lanes over scripted pools: every frame one outcome, in order, within the bounds."""

from __future__ import annotations

from typing import Any

import pytest
from tests.fakes.lane_bench import (
    SECOND,
    Stream,
    frame,
    turns,
)
from tests.fakes.scripted_pool import LOST, ScriptedPool, embedding, faces

from facelane_server.domain import (
    Decision,
    DropReason,
    FacelaneError,
    FrameDrop,
    FrameError,
    FrameResult,
    Identity,
    LivenessVerdict,
    Reason,
    Stage,
)
from facelane_server.lanes import (
    StageChanged,
)
from facelane_server.pipeline import Plan

# -- one frame's way ---------------------------------------------------------------------------


async def test_a_frame_goes_through_all_stages() -> None:
    s = Stream()
    s.offer()
    s.pools.detector.answer(faces(2))
    await turns()
    assert (len(s.pools.recognizer.waiting), len(s.pools.liveness.waiting)) == (2, 2)
    assert await s.bodies() == []
    s.now = 5 * SECOND
    s.pools.answer_second("ada")
    (outcome,) = await s.take()
    assert (outcome.frame_id, outcome.stream_offset_ns, outcome.capture_time_ns) == (
        1,
        SECOND // 25,
        77,
    )
    assert outcome.age_ns == 5 * SECOND
    result = outcome.body
    assert (result.width, result.height, result.missing_stages) == (640, 480, ())
    assert [f.identity.subject_id for f in result.faces] == ["ada", "ada"]
    assert [f.liveness.verdict for f in result.faces] == [LivenessVerdict.LIVE] * 2
    assert [f.track_id for f in result.faces] == [1, 2]
    assert [f.recognized_now for f in result.faces] == [True, True]
    assert {t.stage for t in result.timings} == set(Stage)
    totals = s.lane.totals
    assert (totals.received, totals.results, totals.faces, totals.tracks) == (1, 1, 2, 2)
    assert s.seen.decided == [(1, "ada"), (2, "ada")]


async def test_answers_in_any_order_leave_in_order() -> None:
    s = Stream()
    s.offer(4)
    for _ in range(4):
        s.pools.detector.begin()
    for at in (3, 1, 0):
        s.pools.detector.answer(faces(0), at)
        await turns()
    told = await s.take()
    # 4th, 2nd and 1st are answered: the first two may leave.
    assert [o.frame_id for o in told] == [1, 2]
    s.pools.detector.answer(LOST)
    assert [type(b) for b in await s.bodies()] == [FrameError, FrameResult]


async def test_the_tracker_sees_frames_in_their_order_whatever_is_answered_first() -> None:
    def moving(x: float) -> Any:
        answer = faces(1)
        (face,) = answer.faces
        moved = type(face)(type(face.box)(x, 0, 50, 50), face.score, face.landmarks, face.crops)
        return type(answer)(answer.width, answer.height, (moved,))

    s = Stream()
    s.offer(6)
    for _ in range(6):
        s.pools.detector.begin()
    # Backwards in time the face would jump from 200 to 0 and be another.
    order = [5, 4, 3, 2, 1, 0]
    for at in order:
        s.pools.detector.answer(moving(40.0 * at), at)
        await turns()
        s.pools.answer_second("ada")
    await turns()
    s.pools.answer_second("ada")
    bodies = await s.bodies()
    assert [b.faces[0].track_id for b in bodies] == [1] * 6
    assert [b.faces[0].box.x for b in bodies] == [0, 40, 80, 120, 160, 200]


async def test_a_face_is_recognised_once_a_track_and_never_twice_at_a_time() -> None:
    s = Stream()
    s.offer(3)
    for _ in range(3):
        s.pools.detector.answer(faces(1))
    await turns()
    assert len(s.pools.recognizer.tasks) == 1, "one is under way for the track"
    s.pools.answer_second("ada")
    bodies = await s.bodies()
    assert [b.faces[0].recognized_now for b in bodies] == [True, False, False]
    assert [b.faces[0].identity.subject_id for b in bodies] == ["ada"] * 3
    assert s.seen.decided == [(1, "ada")], "told once"
    s.offer()
    s.pools.detector.answer(faces(1))
    await turns()
    assert s.pools.recognizer.tasks == []


async def test_without_tracking_every_face_is_asked_about() -> None:
    s = Stream(tracking=False)
    s.offer(3)
    for _ in range(3):
        s.pools.detector.answer(faces(1))
    await turns()
    assert len(s.pools.recognizer.tasks) == 3
    s.pools.answer_second("ada")
    bodies = await s.bodies()
    assert [b.faces[0].track_id for b in bodies] == [0] * 3
    assert s.lane.totals.tracks == 0
    assert s.seen.decided == []


async def test_small_faces_are_left_out() -> None:
    s = Stream(plan=Plan(min_face_size=51))
    s.offer()
    s.pools.detector.answer(faces(3))
    (body,) = await s.bodies()
    assert body.faces == ()
    assert s.pools.recognizer.tasks == []


async def test_stages_that_nobody_asked_for_do_not_run_and_are_not_missing() -> None:
    s = Stream(plan=Plan(recognize=False, liveness=False))
    s.offer()
    s.pools.detector.answer(faces(1))
    (body,) = await s.bodies()
    assert body.missing_stages == ()
    assert body.faces[0].identity.decision is Decision.NOT_EVALUATED
    assert body.faces[0].liveness.verdict is LivenessVerdict.UNDECIDED


# -- what goes wrong ---------------------------------------------------------------------------


async def test_a_lost_second_stage_is_missing_and_proves_nothing() -> None:
    s = Stream()
    s.offer()
    s.pools.detector.answer(faces(1))
    await turns()
    s.pools.recognizer.answer(LOST)
    s.pools.liveness.answer(FacelaneError(Reason.DEADLINE_EXCEEDED, "late"))
    (body,) = await s.bodies()
    assert body.missing_stages == (Stage.RECOGNIZER, Stage.LIVENESS)
    (face,) = body.faces
    assert (face.identity, face.liveness.verdict) == (
        Identity(Decision.NOT_EVALUATED),
        LivenessVerdict.UNDECIDED,
    )
    assert not face.recognized_now
    # The next frame asks again: nothing was learnt.
    s.offer()
    s.pools.detector.answer(faces(1))
    await turns()
    assert len(s.pools.recognizer.tasks) == len(s.pools.liveness.tasks) == 1


async def test_an_unavailable_stage_is_skipped_told_and_told_again_when_it_is_back() -> None:
    s = Stream()
    s.pools.liveness.available = False
    s.lane.stages_changed()
    s.lane.stages_changed()
    s.offer()
    s.pools.detector.answer(faces(1))
    await turns()
    s.pools.recognizer.answer(embedding("ada"))
    update, outcome = await s.take()
    assert update == StageChanged(Stage.LIVENESS, available=False)
    assert outcome.body.missing_stages == (Stage.LIVENESS,)
    s.pools.liveness.available = True
    s.lane.stages_changed()
    assert await s.take() == [StageChanged(Stage.LIVENESS, available=True)]


async def test_a_stage_that_the_stream_does_not_want_is_not_told() -> None:
    s = Stream(plan=Plan(liveness=False))
    s.pools.liveness.available = False
    s.lane.stages_changed()
    assert await s.take() == []


async def test_a_pool_that_is_gone_between_two_looks_settles_at_once() -> None:
    """A stage that becomes unavailable while a frame's faces are being handed out."""
    s = Stream()

    class Leaving(ScriptedPool):
        looks = 0

        @property  # type: ignore[override]
        def available(self) -> bool:
            self.looks += 1
            return self.looks <= 3

        @available.setter
        def available(self, value: bool) -> None:
            pass

    leaving = Leaving()
    s.pools.pipeline.pools[Stage.RECOGNIZER] = leaving
    s.offer()
    s.pools.detector.answer(faces(3))
    await turns()
    while leaving.tasks:
        leaving.answer(embedding("ada"))
    s.pools.answer_second()
    (body,) = await s.bodies()
    assert len(body.faces) == 3
    assert body.missing_stages == (Stage.RECOGNIZER,)


async def test_errors_of_the_detector_are_the_frames() -> None:
    s = Stream()
    s.offer(2)
    corrupt = FacelaneError(Reason.PICTURE_CORRUPT, "damaged; send it whole", metadata={"a": "b"})
    s.pools.detector.answer(corrupt)
    s.pools.detector.begin()
    s.pools.detector.begun.pop().future.set_exception(ValueError("a bug"))
    first, second = await s.bodies()
    assert first == FrameError(Reason.PICTURE_CORRUPT, "damaged; send it whole", False, {"a": "b"})
    assert second.reason is Reason.INTERNAL
    assert "a bug" not in second.message


async def test_a_frame_that_waited_too_long_is_dropped_and_one_that_was_begun_is_an_error() -> None:
    s = Stream()
    s.offer(2)
    s.pools.detector.begin()
    s.pools.detector.answer(FacelaneError(Reason.DEADLINE_EXCEEDED, "late", retryable=True))
    s.pools.detector.expire()
    first, second = await s.bodies()
    assert (first.reason, first.retryable) == (Reason.DEADLINE_EXCEEDED, True)
    assert second == FrameDrop(DropReason.TOO_OLD)
    assert s.lane.totals.drops_by_reason == {DropReason.TOO_OLD: 1}
    s.offer()
    s.pools.detector.begin().opening = True
    s.pools.detector.answer(FacelaneError(Reason.DEADLINE_EXCEEDED, "late", retryable=True))
    assert await s.bodies() == [FrameDrop(DropReason.TOO_OLD)], "no decoder has seen it"


async def test_the_deadline_of_a_frame_is_its_age_limit() -> None:
    s = Stream(max_frame_age_ns=123, weight=7)
    s.now = 1_000
    s.offer()
    (task,) = s.pools.detector.waiting
    assert (task.deadline_ns, task.weight, task.lane) == (1_123, 7, 1)


async def test_a_fault_of_the_picture_is_told_in_its_turn() -> None:
    s = Stream()
    s.offer()
    s.lane.offer(frame(2, offset_ns=SECOND), FacelaneError(Reason.PICTURE_EMPTY, "empty"))
    assert await s.bodies() == []
    s.pools.detector.answer(faces(0))
    assert [type(b) for b in await s.bodies()] == [FrameResult, FrameError]


async def test_media_time_that_goes_back_is_the_frames_fault_and_ids_that_do_are_the_streams() -> (
    None
):
    s = Stream()
    s.lane.offer(frame(1, offset_ns=SECOND))
    s.lane.offer(frame(2, offset_ns=SECOND - 1))
    s.lane.offer(frame(3, offset_ns=SECOND))
    s.pools.detector.answer(faces(0))
    s.pools.detector.answer(faces(0))
    bodies = await s.bodies()
    assert [type(b) for b in bodies] == [FrameResult, FrameError, FrameResult]
    assert bodies[1].reason is Reason.ARGUMENT_INVALID
    for wrong in (3, 2, 0):
        with pytest.raises(FacelaneError) as refused:
            s.lane.offer(frame(wrong, offset_ns=SECOND))
        assert refused.value.reason is Reason.FRAME_ID_NOT_INCREASING
    assert s.lane.totals.received == 3
