"""Wald's sequential test over the looks at one track: is it a living face?

Every look adds the logarithm of how much likelier its score is of a living face than of an attack.
A liveness network is trained to say how probable a living face is, so that is the logit of its
score less the logit of the score which tells nothing: the middle between the two thresholds. One
look's say is bounded (``MOST``), so that none decides alone where few errors are allowed.

Looks at one face are no independent witnesses: a print that fools the network once will do so
again. Of n looks that correlate alike by r, the sum counts 1 / (1 + (n - 1) r) times (for normal
scores that is exactly what they are worth together), so all looks together never count for more
than 1 / r independent ones. The ratio of likelihoods of an attack is a martingale: over a track of
any length it reaches (1 - b) / a with a probability of a / (1 - b) at most, and a and b are what
was allowed. These rates hold as far as scores are the probabilities that they are meant to be; a
doubt about who the face is begins the test anew, and an attacker has another try.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

CORRELATION: Final = 0.5
"""Of the scores of two looks at one track, beyond what is common to all tracks."""
MOST: Final = 4.0
"""The most that one look says, in nats: a likelihood ratio of 55."""
_EDGE: Final = 1e-6


class SequentialTest(msgspec.Struct, frozen=True):
    """``false_live``: the share of attacks that may be called LIVE; ``false_spoof``: of living
    faces that may be called SPOOF; both in (0, 0.5)."""

    false_live: float
    false_spoof: float

    def __post_init__(self) -> None:
        if not (0.0 < self.false_live < 0.5 and 0.0 < self.false_spoof < 0.5):
            raise ValueError("false_live and false_spoof lie between 0 and 0.5")

    @property
    def live_from(self) -> float:
        """Evidence in nats from which on a track is LIVE, positive."""
        return math.log((1.0 - self.false_spoof) / self.false_live)

    @property
    def spoof_below(self) -> float:
        """Evidence below which it is SPOOF, negative."""
        return math.log(self.false_spoof / (1.0 - self.false_live))

    def says_live(self, said: float, looks: int) -> bool:
        """``said``: the sum of ``evidence`` of so many ``looks``."""
        return together(said, looks) >= self.live_from

    def says_spoof(self, said: float, looks: int) -> bool:
        return together(said, looks) <= self.spoof_below


def evidence(score: float, live: float, spoof: float) -> float:
    """What one look says, in nats, within [-MOST, MOST]: positive for a living face. ``live``,
    ``spoof``: the thresholds, whose middle tells nothing."""
    said = _logit(score) - _logit((live + spoof) / 2)
    return max(-MOST, min(MOST, said))


def together(said: float, looks: int) -> float:
    """What the looks say together; 0 of none."""
    return said / (1.0 + (looks - 1) * CORRELATION) if looks > 0 else 0.0


def _logit(share: float) -> float:
    inside = min(1.0 - _EDGE, max(_EDGE, share))
    return math.log(inside / (1.0 - inside))
