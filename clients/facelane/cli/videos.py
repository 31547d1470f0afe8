"""What moves: files, devices and addresses by FFmpeg, RTSP cameras by the bridge.

H.264 and H.265 of files and RTSP cameras go on as access units where they can, everything else
as JPEG. The bridge speaks to RTSP cameras in FFmpeg's place: it answers every authentication,
for passwords of any length, and says what a camera refuses and why.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
import urllib.parse
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from facelane.cli.sources import Item, Source, SourceError, Video, without_credentials
from facelane.cli.stills import decode, encode, upright
from facelane.cli.streams import shown
from facelane.types import Encoding, Picture
from facelane.video import NotPassableError, Passage

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_OPEN_TIMEOUT: Final = 10.0
_READ_TIMEOUT: Final = 10.0
_QUALITY: Final = 92
_MAX_DAMAGED: Final = 250
"""Packets in a row of which no picture comes: ten seconds."""


def open_video(
    text: str,
    *,
    live: bool = False,
    realtime: bool = False,
    want_pixels: bool = False,
    video: Video = Video.DECODE,
) -> Source:
    """Whatever FFmpeg opens. Raises SourceError."""
    address = shown(without_credentials(text))
    container, film = _opened(text, address)
    film.thread_type = "AUTO"
    rate = float(film.average_rate or 0) or 25.0
    passage = None
    if video is not Video.DECODE and not want_pixels:
        try:
            passage = _passage(text, address, film)
        except NotPassableError as why:
            if video is Video.PASS:
                container.close()
                raise SourceError(f"{address} cannot be passed on: {why.message}") from None
    moving = _Moving(container, film, address, rate, live, _Pace() if realtime else None)
    return Source(
        lambda: moving.decoded(want_pixels) if passage is None else moving.units(passage),
        live=live or realtime,
        total=0 if live else int(film.frames or _estimate(container, rate)),
        fps=rate,
        close=container.close,
    )


def _opened(text: str, address: str) -> tuple[InputContainer, VideoStream]:
    import av

    rtsp = text.startswith(("rtsp:", "rtsps:"))
    device = text.startswith("/dev/")
    # FFmpeg would take what stands before a colon in a file's name for a protocol.
    opened = text if device or "://" in text else f"file:{Path(text).absolute()}"
    try:
        container = av.open(
            opened,
            "r",
            format="v4l2" if device else None,
            options={"rtsp_transport": "tcp"} if rtsp else {},
            timeout=(_OPEN_TIMEOUT, _READ_TIMEOUT),
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        # FFmpeg's own text repeats the URL, credentials included.
        why = getattr(error, "strerror", None) or type(error).__name__
        raise SourceError(f"{address} cannot be opened: {why}") from None
    film = _film(container)
    if film is None:
        container.close()
        raise SourceError(f"{address} has no video")
    return container, film


def _film(container: InputContainer) -> VideoStream | None:
    """Not its cover: no attached picture, no single frame, the default track."""
    from av.stream import Disposition

    return max(
        container.streams.video,
        key=lambda track: (
            not track.disposition & Disposition.attached_pic,
            track.frames != 1,
            bool(track.disposition & Disposition.default),
            track.codec_context.width * track.codec_context.height,
            -track.index,
        ),
        default=None,
    )


def _passage(text: str, address: str, film: VideoStream) -> Passage:
    """Raises NotPassableError: also where pictures have to be turned, which takes pixels."""
    import av

    passage = Passage(film)
    # What it is, is told by its first picture; the container that is used is left as it is.
    container, same = _opened(text, address)
    with container, contextlib.suppress(av.FFmpegError):
        look = Passage(same)
        any(look.take(packet) is not None for packet in container.demux(same))
        if look.rotation:
            raise NotPassableError("its pictures lie on their side")
    return passage


class _Moving:
    """One opened video as items; FFmpeg's errors without its words, which repeat addresses."""

    def __init__(
        self,
        container: InputContainer,
        film: VideoStream,
        address: str,
        rate: float,
        live: bool,
        pace: _Pace | None,
    ) -> None:
        self._container = container
        self._film = film
        self._address = address
        self._rate = rate
        self._live = live
        self._pace = pace
        self._first: float | None = None
        self._offset = 0.0
        self._number = 0

    def decoded(self, want_pixels: bool) -> Iterator[Item]:
        import av

        damaged = 0
        try:
            for packet in self._container.demux(self._film):
                try:
                    frames = self._film.decode(packet)
                except av.error.InvalidDataError:
                    # A damaged one, or what needs a picture before the first: others follow.
                    damaged += 1
                    if damaged > _MAX_DAMAGED:
                        raise
                    if self._number:
                        yield Item(self._address, None, error="a picture is damaged")
                    continue
                damaged = 0 if frames else damaged
                for frame in frames:
                    self._tell(frame.time)
                    yield self._item(frame, want_pixels)
            self._check_any()
        except av.FFmpegError as error:
            raise SourceError(f"{self._address} broke off: {error.strerror}") from None

    def units(self, passage: Passage) -> Iterator[Item]:
        import av

        try:
            for packet in self._container.demux(self._film):
                unit = passage.take(packet)
                if unit is not None:
                    self._tell(unit.stamp)
                    yield Item(
                        self._address,
                        unit.picture,
                        stream_offset=self._offset,
                        is_key=unit.is_key,
                    )
            self._check_any()
        except NotPassableError as why:
            raise SourceError(
                f"{self._address} turns into what cannot be passed on: {why.message}; give "
                "--video decode"
            ) from None
        except av.FFmpegError as error:
            raise SourceError(f"{self._address} broke off: {error.strerror}") from None

    def _check_any(self) -> None:
        """A video without a picture is none, whatever its header says. Raises SourceError."""
        if not self._number:
            raise SourceError(f"{self._address} gives no picture: not one could be decoded")

    def _tell(self, moment: float | None) -> None:
        """The time of the next picture."""
        moment = self._number / self._rate if moment is None else moment
        self._number += 1
        self._first = moment if self._first is None else self._first
        self._offset = max(self._offset, moment - self._first)
        if self._pace is not None:
            self._pace.wait(self._offset)

    def _item(self, frame: VideoFrame, want_pixels: bool) -> Item:
        pixels = upright(frame.to_ndarray(format="bgr24"), frame.rotation)
        return Item(
            self._address,
            encode(pixels, _QUALITY),
            stream_offset=None if self._live else self._offset,
            capture_time=datetime.now(UTC) if self._live else None,
            pixels=pixels if want_pixels else None,
        )


