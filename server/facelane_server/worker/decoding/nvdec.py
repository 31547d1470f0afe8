"""Video decoded by the card (NVDEC, by PyNvVideoCodec): pictures are NV12 and stay there.

What the card is not given, or does not take, another engine decodes, and the journal says so once
for each reason: 10 bits, odd sides, a format beyond its limits, no memory for one more session.

A session takes 16 MiB of the card at 720p, 26 (H.264) or 52 (H.265) at 1080p. It is made by the
first key frame, which takes 50 ms, one session after the other however many threads ask; closing
one takes 25, so a thread of its own does that. None is given to another lane: where something is
missing, a decoder makes it up from what it has seen before.

A decoder's pictures lie in its own memory, which its next ones take: those that somebody wants are
copied at once, and what lies between them costs its decoding alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from torch import Tensor
from torch.utils import dlpack

from facelane_server import annexb
from facelane_server.domain import Encoding, FacelaneError, Reason
from facelane_server.worker.decoding.device_pictures import DevicePictures
from facelane_server.worker.decoding.pixels import BT601, BT709, OnDevice
from facelane_server.worker.decoding.video import Shown, VideoDecoder, VideoEngine
from facelane_server.worker.faults import Fault, classify
from facelane_server.worker.journal import log_event

THREADS: Final = 8
"""That wait for the card's decoder; its engines work side by side."""
_HD_HEIGHT: Final = 576
_Kind = tuple[Encoding, int, int]


class _Picture:
    """Of ``decoder``, whose memory ``frame`` lies in until it is kept."""

    def __init__(self, decoder: NvdecDecoder, frame: Any) -> None:
        self.tag = int(frame.getPTS())
        self._decoder = decoder
        self._frame = frame
        self._kept: OnDevice | None = None

    def keep(self) -> None:
        self.read()

    def read(self) -> OnDevice:
        if self._kept is None:
            self._kept, self._frame = self._decoder.kept(self._frame), None
        return self._kept


