"""What of a detector's work around the network would gain from the card: JPEG decoding by
nvJPEG against OpenCV's, cutting faces out on the device against doing it on the host, and
the whole detector, from JPEG data to faces and crops, each way.

nvJPEG is reached through torchvision where that is installed. The device's crops need the
picture on the device, so its upload counts with them. `cpu_ms` is what an item costs the
processors, all threads together: with many cameras that is what is short.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from bench import material
from bench.report import Report, Row
from bench.settings import Settings
from bench.stats import percentile

SIZES: Final = {"720p": (1280, 720), "1080p": (1920, 1080)}
BATCHES: Final = (1, 8, 16)
WORKER_BATCHES: Final = (1, 8, 16, 32)
FACES: Final = (0, 1, 2, 1, 4, 0, 3, 1)


async def run(settings: Settings) -> Report:
    report = Report("decode", smoke=settings.smoke)
    rounds = settings.sized(40, 3)
    for size, (width, height) in SIZES.items():
        frames = material.make_frames(16 if not settings.smoke else 2, width, height, [1])
        _host(report, size, frames, rounds)
        if settings.device.startswith("cuda"):
            try:
                _device(report, size, frames, rounds, settings.device)
            except Exception as error:  # without torchvision, say; the crops are still compared
                report.note(f"nvJPEG, {size}: {type(error).__name__}: {error}")
        _crops(report, size, frames[0], rounds, settings.device)
        settings.keep(report)
    ways: dict[str, dict[str, Any]] = {"decoded by OpenCV": {}}
    if settings.device.startswith("cuda"):
        ways["decoded by nvJPEG"] = {"decode": "cuda"}
    for name, options in ways.items():
        settings.say(f"detector, {name}")
        try:
            _detector(report, settings, name, rounds, options)
        except Exception as error:  # the others are still measured
            report.note(f"detector, {name}: {type(error).__name__}: {error}")
        settings.keep(report)
    if settings.device.startswith("cuda"):
        _nv12(report, settings, rounds)
        settings.keep(report)
    return report


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of each round, and processor seconds of all."""

    rounds: list[float]
    cpu: float


def _timed(call: Callable[[], Any], rounds: int) -> _Times:
    for _ in range(3):
        call()
    found = []
    cpu = time.process_time()
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return _Times(found, time.process_time() - cpu)


def _row(report: Report, name: str, scenario: str, batch: int, times: _Times) -> Row:
    """Times are of one item."""
    seconds = times.rounds
    each = [s / batch for s in seconds]
    return report.add(
        Row(
            deployment=name,
            scenario=scenario,
            batch=batch,
            p50_ms=percentile(each, 50) * 1e3,
            p99_ms=percentile(each, 99) * 1e3,
            throughput_per_s=len(each) * batch / sum(seconds),
            extra={"cpu_ms": times.cpu / len(each) / batch * 1e3},
        )
    )


