"""What a stream of video brings, before anybody decodes it: pure.

Each access unit is examined, and has its place in a group of pictures or is refused. Behind one
that is missing or broken there is nothing to be had until the next key frame.
"""

from __future__ import annotations

from typing import Final

from facelane_server import annexb
from facelane_server.domain import Encoding, FacelaneError, Reason
from facelane_server.lanes.allowance import Allowance
from facelane_server.lanes.pace import Parts
from facelane_server.pools.groups import Group

_LEFT_OUT: Final = 300
"""Access units of a group that is left out at most: of cameras that send a key frame now and then
alone, nothing is."""


class Footage:
    """One stream's. ``cache_bytes``: what is kept of a group of pictures; it counts in the
    ``allowance``, and goes where that is full: a key's room is for what waits. ``parts``: which
    groups are taken at all."""

    def __init__(
        self,
        max_pixels: int,
        cache_bytes: int,
        allowance: Allowance | None = None,
        parts: Parts | None = None,
    ) -> None:
        self._max_pixels = max_pixels
        self._cache_bytes = cache_bytes
        self._allowance = allowance
        self._parts = parts
        self._counted = 0
        self._encoding: Encoding | None = None
        self._leading = False
        """The group begins with a soft key frame, and what is shown before it may come."""
        self._reference: annexb.AccessUnit | None = None
        """The newest that others may need."""
        self.group: Group | None = None
        """The newest, while it goes on."""
        self.dry = False
        """A key frame is wanted."""
        self.thinned = False
        """What comes is of a group that is not taken."""
        self.length = 0
        """Of the group before, in access units."""
        self._since = 0

    @property
    def is_video(self) -> bool:
        return self._encoding is not None and self._encoding.is_video

    def knows(self, encoding: Encoding) -> bool:
        """Whether a frame of this encoding is a still like the one before, and nobody's concern
        here."""
        return encoding is self._encoding and not encoding.is_video

    def check(self, encoding: Encoding) -> None:
        """For every frame of the stream. Raises FacelaneError(ENCODING_CHANGED)."""
        before = self._encoding
        if before is None:
            self._encoding = encoding
        elif before is not encoding and (before.is_video or encoding.is_video):
            raise FacelaneError(
                Reason.ENCODING_CHANGED,
                f"the stream's frames were {before.value} before and are {encoding.value} now; "
                "video keeps to one encoding: open another stream",
            )

    def take(self, unit: bytes, encoding: Encoding) -> tuple[Group, int] | None:
        """The access unit's group and its number in it; None when it is ``thinned``, or cannot be
        decoded without a key frame that is not there. Raises FacelaneError for one that is
        refused."""
        try:
            known = self.group.format if self.group is not None else None
            seen = annexb.examine(unit, encoding, self._max_pixels, known)
        except FacelaneError:
            self.thinned = False
            self.lose()
            raise
        if seen.format is not None and self._begins(seen.key, seen.format):
            self.end()
            self.length, self._since = self._since, 0
            self.dry = False
            taken = self._parts is None or self._parts.takes()
            self.thinned = not taken and 0 < self.length <= _LEFT_OUT
            if not self.thinned:
                self.group = Group(encoding, seen.format, self._cache_bytes)
                self._leading = seen.key is annexb.Key.SOFT
                self._reference = None
        self._since += 1
        if self.thinned:
            if self._since > self.length:  # the next key frame should have come
                self.thinned = False
                self.lose()
            self._count()
            return None
        group = self.group
        if group is None or group.broken:
            self.lose()
            return None
        if seen.key is annexb.Key.NONE and self._leading:
            if seen.leading:
                return None  # it needs what was before the group, and nothing needs it
            self._leading = False
        missed = self._reference is not None and not seen.follows(self._reference, group.format)
        if missed or not group.append(unit):
            self.lose()
            return None
        if seen.reference:
            self._reference = seen
        self._count()
        return group, len(group) - 1

    def _count(self) -> None:
        if self._allowance is None:
            return
        if self.group is not None and self._allowance.full:
            self.group.trim()
        kept = self.group.size if self.group is not None else 0
        self._allowance.take(kept - self._counted)
        self._counted = kept

    def _begins(self, key: annexb.Key, found: annexb.Format) -> bool:
        """Whether a group begins here. One whose pictures are shown in another order goes on over
        a soft key frame while it is short enough to be kept, or those shown before it are lost."""
        group = self.group
        if key is not annexb.Key.SOFT:
            return key is annexb.Key.HARD
        return (
            group is None
            or group.broken
            or not found.reorder
            or found != group.format
            or not group.kept
            or group.size > self._cache_bytes // 2
        )

    def lose(self) -> None:
        """An access unit is missing: what follows waits for a key frame."""
        if self.is_video and not self.thinned:
            self.end()
            self.dry = True

    def end(self) -> None:
        """No access units follow those of the group."""
        if self.group is not None:
            self.group.closed = True
            self.group = None

    def close(self) -> None:
        """The stream is over. Safe to call twice."""
        self.end()
        self._count()
