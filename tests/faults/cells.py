"""One cell of the matrix: a fault is committed while traffic runs, and the invariants hold.

The invariants are those of docs/ARCHITECTURE.md; ``run`` returns what broke, in words.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.e2e import wire
from tests.faults import traffic
from tests.running_server import RunningServer, toml
from tests.waiting import auntil, until

from facelane.v1 import admin_service_pb2 as admin_pb
from facelane.v1 import admin_service_pb2_grpc as admin_grpc
from facelane.v1 import analysis_service_pb2 as pb
from facelane.v1 import analysis_service_pb2_grpc as pb_grpc
from facelane.v1 import server_service_pb2 as server_pb
from facelane.v1 import server_service_pb2_grpc as server_grpc

STAGES = ("detector", "recognizer", "liveness")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = (
    "",
    "facelane.v1.AnalysisService",
    "facelane.v1.GalleryService",
    "facelane.process",
    *(f"facelane.pool.{stage}" for stage in STAGES),
)
RECOVERY_S = 60.0
RUN_IN_S = 0.2
"""Traffic before the fault and after the recovery."""
WINDOW = 32
JOB_TIMEOUT_MS = 2_000
MEMORY_GROWTH = 120 << 20
"""Bytes that the front process may grow by over all cells together."""


POOLS = {
    "plain": "",
    "spares": "spares = 1",
    "pairs": "workers = 2",
    "threads": 'isolation = "thread"',
}
"""Ways to host the pools."""


def configuration(folder: Path, pools: str = "plain") -> str:
    """Budgets wide enough that no cell ends in quarantine, times short enough to wait for."""
    return toml(
        folder,
        wire.pools(
            **{
                stage: f"""
job_timeout_ms = {JOB_TIMEOUT_MS}
ping_interval_s = 0.2
load_timeout_s = 15.0
backoff_initial_s = 0.02
backoff_max_s = 0.2
restart_limit = 1000
restart_window_s = 3.0
memory_mib = 400
{POOLS[pools]}
options = {{ "fail.from_file" = "{folder}/{stage}.toml" }}
"""
                for stage in STAGES
            }
        ),
        f"""
