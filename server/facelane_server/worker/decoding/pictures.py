"""Pictures as clients send them to BGR arrays, with every bound checked before decoding.

The orientation tag of EXIF is ignored: results are in pixels of the picture as it is
stored, so a client that turns pictures upright must do so before sending them. An
alpha channel is dropped, 16 bits become 8, and grey becomes BGR.
"""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from facelane_server.domain import Encoding, FacelaneError, Reason
from facelane_server.models.api import U8
from facelane_server.worker.decoding.headers import check_bounds, picture_size

_FLAGS: Final = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
_GREY: Final = 128
"""What libjpeg puts where entropy-coded data ended too early."""
_BLOCK: Final = 16
"""The largest block that JPEG codes at a time."""


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
    """One picture as ``uint8`` [height, width, 3], BGR, C-contiguous.

    ``width``, ``height`` and ``stride`` (bytes a row; 0 = no padding) describe raw
    pictures and are ignored otherwise. ``max_pixels`` 0 = the hard ceiling of
    ``limits``. The result of a raw BGR picture without padding is a read-only view of
    ``data``; any other is a copy.

    Raises FacelaneError with a PICTURE_*, ENCODING_* or RAW_LAYOUT_INVALID reason, and
    nothing else, whatever the bytes are.
    """
    if encoding.is_raw:
        return _raw(data, encoding, width, height, stride, max_pixels)
    size = picture_size(data, encoding)
    check_bounds(*size, max_pixels)
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), _FLAGS)
    except cv2.error:
        picture = None
    if picture is None or picture.dtype != np.uint8 or picture.ndim != 3:
        raise FacelaneError(
            Reason.PICTURE_CORRUPT,
            f"the {encoding.value} picture cannot be decoded; send it again whole",
        )
    if picture.shape != (size[1], size[0], 3):
        raise FacelaneError(
            Reason.PICTURE_CORRUPT,
            f"the {encoding.value} picture's data contradict the size in its header",
        )
    pixels = np.ascontiguousarray(picture, np.uint8)
    if encoding is Encoding.JPEG and _ends_in_filler(pixels):
        raise FacelaneError(
            Reason.PICTURE_CORRUPT,
            "the jpeg picture's data end before the picture does; send it again whole",
        )
    return pixels


def _ends_in_filler(picture: U8) -> bool:
    """Whether the picture's last blocks are the decoder's filler for missing data.

    Filler begins somewhere in a row of blocks and goes on to the picture's very end,
    while the row before is real all along. A picture with grey of its own, a face on a
    grey canvas say, has grey in that row too, and passes.
    """
    if not (picture[-8:, -8:] == _GREY).all():
        return False
    height, width = picture.shape[:2]
    edges = range(0, width, _BLOCK)
    previous: npt.NDArray[np.bool_] | None = None
    # Upwards from the last row of blocks to the last that is not wholly filler.
    for top in range((height - 1) // _BLOCK * _BLOCK, -1, -_BLOCK):
        grey = (picture[top : top + _BLOCK] == _GREY).all(axis=(0, 2))
        blocks = np.logical_and.reduceat(grey, edges)
        if previous is not None:
            return not blocks.any() and not _returns(previous)
        if not blocks.all():
            if not blocks.any():
                return True  # filler from the start of the row below
            previous = blocks
    return False


def _returns(blocks: npt.NDArray[np.bool_]) -> bool:
    """Whether real blocks follow grey ones in a row."""
    return bool((blocks[:-1] & ~blocks[1:]).any())


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
