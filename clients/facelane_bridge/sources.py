"""Where frames come from: RTSP, files, V4L2 devices, HTTP-MJPEG, folders of pictures.

A ``Source`` is blocking and belongs to one reader thread. It gives each frame as an
encoded picture with its media time. Pictures that are JPEG already (MJPEG cameras,
files) are passed on as they are; everything else is decoded and encoded once, in the
decoder's own 4:2:0 planes, without a detour over BGR.

Every wait inside has a deadline (``read_timeout``), and every failure is a
``SourceError`` with a reason. Credentials come from the environment or a file; they are
put into the address at the last moment, and no text of an underlying library, which
might repeat that address, ever gets into an error message.
"""

from __future__ import annotations

import enum
import http.client
import math
import os
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import urllib.response
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Protocol

import av
import av.error
import av.logging
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from facelane_bridge.config import CameraSettings, Pace, SourceKind, Transport
from facelane_bridge.mjpeg import MjpegError, MjpegParser, boundary_of

# FFmpeg writes addresses, with what they carry, to stderr when it is in the mood.
av.logging.set_level(None)

READ_CHUNK_BYTES = 64 * 1024
MAX_PICTURE_FILE_BYTES = 32 * 1024 * 1024
MAX_PIXELS = 8192 * 8192
"""A header may promise any size; nothing larger than this is decoded."""
MAX_BAD_PACKETS = 250
"""Undecodable packets in a row (10 s of a camera) before the source is given up."""
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


class SourceReason(enum.StrEnum):
    """Why a source failed."""

    CREDENTIALS_MISSING = "CREDENTIALS_MISSING"
    AUTHENTICATION_FAILED = "AUTHENTICATION_FAILED"
    NOT_FOUND = "NOT_FOUND"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    CONNECT_FAILED = "CONNECT_FAILED"
    TIMED_OUT = "TIMED_OUT"
    DISCONNECTED = "DISCONNECTED"
    FORMAT_INVALID = "FORMAT_INVALID"
    NO_VIDEO = "NO_VIDEO"
    UNDECODABLE = "UNDECODABLE"
    TLS_FAILED = "TLS_FAILED"
    INTERRUPTED = "INTERRUPTED"


