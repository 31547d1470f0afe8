"""One picture through the graph, over scripted pools."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from tests.fakes.scripted_pool import LIVE, LOST, ScriptedPools, embedding, faces

from facelane_server.domain import (
    Candidate,
    Decision,
    Encoding,
    FacelaneError,
    LivenessVerdict,
    Picture,
    Reading,
    Reason,
    Stage,
)
from facelane_server.models.package import Impostors
from facelane_server.models.promise import Promise
from facelane_server.pipeline import (
    Evidence,
    Origin,
    Pipeline,
    Plan,
    Timings,
    error_of,
)
from facelane_server.pools.tasks import DetectRequest, EmbedRequest, LivenessRequest

PICTURE = Picture(Encoding.JPEG, b"bytes")
ORIGIN = Origin(lane=9, weight=3, deadline_ns=10**18)


async def started(pools: ScriptedPools, plan: Plan) -> asyncio.Task[Reading]:
    task = asyncio.create_task(pools.pipeline.analyse(PICTURE, plan, ORIGIN))
    await asyncio.sleep(0)
    return task


async def turns() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


def test_the_detector_is_required() -> None:
    with pytest.raises(ValueError, match="detector stage is required"):
        Pipeline({}, crops={}, thresholds=ScriptedPools().pipeline.thresholds, max_pixels=1)


async def test_what_the_pools_are_asked() -> None:
    pools = ScriptedPools()
    plan = Plan(gallery_id="g", max_faces=5, max_candidates=4, want_vectors=True)
    task = await started(pools, plan)
    assert pools.detector.waiting[0].request == DetectRequest(PICTURE, 5, 1_000_000)
    pools.detector.answer(faces(1))
    await turns()
    (embed,), (live,) = pools.recognizer.waiting, pools.liveness.waiting
    assert embed.request == EmbedRequest(b"chip", "g", 6, True)
    assert live.request == LivenessRequest((b"context",))
    for asked in (embed, live):
        assert (asked.lane, asked.weight, asked.deadline_ns) == (9, 3, 10**18)
    pools.recognizer.answer(embedding("ada"))
    pools.liveness.answer(LIVE)
    reading = await task
    (face,) = reading.result.faces
    assert (face.identity.decision, face.identity.subject_id) == (Decision.MATCH, "ada")
    assert (face.ood_score, face.track_id, face.recognized_now) == (0.8, 0, True)
    assert face.liveness.verdict is LivenessVerdict.LIVE
    assert reading.readings[0].vector


async def test_what_another_model_said_is_not_judged_by_these_thresholds() -> None:
    """While one takes the other's place workers of both answer: it is as if they had not."""
    pools = ScriptedPools()
    pools.pipeline.models = {Stage.RECOGNIZER: "r@2", Stage.LIVENESS: "l@2"}
    for recognizer, liveness in (("r@1", "l@1"), ("r@2", "l@1"), ("r@1", "l@2"), ("r@2", "l@2")):
        task = await started(pools, Plan(want_vectors=True, max_candidates=3))
        pools.detector.answer(faces(1))
        await turns()
        pools.recognizer.begin().model, pools.liveness.begin().model = recognizer, liveness
        pools.recognizer.answer(embedding("ada"))
        pools.liveness.answer(LIVE)
        reading = await task
        (face,), (told,) = reading.result.faces, reading.readings
        named = recognizer == "r@2"
        assert face.identity.decision is (Decision.MATCH if named else Decision.NOT_EVALUATED)
        assert (face.recognized_now, face.ood_score) == ((True, 0.8) if named else (False, None))
        assert (bool(told.vector), bool(told.candidates)) == (named, named)
        live = liveness == "l@2"
        assert (face.liveness.verdict is LivenessVerdict.LIVE) is live
        missing = {Stage.RECOGNIZER: not named, Stage.LIVENESS: not live}
        assert set(reading.result.missing_stages) == {s for s, gone in missing.items() if gone}
        assert reading.model_id == "r@2", "of the vectors that there are"


async def test_the_threshold_is_of_the_gallery_its_size_and_the_source() -> None:
    pools = ScriptedPools()
    pipeline = pools.pipeline
    rows = (Impostors(0.4, 10**6, 1e-5, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),)
    promised = replace(pipeline.thresholds, promise=Promise(0.001, rows))
    pipeline.thresholds = replace(
        promised, sources={"door": replace(promised, match=0.9, promise=None)}
    )
    pipeline.searched = {"g": 10, "h": 1000}.__getitem__
    seen = Evidence(0.8, (Candidate("ada", 0.5),))
    told = {
        (gallery, source): pipeline.identity(seen, Plan(gallery_id=gallery, source_id=source))
        for gallery in ("g", "h")
        for source in ("", "door")
    }
    assert [round(one.threshold or 0.0, 2) for one in told.values()] == [0.4, 0.9, 0.6, 0.9]
    assert [one.decision for one in told.values()] == [
        Decision.MATCH, Decision.UNKNOWN, Decision.UNKNOWN, Decision.UNKNOWN,
    ]  # fmt: skip


