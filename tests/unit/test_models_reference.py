"""Recorded answers: the drawn portrait, ``check.json``, and what ``models verify`` makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from facelane_server.domain import FacelaneError, Reason
from facelane_server.models.api import Detector, DeviceOptions
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import Package, read_package
from facelane_server.modeltools import reference
from facelane_server.modeltools.cli import app
from facelane_server.modeltools.verify import Finding, verify
from facelane_server.worker.networks.load import load

STARTER = ("facelane-detector", "facelane-recognizer", "facelane-liveness")


def copied(name: str, into: Path) -> Package:
    return read_package(Path(shutil.copytree(Catalog().resolve(name).folder, into / name)))


def edited(package: Package, **changes: Any) -> None:
    path = package.folder / reference.CHECK
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reference_check(package: Package) -> Finding:
    (check,) = [c for c in verify(package).checks if c.name == "reference"]
    return check


def test_the_portrait_is_the_same_everywhere_and_shows_a_face() -> None:
    picture = reference.portrait()
    assert picture.shape == (480, 640, 3)
    assert (picture == reference.portrait()).all()
    detector = load(Catalog().resolve("facelane-detector"), DeviceOptions(), batch_max=1)
    assert isinstance(detector, Detector)
    found = detector.begin([picture], [8]).finish()[0]
    assert len(found.boxes) == 1
    # The places that crops are cut at are those of the drawing, give or take.
    width = float(reference.FACE_BOX[0, 2])
    assert np.abs(found.landmarks - reference.FACE_LANDMARKS).max() < 0.1 * width


@pytest.mark.parametrize("name", STARTER)
def test_starter_packages_answer_as_recorded(name: str) -> None:
    check = reference_check(Catalog().resolve(name))
    assert check.passed, check.detail
    assert check.detail.startswith("as recorded")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("facelane-detector", "max_side = 640", "max_side = 320"),
        ("facelane-recognizer", 'color = "rgb"', 'color = "bgr"'),
        pytest.param("facelane-recognizer", "center = ", "center = -", marks=pytest.mark.slow),
        pytest.param("facelane-liveness", 'color = "bgr"', 'color = "rgb"', marks=pytest.mark.slow),
        ("facelane-liveness", "scale = 4.0", "scale = 1.2"),
    ],
)
def test_an_edit_that_changes_the_answers_is_seen(
    tmp_path: Path, name: str, key: str, value: str
) -> None:
    """No hash, key or shape differs: only what comes out does."""
    package = copied(name, tmp_path)
    manifest = package.folder / "model.toml"
    text = manifest.read_text()
    assert key in text
    manifest.write_text(text.replace(key, value))
    check = reference_check(read_package(package.folder))
    assert not check.passed
    assert "tolerance" in check.detail


def test_a_record_of_other_weights_or_another_picture_is_refused(tmp_path: Path) -> None:
    package = copied("facelane-liveness", tmp_path)
    edited(package, weights="0" * 64)
    assert "recorded with other weights" in reference_check(package).detail
    edited(package, weights=package.weights_digest, picture="0" * 64)
    with pytest.raises(FacelaneError, match="recorded by another release"):
        reference.read(package)
    edited(package, answer=1)
    with pytest.raises(FacelaneError, match="unknown field"):
        reference.read(package)
    (package.folder / reference.CHECK).write_bytes(b" " * (reference.MAX_CHECK_BYTES + 1))
    with pytest.raises(FacelaneError, match="larger than"):
        reference.read(package)


@pytest.mark.slow
def test_recording_keeps_the_tolerance_and_passes(tmp_path: Path) -> None:
    package = copied("facelane-liveness", tmp_path)
    edited(package, weights="0" * 64, tolerance={"score": 0.5, "pixels": 9.0, "cosine": 0.5})
    arguments = ["verify", str(package.folder), "--record", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = reference.read(package)
    assert found is not None
    assert found.tolerance.score == 0.5
    assert found.weights == package.weights_digest
    assert sorted(p.name for p in package.folder.iterdir()) == [
        "CARD.md", "check.json", "model.toml", "weights.safetensors",
    ]  # fmt: skip


def test_a_package_without_a_record_is_sound(tmp_path: Path) -> None:
    package = copied("facelane-liveness", tmp_path)
    (package.folder / reference.CHECK).unlink()
    found = verify(package)
    assert found.passed
    assert "reference" not in {check.name for check in found.checks}


def test_recording_names_its_package(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", "--record", "-d", str(tmp_path)])
    assert result.exit_code == 1
    assert "name the packages" in result.output


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    package = copied("facelane-liveness", tmp_path)
    path = package.folder / reference.CHECK
    path.unlink()
    path.mkdir()  # a file cannot replace a folder, whoever runs this
    with pytest.raises(FacelaneError) as raised:
        reference.record(package)
    assert raised.value.reason in (Reason.ARGUMENT_INVALID, Reason.MODEL_INVALID)


def test_faces_are_compared_by_place_and_faint_ones_not_at_all() -> None:
    def face(score: float, left: float) -> reference.FoundFace:
        return reference.FoundFace(score, (left, 0.0, 50.0, 60.0), (left,) * 10)

    def recorded(*faces: reference.FoundFace) -> reference.Record:
        return reference.Record(1, "", "", reference.Answers(faces=faces))

    clear, faint = face(0.9, 10.0), face(0.06, 300.0)
    same = reference.Answers(faces=(clear,))
    assert "as recorded" in reference.compare(recorded(clear, faint), same)
    moved = reference.Answers(faces=(msgspec.structs.replace(clear, box=(20.0, 0.0, 50.0, 60.0)),))
    for now in (moved, reference.Answers(), reference.Answers(faces=(clear, face(0.8, 200.0)))):
        with pytest.raises(ValueError, match="recorded"):
            reference.compare(recorded(clear), now)