class SourceError(Exception):
    """A source cannot go on. ``permanent``: opening it again would fail in the same way.

    ``message`` never holds credentials.
    """

    def __init__(self, reason: SourceReason, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.permanent = permanent


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What was found when the source was opened."""

    kind: SourceKind
    codec: str
    width: int
    """Pixels; 0 where the source does not tell before its first frame."""
    height: int
    fps: float
    """Nominal; 0 where unknown."""
    duration: float | None
    """Seconds; ``None`` for live sources."""
    reencodes: bool
    """False: the camera's own JPEG bytes are passed on."""


@dataclass(frozen=True, slots=True)
class CapturedFrame:
    """One frame, encoded as JPEG (PNG and WebP files stay what they are)."""

    data: bytes
    media_time: float
    """Seconds since the source was opened, on the source's own clock; never decreases."""
    captured_at: float
    """Wall clock (Unix seconds) when the frame was complete here."""


class Source(Protocol):
    """A blocking source of frames, used by one thread; ``interrupt`` is for the others."""

    def open(self) -> SourceInfo: ...

    def read(self) -> CapturedFrame | None:
        """The next frame, ``None`` at the end. Raises ``SourceError``."""
        ...

    def interrupt(self) -> None:
        """Make a waiting ``open`` or ``read`` return soon. From any thread."""
        ...

    def close(self) -> None:
        """Let go of sockets and files. Idempotent; from the thread that reads."""
        ...

    @property
    def skipped(self) -> int:
        """Frames passed over to keep to ``max_fps``."""
        ...


def open_source(camera: CameraSettings) -> Source:
    """The source for a camera's settings; nothing is opened yet."""
    match camera.resolved_kind:
        case SourceKind.MJPEG:
            return _MjpegSource(camera)
        case SourceKind.FOLDER:
            return _FolderSource(camera)
        case _:
            return _AvSource(camera)


def strip_userinfo(url: str) -> str:
    """The address without user and password, for people to read."""
    return re.sub(r"(?<=://)[^/?#]*@", "", url)


@dataclass(frozen=True, slots=True)
class Credentials:
    """User and password; the text form gives neither away."""

    user: str
    password: str

    def __repr__(self) -> str:
        return "Credentials(…)"


def load_credentials(camera: CameraSettings) -> Credentials | None:
    """``user:password`` from the variable or the file that the settings name."""
    if camera.credentials_env:
        text = os.environ.get(camera.credentials_env)
        where = f"the environment variable {camera.credentials_env}"
        if text is None:
            raise SourceError(
                SourceReason.CREDENTIALS_MISSING,
                f"{where} is not set; set it to user:password",
                permanent=True,
            )
    elif camera.credentials_file:
        where = f"the file {camera.credentials_file}"
        try:
            with open(camera.credentials_file, encoding="utf-8") as file:
                text = file.read(4096)
        except (OSError, UnicodeDecodeError):
            raise SourceError(
                SourceReason.CREDENTIALS_MISSING,
                f"{where} cannot be read; it has to hold user:password",
                permanent=True,
            ) from None
    else:
        return None
    user, colon, password = text.strip("\r\n").partition(":")
    if not colon or not user:
        raise SourceError(
            SourceReason.CREDENTIALS_MISSING,
            f"{where} does not hold user:password",
            permanent=True,
        )
    return Credentials(user, password)


def _trusting(camera: CameraSettings) -> ssl.SSLContext:
    """What a camera's certificate is checked against."""
    try:
        return ssl.create_default_context(cafile=camera.tls_ca_file or None)
    except (OSError, ssl.SSLError) as error:
        what = error.strerror if not isinstance(error, ssl.SSLError) else "no PEM certificate in it"
        raise SourceError(
            SourceReason.TLS_FAILED,
            f"tls_ca_file {camera.tls_ca_file} cannot be used ({what}); name a PEM file",
            permanent=True,
        ) from None


_NO_SUCH_HOST = "the camera's name is not known; check its address, and this machine's DNS"


def _is_known(url: str) -> bool:
    """Whether the host of an address can be looked up."""
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None)
    except (OSError, UnicodeError):
        return False
    return True


def with_userinfo(url: str, credentials: Credentials | None) -> str:
    """The address with credentials, for the library that opens it and for nobody else."""
    if credentials is None:
        return url
    scheme, rest = url.split("://", 1)
    user = urllib.parse.quote(credentials.user, safe="")
    password = urllib.parse.quote(credentials.password, safe="")
    return f"{scheme}://{user}:{password}@{rest}"


# --- clocks ---------------------------------------------------------------------------


class MediaClock:
    """Turns a source's timestamps into seconds that never decrease.

    A timestamp that stands still stays still: this is how a frozen camera is seen. One
    that jumps (a camera that set its clock, a stream that started again) is rebased on
    the arrival time, so that one jump is not taken for a stall of hours.
    """

    MAX_FORWARD = 10.0
    MAX_BACKWARD = 0.5

    def __init__(self, *, live: bool = True) -> None:
        # A file may well have a minute between two frames.
        self._max_forward = self.MAX_FORWARD if live else math.inf
        self._base: float | None = None
        self._last_stamp = 0.0
        self._last_media = 0.0
        self._last_arrival = 0.0

    def media_time(self, stamp: float | None, arrival: float) -> float:
        """Seconds since the first frame. ``arrival`` is monotonic; ``stamp`` may be absent."""
        if stamp is None:
            stamp = arrival
        if self._base is None:
            self._base = stamp
        elif not -self.MAX_BACKWARD <= stamp - self._last_stamp <= self._max_forward:
            self._base = stamp - self._last_media - max(0.0, arrival - self._last_arrival)
        self._last_stamp = stamp
        self._last_arrival = arrival
        self._last_media = max(self._last_media, stamp - self._base)
        return self._last_media


