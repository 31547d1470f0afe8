"""How similar different people are to a recogniser: measured, its tail fitted, and written into
the package, for the thresholds that follow from a promise (``models.promise``)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from facelane_server.domain import FacelaneError, Reason
from facelane_server.models.api import F32
from facelane_server.models.package import (
    IMPOSTOR_DECADES,
    MANIFEST,
    Impostors,
    Package,
    read_package,
)

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

BANDS: Final = 3
"""Bands of the OOD score, of one width from the package's threshold to 1."""
LEAST_PROBES: Final = 50
"""A band with fewer probes is one with its worse neighbour."""
LEAST_PAIRS: Final = 30
"""A share is counted where so many pairs reach its cosine, else it is read off the fitted tail."""
MOST_TEMPLATES: Final = 20_000
"""More are drawn from."""
_BINS: Final = 40_000
_CHUNK: Final = 512


class TooFewError(ValueError):
    """There are not enough different people to say anything."""


def measure(
    probes: F32, trust: F64, who: I64, templates: F32, owner: I64, least: float
) -> tuple[Impostors, ...]:
    """The similarities of different people by bands of the probes' OOD score.

    ``probes`` [P, D] and ``templates`` [T, D] of unit norm; ``trust`` [P] in [0, 1]; ``who`` [P]
    and ``owner`` [T] number the people. ``least``: the OOD threshold; probes below it count for
    nothing. Raises ``TooFewError``.
    """
    if len(templates) > MOST_TEMPLATES:
        drawn = np.random.default_rng(1).permutation(len(templates))[:MOST_TEMPLATES]
        templates, owner = templates[drawn], owner[drawn]
    edges = [least + (1.0 - least) * k / BANDS for k in range(BANDS)]
    rows: list[Impostors] = []
    held: list[int] = []
    for k in reversed(range(BANDS)):
        above = edges[k + 1] if k + 1 < BANDS else np.inf
        held += np.flatnonzero((trust >= edges[k]) & (trust < above)).tolist()
        if len(held) >= LEAST_PROBES or (k == 0 and held and not rows):
            counts = _histogram(probes[held], who[held], templates, owner)
            pairs = int(counts.sum())
            if pairs >= 10 * LEAST_PAIRS:
                cosines, measured = _decades(counts)
                rows.append(Impostors(round(edges[k], 4), pairs, measured, cosines))
                held = []
    if not rows:
        raise TooFewError("too few pictures of different people to tell how similar they are")
    if rows[-1].ood > edges[0]:
        # The worst looks were too few to count: they are judged as the next better ones.
        worst = rows.pop()
        rows.append(Impostors(round(edges[0], 4), worst.pairs, worst.measured, worst.similarity))
    return tuple(reversed(rows))


def _histogram(probes: F32, who: I64, templates: F32, owner: I64) -> I64:
    """[_BINS]: how many pairs of two people have a cosine in each bin of [-1, 1]."""
    counts = np.zeros(_BINS, np.int64)
    for start in range(0, len(probes), _CHUNK):
        cosines = probes[start : start + _CHUNK] @ templates.T
        different = who[start : start + _CHUNK, None] != owner[None, :]
        bins = ((cosines[different] + 1.0) * (_BINS / 2)).astype(np.int64).clip(0, _BINS - 1)
        counts += np.bincount(bins, minlength=_BINS)
    return counts


def _decades(counts: I64) -> tuple[tuple[float, ...], float]:
    """The cosines that 10 ** -1, -2, ... of the pairs reach, and the last share counted."""
    reached = np.cumsum(counts[::-1])[::-1] / counts.sum()
    lower = np.arange(_BINS) * (2.0 / _BINS) - 1.0

    def at(share: float) -> float:
        """The lowest cosine that at most this share reaches."""
        return float(lower[np.searchsorted(-reached, -share)])

    decades = [k for k in range(1, IMPOSTOR_DECADES + 1) if 10.0**-k * counts.sum() >= LEAST_PAIRS]
    last = decades[-1]
    cosines = [at(10.0**-k) for k in decades]
    # The tail: a straight line over the logarithm of the share, through its last one and a half
    # decades. Real tails fall faster, so what is read off it is on the safe side.
    grid = np.linspace(max(0.5, last - 1.5), last, 16)
    slope = float(np.polyfit(grid, [at(10.0**-g) for g in grid], 1)[0])
    cosines += [cosines[-1] + slope * (k - last) for k in range(last + 1, IMPOSTOR_DECADES + 1)]
    rising = [min(1.0, round(cosine, 4)) for cosine in cosines]
    for k in range(1, len(rising)):
        rising[k] = max(rising[k], round(rising[k - 1] + 1e-4, 4))
    return tuple(rising), float(f"{10.0**-last:g}")


_BLOCK = re.compile(r"\n*^\[\[impostors\]\]\n(?:(?!\[).*\n)*", re.MULTILINE)


def write(package: Package, rows: Sequence[Impostors]) -> Package:
    """Puts the rows into the package's manifest, in place of those that are there.

    The model's id stays what it is: embeddings are as comparable as before. Raises
    FacelaneError(ARGUMENT_INVALID) when the file cannot be written.
    """
    path = package.folder / MANIFEST
    try:
        text = _BLOCK.sub("\n", path.read_text(encoding="utf-8-sig")).rstrip("\n") + "\n"
        for row in rows:
            cosines = ", ".join(f"{cosine:g}" for cosine in row.similarity)
            text += (
                f"\n[[impostors]]\nood = {row.ood:g}\npairs = {row.pairs}\n"
                f"measured = {row.measured!r}\nsimilarity = [{cosines}]\n"
            )
        fresh = path.with_suffix(".new")
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        raise FacelaneError(
            Reason.ARGUMENT_INVALID,
            f"{path} cannot be written ({error.strerror}); copy the package to a folder of your "
            "own, and evaluate and serve that one",
        ) from error
    return read_package(package.folder)
