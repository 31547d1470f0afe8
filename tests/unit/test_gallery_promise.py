"""From a promise to a threshold: the arithmetic, and what must always hold."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facelane_server import config, served
from facelane_server.domain import Candidate, Decision, FacelaneError, Stage
from facelane_server.gallery import decide
from facelane_server.gallery.decide import Thresholds
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import Impostors, Package, read_package
from facelane_server.models.promise import Promise, similarity_at

GOOD = Impostors(0.8, 10**7, 1e-6, (0.10, 0.20, 0.28, 0.35, 0.41, 0.46))
POOR = Impostors(0.4, 10**6, 1e-5, (0.12, 0.23, 0.32, 0.40, 0.47, 0.53))
BANDS = (POOR, GOOD)


def test_decades_are_where_they_were_measured() -> None:
    for decade, cosine in enumerate(GOOD.similarity, 1):
        assert similarity_at(GOOD.similarity, 10.0**-decade) == pytest.approx(cosine)
    # Between two of them, and beyond the last by the slope of the last.
    assert similarity_at(GOOD.similarity, 10**-1.5) == pytest.approx(0.15)
    assert similarity_at(GOOD.similarity, 1e-7) == pytest.approx(0.51)
    assert similarity_at(GOOD.similarity, 1e-30) == 1.0


def test_one_in_a_thousand_among_a_thousand_is_one_in_a_million() -> None:
    promise = Promise(0.001, BANDS)
    assert promise.rate(1) == pytest.approx(0.001)
    assert promise.rate(1000) == pytest.approx(1e-6, rel=1e-3)
    assert promise.match(0.9, 1000) == pytest.approx(0.46, abs=1e-3)
    assert promise.match(0.5, 1000) == pytest.approx(0.53, abs=1e-3)
    assert promise.match(0.1, 1) == promise.match(0.5, 1), "below the first band: as in it"
    assert promise.match(0.9, 0) == promise.match(0.9, 1)


@given(
    st.floats(1e-6, 0.5),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
)
def test_stricter_with_more_people_worse_looks_and_firmer_promises(
    share: float, ood: float, other: float, searched: int, more: int
) -> None:
    promise = Promise(share, BANDS)
    best, worst = max(ood, other), min(ood, other)
    assert promise.match(best, searched) <= promise.match(worst, searched)
    assert promise.match(ood, searched) <= promise.match(ood, searched + more)
    assert promise.match(ood, searched) <= Promise(share / 2, BANDS).match(ood, searched)
    assert -1.0 <= promise.match(ood, searched) <= 1.0


def test_a_measurement_that_says_the_reverse_makes_a_worse_look_no_cheaper() -> None:
    reverse = (msgspec.structs.replace(GOOD, ood=0.4), msgspec.structs.replace(POOR, ood=0.8))
    promise = Promise(0.001, reverse)
    assert promise.match(0.5, 10) == promise.match(0.9, 10) == Promise(0.001, (POOR,)).match(1, 10)


def test_a_decision_tells_what_it_compared_with() -> None:
    thresholds = Thresholds(match=0.9, promise=Promise(0.001, BANDS))
    near = [Candidate("a", 0.5)]
    found = decide.identify(0.9, near, thresholds, searched=1000)
    assert (found.decision, found.threshold) == (Decision.MATCH, pytest.approx(0.46, abs=1e-3))
    found = decide.identify(0.5, near, thresholds, searched=1000)
    assert (found.decision, found.threshold) == (Decision.UNKNOWN, pytest.approx(0.53, abs=1e-3))
    assert decide.identify(0.1, near, thresholds, searched=1000).threshold is None
    assert decide.identify(0.9, [], thresholds).threshold is None
    # 1:1 there is one to be compared with.
    assert decide.verify(0.9, 0.3, thresholds) is Decision.MATCH
    assert decide.verify(0.5, 0.3, thresholds) is Decision.UNKNOWN


def test_one_look_is_certain_that_would_match_at_a_hundredth_of_the_promise() -> None:
    thresholds = Thresholds(match=0.9, promise=Promise(0.001, BANDS))
    for cosine, certain in ((0.36, False), (0.44, False), (0.47, True)):
        found = decide.identify(0.9, [Candidate("a", cosine)], thresholds, searched=10)
        assert (found.decision, found.certain) == (Decision.MATCH, certain), cosine
    one = Thresholds(match=0.9, promise=Promise(0.001, BANDS), looks=1)
    assert decide.identify(0.9, [Candidate("a", 0.36)], one, searched=10).certain
    bare = Thresholds(match=0.3)
    assert decide.identify(0.9, [Candidate("a", 0.31)], bare, searched=10).certain


# -- config and packages ------------------------------------------------------------------------


def recognizer(tmp_path: Path, *rows: Impostors) -> Package:
    manifest = Catalog().resolve("null-recognizer").folder / "model.toml"
    text = manifest.read_text()
    for row in rows:
        text += (
            f"\n[[impostors]]\nood = {row.ood}\npairs = {row.pairs}\nmeasured = {row.measured}\n"
            f"similarity = {list(row.similarity)}\n"
        )
    folder = tmp_path / "null-recognizer"
    folder.mkdir(exist_ok=True)
    (folder / "model.toml").write_text(text)
    return read_package(folder)


def judged(package: Package, text: str = "") -> Thresholds:
    return served.thresholds({Stage.RECOGNIZER: package}, config.parse(text).identity)


def test_a_package_without_a_measurement_keeps_its_bare_cosine(tmp_path: Path) -> None:
    package = recognizer(tmp_path)
    found = judged(package)
    assert found.promise is None
    assert found.match_at(0.9, 10**6) == package.thresholds.match


def test_the_promise_is_the_default_and_a_bare_cosine_overrides_it(tmp_path: Path) -> None:
    package = recognizer(tmp_path, *BANDS)
    assert judged(package).promise == Promise(0.001, BANDS)
    assert judged(package, "[identity]\nfalse_naming = 0.01").promise == Promise(0.01, BANDS)
    bare = judged(package, "[identity]\nmatch_threshold = 0.7\nfalse_naming = 0.01")
    assert (bare.promise, bare.match_at(0.9, 10**6)) == (None, 0.7)


def test_galleries_and_sources_have_their_own(tmp_path: Path) -> None:
    found = judged(
        recognizer(tmp_path, *BANDS),
        """
        [identity.galleries.staff]
        false_naming = 1e-4
        [identity.sources.door]
        match_threshold = 0.8
        """,
    )
    assert found.at("default").promise == Promise(0.001, BANDS)
    assert found.at("staff").promise == Promise(1e-4, BANDS)
    assert found.at("staff", "hall").promise == Promise(1e-4, BANDS)
    assert found.at("staff", "door").match_at(0.9, 10**6) == 0.8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[identity]\nfalse_naming = 0.0", "false_naming"),
        ("[identity.galleries.a]\nfalse_namin = 0.1", "did you mean `false_naming`?"),
        ('[identity.sources."a b"]\nfalse_naming = 0.1', "identity.sources.a b"),
    ],
)
def test_a_promise_that_cannot_be_used_is_named(text: str, said: str) -> None:
    with pytest.raises(config.ConfigError) as refused:
        config.parse(text)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "rows",
    [
        (GOOD, POOR),
        (GOOD, GOOD),
        (msgspec.structs.replace(GOOD, similarity=GOOD.similarity[:5]),),
        (msgspec.structs.replace(GOOD, similarity=GOOD.similarity[::-1]),),
        (msgspec.structs.replace(GOOD, similarity=(*GOOD.similarity[:5], 1.5)),),
        (msgspec.structs.replace(GOOD, ood=1.5),),
        (msgspec.structs.replace(GOOD, pairs=0),),
        (msgspec.structs.replace(GOOD, measured=0.0),),
    ],
)
def test_a_measurement_that_is_none_is_refused(tmp_path: Path, rows: tuple[Impostors, ...]) -> None:
    with pytest.raises(FacelaneError, match="impostors"):
        recognizer(tmp_path, *rows)
