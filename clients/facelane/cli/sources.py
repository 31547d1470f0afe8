"""What ``facelane analyze`` can read: pictures, folders, videos, cameras and URLs.

Stills go to the server as they are where it can read them; others, and JPEG with an EXIF
rotation (which the server does not apply), are decoded and sent as JPEG. Frames of videos
are sent as JPEG.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from facelane.errors import PictureError, Reason
from facelane.types import Picture

PICTURE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jp2"}
)
_OPEN_TIMEOUT: Final = 10.0
_READ_TIMEOUT: Final = 10.0
_QUALITY: Final = 92
_STILL_QUALITY: Final = 95
_EXIF_ORIENTATION: Final = 0x0112


class SourceError(Exception):
    """A source cannot be read; the message says why and holds no credentials."""


@dataclass(frozen=True, slots=True)
class Item:
    """Something to analyse. ``pixels`` is BGR uint8 (height, width, 3) or ``None`` when
    nobody asked for it; ``error`` stands instead of a picture that cannot be read."""

    name: str
    picture: Picture | None
    stream_offset: float | None = None
    capture_time: datetime | None = None
    pixels: Any = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """``live``: frames come at their own pace and are dropped rather than kept waiting.
    ``stills``: pictures that have nothing to do with each other. ``total`` is 0 where
    unknown. Draw ``items`` once; close the source after the last."""

    name: str
    items: Callable[[], Iterator[Item]]
    live: bool = False
    stills: bool = False
    total: int = 0
    fps: float = 25.0
    close: Callable[[], None] = lambda: None


def open_source(text: str, *, realtime: bool = False, want_pixels: bool = False) -> Source:
    """The source that ``text`` names.

    Raises:
        SourceError: there is no such file, or it is of no known kind.
    """
    if text.isdecimal():
        text = f"/dev/video{text}"
    if "://" in text:
        return _video(text, live=True, realtime=False, want_pixels=want_pixels)
    path = Path(text)
    if path.is_char_device():
        return _video(text, live=True, realtime=False, want_pixels=want_pixels)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
        if not found:
            raise SourceError(f"{path} holds no pictures: give a folder of JPEG, PNG or WebP")
        return _pictures(str(path), found, want_pixels)
    if not path.is_file():
        raise SourceError(
            f"{path} does not exist: give a picture, a video, a folder, a camera (0 or "
            "/dev/video0) or a URL"
        )
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return _pictures(str(path), [path], want_pixels)
    return _video(text, live=False, realtime=realtime, want_pixels=want_pixels)


def _pictures(name: str, paths: list[Path], want_pixels: bool) -> Source:
    def items() -> Iterator[Item]:
        for path in paths:
            try:
                picture = load_picture(path)
                pixels = decode(picture.data) if want_pixels else None
            except (OSError, PictureError) as error:
                words = error.message if isinstance(error, PictureError) else str(error)
                yield Item(str(path), None, error=words)
            else:
                yield Item(str(path), picture, pixels=pixels)

    return Source(name, items, stills=True, total=len(paths))


def load_picture(path: str | Path) -> Picture:
    """A still, upright.

    Raises:
        OSError: the file cannot be read.
        PictureError: it is no picture.
    """
    data = Path(path).read_bytes()
    try:
        picture = Picture.encoded(data)
    except PictureError as error:
        if error.reason != Reason.ENCODING_UNSUPPORTED:
            raise
        return _encode(decode(data), _STILL_QUALITY)
    if exif_orientation(data) > 1:
        return _encode(decode(data), _STILL_QUALITY)
    return picture


def decode(data: bytes) -> Any:
    """Pixels as BGR uint8 (height, width, 3), with an EXIF rotation applied.

    Raises:
        PictureError: OpenCV cannot read it (PICTURE_CORRUPT).
    """
    import cv2
    import numpy as np

    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise PictureError(
            Reason.PICTURE_CORRUPT, "not a picture, or damaged: save it again as JPEG or PNG"
        )
    return pixels


def _encode(pixels: Any, quality: int) -> Picture:
    import cv2

    done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise PictureError(Reason.PICTURE_CORRUPT, "the picture cannot be written as JPEG")
    return Picture.encoded(data.tobytes())


def exif_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1-8; 1 (upright) when there is none to be read."""
    position = 2
    while data[:2] == b"\xff\xd8" and position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        size = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA or size < 2:
            break
        body = data[position + 4 : position + 2 + size]
        if marker == 0xE1 and body[:6] == b"Exif\x00\x00":
            return _tiff_orientation(body[6:])
        position += 2 + size
    return 1


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


def without_credentials(url: str) -> str:
    """The URL as it may be shown, whether or not it is a right one."""
    return re.sub(r"(?<=://)[^/?#]*@", "", url)


def _video(text: str, *, live: bool, realtime: bool, want_pixels: bool) -> Source:
    import av

    shown = without_credentials(text)
    options: dict[str, str] = {}
    container_format = None
    if text.startswith(("rtsp:", "rtsps:")):
        options = {"rtsp_transport": "tcp"}
    elif text.startswith("/dev/"):
        container_format = "v4l2"
    try:
        container = av.open(
            text,
            format=container_format,
            options=options,
            timeout=(_OPEN_TIMEOUT, _READ_TIMEOUT),
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        # FFmpeg's own text repeats the URL, credentials included.
        why = getattr(error, "strerror", None) or type(error).__name__
        raise SourceError(f"{shown} cannot be opened: {why}") from None
    if not container.streams.video:
        container.close()
        raise SourceError(f"{shown} has no video")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rate = float(stream.average_rate or 0) or 25.0
    total = 0 if live else int(stream.frames or _estimate(container, rate))

    def items() -> Iterator[Item]:
        pace = _Pace() if realtime else None
        first: float | None = None
        try:
            for number, frame in enumerate(container.decode(stream)):
                moment = frame.time if frame.time is not None else number / rate
                first = moment if first is None else first
                offset = max(0.0, moment - first)
                if pace is not None:
                    pace.wait(offset)
                pixels = frame.to_ndarray(format="bgr24")
                yield Item(
                    shown,
                    _encode(pixels, _QUALITY),
                    stream_offset=None if live else offset,
                    capture_time=datetime.now(UTC) if live else None,
                    pixels=pixels if want_pixels else None,
                )
        except av.FFmpegError as error:
            raise SourceError(f"{shown} broke off: {error.strerror}") from None

    return Source(shown, items, live=live or realtime, total=total, fps=rate, close=container.close)


def _estimate(container: Any, rate: float) -> float:
    return container.duration / 1e6 * rate if container.duration else 0


class _Pace:
    """Holds media time back to the clock's."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def wait(self, offset: float) -> None:
        ahead = self._start + offset - time.monotonic()
        if ahead > 0:
            time.sleep(ahead)
