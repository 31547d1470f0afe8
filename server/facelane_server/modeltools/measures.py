"""Measures of verification, of separation and of detection. Everything is numpy, float64."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

MAX_IMPOSTOR_PAIRS: Final = 2_000_000
"""Enough to see a false accept rate of 1e-5 by twenty pairs."""
_ROWS_OF_ONE: Final = 1_000
_CHUNK: Final = 16_384
_BOOTSTRAP_WORK: Final = 50_000_000


def auroc(positive: npt.ArrayLike, negative: npt.ArrayLike) -> float:
    """Probability that a positive scores above a negative; ties count half."""
    p, n = np.asarray(positive, np.float64), np.sort(np.asarray(negative, np.float64))
    below = np.searchsorted(n, p, "left")
    upto = np.searchsorted(n, p, "right")
    return float((below + upto).mean() / 2 / len(n))


def pairs(
    identity: I64, seed: int, cap: int = 20, max_impostor: int = MAX_IMPOSTOR_PAIRS
) -> tuple[I64, I64]:
    """Genuine pairs [G, 2] (at most ``cap`` of each identity) and impostor pairs [I, 2].

    The impostor pairs are all there are, or a random choice of about ``max_impostor`` where
    there are more; memory grows with the choice, not with all.
    """
    rng = np.random.default_rng(seed)
    genuine: list[I64] = [np.zeros((0, 2), np.int64)]
    for who in np.unique(identity):
        rows = np.flatnonzero(identity == who)
        if len(rows) > _ROWS_OF_ONE:
            rows = rng.permutation(rows)[:_ROWS_OF_ONE]
        a, b = np.triu_indices(len(rows), 1)
        both = np.stack((rows[a], rows[b]), 1)
        genuine.append(rng.permutation(both)[:cap])
    count = len(identity)
    if count * (count - 1) // 2 <= max_impostor:
        a, b = np.triu_indices(count, 1)
    else:
        drawn = rng.integers(0, count, (max_impostor, 2))
        code = np.unique(drawn.min(1) * count + drawn.max(1))
        a, b = code // count, code % count
    different = identity[a] != identity[b]
    return np.concatenate(genuine), np.stack((a[different], b[different]), 1)


def similarities(vectors: npt.NDArray[np.float32], rows: I64) -> F64:
    """Cosines of the pairs ``rows`` [P, 2] of unit ``vectors`` [N, D], in bounded memory."""
    out = np.empty(len(rows), np.float64)
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        np.einsum(
            "nd,nd->n", vectors[part[:, 0]], vectors[part[:, 1]], out=out[start : start + _CHUNK]
        )
    return out


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score; (0, 1) of nothing."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = hits / count, 1.96**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = 1.96 * np.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def share_interval(hit: npt.NDArray[np.bool_], subjects: I64, seed: int) -> tuple[float, float]:
    """95 % interval of the share of pairs with ``hit`` [P], pairs of one person being alike.

    ``subjects`` [P, 2]: who is in each pair. People are drawn with replacement, a pair
    weighing by how often both of its people came; the answer is never narrower than
    Wilson's for as many independent pairs.
    """
    low, high = wilson(int(hit.sum()), len(hit))
    if not len(hit):
        return low, high
    rng = np.random.default_rng(seed)
    everyone, members = np.unique(subjects, return_inverse=True)
    # Pairs between the same two people weigh alike: keep one row for each two people.
    members = members.reshape(-1, 2)
    code, row = np.unique(members[:, 0] * len(everyone) + members[:, 1], return_inverse=True)
    first, second = code // len(everyone), code % len(everyone)
    total = np.bincount(row, minlength=len(code)).astype(np.float64)
    hits = np.bincount(row, weights=hit, minlength=len(code))
    rates: list[float] = []
    rounds = int(np.clip(_BOOTSTRAP_WORK // len(code), 50, 1000))
    for _ in range(rounds):
        drawn = rng.integers(0, len(everyone), len(everyone))
        weight = np.bincount(drawn, minlength=len(everyone)).astype(np.float64)
        both = np.where(first == second, weight[first], weight[first] * weight[second])
        seen = float(both @ total)
        if seen:
            rates.append(float(both @ hits) / seen)
    if rates:
        low, high = min(low, *np.quantile(rates, [0.025])), max(high, *np.quantile(rates, [0.975]))
    return float(low), float(high)


def accuracy_10_fold(genuine: F64, impostor: F64, seed: int) -> float:
    """Mean accuracy over ten folds, each at the threshold that is best on the other nine.

    As many impostor pairs as genuine ones are drawn (or the reverse); NaN with fewer than
    ten of either.
    """
    rng = np.random.default_rng(seed)
    count = min(len(genuine), len(impostor))
    if count < 10:
        return float("nan")
    same, other = rng.permutation(genuine)[:count], rng.permutation(impostor)[:count]
    fold = np.arange(count) % 10
    hits: list[float] = []
    for k in range(10):
        threshold = best_threshold(same[fold != k], other[fold != k])
        test_same, test_other = same[fold == k], other[fold == k]
        right = (test_same >= threshold).sum() + (test_other < threshold).sum()
        hits.append(right / (len(test_same) + len(test_other)))
    return float(np.mean(hits))


def best_threshold(genuine: F64, impostor: F64) -> float:
    """The threshold of highest balanced accuracy, in the middle of the gap that it lies in."""
    values = np.unique(np.concatenate((genuine, impostor)))
    passed = 1 - np.searchsorted(np.sort(genuine), values, "left") / len(genuine)
    stopped = np.searchsorted(np.sort(impostor), values, "left") / len(impostor)
    return _middle(values, int(np.argmax(passed + stopped)))


def _middle(values: F64, at: int) -> float:
    """Between ``values[at]`` and the one below: every threshold in that gap does the same to
    what was measured, and its middle is the likeliest to do so to what was not."""
    low, high = float(values[max(at - 1, 0)]), float(values[at])
    middle = (low + high) / 2
    return middle if middle > low else high


def threshold_at_far(impostor: F64, far: float) -> float:
    """The lowest threshold that at most ``far`` of the impostors reach."""
    ordered = np.sort(impostor)[::-1]
    allowed = int(np.floor(far * len(ordered)))
    return float(np.nextafter(ordered[min(allowed, len(ordered) - 1)], np.inf))


def rounded_up(threshold: float, digits: int = 3) -> float:
    """For a manifest: not under ``threshold``, or what it was chosen to stop would pass."""
    step = 10.0**digits
    return float(np.ceil(round(threshold * step, 6)) / step)


def error_curve(genuine: F64, impostor: F64, points: int = 400) -> tuple[F64, F64, F64]:
    """(threshold, false accept rate, false reject rate), FAR falling.

    ``points`` thresholds are spread evenly over the logarithm of the FAR, where its tail
    matters, and as many over the genuine scores, where the impostors have ended.
    """
    far = np.geomspace(1.0, 1.0 / max(2, len(impostor)), points)
    ends = np.quantile(genuine, np.linspace(0, 1, points))
    lowest = min(float(genuine.min()), float(impostor.min()))
    thresholds = np.unique([lowest, *(threshold_at_far(impostor, f) for f in far), *ends])
    accepted = 1 - np.searchsorted(np.sort(impostor), thresholds, "left") / len(impostor)
    rejected = np.searchsorted(np.sort(genuine), thresholds, "left") / len(genuine)
    return thresholds, accepted, rejected


def equal_error(genuine: F64, impostor: F64) -> tuple[float, float]:
    """(threshold, rate) where as many impostors pass as genuine ones fail."""
    values = np.unique(np.concatenate((genuine, impostor)))
    rejected = np.searchsorted(np.sort(genuine), values, "left") / len(genuine)
    accepted = 1 - np.searchsorted(np.sort(impostor), values, "left") / len(impostor)
    at = int(np.argmin(np.abs(rejected - accepted)))
    return _middle(values, at), float((rejected[at] + accepted[at]) / 2)


def reject_curve(score: F64, similarity: F64, genuine: npt.NDArray[np.bool_], shares: F64) -> F64:
    """Verification error among the pairs that remain after rejecting the worst shares.

    The error is one minus the balanced accuracy at the best threshold of the whole set.
    """
    threshold = best_threshold(similarity[genuine], similarity[~genuine])
    wrong = (similarity >= threshold) != genuine
    order = np.argsort(score, kind="stable")
    out: list[float] = []
    for share in shares:
        kept = order[int(share * len(order)) :]
        same = genuine[kept]
        parts = [wrong[kept][side].mean() for side in (same, ~same) if side.any()]
        out.append(float(np.mean(parts)))
    return np.array(out)


def average_precision(score: F64, right: npt.NDArray[np.bool_], truths: int) -> float:
    """Area under precision over recall, of finds with ``score`` [F] of which ``right`` [F]
    are right, among ``truths`` true ones; precision is made to fall with recall."""
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(right[order], dtype=np.float64)
    precision = hits / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((best * right[order]).sum() / max(1, truths))


def match_boxes(found: npt.ArrayLike, truth: npt.ArrayLike, iou: float = 0.5) -> I64:
    """[F]: for each found box, best first, the true box (x, y, w, h) that it takes, or -1.

    Each true box is taken once, by the first found one whose IoU reaches ``iou``.
    """
    boxes = np.asarray(found, np.float64).reshape(-1, 4)
    others = np.asarray(truth, np.float64).reshape(-1, 4)
    out = np.full(len(boxes), -1, np.int64)
    free = np.ones(len(others), bool)
    for i, box in enumerate(boxes):
        if not free.any():
            break
        corner = np.maximum(box[:2], others[:, :2])
        far = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
        overlap = (far - corner).clip(0).prod(1)
        area = box[2] * box[3] + others[:, 2] * others[:, 3] - overlap
        ratio = np.where(free, overlap / np.maximum(area, 1e-9), -1.0)
        best = int(np.argmax(ratio))
        if ratio[best] >= iou:
            out[i], free[best] = best, False
    return out
