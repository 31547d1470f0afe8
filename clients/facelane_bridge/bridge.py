"""The bridge: every camera with its own reader, its own state and its own stream.

::

    reader thread ──▶ Handover ──▶ sender ──▶ SDK stream ──▶ receiver ──▶ Output
    (Source, JPEG)    (1 newest)   task       (window)       task         (bounded)
          ▲                                                     │
          └── opened, fenced and given up by the life task ◀────┘ counters

One event loop serves all cameras. A camera that fails, hangs or floods touches nobody
else: its thread is its own, and what it may hold is bounded by ``Handover``, the
stream's window and the output's queue. A reader thread that hangs inside a driver
cannot be killed; it is fenced off and forgotten, at most ``MAX_HUNG_READERS`` of them a
camera, and reopened behind its back.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import structlog

import facelane
from facelane import aio
from facelane.transport import checked_token
from facelane_bridge import notify
from facelane_bridge.camera import CameraState
from facelane_bridge.config import BridgeSettings, ConfigError, ServerSettings
from facelane_bridge.metrics import serve_metrics
from facelane_bridge.output import (
    CameraTotals,
    Line,
    Output,
    OutputClosedError,
    Selection,
    SummaryLine,
    merge,
)
from facelane_bridge.runner import DRAIN_TIMEOUT, CameraRunner, OpenSource
from facelane_bridge.sources import open_source

log = structlog.get_logger("facelane_bridge")

OUTPUT_PATIENCE = DRAIN_TIMEOUT + 1.0
"""Seconds from the order to stop for which a line waits for whoever reads the lines. With
the times above and the output's own it stays below the 20 s that systemd gives."""
CAMERAS_PER_CONNECTION = 64
"""A server bounds the streams of one connection; the next would wait without a word."""
CONNECT_TIMEOUT = 10.0
RESTART_PAUSE = 120.0
"""Seconds that a service whose cameras failed for good stays before it ends, to be started
again: often enough for a camera that comes right, seldom enough for its account."""


@dataclass(frozen=True, slots=True)
class BridgeReport:
    """What a run came to."""

    summary: SummaryLine
    failed: tuple[str, ...]
    """Cameras that ended FAILED."""
    server_failed: bool
    """A camera was given up because the server was absent for too long, or refused it."""
    output_closed: bool


