"""A pool's decisions, with scripted workers and a clock that stands still."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.scripted_worker import ManualClock, ScriptedLauncher, ScriptedWorker, settle
from tests.real_pool import open_descriptors

from facelane_server import config, limits
from facelane_server.domain import Encoding, FacelaneError, Picture, Reason, Stage
from facelane_server.gallery.decide import Thresholds
from facelane_server.ipc.messages import (
    PROTOCOL,
    GallerySnapshot,
    Hello,
    InferDone,
    InferFailed,
    LivenessDone,
    Ready,
    Warming,
)
from facelane_server.models.catalog import Catalog
from facelane_server.pipeline import Origin, Pipeline, Plan
from facelane_server.pools.pool import Pool
from facelane_server.pools.report import PoolChange, PoolEvent, PoolState
from facelane_server.pools.restart import Life
from facelane_server.pools.tasks import (
    ANYBODY,
    DetectRequest,
    LivenessAnswer,
    LivenessRequest,
    Request,
    Sender,
    Task,
)

PACKAGE = Catalog().resolve("null-liveness")
CROPS = tuple(b"\0" * (spec.size * spec.size * 3) for spec in PACKAGE.crops)


class Bench:
    """A pool, its scripted workers and its clock."""

    def __init__(
        self, *, stage: Stage = Stage.LIVENESS, budget_mib: int | None = None, **options: Any
    ) -> None:
        self.clock = ManualClock()
        self.launcher = ScriptedLauncher()
        self.events: list[PoolEvent] = []
        self.pool = Pool(
            stage,
            config.Pool(**{"backoff_initial_s": 0.1, "ping_interval_s": 1000.0, **options}),
            PACKAGE if stage is Stage.LIVENESS else Catalog().resolve(f"null-{stage}"),
            self.launcher,
            on_change=self.events.append,
            clock=self.clock,
            rng=random.Random(1),
            budget_mib=budget_mib,
        )

    @property
    def workers(self) -> list[ScriptedWorker]:
        return self.launcher.workers

    async def start(self) -> None:
        await self.pool.start()
        await settle()

    async def ready(self) -> None:
        await self.start()
        for worker in self.workers:
            await worker.become_ready()

    def submit(
        self, lane: int = 1, *, weight: int = 1, age_ms: float = 1000.0, sender: Sender = ANYBODY
    ) -> Task[Any]:
        request: Request = LivenessRequest(CROPS)
        if self.pool.stage is Stage.DETECTOR:
            request = DetectRequest(Picture(Encoding.JPEG, b"\0" * 100), 1, 10**6)
        task: Task[Any] = Task(
            request,
            lane,
            weight,
            self.clock.now_ns() + int(age_ms * 1e6),
            asyncio.get_running_loop().create_future(),
            sender=sender,
        )
        # Not every test looks at every task.
        task.future.add_done_callback(lambda f: f.cancelled() or f.exception())
        self.pool.submit(task)
        return task

    async def turn(self) -> None:
        await settle()
        for worker in self.workers:
            worker.read()

    async def answer(self, worker: ScriptedWorker) -> None:
        worker.answer()
        await self.turn()

    def changes(self) -> list[PoolChange]:
        return [event.change for event in self.events]


@asynccontextmanager
async def bench(**options: Any) -> AsyncIterator[Bench]:
    made = Bench(**options)
    try:
        yield made
    finally:
        stopping = asyncio.create_task(made.pool.stop(0.0))
        for turn in range(1000):
            if stopping.done():
                break
            await made.clock.advance(0 if turn < 10 else 10_000)
            await made.turn()
            for worker in made.workers:
                if worker.draining and worker.channel is not None:
                    worker.leave()
        await stopping
        await made.launcher.close()


def reason_of(task: Task[Any]) -> Reason:
    error = task.future.exception()
    assert isinstance(error, FacelaneError)
    return error.reason


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
        b.workers[0].say(Warming(1.0), Ready("null", 1.0, 1.0, 0.1, batch_max=told))
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
        worker.say(Warming(1.0), Ready("null", 1.0, 1.0, 0.1))
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


# -- what can be served at all ------------------------------------------------------------


async def test_tasks_wait_for_a_worker_that_is_starting() -> None:
    async with bench() as b:
        await b.start()
        assert (b.pool.state, b.pool.available) == (PoolState.STARTING, False)
        task = b.submit(age_ms=10_000)
        await b.workers[0].become_ready()
        await b.turn()
        await b.answer(b.workers[0])
        assert task.future.result() == LivenessAnswer(1.0)


async def test_what_cannot_be_served_in_time_is_refused_at_once() -> None:
    async with bench(backoff_initial_s=10.0, backoff_max_s=10.0) as b:
        await b.ready()
        waiting = b.submit(age_ms=1000)
        await b.turn()
        b.workers[0].die(-9)
        await b.turn()
        # The task that was in flight, and a new one: both before their deadlines.
        assert reason_of(waiting) is Reason.POOL_UNAVAILABLE
        assert reason_of(b.submit(age_ms=1000)) is Reason.POOL_UNAVAILABLE
        patient = b.submit(age_ms=60_000)
        await b.clock.advance(10_000)
        await b.workers[1].become_ready()
        await b.turn()
        await b.answer(b.workers[1])
        assert patient.future.result() == LivenessAnswer(1.0)


async def test_a_pool_serves_only_after_a_real_inference() -> None:
    async with bench() as b:
        await b.start()
        worker = b.workers[0]
        await worker.hello()
        worker.say(Warming(1.0), Ready("null", 1.0, 1.0, 0.1))
        await b.turn()
        assert len(worker.jobs) == 1
        assert b.pool.state is PoolState.STARTING
        await b.answer(worker)
        assert b.pool.state is PoolState.SERVING


async def test_a_worker_that_never_gets_ready_is_killed_and_quarantined() -> None:
    async with bench(load_timeout_s=1.0, restart_limit=2, backoff_initial_s=0.1) as b:
        await b.start()
        await b.clock.advance(1001)
        await asyncio.wait([b.workers[0].exited], timeout=30)
        await b.turn()
        assert b.pool.state is PoolState.NOT_SERVING
        await b.clock.advance(200)
        await b.clock.advance(1001)
        await asyncio.wait([b.workers[1].exited], timeout=30)
        await b.turn()
        assert b.pool.info().workers[0].life is Life.QUARANTINED
        assert PoolChange.WORKER_QUARANTINED in b.changes()
        assert reason_of(b.submit()) is Reason.POOL_UNAVAILABLE


async def test_a_process_that_cannot_be_started_is_a_loss_like_any_other() -> None:
    async with bench(restart_limit=2) as b:
        b.launcher.refuse = True
        await b.start()
        assert b.pool.info().workers[0].life is Life.BACKOFF
        b.launcher.refuse = False
        await b.clock.advance(200)
        await b.workers[0].become_ready()
        assert b.pool.state is PoolState.SERVING


async def test_a_load_that_cannot_be_said_is_a_loss_at_once() -> None:
    """A folder whose name is no text: not to be found out by the start's timeout."""
    async with bench(restart_limit=1) as b:
        b.pool.package = replace(PACKAGE, folder=PACKAGE.folder / "\udcff")
        await b.start()
        b.workers[0].say(Hello(PROTOCOL))
        await b.turn()
        info = b.pool.info()
        assert (info.workers[0].life, info.workers[0].last_loss) == (
            Life.QUARANTINED,
            "NOT_STARTED",
        )


