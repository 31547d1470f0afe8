"""Timeouts in quarters: a server that stood still meanwhile (a paused machine) loses one of them,
and its callers nothing. When it goes on, every timer is due at once, before gRPC's own thread has
told of what was read and written."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final, Self

QUARTERS: Final = 4


class Awake:
    """``asyncio.timeout``, in quarters. Raises ``TimeoutError``."""

    def __init__(self, seconds: float) -> None:
        self._quarter_s = seconds / QUARTERS
        self._left = QUARTERS
        self._limit = asyncio.timeout(None)
        self._loop = asyncio.get_running_loop()

    async def __aenter__(self) -> Self:
        await self._limit.__aenter__()
        self._timer = self._loop.call_later(self._quarter_s, self._pass)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        await self._limit.__aexit__(kind, error, trace)

    def _pass(self) -> None:
        self._left -= 1
        if self._left:
            self._timer = self._loop.call_later(self._quarter_s, self._pass)
        else:
            self._limit.reschedule(self._loop.time())
