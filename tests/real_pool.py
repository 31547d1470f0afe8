"""Pools of real worker processes with null models, for the tests of the process layer."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from facelane_server import config
from facelane_server.domain import Encoding, Picture, Stage
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import Package
from facelane_server.pools.host import Launchers
from facelane_server.pools.pool import Pool
from facelane_server.pools.report import PoolChange, PoolEvent
from facelane_server.pools.slots import SubjectResolver
from facelane_server.pools.tasks import (
    DetectRequest,
    EmbedRequest,
    LivenessRequest,
    Request,
    Task,
)

CATALOG = Catalog()
PACKAGES = {
    stage: CATALOG.resolve(f"null-{stage}")
    for stage in (Stage.DETECTOR, Stage.RECOGNIZER, Stage.LIVENESS)
}
CROPS = PACKAGES[Stage.RECOGNIZER].crops + PACKAGES[Stage.LIVENESS].crops

FAST = {
    "backoff_initial_s": 0.02,
    "ping_interval_s": 0.2,
    "job_timeout_ms": 2000,
    "load_timeout_s": 100.0,
}
"""Settings that let faults show within a test."""


class RealPool:
    """A pool, its events with their times, and tasks for it."""

    def __init__(self, pool: Pool, events: list[tuple[float, PoolEvent]]) -> None:
        self.pool = pool
        self.events = events

    def request(
        self,
        *,
        marker: bytes = b"",
        side: int = 64,
        max_faces: int = 4,
        package: Package | None = None,
    ) -> Request:
        """``side``, ``max_faces``: of a picture, for detectors. ``package``: whose crops."""
        stage = self.pool.stage
        if stage is Stage.DETECTOR:
            data = (marker + bytes(side * side * 3))[: side * side * 3]
            picture = Picture(Encoding.BGR24, data, side, side, side * 3)
            return DetectRequest(picture, max_faces, 10_000_000)
        crops = tuple(
            (marker + bytes(spec.size * spec.size * 3))[: spec.size * spec.size * 3]
            for spec in (package or PACKAGES[stage]).crops
        )
        if stage is Stage.RECOGNIZER:
            return EmbedRequest(crops[0], want_vector=True)
        return LivenessRequest(crops)

    def submit(self, lane: int = 1, *, age_s: float = 100.0, **request: Any) -> Task[Any]:
        task: Task[Any] = Task(
            self.request(**request),
            lane,
            1,
            time.monotonic_ns() + int(age_s * 1e9),
            asyncio.get_running_loop().create_future(),
        )
        task.future.add_done_callback(lambda f: f.cancelled() or f.exception())
        self.pool.submit(task)
        return task

    async def infer(self, **options: Any) -> Any:
        return await asyncio.wait_for(self.submit(**options).future, 100)

    def pids(self) -> list[int]:
        return [worker.pid for worker in self.pool.info().workers]

    def changes(self, change: PoolChange) -> list[PoolEvent]:
        return [event for _, event in self.events if event.change is change]


@asynccontextmanager
async def real_pool(
    stage: Stage = Stage.LIVENESS,
    *,
    wait: bool = True,
    resolve: SubjectResolver | None = None,
    **settings: Any,
) -> AsyncIterator[RealPool]:
    """A running pool; on leaving, it is stopped, and every process of it must be gone."""
    events: list[tuple[float, PoolEvent]] = []
    with tempfile.TemporaryDirectory(prefix="facelane-") as folder:
        launchers = Launchers(Path(folder))
        merged = config.Pool(**{**FAST, **settings})
        pool = Pool(
            stage,
            merged,
            PACKAGES[stage],
            launchers.for_pool(str(stage), merged),
            crops=CROPS if stage is Stage.DETECTOR else (),
            resolve=resolve,
            on_change=lambda event: events.append((time.monotonic(), event)),
        )
        await pool.start()
        made = RealPool(pool, events)
        try:
            if wait:
                assert await pool.wait_ready(100.0), pool.info()
            yield made
        finally:
            await pool.stop(1.0)
            await launchers.close()
        pids = {event.pid for _, event in events if event.pid}
        assert not [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    """Whether a process of this id runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def named_shared_memory(pid: int | str = "self") -> list[str]:
    """What a process maps or holds open of /dev/shm; anonymous memfds are not there."""
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    folder = Path(f"/proc/{pid}/fd")
    held = [
        os.readlink(folder / name) for name in os.listdir(folder) if os.path.lexists(folder / name)
    ]
    return [line for line in (*maps.splitlines(), *held) if "/dev/shm/" in line]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
