"""Looks at streams that another shard has: pictures go from shard to shard, past the keeper.

A shard that is asked for a stream of another's has it give a ticket (``messages.WatchStream``, by
way of the keeper), and comes with it to the Unix socket, without a file, that each of them has.
No other user's process is heard there, a ticket is good once and for seconds, and shows what the
caller may see whom it was given for. Nothing is queued: who takes nothing misses pictures.

On the socket: the ticket, then messages of a kind (one byte), a length (four, little endian) and so
many bytes, up to END or FAILED. A socket that ends without has lost its shard.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import secrets
import socket
import struct
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final

import msgspec
import structlog

from facelane.v1 import view_service_pb2 as pb
from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.edge import whole
from facelane_server.edge.roles import Caller
from facelane_server.shards.messages import Answer, Failure
from facelane_server.store import audit

log = structlog.get_logger(__name__)

Write = Callable[[pb.WatchStreamResponse], Awaitable[None]]
Show = Callable[[pb.WatchStreamRequest, Caller, Write], Awaitable[None]]

_METHOD: Final = "/facelane.v1.ViewService/WatchStream"
_TICKET_BYTES: Final = 16
_TICKET_S: Final = 10.0
_CONNECT_S: Final = 5.0
_HEAD: Final = struct.Struct("<BI")
_RESPONSE, _END, _FAILED = range(3)
_PEER: Final = struct.Struct("3i")


def packed(caller: Caller) -> bytes:
    """A caller as one shard tells another; the hash of its key stays here."""
    return msgspec.msgpack.encode(dataclasses.replace(caller, proof=""))


def unpacked(data: bytes) -> Caller:
    return msgspec.msgpack.decode(data, type=Caller)


class Looks:
    """What this shard shows to others. ``open`` listens; ``close`` ends what is shown."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._name = f"facelane-{secrets.token_hex(16)}"
        self._tickets: dict[bytes, tuple[float, pb.WatchStreamRequest, Caller]] = {}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        # Bound and connected by hand: libuv knows no addresses without a file.
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listening.bind(f"\0{self._name}")
            self._server = await asyncio.start_unix_server(self._met, sock=listening)
        except BaseException:
            listening.close()
            raise

    async def close(self) -> None:
        """Idempotent."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def ticket(self, request: pb.WatchStreamRequest, caller: Caller) -> bytes:
        """For one look: the ticket, and the socket's name behind it."""
        now = time.monotonic()
        self._tickets = {key: held for key, held in self._tickets.items() if held[0] > now}
        if len(self._tickets) >= limits.MAX_VIEWERS:
            raise FacelaneError(
                Reason.QUOTA_EXCEEDED, "too many looks begin at once; try again", retryable=True
            )
        ticket = secrets.token_bytes(_TICKET_BYTES)
        self._tickets[ticket] = (now + _TICKET_S, request, caller)
        return ticket + self._name.encode()

    async def _met(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if not _of_this_user(writer):
                return
            async with asyncio.timeout(_CONNECT_S):
                ticket = await reader.readexactly(_TICKET_BYTES)
            until, request, caller = self._tickets.pop(ticket, (0.0, None, None))
            if request is None or caller is None or until < time.monotonic():
                return
            await self._serve(request, caller, reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            return  # nobody is there any more
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve(
        self,
        request: pb.WatchStreamRequest,
        caller: Caller,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        audit.acting(audit.Actor(caller.name, _METHOD))
        # Whatever the peer has not taken is not queued here as well.
        writer.transport.set_write_buffer_limits(high=0)

        async def write(response: pb.WatchStreamResponse) -> None:
            await say(_RESPONSE, response.SerializeToString())

        async def say(kind: int, body: bytes = b"") -> None:
            writer.write(_HEAD.pack(kind, len(body)) + body)
            await writer.drain()

        showing = asyncio.ensure_future(self._show(request, caller, write))
        # The other shard says nothing more: what comes is its end.
        leaving = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait((showing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not showing.done():
                return
            try:
                showing.result()
            except FacelaneError as error:
                failure = Failure(
                    reason=error.reason.value,
                    message=error.message,
                    retryable=error.retryable,
                    metadata=dict(error.metadata),
                )
                await say(_FAILED, msgspec.msgpack.encode(failure))
            else:
                await say(_END)
        finally:
            for task in (showing, leaving):
                task.cancel()
            await asyncio.gather(showing, leaving, return_exceptions=True)


async def seen(ticket: bytes, shard: int) -> AsyncGenerator[pb.WatchStreamResponse, None]:
    """What the shard shows that has given the ticket. Raises what it raises, and STREAM_NOT_FOUND
    (retryable) when it is gone."""
    writer: asyncio.StreamWriter | None = None
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(_CONNECT_S):
            name = f"\0{ticket[_TICKET_BYTES:].decode()}"
            await asyncio.get_running_loop().sock_connect(end, name)
            reader, writer = await asyncio.open_unix_connection(sock=end)
        writer.write(ticket[:_TICKET_BYTES])
        while True:
            kind, length = _HEAD.unpack(await reader.readexactly(_HEAD.size))
            if length > limits.MAX_MESSAGE_BYTES + limits.MAX_LINK_MESSAGE_BYTES:
                raise ConnectionError
            body = await reader.readexactly(length)
            if kind == _END:
                return
            if kind == _FAILED:
                failure = msgspec.msgpack.decode(body, type=Failure)
                whole.good(Answer(shard=shard, failure=failure))
            yield pb.WatchStreamResponse.FromString(body)
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        raise FacelaneError(
            Reason.STREAM_NOT_FOUND,
            "the shard that has the stream is gone; list the streams again",
            metadata={"shard": str(shard)},
            retryable=True,
        ) from None
    finally:
        if writer is None:
            end.close()
        else:
            writer.transport.abort()


def _of_this_user(writer: asyncio.StreamWriter) -> bool:
    peer = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        _, user, _ = _PEER.unpack(
            peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        )
        return bool(user == os.geteuid())
    return False
