"""A subscription to events as a state machine, without sockets, threads, tasks or clocks.

Both clients drive it: it alone knows where to go on after a broken connection, when a server
is late, and whether another try is due.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable

from facelane import convert
from facelane.errors import DeadlineExceededError, FacelaneError, Reason, UnavailableError
from facelane.stream import STEADY, as_lost
from facelane.types import Event, EventKind, Reconnect
from facelane.v1.event_service_pb2 import WatchEventsRequest, WatchEventsResponse


class Subscription:
    """The state of one subscription over all its connections.

    ``now`` is always the driver's monotonic clock in seconds; ``timeout`` is how long a
    connection may take to begin, from the call to its first response, however often that
    was waited for.
    """

    def __init__(
        self,
        resume_token: str,
        kinds: Iterable[EventKind | str],
        reconnect: Reconnect | None,
        timeout: float,
        random_unit: Callable[[], float] = random.random,
        *,
        within: tuple[Iterable[str], Iterable[str]] = ((), ()),
    ) -> None:
        """``within``: sources and galleries; empty = all of them."""
        self._kinds = tuple(kinds)
        self._source_ids, self._gallery_ids = tuple(within[0]), tuple(within[1])
        self._reconnect = reconnect
        self.timeout = timeout
        self._random_unit = random_unit
        self._begun = False
        self._called_at = 0.0
        self._attempts = 0
        self._haste = 0
        self._renewed = False
        self.resume_token = resume_token
        self.inbox: deque[Event] = deque()
        """Events that have arrived: at most the one that came with the subscription itself."""
        # A wrong kind is told where it was given, not at the first event.
        self.call(0.0)

    def call(self, now: float) -> WatchEventsRequest:
        """A connection is made: what to ask for."""
        self._begun = False
        self._called_at = now
        return convert.watch_events_request(
            self.resume_token, self._kinds, self._source_ids, self._gallery_ids
        )

    def patience(self, now: float, deadline: float) -> float:
        """Seconds that the next response may take.

        Events may take as long as they like, but the first response is due at once: it says
        that the subscription has begun.
        """
        if self._begun:
            return math.inf
        return max(0.0, min(self._called_at + self.timeout, deadline) - now)

    def receive(self, response: WatchEventsResponse) -> None:
        """Takes a response of the server."""
        self._begun = True
        self._renewed = False
        self.resume_token = response.resume_token or self.resume_token
        if response.HasField("event"):
            # To have begun is not enough: what breaks at once, again and again, backs off.
            self._attempts = self._haste = 0
            self.inbox.append(convert.event(response))

    def never_began(self) -> DeadlineExceededError:
        """For ``failed``: the first response did not come in time."""
        return DeadlineExceededError(
            Reason.DEADLINE_EXCEEDED,
            f"the server did not begin the subscription within {self.timeout:.3g} s: look at its "
            "health",
        )

    def failed(
        self, error: FacelaneError | None, now: float, deadline: float, *, renewed: bool = False
    ) -> float | None:
        """The connection is over, without an error where the server ended it. ``renewed``: the
        token was refused, and there may be another.

        Gives the seconds before the next one, or ``None`` where none is due before
        ``deadline``.

        Raises:
            FacelaneError: none is due ever.
        """
        if error is None:
            error = UnavailableError(
                Reason.DRAINING, "the server ended the subscription: it is going away"
            )
        policy = self._reconnect
        if renewed and not self._renewed and (policy is not None or not self._begun):
            self._renewed = True
            return 0.0
        if self._begun:
            error = as_lost(error)
            if now - self._called_at >= STEADY:
                self._attempts = self._haste = 0
        self._attempts += 1
        self._haste += 1
        if policy is None or not error.retryable:
            raise error
        if policy.max_attempts and self._attempts > policy.max_attempts:
            raise error
        delay = policy.delay(self._haste, self._random_unit())
        return None if now + delay > deadline else delay
