"""One camera from its first opening to its end: its reader, its state, its stream."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import msgspec
import structlog

import facelane
from facelane import aio
from facelane_bridge.camera import (
    Action,
    Camera,
    CameraState,
    Event,
    FrameArrived,
    HeldBack,
    Outlook,
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
from facelane_bridge.config import CameraSettings, ServerSettings, VideoChoice
from facelane_bridge.handover import Handover, NumberedFrame
from facelane_bridge.ledger import Ledger
from facelane_bridge.output import CameraTotals, Line, StateLine, now_utc
from facelane_bridge.passing import Passing, picture_of
from facelane_bridge.reader import Reader, Said
from facelane_bridge.sources import Source, SourceError, SourceInfo, SourceReason

log = structlog.get_logger("facelane_bridge")

MAX_HUNG_READERS = 3
SEND_PATIENCE = 0.5
"""Seconds that a live frame may wait for room in the window before a newer one goes."""
DRAIN_TIMEOUT = 10.0
"""Seconds for the outcomes of frames on their way when a camera ends."""
READER_EXIT_TIMEOUT = 2.0
SERVER_BACKOFF = Policy(backoff_initial=0.25, backoff_max=10.0)
HEALTH_TIMEOUT = 2.0
CONNECT_HINT = 2.0
"""After so long somebody who watches wants to know what is waited for."""

OpenSource = Callable[[CameraSettings], Source]


class CameraRunner:
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
        self._reader: Reader | None = None
        self._given_up: list[Reader] = []
        self._said: deque[tuple[Reader, Said]] = deque()
        self._ledger = Ledger(settings.name, emit)
        self._sent_as: facelane.Encoding | None = None
        """What the stream carries: pictures, or video of this kind."""
        self._held: NumberedFrame | None = None
        """A frame of another kind, which wants a stream of its own."""
        self._passing = Passing()
        self._rejoined = False
        """The stream came back after its connection broke, and no key frame was wanted since."""
        self._started_at = time.monotonic()
        self._skipped = 0

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
        totals = self._ledger.totals(self._handover.offered)
        camera, reader = self._camera, self._reader
        totals.skipped = self._skipped + (reader.source.skipped if reader is not None else 0)
        totals.connections = self.connections
        totals.state = self.state.value
        if camera is not None:
            totals.openings, totals.reason = camera.openings, camera.reason
            if camera.media_time is not None:
                totals.age_s = round(time.monotonic() - camera.progress_at, 3)
        return totals

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
            while not self._stopped.is_set() and (
                self._held is not None or not self.state.is_terminal
            ):
                if life is not None and life.done() and self._held is None:
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
                    await self._ledger.lost(error.reason)
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
        await self._step(SourceFailed(now, reason, message, Outlook.HOPELESS))
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
            false_naming=camera.false_naming,
            match_threshold=camera.match_threshold,
            zones=[
                facelane.Zone(z.name, z.polygon, z.dwell_s, z.unknown_s, z.faces)
                for z in camera.zones
            ],
            lines=[facelane.Line(line.name, line.start, line.end) for line in camera.lines],
            # What is not passed on is thinned out here already.
            analysis_fps=camera.analysed_fps if camera.passes_video else 0.0,
            private=camera.private,
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
                self._log.warning("outcomes missing at the end", frames=self._ledger.in_flight)
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
        numbered, self._held = self._held, None
        fresh = True
        while True:
            if numbered is None:
                taken = await self._handover.take()
                await self._ledger.taken(taken)
                numbered = taken.frame
            if numbered is None:
                return
            frame = numbered.frame
            if frame.refused is not None:
                await self._ledger.refused(numbered.frame_id, frame.refused)
                numbered = None
                continue
            if frame.video is not self._sent_as and not fresh:
                # A stream keeps to one kind: this one ends, and the next begins with the frame.
                self._held = numbered
                return
            self._sent_as, fresh = frame.video, False
            # The server thins out video, which is worth nothing with a gap in it.
            waits = self._settings.is_lossless or frame.video is not None
            patience = math.inf if waits else SEND_PATIENCE
            try:
                await stream.send(
                    picture_of(frame),
                    stream_offset=numbered.offset,
                    capture_time=datetime.fromtimestamp(frame.captured_at, UTC),
                    frame_id=numbered.frame_id,
                    timeout=patience,
                )
            except (facelane.ArgumentError, facelane.DeadlineExceededError) as error:
                await self._ledger.not_sent(numbered.frame_id, error)
                if frame.video is not None:
                    self._handover.skip_to_key_frame()
            else:
                self._passing.sent(frame)
            numbered = None

    async def _receive(self, stream: aio.AnalyzeStream) -> None:
        async for outcome in stream:
            await self._ledger.settled(outcome)
            why = self._passing.settled(outcome)
            if why:
                await self._decode_instead(why)

    async def _settle_rest(self) -> None:
        """After the end: whatever has no outcome yet gets one."""
        self._handover.close()
        self._held = None  # it is in the ledger
        await self._ledger.tell_updates()
        await self._ledger.lost("CONNECTION_LOST")
        first, count = self._handover.discard()
        if count:
            await self._ledger.dropped(first, count, "STOPPED", where="bridge")

    async def _decode_instead(self, why: str) -> None:
        """The server does not take this camera's video as it is: open it anew, to decode it."""
        outlook = Outlook.PASSING
        match self._settings.video:
            case VideoChoice.DECODE:
                return  # an outcome of what was sent before
            case VideoChoice.PASS:
                outlook = Outlook.HOPELESS
                why += '; video = "auto" decodes it here'
            case VideoChoice.AUTO:
                self._log.warning("the video is decoded here from now on", why=why)
        self._settings = msgspec.structs.replace(self._settings, video=VideoChoice.DECODE)
        reader = self._reader
        if reader is not None:
            self._handover.fence()
            self._said.append((reader, SourceError(SourceReason.NOT_PASSABLE, why, outlook)))
            self._wake.set()
        first, count = self._handover.discard()
        if count:
            await self._ledger.dropped(first, count, "SUPERSEDED", where="bridge")

    def _give_key_frame(self) -> None:
        oldest = self._ledger.oldest_in_flight
        if self._reader is not None and oldest is not None:
            self._reader.source.wants_key_frame(oldest.frame.media_time)
        if self._rejoined and self._settings.is_live:
            # Only the connection was to blame: what is wanted is here. Once: of a unit that is
            # broken itself nothing better would come.
            self._rejoined = False
            self._handover.replay()

    def _on_update(self, update: facelane.StreamUpdate) -> None:
        match update.kind:
            case facelane.StreamUpdateKind.RECONNECTED:
                self._rejoined = True
            case facelane.StreamUpdateKind.KEY_FRAME_WANTED:
                self._give_key_frame()
            case _:
                pass
        if update.kind is not facelane.StreamUpdateKind.TRACK_ENDED:
            self._log.info("stream update", kind=update.kind.value, stage=update.stage.value)
        self._ledger.update(update)

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
        if self._handover.is_holding:
            return [HeldBack(now)]
        source = None if self._reader is None else self._reader.source
        return [Tick(now) if source is None else Tick(now, source.connected, source.seen)]

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

    def _interpret(self, said: Said) -> Event | None:
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
                return SourceFailed(now, said.reason.value, said.message, said.outlook)
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
        reader = Reader(self._open_source(self._settings), self._handover, self._heard)
        self._reader = reader
        elapsed = time.monotonic() - self._started_at if self._settings.is_live else 0.0
        self._handover.admit(reader, elapsed)
        reader.thread.start()

    def _heard(self, reader: Reader, said: Said) -> None:
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
