"""Whose request is received next."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from facelane_server import limits
from facelane_server.edge.receiving import Receiving
from facelane_server.edge.roles import ANYBODY, Caller, Grant

OF_A_KEY = limits.MAX_RECEIVING // 4


def key(name: str, *verbs: str) -> Caller:
    return Caller(name, (Grant(frozenset(verbs)),))  # type: ignore[arg-type]


async def let_in(receiving: Receiving, stack: AsyncExitStack, caller: Caller) -> bool:
    try:
        async with asyncio.timeout(0.01):
            await stack.enter_async_context(receiving.turn(caller))
    except TimeoutError:
        return False
    return True


async def test_a_key_that_sends_slowly_holds_its_own_places_alone() -> None:
    receiving = Receiving()
    async with AsyncExitStack() as stack:
        slow = [await let_in(receiving, stack, key("slow", "analyze")) for _ in range(OF_A_KEY + 3)]
        assert slow == [True] * OF_A_KEY + [False] * 3
        assert await let_in(receiving, stack, key("honest", "analyze"))
        for number in range(limits.MAX_RECEIVING):
            await let_in(receiving, stack, key(f"of-many-{number}", "analyze"))
        assert not await let_in(receiving, stack, key("late", "analyze")), "memory is bounded"
        assert not await let_in(receiving, stack, ANYBODY)
        assert await let_in(receiving, stack, key("operator", "admin"))
    assert not receiving._own, "nothing is kept of who was here"
    async with AsyncExitStack() as stack:
        everybody = [await let_in(receiving, stack, ANYBODY) for _ in range(limits.MAX_RECEIVING)]
        assert all(everybody), "without keys there is one caller"
