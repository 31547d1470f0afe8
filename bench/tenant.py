"""One model that shares a card with others: ``python -m bench.tenant JOB.json``.

A tenant owns a pool with one worker and asks it for work, in a process of its own, so that
one tenant's load costs another nothing but the device. It prints one JSON line when it is
ready, then answers each command line on stdin with one JSON line, until stdin ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from bench.stats import percentile
from facelane_server import config
from facelane_server.domain import Encoding, Picture, Stage
from facelane_server.models.package import Package, read_package
from facelane_server.pools.host import Launchers, Link
from facelane_server.pools.pool import Pool
from facelane_server.pools.restart import Life
from facelane_server.pools.tasks import (
    DetectRequest,
    EmbedRequest,
    LivenessRequest,
    Request,
    Task,
)

SPIN_S = 0.002
"""The event loop's timers are a millisecond coarse; the rest of a wait is spun."""
DEADLINE_S = 20.0


@dataclass(frozen=True, slots=True)
class Job:
    """``crops_of``: packages whose crops a detector cuts. ``channel``: descriptor of the
    channel to a thread of the process ``pid``, or -1: start a worker."""

    stage: str
    package: str
    settings: dict[str, Any]
    start_s: float
    side: int = 64
    crops_of: list[str] = field(default_factory=list)
    mps_pipe_directory: str = ""
    channel: int = -1
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Command:
    """``rate_hz`` 0: as fast as it goes, ``in_flight`` at a time. ``start_at``: on the
    monotonic clock, which all tenants share."""

    start_at: float
    seconds: float
    rate_hz: float = 0.0
    in_flight: int = 1


class _Thread:
    """A thread of a worker process that somebody else started."""

    polite = False

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self.sock = sock
        self.pid = pid
        self.exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self.release)

    def signal(self, number: signal.Signals) -> None:
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def halted(self) -> bool:
        return False

    def release(self) -> None:
        if not self.exited.done():
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self.exited.set_result(0)


class _ThreadLauncher:
    def __init__(self, channel: int, pid: int) -> None:
        self._channel = channel
        self._pid = pid

    def register(self, worker_id: str) -> None:
        pass

    async def launch(self, worker_id: str, nice: int = 0, folder: object = None) -> Link:  # noqa: ARG002 - there is one
        if self._channel < 0:
            raise OSError("a thread is launched once")
        sock = socket.socket(fileno=self._channel)
        self._channel = -1
        return _Thread(sock, self._pid)

    def may_read(self, folder: Path) -> bool:  # noqa: ARG002 - a thread of this process
        return True

    async def close(self) -> None:
        pass


def request_for(stage: Stage, package: Package, side: int) -> Request:
    """The same every time. A detector's picture is small and raw, so that neither decoding
    nor copying limits it: the network's input is as large as for any other."""
    grey = [b"\x60" * (crop.size * crop.size * 3) for crop in package.crops]
    if stage is Stage.DETECTOR:
        picture = Picture(Encoding.BGR24, b"\x60" * (side * side * 3), side, side, side * 3)
        return DetectRequest(picture, max_faces=4, max_pixels=16_000_000)
    return EmbedRequest(grey[0]) if stage is Stage.RECOGNIZER else LivenessRequest(tuple(grey))


