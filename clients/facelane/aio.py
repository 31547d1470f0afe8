"""The asyncio client: the same calls as ``facelane.Client``, awaited.

A client belongs to the event loop in which it was first used. Per stream there are two
tasks, one that reads and one that writes; no task is made for a frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import time
from collections import OrderedDict
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
)
from datetime import datetime
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack, cast

import grpc
import grpc.aio

from facelane import calls, convert, types, views
from facelane.driver import ClientBase, EventStreamBase, StreamBase
from facelane.errors import FacelaneError
from facelane.stream import DEFAULT_BUFFER, DEFAULT_STALL_TIMEOUT, Phase, StreamCore
from facelane.subscription import Subscription
from facelane.transport import Metadata, no_token
from facelane.types import (
    Event,
    EventKind,
    Frame,
    HealthStatus,
    Outcome,
    Picture,
    Reconnect,
    StreamOptions,
    StreamUpdate,
    Subject,
)
from facelane.v1.analysis_service_pb2 import AnalyzeStreamRequest as Request
from facelane.v1.analysis_service_pb2_grpc import AnalysisServiceStub

P = ParamSpec("P")
T = TypeVar("T")


def _awaited(
    build: Callable[P, calls.Call[T]],
) -> Callable[Concatenate[Client, P], Coroutine[Any, Any, T]]:
    """The method that makes a call and awaits its answer."""

    async def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._do(build(*args, **kwargs))

    calls.as_method(build, method, f"As ``facelane.Client.{build.__name__}``.")
    return method


class Client(ClientBase["AnalyzeStream | EventStream"]):
    """A connection to one server, for one event loop at a time: one that is used by a second
    ``asyncio.run`` connects anew.

    Arguments as for ``facelane.Client``. Close it, or use it as an async context manager.

    >>> async with facelane.aio.Client() as client:
    ...     result = await client.analyze_image(picture)
    ...     len(result.faces)
    1
    """

    _made: tuple[grpc.aio.Channel, calls.Stubs] | None = None
    _loop: asyncio.AbstractEventLoop | None = None

    @property
    def _stubs(self) -> calls.Stubs:
        """Made on first use, because the channel belongs to the loop that runs then."""
        self._check_open()
        loop = asyncio.get_running_loop()
        self._leave()
        if self._made is not None and self._loop is not loop:
            raise RuntimeError("the client is in use by another event loop: make one in each")
        if self._made is None:
            self._loop = loop
            channel: grpc.aio.Channel = self._endpoint.channel(grpc.aio)
            self._made = channel, calls.Stubs(cast("grpc.Channel", channel))
        return self._made[1]

    def _leave(self) -> None:
        """A loop that has ended: connection and streams have gone with it."""
        if self._loop is not None and self._loop.is_closed():
            self._loop = self._made = None
            self._open.clear()

    async def close(self) -> None:
        """Closes the streams that are open, then the connection. Again is harmless."""
        self._closed = True
        self._leave()
        for stream in list(self._open):
            await stream.close()
        made, self._made = self._made, None
        if made is not None:
            await made[0].close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def _do(self, call: calls.Call[T], *, again: bool = True) -> T:
        self._check_open()
        shown = await self._metadata()
        try:
            with self._traced(call.request) as context:
                answer = await call.method(self._stubs)(
                    call.request,
                    timeout=calls.deadline(self.timeout if call.timeout is None else call.timeout),
                    metadata=(*shown, *context),
                )
        except grpc.RpcError as failed:
            error = self._endpoint.failure(failed)
            if again and self._renewed(error, shown):
                return await self._do(call, again=False)
            return call.failed(error)
        return call.read(answer)

    async def _metadata(self) -> Metadata:
        bearer = self._endpoint.bearer
        if bearer.held is not None:
            return bearer.held
        secret = bearer.ask()
        if inspect.isawaitable(secret):
            try:
                async with asyncio.timeout(self.timeout):
                    secret = await secret
            except FacelaneError:
                raise
            except Exception as error:
                raise no_token(error) from error
        return bearer.hold(secret)

    # Analysis.

    analyze_image = _awaited(calls.analyze_image)

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
        core = self._new_core(reconnect, buffer, stall_timeout)
        stream = AnalyzeStream(self, core, convert.stream_config(**options), on_update)
        self._leave()
        self._open.add(stream)
        return stream

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

    create_subject = _awaited(calls.create_subject)
    get_subject = _awaited(calls.get_subject)

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
            page = calls.list_subjects(gallery, page_size, token, timeout)
            subjects, token = await self._do(page)
            for subject in subjects:
                yield subject
            if not token:
                return

    update_subject = _awaited(calls.update_subject)
    delete_subject = _awaited(calls.delete_subject)
    erase_subject = _awaited(calls.erase_subject)
    list_templates = _awaited(calls.list_templates)
    delete_template = _awaited(calls.delete_template)
    enroll = _awaited(calls.enroll)
    verify = _awaited(calls.verify)
    identify = _awaited(calls.identify)

    # The server.

    server_info = _awaited(calls.server_info)
    pools = _awaited(calls.pools)
    health = _awaited(calls.health)
    confirm_sighting = _awaited(calls.confirm_sighting)
    list_streams = _awaited(views.list_streams)
    list_events = _awaited(views.list_events)
    event_picture = _awaited(views.event_picture)
    correct_identity = _awaited(views.correct_identity)
    undo_correction = _awaited(views.undo_correction)
    list_corrections = _awaited(views.list_corrections)
    watch_stream = views.watch_stream_async

    async def wait_until_serving(
        self, timeout: float = 60.0, *, service: str = "", poll_interval: float = 0.1
    ) -> None:
        """As ``facelane.Client.wait_until_serving``."""
        wait = calls.ServingWait(timeout, poll_interval, self.timeout, time.monotonic())
        while True:
            answer: HealthStatus | FacelaneError
            try:
                answer = await self.health(service, timeout=wait.question(time.monotonic()))
            except FacelaneError as error:
                answer = error
            if wait.heard(answer, time.monotonic()):
                return
            await asyncio.sleep(poll_interval)

    def watch_events(
        self,
        resume_token: str = "",
        kinds: Iterable[EventKind | str] = (),
        *,
        source_ids: Iterable[str] = (),
        gallery_ids: Iterable[str] = (),
        reconnect: Reconnect | None = None,
    ) -> EventStream:
        """As ``facelane.Client.watch_events``."""
        self._check_open()
        within = (source_ids, gallery_ids)
        core = Subscription(resume_token, kinds, reconnect, self.timeout, within=within)
        stream = EventStream(self, core)
        self._leave()
        self._open.add(stream)
        return stream

    # Administration.

    restart_worker = _awaited(calls.restart_worker)
    reload_model = _awaited(calls.reload_model)
    drain = _awaited(calls.drain)


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


class AnalyzeStream(StreamBase[_Waiters]):
    """One stream of frames; made by ``Client.analyze_stream``.

    ``send`` and iteration may run in different tasks. A single task may also send first and
    iterate afterwards: up to ``buffer`` outcomes are kept for it.
    """

    _statement = "async with"

    def __init__(
        self,
        client: Client,
        core: StreamCore[Request],
        config: Request,
        on_update: Callable[[StreamUpdate], None] | None,
    ) -> None:
        # An event loop is lock enough.
        super().__init__(client, core, config, on_update, contextlib.nullcontext(), _Waiters)
        self._client = client

    async def _walk(self, steps: Generator[tuple[_Waiters, float], None, T]) -> T:
        """Takes the steps and waits where they say so."""
        while True:
            try:
                change, seconds = next(steps)
            except StopIteration as end:
                return cast("T", end.value)
            await change.wait(seconds)

    async def __aenter__(self) -> Self:
        """Opens the stream, as ``facelane.AnalyzeStream`` does on entering."""
        self._check_new()
        now = time.monotonic()
        self._core.connecting(now)
        self._reader = asyncio.create_task(self._run(), name="facelane-stream")
        try:
            await self._walk(self._opening(now + self._timeout))
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Lets go at once: frames in flight are settled as CANCELLED. Again is harmless."""
        self._abandon()
        reader = self._reader
        if reader is not None and reader is not asyncio.current_task():
            reader.cancel()
            await asyncio.wait([reader])

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
        return await self._walk(
            self._sending(picture, stream_offset, capture_time, timeout, frame_id)
        )

    async def recv(self, timeout: float | None = None) -> Outcome | None:
        """As ``facelane.AnalyzeStream.recv``."""
        self._check_entered()
        return await self._walk(self._receiving(timeout))

    def __aiter__(self) -> AsyncIterator[Outcome]:
        return self

    async def __anext__(self) -> Outcome:
        outcome = await self.recv()
        if outcome is None:
            raise StopAsyncIteration
        return outcome

    # Inside.

    async def _run(self) -> None:
        """The reader task: connection after connection."""
        while (generation := await self._walk(self._backing_off())) is not None:
            self._over(generation, await self._read(generation))

    async def _read(self, generation: int) -> FacelaneError | None:
        """Makes a call and reads it to its end."""
        client = self._client
        try:
            self._shown = await client._metadata()
        except FacelaneError as error:
            return error
        if self._generation != generation:
            return None
        channel = client._channels.take(grpc.aio, self._core.moved)
        analysis: Any = client._stubs.analysis if channel is None else AnalysisServiceStub(channel)
        call = self._call = analysis.AnalyzeStream(metadata=self._shown)
        writer = asyncio.create_task(self._write(call, generation), name="facelane-writer")
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                if not self._heard(response, generation):
                    return None
        except asyncio.CancelledError:
            # gRPC says so of a call that we cancelled ourselves; anything else is ours.
            if self._generation == generation or self._core.phase is Phase.ENDED:
                raise
        except Exception as error:
            return self._failure(error)
        finally:
            call.cancel()
            writer.cancel()
            if client._channels.leave(channel):
                await channel.close()
        return None

    async def _write(self, call: Any, generation: int) -> None:
        """The writer task of one call. Failures are the reader's to tell."""
        try:
            await call.write(self._first())
            while (payload := await self._walk(self._writing(generation))) is not None:
                await call.write(payload)
            await call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            return


