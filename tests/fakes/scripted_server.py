"""The server's part in tests of the clients, on real sockets, by script.

It keeps the protocol unless a script says otherwise: a script is a generator that gets the
stream's requests and yields its responses, so a test can break any rule on purpose. It
stands on gRPC's blocking API, so that it runs in threads of its own beside blocking tests
and asyncio tests alike.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from facelane.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    analysis_service_pb2,
    analysis_service_pb2_grpc,
    event_service_pb2,
    event_service_pb2_grpc,
    face_pb2,
    gallery_service_pb2,
    gallery_service_pb2_grpc,
    server_service_pb2,
    server_service_pb2_grpc,
    view_service_pb2,
    view_service_pb2_grpc,
)

Request = analysis_service_pb2.AnalyzeStreamRequest
Response = analysis_service_pb2.AnalyzeStreamResponse
Context = grpc.ServicerContext
Script = Callable[[Iterator[Request], Context], Iterator[Response]]

WINDOW = 4


# Messages.


def status(code: grpc.StatusCode, reason: str, message: str = "", **metadata: str) -> Any:
    """A google.rpc.Status with an ErrorInfo, as the server gives it."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="facelane", metadata=metadata)
    detail = any_pb2.Any()
    detail.Pack(info)
    return status_pb2.Status(
        code=code.value[0], message=message or f"because of {reason}", details=[detail]
    )


def abort(
    context: Context, code: grpc.StatusCode, reason: str, message: str = "", **metadata: str
) -> None:
    context.abort_with_status(rpc_status.to_status(status(code, reason, message, **metadata)))


def opened(window: int = WINDOW, max_frame_bytes: int = 1 << 20) -> Response:
    return Response(
        opened=analysis_service_pb2.StreamOpened(
            stream_id="s-1",
            limits=analysis_service_pb2.StreamLimits(
                window=window, max_frame_bytes=max_frame_bytes, max_pixels=1 << 24, max_faces=64
            ),
            models={"detector": "null@1"},
            server_version="test",
        )
    )


def face(subject_id: str = "grace", track_id: int = 7) -> face_pb2.Face:
    """A face that is named, live and trusted."""
    return face_pb2.Face(
        track_id=track_id,
        box=face_pb2.BoundingBox(x=10, y=20, width=60, height=80),
        score=0.9,
        landmarks=[face_pb2.Point(x=20.0 + i, y=30.0 + i) for i in range(5)],
        identity=face_pb2.Identity(
            decision=face_pb2.DECISION_MATCH,
            subject_id=subject_id,
            similarity=0.75,
            candidates=[face_pb2.Candidate(subject_id=subject_id, similarity=0.75)],
        ),
        liveness=face_pb2.Liveness(verdict=face_pb2.LIVENESS_VERDICT_LIVE, score=0.97),
        ood_score=0.8,
        recognized_now=True,
    )


def frame_result(*faces: face_pb2.Face) -> face_pb2.FrameResult:
    result = face_pb2.FrameResult(width=640, height=480, faces=faces or [face()])
    timing = result.timings.add(stage=face_pb2.STAGE_DETECTOR)
    timing.queue.nanos, timing.service.nanos = 1_000_000, 5_000_000
    return result


def outcome(frame: analysis_service_pb2.Frame, **body: Any) -> Response:
    """The outcome of a frame: ``result=``, ``drop=`` or ``error=``; a result by default."""
    message = analysis_service_pb2.FrameOutcome(
        frame_id=frame.frame_id,
        stream_offset=frame.stream_offset,
        capture_time=frame.capture_time if frame.HasField("capture_time") else None,
        **(body or {"result": frame_result()}),
    )
    message.age.nanos = 2_500_000
    return Response(outcome=message)


def drop(reason: str) -> analysis_service_pb2.FrameDrop:
    number = analysis_service_pb2.DropReason.Value(f"DROP_REASON_{reason}")
    return analysis_service_pb2.FrameDrop(reason=number)


def summary(results: int = 0, drops: int = 0, errors: int = 0, **more: Any) -> Response:
    return Response(
        summary=analysis_service_pb2.StreamSummary(
            received=more.pop("received", results + drops + errors),
            results=results,
            drops=drops,
            errors=errors,
            **more,
        )
    )


