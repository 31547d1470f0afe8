"""The channel and the arenas, both ends in one process."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.waiting import auntil

from facelane_server import limits
from facelane_server.ipc import gallery_table, messages
from facelane_server.ipc.arena import Arena, aligned
from facelane_server.ipc.channel import (
    ChannelClosed,
    ChannelError,
    ProtocolError,
    ServerChannel,
    WorkerChannel,
    socket_pair,
)
from facelane_server.ipc.messages import (
    DetectItem,
    Drain,
    EmbedDone,
    FromWorker,
    GallerySnapshot,
    Hello,
    Infer,
    InferDone,
    Ping,
    Pong,
)

MIB = 1 << 20


class Ends:
    """Both ends of a channel; the server's messages and end are recorded."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket_pair()
        self.received: list[FromWorker] = []
        self.lost: list[ChannelError] = []
        self.worker = WorkerChannel(self.theirs, send_timeout_s=0.2)
        self.server = ServerChannel(
            self.ours, self.received.append, self.lost.append, asyncio.get_running_loop()
        )


@pytest.fixture
async def ends() -> Iterator[Ends]:  # type: ignore[misc]
    made = Ends()
    yield made
    made.server.close()
    made.worker.close()


def resident_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


# -- channel ------------------------------------------------------------------------------


async def test_messages_pass_in_order_both_ways(ends: Ends) -> None:
    for sequence in range(20):
        ends.server.send(Ping(sequence))
    assert [ends.worker.receive(0) for _ in range(21)] == [
        *((Ping(sequence), []) for sequence in range(20)),
        None,
    ]
    for sequence in range(50):
        ends.worker.send(Pong(sequence))
    await auntil(lambda: len(ends.received) == 50)
    assert ends.received == [Pong(sequence) for sequence in range(50)]


async def test_descriptors_travel_and_belong_to_the_receiver(ends: Ends) -> None:
    fd = os.memfd_create("sent")
    os.write(fd, b"matrix")
    ends.server.send(GallerySnapshot(3, 0, 1, ()), [fd])
    os.close(fd)
    received = ends.worker.receive(1.0)
    assert received is not None
    message, (copy,) = received
    assert message == GallerySnapshot(3, 0, 1, ())
    assert os.pread(copy, 10, 0) == b"matrix"
    assert not os.get_inheritable(copy)
    os.close(copy)


async def test_a_receive_has_a_deadline(ends: Ends) -> None:
    assert ends.worker.receive(0.01) is None


async def test_a_wake_descriptor_ends_a_wait() -> None:
    ours, theirs = socket_pair()
    wake, writer = os.pipe()
    channel = WorkerChannel(theirs, wake_fd=wake)
    os.write(writer, b"x")
    assert channel.receive(30.0) is None
    for fd in (wake, writer):
        os.close(fd)
    channel.close()
    ours.close()


async def test_the_server_sees_the_workers_end_at_once(ends: Ends) -> None:
    ends.worker.send(Pong(1))
    ends.worker.close()
    await auntil(lambda: ends.lost)
    assert ends.received == [Pong(1)], "what was sent before is heard first"
    assert isinstance(ends.lost[0], ChannelClosed)
    with pytest.raises(ChannelClosed):
        ends.server.send(Ping(1))


async def test_last_words_are_heard_even_when_messages_were_left_unread(ends: Ends) -> None:
    ends.server.send(Ping(1))
    ends.worker.send(Hello(1, "3"))
    ends.worker.close()  # with the ping unread: the kernel reports a reset first
    await auntil(lambda: ends.lost)
    assert ends.received == [Hello(1, "3")]
    assert isinstance(ends.lost[0], ChannelClosed)


async def test_the_worker_sees_the_servers_end(ends: Ends) -> None:
    ends.server.send(Drain())
    ends.server.close()
    assert ends.worker.receive(1.0) == (Drain(), [])
    with pytest.raises(ChannelClosed):
        ends.worker.receive(1.0)
    with pytest.raises(ChannelClosed):
        ends.worker.send(Pong(1))
    assert ends.lost == [], "closing it oneself is no loss"


