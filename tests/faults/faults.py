"""The faults: named failpoints inside of a worker, and violence from outside."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import resource
import signal
import socket
import sqlite3
from collections.abc import Awaitable, Callable

import grpc
import psutil
from tests.e2e import wire
from tests.faults import traffic
from tests.faults.cells import JOB_TIMEOUT_MS, Cell, Fault
from tests.waiting import auntil

from facelane.v1 import analysis_service_pb2 as pb
from facelane.v1 import analysis_service_pb2_grpc as pb_grpc
from facelane_server.worker.failpoints import POISON

Act = Callable[[Cell], Awaitable[None]]


def on_job(name: str) -> Act:
    async def act(cell: Cell) -> None:
        await cell.fire_once(**{name: cell.rng.randrange(3, 8)})

    return act


def on_start(name: str, value: str = "1") -> Act:
    async def act(cell: Cell) -> None:
        await cell.fire_once(**{name: value})

    return act


def while_on(name: str, value: str, seconds: float) -> Act:
    async def act(cell: Cell) -> None:
        await cell.for_a_while(seconds, **{name: value})

    return act


async def calm(cell: Cell) -> None:
    """Nothing happens: the harness itself must find nothing."""
    await asyncio.sleep(0.5)  # how long it lasts


async def sigkill(cell: Cell) -> None:
    await cell.kill(signal.SIGKILL)


async def sigterm(cell: Cell) -> None:
    pid = await cell.kill(signal.SIGTERM)
    await auntil(lambda: not os.path.exists(f"/proc/{pid}"))


async def sigstop(cell: Cell) -> None:
    pid = await cell.kill(signal.SIGSTOP)
    await auntil(lambda: not os.path.exists(f"/proc/{pid}"), what="the hung worker to be killed")


async def storm(cell: Cell) -> None:
    """A worker is killed every 100 ms."""
    for _ in range(12):
        for worker in (await cell.pool()).workers:
            if worker.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
        await asyncio.sleep(0.1)  # the pace


async def poison(cell: Cell) -> None:
    """One frame of a stream kills every worker that it meets."""
    cell.arm(poison="1")
    await cell.restart()
    pattern = traffic.lossless(pace_s=0.02, limit=12, marked=5, special=POISON)
    books = await traffic.stream(cell.channel, pattern, cell.stop, 1, "poisonous")
    cell.extra.append(books)
    if (books.results, dict(books.errors)) != (11, {"POISONED": 1}):
        cell.broken.append(f"poison: {books}")
    cell.arm()
    await cell.restart()


async def starved(cell: Cell) -> None:
    """The worker's address space cannot grow any more."""
    pid = await cell.pid()
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        now = psutil.Process(pid).memory_info().vms
        resource.prlimit(pid, resource.RLIMIT_AS, (now, resource.RLIM_INFINITY))
        await asyncio.sleep(0.5)  # how long it lasts
        resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)


