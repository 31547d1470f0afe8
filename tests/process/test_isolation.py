"""The ways to host a worker: threads of one process, and processes from outside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.real_pool import (
    CATALOG,
    CROPS,
    FAST,
    PACKAGES,
    RealPool,
    alive,
    named_shared_memory,
    real_pool,
)
from tests.waiting import auntil, until

from facelane_server import config
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.models.package import Package, read_package
from facelane_server.pools.host import ExternalLauncher, Launchers, mps_environment
from facelane_server.pools.pool import Pool
from facelane_server.pools.report import PoolState
from facelane_server.pools.tasks import DetectAnswer, EmbedAnswer, LivenessAnswer
from facelane_server.worker import exit_codes

# -- thread -------------------------------------------------------------------------------


@asynccontextmanager
async def group(
    packages: Mapping[Stage, Package] = PACKAGES, models: Sequence[str] = (), **settings: object
) -> AsyncIterator[dict[Stage, RealPool]]:
    """The three pools as threads of one process."""
    with tempfile.TemporaryDirectory(prefix="facelane-") as folder:
        launchers = Launchers(Path(folder), models=models)
        pools = {}
        for stage, package in packages.items():
            merged = config.Pool(**{**FAST, "isolation": "thread", **settings})  # type: ignore[arg-type]
            pool = Pool(
                stage,
                merged,
                package,
                launchers.for_pool(str(stage), merged),
                crops=CROPS if stage is Stage.DETECTOR else (),
            )
            pools[stage] = RealPool(pool, [])
        for made in pools.values():
            await made.pool.start()
        try:
            for made in pools.values():
                assert await made.pool.wait_ready(50.0)
            yield pools
        finally:
            pids = {pid for made in pools.values() for pid in made.pids() if pid}
            await asyncio.gather(*(made.pool.stop(1.0) for made in pools.values()))
            await launchers.close()
            assert not [pid for pid in pids if alive(pid)]


def thread_names(pid: int) -> list[str]:
    tasks = Path(f"/proc/{pid}/task")
    return [(task / "comm").read_text(encoding="ascii").strip() for task in tasks.iterdir()]


async def all_answer(pools: dict[Stage, RealPool]) -> None:
    answers = await asyncio.gather(*(made.infer() for made in pools.values()))
    assert [type(a) for a in answers] == [DetectAnswer, EmbedAnswer, LivenessAnswer]


async def test_a_group_shares_one_process_and_serves_every_stage() -> None:
    async with group() as pools:
        pids = {pid for made in pools.values() for pid in made.pids()}
        assert len(pids) == 1
        await all_answer(pools)
        names = {name for pid in pids for name in thread_names(pid)}
        assert {"fl-detector#0", "fl-recognizer#0", "fl-liveness#0"} <= names


async def test_the_fate_of_a_group_is_shared_and_it_comes_back_whole() -> None:
    async with group() as pools:
        (old,) = {pid for made in pools.values() for pid in made.pids()}
        os.kill(old, signal.SIGKILL)
        await auntil(lambda: all(m.pool.info().losses == 1 for m in pools.values()))
        await auntil(lambda: all(m.pool.state is PoolState.SERVING for m in pools.values()))
        (new,) = {pid for made in pools.values() for pid in made.pids()}
        assert new != old
        await all_answer(pools)


async def test_a_member_of_a_group_is_restarted_alone() -> None:
    async with group() as pools:
        pids = {pid for made in pools.values() for pid in made.pids()}
        await pools[Stage.LIVENESS].pool.restart_worker("liveness#0")
        await pools[Stage.RECOGNIZER].pool.reload(PACKAGES[Stage.RECOGNIZER])
        await all_answer(pools)
        assert {pid for made in pools.values() for pid in made.pids()} == pids
        assert [made.pool.info().losses for made in pools.values()] == [0, 0, 0]


async def test_a_group_takes_no_package_that_its_process_may_not_read(tmp_path: Path) -> None:
    """Which files it may read was settled when it began, and is every member's."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(PACKAGES[Stage.RECOGNIZER].folder, elsewhere)
    async with group() as pools:
        pids = {pid for made in pools.values() for pid in made.pids()}
        with pytest.raises(FacelaneError, match=r"models\.path") as caught:
            await pools[Stage.RECOGNIZER].pool.reload(read_package(elsewhere))
        assert caught.value.reason is Reason.MODEL_INVALID
        assert {pid for made in pools.values() for pid in made.pids()} == pids
        assert [made.pool.info().losses for made in pools.values()] == [0, 0, 0]
        await all_answer(pools)


