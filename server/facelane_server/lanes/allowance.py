"""What several streams and calls of one key may hold together, in bytes of pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from facelane_server.domain import FacelaneError, Reason
from facelane_server.lanes.wake import Wake


class Allowance:
    """Counts; lanes that find it ``full`` wait until something is given back. Each may hold one
    picture whatever the count, so that none stands still."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._waiting: set[Wake] = set()

    @property
    def full(self) -> bool:
        return self._held >= self._limit

    def take(self, size: int) -> None:
        self._held += size

    def give(self, size: int) -> None:
        self._held -= size
        if not self.full:
            for lane in self._waiting:
                lane.set()
            self._waiting.clear()

    def wake(self, lane: Wake) -> None:
        """Wakes it once there is room."""
        self._waiting.add(lane)

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """For a single picture. Raises ``FacelaneError(QUOTA_EXCEEDED)``."""
        if self.full:
            raise FacelaneError(
                Reason.QUOTA_EXCEEDED,
                f"the key's pictures hold {self._held} bytes here, which is its share; wait for "
                "their answers",
                metadata={"quota": "held_bytes", "limit": str(self._limit)},
                retryable=True,
            )
        self.take(size)
        try:
            yield
        finally:
            self.give(size)
