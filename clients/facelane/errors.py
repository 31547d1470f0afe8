"""What can go wrong, as one tree.

::

    FacelaneError                       reason, message, metadata, retryable
    ├── ArgumentError (ValueError)      the request cannot be right as it stands
    │   └── PictureError                the picture cannot be read
    ├── AuthenticationError             no token, or a wrong one
    ├── PermissionDeniedError           the token does not allow this
    ├── NotFoundError                   no such subject, template, gallery, pool, worker
    ├── AlreadyExistsError              the subject exists
    ├── RefusedError                    the server understood and declines
    │   └── EnrollmentRefusedError      NO_FACE, MULTIPLE_FACES, OOD_REJECTED, SPOOF_SUSPECTED, …
    ├── ConflictError                   somebody else changed it meanwhile
    ├── HistoryLostError                events since the resume token are gone
    ├── OverloadedError                 a limit of the server is reached           retryable
    ├── UnavailableError                nobody answers, or a pool cannot infer     retryable
    │   └── ConnectionLostError         the connection broke under a stream        retryable
    ├── DeadlineExceededError (TimeoutError)  the wait ended first                 retryable
    ├── CancelledError                  the call was cancelled
    ├── StreamClosedError               sending into a stream that has ended
    ├── ProtocolError                   the server broke the stream's rules
    └── ServerError                     a fault of the server

``reason`` is machine-readable: one of ``Reason``, or one that a newer server knows.
``retryable`` means that the same call may succeed later without a change.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Mapping
from typing import Any, ClassVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status


class Reason(enum.StrEnum):
    """Reasons that the server and this client give. Compare with ``==``: ``reason`` of an
    error is a plain string, since a newer server may know more."""

    # The picture.
    PICTURE_EMPTY = "PICTURE_EMPTY"
    PICTURE_CORRUPT = "PICTURE_CORRUPT"
    PICTURE_TOO_SMALL = "PICTURE_TOO_SMALL"
    PICTURE_TOO_LARGE = "PICTURE_TOO_LARGE"
    PICTURE_TOO_COSTLY = "PICTURE_TOO_COSTLY"
    ENCODING_UNSUPPORTED = "ENCODING_UNSUPPORTED"
    ENCODING_MISMATCH = "ENCODING_MISMATCH"
    RAW_LAYOUT_INVALID = "RAW_LAYOUT_INVALID"
    ENCODING_CHANGED = "ENCODING_CHANGED"
    VIDEO_UNSUPPORTED = "VIDEO_UNSUPPORTED"
    PARAMETER_SETS_MISSING = "PARAMETER_SETS_MISSING"
    # The stream.
    CONFIG_MISSING = "CONFIG_MISSING"
    CONFIG_REPEATED = "CONFIG_REPEATED"
    CONFIG_INVALID = "CONFIG_INVALID"
    FRAME_ID_NOT_INCREASING = "FRAME_ID_NOT_INCREASING"
    MESSAGE_EMPTY = "MESSAGE_EMPTY"
    SLOW_READER = "SLOW_READER"
    STREAM_LIMIT = "STREAM_LIMIT"
    CAPACITY = "CAPACITY"
    DRAINING = "DRAINING"
    # The work.
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    POOL_UNAVAILABLE = "POOL_UNAVAILABLE"
    POOL_OVERLOADED = "POOL_OVERLOADED"
    TOO_MANY_BAD_PICTURES = "TOO_MANY_BAD_PICTURES"
    WORKER_LOST = "WORKER_LOST"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    POISONED = "POISONED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"
    # The gallery.
    SUBJECT_NOT_FOUND = "SUBJECT_NOT_FOUND"
    SUBJECT_EXISTS = "SUBJECT_EXISTS"
    TEMPLATE_NOT_FOUND = "TEMPLATE_NOT_FOUND"
    GALLERY_FULL = "GALLERY_FULL"
    GALLERY_UNAVAILABLE = "GALLERY_UNAVAILABLE"
    NO_FACE = "NO_FACE"
    MULTIPLE_FACES = "MULTIPLE_FACES"
    OOD_REJECTED = "OOD_REJECTED"
    SPOOF_SUSPECTED = "SPOOF_SUSPECTED"
    NO_CONTEXT = "NO_CONTEXT"
    LIVENESS_UNDECIDED = "LIVENESS_UNDECIDED"
    TEMPLATES_LOST = "TEMPLATES_LOST"
    FACE_OF_ANOTHER = "FACE_OF_ANOTHER"
    NO_TEMPLATES = "NO_TEMPLATES"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    ARGUMENT_INVALID = "ARGUMENT_INVALID"
    ETAG_MISMATCH = "ETAG_MISMATCH"
    # The caller.
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    NAMING_TOO_LOOSE = "NAMING_TOO_LOOSE"
    NAMING_NOT_MEASURED = "NAMING_NOT_MEASURED"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    # Events and administration.
    RESUME_TOKEN_INVALID = "RESUME_TOKEN_INVALID"  # noqa: S105 - a reason, no secret
    HISTORY_LOST = "HISTORY_LOST"
    STREAM_NOT_FOUND = "STREAM_NOT_FOUND"
    EVENT_NOT_FOUND = "EVENT_NOT_FOUND"
    PICTURE_NOT_FOUND = "PICTURE_NOT_FOUND"
    POOL_NOT_FOUND = "POOL_NOT_FOUND"
    WORKER_NOT_FOUND = "WORKER_NOT_FOUND"
    MODEL_INVALID = "MODEL_INVALID"
    # Given by this client alone.
    CONNECTION_LOST = "CONNECTION_LOST"
    UNREACHABLE = "UNREACHABLE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    WINDOW_FULL = "WINDOW_FULL"
    OUTCOMES_UNREAD = "OUTCOMES_UNREAD"
    NOT_CONNECTED = "NOT_CONNECTED"
    STREAM_CLOSED = "STREAM_CLOSED"
    PROTOCOL_VIOLATION = "PROTOCOL_VIOLATION"


class FacelaneError(Exception):
    """Any failure of a call or a stream.

    ``message`` says what is wrong and what to do next. ``metadata`` holds short strings
    from the server's ErrorInfo.
    """

    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(reason, message)
        self.reason: str = str(reason)
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})
        self.retryable = self.default_retryable if retryable is None else retryable

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"metadata": self.metadata, "retryable": self.retryable}
        return type(self), (self.reason, self.message), state


class ArgumentError(FacelaneError, ValueError):
    """The request cannot be right as it stands."""


class PictureError(ArgumentError):
    """The picture cannot be read, or is beyond the limits."""


class AuthenticationError(FacelaneError):
    """No token was given, or the server does not know it."""


class PermissionDeniedError(FacelaneError):
    """The token does not allow this call."""


class NotFoundError(FacelaneError):
    """There is no such subject, template, gallery, pool or worker."""


class AlreadyExistsError(FacelaneError):
    """What was to be created exists."""


class RefusedError(FacelaneError):
    """The server understood and declines."""


class EnrollmentRefusedError(RefusedError):
    """The picture does not do: NO_FACE, MULTIPLE_FACES or OOD_REJECTED; with ``require_live``
    SPOOF_SUSPECTED, NO_CONTEXT or LIVENESS_UNDECIDED too."""


class ConflictError(FacelaneError):
    """Somebody else changed it meanwhile: read it again, then change it."""


class HistoryLostError(FacelaneError):
    """Events since the resume token are gone: start again without a token."""


class OverloadedError(FacelaneError):
    """A limit of the server is reached."""

    default_retryable = True


class UnavailableError(FacelaneError):
    """Nobody answers, or the models cannot infer at present."""

    default_retryable = True


class ConnectionLostError(UnavailableError):
    """The connection broke under an open stream."""


class DeadlineExceededError(FacelaneError, TimeoutError):
    """The wait ended before the answer came."""

    default_retryable = True


class CancelledError(FacelaneError):
    """The call was cancelled."""


class StreamClosedError(FacelaneError):
    """A frame was sent into a stream that has ended."""


class ProtocolError(FacelaneError):
    """The server broke the rules of a stream: an outcome too many, too few or out of order."""


class ServerError(FacelaneError):
    """A fault of the server."""


# Where the reason says more than the code.
_BY_REASON: dict[str, type[FacelaneError]] = {
    Reason.NO_FACE: EnrollmentRefusedError,
    Reason.MULTIPLE_FACES: EnrollmentRefusedError,
    Reason.OOD_REJECTED: EnrollmentRefusedError,
    Reason.SPOOF_SUSPECTED: EnrollmentRefusedError,
    Reason.NO_CONTEXT: EnrollmentRefusedError,
    Reason.LIVENESS_UNDECIDED: EnrollmentRefusedError,
    Reason.HISTORY_LOST: HistoryLostError,
    Reason.POISONED: RefusedError,
    Reason.PICTURE_EMPTY: PictureError,
    Reason.PICTURE_CORRUPT: PictureError,
    Reason.PICTURE_TOO_SMALL: PictureError,
    Reason.PICTURE_TOO_LARGE: PictureError,
    Reason.PICTURE_TOO_COSTLY: PictureError,
    Reason.ENCODING_UNSUPPORTED: PictureError,
    Reason.ENCODING_MISMATCH: PictureError,
    Reason.RAW_LAYOUT_INVALID: PictureError,
    Reason.ENCODING_CHANGED: PictureError,
    Reason.VIDEO_UNSUPPORTED: PictureError,
    Reason.PARAMETER_SETS_MISSING: PictureError,
}

# Code -> (class, the reason when the server gave none).
_BY_CODE: dict[grpc.StatusCode, tuple[type[FacelaneError], Reason]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (ArgumentError, Reason.ARGUMENT_INVALID),
    grpc.StatusCode.OUT_OF_RANGE: (ArgumentError, Reason.ARGUMENT_INVALID),
    grpc.StatusCode.UNAUTHENTICATED: (AuthenticationError, Reason.UNAUTHENTICATED),
    grpc.StatusCode.PERMISSION_DENIED: (PermissionDeniedError, Reason.PERMISSION_DENIED),
    grpc.StatusCode.NOT_FOUND: (NotFoundError, Reason.ARGUMENT_INVALID),
    grpc.StatusCode.ALREADY_EXISTS: (AlreadyExistsError, Reason.ARGUMENT_INVALID),
    grpc.StatusCode.FAILED_PRECONDITION: (RefusedError, Reason.ARGUMENT_INVALID),
    grpc.StatusCode.ABORTED: (ConflictError, Reason.ETAG_MISMATCH),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (OverloadedError, Reason.POOL_OVERLOADED),
    grpc.StatusCode.UNAVAILABLE: (UnavailableError, Reason.UNREACHABLE),
    grpc.StatusCode.DEADLINE_EXCEEDED: (DeadlineExceededError, Reason.DEADLINE_EXCEEDED),
    grpc.StatusCode.CANCELLED: (CancelledError, Reason.CANCELLED),
    grpc.StatusCode.UNIMPLEMENTED: (ServerError, Reason.UNIMPLEMENTED),
}

_NEXT_STEP: dict[Reason, str] = {
    Reason.UNREACHABLE: (
        "no server answers at the target: check that it runs, the address (host:port or "
        "unix:/path), and TLS on both sides"
    ),
    Reason.DEADLINE_EXCEEDED: "no answer in time: give a longer timeout, or look at the pools",
    Reason.UNAUTHENTICATED: "the server wants a token that it knows",
    Reason.UNIMPLEMENTED: "the server does not offer this call: it may be older than the client",
    Reason.PICTURE_TOO_LARGE: "the message is larger than the server takes: send a smaller picture",
}


def from_rpc(error: grpc.RpcError) -> FacelaneError:
    """The typed error of a failed call, from its status and its ErrorInfo."""
    code: grpc.StatusCode = error.code()
    details: str = error.details() or ""
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):
        # The details disagree with the status proper, or are none: the latter is what gRPC
        # acts on.
        status = None
    info = None if status is None else error_info(status)
    if info is None:
        return _without_reason(code, details)
    return _build(code, info.reason, details, dict(info.metadata))


def error_info(status: status_pb2.Status) -> error_details_pb2.ErrorInfo | None:
    """The ErrorInfo among a status's details, or ``None``."""
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            with contextlib.suppress(DecodeError):
                detail.Unpack(info)
                return info
    return None


