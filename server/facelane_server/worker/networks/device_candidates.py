"""Suppression of ``candidates`` as torch operations of fixed shapes, fit for a CUDA graph.

Greedy suppression is a sequence: whether a candidate stays depends on all better ones. But
bounds of it are not: a candidate that no better one overlaps stays, and one that overlaps
such a candidate goes. A few rounds of this leave little more than the faces, and never lose
one. The host's ``candidates.select`` then does exactly what it does without it, on a
handful of rows instead of a thousand.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

SURVIVORS: Final = 256
"""Rows that are handed on: four times the most faces that a picture may have."""
ROUNDS: Final = 3
_AT_ONCE: Final = 4
"""Pictures compared at a time: each takes some 30 MiB for a thousand candidates."""


def survivors(candidates: Tensor, *, score: float, iou: float) -> Tensor:
    """Of ``candidates`` [n, K, 15], each picture's best first, those that greedy suppression
    may keep: [n, min(K, SURVIVORS), 15], best first; rows that are over have score 0."""
    parts = [_survivors(part, score, iou) for part in torch.split(candidates, _AT_ONCE)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _survivors(candidates: Tensor, score: float, iou: float) -> Tensor:
    sound = (
        (candidates[..., 0] >= score)
        & candidates.isfinite().all(2)
        & (candidates[..., 3] > 0)
        & (candidates[..., 4] > 0)
    )
    rows = candidates.masked_fill(~sound[..., None], 0.0)
    beaten = _beaten(rows, iou)
    alive = sound[..., None].to(beaten.dtype)
    stays = alive
    for _ in range(ROUNDS):
        certain = alive * (beaten @ stays == 0)
        stays = alive * (beaten @ certain == 0)
    # In the order that they came in, which breaks ties.
    first = stays[..., 0].sort(dim=1, descending=True, stable=True)
    count = min(SURVIVORS, rows.shape[1])
    kept = rows.gather(1, first.indices[:, :count, None].expand(-1, -1, rows.shape[2]))
    return kept.masked_fill((first.values[:, :count] == 0)[..., None], 0.0)


def _beaten(rows: Tensor, iou: float) -> Tensor:
    """[n, K, K]: 1 where the row's candidate overlaps the column's, which is better, by more
    than ``iou``. Half precision on a GPU, whose matrix products are fastest in it: sums of up
    to 2,048 ones are exact."""
    low, high = rows[..., 1:3], rows[..., 1:3] + rows[..., 3:5]
    across, down = (
        (
            torch.minimum(high[:, :, None, axis], high[:, None, :, axis])
            - torch.maximum(low[:, :, None, axis], low[:, None, :, axis])
        ).clamp(min=0)
        for axis in (0, 1)
    )
    shared = across * down
    area = rows[..., 3] * rows[..., 4]
    over = shared > iou * (area[:, :, None] + area[:, None, :] - shared)
    dtype = torch.float16 if rows.is_cuda else torch.float32
    return over.tril(-1).to(dtype)
