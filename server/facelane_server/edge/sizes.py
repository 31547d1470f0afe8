"""What a message may weigh, looked at before it is parsed.

A message that brings no picture is small. Parsed, one of millions of empty entries takes a hundred
times its size, and whoever goes over them holds up everybody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from facelane.v1 import analysis_service_pb2 as pb
from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason

_SERVICES: Final = "/facelane.v1."
STREAM: Final = f"{_SERVICES}AnalysisService/AnalyzeStream"
PICTURES: Final = frozenset(
    _SERVICES + method
    for method in (
        "AnalysisService/AnalyzeImage",
        "GalleryService/EnrollFace",
        "GalleryService/VerifyFace",
        "GalleryService/IdentifyFace",
    )
)
"""Methods whose requests hold a picture, and nothing else that repeats."""
_CONFIG: Final = pb.AnalyzeStreamRequest.DESCRIPTOR.fields_by_name["config"].number
_LENGTH_DELIMITED: Final = 2
_MOST_FIELDS: Final = 4
"""Of a stream's message: it has one."""


def checked(method: str) -> Callable[[bytes], None]:
    """What a method's messages must pass: raises ``FacelaneError(ARGUMENT_INVALID)``."""
    if method in PICTURES:
        return _anything
    return _stream if method == STREAM else _plain


def _anything(_data: bytes) -> None:
    """gRPC has bounded it."""


def _plain(data: bytes) -> None:
    if len(data) > limits.MAX_PLAIN_MESSAGE_BYTES:
        raise _too_long(len(data))


def _stream(data: bytes) -> None:
    """A frame may be large, a config may not."""
    if len(data) <= limits.MAX_PLAIN_MESSAGE_BYTES:
        return
    at = 0
    for _ in range(_MOST_FIELDS):
        tag, at = _varint(data, at)
        if tag & 7 != _LENGTH_DELIMITED or tag >> 3 == _CONFIG:
            break
        length, at = _varint(data, at)
        at += length
        if at >= len(data):
            return  # the parser says what is wrong with one that is cut off
    raise _too_long(len(data))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _too_long(len(data))


def _too_long(size: int) -> FacelaneError:
    return FacelaneError(
        Reason.ARGUMENT_INVALID,
        f"the message has {size} bytes; one that is no picture has at most "
        f"{limits.MAX_PLAIN_MESSAGE_BYTES}",
        metadata={"max_bytes": str(limits.MAX_PLAIN_MESSAGE_BYTES)},
    )
