"""What a pool can serve: readiness, memory, galleries, reloads, the end."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs
from tests.fakes.pool_bench import (
    PACKAGE,
    bench,
    reason_of,
)
from tests.fakes.scripted_worker import ScriptedLauncher
from tests.real_pool import open_descriptors

from facelane_server import config
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.ipc.messages import (
    PROTOCOL,
    GallerySnapshot,
    Hello,
    Ready,
    Warming,
)
from facelane_server.models.catalog import Catalog
from facelane_server.pools.pool import Pool
from facelane_server.pools.report import PoolChange, PoolState
from facelane_server.pools.restart import Life
from facelane_server.pools.tasks import (
    LivenessAnswer,
)

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
        worker.say(Warming(1.0), Ready(worker.model_id, 1.0, 1.0, 0.1))
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
        worker.say(Warming(1.0), Ready(worker.model_id, 1.0, 1.0, 0.1, 500))
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
        await b.workers[2].become_ready(model_id=fresh.model_id)
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


async def test_tasks_know_which_model_has_answered_them() -> None:
    """A reload in turn has workers of both models."""
    manifest = structs.replace(PACKAGE.manifest, version="2")
    fresh = replace(PACKAGE, folder=PACKAGE.folder / "fresh", manifest=manifest)
    async with bench(isolation="external", workers=2) as b:
        await b.ready()
        reloading = asyncio.create_task(b.pool.reload(fresh))
        await b.turn()
        b.workers[0].leave()
        await b.turn()
        await b.workers[2].become_ready(model_id=fresh.model_id)
        tasks = [b.submit(age_ms=60_000)]
        await b.turn()
        assert [task.model for task in tasks] == [fresh.model_id], "the other one drains"
        b.workers[1].leave()
        await b.turn()
        await b.answer(b.workers[2])
        await b.workers[3].become_ready(model_id=fresh.model_id)
        await asyncio.wait_for(reloading, 30)
        assert fresh.model_id != PACKAGE.model_id


async def test_a_worker_that_has_loaded_another_model_is_lost() -> None:
    """Its package was replaced, and it was begun anew: by the thresholds and the templates of the
    one before it would judge wrongly."""
    async with bench(restart_limit=1) as b:
        await b.start()
        worker = b.workers[0]
        await worker.hello()
        worker.say(Warming(1.0), Ready(f"{worker.model_id}2", 1.0, 1.0, 0.1))
        await b.turn()
        assert (b.pool.info().workers[0].last_loss, b.pool.available) == ("PROTOCOL", False)


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
        worker.say(Warming(1.0), Ready(worker.model_id, 1.0, 1.0, 0.1))
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
