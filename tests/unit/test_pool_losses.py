"""Workers that are lost: who is to blame, and what becomes of the tasks."""

from __future__ import annotations

import asyncio
import gc
import os
from typing import Any

import pytest
from tests.fakes.pool_bench import (
    bench,
    reason_of,
)

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.ipc.messages import (
    GallerySnapshot,
    InferDone,
    LivenessDone,
    Ready,
    Warming,
)
from facelane_server.pools.report import PoolChange, PoolState
from facelane_server.pools.restart import Life
from facelane_server.pools.tasks import (
    LivenessAnswer,
)

# -- losses -----------------------------------------------------------------------------


async def test_the_tasks_of_a_dead_worker_are_retried_alone_on_another() -> None:
    async with bench(workers=2, batch_max=4) as b:
        await b.ready()
        first, second = b.workers
        tasks = [b.submit() for _ in range(3)]
        await b.turn()
        (victim, survivor) = (first, second) if first.jobs else (second, first)
        assert len(victim.jobs[0].items) == 3
        victim.die(-9)
        await b.turn()
        assert b.pool.state is PoolState.DEGRADED
        # Alone, so that the innocent are not taken for the guilty.
        assert [len(job.items) for job in survivor.jobs] == [1, 1]
        for _ in range(3):
            await b.answer(survivor)
        assert all(task.future.result() == LivenessAnswer(1.0) for task in tasks)


async def test_an_item_that_kills_two_workers_is_poisoned_and_no_other() -> None:
    async with bench(workers=3, batch_max=4) as b:
        await b.ready()
        tasks = [b.submit() for _ in range(3)]
        await b.turn()
        next(w for w in b.workers if w.jobs).die(-11)
        await b.turn()
        # The retried ones are in front in their old order: the first is the guilty one.
        guilty = next(w for w in b.workers if w.jobs and w.channel is not None and len(w.jobs) >= 1)
        guilty.die(-11)
        await b.turn()
        (survivor,) = [w for w in b.workers if w.channel is not None and w.load is not None]
        while survivor.jobs:
            await b.answer(survivor)
        outcomes = [task.future.exception() for task in tasks]
        poisoned = [error for error in outcomes if error is not None]
        assert len(poisoned) == 1
        assert isinstance(poisoned[0], FacelaneError)
        assert poisoned[0].reason is Reason.POISONED
        assert not poisoned[0].retryable


async def test_a_staged_job_is_not_blamed_for_the_one_before_it() -> None:
    async with bench(batch_max=1, restart_limit=100) as b:
        await b.ready()
        running, staged = b.submit(age_ms=9e4), b.submit(age_ms=9e4)
        await b.turn()
        b.workers[0].die(-11)
        await b.turn()
        assert (running.attempts, staged.attempts) == (1, 0)


async def test_a_suspect_stays_one_when_a_worker_leaves_for_another_reason() -> None:
    async with bench(batch_max=4, restart_limit=100) as b:
        await b.ready()
        tasks = [b.submit(age_ms=9e4), b.submit(age_ms=9e4)]
        await b.turn()
        b.workers[0].die(-11)
        await b.turn()
        await b.clock.advance(1000)
        await b.workers[1].become_ready()
        await b.turn()
        b.workers[1].leave()
        await b.turn()
        await b.clock.advance(1000)
        await b.workers[2].become_ready()
        await b.turn()
        assert [len(job.items) for job in b.workers[2].jobs] == [1, 1], "not in one batch"
        b.workers[2].die(-11)
        await b.turn()
        assert [task.attempts for task in tasks] == [2, 1]


async def test_nothing_shares_a_device_with_an_item_that_killed_a_worker() -> None:
    """On a device the staged job is begun before the first has ended, so that either may be
    the guilty one: whoever may be has the worker to itself."""
    async with bench(batch_max=4, restart_limit=100) as b:
        await b.start()
        await b.workers[0].become_ready(device="cuda:0 scripted")
        poison, *innocent = (b.submit(age_ms=9e4) for _ in range(4))
        await b.turn()
        assert [len(job.items) for job in b.workers[0].jobs] == [4]
        later = b.submit(age_ms=9e4)
        b.workers[0].die(-11)
        for life in (1, 2):
            await b.turn()
            await b.clock.advance(1000)
            worker = b.workers[life]
            await worker.become_ready(device="cuda:0 scripted")
            await b.turn()
            if life == 1:
                assert [len(job.items) for job in worker.jobs] == [1], "the suspect alone"
                worker.die(-11)
        for _ in (*innocent, later):
            await b.answer(b.workers[2])
        assert reason_of(poison) is Reason.POISONED
        assert {task.future.result() for task in (*innocent, later)} == {LivenessAnswer(1.0)}
        for _ in range(2):
            b.submit(age_ms=9e4)
            await b.turn()
        assert len(b.workers[2].jobs) == 2, "afterwards jobs overlap again"


