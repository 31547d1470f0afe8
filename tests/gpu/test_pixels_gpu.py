"""The card's kernels against torch's operations, and memory that nvJPEG's engine writes to."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tests.unit.test_pixels import MAKE, picture

from facelane_server import limits
from facelane_server.models.api import AlignedCrop, ContextCrop
from facelane_server.worker.decoding.cuda_pixels import CudaPixels
from facelane_server.worker.decoding.device_pictures import DevicePictures
from facelane_server.worker.decoding.pixels import Layout, OnDevice
from facelane_server.worker.decoding.torch_pixels import TorchPixels
from facelane_server.worker.networks.candidates import TOP, select

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

GPU = "cuda:0"


@pytest.fixture(scope="module")
def kernels() -> CudaPixels:
    torch.zeros(1, device=GPU)
    return CudaPixels(torch.device(GPU))


def there(layout: str, height: int, width: int) -> OnDevice:
    made = MAKE[layout](picture(height, width))
    if made.chroma is None:
        return OnDevice(made.pixels.to(GPU), made.layout)
    surface = torch.zeros((height * 3 // 2, made.pitch), dtype=torch.uint8)
    surface[:height, :width] = made.pixels
    surface[height:, :width] = made.chroma
    return OnDevice.nv12(surface.to(GPU)[:, :width], height, made.colours)


def test_a_batch_is_placed_as_torch_places_it(kernels: CudaPixels) -> None:
    shapes = [(72, 128), (108, 192), (720, 1280), (1080, 1920), (90, 130)]
    pictures = [there(layout, *shape) for layout in MAKE for shape in shapes]
    sizes = [(36, 64), (36, 64), (360, 640), (360, 640), (61, 88)] * len(MAKE)
    expected, found = (
        torch.full((len(pictures), 384, 640, 3), 7, dtype=torch.uint8, device=GPU) for _ in range(2)
    )
    TorchPixels().letterbox(pictures, sizes, expected)
    kernels.letterbox(pictures, sizes, found)
    apart = (expected.int() - found.int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 0.01
    assert found.float().std() > 10


def test_faces_of_a_batch_are_cut_as_torch_cuts_them() -> None:
    rng = np.random.default_rng(3)
    pictures = [there(layout, 180, 240) for layout in MAKE]
    counts = [3, 0, 64, 1, 5]
    faces = sum(counts)
    boxes = rng.uniform(-20, 200, (faces, 4)).astype(np.float32)
    points = rng.uniform(-10, 230, (faces, 5, 2)).astype(np.float32)
    specs = (AlignedCrop(112), ContextCrop(2.7, 80), ContextCrop(4.0, 80))
    results = []
    for pixels in (TorchPixels(), None):
        cutter = DevicePictures(GPU, pixels=pixels)
        torch.cuda.synchronize()
        results.append(cutter.cut(pictures, counts, boxes, points, specs).fetch())
    for expected, found in zip(*results, strict=True):
        for a, b in zip(expected, found, strict=True):
            assert a.shape == b.shape
            if len(a):
                apart = np.abs(a.astype(int) - b.astype(int))
                assert apart.mean() < 0.05
                assert np.percentile(apart, 99.9) <= 2


@pytest.mark.parametrize("rows", [TOP, 300, 21])
def test_suppression_leaves_what_the_hosts_leaves(kernels: CudaPixels, rows: int) -> None:
    rng = np.random.default_rng(rows)
    clouds = []
    for faces in (0, 1, 5, 30, 200):
        cloud = np.zeros((rows, 15), np.float32)
        if faces:
            near = rng.integers(0, faces, rows)
            centres, sizes = rng.uniform(0, 600, (faces, 2)), rng.uniform(20, 120, (faces, 2))
            cloud[:, 1:3] = centres[near] + rng.normal(0, 8, (rows, 2))
            cloud[:, 3:5] = sizes[near] * rng.uniform(0.8, 1.25, (rows, 2))
            cloud[:, 0] = rng.uniform(0, 1, rows).round(3)
            cloud[:, 5:] = rng.normal(0, 50, (rows, 10))
            broken = rng.integers(0, rows, 3)
            cloud[broken[0], 1], cloud[broken[1], 3], cloud[broken[2], 7] = np.nan, -4.0, np.inf
        clouds.append(cloud[np.argsort(-cloud[:, 0], kind="stable")])
    candidates = torch.from_numpy(np.stack(clouds)).to(GPU)
    for score, iou in ((0.3, 0.45), (0.6, 0.2)):
        kept = kernels.suppress(candidates, score, iou).cpu().numpy()
        for cloud, found in zip(clouds, kept, strict=True):
            expected = select(cloud, score=score, iou=iou, limit=limits.MAX_FACES)
            assert np.array_equal(found[: len(expected)], expected)
            assert not found[len(expected) :].any()


def test_plain_ends(kernels: CudaPixels) -> None:
    plain = picture(32, 48)
    plain[-8:, -8:] = (1, 2, 3)
    almost = plain.copy()
    almost[-8, -8, 0] = 2
    made = [
        OnDevice(torch.from_numpy(np.ascontiguousarray(p[..., ::-1].transpose(2, 0, 1))).to(GPU),
                 Layout.RGB_PLANES)
        for p in (plain, almost, plain)
    ]  # fmt: skip
    assert kernels.plain_ends(made) == [True, False, True]


def test_what_is_queued_for_memory_is_done_before_nvjpeg_writes_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine heeds no stream. Without the wait it writes into memory that is still to be
    read: the test sees that first, or it would say nothing."""
    pytest.importorskip("torchvision", reason="facelane[nvjpeg] is not installed")
    pictures = DevicePictures(GPU)
    pictures.add_nvjpeg()
    noise = np.random.default_rng(1).integers(0, 256, (720, 1280, 3), np.uint8)
    encoded, data = cv2.imencode(".jpg", noise)
    assert encoded
    files = [np.asarray(data).reshape(-1)] * 8

    def survivors() -> int:
        """Of blocks that are read after the next batch was decoded, those still as they were."""
        with torch.cuda.stream(pictures.stream), torch.inference_mode():
            blocks = [
                torch.full((3, 720, 1280), 77, dtype=torch.uint8, device=GPU) for _ in range(8)
            ]
            torch.cuda._sleep(400_000_000)  # about 0.2 s
            copies = [block.clone() for block in blocks]
            del blocks
        pictures._decode_all(files)
        torch.cuda.synchronize()
        return sum(bool((copy == 77).all()) for copy in copies)

    settle: Any = pictures._settle
    pictures._decode_all(files)
    torch.cuda.synchronize()
    monkeypatch.setattr(pictures, "_settle", lambda: None)
    without = survivors()
    monkeypatch.setattr(pictures, "_settle", settle)
    assert survivors() == 8
    if without == 8:
        pytest.skip("this nvJPEG waits for the stream, so the wait could not be tried")