[limits]
window = {WINDOW}
slow_reader_s = 1.0
first_message_s = 3.0
max_streams = 64
# Nobody is refused for what a busy machine cannot carry: capacity has tests of its own.
min_fps = 0
""",
    )


@dataclass
class Site:
    """A server that lives through many cells, and what it held when all was calm: leaks of
    any cell add up against it."""

    server: RunningServer
    footprint: Footprint
    memory: int


@contextlib.contextmanager
def site(folder: Path, pools: str = "plain") -> Iterator[Site]:
    """A server whose workers commit what ``Cell.arm`` writes down for them."""
    with RunningServer(folder, configuration(folder, pools)) as server:
        server.wait_serving()
        made = Site(server, Footprint.of(server), 0)
        # What is made at first use (threads, descriptors of the gallery) is no leak.
        asyncio.run(_under_traffic(made, Fault("warm up", _calm, loses=False), "mixed", 0))
        made.footprint = Footprint.at_rest(server)
        made.memory = psutil.Process(server.process.pid).memory_info().rss
        yield made


async def _calm(_cell: Cell) -> None:
    await asyncio.sleep(0.3)  # some traffic without a fault


@dataclass
class HealthLog:
    """What ``Watch`` told of each service, with its time."""

    told: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def dips(self, service: str) -> int:
        return sum(status == NOT_SERVING for _, status in self.told[service])

    def first_dip_after(self, service: str, when: float) -> float | None:
        return next((t for t, s in self.told[service] if s == NOT_SERVING and t >= when), None)


class Cell:
    """What a fault may use: the server, a channel of its own, the pool that it aims at."""

    def __init__(
        self, server: RunningServer, channel: grpc.aio.Channel, stage: str, rng: random.Random
    ) -> None:
        self.server = server
        self.channel = channel
        self.stage = stage
        self.rng = rng
        self.health = HealthLog()
        self.stop = asyncio.Event()
        self.broken: list[str] = []
        self.extra: list[traffic.Books] = []
        self.held_s = 0.0
        """The longest that a call of no pool took since the probe began its picture."""
        self._admin = admin_grpc.AdminServiceStub(channel)
        self._server = server_grpc.ServerServiceStub(channel)
        self._analysis = pb_grpc.AnalysisServiceStub(channel)

    # -- what faults do ------------------------------------------------------------------

    @property
    def marker(self) -> Path:
        return self.server.folder / f"{self.stage}.fired"

    def arm(self, **values: str | int) -> None:
        """The faults of the stage's next process; none without values."""
        lines = "\n".join(f'{name} = "{value}"' for name, value in values.items())
        path = self.server.folder / f"{self.stage}.toml"
        fresh = path.with_suffix(".new")
        fresh.write_text(lines)
        fresh.replace(path)

    async def fire_once(self, **values: str | int) -> None:
        """Has a fresh worker commit the fault once, and waits until it has."""
        self.marker.unlink(missing_ok=True)
        self.arm(only_file=str(self.marker), **values)
        await self.restart()
        await auntil(self.marker.exists, RECOVERY_S, "the fault to be committed")
        self.arm()

    async def for_a_while(self, seconds: float, **values: str | int) -> None:
        """The fault is there for some time, then healed by a restart."""
        self.arm(**values)
        await self.restart()
        await asyncio.sleep(seconds)
        self.arm()
        await self.restart()

    async def restart(self) -> None:
        """All workers of the pool, by AdminService; one that is lost meanwhile, or not there,
        will do as well."""
        for worker in (await self.pool()).workers:
            with contextlib.suppress(grpc.RpcError):
                await self._admin.RestartWorker(
                    admin_pb.RestartWorkerRequest(worker_id=worker.worker_id), timeout=10.0
                )

    async def pools(self) -> list[server_pb.PoolInfo]:
        return list(
            (await self._server.ListPools(server_pb.ListPoolsRequest(), timeout=10.0)).pools
        )

    async def pool(self) -> server_pb.PoolInfo:
        return next(p for p in await self.pools() if p.pool == self.stage)

    async def worker_id(self) -> str:
        return str((await self.pool()).workers[0].worker_id)

    async def pid(self) -> int:
        """Of the stage's worker; waits for one."""

        async def found() -> int:
            return int((await self.pool()).workers[0].pid)

        return await auntil(found, RECOVERY_S, "a worker process")

    async def kill(self, number: int) -> int:
        pid = await self.pid()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return pid

    # -- what is looked at --------------------------------------------------------------

    async def picture(self, **options: bool) -> tuple[set[str], str]:
        """One picture: (missing stages, reason of the refusal or empty)."""
        request = pb.AnalyzeImageRequest(
            picture=wire.pb_picture(wire.encoded(96, 80, self.rng.randrange(4))),
            options=pb.AnalysisOptions(**options),  # type: ignore[arg-type]
        )
        try:
            result = (await self._analysis.AnalyzeImage(request, timeout=20.0)).result
        except grpc.RpcError as error:
            return set(), traffic.reason_of(error)
        return {traffic.STAGES[s] for s in result.missing_stages}, ""

    async def whole(self) -> bool:
        """Every stage answers, and every service says so."""
        if await self.picture() != (set(), ""):
            return False
        stub = health_pb2_grpc.HealthStub(self.channel)
        for service in SERVICES:
            request = health_pb2.HealthCheckRequest(service=service)
            if (await stub.Check(request, timeout=10.0)).status != SERVING:
                return False
        return True

    async def watch(self, service: str) -> None:
        stub = health_pb2_grpc.HealthStub(self.channel)
        request = health_pb2.HealthCheckRequest(service=service)
        log = self.health.told.setdefault(service, [])
        async for answer in stub.Watch(request):
            log.append((time.monotonic(), answer.status))

    async def probe(self) -> None:
        """Keeps every pool busy, and asks for what the fault must not touch: the stages
        before and beside the faulty one."""
        others = {
            "recognizer": {"skip_recognition": True},
            "liveness": {"skip_liveness": True},
        }.get(self.stage)
        while not self.stop.is_set():
            await self.picture()
            if others is not None:
                self.held_s = 0.0
                began = time.monotonic()
                missing, refusal = await self.picture(**others)
                took = time.monotonic() - began
                if missing or refusal:
                    self.broken.append(f"other pools: missing {missing}, refused {refusal!r}")
                # Whoever waits for the fault waits for the timeout of a job, or longer. What
                # needs no pool takes as long as this machine lets it: that is not judged.
                if took - self.held_s > 0.9 * JOB_TIMEOUT_MS / 1000:
                    self.broken.append(
                        f"other pools: a picture took {took:.2f} s, a call of no pool "
                        f"{self.held_s:.2f} s"
                    )
            await asyncio.sleep(0.03)  # the pace

    async def control(self) -> None:
        """What calls that need no pool take at the same time."""
        while not self.stop.is_set():
            began = time.monotonic()
            await self.pools()
            self.held_s = max(self.held_s, time.monotonic() - began)
            await asyncio.sleep(0.05)  # the pace

    async def bounds(self, streams: int) -> None:
        """Queues and streams never exceed what the config allows."""
        most = (streams + len(self.extra) + 4) * WINDOW + 256
        while not self.stop.is_set():
            for pool in await self.pools():
                if pool.queued + pool.in_flight > most:
                    self.broken.append(f"{pool.queued} queued, {pool.in_flight} in flight")
            await asyncio.sleep(0.1)  # the pace


