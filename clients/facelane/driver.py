"""What both clients have in common: everything but how they wait.

Where one of them would wait, the code here is a generator of *steps*: it yields the change
that it waits for and for how many seconds at most, and looks again when it goes on. The
blocking client waits at a condition with its lock held, the asyncio client at a future.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar

import grpc

from facelane import convert, transport
from facelane.errors import (
    AuthenticationError,
    DeadlineExceededError,
    FacelaneError,
    Reason,
)
from facelane.stream import (
    HalfClose,
    Obstacle,
    Phase,
    StreamCore,
    unreadable,
)
from facelane.subscription import Subscription
from facelane.tracing import Tracing
from facelane.types import (
    Outcome,
    Picture,
    Reconnect,
    StreamLimits,
    StreamOpened,
    StreamSummary,
    StreamUpdate,
)
from facelane.v1.analysis_service_pb2 import AnalyzeStreamRequest as Request
from facelane.v1.event_service_pb2_grpc import EventServiceStub

log = logging.getLogger("facelane")

T = TypeVar("T")
_PARK = 5.0
"""Seconds after which whoever waits looks again whether there still is a purpose."""


class Change(Protocol):
    """What can be waited for: ``threading.Condition``, or the asyncio client's own."""

    def notify(self) -> None:
        """Wakes one of those who wait."""

    def notify_all(self) -> None:
        """Wakes them all."""


C = TypeVar("C", bound=Change)
S = TypeVar("S")


class ClientBase(Generic[S]):
    """A client's settings, and the streams that it has to close."""

    def __init__(
        self,
        target: str | None = None,
        *,
        token: transport.AsyncToken | None = None,
        tls: transport.Tls | None = None,
        timeout: float = transport.DEFAULT_TIMEOUT,
        proxy: bool = True,
    ) -> None:
        self._endpoint = transport.endpoint(target, token, tls, proxy=proxy)
        self._channels = transport.Channels(self._endpoint)
        self.timeout = timeout
        self.tracing: Tracing | None = None
        """Whether, and how, calls with a picture are traced, and the frames of the streams that are
        made from here on."""
        self._closed = False
        self._open: weakref.WeakSet[S] = weakref.WeakSet()

    @property
    def target(self) -> str:
        """Where the client connects to."""
        return self._endpoint.target

    def __repr__(self) -> str:
        return f"{type(self).__module__.removesuffix('.client')}.Client({self.target!r})"

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the client was closed: make another")

    def _traced(self, request: Any) -> AbstractContextManager[tuple[tuple[str, str], ...]]:
        """Around a call: the metadata of its trace."""
        if self.tracing is None:
            return nullcontext(())
        return self.tracing.call(request, self._endpoint.failure)

    def _renewed(self, error: FacelaneError | None, shown: transport.Metadata) -> bool:
        """Whether a call that ended like this may go through with another token."""
        refused = isinstance(error, AuthenticationError) and not error.retryable
        return refused and self._endpoint.bearer.refused(shown)

    def _new_core(
        self, reconnect: Reconnect | None, buffer: int, stall_timeout: float
    ) -> StreamCore[Request]:
        self._check_open()
        return StreamCore(
            now=time.monotonic(),
            reconnect=reconnect,
            buffer=buffer,
            stall_timeout=stall_timeout,
            connect_timeout=self.timeout,
        )


