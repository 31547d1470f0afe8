"""A Unix SOCK_SEQPACKET channel between the server and one worker (or worker thread).

One packet is one message of ``messages``; descriptors travel with it (SCM_RIGHTS). The
kernel keeps packets whole, so there is no framing, and it closes the socket of a dead
process at once, so end of file is the signal that the peer is gone, on both sides.

``ServerChannel`` lives on an asyncio loop and never blocks: what the kernel does not
take at once waits in a bounded backlog. ``WorkerChannel`` belongs to a worker's thread
and blocks, always with a deadline.

A packet that is too large, not a message, or carries descriptors it should not is a
``ProtocolError``; after one the channel is of no use and its owner ends the worker.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from facelane_server import limits
from facelane_server.ipc import messages
from facelane_server.ipc.messages import FromWorker, ToWorker

if TYPE_CHECKING:
    import asyncio  # a worker has no loop, and goes without what all this takes

_ANCILLARY: Final = socket.CMSG_SPACE(limits.MAX_DESCRIPTORS * array.array("i").itemsize)
_RECEIVE: Final = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_CUT_OFF: Final = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_SEND: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
"""Numbers: to combine the names of flags takes longer than to send a packet."""
_BURST: Final = 16
"""Packets that a peer may have left behind, at most."""


class ChannelError(Exception):
    """The channel can no longer be used."""


class ChannelClosed(ChannelError):  # noqa: N818 - an event more than an error
    """The peer is gone: end of file, or reset."""


class ProtocolError(ChannelError):
    """The peer does not keep to the protocol."""


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """(server side, worker side); both close on exec until passed on knowingly."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class _Receiver:
    """Reads packets of one socket into a buffer that it reuses."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray(limits.MAX_PACKET_BYTES)
        self._view = memoryview(self._buffer)
        self._into = [self._buffer]

    def receive(self) -> tuple[memoryview, list[int]]:
        """One packet (valid until the next call) and its descriptors, now the caller's.

        Raises BlockingIOError when there is none, ChannelClosed, ProtocolError.
        """
        try:
            size, ancillary, flags, _ = self._packet()
        except BlockingIOError:
            raise
        except OSError as error:
            raise ChannelClosed(f"receive failed: {error.strerror}") from None
        descriptors: list[int] = []
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                descriptors.extend(fds)
        if flags & _CUT_OFF:
            close_all(descriptors)
            raise ProtocolError("a packet is too large or carries too many descriptors")
        if size == 0:
            close_all(descriptors)
            raise ChannelClosed("end of file")
        return self._view[:size], descriptors

    def _packet(self) -> tuple[int, list[tuple[int, int, bytes]], int, object]:
        try:
            return self._sock.recvmsg_into(self._into, _ANCILLARY, _RECEIVE)
        except ConnectionResetError:
            # The peer ended with messages unread. The kernel says so once, and first; what
            # the peer had sent before, its last words among it, is still there.
            return self._sock.recvmsg_into(self._into, _ANCILLARY, _RECEIVE)


def _transmit(sock: socket.socket, packet: bytes, descriptors: Sequence[int]) -> None:
    """Send one packet without waiting. Raises BlockingIOError or ChannelClosed."""
    try:
        if descriptors:
            rights = array.array("i", descriptors)
            sock.sendmsg(
                [packet],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)],
                _SEND,
            )
        else:
            sock.send(packet, _SEND)
    except BlockingIOError:
        raise
    except OSError as error:
        raise ChannelClosed(f"send failed: {error.strerror}") from None


def _encode(message: ToWorker | FromWorker) -> bytes:
    packet = messages.encode(message)
    if len(packet) > limits.MAX_PACKET_BYTES:
        raise ValueError(
            f"a {type(message).__name__} message of {len(packet)} bytes exceeds the packet "
            f"limit of {limits.MAX_PACKET_BYTES}"
        )
    return packet


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors that nobody wants."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


class ServerChannel:
    """The server's end, on its loop. Owns the socket.

    ``on_message`` is called for every message; ``on_lost`` once, with the reason, when
    the channel breaks by itself, and never after ``close``. Both are called by the
    loop, ``on_lost`` possibly out of ``send``'s later retry, never out of ``send``.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_message: Callable[[FromWorker], None],
        on_lost: Callable[[ChannelError], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._sock = sock
        self.on_message = on_message
        self.on_lost = on_lost
        self._loop = loop
        self._receiver = _Receiver(sock)
        self._backlog: deque[tuple[bytes, list[int]]] = deque()
        self._open = True
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    def send(self, message: ToWorker, descriptors: Sequence[int] = ()) -> None:
        """Send, or queue behind what waits. ``descriptors`` stay the caller's.

        Raises ChannelClosed when the peer is gone or does not read any more: the owner
        then treats the worker as lost. Raises ValueError for a message too large.
        """
        packet = _encode(message)
        if not self._open:
            raise ChannelClosed("closed")
        if not self._backlog:
            try:
                _transmit(self._sock, packet, descriptors)
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._writable)
            else:
                return
        if len(self._backlog) >= limits.MAX_CHANNEL_BACKLOG:
            raise ChannelClosed(f"the worker leaves {limits.MAX_CHANNEL_BACKLOG} messages unread")
        self._backlog.append((packet, [os.dup(fd) for fd in descriptors]))

    def receive_last(self) -> None:
        """After a failed ``send``: take in what the peer had sent before it went."""
        for _ in range(_BURST):
            if not self._read_one():
                return

    def close(self) -> None:
        """Close the socket; the worker reads end of file. Safe to call twice."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        for _, descriptors in self._backlog:
            close_all(descriptors)
        self._backlog.clear()
        self._sock.close()

    def _readable(self) -> None:
        """One packet: hardly ever is there another, and to be told so takes as long as to read it.
        The loop calls again while there is more."""
        self._read_one()

    def _read_one(self) -> bool:
        """Whether a message was read, and there may be another."""
        if not self._open:
            return False
        try:
            packet, descriptors = self._receiver.receive()
        except BlockingIOError:
            return False
        except ChannelError as error:
            self._lose(error)
            return False
        if descriptors:
            close_all(descriptors)
            self._lose(ProtocolError("a worker sent descriptors"))
            return False
        try:
            message = messages.decode_from_worker(packet)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._lose(ProtocolError(f"not a message: {type(error).__name__}"))
            return False
        self.on_message(message)
        return True

    def _writable(self) -> None:
        while self._backlog:
            packet, descriptors = self._backlog[0]
            try:
                _transmit(self._sock, packet, descriptors)
            except BlockingIOError:
                return
            except ChannelError as error:
                self._lose(error)
                return
            self._backlog.popleft()
            close_all(descriptors)
        self._loop.remove_writer(self._sock.fileno())

    def _lose(self, error: ChannelError) -> None:
        self.close()
        self.on_lost(error)


class WorkerChannel:
    """The worker's end, blocking. Owns the socket.

    One thread receives; any thread sends.
    """

    def __init__(
        self, sock: socket.socket, *, send_timeout_s: float = 30.0, wake_fd: int | None = None
    ) -> None:
        """``wake_fd``: a descriptor that ends a wait of ``receive`` when it is readable."""
        self._sock = sock
        self._sock.setblocking(False)
        self._receiver = _Receiver(sock)
        self._send_timeout_s = send_timeout_s
        self._lock = threading.Lock()
        self._in = select.poll()
        self._in.register(sock, select.POLLIN)
        if wake_fd is not None:
            self._in.register(wake_fd, select.POLLIN)

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self, timeout_s: float) -> tuple[ToWorker, list[int]] | None:
        """The next message and its descriptors (now the caller's), or None when none came
        within ``timeout_s`` (0 = look and return).

        Raises ChannelClosed when the server is gone, ProtocolError.
        """
        try:
            packet, descriptors = self._receiver.receive()
        except BlockingIOError:
            if timeout_s <= 0 or not self._in.poll(timeout_s * 1000):
                return None
            try:
                packet, descriptors = self._receiver.receive()
            except BlockingIOError:
                return None
        try:
            return messages.decode_to_worker(packet), descriptors
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            close_all(descriptors)
            raise ProtocolError(f"not a message: {type(error).__name__}") from None

    def send(self, message: FromWorker) -> None:
        """Raises ChannelClosed when the server is gone or does not read in time."""
        self.send_packet(_encode(message))

    def send_packet(self, packet: bytes) -> None:
        """Send bytes as they are (fault tests send garbage)."""
        with self._lock:
            deadline = 0.0
            while True:
                try:
                    _transmit(self._sock, packet, ())
                except BlockingIOError:
                    now = time.monotonic()
                    deadline = deadline or now + self._send_timeout_s
                    if now >= deadline:
                        raise ChannelClosed("the server does not read") from None
                    select.select([], [self._sock], [], deadline - now)
                else:
                    return

    def close(self) -> None:
        self._sock.close()
