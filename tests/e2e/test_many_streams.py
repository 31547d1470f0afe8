"""More streams and looks of one client than a server takes by one connection."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, ExitStack, aclosing, closing

from tests.e2e import wire
from tests.fakes import access_units
from tests.running_server import RunningServer

import facelane
import facelane.aio
from facelane_server.limits import MAX_STREAMS_PER_CONNECTION

STREAMS = MAX_STREAMS_PER_CONNECTION + 5
LOOKS = 50
"""Fewer than a server lets look; with as many streams and the watch they are too many."""
assert 2 * LOOKS + 1 > MAX_STREAMS_PER_CONNECTION
KEY_FRAME = facelane.Picture.access_unit(access_units.clip("h264", 1)[0], "h264")
"""A look at video begins with it, at once."""


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


def test_looks_and_watches_of_threads(server: RunningServer) -> None:
    with (
        server.client(timeout=30.0) as client,
        client.analyze_stream(source_id="threads", overload="lossless") as stream,
        ExitStack() as stack,
    ):
        for _ in range(LOOKS - 1):
            stack.enter_context(client.analyze_stream())
        stream.send(KEY_FRAME)
        assert next(stream).result
        for _ in range(LOOKS):
            look = stack.enter_context(closing(client.watch_stream("threads")))
            assert next(look).key_frame
        with client.watch_events() as events:
            assert events.resume_token
        (seen,) = client.list_streams(source_ids=("threads",))
        assert seen.watchers == LOOKS


async def test_looks_and_watches_of_a_loop(server: RunningServer) -> None:
    async with (
        facelane.aio.Client(server.target, timeout=30.0) as client,
        client.analyze_stream(source_id="loop", overload="lossless") as stream,
        AsyncExitStack() as stack,
    ):
        for _ in range(LOOKS - 1):
            await stack.enter_async_context(client.analyze_stream())
        await stream.send(KEY_FRAME)
        assert (await anext(stream)).result
        for _ in range(LOOKS):
            look = await stack.enter_async_context(aclosing(client.watch_stream("loop")))
            assert (await anext(look)).key_frame
        async with client.watch_events() as events:
            assert events.resume_token
        (seen,) = await client.list_streams(source_ids=("loop",))
        assert seen.watchers == LOOKS


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
