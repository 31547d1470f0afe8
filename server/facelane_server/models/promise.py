"""From a promise to a threshold: how similar a face must be before it is given a name.

A bare cosine means something else in every gallery: each template that is searched is one more
chance for a stranger to resemble somebody. What an operator can want is a bound on the share of
strangers that are named (``false_naming``). The threshold follows from it, from how many
templates are searched, and from what was measured of the recogniser: how similar different
people are to it, by bands of the probe's OOD score, because a worse look proves less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Band(Protocol):
    """Similarities of different people, for probes with at least this OOD score.

    ``similarity[k]``: the cosine that a share of 10 ** -(k + 1) of them reaches or exceeds;
    rising. See ``models.package.Impostors``.
    """

    @property
    def ood(self) -> float: ...

    @property
    def similarity(self) -> Sequence[float]: ...


@dataclass(frozen=True, slots=True)
class Promise:
    """``false_naming``: the share of strangers that may be named, (0, 1). ``bands``: what was
    measured of the recogniser, the least OOD score first, at least one."""

    false_naming: float
    bands: tuple[Band, ...]

    def match(self, ood_score: float, searched: int) -> float:
        """Least cosine of a match, [-1, 1], for a probe of this OOD score among ``searched``
        templates. It falls with the score and rises with the number."""
        rate = self.rate(searched)
        # A probe below the first band is judged as those in it; the caller has rejected it.
        at = max((k for k, band in enumerate(self.bands) if ood_score >= band.ood), default=0)
        # Never more lenient than with a better look, whatever the measurement's noise says.
        return max(similarity_at(band.similarity, rate) for band in self.bands[at:])

    def rate(self, searched: int) -> float:
        """The share of single comparisons that may err: they count as independent, which is
        the worst that their number can do."""
        return -math.expm1(math.log1p(-self.false_naming) / max(1, searched))


def similarity_at(similarity: Sequence[float], rate: float) -> float:
    """The cosine that a share ``rate``, (0, 1), of different people reaches.

    Between the decades a straight line over the logarithm of the share; beyond the last one
    the line goes on, which errs on the safe side, because real tails fall ever faster.
    """
    decade = -math.log10(rate) - 1.0
    last = len(similarity) - 1
    at = min(max(math.floor(decade), 0), last - 1)
    step = similarity[at + 1] - similarity[at]
    return min(1.0, max(-1.0, similarity[at] + (decade - at) * step))
