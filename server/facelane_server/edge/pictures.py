"""Single pictures: how many at a time, and for how long each."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from facelane_server import limits
from facelane_server.config import Config
from facelane_server.domain import Decision, FacelaneError, Picture, Reading, Reason
from facelane_server.edge import convert, gate
from facelane_server.edge.streams import StreamRegistry
from facelane_server.pipeline import Origin, Pipeline, Plan
from facelane_server.pools.tasks import Sender
from facelane_server.traces import TracedTimings, Traces

Seen = Callable[[str, str], None]
"""Gallery and subject."""


class SinglePictures:
    """Admits pictures of unary calls, for every service alike."""

    def __init__(
        self,
        config: Config,
        pipeline: Pipeline,
        streams: StreamRegistry,
        seen: Seen,
        traces: Traces | None = None,
    ) -> None:
        """``seen``: told of whoever is named; ``VerifyFace`` tells it of whom it has verified."""
        self.seen = seen
        self._timeout_ns = config.limits.image_timeout_ms * 1_000_000
        self._pipeline = pipeline
        self._streams = streams
        self._traces = traces
        self._room = asyncio.Semaphore(limits.MAX_UNARY_CALLS)

    def _traced(self) -> contextlib.AbstractContextManager[TracedTimings | None]:
        if self._traces is None:
            return contextlib.nullcontext()
        return self._traces.picture(*gate.called())

    async def analyse(
        self, picture: Picture, plan: Plan, *, remaining_s: float | None = None
    ) -> Reading:
        """One picture within the server's image timeout and the caller's deadline.

        Raises ``FacelaneError``; POOL_OVERLOADED when too many single calls are under way,
        QUOTA_EXCEEDED when the key holds its share of bytes, DRAINING when the server ends.
        """
        with self._traced() as timings, self._streams.call():
            if self._room.locked():
                raise FacelaneError(
                    Reason.POOL_OVERLOADED,
                    f"{limits.MAX_UNARY_CALLS} pictures are under way; try again, or use a stream",
                    retryable=True,
                )
            timeout_ns = self._timeout_ns
            if remaining_s is not None:
                timeout_ns = min(timeout_ns, int(remaining_s * 1e9))
            allowance = gate.allowance()
            held = contextlib.nullcontext() if not allowance else allowance.hold(len(picture.data))
            async with self._room:
                caller = gate.caller()
                origin = Origin(
                    self._streams.next_id(),
                    convert.DEFAULT_WEIGHT,
                    time.monotonic_ns() + timeout_ns,
                    Sender(caller.name, caller.weight, live=False),
                )
                with held:
                    reading = await self._pipeline.analyse(picture, plan, origin, timings)
            if timings is not None:
                timings.result = reading.result
            for face in reading.result.faces:
                if face.identity.decision is Decision.MATCH:
                    self.seen(plan.gallery_id, face.identity.subject_id)
            return reading
