"""Open-set figures on people made of random directions, whose truth is known."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facelane_server.models.catalog import Catalog
from facelane_server.modeltools import measures, openset
from facelane_server.modeltools.evaluate import evaluate
from facelane_server.modeltools.samples import Settings


def people(
    count: int, pictures: int, spread: float, *, dim: int = 64, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [count * pictures, dim] around ``count`` directions, and whose they are."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count, 1, dim))
    vectors = centres + spread * rng.normal(size=(count, pictures, dim))
    vectors = vectors.reshape(-1, dim).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, np.repeat(np.arange(count), pictures)


def test_people_who_are_nothing_alike_are_all_named() -> None:
    vectors, who = people(400, 3, 0.1)
    rates = openset.identification(vectors, who, 100, 1, seed=1)
    assert rates is not None
    assert (rates.mated, rates.non_mated) == (500, 1500)
    for fpir in openset.FPIRS:
        found = rates.fnir[fpir]
        assert found is not None
        assert found[1] == 0.0


def test_the_promised_share_of_strangers_is_named_and_more_templates_miss_fewer() -> None:
    vectors, who = people(400, 5, 1.2)
    one, three = (openset.identification(vectors, who, 100, k, seed=1) for k in (1, 3))
    assert one is not None
    assert three is not None
    missed = [one.fnir[f] for f in sorted(openset.FPIRS)]
    shares = [found[1] for found in missed if found]
    # The fewer strangers may be named, the more of the enrolled are missed.
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < 1
    of_three = three.fnir[0.01]
    assert of_three is not None
    assert of_three[1] < shares[-1]


def test_who_has_one_picture_fills_a_large_gallery() -> None:
    several, who = people(240, 2, 0.6)
    alone, others = people(1200, 1, 0.6, seed=5)
    vectors, subject = np.concatenate((several, alone)), np.concatenate((who, others + 1000))
    rates = openset.identification(vectors, subject, 1_000, 1, seed=1)
    assert rates is not None
    assert rates.mated == 120 * openset.SPLITS
    assert rates.non_mated == (240 + 1200 - 1_000) * openset.SPLITS
    small = openset.identification(vectors, subject, 100, 1, seed=1)
    assert small is not None
    # Ten times as many people, and more of them come near a stranger.
    large_at, small_at = rates.fnir[0.01], small.fnir[0.01]
    assert large_at is not None
    assert small_at is not None
    assert large_at[0] > small_at[0]
    assert large_at[1] >= small_at[1]
    assert openset.identification(vectors, subject, 10_000, 1, seed=1) is None


def test_people_whom_the_model_knows_fill_galleries_and_are_no_probes() -> None:
    vectors, who = people(400, 3, 0.6)
    known = who >= 150
    rates = openset.identification(vectors, who, 200, 1, seed=1, known=known)
    assert rates is not None
    assert rates.mated == rates.non_mated == 75 * openset.SPLITS
    assert openset.identification(vectors, who, 1_000, 1, seed=1, known=known) is None
    assert openset.identification(vectors, who, 200, 1, seed=1, known=who >= 40) is None


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 260), st.integers(0, 260), st.sampled_from([1, 3]), st.floats(0.05, 2.0),
    st.integers(0, 100),
)  # fmt: skip
def test_rates_are_what_they_say_of_any_people(
    several: int, alone: int, templates: int, spread: float, seed: int
) -> None:
    vectors, who = people(several + alone, 4, spread, dim=16, seed=seed)
    kept = (who < several) | (np.arange(len(who)) % 4 == 0)
    vectors, who = vectors[kept], who[kept]
    rates = openset.identification(vectors, who, 100, templates, seed=seed)
    enough = several >= openset.LEAST_MATED and several + alone >= 100 + openset.LEAST_MATED
    assert (rates is not None) == enough
    if rates is None:
        return
    assert openset.LEAST_MATED * openset.SPLITS <= rates.mated <= 100 * openset.SPLITS
    assert rates.non_mated == (several + alone - 100) * openset.SPLITS
    told = [rates.fnir[fpir] for fpir in sorted(openset.FPIRS)]
    known = [found for found in told if found is not None]
    # Fewer strangers named is a higher threshold, and that misses more.
    assert [t for t, _ in known] == sorted((t for t, _ in known), reverse=True)
    assert [f for _, f in known] == sorted((f for _, f in known), reverse=True)
    assert all(0 <= f <= 1 for _, f in known)


@pytest.mark.parametrize(("count", "pictures"), [(120, 2), (400, 1)])
def test_too_few_people_or_pictures_are_not_measured(count: int, pictures: int) -> None:
    vectors, who = people(count, pictures, 0.1)
    assert openset.identification(vectors, who, 100, 1, seed=1) is None


def test_too_few_strangers_tell_no_rate() -> None:
    vectors, who = people(210, 2, 0.1)
    rates = openset.identification(vectors, who, 100, 1, seed=1)
    assert rates is not None
    assert rates.non_mated == 550
    assert rates.fnir[0.001] is None
    assert rates.fnir[0.003] is not None


def test_a_group_of_people_who_are_alike_stands_out() -> None:
    vectors, who = people(200, 2, 0.3)
    alike = who < 50
    vectors[alike] += vectors[0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    label = ["alike" if x else "others" for x in alike]
    label[-2:] = ["few", "few"]
    groups = openset.within_groups(vectors, who, label, (1e-2, 1e-3, 1e-9), seed=1)
    assert [(g.name, g.people) for g in groups] == [("alike", 50), ("others", 149)]
    assert set(groups[0].far) == {1e-2, 1e-3}
    assert groups[0].far[1e-2] > 10 * groups[1].far[1e-2]


def test_a_picture_is_no_template_for_itself() -> None:
    vectors, who = people(20, 2, 0.2)
    rows = np.array([0, 5])
    own, other = openset.leave_one_out(vectors[rows], rows, vectors, who)
    assert (own < 1 - 1e-4).all()
    assert (own > other).all()
    alone = np.arange(40)
    own, _ = openset.leave_one_out(vectors[rows], rows, vectors, alone)
    assert (own == -np.inf).all()
    assert not openset.tellable(own, np.zeros(2), -1.0).any()


def test_thresholds_of_people_who_are_told_apart_lie_in_the_middle() -> None:
    genuine, impostor = np.array([0.6, 0.7, 0.9]), np.array([0.0, 0.1, 0.2])
    assert measures.best_threshold(genuine, impostor) == pytest.approx(0.4)
    threshold, rate = measures.equal_error(genuine, impostor)
    assert (threshold, rate) == (pytest.approx(0.4), 0.0)


@pytest.mark.shared
@pytest.mark.slow
def test_of_a_few_people_it_is_said_what_was_not_measured(shared: Path, tmp_path: Path) -> None:
    """The starter models on the enrolment pictures of five people: named where they can be told,
    and no rate is made of too few."""
    catalog = Catalog()
    people = tmp_path / "people"
    shutil.copytree(shared / "media" / "gallery", people)
    (people / "groups.csv").write_text("subject,group\nobama,one\nbiden,one\n")
    found = evaluate(
        catalog.resolve("facelane-recognizer"),
        people,
        tmp_path / "out",
        detector=catalog.resolve("facelane-detector"),
        settings=Settings(damaged=4, plots=False),
    )
    assert "130 people" in found["open_set"]["not_measured"]
    assert "40 people" in found["groups"]["not_measured"]
    told = found["ood"]["tellable"]
    assert told["clean"]["wrongly_named"] == 0
    assert set(told["clean"]) == {"tellable", "tellable_but_refused", "wrongly_named"}
    assert "Open-set identification" in (tmp_path / "out" / "report.md").read_text()
