"""The crops of ``crops`` as torch operations, for pictures that lie on a GPU.

Bilinear sampling in float32; the CPU's version works with 5-bit fractions, so the two
differ by less than one grey level on average.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from facelane_server.worker.models.api import F32, AlignedCrop, CropSpec
from facelane_server.worker.models.crops import alignment, context_region


def cut(picture: Tensor, boxes: F32, landmarks: F32, specs: Sequence[CropSpec]) -> list[Tensor]:
    """For each spec the crops uint8 [N, size, size, 3] of the N faces of ``picture``
    (uint8 [H, W, 3]), on the picture's device."""
    planes = picture.permute(2, 0, 1)[None].float()
    height, width = picture.shape[:2]
    results: list[Tensor] = []
    for spec in specs:
        if not len(boxes):
            results.append(picture.new_zeros((0, spec.size, spec.size, 3)))
            continue
        steps = np.arange(spec.size, dtype=np.float64)
        if isinstance(spec, AlignedCrop):
            points = np.stack([_aligned(landmarks[i], spec.size, steps) for i in range(len(boxes))])
        else:
            points = np.stack([_context(box, spec.scale, width, height, steps) for box in boxes])
        # Pixel centres to [-1, 1] with align_corners=False.
        grid = (points + 0.5) * (2.0 / np.array([width, height])) - 1.0
        sampled = F.grid_sample(
            planes.expand(len(boxes), -1, -1, -1),
            torch.from_numpy(grid.astype(np.float32)).to(picture.device, non_blocking=True),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        results.append(sampled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    return results


def _aligned(landmarks: F32, size: int, steps: np.ndarray) -> np.ndarray:
    """Picture coordinates [size, size, 2] of the pixels of an aligned chip."""
    matrix = alignment(landmarks, size)
    inverse = np.linalg.inv(matrix[:, :2])
    x, y = np.meshgrid(steps, steps)
    return (np.stack((x, y), -1) - matrix[:, 2]) @ inverse.T


def _context(box: F32, scale: float, width: int, height: int, steps: np.ndarray) -> np.ndarray:
    """Picture coordinates [size, size, 2] of the pixels of a context crop."""
    left, top, right, bottom = context_region(box, scale, width, height)
    size = len(steps)
    x = np.clip((steps + 0.5) * ((right - left) / size) - 0.5, 0, right - left - 1) + left
    y = np.clip((steps + 0.5) * ((bottom - top) / size) - 0.5, 0, bottom - top - 1) + top
    return np.stack(np.meshgrid(x, y), -1)
