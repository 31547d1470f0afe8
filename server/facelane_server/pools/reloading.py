"""What an operator may ask of a pool in service: another model, or one of its workers begun anew,
without losing a task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from facelane_server import config
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.models.package import Package
from facelane_server.pools.clock import Changes
from facelane_server.pools.crew import Crew
from facelane_server.pools.host import Launcher
from facelane_server.pools.restart import Happening, Life
from facelane_server.pools.schedule import unavailable
from facelane_server.pools.worker import Worker


class Reloaded(Protocol):
    """The pool."""

    name: str
    stage: Stage
    package: Package

    @property
    def ending(self) -> bool:
        """Nobody would end a worker that is started now."""

    def adopt(self, package: Package) -> None:
        """What is asked from now on is this package's."""

    def shutting_down(self) -> FacelaneError: ...


class Reloading:
    """One reload at a time. All calls from the loop's thread."""

    def __init__(
        self,
        pool: Reloaded,
        settings: config.Pool,
        launcher: Launcher,
        crew: Crew,
        changes: Changes,
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._launcher = launcher
        self._crew = crew
        self._changes = changes
        self._one_at_a_time = asyncio.Lock()

    async def restart(self, worker_id: str, timeout: float) -> tuple[int, int]:
        """See ``Pool.restart_worker``."""
        pool = self._pool
        worker = next((w for w in self._crew.serving if w.worker_id == worker_id), None)
        if worker is None:
            known = ", ".join(w.worker_id for w in self._crew.serving)
            raise FacelaneError(
                Reason.WORKER_NOT_FOUND,
                f"the {pool.name} pool has no worker of this id; it has: {known}",
                metadata={"pool": pool.name},
            )
        if pool.ending:
            raise pool.shutting_down()
        old, before = worker.pid, worker.state.restarts
        self._crew.restart(worker, "RESTARTED")
        await self._until(lambda: worker.came_back(before), timeout)
        if not worker.came_back(before):
            raise unavailable(pool.name, "has not brought the worker back yet")
        return old, worker.pid

    async def reload(self, package: Package, timeout: float | None) -> None:
        """See ``Pool.reload``."""
        pool = self._pool
        if package.task is not pool.stage:
            raise _invalid(package, f"it is a {package.task}, not a {pool.stage}")
        if package.crops != pool.package.crops:
            raise _invalid(package, "it takes other crops; restart the server with it instead")
        async with self._one_at_a_time:
            if pool.ending:
                raise pool.shutting_down()
            bound = timeout if timeout is not None else self._settings.load_timeout_s
            if self._settings.hosting.can_double:
                await self._beside(package, bound)
            else:
                if not self._launcher.may_read(package.folder):
                    raise _invalid(
                        package,
                        f"the process of its thread group may not read {package.folder}; name the "
                        "folder above it in models.path, or its own as the pool's model, and "
                        "restart the server",
                    )
                await self._in_turn(package, bound)

    async def _beside(self, package: Package, timeout: float) -> None:
        fresh = self._crew.warming = self._crew.recruit(package)
        sound = False

        def all_ready() -> bool:
            return all(w.life is Life.READY for w in fresh)

        try:
            for worker in fresh:
                self._crew.happen(worker, Happening.START)
            await self._until(lambda: all_ready() or any(w.was_lost(0) for w in fresh), timeout)
            sound = all_ready() and not self._pool.ending
        finally:
            self._crew.warming = []
            if not sound:
                # Whoever asked may be gone (cancelled): nobody else would end them.
                self._crew.retire(fresh)
        if not sound:
            raise self._refused(package, fresh)
        self._pool.adopt(package)
        self._crew.promote(fresh)

    async def _in_turn(self, package: Package, timeout: float) -> None:
        old = self._pool.package
        self._pool.adopt(package)
        try:
            for worker in self._crew.serving:
                worker.package = package
                restarts, lost = worker.state.restarts, worker.state.lost
                self._crew.happen(worker, Happening.RESTART, "RESTARTED")
                await self._until(
                    lambda w=worker, n=restarts, before=lost: (  # type: ignore[misc]
                        w.came_back(n) or w.was_lost(before)
                    ),
                    timeout,
                )
                if not worker.came_back(restarts) or self._pool.ending:
                    raise self._refused(package, [worker])
        except BaseException:  # cancelled, too: never two models at once
            self._pool.adopt(old)
            for other in self._crew.serving:
                if other.package is package:
                    other.package = old
                    if not self._pool.ending:
                        self._crew.happen(other, Happening.RESTART, "RESTARTED")
            raise

    async def _until(self, is_so: Callable[[], bool], timeout: float) -> None:
        """Or until the pool ends, or so many seconds are over."""
        await self._changes.until(lambda: is_so() or self._pool.ending, timeout)

    def _refused(self, package: Package, workers: list[Worker]) -> FacelaneError:
        if self._pool.ending:
            return self._pool.shutting_down()
        reason = next((w.state.reason for w in workers if w.state.reason), "START_TIMEOUT")
        return _invalid(package, f"its workers do not become ready ({reason}); see the log")


def _invalid(package: Package, why: str) -> FacelaneError:
    return FacelaneError(
        Reason.MODEL_INVALID,
        f"the model package {package.name} is not taken into service: {why}",
        metadata={"model": package.name},
    )
