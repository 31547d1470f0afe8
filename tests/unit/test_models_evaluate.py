"""``models evaluate`` on small folders: measures against hand-made values, and whole reports."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from tests.portraits import COLLINS, HOPPER
from typer.testing import CliRunner

from facelane_server.domain import FacelaneError, Reason
from facelane_server.models.api import Detections
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import read_package
from facelane_server.modeltools import damage, measures
from facelane_server.modeltools import report as reports
from facelane_server.modeltools.cli import app
from facelane_server.modeltools.evaluate import _at_apcer as at_apcer
from facelane_server.modeltools.evaluate import _Finds as Finds
from facelane_server.modeltools.evaluate import evaluate
from facelane_server.modeltools.evaluate_recognizer import _suggested_mapping as suggested_mapping
from facelane_server.modeltools.samples import Settings

GENUINE = np.array([0.9, 0.8, 0.7, 0.4])
IMPOSTOR = np.array([0.5, 0.3, 0.2, 0.1, 0.0])


def portraits() -> dict[str, np.ndarray]:
    found = {
        "hopper": HOPPER,
        "collins": COLLINS,
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
    # From where everybody passes to where hardly anybody does.
    assert (accepted[0], rejected[0]) == (1.0, 0.0)
    assert (accepted[-1], rejected[-1]) == (0.0, 0.75)


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


@pytest.mark.slow
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
    assert report["ood"]["damaged_faces"] == 4
    assert set(report["ood"]["damage"]) == set(damage.KINDS)
    # Four clean portraits against what is left of them: the shipped score tells them apart.
    assert report["ood"]["damage_auroc_mean"] >= 0.95
    with (tmp_path / "out" / "left_out.csv").open(newline="") as stream:
        listed = {row["picture"]: row["reason"] for row in csv.DictReader(stream)}
    assert listed == {"nobody/a.png": "NO_FACE", "nobody/b.jpg": "PICTURE_CORRUPT"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "hopper" not in text + json.dumps(report)
    assert "![roc](roc.svg)" in text
    for plot in ("roc", "det", "ood-reject", "ood-damage"):
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
        settings=Settings(plots=False),
    )
    assert (report["genuine_pairs"], report["impostor_pairs"]) == (1, 1)
    # Nobody said that the other pictures are of different people: they count as such nowhere.
    assert "impostors" not in report
    for part in ("naming", "open_set", "groups"):
        assert "one for each person" in report[part]["not_measured"]
    assert "tellable" not in report["ood"]


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("pairs.csv", b"first,second,same\na/1.png,a/nobody.png,1\n", "there is no picture"),
        ("pairs.csv", b"first,second,same\na/1.png,a/2.png,yes\n", "line 2"),
        ("pairs.csv", "first,second,same\nMüller.png,a/2.png,1\n".encode("cp1252"), "UTF-8"),
        ("groups.csv", "subject,group\nMüller,1\n".encode("cp1252"), "UTF-8"),
        ("groups.csv", b"subject;group\na;1\n", "columns subject"),
    ],
)
def test_lists_that_cannot_be_are_told_before_the_measuring(
    tmp_path: Path, file: str, content: bytes, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a" / "1.png", np.zeros((32, 32, 3), np.uint8))
    write(tmp_path / "a" / "2.png", np.zeros((32, 32, 3), np.uint8))
    (tmp_path / file).write_bytes(content)
    catalog = Catalog()
    # No model is loaded before.
    monkeypatch.setattr("facelane_server.modeltools.evaluate_recognizer.load", None)
    with pytest.raises(FacelaneError, match=told) as raised:
        evaluate(
            catalog.resolve("facelane-recognizer"), tmp_path, tmp_path / "out",
            detector=catalog.resolve("facelane-detector"), settings=Settings(plots=False),
        )  # fmt: skip
    assert raised.value.reason is Reason.ARGUMENT_INVALID


@pytest.mark.parametrize(
    "boxes",
    ['[[1, 2, NaN, 4]]', '[[1, 2, 1e999, 4]]', '[[1, 2, -30, 4]]', '[[1, 2, 0, 4]]',
     f"[[1, 2, {'9' * 400}, 4]]", "[" * 100_000],
)  # fmt: skip
def test_boxes_that_cannot_be_are_refused(tmp_path: Path, boxes: str) -> None:
    write(tmp_path / "a.png", np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "boxes.json").write_text(f'{{"a.png": {boxes}}}')
    with pytest.raises(FacelaneError, match=r"boxes\.json") as raised:
        evaluate(
            Catalog().resolve("facelane-detector"), tmp_path, tmp_path / "out",
            settings=Settings(plots=False),
        )  # fmt: skip
    assert raised.value.reason is Reason.ARGUMENT_INVALID


def test_a_report_that_nobody_may_write_is_told_before_the_measuring(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data / "a.png", np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(
        app, ["evaluate", "facelane-detector", "--data", str(data), "--no-plots", "--reference",
              "facelane-detector", "--out", str(tmp_path / "file" / "report")],
    )  # fmt: skip
    assert done.exit_code == 1
    assert "name another with --out" in done.output.replace("\n", " ")


def test_pictures_of_kinds_that_are_not_read_are_told(tmp_path: Path) -> None:
    for name in ("a/1.HEIC", "a/2.bmp", "b/1.tiff", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"...")
    catalog = Catalog()
    with pytest.raises(FacelaneError, match=r"left out: 3 ENCODING_UNSUPPORTED$"):
        evaluate(
            catalog.resolve("facelane-recognizer"), tmp_path, tmp_path / "out",
            detector=catalog.resolve("facelane-detector"), settings=Settings(plots=False),
        )  # fmt: skip


def test_a_picture_whose_name_is_no_text_is_listed(tmp_path: Path) -> None:
    reports.write({"model_id": "m"}, [("a\udcff.jpg", "NO_FACE")], tmp_path, [])
    assert b"a\\udcff.jpg,NO_FACE" in (tmp_path / "left_out.csv").read_bytes()


@pytest.mark.parametrize(
    ("threshold", "shown"), [(0.8504, 0.851), (0.85, 0.85), (0.1 + 0.2, 0.3), (0.9999, 1.0)]
)
def test_a_suggested_threshold_stops_what_it_was_chosen_to_stop(
    threshold: float, shown: float
) -> None:
    assert measures.rounded_up(threshold) == pytest.approx(shown, abs=1e-12)


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
            settings=Settings(plots=False),
        )
    assert raised.value.reason is Reason.ARGUMENT_INVALID
    assert not (tmp_path / "out").exists()


def test_measures_of_many_pairs_stay_within_bounds() -> None:
    identity = np.repeat(np.arange(300), 4)
    genuine, impostor = measures.pairs(identity, seed=1, max_impostor=5_000)
    assert len(genuine) == 300 * 6
    assert 4_500 < len(impostor) <= 5_000
    assert (identity[impostor[:, 0]] != identity[impostor[:, 1]]).all()
    assert len(np.unique(impostor, axis=0)) == len(impostor)
    vectors = np.random.default_rng(1).normal(size=(1200, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = (vectors @ vectors.T)[impostor[:, 0], impostor[:, 1]]
    np.testing.assert_allclose(measures.similarities(vectors, impostor), expected, atol=1e-6)


def test_intervals() -> None:
    # Wilson's interval of 8 in 10 and of 0 in 10, as published.
    assert measures.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert measures.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=2e-4)
    assert measures.wilson(0, 0) == (0.0, 1.0)
    # Thirty people with ten pairs each, that hit or fail together: thirty facts, not 300.
    who = np.repeat(np.arange(30), 10)
    together = measures.share_interval(who % 2 == 0, np.stack((who, who), 1), seed=1)
    alone = measures.wilson(150, 300)
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
    assert together[0] < 0.5 < together[1]
    # No hit at all is no proof of zero.
    assert measures.share_interval(np.zeros(300, bool), np.stack((who, who), 1), seed=1)[1] > 0.01


def test_average_precision() -> None:
    right = np.array([True, False, True, False])
    score = np.array([0.9, 0.8, 0.7, 0.6])
    assert measures.average_precision(score, right, 2) == pytest.approx((1 + 2 / 3) / 2)
    assert measures.average_precision(score, right, 4) == pytest.approx((1 + 2 / 3) / 4)
    assert measures.average_precision(np.zeros(0), np.zeros(0, bool), 4) == 0.0


@pytest.mark.parametrize("kind", damage.KINDS)
def test_damage_is_repeatable_and_changes_the_chip(kind: str) -> None:
    chip = np.random.default_rng(3).integers(0, 256, (112, 112, 3), np.uint8)
    before = chip.copy()
    first = damage.KINDS[kind](chip, np.random.default_rng(1))
    again = damage.KINDS[kind](chip, np.random.default_rng(1))
    assert first.shape == chip.shape
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert (chip == before).all()
    assert (first != chip).mean() > 0.1


@pytest.mark.slow
def test_a_folder_of_aligned_chips_needs_no_detector(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for who in range(6):
        base = rng.normal(128, 60, (14, 14, 3))
        for number in range(4):
            noisy = (base + rng.normal(0, 8, base.shape)).clip(0, 255).astype(np.uint8)
            side = 112 if number else 160
            chip = cv2.resize(noisy, (side, side), interpolation=cv2.INTER_NEAREST)
            write(tmp_path / "chips" / str(who) / f"{number}.png", chip)
    write(tmp_path / "chips" / "0" / "wide.png", np.zeros((112, 120, 3), np.uint8))
    report = evaluate(
        Catalog().resolve("facelane-recognizer"),
        tmp_path / "chips",
        tmp_path / "out",
        settings=Settings(aligned=True, plots=False, damaged=8, fars=(0.05, 1e-4)),
    )
    assert report["pictures"] == 24
    assert report["left_out"] == {"NOT_SQUARE": 1}
    assert report["genuine_pairs"] == 36
    assert report["impostor_pairs"] == 240
    assert list(report["at_false_accept_rate"]) == ["0.05", "0.0001"]
    # 240 pairs say nothing about one in ten thousand.
    assert report["at_false_accept_rate"]["0.0001"]["threshold"] is None
    low, high = report["at_false_accept_rate"]["0.05"]["interval"]
    assert low <= report["at_false_accept_rate"]["0.05"]["true_accept_rate"] <= high
    # These are no faces, and the score says so.
    assert report["ood"]["under_threshold"] == 1.0


def test_the_suggested_mapping_is_the_one_in_force_where_that_fits(tmp_path: Path) -> None:
    """Scores made by a known logistic mapping give that mapping back."""
    package = Catalog().resolve("facelane-recognizer")
    ood = package.manifest.ood
    assert ood is not None
    raw = np.random.default_rng(1).normal(5.0, 0.7, 4000)
    suggested = suggested_mapping(package, 1 / (1 + np.exp(-(raw - ood.center) / ood.scale)))
    mapped = 1 / (1 + np.exp(-(raw - suggested["ood.center"]) / suggested["ood.scale"]))
    assert np.median(mapped) == pytest.approx(0.9, abs=1e-3)
    assert np.quantile(mapped, 0.02) == pytest.approx(0.4, abs=1e-3)
    assert "ood.center" not in suggested_mapping(package, np.ones(50))


def test_a_detector_is_measured_against_another(tmp_path: Path) -> None:
    for name, picture in portraits().items():
        write(tmp_path / "data" / f"{name}.png", picture)
    write(tmp_path / "data" / "blank.png", np.full((96, 96, 3), 128, np.uint8))
    catalog = Catalog()
    detector = catalog.resolve("facelane-detector")
    report = evaluate(
        detector,
        tmp_path / "data",
        tmp_path / "out",
        reference=detector,
        settings=Settings(plots=False),
    )
    assert report["truth"] == f"the finds of {detector.model_id}"
    assert (report["recall"], report["precision"]) == (1.0, 1.0)
    assert report["landmark_error_of_width"] == 0.0
    assert report["pictures_without_faces"] == 1
    # Below the served threshold it looks as well, where there are false finds.
    assert report["at_score"]["0.3"]["precision"] <= 1.0
    with pytest.raises(FacelaneError, match="is no detector"):
        evaluate(
            detector,
            tmp_path / "data",
            tmp_path / "out",
            reference=catalog.resolve("facelane-liveness"),
            settings=Settings(plots=False),
        )


def test_finds_of_small_faces_count_neither_way() -> None:
    truth = np.array([[0, 0, 100, 100], [200, 0, 10, 10], [300, 0, 50, 50]], np.float64)
    found = Detections(
        boxes=np.array(
            [[0, 0, 100, 100], [200, 0, 10, 10], [400, 0, 12, 12], [500, 0, 60, 60]], np.float32
        ),
        scores=np.array([0.9, 0.8, 0.7, 0.6], np.float32),
        landmarks=np.zeros((4, 5, 2), np.float32),
        crops=(),
    )
    finds = Finds()
    finds.add(found, truth, None, 24.0)
    assert finds.right == [True, False]
    assert finds.side == [100.0, 50.0]
    assert finds.found_at == pytest.approx([0.9, -1.0])


def test_thresholds_hold_for_the_worst_kind_of_attack() -> None:
    live = np.linspace(0.5, 1.0, 101)
    attacks = {"spoof/print": np.linspace(0, 0.4, 100), "spoof/replay": np.linspace(0, 0.8, 100)}
    found, suggested = at_apcer(live, attacks, (0.1, 0.001))
    threshold = found["0.1"]["threshold"]
    assert all((scores >= threshold).mean() <= 0.1 for scores in attacks.values())
    assert threshold > 0.7
    assert found["0.1"]["bpcer"] == pytest.approx((live < threshold).mean())
    assert found["0.001"]["threshold"] is None
    assert suggested["thresholds.live"] == pytest.approx(threshold, abs=1e-3)


@pytest.mark.parametrize("fars", ["0", "1.5", "nought"])
def test_nonsense_rates_are_refused(tmp_path: Path, fars: str) -> None:
    arguments = ["evaluate", "facelane-liveness", "--data", str(tmp_path), "--far", fars]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "such as 1e-" in result.output


def test_plots_without_matplotlib_say_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(FacelaneError, match=r"facelane\[evaluate\]"):
        evaluate(Catalog().resolve("facelane-detector"), tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_an_onnx_recognizer_is_brought_as_the_manual_says(tmp_path: Path) -> None:
    """Import, switch the norm on, take what the report suggests, record the answers."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(7)
    pooled = 3 * 7 * 7
    weights = rng.normal(size=(pooled, 32)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node(
                "AveragePool", ["x"], ["p"], kernel_shape=[16, 16], strides=[16, 16]
            ),
            onnx.helper.make_node("Flatten", ["p"], ["f"]),
            onnx.helper.make_node("MatMul", ["f", "w"], ["y"]),
        ],
        "blocks",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 112, 112])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 32])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    opset = [onnx.helper.make_opsetid("", 13)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "b.onnx")
    for who in range(8):
        base = rng.normal(128, rng.uniform(30, 70), (7, 7, 3))
        for number in range(6):
            noisy = (base + rng.normal(0, 12, base.shape)).clip(0, 255).astype(np.uint8)
            chip = cv2.resize(noisy, (112, 112), interpolation=cv2.INTER_NEAREST)
            write(tmp_path / "data" / str(who) / f"{number}.png", chip)
    models = tmp_path / "models"
    runner = CliRunner()

    def run(*arguments: str) -> str:
        result = runner.invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.stdout

    def measured() -> dict[str, Any]:
        place = ["-d", str(models), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "o")]
        text = run("evaluate", "mine", *place, "--aligned", "--no-plots", "--json")
        found: dict[str, Any] = json.loads(text)
        return found

    run(
        "import", str(tmp_path / "b.onnx"), "--recipe", "onnx-recognizer", "--name", "mine",
        "--into", str(models),
    )  # fmt: skip
    manifest = models / "mine" / "model.toml"
    text = manifest.read_text().replace("embedding_dim = 512", "embedding_dim = 32")
    manifest.write_text(text)
    assert "trusted" in measured()["ood"]["source"]
    plain = '[ood]\nsource = "none"'
    assert plain in text
    wide = '[ood]\nsource = "norm"\ncenter = {}\nscale = {}'
    manifest.write_text(text.replace(plain, wide.format(0.0, 100.0)))
    suggested = measured()["ood"]["suggested"]
    fitted = wide.format(suggested["ood.center"], suggested["ood.scale"])
    manifest.write_text(text.replace(plain, fitted))
    calibrated = measured()["ood"]
    assert calibrated["quantiles"]["0.5"] == pytest.approx(0.9, abs=0.02)
    assert calibrated["quantiles"]["0.02"] == pytest.approx(0.4, abs=0.02)
    assert calibrated["under_threshold"] <= 0.05
    checks = json.loads(run("verify", "mine", "-d", str(models), "--record", "--json"))
    assert checks["results"][0]["checks"][-1]["name"] == "reference"


