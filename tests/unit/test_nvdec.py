"""The card's video decoder behind the workers' seam, with a library that decodes nothing."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import time
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.waiting import until

from facelane_server import annexb
from facelane_server.domain import Encoding, FacelaneError, Reason
from facelane_server.worker.decoding import nvdec
from facelane_server.worker.decoding.device_pictures import DevicePictures
from facelane_server.worker.decoding.nvdec import NvdecDecoder, NvdecEngine
from facelane_server.worker.decoding.pixels import BT601, BT709, Layout, OnDevice
from facelane_server.worker.decoding.video import Session, Shown, VideoDecoder

HD = annexb.Format(64, 720, 8)
SMALL = annexb.Format(64, 48, 8)


class Frame:
    """NV12 in memory that the decoder takes again for its next picture."""

    def __init__(self, surface: torch.Tensor, pts: int, read: list[int]) -> None:
        self._surface, self._pts, self._read = surface, pts, read

    def getPTS(self) -> int:
        return self._pts

    def __dlpack__(self, **options: Any) -> Any:
        self._read.append(self._pts)
        return self._surface.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self._surface.__dlpack_device__()


class Opened:
    def __init__(self, library: Library, width: int, height: int) -> None:
        self._library = library
        self._surface = torch.zeros((height * 3 // 2, width), dtype=torch.uint8)
        self._held: list[int] = []

    def Decode(self, packet: Any) -> list[Frame]:
        data = ctypes.string_at(packet.bsl_data, packet.bsl) if packet.bsl else b""
        self._library.fed.append((data, packet.decode_flag))
        if data.startswith(b"broken"):
            raise RuntimeError("cuvidParseVideoData returned an error")
        if data == b"poison":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if not data:
            held, self._held = self._held, []
            return [Frame(self._surface, pts, self._library.read) for pts in held]
        if data.startswith(b"held"):
            self._held.append(packet.pts)
            return []
        self._surface[:] = data[-1]
        return [Frame(self._surface, packet.pts, self._library.read)]


class Library:
    """In PyNvVideoCodec's place."""

    cudaVideoCodec = SimpleNamespace(H264="h264", HEVC="hevc")  # noqa: N815
    DisplayDecodeLatencyType = SimpleNamespace(LOW="low")
    VideoPacketFlag = SimpleNamespace(ENDOFPICTURE=1, ENDOFSTREAM=2)
    PacketData = SimpleNamespace

    def __init__(self) -> None:
        self.fed: list[tuple[bytes, int]] = []
        self.read: list[int] = []
        self.opened: list[tuple[str, int, int]] = []
        self.streams: list[int] = []
        self.refuse: str | None = None

    def CreateDecoder(self, **options: Any) -> Opened:
        if self.refuse:
            raise RuntimeError(self.refuse)
        self.streams.append(options["cudastream"])
        self.opened.append((options["codec"], options["maxwidth"], options["maxheight"]))
        return Opened(self, options["maxwidth"], options["maxheight"])


class Other:
    """The engine that takes what the card does not."""

    opens_slowly = False
    waits = False

    def settle_in(self) -> None:
        pass

    def __init__(self) -> None:
        self.asked: list[annexb.Format] = []

    def open(self, codec: Encoding, found: annexb.Format, key_frame: bytes = b"") -> VideoDecoder:
        self.asked.append(found)
        return NoDecoder()


class NoDecoder:
    reorders = False
    resets_at_keys = False

    def decode(self, unit: bytes, tag: int) -> Sequence[Shown]:
        if unit.startswith(b"broken for all"):
            raise FacelaneError(Reason.PICTURE_CORRUPT, "broken")
        return []

    def drain(self) -> Sequence[Shown]:
        return []

    def reset(self) -> None: ...

    def close(self) -> None: ...


def engine() -> tuple[NvdecEngine, Library, Other]:
    library, other = Library(), Other()
    return NvdecEngine(DevicePictures("cpu"), other, library), library, other


def test_the_library_copies_on_the_stream_that_pictures_arrive_on() -> None:
    made, library, _ = engine()
    made.open(Encoding.H264, HD)
    made.pictures.stream = SimpleNamespace(cuda_stream=41)  # type: ignore[assignment]
    made.open(Encoding.H264, HD)
    assert library.streams == [0, 41]


def test_pictures_stay_what_they_were_when_the_decoder_goes_on() -> None:
    made, library, _ = engine()
    decoder = made.open(Encoding.H264, HD)
    assert isinstance(decoder, NvdecDecoder)
    shown = []
    for tag, value in enumerate((7, 9)):
        (one,) = decoder.decode(bytes([0, 0, 1, value]), tag)
        one.keep()
        shown.append(one)
    assert [one.tag for one in shown] == [0, 1]
    first, second = (one.read() for one in shown)
    assert isinstance(first, OnDevice)
    assert isinstance(second, OnDevice)
    assert (first.layout, first.height, first.width) == (Layout.NV12, 720, 64)
    assert bool((first.pixels == 7).all())
    assert bool((second.pixels == 9).all())
    assert first.colours == BT709
    assert library.fed == [(b"\0\0\1\7", 1), (b"\0\0\1\t", 1)]
    small = made.open(Encoding.H265, SMALL).decode(b"x\5", 0)[0].read()
    assert isinstance(small, OnDevice)
    assert small.colours == BT601


