"""Every call with one answer: its signature and words for users, what is sent, where it goes,
what the answer means.

A function here is a method of both clients: they differ in how they wait, and nothing else.
"""

from __future__ import annotations

import functools
import inspect
import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, Unpack

import grpc
from google.protobuf import field_mask_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from facelane import convert, describe, types
from facelane.convert import DEFAULT_GALLERY
from facelane.errors import (
    ArgumentError,
    DeadlineExceededError,
    FacelaneError,
    NotFoundError,
    Reason,
    UnavailableError,
)
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
    view_service_pb2_grpc,
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
        self.view = view_service_pb2_grpc.ViewServiceStub(channel)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """``read(await method(stubs)(request, ...))``, or the same without ``await``, is a T.

    ``timeout`` in seconds, ``None`` = the client's. ``absent`` is the answer where the server
    knows no such thing.
    """

    method: Callable[[Stubs], Any]
    request: Any
    read: Callable[[Any], T]
    timeout: float | None = None
    absent: T | None = None

    def failed(self, error: FacelaneError) -> T:
        """The answer that a failure is, or the failure raised."""
        if self.absent is None or not isinstance(error, NotFoundError):
            raise error
        return self.absent


def _call(
    method: Callable[[Stubs], grpc.UnaryUnaryMultiCallable[_Request, _Answer]],
    request: _Request,
    read: Callable[[_Answer], T],
    timeout: float | None,
) -> Call[T]:
    """A ``Call`` whose parts are known to fit together."""
    return Call(method, request, read, timeout)


def as_method(build: Callable[..., Any], method: Callable[..., Any], doc: str | None) -> None:
    """Shows a client's method as what it is made of: name and signature of ``build``."""
    functools.update_wrapper(method, build, assigned=("__name__", "__qualname__"), updated=())
    method.__doc__ = doc
    shown = inspect.signature(build)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    answer = str(shown.return_annotation).removeprefix("Call[").removesuffix("]")
    method.__signature__ = shown.replace(  # type: ignore[attr-defined]
        parameters=[this, *shown.parameters.values()], return_annotation=answer
    )


def deadline(timeout: float) -> float | None:
    """A call's deadline in seconds as gRPC takes it: what it cannot count it would take for
    one that has passed."""
    if math.isnan(timeout):
        raise ArgumentError(Reason.ARGUMENT_INVALID, "timeout nan: give seconds, or math.inf")
    return timeout if timeout < _AGES else None


# Analysis.


def analyze_image(
    picture: types.Picture,
    *,
    timeout: float | None = None,
    **options: Unpack[types.AnalysisOptions],
) -> Call[types.FrameResult]:
    """The faces of one picture.

    ``options`` (``facelane.AnalysisOptions`` says more): ``skip_recognition``,
    ``skip_liveness``, ``gallery``, ``max_faces``, ``max_candidates``, ``min_face_size``,
    ``false_naming``, ``match_threshold``.

    Raises:
        PermissionDeniedError: names that are less sure than the server's (NAMING_TOO_LOOSE).
        PictureError: the picture cannot be read, or is beyond the server's limits.
        OverloadedError, UnavailableError: try again later.
    """
    return _call(
        lambda stubs: stubs.analysis.AnalyzeImage,
        analysis_service_pb2.AnalyzeImageRequest(
            picture=convert.picture(picture), options=convert.analysis_options(**options)
        ),
        lambda answer: convert.frame_result(answer.result),
        timeout,
    )


# The gallery.


def create_subject(
    subject_id: str,
    *,
    display_name: str = "",
    labels: Mapping[str, str] | None = None,
    gallery: str = DEFAULT_GALLERY,
    timeout: float | None = None,
) -> Call[types.Subject]:
    """A new subject without templates.

    Raises:
        AlreadyExistsError: the subject exists (SUBJECT_EXISTS).
    """
    return _call(
        lambda stubs: stubs.gallery.CreateSubject,
        gallery_service_pb2.CreateSubjectRequest(
            gallery_id=gallery,
            subject_id=subject_id,
            display_name=display_name,
            labels=dict(labels or {}),
        ),
        lambda answer: convert.subject(answer.subject),
        timeout,
    )


