"""One stream as a state machine, without sockets, threads, tasks or clocks.

The blocking and the asyncio client drive the same ``StreamCore``; it alone decides what may
be sent, what every frame's outcome is and when to connect again.

::

    CONNECTING ──opened──► OPEN ──half-closed──► FINISHING ──ended──► ENDED
        ▲  │                │                        │
        │  └───failed───┐   └──────broken──────┐     └──broken, or drained by the server──┐
        │               ▼                      ▼                                          ▼
        └──retry_at── BACKOFF (reconnect only; otherwise ENDED with the error)

What holds at every moment, whatever the server does:

- every frame that was submitted gets exactly one outcome, in increasing frame id;
- at most ``window`` frames are without an outcome, and at most ``buffer`` are without an
  outcome or unread. A frame reserves the place of its outcome when it is submitted, so the
  reader never has to stop reading and a slow user never makes the server's queue grow;
- frames in flight when a connection breaks are settled with CONNECTION_LOST; whether to
  send such a picture again is for the caller to say.
"""

from __future__ import annotations

import dataclasses
import enum
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Generic, TypeVar

from facelane.errors import (
    ArgumentError,
    ConnectionLostError,
    FacelaneError,
    PictureError,
    ProtocolError,
    Reason,
    StreamClosedError,
    UnavailableError,
)
from facelane.types import (
    FrameDrop,
    FrameError,
    FrameResult,
    Outcome,
    Reconnect,
    StreamOpened,
    StreamSummary,
    StreamUpdate,
    StreamUpdateKind,
)

T = TypeVar("T")

DEFAULT_BUFFER: Final = 1024
"""Frames in flight or unread: at 25 frames/s a reader may pause for 40 s."""
DEFAULT_STALL_TIMEOUT: Final = 30.0
STEADY: Final = 1.0
"""Seconds after which a connection that breaks was one. What breaks sooner, again and again, is
a server or a proxy that will not have it: the waits between tries go on growing."""
MAX_MOVES: Final = 4
"""How often a stream that is being opened goes to another process of the server that has more room:
from the client's connection, then from one by chance to the next, of which half would be right."""
UPDATES_KEPT: Final = 256
"""Updates kept for a user who does not read them; the oldest go first."""

Message = StreamOpened | Outcome | StreamUpdate | StreamSummary


class Phase(enum.StrEnum):
    """Where a stream is in its life."""

    CONNECTING = "connecting"
    OPEN = "open"
    FINISHING = "finishing"
    BACKOFF = "backoff"
    ENDED = "ended"


# From which phases a message of the server is legal.
_OUTCOME_PHASES = frozenset({Phase.OPEN, Phase.FINISHING})
# Phases with a call under way.
_LIVE = frozenset({Phase.CONNECTING, Phase.OPEN, Phase.FINISHING})
# Statuses that gRPC itself or a proxy gives when a connection dies under a call.
_BROKEN_STATUSES = frozenset({"UNAVAILABLE", "CANCELLED", "INTERNAL", "UNKNOWN"})


class Obstacle(enum.Enum):
    """Why a frame cannot be sent at this moment."""

    NOT_CONNECTED = Reason.NOT_CONNECTED
    WINDOW = Reason.WINDOW_FULL
    UNREAD = Reason.OUTCOMES_UNREAD

    def explain(self, waited: float) -> str:
        """The obstacle, and what to do about it."""
        return f"waited {waited:.3g} s: {_ADVICE[self]}"


_ADVICE = {
    Obstacle.NOT_CONNECTED: "the stream is not connected; it tries again by itself",
    Obstacle.WINDOW: "the server has not answered the frames in flight; give a longer timeout, "
    "or drop frames at the source with try_send",
    Obstacle.UNREAD: "outcomes lie unread; iterate over the stream in another thread or task",
}


class HalfClose(enum.Enum):
    """What ``next_payload`` gives when nothing more will be sent on this connection."""

    HALF_CLOSE = "half_close"


HALF_CLOSE: Final = HalfClose.HALF_CLOSE


