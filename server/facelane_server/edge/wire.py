"""Messages as they come, looked into before they are parsed; and a stream's, parsed around its
picture, which protobuf would copy twice.

What is left out is a matter of lengths alone (the wire format: protobuf.dev, "Encoding"). Wherever
a message is not of the one shape that clients send, protobuf parses all of it as ever.
"""

from __future__ import annotations

from typing import Final

import msgspec
from google.protobuf.descriptor import Descriptor

from facelane.v1 import analysis_service_pb2 as pb
from facelane.v1 import face_pb2

LEAST_BYTES: Final = 32_768
"""Smaller pictures are copied in less time than is looked around them."""
_PLAIN: Final = frozenset(
    face_pb2.PictureEncoding.Value(f"PICTURE_ENCODING_{name}")
    for name in ("JPEG", "BGR24", "RGB24", "NV12")
)
"""Encodings of which nothing but a worker looks at the bytes."""
_MOST_FIELDS: Final = 16
VARINT, DELIMITED = 0, 2
"""Kinds of fields; the others, of eight and four bytes, are none of ours."""


def _number(of: Descriptor, name: str) -> int:
    return of.fields_by_name[name].number


_FRAME: Final = _number(pb.AnalyzeStreamRequest.DESCRIPTOR, "frame")
_PICTURE: Final = _number(pb.Frame.DESCRIPTOR, "picture")
_DATA: Final = _number(face_pb2.Picture.DESCRIPTOR, "data")


class StreamMessage(msgspec.Struct, frozen=True, gc=False):
    """``data``: the frame's picture, if the message is a frame; a view of what came in where the
    picture is large, and then left out of ``message``."""

    message: pb.AnalyzeStreamRequest
    data: bytes | memoryview = b""


def parse(data: bytes) -> StreamMessage:
    """Raises ``google.protobuf.message.DecodeError``."""
    if len(data) >= LEAST_BYTES:
        around = _around_picture(data)
        if around is not None:
            rest, picture = around
            message = pb.AnalyzeStreamRequest.FromString(rest)
            if message.frame.picture.encoding in _PLAIN:
                return StreamMessage(message, picture)
    message = pb.AnalyzeStreamRequest.FromString(data)
    return StreamMessage(message, message.frame.picture.data)


def _around_picture(data: bytes) -> tuple[bytes, memoryview] | None:
    """(the message without the bytes of its picture, these); None where it is of another shape."""
    frame = find(data, 0, len(data), _FRAME)
    if frame is None or frame[0] != 0 or frame[2] != len(data):
        return None
    picture = find(data, frame[1], frame[2], _PICTURE)
    if picture is None:
        return None
    body = find(data, picture[1], picture[2], _DATA)
    if body is None:
        return None
    # Where it stood among the others makes no difference to a field that is there once.
    rest = _field(_PICTURE, data[picture[1] : body[0]] + data[body[2] : picture[2]])
    whole = _field(_FRAME, data[frame[1] : picture[0]] + data[picture[2] : frame[2]] + rest)
    return whole, memoryview(data)[body[1] : body[2]]


def find(
    data: bytes, at: int, end: int, number: int, kind: int = DELIMITED
) -> tuple[int, int, int] | None:
    """Of the field with this number and kind among those from ``at`` to ``end``: where its tag
    begins, and its content from where to where. None unless it is there once, and everything well
    formed."""
    found = None
    for _ in range(_MOST_FIELDS):
        if at == end:
            return found
        begin = at
        tag = data[at]
        if tag < 0x80:  # nearly every one, and many lengths
            at += 1
        else:
            tag, at = varint(data, at, end)
        after = at
        match tag & 7:
            case 2:  # DELIMITED
                if at < end and (length := data[at]) < 0x80:
                    at += 1
                else:
                    length, at = varint(data, at, end)
                after = at + length
            case 0:  # VARINT
                _, after = varint(data, at, end)
            case 1:
                after += 8
            case 5:
                after += 4
            case _:
                return None
        if after > end:
            return None
        if tag == number << 3 | kind:
            if found is not None:
                return None
            found = begin, at, after
        at = after
    return None


def varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """(value, what comes behind); behind ``end`` where it is cut off or too long."""
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    return 0, end + 1


def _field(number: int, content: bytes) -> bytes:
    head, size = bytearray([number << 3 | DELIMITED]), len(content)
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head) + content
