"""The public models, imported, against other people's runtimes and known results."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from facelane_server.models.api import (
    AlignedCrop,
    ContextCrop,
    Detections,
    Detector,
    DeviceOptions,
    LivenessModel,
    Model,
    Recognizer,
)
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import read_package
from facelane_server.modeltools.importer import guess_recipe, import_model
from facelane_server.modeltools.verify import verify
from facelane_server.worker.networks.load import load, network_with_weights

pytestmark = pytest.mark.shared

CROPS = (AlignedCrop(), ContextCrop(2.7), ContextCrop(4.0))
FASNET = ["2.7_80x80_MiniFASNetV2.pth", "4_0_0_80x80_MiniFASNetV1SE.pth"]


@pytest.fixture(scope="module")
def packages(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the public models as packages, made by the importer."""
    into = tmp_path_factory.mktemp("packages")
    for files in (["yunet_n.pth"], ["yunet_n_dynamic.onnx"], ["mbf_512_fp32.onnx"], FASNET):
        sources = [shared / "models" / file for file in files]
        import_model(guess_recipe(sources), sources, into)
    import_model(
        "onnx-recognizer",
        [shared / "models" / "mbf_512_fp32.onnx"],
        into,
        name="mbf-onnx",
        overrides={"ood": {"source": "norm", "center": 6.46, "scale": 0.35}},
    )
    return into


def loaded(packages: Path, name: str, **options: object) -> Model:
    torch.set_num_threads(1)
    model = load(
        Catalog([packages]).resolve(name),
        DeviceOptions(),
        batch_max=8,
        **{"crops": CROPS, **options},  # type: ignore[arg-type]
    )
    model.warm_up()
    return model


@pytest.fixture(scope="module")
def detector(packages: Path) -> Detector:
    model = loaded(packages, "yunet-n")
    assert isinstance(model, Detector)
    return model


@pytest.fixture(scope="module")
def recognizer(packages: Path) -> Recognizer:
    model = loaded(packages, "mbf-512")
    assert isinstance(model, Recognizer)
    return model


@pytest.fixture(scope="module")
def liveness(packages: Path) -> LivenessModel:
    model = loaded(packages, "minifasnet-pair")
    assert isinstance(model, LivenessModel)
    return model


def detect(detector: Detector, *pictures: np.ndarray) -> list[Detections]:
    return detector.begin(pictures, [16] * len(pictures)).finish()


def upright(path: Path) -> np.ndarray:
    """A photo as people see it (OpenCV applies its orientation)."""
    picture = cv2.imread(str(path))
    assert picture is not None
    return picture


def photos(shared: Path) -> list[Path]:
    found = sorted((shared / "media" / "gallery").rglob("*.*"))
    return [*found, shared / "media" / "insightface_t1.jpg"]


@pytest.mark.parametrize("max_side", [320, 640])
def test_yunet_equals_opencv(shared: Path, packages: Path, max_side: int) -> None:
    """Boxes and landmarks within 1e-3 pixels, scores within 1e-4."""
    model = loaded(packages, "yunet-n", max_side=max_side)
    assert isinstance(model, Detector)
    faces = 0
    for path in photos(shared):
        picture = upright(path)
        scale = max_side / max(picture.shape[:2])
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        height, width = picture.shape[:2]
        peer = cv2.FaceDetectorYN.create(
            str(shared / "models" / "yunet_n_dynamic.onnx"), "", (width, height), 0.7, 0.3
        )
        _, rows = peer.detect(picture)
        (found,) = detect(model, picture)
        assert rows is not None
        assert len(found.boxes) == len(rows), path.name
        ordered = rows[np.argsort(-rows[:, 14], kind="stable")]
        assert np.abs(found.boxes - ordered[:, :4]).max() <= 1e-3
        assert np.abs(found.landmarks.reshape(-1, 10) - ordered[:, 4:14]).max() <= 1e-3
        assert np.abs(found.scores - ordered[:, 14]).max() <= 1e-4
        faces += len(rows)
    assert faces >= 14


def test_yunet_by_torch_equals_yunet_by_onnx_runtime(
    shared: Path, packages: Path, detector: Detector
) -> None:
    other = loaded(packages, "yunet-n-onnx")
    assert isinstance(other, Detector)
    pictures = [upright(path) for path in photos(shared)[:6]]
    for a, b in zip(detect(detector, *pictures), detect(other, *pictures), strict=True):
        assert np.abs(a.boxes - b.boxes).max() <= 1e-2  # of pictures scaled by up to four
        assert np.abs(a.scores - b.scores).max() <= 1e-4
        for crops_a, crops_b in zip(a.crops, b.crops, strict=True):
            assert np.abs(crops_a.astype(int) - crops_b).mean() < 0.5


def test_a_batch_equals_its_pictures_one_by_one(shared: Path, detector: Detector) -> None:
    pictures = [upright(path) for path in photos(shared)]
    sizes = {picture.shape for picture in pictures}
    assert len(sizes) > 3
    for start in range(0, len(pictures), 8):
        batch = pictures[start : start + 8]
        for together, picture in zip(detect(detector, *batch), batch, strict=True):
            (alone,) = detect(detector, picture)
            assert np.allclose(together.boxes, alone.boxes, atol=1e-2)
            assert np.allclose(together.scores, alone.scores, atol=1e-4)


