"""What is under way: open streams and single pictures, their bounds, and their end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from facelane_server.domain import FacelaneError, Reason
from facelane_server.lanes import Lane


@dataclass(frozen=True, slots=True)
class OpenStream:
    """A stream that is under way; ``stop`` ends it with DRAINING once it has settled."""

    lane: Lane
    stop: asyncio.Event


class StreamRegistry:
    """The open lanes: their ids are unique, draining reaches all."""

    def __init__(self) -> None:
        self._streams: dict[int, OpenStream] = {}
        self._calls = 0
        self._next = 0
        self.draining = False
        self.on_opened: Callable[[Lane], None] = lambda _lane: None
        self.on_closed: Callable[[Lane], None] = lambda _lane: None
        self.on_number: Callable[[int], None] = lambda _number: None

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def lanes(self) -> list[Lane]:
        """Of the streams that are open."""
        return [stream.lane for stream in self._streams.values()]

    def next_id(self) -> int:
        """A lane id, for streams and for single calls: fairness is between lanes."""
        self._next += 1
        return self._next

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """A single picture under way. Raises ``FacelaneError(DRAINING)``."""
        self.refuse_draining()
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    @property
    def at_rest(self) -> bool:
        """No stream is open and no single picture under way."""
        return not self._streams and not self._calls

    def refuse_draining(self) -> None:
        """Raises ``FacelaneError(DRAINING)`` once the server ends."""
        if self.draining:
            raise FacelaneError(
                Reason.DRAINING, "the server is shutting down; reconnect later", retryable=True
            )

    def add(self, lane: Lane) -> OpenStream:
        """Raises ``FacelaneError(DRAINING)``: nobody would tell this lane of the end."""
        self.refuse_draining()
        stream = OpenStream(lane, asyncio.Event())
        self._streams[lane.lane_id] = stream
        self.on_number(len(self._streams))
        self.on_opened(lane)
        lane.stages_changed()  # those that came or went while it was being opened
        return stream

    def remove(self, lane: Lane) -> None:
        if self._streams.pop(lane.lane_id, None) is not None:
            self.on_number(len(self._streams))
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