@dataclass(frozen=True)
class Fault:
    """``act`` commits it and returns when it is over. ``errors``: reasons that frames of
    lossless streams may end with; ``stages``: the pools it can be aimed at, none = the
    server itself; ``loses``: a worker of the pool ends by it."""

    name: str
    act: Callable[[Cell], Awaitable[None]]
    errors: frozenset[str] = frozenset()
    stages: tuple[str, ...] = STAGES
    loses: bool = True
    gallery: frozenset[str] = frozenset()
    """Reasons that gallery calls may be refused with besides those of a missing pool."""
    detector: frozenset[str] = frozenset()
    """Further ``errors`` when it is the detector's."""
    stalls: bool = False
    """It holds up the whole server: others' times are not judged."""


LATE = frozenset({"POOL_UNAVAILABLE", "DEADLINE_EXCEEDED", "WORKER_LOST"})
"""What a frame with a deadline, or a caller who does not wait, may be told."""
GIVES_UP = frozenset({"POISONED", "OUT_OF_MEMORY", "INTERNAL"})
"""Of video: two workers ended, or failed, over one group of pictures. Else nothing ever waits for a
key frame: the group is decoded again."""
GALLERY = LATE | {"POOL_OVERLOADED"}


@dataclass(frozen=True)
class Footprint:
    descriptors: int
    children: int
    threads: int

    @classmethod
    def of(cls, server: RunningServer) -> Footprint:
        process = psutil.Process(server.process.pid)
        return cls(process.num_fds(), len(process.children(recursive=True)), process.num_threads())

    @classmethod
    def at_rest(cls, server: RunningServer) -> Footprint:
        """Once the connections of who has gone are closed: twenty times in a row the same."""
        seen: list[Footprint] = []

        def same() -> bool:
            seen.append(cls.of(server))
            return len(seen) >= 20 and len(set(seen[-20:])) == 1

        until(same, what="the server is at rest")
        return seen[-1]

    def within(self, before: Footprint) -> bool:
        # gRPC and the executor make their threads when they need them, up to their bounds,
        # and each of gRPC's polling threads has a descriptor.
        return (
            self.descriptors <= before.descriptors + 3
            and self.children <= before.children
            and self.threads <= before.threads + 8
        )


Patterns = dict[str, tuple[traffic.Pattern, ...]]
TRAFFIC: Patterns = {
    "one": (traffic.Pattern(tracking=False),),
    "sixteen": tuple(
        traffic.Pattern(pace_s=0.15, tracking=bool(n % 2), jumps=n == 3) for n in range(16)
    ),
    "file": (traffic.lossless(pace_s=0.01, tracking=False),),
    "video": (
        traffic.Pattern(video=True),
        traffic.Pattern(video=True, analyses=6.0),
        traffic.lossless(pace_s=0.02, video=True),
    ),
    "enrolments": (),
    "mixed": (
        traffic.Pattern(video=True),
        traffic.lossless(pace_s=0.06, video=True),
        traffic.Pattern(pace_s=0.06),
        traffic.Pattern(pace_s=0.06, tracking=False),
        traffic.lossless(pace_s=0.04, tracking=False),
        traffic.lossless(pace_s=0.08, jumps=True),
    ),
}
ENROLLING = frozenset({"enrolments", "mixed"})


@contextlib.asynccontextmanager
async def connection(server: RunningServer) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(server.target, options=options) as channel:
        yield channel


async def run(place: Site, fault: Fault, load: str, seed: int) -> list[str]:
    """Runs a cell; what broke."""
    broken = await _under_traffic(place, fault, load, seed)
    server, before = place.server, place.footprint
    with contextlib.suppress(AssertionError):
        await auntil(lambda: Footprint.of(server).within(before))
    after = Footprint.of(server)
    if not after.within(before):
        broken.append(f"left behind: {before} became {after}")
    if server.process.poll() is not None:
        broken.append("the server ended")
    return broken


