"""``models evaluate`` on small folders: measures against hand-made values, and whole reports."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from facelane_server.domain import FacelaneError, Reason
from facelane_server.worker.models import measures
from facelane_server.worker.models.catalog import Catalog
from facelane_server.worker.models.cli import app
from facelane_server.worker.models.evaluate import evaluate

GENUINE = np.array([0.9, 0.8, 0.7, 0.4])
IMPOSTOR = np.array([0.5, 0.3, 0.2, 0.1, 0.0])


def portraits() -> dict[str, np.ndarray]:
    matplotlib = pytest.importorskip("matplotlib")
    skimage = pytest.importorskip("skimage")
    found = {
        "hopper": Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg",
        "collins": Path(skimage.__file__).parent / "data" / "astronaut.png",
    }
    pictures = {}
    for name, path in found.items():
        picture = cv2.imread(str(path))
        assert picture is not None
        pictures[name] = picture
    return pictures


def write(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture)


def test_measures_of_verification() -> None:
    assert measures.auroc(GENUINE, IMPOSTOR) == pytest.approx(19 / 20)
    assert measures.auroc([1.0], [1.0]) == 0.5
    threshold = measures.threshold_at_far(IMPOSTOR, 0.2)
    assert (threshold <= IMPOSTOR).mean() == pytest.approx(0.2)
    assert (np.nextafter(threshold, 0) - 1e-12 <= IMPOSTOR).mean() > 0.2
    _, rate = measures.equal_error(GENUINE, IMPOSTOR)
    assert 0.2 <= rate <= 0.25
    _, accepted, rejected = measures.error_curve(GENUINE, IMPOSTOR)
    assert np.all(np.diff(accepted) <= 0)
    assert np.all(np.diff(rejected) >= 0)


def test_pairs_are_capped_and_right() -> None:
    identity = np.array([0] * 8 + [1] * 2 + [2])
    genuine, impostor = measures.pairs(identity, seed=1, cap=5)
    assert len(genuine) == 5 + 1
    assert (identity[genuine[:, 0]] == identity[genuine[:, 1]]).all()
    assert (identity[impostor[:, 0]] != identity[impostor[:, 1]]).all()
    assert len(impostor) == 8 * 2 + 8 + 2


def test_a_true_box_is_taken_once() -> None:
    truth = [[0, 0, 10, 10], [100, 0, 10, 10]]
    found = [[1, 0, 10, 10], [0, 0, 10, 10], [100, 4, 10, 10], [50, 50, 10, 10]]
    assert measures.match_boxes(found, truth).tolist() == [0, -1, -1, -1]
    assert measures.match_boxes(found, []).tolist() == [-1] * 4


def test_recognizer_report_and_plots(tmp_path: Path) -> None:
    for name, picture in portraits().items():
        write(tmp_path / "data" / name / "a.png", picture)
        write(tmp_path / "data" / name / "b.jpg", np.ascontiguousarray(picture[:, ::-1]))
    blank = np.full((64, 64, 3), 90, np.uint8)
    write(tmp_path / "data" / "nobody" / "a.png", blank)
    (tmp_path / "data" / "nobody" / "b.jpg").write_bytes(b"\xff\xd8\xff no picture")
    catalog = Catalog()
    report = evaluate(
        catalog.resolve("facelane-recognizer"),
        tmp_path / "data",
        tmp_path / "out",
        detector=catalog.resolve("facelane-detector"),
    )
    assert report["genuine_pairs"] == 2
    assert report["impostor_pairs"] == 4
    assert report["at_package_threshold"]["true_accept_rate"] == 1.0
    assert report["at_package_threshold"]["false_accept_rate"] == 0.0
    assert sum(report["left_out"].values()) == 2
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    for plot in ("roc", "det", "ood-reject"):
        assert (tmp_path / "out" / f"{plot}.png").stat().st_size > 1000
        assert "<svg" in (tmp_path / "out" / f"{plot}.svg").read_text()


def test_listed_pairs_alone_count(tmp_path: Path) -> None:
    for name, picture in portraits().items():
        write(tmp_path / f"{name}-a.png", picture)
        write(tmp_path / f"{name}-b.png", np.ascontiguousarray(picture[:, ::-1]))
    rows = ["first,second,same", "hopper-a.png,hopper-b.png,1", "hopper-a.png,collins-b.png,0"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    catalog = Catalog()
    report = evaluate(
        catalog.resolve("facelane-recognizer"),
        tmp_path,
        tmp_path / "out",
        detector=catalog.resolve("facelane-detector"),
        plots=False,
    )
    assert (report["genuine_pairs"], report["impostor_pairs"]) == (1, 1)


def test_detector_and_liveness_from_the_command_line(tmp_path: Path) -> None:
    pictures = portraits()
    write(tmp_path / "faces" / "hopper.png", pictures["hopper"])
    write(tmp_path / "faces" / "blank.png", np.full((96, 96, 3), 128, np.uint8))
    boxes = {"hopper.png": [[180, 108, 165, 222]], "blank.png": []}
    (tmp_path / "faces" / "boxes.json").write_text(json.dumps(boxes))
    runner = CliRunner()
    data, out = str(tmp_path / "faces"), str(tmp_path / "detector")
    result = runner.invoke(
        app, ["evaluate", "facelane-detector", "--data", data, "--out", out, "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["recall"] == 1.0
    assert report["of_which_with_a_find"] == 0
    for folder, picture in (("live", "collins"), ("spoof/print", "hopper")):
        write(tmp_path / "pad" / folder / "a.png", pictures[picture])
    result = runner.invoke(
        app,
        [
            "evaluate", "facelane-liveness", "--data", str(tmp_path / "pad"),
            "--out", str(tmp_path / "liveness"), "--no-plots",
        ],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "liveness" / "report.json").read_text())
    assert list(report["attacks"]) == ["spoof/print"]
    assert not list((tmp_path / "liveness").glob("*.png"))


@pytest.mark.parametrize(
    ("package", "files"),
    [
        ("facelane-recognizer", {}),
        ("facelane-liveness", {"live/a.png": 1}),
        ("facelane-detector", {"a.png": 1}),
    ],
)
def test_a_folder_without_what_the_task_needs_is_refused(
    tmp_path: Path, package: str, files: dict[str, int]
) -> None:
    for name in files:
        write(tmp_path / name, np.zeros((32, 32, 3), np.uint8))
    catalog = Catalog()
    with pytest.raises(FacelaneError) as raised:
        evaluate(
            catalog.resolve(package),
            tmp_path,
            tmp_path / "out",
            detector=catalog.resolve("facelane-detector"),
            plots=False,
        )
    assert raised.value.reason is Reason.ARGUMENT_INVALID
    assert not (tmp_path / "out").exists()