async def test_a_spare_takes_over_at_once() -> None:
    async with bench(spares=1, batch_max=1) as b:
        await b.ready()
        first, second = b.workers
        b.submit(), b.submit(), b.submit()
        await b.turn()
        assert second.jobs == [], "a spare is given nothing while the others are well"
        first.die(-9)
        await b.turn()
        assert b.pool.state is PoolState.SERVING
        assert len(second.jobs) == 2
        states = [e.state for e in b.events if e.change is PoolChange.STATE]
        assert PoolState.NOT_SERVING not in states


# -- memory, galleries, administration ----------------------------------------------------


async def test_a_worker_over_its_budget_is_drained_and_replaced() -> None:
    async with bench(memory_mib=100) as b:
        await b.ready()
        worker = b.workers[0]
        task = b.submit(age_ms=60_000)
        await b.turn()
        worker.answer(memory_mib=101)
        await b.turn()
        assert task.future.result() == LivenessAnswer(1.0)
        assert worker.draining
        worker.leave()
        await b.turn()
        await b.workers[1].become_ready()
        info = b.pool.info()
        assert (info.state, info.losses) == (PoolState.SERVING, 0)


async def test_out_of_memory_at_the_budget_replaces_the_worker_and_loses_nothing() -> None:
    """The staged job meets the same full memory: both go to the worker that takes over."""
    async with bench(memory_mib=100, spares=1, batch_max=1) as b:
        await b.ready()
        first, second = b.workers
        tasks = [b.submit(age_ms=60_000) for _ in range(2)]
        await b.turn()
        assert len(first.jobs) == 2
        first.fail("OUT_OF_MEMORY", retryable=True)
        await b.turn()
        assert first.draining
        first.fail("OUT_OF_MEMORY", retryable=True)
        await b.turn()
        for _ in tasks:
            await b.answer(second)
        assert all(task.future.result() == LivenessAnswer(1.0) for task in tasks)
        assert b.pool.info().losses == 0


