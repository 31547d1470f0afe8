"""OpenTelemetry: one trace a sampled frame, over its client, its lane, the queues and the workers;
and one a sampled picture of a call of its own.

::

    client's span                      facelane.frame, by the SDK, where it traces
      facelane.lane                    from the frame's receipt to its outcome
        facelane.queue                 a task waits for a worker; one for the detector, and one for
        facelane.worker                each face and stage behind it. A worker has the task. Linked
                                       to the batch that it was part of
    facelane.batch                     a trace of its own: the job, linked to the lanes of its
                                       traced frames

    client's span                      facelane.call, by the SDK, where it traces
      facelane.picture                 from the request's receipt to its answer; over the same
                                       queues and workers as a lane

Spans are made when a frame's outcome is there, of moments that its tasks keep anyway. So a frame
that is not traced costs nothing, and a server that exports no traces has nothing of this module:
its pools have no ``on_answered``, its lanes' observer is not wrapped. Nothing that is exported says
anything of a face but how many there were.

The exporter's thread sends; what it cannot get rid of is bounded, then lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import structlog

from facelane_server import __version__, config, limits, sampling
from facelane_server.addresses import is_local
from facelane_server.domain import (
    FacelaneError,
    Frame,
    FrameDrop,
    FrameResult,
    Outcome,
    Reason,
    Sighting,
    Stage,
)
from facelane_server.lanes import Lane, LaneObserver
from facelane_server.lanes.entry import Entry
from facelane_server.pipeline import Timings
from facelane_server.pools.pool import Pool
from facelane_server.pools.tasks import AnyTask, Job

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, SpanContext, Tracer

log = structlog.get_logger(__name__)

EXPORT_S: Final = 5.0
"""For a batch of spans on their way to the collector; and for all that are left at the end."""


@dataclass(slots=True, eq=False)
class _Batch:
    """A job that was answered in this turn of the loop."""

    job: Job
    pool: Pool
    worker: str
    ended_ns: int
    lanes: list[SpanContext] = field(default_factory=list)
    """Of its frames that are traced."""
    context: SpanContext | None = None


@dataclass(frozen=True, slots=True)
class _Work:
    """One task of a frame."""

    stage: Stage
    task: AnyTask
    batch: _Batch | None


@dataclass(slots=True)
class _Frame:
    """A frame that is traced, until its outcome."""

    span: Span
    work: list[_Work] = field(default_factory=list)
    entry: Entry | None = None


class TracedTimings(Timings):
    """Keeps the tasks too."""

    def __init__(self, traces: Traces, frame: _Frame) -> None:
        super().__init__()
        self.result: FrameResult | None = None
        """Of a single picture, once there is one."""
        self._traces = traces
        self._frame = frame

    def note(self, stage: Stage, task: AnyTask) -> None:
        super().note(stage, task)
        batch = self._traces.batch_of(task)
        if batch is not None:
            batch.lanes.append(self._frame.span.get_span_context())
        if len(self._frame.work) < limits.MAX_TRACED_TASKS:
            self._frame.work.append(_Work(stage, task, batch))


class Traces:
    """What is traced in this process. On the event loop, but for ``close``."""

    def __init__(self, settings: sampling.Tracing, tracer: Tracer) -> None:
        self._sampler = sampling.Sampler(settings.ratio, settings.frames_per_second)
        self._tracer = tracer
        self._frames: dict[tuple[int, int], _Frame] = {}
        """By lane and frame id. Each frame has one outcome, which takes it out."""
        self._pictures = 0
        """Traced pictures of single calls that are under way."""
        self._batches: list[_Batch] = []
        # Spans have the wall clock's time, tasks the monotonic one's.
        self._epoch_ns = time.time_ns() - time.monotonic_ns()

    # -- a frame's way -------------------------------------------------------------------

    def offer(
        self, lane: Lane, frame: Frame, fault: FacelaneError | None, traceparent: str
    ) -> None:
        """As ``lane.offer``, with the context that came with the frame; empty = with none."""
        if not self._begin(lane, frame.frame_id, traceparent):
            lane.offer(frame, fault)
            return
        try:
            lane.offer(frame, fault)
        except FacelaneError:
            # It is none of the lane's, which ends for it.
            self._frames.pop((lane.lane_id, frame.frame_id)).span.end()
            raise
        begun, entry = self._frames.get((lane.lane_id, frame.frame_id)), lane.newest
        if begun is None or entry is None or entry.frame.frame_id != frame.frame_id:
            return  # it had its outcome at once
        entry.timings = TracedTimings(self, begun)
        begun.entry = entry

    def _begin(self, lane: Lane, frame_id: int, traceparent: str) -> bool:
        """Whether it is traced."""
        if (lane.lane_id, frame_id) in self._frames:
            return False  # the same id again, for which the lane ends
        span = self._sampled(
            "facelane.lane",
            traceparent,
            {
                "facelane.source_id": lane.options.source_id,
                "facelane.stream_id": lane.stream_id,
                "facelane.frame_id": str(frame_id),  # 64 bits, and not of a sign
                "facelane.overload": lane.options.overload.value,
            },
        )
        if span is None:
            return False
        self._frames[lane.lane_id, frame_id] = _Frame(span)
        return True

    def _sampled(
        self, name: str, traceparent: str, attributes: Mapping[str, str | int]
    ) -> Span | None:
        """A span of the server's, below the client's; ``None``: it is not traced."""
        theirs = sampling.parent(traceparent) if traceparent else None
        if traceparent and theirs is None:
            return None
        now_ns = time.monotonic_ns()
        if not self._sampler.takes(asked=theirs is not None, chance=random.random(), now_ns=now_ns):
            return None
        return self._tracer.start_span(
            name,
            context=_nobodys() if theirs is None else _remote(theirs),
            kind=_kinds().SERVER,
            start_time=self._wall(now_ns),
            attributes=attributes,
        )

    def answered(self, pool: Pool, job: Job, worker: str) -> None:
        """A worker's answer was given to those who wait: they hear of it in this turn of the
        loop, and what is kept here for them is let go of right behind them."""
        if not self._frames and not self._pictures:
            return
        batch = _Batch(job, pool, worker, time.monotonic_ns())
        self._batches.append(batch)
        asyncio.get_running_loop().call_soon(self._end_batch, batch)

    def batch_of(self, task: AnyTask) -> _Batch | None:
        """The job that a task was answered in, in this turn of the loop."""
        for batch in self._batches:
            if any(one is task for one in batch.job.tasks):
                return batch
        return None

    def outcome(self, lane: Lane, outcome: Outcome) -> None:
        """What became of a frame."""
        frame = self._frames.pop((lane.lane_id, outcome.frame_id), None)
        if frame is not None:
            # Behind the end of the batches of this turn, which its spans link to.
            asyncio.get_running_loop().call_soon(self._end, frame, outcome, time.monotonic_ns())

    # -- a picture of a call of its own ----------------------------------------------------

    @contextlib.contextmanager
    def picture(self, method: str, traceparent: str) -> Iterator[TracedTimings | None]:
        """Around the analysis of one picture: what its tasks are told to, and its result;
        ``None``: it is not traced. ``method``: the call's name."""
        span = self._sampled("facelane.picture", traceparent, {"facelane.method": method})
        if span is None:
            yield None
            return
        picture = _Frame(span)
        timings = TracedTimings(self, picture)
        reason = Reason.INTERNAL.value
        self._pictures += 1
        try:
            yield timings
        except FacelaneError as error:
            reason = error.reason.value
            raise
        except asyncio.CancelledError:
            reason = Reason.CANCELLED.value
            raise
        finally:
            self._pictures -= 1
            asyncio.get_running_loop().call_soon(
                self._end_picture, picture, timings.result or reason, time.monotonic_ns()
            )

    def _end_picture(self, picture: _Frame, outcome: FrameResult | str, now_ns: int) -> None:
        within = _inside(picture.span)
        for one in picture.work:
            self._end_task(one, within, now_ns)
        if isinstance(outcome, FrameResult):
            _tell_result(picture.span, outcome)
        else:
            _tell_error(picture.span, outcome)
        picture.span.end(self._wall(now_ns))

    # -- spans ---------------------------------------------------------------------------

    def _wall(self, monotonic_ns: int) -> int:
        return self._epoch_ns + monotonic_ns

    def _end_batch(self, batch: _Batch) -> None:
        self._batches.remove(batch)
        if not batch.lanes:
            return
        job = batch.job
        begun_ns = job.started_ns or min(task.dispatched_ns for task in job.tasks)
        span = self._tracer.start_span(
            "facelane.batch",
            context=_nobodys(),
            links=_links(batch.lanes),
            start_time=self._wall(begun_ns),
            attributes={
                "facelane.stage": batch.pool.stage.value,
                "facelane.worker": batch.worker,
                "facelane.model": batch.pool.model_id,
                "facelane.batch.size": job.size,
            },
        )
        batch.context = span.get_span_context()
        span.end(self._wall(batch.ended_ns))

    def _end(self, frame: _Frame, outcome: Outcome, now_ns: int) -> None:
        span, body = frame.span, outcome.body
        within = _inside(span)
        work = list(frame.work)
        detection = None if frame.entry is None else frame.entry.task
        if detection is not None and all(one.task is not detection for one in work):
            work.append(_Work(Stage.DETECTOR, detection, None))  # it had no answer
        for one in work:
            self._end_task(one, within, now_ns)
        if isinstance(body, FrameResult):
            _tell_result(span, body)
        elif isinstance(body, FrameDrop):
            span.set_attribute("facelane.outcome", "DROP")
            span.set_attribute("facelane.reason", body.reason.value)
        else:
            _tell_error(span, body.reason.value)
        span.end(self._wall(now_ns))

    def _end_task(self, work: _Work, within: Context, now_ns: int) -> None:
        task = work.task
        if not task.submitted_ns:
            return
        finished_ns = task.finished_ns or now_ns
        stage: dict[str, str | int] = {
            "facelane.stage": work.stage.value,
            "facelane.attempts": task.attempts + 1,
        }
        queue = self._tracer.start_span(
            "facelane.queue",
            context=within,
            start_time=self._wall(task.submitted_ns),
            attributes=stage,
        )
        queue.end(self._wall(task.dispatched_ns or finished_ns))
        if not task.dispatched_ns:
            return
        batch, links = work.batch, []
        of_worker: dict[str, str | int] = {}
        if batch is not None and batch.context is not None:
            links = _links([batch.context])
            of_worker = {
                "facelane.worker": batch.worker,
                "facelane.model": batch.pool.model_id,
                "facelane.batch.size": batch.job.size,
            }
        worker = self._tracer.start_span(
            "facelane.worker",
            context=within,
            links=links,
            start_time=self._wall(task.dispatched_ns),
            attributes=stage | of_worker,
        )
        worker.end(self._wall(finished_ns))


