"""What a card does with pictures, done by the same code on a CPU and held to the host's way."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tests.fakes.access_units import clip
from tests.unit.test_worker_loop import SLOT

from facelane_server import limits
from facelane_server.domain import Encoding, FacelaneError, Reason, Stage
from facelane_server.ipc.arena import Arena
from facelane_server.ipc.messages import (
    DetectDone,
    DetectItem,
    Infer,
    ItemDone,
    ItemFailed,
    Load,
    PictureHeld,
    VideoItem,
)
from facelane_server.models import api
from facelane_server.models.api import AlignedCrop, ContextCrop, DeviceOptions
from facelane_server.models.catalog import Catalog
from facelane_server.modeltools.verify import synthetic_picture
from facelane_server.worker.appearance import signatures
from facelane_server.worker.decoding import crops
from facelane_server.worker.decoding.device_pictures import DevicePictures
from facelane_server.worker.decoding.headers import examine
from facelane_server.worker.decoding.pixels import OnDevice
from facelane_server.worker.decoding.video import Shown
from facelane_server.worker.networks.detector import NetworkDetector
from facelane_server.worker.networks.load import canvases, load, network_with_weights
from facelane_server.worker.networks.serving import ServedDetector
from facelane_server.worker.networks.torch_runner import CpuRunner
from facelane_server.worker.work import DetectWork

CROPS = (AlignedCrop(112), ContextCrop(2.7, 80))


def on_cpu(data: list[torch.Tensor]) -> list[torch.Tensor]:
    """OpenCV's decoder in nvJPEG's place: RGB planes."""
    pictures = [cv2.imdecode(one.numpy(), cv2.IMREAD_COLOR_RGB) for one in data]
    return [torch.from_numpy(p).permute(2, 0, 1).contiguous() for p in pictures]


def jpeg(picture: api.U8, *parameters: int) -> bytes:
    ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92, *parameters])
    assert ok
    return bytes(data)


def faces_in(height: int, width: int, seed: int = 3) -> bytes:
    """A picture on which the starter detector finds something, or the tests say nothing."""
    skimage = pytest.importorskip("skimage.data", reason="the demo extra has a photo")
    photo = np.ascontiguousarray(skimage.astronaut()[:256, 80:400, ::-1])
    canvas = synthetic_picture(height, width, seed)
    scale = min(height / 300, width / 380)
    photo = cv2.resize(photo, None, fx=scale, fy=scale)
    canvas[10 : 10 + photo.shape[0], 10 : 10 + photo.shape[1]] = photo
    return jpeg(canvas)


# -- pictures -------------------------------------------------------------------------------


def detectors() -> tuple[NetworkDetector, NetworkDetector]:
    """The starter detector, its pictures decoded by the host, and on the "device"."""
    package = Catalog().resolve("facelane-detector")
    thresholds = package.manifest.thresholds
    assert thresholds.score is not None
    assert thresholds.nms is not None
    found = []
    for pictures in (None, DevicePictures("cpu", on_cpu)):
        served = ServedDetector(network_with_weights(package), package.manifest.input)
        runner = CpuRunner(
            served,
            warm_shapes=[(480, 640)],
            pictures=pictures,
            canvases=canvases(320) if pictures else (),
        )
        found.append(
            NetworkDetector(
                runner,
                crops=CROPS,
                max_side=320,
                score=thresholds.score,
                nms=thresholds.nms,
                batch_max=4,
            )
        )
    return found[0], found[1]


def host(data: bytes) -> api.U8:
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return np.asarray(picture, np.uint8)


@pytest.mark.parametrize(
    "size",
    [
        (240, 320),
        pytest.param((480, 640), marks=pytest.mark.slow),
        pytest.param((720, 1280), marks=pytest.mark.slow),
        (600, 480),
    ],
)
def test_pictures_on_the_device_give_the_same_faces(size: tuple[int, int]) -> None:
    data = faces_in(*size)
    plain, there = detectors()
    assert not plain.decodes
    assert there.decodes
    [expected] = plain.begin([host(data)], [4]).finish()
    [picture] = there.decode([memoryview(data)])
    assert isinstance(picture, OnDevice)
    [found] = there.begin([picture], [4]).finish()
    assert len(expected.boxes) >= 1, "a face is there"
    assert found.boxes.shape == expected.boxes.shape
    assert np.abs(found.boxes - expected.boxes).max() <= 1.0
    assert np.abs(found.landmarks - expected.landmarks).max() <= 1.0
    assert np.abs(found.scores - expected.scores).max() <= 0.02
    # A box may differ by a part of a pixel: the crops are compared where this one was cut.
    there_too = crops.cut(host(data), found.boxes, found.landmarks, CROPS)
    for a, b in zip(there_too, found.crops, strict=True):
        assert a.shape == b.shape
        assert np.abs(a.astype(int) - b.astype(int)).mean() <= 2.0


def test_a_batch_may_be_mixed() -> None:
    plain, there = detectors()
    files = [faces_in(240, 320, seed) for seed in range(3)]
    expected = plain.begin([host(data) for data in files], [4, 4, 4]).finish()
    [middle] = there.decode([memoryview(files[1])])
    assert middle is not None
    found = there.begin([host(files[0]), middle, host(files[2])], [4, 4, 4]).finish()
    for a, b in zip(expected, found, strict=True):
        assert np.abs(a.boxes - b.boxes).max() <= 1.0
        assert [crop.shape for crop in a.crops] == [crop.shape for crop in b.crops]
        for one, other in zip(a.crops, b.crops, strict=True):
            assert np.abs(one.astype(int) - other.astype(int)).mean() <= 2.0


def test_without_faces_there_are_no_crops() -> None:
    pictures = DevicePictures("cpu", on_cpu)
    [one, two] = pictures.decode([memoryview(faces_in(240, 320))] * 2)
    assert one is not None
    assert two is not None
    none = np.zeros((0, 4), np.float32), np.zeros((0, 5, 2), np.float32)
    for chips in pictures.cut([one, two], [0, 0], *none, CROPS).fetch():
        assert [crop.shape for crop in chips] == [(0, 112, 112, 3), (0, 80, 80, 3)]
    assert pictures.cut([one], [0], *none, ()).fetch() == [()]


def marked(data: bytes) -> bytes:
    """With an Adobe marker after the first."""
    return data[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01" + data[2:]


@pytest.mark.parametrize(
    ("data", "plain"),
    [
        (jpeg(synthetic_picture(64, 96, 1)), True),
        (jpeg(synthetic_picture(64, 96, 1), cv2.IMWRITE_JPEG_RST_INTERVAL, 2), True),
        (jpeg(synthetic_picture(64, 96, 1), cv2.IMWRITE_JPEG_PROGRESSIVE, 1), False),
        (jpeg(synthetic_picture(64, 96, 1)[..., :1]), False),
        (marked(jpeg(synthetic_picture(64, 96, 1))), False),
    ],
    ids=["baseline", "restarts", "progressive", "grey", "adobe"],
)
def test_what_the_device_takes(data: bytes, plain: bool) -> None:
    header = examine(memoryview(data), Encoding.JPEG)
    assert (header.width, header.height, header.plain) == (96, 64, plain)


def test_an_end_of_one_colour_is_left_to_the_host() -> None:
    picture = synthetic_picture(64, 96, 1)
    picture[-16:, -16:] = 128
    files = [jpeg(picture), jpeg(synthetic_picture(64, 96, 2))]
    found = DevicePictures("cpu", on_cpu).decode([memoryview(data) for data in files])
    assert found[0] is None
    assert found[1] is not None


def failing(error: Exception) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    def decode(data: list[torch.Tensor]) -> list[torch.Tensor]:
        raise error

    return decode


def test_what_the_device_cannot_decode_is_left_to_the_host(
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = memoryview(jpeg(synthetic_picture(64, 96, 1)))
    pictures = DevicePictures("cpu", failing(RuntimeError("nvjpegDecode failed: 5")))
    assert pictures.decode([data, data]) == [None, None]
    assert pictures.decode([data]) == [None]
    assert capfd.readouterr().err.count("JPEG not decoded on the device") == 1


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: an illegal memory access was encountered"), MemoryError()],
)
def test_what_costs_the_device_is_told(error: Exception) -> None:
    pictures = DevicePictures("cpu", failing(error))
    with pytest.raises(type(error)):
        pictures.decode([memoryview(jpeg(synthetic_picture(64, 96, 1)))])


def test_it_is_tried_out_before_it_serves() -> None:
    DevicePictures("cpu", on_cpu).try_out()
    for decode in (
        failing(RuntimeError("nvjpegDecode failed: 5")),
        lambda data: [planes.flip(0) for planes in on_cpu(data)],
        lambda data: [planes[:, 1:] for planes in on_cpu(data)],
    ):
        with pytest.raises(FacelaneError) as caught:
            DevicePictures("cpu", decode).try_out()
        assert caught.value.reason is Reason.CONFIG_INVALID
        assert "decode = 'cpu'" in caught.value.message


def test_without_its_decoder_a_card_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not installed, and not to be loaded; nothing of it is imported."""
    pictures = DevicePictures("cpu")
    fake = tmp_path / "torchvision"
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for step in ("it is not installed", "cannot be loaded"):
        with pytest.raises(FacelaneError, match=step) as caught:
            pictures.add_nvjpeg()
        assert caught.value.reason is Reason.CONFIG_INVALID
        assert "decode = 'cpu'" in caught.value.message
        assert not pictures.decodes
        assert "torchvision" not in sys.modules
        fake.mkdir(exist_ok=True)
        (fake / "__init__.py").write_text("raise SystemExit('imported')")
        (fake / "image.so").write_bytes(b"no library")


