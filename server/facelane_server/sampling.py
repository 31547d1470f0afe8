"""Which frames are traced, and under whose trace; pure.

A client that traces a frame says so (W3C Trace Context, https://www.w3.org/TR/trace-context/);
of those that bring no context the server may trace a share by itself. Nobody makes it trace more
than so many a second.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from facelane_server import limits
from facelane_server.addresses import is_host_port

HEADER: Final = "traceparent"
"""Of a call that is traced; a stream's frames have it each for itself, in their message."""
_CONTEXT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED: Final = 1
_LONGEST: Final = 512
"""Of a context of a later version, in characters."""


class Tracing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """OpenTelemetry traces of sampled frames and pictures; tracing.md says what is in them."""

    endpoint: str = ""
    """Where traces are sent, OTLP over gRPC: ``http://127.0.0.1:4317``, or ``https://``. Empty = no
    frame is traced. Needs the extra ``[otel]``. Headers and certificates come from the environment
    (``OTEL_EXPORTER_OTLP_HEADERS``, ``OTEL_EXPORTER_OTLP_CERTIFICATE``)."""
    ratio: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    """Share of the frames, and of single pictures, without a client's context that are traced from
    here on."""
    frames_per_second: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_TRACED_PER_S)] = 20
    """At most so many frames and pictures a second are traced, of all clients together."""

    def problem(self) -> str:
        """What is wrong with it; empty = nothing."""
        scheme, _, rest = self.endpoint.partition("://")
        if self.endpoint and not (scheme in ("http", "https") and is_host_port(rest)):
            return f"tracing.endpoint: `{self.endpoint}` is not http://host:port or https://"
        if self.ratio and not self.endpoint:
            return "tracing.ratio traces frames, and tracing.endpoint says nobody who takes them"
        return ""


@dataclass(frozen=True, slots=True)
class Parent:
    """The client's span. ``trace_id``: 128 bits, ``span_id``: 64; neither is 0."""

    trace_id: int
    span_id: int


def parent(context: str) -> Parent | None:
    """Of a ``traceparent``; ``None`` when it is none, or says that the frame is not sampled."""
    found = _CONTEXT.fullmatch(context) if len(context) <= _LONGEST else None
    if found is None:
        return None
    version, trace, span, flags, more = found.groups()
    if version == "ff" or (version == "00" and more):
        return None
    made = Parent(int(trace, 16), int(span, 16))
    return made if made.trace_id and made.span_id and int(flags, 16) & _SAMPLED else None


class Sampler:
    """Says of each frame whether it is traced."""

    def __init__(self, ratio: float, frames_per_second: int) -> None:
        self._ratio = ratio
        self._most = float(frames_per_second)
        self._room = self._most
        self._at_ns = 0

    def takes(self, *, asked: bool, chance: float, now_ns: int) -> bool:
        """``asked``: the client has a trace of it. ``chance``: random, in [0, 1)."""
        if not asked and not chance < self._ratio:
            return False
        passed = max(0, now_ns - self._at_ns) / 1e9 if self._at_ns else 0.0
        self._room = min(self._most, self._room + passed * self._most)
        self._at_ns = now_ns
        if self._room < 1.0:
            return False
        self._room -= 1.0
        return True
