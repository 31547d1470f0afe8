"""What goes in: pictures, frames, and how their bytes are to be read."""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeAlias

from facelane.errors import PictureError, Reason

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Bytes-like. ``Picture.raw`` takes any object with the buffer protocol, numpy arrays too."""


class Encoding(enum.StrEnum):
    """How the bytes of a picture are to be read."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    BGR24 = "bgr24"
    """Raw, three bytes a pixel, blue first (OpenCV's order)."""
    RGB24 = "rgb24"
    """Raw, three bytes a pixel, red first."""
    NV12 = "nv12"
    """Raw 4:2:0: a Y plane of ``stride * height`` bytes, then the interleaved UV plane."""
    H264 = "h264"
    """Video: one access unit, Annex B. In streams only."""
    H265 = "h265"
    """Video, as ``H264``."""

    @property
    def is_video(self) -> bool:
        """Whether it takes pictures before it to decode one."""
        return self in _VIDEO

    @property
    def is_raw(self) -> bool:
        """Whether the bytes are pixels, so that width and height must be told."""
        return self in _RAW


_RAW = frozenset({Encoding.BGR24, Encoding.RGB24, Encoding.NV12})
_VIDEO = frozenset({Encoding.H264, Encoding.H265})
_START_CODES = (b"\0\0\1", b"\0\0\0\1")

# First bytes of formats that people send by mistake, to name them in the error.
_UNSUPPORTED_MAGIC = (
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"%PDF", "PDF"),
)


def _sniff(data: bytes) -> Encoding:
    if data[:3] == b"\xff\xd8\xff":
        return Encoding.JPEG
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return Encoding.PNG
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return Encoding.WEBP
    found = next((name for magic, name in _UNSUPPORTED_MAGIC if data.startswith(magic)), "")
    if not found and data[4:8] == b"ftyp":
        found = "HEIC, AVIF or MP4"
    raise PictureError(
        Reason.ENCODING_UNSUPPORTED,
        f"the bytes are {found or 'not a picture that is known here'}: send JPEG, PNG or WebP, "
        "or pixels with Picture.raw",
    )


