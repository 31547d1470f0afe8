"""Who has sent pictures that cost too much, and is refused for a while.

One key may carry many cameras (a bridge's does), of which some are hostile and the others must not
pay for them. So strikes are counted for a stream, then for the source that it says it is, then for
the key:

* A *stream* with too many strikes is refused, and so are a key's single pictures with theirs.
* A *source* with too many is refused in every stream that has not shown that it sends something
  else: who comes back is known again, and whoever calls himself like an honest camera blinds none.
* A *key* with too many is refused what is new: streams of sources of which nothing good is known. A
  stream that has had pictures analysed, and no strike for a minute, goes on, and its source comes
  back; only with many times as many are all of a key's streams refused.

So whoever opens a stream, or makes up a source, for every bad picture gets as few of them in as a
key may send. Pictures without a key are blamed on their stream; single ones cannot be told apart,
and are not counted.

Pure: times are arguments.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final, TypeVar

from facelane_server import limits
from facelane_server.pools.tasks import AnyTask

K = TypeVar("K")

_S: Final = 1_000_000_000

Name = tuple[str, int | str | None]
"""A key, and the lane of a stream of it, ``_CALLS``, a source, or None for the key as a whole."""
_CALLS: Final = -1


class _Record:
    def __init__(self) -> None:
        self.strikes: deque[int] = deque(maxlen=limits.MOST_BAD_PICTURES_OF_KEY)
        self.refused_until_ns = 0
        self.closed_until_ns = 0
        """Of a key: to all of them."""


class Offenders:
    """At most ``MAX_OFFENDERS`` are remembered; the one whose last strike is oldest is
    forgotten first."""

    def __init__(self) -> None:
        self._records: OrderedDict[Name, _Record] = OrderedDict()
        self._lanes: dict[int, None] = {}
        """Streams that have had a picture analysed and no strike for a minute; and so sources."""
        self._sources: dict[tuple[str, str], None] = {}

    def __len__(self) -> int:
        return len(self._records)

    def passed(self, task: AnyTask, now_ns: int) -> None:
        """A picture was analysed."""
        key, source = task.sender.key, task.sender.source
        if task.lane in self._lanes or not (key and task.sender.live):
            return
        if self._struck((key, task.lane), now_ns):
            return
        _add(self._lanes, task.lane)
        if source and not self._struck((key, source), now_ns):
            _add(self._sources, (key, source))

    def _struck(self, name: Name, now_ns: int) -> bool:
        """Within the last minute."""
        found = self._records.get(name)
        return found is not None and now_ns - found.strikes[-1] < limits.BAD_PICTURES_S * _S

    def strike(self, task: AnyTask, now_ns: int) -> None:
        """A picture cost too much."""
        for name, most in _names(task):
            record = self._records.setdefault(name, _Record())
            self._records.move_to_end(name)
            recent = [t for t in record.strikes if now_ns - t < limits.BAD_PICTURES_S * _S]
            record.strikes = deque([*recent, now_ns], maxlen=limits.MOST_BAD_PICTURES_OF_KEY)
            until_ns = now_ns + limits.BAD_PICTURES_S * _S
            if len(record.strikes) >= most:
                record.refused_until_ns = until_ns
            if len(record.strikes) >= limits.MOST_BAD_PICTURES_OF_KEY:
                record.closed_until_ns = until_ns
        if task.sender.live:
            self._lanes.pop(task.lane, None)
            self._sources.pop((task.sender.key, task.sender.source), None)
        while len(self._records) > limits.MAX_OFFENDERS:
            self._records.popitem(last=False)

    def refused_s(self, task: AnyTask, now_ns: int) -> float:
        """For how long its sender is still refused; 0 = not at all."""
        if not self._records:
            return 0.0
        key, live, source = task.sender.key, task.sender.live, task.sender.source
        until_ns = 0
        if own := self._records.get((key, task.lane if live else _CALLS)):
            until_ns = own.refused_until_ns
        if key and live:
            known = task.lane in self._lanes
            if not known and source and (same := self._records.get((key, source))):
                until_ns = max(until_ns, same.refused_until_ns)
            if whole := self._records.get((key, None)):
                known = known or (key, source) in self._sources
                of_key = whole.closed_until_ns if known else whole.refused_until_ns
                until_ns = max(until_ns, of_key)
        return max(until_ns - now_ns, 0) / _S


def _names(task: AnyTask) -> list[tuple[Name, int]]:
    """As whom a task's sender is known, and how many such pictures are too many."""
    key, live, source = task.sender.key, task.sender.live, task.sender.source
    found: list[tuple[Name, int]] = []
    if live or key:
        found.append(((key, task.lane if live else _CALLS), limits.BAD_PICTURES))
    if key and live and source:
        found.append(((key, source), limits.BAD_PICTURES))
    if key:
        found.append(((key, None), limits.BAD_PICTURES_OF_KEY))
    return found


def _add(known: dict[K, None], one: K) -> None:
    known[one] = None
    while len(known) > limits.MAX_PROVEN:
        del known[next(iter(known))]  # the oldest