@pytest.mark.parametrize("packet", [b"\xc1", b"garbage", messages.encode(Ping(1)), b"\x91"])
async def test_what_is_no_message_of_a_worker_is_a_breach(ends: Ends, packet: bytes) -> None:
    ends.worker.send_packet(packet)
    await auntil(lambda: ends.lost)
    assert isinstance(ends.lost[0], ProtocolError)


async def test_a_packet_that_is_too_large_is_a_breach(ends: Ends) -> None:
    ends.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
    size = limits.MAX_PACKET_BYTES + 1
    try:
        ends.theirs.send(bytes(size))
    except OSError:
        pytest.skip("the kernel's send buffer is too small for an oversize packet")
    await auntil(lambda: ends.lost)
    assert isinstance(ends.lost[0], ProtocolError)


async def test_descriptors_from_a_worker_are_a_breach_and_are_closed(ends: Ends) -> None:
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(ends.theirs, [messages.encode(Pong(1))], [0])
    await auntil(lambda: ends.lost)
    assert isinstance(ends.lost[0], ProtocolError)
    assert ends.received == []
    assert len(os.listdir("/proc/self/fd")) == before - 1, "our end is closed, nothing more open"


async def test_too_many_descriptors_are_a_breach_and_are_closed(ends: Ends) -> None:
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(ends.ours, [messages.encode(Ping(1))], [0] * 8)
    with pytest.raises(ProtocolError):
        ends.worker.receive(1.0)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_worker_that_does_not_read_fills_a_bounded_backlog(ends: Ends) -> None:
    job = Infer(1, 0, [DetectItem(0, 1, "x" * 4000) for _ in range(32)])
    fd = os.memfd_create("sent")
    sent = 0

    def flood() -> None:
        nonlocal sent
        for _ in range(1000):
            ends.server.send(job, [fd])
            sent += 1

    with pytest.raises(ChannelClosed, match="unread"):
        flood()
    assert 64 < sent < 100
    # What waited is delivered once the worker reads, whole and in order.
    got = 0
    while got < sent:
        await asyncio.sleep(0)
        while (received := ends.worker.receive(0)) is not None:
            assert received[0] == job
            os.close(received[1][0])
            got += 1
    os.close(fd)
    ends.server.send(Ping(9))
    assert ends.worker.receive(0) == (Ping(9), [])


async def test_a_server_that_does_not_read_does_not_hold_a_worker_for_ever(ends: Ends) -> None:
    answer = InferDone(1, [EmbedDone(1.0, tuple((n, 0.5) for n in range(1000)))] * 8)

    def flood() -> None:
        for _ in range(1000):
            ends.worker.send(answer)

    with pytest.raises(ChannelClosed, match="does not read"):
        flood()


def test_a_message_too_large_for_a_packet_is_refused_before_it_is_sent() -> None:
    ours, theirs = socket_pair()
    channel = WorkerChannel(theirs)
    with pytest.raises(ValueError, match="packet limit"):
        channel.send(Hello(1, "x" * limits.MAX_PACKET_BYTES))
    ours.close()
    channel.close()


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_decode_to_anything_but_a_message_or_an_error(data: bytes) -> None:
    for decode in (messages.decode_to_worker, messages.decode_from_worker):
        try:
            message = decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        assert isinstance(message, messages.Message)


# -- arena --------------------------------------------------------------------------------


def test_slots_do_not_overlap_and_both_sides_see_the_same_bytes() -> None:
    arena = Arena.create("test", 2, MIB)
    other = Arena(os.dup(arena.fileno()), 2, MIB, writable=False)
    arena.slot(0)[:] = b"a" * MIB
    arena.slot(1)[:4] = b"bbbb"
    assert bytes(other.slot(0)[-4:]) == b"aaaa"
    assert bytes(other.slot(1)[:8]) == b"bbbb\0\0\0\0"
    with pytest.raises(TypeError):
        other.slot(0)[0] = 1
    other.close()
    arena.close()
    arena.close()