def update(kind: str, **more: Any) -> Response:
    number = analysis_service_pb2.StreamUpdateKind.Value(f"STREAM_UPDATE_KIND_{kind}")
    return Response(update=analysis_service_pb2.StreamUpdate(kind=number, **more))


# Scripts.


def faithful(requests: Iterator[Request], context: Context) -> Iterator[Response]:
    """Keeps every rule: one result a frame, a summary at the end."""
    yield from answering()(requests, context)


def answering(window: int = WINDOW, max_frame_bytes: int = 1 << 20) -> Script:
    """``faithful`` with limits of its own."""

    def script(requests: Iterator[Request], context: Context) -> Iterator[Response]:
        assert next(requests).WhichOneof("message") == "config"
        yield opened(window, max_frame_bytes)
        count = 0
        for request in requests:
            count += 1
            yield outcome(request.frame)
        yield summary(results=count, faces=count, tracks=1)

    return script


def refusing(code: grpc.StatusCode, reason: str, message: str = "") -> Script:
    """Refuses the stream instead of opening it."""

    def script(requests: Iterator[Request], context: Context) -> Iterator[Response]:
        next(requests)
        abort(context, code, reason, message)
        yield opened()

    return script


def breaking_after(answered: int, received: int) -> Script:
    """Answers ``answered`` frames, takes ``received`` in all, and breaks the connection."""

    def script(requests: Iterator[Request], context: Context) -> Iterator[Response]:
        next(requests)
        yield opened()
        for number in range(1, received + 1):
            request = next(requests)
            if number <= answered:
                yield outcome(request.frame)
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    return script


def silent(released: threading.Event, window: int = WINDOW) -> Script:
    """Opens, takes frames and says nothing until ``released``; then answers."""

    def script(requests: Iterator[Request], context: Context) -> Iterator[Response]:
        next(requests)
        yield opened(window)
        assert released.wait(30)
        count = 0
        for request in requests:
            count += 1
            yield outcome(request.frame)
        yield summary(results=count)

    return script


def saying(*responses: Response) -> Script:
    """Opens, waits for one frame, says exactly this and ends."""

    def script(requests: Iterator[Request], context: Context) -> Iterator[Response]:
        next(requests)
        yield opened()
        next(requests)
        yield from responses

    return script


class LosingItsTongue(dict[str, int]):
    """Health that says its status once, and then nothing until it is ``found``."""

    def __init__(self, status: int) -> None:
        super().__init__({"": status})
        self.found = threading.Event()
        self._said = False

    def __getitem__(self, service: str) -> int:
        if self._said:
            assert self.found.wait(30)
        self._said = True
        return super().__getitem__(service)


# Services.


class _Analysis(analysis_service_pb2_grpc.AnalysisServiceServicer):
    def __init__(self, owner: ScriptedServer) -> None:
        self._owner = owner

    def AnalyzeStream(self, request_iterator: Any, context: Context) -> Iterator[Response]:
        owner = self._owner
        script = owner.take_script()
        yield from script(owner.recording(request_iterator), context)

    def AnalyzeImage(self, request: Any, context: Context) -> Any:
        self._owner.images.append(request)
        self._owner.fail_if_told(context)
        return analysis_service_pb2.AnalyzeImageResponse(result=frame_result())