async def test_the_two_best_and_what_they_are_not_are_always_searched_for() -> None:
    pools = ScriptedPools()
    task = await started(pools, Plan(max_candidates=0))
    pools.detector.answer(faces(1))
    await turns()
    assert pools.recognizer.waiting[0].request.top_k == 4
    pools.answer_second()
    await task


@pytest.mark.parametrize("lost", [Stage.RECOGNIZER, Stage.LIVENESS])
async def test_a_lost_second_stage_is_missing(lost: Stage) -> None:
    pools = ScriptedPools()
    task = await started(pools, Plan())
    pools.detector.answer(faces(2))
    await turns()
    pools.by_stage[lost].answer(LOST)
    pools.answer_second("ada")
    reading = await task
    assert reading.result.missing_stages == (lost,)
    named = [f.identity.decision for f in reading.result.faces]
    assert (Decision.NOT_EVALUATED in named) == (lost is Stage.RECOGNIZER)


async def test_a_stage_that_is_not_configured_is_missing_only_if_it_is_wanted() -> None:
    pools = ScriptedPools(Stage.DETECTOR)
    for plan, missing in (
        (Plan(), (Stage.RECOGNIZER, Stage.LIVENESS)),
        (Plan(liveness=False), (Stage.RECOGNIZER,)),
        (Plan(recognize=False, liveness=False), ()),
    ):
        task = await started(pools, plan)
        pools.detector.answer(faces(1))
        assert (await task).result.missing_stages == missing
    # A picture without a face says so too.
    task = await started(pools, Plan())
    pools.detector.answer(faces(0))
    assert (await task).result.missing_stages == (Stage.RECOGNIZER, Stage.LIVENESS)


async def test_the_detectors_error_is_the_pictures() -> None:
    pools = ScriptedPools()
    task = await started(pools, Plan())
    pools.detector.answer(FacelaneError(Reason.PICTURE_CORRUPT, "damaged"))
    with pytest.raises(FacelaneError) as failed:
        await task
    assert failed.value.reason is Reason.PICTURE_CORRUPT


async def test_a_caller_that_leaves_takes_its_picture_back() -> None:
    pools = ScriptedPools()
    task = await started(pools, Plan())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pools.detector.withdrawn == 1


async def test_a_caller_that_leaves_later_takes_its_faces_back() -> None:
    pools = ScriptedPools()
    task = await started(pools, Plan())
    pools.detector.answer(faces(2))
    await turns()
    pools.recognizer.begin()
    under_way = [*pools.recognizer.tasks, *pools.liveness.tasks]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(t.future.cancelled() for t in under_way)
    assert (pools.recognizer.withdrawn, pools.liveness.withdrawn) == (1, 2)
    pools.recognizer.answer(embedding())
    await turns()


async def test_a_stage_that_answered_is_not_missing_for_leaving_afterwards() -> None:
    pools = ScriptedPools()
    task = await started(pools, Plan())
    pools.detector.answer(faces(1))
    await turns()
    pools.answer_second("ada")
    pools.recognizer.available = False
    assert (await task).result.missing_stages == ()


async def test_a_cancelled_detection_cancels() -> None:
    pools = ScriptedPools()
    task = await started(pools, Plan())
    pools.detector.begin().future.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_slowest_task_of_a_stage_is_what_is_told() -> None:
    pools = ScriptedPools()
    got: list[Evidence] = []
    timings = Timings()
    for face in faces(2).faces:
        pools.pipeline.appraise(
            face, Plan(), ORIGIN, timings, got.append, recognize=True, liveness=False
        )
    spans = [(10, 20, 50), (10, 40, 60)]
    for (submitted, dispatched, finished), task in zip(
        spans, list(pools.recognizer.waiting), strict=True
    ):
        pools.recognizer.begin()
        task.submitted_ns, task.dispatched_ns, task.finished_ns = submitted, dispatched, finished
        task.future.set_result(embedding())
    await turns()
    assert len(got) == 2
    (timing,) = timings.freeze()
    assert (timing.stage, timing.queue_ns, timing.service_ns) == (Stage.RECOGNIZER, 30, 20)


async def test_nothing_to_run_is_answered_at_once() -> None:
    pools = ScriptedPools()
    got: list[Evidence] = []
    (face,) = faces(1).faces
    pools.pipeline.appraise(
        face, Plan(), ORIGIN, Timings(), got.append, recognize=False, liveness=False
    )
    assert got == [Evidence()]


async def test_every_failure_has_a_reason() -> None:
    loop = asyncio.get_running_loop()
    cancelled, broken, known = loop.create_future(), loop.create_future(), loop.create_future()
    cancelled.cancel()
    broken.set_exception(RuntimeError("secret detail"))
    known.set_exception(LOST)
    assert error_of(cancelled).reason is Reason.CANCELLED
    assert error_of(broken).reason is Reason.INTERNAL
    assert "secret" not in error_of(broken).message
    assert error_of(known) is LOST
