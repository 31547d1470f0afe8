"""Who is logged in: keys are kept here, and browsers hold a random word for them. Pure.

A session ends when it was not used for ``IDLE_S``, and in any case after ``LONGEST_S``; there are
at most ``MOST`` of them, and ``PER_KEY`` of one key, whose oldest makes room: no key takes the room
of the others.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

IDLE_S: Final = 30 * 60.0
LONGEST_S: Final = 12 * 3600.0
MOST: Final = 256
PER_KEY: Final = 16
TRIES: Final = 10
"""Log-ins that may fail, or be under way, in ``TRIES_S``, of one address; then it waits."""
ALL_TRIES: Final = 100
"""Of all addresses together."""
TRIES_S: Final = 60.0

C = TypeVar("C")


@dataclass(slots=True)
class Session(Generic[C]):
    """``client``: speaks with the server, with the key that was shown. ``csrf``: the page sends it
    with whatever changes something."""

    client: C
    may: dict[str, bool]
    began: float
    used: float
    owner: str = ""
    """Which key it is of, without being it."""
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    def accepts(self, token: str) -> bool:
        return hmac.compare_digest(self.csrf.encode(), token.encode())


class Sessions(Generic[C]):
    """All of them. What is taken out has a client that is to be closed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by_word: dict[str, Session[C]] = {}
        self._tries: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._by_word)

    def may_try(self, address: str) -> bool:
        """Whether a key may be tried now; counts as one that failed until ``succeeded``, so that
        many at once are no way around it."""
        now = self._clock()
        self._tries = [one for one in self._tries if now - one[0] < TRIES_S]
        own = sum(one[1] == address for one in self._tries)
        if own >= TRIES or len(self._tries) >= ALL_TRIES:
            return False
        self._tries.append((now, address))
        return True

    def succeeded(self, address: str) -> None:
        """The key that was tried last from there was no wrong one."""
        last = max((i for i, one in enumerate(self._tries) if one[1] == address), default=-1)
        if last >= 0:
            del self._tries[last]

    def crowded(self, owner: str) -> list[Session[C]]:
        """Takes out the oldest of a key, until there is room for one more of it."""
        own = [word for word, session in self._by_word.items() if session.owner == owner]
        return [self._by_word.pop(word) for word in own[: max(0, len(own) - PER_KEY + 1)]]

    def begin(
        self, client: C, may: dict[str, bool], owner: str = ""
    ) -> tuple[str, Session[C]] | None:
        """The browser's word and the session; None where there is no room."""
        if len(self._by_word) >= MOST:
            return None
        word, now = secrets.token_urlsafe(32), self._clock()
        session = self._by_word[word] = Session(client, may, now, now, owner)
        return word, session

    def find(self, word: str) -> Session[C] | None:
        """The session of a word, which counts as used."""
        session = self._by_word.get(word)
        if session is None or self._is_over(session):
            return None
        session.used = self._clock()
        return session

    def end(self, word: str) -> Session[C] | None:
        return self._by_word.pop(word, None)

    def over(self) -> list[Session[C]]:
        """Takes out those that have ended by themselves."""
        gone = [word for word, session in self._by_word.items() if self._is_over(session)]
        return [self._by_word.pop(word) for word in gone]

    def all(self) -> list[Session[C]]:
        """Takes out everybody."""
        gone, self._by_word = list(self._by_word.values()), {}
        return gone

    def _is_over(self, session: Session[C]) -> bool:
        now = self._clock()
        return now - session.used > IDLE_S or now - session.began > LONGEST_S