class _Gallery(gallery_service_pb2_grpc.GalleryServiceServicer):
    """Subjects in a dictionary."""

    def __init__(self, owner: ScriptedServer) -> None:
        self._owner = owner
        self.subjects: dict[str, face_pb2.Subject] = {}
        self.templates: dict[str, face_pb2.Template] = {}
        self.answers: dict[str, Any] = {}
        self._revision = 0

    def _find(self, subject_id: str, context: Context) -> face_pb2.Subject:
        if subject_id not in self.subjects:
            abort(
                context,
                grpc.StatusCode.NOT_FOUND,
                "SUBJECT_NOT_FOUND",
                "the gallery has no such subject: enrol it first",
            )
        return self.subjects[subject_id]

    def _stamp(self, subject: face_pb2.Subject) -> face_pb2.Subject:
        self._revision += 1
        subject.etag = f"e{self._revision}"
        subject.update_time.GetCurrentTime()
        return subject

    def CreateSubject(self, request: Any, context: Context) -> Any:
        if request.subject_id in self.subjects:
            abort(context, grpc.StatusCode.ALREADY_EXISTS, "SUBJECT_EXISTS")
        subject = face_pb2.Subject(
            subject_id=request.subject_id,
            gallery_id=request.gallery_id,
            display_name=request.display_name,
            labels=request.labels,
        )
        subject.create_time.GetCurrentTime()
        self.subjects[request.subject_id] = self._stamp(subject)
        return gallery_service_pb2.CreateSubjectResponse(subject=subject)

    def GetSubject(self, request: Any, context: Context) -> Any:
        subject = self._find(request.subject_id, context)
        return gallery_service_pb2.GetSubjectResponse(subject=subject)

    def ListSubjects(self, request: Any, context: Context) -> Any:
        names = sorted(self.subjects)
        first = int(request.page_token or 0)
        last = first + (request.page_size or 100)
        return gallery_service_pb2.ListSubjectsResponse(
            subjects=[self.subjects[name] for name in names[first:last]],
            next_page_token=str(last) if last < len(names) else "",
        )

    def UpdateSubject(self, request: Any, context: Context) -> Any:
        subject = self._find(request.subject.subject_id, context)
        if request.subject.etag and request.subject.etag != subject.etag:
            abort(context, grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
        for path in request.update_mask.paths:
            if path == "labels":
                subject.labels.clear()
                subject.labels.update(request.subject.labels)
            else:
                setattr(subject, path, getattr(request.subject, path))
        return gallery_service_pb2.UpdateSubjectResponse(subject=self._stamp(subject))

    def DeleteSubject(self, request: Any, context: Context) -> Any:
        subject = self._find(request.subject_id, context)
        del self.subjects[request.subject_id]
        return gallery_service_pb2.DeleteSubjectResponse(templates_deleted=subject.template_count)

    def ListTemplates(self, request: Any, context: Context) -> Any:
        self._find(request.subject_id, context)
        return gallery_service_pb2.ListTemplatesResponse(
            templates=[t for t in self.templates.values() if t.subject_id == request.subject_id]
        )

    def DeleteTemplate(self, request: Any, context: Context) -> Any:
        if request.template_id not in self.templates:
            abort(context, grpc.StatusCode.NOT_FOUND, "TEMPLATE_NOT_FOUND")
        del self.templates[request.template_id]
        return gallery_service_pb2.DeleteTemplateResponse()

    def EnrollFace(self, request: Any, context: Context) -> Any:
        self._owner.enrolments.append(request)
        self._owner.fail_if_told(context)
        if request.request_id in self.answers:
            return self.answers[request.request_id]
        if request.subject_id not in self.subjects:
            if not request.create_subject:
                self._find(request.subject_id, context)
            self.subjects[request.subject_id] = face_pb2.Subject(
                subject_id=request.subject_id,
                gallery_id=request.gallery_id,
                display_name=request.display_name,
            )
        subject = self.subjects[request.subject_id]
        subject.template_count += 1
        template = face_pb2.Template(
            template_id=f"t{len(self.templates) + 1}",
            subject_id=request.subject_id,
            model_id="null@1",
            ood_score=0.8,
        )
        template.create_time.GetCurrentTime()
        self.templates[template.template_id] = template
        answer = gallery_service_pb2.EnrollFaceResponse(
            subject=self._stamp(subject), template=template, face=face(request.subject_id, 0)
        )
        self.answers[request.request_id] = answer
        return answer

    def VerifyFace(self, request: Any, context: Context) -> Any:
        self._find(request.subject_id, context)
        return gallery_service_pb2.VerifyFaceResponse(
            verified=True, similarity=0.75, threshold=0.34, face=face(request.subject_id, 0)
        )

    def IdentifyFace(self, request: Any, context: Context) -> Any:
        self._owner.fail_if_told(context)
        return gallery_service_pb2.IdentifyFaceResponse(faces=[face("grace", 0)])


class _Events(event_service_pb2_grpc.EventServiceServicer):
    """Numbers 1, 2, …: each subscription is told where it begins, gets ``event_burst``
    events, then ends."""

    def __init__(self, owner: ScriptedServer) -> None:
        self._owner = owner

    def WatchEvents(self, request: Any, context: Context) -> Iterator[Any]:
        owner = self._owner
        owner.subscriptions.append(request)
        owner.fail_if_told(context)
        first = int(request.resume_token or owner.events_before) + 1
        last = min(first + owner.event_burst - 1, owner.events_end)
        numbers = range(first, last + 1)
        yield event_service_pb2.WatchEventsResponse(resume_token=str(first - 1))
        for number in self._numbers(numbers, first + owner.event_burst - 1, context):
            event = event_service_pb2.Event(
                sequence=number,
                kind=event_service_pb2.EVENT_KIND_SUBJECT_SEEN,
                source_id="door",
                identity=face().identity,
                liveness=face().liveness,
                ood_score=0.8,
            )
            # As often as it is told, it was then.
            event.event_time.FromSeconds(1_800_000_000 + number)
            yield event_service_pb2.WatchEventsResponse(event=event, resume_token=str(number))
        if owner.after_subscription:
            owner.failures.append(owner.after_subscription.popleft())

    def _numbers(self, burst: range, most: int, context: Context) -> Iterator[int]:
        """The burst, and where the subscription stays open what ``events_end`` makes room for, up
        to ``most``, and one more when it is told so."""
        yield from burst
        owner = self._owner
        if owner.events_stay_open:
            ended = threading.Event()
            context.add_callback(ended.set)
            following = burst.stop
            while not ended.wait(0.01):
                while following <= min(owner.events_end, most) and not ended.is_set():
                    yield following
                    following += 1
                if owner.say_event.is_set():
                    yield burst.stop
                    ended.wait(30)


class _Server(server_service_pb2_grpc.ServerServiceServicer):
    def GetServerInfo(self, request: Any, context: Context) -> Any:
        answer = server_service_pb2.GetServerInfoResponse(version="1.2.3", open_streams=2)
        answer.start_time.GetCurrentTime()
        answer.models.add(
            name="null", version="1", model_id="null@1#0", task=face_pb2.STAGE_RECOGNIZER
        ).thresholds["match"] = 0.5
        answer.limits.window = WINDOW
        answer.limits.max_frame_bytes = 1 << 20
        answer.limits.default_max_frame_age.seconds = 2
        return answer

    def ListPools(self, request: Any, context: Context) -> Any:
        answer = server_service_pb2.ListPoolsResponse()
        pool = answer.pools.add(
            pool="detector",
            task=face_pb2.STAGE_DETECTOR,
            state=server_service_pb2.POOL_STATE_DEGRADED,
            model_id="null@1#0",
            isolation="process",
            completed=12,
        )
        worker = pool.workers.add(
            worker_id="detector#0",
            pid=4242,
            state=server_service_pb2.WORKER_STATE_READY,
            device="cpu",
            memory_bytes=123 << 20,
        )
        worker.uptime.seconds = 90
        return answer


class _View(view_service_pb2_grpc.ViewServiceServicer):
    """One stream, `door-1`, of one picture."""

    def ListStreams(self, request: Any, context: Context) -> Any:
        stream = view_service_pb2.OpenStream(stream_id="s1", source_id="door-1", result_fps=25)
        return view_service_pb2.ListStreamsResponse(streams=[stream])

    def WatchStream(self, request: Any, context: Context) -> Iterator[Any]:
        opened = view_service_pb2.OpenStream(stream_id="s1", source_id="door-1")
        yield view_service_pb2.WatchStreamResponse(opened=opened)
        frame = analysis_service_pb2.Frame(frame_id=1)
        seen = view_service_pb2.StreamPicture(
            picture=face_pb2.Picture(encoding=face_pb2.PICTURE_ENCODING_JPEG, data=b"\xff\xd8"),
            outcome=outcome(frame, result=frame_result(face())).outcome,
            key_frame=True,
        )
        yield view_service_pb2.WatchStreamResponse(picture=seen)


class _Admin(admin_service_pb2_grpc.AdminServiceServicer):
    def __init__(self, owner: ScriptedServer) -> None:
        self._owner = owner

    def RestartWorker(self, request: Any, context: Context) -> Any:
        self._owner.admin.append(request)
        self._owner.fail_if_told(context)
        return admin_service_pb2.RestartWorkerResponse(old_pid=1, new_pid=2)

    def ReloadModel(self, request: Any, context: Context) -> Any:
        self._owner.admin.append(request)
        return admin_service_pb2.ReloadModelResponse(
            old_model_id="null@1#0", new_model_id=request.model or "null@1#0"
        )

    def Drain(self, request: Any, context: Context) -> Any:
        self._owner.admin.append(request)
        return admin_service_pb2.DrainResponse()


class _Authenticating(grpc.ServerInterceptor):
    def __init__(self, owner: ScriptedServer) -> None:
        self._owner = owner

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        if ("authorization", f"Bearer {self._owner.token}") in details.invocation_metadata:
            return continuation(details)

        def refuse(request: Any, context: Context) -> None:
            abort(context, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "no valid key")

        return grpc.unary_unary_rpc_method_handler(refuse)


class ScriptedServer:
    """A server on a free port of the loopback, or wherever ``address`` says.

    ``scripts`` are taken one a stream; when none is left, ``faithful`` plays. ``failures``
    are taken one a call of AnalyzeImage, EnrollFace, IdentifyFace, WatchEvents or
    RestartWorker: a code, a reason and a message.
    """

    def __init__(
        self,
        *scripts: Script,
        address: str = "127.0.0.1:0",
        token: str = "",
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.scripts: deque[Script] = deque(scripts)
        self.token = token
        self.failures: deque[tuple[grpc.StatusCode, str, str]] = deque()
        self.released = threading.Event()
        """Clear it to hold single calls back."""
        self.released.set()
        self.health: dict[str, int] = {"": 1}
        self.event_burst = 3
        self.events_before = 0
        self.events_end = 1 << 40
        """Number of the last one that there is."""
        self.after_subscription: deque[tuple[grpc.StatusCode, str, str]] = deque()
        """Moved to ``failures`` one by one, as subscriptions end."""
        self.events_stay_open = False
        self.say_event = threading.Event()
        """Set it for one more event of a subscription that stays open."""
        # What was asked, for assertions.
        self.streams: list[list[Request]] = []
        self.images: list[Any] = []
        self.enrolments: list[Any] = []
        self.subscriptions: list[Any] = []
        self.admin: list[Any] = []

        self._server = grpc.server(
            ThreadPoolExecutor(32, thread_name_prefix="scripted"),
            interceptors=[_Authenticating(self)] if token else [],
            # A second server on a taken port must fail, not share it.
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 8 << 20)],
        )
        self.gallery = _Gallery(self)
        analysis_service_pb2_grpc.add_AnalysisServiceServicer_to_server(
            _Analysis(self), self._server
        )
        gallery_service_pb2_grpc.add_GalleryServiceServicer_to_server(self.gallery, self._server)
        event_service_pb2_grpc.add_EventServiceServicer_to_server(_Events(self), self._server)
        server_service_pb2_grpc.add_ServerServiceServicer_to_server(_Server(), self._server)
        view_service_pb2_grpc.add_ViewServiceServicer_to_server(_View(), self._server)
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(_Admin(self), self._server)
        self._server.add_generic_rpc_handlers((self._health_handler(),))
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        self.target = address if address.startswith("unix:") else f"127.0.0.1:{port}"
        self.port = port
        self._server.start()

    def _health_handler(self) -> grpc.GenericRpcHandler:
        def check(request: bytes, context: Context) -> bytes:
            service = request[2:].decode()
            if service not in self.health:
                context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
            return bytes([0x08, self.health[service]])

        return grpc.method_handlers_generic_handler(
            "grpc.health.v1.Health", {"Check": grpc.unary_unary_rpc_method_handler(check)}
        )

    def take_script(self) -> Script:
        return self.scripts.popleft() if self.scripts else faithful

    def recording(self, requests: Iterator[Request]) -> Iterator[Request]:
        """The requests of one stream, kept in ``streams`` as they pass."""
        kept: list[Request] = []
        self.streams.append(kept)

        def passing() -> Iterator[Request]:
            for request in requests:
                kept.append(request)
                yield request

        return passing()

    def fail_if_told(self, context: Context) -> None:
        assert self.released.wait(30)
        if self.failures:
            code, reason, message = self.failures.popleft()
            if reason:
                abort(context, code, reason, message)
            context.abort(code, message)

    def stop(self) -> None:
        """Breaks all connections at once."""
        self.released.set()
        assert self._server.stop(grace=None).wait(30), "the scripted server did not stop"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()