def chips_of(detector: Detector, paths: list[Path]) -> np.ndarray:
    return np.concatenate([detect(detector, upright(path))[0].crops[0] for path in paths])


def test_mobilefacenet_equals_onnx_runtime(
    shared: Path, packages: Path, detector: Detector, recognizer: Recognizer
) -> None:
    """Cosine at least 0.9999, and the same OOD scores."""
    other = loaded(packages, "mbf-onnx")
    assert isinstance(other, Recognizer)
    chips = chips_of(detector, photos(shared))
    for start in range(0, len(chips), 8):
        a = recognizer.begin(chips[start : start + 8]).finish()
        b = other.begin(chips[start : start + 8]).finish()
        assert ((a.vectors * b.vectors).sum(1) >= 0.9999).all()
        assert np.abs(a.ood - b.ood).max() <= 1e-3


def test_the_enrolled_are_told_from_strangers(
    shared: Path, packages: Path, detector: Detector, recognizer: Recognizer
) -> None:
    thresholds = read_package(packages / "mbf-512").thresholds
    assert thresholds.match is not None
    assert thresholds.ood is not None
    gallery: dict[str, list[np.ndarray]] = {}
    for path in sorted((shared / "media" / "gallery").rglob("*.*")):
        (found,) = detect(detector, upright(path))
        assert len(found.boxes) == 1
        result = recognizer.begin(found.crops[0]).finish()
        assert result.ood[0] >= thresholds.ood, "an enrolment photo is trusted"
        gallery.setdefault(path.parent.name, []).append(result.vectors[0])
    for name, vectors in gallery.items():
        for other, others in gallery.items():
            similarity = np.array(vectors) @ np.array(others).T
            if name == other:
                assert similarity.min() >= thresholds.match
            else:
                assert similarity.max() < thresholds.match
    (found,) = detect(detector, upright(shared / "media" / "insightface_t1.jpg"))
    strangers = recognizer.begin(found.crops[0][:8]).finish().vectors
    enrolled = np.concatenate([np.array(vectors) for vectors in gallery.values()])
    assert (strangers @ enrolled.T).max() < thresholds.match


@pytest.mark.slow
def test_damaged_faces_are_out_of_distribution(
    shared: Path, packages: Path, recognizer: Recognizer
) -> None:
    """The calibration: about 2 % of clean faces below the threshold, most damaged ones."""
    threshold = read_package(packages / "mbf-512").thresholds.ood
    assert threshold is not None
    archive = np.load(shared / "data" / "lfw_train.npz")
    offsets, data = archive["offsets"], archive["jpeg"]
    chosen = np.random.default_rng(7).choice(len(offsets) - 1, 300, replace=False)
    chips = np.stack([cv2.imdecode(data[offsets[i] : offsets[i + 1]], 1) for i in chosen])

    def below(chips: np.ndarray) -> float:
        scores = [
            recognizer.begin(np.ascontiguousarray(chips[i : i + 8])).finish().ood
            for i in range(0, len(chips), 8)
        ]
        return float((np.concatenate(scores) < threshold).mean())

    assert 0.0 < below(chips) <= 0.045
    damaged = {
        "blurred": np.stack([cv2.GaussianBlur(chip, (0, 0), 5) for chip in chips[:48]]),
        "dark": (chips[:48] * 0.08).astype(np.uint8),
        "turned": np.rot90(chips[:48], axes=(1, 2)),
    }
    for name, faces in damaged.items():
        assert below(faces) >= 0.9, name


def test_live_and_spoofed_faces(
    shared: Path, packages: Path, detector: Detector, liveness: LivenessModel
) -> None:
    """The authors' three example photos, with their results."""
    thresholds = read_package(packages / "minifasnet-pair").thresholds
    assert thresholds.live is not None
    assert thresholds.spoof is not None
    scores = {}
    for name in ("T1", "F1", "F2"):
        (found,) = detect(detector, upright(shared / "media" / f"liveness_{name}.jpg"))
        assert len(found.boxes) == 1
        scores[name] = float(liveness.begin(list(found.crops[1:])).finish()[0])
    assert scores["T1"] == pytest.approx(1.000, abs=0.005)
    assert scores["F1"] == pytest.approx(0.335, abs=0.02)
    assert scores["F2"] == pytest.approx(0.005, abs=0.005)
    assert scores["T1"] >= thresholds.live
    assert scores["F1"] < thresholds.spoof
    assert scores["F2"] < thresholds.spoof


def test_copied_weights_are_the_public_files(shared: Path, packages: Path) -> None:
    copied = (packages / "yunet-n" / "yunet_n.pth").read_bytes()
    assert copied == (shared / "models" / "yunet_n.pth").read_bytes()
    provenance = read_package(packages / "mbf-512").manifest.provenance
    assert "mbf_512_fp32.onnx sha256:02f10fac" in provenance["files"][0]
    network_with_weights(read_package(packages / "mbf-512"))


@pytest.mark.parametrize(
    "name", ["yunet-n", "yunet-n-onnx", "mbf-512", "mbf-onnx", "minifasnet-pair"]
)
def test_imported_packages_pass_verification(packages: Path, name: str) -> None:
    result = verify(read_package(packages / name))
    assert result.passed, result.checks
