"""``gallery check``: the thresholds that galleries get, and who in them is too alike."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from facelane_server.cli import app
from facelane_server.gallery.decide import Thresholds
from facelane_server.gallery.examine import Alike, alike, examine
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import Impostors
from facelane_server.models.promise import Promise
from facelane_server.store.gallery import Store
from facelane_server.store.records import NewTemplate, StoredVector, unit_float16

PACKAGE = Catalog().resolve("null-recognizer")
DIM = PACKAGE.embedding_dim


def vector(seed: int, near: np.ndarray | None = None) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=DIM).astype(np.float32)
    values /= np.linalg.norm(values)
    if near is not None:
        values = 0.9 * near + np.sqrt(1 - 0.9**2) * values
    return (values / np.linalg.norm(values)).astype(np.float32)


def test_pairs_are_of_different_people_and_come_once() -> None:
    ada, grace = vector(1), vector(2)
    rows = [ada, vector(3, ada), grace, vector(4, grace), vector(5, grace), vector(6)]
    names = ["ada", "ada", "grace", "twin", "twin", "other"]
    [found] = alike(np.stack(rows), names, 0.7)
    assert (found.first, found.second) == ("grace", "twin")
    best = max(float(grace @ rows[3]), float(grace @ rows[4]))
    assert found == Alike("grace", "twin", pytest.approx(best, abs=1e-5))
    assert alike(np.stack(rows), names, 0.999) == []


def test_a_better_picture_is_wanted_of_those_whose_templates_all_promise_little() -> None:
    rows = [
        StoredVector("a", who, f"t{n}", unit_float16(vector(n)), 1, quality)
        for n, (who, quality) in enumerate(
            [("dim", 0.3), ("dim", 0.1), ("dark", 0.2), ("fine", 0.1), ("fine", 0.8), ("old", 0.0)]
        )
    ]
    [found] = examine(rows, Thresholds(match=0.9, ood=0.4))
    assert [(one.subject, one.quality) for one in found.weakest] == [("dark", 0.2), ("dim", 0.3)]
    assert found.weak == 2
    assert found.as_json()["weakest"] == [["dark", 0.2], ["dim", 0.3]]


def test_every_gallery_has_the_threshold_of_its_size_and_of_its_own() -> None:
    bands = (Impostors(0.4, 10**6, 1e-5, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),)
    general = Thresholds(match=0.9, promise=Promise(0.001, bands))
    own = Thresholds(match=0.77)
    thresholds = Thresholds(
        match=0.9, promise=general.promise, galleries={"b": own}
    )  # fmt: skip
    rows = [
        StoredVector(gallery, f"s{n}", f"t{n}", unit_float16(vector(n)))
        for gallery, count in (("a", 10), ("b", 2), ("c", 1))
        for n in range(count)
    ]
    a, b, c = examine(rows, thresholds)
    assert (a.subjects, a.templates, a.threshold) == (10, 10, pytest.approx(0.4, abs=1e-3))
    assert (b.false_naming, b.threshold) == (None, 0.77)
    assert (c.false_naming, c.threshold) == (0.001, pytest.approx(0.3, abs=1e-3))


def test_the_command_looks_beside_a_server_that_runs(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text(
        f'state_dir = "{tmp_path}"\n[pools]\nliveness = false\n'
        '[pools.detector]\nmodel = "null-detector"\n[pools.recognizer]\nmodel = "null-recognizer"\n'
    )
    command = ["gallery", "check", "--config", str(config)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 69
    assert "there is no gallery yet" in done.output
    with closing(Store(tmp_path / "gallery.db")) as store:  # stays open, as a server's does
        done = CliRunner().invoke(app, command)
        assert (done.exit_code, done.output) == (0, "nobody is enrolled\n")
        near = vector(1)
        for name, row in (("ada", near), ("twin", vector(2, near)), ("other", vector(3))):
            new = NewTemplate(PACKAGE.model_id, row, 0.9)
            store.enroll("default", name, new, create_subject=True)
        store.enroll("default", "old", NewTemplate("m@1#aa", near, 0.9), create_subject=True)
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert "default: 3 subjects, 3 templates; match_threshold: named from" in done.output
        assert "too alike: ada, twin: 0.9" in done.output
        assert "1 templates of other models" in done.output
        whole = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
        assert whole["of_other_models"] == 1
        assert whole["galleries"][0]["most_alike"][0][:2] == ["ada", "twin"]
