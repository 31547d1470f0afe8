"""What each key may take at a time and ask in a minute, and the share kept for operators.

Pure counting on the event loop. A place is held by a ``with`` block, from the first byte to the
last. Without keys there is one caller, an operator, and only the server's own bounds count.
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections import Counter
from collections.abc import Callable, Iterator

from facelane_server import limits
from facelane_server.config import Config
from facelane_server.domain import FacelaneError, Reason
from facelane_server.edge.roles import Caller
from facelane_server.lanes import Allowance
from facelane_server.shards.board import COUNTS, Holdings


class Kind(enum.StrEnum):
    """What a call takes a place of."""

    STREAMS = "streams"
    CALLS = "calls"
    WATCHERS = "watchers"
    VIEWERS = "viewers"
    """Who look at streams."""
    HEALTH = "health"
    """Those who watch health. Not in the configuration: clients do it by themselves."""


assert len(Kind) == COUNTS, "shards tell each other of every kind"
_PLACE = {kind: place for place, kind in enumerate(Kind)}
_CONFIGURED = (Kind.STREAMS, Kind.VIEWERS)
"""Whose number in all is the operator's to choose, and of the whole server; the others' protect a
process."""

_ADVICE = {
    Kind.STREAMS: "close one or raise limits.max_streams",
    Kind.CALLS: "try again, or use a stream",
    Kind.WATCHERS: "end one, or share its events",
    Kind.VIEWERS: "end one, or share its pictures",
    Kind.HEALTH: "go without",
}


class Quotas:
    """Places by key, and the bytes that a key's pictures may hold."""

    def __init__(
        self,
        config: Config,
        *,
        clock: Callable[[], float] = time.monotonic,
        elsewhere: Holdings | None = None,
    ) -> None:
        """``elsewhere``: what other shards of this server have under way."""
        self._elsewhere = elsewhere
        chosen = config.quotas
        self._each = {
            Kind.STREAMS: chosen.streams,
            Kind.CALLS: chosen.calls,
            Kind.WATCHERS: chosen.watchers,
            Kind.VIEWERS: config.view.watchers_of_key,
            Kind.HEALTH: limits.MAX_HEALTH_WATCHERS // 4,
        }
        self._all = {
            Kind.STREAMS: config.limits.max_streams,
            Kind.CALLS: limits.MAX_CALLS,
            Kind.WATCHERS: limits.MAX_EVENT_WATCHERS,
            Kind.VIEWERS: config.view.watchers,
            Kind.HEALTH: limits.MAX_HEALTH_WATCHERS,
        }
        self._held_bytes = chosen.held_mib * limits.MIB
        self._taken: Counter[Kind] = Counter()
        self._by_key: Counter[tuple[str, Kind]] = Counter()
        self._allowances: dict[str, tuple[Allowance, int]] = {}
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """By key, as many as the keys file has: look-ups that are left, and when that was."""
        self.lookups: Counter[str] = Counter()
        """Faces looked up, by key; those that were refused are none."""

    @contextlib.contextmanager
    def place(self, kind: Kind, caller: Caller) -> Iterator[Allowance | None]:
        """A place among those of the kind, and the allowance of bytes that goes with the key.

        Raises ``FacelaneError`` (retryable): QUOTA_EXCEEDED when the key has its share already,
        STREAM_LIMIT or POOL_OVERLOADED when nobody's is left.
        """
        self._refuse(kind, caller)
        name = caller.name
        self._taken[kind] += 1
        self._by_key[name, kind] += 1
        self._tell(caller)
        try:
            with self._allowance(caller) as allowance:
                yield allowance
        finally:
            self._taken[kind] -= 1
            self._by_key[name, kind] -= 1
            if not self._by_key[name, kind]:
                del self._by_key[name, kind]
            self._tell(caller)

    def look_up(self, caller: Caller, per_minute: float) -> None:
        """Counts a face that is looked up. Raises ``FacelaneError(QUOTA_EXCEEDED)`` (retryable)
        when the key has had as many as it may within a minute."""
        if not self.may_look_up(caller, per_minute):
            wait_s = 60.0 / per_minute if per_minute else 60.0
            raise FacelaneError(
                Reason.QUOTA_EXCEEDED,
                f"the key `{caller.name}` may look up {per_minute:g} faces a minute, and has; "
                "wait, or ask for more",
                metadata={
                    "quota": "lookups_per_minute",
                    "limit": f"{per_minute:g}",
                    "retry_after_s": f"{wait_s:.0f}",
                },
                retryable=True,
            )

    def may_look_up(self, caller: Caller, per_minute: float) -> bool:
        """The same, as an answer; a face that may be looked up is counted."""
        name = caller.name
        if per_minute == float("inf"):
            self.lookups[name] += 1
            return True
        now = self._clock()
        full, at = self._buckets.get(name, (per_minute, now))
        left = min(per_minute, full + (now - at) * per_minute / 60.0)
        if self._elsewhere is not None:
            left -= self._elsewhere.looked_up(name)
        given = left >= 1.0
        self._buckets[name] = (left - given, now)
        if given:  # what was refused takes nothing away from anybody
            self.lookups[name] += 1
            if self._elsewhere is not None:
                self._elsewhere.tell_lookups(name, self.lookups[name])
        return given

    def taken(self, kind: Kind) -> int:
        return self._taken[kind]

    def full(self, kind: Kind) -> bool:
        """Whether nobody but operators finds a place."""
        return self._taken[kind] >= self._all[kind] - _kept(self._all[kind])

    def _refuse(self, kind: Kind, caller: Caller) -> None:
        if caller.known:
            mine = self._each[kind]
            if kind is Kind.STREAMS and caller.streams is not None:
                mine = caller.streams
            there = self._elsewhere.of(caller.name, _PLACE[kind]) if self._elsewhere else 0
            if self._by_key[caller.name, kind] + there >= mine:
                raise FacelaneError(
                    Reason.QUOTA_EXCEEDED,
                    f"the key `{caller.name}` has {mine} {kind.value} under way, which is its "
                    "share; end one, or ask for more",
                    metadata={"quota": kind.value, "limit": str(mine)},
                    retryable=True,
                )
        most = self._all[kind]
        room = most if caller.may("admin") else most - _kept(most)
        there = 0
        if self._elsewhere is not None and kind in _CONFIGURED:
            there = self._elsewhere.taken(_PLACE[kind])
        if self._taken[kind] + there >= room:
            raise FacelaneError(
                Reason.POOL_OVERLOADED if kind is Kind.CALLS else Reason.STREAM_LIMIT,
                f"{room} {kind.value} are under way, which is this server's limit; {_ADVICE[kind]}",
                metadata={"limit": str(room)},
                retryable=True,
            )

    def _tell(self, caller: Caller) -> None:
        if self._elsewhere is None:
            return
        self._elsewhere.tell_taken([self._taken[kind] for kind in Kind])
        if caller.known:
            self._elsewhere.tell(caller.name, [self._by_key[caller.name, kind] for kind in Kind])

    @contextlib.contextmanager
    def _allowance(self, caller: Caller) -> Iterator[Allowance | None]:
        """One for all that a key has under way; forgotten with the last of it."""
        if not caller.known:
            yield None
            return
        name = caller.name
        allowance, users = self._allowances.get(name, (Allowance(self._held_bytes), 0))
        self._allowances[name] = (allowance, users + 1)
        try:
            yield allowance
        finally:
            users = self._allowances[name][1] - 1
            if users:
                self._allowances[name] = (allowance, users)
            else:
                del self._allowances[name]


def _kept(most: int) -> int:
    """Places that only operators (``admin``) get."""
    return most // limits.OPERATORS_PART