async def frozen(cell: Cell) -> None:
    """The whole front process stands still for longer than a job may take: a laptop's lid,
    a paused virtual machine. Its clocks leap when it goes on."""
    os.kill(cell.server.process.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(1.5 * JOB_TIMEOUT_MS / 1000)
    finally:
        os.kill(cell.server.process.pid, signal.SIGCONT)


async def full_disk(cell: Cell) -> None:
    """No file of the server can grow: neither the gallery's nor the log."""
    pid = cell.server.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        await asyncio.sleep(0.7)  # how long it lasts
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


async def locked(cell: Cell) -> None:
    """Another process holds the gallery's file for itself."""
    path = cell.server.folder / "state" / "gallery.db"
    holder = sqlite3.connect(path, isolation_level=None)
    try:
        holder.execute("BEGIN IMMEDIATE")
        await asyncio.sleep(0.7)  # how long it lasts
        holder.execute("ROLLBACK")
    finally:
        holder.close()


async def vanishing(cell: Cell) -> None:
    """Clients go without a word in the middle of what they do."""
    for _ in range(3):
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.aio.insecure_channel(cell.server.target, options=options)
        calls = [pb_grpc.AnalysisServiceStub(channel).AnalyzeStream() for _ in range(4)]  # type: ignore[call-arg]
        for call in calls:
            await call.write(wire.config())
            for number in range(1, 6):
                await call.write(wire.frame(number))
        await calls[0].read()
        await channel.close(None)


async def babbling(cell: Cell) -> None:
    """Bytes on the port that are no HTTP/2, and connections that say nothing."""
    with contextlib.ExitStack() as stack:
        for n in range(6):
            made = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            made.connect(cell.server.target.removeprefix("unix:"))
            with contextlib.suppress(OSError):
                made.sendall([b"", b"GET / HTTP/1.0\r\n\r\n", cell.rng.randbytes(4096)][n % 3])
        await asyncio.sleep(0.3)  # how long it lasts


async def slow_reader(cell: Cell) -> None:
    """A client writes and never reads: it loses its stream, and nobody else anything."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 8_192),
    ]
    async with grpc.aio.insecure_channel(cell.server.target, options=options) as channel:
        call = pb_grpc.AnalysisServiceStub(channel).AnalyzeStream()  # type: ignore[call-arg]
        await call.write(wire.config(overload_policy=pb.OVERLOAD_POLICY_LATEST_WINS))

        async def write() -> None:
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                for number in itertools.count(1):
                    await call.write(wire.frame(number))

        writer = asyncio.create_task(write())
        try:
            written = len(cell.server.text())
            await auntil(
                lambda: '"reason": "SLOW_READER"' in cell.server.text()[written:],
                what="the stream of a client that never reads to be ended",
            )
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)


LOST_WITH_TWO = frozenset({"POISONED", "WORKER_LOST", "POOL_UNAVAILABLE"})
OOM = frozenset({"OUT_OF_MEMORY", "POISONED"})

FAULTS = {
    fault.name: fault
    for fault in (
        Fault("calm", calm, loses=False),
        # Inside of a worker.
        Fault("load_error", on_start("load")),
        Fault("crash_in_load", on_start("crash_load")),
        Fault("crash_in_warm_up", on_start("crash_warm_up")),
        Fault("slow_load", while_on("slow_load_ms", "700", 0.2)),
        # Where a picture is decoded, the hang is its own.
        Fault("hang_in_job", on_job("hang_on_job"), detector=frozenset({"PICTURE_TOO_COSTLY"})),
        Fault("crash_in_job", on_job("crash_on_job")),
        Fault("exit_in_job", on_job("exit_on_job")),
        Fault("sticky_device_error", on_job("sticky_on_job")),
        Fault("garbage_on_channel", on_job("garbage_on_job")),
        Fault("truncated_packet", on_job("truncated_on_job")),
        Fault("unforeseen_error", on_job("error_on_job"), errors=frozenset({"INTERNAL"})),
        Fault("out_of_memory_once", on_job("oom_once_on_job")),
        Fault("out_of_memory", while_on("oom_on_job", "6", 0.8), errors=OOM),
        Fault("leak", while_on("leak_mib", "60", 1.0)),
        Fault("slow_model", while_on("slow_ms", "60", 0.8), errors=frozenset()),
        Fault("poison", poison, stages=("detector",)),
        # From outside.
        Fault("sigkill", sigkill),
        Fault("sigterm", sigterm),
        Fault("sigstop", sigstop),
        Fault("storm", storm, errors=LOST_WITH_TWO),
        Fault("starved", starved, errors=OOM, loses=False),
        Fault("frozen", frozen, stages=(), loses=False, stalls=True),
        Fault(
            "full_disk",
            full_disk,
            stages=(),
            loses=False,
            gallery=frozenset({"GALLERY_UNAVAILABLE"}),
        ),
        Fault(
            "locked_gallery",
            locked,
            stages=(),
            loses=False,
            gallery=frozenset({"GALLERY_UNAVAILABLE"}),
        ),
        Fault("vanishing_clients", vanishing, stages=(), loses=False),
        Fault("babbling_clients", babbling, stages=(), loses=False),
        Fault("slow_reader", slow_reader, stages=(), loses=False),
    )
}
