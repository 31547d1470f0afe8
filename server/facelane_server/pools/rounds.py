"""Looks after workers that are in service: are they there, do they infer, are they whole?

An idle worker is pinged, which its inference loop answers itself, and has to infer now and
then. A process that somebody has stopped (SIGSTOP, a debugger's leftover) would be found
out by that only after seconds; the kernel is asked instead, twice a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Protocol

from facelane_server import config
from facelane_server.pools.clock import Clock, Timer
from facelane_server.pools.feed import GalleryFeed
from facelane_server.pools.handle import ReadyHandle, WorkerLostError
from facelane_server.pools.schedule import HUNG

_S: Final = 1_000_000_000
_LOOK_NS: Final = _S * 2 // 5


class Patients(Protocol):
    """The crew, as these rounds see it."""

    def in_service(self) -> Iterable[ReadyHandle]: ...

    def handle_lost(self, handle: ReadyHandle, error: WorkerLostError) -> None: ...

    def ask_canary(self, handle: ReadyHandle) -> None: ...

    def recycle_if_too_large(self, handle: ReadyHandle) -> None: ...


class Rounds:
    """``begin`` with the first worker, ``close`` with the last."""

    def __init__(
        self, crew: Patients, settings: config.Pool, feed: GalleryFeed, clock: Clock
    ) -> None:
        self._crew = crew
        self._feed = feed
        self._clock = clock
        self._interval_ns = int(settings.ping_interval_s * _S)
        self._timeout_ns = settings.job_timeout_ms * _S // 1000
        self._canary_ns = int(settings.canary_interval_s * _S)
        self._halted: set[ReadyHandle] = set()
        self._timers: dict[Callable[[], None], Timer] = {}
        self._ticked_ns = 0

    def begin(self) -> None:
        self._look()
        self._tick()

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()

    def _again(self, what: Callable[[], None], after_ns: int) -> None:
        self._timers[what] = self._clock.call_at(self._clock.now_ns() + after_ns, what)

    def _look(self) -> None:
        """Twice in a row, because whoever stops this process's whole group continues it in
        any order."""
        self._again(self._look, _LOOK_NS)
        halted = {handle for handle in self._crew.in_service() if handle.link.halted()}
        for handle in halted & self._halted:
            self._crew.handle_lost(handle, WorkerLostError("HALTED", "its process is stopped"))
        self._halted = halted

    def _tick(self) -> None:
        now = self._clock.now_ns()
        # If this process stood still (a paused machine), what it waits for may have come, and
        # is read after this.
        stood_still = now - self._ticked_ns > 2 * self._interval_ns
        self._ticked_ns = now
        self._again(self._tick, self._interval_ns)
        for handle in self._crew.in_service():
            if stood_still:
                handle.wait_anew(now)
            if not handle.closed:
                self._examine(handle, now)

    def _examine(self, handle: ReadyHandle, now: int) -> None:
        if self._feed.is_late(handle, now):
            self._crew.handle_lost(handle, WorkerLostError("GALLERY_STALE"))
        elif handle.ping_sent_ns:
            if not handle.jobs and now - handle.ping_sent_ns >= self._timeout_ns:
                self._crew.handle_lost(handle, WorkerLostError(HUNG, "no pong in time"))
        elif handle.jobs:
            # It goes when a job is done, before the next: who is busy is not asked less.
            handle.canary_due = now - handle.canary_ns >= self._canary_ns
        else:
            if now - handle.canary_ns >= self._canary_ns:
                self._crew.ask_canary(handle)
            else:
                handle.ping(now)
            self._crew.recycle_if_too_large(handle)