def _tell_result(span: Span, result: FrameResult) -> None:
    span.set_attribute("facelane.outcome", "RESULT")
    span.set_attribute("facelane.faces", len(result.faces))
    span.set_attribute("facelane.missing_stages", [s.value for s in result.missing_stages])


def _tell_error(span: Span, reason: str) -> None:
    span.set_attribute("facelane.outcome", "ERROR")
    span.set_attribute("facelane.reason", reason)
    span.set_status(_error(), reason)


class _Watch:
    """A ``LaneObserver`` that tells the traces before another one."""

    def __init__(self, traces: Traces, observer: LaneObserver) -> None:
        self._traces = traces
        self._observer = observer

    def outcome(self, lane: Lane, outcome: Outcome) -> None:
        self._traces.outcome(lane, outcome)
        self._observer.outcome(lane, outcome)

    def sighted(self, lane: Lane, sighting: Sighting) -> None:
        self._observer.sighted(lane, sighting)

    def track_ended(self, lane: Lane, track_id: int) -> None:
        self._observer.track_ended(lane, track_id)

    def tracks(self, lane_id: int) -> int:
        return self._observer.tracks(lane_id)


def watching(traces: Traces | None, observer: LaneObserver) -> LaneObserver:
    """The observer of lanes whose frames may be traced; without traces, the one that is given."""
    return observer if traces is None else _Watch(traces, observer)


