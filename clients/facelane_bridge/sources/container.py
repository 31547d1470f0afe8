"""Whatever FFmpeg opens and the configuration allows it to open: RTSP, files, devices."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import av
import av.error
import av.logging
from av.container import InputContainer
from av.video.stream import VideoStream

from facelane_bridge.config import CameraSettings, Pace, SourceKind, Transport
from facelane_bridge.sources.access import (
    NO_SUCH_HOST,
    is_known,
    load_credentials,
    trusting,
    with_userinfo,
)
from facelane_bridge.sources.api import CapturedFrame, SourceError, SourceInfo, SourceReason
from facelane_bridge.sources.jpeg import MAX_PIXELS, JpegEncoder, is_self_contained_jpeg
from facelane_bridge.sources.pace import Decimator, MediaClock, Pacer

# FFmpeg writes addresses, with what they carry, to stderr when it is in the mood.
av.logging.set_level(None)

MAX_BAD_PACKETS = 250
"""Undecodable packets in a row (10 s of a camera) before the source is given up."""


class ContainerSource:
    """Anything that FFmpeg opens and that the configuration allows it to open."""

    def __init__(self, camera: CameraSettings) -> None:
        self._camera = camera
        self._kind = camera.resolved_kind
        self._interrupted = threading.Event()
        self._container: InputContainer | None = None
        self._stream: VideoStream | None = None
        self._frames: Iterator[CapturedFrame] | None = None
        self._clock = MediaClock(live=self._is_live)
        self._pacer = Pacer(self._interrupted)
        self._decimator = Decimator(camera.max_fps)
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
                    trusting(camera)
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
                if self._kind is SourceKind.RTSP and not is_known(self._camera.source):
                    return SourceError(SourceReason.CONNECT_FAILED, NO_SUCH_HOST)
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
