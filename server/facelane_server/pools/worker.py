"""One worker of a pool: what is known of it over all its processes. ``crew`` moves it."""

from __future__ import annotations

import asyncio

from facelane_server.models.package import Package
from facelane_server.pools import restart
from facelane_server.pools.clock import Timer
from facelane_server.pools.handle import ReadyHandle
from facelane_server.pools.hang import HangWatch
from facelane_server.pools.host import Link
from facelane_server.pools.restart import Life
from facelane_server.pools.slots import Codec


class Worker:
    """One worker of the pool over all its processes."""

    def __init__(self, worker_id: str, device: str, package: Package) -> None:
        self.worker_id = worker_id
        self.device = device
        self.package = package
        """That its next process will load."""
        self.codec: Codec | None = None
        """For the package that the present process has loaded."""
        self.state = restart.State()
        self.link: Link | None = None
        self.handle: ReadyHandle | None = None
        """Of a process that has loaded: its life may still be WARMING, or already DRAINING."""
        self.spawned_ns = 0
        self.ready_since_ns = 0
        self.timer: Timer | None = None
        self.hang: HangWatch | None = None
        self.bring_up: asyncio.Task[None] | None = None
        self.endings: set[asyncio.Task[None]] = set()

    @property
    def life(self) -> Life:
        return self.state.life

    @property
    def pid(self) -> int:
        """0 = there is no process."""
        return self.link.pid if self.link else 0

    def came_back(self, restarts: int) -> bool:
        """Ready in a later life than the one after so many restarts."""
        return self.state.restarts > restarts and self.life is Life.READY

    def was_lost(self, before: int) -> bool:
        """More often than that, and the process is reaped."""
        return self.state.lost > before and self.life in restart.WAITING
