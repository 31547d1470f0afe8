"""Sees that the first job in flight on a worker ends in time.

One timer, which finds out when it fires whether there is a newer first job to wait for.
The last quarter of the time is always waited for: if this process itself stood still (a
paused machine), the clock leaps, and the answers that came meanwhile are read only after
the timers.
"""

from __future__ import annotations

from collections.abc import Callable

from facelane_server.pools.clock import Clock, Timer
from facelane_server.pools.handle import ReadyHandle
from facelane_server.pools.tasks import Job


class HangWatch:
    """``begin`` whenever a job may have become the first; ``on_hang`` is called at most once
    for a job. ``close`` with the handle."""

    def __init__(
        self, handle: ReadyHandle, clock: Clock, timeout_ns: int, on_hang: Callable[[], None]
    ) -> None:
        self._handle = handle
        self._clock = clock
        self._timeout_ns = timeout_ns
        self._last_quarter_ns = timeout_ns // 4
        self._on_hang = on_hang
        self._timer: Timer | None = None

    def begin(self) -> None:
        if self._timer is None and self._handle.jobs:
            check_ns = self._timeout_ns - self._last_quarter_ns
            self._at(self._handle.jobs[0].started_ns + check_ns, self._check)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        if not self._handle.jobs:
            return
        job, now = self._handle.jobs[0], self._clock.now_ns()
        if now - job.started_ns < self._timeout_ns - self._last_quarter_ns:
            self.begin()
            return
        verdict_ns = max(job.started_ns + self._timeout_ns, now + self._last_quarter_ns)
        self._at(verdict_ns, lambda: self._judge(job))

    def _judge(self, job: Job) -> None:
        if self._handle.jobs and self._handle.jobs[0] is job:
            self._on_hang()
        else:
            self.begin()

    def _at(self, when_ns: int, what: Callable[[], None]) -> None:
        def fire() -> None:
            self._timer = None
            what()

        self._timer = self._clock.call_at(when_ns, fire)
