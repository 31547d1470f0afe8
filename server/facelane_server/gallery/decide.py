"""Open-set decisions: pure functions from scores and thresholds to what is said of a face.

The order is the rule. Trust first: a face whose OOD score is below its threshold is
``REJECTED_OOD`` and nothing is said of who it may be, candidates included. Then the best
subject must be near enough (``UNKNOWN`` otherwise), and far enough from the next one
(``AMBIGUOUS`` otherwise). There is no silent best guess.

A score that is not a number never passes a threshold: NaN is no evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from facelane_server import limits
from facelane_server.domain import (
    Candidate,
    Decision,
    Identity,
    Liveness,
    LivenessVerdict,
)
from facelane_server.liveness.band import LivenessBand
from facelane_server.liveness.sequential import SequentialTest
from facelane_server.models.promise import Band, Promise

BEYOND_DOUBT: Final = 0.01
"""A look is beyond doubt when it would match for this share of the promise, too."""
RESEMBLING: Final = 0.25
"""Share of the OOD threshold from which on a face may pass for the one that it was a moment ago."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What the decisions compare with; from the model packages, or the config's overrides.

    ``match``: least cosine of a match, [-1, 1], where there is no ``promise`` that it follows
    from (``match_at``). ``margin``: least distance in cosine
    between the best subject and the next, [0, 2]. ``ood``: least OOD score, [0, 1].
    ``enroll_ood``: the same for a face that is enrolled; half of ``ood`` unless given.
    ``live``: scores from here on are LIVE. ``spoof``: scores below are SPOOF;
    0 <= spoof <= live <= 1. Raises ``ValueError`` outside of these ranges.
    """

    match: float
    margin: float = 0.05
    ood: float = 0.4
    live: float = 0.5
    spoof: float = 0.5
    enroll_ood: float | None = None
    promise: Promise | None = None
    bands: tuple[Band, ...] = ()
    """What was measured of the recogniser, whether a promise follows from it or not."""
    least: float = -1.0
    """A match needs this cosine at least, whatever the promise says, [-1, 1]."""
    grain: float = 0.0
    """Match thresholds are rounded up to a multiple of it; 0 = as they are."""
    looks: int = 2
    """How many looks of a track must agree before it is named, 1 or 2, where there is a promise;
    one will do where it is beyond doubt (``certain_at``)."""
    galleries: Mapping[str, Thresholds] = field(default_factory=dict)
    """By gallery id: what holds there instead."""
    sources: Mapping[str, Thresholds] = field(default_factory=dict)
    """By source id: what holds for its streams instead; before ``galleries``."""
    calibrated: Mapping[str, LivenessBand] = field(default_factory=dict)
    """By source id: liveness thresholds that were calibrated for its streams."""
    test: SequentialTest | None = None
    """What a track has to pass as well before it is LIVE."""

    def __post_init__(self) -> None:
        if not -1.0 <= self.match <= 1.0:
            raise ValueError(f"match threshold {self.match} is outside of [-1, 1]")
        if not 0.0 <= self.margin <= 2.0:
            raise ValueError(f"margin {self.margin} is outside of [0, 2]")
        if not 0.0 <= self.ood <= 1.0:
            raise ValueError(f"OOD threshold {self.ood} is outside of [0, 1]")
        if self.enroll_ood is not None and not 0.0 <= self.enroll_ood <= self.ood:
            raise ValueError(
                f"enroll_ood {self.enroll_ood} must be between 0 and the OOD threshold {self.ood}"
            )
        LivenessBand(self.live, self.spoof)

    @property
    def judging(self) -> tuple[object, ...]:
        """All that liveness is judged by."""
        return self.live, self.spoof, self.test, self.calibrated

    @property
    def naming(self) -> tuple[object, ...]:
        """All that names are given by, here, in galleries and of sources."""
        own = (self.match, self.margin, self.ood, self.promise, self.bands)
        within = [{k: v.naming for k, v in of.items()} for of in (self.galleries, self.sources)]
        return *own, self.least, self.grain, self.looks, *within

    @property
    def enrolled_ood(self) -> float:
        """Least OOD score of a face that is enrolled."""
        return self.ood / 2 if self.enroll_ood is None else self.enroll_ood

    def at(self, gallery_id: str, source_id: str = "") -> Thresholds:
        """What holds for this gallery and source."""
        return self.sources.get(source_id) or self.galleries.get(gallery_id) or self

    def liveness_at(self, source_id: str) -> Thresholds | LivenessBand:
        """What liveness scores of this source's streams are compared with."""
        return self.calibrated.get(source_id) or self

    def match_at(self, ood_score: float, searched: int) -> float:
        """Least cosine of a match for a probe of this OOD score among ``searched`` templates."""
        if self.promise is None:
            return self._rounded(self.match)
        return self._rounded(self.promise.match(ood_score, searched))

    def certain_at(self, ood_score: float, searched: int) -> float:
        """Cosine from which on one look names a track by itself, [-1, 1]."""
        if self.promise is None or self.looks == 1:
            return self.match_at(ood_score, searched)
        share = self.promise.false_naming * BEYOND_DOUBT
        return self._rounded(replace(self.promise, false_naming=share).match(ood_score, searched))

    def _rounded(self, match: float) -> float:
        least = max(match, self.least)
        if not self.grain:
            return least
        # A multiple as floats have it may lie a little above: 0.35 / 0.05 is 6.999...
        return min(1.0, math.ceil(least / self.grain - 1e-9) * self.grain)