async def test_a_group_takes_a_package_out_of_the_folders_of_models(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(PACKAGES[Stage.RECOGNIZER].folder, elsewhere)
    async with group(models=(str(tmp_path),)) as pools:
        await pools[Stage.RECOGNIZER].pool.reload(read_package(elsewhere))
        await all_answer(pools)
        assert [made.pool.info().losses for made in pools.values()] == [0, 0, 0]


async def test_a_member_that_is_restarted_leaves_nothing_in_its_process() -> None:
    async with group() as pools:
        (pid,) = {pid for made in pools.values() for pid in made.pids()}

        async def again() -> tuple[int, int, int]:
            await pools[Stage.LIVENESS].pool.restart_worker("liveness#0")
            maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
            held = len(os.listdir(f"/proc/{pid}/fd"))
            return held, maps.count("memfd:facelane"), len(thread_names(pid))

        first = await again()
        assert [await again() for _ in range(3)] == [first] * 3


async def test_a_group_can_have_several_workers_of_a_stage() -> None:
    async with group(workers=2) as pools:
        for made in pools.values():
            await auntil(lambda p=made.pool: p.state is PoolState.SERVING)
        await all_answer(pools)
        assert len({pid for made in pools.values() for pid in made.pids()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_the_shipped_models_serve_in_every_isolation(isolation: str) -> None:
    packages = {stage: CATALOG.resolve(f"facelane-{stage}") for stage in PACKAGES}
    async with group(packages, isolation=isolation, load_timeout_s=50.0) as pools:
        detected = await pools[Stage.DETECTOR].infer()
        embedded = await pools[Stage.RECOGNIZER].infer()
        lively = await pools[Stage.LIVENESS].infer(package=packages[Stage.LIVENESS])
        assert detected == DetectAnswer(64, 64, ()), "nobody is in a black picture"
        assert len(embedded.vector) == packages[Stage.RECOGNIZER].embedding_dim * 4
        assert 0.0 <= embedded.ood_score < 0.4, "and nobody can be told by one"
        assert 0.0 <= lively.score <= 1.0
        assert len({pid for made in pools.values() for pid in made.pids()}) == (
            1 if isolation == "thread" else 3
        )


# -- external -----------------------------------------------------------------------------


def attach(path: Path, *prefix: str, timeout_s: float = 60.0) -> subprocess.Popen[bytes]:
    """Start a worker as a systemd unit or a container would."""
    command = [sys.executable, "-m", "facelane_server.worker", "--attach", str(path)]
    return subprocess.Popen(
        [*prefix, *command, "--attach-timeout", str(timeout_s)], stdin=subprocess.DEVNULL
    )


UNSHARE = (
    "unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"
)  # fmt: skip


def may_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "true"], check=False, timeout=10).returncode == 0


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait(30)


async def test_a_worker_attaches_serves_and_leaves_when_the_server_stops(tmp_path: Path) -> None:
    path = tmp_path / "liveness.sock"
    worker = attach(path)  # before the server listens
    try:
        async with real_pool(isolation="external", socket=str(path)) as p:
            assert path.stat().st_mode & 0o777 == 0o600
            assert p.pids() == [worker.pid]
            assert await p.infer() == LivenessAnswer(1.0)
        assert await asyncio.to_thread(worker.wait, 60) == exit_codes.OK
        assert not path.exists()
    finally:
        end([worker])


async def refusal(p: RealPool, *, age_s: float) -> Reason:
    with pytest.raises(FacelaneError) as refused:
        await p.infer(age_s=age_s)
    return refused.value.reason


async def test_without_a_worker_the_pool_says_so_at_once_and_counts_no_loss(
    tmp_path: Path,
) -> None:
    path = tmp_path / "liveness.sock"
    async with real_pool(
        isolation="external", socket=str(path), wait=False, load_timeout_s=2.5
    ) as p:
        # At first one may be about to attach; then it is clear that none does.
        assert await refusal(p, age_s=0.2) is Reason.POOL_UNAVAILABLE

        async def refused_at_once() -> bool:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    return await refusal(p, age_s=3600.0) is Reason.POOL_UNAVAILABLE
            return False

        await auntil(refused_at_once)
        assert p.pool.info().losses == 0, "to wait for somebody else is no failure"
        worker = attach(path)
        try:
            assert await p.pool.wait_ready(20.0)
            assert await p.infer() == LivenessAnswer(1.0)
        finally:
            end([worker])


async def test_another_worker_takes_the_place_of_one_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "liveness.sock"
    workers = [attach(path) for _ in range(2)]  # one waits in the listener's queue
    try:
        async with real_pool(isolation="external", socket=str(path), batch_max=1) as p:
            tasks = [p.submit() for _ in range(5)]
            (first,) = p.pids()
            os.kill(first, signal.SIGKILL)
            await auntil(lambda: p.pool.state is PoolState.SERVING and p.pids() != [first])
            tasks.append(p.submit())
            await asyncio.wait([task.future for task in tasks], timeout=30)
            assert {task.future.result() for task in tasks} == {LivenessAnswer(1.0)}
    finally:
        end(workers)


async def test_an_external_pool_reloads_with_the_worker_that_waits(tmp_path: Path) -> None:
    path = tmp_path / "liveness.sock"
    workers = [attach(path) for _ in range(2)]
    try:
        async with real_pool(isolation="external", socket=str(path)) as p:
            tasks = [p.submit() for _ in range(20)]
            (first,) = p.pids()
            await p.pool.reload(PACKAGES[Stage.LIVENESS], 20.0)
            tasks += [p.submit() for _ in range(20)]
            await asyncio.wait([task.future for task in tasks], timeout=30)
            assert {task.future.result() for task in tasks} == {LivenessAnswer(1.0)}
            assert p.pids() != [first]
            assert p.pool.info().losses == 0
    finally:
        end(workers)


async def test_a_hung_external_worker_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "liveness.sock"
    workers = [attach(path) for _ in range(2)]
    try:
        async with real_pool(
            isolation="external", socket=str(path), job_timeout_ms=1000, ping_interval_s=0.1
        ) as p:
            (first,) = p.pids()
            os.kill(first, signal.SIGSTOP)
            await auntil(lambda: not alive(first))
            await auntil(lambda: p.pool.state is PoolState.SERVING)
            assert await p.infer() == LivenessAnswer(1.0)
    finally:
        end(workers)


async def test_a_worker_in_namespaces_of_its_own_attaches(tmp_path: Path) -> None:
    """As in a container that shares nothing but the socket's folder: other mounts, process
    ids and no network."""
    if not may_unshare():
        pytest.skip("unshare is not permitted here")
    path = tmp_path / "detector.sock"
    worker = attach(path, *UNSHARE, "--mount-proc")
    try:
        async with real_pool(Stage.DETECTOR, isolation="external", socket=str(path)) as p:
            answer = await p.infer()
            assert isinstance(answer, DetectAnswer)
            (pid,) = p.pids()
            assert pid not in (0, worker.pid), "its pid in our namespace"
            for name in ("pid", "net", "mnt", "ipc"):
                assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
            os.kill(pid, signal.SIGSTOP)
            os.kill(pid, signal.SIGCONT)
            assert isinstance(await p.infer(), DetectAnswer)
        assert await asyncio.to_thread(worker.wait, 60) == exit_codes.OK
    finally:
        end([worker])


async def test_a_worker_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "liveness.sock"
    launcher = ExternalLauncher(path, uids=[os.getuid() + 1])
    launching = asyncio.create_task(launcher.launch("liveness#0"))
    await auntil(path.exists)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(str(path))
        stranger.settimeout(60.0)
        assert await asyncio.to_thread(stranger.recv, 10) == b"", "hung up on"
    assert not launching.done()
    launching.cancel()
    await asyncio.wait([launching])
    await launcher.close()


@pytest.mark.parametrize(
    ("name", "why"), [("nosuch.sock", "No such file"), ("x" * 200, "path too long")]
)
def test_attaching_to_nothing_ends_with_its_own_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, why: str
) -> None:
    worker = attach(tmp_path / name, timeout_s=0.3)
    assert worker.wait(60) == exit_codes.CANNOT_ATTACH
    assert why in capfd.readouterr().err