@dataclass(slots=True)
class _InFlight:
    frame_id: int
    stream_offset: float
    capture_time: datetime | None
    sent_at: float


class StreamCore(Generic[T]):
    """The state of one stream. ``T`` is whatever the driver writes to its connection.

    ``now`` is always the driver's monotonic clock in seconds. Not thread-safe: the driver
    brings the lock.
    """

    def __init__(
        self,
        *,
        now: float,
        reconnect: Reconnect | None = None,
        buffer: int = DEFAULT_BUFFER,
        stall_timeout: float = DEFAULT_STALL_TIMEOUT,
        connect_timeout: float = 10.0,
        random_unit: Callable[[], float] = random.random,
    ) -> None:
        if buffer < 1 or not stall_timeout > 0:
            raise ArgumentError(
                Reason.CONFIG_INVALID,
                f"buffer {buffer}, stall_timeout {stall_timeout}: both must be positive",
            )
        self._reconnect = reconnect
        self._buffer = buffer
        self._stall_timeout = stall_timeout
        self._connect_timeout = connect_timeout
        self._random_unit = random_unit

        self.phase = Phase.CONNECTING
        self.opened: StreamOpened | None = None
        self.error: FacelaneError | None = None
        self.retry_at = 0.0
        self.updates: deque[StreamUpdate] = deque(maxlen=UPDATES_KEPT)

        self._window = 0
        self._closing = False
        self._leaving = False
        self._since = now
        self._progress_at = now
        self._opened_at = now
        self._epoch: float | None = None
        self._attempts = 0
        self._haste = 0
        self._renewed = False
        self._connections = 0
        self._moves = 0
        self._moving = False
        self.moved: str | None = None
        """Where the server has sent the next connection, see ``StreamOpened.move``."""

        self._in_flight: deque[_InFlight] = deque()
        self._outbox: deque[T] = deque()
        self._inbox: deque[Outcome] = deque()
        self._last_id = 0
        self._last_offset = 0.0

        self._submitted = 0
        self._results = 0
        self._drops: Counter[str] = Counter()
        self._errors = 0
        self._lost = 0
        self._faces = 0
        self._tracks = 0
        self._summarised = False
        # Results, drops and errors that the server gave on this connection.
        self._connection_counts = [0, 0, 0]

    # Sending.

    def obstacle(self) -> Obstacle | None:
        """Why a frame cannot be submitted now, or ``None``.

        Raises:
            FacelaneError: it never can be again (the stream failed, ended or was closed).
        """
        if self.phase is Phase.OPEN and not self._closing and not self._leaving:
            in_flight = len(self._in_flight)
            if in_flight >= self._window:
                return Obstacle.WINDOW
            if in_flight + len(self._inbox) >= self._buffer:
                return Obstacle.UNREAD
            return None
        if self.error is not None:
            raise self.error
        if self._closing or self.phase is Phase.ENDED:
            raise StreamClosedError(
                Reason.STREAM_CLOSED, "the stream has ended: open another with analyze_stream"
            )
        return Obstacle.NOT_CONNECTED

    def submit(
        self,
        size: int,
        build: Callable[[int, float], T],
        *,
        now: float,
        frame_id: int | None = None,
        stream_offset: float | None = None,
        capture_time: datetime | None = None,
    ) -> int:
        """Takes a frame of ``size`` bytes; call only when there is no obstacle.

        ``build`` makes what is to be written from the frame id and the media time. When it
        or a check raises, the frame was not taken.

        Raises:
            ArgumentError: the frame id or the stream offset went back.
            PictureError: the frame is larger than the server takes (PICTURE_TOO_LARGE).
        """
        assert self.obstacle() is None
        assert self.opened is not None
        assert self._epoch is not None
        limit = self.opened.limits.max_frame_bytes
        if limit and size > limit:
            raise PictureError(
                Reason.PICTURE_TOO_LARGE,
                f"a frame of {size} bytes: the server takes {limit}; compress or scale it down",
            )
        number = self._last_id + 1 if frame_id is None else frame_id
        if not self._last_id < number < 1 << 64:
            raise ArgumentError(
                Reason.FRAME_ID_NOT_INCREASING,
                f"frame id {number} after {self._last_id}: ids must increase, within 64 bits",
            )
        if stream_offset is None:
            offset = max(now - self._epoch, self._last_offset)
        elif stream_offset >= self._last_offset:
            offset = stream_offset
        else:
            raise ArgumentError(
                Reason.ARGUMENT_INVALID,
                f"stream_offset {stream_offset} after {self._last_offset}: media time must not "
                "go back; open another stream for another recording",
            )
        self._outbox.append(build(number, offset))
        self._in_flight.append(_InFlight(number, offset, capture_time, now))
        self._last_id = number
        self._last_offset = offset
        self._submitted += 1
        return number

    def close_send(self) -> None:
        """No more frames; outcomes still come. Again is harmless."""
        self._closing = True
        if self.phase is Phase.BACKOFF:
            # Nothing is in flight and nothing will be: connecting again would serve nobody.
            self._end(None)

    @property
    def closing(self) -> bool:
        """Whether ``close_send`` was called."""
        return self._closing

    def next_payload(self, now: float) -> T | HalfClose | None:
        """What to write now: a payload, the end of this connection's sending, or nothing yet."""
        if self.phase is not Phase.OPEN:
            return None
        if self._outbox:
            return self._outbox.popleft()
        if self._closing or self._leaving:
            self.phase = Phase.FINISHING
            # The server's time to sum up begins here: the camera may have rested for hours.
            self._since = now
            return HALF_CLOSE
        return None

    @property
    def writable(self) -> bool:
        """Whether ``next_payload`` would give something."""
        return self.phase is Phase.OPEN and bool(self._outbox or self._closing or self._leaving)

    # Receiving.

    def receive(self, message: Message | None, now: float) -> StreamUpdate | None:
        """Takes a message of the server; gives the update to tell the user about, if any.

        Raises:
            ProtocolError: the server broke the rules; the driver must call ``disconnected``
                with this error.
        """
        if isinstance(message, Outcome):
            self._settle(message, now)
            return None
        if isinstance(message, StreamOpened):
            return self._open(message, now)
        if isinstance(message, StreamSummary):
            self._summarise(message)
            return None
        if isinstance(message, StreamUpdate):
            if message.kind is StreamUpdateKind.DRAINING and self._reconnect is not None:
                self._leaving = True
            self.updates.append(message)
            return message
        return None

    def _open(self, message: StreamOpened, now: float) -> StreamUpdate | None:
        if self.phase is not Phase.CONNECTING:
            raise _violation("it opened the stream twice")
        if message.move is not None and self.may_move:
            self._moves += 1
            self._moving, self.moved = True, message.move
            return None
        self.phase = Phase.OPEN
        self._moves = 0
        self.opened = message
        self._window = message.limits.window
        # A buffer under the window would make the window a lie.
        self._buffer = max(self._buffer, self._window)
        self._since = self._progress_at = now
        self._leaving = self._summarised = self._renewed = False
        self._opened_at = now
        self._connection_counts = [0, 0, 0]
        self._connections += 1
        if self._epoch is None:
            self._epoch = now
            return None
        update = StreamUpdate(
            StreamUpdateKind.RECONNECTED, message=f"connection {self._connections} is open"
        )
        self.updates.append(update)
        return update

    def _settle(self, outcome: Outcome, now: float) -> None:
        if self.phase not in _OUTCOME_PHASES:
            raise _violation("it gave an outcome before it opened the stream")
        if not self._in_flight or self._in_flight[0].frame_id != outcome.frame_id:
            wanted = self._in_flight[0].frame_id if self._in_flight else "none"
            raise _violation(
                f"it gave the outcome of frame {outcome.frame_id} where {wanted} was due"
            )
        if len(self._in_flight) == len(self._outbox):
            raise _violation(f"it gave the outcome of frame {outcome.frame_id} before its receipt")
        frame = self._in_flight.popleft()
        self._progress_at = now
        self._attempts = 0
        body = outcome.body
        if isinstance(body, FrameResult):
            self._connection_counts[0] += 1
        elif isinstance(body, FrameDrop):
            self._connection_counts[1] += 1
        else:
            self._connection_counts[2] += 1
        self._deliver(dataclasses.replace(outcome, round_trip=now - frame.sent_at))

    def _deliver(self, outcome: Outcome) -> None:
        body = outcome.body
        if isinstance(body, FrameResult):
            self._results += 1
            self._faces += len(body.faces)
        elif isinstance(body, FrameDrop):
            self._drops[body.reason.value] += 1
        else:
            self._errors += 1
        self._inbox.append(outcome)

    def _summarise(self, summary: StreamSummary) -> None:
        if self.phase not in _OUTCOME_PHASES:
            raise _violation("it summed up a stream that it had not opened")
        counted = [summary.results, summary.drops, summary.errors]
        if counted != self._connection_counts or summary.received != sum(counted):
            raise _violation(
                f"it counted {summary.received} frames received and {counted} results, drops and "
                f"errors; {self._connection_counts} arrived here"
            )
        self._summarised = True
        self._tracks += summary.tracks

    def take(self) -> Outcome | None:
        """The next outcome, if one has arrived."""
        return self._inbox.popleft() if self._inbox else None

    @property
    def exhausted(self) -> bool:
        """Whether no outcome lies here and none will come."""
        return self.phase is Phase.ENDED and not self._inbox

    # The connection.

    @property
    def may_move(self) -> bool:
        """Whether the server may send this connection to another of its processes."""
        return self._moves < MAX_MOVES

    @property
    def moving(self) -> bool:
        """Whether it did: the call is of no use any more."""
        return self._moving

    @property
    def live(self) -> bool:
        """Whether a call is, or should be, under way."""
        return self.phase in _LIVE

    def connecting(self, now: float) -> None:
        """The driver starts a call."""
        assert self.phase in (Phase.BACKOFF, Phase.CONNECTING)
        self.phase = Phase.CONNECTING
        self._since = now

    def overdue_at(self) -> float | None:
        """When ``overdue`` may next be true, or ``None``."""
        if self.phase is Phase.CONNECTING:
            return self._since + self._connect_timeout
        if self._in_flight:
            return max(self._progress_at, self._in_flight[0].sent_at) + self._stall_timeout
        if self.phase is Phase.FINISHING:
            # The summary is all that is missing.
            return max(self._progress_at, self._since) + self._stall_timeout
        return None

    def overdue(self, now: float) -> FacelaneError | None:
        """The error with which the driver must end a call that does not get on."""
        at = self.overdue_at()
        if at is None or now < at or not self.live:
            return None
        if self.phase is Phase.CONNECTING:
            return UnavailableError(
                Reason.UNREACHABLE,
                f"the server did not open the stream within {self._connect_timeout:.3g} s: check "
                "that it runs, and its health",
            )
        return ConnectionLostError(
            Reason.CONNECTION_LOST,
            f"no outcome for {self._stall_timeout:.3g} s with {len(self._in_flight)} frames in "
            "flight: the server hangs, or stall_timeout is too short for its models",
        )

    def disconnected(
        self, error: FacelaneError | None, now: float, *, renewed: bool = False
    ) -> StreamUpdate | None:
        """The call is over, with its error if it failed. ``renewed``: the token was refused,
        and there may be another, which is tried once and at once.

        Afterwards the phase is ENDED, or BACKOFF and a new call is due at ``retry_at``.
        Gives the update to tell the user about, if any.
        """
        if self.phase is Phase.ENDED:
            return None
        if self._moving:
            self._moving = False
            self.phase, self.retry_at = Phase.BACKOFF, now
            return None
        self.moved, self._moves = None, 0
        was_open = self.phase in _OUTCOME_PHASES
        # A server that drains settles everything, sums up and only then says DRAINING.
        settled = self._summarised and not self._in_flight
        if error is None and not self._summarised:
            error = ConnectionLostError(
                Reason.CONNECTION_LOST, "the server ended the stream without a summary"
            )
        elif error is not None and was_open:
            error = as_lost(error)
        self._lose_in_flight(Reason.CONNECTION_LOST, error)

        if self._closing and (
            settled or error is None or (self._reconnect is not None and error.retryable)
        ):
            # Every frame has its outcome: there is nothing left to connect for.
            self._end(None)
            return None
        delay = self._delay(error, was_open, now, renewed)
        if delay is None:
            self._end(error)
            return None
        self.phase = Phase.BACKOFF
        self.retry_at = now + delay
        if settled or not was_open:
            return None
        update = StreamUpdate(
            StreamUpdateKind.CONNECTION_LOST, message=error.message if error else ""
        )
        self.updates.append(update)
        return update

    def _delay(
        self, error: FacelaneError | None, was_open: bool, now: float, renewed: bool
    ) -> float | None:
        """Seconds before the next call, ``None`` for none."""
        policy = self._reconnect
        if renewed and not self._renewed and (policy is not None or not was_open):
            self._renewed = True
            return 0.0
        if policy is None or (error is not None and not error.retryable):
            return None
        if was_open and not self._attempts and now - self._opened_at >= STEADY:
            self._haste = 0
        self._attempts += 1
        if policy.max_attempts and self._attempts > policy.max_attempts:
            return None
        self._haste += 1
        return policy.delay(self._haste, self._random_unit())

    def abort(self) -> None:
        """The user lets go. Frames in flight are settled as CANCELLED."""
        if self.phase is Phase.ENDED:
            return
        self._lose_in_flight(Reason.CANCELLED, None)
        self._closing = True
        self._end(None)

    def _lose_in_flight(self, reason: Reason, cause: FacelaneError | None) -> None:
        self._outbox.clear()
        cancelled = reason is Reason.CANCELLED
        message = (
            "the stream was closed before the outcome came"
            if cancelled
            else "the connection broke before the outcome came: send the picture again if it "
            "still matters"
        )
        metadata = {} if cause is None else {"cause": cause.reason}
        self._lost += 0 if cancelled else len(self._in_flight)
        while self._in_flight:
            frame = self._in_flight.popleft()
            body = FrameError(reason.value, message, not cancelled, metadata)
            self._deliver(Outcome(frame.frame_id, frame.stream_offset, frame.capture_time, body))

    def _end(self, error: FacelaneError | None) -> None:
        self.phase = Phase.ENDED
        self.error = error

    # The count.

    def summary(self) -> StreamSummary:
        """The count so far; of the whole stream when it has ended."""
        return StreamSummary(
            received=self._submitted - len(self._in_flight),
            results=self._results,
            drops=self._drops.total(),
            errors=self._errors,
            faces=self._faces,
            tracks=self._tracks,
            drops_by_reason=dict(self._drops),
            lost=self._lost,
            connections=self._connections,
        )


def _violation(what: str) -> ProtocolError:
    return ProtocolError(
        Reason.PROTOCOL_VIOLATION,
        f"the server broke the stream's rules: {what}; report this with both versions",
    )


def unreadable(error: Exception) -> ProtocolError:
    """The stream's end by what nobody foresaw; its text may hold anything, its kind does not."""
    return _violation(f"it said what cannot be read ({type(error).__name__})")


def as_lost(error: FacelaneError) -> FacelaneError:
    """gRPC's own words for a connection that died under a stream, as one error."""
    status = error.metadata.get("grpc_status")
    if status not in _BROKEN_STATUSES:
        return error
    said = error.metadata.get("grpc_message", "")
    return ConnectionLostError(
        Reason.CONNECTION_LOST,
        f"the connection to the server broke ({status}{': ' if said else ''}{said}): open it "
        "again, or give reconnect; a proxy on the way may limit the size and the time of streams",
        metadata=error.metadata,
    )