class StreamBase(Generic[C]):
    """An ``AnalyzeStream`` apart from its waiting.

    ``lock`` guards the core; whoever waits, waits for one of four changes that ``change``
    makes.
    """

    _statement = "with"

    def __init__(
        self,
        client: ClientBase[Any],
        core: StreamCore[Request],
        config: Request,
        on_update: Callable[[StreamUpdate], None] | None,
        lock: AbstractContextManager[Any],
        change: Callable[[], C],
    ) -> None:
        self._endpoint = client._endpoint
        self._renewed = client._renewed
        self._core = core
        self._config = config
        self._timeout = client.timeout
        self._on_update = on_update
        tracing = client.tracing
        self._tracing = None if tracing is None else tracing.stream(config.config.source_id)
        self._lock = lock
        self._space = change()
        self._arrived = change()
        self._work = change()
        self._turn = change()
        self._reader: Any = None
        self._call: Any = None
        self._shown: transport.Metadata = ()
        self._generation = 0
        self._forsaken = False
        self._untold: StreamUpdate | None = None

    # State.

    @property
    def opened(self) -> StreamOpened | None:
        """What the server said when it last accepted the stream."""
        return self._core.opened

    @property
    def limits(self) -> StreamLimits | None:
        """The bounds that the server announced."""
        opened = self._core.opened
        return None if opened is None else opened.limits

    @property
    def connected(self) -> bool:
        """Whether frames can reach the server at this moment."""
        return self._core.phase is Phase.OPEN

    @property
    def ended(self) -> bool:
        """Whether the stream is over; outcomes may still lie here."""
        return self._core.phase is Phase.ENDED

    @property
    def updates(self) -> deque[StreamUpdate]:
        """The last updates, oldest first; take them with ``popleft``."""
        return self._core.updates

    @property
    def summary(self) -> StreamSummary:
        """The count so far, and of the whole stream once iteration has ended."""
        with self._lock:
            return self._core.summary()

    # What never waits.

    def try_send(
        self,
        picture: Picture,
        *,
        stream_offset: float | None = None,
        capture_time: datetime | None = None,
        frame_id: int | None = None,
    ) -> int | None:
        """Sends a frame if there is room for it now, otherwise gives ``None``.

        For cameras, which must not wait: the frame is dropped at its source.
        """
        self._check_entered()
        with self._lock:
            obstacle = self._core.obstacle()
            if obstacle is not None:
                if obstacle is not Obstacle.UNREAD:
                    self._end_if_overdue(time.monotonic())
                return None
            return self._submit(picture, stream_offset, capture_time, frame_id)

    def close_send(self) -> None:
        """Says that no more frames come; iteration ends after the last outcome."""
        with self._lock:
            self._core.close_send()
            self._wake_all()

    def _check_entered(self) -> None:
        if self._reader is None and not self.ended:
            raise RuntimeError(
                f"the stream is not open: use it in `{self._statement} ... as stream:`"
            )

    def _check_new(self) -> None:
        if self._reader is not None or self.ended:
            raise RuntimeError("a stream is opened once: make another with analyze_stream")

    # Steps. They run with the lock held; it is free while they wait.

    def _opening(self, deadline: float) -> Generator[tuple[C, float], None, None]:
        core = self._core
        while core.opened is None and core.phase is not Phase.ENDED:
            if not (yield from self._waiting(self._turn, deadline)):
                break
        if core.error is not None:
            raise core.error

    def _sending(
        self,
        picture: Picture,
        stream_offset: float | None,
        capture_time: datetime | None,
        timeout: float | None,
        frame_id: int | None,
    ) -> Generator[tuple[C, float], None, int]:
        if self._core.obstacle() is not None:
            limit = self._timeout if timeout is None else timeout
            deadline = time.monotonic() + limit
            while (obstacle := self._core.obstacle()) is not None:
                if not (yield from self._waiting(self._space, deadline)):
                    raise DeadlineExceededError(obstacle.value, obstacle.explain(limit))
        return self._submit(picture, stream_offset, capture_time, frame_id)

    def _receiving(self, timeout: float | None) -> Generator[tuple[C, float], None, Outcome | None]:
        core = self._core
        outcome = core.take()
        if outcome is None:
            deadline = math.inf if timeout is None else time.monotonic() + timeout
            while (outcome := core.take()) is None:
                if core.exhausted:
                    if core.error is not None:
                        raise core.error
                    return None
                if not (yield from self._waiting(self._arrived, deadline)):
                    raise DeadlineExceededError(
                        Reason.DEADLINE_EXCEEDED, f"no outcome within {timeout:.3g} s"
                    )
        self._space.notify()
        return outcome

    def _backing_off(self) -> Generator[tuple[C, float], None, int | None]:
        """Until a call is due: gives its generation, or ``None`` when the stream is over."""
        core = self._core
        while core.phase is Phase.BACKOFF and not self._forsaken:
            remaining = core.retry_at - time.monotonic()
            if remaining <= 0:
                core.connecting(time.monotonic())
                break
            yield self._turn, remaining
        due = core.phase is Phase.CONNECTING and not self._forsaken
        return self._generation if due else None

    def _writing(self, generation: int) -> Generator[tuple[C, float], None, Request | None]:
        """Until there is something to write: ``None`` when nothing more will be."""
        while self._generation == generation:
            payload = self._core.next_payload(time.monotonic())
            if isinstance(payload, HalfClose):
                break
            if payload is not None:
                return payload
            yield from self._waiting(self._work, math.inf)
        return None

    def _waiting(self, change: C, deadline: float) -> Generator[tuple[C, float], None, bool]:
        """Waits for a change until ``deadline``; false once it has passed.

        Every waiter also looks after the connection, so that a hanging server is noticed
        by whoever suffers from it.
        """
        now = time.monotonic()
        if self._end_if_overdue(now):
            return True
        if not now < deadline:
            return False
        overdue = self._core.overdue_at()
        # Never longer than _PARK: a lock cannot wait for ever, which either may say.
        until = min(deadline, now + _PARK, math.inf if overdue is None else overdue)
        yield change, max(0.001, until - now)
        return True

    # Inside, with the lock held.

    def _submit(
        self,
        picture: Picture,
        stream_offset: float | None,
        capture_time: datetime | None,
        frame_id: int | None,
    ) -> int:
        moment = None if capture_time is None else convert.timestamp(capture_time)

        def build(identifier: int, offset: float) -> Request:
            return convert.frame(identifier, picture, offset, moment)

        number = self._core.submit(
            convert.size(picture),
            build if self._tracing is None else self._tracing.traced(build),
            now=time.monotonic(),
            frame_id=frame_id,
            stream_offset=stream_offset,
            capture_time=capture_time,
        )
        self._work.notify()
        return number

    def _end_if_overdue(self, now: float) -> bool:
        error = self._core.overdue(now)
        if error is None:
            return False
        call = self._detach()
        # Told by the reader, whom the end of its call wakes: this may be anybody.
        self._untold = self._core.disconnected(error, now)
        self._wake_all()
        if call is not None:
            call.cancel()
        return True

    def _detach(self) -> Any:
        """Makes the present call a stranger: whatever it still says is not heard."""
        self._generation += 1
        if self._tracing is not None:
            self._tracing.lost()
        call, self._call = self._call, None
        return call

    def _wake_all(self) -> None:
        for change in (self._space, self._arrived, self._work, self._turn):
            change.notify_all()

    # Inside; these take the lock themselves.

    def _abandon(self) -> None:
        """The user lets go."""
        with self._lock:
            self._core.abort()
            call = self._detach()
            self._wake_all()
        if call is not None:
            call.cancel()

    def _first(self) -> Request:
        """What a connection begins with."""
        self._config.config.may_move = self._core.may_move
        return self._config

    def _heard(self, response: Any, generation: int) -> bool:
        """Takes a message of a call; false when that call is of no interest any more."""
        message = convert.stream_message(response)
        with self._lock:
            if self._generation != generation:
                return False
            update = self._core.receive(message, time.monotonic())
            if isinstance(message, Outcome):
                if self._tracing is not None:
                    self._tracing.settled(message)
                self._arrived.notify()
                self._space.notify()
            else:
                self._wake_all()
            moving = self._core.moving
        self._tell(update)
        return not moving

    def _failure(self, error: Exception) -> FacelaneError:
        """What a reader met, as the error that ends its call. A reader that died in silence
        would leave everybody waiting."""
        if isinstance(error, grpc.RpcError):
            return self._endpoint.failure(error)
        if isinstance(error, FacelaneError):
            return error
        unforeseen = unreadable(error)
        unforeseen.__cause__ = error
        return unforeseen

    def _over(self, generation: int, error: FacelaneError | None) -> None:
        """A call has ended."""
        with self._lock:
            if self._generation == generation:
                self._detach()
                renewed = self._renewed(error, self._shown)
                self._untold = self._core.disconnected(error, time.monotonic(), renewed=renewed)
            update, self._untold = self._untold, None
            self._wake_all()
        self._tell(update)

    def _tell(self, update: StreamUpdate | None) -> None:
        """Calls the user without the lock: the callback may use the stream."""
        if update is None or self._on_update is None:
            return
        try:
            self._on_update(update)
        except Exception:
            log.exception("on_update raised")


