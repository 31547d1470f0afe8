"""Video as access units: what a camera or a file holds, sent on without decoding.

::

    for outcome in client.analyze(access_units("rtsp://camera.local/stream1"), source_id="door"):
        ...

A picture of H.264 or H.265 takes a tenth of the bytes of a JPEG, and nothing of a processor
until the server decodes it. ``Passage`` makes the access units of one video track out of its
packets; ``access_units`` does it for whatever FFmpeg opens.

PyAV is needed (``pip install 'facelane[bridge]'``), and imported when it is used.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from facelane.errors import PictureError, Reason
from facelane.types import Encoding, Frame, Picture

if TYPE_CHECKING:
    from av.bitstream import BitStreamFilterContext
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

ENCODINGS: Final = {"h264": Encoding.H264, "hevc": Encoding.H265}
"""FFmpeg's names of the codecs that servers take."""
FORMATS: Final = frozenset({"yuv420p", "yuvj420p", "yuv420p10le"})
"""FFmpeg's names of the pixel formats that servers take: 4:2:0 of 8 and 10 bits."""
KEY_FRAMES_PASSED_OVER: Final = 3
MAX_PARAMETER_SETS: Final = 64
"""Of one kind, that are kept for key frames which come without."""

_FILTERS: Final = {Encoding.H264: "h264_mp4toannexb", Encoding.H265: "hevc_mp4toannexb"}
_START: Final = re.compile(rb"\x00\x00\x01(?=.)", re.DOTALL)
_START_CODE: Final = b"\0\0\0\1"
_OPEN_TIMEOUT: Final = 10.0
_READ_TIMEOUT: Final = 30.0


class NotPassableError(PictureError):
    """A video that servers do not take as access units: decode it, and send pictures."""

    def __init__(self, why: str) -> None:
        super().__init__(Reason.ENCODING_UNSUPPORTED, why)


# --- NAL units: pure --------------------------------------------------------------------


def _kind(head: int, encoding: Encoding) -> int:
    """The type of a NAL unit, by the first byte of its header."""
    return head & 0x1F if encoding is Encoding.H264 else head >> 1 & 0x3F


_SETS: Final = {Encoding.H264: (7, 8), Encoding.H265: (32, 33, 34)}
"""Parameter sets, in the order in which they build on each other."""
_SPS: Final = {Encoding.H264: 7, Encoding.H265: 33}
_DELIMITER: Final = {Encoding.H264: 9, Encoding.H265: 35}
_SLICES: Final = {Encoding.H264: range(1, 6), Encoding.H265: range(32)}


def head_of(data: bytes, encoding: Encoding) -> tuple[list[tuple[int, bytes]], int]:
    """The NAL units of an access unit (Annex B) before its first slice, each with its type and
    without its start code, and where the first slice's start code begins (or the end)."""
    found: list[tuple[int, bytes]] = []
    begin = -1
    kind = 0
    for match in _START.finditer(data):
        start = match.start()
        if start and data[start - 1] == 0:
            start -= 1
        if begin >= 0:
            found.append((kind, data[begin:start].rstrip(b"\0")))
        begin = match.end()
        kind = _kind(data[begin], encoding)
        if kind in _SLICES[encoding]:
            return found, start
    if begin >= 0:
        found.append((kind, data[begin:].rstrip(b"\0")))
    return found, len(data)