def get_subject(
    subject_id: str, *, gallery: str = DEFAULT_GALLERY, timeout: float | None = None
) -> Call[types.Subject]:
    """A subject.

    Raises:
        NotFoundError: there is none (SUBJECT_NOT_FOUND).
    """
    return _call(
        lambda stubs: stubs.gallery.GetSubject,
        gallery_service_pb2.GetSubjectRequest(gallery_id=gallery, subject_id=subject_id),
        lambda answer: convert.subject(answer.subject),
        timeout,
    )


def list_subjects(
    gallery: str, page_size: int, page_token: str, timeout: float | None
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
        timeout,
    )


def update_subject(
    subject_id: str,
    *,
    display_name: str | None = None,
    labels: Mapping[str, str] | None = None,
    etag: str = "",
    gallery: str = DEFAULT_GALLERY,
    timeout: float | None = None,
) -> Call[types.Subject]:
    """Changes what is not ``None``. With the ``etag`` of the subject that was read, a change
    that somebody else made meanwhile is not overwritten.

    Raises:
        ConflictError: the subject was changed since (ETAG_MISMATCH).
    """
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
        timeout,
    )


def delete_subject(
    subject_id: str, *, gallery: str = DEFAULT_GALLERY, timeout: float | None = None
) -> Call[int]:
    """Deletes a subject and all its templates; gives the number of templates."""
    return _call(
        lambda stubs: stubs.gallery.DeleteSubject,
        gallery_service_pb2.DeleteSubjectRequest(gallery_id=gallery, subject_id=subject_id),
        lambda answer: answer.templates_deleted,
        timeout,
    )


def erase_subject(
    subject_id: str, *, gallery: str = DEFAULT_GALLERY, timeout: float | None = None
) -> Call[types.Erased]:
    """Deletes a subject as ``delete_subject`` does, and gives the signed receipt of it."""
    return _call(
        lambda stubs: stubs.gallery.DeleteSubject,
        gallery_service_pb2.DeleteSubjectRequest(gallery_id=gallery, subject_id=subject_id),
        lambda answer: types.Erased(answer.templates_deleted, answer.receipt),
        timeout,
    )


def list_templates(
    subject_id: str, *, gallery: str = DEFAULT_GALLERY, timeout: float | None = None
) -> Call[list[types.Template]]:
    """The enrolled faces of a subject."""
    return _call(
        lambda stubs: stubs.gallery.ListTemplates,
        gallery_service_pb2.ListTemplatesRequest(gallery_id=gallery, subject_id=subject_id),
        lambda answer: [convert.template(t) for t in answer.templates],
        timeout,
    )


def delete_template(
    template_id: str, *, gallery: str = DEFAULT_GALLERY, timeout: float | None = None
) -> Call[None]:
    """Deletes one enrolled face."""
    return _call(
        lambda stubs: stubs.gallery.DeleteTemplate,
        gallery_service_pb2.DeleteTemplateRequest(gallery_id=gallery, template_id=template_id),
        _nothing,
        timeout,
    )


def enroll(
    subject_id: str,
    picture: types.Picture,
    *,
    create_subject: bool = True,
    display_name: str = "",
    request_id: str | None = None,
    allow_multiple_faces: bool = False,
    skip_liveness: bool = False,
    require_live: bool = False,
    gallery: str = DEFAULT_GALLERY,
    timeout: float | None = None,
) -> Call[types.Enrollment]:
    """Adds the face of a picture to a subject.

    A random ``request_id`` makes a retry after a lost answer harmless; give your own to
    make the retry of a whole program harmless too. ``require_live`` enrols only a face that
    is judged LIVE (pictures taken under supervision, uncropped); without it liveness is not
    judged, and ``skip_liveness`` says no more than that.

    Raises:
        EnrollmentRefusedError: NO_FACE, MULTIPLE_FACES or OOD_REJECTED; with ``require_live``
            SPOOF_SUSPECTED, NO_CONTEXT or LIVENESS_UNDECIDED.
        NotFoundError: no such subject, and ``create_subject`` is off.

    >>> enrollment = client.enroll("grace", facelane.Picture.from_file("people.jpg"))
    >>> enrollment.subject.template_count
    1
    """
    return _call(
        lambda stubs: stubs.gallery.EnrollFace,
        gallery_service_pb2.EnrollFaceRequest(
            gallery_id=gallery,
            subject_id=subject_id,
            picture=convert.picture(picture),
            request_id=request_id or str(uuid.uuid4()),
            create_subject=create_subject,
            display_name=display_name,
            allow_multiple_faces=allow_multiple_faces,
            skip_liveness=skip_liveness,
            require_live=require_live,
        ),
        convert.enrollment,
        timeout,
    )


