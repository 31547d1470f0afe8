"""Workers as real processes: their lives, their faults, and that nothing is lost."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import time
from pathlib import Path

import msgspec
import psutil
import pytest
from tests.real_pool import PACKAGES, alive, named_shared_memory, open_descriptors, real_pool
from tests.waiting import auntil

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.limits import MIB
from facelane_server.models.package import read_package
from facelane_server.pools.host import ProcessLauncher
from facelane_server.pools.report import PoolChange, PoolState
from facelane_server.pools.restart import Life
from facelane_server.pools.tasks import DetectAnswer, EmbedAnswer, LivenessAnswer, Task
from facelane_server.worker.failpoints import POISON


async def outcomes(tasks: list[Task], timeout: float = 25.0) -> list[object]:  # type: ignore[type-arg]
    """Every task's answer or error; a task that never ends fails the test."""
    done, pending = await asyncio.wait([task.future for task in tasks], timeout=timeout)
    assert not pending, f"{len(pending)} of {len(tasks)} tasks were lost"
    assert len(done) == len(tasks)
    return [task.future.exception() or task.future.result() for task in tasks]


def reasons(results: list[object]) -> set[Reason]:
    return {result.reason for result in results if isinstance(result, FacelaneError)}


def proc(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()


def resident_shared_mib() -> int:
    """Shared memory that this process maps and that is backed by pages."""
    (line,) = [row for row in proc(os.getpid(), "status").splitlines() if b"RssShmem" in row]
    return int(line.split()[1]) // 1024


# -- the good days ----------------------------------------------------------------------


@pytest.mark.parametrize("stage", list(PACKAGES))
async def test_each_stage_answers_through_a_real_process(stage: Stage) -> None:
    async with real_pool(stage) as p:
        answer = await p.infer()
        if stage is Stage.DETECTOR:
            assert isinstance(answer, DetectAnswer)
            assert (answer.width, answer.height, len(answer.faces)) == (64, 64, 1)
            assert [len(c) for c in answer.faces[0].crops] == [112 * 112 * 3, 80 * 80 * 3]
            assert 0 < answer.faces[0].box.width <= 64
            assert len(answer.faces[0].landmarks) == 5
        elif stage is Stage.RECOGNIZER:
            assert isinstance(answer, EmbedAnswer)
            assert len(answer.vector) == 512 * 4
            assert answer == await p.infer(), "equal chips, equal vectors"
            assert answer.vector != (await p.infer(marker=b"another face")).vector
        else:
            assert answer == LivenessAnswer(1.0)


async def test_batches_come_back_to_their_own_tasks() -> None:
    async with real_pool(Stage.RECOGNIZER, workers=2, batch_max=8) as p:
        alone = [await p.infer(marker=bytes([n])) for n in range(20)]
        tasks = [p.submit(lane=n % 3, marker=bytes([n])) for n in range(20)]
        assert await outcomes(tasks) == alone


async def test_a_broken_picture_fails_alone_in_its_batch() -> None:
    async with real_pool(Stage.DETECTOR, batch_max=8) as p:
        tasks = [p.submit() for _ in range(4)]
        for task in tasks[1::2]:
            p.pool.withdraw(task)
            broken = msgspec.structs.replace(task.request.picture, stride=7)
            task.request = msgspec.structs.replace(task.request, picture=broken)
            p.pool.submit(task)
        results = await outcomes(tasks)
        assert [isinstance(r, DetectAnswer) for r in results] == [True, False, True, False]
        assert reasons(results) == {Reason.RAW_LAYOUT_INVALID}
        assert p.pool.info().losses == 0


async def test_a_request_that_no_message_can_carry_fails_alone() -> None:
    async with real_pool(Stage.RECOGNIZER, batch_max=8) as p:
        tasks = [p.submit() for _ in range(4)]
        for task in tasks[:2]:
            p.pool.withdraw(task)
        too_long, no_text = tasks[:2]
        for task, name in ((too_long, "x" * 300_000), (no_text, "\ud800")):
            task.request = msgspec.structs.replace(task.request, gallery_id=name)
        for task in tasks[:2]:
            p.pool.submit(task)
        results = await outcomes(tasks)
        assert [isinstance(r, EmbedAnswer) for r in results] == [False, False, True, True]
        assert reasons(results) == {Reason.INTERNAL}
        assert p.pool.info().losses == 0
        await p.infer()


async def test_the_worker_is_told_apart_and_knows_its_manners() -> None:
    async with real_pool() as p:
        pid = p.pids()[0]
        assert proc(pid, "comm").strip() == b"fl-liveness#0"
        assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull
        assert os.getsid(pid) == pid
        assert b"--threads=1" in proc(pid, "cmdline")
        os.kill(pid, signal.SIGINT)
        await p.infer()
        assert p.pids() == [pid], "Ctrl-C is the server's to handle"


async def test_stopping_a_pool_drains_its_workers() -> None:
    async with real_pool(options={"fail.slow_ms": "30"}, batch_max=1) as p:
        tasks = [p.submit() for _ in range(5)]
        await p.pool.stop(10.0)
        assert await outcomes(tasks) == [LivenessAnswer(1.0)] * 5
        assert p.pool.info().losses == 0


async def test_no_descriptor_and_no_shared_memory_is_left_behind() -> None:
    async with real_pool():
        pass
    before = open_descriptors()
    for _ in range(2):
        async with real_pool(Stage.DETECTOR, workers=2) as p:
            await p.infer()
            assert [named_shared_memory(pid) for pid in ("self", *p.pids())] == [[], [], []]
            os.kill(p.pids()[0], signal.SIGKILL)
            await auntil(lambda p=p: p.pool.info().workers[0].restarts == 1)
            await auntil(lambda p=p: p.pool.state is PoolState.SERVING)
    assert open_descriptors() == before


async def test_a_large_picture_and_a_large_answer_do_not_stay_resident() -> None:
    side = 3000
    async with real_pool(Stage.DETECTOR, batch_max=8, options={"faces": "60"}) as p:
        await p.infer()
        before = resident_shared_mib()
        for _ in range(3):
            large = p.submit(max_faces=60, side=side)
            many = [p.submit(max_faces=60) for _ in range(8)]
            results = await outcomes([large, *many])
            assert [len(answer.faces) for answer in results] == [60] * 9
        assert side * side * 3 > 24 * MIB
        # Two slots of two arenas keep a little; the rest is given back.
        kept = 4 * limits.SLOT_KEEP_BYTES // MIB
        assert resident_shared_mib() - before <= kept


async def test_a_process_that_cannot_be_watched_is_not_left_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server has no descriptor left just then."""

    def refused(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    children, descriptors = psutil.Process().children(), open_descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pidfd_open", refused)
        with pytest.raises(OSError, match="Too many open files"):
            await ProcessLauncher(threads=1).launch("liveness#0")
    assert psutil.Process().children() == children
    assert open_descriptors() == descriptors


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(b'{"level": []}', marks=pytest.mark.slow),
        b'{"self": 1, "method_name": 2, "exc_info": true, "stack_info": true}',
        b'{"event": ' + b"[" * 7000,
        pytest.param(b"{" + b"\xff" * 9000, marks=pytest.mark.slow),
    ],
    ids=["level", "names", "depth", "bytes"],
)
async def test_whatever_a_worker_says_last_its_end_is_seen(words: bytes) -> None:
    """Libraries write to stderr what they like, in JSON too."""
    async with real_pool() as p:
        (pid,) = p.pids()
        Path(f"/proc/{pid}/fd/2").write_bytes(words)
        os.kill(pid, signal.SIGKILL)
        await auntil(lambda: p.pool.info().workers[0].restarts == 1)
        assert await p.infer() == LivenessAnswer(1.0)


# -- violence ---------------------------------------------------------------------------


async def test_kill_9_under_load_loses_nothing() -> None:
    slow = {"fail.slow_ms": "3"}
    async with real_pool(workers=2, batch_max=4, restart_limit=100, options=slow) as p:
        tasks = []
        for round_ in range(4):
            # Both are there: the number of one that is gone could be killed again.
            await auntil(lambda: [w.life for w in p.pool.info().workers] == [Life.READY] * 2)
            tasks += [p.submit(lane=n % 5) for n in range(60)]
            await auntil(lambda: p.pool.in_flight > 0)
            ready = [w.pid for w in p.pool.info().workers if w.life is Life.READY]
            killed = ready[round_ % len(ready)]
            os.kill(killed, signal.SIGKILL)
            await auntil(lambda pid=killed: pid not in p.pids())
            await auntil(lambda: p.pool.state is PoolState.SERVING)
        assert p.pool.info().losses >= 4
        results = await outcomes(tasks)
        wrong = [result for result in results if not isinstance(result, LivenessAnswer)]
        assert wrong == []
        assert p.pool.info().completed == len(tasks)


async def test_every_loss_shows_and_heals() -> None:
    """How soon is for ``bench recovery`` to say."""
    async with real_pool(restart_limit=100, backoff_max_s=0.1) as p:
        for _ in range(3):
            events = len(p.events)
            os.kill(p.pids()[0], signal.SIGKILL)
            await auntil(lambda: p.pool.state is not PoolState.SERVING)
            await auntil(lambda: p.pool.state is PoolState.SERVING)
            told = [x for _, x in p.events[events:] if x.change is PoolChange.STATE]
            assert [e.state for e in told] == [PoolState.NOT_SERVING, PoolState.SERVING]
            assert await p.infer() == LivenessAnswer(1.0)


async def test_a_spare_takes_over_without_a_gap() -> None:
    async with real_pool(spares=1, batch_max=2, options={"fail.slow_ms": "5"}) as p:
        await auntil(lambda: len(p.changes(PoolChange.WORKER_READY)) == 2)
        tasks = [p.submit() for _ in range(20)]
        await auntil(lambda: p.pool.in_flight > 0)
        (active,) = [w.pid for w in p.pool.info().workers if not w.spare]
        killed = time.monotonic()
        os.kill(active, signal.SIGKILL)
        assert set(await outcomes(tasks)) == {LivenessAnswer(1.0)}
        states = {e.state for at, e in p.events if at > killed}
        assert PoolState.NOT_SERVING not in states
        await auntil(lambda: sum(w.spare for w in p.pool.info().workers) == 1)


async def test_a_stopped_process_is_seen_without_a_job_or_a_ping() -> None:
    async with real_pool(job_timeout_ms=60_000, ping_interval_s=60.0) as p:
        pid = p.pids()[0]
        os.kill(pid, signal.SIGSTOP)
        await auntil(lambda: p.pool.state is PoolState.NOT_SERVING)
        await auntil(lambda: not alive(pid))
        await auntil(lambda: p.pool.state is PoolState.SERVING)
        assert p.pool.info().workers[0].last_loss == "HALTED"


async def test_sigterm_from_outside_is_a_polite_leave() -> None:
    async with real_pool(batch_max=1, options={"fail.slow_ms": "10"}) as p:
        tasks = [p.submit() for _ in range(10)]
        await auntil(lambda: p.pool.in_flight > 0)
        pid = p.pids()[0]
        os.kill(pid, signal.SIGTERM)
        assert set(await outcomes(tasks)) == {LivenessAnswer(1.0)}
        await auntil(lambda: not alive(pid))
        assert p.pool.info().losses == 0


# -- failpoints ---------------------------------------------------------------------------


async def test_a_hanging_job_ends_in_a_stack_dump_a_kill_and_a_retry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"fail.hang_on_job": "3", "fail.only_file": str(tmp_path / "once")}
    async with real_pool(job_timeout_ms=1000, batch_max=1, options=options) as p:
        tasks = [p.submit() for _ in range(5)]
        assert await outcomes(tasks) == [LivenessAnswer(1.0)] * 5
        assert p.pool.info().workers[0].last_loss == "HUNG"
    assert "most recent call first" in capsys.readouterr().out, "the stack dump was logged"


@pytest.mark.parametrize(
    ("fault", "loss"),
    [
        ("crash_on_job", "EXITED"),
        pytest.param("exit_on_job", "EXITED", marks=pytest.mark.slow),
        ("sticky_on_job", "DEVICE_POISONED"),
        ("garbage_on_job", "PROTOCOL"),
        pytest.param("truncated_on_job", "PROTOCOL", marks=pytest.mark.slow),
    ],
)
async def test_a_fault_in_a_job_costs_a_worker_and_no_task(
    fault: str, loss: str, tmp_path: Path
) -> None:
    options = {f"fail.{fault}": "4", "fail.only_file": str(tmp_path / "once")}
    async with real_pool(batch_max=2, options=options) as p:
        tasks = [p.submit() for _ in range(20)]
        assert await outcomes(tasks) == [LivenessAnswer(1.0)] * 20
        info = p.pool.info()
        assert (info.losses, info.workers[0].last_loss) == (1, loss)


async def test_an_unforeseen_error_fails_its_job_and_not_the_worker() -> None:
    async with real_pool(batch_max=1, options={"fail.error_on_job": "3"}) as p:
        results = await outcomes([p.submit() for _ in range(4)])
        assert reasons(results) == {Reason.INTERNAL}
        assert sum(isinstance(r, FacelaneError) for r in results) == 1
        assert p.pool.info().losses == 0


async def test_out_of_memory_once_is_retried() -> None:
    async with real_pool(batch_max=4, options={"fail.oom_once_on_job": "3"}) as p:
        assert set(await outcomes([p.submit() for _ in range(12)])) == {LivenessAnswer(1.0)}
        assert p.pool.info().losses == 0


async def test_out_of_memory_that_repeats_recycles_the_worker() -> None:
    async with real_pool(batch_max=1, options={"fail.oom_on_job": "3"}) as p:
        results = await outcomes([p.submit() for _ in range(8)])
        assert reasons(results) <= {Reason.OUT_OF_MEMORY, Reason.POISONED}
        await auntil(lambda: p.pool.info().losses >= 1)
        assert p.pool.info().workers[0].last_loss == "OUT_OF_MEMORY"


async def test_poison_is_quarantined_and_the_innocent_are_served() -> None:
    async with real_pool(
        workers=2, batch_max=8, options={"fail.poison": "1"}, restart_limit=20
    ) as p:
        tasks = [p.submit(marker=POISON if n == 5 else b"", age_s=25.0) for n in range(16)]
        results = await outcomes(tasks)
        assert isinstance(results[5], FacelaneError)
        assert results[5].reason is Reason.POISONED
        assert [r for n, r in enumerate(results) if n != 5] == [LivenessAnswer(1.0)] * 15
        assert p.pool.info().losses == 2


async def test_a_leak_is_recycled_at_the_budget_and_nothing_is_lost() -> None:
    options = {"fail.leak_mib": "10"}
    async with real_pool(batch_max=1, memory_mib=220, options=options) as p:
        first = p.pids()[0]

        async def recycled() -> bool:
            assert await p.infer() == LivenessAnswer(1.0)
            return bool(p.changes(PoolChange.WORKER_RESTARTING))

        await auntil(recycled)
        await auntil(lambda: p.pool.state is PoolState.SERVING and p.pids()[0] != first)
        assert p.changes(PoolChange.WORKER_RESTARTING)[0].reason == "OVER_BUDGET"
        assert p.pool.info().losses == 0


# -- starts that fail -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "loss"),
    [
        ("load", "LOAD_FAILED"),
        pytest.param("crash_load", "EXITED", marks=pytest.mark.slow),
        pytest.param("crash_warm_up", "EXITED", marks=pytest.mark.slow),
        ("hang_load", "START_TIMEOUT"),
    ],
)
async def test_a_start_that_keeps_failing_ends_in_quarantine(fault: str, loss: str) -> None:
    async with real_pool(
        wait=False,
        restart_limit=2,
        load_timeout_s=20.0 if fault != "hang_load" else 0.7,
        options={f"fail.{fault}": "1"},
    ) as p:
        await auntil(lambda: p.pool.info().workers[0].life is Life.QUARANTINED)
        info = p.pool.info()
        assert (info.state, info.losses) == (PoolState.NOT_SERVING, 2)
        assert info.workers[0].last_loss == loss
        with pytest.raises(FacelaneError) as refused:
            await p.infer(age_s=5.0)
        assert refused.value.reason is Reason.POOL_UNAVAILABLE


async def test_a_start_that_fails_once_heals(tmp_path: Path) -> None:
    options = {"fail.crash_load": "1", "fail.only_file": str(tmp_path / "once")}
    async with real_pool(options=options) as p:
        assert await p.infer() == LivenessAnswer(1.0)
        assert p.pool.info().workers[0].restarts == 1


async def test_a_slow_start_is_waited_for() -> None:
    async with real_pool(wait=False, options={"fail.slow_load_ms": "500"}) as p:
        assert p.pool.state is not PoolState.SERVING
        assert await p.infer() == LivenessAnswer(1.0)
        assert p.pool.info().losses == 0


async def test_an_unknown_failpoint_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    async with real_pool(wait=False, restart_limit=1, options={"fail.nosuch": "1"}) as p:
        await auntil(lambda: p.pool.info().workers[0].life is Life.QUARANTINED)
    assert "unknown failpoint fail.nosuch" in capsys.readouterr().out


# -- administration -------------------------------------------------------------------------


async def test_restart_worker_under_load() -> None:
    async with real_pool(batch_max=2, options={"fail.slow_ms": "2"}) as p:
        tasks = [p.submit() for _ in range(60)]
        old, new = await p.pool.restart_worker("liveness#0")
        assert set(await outcomes(tasks)) == {LivenessAnswer(1.0)}
        assert old != new
        assert not alive(old)
        assert p.pool.info().losses == 0


async def test_reload_under_load_loses_nothing() -> None:
    async with real_pool(workers=2, batch_max=2, options={"fail.slow_ms": "2"}) as p:
        old = set(p.pids())
        reloading = asyncio.create_task(p.pool.reload(PACKAGES[Stage.LIVENESS]))
        tasks = []
        while not reloading.done():
            tasks += [p.submit() for _ in range(5)]
            await asyncio.wait([task.future for task in tasks[-5:]])
        await reloading
        tasks += [p.submit() for _ in range(20)]
        assert set(await outcomes(tasks)) == {LivenessAnswer(1.0)}
        await auntil(lambda: not any(alive(pid) for pid in old))
        await auntil(lambda: len(p.pool.info().workers) == 2)
        info = p.pool.info()
        assert (info.losses, info.retried, info.state) == (0, 0, PoolState.SERVING)


async def test_answers_are_read_by_the_model_that_gave_them(tmp_path: Path) -> None:
    """A reload to a model of another embedding size, while the old one has jobs in flight."""
    old = PACKAGES[Stage.RECOGNIZER]
    manifest = (old.folder / "model.toml").read_text(encoding="utf-8")
    shorter = tmp_path / "shorter"
    shorter.mkdir()
    (shorter / "model.toml").write_text(
        manifest.replace("embedding_dim = 512", "embedding_dim = 128"), encoding="utf-8"
    )
    async with real_pool(Stage.RECOGNIZER, batch_max=2, options={"fail.slow_ms": "5"}) as p:
        before = (await p.infer()).vector
        reloading = asyncio.create_task(p.pool.reload(read_package(shorter)))
        tasks = []
        while not reloading.done():
            tasks += [p.submit() for _ in range(6)]
            await asyncio.wait([task.future for task in tasks[-6:-5]])
        await reloading
        after = (await p.infer()).vector
        assert (len(before), len(after)) == (512 * 4, 128 * 4)
        vectors = [answer.vector for answer in await outcomes(tasks)]  # type: ignore[attr-defined]
        assert {bytes(vector) for vector in vectors} == {bytes(before), bytes(after)}
        assert p.pool.info().losses == 0


async def test_reload_of_a_broken_package_keeps_the_old_one(tmp_path: Path) -> None:
    from dataclasses import replace

    async with real_pool() as p:
        pids = p.pids()
        gone = replace(PACKAGES[Stage.LIVENESS], folder=tmp_path / "nosuch")
        with pytest.raises(FacelaneError) as caught:
            await p.pool.reload(gone)
        assert caught.value.reason is Reason.MODEL_INVALID
        assert p.pids() == pids
        assert await p.infer() == LivenessAnswer(1.0)
