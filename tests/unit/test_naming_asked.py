"""Names that one caller asks for: surer than the server's, never less so without a role."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facelane.v1 import analysis_service_pb2 as pb
from facelane_server.domain import Candidate, Decision, FacelaneError, Reason
from facelane_server.edge import convert
from facelane_server.edge.roles import ANYBODY, Caller, Grant, Role
from facelane_server.gallery import decide
from facelane_server.gallery.asked import Asked
from facelane_server.gallery.decide import Thresholds
from facelane_server.models.package import Impostors
from facelane_server.models.promise import Promise

BANDS = (
    Impostors(0.4, 10**6, 1e-5, (0.12, 0.23, 0.32, 0.40, 0.47, 0.53)),
    Impostors(0.8, 10**7, 1e-6, (0.10, 0.20, 0.28, 0.35, 0.41, 0.46)),
)
PROMISED = Thresholds(match=0.4, promise=Promise(0.001, BANDS), bands=BANDS)
BARE = Thresholds(match=0.5, bands=BANDS)
UNMEASURED = Thresholds(match=0.5)

shares = st.floats(1e-6, 0.9)
asks = st.one_of(
    st.builds(Asked, shares, st.none(), grain=st.sampled_from([0.0, 0.01, 0.05])),
    st.builds(Asked, st.none(), st.floats(0.0, 1.0), grain=st.sampled_from([0.0, 0.01, 0.05])),
)


@given(asks, st.sampled_from([PROMISED, BARE]), st.floats(0.0, 1.0), st.integers(0, 10**6))
def test_what_is_asked_never_names_anybody_whom_the_server_would_not(
    asked: Asked, server: Thresholds, ood: float, searched: int
) -> None:
    own = asked.applied(server)
    assert own is not None
    assert own.match_at(ood, searched) >= server.match_at(ood, searched) - 1e-12
    assert own.certain_at(ood, searched) >= own.match_at(ood, searched) - 1e-12
    assert (own.ood, own.margin) == (server.ood, server.margin)


@given(shares, st.sampled_from([PROMISED, BARE]))
def test_whoever_may_have_it_looser_gets_what_was_asked(share: float, server: Thresholds) -> None:
    own = Asked(share, looser=True).applied(server)
    assert own is not None
    assert own.match_at(0.9, 100) == Promise(share, BANDS).match(0.9, 100)
    bare = Asked(match=0.2, looser=True).applied(server)
    assert bare is not None
    assert bare.match_at(0.9, 100) == 0.2


def test_the_outcome_tells_the_threshold_that_was_asked_for() -> None:
    seen = [Candidate("ada", 0.6)]
    assert decide.identify(0.9, seen, PROMISED, searched=10).decision is Decision.MATCH
    own = Asked(match=0.7).applied(PROMISED)
    assert own is not None
    told = decide.identify(0.9, seen, own, searched=10)
    assert (told.decision, told.threshold) == (Decision.UNKNOWN, 0.7)


@pytest.mark.parametrize(
    ("asked", "server", "reason"),
    [
        (Asked(0.01), PROMISED, Reason.NAMING_TOO_LOOSE),
        (Asked(match=0.1), PROMISED, Reason.NAMING_TOO_LOOSE),
        (Asked(match=0.4), BARE, Reason.NAMING_TOO_LOOSE),
        (Asked(0.0001), UNMEASURED, Reason.NAMING_NOT_MEASURED),
        (Asked(0.0001, looser=True), UNMEASURED, Reason.NAMING_NOT_MEASURED),
        (Asked(0.001), PROMISED, None),
        (Asked(0.0001), PROMISED, None),
        (Asked(0.1), BARE, None),
        (Asked(match=0.9), PROMISED, None),
        (Asked(match=0.5), UNMEASURED, None),
        (Asked(0.5, looser=True), PROMISED, None),
        (Asked(match=0.0, looser=True), PROMISED, None),
    ],
    ids=str,
)
def test_what_is_looser_or_cannot_be_kept_is_refused(
    asked: Asked, server: Thresholds, reason: Reason | None
) -> None:
    if reason is None:
        asked.check(server, 100)
        return
    with pytest.raises(FacelaneError) as refused:
        asked.check(server, 100)
    assert refused.value.reason is reason
    assert refused.value.metadata["field"] in ("false_naming", "match_threshold")


def test_what_a_refusal_allows_is_let_in() -> None:
    for asked in (Asked(0.3), Asked(match=0.01)):
        with pytest.raises(FacelaneError) as refused:
            asked.check(PROMISED, 1000)
        allowed = float(refused.value.metadata["allowed"])
        share = refused.value.metadata["field"] == "false_naming"
        (Asked(allowed) if share else Asked(match=allowed)).check(PROMISED, 1000)


def test_a_recogniser_that_was_not_measured_names_nobody_by_a_share() -> None:
    """One that took the place of another, while the stream was open."""
    assert Asked(0.0001).applied(UNMEASURED) is None


def test_a_server_that_became_stricter_stays_so() -> None:
    stricter = replace(PROMISED, promise=Promise(1e-5, BANDS))
    own = Asked(0.0005).applied(stricter)
    assert own is not None
    assert own.match_at(0.9, 100) == stricter.match_at(0.9, 100)


@pytest.mark.parametrize("grain", [0.01, 0.05])
def test_thresholds_are_in_steps_for_those_who_do_not_see_similarities(grain: float) -> None:
    for match in (0.5, 0.55, 0.6, 0.7, 0.73, 0.9, 1.0):
        own = Asked(match=match, grain=grain).applied(BARE)
        assert own is not None
        steps = own.match_at(0.9, 1) / grain
        assert steps == pytest.approx(round(steps))
        assert match - 1e-9 <= own.match_at(0.9, 1) < match + grain


def options(**given_: float) -> pb.AnalysisOptions:
    return pb.AnalysisOptions(**given_)  # type: ignore[arg-type]


def holder(*verbs: str, similarities: str = "rounded") -> Caller:
    role = Role("r", verbs, galleries=("g",), sources=("s",), similarities=similarities)  # type: ignore[arg-type]
    return Caller("k", (Grant.of(role),))


@pytest.mark.parametrize(
    "wrong",
    [
        {"false_naming": 0.0},
        {"false_naming": 1.0},
        {"false_naming": -0.1},
        {"false_naming": float("nan")},
        {"match_threshold": -0.1},
        {"match_threshold": 1.5},
        {"match_threshold": float("nan")},
        {"match_threshold": 0.5, "false_naming": 0.1},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(FacelaneError) as refused:
        convert.naming(options(**wrong), ANYBODY, "g", "s")
    assert refused.value.reason is Reason.ARGUMENT_INVALID


def test_a_role_makes_it_looser_where_it_counts() -> None:
    asked = options(false_naming=0.1)
    may = holder("analyze", "identify", "loosen-naming", similarities="exact")
    assert convert.naming(asked, may, "g", "s") == Asked(0.1, looser=True)
    elsewhere = convert.naming(asked, may, "g", "other")
    assert elsewhere is not None
    assert not elsewhere.looser
    for caller in (ANYBODY, holder("analyze", "identify")):
        made = convert.naming(asked, caller, "g", "s")
        assert made is not None
        assert not made.looser
    assert convert.naming(options(), may, "g", "s") is None


def test_how_finely_is_what_the_caller_sees() -> None:
    asked = options(match_threshold=0.5)
    for similarities, grain in (("exact", 0.0), ("rounded", 0.01), ("withheld", 0.05)):
        made = convert.naming(asked, holder("identify", similarities=similarities), "g", "s")
        assert made == Asked(match=0.5, grain=grain)
