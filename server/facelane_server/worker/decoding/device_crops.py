"""The crops of ``crops`` as torch operations, for pictures that lie on a GPU.

Bilinear sampling in float32; the CPU's version works with 5-bit fractions, so the two
differ by less than one grey level on average. Of each face ten numbers go to the device;
where its pixels lie is worked out there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from facelane_server.models.api import F32, AlignedCrop, CropSpec
from facelane_server.worker.decoding.crops import alignment, context_region

_FAR: Final = 1e9
"""Beyond every picture: no bound."""


def cut(picture: Tensor, boxes: F32, landmarks: F32, specs: Sequence[CropSpec]) -> list[Tensor]:
    """For each spec the crops uint8 [N, size, size, 3] of the N faces of ``picture``
    (uint8 [H, W, 3]), on the picture's device."""
    height, width = picture.shape[:2]
    if not len(boxes):
        return [picture.new_zeros((0, spec.size, spec.size, 3)) for spec in specs]
    planes = picture.permute(2, 0, 1)[None].float().expand(len(boxes), -1, -1, -1)
    results: list[Tensor] = []
    for spec in specs:
        if isinstance(spec, AlignedCrop):
            maps = np.stack([_aligned(points, spec.size) for points in landmarks])
        else:
            maps = np.stack([_context(box, spec.scale, width, height, spec.size) for box in boxes])
        sampled = F.grid_sample(
            planes,
            _grid(torch.from_numpy(maps).to(picture.device), spec.size, width, height),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        results.append(sampled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    return results


def _grid(maps: Tensor, size: int, width: int, height: int) -> Tensor:
    """Where the pixels of N crops lie in the picture, as ``grid_sample`` wants it
    [N, size, size, 2]. A map's rows, for x and y: (x's part, y's part, shift, least, most)."""
    steps = torch.arange(size, device=maps.device, dtype=torch.float32)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    found = maps[:, None, None]
    points = x[..., None] * found[..., 0] + y[..., None] * found[..., 1] + found[..., 2]
    points = points.clamp(found[..., 3], found[..., 4])
    # Pixel centres to [-1, 1] with align_corners=False.
    return torch.stack(
        (
            (points[..., 0] + 0.5) * (2.0 / width) - 1.0,
            (points[..., 1] + 0.5) * (2.0 / height) - 1.0,
        ),
        -1,
    )


def _aligned(landmarks: F32, size: int) -> F32:
    """The map [2, 5] of an aligned chip's pixels into the picture."""
    matrix = alignment(landmarks, size)
    inverse = np.linalg.inv(matrix[:, :2])
    shift = -inverse @ matrix[:, 2]
    bounds = np.tile((-_FAR, _FAR), (2, 1))
    return np.concatenate((inverse, shift[:, None], bounds), 1).astype(np.float32)


def _context(box: F32, scale: float, width: int, height: int, size: int) -> F32:
    """The map [2, 5] of a context crop's pixels into the picture."""
    left, top, right, bottom = context_region(box, scale, width, height)
    across, down = (right - left) / size, (bottom - top) / size
    return np.array(
        [
            [across, 0.0, 0.5 * across - 0.5 + left, left, right - 1],
            [0.0, down, 0.5 * down - 0.5 + top, top, bottom - 1],
        ],
        np.float32,
    )
