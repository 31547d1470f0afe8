"""How good is a model package on pictures of one's own.

``evaluate`` measures a package on a folder and writes a report (see ``report``). What the
folder must hold depends on the task:

- recogniser: ``subject/picture.jpg``, one folder for each person; or with ``pairs.csv`` (rows
  ``first,second,same`` with paths and 0 or 1), those pairs alone; ``groups.csv`` (rows
  ``subject,group``, the subject a folder's name) asks for rates within groups as well;
- liveness: ``live/…`` and ``spoof/…``; sub-folders of ``spoof`` are kinds of attack;
- detector: pictures anywhere, and ``boxes.json``: ``{"path": [[x, y, w, h], …], …}``, in which
  a picture without a face has an empty list; or no such file, and another detector to agree with.

Pictures go through the same code as in service: decoded, searched by a detector package, cut.
Only their EXIF orientation is heeded here, which the service leaves to its clients. A picture
that cannot be used is counted and listed, and the rest goes on. Reports hold counts and rates,
no names of subjects or files; ``left_out.csv`` alone holds paths.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.models.api import F32, Detections, Detector, DeviceOptions, LivenessModel
from facelane_server.models.package import Package
from facelane_server.modeltools import measures, report
from facelane_server.modeltools.evaluate_recognizer import evaluate_recognizer
from facelane_server.modeltools.report import Bars, Curve, Plot, Report
from facelane_server.modeltools.samples import (
    BATCH,
    F64,
    SUFFIXES,
    Progress,
    Run,
    Settings,
    batches,
    detections,
    error_plots,
    faces_of,
    picture_files,
    read_picture,
    refuse,
)
from facelane_server.worker.networks.load import load

APCERS: Final = (0.1, 0.05, 0.01)
"""ISO/IEC 30107-3 calls the BPCER at these BPCER10, BPCER20 and BPCER100."""
LOW_SCORE: Final = 0.05
"""Detectors are measured from here up, whatever their package's threshold."""
SIDES: Final = (24, 48, 96, 192)


