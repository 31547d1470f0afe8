"""Who is logged in: keys are kept here, and browsers hold a random word for them. Pure.

A session ends when it was not used for ``IDLE_S``, and in any case after ``LONGEST_S``; there are
at most ``MOST`` of them.
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
TRIES: Final = 10
"""Log-ins that may fail in ``TRIES_S``, of all who try; then everybody waits."""
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
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    def accepts(self, token: str) -> bool:
        return hmac.compare_digest(self.csrf.encode(), token.encode())


class Sessions(Generic[C]):
    """All of them. ``take`` and ``end`` give back clients that are to be closed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by_word: dict[str, Session[C]] = {}
        self._failures: list[float] = []

    def __len__(self) -> int:
        return len(self._by_word)

    @property
    def may_try(self) -> bool:
        """Whether a key may be tried now."""
        now = self._clock()
        self._failures = [at for at in self._failures if now - at < TRIES_S]
        return len(self._failures) < TRIES

    def failed(self) -> None:
        """A key was refused."""
        self._failures.append(self._clock())

    def begin(self, client: C, may: dict[str, bool]) -> tuple[str, Session[C]] | None:
        """The browser's word and the session; None where there is no room."""
        if len(self._by_word) >= MOST:
            return None
        word, now = secrets.token_urlsafe(32), self._clock()
        session = self._by_word[word] = Session(client, may, now, now)
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