class EventStream(EventStreamBase):
    """An asynchronous iterator over events; made by ``Client.watch_events``."""

    def __init__(self, client: Client, core: Subscription) -> None:
        super().__init__(client, core)
        self._client = client
        self._closed = asyncio.Event()
        self._reading: asyncio.Future[Any] | None = None

    async def __aenter__(self) -> Self:
        """Subscribes: what happens from here on is delivered.

        Raises:
            FacelaneError: the server refuses, cannot be reached, or does not begin within the
                client's timeout. With ``reconnect`` failures that may pass are waited out up
                to that timeout, then the iteration goes on trying.
        """
        try:
            await self._receive(time.monotonic() + self._core.timeout)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the subscription; iteration ends."""
        self._closed.set()
        await self._hang_up()
        if (channel := self._left()) is not None:
            await channel.close()

    async def _hang_up(self) -> None:
        if self._call is not None:
            self._call.cancel()
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        core = self._core
        while not core.inbox:
            if not await self._receive(math.inf):
                raise StopAsyncIteration
        return core.inbox.popleft()

    async def _receive(self, deadline: float) -> bool:
        """Takes the next response, over as many connections as it takes; false once closed, and
        where no further try is due before ``deadline``."""
        core = self._core
        while not self._closed.is_set():
            error: FacelaneError | None = None
            try:
                if self._call is None and not await self._connect():
                    break
                if self._reading is None:
                    # A task of its own: gRPC ends a call whose reader is cancelled, and whoever
                    # waits for the next event with a timeout means to go on.
                    self._reading = asyncio.ensure_future(self._call.read())
                async with asyncio.timeout(
                    calls.deadline(core.patience(time.monotonic(), deadline))
                ):
                    response = await asyncio.shield(self._reading)
            except grpc.RpcError as failed:
                error = self._endpoint.failure(failed)
            except FacelaneError as failed:
                error = failed
            except TimeoutError:
                await self._hang_up()
                error = core.never_began()
            except asyncio.CancelledError:
                # gRPC says so of a call that was cancelled by close().
                if self._closed.is_set():
                    break
                raise
            else:
                if response is not grpc.aio.EOF:
                    self._reading = None
                    core.receive(response)
                    return True
            self._reading = None
            if self._closed.is_set():
                break
            delay = self._failed(error, deadline)
            if delay is None:
                break
            # Not wait_for, which forgets in Python 3.11 that its task was cancelled.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._closed.wait()
        return False

    async def _connect(self) -> bool:
        """False where it was closed while the token was asked for."""
        client = self._client
        self._shown = await client._metadata()
        if self._closed.is_set():
            return False
        events = self._stub(grpc.aio, client._stubs.events)
        self._call = events.WatchEvents(self._core.call(time.monotonic()), metadata=self._shown)
        return True
