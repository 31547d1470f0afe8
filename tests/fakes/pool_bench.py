"""A pool with scripted workers and a clock that stands still."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.fakes.scripted_worker import ManualClock, ScriptedLauncher, ScriptedWorker, settle

from facelane_server import config
from facelane_server.domain import Encoding, FacelaneError, Picture, Reason, Stage
from facelane_server.models.catalog import Catalog
from facelane_server.pools.pool import Pool
from facelane_server.pools.report import PoolChange, PoolEvent
from facelane_server.pools.tasks import (
    ANYBODY,
    DetectRequest,
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
        self,
        lane: int = 1,
        *,
        weight: int = 1,
        age_ms: float = 1000.0,
        sender: Sender = ANYBODY,
        picture: bytes = bytes(100),
    ) -> Task[Any]:
        request: Request = LivenessRequest(CROPS)
        if self.pool.stage is Stage.DETECTOR:
            request = DetectRequest(Picture(Encoding.JPEG, picture), 1, 10**6)
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
