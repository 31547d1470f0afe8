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
import math
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

import facelane
from facelane import aio
from facelane_bridge import notify
from facelane_bridge.camera import (
    Action,
    Camera,
    CameraState,
    Event,
    FrameArrived,
    HeldBack,
    Policy,
    SourceEnded,
    SourceFailed,
    Stop,
    Tick,
    backoff_delay,
    deadline,
    start,
    step,
)
from facelane_bridge.config import BridgeSettings, CameraSettings, ConfigError, ServerSettings
from facelane_bridge.handover import Handover, NumberedFrame
from facelane_bridge.output import (
    CameraTotals,
    DropLine,
    ErrorLine,
    Line,
    Output,
    OutputClosedError,
    ResultLine,
    StateLine,
    SummaryLine,
    UpdateLine,
    face_line,
    merge,
    now_utc,
    percentile,
    utc,
)
from facelane_bridge.sources import Source, SourceError, SourceInfo, SourceReason, open_source

log = structlog.get_logger("facelane_bridge")

LATENCIES_KEPT = 20_000
"""For the percentiles: the newest, 13 minutes of 25 frames/s."""
UPDATES_KEPT = 256
MAX_HUNG_READERS = 3
SEND_PATIENCE = 0.5
"""Seconds that a live frame may wait for room in the window before a newer one goes."""
DRAIN_TIMEOUT = 10.0
"""Seconds for the outcomes of frames on their way when a camera ends."""
OUTPUT_PATIENCE = DRAIN_TIMEOUT + 1.0
"""Seconds from the order to stop for which a line waits for whoever reads the lines. With
the times above and the output's own it stays below the 20 s that systemd gives."""
READER_EXIT_TIMEOUT = 2.0
SERVER_BACKOFF = Policy(backoff_initial=0.25, backoff_max=10.0)
CONNECT_TIMEOUT = 10.0
HEALTH_TIMEOUT = 2.0
CONNECT_HINT = 2.0
"""After so long somebody who watches wants to know what is waited for."""

OpenSource = Callable[[CameraSettings], Source]


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
    ) -> None:
        self._settings = settings
        self._output = output
        self._random_unit = random_unit
        self._open_source = open_source
        self._stopping = asyncio.Event()
        self._output_closed = False
        self._emitting: set[asyncio.Timeout] = set()
        self._emit_until: float | None = None
        self._runners: list[_CameraRunner] = []

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
        async with new_client(self._settings.server) as client, self._output:
            self._runners = [
                _CameraRunner(
                    camera,
                    self._settings.server,
                    client,
                    self._emit,
                    self._random_unit,
                    self._open_source,
                )
                for camera in self._settings.cameras
            ]
            if self._stopping.is_set():
                self.stop()
            notify.notify("READY=1")
            background = [
                asyncio.create_task(self._report_status(), name="status"),
                asyncio.create_task(self._feed_watchdog(), name="watchdog"),
            ]
            try:
                async with asyncio.TaskGroup() as group:
                    for runner in self._runners:
                        group.create_task(runner.run(), name=f"camera {runner.name}")
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

    async def _emit(self, line: Line) -> None:
        if self._output_closed:
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


def new_client(server: ServerSettings) -> aio.Client:
    """A client for the server that the settings name. Raises ``ConfigError``."""
    token: str | None = None
    if server.token_env:
        token = os.environ.get(server.token_env)
        if not token:
            raise ConfigError(f"the environment variable {server.token_env} is not set")
    try:
        if server.token_file:
            with open(server.token_file, encoding="utf-8") as file:
                token = file.read(8192).strip()
            if not token:
                raise ConfigError(f"{server.token_file} is empty; it has to hold the key")
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
        return aio.Client(server.target, token=token, tls=tls, timeout=patience)
    except OSError as error:
        name = error.filename or "a file of [server]"
        raise ConfigError(f"{name} cannot be read ({error.strerror})") from None
    except facelane.ArgumentError as error:
        raise ConfigError(f"in [server]: {error.message}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{server.token_file} is no text; it has to hold the key") from None