RETRYABLE_REASONS = frozenset(
    {
        Reason.DEADLINE_EXCEEDED,
        Reason.POOL_UNAVAILABLE,
        Reason.POOL_OVERLOADED,
        Reason.WORKER_LOST,
        Reason.OUT_OF_MEMORY,
        Reason.STREAM_LIMIT,
        Reason.CAPACITY,
        Reason.SLOW_READER,
        Reason.DRAINING,
        Reason.GALLERY_UNAVAILABLE,
        Reason.CONNECTION_LOST,
        Reason.UNREACHABLE,
    }
)
"""Reasons whose failures may pass without a change of the request."""


def is_retryable(reason: str, metadata: Mapping[str, str], default: bool) -> bool:
    """The server's own word (metadata ``retryable``) first, then the reason's nature."""
    said = metadata.get("retryable", "").lower()
    if said in ("true", "false"):
        return said == "true"
    if reason in Reason.__members__:
        return reason in RETRYABLE_REASONS
    return default


def _without_reason(code: grpc.StatusCode, details: str) -> FacelaneError:
    """An error of gRPC itself, or of a server that is not facelane."""
    kind, reason = _BY_CODE.get(code, (ServerError, Reason.INTERNAL))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        kind, reason = PictureError, Reason.PICTURE_TOO_LARGE
    step = _NEXT_STEP.get(reason, "")
    message = f"{step} ({details})" if step and details else step or details or code.name
    metadata = {"grpc_status": code.name, "grpc_message": details}
    return kind(reason, message, metadata=metadata)


def _build(
    code: grpc.StatusCode, reason: str, message: str, metadata: dict[str, str]
) -> FacelaneError:
    kind = _BY_REASON.get(reason) or _BY_CODE.get(code, (ServerError, Reason.INTERNAL))[0]
    retryable = is_retryable(reason, metadata, kind.default_retryable)
    return kind(reason, message or reason, metadata=metadata, retryable=retryable)
