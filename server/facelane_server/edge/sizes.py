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
from facelane_server.edge import wire

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
_MOST_FIELDS: Final = 4
"""Of a stream's message: it has one."""


def checked(method: str) -> Callable[[bytes], None]:
    """What a method's messages must pass: raises ``FacelaneError(ARGUMENT_INVALID)``."""
    if method in PICTURES:
        return partial(_picture, PICTURES[method])
    if method == STREAM:
        return _stream
    ours = method.startswith(_SERVICES)
    return partial(_plain, limits.MAX_PLAIN_MESSAGE_BYTES if ours else limits.MAX_NAME_BYTES)


def _picture(field: int, data: bytes) -> None:
    """gRPC has bounded it. A file that is far larger than its picture is refused before it is
    copied out of the message; raises PICTURE_TOO_COSTLY. What is put together otherwise than
    libraries do is looked at when it was parsed."""
    if len(data) <= limits.MAX_PICTURE_EXTRAS:
        return
    picture = wire.find(data, 0, len(data), field)
    if picture is None:
        return
    encoding = wire.find(data, *picture[1:], _ENCODING, wire.VARINT)
    body = wire.find(data, *picture[1:], _DATA)
    if encoding is None or body is None:
        return
    named = _SWELLS.get(wire.varint(data, *encoding[1:])[0])
    _, at, end = body
    if named is not None:
        refuse_swollen(data[at : min(at + HEAD, end)], named, end - at)


def _plain(most: int, data: bytes) -> None:
    if len(data) > most:
        raise _too_long(len(data), most)


def _stream(data: bytes) -> None:
    """A frame may be large, a config may not."""
    if len(data) <= limits.MAX_PLAIN_MESSAGE_BYTES:
        return
    at = 0
    for _ in range(_MOST_FIELDS):
        tag, at = wire.varint(data, at, len(data))
        if at > len(data) or tag & 7 != wire.DELIMITED or tag >> 3 == _CONFIG:
            break
        length, at = wire.varint(data, at, len(data))
        if at > len(data):
            break
        at += length
        if at >= len(data):
            return  # the parser says what is wrong with one that is cut off
    raise _too_long(len(data), limits.MAX_PLAIN_MESSAGE_BYTES)


def _too_long(size: int, most: int) -> FacelaneError:
    return FacelaneError(
        Reason.ARGUMENT_INVALID,
        f"the message has {size} bytes; one of this method that is no picture has at most {most}",
        metadata={"max_bytes": str(most)},
    )