def evaluate(
    package: Package,
    data: Path,
    out: Path,
    *,
    detector: Package | None = None,
    reference: Package | None = None,
    options: DeviceOptions | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure ``package`` on the folder ``data``; write report and plots to ``out``.

    ``detector`` finds the faces for a recogniser or a liveness model. ``reference`` is the
    detector that another one is compared with where there is no ``boxes.json``. Raises
    FacelaneError(ARGUMENT_INVALID) when the folder does not hold what the task needs, or
    plots are wanted and matplotlib is absent.
    """
    settings = settings or Settings()
    run = Run(data, options or DeviceOptions(), settings, progress or (lambda *_: None))
    if settings.plots:
        report.require_matplotlib()
    if not data.is_dir():
        raise refuse(f"{data} is no folder")
    report.require_folder(out)
    try:
        found, drawn = _measured(package, detector, reference, run)
    except FacelaneError as error:
        if run.left_out and error.reason is Reason.ARGUMENT_INVALID:
            # No report will say so.
            counts = ", ".join(f"{count} {reason}" for reason, count in run.counts().items())
            raise FacelaneError(error.reason, f"{error.message}; left out: {counts}") from error
        raise
    whole = {
        "model_id": package.model_id,
        "task": package.task.value,
        **found,
        "left_out": run.counts(),
    }
    report.write(whole, run.left_out, out, drawn if settings.plots else [])
    return whole


def _measured(
    package: Package, detector: Package | None, reference: Package | None, run: Run
) -> tuple[Report, list[Plot | Bars]]:
    aligned = run.settings.aligned
    if package.task is Stage.DETECTOR:
        if aligned:
            raise refuse("a detector takes whole pictures: leave out --aligned")
        return _detector(package, reference, run)
    if not aligned and (detector is None or detector.task is not Stage.DETECTOR):
        raise refuse(f"a {package.task.value} needs a detector package to find the faces")
    if aligned:
        detector = None
    measure = evaluate_recognizer if package.task is Stage.RECOGNIZER else _liveness
    found, drawn = measure(package, detector, run)
    found["detector"] = detector.model_id if detector else "none: aligned pictures"
    return found, drawn


# -- liveness ---------------------------------------------------------------------------


def _liveness(
    package: Package, detector: Package | None, run: Run
) -> tuple[Report, list[Plot | Bars]]:
    for name in ("live", "spoof"):
        if not (run.data / name).is_dir():
            raise refuse(f"it needs the folders live and spoof; {name} is missing")
    files = [f for part in ("live", "spoof") for f in picture_files(run.data / part, run)]
    kind_of = [_kind(path.relative_to(run.data)) for path in files]
    shown = Counter(kind_of)
    model = load(package, run.options, batch_max=BATCH)
    assert isinstance(model, LivenessModel)
    model.warm_up()
    kinds: dict[str, list[float]] = {}
    try:
        for indices, crops in batches(faces_of(package, detector, files, run)):
            answer = model.begin(crops).finish()
            for index, score in zip(indices, answer, strict=True):
                kinds.setdefault(kind_of[index], []).append(float(score))
    finally:
        model.close()
    live = np.array(kinds.pop("live", []), np.float64)
    if not len(live) or not kinds:
        raise refuse("it needs at least one live face and one spoof")
    attacks = {kind: np.array(scores, np.float64) for kind, scores in sorted(kinds.items())}
    spoof = np.concatenate(list(attacks.values()))
    least_live, least_bona_fide = package.thresholds.live, package.thresholds.spoof
    assert least_live is not None
    assert least_bona_fide is not None
    eer_threshold, eer = measures.equal_error(live, spoof)

    def verdicts(kind: str, scores: F64) -> Report:
        passed = int((scores >= least_live).sum())
        return {
            "count": len(scores),
            "no_face": shown[kind] - len(scores),
            "live": passed / len(scores),
            "live_interval": list(measures.wilson(passed, len(scores))),
            "undecided": float(((scores < least_live) & (scores >= least_bona_fide)).mean()),
            "spoof": float((scores < least_bona_fide).mean()),
        }

    by_kind = {kind: verdicts(kind, scores) for kind, scores in attacks.items()}
    worst = max(by_kind, key=lambda kind: by_kind[kind]["live"])
    at_apcer, suggested = _at_apcer(live, attacks, run.settings.fars or APCERS)
    if suggested:
        # At most one living face in a hundred is called an attack.
        calm = min(float(np.quantile(live, 0.01)), suggested["thresholds.live"])
        suggested["thresholds.spoof"] = round(calm, 3)
    refused = int((live < least_bona_fide).sum())
    found: Report = {
        "thresholds": {"live": least_live, "spoof": least_bona_fide},
        # ISO/IEC 30107-3: the attack rate is that of the worst kind.
        "apcer": by_kind[worst]["live"],
        "apcer_interval": by_kind[worst]["live_interval"],
        "bpcer": refused / len(live),
        "bpcer_interval": list(measures.wilson(refused, len(live))),
        "bona_fide_not_live": float((live < least_live).mean()),
        "auroc": measures.auroc(live, spoof),
        "live": verdicts("live", live),
        "attacks": by_kind,
        "equal_error": {"threshold": eer_threshold, "rate": eer},
        "at_attack_accept_rate": at_apcer,
        "suggested": suggested,
    }
    mark = (
        f"live = {least_live:g}",
        float((spoof >= least_live).mean()),
        float((live >= least_live).mean()),
    )
    plots = error_plots(live, spoof, "attacks accepted", "bona fide accepted", mark)
    return found, plots


def _kind(path: Path) -> str:
    """``live``, ``spoof``, or ``spoof/kind`` of a path in such a folder."""
    if path.parts[0] == "live":
        return "live"
    return "/".join(path.parts[:2] if path.parts[2:] else path.parts[:1])


def _at_apcer(
    live: F64, attacks: Mapping[str, F64], rates: Sequence[float]
) -> tuple[Report, Report]:
    """For each APCER the threshold that holds it for every kind, and the BPCER that it costs."""
    found: Report = {}
    suggested: Report = {}
    fewest = min(len(scores) for scores in attacks.values())
    for rate in sorted(rates, reverse=True):
        if rate * fewest < 1:
            found[f"{rate:g}"] = {"threshold": None, "bpcer": None, "interval": None}
            continue
        threshold = max(measures.threshold_at_far(scores, rate) for scores in attacks.values())
        refused = int((live < threshold).sum())
        found[f"{rate:g}"] = {
            "threshold": threshold,
            "bpcer": refused / len(live),
            "interval": list(measures.wilson(refused, len(live))),
        }
        if threshold <= 1:
            suggested = {
                "thresholds.live": min(1.0, measures.rounded_up(threshold)),
                "for_attack_accept_rate": rate,
            }
    return found, suggested


# -- detector ---------------------------------------------------------------------------


@dataclass
class _Finds:
    """All finds of a detector, matched.

    ``score`` and ``right`` of those that count; ``side`` and ``found_at`` (score, or -1 where
    missed) of the true faces; ``shift``: landmark error over the box's width.
    """

    score: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    side: list[float] = field(default_factory=list)
    found_at: list[float] = field(default_factory=list)
    shift: list[tuple[float, float]] = field(default_factory=list)
    empty: list[float] = field(default_factory=list)
    """The best score in each picture without faces."""

    def add(self, found: Detections, boxes: F64, landmarks: F32 | None, least: float) -> None:
        """One picture; faces under ``least`` pixels count neither way."""
        taken = measures.match_boxes(found.boxes, boxes)
        found_at = np.full(len(boxes), -1.0)
        for i, at in enumerate(taken):
            if at >= 0:
                found_at[at] = found.scores[i]
                big = _side(boxes[at]) >= least
                if big and landmarks is not None:
                    gap = np.linalg.norm(found.landmarks[i] - landmarks[at], axis=1).mean()
                    self.shift.append((float(found.scores[i]), float(gap / boxes[at, 2])))
            else:
                big = _side(found.boxes[i]) >= least
            if big:
                self.score.append(float(found.scores[i]))
                self.right.append(bool(at >= 0))
        for box, score in zip(boxes, found_at, strict=True):
            if _side(box) >= least:
                self.side.append(_side(box))
                self.found_at.append(float(score))
        if not len(boxes):
            sides = np.array([_side(box) for box in found.boxes])
            self.empty.append(float(found.scores[sides >= least].max(initial=0.0)))


def _side(box: npt.NDArray[Any]) -> float:
    return float(np.sqrt(max(0.0, float(box[2]) * float(box[3]))))


def _detector(
    package: Package, reference: Package | None, run: Run
) -> tuple[Report, list[Plot | Bars]]:
    if not (run.data / "boxes.json").is_file() and reference is not None:
        if reference.task is not Stage.DETECTOR:
            raise refuse(f"the reference {reference.name} is no detector")
        truth: dict[Path, list[list[float]] | None] = dict.fromkeys(picture_files(run.data, run))
    else:
        reference = None
        truth = {run.data / name: rows for name, rows in sorted(_boxes(run.data).items())}
    threshold = package.thresholds.score
    assert threshold is not None
    model = load(package.with_score(min(LOW_SCORE, threshold)), run.options, batch_max=1)
    assert isinstance(model, Detector)
    judge = load(reference, run.options, batch_max=1) if reference else None
    assert judge is None or isinstance(judge, Detector)
    finds = _Finds()
    count = 0
    try:
        for number, (path, rows) in enumerate(truth.items()):
            run.progress("measuring", number, len(truth))
            picture = read_picture(path, run)
            if picture is None:
                continue
            count += 1
            marks: F32 | None = None
            if judge is not None:
                true = detections(judge, picture)
                boxes, marks = true.boxes.astype(np.float64), true.landmarks
            else:
                boxes = np.array(rows, np.float64).reshape(-1, 4)
            finds.add(detections(model, picture), boxes, marks, run.settings.min_face)
    finally:
        model.close()
        if judge is not None:
            judge.close()
    if not finds.side:
        raise refuse(f"no readable picture has a face of {run.settings.min_face:g} pixels or more")
    return _detection_report(finds, threshold, count, reference)


def _detection_report(
    finds: _Finds, threshold: float, count: int, reference: Package | None
) -> tuple[Report, list[Plot | Bars]]:
    score, right = np.array(finds.score, np.float64), np.array(finds.right, bool)
    side, found_at = np.array(finds.side), np.array(finds.found_at)
    empty = np.array(finds.empty)
    faces = len(side)

    def at(least: float) -> Report:
        good = int((found_at >= least).sum())
        shown = int((score >= least).sum())
        hits = int((right & (score >= least)).sum())
        return {
            "recall": good / faces,
            "recall_interval": list(measures.wilson(good, faces)),
            "precision": hits / shown if shown else None,
            "precision_interval": list(measures.wilson(hits, shown)) if shown else None,
            "empty_pictures_with_a_find": int((empty >= least).sum()),
        }

    edges = [0, *SIDES, np.inf]
    by_side: Report = {}
    for low, high in itertools.pairwise(edges):
        rows = found_at[(side >= low) & (side < high)]
        if len(rows):
            name = f"{low:g} and more" if np.isinf(high) else f"{low:g} to {high:g}"
            hit = int((rows >= threshold).sum())
            by_side[name] = {
                "faces": len(rows),
                "recall": hit / len(rows),
                "interval": list(measures.wilson(hit, len(rows))),
            }
    shifts = [shift for s, shift in finds.shift if s >= threshold]
    served = at(threshold)
    found: Report = {
        "pictures": count,
        "faces": faces,
        "truth": f"the finds of {reference.model_id}" if reference else "boxes.json",
        "threshold": threshold,
        "recall": served["recall"],
        "recall_interval": served["recall_interval"],
        "precision": served["precision"],
        "precision_interval": served["precision_interval"],
        "average_precision": measures.average_precision(score, right, faces),
        "pictures_without_faces": len(empty),
        "of_which_with_a_find": served["empty_pictures_with_a_find"],
        "recall_by_side": by_side,
        "at_score": {f"{s:g}": at(s) for s in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)},
    }
    if shifts:
        found["landmark_error_of_width"] = float(np.mean(shifts))
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(right[order], dtype=np.float64)
    curve = Curve("", hits / faces, hits / np.arange(1, len(hits) + 1))
    mark = (f"score = {threshold:g}", served["recall"], served["precision"] or 0.0)
    return found, [Plot("precision-recall", "recall", "precision", [curve], marks=[mark])]


def _boxes(data: Path) -> Mapping[str, list[list[float]]]:
    path = data / "boxes.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        out = {
            str(name): [[float(v) for v in box] for box in boxes] for name, boxes in found.items()
        }
    except (OSError, ValueError, OverflowError, RecursionError, AttributeError, TypeError) as error:
        raise refuse(
            'it needs boxes.json: {"path": [[x, y, width, height], ...], ...}, in pixels; '
            "or name another detector to compare with: --reference"
        ) from error
    for name, boxes in out.items():
        inside = (data / name).resolve().is_relative_to(data.resolve())
        if not inside or Path(name).suffix.lower() not in SUFFIXES or not (data / name).is_file():
            raise refuse(f"boxes.json names {name}, which is no picture in the folder")
        if any(len(box) != 4 for box in boxes):
            raise refuse(f"boxes.json: a box of {name} has not four numbers")
        if not all(math.isfinite(v) for box in boxes for v in box):
            raise refuse(f"boxes.json: a box of {name} has a number that is none")
        if any(box[2] <= 0 or box[3] <= 0 for box in boxes):
            raise refuse(
                f"boxes.json: a box of {name} has no width or no height; boxes are x, y, width, "
                "height, not two corners"
            )
    return out