async def test_a_job_over_its_time_means_a_hung_worker() -> None:
    async with bench(workers=2, job_timeout_ms=100, batch_max=1) as b:
        await b.ready()
        task = b.submit(age_ms=5000)
        await b.turn()
        victim = next(w for w in b.workers if w.jobs)
        await b.clock.advance(99)
        assert not victim.signals
        await b.clock.advance(2)
        await asyncio.wait([victim.exited], timeout=30)
        assert [s.name for s in victim.signals] == ["SIGUSR1", "SIGKILL"], "a stack dump first"
        await b.turn()
        survivor = next(w for w in b.workers if w.jobs and w.channel is not None)
        await b.answer(survivor)
        assert task.future.result() == LivenessAnswer(1.0)
        assert [e.reason for e in b.events if e.change is PoolChange.WORKER_LOST] == ["HUNG"]


async def test_a_hang_over_a_picture_is_the_pictures_and_costs_no_budget() -> None:
    async with bench(stage=Stage.DETECTOR, job_timeout_ms=100, restart_limit=1, batch_max=1) as b:
        await b.ready()
        for life in range(limits.BAD_PICTURES):
            task = b.submit(7, age_ms=60_000)
            await b.turn()
            await b.clock.advance(101)
            assert reason_of(task) is Reason.PICTURE_TOO_COSTLY
            await asyncio.wait([b.workers[life].exited], timeout=30)
            await b.turn()
            info = b.pool.info().workers[0]
            assert (info.life, info.last_loss) == (Life.BACKOFF, "HUNG")
            await b.clock.advance(200)
            await b.workers[life + 1].become_ready()
            assert b.pool.state is PoolState.SERVING
        assert reason_of(b.submit(7)) is Reason.TOO_MANY_BAD_PICTURES
        honest = b.submit(8)
        await b.turn()
        await b.answer(b.workers[limits.BAD_PICTURES])
        assert honest.future.exception() is None


async def test_a_stopped_process_is_seen_within_a_second() -> None:
    async with bench(workers=2) as b:
        await b.ready()
        b.workers[0].is_halted = True
        await b.clock.advance(401)
        b.workers[0].is_halted = False
        await b.clock.advance(2000)
        assert b.pool.state is PoolState.SERVING, "continued at once: no loss"
        for worker in b.workers:
            worker.is_halted = True
        await b.clock.advance(900)
        assert b.pool.state is PoolState.NOT_SERVING
        assert {w.last_loss for w in b.pool.info().workers} == {"HALTED"}
        assert all(worker.exited.done() for worker in b.workers[:2])


async def test_the_second_job_is_timed_from_when_it_is_first() -> None:
    async with bench(job_timeout_ms=100, batch_max=1) as b:
        await b.ready()
        b.submit(age_ms=5000), b.submit(age_ms=5000)
        await b.turn()
        await b.clock.advance(80)
        await b.answer(b.workers[0])
        await b.clock.advance(80)
        assert b.workers[0].signals == []
        await b.clock.advance(21)
        assert b.workers[0].signals != []


async def test_an_answer_that_came_while_this_process_stood_still_is_no_hang() -> None:
    async with bench(job_timeout_ms=100, batch_max=1) as b:
        await b.ready()
        task = b.submit(age_ms=90_000)
        await b.turn()
        b.workers[0].answer()
        b.clock.leap(10_000)
        await b.turn()
        assert task.future.result() == LivenessAnswer(1.0)
        assert b.workers[0].signals == []
        b.submit(age_ms=90_000)
        await b.turn()
        b.clock.leap(10_000)
        await b.clock.advance(26)
        assert b.workers[0].signals != [], "one that is silent still is"


async def test_a_pong_that_came_while_this_process_stood_still_is_no_hang() -> None:
    async with bench(ping_interval_s=1.0, job_timeout_ms=500, canary_interval_s=1000.0) as b:
        await b.ready()
        b.clock.leap(1001)  # a ping is sent
        b.clock.leap(30_000)
        await b.turn()
        assert b.pool.state is PoolState.SERVING
        b.workers[0].answers_pings = False
        await b.clock.advance(3000)
        assert b.pool.info().workers[0].last_loss == "HUNG"


async def test_no_pong_means_a_hung_worker() -> None:
    async with bench(ping_interval_s=1.0, job_timeout_ms=500, canary_interval_s=1000.0) as b:
        await b.ready()
        b.workers[0].answers_pings = False
        await b.clock.advance(1001)
        await b.turn()
        assert b.pool.state is PoolState.SERVING
        await b.clock.advance(1000)
        assert b.pool.state is PoolState.NOT_SERVING
        assert b.pool.info().workers[0].last_loss == "HUNG"