class _Reader:
    """One opening of a camera: a thread that reads until it ends, fails or is fenced off."""

    def __init__(
        self, source: Source, handover: Handover, report: Callable[[_Reader, _Said], None]
    ) -> None:
        self.source = source
        self._handover = handover
        self._report = report
        self.thread = threading.Thread(target=self._run, name="camera reader", daemon=True)

    def _run(self) -> None:
        try:
            try:
                self._report(self, self.source.open())
                while (frame := self.source.read()) is not None:
                    if not self._handover.offer(self, frame):
                        return
                self._report(self, _ENDED)
            finally:
                self.source.close()
        except SourceError as error:
            self._report(self, error)
        except Exception as error:
            # A fault of ours or of a driver: this camera tries again, the others go on.
            self._report(self, _broke(error))


def _broke(error: Exception) -> SourceError:
    """What nobody foresaw; its text may repeat an address, so its kind alone is told."""
    kind = type(error).__name__
    return SourceError(SourceReason.CONNECT_FAILED, f"the reader broke ({kind})")


class _Ended:
    """The source gave its last frame."""


_ENDED = _Ended()
_Said = SourceInfo | SourceError | _Ended


class _CameraRunner:
    """One camera from its first opening to its end, over any number of reconnections."""

    def __init__(
        self,
        settings: CameraSettings,
        server: ServerSettings,
        client: aio.Client,
        emit: Callable[[Line], Awaitable[None]],
        random_unit: Callable[[], float],
        open_source: OpenSource,
    ) -> None:
        self.name = settings.name
        self.server_failed = False
        self._settings = settings
        self._server = server
        self._client = client
        self._emit = emit
        self._random_unit = random_unit
        self._open_source = open_source
        self._policy = settings.policy
        self._log = log.bind(camera=settings.name)

        self._loop = asyncio.get_running_loop()
        self._handover = Handover(self._loop, lossless=settings.is_lossless)
        self._wake = asyncio.Event()
        self._handover.watch(self._wake)
        self._stream: aio.AnalyzeStream | None = None
        self._awaited = False
        self._connections_before = 0
        self._stopped = asyncio.Event()
        self._camera: Camera | None = None
        self._reader: _Reader | None = None
        self._given_up: list[_Reader] = []
        self._said: deque[tuple[_Reader, _Said]] = deque()
        self._updates: deque[UpdateLine] = deque(maxlen=UPDATES_KEPT)
        self._started_at = time.monotonic()
        self._skipped = 0

        self._counts = CameraTotals()
        self._drops: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._decisions: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._in_flight: dict[int, NumberedFrame] = {}

    # --- what others see ---

    @property
    def state(self) -> CameraState:
        return CameraState.CONNECTING if self._camera is None else self._camera.state

    @property
    def connections(self) -> int:
        """How often a stream to the server was opened."""
        stream = self._stream
        return self._connections_before + (0 if stream is None else stream.summary.connections)

    def stop(self) -> None:
        """Begin to end; from the event loop."""
        self._stopped.set()
        self._wake.set()

    def totals(self) -> CameraTotals:
        """A copy of the counters."""
        counts = self._counts
        latencies = list(self._latencies)
        camera = self._camera
        frames = self._handover.offered
        reader = self._reader
        return CameraTotals(
            frames=frames,
            results=counts.results,
            drops=counts.drops,
            errors=counts.errors,
            faces=counts.faces,
            skipped=self._skipped + (reader.source.skipped if reader is not None else 0),
            in_flight=frames - counts.results - counts.drops - counts.errors,
            openings=0 if camera is None else camera.openings,
            connections=self.connections,
            drops_by_reason=dict(self._drops),
            errors_by_reason=dict(self._errors),
            decisions=dict(self._decisions),
            p50_ms=_rounded(percentile(latencies, 0.50)),
            p99_ms=_rounded(percentile(latencies, 0.99)),
            state=self.state.value,
            reason="" if camera is None else camera.reason,
        )

    @property
    def connected(self) -> bool:
        """Whether the server has this camera's stream now, or needs it no more."""
        return self.state.is_terminal or (self._stream is not None and self._stream.connected)

    # --- the whole run ---

    async def run(self) -> None:
        """Until the camera is STOPPED or FAILED and every frame has its outcome."""
        life: asyncio.Task[None] | None = None
        failures = 0
        try:
            while not self._stopped.is_set() and not self.state.is_terminal:
                if life is not None and life.done():
                    break  # it broke, and is told below: nobody would send anything
                try:
                    async with contextlib.AsyncExitStack() as stack:
                        stream = await self._connect(stack)
                        if stream is None:
                            break  # told to stop meanwhile
                        failures = 0
                        if life is None:
                            # The camera is opened when there is somebody to send to.
                            life = asyncio.create_task(self._live(), name=f"life {self.name}")
                        await self._serve(stream)
                except facelane.FacelaneError as error:
                    failures += 1
                    await self._settle_in_flight(error.reason)
                    if not await self._may_try_again(error, failures):
                        break
        finally:
            self.stop()
            if life is not None:
                await life
            elif self._camera is None:
                # Stopped before the server was reached.
                camera, _ = start(time.monotonic())
                self._camera, _ = step(camera, Stop(time.monotonic()), self._policy, 0.0)
            await self._settle_rest()
            await asyncio.to_thread(self._join_readers)

    async def _connect(self, stack: contextlib.AsyncExitStack) -> aio.AnalyzeStream | None:
        """An open stream, owned by ``stack``; ``None`` when the camera was stopped first.

        The stream comes back by itself when its connection breaks later. Raises
        ``FacelaneError`` when the server cannot be reached now, or refuses.
        """
        stream = self._client.analyze_stream(
            on_update=self._on_update, reconnect=facelane.Reconnect(), **self._stream_options()
        )
        opening = asyncio.create_task(stack.enter_async_context(stream))
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            done, _ = await asyncio.wait(
                {opening, stopped}, timeout=CONNECT_HINT, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                if not self._awaited:
                    self._awaited = True
                    self._log.warning(
                        "waiting for the server: does it run, and is TLS on at both sides?",
                        target=self._server.target,
                        tls=bool(self._server.tls_ca),
                    )
                await asyncio.wait({opening, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            if not opening.done():
                opening.cancel()
            await asyncio.gather(opening, stopped, return_exceptions=True)
        if opening.cancelled() or self._stopped.is_set():
            return None
        opening.result()
        if stream.opened is None:
            raise await self._why_closed()
        if self._awaited:
            self._awaited = False
            self._log.info("server reached", target=self._server.target)
        self._connections_before = self.connections
        self._stream = stream
        return stream

    async def _why_closed(self) -> facelane.UnavailableError:
        """No stream was opened in time: whether anybody is there at all."""
        try:
            health = await self._client.health(timeout=HEALTH_TIMEOUT)
        except facelane.FacelaneError:
            return facelane.UnavailableError(
                facelane.Reason.UNREACHABLE,
                "no server answers at the target; check that it runs, and its address",
            )
        return facelane.UnavailableError(
            facelane.Reason.NOT_CONNECTED,
            f"the server answers ({health.value}) and opens no stream; it may be at its limit of "
            "streams, or about to end: look at its log",
        )

    async def _may_try_again(self, error: facelane.FacelaneError, failures: int) -> bool:
        """Wait for the server to come back; False when that cannot help."""
        waited = time.monotonic() - self._started_at
        never = not self.connections and self._server.wait and waited >= self._server.wait
        if not error.retryable or never:
            self.server_failed = True
            self._log.error("server refused or absent", reason=error.reason, message=error.message)
            reason = "SERVER_UNREACHABLE" if never else error.reason
            await self._fail(reason, error.message)
            return False
        delay = backoff_delay(failures, SERVER_BACKOFF, self._random_unit())
        if failures == 1:
            self._log.warning("server unavailable", reason=error.reason, message=error.message)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._stopped.wait()
        return True

    async def _fail(self, reason: str, message: str) -> None:
        """The camera ends FAILED for the server's sake."""
        now = time.monotonic()
        if self._camera is None:
            self._camera, _ = start(now)
        await self._step(SourceFailed(now, reason, message, permanent=True))
        self._wake.set()

    def _stream_options(self) -> facelane.StreamConfigOptions:
        camera = self._settings
        return facelane.StreamConfigOptions(
            source_id=camera.name,
            overload="lossless" if camera.is_lossless else "latest_wins",
            max_frame_age=camera.max_frame_age or None,
            weight=camera.weight,
            reinference_interval=camera.reinference_interval or None,
            disable_tracking=camera.disable_tracking,
            skip_recognition=camera.skip_recognition,
            skip_liveness=camera.skip_liveness,
            gallery=camera.gallery,
            max_faces=camera.max_faces,
            max_candidates=camera.max_candidates,
            min_face_size=camera.min_face_size,
        )

    async def _serve(self, stream: aio.AnalyzeStream) -> None:
        """Send and receive until the camera has ended and all outcomes are here.

        Raises ``FacelaneError`` when the stream cannot go on.
        """
        sender = asyncio.create_task(self._send(stream), name=f"send {self.name}")
        receiver = asyncio.create_task(self._receive(stream), name=f"receive {self.name}")
        # A camera that came to its end waits for its outcomes as long as the SDK does; one
        # that was told to stop has DRAIN_TIMEOUT.
        patience = asyncio.create_task(self._patience(), name=f"patience {self.name}")
        try:
            await asyncio.wait({sender, receiver, patience}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done() and not patience.done():
                if sender.exception() is None:
                    stream.close_send()
                elif not stream.ended:
                    sender.result()  # a fault of ours: nothing more would be sent
                # The stream settles what is in flight, also when it has broken.
                await asyncio.wait({receiver, patience}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
            if receiver.done():
                receiver.result()
                if not sender.done():
                    raise facelane.ConnectionLostError(
                        facelane.Reason.CONNECTION_LOST, "the server ended the stream early"
                    )
            if not receiver.done():
                self._log.warning("outcomes missing at the end", frames=len(self._in_flight))
        finally:
            tasks = (sender, receiver, patience)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _patience(self) -> None:
        await self._stopped.wait()
        await asyncio.sleep(DRAIN_TIMEOUT)

    # --- frames out, outcomes in ---

    async def _send(self, stream: aio.AnalyzeStream) -> None:
        patience = math.inf if self._settings.is_lossless else SEND_PATIENCE
        while True:
            taken = await self._handover.take()
            numbered = taken.frame
            if numbered is not None:
                # At once: who is cancelled while a line waits must not take it along.
                self._in_flight[numbered.frame_id] = numbered
            if taken.replaced:
                await self._dropped(
                    taken.first_replaced, taken.replaced, "SUPERSEDED", where="bridge"
                )
            if numbered is None:
                return
            frame = numbered.frame
            try:
                await stream.send(
                    facelane.Picture.encoded(frame.data),
                    stream_offset=numbered.offset,
                    capture_time=datetime.fromtimestamp(frame.captured_at, UTC),
                    frame_id=numbered.frame_id,
                    timeout=patience,
                )
            except facelane.ArgumentError as error:
                # This picture cannot be sent; the next one may.
                del self._in_flight[numbered.frame_id]
                await self._failed(numbered.frame_id, error.reason, error.message, error.retryable)
            except facelane.DeadlineExceededError as error:
                del self._in_flight[numbered.frame_id]
                await self._dropped(numbered.frame_id, 1, error.reason, where="bridge")

    async def _receive(self, stream: aio.AnalyzeStream) -> None:
        async for outcome in stream:
            # Before the frame is taken: who is cancelled here leaves it to be settled.
            await self._tell_updates()
            numbered = self._in_flight.pop(outcome.frame_id, None)
            if numbered is None:
                continue  # settled before: the stream was given up
            match outcome.body:
                case facelane.FrameResult() as result:
                    await self._result(numbered, outcome, result)
                case facelane.FrameDrop(reason):
                    await self._dropped(outcome.frame_id, 1, reason.value, where="server")
                case facelane.FrameError(reason, message, retryable):
                    await self._failed(outcome.frame_id, reason, message, retryable)

    async def _tell_updates(self) -> None:
        while self._updates:
            await self._emit(self._updates.popleft())

    async def _result(
        self, numbered: NumberedFrame, outcome: facelane.Outcome, result: facelane.FrameResult
    ) -> None:
        latency = (time.monotonic() - numbered.arrived) * 1e3
        self._latencies.append(latency)
        self._counts.results += 1
        self._counts.faces += len(result.faces)
        for face in result.faces:
            self._decisions[face.identity.decision.value] += 1
        await self._emit(
            ResultLine(
                time=now_utc(),
                camera=self.name,
                frame_id=outcome.frame_id,
                offset_s=round(numbered.offset, 4),
                captured=utc(numbered.frame.captured_at),
                latency_ms=round(latency, 2),
                age_ms=round(outcome.age * 1e3, 2),
                width=result.width,
                height=result.height,
                faces=tuple(face_line(face) for face in result.faces),
                missing_stages=tuple(stage.value for stage in result.missing_stages),
            )
        )

    async def _dropped(self, first: int, count: int, reason: str, *, where: str) -> None:
        self._counts.drops += count
        self._drops[reason] += count
        await self._emit(
            DropLine(
                time=now_utc(),
                camera=self.name,
                frame_id=first,
                count=count,
                reason=reason,
                where=where,
            )
        )

    async def _failed(self, frame_id: int, reason: str, message: str, retryable: bool) -> None:
        self._counts.errors += 1
        self._errors[reason] += 1
        await self._emit(
            ErrorLine(
                time=now_utc(),
                camera=self.name,
                frame_id=frame_id,
                reason=reason,
                message=message,
                retryable=retryable,
            )
        )

    async def _settle_in_flight(self, reason: str) -> None:
        """The stream is gone: its frames without an outcome are errors."""
        for frame_id in sorted(self._in_flight):
            del self._in_flight[frame_id]
            await self._failed(frame_id, reason, "the stream ended before the outcome", True)

    async def _settle_rest(self) -> None:
        """After the end: whatever has no outcome yet gets one."""
        self._handover.close()
        await self._tell_updates()
        await self._settle_in_flight("CONNECTION_LOST")
        first, count = self._handover.discard()
        if count:
            await self._dropped(first, count, "STOPPED", where="bridge")

    def _on_update(self, update: facelane.StreamUpdate) -> None:
        if update.kind is not facelane.StreamUpdateKind.TRACK_ENDED:
            self._log.info("stream update", kind=update.kind.value, stage=update.stage.value)
        self._updates.append(
            UpdateLine(
                time=now_utc(),
                camera=self.name,
                kind=update.kind.value,
                stage="" if update.stage is facelane.Stage.UNSPECIFIED else update.stage.value,
                track_id=update.track_id,
                message=update.message,
            )
        )

    # --- the camera's life ---

    async def _live(self) -> None:
        """Drive the state machine until the camera has ended."""
        self._camera, actions = start(time.monotonic())
        try:
            self._perform(actions)
            while not self._camera.is_terminal:
                for event in await self._events():
                    await self._step(event)
        finally:
            self._handover.close()

    async def _step(self, event: Event) -> None:
        before = self._camera
        assert before is not None
        self._camera, actions = step(before, event, self._policy, self._random_unit())
        self._perform(actions)
        if self._camera.state is not before.state:
            await self._tell(before, self._camera)

    async def _events(self) -> list[Event]:
        """What has happened; waits until something has, or a deadline is reached."""
        assert self._camera is not None
        due = deadline(self._camera, self._policy)
        self._wake.clear()
        events = self._collect()
        if not events:
            timeout = None if due is None else max(0.0, due - time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            events = self._collect()
        if events:
            return events
        now = time.monotonic()
        return [HeldBack(now) if self._handover.is_holding else Tick(now)]

    def _collect(self) -> list[Event]:
        events: list[Event] = []
        progress = self._handover.progress()
        if progress is not None:
            events.append(FrameArrived(*progress))
        while self._said:
            reader, said = self._said.popleft()
            if reader is self._reader:
                event = self._interpret(said)
                if event is not None:
                    events.append(event)
        if self._stopped.is_set():
            events.append(Stop(time.monotonic()))
        return events

    def _interpret(self, said: _Said) -> Event | None:
        now = time.monotonic()
        match said:
            case SourceInfo():
                self._log.info(
                    "camera opened",
                    kind=said.kind.value,
                    codec=said.codec,
                    width=said.width,
                    height=said.height,
                    fps=round(said.fps, 2),
                    reencodes=said.reencodes,
                )
                return None
            case SourceError():
                return SourceFailed(now, said.reason.value, said.message, said.permanent)
            case _:
                return SourceEnded(now)

    async def _tell(self, before: Camera, after: Camera) -> None:
        retry_in = None if after.retry_at is None else round(after.retry_at - after.since, 3)
        level = {
            CameraState.FAILED: self._log.error,
            CameraState.BACKOFF: self._log.warning,
            CameraState.STALLED: self._log.warning,
        }.get(after.state, self._log.info)
        level(
            "camera state",
            state=after.state.value,
            previous=before.state.value,
            reason=after.reason,
            message=after.message,
            attempts=after.attempts,
            retry_in_s=retry_in,
        )
        await self._emit(
            StateLine(
                time=now_utc(),
                camera=self.name,
                state=after.state.value,
                previous=before.state.value,
                reason=after.reason,
                message=after.message,
                retry_in_s=retry_in,
            )
        )

    def _perform(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            match action:
                case Action.CLOSE:
                    self._give_up_reader()
                case Action.OPEN:
                    self._open_reader()

    def _open_reader(self) -> None:
        self._given_up = [reader for reader in self._given_up if reader.thread.is_alive()]
        if len(self._given_up) >= MAX_HUNG_READERS:
            self._log.error("readers hang", count=len(self._given_up))
            self._reader = None
            return  # the opening times out and is tried again when they have ended
        reader = _Reader(self._open_source(self._settings), self._handover, self._heard)
        self._reader = reader
        elapsed = time.monotonic() - self._started_at if self._settings.is_live else 0.0
        self._handover.admit(reader, elapsed)
        reader.thread.start()

    def _heard(self, reader: _Reader, said: _Said) -> None:
        """From a reader's thread."""

        def deliver() -> None:
            self._said.append((reader, said))
            self._wake.set()

        # The loop may have gone while a hung reader hung.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(deliver)

    def _give_up_reader(self) -> None:
        reader, self._reader = self._reader, None
        self._handover.fence()
        if reader is not None:
            reader.source.interrupt()
            self._skipped += reader.source.skipped
            self._given_up.append(reader)

    def _join_readers(self) -> None:
        """Give the readers a moment to close their sockets; a hung one dies with us."""
        until = time.monotonic() + READER_EXIT_TIMEOUT
        for reader in self._given_up:
            reader.thread.join(max(0.0, until - time.monotonic()))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What opening a camera once found: ``info`` with the first frame's size, or ``error``."""

    camera: str
    info: SourceInfo | None
    first_frame_bytes: int = 0
    seconds: float = 0.0
    error: SourceError | None = None


def check_camera(settings: CameraSettings) -> CheckResult:
    """Open a camera, read one frame, close it. Blocks up to its opening time and a second."""
    begun = time.monotonic()
    result: list[CheckResult] = []

    def probe() -> None:
        source = open_source(settings)
        try:
            info = source.open()
            frame = source.read()
            size = 0 if frame is None else len(frame.data)
            result.append(CheckResult(settings.name, info, size, time.monotonic() - begun))
        except SourceError as error:
            seconds = time.monotonic() - begun
            result.append(CheckResult(settings.name, None, 0, seconds, error))
        except Exception as error:
            result.append(
                CheckResult(settings.name, None, 0, time.monotonic() - begun, _broke(error))
            )
        finally:
            source.close()

    # A driver that hangs must not hang the check.
    thread = threading.Thread(target=probe, name=f"check {settings.name}", daemon=True)
    thread.start()
    thread.join(settings.open_timeout + 1.0)
    if result:
        return result[0]
    error = SourceError(SourceReason.TIMED_OUT, "the source gave no frame in its opening time")
    return CheckResult(settings.name, None, 0, time.monotonic() - begun, error)


async def check_server(server: ServerSettings) -> str:
    """The server's health in one word, or why it cannot be asked."""
    async with new_client(server) as client:
        try:
            return str(await client.health())
        except facelane.FacelaneError as error:
            return f"{error.reason}: {error.message}"