def test_of_what_is_decoded_only_what_somebody_wants_is_copied() -> None:
    made, library, _ = engine()
    session = Session(Encoding.H264, made.open(Encoding.H264, SMALL), SMALL)
    for value in range(4):
        session.feed([bytes([0, 0, 1, value])])
    assert session.decode(time.monotonic, math.inf, 3)
    assert library.read == [3]
    shown = session.picture(3)
    assert shown is not None
    session.feed([bytes([0, 0, 1, 9])])
    assert session.decode(time.monotonic, math.inf, 4)
    found = shown.read()
    assert isinstance(found, OnDevice)
    assert bool((found.pixels == 3).all())
    assert library.read == [3, 4]


def test_what_is_held_back_comes_when_it_is_drained_and_is_let_go_when_reset() -> None:
    made, library, _ = engine()
    decoder = made.open(Encoding.H264, SMALL)
    session = Session(Encoding.H264, decoder, annexb.Format(64, 48, 8, 2))
    for unit in (b"held0", b"held1"):
        session.feed([unit])
    assert session.decode(time.monotonic, math.inf)
    assert session.picture(0) is None
    session.drain()
    assert session.picture(1) is not None
    decoder.decode(b"held2", 2)
    decoder.reset()
    assert decoder.drain() == []
    assert [flag for data, flag in library.fed if not data] == [2, 2, 2]


def test_a_group_follows_another_without_the_end_of_a_stream_between() -> None:
    made, library, _ = engine()
    session = Session(Encoding.H264, made.open(Encoding.H264, SMALL), SMALL)
    for group in range(3):
        if group:
            session.begin(SMALL)
        for number in range(2):
            session.feed([bytes([0, 0, 1, 10 * group + number])])
            assert session.decode(time.monotonic, math.inf)
            shown = session.picture(number)
            assert shown is not None
            found = shown.read()
            assert isinstance(found, OnDevice)
            assert bool((found.pixels == 10 * group + number).all())
    assert all(data for data, _ in library.fed)
    session.feed([b"broken"])
    with pytest.raises(FacelaneError):
        session.decode(time.monotonic, math.inf)
    session.begin(SMALL)
    assert library.fed[-1] == (b"", Library.VideoPacketFlag.ENDOFSTREAM)


def test_what_a_group_before_held_back_is_nobodys_picture() -> None:
    made, _, _ = engine()
    session = Session(Encoding.H264, made.open(Encoding.H264, SMALL), SMALL)
    session.feed([b"held0"])
    assert session.decode(time.monotonic, math.inf)
    session.begin(SMALL)
    session.feed([b"held1"])
    assert session.decode(time.monotonic, math.inf)
    session.drain()
    shown = session.picture(0)
    assert shown is not None
    assert shown.tag == 1


def test_a_broken_unit_is_its_own_fault_and_a_poisoned_card_is_not() -> None:
    made, _, _ = engine()
    decoder = made.open(Encoding.H264, SMALL)
    with pytest.raises(FacelaneError, match="a key frame is needed") as caught:
        decoder.decode(b"broken", 0)
    assert caught.value.reason is Reason.PICTURE_CORRUPT
    assert decoder.decode(b"x\3", 1)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        decoder.decode(b"poison", 2)


def test_what_the_card_does_not_take_another_decodes_and_it_is_said_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    made, library, other = engine()
    unfit = [annexb.Format(64, 48, 10), annexb.Format(63, 48, 8), annexb.Format(63, 48, 8)]
    for found in unfit:
        assert isinstance(made.open(Encoding.H265, found), NoDecoder)
    library.refuse = "MBCount not supported on this GPU"
    assert isinstance(made.open(Encoding.H264, SMALL), NoDecoder)
    assert other.asked == [*unfit, SMALL]
    said = capfd.readouterr().err
    assert said.count("video is decoded on the host") == 3
    assert "MBCount" in said
    library.refuse = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError):
        made.open(Encoding.H264, SMALL)


def test_its_first_key_frame_says_whether_the_card_takes_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    made, library, _ = engine()
    assert isinstance(made.open(Encoding.H264, SMALL, b"key"), NvdecDecoder)
    assert library.fed == [(b"key", 1)]
    assert isinstance(made.open(Encoding.H264, SMALL, b"broken for all"), NvdecDecoder)
    assert not capfd.readouterr().err
    assert isinstance(made.open(Encoding.H264, SMALL, b"broken"), NoDecoder)
    assert "video is decoded on the host" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="illegal memory access"):
        made.open(Encoding.H264, SMALL, b"poison")


def test_the_session_of_a_lane_that_ends_is_closed_and_goes_to_nobody() -> None:
    made, library, _ = engine()
    decoder = made.open(Encoding.H264, SMALL)
    assert isinstance(decoder, NvdecDecoder)
    gone = weakref.ref(decoder._opened)
    decoder.close()
    decoder.close()
    until(lambda: gone() is None, what="its end")
    assert all(data for data, _ in library.fed)


def test_without_a_card_or_the_library_another_decodes(capfd: pytest.CaptureFixture[str]) -> None:
    other = Other()
    assert nvdec.engine_for(None, other) is other
    assert nvdec.engine_for(DevicePictures("cpu"), other) is other
    on_card: Any = SimpleNamespace(device=torch.device("cuda:0"))
    if importlib.util.find_spec("PyNvVideoCodec") is None:
        assert nvdec.engine_for(on_card, other) is other
        assert "install facelane[nvdec]" in capfd.readouterr().err
