"""Faces cut out of pictures for the models behind the detector, on the CPU.

``pixels`` does the same on a card; a test holds the two together.
"""

from __future__ import annotations

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
    """``alignments`` of one face: [2, 3]."""
    [found] = alignments(np.asarray(landmarks, np.float64)[None], size)
    return np.asarray(found)


def alignments(landmarks: npt.ArrayLike, size: int = ARCFACE_SIZE) -> npt.NDArray[np.float64]:
    """The similarities [N, 2, 3] that take picture to chip pixels, best in the least squares,
    of the faces with ``landmarks`` [N, 5, 2].

    Rotation, uniform scale and shift, no reflection, in closed form: with the points
    as complex numbers around their means, the factor is <source, target>/<source, source>.
    Landmarks that all fall into one point have no such map: they get scale 1.
    """
    source = np.asarray(landmarks, np.float64)
    target = ARCFACE_TEMPLATE * (size / ARCFACE_SIZE)
    source_mean, target_mean = source.mean(1), target.mean(0)
    z = (source - source_mean[:, None]) @ (1.0, 1.0j)
    w = (target - target_mean) @ (1.0, 1.0j)
    energy = (z.real**2 + z.imag**2).sum(1)
    spread = energy > 1e-6
    factor = np.ones(len(source), np.complex128)
    factor[spread] = (z[spread].conj() @ w) / energy[spread]
    factor[np.abs(factor) < 1e-6] = 1.0
    maps = np.empty((len(source), 2, 3))
    maps[:, 0, 0] = maps[:, 1, 1] = factor.real
    maps[:, 1, 0], maps[:, 0, 1] = factor.imag, -factor.imag
    maps[:, :, 2] = target_mean - (maps[:, :, :2] @ source_mean[:, :, None])[:, :, 0]
    return maps


def context_region(
    box: npt.ArrayLike, scale: float, width: int, height: int
) -> tuple[int, int, int, int]:
    """``context_regions`` of one face."""
    found = context_regions(np.asarray(box, np.float64)[None], scale, np.array([[width, height]]))
    left, top, right, bottom = (int(value) for value in found[0])
    return left, top, right, bottom


def context_regions(
    boxes: npt.ArrayLike, scale: float, bounds: npt.NDArray[np.intp]
) -> npt.NDArray[np.intp]:
    """(left, top, right, bottom) of context crops [N, 4], the last two exclusive. ``boxes``
    [N, 4] are x, y, w, h; ``bounds`` [N, 2] the widths and heights of their pictures.

    A box is enlarged ``scale`` times around its centre, by less where it would not
    fit into the picture, and shifted to lie inside it.
    """
    found = np.asarray(boxes, np.float64)
    last = np.asarray(bounds, np.float64) - 1
    sizes = np.maximum(found[:, 2:], 1.0)
    factors = np.minimum((last / sizes).min(1), scale)
    # From the corner and the unbounded size, as the box says them.
    centres = found[:, :2] + sizes / 2
    half = sizes * factors[:, None] / 2
    low, high = centres - half, centres + half
    under = low < 0
    high = np.where(under, high - low, high)
    low = np.where(under, 0.0, low)
    over = high > last
    low = np.where(over, low - (high - last), low)
    high = np.where(over, last, high)
    first = np.clip(np.floor(low), 0, last)
    end = np.clip(np.floor(high), first, last)
    return np.concatenate((first, end + 1), 1).astype(np.intp)
