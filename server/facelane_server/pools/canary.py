"""The canary's answers, held against what full precision said: half precision, a graph or a card
that computes wrongly is seen while it serves, and its worker is lost (WRONG_ANSWER).

Pure. What is asked is made by ``models.canary``; how far an answer may be from the known one is
what half precision costs, and some.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from facelane_server import limits
from facelane_server.ipc.arena import aligned
from facelane_server.models.canary import batch_buckets
from facelane_server.pools.tasks import (
    Answer,
    DetectAnswer,
    DetectRequest,
    EmbedAnswer,
    LivenessAnswer,
    Request,
)

WRONG_ANSWER: Final = "WRONG_ANSWER"
_SCORE: Final = 0.05
_PLACE: Final = 0.1
"""Of a box's larger side; and a pixel and a half."""
_PIXELS: Final = 1.5
_COSINE: Final = 0.995
_FACE_NUMBERS: Final = 15


def batch(requests: Sequence[Request], batch_max: int, turn: int) -> tuple[int, int]:
    """(which picture, how often) the ``turn``-th canary of a worker asks: for every batch
    bucket in turn, then with the next picture. As many as fit into a slot."""
    buckets = batch_buckets(batch_max)
    which = turn // len(buckets) % len(requests)
    request = requests[which]
    size = len(request.picture.data) if isinstance(request, DetectRequest) else 1
    fitting = limits.REQUEST_SLOT_BYTES // aligned(max(size, 1))
    return which, max(1, min(buckets[turn % len(buckets)], fitting))


def agrees(known: Sequence[float], answer: Answer, least: float) -> bool:
    """Whether ``answer`` is the ``known`` one. ``least``: of a detector, the score from which on
    a face is one; those just above it may come and go."""
    if isinstance(answer, DetectAnswer):
        if len(known) % _FACE_NUMBERS:
            return False
        expected = np.array(known, np.float64).reshape(-1, _FACE_NUMBERS)
        found = np.array(
            [
                [f.score, f.box.x, f.box.y, f.box.width, f.box.height, *np.ravel(f.landmarks)]
                for f in answer.faces
            ],
            np.float64,
        ).reshape(-1, _FACE_NUMBERS)
        return _all_among(expected, found, least) and _all_among(found, expected, least)
    if isinstance(answer, EmbedAnswer):
        vector = np.frombuffer(answer.vector, np.float32).astype(np.float64)
        expected = np.array(known[:-1], np.float64)
        if len(vector) != len(expected) or not len(vector):
            return False
        return bool(vector @ expected >= _COSINE) and abs(answer.ood_score - known[-1]) <= _SCORE
    if isinstance(answer, LivenessAnswer):
        return len(known) == 1 and abs(answer.score - known[0]) <= _SCORE
    return False


def _all_among(some: np.ndarray, others: np.ndarray, least: float) -> bool:
    """Whether every face of ``some`` that is none at the threshold is one of ``others``."""
    for row in some:
        if row[0] < least + _SCORE:
            continue
        apart = np.abs(others - row)
        slack = _PLACE * float(row[3:5].max()) + _PIXELS
        if not ((apart[:, 0] <= _SCORE) & (apart[:, 1:] <= slack).all(1)).any():
            return False
    return True
