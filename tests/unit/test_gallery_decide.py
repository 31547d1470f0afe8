"""Open-set decisions: what is said of a face, and what is never said."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facelane_server import limits
from facelane_server.domain import Candidate, Decision, LivenessVerdict
from facelane_server.gallery import decide
from facelane_server.gallery.decide import (
    Thresholds,
    best_first,
    identify,
    liveness,
    resembles,
    verify,
)
from facelane_server.models.promise import Promise

THRESHOLDS = Thresholds(match=0.35, margin=0.05, ood=0.4, live=0.9, spoof=0.5)

similarities = st.floats(-1.0, 1.0) | st.just(math.nan)
candidates = st.lists(
    st.builds(Candidate, st.sampled_from(["a", "b", "c", "d"]), similarities), max_size=8
)
oods = st.none() | st.floats(0.0, 1.0) | st.just(math.nan)
thresholds = st.builds(
    Thresholds, match=st.floats(-1.0, 1.0), margin=st.floats(0.0, 1.0), ood=st.floats(0.0, 1.0)
)


def of(*pairs: tuple[str, float]) -> list[Candidate]:
    return [Candidate(*pair) for pair in pairs]


@pytest.mark.parametrize(
    ("ood", "found", "decision", "subject"),
    [
        (None, of(("a", 0.9)), Decision.NOT_EVALUATED, ""),
        (0.39, of(("a", 0.9)), Decision.REJECTED_OOD, ""),
        (math.nan, of(("a", 0.9)), Decision.REJECTED_OOD, ""),
        (0.4, of(("a", 0.9)), Decision.MATCH, "a"),
        (0.9, [], Decision.UNKNOWN, ""),
        (0.9, of(("a", math.nan)), Decision.UNKNOWN, ""),
        (0.9, of(("a", 0.34)), Decision.UNKNOWN, ""),
        (0.9, of(("a", 0.35)), Decision.MATCH, "a"),
        (0.9, of(("a", 0.6), ("b", 0.58)), Decision.AMBIGUOUS, ""),
        (0.9, of(("a", 0.6), ("b", 0.5)), Decision.MATCH, "a"),
        # Two templates of one subject do not compete with each other.
        (0.9, of(("a", 0.6), ("a", 0.59), ("b", 0.1)), Decision.MATCH, "a"),
        # The second need not reach the match threshold to make the first doubtful.
        (0.9, of(("a", 0.36), ("b", 0.34)), Decision.AMBIGUOUS, ""),
    ],
)
def test_decisions(
    ood: float | None, found: list[Candidate], decision: Decision, subject: str
) -> None:
    identity = identify(ood, found, THRESHOLDS)
    assert (identity.decision, identity.subject_id) == (decision, subject)


@given(oods, candidates, thresholds, st.integers(0, 20))
def test_only_a_match_names_and_a_rejected_face_tells_nothing(
    ood: float | None, found: list[Candidate], limit: Thresholds, keep: int
) -> None:
    identity = identify(ood, found, limit, keep=keep)
    assert bool(identity.subject_id) == (identity.decision is Decision.MATCH)
    assert len(identity.candidates) <= min(keep, limits.MAX_CANDIDATES)
    assert not any(math.isnan(c.similarity) for c in identity.candidates)
    if identity.decision in (Decision.REJECTED_OOD, Decision.NOT_EVALUATED):
        assert identity.candidates == ()
        assert identity.similarity is None
    if identity.decision is Decision.MATCH:
        assert ood is not None
        assert ood >= limit.ood
        assert identity.similarity is not None
        assert identity.similarity >= limit.match
        others = [
            c.similarity
            for c in found
            if c.subject_id != identity.subject_id and not math.isnan(c.similarity)
        ]
        assert all(identity.similarity - other >= limit.margin for other in others)


@given(oods, candidates, thresholds, st.randoms())
def test_the_order_of_candidates_does_not_matter(
    ood: float | None, found: list[Candidate], limit: Thresholds, random: object
) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert identify(ood, shuffled, limit, keep=4) == identify(ood, found, limit, keep=4)


@given(candidates)
def test_best_first_has_each_subject_once_and_sorted(found: list[Candidate]) -> None:
    ranked = best_first(found)
    assert len({c.subject_id for c in ranked}) == len(ranked)
    assert [c.similarity for c in ranked] == sorted((c.similarity for c in ranked), reverse=True)


@given(candidates, thresholds, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_stricter_ood_threshold_never_names_more(
    found: list[Candidate], limit: Thresholds, ood: float, stricter: float
) -> None:
    harder = Thresholds(match=limit.match, margin=limit.margin, ood=max(limit.ood, stricter))
    if identify(ood, found, harder).decision is Decision.MATCH:
        assert identify(ood, found, limit).decision is Decision.MATCH


def test_verification_has_the_same_gate() -> None:
    assert verify(None, 0.9, THRESHOLDS) is Decision.NOT_EVALUATED
    assert verify(0.2, 0.9, THRESHOLDS) is Decision.REJECTED_OOD
    assert verify(math.nan, 0.9, THRESHOLDS) is Decision.REJECTED_OOD
    assert verify(0.8, math.nan, THRESHOLDS) is Decision.UNKNOWN
    assert verify(0.8, 0.2, THRESHOLDS) is Decision.UNKNOWN
    assert verify(0.8, 0.35, THRESHOLDS) is Decision.MATCH


@pytest.mark.parametrize(
    ("score", "verdict"),
    [
        (None, LivenessVerdict.UNDECIDED),
        (math.nan, LivenessVerdict.UNDECIDED),
        (0.49, LivenessVerdict.SPOOF),
        (0.5, LivenessVerdict.UNDECIDED),
        (0.89, LivenessVerdict.UNDECIDED),
        (0.9, LivenessVerdict.LIVE),
    ],
)
def test_liveness_of_one_shot(score: float | None, verdict: LivenessVerdict) -> None:
    found = liveness(score, THRESHOLDS)
    assert found.verdict is verdict
    assert found.score is None or not math.isnan(found.score)


@pytest.mark.parametrize(
    "wrong",
    [
        {"match": 1.1},
        {"match": math.nan},
        {"match": 0.3, "margin": -0.1},
        {"match": 0.3, "ood": 1.5},
        {"match": 0.3, "live": 0.4, "spoof": 0.5},
    ],
)
def test_thresholds_outside_of_their_ranges_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"threshold|margin"):
        Thresholds(**wrong)


def test_a_face_that_is_trusted_less_passes_for_one_person_and_is_named_nobody() -> None:
    promise = Promise(0.001, (Measured(0.4, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),))
    measured = Thresholds(match=0.9, margin=0.05, ood=0.4, promise=promise)
    found = of(("a", 0.35), ("b", 0.1))
    # 0.3 among one template, 0.6 among a thousand: who it is, is another question than whether
    # it is still the same.
    assert identify(0.9, found, measured, searched=1000).decision is Decision.UNKNOWN
    for ood, passes in ((0.9, "a"), (0.1, "a"), (0.09, ""), (math.nan, ""), (None, "")):
        assert resembles(ood, found, measured) == passes, ood
    assert resembles(0.2, of(("a", 0.29)), measured) == ""
    assert resembles(0.2, of(("a", 0.35), ("b", 0.34)), measured) == ""
    assert identify(0.2, found, measured).decision is Decision.REJECTED_OOD


@dataclass(frozen=True)
class Measured:
    ood: float
    similarity: tuple[float, ...]


def test_what_a_subject_is_not_takes_it_out_and_nobody_else() -> None:
    thresholds = Thresholds(match=0.4, margin=0.05)

    def who(*near: tuple[str, float]) -> tuple[Decision, str, set[str]]:
        found = [Candidate(name, similarity) for name, similarity in near]
        identity = decide.identify(0.9, found, thresholds, keep=5)
        return identity.decision, identity.subject_id, identity.subjects

    no = decide.SHADOW
    assert who(("ada", 0.7))[:2] == (Decision.MATCH, "ada")
    assert who(("ada", 0.7), (f"{no}ada", 0.6))[:2] == (Decision.MATCH, "ada")
    assert who(("ada", 0.6), (f"{no}ada", 0.7))[:2] == (Decision.UNKNOWN, "")
    # Whom it really shows has the very same face for a template.
    told = who(("ada", 0.6), (f"{no}ada", 0.7), ("bea", 0.7))
    assert told == (Decision.MATCH, "bea", {"bea"})
    # What somebody is not is no second, and no candidate.
    assert who(("ada", 0.7), (f"{no}bea", 0.69))[:2] == (Decision.MATCH, "ada")
    assert who((f"{no}ada", 0.9)) == (Decision.UNKNOWN, "", set())