def best_first(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """One candidate a subject (its best), best first, ties by id; NaN similarities left out."""
    best: dict[str, Candidate] = {}
    for candidate in candidates:
        if math.isnan(candidate.similarity):
            continue
        known = best.get(candidate.subject_id)
        if known is None or candidate.similarity > known.similarity:
            best[candidate.subject_id] = candidate
    return tuple(sorted(best.values(), key=lambda c: (-c.similarity, c.subject_id)))


SHADOW: Final = "\0"
"""Before a subject's id: what was said not to be this subject. No id has it."""


def standing(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """``best_first``, without those to whom the probe is not as near as to what they are not, and
    without what nobody is."""
    ranked = best_first(candidates)
    out, found = set(), []
    for candidate in ranked:
        if candidate.subject_id.startswith(SHADOW):
            out.add(candidate.subject_id.removeprefix(SHADOW))
        elif candidate.subject_id not in out:
            found.append(candidate)
    return tuple(found)


def identify(
    ood_score: float | None,
    candidates: Iterable[Candidate],
    thresholds: Thresholds,
    *,
    searched: int = 1,
    keep: int = 0,
) -> Identity:
    """The identity of one face among ``searched`` templates.

    ``ood_score`` in [0, 1]; ``None`` means that the recogniser did not answer and gives
    NOT_EVALUATED. ``candidates`` may come in any order and with several entries a subject.
    ``keep``: how many of them the answer carries, at most ``limits.MAX_CANDIDATES``.

    MATCH when ``best >= match_at(...)``, which the answer tells, and ``best - second >= margin``,
    where ``second`` is the best similarity of *another* subject; AMBIGUOUS when only the first
    holds.
    """
    return _identify(ood_score, candidates, thresholds, thresholds.ood, searched, keep)


def _identify(
    ood_score: float | None,
    candidates: Iterable[Candidate],
    thresholds: Thresholds,
    trusted: float,
    searched: int,
    keep: int,
) -> Identity:
    """``trusted``: the least OOD score of a face that is looked for."""
    if ood_score is None:
        return Identity(Decision.NOT_EVALUATED)
    if not ood_score >= trusted:
        return Identity(Decision.REJECTED_OOD)
    ranked = standing(candidates)
    if not ranked:
        return Identity(Decision.UNKNOWN)
    shown = ranked[: max(0, min(keep, limits.MAX_CANDIDATES))]
    best = ranked[0]
    needed = thresholds.match_at(ood_score, searched)
    if best.similarity < needed:
        return Identity(Decision.UNKNOWN, "", best.similarity, shown, needed)
    if len(ranked) > 1 and best.similarity - ranked[1].similarity < thresholds.margin:
        return Identity(Decision.AMBIGUOUS, "", best.similarity, shown, needed)
    certain = best.similarity >= thresholds.certain_at(ood_score, searched)
    return Identity(Decision.MATCH, best.subject_id, best.similarity, shown, needed, certain)


def resembles(
    ood_score: float | None, candidates: Iterable[Candidate], thresholds: Thresholds
) -> str:
    """The one subject whom this face passes for when nobody else is looked for, trusted a little
    less; else "". No name for it: it tells a track whether its face is still the one it was.

    That is a comparison with one person, whatever the gallery's size. Of looks between
    ``RESEMBLING`` and the whole of the OOD threshold (blurred, dark, covered, turned), no larger
    share resembles somebody else's template so far than of good ones (the
    starter recogniser: 0.06 to 0.1 % at ``false_naming = 0.001``), and four of five that of the
    same person.
    """
    lenient = thresholds.ood * RESEMBLING
    return _identify(ood_score, candidates, thresholds, lenient, 1, 0).subject_id


def verify(ood_score: float | None, similarity: float, thresholds: Thresholds) -> Decision:
    """The decision of a 1:1 comparison, where no other subject competes."""
    if ood_score is None:
        return Decision.NOT_EVALUATED
    if not ood_score >= thresholds.ood:
        return Decision.REJECTED_OOD
    needed = thresholds.match_at(ood_score, 1)
    return Decision.MATCH if similarity >= needed else Decision.UNKNOWN


def liveness(
    score: float | None, thresholds: Thresholds | LivenessBand, *, no_context: bool = False
) -> Liveness:
    """The verdict of one shot. No score, or NaN, is UNDECIDED: never LIVE by absence."""
    if score is None or math.isnan(score):
        return Liveness(LivenessVerdict.UNDECIDED, no_context=no_context)
    return Liveness(verdict(score, thresholds), score)


def verdict(score: float, thresholds: Thresholds | LivenessBand) -> LivenessVerdict:
    """LIVE at or above ``live``, SPOOF below ``spoof``, UNDECIDED between and for NaN."""
    if score >= thresholds.live:
        return LivenessVerdict.LIVE
    if score < thresholds.spoof:
        return LivenessVerdict.SPOOF
    return LivenessVerdict.UNDECIDED
