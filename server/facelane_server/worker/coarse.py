"""Exact search of many templates on a CPU: coarsely in 8 bits, then again in full what could win.

Searching a large gallery is reading it, so it is read as small as it can be: every row as 8-bit
integers with a scale of its own, a quarter of float32 (1 million x 512 are 0.5 GB instead of 2).
For each row the length of what rounding took away is known, and by Cauchy and Schwarz no cosine
is off by more. A row whose coarse cosine, with twice the greatest such error, does not reach the
best ones found cannot be among them; the others, a few dozen of a million, are scored again in
float32 from the templates as they are, which stay where they were mapped. What comes back is what
a search of everything in float32 finds. Where too many come near (a gallery of one face, say),
everything is searched in float32.

Both products are PyTorch's, on the processor's 8-bit and bfloat16 units where it has them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from facelane_server.models.api import F32

LEAST_ROWS: Final = 50_000
"""Below, float32 is as quick, and PyTorch need not be loaded for it."""
_BLOCK: Final = 128
"""Rows of which the best coarse cosine is kept, to find out what could win."""
_BUILD_ROWS: Final = 16_384
_FULL_ROWS: Final = 16_384
_MOST_AGAIN: Final = 65_536
"""Rows that are scored again one by one; more are searched as a whole."""
_BF16: Final = 2.0**-8
"""Relative error of a bfloat16, rounded: at most half of it."""
_TRIED_ROWS: Final = 131_072
"""More than caches hold."""
_NEVER: Final = -4.0
"""Below every cosine, by more than it may be off: of rows that were removed."""


class CoarseRows:
    """Rows in 8 bits, and the templates behind them (float16, [rows, dim], not copied)."""

    def __init__(self, matrix: npt.NDArray[np.float16]) -> None:
        import torch

        self._torch: Any = torch
        rows, dim = matrix.shape
        self._matrix = matrix
        self._removed = np.zeros(rows, bool)
        self._any_removed = False
        # NumPy's memory, not PyTorch's: it asks for huge pages, and reading is all there is to it.
        written = np.empty((rows, dim), np.int8)
        self._scales: F32 = np.empty(rows, np.float32)
        errors: F32 = np.empty(rows, np.float32)
        for first in range(0, rows, _BUILD_ROWS):
            last = min(first + _BUILD_ROWS, rows)
            block = matrix[first:last].astype(np.float32)
            scales = np.maximum(np.abs(block).max(axis=1), 1e-12) / 127.0
            rounded = np.rint(block / scales[:, None])
            written[first:last] = rounded
            block -= rounded * scales[:, None]
            self._scales[first:last] = scales
            errors[first:last] = np.sqrt(np.einsum("nd,nd->n", block, block))
        self._codes = torch.from_numpy(written)
        self._factors = torch.from_numpy(self._scales).bfloat16()
        self._error = float(errors.max(initial=0.0)) * 1.001
        self._longest = 1.01
        """Of a row: a unit vector in float16, or of zeros."""
        self._one = self._is_quicker_alone()

    @staticmethod
    def can() -> bool:
        """Whether this PyTorch has what it takes."""
        try:
            import torch
        except (ImportError, OSError):  # not there, or out of a confined worker's reach
            return False
        return hasattr(torch, "_int_mm") and hasattr(torch, "_weight_int8pack_mm")

    def remove(self, rows: Sequence[int]) -> None:
        """They are never found again; their codes are overwritten."""
        chosen = np.asarray(rows, np.intp)
        self._removed[chosen] = True
        self._any_removed = True
        self._codes[self._torch.from_numpy(chosen)] = 0

    def best_of_subjects(
        self,
        probes: F32,
        first: int,
        starts: npt.NDArray[np.intp],
        last: int,
        keep: int,
        chunks: Sequence[tuple[int, int, int, int]],
    ) -> list[list[tuple[int, float]]]:
        """For each probe (unit vectors [N, dim]) the (place in ``starts``, cosine) of the best
        ``keep`` subjects, best first, of rows [first, last), whose subjects begin at ``starts``,
        relative to ``first``. ``chunks``: (first subject, last subject, first row, last row),
        relative too, cut between subjects."""
        bounds = np.append(starts, last - first)
        keep = min(keep, len(starts))
        # Of so many blocks' best, at least ``keep`` are of different subjects: the rows of one lie
        # side by side.
        longest = int(np.diff(bounds).max())
        blocks = keep * ((longest - 2) // _BLOCK + 2 if longest > 1 else 1)
        tops: F32 = np.full((blocks, len(probes)), _NEVER, np.float32)
        near: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], F32]] = []
        error = 0.0
        for _, _, begin, end in chunks:
            scores, error = self._coarse(probes, first + begin, first + end)
            if self._any_removed:
                scores[self._removed[first + begin : first + end]] = _NEVER
            tops = _best(np.concatenate([tops, _block_tops(scores)]), blocks)
            rows, columns = np.nonzero(scores >= tops[0] - 2 * error)
            near.append((rows + begin, columns, scores[rows, columns]))
            if sum(len(part[0]) for part in near) > _MOST_AGAIN * len(probes):
                everybody = np.arange(len(starts))
                return [self._again(probe, everybody, first, bounds, keep) for probe in probes]
        rows, columns = (np.concatenate([part[i] for part in near]) for i in (0, 1))
        cosines = np.concatenate([part[2] for part in near])
        # What a later chunk has outdone is left out.
        still = cosines >= np.maximum(tops[0] - 2 * error, _NEVER / 2)[columns]
        subjects = np.searchsorted(starts, rows, side="right") - 1
        return [
            self._again(
                probe, np.unique(subjects[still & (columns == column)]), first, bounds, keep
            )
            for column, probe in enumerate(probes)
        ]

    # -- coarsely -----------------------------------------------------------------------------

    def _coarse(self, probes: F32, first: int, last: int) -> tuple[F32, float]:
        """Cosines [rows, N], and by how much one may be off."""
        if len(probes) == 1 and self._one:
            return self._alone(probes, first, last)
        return self._together(probes, first, last)

    def _alone(self, probes: F32, first: int, last: int) -> tuple[F32, float]:
        """One probe: the rows stay 8-bit, the arithmetic is bfloat16's."""
        torch = self._torch
        with torch.inference_mode():
            given = torch.from_numpy(probes).bfloat16()
            scores = torch._weight_int8pack_mm(
                given, self._codes[first:last], self._factors[first:last]
            )
            found: F32 = scores.float().numpy().T
        # The probe, the scale and the answer are each rounded to bfloat16.
        return found, self._error + 3 * _BF16 * self._longest * self._longest

    def _together(self, probes: F32, first: int, last: int) -> tuple[F32, float]:
        """Several: 8-bit products, summed in 32 bits."""
        torch = self._torch
        scales = np.maximum(np.abs(probes).max(axis=1), 1e-12) / 127.0
        rounded = np.rint(probes / scales[:, None])
        left = probes - rounded * scales[:, None]
        error = float(np.sqrt(np.einsum("nd,nd->n", left, left)).max(initial=0.0)) * 1.001
        with torch.inference_mode():
            codes = torch.from_numpy(np.ascontiguousarray(rounded.T.astype(np.int8)))
            products = torch._int_mm(self._codes[first:last], codes).float()
            products *= torch.from_numpy(self._scales[first:last, None])
            products *= torch.from_numpy(scales.astype(np.float32))
            scores: F32 = products.numpy()
        return scores, self._error + error * (self._longest + self._error) + 1e-5

    def _is_quicker_alone(self) -> bool:
        """Which of the two ways is quicker for one probe, on this processor."""
        rows = min(_TRIED_ROWS, len(self._matrix))
        probe = np.full((1, self._matrix.shape[1]), self._matrix.shape[1] ** -0.5, np.float32)

        def seconds(way: Any) -> float:
            taken = []
            for _ in range(5):
                began = time.perf_counter()
                way(probe, 0, rows)
                taken.append(time.perf_counter() - began)
            return min(taken)

        return seconds(self._alone) < seconds(self._together)

    # -- in full ------------------------------------------------------------------------------

    def _again(
        self,
        probe: F32,
        chosen: npt.NDArray[np.intp],
        first: int,
        bounds: npt.NDArray[np.intp],
        keep: int,
    ) -> list[tuple[int, float]]:
        """The best of the chosen subjects, scored in full."""
        lengths = bounds[chosen + 1] - bounds[chosen]
        if lengths.sum() > _MOST_AGAIN:
            exact = self._in_full(probe, first, bounds)
            chosen = np.arange(len(bounds) - 1)
        else:
            # Every row of the chosen subjects, side by side, and where each subject's begin.
            begins = np.cumsum(lengths) - lengths
            rows = np.arange(lengths.sum()) + np.repeat(bounds[chosen] - begins, lengths) + first
            scores = self._matrix[rows].astype(np.float32) @ probe
            scores[self._removed[rows]] = _NEVER
            exact = np.maximum.reduceat(scores, begins) if len(chosen) else np.empty(0, np.float32)
        order = np.argsort(-exact, kind="stable")[:keep]
        return [(int(chosen[i]), float(exact[i])) for i in order if exact[i] > _NEVER / 2]

    def _in_full(self, probe: F32, first: int, bounds: npt.NDArray[np.intp]) -> F32:
        """The cosine of every subject's best row."""
        last = first + int(bounds[-1])
        scores: F32 = np.empty(last - first, np.float32)
        for begin in range(first, last, _FULL_ROWS):
            end = min(begin + _FULL_ROWS, last)
            scores[begin - first : end - first] = self._matrix[begin:end].astype(np.float32) @ probe
        scores[self._removed[first:last]] = _NEVER
        found: F32 = np.maximum.reduceat(scores, bounds[:-1])
        return found


def _block_tops(scores: F32) -> F32:
    """The best of every ``_BLOCK`` rows, by column."""
    rows, columns = scores.shape
    whole = rows // _BLOCK * _BLOCK
    if columns == 1:  # else each of its inner loops would be one number long
        tops = scores[:whole, 0].reshape(-1, _BLOCK).max(axis=1)[:, None]
    else:
        tops = scores[:whole].reshape(-1, _BLOCK, columns).max(axis=1)
    rest = scores[whole:]
    return np.concatenate([tops, rest.max(axis=0, keepdims=True)]) if len(rest) else tops


def _best(tops: F32, count: int) -> F32:
    """The ``count`` greatest of each column, the least of them first."""
    found: F32 = np.partition(tops, len(tops) - count, axis=0)[len(tops) - count :]
    return found
