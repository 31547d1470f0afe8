"""The blocking client.

Streams stand on gRPC's blocking API with one reader thread each, not on an event loop in a
background thread: measured side by side (60 kB frames, window 16, server on the other
core) the loop is 9-12 % faster, but gRPC's asyncio layer shares one completion queue among
all event loops of a process, so that a hidden loop beside the user's own makes both wake
for each other's work and log BlockingIOError. Use ``facelane.aio`` where the last tenth
counts: it needs 25 % less time of the processor a frame.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast

import grpc

from facelane import calls, convert, types
from facelane.errors import (
    DeadlineExceededError,
    FacelaneError,
    NotFoundError,
    ProtocolError,
    Reason,
    StreamClosedError,
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

_Request = analysis_service_pb2.AnalyzeStreamRequest
_EventResponse = event_service_pb2.WatchEventsResponse
T = TypeVar("T")
_Stream = TypeVar("_Stream", "AnalyzeStream", "EventStream")

_JOIN_TIMEOUT = 5.0
"""Seconds for a thread of ours to end once its call was cancelled."""
_PARK = 5.0
"""Seconds after which a parked thread looks again whether it still has a purpose."""


class Client:
    """A connection to one server; safe to share between threads.

    ``target`` is ``host:port`` or ``unix:/path``; ``timeout`` is the deadline in seconds of
    every call that is not given its own. What is left out comes from the environment, see
    ``facelane.transport``. Nothing is sent before the first call. Close it, or use it as a
    context manager.

    >>> with facelane.Client() as client:
    ...     result = client.analyze_image(facelane.Picture.from_file("people.jpg"))
    ...     [face.identity.decision for face in result.faces]
    [<Decision.MATCH: 'MATCH'>]
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
        where = self._endpoint
        self._channel: grpc.Channel = (
            grpc.insecure_channel(where.target, options=where.options)
            if where.credentials is None
            else grpc.secure_channel(where.target, where.credentials, options=where.options)
        )
        self._stubs = calls.Stubs(self._channel)
        self._closed = False
        # A set of any kind must not grow while it is gone through.
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[AnalyzeStream | EventStream] = weakref.WeakSet()

    @property
    def target(self) -> str:
        """Where the client connects to."""
        return self._endpoint.target

    def close(self) -> None:
        """Closes the streams that are open, then the connection. Again is harmless."""
        self._closed = True
        with self._lock:
            streams = list(self._open)
        for stream in streams:
            stream.close()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"facelane.Client({self.target!r})"

    def _do(self, call: calls.Call[T], timeout: float | None) -> T:
        self._check_open()
        try:
            answer = call.method(self._stubs)(
                call.request,
                timeout=calls.deadline(self.timeout if timeout is None else timeout),
                metadata=self._endpoint.metadata,
            )
        except grpc.RpcError as error:
            raise from_rpc(error) from error
        return call.read(answer)

    def _check_open(self) -> None:
        if self._closed:
            raise calls.closed()

    def _keep(self, stream: _Stream) -> _Stream:
        """Remembers a stream that ``close`` has to close."""
        with self._lock:
            self._open.add(stream)
        return stream

    # Analysis.

    def analyze_image(
        self,
        picture: Picture,
        *,
        timeout: float | None = None,
        **options: Unpack[AnalysisOptions],
    ) -> FrameResult:
        """The faces of one picture.

        ``options`` (``facelane.AnalysisOptions`` says more): ``skip_recognition``,
        ``skip_liveness``, ``gallery``, ``max_faces``, ``max_candidates``, ``min_face_size``.

        Raises:
            PictureError: the picture cannot be read, or is beyond the server's limits.
            OverloadedError, UnavailableError: try again later.
        """
        return self._do(calls.analyze_image(picture, **options), timeout)

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
        ``reinference_interval`` (seconds), ``disable_tracking``.

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
        return self._keep(stream)

    def _start_stream(self, requests: Iterator[_Request]) -> Any:
        return self._stubs.analysis.AnalyzeStream(requests, metadata=self._endpoint.metadata)

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
                pump.join(_JOIN_TIMEOUT)
        if failures:
            raise failures[0]

    # The gallery.

    def create_subject(
        self,
        subject_id: str,
        *,
        display_name: str = "",
        labels: Mapping[str, str] | None = None,
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> Subject:
        """A new subject without templates.

        Raises:
            AlreadyExistsError: the subject exists (SUBJECT_EXISTS).
        """
        return self._do(calls.create_subject(subject_id, gallery, display_name, labels), timeout)

    def get_subject(
        self,
        subject_id: str,
        *,
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> Subject:
        """A subject.

        Raises:
            NotFoundError: there is none (SUBJECT_NOT_FOUND).
        """
        return self._do(calls.get_subject(subject_id, gallery), timeout)

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
            page = calls.list_subjects(gallery, page_size, token)
            subjects, token = self._do(page, timeout)
            yield from subjects
            if not token:
                return

    def update_subject(
        self,
        subject_id: str,
        *,
        display_name: str | None = None,
        labels: Mapping[str, str] | None = None,
        etag: str = "",
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> Subject:
        """Changes what is not ``None``. With the ``etag`` of the subject that was read, a
        change that somebody else made meanwhile is not overwritten.

        Raises:
            ConflictError: the subject was changed since (ETAG_MISMATCH).
        """
        return self._do(
            calls.update_subject(subject_id, gallery, display_name, labels, etag), timeout
        )

    def delete_subject(
        self,
        subject_id: str,
        *,
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> int:
        """Deletes a subject and all its templates; gives the number of templates."""
        return self._do(calls.delete_subject(subject_id, gallery), timeout)

    def list_templates(
        self,
        subject_id: str,
        *,
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> list[Template]:
        """The enrolled faces of a subject."""
        return self._do(calls.list_templates(subject_id, gallery), timeout)

    def delete_template(
        self,
        template_id: str,
        *,
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> None:
        """Deletes one enrolled face."""
        self._do(calls.delete_template(template_id, gallery), timeout)

    def enroll(
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
        """Adds the face of a picture to a subject.

        A random ``request_id`` makes a retry after a lost answer harmless; give your own to
        make the retry of a whole program harmless too.

        Raises:
            EnrollmentRefusedError: NO_FACE, MULTIPLE_FACES, OOD_REJECTED or SPOOF_SUSPECTED.
            NotFoundError: no such subject, and ``create_subject`` is off.

        >>> enrollment = client.enroll("grace", facelane.Picture.from_file("people.jpg"))
        >>> enrollment.subject.template_count
        1
        """
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
        return self._do(call, timeout)

    def verify(
        self,
        subject_id: str,
        picture: Picture,
        *,
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> Verification:
        """Whether the face of a picture is the subject (1:1).

        Raises:
            RefusedError: NO_FACE or MULTIPLE_FACES in the picture, or the subject has
                NO_TEMPLATES of the serving model.
            NotFoundError: no such subject.
        """
        return self._do(calls.verify(subject_id, picture, gallery), timeout)

    def identify(
        self,
        picture: Picture,
        *,
        max_candidates: int = 3,
        gallery: str = convert.DEFAULT_GALLERY,
        timeout: float | None = None,
    ) -> list[Face]:
        """Who every face of a picture is (1:N), with up to 10 candidates each."""
        return self._do(calls.identify(picture, gallery, max_candidates), timeout)

    # The server.

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Version, models and limits."""
        return self._do(calls.server_info(), timeout)

    def pools(self, *, timeout: float | None = None) -> list[PoolInfo]:
        """The pools of workers and how they fare."""
        return self._do(calls.pools(), timeout)

    def health(self, service: str = "", *, timeout: float | None = None) -> HealthStatus:
        """grpc.health.v1 of one service, or of the server in all.

        Raises:
            UnavailableError: nobody answers.
        """
        try:
            return self._do(calls.health(service), timeout)
        except NotFoundError:
            return HealthStatus.SERVICE_UNKNOWN

    def wait_until_serving(
        self, timeout: float = 60.0, *, service: str = "", poll_interval: float = 0.1
    ) -> None:
        """Returns when ``health`` says SERVING; a server that is still starting is waited for.

        Raises:
            DeadlineExceededError: it did not within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        said = ""
        pause = threading.Event()
        while True:
            remaining = deadline - time.monotonic()
            try:
                status = self.health(service, timeout=max(0.05, min(remaining, self.timeout)))
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
            pause.wait(poll_interval)

    def watch_events(
        self,
        resume_token: str = "",
        kinds: Iterable[EventKind | str] = (),
        *,
        reconnect: Reconnect | None = None,
    ) -> EventStream:
        """Events as they happen, after those since ``resume_token``; all kinds unless given.

        Use it as a context manager: entering subscribes. Iterate over it; close it from any
        thread. With ``reconnect`` it goes on by itself where it was.

        Raises (on entering and while iterating):
            HistoryLostError: events since the token are gone.
        """
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
        return self._keep(stream)

    # Administration.

    def restart_worker(self, worker_id: str, *, timeout: float | None = None) -> WorkerRestarted:
        """Drains one worker (``pool#index``) and starts it again."""
        return self._do(calls.restart_worker(worker_id), timeout)

    def reload_model(
        self, pool: str, model: str = "", *, timeout: float | None = None
    ) -> ModelReloaded:
        """Swaps a pool's model without losing a frame; no ``model`` = the present one again."""
        return self._do(calls.reload_model(pool, model), timeout)

    def drain(self, grace: float = 30.0, *, timeout: float | None = None) -> None:
        """Ends the server within ``grace`` seconds; open streams are told."""
        self._do(calls.drain(grace), timeout)


def _pump(
    frames: Iterable[Picture | Frame], stream: AnalyzeStream, failures: list[BaseException]
) -> None:
    try:
        for item in frames:
            frame = item if isinstance(item, Frame) else Frame(item)
            stream.send(
                frame.picture,
                stream_offset=frame.stream_offset,
                capture_time=frame.capture_time,
                timeout=math.inf,
            )
    except FacelaneError as error:
        # A stream that has ended tells its own reader why; the rest is about a frame.
        if not stream.ended:
            failures.append(error)
    except BaseException as error:
        # The user's iterable failed: its error belongs to the user's thread.
        failures.append(error)
    stream.close_send()


class AnalyzeStream:
    """One stream of frames; made by ``Client.analyze_stream``.

    ``send`` and iteration may run in different threads. A single thread may also send first
    and iterate afterwards: up to ``buffer`` outcomes are kept for it.
    """

    def __init__(
        self,
        start: Callable[[Iterator[_Request]], Any],
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
        # One lock; whoever waits, waits for one of these.
        self._lock = threading.Lock()
        self._space = threading.Condition(self._lock)
        self._arrived = threading.Condition(self._lock)
        self._work = threading.Condition(self._lock)
        self._turn = threading.Condition(self._lock)
        self._call: Any = None
        self._generation = 0
        self._untold: StreamUpdate | None = None
        self._reader: threading.Thread | None = None

    # Opening and closing.

    def __enter__(self) -> Self:
        """Opens the stream.

        Without ``reconnect`` it raises what the server says. With it, failures that may pass
        are waited out up to the client's timeout, then the stream goes on trying by itself
        and ``opened`` is ``None`` until it succeeds.
        """
        if self._reader is not None or self.ended:
            raise RuntimeError("a stream is opened once: make another with analyze_stream")
        self._reader = threading.Thread(target=self._run, name="facelane-stream", daemon=True)
        now = time.monotonic()
        deadline = now + self._timeout
        core = self._core
        try:
            with self._lock:
                core.connecting(now)
                self._reader.start()
                while core.opened is None and core.phase is not Phase.ENDED:
                    if not self._wait(self._turn, deadline):
                        break
                if core.error is not None:
                    raise core.error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go at once: frames in flight are settled as CANCELLED. Again is harmless."""
        with self._lock:
            self._core.abort()
            call = self._detach()
            self._wake_all()
        if call is not None:
            call.cancel()
        reader = self._reader
        if reader is not None and reader is not threading.current_thread() and reader.is_alive():
            reader.join(_JOIN_TIMEOUT)

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

    # Sending.

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
        limit = self._timeout if timeout is None else timeout
        with self._lock:
            obstacle = self._core.obstacle()
            if obstacle is not None:
                deadline = time.monotonic() + limit
                while (obstacle := self._core.obstacle()) is not None:
                    if not self._wait(self._space, deadline):
                        raise DeadlineExceededError(
                            obstacle.value, obstacle.explain(limit), retryable=True
                        )
            return self._submit(picture, stream_offset, capture_time, frame_id)

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
        with self._lock:
            self._core.close_send()
            self._wake_all()

    # Receiving.

    def recv(self, timeout: float | None = None) -> Outcome | None:
        """The next outcome; ``None`` when the stream is over.

        Without a ``timeout`` it waits as long as the stream lives, which the stall timeout
        bounds while frames are in flight.

        Raises:
            DeadlineExceededError: none came within ``timeout`` seconds.
            FacelaneError: the stream failed. All outcomes were delivered before.
        """
        self._check_entered()
        core = self._core
        with self._lock:
            outcome = core.take()
            if outcome is None:
                deadline = math.inf if timeout is None else time.monotonic() + timeout
                while (outcome := core.take()) is None:
                    if core.exhausted:
                        if core.error is not None:
                            raise core.error
                        return None
                    if not self._wait(self._arrived, deadline):
                        raise DeadlineExceededError(
                            Reason.DEADLINE_EXCEEDED, f"no outcome within {timeout:.3g} s"
                        )
            self._space.notify()
            return outcome

    def __iter__(self) -> Iterator[Outcome]:
        return self

    def __next__(self) -> Outcome:
        outcome = self.recv()
        if outcome is None:
            raise StopIteration
        return outcome

    def _check_entered(self) -> None:
        if self._reader is None and not self.ended:
            raise RuntimeError("the stream is not open: use it in `with ... as stream:`")

    # Inside. Everything below runs with the lock held, unless it says otherwise.

    def _wait(self, condition: threading.Condition, deadline: float) -> bool:
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
        condition.wait(max(0.001, until - now))
        return True

    def _end_if_overdue(self, now: float) -> bool:
        error = self._core.overdue(now)
        if error is None:
            return False
        call = self._detach()
        # Told by the reader, whom the end of its call wakes: this may be any thread.
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
        for condition in (self._space, self._arrived, self._work, self._turn):
            condition.notify_all()

    def _run(self) -> None:
        """The reader thread (takes the lock itself): connection after connection."""
        core = self._core
        while True:
            with self._lock:
                while core.phase is Phase.BACKOFF:
                    remaining = core.retry_at - time.monotonic()
                    if remaining <= 0:
                        core.connecting(time.monotonic())
                        break
                    self._turn.wait(remaining)
                if core.phase is not Phase.CONNECTING:
                    return
                generation = self._generation
            error = self._read(generation)
            with self._lock:
                if self._generation == generation:
                    self._detach()
                    self._untold = core.disconnected(error, time.monotonic())
                update, self._untold = self._untold, None
                self._wake_all()
            self._tell(update)

    def _read(self, generation: int) -> FacelaneError | None:
        """Makes a call and reads it to its end (takes the lock itself)."""
        core = self._core
        try:
            call = self._start(self._requests(generation))
        except ValueError:
            # All that gRPC says when the client was closed under a stream that came back.
            return StreamClosedError(Reason.STREAM_CLOSED, "the client was closed: make another")
        with self._lock:
            current = self._generation == generation
            if current:
                self._call = call
        if not current:
            call.cancel()
        try:
            for pb in call:
                message = convert.stream_message(pb)
                with self._lock:
                    if self._generation != generation:
                        break
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
            call.cancel()
            return error
        except Exception as error:
            # A reader that died in silence would leave everybody waiting.
            call.cancel()
            failure = unreadable(error)
            failure.__cause__ = error
            return failure
        return None

    def _requests(self, generation: int) -> Iterator[_Request]:
        """What gRPC's writer thread draws (takes the lock itself)."""
        yield self._config
        core = self._core
        while True:
            with self._lock:
                while self._generation == generation and not core.writable:
                    if not self._end_if_overdue(time.monotonic()):
                        self._work.wait(_PARK)
                if self._generation != generation:
                    return
                payload = core.next_payload(time.monotonic())
            if payload is None or isinstance(payload, HalfClose):
                return
            yield payload

    def _tell(self, update: StreamUpdate | None) -> None:
        """Calls the user without the lock: the callback may use the stream."""
        if update is None or self._on_update is None:
            return
        try:
            self._on_update(update)
        except Exception:
            log.exception("on_update raised")


class EventStream:
    """An iterator over events; made by ``Client.watch_events``."""

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
        self._request = convert.watch_events_request(resume_token, self._kinds)
        self.resume_token = resume_token
        """Goes on after what has arrived."""
        self._reconnect = reconnect
        self._closed = threading.Event()
        self._call: Any = None
        self._begun = False
        self._ahead: _EventResponse | None = None
        self._attempts = 0

    def __enter__(self) -> Self:
        """Subscribes: what happens from here on is delivered.

        Raises:
            FacelaneError: the server refuses, cannot be reached, or does not begin within the
                client's timeout. With ``reconnect`` failures that may pass are waited out up
                to that timeout, then the iteration goes on trying.
        """
        try:
            self._ahead = self._receive(time.monotonic() + self._timeout)
        except BaseException:
            self.close()
            raise
        return self

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        while True:
            response, self._ahead = self._ahead, None
            if response is None:
                response = self._receive(math.inf)
            if response is None:
                raise StopIteration
            if response.HasField("event"):
                return convert.event(response)

    def _receive(self, deadline: float) -> _EventResponse | None:
        """The next response, over as many connections as it takes; ``None`` once closed, and
        where no further try is due before ``deadline``."""
        while not self._closed.is_set():
            if self._call is None:
                request = convert.watch_events_request(self.resume_token, self._kinds)
                self._call = self._start(request)
                self._begun = False
                if self._closed.is_set():
                    self._call.cancel()
            try:
                response = self._next(deadline)
            except StopIteration:
                error: FacelaneError = UnavailableError(
                    Reason.DRAINING, "the server ended the subscription: it is going away"
                )
            except grpc.RpcError as failure:
                error = from_rpc(failure)
            except DeadlineExceededError as failure:
                error = failure
            else:
                return self._progress(response)
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
            self._closed.wait(delay)
        return None

    def _next(self, deadline: float) -> _EventResponse:
        """The next response of this connection. Events may take as long as they like, but the
        first response is due at once: it says that the subscription has begun."""
        call = self._call
        limit = max(0.0, min(self._timeout, deadline - time.monotonic()))
        seconds = None if self._begun else calls.deadline(limit)
        if seconds is None:
            return cast("_EventResponse", next(call))
        late = threading.Event()

        def give_up() -> None:
            late.set()
            call.cancel()

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            return cast("_EventResponse", next(call))
        except grpc.RpcError:
            if late.is_set():
                raise calls.never_began(self._timeout) from None
            raise
        finally:
            timer.cancel()

    def _progress(self, response: _EventResponse) -> _EventResponse:
        self._begun = True
        self._attempts = 0
        self.resume_token = response.resume_token or self.resume_token
        return response

    def close(self) -> None:
        """Ends the subscription, from any thread; iteration ends."""
        self._closed.set()
        # The iterating thread may let go of it at this very moment.
        call = self._call
        if call is not None:
            call.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def retry_delay(policy: Reconnect | None, attempt: int, error: FacelaneError) -> float | None:
    """Seconds before the ``attempt``-th try (from 1), or ``None`` to give up with ``error``."""
    if policy is None or not error.retryable:
        return None
    if policy.max_attempts and attempt > policy.max_attempts:
        return None
    return policy.delay(attempt, random.random())
