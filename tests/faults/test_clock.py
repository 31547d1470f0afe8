"""The wall clock is set while everything runs: nobody but a reader of dates may notice."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from tests.real_pool import real_pool

from facelane_server.domain import Stage
from facelane_server.pools.report import PoolState
from facelane_server.pools.tasks import LivenessAnswer

DAY_S = 86_400.0


async def test_a_jumping_wall_clock_costs_no_worker_and_no_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Deadlines, pings, canaries and budgets of the pool are all of monotonic time."""
    rng = random.Random(1)

    def jumping() -> float:
        return 1.7e9 + rng.uniform(-30.0, 30.0) * DAY_S

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    async with real_pool(
        Stage.LIVENESS, ping_interval_s=0.02, canary_interval_s=0.05, job_timeout_ms=10_000
    ) as p:
        for _ in range(40):
            assert await p.infer() == LivenessAnswer(1.0)
        await asyncio.sleep(0.4)  # idle: pings and canaries have their turn
        assert await p.infer() == LivenessAnswer(1.0)
        info = p.pool.info()
        assert (info.losses, info.retried, info.state) == (0, 0, PoolState.SERVING)
        assert time.time() != time.time(), "the clock did jump"
