"""Groups of pictures: the access units of a lane's video since a key frame.

A decoder has a memory: to decode one picture it takes all before it, back to a key frame. So a
task of video names a picture of a group, and what is handed over is found out when a worker
takes it: what is new, where the worker's decoder has the rest; the whole group, where another
worker had it, or its decoder was lost. Nothing has to be told of losses, and nothing waits for
the camera's next key frame as long as the group is kept.

Pure: no clock, no loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from facelane_server import annexb, limits
from facelane_server.domain import Encoding


class Group:
    """``bytes_max``: of access units that are kept; from then on those that were decoded go, and
    the group cannot be replayed. One whose units a decoder has not had yet outgrows it: see
    ``append``."""

    def __init__(self, encoding: Encoding, found: annexb.Format, bytes_max: int) -> None:
        self.encoding = encoding
        self.format = found
        self.delay = found.reorder
        """Pictures that a decoder holds back."""
        self.closed = False
        """No access units follow."""
        self.broken = False
        """What follows cannot be decoded, or has ended too many workers."""
        self.losses = 0
        """Workers that ended over it since a picture of it was decoded."""
        self.size = 0
        """Bytes kept."""
        self._bytes_max = bytes_max
        self._units: deque[bytes] = deque()
        self._first = 0
        self._decoded = -1

    def __len__(self) -> int:
        """Access units since the key frame."""
        return self._first + len(self._units)

    @property
    def kept(self) -> bool:
        """It can be decoded from its key frame on."""
        return self._first == 0

    @property
    def begun(self) -> bool:
        """A picture of it was decoded."""
        return self._decoded >= 0

    def append(self, unit: bytes) -> bool:
        """False where it does not fit: the group is broken then."""
        if self.size + len(unit) > self._bytes_max or len(self) >= limits.MAX_GROUP_UNITS:
            self.trim()
        if len(self) >= limits.MAX_GROUP_UNITS or (
            self._units and self.size + len(unit) > self._bytes_max
        ):
            self.broken = True
            return False
        self._units.append(unit)
        self.size += len(unit)
        return True

    def trim(self) -> None:
        """Lets go of what was decoded: it cannot be replayed any more."""
        while self._units and self._first <= self._decoded:
            self.size -= len(self._units.popleft())
            self._first += 1

    def decoded(self, number: int) -> None:
        """An answer has shown that all up to this one were."""
        self._decoded = max(self._decoded, number)
        self.losses = 0

    def units(self, first: int, last: int) -> list[bytes] | None:
        """From ``first`` to ``last``; None when some are no longer kept."""
        if first < self._first or last >= len(self):
            return None
        at = first - self._first
        return [self._units[i] for i in range(at, at + last - first + 1)]

    def bytes_between(self, first: int, last: int) -> int:
        """Of the units from ``first`` to ``last`` that are kept."""
        if first <= self._first and last >= len(self) - 1:
            return self.size
        low, high = max(first - self._first, 0), min(last - self._first, len(self._units) - 1)
        return sum(len(self._units[i]) for i in range(low, high + 1))


@dataclass(frozen=True, slots=True)
class Span:
    """What a decoder is to be given of a group: access units ``first`` to ``last``."""

    first: int
    last: int
    begins: bool
    drains: bool


@dataclass(frozen=True, slots=True)
class Wanted:
    """The ``picture``-th picture shown of ``group``; it takes access units up to ``last``.
    ``drains``: no more of them follow that would bring it out."""

    lane: int
    group: Group
    picture: int
    last: int
    drains: bool = False


@dataclass(slots=True)
class _State:
    group: Group | None
    """None = it is not known what the decoder has had."""
    position: int
    drained: bool = False
    anew: bool = False
    """It begins with all since the key frame."""


class Decoders:
    """What the decoders of one worker hold once all that was sent to it is done. It may have lost
    some of these; it has no other."""

    def __init__(self) -> None:
        self._states: dict[int, _State] = {}
        self._replayed = 0

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, lane: int) -> bool:
        return lane in self._states

    def span(self, wanted: Wanted) -> Span | None:
        """What is to be sent for this picture; None when it cannot be decoded any more."""
        onward = self.onward(wanted)
        if onward is not None:
            return onward
        group = wanted.group
        if group.broken or group.units(0, wanted.last) is None:
            return None
        return Span(0, wanted.last, begins=True, drains=wanted.drains)

    def onward(self, wanted: Wanted) -> Span | None:
        """The same where the lane's decoder goes on; None where it would begin anew."""
        group, state = wanted.group, self._states.get(wanted.lane)
        if state is None or state.group is not group or wanted.picture > wanted.last:
            return None
        last = max(wanted.last, state.position)
        fresh = last > state.position
        behind = not group.delay and state.position > wanted.picture
        if behind or (state.drained and fresh) or not self._has(group, state, last):
            return None
        return Span(state.position + 1, last, begins=False, drains=wanted.drains)

    def take_replayed(self) -> int:
        """Groups that were decoded again from their key frame on, since this was asked."""
        count, self._replayed = self._replayed, 0
        return count

    @staticmethod
    def _has(group: Group, state: _State, last: int) -> bool:
        return last == state.position or group.units(state.position + 1, last) is not None

    def sent(self, wanted: Wanted, span: Span) -> None:
        self._replayed += span.begins and wanted.group.begun
        old = self._states.pop(wanted.lane, None)
        anew = span.begins or (old is not None and old.anew and old.group is wanted.group)
        self._states[wanted.lane] = _State(wanted.group, span.last, span.drains, anew)

    def catches_up(self, lane: int) -> bool:
        """The lane's decoder has begun with all since a key frame, and has shown nothing yet."""
        return lane in self._states and self._states[lane].anew

    def shown(self, lane: int) -> None:
        """A picture of the lane has come."""
        if lane in self._states:
            self._states[lane].anew = False

    def at(self, lane: int, position: int) -> None:
        """The worker says how far it is: it has not done all that was sent."""
        state = self._states.get(lane)
        if state is not None and state.group is not None:
            state.position = position
            state.drained = False

    def beyond(self, most: int, needed: Collection[int]) -> list[int]:
        """Lanes that make it more than ``most``: those sent to longest ago, but these."""
        spare = [lane for lane in self._states if lane not in needed]
        return spare[: max(len(self._states) - most, 0)]

    def forget(self, lanes: Iterable[int]) -> None:
        """Whatever is sent next begins anew. The worker may have a decoder of the lane all the
        same, until it is told to close it."""
        for lane in lanes:
            state = self._states.get(lane)
            if state is not None:
                state.group = None

    def closed(self, lane: int) -> None:
        """The worker was told that it needs no decoder of the lane."""
        self._states.pop(lane, None)
