"""Time and waiting for a pool: a clock of which tests can bring their own, and changes that
somebody waits for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Protocol

_S: Final = 1e9
_AT_LATEST_S: Final = 0.05
_GRAIN_S: Final = 0.001
"""What a timer may be late by rather than early."""


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    def now_ns(self) -> int:
        """As ``time.monotonic_ns``."""

    def call_at(self, when_ns: int, callback: Callable[[], None]) -> Timer: ...


class _LoopTimer:
    """Never early: a loop counts from when its turn began, which may be long ago, and in whole
    milliseconds at that; who waits for a moment would find that it has not come, and wait on."""

    __slots__ = ("_callback", "_handle", "_loop", "_when_ns")

    def __init__(self, when_ns: int, callback: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._when_ns = when_ns
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None
        self._wait()

    def _wait(self) -> None:
        left_ns = self._when_ns - time.monotonic_ns()
        self._handle = self._loop.call_later(max(0.0, left_ns / _S + _GRAIN_S), self._due)

    def _due(self) -> None:
        if time.monotonic_ns() < self._when_ns:
            self._wait()
        else:
            self._callback()

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()


class LoopClock:
    """The running event loop's time."""

    now_ns = staticmethod(time.monotonic_ns)

    def call_at(self, when_ns: int, callback: Callable[[], None]) -> Timer:
        return _LoopTimer(when_ns, callback)


class Changes:
    """Wakes those who wait for a condition that a change may bring about."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiters: set[asyncio.Future[None]] = set()

    def tell(self) -> None:
        """Something changed."""
        for waiter in list(self._waiters):
            if not waiter.done():
                waiter.set_result(None)

    async def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Whether it held in time. It is looked at after every change, and now and then."""
        deadline_ns = self._clock.now_ns() + int(timeout_s * _S)
        while not condition():
            left_s = (deadline_ns - self._clock.now_ns()) / _S
            if left_s <= 0:
                return False
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await asyncio.wait([waiter], timeout=min(left_s, _AT_LATEST_S))
            finally:
                self._waiters.discard(waiter)
        return True
