"""From a detector's candidates to faces, vectorised on the host.

A candidate is a row of 15 float32: score, x, y, w, h, five landmarks (x, y).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from facelane_server.models.api import F32

WIDTH: Final = 15
TOP: Final = 1024
"""Candidates kept a picture before suppression: a face raises some twenty."""
TURNED: Final = 0.3
"""Of ``turn``: from here on a face is turned to the side."""

_STRIDES: Final = (8, 16, 32)
HEADS: Final = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}
"""YuNet's heads and how many values each has for a cell."""


def select(candidates: F32, *, score: float, iou: float, limit: int) -> F32:
    """The faces among ``candidates`` [K, 15]: score at least ``score``, best first, none
    overlapping a better one by more than ``iou``, at most ``limit``. Returns [n, 15]."""
    rows = candidates[candidates[:, 0] >= score]  # few are
    sound = np.isfinite(rows).all(1) & (rows[:, 3] > 0) & (rows[:, 4] > 0)
    rows = rows[sound]
    rows = rows[np.argsort(-rows[:, 0], kind="stable")]
    kept: list[int] = []
    low = rows[:, 1:3]
    high = low + rows[:, 3:5]
    area = rows[:, 3] * rows[:, 4]
    alive = np.arange(len(rows))
    while len(alive) and len(kept) < limit:
        best, alive = alive[0], alive[1:]
        kept.append(int(best))
        overlap = np.minimum(high[best], high[alive]) - np.maximum(low[best], low[alive])
        shared = overlap.clip(min=0).prod(1)
        alive = alive[shared <= iou * (area[best] + area[alive] - shared)]
    return rows[kept]


def believed(rows: F32, *, score: float, turned: float) -> npt.NDArray[np.bool_]:
    """Which of the faces ``rows`` [n, 15] are: score at least ``score``, or ``turned`` where the
    face is turned to the side. A network that learnt mostly faces seen from before scores turned
    ones less; what it takes for a face and is none is mostly seen from before too."""
    return (rows[:, 0] >= score) | ((rows[:, 0] >= turned) & (turn(rows) >= TURNED))


def turn(rows: F32) -> F32:
    """[n] how far each nose lies beside the line from between the eyes to the mouth, in its
    lengths: 0 from before, about 0.45 in profile."""
    five = rows[:, 5:].reshape(-1, 5, 2)
    eyes, mouth = five[:, :2].mean(1), five[:, 3:].mean(1)
    down, aside = mouth - eyes, five[:, 2] - eyes
    across = aside[:, 0] * down[:, 1] - aside[:, 1] * down[:, 0]
    found: F32 = np.abs(across) / np.square(down).sum(1).clip(min=1e-3)
    return found


def decode_yunet(outputs: Mapping[str, npt.NDArray[np.float32]], height: int, width: int) -> F32:
    """YuNet's outputs (``cls_8`` … ``kps_32``, each [N, A, c]) to candidates [N, A, 15].

    The same as ``architectures.yunet.decode``, without torch.
    """
    levels: list[F32] = []
    for stride in _STRIDES:
        count = len(outputs[f"cls_{stride}"])
        heads = {
            name: outputs[f"{name}_{stride}"].reshape(count, -1, size).astype(np.float32)
            for name, size in HEADS.items()
        }
        y, x = np.mgrid[: height // stride, : width // stride]
        grid = np.stack((x, y), -1).reshape(-1, 2).astype(np.float32)
        size = np.exp(np.minimum(heads["bbox"][..., 2:], 10.0)) * stride
        corner = (grid + heads["bbox"][..., :2]) * stride - size / 2
        offsets = heads["kps"].reshape(count, -1, 5, 2)
        points = ((offsets + grid[:, None, :]) * stride).reshape(count, -1, 10)
        score = np.sqrt(heads["cls"].clip(0, 1) * heads["obj"].clip(0, 1))
        levels.append(np.concatenate((score, corner, size, points), -1))
    return np.concatenate(levels, 1)