async def test_out_of_memory_without_a_budget_is_retried_where_it_happened() -> None:
    async with bench(batch_max=1) as b:
        await b.ready()
        task = b.submit(age_ms=60_000)
        await b.turn()
        b.workers[0].fail("OUT_OF_MEMORY", retryable=True)
        await b.turn()
        assert not b.workers[0].draining
        await b.answer(b.workers[0])
        assert task.future.result() == LivenessAnswer(1.0)


async def test_a_thread_group_over_its_budget_ends_as_a_process() -> None:
    """``budget_mib`` is the group's; draining one thread would give no memory back."""
    async with bench(memory_mib=100, isolation="thread", budget_mib=250) as b:
        await b.ready()
        for memory in (200, 251):
            task = b.submit(age_ms=60_000)
            await b.turn()
            b.workers[0].answer(memory_mib=memory)
            await b.turn()
            assert task.future.result() == LivenessAnswer(1.0)
        info = b.pool.info()
        assert (info.losses, info.workers[0].last_loss) == (1, "OVER_BUDGET")


async def test_a_model_that_alone_exceeds_its_budget_costs_the_restart_budget() -> None:
    async with bench(memory_mib=100, restart_limit=1) as b:
        await b.start()
        worker = b.workers[0]
        await worker.hello()
        worker.say(Warming(1.0), Ready("null", 1.0, 1.0, 0.1, 500))
        await b.turn()
        assert b.pool.info().workers[0].life is Life.QUARANTINED
        assert b.pool.info().workers[0].last_loss == "OVER_BUDGET"


async def test_a_worker_that_does_not_load_the_gallery_is_replaced() -> None:
    """It would go on naming people by a gallery that is no more."""
    async with bench(workers=2, ping_interval_s=1.0, canary_interval_s=1000.0) as b:
        await b.ready()
        fd = os.memfd_create("snapshot")
        publishing = asyncio.create_task(b.pool.publish_gallery(GallerySnapshot(1, 0, 512, ()), fd))
        await b.turn()
        prompt, stale = b.workers
        prompt.load_gallery()
        for _ in range(29):
            await b.clock.advance(1000)
            await b.turn()
        assert not publishing.done()
        for _ in range(3):
            await b.clock.advance(1000)
            await b.turn()
        await asyncio.wait_for(publishing, 30)
        os.close(fd)
        lost = [e for e in b.events if e.change is PoolChange.WORKER_LOST]
        assert [(e.worker_id, e.reason) for e in lost] == [(stale.worker_id, "GALLERY_STALE")]


async def test_gallery_versions_do_not_go_back_and_may_be_asked_for_again() -> None:
    async with bench() as b:
        await b.ready()
        fd = os.memfd_create("snapshot")
        for version in (2, 2):
            publishing = asyncio.create_task(
                b.pool.publish_gallery(GallerySnapshot(version, 0, 512, ()), fd)
            )
            await b.turn()
            b.workers[0].load_gallery()
            await asyncio.wait_for(publishing, 30)
        assert b.workers[0].snapshots == [2], "it was sent once"
        with pytest.raises(ValueError, match="go back"):
            await b.pool.publish_gallery(GallerySnapshot(1, 0, 512, ()), fd)
        os.close(fd)


