"""A look at a stream, which never slows it: pure.

What a lane receives passes by here as references, and only while somebody looks; with its outcome
it goes into the box of each who looks. A box is bounded: of still pictures it holds the newest, of
video the access units that its decoder needs next, and where they are too many it is emptied and
goes on with the next key frame.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from facelane_server import limits
from facelane_server.domain import DropReason, Encoding, Frame, FrameDrop, FrameResult, Outcome
from facelane_server.domain import Picture as Received

_SECOND: Final = 1_000_000_000
RECENT_NS: Final = 5 * _SECOND
"""Rates and ages are told of so long."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture that somebody looks at. ``outcome`` None: of an access unit from before the look.
    ``skipped``: pictures before it that were left out for this one's sake."""

    picture: Received
    outcome: Outcome | None
    key: bool
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody wants to see; see ``WatchStreamRequest``."""

    max_fps: float = limits.VIEW_FPS
    results_only: bool = False
    key_frames_only: bool = False


class Box:
    """What waits for one who looks. ``wake`` is called when there may be something new."""

    def __init__(self, wish: Wish, wake: Callable[[], None], *, after: int = -1) -> None:
        """``after``: frames up to this id are shown already, or never will be."""
        self._wish = wish
        self._wake = wake
        self._after = after
        self._interval_ns = int(_SECOND / wish.max_fps)
        self._waiting: deque[Seen] = deque()
        self._bytes = 0
        self._skipped = 0
        self._lost = True
        """Of video: nothing can be decoded before the next key frame."""
        self._due_ns = -(1 << 62)
        self.closed = False
        """The stream has ended: what waits is the last."""

    def begin(self, units: Sequence[bytes], encoding: Encoding) -> None:
        """Of video: the access units since the last key frame, where all of them fit."""
        if sum(map(len, units)) > limits.MAX_VIEWED_BYTES or len(units) > limits.MAX_VIEWED_UNITS:
            return
        shown = units[:1] if self._wish.key_frames_only else units
        for number, unit in enumerate(shown):
            self._lost = False
            self._append(Seen(Received(encoding, unit), None, number == 0))
        self._wake()

    def put(self, seen: Seen) -> None:
        """The next picture of the stream; never waits, and never fails."""
        outcome = seen.outcome
        if self.closed or (outcome is not None and outcome.frame_id <= self._after):
            return
        if seen.picture.encoding.is_video:
            self._put_video(seen)
        else:
            self._put_still(seen)

    def _put_still(self, seen: Seen) -> None:
        analysed = seen.outcome is not None and isinstance(seen.outcome.body, FrameResult)
        if not seen.picture.data or (self._wish.results_only and not analysed):
            return
        if len(seen.picture.data) > limits.MAX_VIEWED_BYTES:
            self._skipped += 1
            return
        if self._waiting:
            self._skipped += 1 + self._waiting[0].skipped
            self._empty()
        self._append(seen)
        self._wake()

    def _put_video(self, seen: Seen) -> None:
        if not seen.picture.data or _cannot_be_decoded(seen.outcome):
            self.lose()
            return
        if self._wish.key_frames_only and not seen.key:
            return
        if seen.key and self._wish.key_frames_only:
            self._skipped += len(self._waiting)
            self._empty()
        size = len(seen.picture.data)
        full = (
            self._bytes + size > limits.MAX_VIEWED_BYTES
            or len(self._waiting) >= limits.MAX_VIEWED_UNITS
        )
        if full:
            self.lose()
        if (self._lost and not seen.key) or size > limits.MAX_VIEWED_BYTES:
            self._skipped += 1
            return
        self._lost = False
        self._append(seen)
        self._wake()

    def lose(self) -> None:
        """Of video: something is missing, so what follows waits for a key frame."""
        if self._lost:
            return
        self._skipped += len(self._waiting)
        self._empty()
        self._lost = True

    def _append(self, seen: Seen) -> None:
        self._waiting.append(seen)
        self._bytes += len(seen.picture.data)

    def _empty(self) -> None:
        self._waiting.clear()
        self._bytes = 0

    def take(self, now_ns: int) -> Seen | None:
        """What is to be shown now, if anything."""
        if not self._waiting or self.due_in_s(now_ns) > 0.0:
            return None
        seen = self._waiting.popleft()
        self._bytes -= len(seen.picture.data)
        if not seen.picture.encoding.is_video or self._wish.key_frames_only:
            # As often as was asked for in the long run, though each is taken a little late.
            self._due_ns = max(self._due_ns + self._interval_ns, now_ns - self._interval_ns // 2)
        skipped, self._skipped = self._skipped + seen.skipped, 0
        return Seen(seen.picture, seen.outcome, seen.key, skipped)

    def due_in_s(self, now_ns: int) -> float:
        """Seconds until ``take`` gives something; infinity = not before ``wake``."""
        if not self._waiting:
            return math.inf
        is_video = self._waiting[0].picture.encoding.is_video
        if is_video and not self._wish.key_frames_only:
            return 0.0
        return max(0.0, (self._due_ns + self._interval_ns - now_ns) / _SECOND)

    def close(self) -> None:
        """Nothing comes any more."""
        self.closed = True
        self._wake()

    @property
    def waiting_bytes(self) -> int:
        return self._bytes


def _cannot_be_decoded(outcome: Outcome | None) -> bool:
    return (
        outcome is not None
        and isinstance(outcome.body, FrameDrop)
        and outcome.body.reason is DropReason.WAITING_FOR_KEY_FRAME
    )


class _Unseen:
    """A frame on its way through its lane."""

    __slots__ = ("frame_id", "key", "outcome", "picture")

    def __init__(self, frame: Frame) -> None:
        self.frame_id = frame.frame_id
        self.picture = frame.picture
        self.key: bool | None = None
        """Not known yet."""
        self.outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the last seconds: outcomes and results a second, ages of results in nanoseconds."""

    outcome_fps: float = 0.0
    result_fps: float = 0.0
    age_median_ns: int = 0
    age_p95_ns: int = 0