class ParameterSets:
    """The parameter sets of a stream, and key frames made whole with them.

    A decoder that begins, or begins anew, has nothing but the key frame: where a camera tells
    its sets once, outside of the stream (SDP, a file's header), they are put in front.
    """

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._kept: dict[int, list[bytes]] = {}

    @property
    def sequence(self) -> tuple[bytes, ...]:
        """The sequence parameter sets that hold now: another one, another format."""
        return tuple(self._kept.get(_SPS[self._encoding], ()))

    def learn(self, data: bytes) -> None:
        """Keep the sets in an access unit, or in a header of Annex B."""
        self._learn(head_of(data, self._encoding)[0])

    def _learn(self, units: list[tuple[int, bytes]]) -> None:
        for kind in _SETS[self._encoding]:
            # What comes takes the place of what was: sets are told anew as a whole.
            if told := [unit for found, unit in units if found == kind]:
                self._kept[kind] = told[:MAX_PARAMETER_SETS]

    def complete(self, data: bytes) -> bytes:
        """A key frame with all of its parameter sets. Keeps those that it brings."""
        units, slices = head_of(data, self._encoding)
        self._learn(units)
        there = {kind for kind, _ in units}
        if there.issuperset(_SETS[self._encoding]):
            return data
        order = _SETS[self._encoding]
        sets = [unit for kind in order for unit in self._kept.get(kind, ())]
        delimiter = [unit for kind, unit in units if kind == _DELIMITER[self._encoding]]
        others = [u for kind, u in units if kind not in order and u not in delimiter]
        head = b"".join(_START_CODE + unit for unit in (*delimiter, *sets, *others))
        return head + data[slices:]


# --- packets of FFmpeg's ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AccessUnit:
    """All of one picture of a video. ``stamp``: seconds on the source's own clock, never
    decreasing with a source that keeps to it; ``None`` where it tells none."""

    data: bytes
    encoding: Encoding
    is_key: bool
    stamp: float | None

    @property
    def picture(self) -> Picture:
        return Picture.access_unit(self.data, self.encoding)


class Passage:
    """Packets of one track to access units, from the first key frame on.

    The first key frame, and every one with another sequence parameter set, is decoded once to
    see what it is: what servers do not take (4:2:2, interlaced) ends in ``NotPassableError``,
    before anything of the packet is used.
    """

    def __init__(
        self, stream: VideoStream, *, patient: bool = False, upright: bool = False
    ) -> None:
        """``patient``: of a camera, whose first key frame may have come in part, a few are
        passed over. ``upright``: pictures that are to be turned are not passable. Raises
        NotPassableError: the track is neither H.264 nor H.265."""
        context = stream.codec_context
        encoding = ENCODINGS.get(context.name)
        if encoding is None:
            raise NotPassableError(f"{context.name} is neither H.264 nor H.265")
        self.encoding = encoding
        self._stream = stream
        self._sets = ParameterSets(encoding)
        self._looked_at: tuple[bytes, ...] | None = None
        self.rotation = 0
        """Degrees against the clock by which pictures are to be turned; servers do not."""
        self._upright = upright
        self._begun = False
        self._may_fail = KEY_FRAMES_PASSED_OVER if patient else 0
        self._step = 1.0 / float(stream.average_rate or stream.guessed_rate or 25)
        self._numbered: float | None = None
        self._shift = 0.0
        self._filter: BitStreamFilterContext | None = None
        header = bytes(context.extradata or b"")
        if not header or _START.match(header) or header.startswith(_START_CODE):
            self._sets.learn(header)
        else:
            from av.bitstream import BitStreamFilterContext

            # Lengths instead of start codes, as in MP4 and Matroska.
            self._filter = BitStreamFilterContext(_FILTERS[encoding], stream)

    def restart(self) -> None:
        """What follows is from another place of the source: it begins at a key frame."""
        self._begun = False
        if self._filter is not None:
            self._filter.flush()

    def take(self, packet: Packet[VideoStream]) -> AccessUnit | None:
        """The access unit in a packet, which is used up; ``None`` where there is none as yet.

        Raises NotPassableError: the packet is as it was.
        """
        if not packet.size or not (self._begun or packet.is_keyframe):
            return None
        is_key, stamp = packet.is_keyframe, self._stamp(packet)
        if is_key and not self._is_sound(packet):
            self._begun = False
            return None
        data = bytes(packet)
        if self._filter is not None:
            data = b"".join(bytes(part) for part in self._filter.filter(packet))
        if is_key:
            data = self._sets.complete(data)
        self._begun = True
        return AccessUnit(data, self.encoding, is_key, stamp) if data else None

    def _stamp(self, packet: Packet[VideoStream]) -> float | None:
        """Where pictures are shown in another order, the n-th unit stands for the n-th picture
        shown: but for a constant, that is the time of decoding."""
        shown, decoded, base = packet.pts, packet.dts, packet.time_base
        if decoded is not None:
            moment = float(decoded * base)
            if self._numbered is not None:
                self._shift, self._numbered = self._numbered + self._step - moment, None
            return moment + self._shift
        if shown is None:
            return None
        if not self._stream.codec_context.has_b_frames:
            return float(shown * base)
        # FFmpeg finds out after a few: until then they are numbered.
        before = self._numbered
        self._numbered = float(shown * base) if before is None else before + self._step
        return self._numbered

    def _is_sound(self, packet: Packet[VideoStream]) -> bool:
        """Decode a key frame to see what it is, where that is not known. False: pass it over."""
        if self._filter is None:
            self._sets.learn(bytes(packet))
        if self._looked_at == (self._sets.sequence if self._filter is None else ()):
            return True
        import av

        context = self._stream.codec_context
        frames = []
        with contextlib.suppress(av.FFmpegError):
            frames = [*context.decode(packet), *context.decode(None)]
        context.flush_buffers()
        if not frames and self._may_fail:
            self._may_fail -= 1
            return False
        if not frames:
            raise NotPassableError("its key frames cannot be decoded by themselves")
        frame = frames[0]
        if frame.format.name not in FORMATS:
            kind = frame.format.name
            raise NotPassableError(f"its pictures are {kind}, not 4:2:0 of 8 or 10 bits")
        if any(shown.interlaced_frame for shown in frames):
            raise NotPassableError("it is interlaced")
        self.rotation = frame.rotation
        if self._upright and self.rotation:
            raise NotPassableError("its pictures lie on their side")
        self._looked_at = self._sets.sequence if self._filter is None else ()
        return True


