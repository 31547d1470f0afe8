"""Who has sent pictures that cost too much, and is refused for a while.

Strikes are counted for a stream, for a key's single pictures, and, with more patience, for
a key as a whole: a bridge's key carries many cameras, of which one may be hostile, and who
opens a stream for every picture is known by the key. Single pictures without a key cannot
be told apart, and are not counted.

Pure: times are arguments.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final

from facelane_server import limits
from facelane_server.pools.tasks import AnyTask

_S: Final = 1_000_000_000

Name = tuple[str, int | None]
"""A key, and a stream of it, ``_CALLS``, or None for the key as a whole."""
_CALLS: Final = -1


class _Record:
    def __init__(self) -> None:
        self.strikes: deque[int] = deque(maxlen=limits.BAD_PICTURES_OF_KEY)
        self.refused_until_ns = 0


class Offenders:
    """At most ``MAX_OFFENDERS`` are remembered; the one whose last strike is oldest is
    forgotten first."""

    def __init__(self) -> None:
        self._records: OrderedDict[Name, _Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def strike(self, task: AnyTask, now_ns: int) -> None:
        """A picture cost too much."""
        for name, most in _names(task):
            record = self._records.setdefault(name, _Record())
            self._records.move_to_end(name)
            recent = [t for t in record.strikes if now_ns - t < limits.BAD_PICTURES_S * _S]
            record.strikes = deque([*recent, now_ns], maxlen=limits.BAD_PICTURES_OF_KEY)
            if len(record.strikes) >= most:
                record.refused_until_ns = now_ns + limits.BAD_PICTURES_S * _S
        while len(self._records) > limits.MAX_OFFENDERS:
            self._records.popitem(last=False)

    def refused_s(self, task: AnyTask, now_ns: int) -> float:
        """For how long its sender is still refused; 0 = not at all."""
        if not self._records:
            return 0.0
        known = [self._records[name] for name, _ in _names(task) if name in self._records]
        return max((max(r.refused_until_ns - now_ns, 0) / _S for r in known), default=0.0)


def _names(task: AnyTask) -> list[tuple[Name, int]]:
    """As whom a task's sender is known, and how many such pictures are too many."""
    key, live = task.sender.key, task.sender.live
    found: list[tuple[Name, int]] = []
    if live or key:
        found.append(((key, task.lane if live else _CALLS), limits.BAD_PICTURES))
    if key:
        found.append(((key, None), limits.BAD_PICTURES_OF_KEY))
    return found
