"""A collector of traces: OTLP over gRPC, as the OpenTelemetry collector takes it."""

from __future__ import annotations

import threading
from concurrent import futures
from dataclasses import dataclass
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc


@dataclass(frozen=True)
class Span:
    """As it was received. ``links``: (trace id, span id)."""

    service: str
    name: str
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    links: list[tuple[bytes, bytes]]
    failed: bool


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind)


class Collector(pb_grpc.TraceServiceServicer):
    """Keeps the spans that it is sent. ``raw``: the requests, as they came."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self.raw: list[bytes] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        pb_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.stop(0).wait(10)

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            self.raw.append(request.SerializeToString())
            for group in request.resource_spans:
                named = {a.key: _value(a.value) for a in group.resource.attributes}
                for scope in group.scope_spans:
                    self._spans += [
                        Span(
                            named["service.name"],
                            span.name,
                            span.trace_id,
                            span.span_id,
                            span.parent_span_id,
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            {a.key: _value(a.value) for a in span.attributes},
                            [(link.trace_id, link.span_id) for link in span.links],
                            span.status.code == 2,
                        )
                        for span in scope.spans
                    ]
        return pb.ExportTraceServiceResponse()

    def spans(self, name: str = "") -> list[Span]:
        """Those that have come, of a name."""
        with self._lock:
            return [span for span in self._spans if name in ("", span.name)]
