"""Sizes of compressed pictures, read from their headers before anything is decoded.

A decoder allocates what a header claims, so the claim is checked first, by code that
allocates nothing. The same walk finds files that were cut off, which decoders like to
repair with grey. Bytes after a picture's end are legal and ignored.

Pure functions over untrusted bytes: they raise FacelaneError and nothing else.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import Final, NoReturn

from facelane_server import limits
from facelane_server.domain import Encoding, FacelaneError, Reason

_PNG_MAGIC: Final = b"\x89PNG\r\n\x1a\n"
_JPEG_MAGIC: Final = b"\xff\xd8\xff"

# In entropy-coded data FF is followed by 00 (a stuffed byte), D0..D7 (a restart) or FF
# (fill); anything else is the next marker.
_NEXT_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

_SOF: Final = frozenset({0xC0, 0xC1, 0xC2})
_SOF_UNSUPPORTED: Final = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_SOS, _EOI, _DQT = 0xDA, 0xD9, 0xDB
_SOF0, _APP14 = 0xC0, 0xEE
_STANDALONE: Final = frozenset({0x01, *range(0xD0, 0xD8)})


def picture_size(data: memoryview, encoding: Encoding) -> tuple[int, int]:
    """(width, height) of a JPEG, PNG or WebP.

    Raises FacelaneError: PICTURE_EMPTY, ENCODING_MISMATCH (the bytes are of another
    format), ENCODING_UNSUPPORTED (a rare variant of the format), PICTURE_CORRUPT.
    """
    if not len(data):
        raise FacelaneError(
            Reason.PICTURE_EMPTY, "the picture has no bytes; send an encoded picture"
        )
    actual = sniff(data)
    if actual is not encoding:
        found = f"look like {actual.value}" if actual else "are of no known format"
        raise FacelaneError(
            Reason.ENCODING_MISMATCH,
            f"the encoding says {encoding.value}, but the bytes {found}; send the right encoding",
        )
    try:
        if encoding is Encoding.JPEG:
            return _jpeg(data)
        if encoding is Encoding.PNG:
            return _png(data)
        return _webp(data)
    except (struct.error, IndexError):
        _corrupt(encoding, "it ends inside its header")


def plain_jpeg(data: memoryview) -> bool:
    """Whether a JPEG that ``picture_size`` accepts is of the kind that every decoder takes:
    baseline, three components, no colour transform of Adobe's."""
    at = 2
    plain = False
    try:
        while True:
            while data[at] == 0xFF:
                at += 1
            marker = data[at]
            at += 1
            if marker in _STANDALONE:
                continue
            if marker in (_SOS, _EOI):
                return plain
            (length,) = struct.unpack_from(">H", data, at)
            if marker == _APP14 or (marker in _SOF and marker != _SOF0):
                return False
            if marker == _SOF0:
                plain = data[at + 7] == 3
            at += length
    except (struct.error, IndexError):
        return False


def sniff(data: memoryview) -> Encoding | None:
    """The compressed format that the first bytes belong to."""
    head = bytes(data[:12])
    if head.startswith(_JPEG_MAGIC):
        return Encoding.JPEG
    if head.startswith(_PNG_MAGIC):
        return Encoding.PNG
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return Encoding.WEBP
    return None


def check_bounds(width: int, height: int, max_pixels: int) -> None:
    """Refuse sizes that hold no face or are too large to decode.

    Raises FacelaneError: PICTURE_TOO_SMALL or PICTURE_TOO_LARGE.
    """
    size = {"width": str(width), "height": str(height)}
    if width < limits.MIN_SIDE or height < limits.MIN_SIDE:
        raise FacelaneError(
            Reason.PICTURE_TOO_SMALL,
            f"the picture is {width}x{height}, but each side must be at least "
            f"{limits.MIN_SIDE} pixels",
            metadata=size,
        )
    ceiling = min(max_pixels or limits.MAX_PIXELS, limits.MAX_PIXELS)
    if width > limits.MAX_SIDE or height > limits.MAX_SIDE or width * height > ceiling:
        raise FacelaneError(
            Reason.PICTURE_TOO_LARGE,
            f"the picture is {width}x{height}, but at most {ceiling} pixels and "
            f"{limits.MAX_SIDE} a side are decoded; scale it down",
            metadata={**size, "max_pixels": str(ceiling)},
        )