async def test_a_socket_that_cannot_be_made_is_named_for_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ("x" * 200)
    async with real_pool(isolation="external", socket=str(path), wait=False) as p:
        await auntil(lambda: p.pool.info().losses)
        assert p.pool.info().workers[0].last_loss == "NOT_STARTED"
    assert "path too long" in capsys.readouterr().out


def test_a_wrong_command_line_ends_with_its_own_exit_code() -> None:
    command = [sys.executable, "-m", "facelane_server.worker"]
    run = subprocess.run([*command, "--nosuch"], check=False, capture_output=True, timeout=60)
    assert run.returncode == exit_codes.USAGE


# -- mps ------------------------------------------------------------------------------------


def test_the_environment_of_an_mps_client() -> None:
    made = mps_environment(
        pipe_directory=Path("/run/facelane/mps"),
        devices=("cuda:0", "cuda:2"),
        sm_share=70,
        memory_mib=2048,
    )
    assert made == {
        "CUDA_MPS_PIPE_DIRECTORY": "/run/facelane/mps",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "70",
        "CUDA_MPS_CLIENT_PRIORITY": "1",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=2048M,2=2048M",
    }


def test_a_raised_priority_holds_between_mps_clients() -> None:
    made = mps_environment(
        pipe_directory=Path("/x"), devices=("auto",), sm_share=100, memory_mib=0, stream_priority=-1
    )
    assert made["CUDA_MPS_CLIENT_PRIORITY"] == "0"
    assert "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT" not in made


