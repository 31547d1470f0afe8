"""A worker that computes wrongly, seen by its pool."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.real_pool import real_pool
from tests.waiting import WAIT_S, auntil

from facelane_server.domain import Stage
from facelane_server.pools.canary import WRONG_ANSWER
from facelane_server.pools.report import PoolState


@pytest.mark.parametrize(
    ("stage", "job"),
    [
        (Stage.DETECTOR, 1),
        pytest.param(Stage.RECOGNIZER, 1, marks=pytest.mark.slow),
        pytest.param(Stage.LIVENESS, 1, marks=pytest.mark.slow),
        (Stage.RECOGNIZER, 2),
    ],
)
async def test_a_worker_that_answers_wrongly_is_lost_and_its_successor_serves(
    stage: Stage, job: int, tmp_path: Path
) -> None:
    """At the first canary, or at one that is asked while it serves."""
    options = {"fail.wrong_from_job": str(job), "fail.only_file": str(tmp_path / "fired")}
    async with real_pool(
        stage, options=options, canary_interval_s=0.1, ping_interval_s=0.05, wait=False
    ) as running:
        pool = running.pool
        await auntil(
            lambda: (
                pool.info().workers[0].last_loss == WRONG_ANSWER and pool.state is PoolState.SERVING
            ),
            what="the loss, and the successor",
        )
        await running.infer()
        assert (pool.info().losses, pool.info().failed) == (1, 0)


async def test_a_busy_worker_is_asked_too(tmp_path: Path) -> None:
    """It has a job whenever somebody looks."""
    options = {"fail.wrong_from_job": "2", "fail.only_file": str(tmp_path / "fired")}
    async with real_pool(options=options, canary_interval_s=0.05, ping_interval_s=0.02) as running:
        pool = running.pool
        async with asyncio.timeout(WAIT_S):
            while pool.info().losses == 0:
                await asyncio.gather(*(running.infer() for _ in range(8)))
        assert pool.info().workers[0].last_loss == WRONG_ANSWER
