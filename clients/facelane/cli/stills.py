"""Stills: which files of a folder are pictures, and pictures as the server takes them.

They go to the server as they are where it can read them; others, those that lie on their
side, and those that are larger than a server takes, are decoded, turned upright, scaled down
and sent as JPEG.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from facelane.cli.streams import shown
from facelane.errors import PictureError, Reason
from facelane.types import Encoding, Picture

PICTURE_SUFFIXES: Final = frozenset(
    (
        ".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".dib", ".tif",
        ".tiff", ".jp2", ".pbm", ".pgm", ".ppm", ".heic", ".heif", ".hif", ".avif",
    )
)  # fmt: skip
"""Names of pictures; what else is one is told by its first bytes."""
_FOLDER_SUFFIXES: Final = PICTURE_SUFFIXES | {".gif"}
_RAW_SUFFIXES: Final = frozenset(
    (".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw")
)
_RAW: Final = "a camera's raw file: save it as JPEG"
"""Most of them are TIFF files by their first bytes, and what can be read of them is a preview as
small as a stamp."""
_MAGIC: Final = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\x00", b"MM\x00*",
    b"\x00\x00\x00\x0cjP  ",
)  # fmt: skip
_STILL_BRANDS: Final = (b"heic", b"heix", b"heif", b"mif1", b"avif")
_STILL_QUALITY: Final = 95
_SENT_PIXELS: Final = 16_000_000
_SENT_BYTES: Final = 16 << 20
"""What a server takes by default: larger ones are scaled down, which costs no face that a
recogniser could use."""
_READ_BYTES: Final = 1 << 30
"""A larger file is not even read."""
_EXIF_ORIENTATION: Final = 0x0112


# Which files are pictures.


def is_picture(path: Path) -> bool:
    """By its name, or by its first bytes; an animation alone is a video."""
    return path.suffix.lower() in PICTURE_SUFFIXES | _RAW_SUFFIXES or (
        path.suffix.lower() != ".gif" and _looks_like_one(path)
    )


def _looks_like_one(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(16)
    if head[4:8] == b"ftyp":
        return head[8:12] in _STILL_BRANDS
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


@dataclass(frozen=True, slots=True)
class Folder:
    """What lies in a folder: pictures by name, and the names of all else, with the reason."""

    pictures: list[Path]
    passed_over: list[tuple[str, str]]


def look_through(folder: Path) -> Folder:
    """Sorts what lies in a folder. Opens regular files alone: a pipe would never end.

    Raises:
        OSError: the folder cannot be read.
    """
    found = Folder([], [])
    for path in sorted(folder.iterdir()):
        why = _why_not(path)
        if why:
            found.passed_over.append((shown(path.name), why))
        else:
            found.pictures.append(path)
    return found


def _why_not(path: Path) -> str:
    try:
        if path.is_dir():
            return "a folder: give it by itself"
        if path.name.startswith("."):
            return "hidden"
        if not path.exists():
            return "a link that leads nowhere"
        if not path.is_file():
            return "no regular file"
        if path.suffix.lower() in _RAW_SUFFIXES:
            return _RAW
        if path.suffix.lower() in _FOLDER_SUFFIXES or _looks_like_one(path):
            return ""
    except OSError as error:
        return error.strerror or type(error).__name__
    return "no picture"


# Reading.


def load_picture(path: str | Path) -> Picture:
    """A still, upright, of a size that a server takes; one that was scaled down is told of on
    stderr.

    Raises:
        OSError: the file cannot be read.
        PictureError: it is no picture, or one that is far too large.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{shown(path)} is no file")
    if path.suffix.lower() in _RAW_SUFFIXES:
        raise PictureError(Reason.ENCODING_UNSUPPORTED, _RAW)
    with path.open("rb") as file:
        data = file.read(_READ_BYTES + 1)
    if len(data) > _READ_BYTES:
        raise _too_large()
    try:
        picture = Picture.encoded(data)
    except PictureError as error:
        if error.reason != Reason.ENCODING_UNSUPPORTED:
            raise
        return _sent(path, decode(data))
    width, height = dimensions(data)
    if width * height > _SENT_PIXELS or len(data) > _SENT_BYTES:
        # Half the size is made while decoding, for a quarter of the memory.
        return _sent(path, decode(data, half=width * height > 2 * _SENT_PIXELS), width, height)
    if exif_orientation(data) > 1 or _is_animated(data):
        return encode(decode(data), _STILL_QUALITY)
    return picture


def _is_animated(data: bytes) -> bool:
    """A WebP of several pictures, which servers do not take: its first one is sent."""
    return data[8:16] == b"WEBPVP8X" and bool(data[20:21] and data[20] & 0x02)


def _sent(path: Path, pixels: Any, width: int = 0, height: int = 0) -> Picture:
    """``width`` and ``height``: what the file has, where it is known."""
    import cv2

    from facelane.cli import output

    rows, columns = pixels.shape[:2]
    before = f"{width or columns}x{height or rows}"
    scale = (_SENT_PIXELS / (rows * columns)) ** 0.5
    if scale < 1:
        size = (int(columns * scale), int(rows * scale))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    rows, columns = pixels.shape[:2]
    if scale < 1 or width:
        output.consoles()[1].print(
            f"facelane: {shown(path)}: {before} is more than a server takes; sent as "
            f"{columns}x{rows}"
        )
    return encode(pixels, _STILL_QUALITY)


