"""Whose request is received next: who sends slowly holds a place of its own key, and no other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from facelane_server import limits
from facelane_server.edge.roles import Caller

_OF_A_KEY: Final = limits.MAX_RECEIVING // 4


class Receiving:
    """``MAX_RECEIVING`` requests at a time are taken in, a quarter of that of one key; the others
    wait unread. Operators do not wait for anybody else."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(limits.MAX_RECEIVING)
        self._own: dict[str, tuple[asyncio.Semaphore, int]] = {}
        """By key, and how many wait or receive."""

    @contextlib.asynccontextmanager
    async def turn(self, caller: Caller) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as places:
            if caller.known:
                await places.enter_async_context(self._place_of(caller.name))
            if not (caller.known and caller.may("admin")):
                await places.enter_async_context(self._all)
            yield

    @contextlib.asynccontextmanager
    async def _place_of(self, name: str) -> AsyncIterator[None]:
        own, users = self._own.get(name, (asyncio.Semaphore(_OF_A_KEY), 0))
        self._own[name] = own, users + 1
        try:
            async with own:
                yield
        finally:
            users = self._own[name][1] - 1
            if users:
                self._own[name] = own, users
            else:
                del self._own[name]