def verify(
    subject_id: str,
    picture: types.Picture,
    *,
    gallery: str = DEFAULT_GALLERY,
    timeout: float | None = None,
    **naming: Unpack[types.NamingOptions],
) -> Call[types.Verification]:
    """Whether the face of a picture is the subject (1:1).

    ``naming``: ``false_naming`` (here: the share of others who may pass for the subject) or
    ``match_threshold``, stricter than the server's (``facelane.NamingOptions``).

    Raises:
        PermissionDeniedError: names that are less sure than the server's (NAMING_TOO_LOOSE).
        RefusedError: NO_FACE or MULTIPLE_FACES in the picture, or the subject has
            NO_TEMPLATES of the serving model.
        NotFoundError: no such subject.
    """
    return _call(
        lambda stubs: stubs.gallery.VerifyFace,
        gallery_service_pb2.VerifyFaceRequest(
            gallery_id=gallery,
            subject_id=subject_id,
            picture=convert.picture(picture),
            **naming,
        ),
        convert.verification,
        timeout,
    )


def identify(
    picture: types.Picture,
    *,
    max_candidates: int = 3,
    gallery: str = DEFAULT_GALLERY,
    timeout: float | None = None,
    **naming: Unpack[types.NamingOptions],
) -> Call[list[types.Face]]:
    """Who every face of a picture is (1:N), with up to 10 candidates each.

    ``naming``: ``false_naming`` or ``match_threshold``, stricter than the server's
    (``facelane.NamingOptions``).

    Raises:
        PermissionDeniedError: names that are less sure than the server's (NAMING_TOO_LOOSE).
    """
    return _call(
        lambda stubs: stubs.gallery.IdentifyFace,
        gallery_service_pb2.IdentifyFaceRequest(
            gallery_id=gallery,
            picture=convert.picture(picture),
            max_candidates=convert.count("max_candidates", max_candidates),
            **naming,
        ),
        lambda answer: [convert.face(f) for f in answer.faces],
        timeout,
    )


# Events.


def confirm_sighting(
    candidate: types.Event | int,
    *,
    agrees: bool = True,
    gallery: str = DEFAULT_GALLERY,
    timeout: float | None = None,
) -> Call[types.Confirmation]:
    """Says whether a candidate (an event SUBJECT_CANDIDATE, or its ``sequence``) is the subject
    that it names. Once so many keys agree as the gallery asks for, SUBJECT_SEEN is told; one that
    does not agree ends it.

    Raises:
        NotFoundError: there is no such candidate (EVENT_NOT_FOUND).
    """
    sequence = candidate if isinstance(candidate, int) else candidate.sequence
    return _call(
        lambda stubs: stubs.events.ConfirmSighting,
        event_service_pb2.ConfirmSightingRequest(
            gallery_id=gallery, sequence=convert.count("candidate", sequence), agrees=agrees
        ),
        _confirmation,
        timeout,
    )


# The server.


def server_info(*, timeout: float | None = None) -> Call[types.ServerInfo]:
    """Version, models and limits."""
    return _call(
        lambda stubs: stubs.server.GetServerInfo,
        server_service_pb2.GetServerInfoRequest(),
        describe.server_info,
        timeout,
    )


def pools(*, timeout: float | None = None) -> Call[list[types.PoolInfo]]:
    """The pools of workers and how they fare."""
    return _call(
        lambda stubs: stubs.server.ListPools,
        server_service_pb2.ListPoolsRequest(),
        describe.pools,
        timeout,
    )