class EventStreamBase:
    """An ``EventStream`` apart from its waiting."""

    def __init__(self, client: ClientBase[Any], core: Subscription) -> None:
        self._endpoint = client._endpoint
        self._renewed = client._renewed
        self._channels = client._channels
        self._core = core
        self._call: Any = None
        self._shown: transport.Metadata = ()
        self._taken: list[Any] = []
        """The connection that it goes by while it is open; at most one."""

    @property
    def resume_token(self) -> str:
        """Goes on after what has arrived."""
        return self._core.resume_token

    def _stub(self, way: Any, own: EventServiceStub) -> Any:
        """``own``: the client's."""
        if not self._taken:
            self._taken.append(self._channels.take(way))
        channel = self._taken[0]
        return own if channel is None else EventServiceStub(channel)

    def _left(self) -> Any:
        """The connection that is to be closed now, if any."""
        try:
            channel = self._taken.pop()
        except IndexError:  # another thread was quicker, or nothing was taken
            return None
        return channel if self._channels.leave(channel) else None

    def _failed(self, error: FacelaneError | None, deadline: float) -> float | None:
        """Seconds before the next connection, see ``Subscription.failed``."""
        self._call = None
        renewed = self._renewed(error, self._shown)
        return self._core.failed(error, time.monotonic(), deadline, renewed=renewed)
