"""The search in 8 bits finds what the plainest search finds, whatever the gallery is like."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facelane_server.worker import coarse, search

pytest.importorskip("torch")

DIM = 64


def units(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def gallery(kind: str, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Of unrelated people; of faces that are all but the same; of rows whose 8 bits are coarse
    (one great value); of one row many times; of nothing."""
    made = rng.standard_normal((rows, DIM))
    if kind == "alike":
        made = made[:1] + 0.01 * made
    elif kind == "spiked":
        made *= 0.02
        made[np.arange(rows), rng.integers(0, DIM, rows)] += 1.0
    elif kind == "repeated":
        made[:] = made[0]
    elif kind == "zeros":
        made[:] = 0.0
    return units(made).astype(np.float16)


def plain(
    probe: np.ndarray, matrix: np.ndarray, starts: np.ndarray, gone: set[int]
) -> dict[int, float]:
    scores = matrix.astype(np.float64) @ probe
    scores[list(gone)] = -2.0
    best = np.maximum.reduceat(scores, starts)
    return {place: float(best[place]) for place in range(len(starts)) if best[place] > -1.5}


@settings(max_examples=60)
@given(
    kind=st.sampled_from(["unrelated", "alike", "spiked", "repeated", "zeros"]),
    subjects=st.lists(st.integers(1, 4), min_size=1, max_size=300),
    probes=st.integers(1, 4),
    keep=st.integers(1, 10),
    chunk=st.integers(1, 400),
    again=st.sampled_from([2, 65_536]),
    block=st.sampled_from([2, 16, 1_024]),
    seed=st.integers(0, 1_000),
)
def test_it_finds_what_the_plainest_search_finds(
    kind: str,
    subjects: list[int],
    probes: int,
    keep: int,
    chunk: int,
    again: int,
    block: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    before, after = 3, sum(subjects)
    matrix = gallery(kind, before + after, rng)
    owners = np.repeat(np.arange(len(subjects), dtype=np.int32), subjects)
    segment = search._segment(
        before, before + after, np.concatenate([np.full(before, -1, np.int32), owners])
    )
    batch = units(
        matrix[before : before + 1].astype(np.float64) + rng.standard_normal((probes, DIM))
    )
    batch = batch.astype(np.float32)
    gone = set(rng.integers(0, after, after // 3).tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_CHUNK_ROWS", chunk)
        patch.setattr(coarse, "_MOST_AGAIN", again)
        patch.setattr(coarse, "_BLOCK", block)
        rows = search._CoarseRows(matrix)
        rows.remove([before + row for row in gone])
        for one in (True, False):
            rows._rows._one = one
            found = rows.best_of_subjects(batch, segment, keep)
            assert len(found) == probes
            for probe, hits in zip(batch, found, strict=True):
                known = plain(probe.astype(np.float64), matrix[before:], segment.starts, gone)
                best = sorted(known.values(), reverse=True)[:keep]
                assert [cosine for _, cosine in hits] == pytest.approx(best, abs=1e-5)
                for subject, cosine in hits:
                    assert cosine == pytest.approx(known[subject], abs=1e-5)
                assert len({subject for subject, _ in hits}) == len(hits)


def test_a_large_gallery_is_searched_so_and_a_small_one_in_float32() -> None:
    assert coarse.CoarseRows.can()
    few = np.zeros((10, DIM), np.float16)
    assert isinstance(search._rows(few, "cpu"), search._NumpyRows)
    many = np.zeros((coarse.LEAST_ROWS, DIM), np.float16)
    assert isinstance(search._rows(many, "cpu"), search._CoarseRows)
