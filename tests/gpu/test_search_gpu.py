"""Search of a gallery on a card: its kernels and its matrix product against the plainest way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from facelane_server import limits
from facelane_server.worker import card_search
from facelane_server.worker.card_search import FEW, CardRows, kernels_for

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

GPU = "cuda:0"


def units(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    matrix = rng.standard_normal((rows, dim)).astype(np.float32)
    matrix[rows // 2 :] = matrix[: rows - rows // 2] + 0.05 * matrix[rows // 2 :]  # nearly twice
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix


@pytest.mark.parametrize("probes", [1, 2, 4, 5, 32])
@pytest.mark.parametrize("dim", [8, 64, 200, 256, 512, 1_024, 12])
@pytest.mark.parametrize("most", [1, 3, 32])
def test_the_best_subjects_are_found(dim: int, most: int, probes: int) -> None:
    torch.zeros(1, device=GPU)
    rng = np.random.default_rng(dim + most + probes)
    for subjects in (1, 7, 300, 3_000):
        lengths = rng.integers(1, most + 1, subjects)
        starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
        first, rows = 5, int(lengths.sum())
        matrix = units(rng, first + rows + 9, dim).astype(np.float16)
        held = CardRows(matrix, GPU)
        gone: list[int] = []
        for _ in range(2):
            scores = matrix[first : first + rows].astype(np.float64)
            batch = units(rng, 2 * probes, dim)[:probes]
            batch[0] = scores[-1]
            scores = scores @ batch.T.astype(np.float64)
            scores[gone] = -2.0
            best = np.maximum.reduceat(scores, starts, axis=0).T
            for keep in (1, 5, limits.MAX_CANDIDATES):
                found = held.best_of_subjects(batch, first, starts, first + rows, keep)
                assert len(found) == probes
                for hits, expected in zip(found, best, strict=True):
                    there = np.sort(expected[expected > -1.5])[::-1][:keep]
                    assert [cosine for _, cosine in hits] == pytest.approx(there, abs=1e-5)
                    for place, cosine in hits:
                        assert cosine == pytest.approx(expected[place], abs=1e-5)
                    assert len({place for place, _ in hits}) == len(hits)
            gone = sorted(set(rng.integers(0, rows, rows // 2 + 1).tolist()))
            held.remove([first + row for row in gone])


@pytest.mark.parametrize("probes", [1, 2, 4])
@pytest.mark.parametrize("most", [1, 3])
def test_of_equal_ones_the_first_are_found(most: int, probes: int) -> None:
    torch.zeros(1, device=GPU)
    rng = np.random.default_rng(most + probes)
    for subjects in (4, 900, 20_000):
        lengths = rng.integers(1, most + 1, subjects)
        starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
        rows = int(lengths.sum())
        kinds = units(rng, 3, 64).astype(np.float16)
        matrix = kinds[rng.integers(0, 3, rows)]
        held = CardRows(matrix, GPU)
        batch = kinds.astype(np.float32)[[0, 1, 2, 0]][:probes]
        scores = (matrix.astype(np.float64) @ batch.T).round(4)
        best = np.maximum.reduceat(scores, starts, axis=0).T
        for hits, of_probe in zip(
            held.best_of_subjects(batch, 0, starts, rows, 10), best, strict=True
        ):
            expected = np.argsort(-of_probe, kind="stable")[:10]
            assert [place for place, _ in hits] == expected.tolist()
        assert held._desk is not None
        assert not held._desk.given.any()  # nothing of a probe stays


def test_there_are_kernels_for_few_probes() -> None:
    torch.zeros(1, device=GPU)
    assert all(kernels_for(torch.device(GPU), 512, few) for few in FEW)
    assert kernels_for(torch.device(GPU), 12, 1) is None
    assert kernels_for(torch.device(GPU), 2 * card_search._WIDEST, 1) is None
