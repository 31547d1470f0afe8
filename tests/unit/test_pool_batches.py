"""What a pool gives its workers: batches, order, deadlines."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.pool_bench import (
    Bench,
    bench,
    reason_of,
)
from tests.fakes.scripted_worker import settle

from facelane_server import limits
from facelane_server.domain import Encoding, Picture, Reason, Stage
from facelane_server.gallery.decide import Thresholds
from facelane_server.ipc.arena import ALIGN
from facelane_server.ipc.messages import (
    InferFailed,
    Ready,
    Warming,
)
from facelane_server.pipeline import Origin, Pipeline, Plan
from facelane_server.pools.tasks import (
    LivenessAnswer,
    Sender,
    Task,
)

# -- batches and order ------------------------------------------------------------------


async def test_a_lone_task_goes_at_once() -> None:
    async with bench() as b:
        await b.ready()
        task = b.submit()
        await b.turn()
        assert [len(job.items) for job in b.workers[0].jobs] == [1]
        await b.answer(b.workers[0])
        assert task.future.result() == LivenessAnswer(1.0)
        assert task.submitted_ns <= task.dispatched_ns <= task.finished_ns


async def test_a_worker_says_how_large_its_batches_may_be() -> None:
    async with bench(batch_max=0) as b:
        await b.start()
        await b.workers[0].become_ready(batch_max=2)
        for _ in range(9):
            b.submit()
        await b.turn()
        assert [len(job.items) for job in b.workers[0].jobs] == [2, 2]


@pytest.mark.parametrize("told", [-1, 5, 10_000])
async def test_a_worker_that_takes_other_batches_than_it_was_told_is_lost(told: int) -> None:
    async with bench(batch_max=4) as b:
        await b.start()
        await b.workers[0].hello()
        b.workers[0].say(Warming(1.0), Ready(b.workers[0].model_id, 1.0, 1.0, 0.1, batch_max=told))
        await settle()
        assert b.pool.info().workers[0].last_loss == "PROTOCOL"


async def test_who_loads_beside_others_steps_back() -> None:
    async with bench(spares=1) as b:
        await b.ready()
        assert b.launcher.nice == [0, 0], "at the start nobody serves"
        b.workers[0].die(-9)
        await b.turn()
        await b.clock.advance(1000)
        assert len(b.launcher.nice) == 3
        beside = b.launcher.nice[2]
        b.workers[1].die(-9)
        await b.turn()
        await b.clock.advance(1000)
        alone = b.launcher.nice[3]
        assert 0 < alone < beside <= 19, "somebody waits for the one that comes back alone"


async def test_batches_grow_by_themselves_while_the_workers_are_busy() -> None:
    async with bench(batch_max=4) as b:
        await b.ready()
        worker = b.workers[0]
        b.submit()
        await b.turn()
        for _ in range(9):
            b.submit()
            await b.turn()
        # One runs, one was staged as soon as it came: the first of the nine.
        assert [len(job.items) for job in worker.jobs] == [1, 1]
        for size in (4, 4):
            await b.answer(worker)
            assert len(worker.jobs[-1].items) == size


async def test_idle_workers_come_before_staging() -> None:
    async with bench(workers=2, batch_max=1) as b:
        await b.ready()
        first, second = b.workers
        b.submit()
        b.submit()
        await b.turn()
        assert (len(first.jobs), len(second.jobs)) == (1, 1)
        b.submit()
        b.submit()
        b.submit()
        await b.turn()
        assert (len(first.jobs), len(second.jobs)) == (2, 2)
        assert b.pool.queued == 1


async def test_a_slow_cpu_worker_is_given_no_staged_job() -> None:
    """The staged frame could no longer be replaced by a newer one, for nothing."""
    async with bench(batch_max=1) as b:
        await b.ready()
        worker = b.workers[0]
        for _ in range(10):
            b.submit()
            await b.turn()
            await b.clock.advance(60)
            await b.answer(worker)
        b.submit()
        b.submit()
        await b.turn()
        assert len(worker.jobs) == 1


async def test_a_batch_does_not_exceed_the_slot() -> None:
    async with bench(batch_max=32) as b:
        await b.ready()
        b.pool._schedule.codec.cost = lambda _: (limits.REQUEST_SLOT_BYTES // 3, 0)  # type: ignore[method-assign]
        for _ in range(7):
            b.submit()
        await b.turn()
        assert [len(job.items) for job in b.workers[0].jobs] == [3, 3]


async def test_lanes_share_a_saturated_worker() -> None:
    async with bench(batch_max=2) as b:
        await b.ready()
        worker = b.workers[0]
        flood = [b.submit(1) for _ in range(50)]
        await b.turn()
        quiet = b.submit(2)
        for _ in range(3):
            await b.answer(worker)
        assert quiet.future.done()
        assert sum(task.future.done() for task in flood) <= 6


@settings(max_examples=25)
@given(st.data())
def test_every_task_ends_exactly_once_whatever_happens(data: st.DataObject) -> None:
    """Submissions, answers, failures, deaths and time in any order: no future is left, and
    none is resolved by an item that is not its own."""

    async def scenario() -> None:
        async with bench(workers=data.draw(st.integers(1, 3)), batch_max=3, restart_limit=100) as b:
            await b.ready()
            tasks: list[Task[Any]] = []
            for _ in range(data.draw(st.integers(5, 40))):
                await step(b, tasks)
            for _ in range(400):
                alive = [w for w in b.workers if w.channel is not None]
                for worker in alive:
                    if worker.load is None:
                        await worker.become_ready()
                    while worker.jobs:
                        await b.answer(worker)
                if all(task.future.done() for task in tasks):
                    break
                await b.clock.advance(50)
                await b.turn()
            assert all(task.future.done() for task in tasks)
            info = b.pool.info()
            assert info.completed + info.failed + withdrawn[0] == len(tasks)
            assert (info.queued, info.in_flight) == (0, 0)

    withdrawn = [0]

    async def step(b: Bench, tasks: list[Task[Any]]) -> None:
        what = data.draw(st.sampled_from(["submit", "answer", "kill", "time", "withdraw", "fail"]))
        alive = [w for w in b.workers if w.channel is not None]
        busy = [w for w in alive if w.jobs and w.load is not None]
        if what == "submit":
            lanes = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=5))
            tasks.extend(b.submit(lane, age_ms=500) for lane in lanes)
        elif what == "answer" and busy:
            data.draw(st.sampled_from(busy)).answer()
        elif what == "fail" and busy:
            reason = data.draw(st.sampled_from(["OUT_OF_MEMORY", "INTERNAL"]))
            data.draw(st.sampled_from(busy)).fail(reason, retryable=reason != "INTERNAL")
        elif what == "kill" and alive:
            data.draw(st.sampled_from(alive)).die(-9)
        elif what == "withdraw" and tasks:
            task = data.draw(st.sampled_from(tasks))
            if b.pool.withdraw(task):
                withdrawn[0] += 1
                task.future.cancel()
        elif what == "time":
            await b.clock.advance(data.draw(st.integers(1, 200)))
        await b.turn()
        for worker in b.workers:
            if worker.channel is not None and worker.load is None:
                await worker.become_ready()

    asyncio.run(scenario())


# -- deadlines --------------------------------------------------------------------------


async def test_a_task_that_waits_too_long_fails_at_its_deadline() -> None:
    async with bench(batch_max=1) as b:
        await b.ready()
        b.submit()
        b.submit()
        late = b.submit(age_ms=30)
        b.submit(age_ms=5000)
        await b.turn()
        await b.clock.advance(29)
        assert not late.future.done()
        await b.clock.advance(2)
        assert reason_of(late) is Reason.DEADLINE_EXCEEDED


async def test_one_timer_serves_all_deadlines() -> None:
    async with bench(batch_max=1) as b:
        await b.ready()
        b.submit()
        b.submit()
        await b.turn()
        before = b.clock.armed
        for age in range(2000, 1000, -1):
            b.submit(age_ms=age)
        await b.turn()
        assert b.clock.armed <= before + 1


async def test_a_deadline_that_has_passed_is_refused() -> None:
    async with bench() as b:
        await b.ready()
        assert reason_of(b.submit(age_ms=0)) is Reason.DEADLINE_EXCEEDED


async def test_a_full_queue_refuses_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_POOL_QUEUE", 4)
    async with bench(batch_max=1) as b:
        await b.ready()
        for _ in range(2):
            b.submit()
            await b.turn()
        tasks = [b.submit() for _ in range(5)]
        assert [task.future.done() for task in tasks] == [False] * 4 + [True]
        assert reason_of(tasks[-1]) is Reason.POOL_OVERLOADED


async def test_what_is_in_no_hurry_is_not_late() -> None:
    async with bench() as made:
        await made.start()  # and no worker is ready
        for lane, sender in enumerate([Sender(), Sender(patient=True), Sender(live=False)]):
            made.submit(lane, sender=sender)
        assert made.pool.queued == 3
        assert made.pool.work().queued == 1


async def test_withdraw_says_whether_it_was_in_time() -> None:
    async with bench(batch_max=1) as b:
        await b.ready()
        running, staged, queued = b.submit(), b.submit(), b.submit()
        await b.turn()
        assert not b.pool.withdraw(running)
        assert not b.pool.withdraw(staged)
        assert b.pool.withdraw(queued)
        assert not b.pool.withdraw(queued)
        for _ in range(2):
            await b.answer(b.workers[0])
        assert running.future.done()
        assert not queued.future.done()


async def test_a_staged_job_that_nobody_waits_for_is_cancelled() -> None:
    async with bench(batch_max=1) as b:
        await b.ready()
        worker = b.workers[0]
        running, staged, waiting = b.submit(), b.submit(), b.submit()
        await b.turn()
        staged.future.cancel()
        assert not b.pool.withdraw(staged)
        await b.turn()
        (job,) = (j for j in worker.jobs if j.job_id in worker.cancelled)
        worker.jobs.remove(job)
        worker.say(InferFailed(job.job_id, "CANCELLED", ""))
        await b.turn()
        assert [len(j.items) for j in worker.jobs] == [1, 1], "its place was free at once"
        for _ in range(2):
            await b.answer(worker)
        assert running.future.done()
        assert waiting.future.done()
        assert b.pool.info().losses == 0


async def test_a_single_picture_that_is_given_up_sends_cancel_and_logs_nothing() -> None:
    """Whoever waits for it is cancelled, as a server call is; nothing else is done by hand."""
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    origin = Origin(1, 1, 1_000_000_000_000)
    picture = Picture(Encoding.BGR24, b"\0" * 32 * 32 * 3, 32, 32, 96)
    for end in (InferFailed(0, "CANCELLED", ""), InferFailed(0, "INTERNAL", "late")):
        async with bench(stage=Stage.DETECTOR, batch_max=1) as b:
            await b.ready()
            pipeline = Pipeline(
                {Stage.DETECTOR: b.pool},
                crops={},
                thresholds=Thresholds(match=0.5),
                max_pixels=limits.MAX_PIXELS,
            )
            plan = Plan(recognize=False, liveness=False)
            calls = [asyncio.create_task(pipeline.analyse(picture, plan, origin)) for _ in range(2)]
            await b.turn()
            worker = b.workers[0]
            begun, staged = worker.jobs
            for call in calls:
                call.cancel()
            await b.turn()
            assert worker.cancelled == [staged.job_id], "the other one is under way"
            worker.say(msgspec.structs.replace(end, job_id=begun.job_id))
            worker.say(InferFailed(staged.job_id, "CANCELLED", ""))
            await b.turn()
            assert all(call.cancelled() for call in calls)
            assert b.pool.info().in_flight == 0
            calls.clear()
    gc.collect()
    assert problems == []


async def test_a_caller_that_gave_up_costs_no_inference() -> None:
    async with bench(batch_max=1) as b:
        await b.ready()
        b.submit(), b.submit()
        given_up, waiting = b.submit(), b.submit()
        await b.turn()
        given_up.future.cancel()
        for _ in range(3):
            await b.answer(b.workers[0])
        assert waiting.future.done()
        assert b.workers[0].jobs == []


# -- what jobs leave ----------------------------------------------------------------------

LONG, SHORT = b"long" * 10 * ALIGN, b"shrt" * ALIGN


async def test_nothing_of_a_picture_is_left_in_a_slot_once_it_is_answered() -> None:
    async with bench(stage=Stage.DETECTOR, batch_max=1) as b:
        await b.ready()
        worker = b.workers[0]
        places = limits.JOBS_PER_WORKER
        for _ in range(places):
            b.submit(picture=LONG)
        b.submit(picture=SHORT)
        await b.turn()
        assert worker.slots()[:places] == [LONG] * places
        await b.answer(worker)
        assert sorted(worker.slots()[:places]) == [*[LONG] * (places - 1), SHORT], (
            "the next job's slot has nothing of the one before"
        )
        for _ in range(places):
            await b.answer(worker)
        assert not any(worker.slots())


async def test_nothing_is_left_of_an_answer_that_failed_when_a_part_was_written() -> None:
    async with bench(stage=Stage.DETECTOR, batch_max=1) as b:
        await b.ready()
        worker = b.workers[0]
        b.submit()
        await b.turn()
        for reason in ("OUT_OF_MEMORY", "INTERNAL"):
            b.submit()
            await b.turn()
            worker.write(worker.jobs[0], LONG)
            worker.fail(reason)
            await b.turn()
        await b.answer(worker)
        assert not any(worker.slots())


async def test_nothing_of_an_answer_is_left_either() -> None:
    async with bench(stage=Stage.DETECTOR, batch_max=1) as b:
        await b.ready()
        worker = b.workers[0]
        places = limits.JOBS_PER_WORKER
        found = b.submit()
        for _ in range(places):
            b.submit()
        await b.turn()
        worker.find_a_face()
        await b.turn()
        assert len(found.future.result().faces) == 1
        for _ in range(places):
            await b.answer(worker)
        assert not any(worker.slots())