def _encoding(name: Encoding | str) -> Encoding:
    try:
        return Encoding(name)
    except ValueError:
        raise PictureError(
            Reason.ENCODING_UNSUPPORTED, f"encoding {name!r}: give one of {', '.join(Encoding)}"
        ) from None


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture to send. Build it with ``encoded``, ``from_file``, ``raw`` or ``access_unit``.

    EXIF orientation is not applied by the server: rotate before sending.
    ``width``, ``height`` (pixels) and ``stride`` (bytes a row, 0 = packed) are zero unless
    the encoding is raw.
    """

    encoding: Encoding
    data: bytes = field(repr=False)
    width: int = 0
    height: int = 0
    stride: int = 0

    @classmethod
    def encoded(
        cls, data: Buffer, encoding: Encoding | Literal["jpeg", "png", "webp"] | None = None
    ) -> Picture:
        """A compressed picture; its encoding is read from the first bytes unless given.

        Raises:
            PictureError: no bytes (PICTURE_EMPTY), or not JPEG, PNG or WebP
                (ENCODING_UNSUPPORTED).
        """
        chosen = None if encoding is None else _encoding(encoding)
        if not isinstance(data, bytes):
            data = bytes(data)
        if not data:
            raise PictureError(
                Reason.PICTURE_EMPTY, "the picture has no bytes: check what was read"
            )
        if chosen is None:
            chosen = _sniff(data)
        if chosen.is_raw:
            raise PictureError(
                Reason.ENCODING_MISMATCH, f"{chosen} is raw: use Picture.raw with width and height"
            )
        if chosen.is_video:
            raise PictureError(
                Reason.ENCODING_MISMATCH, f"{chosen} is video: use Picture.access_unit in a stream"
            )
        return cls(chosen, data)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Picture:
        """A compressed picture read from a file.

        Raises:
            OSError: the file cannot be read.
            PictureError: as for ``encoded``.
        """
        return cls.encoded(Path(path).read_bytes())

    @classmethod
    def raw(
        cls,
        buffer: object,
        *,
        width: int = 0,
        height: int = 0,
        encoding: Encoding | Literal["bgr24", "rgb24", "nv12"] = Encoding.BGR24,
        stride: int = 0,
    ) -> Picture:
        """Pixels: any object with the buffer protocol, one byte an element.

        A numpy array of shape (height, width, 3), dtype uint8, tells its own size, and a
        view of one (a crop) is packed. For NV12 a 2-D array has shape
        (height * 3 / 2, width). Otherwise give ``width`` and ``height`` in pixels, and
        ``stride`` in bytes where rows are padded.

        Raises:
            PictureError: the buffer's size does not fit the layout (RAW_LAYOUT_INVALID), it
                is empty (PICTURE_EMPTY), or the encoding is none (ENCODING_UNSUPPORTED).
        """
        chosen = _encoding(encoding)
        if not chosen.is_raw:
            made_by = "access_unit" if chosen.is_video else "encoded"
            raise PictureError(
                Reason.ENCODING_MISMATCH, f"{chosen} is compressed: use Picture.{made_by}"
            )
        try:
            view = memoryview(buffer)  # type: ignore[arg-type]
        except TypeError:
            raise PictureError(
                Reason.RAW_LAYOUT_INVALID,
                f"{type(buffer).__name__} has no buffer: give bytes or a uint8 array",
            ) from None
        if view.itemsize != 1:
            raise PictureError(
                Reason.RAW_LAYOUT_INVALID,
                f"elements of {view.itemsize} bytes: convert the pixels to 8 bits first",
            )
        if view.ndim > 1 and view.shape is not None:
            width, height = _shape_of(view.shape, chosen, width, height)
        data = view.tobytes()
        _check_layout(chosen, len(data), width, height, stride)
        return cls(chosen, data, width, height, stride)

    @classmethod
    def access_unit(
        cls, data: Buffer, encoding: Encoding | Literal["h264", "h265"] = Encoding.H264
    ) -> Picture:
        """All of one picture of a video as a camera sends it, with its start codes (Annex B).

        A stream of them has every access unit, in decoding order, and one encoding. Key frames
        bring their parameter sets (SPS, PPS; VPS for H.265) along. The units of MP4 and Matroska
        files have lengths instead of start codes: FFmpeg's bitstream filters
        ``h264_mp4toannexb`` and ``hevc_mp4toannexb`` make them into what is wanted here.

        Raises:
            PictureError: no bytes (PICTURE_EMPTY), no start code in front (PICTURE_CORRUPT), or
                an encoding that is no video (ENCODING_MISMATCH, ENCODING_UNSUPPORTED).
        """
        chosen = _encoding(encoding)
        if not chosen.is_video:
            raise PictureError(Reason.ENCODING_MISMATCH, f"{chosen} is no video: give h264 or h265")
        if not isinstance(data, bytes):
            data = bytes(data)
        if not data:
            raise PictureError(
                Reason.PICTURE_EMPTY, "the access unit has no bytes: check what was read"
            )
        if not data.startswith(_START_CODES):
            raise PictureError(
                Reason.PICTURE_CORRUPT,
                "the access unit begins with no start code: send Annex B; from MP4 or Matroska "
                "use the bitstream filter h264_mp4toannexb or hevc_mp4toannexb",
            )
        return cls(chosen, data)


def _shape_of(shape: Sequence[int], encoding: Encoding, width: int, height: int) -> tuple[int, int]:
    """Width and height of an array; those that were also given must agree."""
    if encoding is Encoding.NV12:
        fits = len(shape) == 2 and shape[0] % 3 == 0
        found = (shape[-1], shape[0] * 2 // 3)
    else:
        fits = len(shape) == 3 and shape[2] == 3
        found = (shape[1], shape[0])
    if not fits:
        wanted = "(height * 3 / 2, width)" if encoding is Encoding.NV12 else "(height, width, 3)"
        raise PictureError(
            Reason.RAW_LAYOUT_INVALID,
            f"an array of shape {tuple(shape)}: {encoding} needs {wanted}",
        )
    if (width and width != found[0]) or (height and height != found[1]):
        raise PictureError(
            Reason.RAW_LAYOUT_INVALID,
            f"the array is {found[0]}x{found[1]}, but {width}x{height} was given: leave both out",
        )
    return found


def _check_layout(encoding: Encoding, size: int, width: int, height: int, stride: int) -> None:
    if not size:
        raise PictureError(Reason.PICTURE_EMPTY, "the buffer is empty: check what was read")
    if width <= 0 or height <= 0 or stride < 0:
        raise PictureError(
            Reason.RAW_LAYOUT_INVALID,
            f"{width}x{height}, stride {stride}: raw pixels need a positive width and height",
        )
    nv12 = encoding is Encoding.NV12
    if nv12 and (width % 2 or height % 2):
        raise PictureError(
            Reason.RAW_LAYOUT_INVALID, f"{width}x{height}: NV12 needs an even width and height"
        )
    row = width if nv12 else width * 3
    pitch = stride or row
    rows = height * 3 // 2 if nv12 else height
    if pitch < row or size != pitch * rows:
        raise PictureError(
            Reason.RAW_LAYOUT_INVALID,
            f"{size} bytes for {width}x{height} {encoding} with stride {stride}: "
            f"{max(pitch, row) * rows} are needed; check the size, the encoding and the stride",
        )


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture of a stream, for ``Client.analyze``.

    ``stream_offset`` is media time since the start of the stream in seconds and must not
    decrease; ``None`` takes the time since the stream was opened.
    """

    picture: Picture
    stream_offset: float | None = None
    capture_time: datetime | None = None