class Sight:
    """One open stream, for those who look at it. Only while somebody does are pictures kept, and
    no more of them than ``limits.MAX_UNSEEN_BYTES``."""

    def __init__(self, *, opened_ns: int, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """``opened_ns``: wall clock, since the epoch."""
        self.opened_ns = opened_ns
        self.encoding: Encoding | None = None
        """Of the newest frame."""
        self._clock = clock
        self._boxes: set[Box] = set()
        self._unseen: deque[_Unseen] = deque()
        self._unseen_bytes = 0
        self._newest = -1
        self._recent: deque[tuple[int, int]] = deque(maxlen=limits.VIEWED_OUTCOMES)
        """(when, age in nanoseconds or -1 where it was no result)."""

    @property
    def watchers(self) -> int:
        return len(self._boxes)

    @property
    def unseen_bytes(self) -> int:
        return self._unseen_bytes

    # -- those who look --------------------------------------------------------------------

    def watch(
        self,
        wish: Wish,
        wake: Callable[[], None],
        units: Sequence[bytes] | None = None,
    ) -> Box:
        """A box of one who looks from now on. ``units``: of video, the access units since the last
        key frame; None = they are not kept."""
        box = Box(wish, wake, after=self._newest)
        if units and self.encoding is not None and self.encoding.is_video:
            box.begin(units, self.encoding)
        self._boxes.add(box)
        return box

    def leave(self, box: Box) -> None:
        self._boxes.discard(box)
        if not self._boxes:
            self._unseen.clear()
            self._unseen_bytes = 0

    def close(self) -> None:
        """The stream is over."""
        for box in self._boxes:
            box.close()

    # -- the stream ------------------------------------------------------------------------

    def receiving(self, frame: Frame) -> None:
        """A frame, before its lane has it; ``received`` follows."""
        if frame.picture.data:
            self.encoding = frame.picture.encoding
        self._newest = frame.frame_id
        if not self._boxes:
            return
        unseen = _Unseen(frame)
        if not frame.picture.encoding.is_video:
            unseen.key = True
        self._unseen.append(unseen)
        self._unseen_bytes += len(frame.picture.data)
        while self._unseen_bytes > limits.MAX_UNSEEN_BYTES and len(self._unseen) > 1:
            gone = self._unseen.popleft()
            self._unseen_bytes -= len(gone.picture.data)
            if gone.picture.encoding.is_video:
                for box in self._boxes:
                    box.lose()

    def received(self, *, key: bool) -> None:
        """The lane has it. ``key``: of video, it began a group of pictures."""
        if self._unseen and self._unseen[-1].key is None:
            self._unseen[-1].key = key
            self._hand_over()

    def outcome(self, outcome: Outcome) -> None:
        """The outcomes of the lane in their order."""
        age_ns = outcome.age_ns if isinstance(outcome.body, FrameResult) else -1
        self._recent.append((self._clock(), age_ns))
        if not self._unseen:
            return
        # Frames without one are of a lane that was given up, or from before the look.
        for unseen in self._unseen:
            if unseen.frame_id == outcome.frame_id:
                unseen.outcome = outcome
                break
            if unseen.frame_id > outcome.frame_id:
                return
        self._hand_over()

    def _hand_over(self) -> None:
        unseen = self._unseen
        while unseen and unseen[0].outcome is not None and unseen[0].key is not None:
            first = unseen.popleft()
            self._unseen_bytes -= len(first.picture.data)
            seen = Seen(first.picture, first.outcome, first.key is True)
            for box in self._boxes:
                box.put(seen)

    # -- figures ---------------------------------------------------------------------------

    def figures(self) -> Figures:
        """Of the last ``RECENT_NS``, or of the newest outcomes where there were many."""
        now = self._clock()
        recent = [entry for entry in self._recent if now - entry[0] <= RECENT_NS]
        if not recent:
            return Figures()
        span_s = max(now - recent[0][0], _SECOND // 2) / _SECOND
        ages = sorted(age for _, age in recent if age >= 0)
        if not ages:
            return Figures(len(recent) / span_s)
        return Figures(
            len(recent) / span_s,
            len(ages) / span_s,
            ages[len(ages) // 2],
            ages[min(len(ages) - 1, int(0.95 * len(ages)))],
        )


class Sights:
    """All open streams of a server, by lane, and how many look."""

    def __init__(self, *, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._clock_ns = clock_ns
        self._by_lane: dict[int, Sight] = {}

    def opened(self, lane_id: int) -> Sight:
        sight = self._by_lane[lane_id] = Sight(opened_ns=self._clock_ns())
        return sight

    def closed(self, lane_id: int) -> None:
        sight = self._by_lane.pop(lane_id, None)
        if sight is not None:
            sight.close()

    def of(self, lane_id: int) -> Sight | None:
        return self._by_lane.get(lane_id)

    @property
    def watchers(self) -> int:
        """Looks under way."""
        return sum(sight.watchers for sight in self._by_lane.values())
