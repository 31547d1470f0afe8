"""Real faults of a real card: a poisoned context, no memory left, MPS taken away."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.gpu.test_service_gpu import MPS, ask, pools_on_the_card, request

from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.pools.pool import Pool

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

LIVENESS = request(Stage.LIVENESS, b"")
EMBED = request(Stage.RECOGNIZER, b"")
BOTH = [Stage.LIVENESS, Stage.RECOGNIZER]
PASSING = (Reason.POOL_UNAVAILABLE, Reason.WORKER_LOST, Reason.POISONED)
QUICK: dict[str, Any] = {"backoff_initial_s": 0.02, "ping_interval_s": 0.2}


def once(folder: Path, fault: str, job: int = 4) -> dict[str, str]:
    """Job ``job`` of the first worker to get there: the second, one is a canary."""
    return {f"fail.{fault}": str(job), "fail.only_file": str(folder / "fired")}


async def ask_until(pool: Pool, asked: Any, timeout_s: float = 60.0) -> int:
    """Asks until it is answered; how often it was refused. Every refusal has a reason."""
    deadline = time.monotonic() + timeout_s
    refused = 0
    while True:
        try:
            await ask(pool, asked, 20.0)
        except FacelaneError as error:
            if error.reason not in PASSING or time.monotonic() > deadline:
                raise
            refused += 1
            await asyncio.sleep(0.05)  # the pace
        else:
            return refused


async def test_an_illegal_access_costs_one_worker_and_no_task(tmp_path: Path) -> None:
    """Its own context is lost; the neighbour's, on the same card, is not."""
    options = once(tmp_path, "sticky_on_job")
    async with (
        pools_on_the_card("process", [Stage.RECOGNIZER]) as calm,
        pools_on_the_card("process", [Stage.LIVENESS], options=options, **QUICK) as hurt,
    ):
        neighbour, pool = calm[Stage.RECOGNIZER], hurt[Stage.LIVENESS]
        for _ in range(8):
            await asyncio.gather(ask(pool, LIVENESS, 60.0), ask(neighbour, EMBED))
        info = pool.info()
        assert (info.losses, info.failed) == (1, 0)
        assert info.workers[0].last_loss == "DEVICE_POISONED"
        assert (neighbour.info().losses, neighbour.info().failed) == (0, 0)


async def test_no_memory_once_is_tried_again(tmp_path: Path) -> None:
    """The allocator's own error, not one that we made: the job is retried, the worker stays."""
    options = once(tmp_path, "oom_once_on_job")
    async with pools_on_the_card("process", [Stage.LIVENESS], options=options, **QUICK) as pools:
        pool = pools[Stage.LIVENESS]
        for _ in range(8):
            await ask(pool, LIVENESS, 60.0)
        assert (tmp_path / "fired").exists()
        info = pool.info()
        assert (info.losses, info.failed, info.retried) == (0, 0, 1)


@pytest.mark.skipif(not MPS, reason="MPS is not installed")
async def test_an_illegal_access_under_mps_is_recovered_from_by_all(tmp_path: Path) -> None:
    """One context for all on the card: everybody is hit, and everybody comes back."""
    options = once(tmp_path, "sticky_on_job")
    async with pools_on_the_card("mps", BOTH, options=options, **QUICK) as pools:
        for _ in range(8):
            await asyncio.gather(
                ask_until(pools[Stage.LIVENESS], LIVENESS),
                ask_until(pools[Stage.RECOGNIZER], EMBED),
            )
        assert sum(pool.info().losses for pool in pools.values()) >= 1


@pytest.mark.skipif(not MPS, reason="MPS is not installed")
async def test_a_killed_mps_server_is_recovered_from() -> None:
    """The daemon brings a new server for the workers that come back."""
    async with pools_on_the_card("mps", BOTH, **QUICK) as pools:
        before = {w.pid for pool in pools.values() for w in pool.info().workers}
        [server] = [p for p in psutil.process_iter() if p.name() == "nvidia-cuda-mps-server"]
        os.kill(server.pid, signal.SIGKILL)
        for stage, asked in ((Stage.LIVENESS, LIVENESS), (Stage.RECOGNIZER, EMBED)):
            for _ in range(4):
                await ask_until(pools[stage], asked)
        after = {w.pid for pool in pools.values() for w in pool.info().workers}
        assert not before & after, "whoever lost its context does not serve on"
