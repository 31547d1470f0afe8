"""Whatever FFmpeg opens and the configuration allows it to open: RTSP, files, devices."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import av.error
import av.logging
import structlog
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from facelane import video
from facelane_bridge.camera import OPENING_STRETCH, Outlook
from facelane_bridge.config import CameraSettings, Pace, SourceKind, Transport, VideoChoice
from facelane_bridge.sources.api import (
    CapturedFrame,
    Refusal,
    SourceError,
    SourceInfo,
    SourceReason,
)
from facelane_bridge.sources.challenge import Credentials
from facelane_bridge.sources.jpeg import MAX_PIXELS, JpegEncoder, JpegGate
from facelane_bridge.sources.pace import Decimator, MediaClock, Pacer
from facelane_bridge.sources.rtsp import RtspRelay
from facelane_bridge.sources.turning import Turner, orientation_of

# FFmpeg writes addresses, with what they carry, to stderr when it is in the mood.
av.logging.set_level(None)

MAX_BAD_PACKETS = 250
"""Undecodable packets in a row (10 s of a camera) before the source is given up."""


MAX_REDIRECTS = 5

log = structlog.get_logger("facelane_bridge")


class ContainerSource:
    """Anything that FFmpeg opens and that the configuration allows it to open."""

    def __init__(self, camera: CameraSettings, credentials: Credentials | None = None) -> None:
        self._camera = camera
        self._credentials = credentials
        self._kind = camera.resolved_kind
        self._interrupted = threading.Event()
        self._container: InputContainer | None = None
        self._stream: VideoStream | None = None
        self._frames: Iterator[CapturedFrame] | None = None
        self._relay: RtspRelay | None = None
        self._clock = MediaClock(live=self._is_live)
        self._told_clock = False
        self._numbered = 0
        self._pacer = Pacer(self._interrupted)
        self._decimator = Decimator(camera.analysed_fps)
        self._encoder = JpegEncoder(camera.jpeg_quality, camera.max_side)
        self._gate = JpegGate(camera.jpeg_quality, camera.max_side)
        self._turner = Turner()
        self._loop_offset = 0.0
        self._media_time = 0.0
        self._pass_through = False
        self._passage: video.Passage | None = None
        self._wanted_since: float | None = None
        """A key frame is wanted, at this media time or before."""
        self._first_stamp = 0.0
        self._read_to: int | None = None
        """Of a file whose video is passed on: the time of decoding of the newest unit."""
        self._again_to: int | None = None
        """The same, of a file that was taken back to a key frame: so far it is known."""

    @property
    def skipped(self) -> int:
        return self._decimator.skipped

    @property
    def connected(self) -> bool:
        relay = self._relay
        return self._container is not None or (relay is not None and relay.answered)

    @property
    def seen(self) -> str:
        relay = self._relay
        if relay is None or not relay.answered:
            return ""
        if relay.packets or (self._container is not None and not relay.playing):
            return (
                "packets came, and no key frame: the camera's key frames are further apart than "
                "open_timeout; raise it, or let the camera send them more often"
            )
        if not relay.playing:
            return "the camera answers, and has not begun to play"
        if self._camera.transport is Transport.UDP:
            return 'the camera plays; is UDP stopped by a firewall? transport = "tcp" helps'
        return "the camera agreed to play, and sent nothing"

    @property
    def _is_live(self) -> bool:
        return self._kind is not SourceKind.FILE

    def wants_key_frame(self, since: float) -> None:
        # A live camera gives one when it gives one: RTSP has no word for it.
        if not self._is_live:
            self._wanted_since = since

    def interrupt(self) -> None:
        self._interrupted.set()
        relay = self._relay
        if relay is not None:
            relay.interrupt()

    def close(self) -> None:
        frames, self._frames = self._frames, None
        container, self._container = self._container, None
        if frames is not None:
            del frames
        if container is not None:
            container.close()
        relay, self._relay = self._relay, None
        if relay is not None:
            relay.close()

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
            reencodes=not self._pass_through and self._passage is None,
        )

    def _open_container(self) -> InputContainer:
        address = self._camera.source
        for _ in range(MAX_REDIRECTS):
            opened = self._open_at(address)
            if not isinstance(opened, str):
                return opened
            address = opened
            if not re.match("rtsps?://[^/]", address):
                break
        raise SourceError(
            SourceReason.CONNECT_FAILED, "the camera redirects to nowhere; check its address"
        )

    def _open_at(self, address: str) -> InputContainer | str:
        """The source, opened, or the address that the camera names instead."""
        opened, input_format, options = self._address(address)
        try:
            container = av.open(
                opened,
                "r",
                format=input_format,
                options=options,
                # Whether a camera that answers is given up is the state machine's to say.
                timeout=(
                    OPENING_STRETCH * self._camera.open_timeout,
                    self._camera.read_timeout,
                ),
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            relay, self._relay = self._relay, None
            if relay is not None:
                relay.close()
                if relay.redirect:
                    return relay.redirect
            raise self._as_source_error(error, "opened", relay) from None
        try:
            stream = self._best_stream(container)
            if stream is None:
                raise SourceError(
                    SourceReason.NO_VIDEO,
                    "the source has no video stream",
                    Outlook.PASSING if self._is_live else Outlook.HOPELESS,
                )
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
                Outlook.UNPROVEN,
            )
        name = stream.codec_context.name
        self._pass_through = name == "mjpeg" and not self._camera.max_side
        self._passage = self._read_to = self._again_to = None
        known = name in video.ENCODINGS
        if self._camera.passes_video and (known or (self._must_pass and not self._pass_through)):
            try:
                self._passage = video.Passage(
                    stream, patient=self._is_live, upright=not self._is_live
                )
            except video.NotPassableError as why:
                self._decode_instead(why)
        return container

    @property
    def _must_pass(self) -> bool:
        return self._camera.video is VideoChoice.PASS

    def _decode_instead(self, why: video.NotPassableError) -> None:
        self._passage = None
        if self._must_pass:
            self._close_container()
            raise SourceError(
                SourceReason.NOT_PASSABLE,
                f'the video cannot be passed on: {why.message}; video = "auto" decodes it here',
                Outlook.UNPROVEN,
            )
        log.info("the video is decoded here", camera=self._camera.name, why=why.message)

    @staticmethod
    def _best_stream(container: InputContainer) -> VideoStream | None:
        """The film, not its cover: no attached picture, no single frame, the default track,
        the larger one, the first one."""

        def rank(stream: VideoStream) -> tuple[bool, bool, bool, int, int]:
            marks = stream.disposition
            return (
                not marks & (Disposition.attached_pic | Disposition.timed_thumbnails),
                stream.frames != 1,
                bool(marks & Disposition.default),
                stream.codec_context.width * stream.codec_context.height,
                -stream.index,
            )

        return max(container.streams.video, key=rank, default=None)

    def _address(self, address: str) -> tuple[str, str | None, dict[str, str]]:
        camera = self._camera
        match self._kind:
            case SourceKind.RTSP:
                self._relay = relay = RtspRelay(camera, self._credentials)
                if self._interrupted.is_set():
                    raise SourceError(SourceReason.INTERRUPTED, "the source was told to stop")
                try:
                    url = relay.open(address)
                except SourceError:
                    relay.close()
                    raise
                udp = camera.transport is Transport.UDP and not address.startswith("rtsps")
                options = {
                    "rtsp_transport": "udp" if udp else "tcp",
                    "allowed_media_types": "video",
                    "timeout": str(int(camera.read_timeout * 1e6)),
                    # A camera says in its SDP what it sends: no looking for seconds, and no
                    # waiting for twenty frames of one that sends one in ten seconds.
                    "probesize": "32768",
                    "analyzeduration": "100000",
                    "fpsprobesize": "0",
                    "max_delay": "500000",
                }
                if udp:
                    options["buffer_size"] = str(2 * 1024 * 1024)
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
                        SourceReason.NOT_FOUND, "the file does not exist", Outlook.HOPELESS
                    )
                # A playlist or an SDP file must not make us open anything but files.
                return f"file:{path.absolute()}", None, {"protocol_whitelist": "file"}

    def _as_source_error(
        self, error: BaseException, doing: str, relay: RtspRelay | None = None
    ) -> SourceError:
        """Our own words for FFmpeg's errors, whose text repeats the address."""
        if self._interrupted.is_set():
            return SourceError(SourceReason.INTERRUPTED, "the source was told to stop")
        relay = relay or self._relay
        if relay is not None and relay.error is not None and not relay.playing:
            return relay.error
        # A file will not change; whatever lives may.
        outlook = Outlook.PASSING if self._is_live else Outlook.HOPELESS
        match error:
            case av.error.InvalidDataError() if relay is not None and not relay.answered:
                return SourceError(SourceReason.FORMAT_INVALID, "the camera does not speak RTSP")
            case TimeoutError() | av.error.ExitError():
                return SourceError(
                    SourceReason.TIMED_OUT,
                    f"the source could not be {doing} in time; "
                    + (self.seen or "is it on and reachable?"),
                )
            case PermissionError():
                return SourceError(
                    SourceReason.PERMISSION_DENIED,
                    "the source may not be read; check its permissions",
                    outlook,
                )
            case FileNotFoundError():
                return SourceError(SourceReason.NOT_FOUND, "the source does not exist", outlook)
            case ConnectionError():
                return SourceError(
                    SourceReason.CONNECT_FAILED, "the camera refuses or broke the connection"
                )
            case av.error.InvalidDataError():
                return SourceError(
                    SourceReason.FORMAT_INVALID,
                    "the source is no video that can be read",
                    outlook,
                )
            case av.error.EOFError():
                return SourceError(SourceReason.DISCONNECTED, "the camera ended the stream")
            case _:
                kind = type(error).__name__
                return SourceError(
                    SourceReason.CONNECT_FAILED,
                    f"the source could not be {doing} ({kind})",
                    outlook,
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
            if self._is_live or self._interrupted.is_set():
                return
            if last is None:
                raise SourceError(
                    SourceReason.UNDECODABLE, "not one frame could be decoded", Outlook.HOPELESS
                )
            if not self._camera.loop:
                return
            # One frame's time between the last frame of one round and the first of the
            # next, or the tracker sees two frames at one instant.
            stream = self._stream
            rate = float(stream.average_rate or 25) if stream is not None else 25.0
            self._loop_offset = last.media_time + 1.0 / rate
            self._clock = MediaClock(live=False)
            self._numbered = 0
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
        before: bytes | None = None
        while not self._interrupted.is_set():
            try:
                packet = next(packets, None)
            except (av.FFmpegError, OSError) as error:
                raise self._as_source_error(error, "read") from None
            if packet is None:
                return
            differs = False
            if self._is_live and not self._clock.moves:
                data = bytes(packet)
                differs, before = before is not None and data != before, data
            if stream.codec_context.name == "mjpeg" and packet.size:
                yield from self._pictures(packet, differs)
                continue
            if self._passage is not None:
                yield from self._units(self._passage, packet, differs)
                if self._passage is not None:
                    self._go_back(container, stream)
                    continue
            try:
                frames = stream.decode(packet)
                bad = 0
            except av.error.InvalidDataError:
                # Normal at the start in the middle of a group of pictures and after
                # packet loss: the next key frame mends it.
                bad += 1
                if bad >= MAX_BAD_PACKETS:
                    # A file would be the same again, from its beginning.
                    raise SourceError(
                        SourceReason.UNDECODABLE,
                        "nothing could be decoded for a long time; check the "
                        + ("camera's codec" if self._is_live else "file"),
                        Outlook.PASSING if self._is_live else Outlook.HOPELESS,
                    ) from None
                continue
            except (av.FFmpegError, OSError) as error:
                raise self._as_source_error(error, "decoded") from None
            for frame in frames:
                if self._take(frame.time, differs) is None:
                    continue
                try:
                    data = self._encoder.encode(self._upright(frame))
                except (av.FFmpegError, ValueError) as error:
                    raise self._as_source_error(error, "encoded") from None
                yield CapturedFrame(data, self._media_time, time.time())

    def _upright(self, frame: VideoFrame) -> VideoFrame:
        """A telephone's video as it was held; a camera's as it hangs."""
        return frame if self._is_live else self._turner.upright(frame, orientation_of(frame))

    def _units(
        self, passage: video.Passage, packet: Packet[VideoStream], differs: bool
    ) -> Iterator[CapturedFrame]:
        """A packet of video that is passed on is an access unit, or part of none."""
        decoded_at = packet.dts
        try:
            unit = passage.take(packet)
        except video.NotPassableError as why:
            self._decode_instead(why)
            return
        except (av.FFmpegError, OSError) as error:
            raise self._as_source_error(error, "read") from None
        if unit is None:
            return
        if self._again_to is None or decoded_at is None or decoded_at > self._again_to:
            self._again_to = None
            # All of them go on: the server passes over what is not to be analysed.
            if self._read_to is None:
                self._first_stamp = unit.stamp or 0.0
            self._advance(unit.stamp, differs)
            self._read_to = decoded_at
        yield CapturedFrame(
            unit.data, self._media_time, time.time(), video=unit.encoding, is_key=unit.is_key
        )

    def _go_back(self, container: InputContainer, stream: VideoStream) -> None:
        """To the key frame behind which a file was read, where the server wants one."""
        since, self._wanted_since = self._wanted_since, None
        if since is None or self._passage is None:
            return
        if self._read_to is None or self._again_to is not None or stream.time_base is None:
            return
        moment = self._first_stamp + max(0.0, since - self._loop_offset)
        try:
            container.seek(int(moment / stream.time_base), stream=stream)
        except (av.FFmpegError, OSError):
            return  # a file that cannot be sought in: the next key frame comes by itself
        self._passage.restart()
        self._again_to = self._read_to

    def _pictures(self, packet: Packet[VideoStream], differs: bool) -> Iterator[CapturedFrame]:
        """A packet of MJPEG is a picture, and passes through the gate for pictures."""
        stamp = packet.pts
        seconds = float(stamp * packet.time_base) if stamp is not None else None
        if self._take(seconds, differs) is None:
            return
        taken = self._gate.take(bytes(packet))
        if isinstance(taken, Refusal):
            yield CapturedFrame(b"", self._media_time, time.time(), taken)
        else:
            yield CapturedFrame(taken, self._media_time, time.time())

    def _take(self, stamp: float | None, differs: bool) -> float | None:
        """Advance the media clock; the frame's media time, or ``None`` to pass it over."""
        return self._advance(stamp, differs, self._decimator.wants)

    def _advance(
        self, stamp: float | None, differs: bool, wants: Callable[[float], bool] = lambda _: True
    ) -> float | None:
        if stamp is None and self._kind is SourceKind.RTSP and not self._numbered:
            stamp = 0.0  # FFmpeg counts from the first packet, and does not say so with it
        if not self._is_live:
            # Files without time stamps play at their nominal rate.
            rate = self._stream.average_rate if self._stream is not None else None
            stamp = self._numbered / float(rate or 25) if stamp is None else stamp
        self._numbered += 1
        clock = self._clock
        moment = clock.media_time(stamp, time.monotonic(), differs=differs)
        if clock.is_useless and not self._told_clock:
            self._told_clock = True
            log.info(
                "the camera's time stamps stand still; arrival counts", camera=self._camera.name
            )
        media_time = self._loop_offset + moment
        if not wants(media_time):
            return None
        if not self._is_live and self._camera.pace is Pace.REALTIME:
            self._pacer.wait_for(media_time)
        self._media_time = media_time
        return media_time
