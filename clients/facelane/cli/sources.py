"""What ``facelane analyze`` can read: pictures, folders, videos, cameras and URLs.

Which of them a text names; for stills see ``stills``, for what moves ``videos``.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from facelane.cli.stills import decode, is_picture, load_picture, look_through
from facelane.cli.streams import shown
from facelane.errors import PictureError
from facelane.types import Picture


class SourceError(Exception):
    """A source cannot be read; the message says why and holds no credentials."""


class Video(enum.StrEnum):
    """How H.264 and H.265 go to the server: as they are, where it takes them so, or as JPEG."""

    AUTO = "auto"
    PASS = "pass"  # noqa: S105 - what is done
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Item:
    """Something to analyse. ``pixels`` is BGR uint8 (height, width, 3) or ``None`` when
    nobody asked for it; ``error`` stands instead of a picture that cannot be read; ``is_key``:
    it needs none before it."""

    name: str
    picture: Picture | None
    stream_offset: float | None = None
    capture_time: datetime | None = None
    pixels: Any = None
    error: str = ""
    is_key: bool = True


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


def open_source(
    text: str,
    *,
    realtime: bool = False,
    want_pixels: bool = False,
    video: Video = Video.DECODE,
    credentials_file: Path | None = None,
) -> Source:
    """The source that ``text`` names. ``credentials_file``: user:password of an RTSP camera.

    Raises:
        SourceError: there is no such file, or it is of no known kind.
    """
    from facelane.cli.videos import open_camera, open_video

    if text.isdecimal():
        text = f"/dev/video{text}"
    if text.startswith(("rtsp:", "rtsps:")):
        return open_camera(text, want_pixels, video, credentials_file)
    if "://" in text:
        return open_video(text, live=True, want_pixels=want_pixels)
    path = Path(text)
    if path.is_char_device():
        return open_video(text, live=True, want_pixels=want_pixels)
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
    if path.is_fifo():
        return open_video(text, realtime=realtime, want_pixels=want_pixels)
    if path.is_file():
        return open_video(text, realtime=realtime, want_pixels=want_pixels, video=video)
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
