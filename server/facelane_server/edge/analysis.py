"""``AnalysisService``: streams through lanes, single pictures through the pipeline."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import grpc
import structlog

from facelane.v1 import analysis_service_pb2 as pb
from facelane.v1 import analysis_service_pb2_grpc as pb_grpc
from facelane_server import limits, tracking
from facelane_server.config import Config
from facelane_server.domain import FacelaneError, Outcome, Picture, Reading, Reason, Stage
from facelane_server.edge import convert, errors
from facelane_server.lanes import (
    Lane,
    LaneDraining,
    LaneObserver,
    LaneTotals,
    StageChanged,
    TrackEnded,
    Update,
)
from facelane_server.pipeline import Origin, Pipeline, Plan

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class OpenStream:
    """A stream that is under way; ``stop`` ends it with DRAINING once it has settled."""

    lane: Lane
    stop: asyncio.Event


class LaneRegistry:
    """The open lanes: their number is bounded, their ids are unique, draining reaches all."""

    def __init__(self, max_streams: int) -> None:
        self._max = max_streams
        self._streams: dict[int, OpenStream] = {}
        self._opening = 0
        self._calls = 0
        self._next = 0
        self.draining = False
        self.on_opened: Callable[[Lane], None] = lambda _lane: None
        self.on_closed: Callable[[Lane], None] = lambda _lane: None

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Any:
        return iter([stream.lane for stream in self._streams.values()])

    def next_id(self) -> int:
        """A lane id, for streams and for single calls: fairness is between lanes."""
        self._next += 1
        return self._next

    @contextlib.contextmanager
    def place(self) -> Any:
        """A place among the streams, from the first byte to the last.

        Raises ``FacelaneError``: STREAM_LIMIT, or DRAINING.
        """
        self._refuse_draining()
        if self._opening >= self._max:
            raise FacelaneError(
                Reason.STREAM_LIMIT,
                f"{self._max} streams are open, which is this server's limit; close one or "
                "raise limits.max_streams",
                metadata={"max_streams": str(self._max)},
                retryable=True,
            )
        self._opening += 1
        try:
            yield
        finally:
            self._opening -= 1

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """A single picture under way. Raises ``FacelaneError(DRAINING)``."""
        self._refuse_draining()
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    @property
    def at_rest(self) -> bool:
        """No stream is open and no single picture under way."""
        return not self._streams and not self._calls

    def _refuse_draining(self) -> None:
        if self.draining:
            raise FacelaneError(
                Reason.DRAINING, "the server is shutting down; reconnect later", retryable=True
            )

    def add(self, lane: Lane) -> OpenStream:
        """Raises ``FacelaneError(DRAINING)``: nobody would tell this lane of the end."""
        self._refuse_draining()
        stream = OpenStream(lane, asyncio.Event())
        self._streams[lane.lane_id] = stream
        self.on_opened(lane)
        lane.stages_changed()  # those that came or went while it was being opened
        return stream

    def remove(self, lane: Lane) -> None:
        if self._streams.pop(lane.lane_id, None) is not None:
            self.on_closed(lane)

    def stages_changed(self) -> None:
        for stream in list(self._streams.values()):
            stream.lane.stages_changed()

    def drain(self, grace_ns: int) -> None:
        """Tells every stream; new frames are dropped with DRAINING."""
        self.draining = True
        for stream in list(self._streams.values()):
            stream.lane.drain(grace_ns)

    def stop(self) -> None:
        """Ends every stream as soon as its outcomes are written."""
        self.draining = True
        for stream in list(self._streams.values()):
            stream.stop.set()


class _Patience:
    """Cancels its task, with ``LOST``, when what has begun does not end within so many seconds.

    A timer, not ``wait_for``, which would cost a task for every outcome. It runs in quarters:
    when this process stood still (a paused machine), the clock leaps ahead with every timer
    due at once, and a peer that read all the while must not pay for it.
    """

    LOST: Final = "slow reader"
    QUARTERS: Final = 4

    def __init__(self, task: asyncio.Task[Any], seconds: float) -> None:
        self._task = task
        self._quarter_s = seconds / self.QUARTERS
        self._loop = asyncio.get_running_loop()
        self._left = 0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        self._left = self.QUARTERS
        self._timer = self._loop.call_later(self._quarter_s, self._pass)

    def _pass(self) -> None:
        self._left -= 1
        if self._left:
            self._timer = self._loop.call_later(self._quarter_s, self._pass)
        else:
            self._task.cancel(self.LOST)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class AnalysisService(pb_grpc.AnalysisServiceServicer):
    def __init__(
        self,
        config: Config,
        pipeline: Pipeline,
        lanes: LaneRegistry,
        *,
        observer: LaneObserver,
        models: Callable[[], dict[str, str]],
        server_version: str,
    ) -> None:
        self._config = config
        self._pipeline = pipeline
        self._lanes = lanes
        self._observer = observer
        self._models = models
        self._version = server_version
        self._params = tracking.Params.of(config.tracking)
        self._calls = asyncio.Semaphore(limits.MAX_UNARY_CALLS)

    # -- streams -------------------------------------------------------------------------

    async def AnalyzeStream(  # type: ignore[override]
        self, request_iterator: Any, context: Context
    ) -> None:
        del request_iterator  # read() and write() cost less than the iterators
        try:
            with self._lanes.place():
                await self._serve(context)
        except FacelaneError as error:
            log.info("stream refused or ended", reason=error.reason.value)
            await errors.abort(context, error)

    async def _serve(self, context: Context) -> None:
        lane = await self._open(context)
        stream = self._lanes.add(lane)
        reader = asyncio.create_task(self._read(context, lane), name="lane-reader")
        writer = asyncio.create_task(self._write(context, lane), name="lane-writer")
        stopper = asyncio.create_task(stream.stop.wait(), name="lane-stopper")
        tasks = {reader, writer, stopper}
        try:
            # The writer ends when the lane has settled; the reader only by an error or the
            # client's half-close, after which the writer goes on.
            while not writer.done():
                done, _ = await asyncio.wait(
                    {t for t in tasks if not t.done()} | {writer},
                    return_when=asyncio.FIRST_COMPLETED,
                )
                # A cancelled task has no exception to ask for: asking raises.
                if reader in done and not reader.cancelled() and reader.exception() is not None:
                    reader.result()  # raises
                if stopper in done and not reader.done():
                    reader.cancel()
                    lane.close_input()
            writer.result()
            lane.finish()
            totals = lane.totals
            assert totals.received == totals.results + totals.drops + totals.errors
            await self._say(context, _summary(totals))
            if stream.stop.is_set():
                raise FacelaneError(
                    Reason.DRAINING, "the server is shutting down; reconnect", retryable=True
                )
        finally:
            for task in tasks:
                task.cancel()
            # Before anything is awaited: a client that vanishes now cancels this very task,
            # and a lane that stayed behind would hold its place for ever.
            lane.abort()
            lane.finish()
            self._lanes.remove(lane)
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _open(self, context: Context) -> Lane:
        try:
            async with asyncio.timeout(self._config.limits.first_message_s):
                first = await context.read()
        except TimeoutError:
            first = grpc.aio.EOF
        if first is grpc.aio.EOF or first.WhichOneof("message") != "config":
            raise FacelaneError(
                Reason.CONFIG_MISSING, "the first message of a stream must be its config"
            )
        options = convert.lane_options(first.config, self._config)
        lane = Lane(
            self._lanes.next_id(),
            uuid.uuid4().hex[:16],
            options,
            self._pipeline,
            window=self._config.limits.window,
            window_bytes=self._config.limits.window_bytes,
            tracking_params=self._params.with_interval(options.reinference_interval_ns),
            observer=self._observer,
        )
        opened = pb.StreamOpened(
            stream_id=lane.stream_id,
            limits=pb.StreamLimits(
                window=self._config.limits.window,
                max_frame_bytes=self._config.limits.max_frame_bytes,
                max_pixels=self._config.limits.max_pixels,
                max_faces=options.plan.max_faces,
                max_frame_age=convert.duration(options.max_frame_age_ns),
            ),
            models=self._models(),
            server_version=self._version,
        )
        await self._say(context, pb.AnalyzeStreamResponse(opened=opened))
        return lane

    async def _read(self, context: Context, lane: Lane) -> None:
        opened_ns = time.monotonic_ns()
        while True:
            if not lane.can_accept:
                await lane.wait_can_accept()
            message = await context.read()
            if message is grpc.aio.EOF:
                lane.close_input()
                return
            kind = message.WhichOneof("message")
            if kind == "frame":
                elapsed_ns = time.monotonic_ns() - opened_ns
                lane.offer(*convert.frame(message.frame, self._config, elapsed_ns=elapsed_ns))
            elif kind == "config":
                raise FacelaneError(
                    Reason.CONFIG_REPEATED,
                    "a stream has one config, its first message; open a new stream to change it",
                )
            else:
                raise FacelaneError(
                    Reason.MESSAGE_EMPTY, "a message of the stream held neither config nor frame"
                )

    async def _write(self, context: Context, lane: Lane) -> None:
        task = asyncio.current_task()
        assert task is not None
        patience = _Patience(task, self._config.limits.slow_reader_s)
        while items := await lane.take():
            for item in items:
                message = (
                    pb.AnalyzeStreamResponse(outcome=convert.outcome(item))
                    if isinstance(item, Outcome)
                    else _update(item)
                )
                patience.begin()
                try:
                    await context.write(message)
                except asyncio.CancelledError as error:
                    if error.args != (_Patience.LOST,):
                        raise
                    task.uncancel()
                    raise self._unread() from None
                finally:
                    patience.end()
                if isinstance(item, Outcome):
                    lane.written()

    async def _say(self, context: Context, message: pb.AnalyzeStreamResponse) -> None:
        """Writes what is said once a stream. Raises ``FacelaneError(SLOW_READER)``."""
        try:
            async with asyncio.timeout(self._config.limits.slow_reader_s):
                await context.write(message)
        except TimeoutError:
            raise self._unread() from None

    def _unread(self) -> FacelaneError:
        return FacelaneError(
            Reason.SLOW_READER,
            f"nothing could be written for {self._config.limits.slow_reader_s:g} s; read the "
            "outcomes while sending frames",
        )

    # -- single pictures -------------------------------------------------------------------

    async def AnalyzeImage(
        self, request: pb.AnalyzeImageRequest, context: Context
    ) -> pb.AnalyzeImageResponse:
        try:
            plan = convert.plan(request.options, self._config)
            picture = convert.picture(request.picture, self._config)
            reading = await self.analyse(picture, plan, remaining_s=context.time_remaining())
        except FacelaneError as error:
            await errors.abort(context, error)
        return pb.AnalyzeImageResponse(result=convert.result(reading.result))

    def model_id(self, stage: Stage) -> str:
        """Of the model that serves now; empty where the stage is switched off."""
        return self._models().get(stage.value, "")

    async def analyse(
        self, picture: Picture, plan: Plan, *, remaining_s: float | None = None
    ) -> Reading:
        """One picture within the server's image timeout and the caller's deadline.

        Raises ``FacelaneError``; POOL_OVERLOADED when too many single calls are under way,
        DRAINING when the server ends.
        """
        with self._lanes.call():
            return await self._analyse(picture, plan, remaining_s)

    async def _analyse(self, picture: Picture, plan: Plan, remaining_s: float | None) -> Reading:
        if self._calls.locked():
            raise FacelaneError(
                Reason.POOL_OVERLOADED,
                f"{limits.MAX_UNARY_CALLS} pictures are under way; try again, or use a stream",
                retryable=True,
            )
        timeout_ns = self._config.limits.image_timeout_ms * 1_000_000
        if remaining_s is not None:
            timeout_ns = min(timeout_ns, int(remaining_s * 1e9))
        async with self._calls:
            origin = Origin(
                self._lanes.next_id(), convert.DEFAULT_WEIGHT, time.monotonic_ns() + timeout_ns
            )
            return await self._pipeline.analyse(picture, plan, origin)


def _summary(totals: LaneTotals) -> pb.AnalyzeStreamResponse:
    return pb.AnalyzeStreamResponse(
        summary=pb.StreamSummary(
            received=totals.received,
            results=totals.results,
            drops=totals.drops,
            errors=totals.errors,
            faces=totals.faces,
            tracks=totals.tracks,
            drops_by_reason={r.value: n for r, n in totals.drops_by_reason.items()},
        )
    )


def _update(item: Update) -> pb.AnalyzeStreamResponse:
    if isinstance(item, TrackEnded):
        update = pb.StreamUpdate(kind=pb.STREAM_UPDATE_KIND_TRACK_ENDED, track_id=item.track_id)
    elif isinstance(item, StageChanged):
        kind = (
            pb.STREAM_UPDATE_KIND_STAGE_RESTORED
            if item.available
            else pb.STREAM_UPDATE_KIND_STAGE_LOST
        )
        update = pb.StreamUpdate(kind=kind, stage=convert.STAGES[item.stage])
    else:
        assert isinstance(item, LaneDraining)
        update = pb.StreamUpdate(
            kind=pb.STREAM_UPDATE_KIND_DRAINING,
            message="the server is shutting down",
            grace=convert.duration(item.grace_ns),
        )
    return pb.AnalyzeStreamResponse(update=update)
