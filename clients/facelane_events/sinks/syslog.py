"""Syslog, RFC 5424: over TCP with counted octets (RFC 6587), over UDP, or to a local socket."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Any, Final

from facelane_events import config
from facelane_events.delivery import UnavailableError
from facelane_events.message import Message
from facelane_events.sinks.doubt import Doubtful

_SEVERITIES: Final = {"SPOOF_SUSPECTED": 4, "HISTORY_LOST": 3, "POOL_CHANGED": 5}
_NOTICE, _INFO = 5, 6
MAX_DATAGRAM: Final = 8 * 1024
_APP: Final = "facelane-events"


def record(event: Message, facility: int, host: str) -> bytes:
    """The message as RFC 5424 has it, its body behind a byte order mark."""
    severity = _SEVERITIES.get(event.kind, _NOTICE if event.kind.endswith("_SEEN") else _INFO)
    moment = event.time.isoformat(timespec="milliseconds") if event.time else "-"
    head = (
        f"<{8 * facility + severity}>1 {moment} {host or '-'} {_APP} {os.getpid()} {event.kind} - "
    )
    return head.encode("ascii", "replace") + b"\xef\xbb\xbf" + event.body.replace(b"\n", b" ")


class SyslogSink:
    def __init__(self, settings: config.Syslog) -> None:
        self._settings = settings
        self._host = socket.gethostname()
        self._socket: socket.socket | None = None
        self._stream = False
        self._udp = settings.address.startswith("udp:")
        # Of datagrams the last alone: that one was refused is told to the one behind it.
        self._doubtful: Doubtful[bytes] = Doubtful(1) if self._udp else Doubtful()
        self._first = 0
        """Of the name's addresses, which is tried first."""

    async def open(self) -> None:
        address = self._settings.address
        scheme, _, rest = address.partition(":")
        loop = asyncio.get_running_loop()
        try:
            if scheme == "unix":
                await self._local(rest)
                await self._again()
                return
            host, _, port = rest[2:].rpartition(":")
            kind = socket.SOCK_STREAM if scheme == "tcp" else socket.SOCK_DGRAM
            found = await loop.getaddrinfo(host.strip("[]"), int(port), type=kind)
            await self._reach(found, kind)
            await self._again()
        except OSError as error:
            await self.close()
            raise UnavailableError(f"{address}: {error.strerror or error}") from None

    async def _reach(self, found: list[Any], kind: socket.SocketKind) -> None:
        """One of the name's addresses, the one that answered before first: a receiver listens to
        127.0.0.1 or to ::1, and ``localhost`` is both. Raises OSError."""
        for attempt in range(len(found)):
            self._first %= len(found)
            family, _, _, _, peer = found[self._first]
            try:
                await asyncio.get_running_loop().sock_connect(self._made(family, kind), peer)
                return
            except OSError:
                self._first += 1
                if attempt + 1 == len(found):
                    raise

    async def _local(self, path: str) -> None:
        """A socket of datagrams or a stream, whichever it is."""
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(self._made(socket.AF_UNIX, socket.SOCK_DGRAM), path)
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise
            await loop.sock_connect(self._made(socket.AF_UNIX, socket.SOCK_STREAM), path)

    def _made(self, family: int, kind: socket.SocketKind) -> socket.socket:
        if self._socket is not None:
            self._socket.close()
        self._socket = socket.socket(family, kind)
        self._socket.setblocking(False)
        self._stream = kind == socket.SOCK_STREAM
        return self._socket

    async def send(self, event: Message) -> None:
        assert self._socket is not None, "not open"
        line = record(event, self._settings.facility, self._host)
        line = b"%d %s" % (len(line), line) if self._stream else line[:MAX_DATAGRAM]
        loop = asyncio.get_running_loop()
        well = False
        try:
            if self._stream and self._ended():
                raise ConnectionResetError("the receiver hung up")
            await loop.sock_sendall(self._socket, line)
            well = True
        except OSError as error:
            if self._udp:
                self._first += 1  # nobody listens at this address
            raise UnavailableError(f"{self._settings.address}: {error}") from None
        finally:
            if not well:
                self._doubtful.broke()
            elif self._stream or self._udp:
                self._doubtful.sent(line, len(line))

    async def _again(self) -> None:
        """What a receiver that broke off may not have read. Raises OSError."""
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        while (line := self._doubtful.next()) is not None:
            await loop.sock_sendall(self._socket, line)
            self._doubtful.sent_again()

    def _ended(self) -> bool:
        """Whether a receiver that never answers has closed: what is sent then is lost."""
        assert self._socket is not None
        try:
            return self._socket.recv(1) == b""
        except BlockingIOError:
            return False

    async def close(self) -> None:
        made, self._socket = self._socket, None
        if made is not None:
            made.close()