class _Pacer:
    """Holds frames back until their media time, in step with the monotonic clock."""

    def __init__(self, interrupted: threading.Event) -> None:
        self._interrupted = interrupted
        self._start: float | None = None

    def wait_for(self, media_time: float) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = now - media_time
        due = self._start + media_time
        if due > now:
            self._interrupted.wait(due - now)
        elif now - due > 1.0:
            # The machine slept or the decoder is too slow: go on from here rather than
            # racing through everything that was missed.
            self._start = now - media_time


class _Decimator:
    """Chooses at most ``max_fps`` frames a second of media time, evenly."""

    def __init__(self, max_fps: float) -> None:
        self._interval = 1.0 / max_fps if max_fps > 0 else 0.0
        self._due = 0.0
        self.skipped = 0

    def wants(self, media_time: float) -> bool:
        if not self._interval:
            return True
        # A tolerance of a tenth of the interval: timestamps are rounded to
        # milliseconds by some muxers, and 25 of 25 fps has to stay 25.
        if media_time < self._due - self._interval * 0.1:
            self.skipped += 1
            return False
        self._due = max(self._due + self._interval, media_time)
        if self._due <= media_time:
            self._due = media_time + self._interval
        return True


# --- encoding -------------------------------------------------------------------------


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) from a JPEG's frame header, ``None`` if it has none."""
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7])
        elif marker == 0xDA:
            return None
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def is_self_contained_jpeg(data: bytes) -> bool:
    """Whether these bytes are a JPEG that any decoder reads: some webcams leave the
    Huffman tables (DHT) out to save bandwidth, which only MJPEG decoders know."""
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xC4:
            return True
        if data[at + 1] == 0xDA:
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return False


class JpegEncoder:
    """Encodes decoded frames as JPEG, scaled so that no side exceeds ``max_side``.

    FFmpeg's encoder on the decoder's own planes: 720p in 2.5 ms on one core, where the
    way over BGR and libjpeg-turbo takes 5.8 ms. One per source: it keeps its state
    between frames of one size.
    """

    def __init__(self, quality: int, max_side: int) -> None:
        # FFmpeg scales its matrix by q/8, libjpeg its by (200 - 2 quality)/100; the
        # factor makes both quantise about equally at the same quality.
        self._qscale = min(31, max(2, round((100 - quality) * 0.34)))
        self._max_side = max_side
        self._context: VideoCodecContext | None = None
        self._reformatter = VideoReformatter()
        self._count = 0

    def encode(self, frame: VideoFrame) -> bytes:
        """JPEG bytes of one decoded frame. Raises ``av.FFmpegError``."""
        width, height = fit(frame.width, frame.height, self._max_side)
        # JPEG is BT.601 by definition (JFIF), HD video is BT.709: told apart only where
        # the stream says so.
        bt709 = frame.colorspace == Colorspace.ITU709
        planes = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="yuvj420p",
            src_colorspace=Colorspace.ITU709 if bt709 else None,
            dst_colorspace=Colorspace.ITU601 if bt709 else None,
            dst_color_range=ColorRange.JPEG,
            interpolation=Interpolation.AREA if width < frame.width else Interpolation.BILINEAR,
        )
        context = self._context
        if context is None or (context.width, context.height) != (width, height):
            context = self._context = self._new_context(width, height)
        self._count += 1
        planes.pts = self._count
        planes.time_base = Fraction(1, 1000)
        return b"".join(bytes(packet) for packet in context.encode(planes))

    def _new_context(self, width: int, height: int) -> VideoCodecContext:
        context = VideoCodecContext.create("mjpeg", "w")
        assert isinstance(context, VideoCodecContext)
        context.width, context.height = width, height
        context.pix_fmt = "yuvj420p"
        context.time_base = Fraction(1, 1000)
        context.qmin = context.qmax = self._qscale
        context.thread_count = 1  # more threads mean frames held back
        # The optimal tables cost a second pass: 7.4 ms instead of 2.5 for 720p.
        context.options = {"huffman": "default"}
        return context


def fit(width: int, height: int, max_side: int) -> tuple[int, int]:
    """The size that keeps the proportions with no side above ``max_side`` (0 = any)."""
    longest = max(width, height)
    if max_side <= 0 or longest <= max_side:
        return width, height
    scale = max_side / longest
    return max(2, round(width * scale)), max(2, round(height * scale))


