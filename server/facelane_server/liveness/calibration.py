"""The liveness thresholds of one source, from what living people score at it: pure.

A camera's own light, lens and codec move the scores of everybody whom it sees. What is looked at
are its tracks, each with the score that was fused over it, since pictures of one track say the same
thing again and again. ``live`` is meant to be the score that ``not_live`` (1 in 20) of its living
faces stay under: a quantile, of which so many tracks tell an interval only (95 % on either side,
without an assumption about how scores are distributed: two of the ordered scores, by the binomial
law).

* Where the package's threshold lies within that interval, nothing contradicts it: it stays.
* Where it lies above, living people are held up: it is lowered, to the interval's **upper** end,
  no further than the tracks are sure of.
* Where it lies below, attacks get more than they need: it is raised, to the **lower** end.

``spoof`` is only ever lowered, in the same way, until 1 in 100 living faces stays under it.

**Bounds.** Who stands before the camera in that time may be an attacker. So ``live`` falls by no
more than a quarter of the way to ``spoof``, and rises no further than half of what is left to 1;
``spoof`` falls by a quarter of itself. What the package refuses by more than that never becomes
LIVE.
Tracks under half of ``spoof`` are refused by far: they teach nothing, and where they are many the
camera is no case for a calibration.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from facelane_server.liveness.band import LivenessBand

CONFIDENCE: Final = 0.95
NOT_LIVE: Final = 0.05
"""The share of living faces that may not be LIVE, unless another one is asked for."""
SPOOF_SHARE: Final = 0.01
"""The share of living faces that may be SPOOF."""
FAR_SHARE: Final = 0.1
"""So many tracks that are refused by far, and nothing is calibrated."""
DOWN: Final = 0.25
"""How far ``live`` falls at most, of its distance to ``spoof``; and ``spoof``, of its own."""
UP: Final = 0.5
"""How far ``live`` rises at most, of its distance to 1."""


class Refusal(enum.StrEnum):
    """Why nothing was calibrated."""

    TOO_FEW = "TOO_FEW"
    """Tracks, for what is asked."""
    REFUSED_BY_FAR = "REFUSED_BY_FAR"
    """Too many tracks are of what the model takes for attacks, whatever the threshold."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Of the tracks: how many would be LIVE, and how many SPOOF, in [0, 1]."""

    live: float
    spoof: float


@dataclass(frozen=True, slots=True)
class Calibrated:
    """``band``: what is to hold. ``tracks``: those that taught it; ``far``: those that were refused
    by far. ``interval``: of the quantile. ``before``, ``after``: what becomes of all of them."""

    band: LivenessBand
    tracks: int
    far: int
    interval: tuple[float, float]
    before: Shares
    after: Shares


@dataclass(frozen=True, slots=True)
class Refused:
    """``wanted``: tracks that it takes."""

    reason: Refusal
    tracks: int
    far: int
    wanted: int


def least_tracks(not_live: float = NOT_LIVE) -> int:
    """So many tracks it takes to tell an interval of the quantile: 59 for 1 in 20."""
    count = 1
    while (1.0 - not_live) ** count > 1.0 - CONFIDENCE:
        count += 1
    return count


def bounds(base: LivenessBand) -> tuple[LivenessBand, LivenessBand]:
    """(the loosest, the strictest) band that a calibration of ``base`` can come to."""
    loosest = LivenessBand(base.live - DOWN * (base.live - base.spoof), base.spoof * (1.0 - DOWN))
    return loosest, LivenessBand(base.live + UP * (1.0 - base.live), base.spoof)


def calibrate(
    scores: Iterable[float], base: LivenessBand, *, not_live: float = NOT_LIVE
) -> Calibrated | Refused:
    """``scores`` in [0, 1]: one of each track of living people. ``base``: what the package says."""
    everybody = sorted(scores)
    near = [score for score in everybody if score >= base.spoof / 2]
    far = len(everybody) - len(near)
    wanted = least_tracks(not_live)
    if far > FAR_SHARE * len(everybody):
        return Refused(Refusal.REFUSED_BY_FAR, len(near), far, wanted)
    if len(near) < wanted:
        return Refused(Refusal.TOO_FEW, len(near), far, wanted)
    loosest, strictest = bounds(base)
    low, high = interval(near, not_live)
    live = base.live
    if live > high:
        live = max(high, loosest.live)
    elif live < low:
        live = min(low, strictest.live)
    _, calm = interval(near, SPOOF_SHARE)
    spoof = min(base.spoof, max(calm, loosest.spoof))
    band = LivenessBand(live, spoof)
    return Calibrated(
        band, len(near), far, (low, high), _shares(everybody, base), _shares(everybody, band)
    )


def interval(ordered: list[float], share: float) -> tuple[float, float]:
    """Two of the ``ordered`` scores between which the score lies, with ``CONFIDENCE`` on either
    side, that ``share`` of all such scores stay under. The lower one is 0 where so few scores
    tell none, and the upper one the largest."""
    count = len(ordered)
    # Of so many scores K lie under the quantile, and K is binomial. The k-th one lies at or under
    # it where K >= k, and at or above it where K < k.
    below = binomial_quantile(1.0 - CONFIDENCE, count, share)
    above = binomial_quantile(CONFIDENCE, count, share) + 1
    low = ordered[below - 1] if below >= 1 else 0.0
    return low, ordered[min(above, count) - 1]


def binomial_quantile(level: float, count: int, share: float) -> int:
    """The fewest of ``count`` trials, each of which succeeds with probability ``share`` (between 0
    and 1), that are reached or not exceeded with probability ``level`` at least."""
    whole = math.lgamma(count + 1)
    log_share, log_other = math.log(share), math.log1p(-share)
    summed = 0.0
    for k in range(count):
        ways = whole - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        summed += math.exp(ways + k * log_share + (count - k) * log_other)
        if summed >= level:
            return k
    return count


def _shares(scores: list[float], band: LivenessBand) -> Shares:
    count = max(1, len(scores))
    return Shares(
        sum(score >= band.live for score in scores) / count,
        sum(score < band.spoof for score in scores) / count,
    )