def dimensions(data: bytes) -> tuple[int, int]:
    """(width, height) of a JPEG, PNG or WebP as stored; zeros where they cannot be read."""
    if data.startswith(b"\x89PNG"):
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data[8:16] == b"WEBPVP8X":
        return (
            int.from_bytes(data[24:27], "little") + 1,
            int.from_bytes(data[27:30], "little") + 1,
        )
    if data[8:16] == b"WEBPVP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if data[8:16] == b"WEBPVP8 ":
        sides = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        return next(sides), next(sides)
    frame = re.search(rb"\xff[\xc0-\xc2]\x00.\x08(....)[\x01\x03\x04]", _segments(data), re.DOTALL)
    if frame is None:
        return 0, 0
    return int.from_bytes(frame[1][2:], "big"), int.from_bytes(frame[1][:2], "big")


def _segments(jpeg: bytes) -> bytes:
    """The heads of a JPEG's segments before its data: previews in them are passed over."""
    at, heads = 2, list[bytes]()
    while jpeg[:2] == b"\xff\xd8" and at + 4 <= len(jpeg) and len(heads) < 4096:
        if jpeg[at] != 0xFF:
            at = jpeg.find(b"\xff", at)
            if at < 0:
                break
            continue
        if jpeg[at + 1] in (0x00, 0xFF):
            at += 1
            continue
        heads.append(jpeg[at : at + 10])
        if jpeg[at + 1] == 0xDA:
            break
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return b"".join(heads)


def decode(data: bytes, *, half: bool = False) -> Any:
    """Pixels as BGR uint8 (height, width, 3), upright. ``half``: scaled down while decoding.

    Raises:
        PictureError: nobody here can read it (PICTURE_CORRUPT, ENCODING_UNSUPPORTED), or it has
            too many pixels (PICTURE_TOO_LARGE).
    """
    import cv2
    import numpy as np

    # OpenCV reads some of these, and leaves them lying on their side.
    if data[4:8] == b"ftyp":
        return _decode_by_ffmpeg(data)
    flags = cv2.IMREAD_REDUCED_COLOR_2 if half else cv2.IMREAD_COLOR
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except (cv2.error, MemoryError):
        # What its header promises: there is no need for as much data.
        raise _too_large() from None
    return _decode_by_ffmpeg(data) if pixels is None else pixels


def _too_large() -> PictureError:
    return PictureError(
        Reason.PICTURE_TOO_LARGE,
        "the picture is larger than can be read here: scale it down",
    )


def _decode_by_ffmpeg(data: bytes) -> Any:
    import av

    if data[8:12] in _STILL_BRANDS and b"grid" in data[: 1 << 16]:
        # FFmpeg gives the tiles one by one: a corner would be taken for the picture.
        raise PictureError(
            Reason.ENCODING_UNSUPPORTED,
            "a picture made of tiles, as telephones write HEIC: save it as JPEG",
        )
    try:
        with av.open(io.BytesIO(data), "r") as container:
            frame = next(container.decode(video=0))
            return upright(frame.to_ndarray(format="bgr24"), frame.rotation)
    except (av.FFmpegError, OSError, ValueError, IndexError, StopIteration):
        raise PictureError(
            Reason.PICTURE_CORRUPT, "not a picture, or damaged: save it again as JPEG or PNG"
        ) from None


def upright(pixels: Any, rotation: int) -> Any:
    """Pixels turned by FFmpeg's ``rotation``, degrees against the clock."""
    import numpy as np

    quarters = round(rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


def encode(pixels: Any, quality: int) -> Picture:
    """BGR pixels as JPEG."""
    import cv2

    done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise PictureError(Reason.PICTURE_CORRUPT, "the picture cannot be written as JPEG")
    return Picture(Encoding.JPEG, data.tobytes())


# Orientation.


def exif_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, PNG or WebP, 1-8; 1 (upright) when there is none to be
    read."""
    walk: Callable[[bytes], bytes] | None = None
    if data[:2] == b"\xff\xd8":
        walk = _exif_of_jpeg
    elif data[:4] == b"\x89PNG":
        walk = _exif_of_png
    elif data[:4] == b"RIFF":
        walk = _exif_of_webp
    return 1 if walk is None else _tiff_orientation(walk(data).removeprefix(b"Exif\x00\x00"))


def _exif_of_jpeg(data: bytes) -> bytes:
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill
            position += 1
            continue
        size = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA or size < 2:
            break
        body = data[position + 4 : position + 2 + size]
        if marker == 0xE1 and body[:6] == b"Exif\x00\x00":
            return body
        position += 2 + size
    return b""


def _exif_of_png(data: bytes) -> bytes:
    position = 8
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"eXIf":
            return data[position + 8 : position + 8 + size]
        position += 12 + size
    return b""


def _exif_of_webp(data: bytes) -> bytes:
    position = 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"EXIF":
            return data[position + 8 : position + 8 + size]
        position += 8 + size + size % 2
    return b""


def _tiff_orientation(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return 1
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for index in range(count):
            tag, _kind, _count, value = struct.unpack_from(
                f"{order}HHIH", tiff, start + 2 + 12 * index
            )
            if tag == _EXIF_ORIENTATION:
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        # Cut off or nonsense: cameras write such; the picture itself may still be good.
        return 1
    return 1