def _decode_picture(data: bytes, codec: str) -> VideoFrame:
    context = VideoCodecContext.create(codec, "r")
    assert isinstance(context, VideoCodecContext)
    context.options = {"max_pixels": str(MAX_PIXELS)}
    for flush in (av.Packet(data), None):
        for frame in context.decode(flush):
            return frame
    raise av.error.InvalidDataError(0, "no picture")


# --- PyAV: RTSP, files, devices -------------------------------------------------------


class _AvSource:
    """Anything that FFmpeg opens and that the configuration allows it to open."""

    def __init__(self, camera: CameraSettings) -> None:
        self._camera = camera
        self._kind = camera.resolved_kind
        self._interrupted = threading.Event()
        self._container: InputContainer | None = None
        self._stream: VideoStream | None = None
        self._frames: Iterator[CapturedFrame] | None = None
        self._clock = MediaClock(live=self._is_live)
        self._pacer = _Pacer(self._interrupted)
        self._decimator = _Decimator(camera.max_fps)
        self._encoder = JpegEncoder(camera.jpeg_quality, camera.max_side)
        self._loop_offset = 0.0
        self._media_time = 0.0
        self._pass_through = False

    @property
    def skipped(self) -> int:
        return self._decimator.skipped

    @property
    def _is_live(self) -> bool:
        return self._kind is not SourceKind.FILE

    def interrupt(self) -> None:
        self._interrupted.set()

    def close(self) -> None:
        frames, self._frames = self._frames, None
        container, self._container = self._container, None
        if frames is not None:
            del frames
        if container is not None:
            container.close()

    def open(self) -> SourceInfo:
        container = self._open_container()
        stream = self._stream
        assert stream is not None
        duration = None
        if not self._is_live and container.duration:
            duration = container.duration / av.time_base
        self._frames = self._read_frames()
        context = stream.codec_context
        return SourceInfo(
            kind=self._kind,
            codec=context.name,
            width=context.width,
            height=context.height,
            fps=float(stream.average_rate or stream.guessed_rate or 0),
            duration=duration,
            reencodes=not self._pass_through,
        )

    def _open_container(self) -> InputContainer:
        address, input_format, options = self._address()
        begun = time.monotonic()
        try:
            container = av.open(
                address,
                "r",
                format=input_format,
                options=options,
                timeout=(self._camera.open_timeout, self._camera.read_timeout),
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            patience = min(self._camera.open_timeout, self._camera.read_timeout)
            if (
                self._kind is SourceKind.RTSP
                and isinstance(error, av.error.InvalidDataError)
                and time.monotonic() - begun > 0.9 * patience
            ):
                # FFmpeg calls it invalid data when a port takes the connection and then
                # says nothing.
                raise self._as_source_error(TimeoutError(), "opened") from None
            raise self._as_source_error(error, "opened") from None
        try:
            if not container.streams.video:
                raise SourceError(
                    SourceReason.NO_VIDEO, "the source has no video stream", permanent=True
                )
            stream = container.streams.video[0]
            stream.thread_type = "AUTO" if not self._is_live else "SLICE"
            stream.codec_context.thread_count = 1 if self._is_live else 2
            # Before the first allocation, not after: a lying header costs nothing.
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        except BaseException:
            container.close()
            raise
        self._container, self._stream = container, stream
        if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
            self._close_container()
            raise SourceError(
                SourceReason.FORMAT_INVALID,
                f"the video has more than {MAX_PIXELS} pixels a frame",
                permanent=True,
            )
        self._pass_through = stream.codec_context.name == "mjpeg" and not self._camera.max_side
        return container

    def _address(self) -> tuple[str, str | None, dict[str, str]]:
        camera = self._camera
        match self._kind:
            case SourceKind.RTSP:
                url = with_userinfo(camera.source, load_credentials(camera))
                micros = str(int(camera.read_timeout * 1e6))
                options = {
                    "rtsp_transport": camera.transport.value,
                    "timeout": micros,
                    # Half a second of looking instead of five: a camera says in its SDP
                    # what it sends (1.2 s -> 0.3 s until the first frame).
                    "probesize": "32768",
                    "analyzeduration": "100000",
                    "fflags": "nobuffer",
                    "max_delay": "500000",
                }
                if camera.transport is Transport.UDP:
                    options["buffer_size"] = str(2 * 1024 * 1024)
                if camera.tls_ca_file:
                    _trusting(camera)
                    options |= {"tls_verify": "1", "ca_file": camera.tls_ca_file}
                return url, None, options
            case SourceKind.DEVICE:
                options = {}
                if camera.device_size:
                    options["video_size"] = camera.device_size
                if camera.device_fps:
                    options["framerate"] = str(camera.device_fps)
                if camera.device_format:
                    options["input_format"] = camera.device_format
                if not os.path.exists(camera.source):
                    raise SourceError(
                        SourceReason.NOT_FOUND, "the device does not exist; is it plugged in?"
                    )
                return camera.source, "v4l2", options
            case _:
                path = Path(camera.source)
                if not path.exists():
                    raise SourceError(
                        SourceReason.NOT_FOUND, "the file does not exist", permanent=True
                    )
                # A playlist or an SDP file must not make us open anything but files.
                return f"file:{path.absolute()}", None, {"protocol_whitelist": "file"}

    def _as_source_error(self, error: BaseException, doing: str) -> SourceError:
        """Our own words for FFmpeg's errors, whose text repeats the address."""
        if self._interrupted.is_set():
            return SourceError(SourceReason.INTERRUPTED, "the source was told to stop")
        file = self._kind is SourceKind.FILE
        match error:
            case av.error.HTTPUnauthorizedError() | av.error.HTTPForbiddenError():
                hint = (
                    "check them"
                    if self._camera.credentials_env or self._camera.credentials_file
                    else "name them with credentials_env or credentials_file"
                )
                # Not tried again: cameras lock accounts after a few wrong passwords.
                return SourceError(
                    SourceReason.AUTHENTICATION_FAILED,
                    f"the camera refuses the credentials; {hint}",
                    permanent=True,
                )
            case av.error.HTTPNotFoundError():
                return SourceError(
                    SourceReason.NOT_FOUND,
                    "the camera has no such stream; check the path of its address",
                )
            case TimeoutError() | av.error.ExitError():
                return SourceError(
                    SourceReason.TIMED_OUT,
                    f"the source could not be {doing} in time; is it on and reachable?",
                )
            case PermissionError():
                return SourceError(
                    SourceReason.PERMISSION_DENIED,
                    "the source may not be read; check its permissions",
                    permanent=file,
                )
            case FileNotFoundError():
                return SourceError(
                    SourceReason.NOT_FOUND, "the source does not exist", permanent=file
                )
            case ConnectionError():
                return SourceError(
                    SourceReason.CONNECT_FAILED, "the camera refuses or broke the connection"
                )
            case av.error.InvalidDataError():
                return SourceError(
                    SourceReason.FORMAT_INVALID,
                    "the source is no video that can be read",
                    permanent=file,
                )
            case av.error.EOFError():
                return SourceError(SourceReason.DISCONNECTED, "the camera ended the stream")
            case _:
                # FFmpeg calls a name that nobody knows an input/output error.
                if self._kind is SourceKind.RTSP and not _is_known(self._camera.source):
                    return SourceError(SourceReason.CONNECT_FAILED, _NO_SUCH_HOST)
                kind = type(error).__name__
                return SourceError(
                    SourceReason.CONNECT_FAILED,
                    f"the source could not be {doing} ({kind})",
                    permanent=file,
                )

    def read(self) -> CapturedFrame | None:
        assert self._frames is not None, "open() comes before read()"
        frame = next(self._frames, None)
        if self._interrupted.is_set():
            raise SourceError(SourceReason.INTERRUPTED, "the source was told to stop")
        if frame is None and self._is_live:
            raise SourceError(SourceReason.DISCONNECTED, "the camera ended the stream")
        return frame

    def _read_frames(self) -> Iterator[CapturedFrame]:
        while True:
            last = None
            for last in self._read_once():
                yield last
            if not self._camera.loop or self._is_live or self._interrupted.is_set():
                return
            if last is None:
                raise SourceError(
                    SourceReason.UNDECODABLE, "not one frame could be decoded", permanent=True
                )
            # One frame's time between the last frame of one round and the first of the
            # next, or the tracker sees two frames at one instant.
            stream = self._stream
            rate = float(stream.average_rate or 25) if stream is not None else 25.0
            self._loop_offset = last.media_time + 1.0 / rate
            self._clock = MediaClock(live=False)
            self._close_container()
            self._open_container()

    def _close_container(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            container.close()

    def _read_once(self) -> Iterator[CapturedFrame]:
        container, stream = self._container, self._stream
        assert container is not None
        assert stream is not None
        bad = 0
        packets = container.demux(stream)
        while not self._interrupted.is_set():
            try:
                packet = next(packets, None)
            except (av.FFmpegError, OSError) as error:
                raise self._as_source_error(error, "read") from None
            if packet is None:
                return
            stamp = packet.pts
            if self._pass_through and packet.size:
                data = bytes(packet)
                if is_self_contained_jpeg(data):
                    seconds = float(stamp * packet.time_base) if stamp is not None else None
                    if self._take(seconds) is not None:
                        yield self._captured(data)
                    continue
            try:
                frames = stream.decode(packet)
                bad = 0
            except av.error.InvalidDataError:
                # Normal at the start in the middle of a group of pictures and after
                # packet loss: the next key frame mends it.
                bad += 1
                if bad >= MAX_BAD_PACKETS:
                    raise SourceError(
                        SourceReason.UNDECODABLE,
                        "nothing could be decoded for a long time; check the camera's codec",
                    ) from None
                continue
            except (av.FFmpegError, OSError) as error:
                raise self._as_source_error(error, "decoded") from None
            for frame in frames:
                if self._take(frame.time) is None:
                    continue
                try:
                    data = self._encoder.encode(frame)
                except (av.FFmpegError, ValueError) as error:
                    raise self._as_source_error(error, "encoded") from None
                yield self._captured(data)

    def _take(self, stamp: float | None) -> float | None:
        """Advance the media clock; the frame's media time, or ``None`` to pass it over."""
        media_time = self._loop_offset + self._clock.media_time(stamp, time.monotonic())
        if not self._decimator.wants(media_time):
            return None
        if not self._is_live and self._camera.pace is Pace.REALTIME:
            self._pacer.wait_for(media_time)
        self._media_time = media_time
        return media_time

    def _captured(self, data: bytes) -> CapturedFrame:
        return CapturedFrame(data, self._media_time, time.time())


# --- HTTP-MJPEG -----------------------------------------------------------------------


def _second_try(
    retry: Callable[..., urllib.response.addinfourl | None],
    request: urllib.request.Request,
    refusal: IO[bytes],
    *rest: Any,
) -> urllib.response.addinfourl | None:
    """Ask again with credentials, and close the refusal's connection, which the standard
    handlers leave to the garbage collector; they leave it open when they do not ask again."""
    try:
        answer = retry(request, refusal, *rest)
    except BaseException:
        refusal.close()
        raise
    if answer is not None:
        refusal.close()
    return answer


class _OneTryDigest(urllib.request.HTTPDigestAuthHandler):
    """The standard handler tries five times: enough to lock an account on many cameras."""

    def retry_http_digest_auth(
        self, req: urllib.request.Request, auth: str
    ) -> urllib.response.addinfourl | None:
        if req.has_header(self.auth_header):
            return None
        return super().retry_http_digest_auth(req, auth)

    def http_error_401(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
    ) -> urllib.response.addinfourl | None:
        return _second_try(super().http_error_401, req, fp, code, msg, headers)


class _BasicIfAsked(urllib.request.HTTPBasicAuthHandler):
    """The standard handler raises ValueError when the challenge is for digest."""

    def http_error_401(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
    ) -> urllib.response.addinfourl | None:
        if not any(
            challenge.strip().lower().startswith("basic")
            for challenge in headers.get_all("WWW-Authenticate", [])
        ):
            return None
        return _second_try(super().http_error_401, req, fp, code, msg, headers)


class _MjpegSource:
    """A camera's ``multipart/x-mixed-replace`` address; its JPEGs pass untouched."""

    def __init__(self, camera: CameraSettings) -> None:
        self._camera = camera
        self._interrupted = threading.Event()
        self._response: http.client.HTTPResponse | None = None
        self._parser: MjpegParser | None = None
        self._ready: list[bytes] = []
        self._clock = MediaClock()
        self._decimator = _Decimator(camera.max_fps)
        self._shrink = (
            JpegEncoder(camera.jpeg_quality, camera.max_side) if camera.max_side else None
        )

    @property
    def skipped(self) -> int:
        return self._decimator.skipped

    def interrupt(self) -> None:
        self._interrupted.set()

    def close(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.close()

    def open(self) -> SourceInfo:
        response = self._request()
        self._response = response
        try:
            boundary = boundary_of(response.headers.get("Content-Type", ""))
        except MjpegError as error:
            self.close()
            raise SourceError(SourceReason.FORMAT_INVALID, error.message, permanent=True) from None
        self._parser = MjpegParser(boundary)
        return SourceInfo(
            SourceKind.MJPEG, "mjpeg", 0, 0, 0.0, None, reencodes=self._shrink is not None
        )

    def _request(self) -> http.client.HTTPResponse:
        camera = self._camera
        context = _trusting(camera)
        handlers: list[urllib.request.BaseHandler] = [
            urllib.request.HTTPSHandler(context=context),
            # A camera on the local network is not behind the proxy of the environment.
            urllib.request.ProxyHandler({}),
        ]
        credentials = load_credentials(camera)
        if credentials is not None:
            passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
            passwords.add_password(None, camera.source, credentials.user, credentials.password)
            handlers += [
                _OneTryDigest(passwords),
                _BasicIfAsked(passwords),
            ]
        opener = urllib.request.build_opener(*handlers)
        timeout = min(camera.open_timeout, camera.read_timeout)
        try:
            response = opener.open(camera.source, timeout=timeout)
        except urllib.error.HTTPError as error:
            status = error.code
            error.close()
            raise self._refused(status, credentials is not None) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        except ValueError:
            raise SourceError(
                SourceReason.AUTHENTICATION_FAILED,
                "the camera asks for an authentication that is not known here; "
                "set it to basic, or to digest with MD5",
                permanent=True,
            ) from None
        assert isinstance(response, http.client.HTTPResponse)
        return response

    def _refused(self, status: int, had_credentials: bool) -> SourceError:
        if status in (401, 403):
            hint = "check them" if had_credentials else "name them with credentials_env or _file"
            return SourceError(
                SourceReason.AUTHENTICATION_FAILED,
                f"the camera refuses the credentials; {hint}",
                permanent=True,
            )
        if status in (404, 410):
            return SourceError(
                SourceReason.NOT_FOUND, "the camera has no such stream; check its address"
            )
        return SourceError(SourceReason.CONNECT_FAILED, f"the camera answers HTTP {status}")

    def _unreachable(self, error: BaseException) -> SourceError:
        if self._interrupted.is_set():
            return SourceError(SourceReason.INTERRUPTED, "the source was told to stop")
        cause: object = error.reason if isinstance(error, urllib.error.URLError) else error
        match cause:
            case TimeoutError():
                return SourceError(
                    SourceReason.TIMED_OUT, "the camera does not answer in time; is it on?"
                )
            case ssl.SSLError():
                return SourceError(
                    SourceReason.TLS_FAILED,
                    "the camera's certificate is not trusted; name its authority in tls_ca_file",
                )
            case http.client.HTTPException():
                return SourceError(SourceReason.FORMAT_INVALID, "the camera does not speak HTTP")
            case socket.gaierror():
                return SourceError(SourceReason.CONNECT_FAILED, _NO_SUCH_HOST)
            case _:
                return SourceError(
                    SourceReason.CONNECT_FAILED, "the camera refuses or broke the connection"
                )

    def read(self) -> CapturedFrame | None:
        while True:
            while self._ready:
                data = self._ready.pop(0)
                media_time = self._clock.media_time(None, time.monotonic())
                if not self._decimator.wants(media_time):
                    continue
                return CapturedFrame(self._shrunk(data), media_time, time.time())
            if self._interrupted.is_set():
                raise SourceError(SourceReason.INTERRUPTED, "the source was told to stop")
            self._receive()

    def _receive(self) -> None:
        response, parser = self._response, self._parser
        assert response is not None, "open() comes before read()"
        assert parser is not None
        try:
            data = response.read1(READ_CHUNK_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(error) from None
        if not data or parser.ended:
            raise SourceError(SourceReason.DISCONNECTED, "the camera ended the stream")
        try:
            self._ready += parser.feed(data)
        except MjpegError as error:
            raise SourceError(SourceReason.FORMAT_INVALID, error.message) from None

    def _shrunk(self, data: bytes) -> bytes:
        if self._shrink is None:
            return data
        size = jpeg_size(data)
        if size is None or max(size) <= self._camera.max_side or size[0] * size[1] > MAX_PIXELS:
            return data  # what cannot be read is the server's to refuse, frame by frame
        try:
            return self._shrink.encode(_decode_picture(data, "mjpeg"))
        except (av.FFmpegError, ValueError):
            return data


# --- folders --------------------------------------------------------------------------


class _FolderSource:
    """The pictures of a folder in the order of their names, at ``folder_fps``."""

    def __init__(self, camera: CameraSettings) -> None:
        self._camera = camera
        self._interrupted = threading.Event()
        self._paths: list[Path] = []
        self._next = 0
        self._pacer = _Pacer(self._interrupted)
        self._decimator = _Decimator(camera.max_fps)
        self._shrink = (
            JpegEncoder(camera.jpeg_quality, camera.max_side) if camera.max_side else None
        )

    @property
    def skipped(self) -> int:
        return self._decimator.skipped

    def interrupt(self) -> None:
        self._interrupted.set()

    def close(self) -> None:
        self._paths = []

    def open(self) -> SourceInfo:
        folder = Path(self._camera.source)
        try:
            self._paths = sorted(
                path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES
            )
        except PermissionError:
            raise SourceError(
                SourceReason.PERMISSION_DENIED, "the folder may not be read", permanent=True
            ) from None
        except OSError:
            raise SourceError(
                SourceReason.NOT_FOUND, "the folder does not exist", permanent=True
            ) from None
        if not self._paths:
            raise SourceError(
                SourceReason.NO_VIDEO,
                "the folder holds no .jpg, .png or .webp picture",
                permanent=True,
            )
        return SourceInfo(
            SourceKind.FOLDER,
            "pictures",
            0,
            0,
            self._camera.folder_fps,
            len(self._paths) / self._camera.folder_fps,
            reencodes=self._shrink is not None,
        )

    def read(self) -> CapturedFrame | None:
        while True:
            if self._next >= len(self._paths) and not self._camera.loop:
                return None
            path = self._paths[self._next % len(self._paths)]
            media_time = self._next / self._camera.folder_fps
            self._next += 1
            if not self._decimator.wants(media_time):
                continue
            if self._camera.pace is Pace.REALTIME:
                self._pacer.wait_for(media_time)
            if self._interrupted.is_set():
                raise SourceError(SourceReason.INTERRUPTED, "the source was told to stop")
            return CapturedFrame(self._load(path), media_time, time.time())

    def _load(self, path: Path) -> bytes:
        try:
            with path.open("rb") as file:
                data = _read_bounded(file)
        except OSError:
            return b""  # an error of this frame, which the stream outlives
        if self._shrink is not None and data:
            codec = {b"\xff\xd8": "mjpeg", b"\x89P": "png", b"RI": "webp"}.get(data[:2])
            try:
                if codec is not None:
                    frame = _decode_picture(data, codec)
                    if max(frame.width, frame.height) > self._camera.max_side:
                        return self._shrink.encode(frame)
            except (av.FFmpegError, ValueError):
                pass  # the server says what is wrong with it, frame by frame
        return data


def _read_bounded(file: IO[Any]) -> bytes:
    data: bytes = file.read(MAX_PICTURE_FILE_BYTES + 1)
    if len(data) > MAX_PICTURE_FILE_BYTES:
        raise OSError("too large")
    return data
