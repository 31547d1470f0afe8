"""Pictures as clients send them to BGR arrays, with every bound checked before decoding.

The orientation tag of EXIF is ignored: results are in pixels of the picture as it is
stored, so a client that turns pictures upright must do so before sending them. What is
see-through lies on white, 16 bits become 8, grey and CMYK become BGR.
"""

from __future__ import annotations

import sys
from typing import Final

import cv2
import numpy as np

from facelane_server import limits
from facelane_server.domain import Encoding, FacelaneError, Reason
from facelane_server.models.api import U8
from facelane_server.wiping import Fleeting, wipe
from facelane_server.worker.decoding.headers import Header, check_bounds, examine

_FLAGS: Final = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
_SHRUNK: Final = {
    1: _FLAGS,
    2: cv2.IMREAD_REDUCED_COLOR_2 | cv2.IMREAD_IGNORE_ORIENTATION,
    4: cv2.IMREAD_REDUCED_COLOR_4 | cv2.IMREAD_IGNORE_ORIENTATION,
    8: cv2.IMREAD_REDUCED_COLOR_8 | cv2.IMREAD_IGNORE_ORIENTATION,
}
_GREY: Final = 128
"""What libjpeg puts where entropy-coded data ended too early."""
_EOI: Final = b"\xff\xd9"
_IEND: Final = b"\0\0\0\0IEND\xaeB`\x82"
_PIXEL_BYTES: Final = 6
_DECODER_BYTES: Final = 1 << 20
"""What decoding takes at least: so much for every pixel, and so much in any case."""
_NOISE: Final = bytes(254 - 37 * i % 251 for i in range(96))
"""Codes of blocks, of no picture in particular."""


def silence_opencv(threads: int = 1) -> None:
    """Once a worker process: no messages of OpenCV on stderr, ``threads`` of its own."""
    # OpenCV 4 has the function at two places, OpenCV 5 at this one.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    cv2.setNumThreads(threads)


def decode(
    data: memoryview,
    encoding: Encoding,
    *,
    width: int = 0,
    height: int = 0,
    stride: int = 0,
    max_pixels: int = 0,
) -> U8:
    """One picture as ``uint8`` [height, width, 3], BGR, C-contiguous; shrunk as ``read`` says.

    ``width``, ``height`` and ``stride`` (bytes a row; 0 = no padding) describe raw
    pictures and are ignored otherwise. ``max_pixels`` 0 = the hard ceiling of
    ``limits``. The result of a raw BGR picture without padding is a read-only view of
    ``data``; any other is a copy.

    Raises FacelaneError with a PICTURE_*, ENCODING_* or RAW_LAYOUT_INVALID reason, and
    nothing else, whatever the bytes are.
    """
    return read(data, encoding, width, height, stride, max_pixels)[0]


def read(
    data: memoryview,
    encoding: Encoding,
    width: int = 0,
    height: int = 0,
    stride: int = 0,
    max_pixels: int = 0,
) -> tuple[U8, tuple[int, int]]:
    """As ``decode``, with the (width, height) that the picture has as it is stored: a JPEG of
    more than ``max_pixels`` is shrunk by 2, 4 or 8 while it is decoded."""
    if encoding.is_raw:
        return _raw(data, encoding, width, height, stride, max_pixels), (width, height)
    header = examine(data, encoding, max_pixels)
    if encoding is Encoding.JPEG:
        picture = _jpeg(data, header)
    elif encoding is Encoding.PNG:
        # What else it holds (profiles, texts, animations) is none of a decoder's business.
        end = () if header.ends else (_IEND,)
        picture = _read(_joined(data[:8], *(data[a:b] for a, b in header.chunks), *end), header)
    else:
        picture = _read(data if header.ends else _of_its_length(data), header)
    if picture is None:
        enough_memory(header.width * header.height)
        raise FacelaneError(
            Reason.PICTURE_CORRUPT,
            f"the {encoding.value} picture cannot be decoded; send it again whole",
        )
    if picture.shape != (*reversed(header.decoded), 3):
        raise FacelaneError(
            Reason.PICTURE_CORRUPT,
            f"the {encoding.value} picture's data contradict the size in its header",
        )
    return picture, (header.width, header.height)


def _read(data: bytearray | memoryview, header: Header, flags: int = _FLAGS) -> U8 | None:
    """uint8 [height, width, 3], see-through parts on white, as they are looked at."""
    try:
        picture = cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED if header.alpha else flags
        )
    except cv2.error:
        return None
    if picture is None or picture.ndim not in (2, 3):
        return None
    if picture.dtype == np.uint16:
        high = 1 if sys.byteorder == "little" else 0
        picture = np.ascontiguousarray(picture).view(np.uint8)[..., high::2].reshape(picture.shape)
    if picture.dtype != np.uint8:
        return None
    if picture.ndim == 2:
        picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR)
    elif picture.shape[2] == 4:
        picture = _on_white(np.asarray(picture, np.uint8))
    return np.ascontiguousarray(picture, np.uint8)


