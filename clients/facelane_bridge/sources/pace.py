"""Media clocks: a source's own time, held back to real time, thinned out to a rate."""

from __future__ import annotations

import math
import threading
import time


class MediaClock:
    """Turns a source's timestamps into seconds that never decrease.

    A timestamp that stands still stays still: this is how a frozen camera is seen. One
    that jumps (a camera that set its clock, a stream that started again) is rebased on
    the arrival time, so that one jump is not taken for a stall of hours. One that never
    moved while the frames did says nothing at all: arrival counts instead.
    """

    MAX_FORWARD = 10.0
    MAX_BACKWARD = 0.5
    STANDING = 3
    """Frames that differ at one timestamp, from the first on, that make a clock useless."""

    def __init__(self, *, live: bool = True) -> None:
        # A file may well have a minute between two frames.
        self._max_forward = self.MAX_FORWARD if live else math.inf
        self._live = live
        self._base: float | None = None
        self._first: float | None = None
        self._standing = 0
        self._last_stamp = 0.0
        self._last_media = 0.0
        self._last_arrival = 0.0
        self.moves = False
        """The source's own clock has moved since the first frame."""

    @property
    def is_useless(self) -> bool:
        """The source's clock never moved, and its frames did."""
        return self._standing >= self.STANDING

    def media_time(self, stamp: float | None, arrival: float, *, differs: bool = False) -> float:
        """Seconds since the first frame. ``arrival`` is monotonic; ``stamp`` may be absent.

        ``differs``: the frame is not the one before; of interest while the clock stands.
        """
        if stamp is not None and self._live and not self.moves and not self.is_useless:
            if self._first is None:
                self._first = stamp
            self.moves = stamp != self._first
            self._standing += differs and not self.moves
        if stamp is None or self.is_useless:
            stamp = arrival
        if self._base is None:
            self._base = stamp
        elif not -self.MAX_BACKWARD <= stamp - self._last_stamp <= self._max_forward:
            self._base = stamp - self._last_media - max(0.0, arrival - self._last_arrival)
        self._last_stamp = stamp
        self._last_arrival = arrival
        self._last_media = max(self._last_media, stamp - self._base)
        return self._last_media


class Pacer:
    """Holds frames back until their media time, in step with the monotonic clock."""

    def __init__(self, interrupted: threading.Event) -> None:
        self._interrupted = interrupted
        self._start: float | None = None

    def wait_for(self, media_time: float) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = now - media_time
        due = self._start + media_time
        if due > now:
            self._interrupted.wait(due - now)
        elif now - due > 1.0:
            # The machine slept or the decoder is too slow: go on from here rather than
            # racing through everything that was missed.
            self._start = now - media_time


class Decimator:
    """Chooses at most ``max_fps`` frames a second of media time, evenly."""

    def __init__(self, max_fps: float) -> None:
        self._interval = 1.0 / max_fps if max_fps > 0 else 0.0
        self._due = 0.0
        self.skipped = 0

    def wants(self, media_time: float) -> bool:
        if not self._interval:
            return True
        # A tolerance of a tenth of the interval: timestamps are rounded to
        # milliseconds by some muxers, and 25 of 25 fps has to stay 25.
        if media_time < self._due - self._interval * 0.1:
            self.skipped += 1
            return False
        self._due = max(self._due + self._interval, media_time)
        if self._due <= media_time:
            self._due = media_time + self._interval
        return True
