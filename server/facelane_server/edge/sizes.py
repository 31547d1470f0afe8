"""What a message may weigh, looked at before it is parsed.

A message that brings no picture is small. Parsed, one of millions of empty entries takes a hundred
times its size, and whoever goes over them holds up everybody.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from facelane.v1 import analysis_service_pb2 as pb
from facelane.v1 import face_pb2 as face_pb
from facelane.v1 import gallery_service_pb2 as gallery_pb
from facelane_server import limits
from facelane_server.bulk import HEAD, refuse_swollen
from facelane_server.domain import Encoding, FacelaneError, Reason

_SERVICES: Final = "/facelane.v1."
STREAM: Final = f"{_SERVICES}AnalysisService/AnalyzeStream"
PICTURES: Final = {
    _SERVICES + method: request.DESCRIPTOR.fields_by_name["picture"].number
    for method, request in (
        ("AnalysisService/AnalyzeImage", pb.AnalyzeImageRequest),
        ("GalleryService/EnrollFace", gallery_pb.EnrollFaceRequest),
        ("GalleryService/VerifyFace", gallery_pb.VerifyFaceRequest),
        ("GalleryService/IdentifyFace", gallery_pb.IdentifyFaceRequest),
    )
}
"""Methods whose requests hold a picture, in this field, and nothing else that repeats."""
_ENCODING: Final = face_pb.Picture.DESCRIPTOR.fields_by_name["encoding"].number
_DATA: Final = face_pb.Picture.DESCRIPTOR.fields_by_name["data"].number
_SWELLS: Final[dict[int, Encoding]] = {
    face_pb.PICTURE_ENCODING_PNG: Encoding.PNG,
    face_pb.PICTURE_ENCODING_WEBP: Encoding.WEBP,
}
_CONFIG: Final = pb.AnalyzeStreamRequest.DESCRIPTOR.fields_by_name["config"].number
_LENGTH_DELIMITED: Final = 2
_LOOKED_AT: Final = 16
_MOST_FIELDS: Final = 4
"""Of a stream's message: it has one."""


def checked(method: str) -> Callable[[bytes], None]:
    """What a method's messages must pass: raises ``FacelaneError(ARGUMENT_INVALID)``."""
    if method in PICTURES:
        return partial(_picture, PICTURES[method])
    return _stream if method == STREAM else _plain


def _picture(field: int, data: bytes) -> None:
    """gRPC has bounded it. A file that is far larger than its picture is refused before it is
    copied out of the message; raises PICTURE_TOO_COSTLY. What is put together otherwise than
    libraries do is looked at when it was parsed."""
    if len(data) <= limits.MAX_PICTURE_EXTRAS:
        return
    try:
        at, end = _fields(data, 0, len(data)).get(field, (0, 0))
        inside = _fields(data, at, end)
    except FacelaneError:
        return  # the parser says what is wrong
    encoding = _SWELLS.get(inside.get(_ENCODING, (0, 0))[0])
    at, end = inside.get(_DATA, (0, 0))
    if encoding is not None:
        refuse_swollen(data[at : min(at + HEAD, end)], encoding, end - at)


def _fields(data: bytes, at: int, end: int) -> dict[int, tuple[int, int]]:
    """Of a message's first fields by number: where the bytes begin and end, or (number, 0)."""
    found: dict[int, tuple[int, int]] = {}
    for _ in range(_LOOKED_AT):
        if at >= end:
            break
        tag, at = _varint(data, at)
        value, after = _varint(data, at)
        if tag & 7 == _LENGTH_DELIMITED:
            found[tag >> 3] = (after, min(after + value, end))
            at = after + value
        elif tag & 7 == 0:
            found[tag >> 3], at = (value, 0), after
        else:
            break  # none of ours
    return found


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
