"""The starter models as they are shipped: whole, small, and of some use.

Two photos in the public domain come with other packages, so that this needs no network and
nothing beside the repository; what needs more pictures is marked ``shared``.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tests.portraits import COLLINS, HOPPER
from training.imaging import textures

from facelane_server.models.api import (
    F32,
    U8,
    Detector,
    DeviceOptions,
    LivenessModel,
    Recognizer,
)
from facelane_server.models.catalog import Catalog
from facelane_server.modeltools.verify import verify
from facelane_server.worker.networks.load import load, network_with_weights

NAMES = ("facelane-detector", "facelane-recognizer", "facelane-liveness")
MAX_BYTES = 12_000_000
MAX_WHEEL_BYTES = 16_000_000


@dataclass(frozen=True)
class Face:
    box: F32
    score: float
    vector: F32
    ood: float
    liveness: float


class Starter:
    """The three models, one after the other, as a lane runs them."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        detector, recognizer, liveness = (Catalog().resolve(name) for name in NAMES)
        self.recognizer_thresholds = recognizer.thresholds
        self.liveness_thresholds = liveness.thresholds
        options = DeviceOptions()
        crops = recognizer.crops + liveness.crops
        found = load(detector, options, batch_max=1, crops=crops)
        known = load(recognizer, options, batch_max=16)
        alive = load(liveness, options, batch_max=16)
        assert isinstance(found, Detector)
        assert isinstance(known, Recognizer)
        assert isinstance(alive, LivenessModel)
        self._detector, self._recognizer, self._liveness = found, known, alive

    def faces(self, picture: U8) -> list[Face]:
        """All faces, best score first."""
        (found,) = self._detector.begin([picture], [16]).finish()
        if not len(found.boxes):
            return []
        chips, *context = found.crops
        known = self._recognizer.begin(chips).finish()
        alive = self._liveness.begin(context).finish()
        return [
            Face(
                found.boxes[i],
                float(found.scores[i]),
                known.vectors[i],
                float(known.ood[i]),
                float(alive[i]),
            )
            for i in range(len(found.boxes))
        ]

    def trusted(self, picture: U8) -> list[Face]:
        """The faces whose OOD score passes."""
        threshold = self.recognizer_thresholds.ood
        assert threshold is not None
        return [face for face in self.faces(picture) if face.ood >= threshold]


@pytest.fixture(scope="module")
def starter() -> Starter:
    return Starter()


def read(path: Path) -> U8:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert picture is not None, path
    return np.asarray(picture, np.uint8)


@pytest.fixture(scope="module")
def hopper() -> U8:
    return read(HOPPER)


@pytest.fixture(scope="module")
def collins() -> U8:
    return read(COLLINS)


@pytest.mark.parametrize("name", NAMES)
def test_package_is_sound(name: str) -> None:
    found = verify(Catalog().resolve(name))
    assert found.passed, [check for check in found.checks if not check.passed]
    assert not found.random_weights


def test_packages_are_small() -> None:
    packages = [Catalog().resolve(name) for name in NAMES]
    sizes = [p.weights_path(w).stat().st_size for p in packages for w in p.manifest.weights]
    assert sum(sizes) <= MAX_BYTES


def test_wheel_holds_the_packages_and_is_small(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    script = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, tmp_path], cwd=root, check=True, timeout=50)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size <= MAX_WHEEL_BYTES
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for name in NAMES:
        folder = f"facelane_server/models/starter/{name}"
        files = ("model.toml", "weights.safetensors", "CARD.md", "check.json")
        assert {f"{folder}/{file}" for file in files} <= names


def test_networks_are_as_small_as_their_cards_say() -> None:
    limits = dict(zip(NAMES, (400_000, 5_000_000, 1_000_000), strict=True))
    for name, limit in limits.items():
        network = network_with_weights(Catalog().resolve(name))
        assert sum(p.numel() for p in network.parameters()) <= limit


def test_cards_say_what_the_weights_may_be_used_for() -> None:
    for name in NAMES:
        package = Catalog().resolve(name)
        card = (package.folder / package.manifest.card).read_text()
        assert "non-commercial research" in card
        assert "## Where it fails" in card


@pytest.mark.slow
def test_nothing_is_found_in_textures() -> None:
    """Gratings, checks, cloth, blobs, noise and marbling, two hundred of them, hold no face."""
    package = Catalog().resolve("facelane-detector")
    model = load(package, DeviceOptions(), batch_max=1)
    assert isinstance(model, Detector)
    torch.manual_seed(12)
    pictures = textures(200, 320, torch.zeros(1)).mul(255).byte().permute(0, 2, 3, 1)
    found = [model.begin([picture.numpy()], [16]).finish()[0] for picture in pictures.contiguous()]
    assert [float(faces.scores.max()) for faces in found if len(faces.boxes)] == []