class Bridge:
    """Runs every camera of the settings until they end or ``stop`` is called.

    ``random_unit`` and ``open_source`` are there to be replaced in tests.
    """

    def __init__(
        self,
        settings: BridgeSettings,
        output: Output,
        *,
        random_unit: Callable[[], float] = random.random,
        open_source: OpenSource = open_source,
        restart_pause: float = 0.0,
    ) -> None:
        self._settings = settings
        self._output = output
        self._random_unit = random_unit
        self._open_source = open_source
        self._restart_pause = restart_pause
        self._selection = Selection(settings.results)
        self._stopping = asyncio.Event()
        self._output_closed = False
        self._emitting: set[asyncio.Timeout] = set()
        self._emit_until: float | None = None
        self._runners: list[CameraRunner] = []

    def stop(self) -> None:
        """End all cameras; ``run`` returns when the frames on their way have their outcomes."""
        self._stopping.set()
        if self._emit_until is None:
            # From now on nobody waits for ever for whoever reads the lines.
            self._emit_until = asyncio.get_running_loop().time() + OUTPUT_PATIENCE
            for limit in self._emitting:
                limit.reschedule(self._emit_until)
        for runner in self._runners:
            runner.stop()

    @property
    def totals(self) -> dict[str, CameraTotals]:
        """Every camera's counters as they are now."""
        return {runner.name: runner.totals() for runner in self._runners}

    async def run(self) -> BridgeReport:
        """Run to the end. Raises ``ConfigError`` when the server's credentials cannot be read."""
        cameras = self._settings.cameras
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._output)
            clients = [
                await stack.enter_async_context(new_client(self._settings.server))
                for _ in range(0, len(cameras), CAMERAS_PER_CONNECTION)
            ]
            self._runners = [
                CameraRunner(
                    camera,
                    self._settings.server,
                    clients[number // CAMERAS_PER_CONNECTION],
                    self._emit,
                    self._random_unit,
                    self._open_source,
                )
                for number, camera in enumerate(cameras)
            ]
            if self._stopping.is_set():
                self.stop()
            stack.enter_context(serve_metrics(self._settings.metrics, self._snapshot))
            return await self._run()

    async def _snapshot(self) -> dict[str, CameraTotals]:
        return self.totals

    async def _run(self) -> BridgeReport:
        notify.notify("READY=1")
        background = [
            asyncio.create_task(self._report_status(), name="status"),
            asyncio.create_task(self._feed_watchdog(), name="watchdog"),
        ]
        try:
            async with asyncio.TaskGroup() as group:
                for runner in self._runners:
                    group.create_task(runner.run(), name=f"camera {runner.name}")
            await self._pause()
        finally:
            notify.notify("STOPPING=1")
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
        summary = merge(self.totals)
        await self._emit(summary)
        return BridgeReport(
            summary=summary,
            failed=tuple(r.name for r in self._runners if r.state is CameraState.FAILED),
            server_failed=any(r.server_failed for r in self._runners),
            output_closed=self._output_closed,
        )

    async def _pause(self) -> None:
        """Before the service manager starts again what failed."""
        failed = [runner.name for runner in self._runners if runner.state is CameraState.FAILED]
        if not failed or not self._restart_pause or self._stopping.is_set():
            return
        pause = self._restart_pause
        log.warning("failed for good; ends soon, to be started again", cameras=failed, in_s=pause)
        notify.notify(f"STATUS=failed: {', '.join(failed)}; ends in {pause:g} s to start again")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._stopping.wait()

    async def _emit(self, line: Line) -> None:
        if self._output_closed or not self._selection.wants(line):
            return
        try:
            async with asyncio.timeout_at(self._emit_until) as limit:
                self._emitting.add(limit)
                try:
                    await self._output.emit(line)
                finally:
                    self._emitting.discard(limit)
        except OutputClosedError:
            self._give_up_output("output closed", "whoever read the results has gone")
        except TimeoutError:
            self._give_up_output("output stuck", "whoever reads the results reads no further")

    def _give_up_output(self, event: str, hint: str) -> None:
        if not self._output_closed:
            self._output_closed = True
            log.error(event, hint=hint)
            self.stop()

    async def _report_status(self) -> None:
        while True:
            await asyncio.sleep(self._settings.status_interval)
            states = Counter(runner.state.value for runner in self._runners)
            cameras = ", ".join(f"{n} {state}" for state, n in states.items())
            away = "" if all(runner.connected for runner in self._runners) else "; server away"
            notify.notify(f"STATUS={cameras}{away}")
            for runner in self._runners:
                totals = runner.totals()
                log.info(
                    "camera status",
                    camera=runner.name,
                    state=totals.state,
                    connected=runner.connected,
                    frames=totals.frames,
                    results=totals.results,
                    drops=totals.drops,
                    errors=totals.errors,
                    p50_ms=totals.p50_ms,
                    p99_ms=totals.p99_ms,
                    openings=totals.openings,
                )

    async def _feed_watchdog(self) -> None:
        # The loop itself says that it is alive; a stuck loop says nothing.
        interval = notify.watchdog_interval()
        while interval is not None:
            notify.notify("WATCHDOG=1")
            await asyncio.sleep(interval)


def _read_key(path: str) -> str:
    with open(path, encoding="utf-8-sig") as file:
        key = file.read(8192).strip()
    if not key:
        raise ConfigError(f"{path} is empty; it has to hold the key")
    return key


def new_client(server: ServerSettings) -> aio.Client:
    """A client for the server that the settings name. Raises ``ConfigError``."""
    token: str | Callable[[], str] | None = None
    if server.token_env:
        token = os.environ.get(server.token_env)
        if not token:
            raise ConfigError(f"the environment variable {server.token_env} is not set")
    try:
        if server.token_file:
            # Read again whenever the server refuses the key: keys change while a bridge runs.
            checked_token(_read_key(server.token_file))
            token = functools.partial(_read_key, server.token_file)
        tls = None
        if server.tls_ca:
            tls = facelane.Tls(
                ca_file=server.tls_ca,
                cert_file=server.tls_cert or None,
                key_file=server.tls_key or None,
                server_name=server.tls_server_name or None,
            )
        # Whoever waits a second for an absent server does not want ten for the first try.
        patience = min(CONNECT_TIMEOUT, max(1.0, server.wait)) if server.wait else CONNECT_TIMEOUT
        client = aio.Client(
            server.target, token=token, tls=tls, timeout=patience, proxy=server.proxy
        )
        if server.traces:
            client.tracing = facelane.tracing.Tracing.to(
                server.traces, ratio=server.trace_ratio, service="facelane-bridge"
            )
        return client
    except ImportError as error:
        raise ConfigError(f"in [server]: {error}") from None
    except OSError as error:
        name = error.filename or "a file of [server]"
        raise ConfigError(f"{name} cannot be read ({error.strerror})") from None
    except facelane.ArgumentError as error:
        raise ConfigError(f"in [server]: {error.message}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{server.token_file} is no text; it has to hold the key") from None


async def check_server(server: ServerSettings) -> str:
    """The server's health in one word, or why it cannot be asked."""
    async with new_client(server) as client:
        try:
            return str(await client.health())
        except facelane.FacelaneError as error:
            return f"{error.reason}: {error.message}"