def test_what_was_measured_of_strangers_is_written_into_the_package(tmp_path: Path) -> None:
    folder = tmp_path / "null-recognizer"
    shutil.copytree(Catalog().resolve("null-recognizer").folder, folder)
    rng = np.random.default_rng(1)
    for person in range(40):
        for shot in range(2):
            chip = rng.integers(0, 256, (112, 112, 3), np.uint8)
            write(tmp_path / "people" / str(person) / f"{shot}.png", chip)
    command = [
        "evaluate", str(folder), "--data", str(tmp_path / "people"), "--out",
        str(tmp_path / "out"), "--aligned", "--damaged", "20", "--no-plots",
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert read_package(folder).manifest.impostors == ()
    done = CliRunner().invoke(app, [*command, "--write"])
    assert done.exit_code == 0, done.output
    rows = read_package(folder).manifest.impostors
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row.similarity for row in rows] == [
        tuple(row["similarity"]) for row in report["impostors"].values()
    ]
    assert rows[0].pairs > 80 * 78
    table = report["naming"]
    thresholds = [table[size]["threshold"] for size in ("1", "10", "100", "1000", "10000")]
    assert thresholds == sorted(thresholds)
    for row in table.values():
        low, high = row["strangers_interval"]
        assert low <= row["strangers_named"] <= high


def test_nothing_is_written_of_too_few(tmp_path: Path) -> None:
    folder = tmp_path / "null-recognizer"
    shutil.copytree(Catalog().resolve("null-recognizer").folder, folder)
    rng = np.random.default_rng(1)
    for person in range(2):
        for shot in range(2):
            chip = rng.integers(0, 256, (112, 112, 3), np.uint8)
            write(tmp_path / "people" / str(person) / f"{shot}.png", chip)
    done = CliRunner().invoke(
        app,
        ["evaluate", str(folder), "--data", str(tmp_path / "people"), "--out",
         str(tmp_path / "out"), "--aligned", "--damaged", "0", "--no-plots", "--write"],
    )  # fmt: skip
    assert done.exit_code == 1
    assert "nothing was written" in done.output
    assert read_package(folder).manifest.impostors == ()
