"""Pictures with known answers: what is asked in turn, and which answers are right."""

from __future__ import annotations

import numpy as np
import pytest

from facelane_server import limits
from facelane_server.domain import Box, DetectedFace, Encoding, Picture
from facelane_server.models import canary as pictures
from facelane_server.models.api import Detector, DeviceOptions
from facelane_server.models.catalog import Catalog
from facelane_server.pools import canary
from facelane_server.pools.tasks import (
    DetectAnswer,
    DetectRequest,
    EmbedAnswer,
    LivenessAnswer,
    Request,
)
from facelane_server.worker.networks.load import load


def requests(*sizes: int) -> list[Request]:
    return [
        DetectRequest(Picture(Encoding.BGR24, bytes(size), 16, 16, 48), 4, 1 << 20)
        for size in sizes
    ]


def test_every_picture_is_asked_in_every_bucket_in_turn() -> None:
    asked = [canary.batch(requests(768, 768), 6, turn) for turn in range(8)]
    assert asked == [(0, 1), (0, 2), (0, 4), (0, 6), (1, 1), (1, 2), (1, 4), (1, 6)]
    assert canary.batch(requests(768, 768), 6, 8) == (0, 1)


def test_a_canary_fits_into_a_slot() -> None:
    large = requests(limits.REQUEST_SLOT_BYTES // 3)
    assert [canary.batch(large, 8, turn) for turn in range(4)] == [(0, 1), (0, 2), (0, 2), (0, 2)]


FACE = [0.9, 10, 20, 40, 50, 20, 40, 40, 40, 30, 50, 22, 60, 38, 60]


def answer(*rows: list[float]) -> DetectAnswer:
    return DetectAnswer(
        96,
        96,
        tuple(
            DetectedFace(
                Box(*row[1:5]), row[0], tuple(zip(row[5::2], row[6::2], strict=True)), (), b""
            )
            for row in rows
        ),
    )


def moved(by: float, score: float = 0.9) -> list[float]:
    return [score, *(value + by for value in FACE[1:])]


@pytest.mark.parametrize(
    ("known", "found", "right"),
    [
        (FACE, [FACE], True),
        (FACE, [moved(3.0, 0.88)], True),
        (FACE, [moved(9.0)], False),
        (FACE, [moved(0.0, 0.8)], False),
        (FACE, [], False),
        ([], [FACE], False),
        ([], [], True),
        # At the threshold of 0.5 faces come and go.
        ([], [moved(0.0, 0.52)], True),
        (moved(0.0, 0.52), [], True),
        ([*FACE, *moved(100.0)], [moved(100.0), FACE], True),
        ([*FACE, *moved(100.0)], [FACE], False),
        (FACE[:7], [FACE], False),
    ],
)
def test_faces(known: list[float], found: list[list[float]], right: bool) -> None:
    assert canary.agrees(known, answer(*found), 0.5) is right


def test_vectors_and_scores() -> None:
    rng = np.random.default_rng(2)
    vector = rng.normal(size=128).astype(np.float32)
    vector /= np.linalg.norm(vector)
    known = [*vector.tolist(), 0.7]
    assert canary.agrees(known, EmbedAnswer(0.71, (), vector.tobytes()), 0.0)
    assert not canary.agrees(known, EmbedAnswer(0.8, (), vector.tobytes()), 0.0)
    assert not canary.agrees(known, EmbedAnswer(0.7, (), (-vector).tobytes()), 0.0)
    assert not canary.agrees(known, EmbedAnswer(0.7, (), vector[:64].tobytes()), 0.0)
    broken = vector.copy()
    broken[3] = np.nan
    assert not canary.agrees(known, EmbedAnswer(0.7, (), broken.tobytes()), 0.0)
    assert canary.agrees([0.3], LivenessAnswer(0.33), 0.0)
    assert not canary.agrees([0.3], LivenessAnswer(0.9), 0.0)
    assert not canary.agrees([], LivenessAnswer(0.3), 0.0)


def test_the_drawn_face_is_one_to_the_starter_detector() -> None:
    """Or its canary would have no answer that can be wrong."""
    model = load(Catalog().resolve("facelane-detector"), DeviceOptions(), batch_max=1)
    assert isinstance(model, Detector)
    for picture in pictures.pictures(640):
        [found] = model.begin([picture], [pictures.MOST_FACES]).finish()
        assert len(found.scores) == 1
        assert found.scores[0] > 0.8
    model.close()
