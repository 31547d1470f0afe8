"""Health tells the truth."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.e2e import wire
from tests.faults import cells, traffic
from tests.running_server import RunningServer, toml
from tests.waiting import auntil, until


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cells.Site]:
    with cells.site(tmp_path_factory.mktemp("truth")) as made:
        yield made


@asynccontextmanager
async def watched(server: RunningServer, stage: str) -> AsyncIterator[cells.Cell]:
    """A cell whose health is followed."""
    async with cells.connection(server) as channel:
        cell = cells.Cell(server, channel, stage, random.Random(1))
        watchers = [asyncio.create_task(cell.watch(service)) for service in cells.SERVICES]
        try:
            await auntil(lambda: all(cell.health.told.get(s) for s in cells.SERVICES))
            yield cell
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)


TOUCHED = {
    "detector": {
        "",
        "facelane.v1.AnalysisService",
        "facelane.v1.GalleryService",
        "facelane.pool.detector",
    },
    "recognizer": {"", "facelane.v1.GalleryService", "facelane.pool.recognizer"},
    "liveness": {"", "facelane.pool.liveness"},
}


@pytest.mark.parametrize(
    "stage", ["detector", "recognizer", pytest.param("liveness", marks=pytest.mark.slow)]
)
async def test_a_killed_worker_is_told(site: cells.Site, stage: str) -> None:
    """Every service that needs the pool, and no other, says NOT_SERVING; how soon is for
    ``bench recovery`` to say."""
    site.server.wait_serving()  # whatever was done to it before
    async with watched(site.server, stage) as cell:
        for _ in range(2):
            # From now on: what a former kill had to say is over.
            await auntil(cell.whole, what="recovery")
            pid = await cell.pid()
            killed = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            for service in TOUCHED[stage]:
                dip = functools.partial(cell.health.first_dip_after, service, killed)
                await auntil(dip, what=service)
        for service in set(cells.SERVICES) - TOUCHED[stage]:
            assert not cell.health.dips(service), service


async def test_serving_means_that_it_infers(site: cells.Site) -> None:
    """Whoever hears SERVING and asks at once gets a whole answer."""
    site.server.wait_serving()
    pool = "facelane.pool.recognizer"
    async with watched(site.server, "recognizer") as cell:
        for _ in range(3):
            killed = time.monotonic()
            await cell.kill(signal.SIGKILL)
            back = functools.partial(served_again_after, cell.health, pool, killed)
            await auntil(back, what="SERVING again")
            assert await cell.picture() == (set(), "")


def served_again_after(log: cells.HealthLog, service: str, when: float) -> bool:
    """NOT_SERVING was told since, and SERVING after it."""
    dip = log.first_dip_after(service, when)
    return dip is not None and any(
        status == cells.SERVING and at > dip for at, status in log.told[service]
    )


def one_pool(folder: Path, options: str, extra: str = "") -> str:
    return toml(folder, wire.pools(recognizer=f"options = {options}\n{extra}"))


async def test_a_worker_that_loads_and_cannot_infer_never_serves(tmp_path: Path) -> None:
    """Loaded, warmed up, and the first real inference hangs: SERVING is never told."""
    config = one_pool(tmp_path, '{ "fail.hang_on_job" = "1" }', "load_timeout_s = 1.0")
    with RunningServer(tmp_path, config) as server:
        server.wait_serving(service="facelane.v1.AnalysisService")
        async with watched(server, "recognizer") as cell:
            until(lambda: "START_TIMEOUT" in server.text(), what="the hang to be seen")
            told = cell.health.told
            assert {s for _, s in told["facelane.pool.recognizer"]} == {cells.NOT_SERVING}
            assert {s for _, s in told[""]} == {cells.NOT_SERVING}
            # The rest serves meanwhile, and says what is missing.
            assert await cell.picture() == ({"recognizer"}, "")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ('{ "fail.hang_on_job" = "2" }', "HUNG"),
        pytest.param('{ "fail.error_on_job" = "2" }', "CANARY_FAILED", marks=pytest.mark.slow),
        pytest.param('{ "fail.sticky_on_job" = "2" }', "DEVICE_POISONED", marks=pytest.mark.slow),
    ],
)
async def test_an_idle_pool_is_found_out_by_its_canary(
    tmp_path: Path, options: str, reason: str
) -> None:
    """Nobody sends anything; the model breaks; health says so."""
    quick = "canary_interval_s = 0.2\nping_interval_s = 0.1\njob_timeout_ms = 400"
    with RunningServer(tmp_path, one_pool(tmp_path, options, quick)) as server:
        # The first worker may be found out before anybody has asked: the log has it all.
        until(lambda: f'"reason": "{reason}"' in server.text(), what=reason)
        text = server.text()
        ready = text.index('"event": "worker ready"', text.index('"pool": "recognizer"'))
        assert ready < text.index(f'"reason": "{reason}"')
        async with watched(server, "recognizer") as cell:
            await auntil(lambda: cell.health.dips("facelane.pool.recognizer"), what="a dip")


async def test_a_missing_stage_is_named_and_says_nothing(site: cells.Site) -> None:
    """A known, live face before the camera while its pools come and go."""
    site.server.wait_serving()
    async with watched(site.server, "recognizer") as cell:
        stop = asyncio.Event()
        flow = [
            asyncio.create_task(
                traffic.stream(
                    cell.channel, traffic.lossless(pace_s=0.02, tracking=t), stop, 1, f"{t}"
                )
            )
            for t in (True, False)
        ]
        missing = 0
        try:
            for stage in ("recognizer", "liveness"):
                cell.stage = stage
                cell.arm(load="1")  # until it is disarmed
                pool = f"facelane.pool.{stage}"
                dips = cell.health.dips(pool)
                await cell.kill(signal.SIGKILL)
                await auntil(functools.partial(lambda p, n: cell.health.dips(p) > n, pool, dips))
                found, refused = await cell.picture()
                missing += found == {stage}
                assert not refused
                cell.arm()
                await auntil(cell.whole, what="recovery")
        finally:
            stop.set()
        for books in await asyncio.gather(*flow):
            assert not books.broken, books
            assert not books.errors, books
            assert set(books.missing) == {"recognizer", "liveness"}
        assert missing == 2