def open_camera(
    text: str, want_pixels: bool, video: Video, credentials_file: Path | None
) -> Source:
    """An RTSP camera, by the bridge where that is installed. Raises SourceError."""
    try:
        import structlog

        from facelane_bridge import config
        from facelane_bridge import sources as bridge
        from facelane_bridge.sources.challenge import Credentials
    except ImportError as error:
        if credentials_file is not None or video is Video.PASS:
            raise SourceError(
                f"{error.name} is missing, which this takes: pip install 'facelane[bridge]'"
            ) from None
        sys.stderr.write(
            "facelane: without the bridge FFmpeg speaks to the camera: no passwords of more than "
            "127 characters, no choice of digest algorithms, no certificate is checked; "
            "pip install 'facelane[bridge]'\n"
        )
        return open_video(text, live=True, want_pixels=want_pixels)
    # Its words are for people; standard output is for results.
    structlog.configure(
        processors=[lambda _, __, event: f"facelane: {_words(event)}"],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    address = without_credentials(text)
    options: dict[str, Any] = {"video": "decode" if want_pixels else video.value}
    if credentials_file is not None:
        options["credentials_file"] = str(credentials_file)
    try:
        settings = config.single(address, server={}, options=options).cameras[0]
    except config.ConfigError as error:
        raise SourceError(f"{address} cannot be opened: {error}") from None
    user, colon, password = _user_info(text).partition(":")
    known = Credentials(urllib.parse.unquote(user), urllib.parse.unquote(password))
    source = bridge.open_source(settings, known if colon else None)
    try:
        info = source.open()
    except bridge.SourceError as error:
        source.close()
        raise SourceError(f"{shown(address)} cannot be opened: {error.message}") from None

    def items() -> Iterator[Item]:
        try:
            while (frame := source.read()) is not None:
                yield _camera_item(frame)
        except bridge.SourceError as error:
            raise SourceError(f"{shown(address)} broke off: {error.message}") from None

    def _camera_item(frame: bridge.CapturedFrame) -> Item:
        if frame.refused is not None:
            return Item(shown(address), None, error=frame.refused.message)
        encoding = frame.video or Encoding.JPEG
        return Item(
            shown(address),
            Picture(encoding, frame.data),
            stream_offset=frame.media_time,
            capture_time=datetime.fromtimestamp(frame.captured_at, UTC),
            pixels=decode(frame.data) if want_pixels else None,
            is_key=frame.is_key,
        )

    def close() -> None:
        source.interrupt()
        source.close()

    return Source(items, live=True, fps=info.fps or 25.0, close=close)


def _user_info(url: str) -> str:
    found = re.match(r"[^/?#]*://([^/?#]*)@", url)
    return found[1] if found else ""


def _words(event: Any) -> str:
    why = f": {event['why']}" if "why" in event else ""
    return f"{event['event']}{why}"


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
