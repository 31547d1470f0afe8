"""Open-set figures on people made of random directions, whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from facelane_server.modeltools import measures, openset


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


@pytest.mark.parametrize(("count", "pictures"), [(150, 2), (400, 1)])
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
