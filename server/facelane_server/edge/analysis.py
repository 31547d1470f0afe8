"""``AnalysisService``: streams through lanes, single pictures through the pipeline."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import replace
from typing import Any, Final

import grpc
import structlog

from facelane.v1 import analysis_service_pb2 as pb
from facelane.v1 import analysis_service_pb2_grpc as pb_grpc
from facelane_server import __version__, tracking
from facelane_server.config import Config
from facelane_server.domain import FacelaneError, Outcome, Overload, Reason, Stage
from facelane_server.edge import areas, convert, gate
from facelane_server.edge.awake import Awake
from facelane_server.edge.controls import Controls
from facelane_server.edge.errors import Context
from facelane_server.edge.load import LoadWatch
from facelane_server.edge.pictures import SinglePictures
from facelane_server.edge.quotas import Quotas
from facelane_server.edge.roles import Caller
from facelane_server.edge.streams import StreamRegistry
from facelane_server.edge.whole import Siblings
from facelane_server.gallery.trail import Trail
from facelane_server.lanes import (
    KeyFrameWanted,
    Lane,
    LaneDraining,
    LaneObserver,
    LaneTotals,
    RateChanged,
    StageChanged,
    TrackEnded,
    Update,
)
from facelane_server.pipeline import Pipeline
from facelane_server.pools.tasks import Sender
from facelane_server.store.audit import Action
from facelane_server.traces import Traces
from facelane_server.viewing import Sights

log = structlog.get_logger(__name__)


class _Patience:
    """Cancels its task, with ``LOST``, when what has begun does not end within so many seconds,
    or a quarter more.

    Not ``wait_for``, which would cost a task for every outcome, nor a timer for each: one timer
    goes by as long as anything is begun, and looks whether the same thing is still under way. It
    runs in quarters: when this process stood still (a paused machine), the clock leaps ahead with
    every timer due at once, and a peer that read all the while must not pay for it.
    """

    LOST: Final = "slow reader"
    QUARTERS: Final = 4

    def __init__(self, task: asyncio.Task[Any], seconds: float) -> None:
        self._task = task
        self._quarter_s = seconds / self.QUARTERS
        self._loop = asyncio.get_running_loop()
        self._left = 0
        """Passes until it is too late; 0 = nothing is under way."""
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        if self._timer is None:
            self._left = self.QUARTERS
            self._timer = self._loop.call_later(self._quarter_s, self._pass)
        else:
            self._left = self.QUARTERS + 1  # the first of them may be over at once

    def _pass(self) -> None:
        self._timer = None
        if not self._left:
            return
        self._left -= 1
        if self._left:
            self._timer = self._loop.call_later(self._quarter_s, self._pass)
        else:
            self._task.cancel(self.LOST)

    def end(self) -> None:
        self._left = 0

    def close(self) -> None:
        """Nothing is left to fire."""
        if self._timer is not None:
            self._timer.cancel()


class AnalysisService(pb_grpc.AnalysisServiceServicer):
    def __init__(
        self,
        config: Config,
        pipeline: Pipeline,
        streams: StreamRegistry,
        pictures: SinglePictures,
        observer: LaneObserver,
        controls: Controls,
        load: LoadWatch,
        quotas: Quotas,
        trail: Trail,
        sights: Sights,
        siblings: Siblings | None = None,
        traces: Traces | None = None,
    ) -> None:
        self._siblings = siblings
        self._traces = traces
        self._config = config
        self._pipeline = pipeline
        self._streams = streams
        self._pictures = pictures
        self._load = load
        self._observer = observer
        self._controls = controls
        self._quotas = quotas
        self._trail = trail
        self._sights = sights
        self._params = tracking.Params.of(config.tracking)

    # -- streams -------------------------------------------------------------------------

    async def AnalyzeStream(  # type: ignore[override]
        self, request_iterator: Any, context: Context
    ) -> None:
        del request_iterator  # read() and write() cost less than the iterators
        self._streams.refuse_draining()
        await self._serve(context)

    async def _serve(self, context: Context) -> None:
        made = await self._open(context)
        if made is None:
            return
        lane, opened = made
        stream = self._streams.add(lane)
        self._load.opened(lane)
        tasks: set[asyncio.Task[Any]] = set()
        try:
            # It is among the streams by then: a client that goes as soon as it is told cancels
            # this very task, and whoever watches events is to hear of that stream too.
            await gate.write(
                context,
                pb.AnalyzeStreamResponse(opened=opened),
                self._config.limits.slow_reader_s,
            )
            reader = asyncio.create_task(self._read(context, lane), name="lane-reader")
            writer = asyncio.create_task(self._write(context, lane), name="lane-writer")
            stopper = asyncio.create_task(stream.stop.wait(), name="lane-stopper")
            tasks |= {reader, writer, stopper}
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
            await gate.write(context, _summary(totals), self._config.limits.slow_reader_s)
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
            self._streams.remove(lane)
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _open(self, context: Context) -> tuple[Lane, pb.StreamOpened] | None:
        """The stream, and what to tell its client of it; None when it was sent to another
        shard."""
        try:
            async with Awake(self._config.limits.first_message_s):
                first = await context.read()
        except TimeoutError:
            first = grpc.aio.EOF
        if first is grpc.aio.EOF or first.message.WhichOneof("message") != "config":
            raise FacelaneError(
                Reason.CONFIG_MISSING, "the first message of a stream must be its config"
            )
        wanted = first.message.config
        if self._siblings is not None and wanted.may_move:
            target = self._siblings.move()
            if target is not None:
                opened = pb.StreamOpened(move=pb.StreamMove(target=target))
                await gate.write(
                    context,
                    pb.AnalyzeStreamResponse(opened=opened),
                    self._config.limits.slow_reader_s,
                )
                return None
        caller = gate.caller()
        options = convert.lane_options(wanted, self._config, caller)
        options = areas.placed(options, wanted, self._config)
        self._pipeline.check_naming(options.plan)
        patient = options.overload is Overload.LOSSLESS
        sender = Sender(caller.name, caller.weight, patient=patient, source=options.source_id)
        self._load.admit(options, sender)
        lane = Lane(
            self._streams.next_id(),
            uuid.uuid4().hex[:16],
            options,
            self._pipeline,
            window=self._config.limits.window,
            window_bytes=self._config.limits.window_bytes,
            video_cache_bytes=self._config.limits.video_cache_bytes,
            tracking_params=self._params.with_interval(options.reinference_interval_ns),
            observer=self._observer,
            sender=sender,
            allowance=gate.allowance(),
        )
        if options.plan.recognize:
            self._trail.note(
                Action.STREAM_OPENED, gallery=options.plan.gallery_id, source=options.source_id
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
            models=self._controls.model_ids(),
            server_version=__version__,
            move=None,
            **convert.names_by(
                self._pipeline.named_by(options.plan),
                options.plan.recognize and Stage.RECOGNIZER in self._pipeline.pools,
            ),
        )
        return lane, opened

    async def _read(self, context: Context, lane: Lane) -> None:
        opened_ns = time.monotonic_ns()
        sight, traces = self._sights.of(lane.lane_id), self._traces
        plain = sight is None and traces is None
        while True:
            if not lane.can_accept:
                await lane.wait_can_accept()
            received = await context.read()
            if received is grpc.aio.EOF:
                lane.close_input()
                return
            message, data = received.message, received.data
            kind = message.WhichOneof("message")
            if kind == "frame":
                elapsed_ns = time.monotonic_ns() - opened_ns
                frame, fault = convert.frame(
                    message.frame, self._config, elapsed_ns=elapsed_ns, data=data
                )
                if plain:
                    lane.offer(frame, fault)
                    continue
                before = lane.footage.group
                if sight is not None:
                    sight.receiving(frame)
                if traces is None:
                    lane.offer(frame, fault)
                else:
                    traces.offer(lane, frame, fault, message.frame.traceparent)
                if sight is not None:
                    sight.received(key=lane.footage.group is not before)
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
        plan = lane.options.plan
        view = self._view(gate.caller(), plan.gallery_id, plan.source_id)
        try:
            while items := await lane.take():
                for item in items:
                    told = isinstance(item, Outcome)
                    message = (
                        convert.outcome(item, lane.stream_id, view)
                        if isinstance(item, Outcome)
                        else _update(item)
                    )
                    patience.begin()
                    await context.write(message)
                    patience.end()
                    if told:
                        lane.written()
                del items, item, message  # until there is more, nobody is kept here
        except asyncio.CancelledError as error:
            if error.args != (_Patience.LOST,):
                raise
            task.uncancel()
            raise gate.unread(self._config.limits.slow_reader_s) from None
        finally:
            patience.close()

    # -- single pictures -------------------------------------------------------------------

    async def AnalyzeImage(
        self, request: pb.AnalyzeImageRequest, context: Context
    ) -> pb.AnalyzeImageResponse:
        caller = gate.caller()
        gallery_id = convert.gallery(request.options.gallery_id, caller, "analyze")
        named = caller.may("identify", gallery=gallery_id)
        plan = convert.plan(request.options, self._config, gallery_id if named else "")
        if named:
            asked = convert.naming(request.options, caller, gallery_id, None)
            plan = replace(plan, naming=asked)
            self._pipeline.check_naming(plan)
        picture = convert.picture(request.picture, self._config)
        if named and plan.recognize:
            self._quotas.look_up(caller, caller.lookups_per_minute("identify", gallery=gallery_id))
        reading = await self._pictures.analyse(picture, plan, remaining_s=context.time_remaining())
        if named and plan.recognize:
            faces = len(reading.result.faces)
            self._trail.note(Action.LOOKED_UP, gallery=gallery_id, faces=faces)
        view = self._view(caller, gallery_id, None, credit=1)
        return pb.AnalyzeImageResponse(result=convert.result(reading.result, view))

    def _view(
        self, caller: Caller, gallery_id: str, source_id: str | None, *, credit: int = 0
    ) -> convert.View:
        """What the caller sees of the names that a gallery gives to faces."""
        view = convert.View.of(caller, "identify", gallery_id, source_id)
        return view.bounded(
            self._quotas,
            caller,
            caller.lookups_per_minute("identify", gallery=gallery_id, source=source_id),
            credit=credit,
        )


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
    elif isinstance(item, RateChanged):
        told = f"{item.fps:.1f} frames a second are analysed" if item.fps else "all are analysed"
        update = pb.StreamUpdate(kind=pb.STREAM_UPDATE_KIND_RATE, message=told, rate_fps=item.fps)
    elif isinstance(item, KeyFrameWanted):
        update = pb.StreamUpdate(
            kind=pb.STREAM_UPDATE_KIND_KEY_FRAME_WANTED,
            message="frames are dropped until the next key frame",
        )
    else:
        assert isinstance(item, LaneDraining)
        update = pb.StreamUpdate(
            kind=pb.STREAM_UPDATE_KIND_DRAINING,
            message="the server is shutting down",
            grace=convert.duration(item.grace_ns),
        )
    return pb.AnalyzeStreamResponse(update=update)
