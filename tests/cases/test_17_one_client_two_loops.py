"""A client where ``asyncio.run`` is called more than once, and where threads have loops."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

import facelane
from tests.fakes import scripted_server as fake

PICTURE = facelane.Picture.encoded(b"\xff\xd8\xff\xe0" + bytes(60))


@pytest.fixture
def client() -> Iterator[facelane.aio.Client]:
    with fake.ScriptedServer() as server:
        made = facelane.aio.Client(server.target, timeout=60)
        yield made
        asyncio.run(made.close())


async def used(client: facelane.aio.Client) -> tuple[str, int]:
    return await client.health(), len([o async for o in client.analyze([PICTURE, PICTURE])])


async def left_unfinished(client: facelane.aio.Client) -> int:
    async for outcome in client.analyze([PICTURE] * 5):
        return outcome.frame_id
    return 0


def test_one_after_the_other(client: facelane.aio.Client) -> None:
    for _ in range(3):
        assert asyncio.run(used(client)) == ("SERVING", 2)
    assert asyncio.run(left_unfinished(client)) == 1
    assert asyncio.run(used(client)) == ("SERVING", 2)


def test_two_at_once_are_told(client: facelane.aio.Client) -> None:
    async def both() -> None:
        await client.health()
        with pytest.raises(RuntimeError, match="another event loop: make one in each"):
            await asyncio.to_thread(lambda: asyncio.run(client.health()))
        assert await client.health() == "SERVING"

    asyncio.run(both())