def _host(report: Report, size: str, frames: list[bytes], rounds: int) -> None:
    from facelane_server.domain import Encoding
    from facelane_server.worker.decoding.pictures import decode, silence_opencv

    silence_opencv()
    views = [memoryview(data) for data in frames]
    one = _timed(lambda: decode(views[0], Encoding.JPEG), rounds)
    _row(report, "OpenCV, one thread", f"JPEG {size}", 1, one)
    with ThreadPoolExecutor(4) as pool:

        def batch() -> None:
            list(pool.map(lambda view: decode(view, Encoding.JPEG), views[:8]))

        _row(
            report,
            "OpenCV, four threads",
            f"JPEG {size}",
            len(views[:8]),
            _timed(batch, max(3, rounds // 4)),
        )


def _device(report: Report, size: str, frames: list[bytes], rounds: int, device: str) -> None:
    import cv2
    import numpy as np
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    data = [torch.from_numpy(np.frombuffer(frame, np.uint8).copy()) for frame in frames]
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for count in BATCHES:

        def batch(count: int = count) -> Any:
            with torch.cuda.stream(stream):
                found = decode_jpeg(data[:count], mode=ImageReadMode.RGB, device=device)
            stream.synchronize()
            return found

        _row(report, "nvJPEG", f"JPEG {size}", count, _timed(batch, rounds))
    found = batch(1)[0].permute(1, 2, 0).flip(2).cpu().numpy().astype(np.int16)
    there = cv2.imdecode(np.frombuffer(frames[0], np.uint8), cv2.IMREAD_COLOR)
    assert there is not None
    apart = np.abs(found - there.astype(np.int16))
    report.note(
        f"nvJPEG and OpenCV, {size}: grey levels apart at most {apart.max()}, "
        f"on average {apart.mean():.3f}"
    )


def _crops(report: Report, size: str, data: bytes, rounds: int, device: str) -> None:
    """One picture with two faces: a chip and a context crop each."""
    import numpy as np
    import torch

    from facelane_server.domain import Encoding
    from facelane_server.models.api import AlignedCrop, ContextCrop
    from facelane_server.worker.decoding import crops
    from facelane_server.worker.decoding.device_pictures import DevicePictures
    from facelane_server.worker.decoding.pictures import decode

    picture = decode(memoryview(data), Encoding.JPEG)
    boxes = np.array([[500, 200, 180, 220], [100, 100, 90, 110]], np.float32)
    points = np.array([[40, 80], [130, 80], [85, 130], [50, 170], [120, 170]], np.float32)
    corners = np.array([[500, 200], [100, 100]], np.float32)
    landmarks = np.stack([points + corners[0], points / 2 + corners[1]])
    specs = (AlignedCrop(112), ContextCrop(2.7, 80))
    host = _timed(lambda: crops.cut(picture, boxes, landmarks, specs), rounds)
    _row(report, "crops on the host", f"two faces of {size}", 1, host)
    if not device.startswith("cuda"):
        return
    pictures = DevicePictures(device)

    def cut() -> None:
        there = pictures.upload(picture)
        torch.cuda.synchronize()
        pictures.cut([there], [len(boxes)], boxes, landmarks, specs).fetch()

    _row(report, "upload, crops on the device", f"two faces of {size}", 1, _timed(cut, rounds))


def _detector(
    report: Report, settings: Settings, name: str, rounds: int, options: dict[str, Any]
) -> None:
    """The starter detector on 720p frames with 0 to 4 faces, as a worker runs it, from a job's
    slot to its answer's: a job is begun before the one before it is finished."""
    from facelane_server.domain import Encoding, Stage
    from facelane_server.ipc.arena import Arena
    from facelane_server.ipc.messages import DetectItem, Infer, Load
    from facelane_server.models.api import Detector, DeviceOptions
    from facelane_server.worker.networks.load import load
    from facelane_server.worker.work import DetectWork

    models = material.real_models(settings.cache)
    data = material.make_frames(8 if not settings.smoke else 2, *SIZES["720p"], FACES)
    most = max(WORKER_BATCHES) if not settings.smoke else len(data)
    model = load(
        models.packages[Stage.DETECTOR],
        DeviceOptions(device=settings.device, **options),
        batch_max=most,
        crops=models.crops,
    )
    assert isinstance(model, Detector)
    slot_bytes = 32 << 20
    # The arenas go with their last view.
    request, response = (Arena.create(name, 2, slot_bytes) for name in ("request", "response"))
    with contextlib.closing(model):
        model.warm_up()
        told = Load(
            "w", Stage.DETECTOR, "", settings.device, most, 2, slot_bytes, slot_bytes, threads=4
        )
        work = DetectWork(model, told, request, response)
        items: list[DetectItem] = []
        at = 0
        for i in range(most):
            frame = data[i % len(data)]
            for slot in range(2):
                request.slot(slot)[at : at + len(frame)] = frame
            items.append(DetectItem(at, len(frame), Encoding.JPEG.value, 0, 0, 0, 64, 0))
            at += -(-len(frame) // 64) * 64
        for count in sorted({1, *(n for n in WORKER_BATCHES if n <= most), most}):
            under_way: list[Any] = []
            jobs = itertools.count()

            def one(
                count: int = count,
                under_way: list[Any] = under_way,
                jobs: Iterator[int] = jobs,
            ) -> None:
                number = next(jobs)
                finish, there = work.begin(Infer(number, number % 2, list(items[:count])))
                if there:
                    finish()
                    return
                under_way.append(finish)
                if len(under_way) > 1:
                    under_way.pop(0)()

            times = _timed(one, rounds)
            for finish in under_way:
                finish()
            _row(report, name, "detector worker, 720p JPEG to faces", count, times)
        views = [memoryview(data[i % len(data)]) for i in range(most)]
        for count in WORKER_BATCHES if model.decodes else ():
            begun: list[Any] = []

            def detect(count: int = count, begun: list[Any] = begun) -> None:
                pictures = [one for one in model.decode(views[:count]) if one is not None]
                assert len(pictures) == count
                begun.append(model.begin(pictures, [64] * count))
                if len(begun) > 1:
                    begun.pop(0).finish()

            times = _timed(detect, rounds)
            begun.pop().finish()
            _row(report, name, "detector, 720p JPEG to faces", count, times)


def _nv12(report: Report, settings: Settings, rounds: int) -> None:
    """The same detector on pictures that lie on the card already, as NVDEC leaves them."""
    import cv2
    import numpy as np
    import torch

    from facelane_server.domain import Stage
    from facelane_server.models.api import Detector, DeviceOptions
    from facelane_server.worker.decoding.pixels import OnDevice
    from facelane_server.worker.networks.load import load

    models = material.real_models(settings.cache)
    width, height = SIZES["720p"]
    surfaces = []
    for data in material.make_frames(8, width, height, FACES):
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert picture is not None
        planes = cv2.cvtColor(picture, cv2.COLOR_BGR2YUV_I420)
        chroma = planes[height:].reshape(2, height // 2, width // 2).transpose(1, 2, 0)
        surface = np.concatenate((planes[:height], chroma.reshape(height // 2, width)))
        surfaces.append(torch.from_numpy(surface).to(settings.device))
    pictures = [OnDevice.nv12(surfaces[i % 8], height) for i in range(max(WORKER_BATCHES))]
    model = load(
        models.packages[Stage.DETECTOR],
        DeviceOptions(device=settings.device),
        batch_max=len(pictures),
        crops=models.crops,
    )
    assert isinstance(model, Detector)
    with contextlib.closing(model):
        model.warm_up()
        for count in WORKER_BATCHES:
            under_way: list[Any] = []

            def one(count: int = count, under_way: list[Any] = under_way) -> None:
                under_way.append(model.begin(pictures[:count], [64] * count))
                if len(under_way) > 1:
                    under_way.pop(0).finish()

            times = _timed(one, rounds)
            under_way.pop().finish()
            _row(report, "NV12 on the card", "detector, 720p NV12 to faces", count, times)
