"""What a receiver may have lost with its connection, although it was sent, or even acknowledged.

A broker acknowledges what it holds in memory; syslog acknowledges nothing. So what was sent last is
sent again when a connection broke, before anything new: first deliveries stay in order, and what
comes twice has the same id. Pure.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Generic, TypeVar

T = TypeVar("T")

MAX_BYTES: Final = 1 << 20
"""Of a receiver that acknowledges nothing."""


class Doubtful(Generic[T]):
    """The last ``limit`` bytes that were sent."""

    def __init__(self, limit: int = MAX_BYTES) -> None:
        self._limit = limit
        self._sent: deque[tuple[int, T]] = deque()
        self._again: deque[tuple[int, T]] = deque()
        self._bytes = 0

    def sent(self, item: T, size: int) -> None:
        self._sent.append((size, item))
        self._bytes += size
        while self._bytes > self._limit and len(self._sent) > 1:
            self._bytes -= self._sent.popleft()[0]

    def broke(self) -> None:
        """Everything is to be sent again, in its order."""
        self._again.extendleft(reversed(self._sent))
        self._sent.clear()
        self._bytes = 0

    def next(self) -> T | None:
        """The first that is to be sent again; ``None``: nothing is left."""
        return self._again[0][1] if self._again else None

    def sent_again(self) -> None:
        """That one was."""
        size, item = self._again.popleft()
        self.sent(item, size)
