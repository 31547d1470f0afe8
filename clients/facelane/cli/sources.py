"""What ``facelane analyze`` can read: pictures, folders, videos, cameras and URLs.

Frames of videos are sent as JPEG; for stills see ``stills``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from facelane.cli.stills import decode, encode, is_picture, load_picture, look_through, upright
from facelane.cli.streams import shown
from facelane.errors import PictureError
from facelane.types import Picture

_OPEN_TIMEOUT: Final = 10.0
_READ_TIMEOUT: Final = 10.0
_QUALITY: Final = 92


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
    unknown. ``passed_over``: what of a folder is no picture, and why. Draw ``items`` once;
    close the source after the last."""

    items: Callable[[], Iterator[Item]]
    live: bool = False
    stills: bool = False
    total: int = 0
    fps: float = 25.0
    passed_over: tuple[tuple[str, str], ...] = ()
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
        found = look_through(path)
        if not found.pictures:
            raise SourceError(
                f"{shown(path)} holds no pictures: give a folder of JPEG, PNG or WebP"
                f"{passed_over_words(found.passed_over)}"
            )
        return _pictures(found.pictures, want_pixels, tuple(found.passed_over))
    if not path.exists():
        raise SourceError(
            f"{shown(path)} does not exist: give a picture, a video, a folder, a camera (0 or "
            "/dev/video0) or a URL"
        )
    if path.is_file() and is_picture(path):
        return _pictures([path], want_pixels)
    if path.is_file() or path.is_fifo():
        return _video(text, live=False, realtime=realtime, want_pixels=want_pixels)
    raise SourceError(f"{shown(path)} is neither a file, a folder nor a camera")


def passed_over_words(passed_over: Sequence[tuple[str, str]]) -> str:
    """What of a folder was passed over, the first few by name."""
    if not passed_over:
        return ""
    named = ", ".join(f"{name} ({why})" for name, why in passed_over[:10])
    more = len(passed_over) - 10
    return f"; passed over: {named}{f' and {more} more' if more > 0 else ''}"


def _pictures(
    paths: list[Path], want_pixels: bool, passed_over: tuple[tuple[str, str], ...] = ()
) -> Source:
    def items() -> Iterator[Item]:
        for path in paths:
            try:
                picture = load_picture(path)
                pixels = decode(picture.data) if want_pixels else None
            except (OSError, PictureError) as error:
                words = error.message if isinstance(error, PictureError) else str(error)
                yield Item(shown(path), None, error=words)
            else:
                yield Item(shown(path), picture, pixels=pixels)

    return Source(items, stills=True, total=len(paths), passed_over=passed_over)


def name_of(text: str) -> str:
    """What a source is called where nobody says it: a camera's address, a file's name."""
    if text.isdecimal():
        return f"video{text}"
    if "://" in text:
        name = re.sub(r"^[^:]*://|[?#].*$", "", without_credentials(text))
    else:
        name = shown(Path(text).stem) or shown(Path(text).resolve().name)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")[:64] or "source"


def without_credentials(url: str) -> str:
    """The URL as it may be shown, whether or not it is a right one."""
    return re.sub(r"(?<=://)[^/?#]*@", "", url)


def _video(text: str, *, live: bool, realtime: bool, want_pixels: bool) -> Source:
    import av
    from av.stream import Disposition

    address = shown(without_credentials(text))
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
        raise SourceError(f"{address} cannot be opened: {why}") from None
    if not container.streams.video:
        container.close()
        raise SourceError(f"{address} has no video")
    # The film, not its cover: no attached picture, no single frame, the default track.
    stream = max(
        container.streams.video,
        key=lambda track: (
            not track.disposition & Disposition.attached_pic,
            track.frames != 1,
            bool(track.disposition & Disposition.default),
            track.codec_context.width * track.codec_context.height,
            -track.index,
        ),
    )
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
                pixels = upright(frame.to_ndarray(format="bgr24"), frame.rotation)
                yield Item(
                    address,
                    encode(pixels, _QUALITY),
                    stream_offset=None if live else offset,
                    capture_time=datetime.now(UTC) if live else None,
                    pixels=pixels if want_pixels else None,
                )
        except av.FFmpegError as error:
            raise SourceError(f"{address} broke off: {error.strerror}") from None

    return Source(items, live=live or realtime, total=total, fps=rate, close=container.close)


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