def _corrupt(encoding: Encoding, why: str) -> NoReturn:
    raise FacelaneError(
        Reason.PICTURE_CORRUPT,
        f"the {encoding.value} picture is damaged: {why}; send it again whole",
    )


def _unsupported(encoding: Encoding, what: str) -> NoReturn:
    raise FacelaneError(
        Reason.ENCODING_UNSUPPORTED,
        f"{what} {encoding.value} pictures are not supported; send a plain one",
    )


def _jpeg(data: memoryview) -> tuple[int, int]:
    size: tuple[int, int] | None = None
    blocks = 0
    entropy = 0
    at = 2
    for _ in range(limits.MAX_PICTURE_SEGMENTS):
        if data[at] != 0xFF:
            _corrupt(Encoding.JPEG, "a marker is missing")
        while data[at] == 0xFF:  # fill bytes may precede a marker
            at += 1
        marker = data[at]
        at += 1
        if marker == _EOI:
            if size is None or not entropy:
                _corrupt(Encoding.JPEG, "it holds no picture")
            # The shortest code of a block has two bits, of a progressive scan's one.
            if entropy * 8 < blocks:
                _corrupt(Encoding.JPEG, "it holds less data than its size needs")
            return size
        if marker in _STANDALONE:
            continue
        (length,) = struct.unpack_from(">H", data, at)
        if length < 2 or at + length > len(data):
            _corrupt(Encoding.JPEG, "a segment is cut off")
        if marker in _SOF_UNSUPPORTED:
            _unsupported(Encoding.JPEG, "lossless, hierarchical or arithmetic-coded")
        if marker in _SOF:
            if size is not None:
                _corrupt(Encoding.JPEG, "it has two frame headers")
            depth, height, width, components = struct.unpack_from(">BHHB", data, at + 2)
            if depth != 8:
                _unsupported(Encoding.JPEG, f"{depth}-bit")
            if components not in (1, 3, 4) or length != 8 + 3 * components:
                _corrupt(Encoding.JPEG, "its frame header contradicts itself")
            size = (width, height)
            blocks = -(-width // 8) * -(-height // 8)
        at += length
        if marker == _SOS:
            if size is None:
                _corrupt(Encoding.JPEG, "its data come before its size")
            found = _NEXT_MARKER.search(data, at)
            if found is None:
                _corrupt(Encoding.JPEG, "it is cut off")
            entropy += found.start() - at
            at = found.start()
    _corrupt(Encoding.JPEG, "it has too many segments")


def _png(data: memoryview) -> tuple[int, int]:
    size: tuple[int, int] | None = None
    pixels = False
    at = len(_PNG_MAGIC)
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        body = at + 8
        end = body + length
        (crc,) = struct.unpack_from(">I", data, end)
        if kind in (b"IHDR", b"IDAT", b"PLTE") and zlib.crc32(data[at + 4 : end]) != crc:
            _corrupt(Encoding.PNG, "a checksum is wrong")
        if (kind == b"IHDR") is not (size is None):
            _corrupt(Encoding.PNG, "its header is missing or repeated")
        if kind == b"IHDR":
            if length != 13:
                _corrupt(Encoding.PNG, "its header has a wrong length")
            size = struct.unpack_from(">II", data, body)
        pixels = pixels or (kind == b"IDAT" and length > 0)
        if kind == b"IEND":
            if size is None or not pixels:
                _corrupt(Encoding.PNG, "it holds no picture")
            return size
        at = end + 4


def _webp(data: memoryview) -> tuple[int, int]:
    (riff,) = struct.unpack_from("<I", data, 4)
    if riff + 8 > len(data):
        _corrupt(Encoding.WEBP, "it is cut off")
    kind, length = struct.unpack_from("<4sI", data, 12)
    if length + 20 > len(data):
        _corrupt(Encoding.WEBP, "a chunk is cut off")
    if kind == b"VP8 ":
        tag, width, height = struct.unpack_from("<3s3xHH", data, 20)
        if tag[0] & 1 or bytes(data[23:26]) != b"\x9d\x01\x2a":
            _corrupt(Encoding.WEBP, "it does not begin with a key frame")
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        signature, bits = struct.unpack_from("<BI", data, 20)
        if signature != 0x2F:
            _corrupt(Encoding.WEBP, "its lossless signature is wrong")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        flags, width, height = struct.unpack("<B3x3s3s", data[20:30])
        if flags & 0x02:
            _unsupported(Encoding.WEBP, "animated")
        return int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
    _corrupt(Encoding.WEBP, "its first chunk is unknown")
