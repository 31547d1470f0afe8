"""The card's kernels, their arithmetic compiled for this processor, against torch's operations; and
those against OpenCV's colours."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from facelane_server.models.api import AlignedCrop, ContextCrop
from facelane_server.modeltools.verify import synthetic_picture
from facelane_server.worker.decoding.crops import ARCFACE_TEMPLATE
from facelane_server.worker.decoding.cuda_pixels import CROP, SOURCE, crop_table, picture_table
from facelane_server.worker.decoding.pixels import (
    BT709,
    Colours,
    Layout,
    OnDevice,
    Pixels,
    crop_maps,
)
from facelane_server.worker.decoding.torch_pixels import TorchPixels

BT709_FULL: Colours = (1.0, 0.0, 1.5748, -0.1873243, -0.4681243, 1.8556)
"""Full range, of what few cameras send."""
LOOPS = """
extern "C" void letterbox(const Picture* pictures, unsigned char* canvas, int height, int width) {
  for (int at = 0; at < height * width; ++at)
    letterbox_pixel(pictures[0], canvas + 3 * at, at % width, at / width);
}
extern "C" void crops(const Picture* pictures, const Crop* table, int count, unsigned char* out) {
  for (int i = 0; i < count; ++i)
    for (int at = 0; at < table[i].size * table[i].size; ++at)
      crop_pixel(pictures, table[i], out + table[i].offset + 3 * at, at % table[i].size,
                 at / table[i].size);
}
extern "C" int sizes(int which) { return which ? sizeof(Crop) : sizeof(Picture); }
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no compiler for C++ is installed")
    folder = tmp_path_factory.mktemp("kernels")
    source, library = folder / "pixels.cpp", folder / "pixels.so"
    source.write_text(SOURCE.read_text() + LOOPS)
    flags = ["-O2", "-shared", "-fPIC", "-std=c++17", "-ffp-contract=off", "-Wall", "-Werror"]
    subprocess.run([compiler, *flags, "-o", library, source], check=True, timeout=120)
    return ctypes.CDLL(str(library))


