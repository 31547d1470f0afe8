"""How good is a model package on pictures of one's own.

``evaluate`` measures a package on a folder and writes ``report.json`` and plots (PNG and SVG,
which need matplotlib: ``pip install 'facelane[evaluate]'``). The folder depends on the task:

- recogniser: ``subject/picture.jpg``, one folder for each person; or with ``pairs.csv`` (rows
  ``first,second,same`` with paths and 0 or 1), those pairs alone;
- liveness: ``live/…`` and ``spoof/…``; sub-folders of ``spoof`` are kinds of attack;
- detector: pictures anywhere, and ``boxes.json``: ``{"path": [[x, y, w, h], …], …}``, in which
  a picture without a face has an empty list.

Pictures go through the same code as in service: decoded, searched by a detector package, cut.
Only their EXIF orientation is heeded here, which the service leaves to its clients.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

from facelane_server.domain import Encoding, FacelaneError, Reason, Stage
from facelane_server.worker import pictures
from facelane_server.worker.models import measures
from facelane_server.worker.models.api import (
    U8,
    Detections,
    Detector,
    DeviceOptions,
    LivenessModel,
    Recognizer,
)
from facelane_server.worker.models.load import load
from facelane_server.worker.models.package import Package

Report = dict[str, Any]
F64 = npt.NDArray[np.float64]

FARS: Final = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
MAX_PICTURES: Final = 20_000
"""More would make too many pairs for the memory of a laptop."""
MAX_FACES: Final = 64
_SUFFIXES: Final = {
    ".jpg": Encoding.JPEG,
    ".jpeg": Encoding.JPEG,
    ".png": Encoding.PNG,
    ".webp": Encoding.WEBP,
}


@dataclass(frozen=True)
class Curve:
    """A line of a plot."""

    label: str
    x: F64
    y: F64


@dataclass(frozen=True)
class Plot:
    """A plot to draw; ``log``: of which axes (``x``, ``xy`` or none)."""

    name: str
    x: str
    y: str
    curves: Sequence[Curve]
    log: str = ""


@dataclass
class _Skipped:
    """Why pictures were left out, counted; names of files stay out of the report."""

    counts: Counter[str] = field(default_factory=Counter)


def evaluate(
    package: Package,
    data: Path,
    out: Path,
    *,
    detector: Package | None = None,
    options: DeviceOptions | None = None,
    plots: bool = True,
) -> Report:
    """Measure ``package`` on the folder ``data``; write report and plots to ``out``.

    ``detector`` finds the faces for a recogniser or a liveness model. Raises
    FacelaneError(ARGUMENT_INVALID) when the folder does not hold what the task needs, or
    plots are wanted and matplotlib is absent.
    """
    options = options or DeviceOptions()
    if plots:
        _require_matplotlib()
    if not data.is_dir():
        raise _refuse(f"{data} is no folder")
    skipped = _Skipped()
    if package.task is Stage.DETECTOR:
        report, drawn = _detector(package, data, options, skipped)
    else:
        if detector is None or detector.task is not Stage.DETECTOR:
            raise _refuse(f"a {package.task.value} needs a detector package to find the faces")
        measure = _recognizer if package.task is Stage.RECOGNIZER else _liveness
        report, drawn = measure(package, detector, data, options, skipped)
        report["detector"] = detector.model_id
    report = {
        "model_id": package.model_id,
        "task": package.task.value,
        **report,
        "left_out": dict(skipped.counts),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    if plots:
        for plot in drawn:
            _draw(plot, out)
    return report


# -- pictures ---------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if len(found) > MAX_PICTURES:
        raise _refuse(f"{folder} holds more than {MAX_PICTURES} pictures; take a part of them")
    return found


def _read(path: Path, skipped: _Skipped) -> U8 | None:
    data = path.read_bytes()
    try:
        picture = pictures.decode(memoryview(data), _SUFFIXES[path.suffix.lower()])
    except FacelaneError as error:
        skipped.counts[error.reason.value] += 1
        return None
    upright = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return picture if upright is None else np.asarray(upright, np.uint8)


def _detections(detector: Detector, picture: U8) -> Detections:
    return detector.begin([picture], [MAX_FACES]).finish()[0]


def _main_face(found: Detections) -> int:
    """The largest face: who a picture of one person is of."""
    return int(np.argmax(found.boxes[:, 2] * found.boxes[:, 3]))


def _main_crops(
    package: Package,
    detector: Package,
    files: Sequence[Path],
    options: DeviceOptions,
    skipped: _Skipped,
) -> Iterator[tuple[int, tuple[U8, ...]]]:
    """(index of the file, its main face's crops [1, size, size, 3]) of files with a face."""
    model = load(detector, options, batch_max=1, crops=package.crops)
    assert isinstance(model, Detector)
    model.warm_up()
    try:
        for index, path in enumerate(files):
            picture = _read(path, skipped)
            if picture is None:
                continue
            found = _detections(model, picture)
            if not len(found.boxes):
                skipped.counts["NO_FACE"] += 1
                continue
            best = _main_face(found)
            yield index, tuple(crop[best : best + 1].copy() for crop in found.crops)
    finally:
        model.close()


# -- recogniser -------------------------------------------------------------------------


def _recognizer(
    package: Package, detector: Package, data: Path, options: DeviceOptions, skipped: _Skipped
) -> tuple[Report, list[Plot]]:
    files = _files(data)
    model = load(package, options, batch_max=1)
    assert isinstance(model, Recognizer)
    model.warm_up()
    used: list[int] = []
    vectors: list[npt.NDArray[np.float32]] = []
    scores: list[float] = []
    try:
        for index, (chip,) in _main_crops(package, detector, files, options, skipped):
            answer = model.begin(chip).finish()
            used.append(index)
            vectors.append(answer.vectors[0])
            scores.append(float(answer.ood[0]))
    finally:
        model.close()
    if len(used) < 2:
        raise _refuse("fewer than two pictures show a face")
    embedding = np.stack(vectors).astype(np.float64)
    trust = np.array(scores, np.float64)
    genuine, impostor, subjects = _pairs(data, [files[i] for i in used])
    if not len(genuine) or not len(impostor):
        raise _refuse("it needs two pictures of one person, and a second person")
    same = (embedding[genuine[:, 0]] * embedding[genuine[:, 1]]).sum(1)
    other = (embedding[impostor[:, 0]] * embedding[impostor[:, 1]]).sum(1)
    thresholds = package.thresholds
    assert thresholds.match is not None
    assert thresholds.ood is not None
    accuracy = measures.accuracy_10_fold(same, other, seed=1)
    at_far: Report = {}
    for far in FARS:
        if far * len(other) < 1:
            break
        threshold = measures.threshold_at_far(other, far)
        at_far[f"{far:.0e}"] = {
            "threshold": threshold,
            "true_accept_rate": float((same >= threshold).mean()),
        }
    eer_threshold, eer = measures.equal_error(same, other)
    shares = np.linspace(0, 0.5, 26)
    kept = np.random.default_rng(2).permutation(len(other))[: max(len(same), 1000)]
    both = np.concatenate((genuine, impostor[kept]))
    curve = measures.reject_curve(
        trust[both].min(1),
        np.concatenate((same, other[kept])),
        np.arange(len(both)) < len(same),
        shares,
    )
    report: Report = {
        "pictures": len(used),
        "subjects": subjects,
        "genuine_pairs": len(same),
        "impostor_pairs": len(other),
        "accuracy_10_fold": None if np.isnan(accuracy) else accuracy,
        "equal_error": {"threshold": eer_threshold, "rate": eer},
        "at_false_accept_rate": at_far,
        "at_package_threshold": {
            "threshold": thresholds.match,
            "false_accept_rate": float((other >= thresholds.match).mean()),
            "true_accept_rate": float((same >= thresholds.match).mean()),
        },
        "ood": {
            "threshold": thresholds.ood,
            "under_threshold": float((trust < thresholds.ood).mean()),
            "quantiles": {
                str(q): float(np.quantile(trust, q)) for q in (0.01, 0.02, 0.05, 0.25, 0.5, 0.75)
            },
            "reject_curve": {"share": shares.tolist(), "error": curve.tolist()},
        },
    }
    plots = _error_plots(same, other, "false accept rate", "true accept rate")
    plots.append(
        Plot(
            "ood-reject",
            "share of pairs rejected, least trusted first",
            "verification error",
            [Curve("OOD score", shares, curve)],
        )
    )
    return report, plots


def _pairs(
    data: Path, files: Sequence[Path]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Genuine pairs, impostor pairs (rows of ``files``), and how many subjects there are."""
    listed = data / "pairs.csv"
    if not listed.is_file():
        names = [path.relative_to(data).parts[0] for path in files if path.parent != data]
        if len(names) != len(files):
            raise _refuse("pictures lie outside of the subjects' folders; move them into one")
        unique, identity = np.unique(names, return_inverse=True)
        return (*measures.pairs(identity.astype(np.int64), seed=3), len(unique))
    row_of = {path.resolve(): row for row, path in enumerate(files)}
    sides: dict[str, list[tuple[int, int]]] = {"0": [], "1": []}
    with listed.open(newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream), 2):
            try:
                ends = [(data / row[key]).resolve() for key in ("first", "second")]
                side = sides[row["same"].strip()]
            except (KeyError, TypeError, AttributeError) as error:
                raise _refuse(
                    f"pairs.csv, line {number}: needs the columns first, second and same (0 or 1)"
                ) from error
            if all(end in row_of for end in ends):
                side.append((row_of[ends[0]], row_of[ends[1]]))
    genuine, impostor = (np.array(sides[key], np.int64).reshape(-1, 2) for key in ("1", "0"))
    return genuine, impostor, len({path.parent for path in files})


# -- liveness ---------------------------------------------------------------------------


def _liveness(
    package: Package, detector: Package, data: Path, options: DeviceOptions, skipped: _Skipped
) -> tuple[Report, list[Plot]]:
    for name in ("live", "spoof"):
        if not (data / name).is_dir():
            raise _refuse(f"it needs the folders live and spoof; {name} is missing")
    files = _files(data / "live") + _files(data / "spoof")
    model = load(package, options, batch_max=1)
    assert isinstance(model, LivenessModel)
    model.warm_up()
    kinds: dict[str, list[float]] = {}
    try:
        for index, crops in _main_crops(package, detector, files, options, skipped):
            parts = files[index].relative_to(data).parts
            kind = "live" if parts[0] == "live" else "/".join(parts[:2] if parts[2:] else parts[:1])
            kinds.setdefault(kind, []).append(float(model.begin(crops).finish()[0]))
    finally:
        model.close()
    live = np.array(kinds.pop("live", []), np.float64)
    if not len(live) or not kinds:
        raise _refuse("it needs at least one live face and one spoof")
    spoof = np.concatenate([np.array(scores, np.float64) for scores in kinds.values()])
    least_live, least_bona_fide = package.thresholds.live, package.thresholds.spoof
    assert least_live is not None
    assert least_bona_fide is not None
    eer_threshold, eer = measures.equal_error(live, spoof)

    def verdicts(scores: F64) -> Report:
        return {
            "count": len(scores),
            "live": float((scores >= least_live).mean()),
            "undecided": float(((scores < least_live) & (scores >= least_bona_fide)).mean()),
            "spoof": float((scores < least_bona_fide).mean()),
        }

    by_kind = {kind: verdicts(np.array(scores)) for kind, scores in sorted(kinds.items())}
    report: Report = {
        "thresholds": {"live": least_live, "spoof": least_bona_fide},
        "live": verdicts(live),
        "attacks": by_kind,
        # ISO/IEC 30107-3: the attack rates are those of the worst kind.
        "apcer": max(row["live"] for row in by_kind.values()),
        "bpcer": float((live < least_bona_fide).mean()),
        "bona_fide_not_live": float((live < least_live).mean()),
        "equal_error": {"threshold": eer_threshold, "rate": eer},
        "auroc": measures.auroc(live, spoof),
    }
    return report, _error_plots(live, spoof, "attacks accepted", "bona fide accepted")


# -- detector ---------------------------------------------------------------------------


def _detector(
    package: Package, data: Path, options: DeviceOptions, skipped: _Skipped
) -> tuple[Report, list[Plot]]:
    truth = _boxes(data)
    model = load(package, options, batch_max=1)
    assert isinstance(model, Detector)
    model.warm_up()
    hits: list[tuple[float, bool]] = []
    faces = empty = falsely_found = 0
    try:
        for name, boxes in sorted(truth.items()):
            picture = _read(data / name, skipped)
            if picture is None:
                continue
            found = _detections(model, picture)
            taken = measures.match_boxes(found.boxes, boxes)
            hits += [(float(s), bool(t >= 0)) for s, t in zip(found.scores, taken, strict=True)]
            faces += len(boxes)
            if not boxes:
                empty += 1
                falsely_found += bool(len(found.boxes))
    finally:
        model.close()
    if not faces:
        raise _refuse("boxes.json names no face in a readable picture")
    ordered = sorted(hits, reverse=True)
    right = np.cumsum([hit for _, hit in ordered], dtype=np.float64)
    count = np.arange(1, len(ordered) + 1, dtype=np.float64)
    report: Report = {
        "pictures": len(truth) - sum(skipped.counts.values()),
        "faces": faces,
        "threshold": package.thresholds.score,
        "recall": float(right[-1] / faces) if len(right) else 0.0,
        "precision": float(right[-1] / len(ordered)) if len(right) else None,
        "pictures_without_faces": empty,
        "of_which_with_a_find": falsely_found,
        "at_score": {
            f"{score:g}": {
                "recall": sum(hit for s, hit in hits if s >= score) / faces,
                "precision": _share([hit for s, hit in hits if s >= score]),
            }
            for score in (0.5, 0.6, 0.7, 0.8, 0.9)
            if score >= (package.thresholds.score or 0.0)
        },
    }
    curve = Curve("from the package's threshold up", right / faces, right / count)
    return report, [Plot("precision-recall", "recall", "precision", [curve])]


def _boxes(data: Path) -> Mapping[str, list[list[float]]]:
    path = data / "boxes.json"
    try:
        found = json.loads(path.read_text())
        out = {
            str(name): [[float(v) for v in box] for box in boxes] for name, boxes in found.items()
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise _refuse(
            'it needs boxes.json: {"path": [[x, y, width, height], ...], ...}, in pixels'
        ) from error
    for name, boxes in out.items():
        inside = (data / name).resolve().is_relative_to(data.resolve())
        if not inside or Path(name).suffix.lower() not in _SUFFIXES or not (data / name).is_file():
            raise _refuse(f"boxes.json names {name}, which is no picture in the folder")
        if any(len(box) != 4 for box in boxes):
            raise _refuse(f"boxes.json: a box of {name} has not four numbers")
    return out


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


# -- plots ------------------------------------------------------------------------------


def _error_plots(genuine: F64, impostor: F64, false: str, true: str) -> list[Plot]:
    _, accepted, rejected = measures.error_curve(genuine, impostor)
    floor = 0.5 / max(len(genuine), len(impostor))
    return [
        Plot("roc", false, true, [Curve("", np.maximum(accepted, floor), 1 - rejected)], "x"),
        Plot(
            "det",
            false,
            f"1 - {true}",
            [Curve("", np.maximum(accepted, floor), np.maximum(rejected, floor))],
            "xy",
        ),
    ]


def _require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise _refuse("plots need matplotlib: pip install 'facelane[evaluate]', or leave them out")


def _draw(plot: Plot, out: Path) -> None:
    # Without pyplot there is no global state, and no display is looked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="tight")
    axes = figure.add_subplot()
    for curve in plot.curves:
        axes.plot(curve.x, curve.y, label=curve.label or None)
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    if "x" in plot.log:
        axes.set_xscale("log")
    if "y" in plot.log:
        axes.set_yscale("log")
    axes.grid(visible=True, alpha=0.3)
    if any(curve.label for curve in plot.curves):
        axes.legend()
    for suffix in ("png", "svg"):
        figure.savefig(out / f"{plot.name}.{suffix}", dpi=120)


def _refuse(message: str) -> FacelaneError:
    return FacelaneError(Reason.ARGUMENT_INVALID, f"the evaluation cannot be made: {message}")