class NvdecDecoder:
    """See ``VideoDecoder``. ``opened``: of PyNvVideoCodec."""

    resets_at_keys = True

    def __init__(self, engine: NvdecEngine, kind: _Kind, opened: Any, found: annexb.Format) -> None:
        self._engine = engine
        self._kind = kind
        self._opened = opened
        self.reorders = found.reorder > 0

    def decode(self, unit: bytes, tag: int) -> Sequence[Shown]:
        return self._run(unit, tag)

    def drain(self) -> Sequence[Shown]:
        return self._run(b"", 0)

    def reset(self) -> None:
        """What is held back comes out, and is let go."""
        self._run(b"", 0)

    def close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            self._engine.left([opened])

    def _run(self, unit: bytes, tag: int) -> Sequence[Shown]:
        packet = self._engine.library.PacketData()
        packet.bsl = len(unit)
        packet.bsl_data = ctypes.cast(ctypes.c_char_p(unit), ctypes.c_void_p).value or 0
        packet.pts = tag
        flags = self._engine.library.VideoPacketFlag
        packet.decode_flag = flags.ENDOFPICTURE if unit else flags.ENDOFSTREAM
        with self._blamed():
            return [_Picture(self, frame) for frame in self._opened.Decode(packet)]

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        """What goes wrong in here is the access unit's fault, unless it costs the device."""
        try:
            yield
        except FacelaneError:
            raise
        except Exception as error:
            if classify(error) is not Fault.ORDINARY:
                raise
            raise FacelaneError(
                Reason.PICTURE_CORRUPT,
                f"the {self._kind[0].value} access unit cannot be decoded "
                f"({type(error).__name__}); a key frame is needed",
            ) from error

    def kept(self, frame: Any) -> OnDevice:
        """A copy of its own of what was decoded last. Raises FacelaneError."""
        codec, width, height = self._kind
        arriving = self._engine.pictures.stream
        with self._blamed(), self._engine.pictures.arriving():
            # torch would ask for the stream itself, and first for a version that there is none of.
            lent = frame.__dlpack__(stream=arriving.cuda_stream if arriving is not None else None)
            surface: Tensor = dlpack.from_dlpack(lent).clone()
        if surface.shape != (height * 3 // 2, width):
            raise FacelaneError(
                Reason.VIDEO_UNSUPPORTED,
                f"the {codec.value} video's pictures are not of the size that it names; let the "
                "bridge decode it",
            )
        return OnDevice.nv12(surface, height, BT709 if height > _HD_HEIGHT else BT601)


class NvdecEngine:
    """See ``VideoEngine``. ``other`` decodes what the card does not; ``library`` is
    PyNvVideoCodec, or what a test brings.

    Raises ImportError or RuntimeError where the card's decoder cannot be had.
    """

    opens_slowly = True
    waits = True

    def __init__(self, pictures: DevicePictures, other: VideoEngine, library: Any = None) -> None:
        self.library: Any = library or importlib.import_module("PyNvVideoCodec")
        self.pictures = pictures
        self._other = other
        self._told: set[str] = set()
        self._closer = ThreadPoolExecutor(1, "nvdec")

    def settle_in(self) -> None:
        self.pictures.arrive_here()

    def open(self, codec: Encoding, found: annexb.Format, key_frame: bytes = b"") -> VideoDecoder:
        if found.depth != 8:
            return self._by_other(codec, found, f"{found.depth} bits a sample")
        if found.width % 2 or found.height % 2:
            return self._by_other(codec, found, "sides that are odd")
        kind = codec, found.width, found.height
        try:
            decoder = NvdecDecoder(self, kind, self._session(kind), found)
            if key_frame:
                for picture in decoder.decode(key_frame, -1):
                    picture.keep()
        except FacelaneError as error:
            if self._is_broken(codec, found, key_frame):
                decoder.reset()  # the lane finds out
                return decoder
            return self._by_other(codec, found, error.message)
        except Exception as error:
            if classify(error) is Fault.POISONED:
                raise
            return self._by_other(codec, found, f"{type(error).__name__}: {error}")
        return decoder

    def _session(self, kind: _Kind) -> Any:
        codec, width, height = kind
        library = self.library
        codecs = library.cudaVideoCodec
        device = self.pictures.device
        # The library copies each picture out of the decoder and waits for that. On a stream without
        # priority it waits behind whatever computes, in this process and in others on the card.
        arriving = self.pictures.stream
        return library.CreateDecoder(
            gpuid=device.index or 0,
            codec=codecs.H264 if codec is Encoding.H264 else codecs.HEVC,
            cudacontext=0,
            cudastream=arriving.cuda_stream if arriving is not None else 0,
            usedevicememory=True,
            maxwidth=width,
            maxheight=height,
            latency=library.DisplayDecodeLatencyType.LOW,
        )

    def left(self, opened: list[Any]) -> None:
        """A lane has no more use for the session in ``opened``, which nobody else holds."""
        self._closer.submit(opened.clear)

    def _is_broken(self, codec: Encoding, found: annexb.Format, key_frame: bytes) -> bool:
        """Whether nobody can decode it, so it says nothing about the card."""
        decoder = self._other.open(codec, found)
        try:
            decoder.decode(key_frame, 0)
        except FacelaneError:
            return True
        finally:
            decoder.close()
        return False

    def _by_other(self, codec: Encoding, found: annexb.Format, why: str) -> VideoDecoder:
        if why not in self._told and len(self._told) < 16:
            self._told.add(why)
            log_event(
                "video is decoded on the host",
                codec=codec.value,
                width=found.width,
                height=found.height,
                cause=why,
            )
        return self._other.open(codec, found)


def engine_for(pictures: DevicePictures | None, other: VideoEngine) -> VideoEngine:
    """The card's where the model lies on one that has it."""
    if pictures is None or pictures.device.type != "cuda":
        return other
    try:
        return NvdecEngine(pictures, other)
    except (ImportError, OSError, RuntimeError) as error:
        if classify(error) is not Fault.ORDINARY:
            raise
        log_event(
            "video is decoded on the host",
            cause=f"PyNvVideoCodec cannot be had ({type(error).__name__}: {error}); "
            "install facelane[nvdec]",
        )
        return other