def test_a_cpu_pool_decodes_on_the_cpu() -> None:
    model = load(Catalog().resolve("facelane-detector"), DeviceOptions(decode="cuda"), batch_max=1)
    assert isinstance(model, api.Detector)
    assert not model.decodes


# -- in the worker --------------------------------------------------------------------------


class Recorder(api.Detector):
    """Decodes by the code under test; a face says where each picture was decoded."""

    crops = ()
    batch_max = 8
    decodes = True

    def __init__(self) -> None:
        self._pictures = DevicePictures("cpu", on_cpu)
        self.asked: list[int] = []

    def warm_up(self) -> None:
        pass

    def decode(self, jpegs: Sequence[memoryview]) -> list[api.DevicePicture | None]:
        self.asked.append(len(jpegs))
        return self._pictures.decode(jpegs)

    def begin(
        self, pictures: Sequence[api.U8 | api.DevicePicture], max_faces: Sequence[int]
    ) -> api.Pending[list[api.Detections]]:
        return api.Immediate(
            [
                api.Detections(
                    np.zeros((1, 4), np.float32),
                    np.full(1, isinstance(picture, OnDevice), np.float32),
                    np.zeros((1, 5, 2), np.float32),
                    (),
                )
                for picture in pictures
            ]
        )


def detected(
    files: list[tuple[Encoding, bytes]], threads: int, tmp_path: Path
) -> tuple[list[ItemDone], list[bool], Recorder]:
    """Answers of a worker, and where each picture was decoded, in order."""
    request, response = (Arena.create(name, 2, SLOT) for name in ("request", "response"))
    items: list[Any] = []
    offset = 0
    for encoding, data in files:
        request.slot(0)[offset : offset + len(data)] = data
        items.append(DetectItem(offset, len(data), encoding.value, 0, 0, 0, 4, 0))
        offset += -(-len(data) // 64) * 64
    model = Recorder()
    message = Load("w", Stage.DETECTOR, str(tmp_path), "cpu", 8, 2, SLOT, SLOT, threads=threads)
    work = DetectWork(model, message, request, response)
    finish, ready = work.begin(Infer(1, 0, items))
    assert ready
    done = finish()
    where = []
    for answer in done:
        if isinstance(answer, DetectDone):
            record = np.frombuffer(response.slot(0), np.float32, 15, answer.offset)
            where.append(bool(record[4]))
    return done, where, model


@pytest.mark.parametrize("threads", [1, 3])
def test_a_worker_decodes_on_the_device_what_it_can(threads: int, tmp_path: Path) -> None:
    good = jpeg(synthetic_picture(64, 96, 1))
    _, png = cv2.imencode(".png", synthetic_picture(48, 80, 2))
    done, where, model = detected(
        [
            (Encoding.JPEG, good),
            (Encoding.PNG, bytes(png)),
            (Encoding.JPEG, good[: len(good) // 2]),
            (Encoding.JPEG, jpeg(synthetic_picture(8, 8, 3))),
            (Encoding.JPEG, jpeg(synthetic_picture(40, 56, 4), cv2.IMWRITE_JPEG_PROGRESSIVE, 1)),
            (Encoding.JPEG, jpeg(synthetic_picture(72, 88, 5))),
        ],
        threads,
        tmp_path,
    )
    assert model.asked == [2], "plain whole ones of an allowed size"
    failed = {i: a.reason for i, a in enumerate(done) if isinstance(a, ItemFailed)}
    assert failed == {2: Reason.PICTURE_CORRUPT, 3: Reason.PICTURE_TOO_SMALL}
    sizes = [(a.width, a.height) for a in done if isinstance(a, DetectDone)]
    assert sizes == [(96, 64), (80, 48), (56, 40), (88, 72)]
    assert where == [True, False, False, True]


def test_a_job_does_not_wait_for_what_is_decoded_beside_it(tmp_path: Path) -> None:
    """Whoever begins another one does, or ends that lane: so the loop settles it before."""
    request, response = (Arena.create(name, 2, SLOT) for name in ("request", "response"))
    message = Load("w", Stage.DETECTOR, str(tmp_path), "cpu", 8, 2, SLOT, SLOT, threads=1)
    work, units = DetectWork(Recorder(), message, request, response), clip(count=6)
    number = itertools.count()

    def begin(*asked: tuple[int, int, bool]) -> list[type[ItemDone]]:
        """Of (lane, picture, ahead) each."""
        items, at = [], 0
        for lane, picture, ahead in asked:
            unit = units[picture]
            request.slot(0)[at : at + len(unit)] = unit
            places = (at, (len(unit),), "h264", picture, picture, picture, picture == 0)
            items.append(VideoItem(lane, *places, ahead=ahead))
            at += len(unit)
        work.settle()
        finish, _ = work.begin(Infer(next(number), 0, items))
        return [type(answer) for answer in finish()]

    assert begin((1, 0, False), (2, 0, False)) == [DetectDone, DetectDone]
    decoder = work._reader._video._sessions[2]._decoder
    assert not isinstance(decoder, Future)
    decode, held, free = decoder.decode, threading.Event(), threading.Event()

    def wait(unit: bytes, tag: int) -> Sequence[Shown]:
        held.set()
        assert free.wait(30)
        return decode(unit, tag)

    decoder.decode = wait  # type: ignore[method-assign]
    assert begin((1, 1, False), (2, 1, True)) == [DetectDone, PictureHeld]
    assert held.wait(30)
    assert begin((1, 2, False)) == [DetectDone], "lane 2 is not waited for"
    threading.Timer(0.0, free.set).start()
    assert begin((1, 3, False), (2, 2, False)) == [DetectDone, DetectDone], "it is now"
    free.clear()
    assert begin((2, 3, True), (1, 4, False)) == [PictureHeld, DetectDone]
    closed = threading.Event()
    decoder.close = closed.set  # type: ignore[method-assign]
    threading.Timer(0.0, free.set).start()
    work.settle(2)
    work.close_video(2)
    assert closed.is_set(), "it was at work"


def test_who_brings_more_than_can_be_decoded_beside_the_jobs_waits(tmp_path: Path) -> None:
    request, response = (Arena.create(name, 2, SLOT) for name in ("request", "response"))
    message = Load("w", Stage.DETECTOR, str(tmp_path), "cpu", 8, 2, SLOT, SLOT, threads=1)
    work, units = DetectWork(Recorder(), message, request, response), clip(count=9)

    def begin(*asked: tuple[int, bool]) -> list[ItemDone]:
        items = []
        for lane, (picture, ahead) in enumerate(asked):
            unit = units[picture]
            request.slot(0)[lane << 16 : (lane << 16) + len(unit)] = unit
            places = (lane << 16, (len(unit),), "h264", picture, picture, picture, picture == 0)
            items.append(VideoItem(lane, *places, ahead=ahead))
        finish, _ = work.begin(Infer(1, 0, items))
        return finish()

    begin((0, False), (0, False))
    decoder = work._reader._video._sessions[1]._decoder
    assert not isinstance(decoder, Future)
    decode, free = decoder.decode, threading.Event()

    def wait(unit: bytes, tag: int) -> Sequence[Shown]:
        assert free.wait(30)
        return decode(unit, tag)

    decoder.decode = wait  # type: ignore[method-assign]
    for number in range(1, 6):
        work.settle()
        assert isinstance(begin((number, False), (number, True))[1], PictureHeld)
    threading.Timer(0.05, free.set).start()
    work.settle()
    assert free.is_set(), "it has waited"


class Crowd(Recorder):
    """So many faces in each picture of a job, each with a chip of its own."""

    crops = (ContextCrop(2.7, 16), AlignedCrop(112))
    counts = (2, 0, 1, 3)
    chips = np.random.default_rng(3).integers(0, 256, (sum(counts), 112, 112, 3), np.uint8)

    def begin(
        self, pictures: Sequence[api.U8 | api.DevicePicture], max_faces: Sequence[int]
    ) -> api.Pending[list[api.Detections]]:
        ends = np.cumsum(self.counts)
        return api.Immediate(
            [
                api.Detections(
                    np.zeros((count, 4), np.float32),
                    np.ones(count, np.float32),
                    np.zeros((count, 5, 2), np.float32),
                    (np.zeros((count, 16, 16, 3), np.uint8), self.chips[end - count : end]),
                )
                for count, end in zip(self.counts, ends, strict=True)
            ]
        )


def test_each_face_of_a_job_has_its_own_signature(tmp_path: Path) -> None:
    request, response = (Arena.create(name, 2, SLOT) for name in ("request", "response"))
    raw, side = Encoding.BGR24, 16
    request.slot(0)[: side * side * 3] = bytes(side * side * 3)
    item = DetectItem(0, side * side * 3, raw.value, side, side, 0, 4, 0)
    message = Load("w", Stage.DETECTOR, str(tmp_path), "cpu", 8, 2, SLOT, SLOT)
    work = DetectWork(Crowd(), message, request, response)
    finish, _ = work.begin(Infer(1, 0, [item] * len(Crowd.counts)))
    told = []
    for answer in finish():
        assert isinstance(answer, DetectDone)
        size = limits.FACE_RECORD_BYTES
        records = bytes(response.slot(0)[answer.offset : answer.offset + answer.count * size])
        told += [
            records[n * size : (n + 1) * size][4 * limits.FACE_FLOATS :]
            for n in range(answer.count)
        ]
    assert told == [signatures(chip[None]).tobytes() for chip in Crowd.chips]
