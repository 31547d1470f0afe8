"""What runs beside a server goes on whatever happens to it."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from structlog.testing import capture_logs
from tests.waiting import auntil

from facelane_server import standing


async def test_what_fails_begins_again_until_it_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "AGAIN_S", 0.0)
    begun: list[int] = []
    ended: list[bool] = []

    async def work() -> None:
        begun.append(1)
        if len(begun) < 3:
            raise MemoryError
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def done() -> None:
        begun.append(100)

    with capture_logs() as logs:
        async with contextlib.AsyncExitStack() as stack:
            standing.beside(stack, work, "work")
            await auntil(lambda: len(begun) == 3)
            standing.beside(stack, done, "done")
            await auntil(lambda: len(begun) == 4)
        assert ended == [True]
    assert [entry["task"] for entry in logs] == ["work", "work"]
