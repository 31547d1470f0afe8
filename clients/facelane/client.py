"""The blocking client.

Streams stand on gRPC's blocking API with one reader thread each, not on a hidden event loop: all
loops of a process share gRPC's one completion queue, and wake for each other's work. Use
``facelane.aio`` where the last tenth counts: it takes a quarter less of the processor."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from datetime import datetime
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack, cast

import grpc

from facelane import calls, convert, ending, types, views
from facelane.driver import ClientBase, EventStreamBase, StreamBase
from facelane.errors import FacelaneError, Reason, StreamClosedError
from facelane.stream import DEFAULT_BUFFER, DEFAULT_STALL_TIMEOUT, StreamCore
from facelane.subscription import Subscription
from facelane.transport import DEFAULT_TIMEOUT, Metadata, Tls, Token
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
from facelane.v1.event_service_pb2 import WatchEventsResponse

P = ParamSpec("P")
T = TypeVar("T")
_Stream = TypeVar("_Stream", "AnalyzeStream", "EventStream")


def _blocking(build: Callable[P, calls.Call[T]]) -> Callable[Concatenate[Client, P], T]:
    """The method that makes a call and waits for its answer."""

    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._do(build(*args, **kwargs))

    calls.as_method(build, method, build.__doc__)
    return method


class Client(ClientBase["AnalyzeStream | EventStream"]):
    """A connection to a server, or to several; safe to share between threads.

    ``target`` is ``host:port``, ``unix:/path``, or many (``dns:///name:port``, ``ipv4:a:1,b:1``),
    by turns; ``token`` a string or a function that gives the present one; ``timeout`` the deadline
    in seconds of calls that are not given their own; ``proxy``: whether one of the environment may
    be used. What is left out comes from the environment, see ``facelane.transport``. Nothing is
    sent before the first call. Close it, or use it as a context manager.

    >>> with facelane.Client() as client:
    ...     result = client.analyze_image(facelane.Picture.from_file("people.jpg"))
    ...     [face.identity.decision for face in result.faces]
    [<Decision.MATCH: 'MATCH'>]
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: Token | None = None,
        tls: Tls | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        proxy: bool = True,
    ) -> None:
        super().__init__(target, token=token, tls=tls, timeout=timeout, proxy=proxy)
        self._channel: grpc.Channel = self._endpoint.channel(grpc)
        self._stubs = calls.Stubs(self._channel)

    def close(self) -> None:
        """Closes the streams that are open, then the connection. Again is harmless."""
        self._closed = True
        for stream in ending.kept(self._open):
            stream.close()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _do(self, call: calls.Call[T], *, again: bool = True) -> T:
        self._check_open()
        shown = self._metadata()
        try:
            with self._traced(call.request) as context:
                answer = call.method(self._stubs)(
                    call.request,
                    timeout=calls.deadline(self.timeout if call.timeout is None else call.timeout),
                    metadata=(*shown, *context),
                )
        except grpc.RpcError as failed:
            error = self._endpoint.failure(failed)
            if again and self._renewed(error, shown):
                return self._do(call, again=False)
            return call.failed(error)
        return call.read(answer)

    def _metadata(self) -> Metadata:
        bearer = self._endpoint.bearer
        held = bearer.held
        return bearer.hold(cast("str", bearer.ask())) if held is None else held

    def _keep(self, stream: _Stream) -> _Stream:
        """Remembers a stream that ``close`` has to close."""
        return ending.keep(stream, self._open)

    # Analysis.

    analyze_image = _blocking(calls.analyze_image)

    def analyze_stream(
        self,
        *,
        on_update: Callable[[StreamUpdate], None] | None = None,
        reconnect: Reconnect | None = None,
        buffer: int = DEFAULT_BUFFER,
        stall_timeout: float = DEFAULT_STALL_TIMEOUT,
        **options: Unpack[types.StreamConfigOptions],
    ) -> AnalyzeStream:
        """A stream of frames, one camera.

        Use it as a context manager: entering opens the stream. ``on_update`` is called from
        the stream's reader thread and must not block. At most ``buffer`` frames are in flight
        or unread at one time; after ``stall_timeout`` seconds without an outcome, with frames
        in flight, the connection counts as broken.

        ``options`` (``facelane.StreamOptions`` says more): those of ``analyze_image`` and
        ``source_id`` (a name for logs), ``overload`` (``latest_wins`` or ``lossless``),
        ``max_frame_age`` (seconds), ``weight`` (1-100, share under load),
        ``reinference_interval`` (seconds), ``disable_tracking``,
        ``analysis_fps`` (pictures a second that are analysed), ``private`` (nobody may look),
        ``zones`` and ``lines`` (of ``facelane.Zone`` and ``facelane.Line``: events tell of them).

        >>> with client.analyze_stream(source_id="door", overload="lossless") as stream:
        ...     for picture in pictures:
        ...         frame_id = stream.send(picture)
        ...     stream.close_send()
        ...     for outcome in stream:
        ...         if outcome.result:
        ...             print(outcome.frame_id, len(outcome.result.faces))
        1 1
        2 1
        3 1
        >>> stream.summary.received
        3
        """
        core = self._new_core(reconnect, buffer, stall_timeout)
        config = convert.stream_config(**options)
        return self._keep(AnalyzeStream(self, core, config, on_update))

    def analyze(
        self, frames: Iterable[Picture | Frame], **options: Unpack[StreamOptions]
    ) -> Generator[Outcome, None, None]:
        """Streams ``frames`` and yields their outcomes in order; ``options`` are those of
        ``analyze_stream``, ``reconnect`` and the like included.

        A thread draws from ``frames`` as fast as outcomes are taken. Unlike
        ``analyze_stream`` it is lossless unless ``overload`` says otherwise: an iterable can
        wait, a camera cannot. An error that ``frames`` raises is raised here, after the
        outcomes of the frames before it; so is that of a frame which cannot be sent: it is
        larger than the server takes, or its media time goes back.

        >>> for outcome in client.analyze(pictures):
        ...     print(outcome.frame_id, outcome.result is not None)
        1 True
        2 True
        3 True
        """
        options.setdefault("overload", types.Overload.LOSSLESS)
        failures: list[BaseException] = []
        with self.analyze_stream(**options) as stream:
            pump = threading.Thread(
                target=_pump, args=(frames, stream, failures), name="facelane-pump", daemon=True
            )
            pump.start()
            try:
                yield from stream
            finally:
                stream.close()
                if not sys.is_finalizing():
                    pump.join(ending.JOIN_TIMEOUT)
        if failures:
            raise failures[0]

    # The gallery.

    create_subject = _blocking(calls.create_subject)
    get_subject = _blocking(calls.get_subject)

    def list_subjects(
        self,
        *,
        gallery: str = convert.DEFAULT_GALLERY,
        page_size: int = calls.DEFAULT_PAGE_SIZE,
        timeout: float | None = None,
    ) -> Iterator[Subject]:
        """All subjects, fetched page by page (1-1000 a page) as the iterator advances."""
        token = ""
        while True:
            page = calls.list_subjects(gallery, page_size, token, timeout)
            subjects, token = self._do(page)
            yield from subjects
            if not token:
                return

    update_subject = _blocking(calls.update_subject)
    delete_subject = _blocking(calls.delete_subject)
    erase_subject = _blocking(calls.erase_subject)
    list_templates = _blocking(calls.list_templates)
    delete_template = _blocking(calls.delete_template)
    enroll = _blocking(calls.enroll)
    verify = _blocking(calls.verify)
    identify = _blocking(calls.identify)

    # The server.

    server_info = _blocking(calls.server_info)
    pools = _blocking(calls.pools)
    health = _blocking(calls.health)
    confirm_sighting = _blocking(calls.confirm_sighting)
    list_streams = _blocking(views.list_streams)
    list_events = _blocking(views.list_events)
    event_picture = _blocking(views.event_picture)
    correct_identity = _blocking(views.correct_identity)
    undo_correction = _blocking(views.undo_correction)
    list_corrections = _blocking(views.list_corrections)
    watch_stream = views.watch_stream

    def wait_until_serving(
        self, timeout: float = 60.0, *, service: str = "", poll_interval: float = 0.1
    ) -> None:
        """Returns when ``health`` says SERVING; a server that is still starting is waited for.

        Raises:
            DeadlineExceededError: it did not within ``timeout`` seconds.
        """
        wait = calls.ServingWait(timeout, poll_interval, self.timeout, time.monotonic())
        while True:
            answer: HealthStatus | FacelaneError
            try:
                answer = self.health(service, timeout=wait.question(time.monotonic()))
            except FacelaneError as error:
                answer = error
            if wait.heard(answer, time.monotonic()):
                return
            time.sleep(poll_interval)

    def watch_events(
        self,
        resume_token: str = "",
        kinds: Iterable[EventKind | str] = (),
        *,
        source_ids: Iterable[str] = (),
        gallery_ids: Iterable[str] = (),
        reconnect: Reconnect | None = None,
    ) -> EventStream:
        """Events as they happen, after those since ``resume_token``; all unless some are named.

        Use it as a context manager: entering subscribes. Iterate over it; close it from any
        thread. With ``reconnect`` it goes on by itself where it was.

        Raises (on entering and while iterating):
            HistoryLostError: events since the token are gone.
        """
        self._check_open()
        asked = (resume_token, kinds, reconnect, self.timeout)
        return self._keep(EventStream(self, Subscription(*asked, within=(source_ids, gallery_ids))))

    restart_worker = _blocking(calls.restart_worker)
    reload_model = _blocking(calls.reload_model)
    drain = _blocking(calls.drain)


