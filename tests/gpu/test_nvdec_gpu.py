"""Video decoded by the card against the CPU's decoder."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from tests.fakes.access_units import clip

from facelane_server import annexb
from facelane_server.domain import Encoding
from facelane_server.worker.decoding.cpu_video import CpuEngine
from facelane_server.worker.decoding.device_pictures import DevicePictures
from facelane_server.worker.decoding.pixels import OnDevice
from facelane_server.worker.decoding.video import Session, Shown, VideoEngine

nvdec = pytest.importorskip(
    "facelane_server.worker.decoding.nvdec", reason="the card's decoder cannot be imported"
)
pytest.importorskip("PyNvVideoCodec", reason="facelane[nvdec] is not installed")
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

GPU = "cuda:0"


def bgr(picture: Shown, pictures: DevicePictures) -> np.ndarray:
    read = picture.read()
    if not isinstance(read, OnDevice):
        return np.asarray(read)
    canvas = torch.zeros((1, read.height, read.width, 3), dtype=torch.uint8, device=GPU)
    pictures.place([read], [(read.height, read.width)], canvas)
    return canvas[0].cpu().numpy()


def shown(
    engine: VideoEngine, encoding: Encoding, units: list[bytes], pictures: DevicePictures
) -> dict[int, np.ndarray]:
    """BGR of every picture, by its number."""
    found = annexb.examine(units[0], encoding, 0).format
    assert found is not None
    session = Session(encoding, engine.open(encoding, found), found)
    seen: dict[int, np.ndarray] = {}

    def take(upto: int) -> None:
        for number in range(upto):
            if number in seen:
                continue
            picture = session.picture(number)
            if picture is None:
                return
            seen[number] = bgr(picture, pictures)

    for i, unit in enumerate(units):
        session.feed([unit])
        assert session.decode(time.monotonic, math.inf)
        take(i + 1)
    session.drain()
    take(len(units))
    return seen


@pytest.mark.parametrize("encoding", [Encoding.H264, Encoding.H265])
@pytest.mark.parametrize("bframes", [0, 3])
@pytest.mark.parametrize("size", [(320, 240), (1920, 1080)])
def test_the_card_shows_what_the_cpu_shows(
    encoding: Encoding, bframes: int, size: tuple[int, int]
) -> None:
    units = clip(encoding, 10, size=size, bframes=bframes)[:10]
    pictures = DevicePictures(GPU)
    engine = nvdec.NvdecEngine(pictures, CpuEngine())
    expected = shown(CpuEngine(), encoding, units, pictures)
    found = shown(engine, encoding, units, pictures)
    assert len(expected) == 10
    assert found.keys() == expected.keys()
    for number, picture in expected.items():
        assert np.abs(found[number].astype(int) - picture.astype(int)).mean() <= 3.0
    # Pictures in a row are not the same, or this says nothing about their order.
    assert np.abs(expected[0].astype(int) - expected[1].astype(int)).mean() > 0.2


@pytest.mark.parametrize("bframes", [0, 3])
def test_only_wanted_pictures_are_copied_and_they_outlast_what_is_decoded_next(
    bframes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = clip("h264", 24, size=(320, 240), bframes=bframes)[:24]
    pictures = DevicePictures(GPU)
    engine = nvdec.NvdecEngine(pictures, CpuEngine())
    expected = shown(CpuEngine(), Encoding.H264, units, pictures)
    found = annexb.examine(units[0], Encoding.H264, 0).format
    assert found is not None
    copied = []
    kept = nvdec.NvdecDecoder.kept

    def counted(decoder: object, frame: object) -> OnDevice:
        copied.append(frame)
        return kept(decoder, frame)

    monkeypatch.setattr(nvdec.NvdecDecoder, "kept", counted)
    session = Session(Encoding.H264, engine.open(Encoding.H264, found), found)
    taken: dict[int, Shown] = {}
    fed = 0
    for wanted in (3, 7, 11, 15, 19):
        while (picture := session.picture(wanted) if fed > wanted else None) is None:
            session.feed([units[fed]])
            fed += 1
            assert session.decode(time.monotonic, math.inf, wanted)
        taken[wanted] = picture
    while fed < len(units):
        session.feed([units[fed]])
        fed += 1
        assert session.decode(time.monotonic, math.inf, len(units))
    for wanted, picture in taken.items():
        apart = np.abs(bgr(picture, pictures).astype(int) - expected[wanted].astype(int)).mean()
        assert apart <= 3.0
    # Those shown beside a wanted one may be wanted next.
    assert len(taken) <= len(copied) <= len(taken) * (1 + bframes)
    session.close()


def test_a_decoder_begins_again() -> None:
    units = clip("h264", 10, size=(320, 240))[:10]
    pictures = DevicePictures(GPU)
    found = annexb.examine(units[0], Encoding.H264, 0).format
    assert found is not None
    decoder = nvdec.NvdecEngine(pictures, CpuEngine()).open(Encoding.H264, found)
    for round_ in range(3):
        decoder.reset()
        tags = [
            one.tag for i, unit in enumerate(units[: 4 + round_]) for one in decoder.decode(unit, i)
        ]
        assert tags == list(range(4 + round_))
    decoder.close()
