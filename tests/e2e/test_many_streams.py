"""More streams of one client than a server takes by one connection."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, ExitStack

from tests.e2e import wire
from tests.running_server import RunningServer

import facelane
import facelane.aio
from facelane_server.limits import MAX_STREAMS_PER_CONNECTION

STREAMS = MAX_STREAMS_PER_CONNECTION + 5


def test_of_threads(server: RunningServer) -> None:
    with server.client(timeout=30.0) as client, ExitStack() as stack:
        streams = [
            stack.enter_context(client.analyze_stream(overload="lossless")) for _ in range(STREAMS)
        ]
        assert client.server_info().open_streams >= STREAMS
        for stream in streams:
            stream.send(wire.picture())
            stream.close_send()
        assert [len([one for one in stream if one.result]) for stream in streams] == [1] * STREAMS


async def test_of_a_loop(server: RunningServer) -> None:
    async with (
        facelane.aio.Client(server.target, timeout=30.0) as client,
        AsyncExitStack() as stack,
    ):
        made = [client.analyze_stream(overload="lossless") for _ in range(STREAMS)]
        streams = await asyncio.gather(*map(stack.enter_async_context, made))
        assert (await client.server_info()).open_streams >= STREAMS
        for stream in streams:
            await stream.send(wire.picture())
            stream.close_send()
        for stream in streams:
            assert len([outcome async for outcome in stream if outcome.result]) == 1