def _pump(
    frames: Iterable[Picture | Frame], stream: AnalyzeStream, failures: list[BaseException]
) -> None:
    try:
        for item in frames:
            frame = item if isinstance(item, Frame) else Frame(item)
            given = {"stream_offset": frame.stream_offset, "capture_time": frame.capture_time}
            stream.send(frame.picture, timeout=math.inf, **given)  # type: ignore[arg-type]
    except BaseException as error:
        # The user's iterable failed: its error belongs to the user's thread. A stream that has
        # ended tells its own reader why.
        if not (isinstance(error, FacelaneError) and stream.ended):
            failures.append(error)
    stream.close_send()


class AnalyzeStream(StreamBase[threading.Condition]):
    """One stream of frames; made by ``Client.analyze_stream``.

    ``send`` and iteration may run in different threads. A single thread may also send first
    and iterate afterwards: up to ``buffer`` outcomes are kept for it.
    """

    def __init__(
        self,
        client: Client,
        core: StreamCore[Request],
        config: Request,
        on_update: Callable[[StreamUpdate], None] | None,
    ) -> None:
        lock = threading.Lock()
        super().__init__(client, core, config, on_update, lock, lambda: threading.Condition(lock))
        self._client = client

    def _walk(self, steps: Generator[tuple[threading.Condition, float], None, T]) -> T:
        """Takes the steps and waits where they say so."""
        with self._lock:
            while True:
                try:
                    change, seconds = next(steps)
                except StopIteration as end:
                    return cast("T", end.value)
                change.wait(seconds)

    def __enter__(self) -> Self:
        """Opens the stream.

        Without ``reconnect`` it raises what the server says. With it, failures that may pass
        are waited out up to the client's timeout, then the stream goes on trying by itself
        and ``opened`` is ``None`` until it succeeds.
        """
        self._check_new()
        self._reader = threading.Thread(target=self._run, name="facelane-stream", daemon=True)
        now = time.monotonic()
        try:
            self._core.connecting(now)
            self._reader.start()
            self._walk(self._opening(now + self._timeout))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go at once: frames in flight are settled as CANCELLED. Again is harmless."""
        if sys.is_finalizing():
            return
        self._abandon()
        reader = self._reader
        if reader is not None and reader is not threading.current_thread() and reader.is_alive():
            reader.join(ending.JOIN_TIMEOUT)

    def _let_go(self, deadline: float) -> None:
        """See ``ending.Open``."""
        with self._lock:
            self._forsaken = True
            call = self._detach()
            self._turn.notify_all()
        if call is not None:
            call.cancel()
        if self._reader is not None and self._reader.is_alive():
            self._reader.join(max(0.0, deadline - time.monotonic()))

    def send(
        self,
        picture: Picture,
        *,
        stream_offset: float | None = None,
        capture_time: datetime | None = None,
        timeout: float | None = None,
        frame_id: int | None = None,
    ) -> int:
        """Sends a frame and gives its id; waits while the window is full.

        ``stream_offset`` is media time in seconds, by default the time since the stream was
        opened. ``timeout`` in seconds, by default the client's; ``math.inf`` waits as long
        as the stream lives.

        Raises:
            DeadlineExceededError: no place came free (WINDOW_FULL, OUTCOMES_UNREAD or
                NOT_CONNECTED). The frame was not sent.
            PictureError: the frame is larger than the server takes. The stream goes on.
            StreamClosedError: after ``close_send`` or the end.
        """
        self._check_entered()
        return self._walk(self._sending(picture, stream_offset, capture_time, timeout, frame_id))

    def recv(self, timeout: float | None = None) -> Outcome | None:
        """The next outcome; ``None`` when the stream is over.

        Without a ``timeout`` it waits as long as the stream lives, which the stall timeout
        bounds while frames are in flight.

        Raises:
            DeadlineExceededError: none came within ``timeout`` seconds.
            FacelaneError: the stream failed. All outcomes were delivered before.
        """
        self._check_entered()
        return self._walk(self._receiving(timeout))

    def __iter__(self) -> Iterator[Outcome]:
        return self

    def __next__(self) -> Outcome:
        outcome = self.recv()
        if outcome is None:
            raise StopIteration
        return outcome

    # Inside. These take the lock themselves.

    def _run(self) -> None:
        """The reader thread: connection after connection."""
        while (generation := self._walk(self._backing_off())) is not None:
            self._over(generation, self._read(generation))

    def _read(self, generation: int) -> FacelaneError | None:
        """Makes a call and reads it to its end."""
        client = self._client
        try:
            self._shown = client._metadata()
        except FacelaneError as error:
            return error
        if client._closed:
            return StreamClosedError(Reason.STREAM_CLOSED, "the client was closed: make another")
        channel = client._channels.take(grpc, self._core.moved)
        stub = client._stubs.analysis if channel is None else AnalysisServiceStub(channel)
        call: Any = None
        try:
            call = stub.AnalyzeStream(self._requests(generation), metadata=self._shown)
            with self._lock:
                if self._generation == generation:
                    self._call = call
                else:
                    call.cancel()
            for response in call:
                if not self._heard(response, generation):
                    break
        except Exception as error:
            return self._failure(error)
        finally:
            if call is not None:
                call.cancel()
            if client._channels.leave(channel):
                channel.close()
        return None

    def _requests(self, generation: int) -> Iterator[Request]:
        """What gRPC's writer thread draws."""
        yield self._first()
        while (payload := self._walk(self._writing(generation))) is not None:
            yield payload


