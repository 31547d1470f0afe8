"""``FacelaneError`` to gRPC status with ``google.rpc.ErrorInfo`` (AIP-193)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

import grpc
import structlog
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from facelane_server.domain import FacelaneError, Reason
from facelane_server.edge.awake import Awake

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

DOMAIN: Final = "facelane"

_INVALID = (
    Reason.PICTURE_EMPTY,
    Reason.PICTURE_CORRUPT,
    Reason.PICTURE_TOO_SMALL,
    Reason.PICTURE_TOO_LARGE,
    Reason.PICTURE_TOO_COSTLY,
    Reason.ENCODING_UNSUPPORTED,
    Reason.ENCODING_MISMATCH,
    Reason.RAW_LAYOUT_INVALID,
    Reason.ENCODING_CHANGED,
    Reason.VIDEO_UNSUPPORTED,
    Reason.PARAMETER_SETS_MISSING,
    Reason.CONFIG_MISSING,
    Reason.CONFIG_REPEATED,
    Reason.CONFIG_INVALID,
    Reason.FRAME_ID_NOT_INCREASING,
    Reason.MESSAGE_EMPTY,
    Reason.REQUEST_ID_REUSED,
    Reason.ARGUMENT_INVALID,
    Reason.RESUME_TOKEN_INVALID,
    Reason.MODEL_INVALID,
)

CODES: Final[dict[Reason, int]] = {
    **dict.fromkeys(_INVALID, code_pb2.INVALID_ARGUMENT),
    Reason.SLOW_READER: code_pb2.RESOURCE_EXHAUSTED,
    Reason.QUOTA_EXCEEDED: code_pb2.RESOURCE_EXHAUSTED,
    Reason.STREAM_LIMIT: code_pb2.RESOURCE_EXHAUSTED,
    Reason.CAPACITY: code_pb2.RESOURCE_EXHAUSTED,
    Reason.POOL_OVERLOADED: code_pb2.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_BAD_PICTURES: code_pb2.RESOURCE_EXHAUSTED,
    Reason.GALLERY_FULL: code_pb2.RESOURCE_EXHAUSTED,
    Reason.DRAINING: code_pb2.UNAVAILABLE,
    Reason.POOL_UNAVAILABLE: code_pb2.UNAVAILABLE,
    Reason.WORKER_LOST: code_pb2.UNAVAILABLE,
    Reason.OUT_OF_MEMORY: code_pb2.UNAVAILABLE,
    Reason.GALLERY_UNAVAILABLE: code_pb2.UNAVAILABLE,
    Reason.DEADLINE_EXCEEDED: code_pb2.DEADLINE_EXCEEDED,
    Reason.POISONED: code_pb2.ABORTED,
    Reason.CANCELLED: code_pb2.CANCELLED,
    Reason.INTERNAL: code_pb2.INTERNAL,
    Reason.SUBJECT_NOT_FOUND: code_pb2.NOT_FOUND,
    Reason.TEMPLATE_NOT_FOUND: code_pb2.NOT_FOUND,
    Reason.STREAM_NOT_FOUND: code_pb2.NOT_FOUND,
    Reason.PICTURE_NOT_FOUND: code_pb2.NOT_FOUND,
    Reason.POOL_NOT_FOUND: code_pb2.NOT_FOUND,
    Reason.WORKER_NOT_FOUND: code_pb2.NOT_FOUND,
    Reason.EVENT_NOT_FOUND: code_pb2.NOT_FOUND,
    Reason.SUBJECT_EXISTS: code_pb2.ALREADY_EXISTS,
    Reason.NO_FACE: code_pb2.FAILED_PRECONDITION,
    Reason.MULTIPLE_FACES: code_pb2.FAILED_PRECONDITION,
    Reason.OOD_REJECTED: code_pb2.FAILED_PRECONDITION,
    Reason.SPOOF_SUSPECTED: code_pb2.FAILED_PRECONDITION,
    Reason.NO_CONTEXT: code_pb2.FAILED_PRECONDITION,
    Reason.LIVENESS_UNDECIDED: code_pb2.FAILED_PRECONDITION,
    Reason.TEMPLATES_LOST: code_pb2.FAILED_PRECONDITION,
    Reason.FACE_OF_ANOTHER: code_pb2.FAILED_PRECONDITION,
    Reason.NO_TEMPLATES: code_pb2.FAILED_PRECONDITION,
    Reason.ETAG_MISMATCH: code_pb2.ABORTED,
    Reason.UNAUTHENTICATED: code_pb2.UNAUTHENTICATED,
    Reason.PERMISSION_DENIED: code_pb2.PERMISSION_DENIED,
    Reason.NAMING_TOO_LOOSE: code_pb2.PERMISSION_DENIED,
    Reason.NAMING_NOT_MEASURED: code_pb2.FAILED_PRECONDITION,
    Reason.HISTORY_LOST: code_pb2.OUT_OF_RANGE,
}

_MOST_CHARS: Final = 1_000
"""Of a text in a status: it travels twice among a call's metadata, of which clients take 8 KiB."""
ABORT_S: Final = 3.0
"""How long a peer may take to read why its call ended."""

assert set(CODES) == set(Reason), "every reason has a status code"

_observers: list[Callable[[Reason], None]] = []


@contextlib.contextmanager
def observed(by: Callable[[Reason], None]) -> Iterator[None]:
    """Tells ``by`` the reason of every call that ends with an error."""
    _observers.append(by)
    try:
        yield
    finally:
        _observers.remove(by)


def status(
    reason: Reason, message: str, metadata: dict[str, str] | None = None, *, retryable: bool = False
) -> status_pb2.Status:
    """The rich status of one error; what is long in it is cut."""
    message = _cut(message)
    told = {name: _cut(value) for name, value in (metadata or {}).items()}
    info = error_details_pb2.ErrorInfo(reason=reason.value, domain=DOMAIN, metadata=told)
    if retryable:
        info.metadata["retryable"] = "true"
    detail = any_pb2.Any()
    detail.Pack(info)
    return status_pb2.Status(code=CODES[reason], message=message, details=[detail])


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARS else text[:_MOST_CHARS] + "…"


async def abort(context: Context, error: FacelaneError) -> NoReturn:
    """Ends the call with the error's status.

    The status travels behind what is still to be written. A peer that does not read that
    either is given up after ``ABORT_S``, with ``CancelledError``; gRPC keeps what it was sent
    until it reads it or is gone.
    """
    for tell in _observers:
        tell(error.reason)
    await _abort(
        context, status(error.reason, error.message, error.metadata, retryable=error.retryable)
    )


async def not_offered(context: Context, error: FacelaneError) -> NoReturn:
    """Ends the call as ``abort``, and as if there were no such method: UNIMPLEMENTED."""
    told = status(error.reason, error.message, error.metadata, retryable=error.retryable)
    told.code = code_pb2.UNIMPLEMENTED
    await _abort(context, told)


async def _abort(context: Context, told: status_pb2.Status) -> NoReturn:
    rich = rpc_status.to_status(told)
    try:
        async with Awake(ABORT_S):
            await context.abort(rich.code, rich.details, rich.trailing_metadata)
    except (TimeoutError, grpc.aio.InternalError) as end:
        # Not read, or the peer is gone: nobody is there to be told.
        log.info("peer not told", status=told.code, cause=type(end).__name__)
        raise asyncio.CancelledError from None
    raise AssertionError("abort raises")