def nv12(picture: np.ndarray) -> torch.Tensor:
    """[H * 3 / 2, W], limited range."""
    height, width = picture.shape[:2]
    planes = cv2.cvtColor(picture, cv2.COLOR_BGR2YUV_I420)
    chroma = planes[height:].reshape(2, height // 2, width // 2).transpose(1, 2, 0)
    return torch.from_numpy(np.concatenate((planes[:height], chroma.reshape(-1, width))))


def padded(surface: torch.Tensor) -> torch.Tensor:
    """The same, its rows further apart."""
    wide = torch.zeros((len(surface), surface.shape[1] + 64), dtype=torch.uint8)
    wide[:, : surface.shape[1]] = surface
    return wide[:, : surface.shape[1]]


MAKE: dict[str, Callable[[np.ndarray], OnDevice]] = {
    "rgb": lambda p: OnDevice(
        torch.from_numpy(np.ascontiguousarray(p[..., ::-1].transpose(2, 0, 1))), Layout.RGB_PLANES
    ),
    "bgr": lambda p: OnDevice(torch.from_numpy(p), Layout.BGR),
    "nv12": lambda p: OnDevice.nv12(nv12(p), len(p)),
    "nv12 with a pitch": lambda p: OnDevice.nv12(padded(nv12(p)), len(p), BT709),
    "nv12 of full range": lambda p: OnDevice.nv12(nv12(p), len(p), BT709_FULL),
}


def picture(height: int, width: int) -> np.ndarray:
    return np.ascontiguousarray(synthetic_picture(height, width, 5))


@pytest.mark.parametrize("layout", MAKE)
@pytest.mark.parametrize(
    ("size", "to"),
    [
        ((72, 128), (72, 128)),
        ((72, 128), (36, 64)),
        ((108, 192), (36, 64)),
        ((90, 130), (61, 88)),
        ((300, 130), (64, 28)),
    ],
)
def test_letterbox(kernels: Any, layout: str, size: tuple[int, int], to: tuple[int, int]) -> None:
    there = MAKE[layout](picture(*size))
    canvas = torch.full((1, 96, 160, 3), 7, dtype=torch.uint8)
    TorchPixels().letterbox([there], [to], canvas)
    own = np.full((96, 160, 3), 9, np.uint8)
    table = picture_table([there], [to])
    kernels.letterbox(
        table.ctypes.data_as(ctypes.c_void_p), own.ctypes.data_as(ctypes.c_void_p), 96, 160
    )
    apart = np.abs(own.astype(int) - canvas[0].numpy().astype(int))
    assert apart.max() <= 1
    assert apart.mean() < 0.01
    assert not own[to[0] :].any()
    assert not own[:, to[1] :].any()
    assert own[: to[0], : to[1]].std() > 10, "the canvas shows something"


@pytest.mark.parametrize("layout", MAKE)
def test_crops(kernels: Any, layout: str) -> None:
    """Of two pictures, some over the edge, of three kinds."""
    there = [MAKE[layout](picture(180, 240)), MAKE[layout](picture(90, 120))]
    faces = np.array([0, 0, 1], np.intp)
    landmarks = np.stack(
        [
            ARCFACE_TEMPLATE + np.array([40, 60]),
            ARCFACE_TEMPLATE @ np.array([[0.9, 0.4], [-0.4, 0.9]]) + (90, 20),
            ARCFACE_TEMPLATE / 2 - (20, 10),
        ]
    ).astype(np.float32)
    low, high = landmarks.min(1), landmarks.max(1)
    boxes = np.concatenate((low, high - low), 1)
    specs = [AlignedCrop(112), ContextCrop(2.7, 80), ContextCrop(4.0, 40)]
    sizes = [spec.size for spec in specs]
    bounds = np.array([(one.width, one.height) for one in there])[faces]
    maps = [crop_maps(spec, boxes, landmarks, bounds) for spec in specs]
    expected = TorchPixels().cut(there, faces, maps, sizes).numpy()
    own = np.zeros_like(expected)
    pictures, table = picture_table(there), crop_table(faces, maps, sizes)
    kernels.crops(
        *(t.ctypes.data_as(ctypes.c_void_p) for t in (pictures, table)),
        len(table),
        own.ctypes.data_as(ctypes.c_void_p),
    )
    apart = np.abs(own.astype(int) - expected.astype(int))
    # grid_sample's coordinates are fractions of the picture's sides.
    assert apart.max() <= 2
    assert apart.mean() < 0.05
    assert (expected.reshape(3, -1).std(1) > 10).all()


def test_tables_are_as_the_kernels_have_them(kernels: Any) -> None:
    [row] = picture_table([MAKE["bgr"](picture(32, 48))])
    assert kernels.sizes(0) == row.nbytes
    assert kernels.sizes(1) == CROP.itemsize


def test_colours_are_opencvs() -> None:
    """Its NV12 is of BT.601's limited range; what it rounds on the way is a grey level."""
    surface = nv12(picture(72, 128))
    expected = cv2.cvtColor(surface.numpy(), cv2.COLOR_YUV2BGR_NV12)
    canvas = torch.zeros((1, 72, 128, 3), dtype=torch.uint8)
    TorchPixels().letterbox([OnDevice.nv12(surface, 72)], [(72, 128)], canvas)
    assert np.abs(canvas[0].numpy().astype(int) - expected.astype(int)).max() <= 2


def test_plain_ends() -> None:
    pixels: Pixels = TorchPixels()
    plain = picture(32, 48)
    plain[-8:, -8:] = (1, 2, 3)
    almost = plain.copy()
    almost[-8, -8, 0] = 2
    for layout in ("rgb", "bgr"):
        make = MAKE[layout]
        assert pixels.plain_ends([make(plain), make(almost)]) == [True, False]


def test_a_picture_must_be_as_it_is_said() -> None:
    surface = nv12(picture(32, 48))
    with pytest.raises(ValueError, match="chroma"):
        OnDevice(surface[:32], Layout.NV12)
    with pytest.raises(ValueError, match="chroma"):
        OnDevice(surface[:32], Layout.NV12, chroma=surface[32:40])
    with pytest.raises(ValueError, match="planes"):
        OnDevice(torch.zeros((3, 40, 48), dtype=torch.uint8)[:, :32], Layout.RGB_PLANES)


def test_the_source_is_in_the_package() -> None:
    assert SOURCE.is_file()
    assert isinstance(SOURCE, Path)
