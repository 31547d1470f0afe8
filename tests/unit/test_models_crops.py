"""Crops: the alignment's algebra, context regions, and the GPU's version against OpenCV's."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facelane_server.models.api import AlignedCrop, ContextCrop
from facelane_server.modeltools.verify import synthetic_picture
from facelane_server.worker.decoding import crops
from facelane_server.worker.decoding.crops import ARCFACE_TEMPLATE, alignment, context_region
from facelane_server.worker.decoding.device_pictures import DevicePictures

COORDINATE = st.floats(-2000, 4000, allow_nan=False, width=32)


def similarity(scale: float, angle: float, shift: tuple[float, float]) -> np.ndarray:
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[c, -s, shift[0]], [s, c, shift[1]]])


@pytest.mark.parametrize("size", [112, 128, 224])
@pytest.mark.parametrize("angle", [0.0, 0.4, -2.0, 3.1])
@pytest.mark.parametrize("scale", [0.2, 1.0, 6.0])
def test_a_moved_template_comes_back(scale: float, angle: float, size: int) -> None:
    moved = similarity(scale, angle, (300.0, -40.0))
    landmarks = ARCFACE_TEMPLATE @ moved[:, :2].T + moved[:, 2]
    matrix = alignment(landmarks, size)
    back = landmarks @ matrix[:, :2].T + matrix[:, 2]
    assert np.allclose(back, ARCFACE_TEMPLATE * size / 112, atol=1e-6)


def test_the_alignment_is_the_best_of_all_similarities() -> None:
    random = np.random.default_rng(4)
    landmarks = ARCFACE_TEMPLATE * 2 + random.normal(0, 6, (5, 2))

    def error(matrix: np.ndarray) -> float:
        moved = landmarks @ matrix[:, :2].T + matrix[:, 2]
        return float(((moved - ARCFACE_TEMPLATE) ** 2).sum())

    best = alignment(landmarks)
    for _ in range(200):
        a, b = best[0, 0] + random.normal(0, 0.02), best[1, 0] + random.normal(0, 0.02)
        shift = best[:, 2] + random.normal(0, 1, 2)
        assert error(np.array([[a, -b, shift[0]], [b, a, shift[1]]])) >= error(best)


@settings(max_examples=200)
@given(st.lists(st.tuples(COORDINATE, COORDINATE), min_size=5, max_size=5))
def test_any_landmarks_give_a_finite_similarity(points: list[tuple[float, float]]) -> None:
    matrix = alignment(np.array(points, np.float32))
    assert np.isfinite(matrix).all()
    assert matrix[0, 0] == matrix[1, 1]
    assert matrix[0, 1] == -matrix[1, 0]
    assert abs(np.linalg.det(matrix[:, :2])) > 0


def test_landmarks_in_one_point_have_a_crop() -> None:
    picture = synthetic_picture(60, 60, 0)
    landmarks = np.full((1, 5, 2), 30, np.float32)
    (chip,) = crops.cut(picture, np.zeros((1, 4), np.float32), landmarks, [AlignedCrop()])
    assert chip.shape == (1, 112, 112, 3)


@pytest.mark.parametrize(
    ("box", "scale", "expected"),
    [
        # In the middle: enlarged around the centre.
        ((100, 100, 40, 50), 2.0, (80, 75, 161, 176)),
        # At the left edge: shifted inside, same size.
        ((0, 100, 40, 50), 2.0, (0, 75, 81, 176)),
        # At the bottom right corner.
        ((360, 250, 40, 50), 2.0, (319, 199, 400, 300)),
        # Does not fit: the largest scale that does, (300 - 1) / 200.
        ((100, 50, 100, 200), 4.0, (75, 0, 225, 300)),
    ],
)
def test_context_regions(
    box: tuple[int, ...], scale: float, expected: tuple[int, int, int, int]
) -> None:
    assert context_region(box, scale, 400, 300) == expected


@settings(max_examples=300)
@given(
    box=st.tuples(COORDINATE, COORDINATE, st.floats(0, 5000), st.floats(0, 5000)),
    scale=st.floats(1, 10),
    width=st.integers(16, 2000),
    height=st.integers(16, 2000),
)
def test_a_context_region_lies_inside_the_picture(
    box: tuple[float, ...], scale: float, width: int, height: int
) -> None:
    left, top, right, bottom = context_region(box, scale, width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_no_faces_no_crops() -> None:
    picture = synthetic_picture(60, 60, 0)
    none = crops.cut(
        picture,
        np.zeros((0, 4), np.float32),
        np.zeros((0, 5, 2), np.float32),
        [AlignedCrop(), ContextCrop(2.7)],
    )
    assert [c.shape for c in none] == [(0, 112, 112, 3), (0, 80, 80, 3)]


@pytest.mark.parametrize("zoom", [0.6, 1.0, 2.5])
def test_the_device_version_agrees_with_opencv(zoom: float) -> None:
    picture = cv2.GaussianBlur(synthetic_picture(360, 480, 9), (0, 0), 1.0)
    landmarks = np.stack(
        [
            ARCFACE_TEMPLATE * zoom + (40, 60),
            ARCFACE_TEMPLATE * zoom @ np.array([[0.9, 0.4], [-0.4, 0.9]]) + (250, 20),
            ARCFACE_TEMPLATE * zoom + (-30, -20),  # reaches over the picture's edge
        ]
    ).astype(np.float32)
    low, high = landmarks.min(1), landmarks.max(1)
    boxes = np.concatenate((low, high - low), 1)
    specs = [AlignedCrop(), AlignedCrop(128), ContextCrop(2.7), ContextCrop(4.0)]
    host = crops.cut(picture, boxes, landmarks, specs)
    pictures = DevicePictures("cpu")
    there = pictures.upload(picture)
    [device] = pictures.cut([there], [len(boxes)], boxes, landmarks, specs).fetch()
    for spec, a, b in zip(specs, host, device, strict=True):
        difference = np.abs(a.astype(int) - b.astype(int))
        assert difference.mean() <= 1.0, spec
        assert a.std() > 5, "the crop shows something"