def test_an_arena_cannot_be_shrunk_under_its_owner() -> None:
    arena = Arena.create("test", 1, MIB)
    for size in (0, 2 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fileno(), size)
    arena.close()


def test_a_slot_is_cleared_of_what_a_job_has_left() -> None:
    size = limits.SLOT_KEEP_BYTES + 8 * MIB
    arena = Arena.create("test", 2, size)
    for slot in range(2):
        arena.slot(slot)[:] = b"x" * size
    assert resident_bytes(arena.fileno()) >= 2 * size
    arena.clear(0, size - 100)
    assert resident_bytes(arena.fileno()) <= size + limits.SLOT_KEEP_BYTES, "pages are given back"
    assert not any(arena.slot(0)[: size - 100])
    assert bytes(arena.slot(1)[:1]) == bytes(arena.slot(1)[-1:]) == b"x", "the other is untouched"
    arena.clear(1, 100)
    assert not any(arena.slot(1)[:100])
    assert bytes(arena.slot(1)[100:101]) == b"x", "a small job had no more than that"
    arena.clear(1, size + 100)
    assert not any(arena.slot(1))
    arena.clear(1, 0)
    arena.close()


class KeepsPages:
    """A mapping on a kernel without MADV_REMOVE."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped

    def madvise(self, *_: int) -> None:
        raise OSError(errno.EINVAL, "not here")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mapped, name)


def test_pages_that_the_kernel_does_not_take_back_are_overwritten() -> None:
    size = limits.SLOT_KEEP_BYTES + MIB
    arena = Arena.create("test", 1, size)
    arena._map = KeepsPages(arena._map)  # type: ignore[assignment]
    arena.slot(0)[:] = b"x" * size
    arena.clear(0, size)
    assert not any(arena.slot(0))
    arena.close()


def test_only_its_writer_can_clear_an_arena() -> None:
    arena = Arena.create("test", 1, mmap.PAGESIZE)
    only_read = os.open(f"/proc/self/fd/{arena.fileno()}", os.O_RDONLY)
    other = Arena(only_read, 1, mmap.PAGESIZE, writable=False)
    with pytest.raises(ValueError, match="writ"):
        other.clear(0, 1)
    other.close()
    arena.close()


@pytest.mark.parametrize(
    ("slots", "slot_bytes"), [(1, 2 * MIB), (2, 2 * MIB), (0, MIB), (1, 100), (2, MIB + 1)]
)
def test_an_arena_that_is_not_what_it_should_be_is_refused(slots: int, slot_bytes: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 2 * MIB)
    with pytest.raises(ValueError, match="arena"):
        Arena(fd, slots, slot_bytes, writable=True)
    assert len(os.listdir("/proc/self/fd")) == before, "it was ours to close"


@given(st.integers(0, 1 << 40))
def test_alignment(offset: int) -> None:
    assert aligned(offset) % 64 == 0
    assert 0 <= aligned(offset) - offset < 64


# -- the table of galleries -------------------------------------------------------------------

TABLE = GallerySnapshot(7, 5, 16, (("staff", 0, 3), ("guests", 3, 5)), "model")


def test_a_table_of_galleries_travels_beside_its_message() -> None:
    before = len(os.listdir("/proc/self/fd"))
    message, fd = gallery_table.detach(TABLE)
    assert message.galleries == ()
    assert gallery_table.attach(message, fd) == TABLE
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", [0, -1, 1, 5, 10**4, 10**12])
def test_a_table_that_is_not_what_its_message_says_is_refused(size: int) -> None:
    message, fd = gallery_table.detach(TABLE)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="table of galleries"):
        gallery_table.attach(msgspec.structs.replace(message, table_bytes=size), fd)
    assert len(os.listdir("/proc/self/fd")) == before - 1
