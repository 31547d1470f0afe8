"""Whether a picture's file is far larger than its pixels could need, told from its first bytes.

A walk over millions of chunks, or of a profile of megabytes, is left undone so: such a file is
refused where it comes in, before it is copied to anybody. Pure; formats whose size stands
elsewhere, and headers that say nothing, are for whoever decodes.
"""

from __future__ import annotations

import struct
from typing import Final

from facelane_server import limits
from facelane_server.domain import Encoding, FacelaneError, Reason

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_PNG_PIXEL: Final = 8
"""Bytes of the largest: four channels of 16 bits, not compressed."""
_WEBP_PIXEL: Final = 5
_ROW: Final = 32
"""More for each row: filters, of all passes."""


HEAD: Final = 64
"""Bytes of a file that say all that is looked at."""


def refuse_swollen(data: bytes | memoryview, encoding: Encoding, length: int | None = None) -> None:
    """``data``: a file, or its head, of a file of ``length`` bytes. Raises PICTURE_TOO_COSTLY."""
    length = len(data) if length is None else length
    if length <= limits.MAX_PICTURE_EXTRAS or len(data) < HEAD:
        return
    size, pixel, head = None, 0, bytes(data[:HEAD])
    if encoding is Encoding.PNG:
        size, pixel = _png(head), _PNG_PIXEL
    elif encoding is Encoding.WEBP:
        size, pixel = _webp(head), _WEBP_PIXEL
    if size is None:
        return
    width, height = size
    if length > limits.MAX_PICTURE_EXTRAS + height * (pixel * width + _ROW):
        raise FacelaneError(
            Reason.PICTURE_TOO_COSTLY,
            f"the {encoding.value} picture would take too much work: a file of {length} bytes "
            f"for {width}x{height} pixels; save it again as a plain one",
        )


def _png(data: bytes) -> tuple[int, int] | None:
    if not data.startswith(_PNG) or data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _webp(data: bytes) -> tuple[int, int] | None:
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    match data[12:16]:
        case b"VP8X":
            w, h = data[24:27], data[27:30]
            return int.from_bytes(w, "little") + 1, int.from_bytes(h, "little") + 1
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
    return None