@contextlib.asynccontextmanager
async def exported(
    settings: config.Config, pools: Mapping[Stage, Pool]
) -> AsyncIterator[Traces | None]:
    """Traces that go where the settings say; ``None``: nowhere. Raises ``ConfigError`` where the
    extra is not installed."""
    tracing = settings.tracing
    if not tracing.endpoint:
        yield None
        return
    provider = _provider(tracing)
    traces = Traces(tracing, provider.get_tracer("facelane_server", __version__))
    for pool in pools.values():
        pool.on_answered = traces.answered
    log.info("frames are traced", endpoint=tracing.endpoint, ratio=tracing.ratio)
    try:
        yield traces
    finally:
        for pool in pools.values():
            pool.on_answered = None
        await asyncio.to_thread(provider.shutdown)


def check(settings: sampling.Tracing) -> None:
    """Whether what exports them is installed, where they are to be exported. Raises
    ``ConfigError``."""
    if not settings.endpoint:
        return
    try:
        import opentelemetry.exporter.otlp.proto.grpc.trace_exporter
        import opentelemetry.sdk.trace.export  # noqa: F401
    except ImportError:
        raise config.ConfigError(
            "tracing.endpoint needs OpenTelemetry: install facelane[otel], or leave it empty"
        ) from None


def _provider(settings: sampling.Tracing) -> Any:
    """A ``TracerProvider`` with an exporter of its own; what this process is comes first, what the
    environment says of it (``OTEL_RESOURCE_ATTRIBUTES``) besides."""
    check(settings)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    resource = Resource.create({"service.name": "facelane-server", "service.version": __version__})
    # What is traced was decided before any span is made.
    provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
    # gRPC asks the environment for a proxy even to its own machine.
    own = is_local(urlsplit(settings.endpoint).netloc)
    options: Any = (("grpc.enable_http_proxy", 0),) if own else None
    exporter = OTLPSpanExporter(
        endpoint=settings.endpoint, timeout=EXPORT_S, channel_options=options
    )
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=limits.MAX_SPANS_WAITING,
            export_timeout_millis=int(EXPORT_S * 1000),
        )
    )
    return provider


# -- what OpenTelemetry calls it; imported where something is traced ---------------------------


def _kinds() -> Any:
    from opentelemetry.trace import SpanKind

    return SpanKind


def _error() -> Any:
    from opentelemetry.trace import StatusCode

    return StatusCode.ERROR


def _links(contexts: Iterable[SpanContext]) -> list[Any]:
    from opentelemetry.trace import Link

    return [Link(context) for context in contexts]


def _nobodys() -> Context:
    """Of a span that begins a trace."""
    from opentelemetry.context import Context

    return Context()


def _inside(span: Span) -> Context:
    from opentelemetry.trace import set_span_in_context

    return set_span_in_context(span, _nobodys())


def _remote(parent: sampling.Parent) -> Context:
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

    flags = TraceFlags(TraceFlags.SAMPLED)
    span = NonRecordingSpan(
        SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=flags)
    )
    return _inside(span)
