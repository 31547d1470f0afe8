"""Every call with one answer: what is sent, where it goes, what the answer means.

Both clients make these calls. How they wait is theirs; everything else is here.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, Unpack

import grpc
from google.protobuf import field_mask_pb2

from facelane import convert, types
from facelane.errors import ArgumentError, DeadlineExceededError, Reason
from facelane.transport import HEALTH_METHOD, decode_health_response, encode_health_request
from facelane.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    analysis_service_pb2,
    analysis_service_pb2_grpc,
    event_service_pb2_grpc,
    face_pb2,
    gallery_service_pb2,
    gallery_service_pb2_grpc,
    server_service_pb2,
    server_service_pb2_grpc,
)

T = TypeVar("T")
_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")

DEFAULT_PAGE_SIZE = 500
_AGES = 1e8
"""Seconds; three years. A deadline so far away is none."""


class Stubs:
    """What can be called through a channel. Given one of ``grpc.aio``, the methods give
    awaitables; their annotations are those of the blocking channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.analysis = analysis_service_pb2_grpc.AnalysisServiceStub(channel)
        self.gallery = gallery_service_pb2_grpc.GalleryServiceStub(channel)
        self.events = event_service_pb2_grpc.EventServiceStub(channel)
        self.server = server_service_pb2_grpc.ServerServiceStub(channel)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(channel)
        self.health: grpc.UnaryUnaryMultiCallable[str, types.HealthStatus] = channel.unary_unary(
            HEALTH_METHOD,
            request_serializer=encode_health_request,
            response_deserializer=decode_health_response,
        )


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """``read(await method(stubs)(request, ...))``, or the same without ``await``, is a T."""

    method: Callable[[Stubs], Any]
    request: Any
    read: Callable[[Any], T]


def _call(
    method: Callable[[Stubs], grpc.UnaryUnaryMultiCallable[_Request, _Answer]],
    request: _Request,
    read: Callable[[_Answer], T],
) -> Call[T]:
    """A ``Call`` whose parts are known to fit together."""
    return Call(method, request, read)


def deadline(timeout: float) -> float | None:
    """A call's deadline in seconds as gRPC takes it: what it cannot count it would take for
    one that has passed."""
    if math.isnan(timeout):
        raise ArgumentError(Reason.ARGUMENT_INVALID, "timeout nan: give seconds, or math.inf")
    return timeout if timeout < _AGES else None


def closed() -> RuntimeError:
    """For whoever calls through a client that was closed."""
    return RuntimeError("the client was closed: make another")


# Analysis.


def analyze_image(
    picture: types.Picture, **options: Unpack[types.AnalysisOptions]
) -> Call[types.FrameResult]:
    """The faces of a picture."""
    return _call(
        lambda stubs: stubs.analysis.AnalyzeImage,
        analysis_service_pb2.AnalyzeImageRequest(
            picture=convert.picture(picture), options=convert.analysis_options(**options)
        ),
        lambda answer: convert.frame_result(answer.result),
    )


# The gallery.


def create_subject(
    subject_id: str, gallery: str, display_name: str, labels: Mapping[str, str] | None
) -> Call[types.Subject]:
    """A new subject."""
    return _call(
        lambda stubs: stubs.gallery.CreateSubject,
        gallery_service_pb2.CreateSubjectRequest(
            gallery_id=gallery,
            subject_id=subject_id,
            display_name=display_name,
            labels=dict(labels or {}),
        ),
        lambda answer: convert.subject(answer.subject),
    )


def get_subject(subject_id: str, gallery: str) -> Call[types.Subject]:
    """A subject."""
    return _call(
        lambda stubs: stubs.gallery.GetSubject,
        gallery_service_pb2.GetSubjectRequest(gallery_id=gallery, subject_id=subject_id),
        lambda answer: convert.subject(answer.subject),
    )


def list_subjects(
    gallery: str, page_size: int, page_token: str
) -> Call[tuple[list[types.Subject], str]]:
    """A page of subjects and the token of the next one, empty after the last."""
    return _call(
        lambda stubs: stubs.gallery.ListSubjects,
        gallery_service_pb2.ListSubjectsRequest(
            gallery_id=gallery,
            page_size=convert.count("page_size", page_size),
            page_token=page_token,
        ),
        lambda answer: ([convert.subject(s) for s in answer.subjects], answer.next_page_token),
    )


def update_subject(
    subject_id: str,
    gallery: str,
    display_name: str | None,
    labels: Mapping[str, str] | None,
    etag: str,
) -> Call[types.Subject]:
    """A change of those fields that are not ``None``."""
    paths = []
    if display_name is not None:
        paths.append("display_name")
    if labels is not None:
        paths.append("labels")
    if not paths:
        # An empty mask means "both" on the wire and would erase them.
        raise ArgumentError(
            Reason.ARGUMENT_INVALID, "nothing to change: give display_name or labels"
        )
    return _call(
        lambda stubs: stubs.gallery.UpdateSubject,
        gallery_service_pb2.UpdateSubjectRequest(
            subject=face_pb2.Subject(
                subject_id=subject_id,
                gallery_id=gallery,
                display_name=display_name or "",
                labels=dict(labels or {}),
                etag=etag,
            ),
            update_mask=field_mask_pb2.FieldMask(paths=paths),
        ),
        lambda answer: convert.subject(answer.subject),
    )


