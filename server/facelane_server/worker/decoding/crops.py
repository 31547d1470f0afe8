"""Faces cut out of pictures for the models behind the detector, on the CPU.

``device_crops`` does the same with torch on a GPU; a test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, assert_never

import cv2
import numpy as np
import numpy.typing as npt

from facelane_server.models.api import F32, U8, AlignedCrop, ContextCrop, CropSpec

ARCFACE_SIZE: Final = 112
ARCFACE_TEMPLATE: Final = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ],
    np.float64,
)
"""Where the five landmarks lie in an aligned 112x112 chip; scaled for other sizes."""


def cut(picture: U8, boxes: F32, landmarks: F32, specs: Sequence[CropSpec]) -> tuple[U8, ...]:
    """For each spec the crops [N, size, size, 3] of the N faces of one picture.

    ``boxes`` [N, 4] (x, y, w, h) and ``landmarks`` [N, 5, 2] in the picture's pixels.
    """
    cropped: list[U8] = []
    for spec in specs:
        crops = np.zeros((len(boxes), spec.size, spec.size, 3), np.uint8)
        for i in range(len(boxes)):
            if isinstance(spec, AlignedCrop):
                _warp(picture, alignment(landmarks[i], spec.size), crops[i])
            elif isinstance(spec, ContextCrop):
                left, top, right, bottom = context_region(
                    boxes[i], spec.scale, picture.shape[1], picture.shape[0]
                )
                cv2.resize(
                    picture[top:bottom, left:right],
                    (spec.size, spec.size),
                    dst=crops[i],
                    interpolation=cv2.INTER_LINEAR,
                )
            else:
                assert_never(spec)
        cropped.append(crops)
    return tuple(cropped)


def _warp(picture: U8, matrix: npt.NDArray[np.float64], out: U8) -> None:
    cv2.warpAffine(
        picture,
        matrix,
        (out.shape[1], out.shape[0]),
        dst=out,
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(0, 0, 0),
    )


def alignment(landmarks: npt.ArrayLike, size: int = ARCFACE_SIZE) -> npt.NDArray[np.float64]:
    """The similarity [2, 3] that takes picture to chip pixels, best in the least squares.

    Rotation, uniform scale and shift, no reflection, in closed form: with the points
    as complex numbers around their means, the factor is <source, target>/<source, source>.
    Landmarks that all fall into one point have no such map: they get scale 1.
    """
    source = np.asarray(landmarks, np.float64)
    target = ARCFACE_TEMPLATE * (size / ARCFACE_SIZE)
    source_mean, target_mean = source.mean(0), target.mean(0)
    z = (source - source_mean) @ (1.0, 1.0j)
    w = (target - target_mean) @ (1.0, 1.0j)
    energy = float(np.vdot(z, z).real)
    factor = complex(np.vdot(z, w)) / energy if energy > 1e-6 else 1.0 + 0.0j
    if abs(factor) < 1e-6:
        factor = 1.0 + 0.0j
    a, b = factor.real, factor.imag
    linear = np.array([[a, -b], [b, a]])
    return np.concatenate((linear, (target_mean - linear @ source_mean)[:, None]), 1)


def context_region(
    box: npt.ArrayLike, scale: float, width: int, height: int
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a context crop, the last two exclusive.

    The box is enlarged ``scale`` times around its centre, by less where it would not
    fit into the picture, and shifted to lie inside it.
    """
    x, y, w, h = (float(v) for v in np.asarray(box, np.float64))
    w, h = max(w, 1.0), max(h, 1.0)
    scale = min(scale, (width - 1) / w, (height - 1) / h)
    left, right = _interval(x + w / 2, w * scale, width - 1)
    top, bottom = _interval(y + h / 2, h * scale, height - 1)
    return left, top, right + 1, bottom + 1


def _interval(centre: float, length: float, last: int) -> tuple[int, int]:
    low = centre - length / 2
    high = centre + length / 2
    if low < 0:
        low, high = 0.0, high - low
    if high > last:
        low, high = low - (high - last), float(last)
    first = min(max(math.floor(low), 0), last)
    return first, min(max(math.floor(high), first), last)
