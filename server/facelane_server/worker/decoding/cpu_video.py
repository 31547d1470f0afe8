"""Video decoded by the CPU (FFmpeg's own decoders, by PyAV)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import av
import av.logging
import numpy as np

from facelane_server import annexb, limits
from facelane_server.domain import Encoding, FacelaneError, Reason
from facelane_server.models.api import U8
from facelane_server.worker.decoding.pictures import enough_memory
from facelane_server.worker.decoding.video import Shown

_NAMES: Final = {Encoding.H264: "h264", Encoding.H265: "hevc"}
_BT709, _UNSPECIFIED, _BT470BG, _SMPTE170M, _SMPTE240M, _BT2020 = 1, 2, 5, 6, 7, 9
_MATRICES: Final = {
    _BT709: 1, _BT470BG: 5, _SMPTE170M: 5, _SMPTE240M: 7, _BT2020: 9, _BT2020 + 1: 9,
}  # fmt: skip
"""Of FFmpeg's colour spaces: how its scaler calls their matrix."""
_FULL_RANGE: Final = 2
_HD_HEIGHT: Final = 576


@dataclass(frozen=True, slots=True)
class _Picture:
    tag: int
    frame: av.VideoFrame
    reformatter: av.video.reformatter.VideoReformatter

    def keep(self) -> None:
        """It does: its frame is its own."""

    def read(self) -> U8:
        """By the matrix and the range that the video names; where it names none, as players do:
        BT.709 from HD on, BT.601 below, studio range."""
        frame = self.frame
        matrix = _MATRICES.get(int(frame.colorspace))
        if matrix is None:
            matrix = 1 if frame.height > _HD_HEIGHT else 5
        full = int(frame.color_range) == _FULL_RANGE or frame.format.name.startswith("yuvj")
        bgr = self.reformatter.reformat(
            frame,
            format="bgr24",
            src_colorspace=matrix,
            dst_colorspace=5,
            src_color_range=2 if full else 1,
            dst_color_range=2,
            interpolation="BILINEAR",
        )
        return np.ascontiguousarray(bgr.to_ndarray(), np.uint8)


class CpuDecoder:
    """See ``VideoDecoder``."""

    resets_at_keys = False

    def __init__(self, codec: Encoding, found: annexb.Format, threads: int) -> None:
        self._codec = codec
        self._threads = threads
        self._pixels = found.width * found.height
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._context = self._open()
        self.reorders = found.reorder > 0

    def _open(self) -> av.VideoCodecContext:
        context = av.CodecContext.create(_NAMES[self._codec], "r")
        assert isinstance(context, av.VideoCodecContext)
        # Threads by slices alone: those by frames hold pictures back.
        context.thread_count = min(self._threads, limits.MAX_DECODER_THREADS)
        context.thread_type = "SLICE"
        context.options = {
            "err_detect": "explode",
            "max_pixels": str(limits.MAX_VIDEO_PIXELS + limits.MAX_SIDE * 64),
        }
        return context

    def decode(self, unit: bytes, tag: int) -> Sequence[Shown]:
        packet: av.Packet[Any] = av.Packet(unit)
        packet.pts = tag
        return self._run(packet)

    def drain(self) -> Sequence[Shown]:
        shown = self._run(None)
        self._context.flush_buffers()
        return shown

    def _run(self, packet: av.Packet[Any] | None) -> Sequence[Shown]:
        try:
            frames = self._context.decode(packet)
        except av.MemoryError:
            raise MemoryError from None
        except (av.FFmpegError, ValueError) as error:
            enough_memory(self._pixels)
            raise self._corrupt(type(error).__name__) from None
        self.reorders = self.reorders or bool(self._context.has_b_frames)
        for frame in frames:
            if frame.is_corrupt or frame.pts is None:
                raise self._corrupt("parts of it are missing")
            if frame.interlaced_frame:
                raise FacelaneError(
                    Reason.VIDEO_UNSUPPORTED,
                    f"the {self._codec.value} video is interlaced; send progressive video, or let "
                    "the bridge decode it",
                )
        return [_Picture(frame.pts or 0, frame, self._reformatter) for frame in frames]

    def reset(self) -> None:
        if self._context.is_open:
            self._context.flush_buffers()

    def close(self) -> None:
        """The context goes with its last reference."""
        del self._context

    def _corrupt(self, why: str) -> FacelaneError:
        return FacelaneError(
            Reason.PICTURE_CORRUPT,
            f"the {self._codec.value} access unit cannot be decoded ({why}); a key frame is needed",
        )


class CpuEngine:
    """See ``VideoEngine``. ``threads``: of one decoder, at most two."""

    opens_slowly = False
    waits = False

    def __init__(self, threads: int = 1) -> None:
        av.logging.set_level(None)  # what it has to say of broken streams comes as an error
        self._threads = threads

    def settle_in(self) -> None:
        """There is nothing to do."""

    def open(self, codec: Encoding, found: annexb.Format, key_frame: bytes = b"") -> CpuDecoder:
        del key_frame
        return CpuDecoder(codec, found, self._threads)
