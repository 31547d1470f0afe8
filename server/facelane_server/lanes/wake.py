"""What the one reader, or the one writer, of a lane waits for."""

from __future__ import annotations

import asyncio


class Wake:
    """Wakes the one who waits. Whoever waits has looked right before that there is nothing for it:
    so nothing need be remembered, as an ``asyncio.Event`` does, at three times the cost a frame."""

    __slots__ = ("_waiter",)

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait(self) -> None:
        assert self._waiter is None, "somebody waits already"
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