class Tenant:
    """A pool, and one request that is made of it again and again."""

    def __init__(self, pool: Pool, request: Request) -> None:
        self._pool = pool
        self._request = request
        self._number = 0

    def _ask(self, done: Callable[[float, str], None]) -> None:
        """``done``: when it was answered, and the reason of a failure (else empty)."""
        self._number += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        task: Task[Any] = Task(
            self._request,
            self._number % 8,
            1,
            time.monotonic_ns() + int(DEADLINE_S * 1e9),
            future,
        )

        def answered(future: asyncio.Future[Any]) -> None:
            error = None if future.cancelled() else future.exception()
            done(time.monotonic(), "" if error is None else str(getattr(error, "reason", error)))

        future.add_done_callback(answered)
        self._pool.submit(task)

    async def run(self, command: Command) -> dict[str, Any]:
        """Durations from the moment an answer was due to be asked for."""
        end = command.start_at + command.seconds
        seconds: list[float] = []
        failed: dict[str, int] = {}
        open_calls = 0
        idle = asyncio.Event()

        def ask(due: float) -> None:
            nonlocal open_calls
            open_calls += 1
            idle.clear()

            def done(at: float, reason: str) -> None:
                nonlocal open_calls
                open_calls -= 1
                if reason:
                    failed[reason] = failed.get(reason, 0) + 1
                elif command.rate_hz or at <= end:
                    seconds.append(at - due)
                if not command.rate_hz and at < end:
                    ask(at)
                elif open_calls == 0:
                    idle.set()

            self._ask(done)

        if command.rate_hz:
            for index in range(max(2, round(command.seconds * command.rate_hz))):
                due = command.start_at + index / command.rate_hz
                await _until(due)
                ask(due)
        else:
            await _until(command.start_at)
            for _ in range(command.in_flight):
                ask(time.monotonic())
        if open_calls:
            await asyncio.wait_for(idle.wait(), command.seconds + DEADLINE_S + 5.0)
        return {
            "p50_ms": percentile(seconds, 50) * 1e3,
            "p99_ms": percentile(seconds, 99) * 1e3,
            "max_ms": max(seconds, default=float("nan")) * 1e3,
            "throughput_per_s": len(seconds) / command.seconds,
            "count": len(seconds),
            "failed": failed,
            "worker_memory_mib": sum(w.memory_mib for w in self._pool.info().workers),
            "losses": self._pool.info().losses,
            "restarts": sum(w.restarts for w in self._pool.info().workers),
        }


async def _until(due: float) -> None:
    delay = due - time.monotonic() - SPIN_S
    if delay > 0:
        await asyncio.sleep(delay)
    while time.monotonic() < due:
        await asyncio.sleep(0)


async def serve(job: Job) -> None:
    """Start, say so, obey, stop."""
    stage = Stage(job.stage)
    package = read_package(Path(job.package))
    settings = config.Pool(**{**job.settings, "devices": tuple(job.settings["devices"])})
    crops = tuple(crop for folder in job.crops_of for crop in read_package(Path(folder)).crops)
    with tempfile.TemporaryDirectory(prefix="facelane-bench-") as scratch:
        pipes = Path(job.mps_pipe_directory) if job.mps_pipe_directory else None
        launchers = Launchers(Path(scratch), mps_pipe_directory=pipes)
        launcher = (
            _ThreadLauncher(job.channel, job.pid)
            if job.channel >= 0
            else launchers.for_pool(stage, settings)
        )
        pool = Pool(
            stage, settings, package, launcher, crops=crops if stage is Stage.DETECTOR else ()
        )
        await pool.start()
        try:
            if not (await pool.wait_ready(job.start_s) and await _all_ready(pool, job.start_s)):
                reasons = [w.last_loss or w.life.value for w in pool.info().workers]
                raise RuntimeError(f"the {stage} worker is not ready: {', '.join(reasons)}")
            _say({"ready": True, "pids": [w.pid for w in pool.info().workers]})
            tenant = Tenant(pool, request_for(stage, package, job.side))
            gc.collect()
            gc.freeze()
            while line := await asyncio.to_thread(sys.stdin.readline):
                _say(await tenant.run(Command(**json.loads(line))))
        finally:
            await pool.stop(1.0)
            await launchers.close()


async def _all_ready(pool: Pool, timeout_s: float) -> bool:
    """The spares too: their start is no part of what is measured."""
    deadline = time.monotonic() + timeout_s
    while any(worker.life is not Life.READY for worker in pool.info().workers):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        asyncio.run(serve(Job(**json.loads(Path(sys.argv[1]).read_text()))))
    except Exception as error:  # whatever it is, the bench shall read it
        _say({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)
