"""How similar different people are: counted where there are enough pairs, fitted beyond."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from facelane_server.domain import FacelaneError
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import Impostors, read_package
from facelane_server.models.promise import Promise, similarity_at
from facelane_server.modeltools import impostors

DIM = 32


def people(count: int, seed: int, each: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of ``count`` people, ``each`` of them, and whose they are."""
    rng = np.random.default_rng(seed)
    middle = rng.normal(size=(count, 1, DIM))
    vectors = (middle + 0.3 * rng.normal(size=(count, each, DIM))).reshape(-1, DIM)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), np.repeat(np.arange(count), each)


def test_shares_are_what_was_counted() -> None:
    probes, who = people(400, 1)
    templates, owner = people(1000, 2)
    trust = np.full(len(probes), 0.95)
    (row,) = impostors.measure(probes, trust, who + 10_000, templates, owner, 0.4)
    assert (row.ood, row.pairs, row.measured) == (0.4, 400_000, 1e-4)
    cosines = probes @ templates.T
    for decade, cosine in enumerate(row.similarity[:4], 1):
        assert (cosines >= cosine).mean() == pytest.approx(10.0**-decade, rel=0.05)
    # The fitted tail errs on the safe side: here the truth is known.
    more = people(3000, 3)[0] @ people(3000, 4)[0].T
    assert (more >= row.similarity[4]).mean() <= 1.2e-5
    assert (more >= row.similarity[5]).mean() <= 1.2e-6


def test_a_person_is_no_impostor_of_their_own() -> None:
    vectors, who = people(60, 1, each=5)
    trust = np.full(len(vectors), 0.95)
    (row,) = impostors.measure(vectors, trust, who, vectors, who, 0.4)
    same = vectors @ vectors.T
    assert row.pairs == 300 * 300 - 60 * 25
    assert row.similarity[-1] < np.median(same[who[:, None] == who[None, :]])


def test_worse_looks_have_a_band_of_their_own_where_there_are_enough() -> None:
    probes, who = people(600, 1)
    templates, owner = people(500, 2)
    # The worse half all look a little like one another, templates included.
    blurred = probes + 0.08
    blurred /= np.linalg.norm(blurred, axis=1, keepdims=True)
    templates = templates + 0.05
    templates /= np.linalg.norm(templates, axis=1, keepdims=True)
    trust = np.where(np.arange(600) < 300, 0.5, 0.95)
    mixed = np.where((trust < 0.6)[:, None], blurred, probes).astype(np.float32)
    rows = impostors.measure(mixed, trust, who + 10_000, templates.astype(np.float32), owner, 0.4)
    assert [row.ood for row in rows] == [0.4, 0.8]
    promise = Promise(0.001, rows)
    assert promise.match(0.5, 100) > promise.match(0.9, 100)
    few = np.where(np.arange(600) < 10, 0.5, 0.95)
    rows = impostors.measure(mixed, few, who + 10_000, templates.astype(np.float32), owner, 0.4)
    assert [row.ood for row in rows] == [0.4]


def test_too_few_people_say_nothing() -> None:
    vectors, who = people(3, 1)
    with pytest.raises(impostors.TooFewError):
        impostors.measure(vectors, np.full(3, 0.9), who, vectors, who, 0.4)
    with pytest.raises(impostors.TooFewError):
        impostors.measure(vectors, np.full(3, 0.1), who, vectors, who, 0.4)


def test_written_into_the_package_in_place_of_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "null-recognizer"
    shutil.copytree(Catalog().resolve("null-recognizer").folder, folder)
    before = read_package(folder)
    rows = (
        Impostors(0.4, 10_000, 1e-3, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),
        Impostors(0.8, 99_999, 1e-4, (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)),
    )
    after = impostors.write(before, rows)
    assert after.manifest.impostors == rows
    assert after.model_id == before.model_id
    again = impostors.write(after, rows[:1])
    assert again.manifest.impostors == rows[:1]
    assert (folder / "model.toml").read_text().count("[[impostors]]") == 1
    assert again.manifest.thresholds == before.manifest.thresholds
    assert similarity_at(again.manifest.impostors[0].similarity, 1e-2) == pytest.approx(0.2)


def test_a_package_that_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "null-recognizer"
    shutil.copytree(Catalog().resolve("null-recognizer").folder, folder)
    package = read_package(folder)
    (folder / "model.new").mkdir()
    with pytest.raises(FacelaneError, match="copy the package"):
        impostors.write(package, (Impostors(0.4, 100, 1e-2, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),))