def test_one_person_in_each_portrait(starter: Starter, hopper: U8, collins: U8) -> None:
    for picture in (hopper, collins):
        faces = starter.trusted(picture)
        assert len(faces) == 1
        assert faces[0].score >= 0.85


def test_two_people_differ_and_each_stays_the_same(
    starter: Starter, hopper: U8, collins: U8
) -> None:
    match = starter.recognizer_thresholds.match
    assert match is not None
    vectors: dict[str, list[F32]] = {}
    for name, picture in (("hopper", hopper), ("collins", collins)):
        variants = [
            picture,
            np.ascontiguousarray(picture[:, ::-1]),
            cv2.resize(picture, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA),
            cv2.convertScaleAbs(picture, alpha=0.75, beta=10),
        ]
        vectors[name] = [starter.trusted(np.asarray(v, np.uint8))[0].vector for v in variants]
    for same in vectors.values():
        assert min(float(a @ b) for a in same for b in same) >= match
    across = [float(a @ b) for a in vectors["hopper"] for b in vectors["collins"]]
    assert max(across) < match - 0.1


@pytest.mark.parametrize("damage", ["blur", "tiny", "noise", "upside_down", "half"])
def test_ood_score_falls_under_its_threshold(starter: Starter, collins: U8, damage: str) -> None:
    face = starter.trusted(collins)[0]
    threshold = starter.recognizer_thresholds.ood
    assert threshold is not None
    package = Catalog().resolve("facelane-recognizer")
    model = load(package, DeviceOptions(), batch_max=1)
    assert isinstance(model, Recognizer)
    x, y, w, h = (round(float(v)) for v in face.box)
    side = max(w, h) + 24
    left, top = x + w // 2 - side // 2, y + h // 2 - side // 2
    chip = cv2.resize(collins[top : top + side, left : left + side], (112, 112))
    rng = np.random.default_rng(1)
    spoilt = {
        "blur": lambda: cv2.GaussianBlur(chip, (0, 0), 4.0),
        "tiny": lambda: cv2.resize(
            cv2.resize(chip, (10, 10), interpolation=cv2.INTER_AREA), (112, 112)
        ),
        "noise": lambda: (chip + rng.normal(0, 64, chip.shape)).clip(0, 255).astype(np.uint8),
        "upside_down": lambda: np.ascontiguousarray(chip[::-1]),
        "half": lambda: np.concatenate((chip[:60], np.zeros_like(chip[60:]))),
    }[damage]()
    good = float(model.begin(np.asarray(chip, np.uint8)[None]).finish().ood[0])
    bad = float(model.begin(np.asarray(spoilt, np.uint8)[None]).finish().ood[0])
    assert bad < threshold
    assert bad < good


@pytest.mark.shared
def test_probes_are_matched_and_strangers_are_not(
    starter: Starter, shared: Path, hopper: U8, collins: U8
) -> None:
    """Every enrolled person in the probes is found; nobody else gets a name."""
    thresholds = starter.recognizer_thresholds
    assert thresholds.match is not None
    assert thresholds.margin is not None
    media = shared / "media"
    gallery: defaultdict[str, list[F32]] = defaultdict(list)
    for path in sorted((media / "gallery").glob("*/*")):
        faces = starter.trusted(read(path))
        assert len(faces) == 1, path.name
        gallery[path.parent.name].append(faces[0].vector)

    def names(picture: U8) -> list[str]:
        out = []
        for face in starter.trusted(picture):
            ranked = sorted(
                ((max(float(face.vector @ t) for t in rows), who) for who, rows in gallery.items()),
                reverse=True,
            )
            if (
                ranked[0][0] >= thresholds.match
                and ranked[0][0] - ranked[1][0] >= thresholds.margin
            ):
                out.append(ranked[0][1])
        return sorted(out)

    expected = {
        "alex_lacamoire1.jpg": ["alex_lacamoire"],
        "johnsnow_test1.jpg": ["kit_harington"],
        "kit_with_rose.jpg": ["kit_harington", "rose_leslie"],
        "obama1.jpg": ["obama"],
        "obama_and_biden.jpg": ["biden", "obama"],
        "two_people.jpg": ["biden", "obama"],
    }
    assert {name: names(read(media / "probes" / name)) for name in expected} == expected
    for stranger in (hopper, collins, read(media / "insightface_t1.jpg")):
        assert names(stranger) == []


@pytest.mark.shared
def test_live_picture_passes_and_spoofs_do_not(starter: Starter, shared: Path) -> None:
    live = starter.liveness_thresholds.live
    assert live is not None
    score = {
        name: starter.faces(read(shared / "media" / f"liveness_{name}.jpg"))[0].liveness
        for name in ("T1", "F1", "F2")
    }
    assert score["T1"] >= live
    assert score["F1"] < live
    assert score["F2"] < live
