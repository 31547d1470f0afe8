"""The asyncio client: the same calls as ``facelane.Client``, awaited.

A client belongs to the event loop in which it was first used. Per stream there are two
tasks, one that reads and one that writes; no task is made for a frame.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Mapping,
)
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast

import grpc
import grpc.aio

from facelane import calls, convert, types
from facelane.client import retry_delay
from facelane.errors import (
    DeadlineExceededError,
    FacelaneError,
    NotFoundError,
    ProtocolError,
    Reason,
    UnavailableError,
    from_rpc,
)
from facelane.stream import (
    DEFAULT_BUFFER,
    DEFAULT_STALL_TIMEOUT,
    HalfClose,
    Obstacle,
    Phase,
    StreamCore,
    as_lost,
    unreadable,
)
from facelane.transport import (
    DEFAULT_TIMEOUT,
    Tls,
    endpoint,
)
from facelane.types import (
    AnalysisOptions,
    Enrollment,
    Event,
    EventKind,
    Face,
    Frame,
    FrameResult,
    HealthStatus,
    ModelReloaded,
    Outcome,
    Picture,
    PoolInfo,
    Reconnect,
    ServerInfo,
    StreamLimits,
    StreamOpened,
    StreamOptions,
    StreamSummary,
    StreamUpdate,
    Subject,
    Template,
    Verification,
    WorkerRestarted,
)
from facelane.v1 import analysis_service_pb2, event_service_pb2

log = logging.getLogger("facelane")

T = TypeVar("T")

_Request = analysis_service_pb2.AnalyzeStreamRequest
_EventResponse = event_service_pb2.WatchEventsResponse
_PARK = 5.0
"""Seconds after which a parked task looks again whether it still has a purpose."""


class Client:
    """A connection to one server, for one event loop.

    Arguments as for ``facelane.Client``. Close it, or use it as an async context manager.

    >>> async with facelane.aio.Client() as client:
    ...     result = await client.analyze_image(picture)
    ...     len(result.faces)
    1
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        self._endpoint = endpoint(target, token, tls)
        self.timeout = timeout
        self._made: tuple[grpc.aio.Channel, calls.Stubs] | None = None
        self._closed = False
        self._open: weakref.WeakSet[AnalyzeStream | EventStream] = weakref.WeakSet()

    @property
    def target(self) -> str:
        """Where the client connects to."""
        return self._endpoint.target

    @property
    def _stubs(self) -> calls.Stubs:
        """Made on first use, because the channel belongs to the loop that runs then."""
        self._check_open()
        if self._made is None:
            where = self._endpoint
            channel = (
                grpc.aio.insecure_channel(where.target, options=where.options)
                if where.credentials is None
                else grpc.aio.secure_channel(where.target, where.credentials, options=where.options)
            )
            self._made = channel, calls.Stubs(cast("grpc.Channel", channel))
        return self._made[1]

    def _check_open(self) -> None:
        if self._closed:
            raise calls.closed()

    async def close(self) -> None:
        """Closes the streams that are open, then the connection. Again is harmless."""
        self._closed = True
        for stream in list(self._open):
            await stream.close()
        made, self._made = self._made, None
        if made is not None:
            await made[0].close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"facelane.aio.Client({self.target!r})"

    async def _do(self, call: calls.Call[T], timeout: float | None) -> T:
        try:
            answer = await call.method(self._stubs)(
                call.request,
                timeout=calls.deadline(self.timeout if timeout is None else timeout),
                metadata=self._endpoint.metadata,
            )
        except grpc.RpcError as error:
            raise from_rpc(error) from error
        return call.read(answer)

    # Analysis.

    async def analyze_image(
        self,
        picture: Picture,
        *,
        timeout: float | None = None,
        **options: Unpack[AnalysisOptions],
    ) -> FrameResult:
        """As ``facelane.Client.analyze_image``."""
        return await self._do(calls.analyze_image(picture, **options), timeout)

    def analyze_stream(
        self,
        *,
        on_update: Callable[[StreamUpdate], None] | None = None,
        reconnect: Reconnect | None = None,
        buffer: int = DEFAULT_BUFFER,
        stall_timeout: float = DEFAULT_STALL_TIMEOUT,
        **options: Unpack[types.StreamConfigOptions],
    ) -> AnalyzeStream:
        """As ``facelane.Client.analyze_stream``; ``on_update`` is called in the event loop.

        >>> async with client.analyze_stream(overload="lossless") as stream:
        ...     for picture in pictures:
        ...         frame_id = await stream.send(picture)
        ...     stream.close_send()
        ...     async for outcome in stream:
        ...         if outcome.result:
        ...             print(outcome.frame_id, len(outcome.result.faces))
        1 1
        2 1
        3 1
        """
        self._check_open()
        stream = AnalyzeStream(
            self._start_stream,
            convert.stream_config(**options),
            StreamCore(
                now=time.monotonic(),
                reconnect=reconnect,
                buffer=buffer,
                stall_timeout=stall_timeout,
                connect_timeout=self.timeout,
            ),
            self.timeout,
            on_update,
        )
        self._open.add(stream)
        return stream

    def _start_stream(self) -> Any:
        analysis: Any = self._stubs.analysis
        return analysis.AnalyzeStream(metadata=self._endpoint.metadata)

    async def analyze(
        self,
        frames: Iterable[Picture | Frame] | AsyncIterable[Picture | Frame],
        **options: Unpack[StreamOptions],
    ) -> AsyncGenerator[Outcome, None]:
        """As ``facelane.Client.analyze``; lossless unless ``overload`` says otherwise.

        A plain iterable is drawn from in the event loop: give an asynchronous one where
        making a frame takes long. Close the generator (``contextlib.aclosing``) when you
        leave it early.
        """
        options.setdefault("overload", types.Overload.LOSSLESS)
        async with self.analyze_stream(**options) as stream:
            pump = asyncio.create_task(_pump(frames, stream))
            try:
                async for outcome in stream:
                    yield outcome
            except BaseException:
                pump.cancel()
                await asyncio.wait([pump])
                raise
            if not pump.done():
                # The stream ended under it. It may wait for a camera that gives nothing more.
                pump.cancel()
                await asyncio.wait([pump])
                return
            await pump

    # The gallery.

    async def create_subject(
        self,
        subject_id: str,
        *,
        display_name: str = "",
        labels: Mapping[str, str] | None = None,
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> Subject:
        """As ``facelane.Client.create_subject``."""
        return await self._do(
            calls.create_subject(subject_id, gallery, display_name, labels), timeout
        )

    async def get_subject(
        self,
        subject_id: str,
        *,
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> Subject:
        """As ``facelane.Client.get_subject``."""
        return await self._do(calls.get_subject(subject_id, gallery), timeout)

    async def list_subjects(
        self,
        *,
        gallery: str = convert.DEFAULT_GALLERY,
        page_size: int = calls.DEFAULT_PAGE_SIZE,
        timeout: float | None = None,
    ) -> AsyncIterator[Subject]:
        """As ``facelane.Client.list_subjects``."""
        token = ""
        while True:
            page = calls.list_subjects(gallery, page_size, token)
            subjects, token = await self._do(page, timeout)
            for subject in subjects:
                yield subject
            if not token:
                return

    async def update_subject(
        self,
        subject_id: str,
        *,
        display_name: str | None = None,
        labels: Mapping[str, str] | None = None,
        etag: str = "",
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> Subject:
        """As ``facelane.Client.update_subject``."""
        return await self._do(
            calls.update_subject(subject_id, gallery, display_name, labels, etag), timeout
        )

    async def delete_subject(
        self,
        subject_id: str,
        *,
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> int:
        """As ``facelane.Client.delete_subject``."""
        return await self._do(calls.delete_subject(subject_id, gallery), timeout)

    async def list_templates(
        self,
        subject_id: str,
        *,
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> list[Template]:
        """As ``facelane.Client.list_templates``."""
        return await self._do(calls.list_templates(subject_id, gallery), timeout)

    async def delete_template(
        self,
        template_id: str,
        *,
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> None:
        """As ``facelane.Client.delete_template``."""
        await self._do(calls.delete_template(template_id, gallery), timeout)

    async def enroll(
        self,
        subject_id: str,
        picture: Picture,
        *,
        create_subject: bool = True,
        display_name: str = "",
        request_id: str | None = None,
        allow_multiple_faces: bool = False,
        skip_liveness: bool = False,
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> Enrollment:
        """As ``facelane.Client.enroll``."""
        call = calls.enroll(
            subject_id,
            picture,
            gallery=gallery,
            create_subject=create_subject,
            display_name=display_name,
            request_id=request_id,
            allow_multiple_faces=allow_multiple_faces,
            skip_liveness=skip_liveness,
        )
        return await self._do(call, timeout)

    async def verify(
        self,
        subject_id: str,
        picture: Picture,
        *,
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> Verification:
        """As ``facelane.Client.verify``."""
        return await self._do(calls.verify(subject_id, picture, gallery), timeout)

    async def identify(
        self,
        picture: Picture,
        *,
        max_candidates: int = 3,
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> list[Face]:
        """As ``facelane.Client.identify``."""
        return await self._do(calls.identify(picture, gallery, max_candidates), timeout)

    # The server.

    async def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """As ``facelane.Client.server_info``."""
        return await self._do(calls.server_info(), timeout)

    async def pools(self, *, timeout: float | None = None) -> list[PoolInfo]:
        """As ``facelane.Client.pools``."""
        return await self._do(calls.pools(), timeout)

    async def health(self, service: str = "", *, timeout: float | None = None) -> HealthStatus:
        """As ``facelane.Client.health``."""
        try:
            return await self._do(calls.health(service), timeout)
        except NotFoundError:
            return HealthStatus.SERVICE_UNKNOWN

    async def wait_until_serving(
        self, timeout: float = 60.0, *, service: str = "", poll_interval: float = 0.1
    ) -> None:
        """As ``facelane.Client.wait_until_serving``."""
        deadline = time.monotonic() + timeout
        said = ""
        while True:
            remaining = deadline - time.monotonic()
            try:
                status = await self.health(service, timeout=max(0.05, min(remaining, self.timeout)))
            except UnavailableError as error:
                said = error.reason
            except DeadlineExceededError as error:
                # The last question's time is what was left of ours: no answer to it says less
                # than an answer before it.
                said = error.reason if remaining >= self.timeout else said or error.reason
            else:
                if status is HealthStatus.SERVING:
                    return
                said = status.value
            if deadline - time.monotonic() <= poll_interval:
                raise calls.never_served(timeout, said)
            await asyncio.sleep(poll_interval)

    def watch_events(
        self,
        resume_token: str = "",
        kinds: Iterable[EventKind | str] = (),
        *,
        reconnect: Reconnect | None = None,
    ) -> EventStream:
        """As ``facelane.Client.watch_events``."""
        self._check_open()
        stream = EventStream(
            lambda request: self._stubs.events.WatchEvents(
                request, metadata=self._endpoint.metadata
            ),
            resume_token,
            kinds,
            reconnect,
            self.timeout,
        )
        self._open.add(stream)
        return stream

    # Administration.

    async def restart_worker(
        self, worker_id: str, *, timeout: float | None = None
    ) -> WorkerRestarted:
        """As ``facelane.Client.restart_worker``."""
        return await self._do(calls.restart_worker(worker_id), timeout)

    async def reload_model(
        self, pool: str, model: str = "", *, timeout: float | None = None
    ) -> ModelReloaded:
        """As ``facelane.Client.reload_model``."""
        return await self._do(calls.reload_model(pool, model), timeout)

    async def drain(self, grace: float = 30.0, *, timeout: float | None = None) -> None:
        """As ``facelane.Client.drain``."""
        await self._do(calls.drain(grace), timeout)


async def _pump(
    frames: Iterable[Picture | Frame] | AsyncIterable[Picture | Frame], stream: AnalyzeStream
) -> None:
    """Sends everything; an error of ``frames`` is raised to whoever awaits the task."""
    try:
        if isinstance(frames, AsyncIterable):
            async for item in frames:
                await _send_one(item, stream)
        else:
            for item in frames:
                await _send_one(item, stream)
    except FacelaneError:
        # A stream that has ended tells its own reader why; the rest is about a frame.
        if not stream.ended:
            raise
    finally:
        stream.close_send()


async def _send_one(item: Picture | Frame, stream: AnalyzeStream) -> None:
    frame = item if isinstance(item, Frame) else Frame(item)
    await stream.send(
        frame.picture,
        stream_offset=frame.stream_offset,
        capture_time=frame.capture_time,
        timeout=math.inf,
    )


class _Waiters:
    """Tasks that wait for one kind of change, woken in the order in which they came."""

    def __init__(self) -> None:
        self._futures: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    def notify(self) -> None:
        while self._futures:
            future, _ = self._futures.popitem(last=False)
            if not future.done():
                future.set_result(None)
                return

    def notify_all(self) -> None:
        while self._futures:
            self.notify()

    async def wait(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._futures[future] = None
        timer = loop.call_later(seconds, _expire, future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                # Woken and cancelled at once: the wake belongs to the next in line.
                self.notify()
            raise
        finally:
            timer.cancel()
            # Whoever gave up waiting must not be kept until the next change, if one comes.
            self._futures.pop(future, None)


def _expire(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class AnalyzeStream:
    """One stream of frames; made by ``Client.analyze_stream``.

    ``send`` and iteration may run in different tasks. A single task may also send first and
    iterate afterwards: up to ``buffer`` outcomes are kept for it.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        config: _Request,
        core: StreamCore[_Request],
        timeout: float,
        on_update: Callable[[StreamUpdate], None] | None,
    ) -> None:
        self._start = start
        self._config = config
        self._core = core
        self._timeout = timeout
        self._on_update = on_update
        self._space = _Waiters()
        self._arrived = _Waiters()
        self._work = _Waiters()
        self._turn = _Waiters()
        self._call: Any = None
        self._generation = 0
        self._untold: StreamUpdate | None = None
        self._reader: asyncio.Task[None] | None = None

    # Opening and closing.

    async def __aenter__(self) -> Self:
        """Opens the stream, as ``facelane.AnalyzeStream`` does on entering."""
        if self._reader is not None or self.ended:
            raise RuntimeError("a stream is opened once: make another with analyze_stream")
        core = self._core
        now = time.monotonic()
        core.connecting(now)
        self._reader = asyncio.create_task(self._run(), name="facelane-stream")
        deadline = now + self._timeout
        try:
            while core.opened is None and core.phase is not Phase.ENDED:
                if not await self._wait(self._turn, deadline):
                    break
            if core.error is not None:
                raise core.error
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Lets go at once: frames in flight are settled as CANCELLED. Again is harmless."""
        self._core.abort()
        call = self._detach()
        self._wake_all()
        if call is not None:
            call.cancel()
        reader = self._reader
        if reader is not None and reader is not asyncio.current_task():
            reader.cancel()
            await asyncio.wait([reader])

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
        return self._core.summary()

    # Sending.

    async def send(
        self,
        picture: Picture,
        *,
        stream_offset: float | None = None,
        capture_time: datetime | None = None,
        timeout: float | None = None,
        frame_id: int | None = None,
    ) -> int:
        """As ``facelane.AnalyzeStream.send``; waits while the window is full."""
        self._check_entered()
        obstacle = self._core.obstacle()
        if obstacle is not None:
            limit = self._timeout if timeout is None else timeout
            deadline = time.monotonic() + limit
            while (obstacle := self._core.obstacle()) is not None:
                if not await self._wait(self._space, deadline):
                    raise DeadlineExceededError(obstacle.value, obstacle.explain(limit))
        return self._submit(picture, stream_offset, capture_time, frame_id)

    def try_send(
        self,
        picture: Picture,
        *,
        stream_offset: float | None = None,
        capture_time: datetime | None = None,
        frame_id: int | None = None,
    ) -> int | None:
        """As ``facelane.AnalyzeStream.try_send``; never waits."""
        self._check_entered()
        obstacle = self._core.obstacle()
        if obstacle is not None:
            if obstacle is not Obstacle.UNREAD:
                self._end_if_overdue(time.monotonic())
            return None
        return self._submit(picture, stream_offset, capture_time, frame_id)

    def _submit(
        self,
        picture: Picture,
        stream_offset: float | None,
        capture_time: datetime | None,
        frame_id: int | None,
    ) -> int:
        moment = None if capture_time is None else convert.timestamp(capture_time)
        number = self._core.submit(
            convert.size(picture),
            lambda identifier, offset: convert.frame(identifier, picture, offset, moment),
            now=time.monotonic(),
            frame_id=frame_id,
            stream_offset=stream_offset,
            capture_time=capture_time,
        )
        self._work.notify()
        return number

    def close_send(self) -> None:
        """Says that no more frames come; iteration ends after the last outcome."""
        self._core.close_send()
        self._wake_all()

    # Receiving.

    async def recv(self, timeout: float | None = None) -> Outcome | None:
        """As ``facelane.AnalyzeStream.recv``."""
        self._check_entered()
        core = self._core
        outcome = core.take()
        if outcome is None:
            deadline = math.inf if timeout is None else time.monotonic() + timeout
            while (outcome := core.take()) is None:
                if core.exhausted:
                    if core.error is not None:
                        raise core.error
                    return None
                if not await self._wait(self._arrived, deadline):
                    raise DeadlineExceededError(
                        Reason.DEADLINE_EXCEEDED, f"no outcome within {timeout:.3g} s"
                    )
        self._space.notify()
        return outcome

    def __aiter__(self) -> AsyncIterator[Outcome]:
        return self

    async def __anext__(self) -> Outcome:
        outcome = await self.recv()
        if outcome is None:
            raise StopAsyncIteration
        return outcome

    def _check_entered(self) -> None:
        if self._reader is None and not self.ended:
            raise RuntimeError("the stream is not open: use it in `async with ... as stream:`")

    # Inside.

    async def _wait(self, waiters: _Waiters, deadline: float) -> bool:
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
        until = min(deadline, now + _PARK, math.inf if overdue is None else overdue)
        await waiters.wait(max(0.001, until - now))
        return True

    def _end_if_overdue(self, now: float) -> bool:
        error = self._core.overdue(now)
        if error is None:
            return False
        call = self._detach()
        # Told by the reader, whom the end of its call wakes.
        self._untold = self._core.disconnected(error, now)
        self._wake_all()
        if call is not None:
            call.cancel()
        return True

    def _detach(self) -> Any:
        """Makes the present call a stranger: whatever it still says is not heard."""
        self._generation += 1
        call, self._call = self._call, None
        return call

    def _wake_all(self) -> None:
        for waiters in (self._space, self._arrived, self._work, self._turn):
            waiters.notify_all()

    async def _run(self) -> None:
        """The reader task: connection after connection."""
        core = self._core
        while True:
            while core.phase is Phase.BACKOFF:
                remaining = core.retry_at - time.monotonic()
                if remaining <= 0:
                    core.connecting(time.monotonic())
                    break
                await self._turn.wait(remaining)
            if core.phase is not Phase.CONNECTING:
                return
            generation = self._generation
            error = await self._read(generation)
            if self._generation == generation:
                self._detach()
                self._untold = core.disconnected(error, time.monotonic())
            update, self._untold = self._untold, None
            self._wake_all()
            self._tell(update)

    async def _read(self, generation: int) -> FacelaneError | None:
        """Makes a call and reads it to its end."""
        core = self._core
        call = self._call = self._start()
        writer = asyncio.create_task(self._write(call, generation), name="facelane-writer")
        try:
            while (pb := await call.read()) is not grpc.aio.EOF:
                if self._generation != generation:
                    return None
                message = convert.stream_message(pb)
                update = core.receive(message, time.monotonic())
                if isinstance(message, Outcome):
                    self._arrived.notify()
                    self._space.notify()
                else:
                    self._wake_all()
                    self._tell(update)
        except grpc.RpcError as error:
            return from_rpc(error)
        except ProtocolError as error:
            return error
        except asyncio.CancelledError:
            # gRPC says so of a call that we cancelled ourselves; anything else is ours.
            if self._generation == generation or core.phase is Phase.ENDED:
                raise
        except Exception as error:
            # A reader that died in silence would leave everybody waiting.
            failure = unreadable(error)
            failure.__cause__ = error
            return failure
        finally:
            call.cancel()
            writer.cancel()
        return None

    async def _write(self, call: Any, generation: int) -> None:
        """The writer task of one call. Failures are the reader's to tell."""
        core = self._core
        try:
            await call.write(self._config)
            while self._generation == generation:
                payload = core.next_payload(time.monotonic())
                if payload is None:
                    await self._wait(self._work, math.inf)
                elif isinstance(payload, HalfClose):
                    await call.done_writing()
                    return
                else:
                    await call.write(payload)
        except (grpc.RpcError, asyncio.InvalidStateError):
            return

    def _tell(self, update: StreamUpdate | None) -> None:
        if update is None or self._on_update is None:
            return
        try:
            self._on_update(update)
        except Exception:
            log.exception("on_update raised")


class EventStream:
    """An asynchronous iterator over events; made by ``Client.watch_events``."""

    def __init__(
        self,
        start: Callable[[event_service_pb2.WatchEventsRequest], Any],
        resume_token: str,
        kinds: Iterable[EventKind | str],
        reconnect: Reconnect | None,
        timeout: float,
    ) -> None:
        self._start = start
        self._timeout = timeout
        self._kinds = tuple(kinds)
        # Built once here so that a wrong kind is told at the call, not at the first event.
        convert.watch_events_request(resume_token, self._kinds)
        self.resume_token = resume_token
        """Goes on after what has arrived."""
        self._reconnect = reconnect
        self._closed = asyncio.Event()
        self._call: Any = None
        self._called_at = 0.0
        self._reading: asyncio.Future[Any] | None = None
        self._begun = False
        self._ahead: _EventResponse | None = None
        self._attempts = 0

    async def __aenter__(self) -> Self:
        """Subscribes: what happens from here on is delivered.

        Raises:
            FacelaneError: the server refuses, cannot be reached, or does not begin within the
                client's timeout. With ``reconnect`` failures that may pass are waited out up
                to that timeout, then the iteration goes on trying.
        """
        try:
            self._ahead = await self._receive(time.monotonic() + self._timeout)
        except BaseException:
            await self.close()
            raise
        return self

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while True:
            response, self._ahead = self._ahead, None
            if response is None:
                response = await self._receive(math.inf)
            if response is None:
                raise StopAsyncIteration
            if response.HasField("event"):
                return convert.event(response)

    async def _receive(self, deadline: float) -> _EventResponse | None:
        """The next response, over as many connections as it takes; ``None`` once closed, and
        where no further try is due before ``deadline``."""
        while not self._closed.is_set():
            if self._call is None:
                self._call = self._start(
                    convert.watch_events_request(self.resume_token, self._kinds)
                )
                self._begun = False
                self._called_at = time.monotonic()
            if self._reading is None:
                # A task of its own: gRPC ends a call whose reader is cancelled, and whoever
                # waits for the next event with a timeout means to go on.
                self._reading = asyncio.ensure_future(self._call.read())
            # Events may take as long as they like, but the first response is due at once: it
            # says that the subscription has begun.
            now = time.monotonic()
            limit = max(0.0, min(self._called_at + self._timeout, deadline) - now)
            try:
                async with asyncio.timeout(None if self._begun else calls.deadline(limit)):
                    response = await asyncio.shield(self._reading)
            except grpc.RpcError as failure:
                error = from_rpc(failure)
            except TimeoutError:
                self._reading.cancel()
                self._call.cancel()
                error = calls.never_began(self._timeout)
            except asyncio.CancelledError:
                # gRPC says so of a call that was cancelled by close().
                if self._closed.is_set():
                    break
                raise
            else:
                if response is not grpc.aio.EOF:
                    self._reading = None
                    return self._progress(response)
                error = UnavailableError(
                    Reason.DRAINING, "the server ended the subscription: it is going away"
                )
            self._reading = None
            self._call = None
            if self._closed.is_set():
                break
            if self._begun:
                error = as_lost(error)
            self._attempts += 1
            delay = retry_delay(self._reconnect, self._attempts, error)
            if delay is None:
                raise error
            if time.monotonic() + delay > deadline:
                break
            try:
                await asyncio.wait_for(self._closed.wait(), delay)
            except TimeoutError:
                continue
        return None

    def _progress(self, response: _EventResponse) -> _EventResponse:
        self._begun = True
        self._attempts = 0
        self.resume_token = response.resume_token or self.resume_token
        return response

    async def close(self) -> None:
        """Ends the subscription; iteration ends."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
