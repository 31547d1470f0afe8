"""The end of a process that left streams of the blocking client open.

At its end the interpreter stops every thread where it is, with whatever locks it holds, and then
destroys what is left. A call of gRPC takes its lock to be destroyed, and gRPC's threads hold that
lock while they hear of an answer: whatever is destroyed from there may wait for ever. So all calls
are ended, and let go of, while there still are threads to do it.
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
import weakref
from typing import Any, Protocol, Self, TypeVar

JOIN_TIMEOUT = 5.0
"""Seconds for a thread of ours to end once its call was cancelled."""


class Open(Protocol):
    """What holds a call."""

    def _let_go(self, deadline: float) -> None:
        """Ends the call and forgets it, without a word: whoever waits for it goes on waiting."""


T = TypeVar("T", bound=Open)

_open: weakref.WeakSet[Open] = weakref.WeakSet()
_lock = threading.Lock()
"""A set of any kind must not grow while it is gone through."""


def keep(one: T, *others: weakref.WeakSet[Any]) -> T:
    """Remembers what is let go of at the end, and in ``others`` too."""
    with _lock:
        for kept in (_open, *others):
            kept.add(one)
    return one


def kept(some: weakref.WeakSet[T]) -> list[T]:
    """What there is now in a set of those that ``keep`` was given."""
    with _lock:
        return list(some)


@atexit.register
def _let_go_of_all() -> None:
    deadline = time.monotonic() + JOIN_TIMEOUT
    for one in kept(_open):
        one._let_go(deadline)


class Answers:
    """The answers of a call for a generator, whose frame must not hold the call itself."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        call = self._call
        if call is None:
            raise StopIteration
        return next(call)

    def close(self) -> None:
        """Ends the call. Again is harmless."""
        call, self._call = self._call, None
        if call is not None and not sys.is_finalizing():
            call.cancel()

    def _let_go(self, _deadline: float) -> None:
        """See ``Open``."""
        self.close()
