"""OpenTelemetry traces of sampled frames; needs the extra ``[otel]``.

Give a client a ``Tracing``, and a share of its streams' frames has a span, ``facelane.frame``, from
``send`` to the outcome; and a share of the calls with a picture (``analyze_image``, ``identify``,
``verify``, ``enroll``) one, ``facelane.call``. Its context goes with the frame or the call, so that
a server that exports traces too adds what happened there: lane, queues, workers, batches. Without
one nothing of OpenTelemetry is imported, and no frame costs more.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

import grpc

from facelane.errors import FacelaneError, Reason
from facelane.proxies import is_local
from facelane.types import FrameDrop, FrameError, FrameResult, Outcome
from facelane.v1.analysis_service_pb2 import AnalyzeImageRequest
from facelane.v1.analysis_service_pb2 import AnalyzeStreamRequest as Request
from facelane.v1.gallery_service_pb2 import (
    EnrollFaceRequest,
    IdentifyFaceRequest,
    VerifyFaceRequest,
)

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

DEFAULT_RATIO: Final = 0.01
EXPORT_TIMEOUT: Final = 5.0
_PAST_PROXIES: Any = (("grpc.enable_http_proxy", 0),)
"""gRPC asks the environment even for a collector on its own machine."""

Build = Callable[[int, float], Request]
"""A frame's message, of its number and its media time."""

HEADER: Final = "traceparent"
"""What a call's context is called among its metadata (W3C Trace Context)."""
_PICTURES: Final = (AnalyzeImageRequest, IdentifyFaceRequest, VerifyFaceRequest, EnrollFaceRequest)
"""Calls of these have a picture."""


class Tracing:
    """Which frames and calls with a picture are traced, and by which provider.

    ``provider``: a ``TracerProvider``; the process's own by default, as
    ``opentelemetry.trace.set_tracer_provider`` has set it. ``ratio``: the share of them, 0 to 1.
    What is sent inside of a span which is recorded is traced in any case, as its child.
    """

    def __init__(
        self, provider: TracerProvider | None = None, *, ratio: float = DEFAULT_RATIO
    ) -> None:
        try:
            from opentelemetry import trace
        except ImportError:
            raise ImportError("traces need OpenTelemetry: pip install facelane[otel]") from None
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"ratio is a share of frames, 0 to 1, not {ratio}")
        self.ratio = ratio
        self._trace = trace
        self._tracer = trace.get_tracer("facelane", tracer_provider=provider)
        self._own: Any = None

    @classmethod
    def to(
        cls, endpoint: str, *, ratio: float = DEFAULT_RATIO, service: str = "facelane-client"
    ) -> Self:
        """Traces that go to a collector by themselves, OTLP over gRPC: ``http://host:4317`` or
        ``https://``. ``service`` is who sends them. What is left goes out with ``close``, or at the
        end of the process."""
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise ImportError("traces need OpenTelemetry: pip install facelane[otel]") from None
        provider = TracerProvider(resource=Resource.create({"service.name": service}))
        own = is_local(urlsplit(endpoint).netloc)
        exporter = OTLPSpanExporter(
            endpoint=endpoint,
            timeout=EXPORT_TIMEOUT,
            channel_options=_PAST_PROXIES if own else None,
        )
        provider.add_span_processor(BatchSpanProcessor(exporter))
        tracing = cls(provider, ratio=ratio)
        tracing._own = provider
        return tracing

    def close(self) -> None:
        """Sends what is left and ends what ``to`` has begun; another's provider is left alone."""
        own, self._own = self._own, None
        if own is not None:
            own.shutdown()

    def stream(self, source_id: str) -> StreamTracing:
        """For one stream."""
        return StreamTracing(self, source_id)

    @contextlib.contextmanager
    def call(
        self, request: Any, failure: Callable[[grpc.RpcError], FacelaneError]
    ) -> Iterator[tuple[tuple[str, str], ...]]:
        """Around a call: what to send of its trace, as metadata; nothing where it is not traced, as
        none without a picture is. ``failure``: what an error of gRPC's means."""
        span = self._begin_call(request) if isinstance(request, _PICTURES) else None
        if span is None:
            yield ()
            return
        try:
            yield ((HEADER, _context(span)),)
        except grpc.RpcError as failed:
            self._failed(span, failure(failed).reason)
            raise
        except BaseException:
            self._failed(span, Reason.CANCELLED)
            raise
        else:
            span.set_attribute("facelane.outcome", "RESULT")
        finally:
            span.end()

    def _begin_call(self, request: Any) -> Span | None:
        method = type(request).__name__.removesuffix("Request")
        size = len(request.picture.data)
        return self._begin(
            "facelane.call", {"facelane.method": method, "facelane.picture_bytes": size}
        )

    def _begin(self, name: str, attributes: dict[str, str | int]) -> Span | None:
        current = self._trace.get_current_span()
        if not current.is_recording() and not random.random() < self.ratio:
            return None
        kind = self._trace.SpanKind.CLIENT
        span = self._tracer.start_span(name, kind=kind, attributes=attributes)
        return span if span.is_recording() else None

    def _failed(self, span: Span, reason: str) -> None:
        span.set_attribute("facelane.outcome", "ERROR")
        span.set_attribute("facelane.reason", reason)
        span.set_status(self._trace.StatusCode.ERROR, reason)


def _context(span: Span) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


class StreamTracing:
    """The spans of a stream's frames that have no outcome yet. Its methods are called with the
    stream's lock held."""

    def __init__(self, tracing: Tracing, source_id: str) -> None:
        self._tracing = tracing
        self._source_id = source_id
        self._spans: dict[int, Span] = {}

    def traced(self, build: Build) -> Build:
        """``build``, for a frame that may be traced."""

        def built(frame_id: int, offset: float) -> Request:
            request = build(frame_id, offset)
            span = self._tracing._begin("facelane.frame", {"facelane.source_id": self._source_id})
            if span is not None:
                span.set_attribute("facelane.frame_id", str(frame_id))
                span.set_attribute("facelane.frame_bytes", len(request.frame.picture.data))
                request.frame.traceparent = _context(span)
                self._spans[frame_id] = span
            return request

        return built

    def settled(self, outcome: Outcome) -> None:
        """A frame has its outcome."""
        span = self._spans.pop(outcome.frame_id, None)
        if span is None:
            return
        body = outcome.body
        if isinstance(body, FrameResult):
            span.set_attribute("facelane.outcome", "RESULT")
        elif isinstance(body, FrameDrop):
            span.set_attribute("facelane.outcome", "DROP")
            span.set_attribute("facelane.reason", body.reason.value)
        else:
            assert isinstance(body, FrameError)
            self._tracing._failed(span, body.reason)
        span.end()

    def lost(self) -> None:
        """The connection is over: what has no outcome by now gets none from the server."""
        spans, self._spans = self._spans, {}
        for span in spans.values():
            self._tracing._failed(span, "CONNECTION_LOST")
            span.end()