def delete_subject(subject_id: str, gallery: str) -> Call[int]:
    """The number of templates that went with the subject."""
    return _call(
        lambda stubs: stubs.gallery.DeleteSubject,
        gallery_service_pb2.DeleteSubjectRequest(gallery_id=gallery, subject_id=subject_id),
        lambda answer: answer.templates_deleted,
    )


def list_templates(subject_id: str, gallery: str) -> Call[list[types.Template]]:
    """The enrolled faces of a subject."""
    return _call(
        lambda stubs: stubs.gallery.ListTemplates,
        gallery_service_pb2.ListTemplatesRequest(gallery_id=gallery, subject_id=subject_id),
        lambda answer: [convert.template(t) for t in answer.templates],
    )


def delete_template(template_id: str, gallery: str) -> Call[None]:
    """One enrolled face less."""
    return _call(
        lambda stubs: stubs.gallery.DeleteTemplate,
        gallery_service_pb2.DeleteTemplateRequest(gallery_id=gallery, template_id=template_id),
        _nothing,
    )


def enroll(
    subject_id: str,
    picture: types.Picture,
    *,
    gallery: str,
    create_subject: bool,
    display_name: str,
    request_id: str | None,
    allow_multiple_faces: bool,
    skip_liveness: bool,
) -> Call[types.Enrollment]:
    """An enrolment; without a ``request_id`` a random one makes retries idempotent."""
    return _call(
        lambda stubs: stubs.gallery.EnrollFace,
        gallery_service_pb2.EnrollFaceRequest(
            gallery_id=gallery,
            subject_id=subject_id,
            picture=convert.picture(picture),
            request_id=str(uuid.uuid4()) if request_id is None else request_id,
            create_subject=create_subject,
            display_name=display_name,
            allow_multiple_faces=allow_multiple_faces,
            skip_liveness=skip_liveness,
        ),
        convert.enrollment,
    )


def verify(subject_id: str, picture: types.Picture, gallery: str) -> Call[types.Verification]:
    """1:1."""
    return _call(
        lambda stubs: stubs.gallery.VerifyFace,
        gallery_service_pb2.VerifyFaceRequest(
            gallery_id=gallery, subject_id=subject_id, picture=convert.picture(picture)
        ),
        convert.verification,
    )


def identify(picture: types.Picture, gallery: str, max_candidates: int) -> Call[list[types.Face]]:
    """1:N."""
    return _call(
        lambda stubs: stubs.gallery.IdentifyFace,
        gallery_service_pb2.IdentifyFaceRequest(
            gallery_id=gallery,
            picture=convert.picture(picture),
            max_candidates=convert.count("max_candidates", max_candidates),
        ),
        lambda answer: [convert.face(f) for f in answer.faces],
    )


# The server.


def server_info() -> Call[types.ServerInfo]:
    """What the server is."""
    return _call(
        lambda stubs: stubs.server.GetServerInfo,
        server_service_pb2.GetServerInfoRequest(),
        convert.server_info,
    )


def pools() -> Call[list[types.PoolInfo]]:
    """How the pools fare."""
    return _call(
        lambda stubs: stubs.server.ListPools,
        server_service_pb2.ListPoolsRequest(),
        convert.pools,
    )


def health(service: str) -> Call[types.HealthStatus]:
    """grpc.health.v1; a service that is not known is an error there (NOT_FOUND)."""
    return _call(lambda stubs: stubs.health, service, lambda status: status)


def never_served(timeout: float, said: str) -> DeadlineExceededError:
    """Health did not say SERVING in time, but ``said`` last."""
    return DeadlineExceededError(
        Reason.DEADLINE_EXCEEDED,
        f"the server was not serving within {timeout:.3g} s (last: {said}): look at its log and "
        "its pools",
    )


def never_began(timeout: float) -> DeadlineExceededError:
    """A server took a subscription, and did not say that it began."""
    return DeadlineExceededError(
        Reason.DEADLINE_EXCEEDED,
        f"the server did not begin the subscription within {timeout:.3g} s: look at its health",
    )


# Administration.


def restart_worker(worker_id: str) -> Call[types.WorkerRestarted]:
    """Drains one worker and starts it again."""
    return _call(
        lambda stubs: stubs.admin.RestartWorker,
        admin_service_pb2.RestartWorkerRequest(worker_id=worker_id),
        lambda answer: types.WorkerRestarted(answer.old_pid, answer.new_pid),
    )


def reload_model(pool: str, model: str) -> Call[types.ModelReloaded]:
    """Swaps a pool's model."""
    return _call(
        lambda stubs: stubs.admin.ReloadModel,
        admin_service_pb2.ReloadModelRequest(pool=pool, model=model),
        lambda answer: types.ModelReloaded(answer.old_model_id, answer.new_model_id),
    )


def drain(grace: float) -> Call[None]:
    """Ends the server within ``grace`` seconds."""
    return _call(
        lambda stubs: stubs.admin.Drain,
        admin_service_pb2.DrainRequest(grace=convert.duration(grace)),
        _nothing,
    )


def _nothing(_answer: object) -> None:
    return None