@pytest.mark.parametrize("call", ["dup", "memfd_create"])
async def test_without_a_descriptor_for_the_next_gallery_the_last_one_stands(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptors are still the pool's, and still what they were."""

    def refused(*_: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with bench() as b:
        await b.ready()
        fd = os.memfd_create("snapshot")
        publishing = asyncio.create_task(b.pool.publish_gallery(GallerySnapshot(1, 0, 512, ()), fd))
        await b.turn()
        b.workers[0].load_gallery()
        await asyncio.wait_for(publishing, 30)
        before = open_descriptors()
        with monkeypatch.context() as patched:
            patched.setattr(os, call, refused)
            with pytest.raises(OSError, match="Too many open files"):
                await b.pool.publish_gallery(GallerySnapshot(2, 0, 512, ()), fd)
        assert open_descriptors() == before
        os.close(fd)
        b.workers[0].die(-9)
        await b.turn()
        await b.clock.advance(200)
        await b.workers[1].become_ready()
        assert b.workers[1].snapshots == [1]
        assert b.pool.state is PoolState.SERVING


async def test_restart_worker_drains_it_and_nothing_is_lost() -> None:
    async with bench(batch_max=1) as b:
        await b.ready()
        worker = b.workers[0]
        tasks = [b.submit(age_ms=60_000) for _ in range(4)]
        await b.turn()
        restarting = asyncio.create_task(b.pool.restart_worker("liveness#0"))
        await b.turn()
        assert worker.draining
        while worker.jobs:
            await b.answer(worker)
        worker.leave()
        await b.turn()
        await b.workers[1].become_ready()
        await b.turn()
        while b.workers[1].jobs:
            await b.answer(b.workers[1])
        assert await restarting == (1000, 1001)
        assert all(task.future.result() == LivenessAnswer(1.0) for task in tasks)


async def test_restart_of_an_unknown_worker_names_the_known_ones() -> None:
    async with bench() as b:
        await b.ready()
        with pytest.raises(FacelaneError, match="liveness#0") as caught:
            await b.pool.restart_worker("liveness#7")
        assert caught.value.reason is Reason.WORKER_NOT_FOUND


async def test_reload_warms_beside_swaps_and_drains() -> None:
    async with bench(batch_max=1) as b:
        await b.ready()
        old = b.workers[0]
        before = b.submit(age_ms=60_000)
        await b.turn()
        reloading = asyncio.create_task(b.pool.reload(PACKAGE))
        await b.turn()
        new = b.workers[1]
        during = b.submit(age_ms=60_000)
        await b.turn()
        assert len(old.jobs) == 2, "the old one serves until the new one is ready"
        await new.become_ready()
        await asyncio.wait_for(reloading, 30)
        after = b.submit(age_ms=60_000)
        await b.turn()
        assert len(new.jobs) == 1
        assert old.draining
        while old.jobs:
            await b.answer(old)
        old.leave()
        await b.answer(new)
        for task in (before, during, after):
            assert task.future.result() == LivenessAnswer(1.0)
        assert [w.worker_id for w in b.pool.info().workers] == ["liveness#1"]


async def test_a_reload_that_fails_leaves_the_old_model_in_service() -> None:
    async with bench() as b:
        await b.ready()
        reloading = asyncio.create_task(b.pool.reload(PACKAGE))
        await b.turn()
        b.workers[1].die(78)
        with pytest.raises(FacelaneError) as caught:
            await asyncio.wait_for(reloading, 30)
        assert caught.value.reason is Reason.MODEL_INVALID
        assert b.pool.state is PoolState.SERVING
        task = b.submit()
        await b.turn()
        await b.answer(b.workers[0])
        assert task.future.done()


async def test_a_reload_that_is_cancelled_leaves_no_worker_behind() -> None:
    """Its caller hung up: the new workers would wait for ever, for nothing."""
    async with bench() as b:
        await b.ready()
        reloading = asyncio.create_task(b.pool.reload(PACKAGE))
        await b.turn()
        assert len(b.workers) == 2
        reloading.cancel()
        await asyncio.wait([reloading])
        await asyncio.wait([b.workers[1].exited], timeout=30)
        await b.turn()
        assert [w.worker_id for w in b.pool.info().workers] == ["liveness#0"]
        assert b.pool.state is PoolState.SERVING


@pytest.mark.parametrize("isolation", ["process", "external"])
async def test_a_pool_that_stops_starts_nothing_any_more(isolation: str) -> None:
    async with bench(isolation=isolation) as b:
        await b.ready()
        reloading = asyncio.create_task(b.pool.reload(PACKAGE))
        await b.turn()
        began = len(b.workers)
        stopping = asyncio.create_task(b.pool.stop(0.0))
        await b.turn()
        for worker in b.workers:
            if worker.draining:
                worker.leave()
        await asyncio.wait_for(stopping, 30)
        with pytest.raises(FacelaneError) as ended:
            await asyncio.wait_for(reloading, 30)
        assert ended.value.reason is Reason.POOL_UNAVAILABLE
        with pytest.raises(FacelaneError, match="shutting down"):
            await asyncio.wait_for(b.pool.reload(PACKAGE), 30)
        with pytest.raises(FacelaneError, match="shutting down"):
            await asyncio.wait_for(b.pool.restart_worker("liveness#0"), 30)
        await b.turn()
        assert len(b.workers) == began
        assert all(worker.exited.done() for worker in b.workers)


async def test_a_reload_in_turn_mends_a_quarantined_worker() -> None:
    """Its losses were the old package's: that is what the reload is for."""
    async with bench(isolation="external", restart_limit=1, quarantine_s=60.0) as b:
        await b.start()
        b.workers[0].die(78)
        await b.turn()
        assert b.pool.info().workers[0].life is Life.QUARANTINED
        reloading = asyncio.create_task(b.pool.reload(PACKAGE))
        await b.turn()
        await b.workers[1].become_ready()
        await asyncio.wait_for(reloading, 30)
        assert b.pool.state is PoolState.SERVING


async def test_a_reload_in_turn_that_is_cancelled_goes_back_to_the_old_model() -> None:
    fresh = replace(PACKAGE, folder=PACKAGE.folder / "fresh")
    async with bench(isolation="external", workers=2) as b:
        await b.ready()
        reloading = asyncio.create_task(b.pool.reload(fresh))
        await b.turn()
        b.workers[0].leave()
        await b.turn()
        await b.workers[2].become_ready()
        assert b.workers[2].load is not None
        assert b.workers[2].load.package == str(fresh.folder)
        reloading.cancel()
        await asyncio.wait([reloading])
        assert b.pool.package is PACKAGE
        for life in (2, 1):
            await b.turn()
            b.workers[life].leave()
        await b.turn()
        for worker in b.workers[3:]:
            await worker.become_ready()
            assert worker.load is not None
            assert worker.load.package == str(PACKAGE.folder)
        assert b.pool.state is PoolState.SERVING


async def test_reload_refuses_another_task_and_other_crops() -> None:
    async with bench() as b:
        await b.ready()
        with pytest.raises(FacelaneError, match="recognizer"):
            await b.pool.reload(Catalog().resolve("null-recognizer"))
        assert len(b.workers) == 1


async def test_drain_ends_when_the_last_task_is_answered() -> None:
    async with bench(batch_max=1) as b:
        await b.ready()
        tasks = [b.submit(age_ms=60_000) for _ in range(3)]
        await b.turn()
        draining = asyncio.create_task(b.pool.drain(30.0))
        await b.turn()
        assert reason_of(b.submit()) is Reason.POOL_UNAVAILABLE
        while b.workers[0].jobs:
            assert not draining.done()
            await b.answer(b.workers[0])
        assert await asyncio.wait_for(draining, 30)
        assert all(task.future.result() == LivenessAnswer(1.0) for task in tasks)


async def test_stop_leaves_no_future_behind() -> None:
    async with bench(batch_max=1) as b:
        await b.ready()
        tasks = [b.submit(age_ms=600_000) for _ in range(5)]
        await b.turn()
        worker = b.workers[0]
    assert all(task.future.done() for task in tasks)
    assert worker.exited.done()
    assert b.pool.state is PoolState.STOPPED
    assert b.clock.armed == 0, "no timer is left"


async def test_stop_before_anything_was_ready() -> None:
    async with bench() as b:
        await b.start()
    assert b.workers[0].exited.done()


async def test_a_worker_that_leaves_by_itself_loses_nothing() -> None:
    """SIGTERM from outside: it answers what it has, and says so."""
    async with bench(batch_max=1) as b:
        await b.ready()
        worker = b.workers[0]
        tasks = [b.submit(age_ms=60_000) for _ in range(3)]
        await b.turn()
        worker.answer()
        worker.leave()
        await b.turn()
        info = b.pool.info()
        assert (info.losses, info.workers[0].life) == (0, Life.BACKOFF)
        await b.clock.advance(200)
        await b.workers[1].become_ready()
        await b.turn()
        while b.workers[1].jobs:
            await b.answer(b.workers[1])
        assert [task.attempts for task in tasks] == [0, 0, 0]
        assert all(task.future.result() == LivenessAnswer(1.0) for task in tasks)


async def test_a_worker_that_leaves_before_it_joined_never_joins() -> None:
    async with bench() as b:
        await b.start()
        worker = b.workers[0]
        await worker.hello()
        worker.say(Warming(1.0), Ready("null", 1.0, 1.0, 0.1))
        await b.turn()
        # In one packet burst: the canary's answer, and the farewell of a SIGTERM.
        worker.answer()
        worker.leave()
        await b.turn()
        assert not b.pool.available
        assert b.pool.info().workers[0].life is Life.BACKOFF
        await b.clock.advance(200)
        await b.workers[1].become_ready()
        assert b.pool.state is PoolState.SERVING


def test_a_clock_is_not_needed_to_ask_a_pool_what_it_is() -> None:
    make: Callable[[], Pool] = lambda: Pool(  # noqa: E731
        Stage.LIVENESS, config.Pool(), PACKAGE, ScriptedLauncher()
    )
    assert make().state is PoolState.STOPPED
    assert make().model_id == PACKAGE.model_id