async def _under_traffic(place: Site, fault: Fault, load: str, seed: int) -> list[str]:
    """What broke while the fault was done."""
    server = place.server
    rng = random.Random(f"{fault.name}/{load}/{seed}")
    stage = fault.stages[seed % len(fault.stages)] if fault.stages else ""
    async with connection(server) as channel:
        cell = Cell(server, channel, stage, rng)
        watchers = [asyncio.create_task(cell.watch(service)) for service in SERVICES]
        own = [traffic.Books(f"{load} {n}") for n in range(len(TRAFFIC[load]))]
        streams = [
            asyncio.create_task(
                traffic.stream(channel, p, cell.stop, rng.randrange(10**6), book.name, books=book)
            )
            for book, p in zip(own, TRAFFIC[load], strict=True)
        ]
        # Subjects are named after the moment: cells share one gallery.
        clerks = [
            asyncio.create_task(
                traffic.enrolments(channel, cell.stop, time.monotonic_ns(), f"clerk-{n}")
            )
            for n in range(2 if load == "enrolments" else load in ENROLLING)
        ]
        probes = [asyncio.create_task(cell.bounds(len(streams)))]
        if not fault.stalls:
            probes += [asyncio.create_task(cell.probe()), asyncio.create_task(cell.control())]
        try:
            await auntil(lambda: all(cell.health.told.get(s) for s in SERVICES))
            await asyncio.sleep(RUN_IN_S)
            await fault.act(cell)
            await auntil(cell.whole, RECOVERY_S, "a whole result and SERVING everywhere")
            await asyncio.sleep(RUN_IN_S)
            # A busy machine takes longer to give each stream one.
            with contextlib.suppress(AssertionError):
                await auntil(lambda: all(book.results or book.ended for book in own), RECOVERY_S)
        finally:
            cell.stop.set()
        books = [*cell.extra, *await asyncio.wait_for(asyncio.gather(*streams), RECOVERY_S)]
        ledgers = await asyncio.wait_for(asyncio.gather(*clerks), RECOVERY_S)
        await asyncio.wait_for(asyncio.gather(*probes), RECOVERY_S)
        for ledger in ledgers:
            cell.broken += await traffic.audit(channel, ledger)
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
        _judge(cell, fault, books, ledgers, TRAFFIC[load])
    return cell.broken


def _judge(
    cell: Cell,
    fault: Fault,
    books: list[traffic.Books],
    ledgers: list[traffic.Ledger],
    patterns: tuple[traffic.Pattern, ...],
) -> None:
    broken = cell.broken
    errors = fault.errors | (fault.detector if cell.stage == "detector" else frozenset())
    own = books[len(cell.extra) :]
    for book in books:
        broken += [f"{book.name}: {what}" for what in book.broken]
    for book, pattern in zip(own, patterns, strict=True):
        if book.ended:
            broken.append(f"{book.name}: ended by {book.ended}")
        allowed = errors | (frozenset() if pattern.lossless else LATE)
        if set(book.errors) - allowed:
            broken.append(f"{book.name}: errors {dict(book.errors)}")
        given_up = set() if pattern.lossless else {"SUPERSEDED", "TOO_OLD", "THINNED"}
        if pattern.video and fault.errors & GIVES_UP:
            given_up.add("WAITING_FOR_KEY_FRAME")
        if set(book.drops) - given_up:
            broken.append(f"{book.name}: drops {dict(book.drops)}")
        # Behind a server that stood still a deadline may have passed between two stages.
        spared = set() if fault.stalls else set(book.missing) - {cell.stage}
        if spared:
            broken.append(f"{book.name}: missing {dict(book.missing)}")
        if not book.results:
            broken.append(f"{book.name}: not one result")
    for ledger in ledgers:
        if set(ledger.refusals) - GALLERY - errors - fault.gallery:
            broken.append(f"enrolments refused: {dict(ledger.refusals)}")
        if not ledger.templates and not ledger.deleted:
            broken.append("nobody was enrolled")
    for stage in STAGES:
        dips = cell.health.dips(f"facelane.pool.{stage}")
        if stage != cell.stage and dips:
            broken.append(f"health: {stage} dipped, which the fault does not touch")
        if stage == cell.stage and fault.loses and not dips:
            broken.append(f"health: {stage} lost its only worker and stayed SERVING")
    if cell.health.dips("facelane.process"):
        broken.append("health: the process was told dead")
    # The whole is no better than its parts.
    if cell.stage and cell.health.dips(f"facelane.pool.{cell.stage}") and not cell.health.dips(""):
        broken.append("health: the whole stayed SERVING")