async def test_an_idle_worker_proves_now_and_then_that_it_infers() -> None:
    async with bench(ping_interval_s=1.0, canary_interval_s=3.0) as b:
        await b.ready()
        worker = b.workers[0]
        for _ in range(3):
            assert worker.jobs == []
            await b.clock.advance(1000)
            await b.turn()
        assert len(worker.jobs) == 1
        worker.fail("INTERNAL")
        await b.turn()
        assert b.pool.state is PoolState.NOT_SERVING
        assert b.pool.info().workers[0].last_loss == "CANARY_FAILED"


async def test_what_nobody_asked_for_is_not_counted() -> None:
    async with bench(ping_interval_s=1.0, canary_interval_s=1.0) as b:
        await b.ready()
        await b.clock.advance(1000)
        await b.turn()
        b.workers[0].fail("INTERNAL")
        await b.turn()
        await b.clock.advance(200)
        await b.workers[1].become_ready()
        await b.clock.advance(2000)
        await b.turn()
        b.workers[1].die(-9)
        await b.turn()
        info = b.pool.info()
        assert info.losses == 2
        assert (info.completed, info.failed, info.retried) == (0, 0, 0)


async def test_a_worker_that_dies_over_a_canary_is_a_loss_and_no_more() -> None:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    async with bench(ping_interval_s=1.0, canary_interval_s=1.0, batch_max=4) as b:
        await b.ready()
        worker = b.workers[0]
        while not worker.jobs or len(worker.jobs[0].items) < 4:
            if worker.jobs:
                await b.answer(worker)
            await b.clock.advance(1000)
            await b.turn()
        worker.die(-9)
        await b.turn()
        assert b.pool.info().workers[0].last_loss == "EXITED"
    gc.collect()
    assert problems == []


async def test_a_worker_that_dies_before_its_first_gallery_is_a_loss_and_no_more() -> None:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    async with bench() as b:
        await b.start()
        fd = os.memfd_create("snapshot")
        await b.pool.publish_gallery(GallerySnapshot(1, 0, 512, ()), fd)
        os.close(fd)
        worker = b.workers[0]
        await worker.hello()
        worker.say(Warming(1.0), Ready(worker.model_id, 1.0, 1.0, 0.1))
        await b.turn()
        worker.answer()
        # The answer is heard in this turn, the end of the worker only after the next one's
        # sending of the gallery.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        worker.die(-9)
        await b.turn()
        assert worker.snapshots == []
        assert b.pool.info().workers[0].last_loss == "EXITED"
        await b.clock.advance(200)
        await b.workers[1].become_ready()
        assert b.pool.state is PoolState.SERVING
    gc.collect()
    assert problems == []


async def test_an_answer_that_cannot_be_one_loses_the_worker_not_the_task() -> None:
    async with bench(workers=2) as b:
        await b.ready()
        task = b.submit()
        await b.turn()
        liar = next(w for w in b.workers if w.jobs)
        job = liar.jobs.pop(0)
        liar.say(InferDone(job.job_id, [LivenessDone(1.0), LivenessDone(1.0)]))
        await b.turn()
        assert b.pool.info().losses == 1
        await b.answer(next(w for w in b.workers if w.jobs))
        assert task.future.result() == LivenessAnswer(1.0)


@pytest.mark.parametrize("out_of_order", [True, False])
async def test_answers_to_no_job_are_a_breach(out_of_order: bool) -> None:
    async with bench(batch_max=1) as b:
        await b.ready()
        b.submit(), b.submit()
        await b.turn()
        worker = b.workers[0]
        wrong = worker.jobs[1].job_id if out_of_order else 10**6
        worker.say(InferDone(wrong, [LivenessDone(1.0)]))
        await b.turn()
        assert b.pool.info().workers[0].last_loss == "PROTOCOL"


async def test_out_of_memory_is_retried_once_alone() -> None:
    async with bench(batch_max=4) as b:
        await b.ready()
        worker = b.workers[0]
        tasks = [b.submit(), b.submit()]
        await b.turn()
        worker.fail("OUT_OF_MEMORY", retryable=True)
        await b.turn()
        assert [len(job.items) for job in worker.jobs] == [1, 1]
        worker.fail("OUT_OF_MEMORY", retryable=True)
        await b.turn()
        await b.answer(worker)
        assert reason_of(tasks[0]) is Reason.OUT_OF_MEMORY
        assert tasks[1].future.result() == LivenessAnswer(1.0)
