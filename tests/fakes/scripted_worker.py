"""A worker that does what the test says, and a clock that stands still.

The worker speaks the real protocol over a real channel and real arenas; only its process
and its model are missing. So the pool's decisions can be tested one by one, without
waiting for anything.
"""

from __future__ import annotations

import asyncio
import heapq
import signal
import socket
import struct
from collections.abc import Callable
from itertools import count
from pathlib import Path

from facelane_server import limits
from facelane_server.ipc.arena import Arena
from facelane_server.ipc.channel import ChannelClosed, WorkerChannel, close_all, socket_pair
from facelane_server.ipc.messages import (
    PROTOCOL,
    Cancel,
    DetectDone,
    DetectItem,
    Drain,
    Drained,
    GalleryLoaded,
    GallerySnapshot,
    Hello,
    Infer,
    InferDone,
    InferFailed,
    ItemDone,
    LivenessDone,
    Load,
    Ping,
    Pong,
    Ready,
    ToWorker,
    Warming,
)
from facelane_server.models.package import read_package
from facelane_server.pools.host import Link


class ManualTimer:
    def __init__(self, when_ns: int, callback: Callable[[], None]) -> None:
        self.when_ns = when_ns
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class ManualClock:
    """Time moves only by ``advance``."""

    def __init__(self) -> None:
        self._now = 1_000_000_000
        self._timers: list[tuple[int, int, ManualTimer]] = []
        self._order = count()

    def now_ns(self) -> int:
        return self._now

    def call_at(self, when_ns: int, callback: Callable[[], None]) -> ManualTimer:
        timer = ManualTimer(when_ns, callback)
        heapq.heappush(self._timers, (when_ns, next(self._order), timer))
        return timer

    @property
    def armed(self) -> int:
        return sum(not timer.cancelled for _, _, timer in self._timers)

    async def advance(self, milliseconds: float) -> None:
        """Run what is due on the way, and let the loop do what follows from it."""
        end = self._now + int(milliseconds * 1e6)
        while self._timers and self._timers[0][0] <= end:
            when, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, when)
            if not timer.cancelled:
                timer.callback()
                await settle()
        self._now = end
        await settle()

    def leap(self, milliseconds: float) -> None:
        """The process stood still: all that is due runs at once, late, and before anything
        that came meanwhile is read."""
        self._now += int(milliseconds * 1e6)
        due = [heapq.heappop(self._timers)[2] for _ in list(self._timers) if self._is_due()]
        for timer in due:
            if not timer.cancelled:
                timer.callback()

    def _is_due(self) -> bool:
        return bool(self._timers) and self._timers[0][0] <= self._now


async def settle(turns: int = 12) -> None:
    """Let the loop run until nothing is left to do that does not wait for the test."""
    for _ in range(turns):
        await asyncio.sleep(0)