def enough_memory(pixels: int) -> None:
    """Before a picture is blamed: decoders that find no memory say no more than that it cannot be
    decoded. Raises MemoryError where what they take is not to be had now."""
    bytearray(_PIXEL_BYTES * pixels + _DECODER_BYTES)


def _on_white(picture: U8) -> U8:
    alpha, bgr = cv2.extractChannel(picture, 3), cv2.cvtColor(picture, cv2.COLOR_BGRA2BGR)
    if alpha.min() == 255 or alpha.max() == 0:  # a fourth byte that somebody left empty
        return np.asarray(bgr, np.uint8)
    opaque = alpha.astype(np.float32) / 255
    return np.asarray(cv2.blendLinear(bgr, np.full_like(bgr, 255), opaque, 1 - opaque), np.uint8)


def _jpeg(data: memoryview, header: Header) -> U8 | None:
    """None where it cannot be decoded. Raises FacelaneError(PICTURE_CORRUPT) where a part of
    the picture is missing."""
    end = abs(header.end)
    whole = header.end > 0
    if end and data[end - 1] == 0xFF:  # half an end marker, or fill
        without = Fleeting(data[:end]).rstrip(b"\xff")
        end = len(without)
        wipe(without)
    kept = data[:end]
    flags = _SHRUNK[header.shrink]
    picture = _read(data if whole else _joined(kept, _EOI), header, flags)
    if picture is None:
        return None
    if whole and header.components != 4 and np.not_equal(picture[-1, -1], _GREY).any():
        return picture
    # Is that grey the picture's own, is this the end of the data? A decoder that has all
    # blocks ignores more of them; one that lacks some takes them, and the picture changes.
    # Scaled down to the blocks' means where that is enough: a part of the cost.
    small = whole and header.scans == 1
    flags = _SHRUNK[limits.MAX_SHRINK] if small else flags
    more = _read(_joined(kept, _further(kept), _EOI), header, flags)
    found = _read(data, header, flags) if small else picture
    if found is None or more is None or not np.array_equal(found, more):
        enough_memory(header.width * header.height)
        raise FacelaneError(
            Reason.PICTURE_CORRUPT,
            "the jpeg picture's data end before the picture does; send it again whole",
        )
    return picture


def _joined(data: memoryview, *more: bytes | memoryview) -> Fleeting:
    """A copy of all, one behind the other."""
    made = Fleeting(len(data) + sum(map(len, more)))
    end = len(data)
    made[:end] = data
    for part in more:
        made[end : end + len(part)] = part
        end += len(part)
    return made


def _of_its_length(webp: memoryview) -> Fleeting:
    """A copy that tells the length that it has, which is an even one."""
    padding = bytes(len(webp) % 2)
    length = len(webp) + len(padding) - 8
    return _joined(webp[:4], length.to_bytes(4, "little"), webp[8:], padding)


def _further(data: memoryview) -> bytes:
    """More blocks for a decoder that wants some, and after each restart that it may wait for."""
    scan = Fleeting(data)
    last = max(range(8), key=lambda i: scan.rfind(bytes((0xFF, 0xD0 + i))))
    return _NOISE + b"".join(bytes((0xFF, 0xD0 + (last + i) % 8)) + _NOISE for i in range(1, 9))


def _raw(
    data: memoryview, encoding: Encoding, width: int, height: int, stride: int, max_pixels: int
) -> U8:
    if not len(data):
        raise FacelaneError(Reason.PICTURE_EMPTY, "the picture has no bytes; send its pixels")
    if width <= 0 or height <= 0 or stride < 0:
        raise _layout("width and height must be positive and stride not negative")
    check_bounds(width, height, max_pixels)
    nv12 = encoding is Encoding.NV12
    if nv12 and (width % 2 or height % 2):
        raise _layout("width and height of nv12 must be even")
    row = width if nv12 else 3 * width
    stride = stride or row
    if stride < row:
        raise _layout(f"a row of {encoding.value} has {row} bytes, but stride is {stride}")
    rows = height * 3 // 2 if nv12 else height
    if len(data) != stride * rows:
        raise _layout(
            f"{rows} rows of {stride} bytes are {stride * rows} bytes, but {len(data)} came"
        )
    pixels = np.frombuffer(data, np.uint8).reshape(rows, stride)[:, :row]
    if nv12:
        converted = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_YUV2BGR_NV12)
        return np.asarray(converted, np.uint8)
    pixels = np.ascontiguousarray(pixels).reshape(height, width, 3)
    if encoding is Encoding.RGB24:
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), np.uint8)
    return pixels


def _layout(why: str) -> FacelaneError:
    return FacelaneError(
        Reason.RAW_LAYOUT_INVALID, f"the raw picture's layout is wrong: {why}; correct it"
    )