def access_units(
    source: str | os.PathLike[str] | InputContainer, *, live: bool | None = None
) -> Iterator[Frame]:
    """A source's video as frames to send: for ``Client.analyze``, or one by one.

    ``source``: a path, an address (``rtsp://…``), or a container that PyAV has opened, which
    stays open. Of several tracks the first is taken that is no attached picture. ``live``: the
    frames carry the time at which they came; by itself for addresses.

    Every frame goes into one stream, in order, none left out. ``stream_offset`` is the source's
    own clock, in seconds from the first key frame on. A telephone's note of how its video is to be
    turned is lost: servers do not turn pictures.

    Raises:
        ImportError: PyAV is not installed.
        OSError: the source cannot be opened, or broke off (PyAV's errors are of this kind).
        PictureError: ENCODING_UNSUPPORTED: no video, neither H.264 nor H.265, not 4:2:0, or
            interlaced. Decode it (``frame.to_ndarray``), and send ``Picture.raw`` or JPEG.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("video needs PyAV: pip install 'facelane[bridge]'") from error
    if not isinstance(source, (str, os.PathLike)):
        yield from _units(source, bool(live))
        return
    address = os.fspath(source)
    is_address = "://" in address
    options = {"rtsp_transport": "tcp"} if address.startswith(("rtsp:", "rtsps:")) else {}
    opened = address if is_address else f"file:{Path(address).absolute()}"
    timeout = (_OPEN_TIMEOUT, _READ_TIMEOUT)
    try:
        container = av.open(opened, "r", options=options, timeout=timeout)
    except (av.FFmpegError, OSError) as error:
        # FFmpeg's own text repeats the address, and what secrets it holds.
        why = error.strerror or type(error).__name__
        raise OSError(error.errno, f"the video cannot be opened: {why}") from None
    with container:
        yield from _units(container, is_address if live is None else live)


def _units(container: InputContainer, live: bool) -> Iterator[Frame]:
    from av.stream import Disposition

    films = (t for t in container.streams.video if not t.disposition & Disposition.attached_pic)
    stream = next(films, None)
    if stream is None:
        raise NotPassableError("the source has no video")
    passage = Passage(stream, patient=live)
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    first: float | None = None
    last = 0.0
    units = (unit for packet in container.demux(stream) if (unit := passage.take(packet)))
    for number, unit in zip(itertools.count(), units):
        stamp = number / rate if unit.stamp is None else unit.stamp
        first = stamp if first is None else first
        last = max(last, stamp - first)
        arrived = datetime.fromtimestamp(time.time(), UTC) if live else None
        yield Frame(unit.picture, last, arrived)