class ScriptedWorker:
    """The worker's end of one life. Also its ``Link``."""

    polite = True

    def __init__(self, worker_id: str, pid: int) -> None:
        self.worker_id = worker_id
        self.pid = pid
        self.exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self.signals: list[signal.Signals] = []
        self.sock, theirs = socket_pair()
        self.channel: WorkerChannel | None = WorkerChannel(theirs)
        self.load: Load | None = None
        self.jobs: list[Infer] = []
        self.cancelled: list[int] = []
        self.snapshots: list[int] = []
        self.draining = False
        self.obeys_sigkill = True
        self.answers_pings = True
        self.is_halted = False
        self._request: Arena | None = None
        self._response: Arena | None = None

    # -- what the pool does to it

    def signal(self, number: signal.Signals) -> None:
        self.signals.append(number)
        if number is signal.SIGKILL and self.obeys_sigkill:
            self.die(-9)

    def halted(self) -> bool:
        return self.is_halted

    def release(self) -> None:
        self.die(0)

    # -- what the test has it do

    def read(self) -> None:
        """Take in what the pool has sent."""
        while self.channel is not None:
            try:
                received = self.channel.receive(0)
            except ChannelClosed:
                return
            if received is None:
                return
            message, descriptors = received
            self._take(message, descriptors)

    def _take(self, message: ToWorker, descriptors: list[int]) -> None:
        if isinstance(message, Load):
            self.load = message
            sizes = (message.request_slot_bytes, message.response_slot_bytes)
            self._request, self._response = (
                Arena(fd, message.slots, size, writable=True)
                for fd, size in zip(descriptors, sizes, strict=True)
            )
        elif isinstance(message, Infer):
            self.jobs.append(message)
        elif isinstance(message, Cancel):
            self.cancelled.append(message.job_id)
        elif isinstance(message, GallerySnapshot):
            close_all(descriptors)
            self.snapshots.append(message.version)
        elif isinstance(message, Ping):
            if self.answers_pings:
                self.say(Pong(message.sequence))
        elif isinstance(message, Drain):
            self.draining = True

    def say(self, *messages: object) -> None:
        assert self.channel is not None
        for message in messages:
            self.channel.send(message)  # type: ignore[arg-type]

    def answer(self, score: float = 1.0, *, memory_mib: int = 0) -> Infer:
        """Answer the oldest job."""
        job = self.jobs.pop(0)
        done: list[ItemDone] = [
            DetectDone(item.width or 64, item.height or 64, 0, 0, 0)
            if isinstance(item, DetectItem)
            else LivenessDone(score)
            for item in job.items
        ]
        self.say(InferDone(job.job_id, done, memory_mib))
        return job

    def find_a_face(self) -> Infer:
        """Answer the oldest job, of one picture, with a face."""
        job = self.jobs.pop(0)
        assert self._response is not None
        numbers = [1.0] * limits.FACE_FLOATS
        face = struct.pack(f"{len(numbers)}f", *numbers) + b"s" * limits.SIGNATURE_BYTES
        self._response.slot(job.slot)[: len(face)] = face
        self.say(InferDone(job.job_id, [DetectDone(64, 64, 1, 0, len(face))], 0))
        return job

    def fail(self, reason: str, *, retryable: bool = False) -> Infer:
        job = self.jobs.pop(0)
        self.say(InferFailed(job.job_id, reason, "scripted", retryable))
        return job

    def write(self, job: Infer, part: bytes) -> None:
        """Of its answer, which is not given yet."""
        assert self._response is not None
        self._response.slot(job.slot)[: len(part)] = part

    def slots(self) -> list[bytes]:
        """What is in them, of requests and then of responses, but for zeros at the end."""
        return [
            bytes(arena.slot(slot)).rstrip(b"\0")
            for arena in (self._request, self._response)
            if arena is not None
            for slot in range(arena.slots)
        ]

    def load_gallery(self) -> None:
        self.say(GalleryLoaded(self.snapshots[-1]))

    async def hello(self) -> None:
        self.say(Hello(PROTOCOL))
        await settle()
        self.read()
        assert self.load is not None

    @property
    def model_id(self) -> str:
        """Of the package that it was told to load."""
        assert self.load is not None
        return read_package(Path(self.load.package)).model_id

    async def become_ready(
        self,
        *,
        model_id: str = "",
        memory_mib: int = 0,
        batch_max: int = 0,
        device: str = "cpu",
    ) -> None:
        """All the way to READY, the canary answered."""
        await self.hello()
        assert self.load is not None
        batch_max = batch_max or self.load.batch_max or 8
        self.say(
            Warming(1.0),
            Ready(
                model_id or self.model_id, 1.0, 1.0, 0.1, memory_mib, device, batch_max=batch_max
            ),
        )
        await settle()
        self.read()
        self.answer()
        await settle()
        self.read()
        if self.snapshots:
            self.load_gallery()
            await settle()

    def leave(self) -> None:
        """Exit as a worker does that was drained."""
        self.say(Drained())
        self.die(0)

    def die(self, code: int) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        for arena in (self._request, self._response):
            if arena is not None:
                arena.close()
        self._request = self._response = None
        if not self.exited.done():
            self.exited.set_result(code)


class ScriptedLauncher:
    """Makes scripted workers; ``workers`` in the order of their launch."""

    def __init__(self) -> None:
        self.workers: list[ScriptedWorker] = []
        self.refuse = False
        self.nice: list[int] = []

    def register(self, worker_id: str) -> None:
        pass

    async def launch(
        self,
        worker_id: str,
        nice: int = 0,
        folder: object = None,
    ) -> Link:
        self.nice.append(nice)
        if self.refuse:
            raise OSError(12, "scripted")
        worker = ScriptedWorker(worker_id, 1000 + len(self.workers))
        self.workers.append(worker)
        return worker

    def may_read(self, folder: Path) -> bool:
        return True

    async def close(self) -> None:
        for worker in self.workers:
            worker.die(0)
            _close(worker.sock)


def _close(sock: socket.socket) -> None:
    sock.close()