# -- the parent's death -----------------------------------------------------------------------

PARENT = """
import asyncio, sys
from tests.real_pool import real_pool
from facelane_server.domain import Stage

async def main():
    options = {"fail.hang_on_job": "2"} if sys.argv[1] == "hung" else {}
    async with real_pool(Stage.DETECTOR, workers=2, job_timeout_ms=60000, options=options) as p:
        while p.pool.state != "SERVING":
            await asyncio.sleep(0.01)  # the pace
        if options:
            p.submit(), p.submit()
        print(*p.pids(), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("state", ["idle", "hung"])
def test_no_worker_outlives_a_server_that_was_killed(state: str) -> None:
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, state],
        cwd=root,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
    )
    try:
        assert parent.stdout is not None
        line = b""
        while not line.strip().replace(b" ", b"").isdigit():
            line = parent.stdout.readline()
            assert line, "the parent ended early"
        pids = [int(word) for word in line.split()]
        assert len(pids) == 2
        assert all(alive(pid) for pid in pids)
        assert [named_shared_memory(pid) for pid in (*pids, parent.pid)] == [[], [], []]
        parent.kill()
        parent.wait(30)
        until(lambda: not any(alive(pid) for pid in pids), timeout=30.0)
    finally:
        parent.kill()
        parent.wait(30)
        assert parent.stdout is not None
        parent.stdout.close()