def health(service: str = "", *, timeout: float | None = None) -> Call[types.HealthStatus]:
    """grpc.health.v1 of one service, or of the server in all.

    Raises:
        UnavailableError: nobody answers.
    """
    return Call(
        lambda stubs: stubs.health.Check,
        health_pb2.HealthCheckRequest(service=service),
        convert.health,
        timeout,
        absent=types.HealthStatus.SERVICE_UNKNOWN,
    )


class ServingWait:
    """Asks for health again and again until it says SERVING, within ``timeout`` seconds from
    ``now``; each question has ``patience`` seconds at most."""

    def __init__(self, timeout: float, poll_interval: float, patience: float, now: float) -> None:
        self._timeout = timeout
        self._poll_interval = poll_interval
        self._patience = patience
        self._deadline = now + timeout
        self._remaining = timeout
        self._said = ""

    def question(self, now: float) -> float:
        """Seconds for the next question."""
        self._remaining = self._deadline - now
        return max(0.05, min(self._remaining, self._patience))

    def heard(self, answer: types.HealthStatus | FacelaneError, now: float) -> bool:
        """Whether the server serves; if not, ask again.

        Raises:
            DeadlineExceededError: there is no time for another question.
            FacelaneError: the server refuses to say.
        """
        if isinstance(answer, types.HealthStatus):
            if answer is types.HealthStatus.SERVING:
                return True
            self._said = answer.value
        elif isinstance(answer, UnavailableError):
            self._said = answer.reason
        elif isinstance(answer, DeadlineExceededError):
            # The last question's time is what was left of ours: no answer to it says less
            # than an answer before it.
            if self._remaining >= self._patience or not self._said:
                self._said = answer.reason
        else:
            raise answer
        if self._deadline - now <= self._poll_interval:
            raise DeadlineExceededError(
                Reason.DEADLINE_EXCEEDED,
                f"the server was not serving within {self._timeout:.3g} s (last: {self._said}): "
                "look at its log and its pools",
            )
        return False


# Administration.


def restart_worker(worker_id: str, *, timeout: float | None = None) -> Call[types.WorkerRestarted]:
    """Drains one worker (``pool#index``) and starts it again."""
    return _call(
        lambda stubs: stubs.admin.RestartWorker,
        admin_service_pb2.RestartWorkerRequest(worker_id=worker_id),
        lambda answer: types.WorkerRestarted(answer.old_pid, answer.new_pid),
        timeout,
    )


def reload_model(
    pool: str, model: str = "", *, forget_templates: bool = False, timeout: float | None = None
) -> Call[types.ModelReloaded]:
    """Swaps a pool's model without losing a frame; no ``model`` = the present one again.

    A recogniser that finds nobody by the gallery's templates is refused (TEMPLATES_LOST) unless
    ``forget_templates``: they are kept, and searched again when their model comes back.
    """
    return _call(
        lambda stubs: stubs.admin.ReloadModel,
        admin_service_pb2.ReloadModelRequest(
            pool=pool, model=model, forget_templates=forget_templates
        ),
        lambda answer: types.ModelReloaded(
            answer.old_model_id,
            answer.new_model_id,
            answer.templates_not_searched,
            answer.remembered,
        ),
        timeout,
    )


def drain(grace: float = 30.0, *, timeout: float | None = None) -> Call[None]:
    """Ends the server within ``grace`` seconds; open streams are told."""
    return _call(
        lambda stubs: stubs.admin.Drain,
        admin_service_pb2.DrainRequest(grace=convert.duration(grace)),
        _nothing,
        timeout,
    )


def _confirmation(answer: event_service_pb2.ConfirmSightingResponse) -> types.Confirmation:
    known = {
        number: types.SightingState(name.removeprefix("SIGHTING_STATE_"))
        for name, number in event_service_pb2.SightingState.items()
    }
    state = known.get(answer.state, types.SightingState.UNSPECIFIED)
    return types.Confirmation(state, answer.agreed, answer.needed)


def _nothing(_answer: object) -> None:
    return None
