"""How much of a stream is taken, by its own wish and while the server thins: pure."""

from __future__ import annotations

from typing import Final

_BURST: Final = 2.0
"""Pictures that may be owed to a stream: one, and the part of another by which the camera's own
rhythm misses the rate, so that over time exactly the rate is taken."""
_TELL_NS: Final = 1_000_000_000
"""Least time between two changes of a rate that the client is told."""
_LEAST_FPS: Final = 0.1
"""What is told of a rate below; 0 would mean the opposite."""
_GOLDEN: Final = 0.618034
_EARLY: Final = 0.1
"""Part of a beat by which a picture may come before it: time stamps are rounded to milliseconds
by cameras and files, and 30 of 30 pictures a second have to stay 30."""


class Pace:
    """Takes ``rate`` pictures a second of a stream, evenly; all while it is ``None``."""

    __slots__ = ("_level", "_since_ns", "rate")

    def __init__(self, lane_id: int) -> None:
        self.rate: float | None = None
        # Streams that are thinned from the same moment on do not come all at once.
        self._level = lane_id * _GOLDEN % 1.0
        self._since_ns = 0

    def change(self, rate: float | None, now_ns: int) -> None:
        if self.rate is None:
            self._since_ns = now_ns
        else:
            self._earn(now_ns, self.rate)
        self.rate = rate

    def takes(self, now_ns: int) -> bool:
        """Whether a picture that comes now is taken."""
        rate = self.rate
        if rate is None:
            return True
        self._earn(now_ns, rate)
        if self._level < 1.0:
            return False
        self._level -= 1.0
        return True

    def _earn(self, now_ns: int, rate: float) -> None:
        self._level = min(_BURST, self._level + rate * (now_ns - self._since_ns) / 1e9)
        self._since_ns = now_ns


class Parts:
    """Takes a part of what comes one after the other (groups of pictures), evenly."""

    __slots__ = ("_level", "part")

    def __init__(self, lane_id: int) -> None:
        self.part = 1.0
        # As of ``Pace``: streams whose key frames come together are not all left out together.
        self._level = lane_id * _GOLDEN % 1.0

    def takes(self) -> bool:
        """Whether the next one is taken."""
        self._level += self.part
        if self._level < 1.0:
            return False
        self._level -= 1.0
        return True


class Rhythm:
    """Takes at most ``fps`` pictures a second of media time, those nearest behind the beats of an
    even rhythm, so that a camera's own rate is not rounded down to one that divides it."""

    __slots__ = ("_beat_ns", "_next_ns")

    def __init__(self, fps: float) -> None:
        self._beat_ns = 1e9 / fps
        self._next_ns: float | None = None

    def takes(self, at_ns: int) -> bool:
        """Whether the picture of this moment is taken; moments do not go back."""
        if self._next_ns is None:
            self._next_ns = float(at_ns)
        late = at_ns + _EARLY * self._beat_ns - self._next_ns
        if late < 0:
            return False
        self._next_ns += self._beat_ns * (late // self._beat_ns + 1)
        return True


class ToldRate:
    """What a client knows of the rate at which its pictures are taken."""

    __slots__ = ("_fps", "_told_ns")

    def __init__(self) -> None:
        self._fps = 0.0
        self._told_ns = 0

    def change(self, fps: float | None, now_ns: int) -> float | None:
        """What it is to be told of this rate (``None`` = all pictures), if anything; 0 = all."""
        told, rate = self._fps, 0.0 if fps is None else max(fps, _LEAST_FPS)
        on_off = (told == 0.0) is not (rate == 0.0)
        if on_off or (abs(rate - told) > 0.2 * told and now_ns - self._told_ns > _TELL_NS):
            self._fps, self._told_ns = rate, now_ns
            return rate
        return None
