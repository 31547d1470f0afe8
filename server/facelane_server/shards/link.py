"""One end of the connection between a keeper and a shard: a socket pair that the shard inherits.

Messages are msgpack behind four bytes of length. The end of either process is end of file for the
other. Writing never waits: a peer that does not read is given ``MAX_LINK_BACKLOG_BYTES``, and then
given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any, Final, Generic, Self, TypeVar

import msgspec

from facelane_server import limits
from facelane_server.shards.messages import ToKeeper, ToShard

_LENGTH: Final = struct.Struct("<I")

Heard = TypeVar("Heard")


class Link(Generic[Heard]):
    """``Heard``: the union of what this end hears. Made by ``at_keeper`` and ``at_shard``; owns
    its socket."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: msgspec.msgpack.Decoder[Heard],
    ) -> None:
        self._reader, self._writer = reader, writer
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()

    @classmethod
    async def _over(cls, end: socket.socket, heard: Any) -> Self:
        reader, writer = await asyncio.open_connection(sock=end)
        return cls(reader, writer, msgspec.msgpack.Decoder(heard))

    def send(self, message: ToShard | ToKeeper) -> None:
        """Never waits, never raises: a link that is gone is heard of by ``receive``."""
        if self._writer.is_closing():
            return
        data = self._encoder.encode(message)
        if len(data) > limits.MAX_LINK_MESSAGE_BYTES:
            raise ValueError("a message between keeper and shard is too long")
        if self._writer.transport.get_write_buffer_size() > limits.MAX_LINK_BACKLOG_BYTES:
            self.close()
            return
        self._writer.write(_LENGTH.pack(len(data)) + data)

    async def receive(self) -> Heard | None:
        """The next message; None when the peer is gone, or says what nobody understands."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > limits.MAX_LINK_MESSAGE_BYTES:
                return None
            return self._decoder.decode(await self._reader.readexactly(length))
        except (OSError, asyncio.IncompleteReadError, msgspec.MsgspecError):
            return None

    async def flush(self) -> None:
        """Until the peer's kernel has all."""
        with contextlib.suppress(OSError):
            await self._writer.drain()

    def close(self) -> None:
        """Idempotent; what was not read is lost."""
        self._writer.transport.abort()


async def at_keeper(end: socket.socket) -> Link[ToKeeper]:
    return await Link[ToKeeper]._over(end, ToKeeper)


async def at_shard(end: socket.socket) -> Link[ToShard]:
    return await Link[ToShard]._over(end, ToShard)