class EventStream(EventStreamBase):
    """An iterator over events; made by ``Client.watch_events``."""

    def __init__(self, client: Client, core: Subscription) -> None:
        super().__init__(client, core)
        self._client = client
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        """Subscribes: what happens from here on is delivered.

        Raises:
            FacelaneError: the server refuses, cannot be reached, or does not begin within the
                client's timeout. With ``reconnect`` failures that may pass are waited out up
                to that timeout, then the iteration goes on trying.
        """
        try:
            self._receive(time.monotonic() + self._core.timeout)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the subscription, from any thread; iteration ends."""
        self._closed.set()
        # The iterating thread may let go of it at this very moment.
        call = self._call
        if call is not None and not sys.is_finalizing():
            call.cancel()
        if (channel := self._left()) is not None and not sys.is_finalizing():
            channel.close()

    def _let_go(self, _deadline: float) -> None:
        """See ``ending.Open``."""
        self.close()
        self._call = None

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        core = self._core
        while not core.inbox:
            if not self._receive(math.inf):
                raise StopIteration
        return core.inbox.popleft()

    def _receive(self, deadline: float) -> bool:
        """Takes the next response, over as many connections as it takes; false once closed, and
        where no further try is due before ``deadline``."""
        core = self._core
        while not self._closed.is_set():
            error: FacelaneError | None
            try:
                if self._call is None:
                    self._connect()
                core.receive(self._next(core.patience(time.monotonic(), deadline)))
            except StopIteration:
                error = None
            except grpc.RpcError as failed:
                error = self._endpoint.failure(failed)
            except FacelaneError as failed:
                error = failed
            else:
                return True
            if self._closed.is_set():
                break
            delay = self._failed(error, deadline)
            if delay is None:
                break
            self._closed.wait(delay)
        return False

    def _connect(self) -> None:
        client = self._client
        self._shown = client._metadata()
        request = self._core.call(time.monotonic())
        events = self._stub(grpc, client._stubs.events)
        try:
            self._call = events.WatchEvents(request, metadata=self._shown)
        except ValueError:  # gRPC's word for a connection that was closed meanwhile
            if not self._closed.is_set():
                raise
        if self._closed.is_set():
            self.close()

    def _next(self, patience: float) -> WatchEventsResponse:
        """The next response of this connection, which has so many seconds."""
        call = self._call
        if call is None:
            raise StopIteration
        seconds = calls.deadline(patience)
        if seconds is None:
            return cast("WatchEventsResponse", next(call))
        late = threading.Event()

        def give_up() -> None:
            late.set()
            call.cancel()

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            return cast("WatchEventsResponse", next(call))
        except grpc.RpcError as failed:
            if not late.is_set():
                raise
            # See Endpoint.failure.
            failed.__traceback__ = None
        finally:
            timer.cancel()
        raise self._core.never_began()
