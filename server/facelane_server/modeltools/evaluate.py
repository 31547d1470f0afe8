"""How good is a model package on pictures of one's own.

``evaluate`` measures a package on a folder and writes a report (see ``report``). What the
folder must hold depends on the task:

- recogniser: ``subject/picture.jpg``, one folder for each person; or with ``pairs.csv`` (rows
  ``first,second,same`` with paths and 0 or 1), those pairs alone;
- liveness: ``live/…`` and ``spoof/…``; sub-folders of ``spoof`` are kinds of attack;
- detector: pictures anywhere, and ``boxes.json``: ``{"path": [[x, y, w, h], …], …}``, in which
  a picture without a face has an empty list; or no such file, and another detector to agree with.

Pictures go through the same code as in service: decoded, searched by a detector package, cut.
Only their EXIF orientation is heeded here, which the service leaves to its clients. A picture
that cannot be used is counted and listed, and the rest goes on. Reports hold counts and rates,
no names of subjects or files; ``left_out.csv`` alone holds paths.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

from facelane_server.domain import Encoding, FacelaneError, Reason, Stage
from facelane_server.models.api import (
    U8,
    Detections,
    Detector,
    DeviceOptions,
    Embeddings,
    LivenessModel,
    Recognizer,
)
from facelane_server.models.package import Package
from facelane_server.modeltools import damage, measures, report
from facelane_server.modeltools.report import Bars, Curve, Plot, Report
from facelane_server.worker.decoding import pictures
from facelane_server.worker.networks.load import load

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]
"""(what is done, how many are done, of how many)."""

FARS: Final = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
APCERS: Final = (0.1, 0.05, 0.01)
"""ISO/IEC 30107-3 calls the BPCER at these BPCER10, BPCER20 and BPCER100."""
MAX_PICTURES: Final = 20_000
MAX_FACES: Final = 64
LOW_SCORE: Final = 0.05
"""Detectors are measured from here up, whatever their package's threshold."""
SIDES: Final = (24, 48, 96, 192)
_BATCH: Final = 16
_SEED: Final = 1
_SUFFIXES: Final = {
    ".jpg": Encoding.JPEG,
    ".jpeg": Encoding.JPEG,
    ".png": Encoding.PNG,
    ".webp": Encoding.WEBP,
}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    ``fars``: false accept rates (of attacks, for a liveness package) to find thresholds for;
    empty takes the task's usual ones. ``aligned``: the pictures are chips already, aligned to
    the ArcFace template (recognisers) or cut as the package declares (liveness, one crop).
    ``damaged``: how many faces the OOD score is tried on with every kind of damage; 0 leaves
    that out. ``min_face``: faces with a smaller geometric mean of their sides, in pixels,
    count neither for nor against a detector.
    """

    fars: tuple[float, ...] = ()
    aligned: bool = False
    damaged: int = 200
    min_face: float = 24.0
    plots: bool = True

    def __post_init__(self) -> None:
        if any(not 0 < far < 1 for far in self.fars):
            raise _refuse("false accept rates lie between 0 and 1, such as 1e-3")


@dataclass
class _Run:
    """What an evaluation carries along: where it reads, and what it left out."""

    data: Path
    options: DeviceOptions
    settings: Settings
    progress: Progress
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def skip(self, path: Path, reason: str) -> None:
        self.left_out.append((str(path.relative_to(self.data)), reason))

    def counts(self) -> dict[str, int]:
        return dict(Counter(reason for _, reason in self.left_out))


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
    run = _Run(data, options or DeviceOptions(), settings, progress or (lambda *_: None))
    if settings.plots:
        report.require_matplotlib()
    if not data.is_dir():
        raise _refuse(f"{data} is no folder")
    if package.task is Stage.DETECTOR:
        if settings.aligned:
            raise _refuse("a detector takes whole pictures: leave out --aligned")
        found, drawn = _detector(package, reference, run)
    else:
        if not settings.aligned and (detector is None or detector.task is not Stage.DETECTOR):
            raise _refuse(f"a {package.task.value} needs a detector package to find the faces")
        if settings.aligned:
            detector = None
        measure = _recognizer if package.task is Stage.RECOGNIZER else _liveness
        found, drawn = measure(package, detector, run)
        found["detector"] = detector.model_id if detector else "none: aligned pictures"
    whole = {
        "model_id": package.model_id,
        "task": package.task.value,
        **found,
        "left_out": run.counts(),
    }
    report.write(whole, run.left_out, out, drawn if settings.plots else [])
    return whole


# -- pictures ---------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if len(found) > MAX_PICTURES:
        raise _refuse(f"{folder} holds more than {MAX_PICTURES} pictures; take a part of them")
    return found


def _read(path: Path, run: _Run) -> U8 | None:
    try:
        data = path.read_bytes()
        picture = pictures.decode(memoryview(data), _SUFFIXES[path.suffix.lower()])
    except FacelaneError as error:
        run.skip(path, error.reason.value)
        return None
    except OSError:
        run.skip(path, "UNREADABLE")
        return None
    upright = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return picture if upright is None else np.asarray(upright, np.uint8)


def _detections(detector: Detector, picture: U8) -> Detections:
    return detector.begin([picture], [MAX_FACES]).finish()[0]


def _main_face(found: Detections) -> int:
    """The largest face: who a picture of one person is of."""
    return int(np.argmax(found.boxes[:, 2] * found.boxes[:, 3]))


def _faces(
    package: Package, detector: Package | None, files: Sequence[Path], run: _Run
) -> Iterator[tuple[int, tuple[U8, ...]]]:
    """(index of the file, its main face's crops [size, size, 3]) of files with a face.

    Without ``detector`` the files are crops themselves.
    """
    sizes = [crop.size for crop in package.crops]
    if detector is None:
        if len(sizes) != 1:
            raise _refuse("the model reads several crops of a face; leave out --aligned")
        for index, path in enumerate(files):
            run.progress("measuring", index, len(files))
            picture = _read(path, run)
            if picture is None:
                continue
            if picture.shape[0] != picture.shape[1]:
                run.skip(path, "NOT_SQUARE")
                continue
            how = cv2.INTER_AREA if len(picture) > sizes[0] else cv2.INTER_LINEAR
            yield index, (np.asarray(cv2.resize(picture, (sizes[0],) * 2, interpolation=how)),)
        return
    model = load(detector, run.options, batch_max=1, crops=package.crops)
    assert isinstance(model, Detector)
    model.warm_up()
    try:
        for index, path in enumerate(files):
            run.progress("measuring", index, len(files))
            picture = _read(path, run)
            if picture is None:
                continue
            found = _detections(model, picture)
            if not len(found.boxes):
                run.skip(path, Reason.NO_FACE.value)
                continue
            best = _main_face(found)
            yield index, tuple(crop[best].copy() for crop in found.crops)
    finally:
        model.close()


def _batches(
    faces: Iterator[tuple[int, tuple[U8, ...]]],
) -> Iterator[tuple[list[int], list[U8]]]:
    """Faces in batches: (indices of the files, one stack of crops for each spec)."""
    indices: list[int] = []
    crops: list[tuple[U8, ...]] = []
    for index, face in faces:
        indices.append(index)
        crops.append(face)
        if len(indices) == _BATCH:
            yield indices, [np.stack(stack) for stack in zip(*crops, strict=True)]
            indices, crops = [], []
    if indices:
        yield indices, [np.stack(stack) for stack in zip(*crops, strict=True)]


# -- recogniser -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Faces:
    """What a recogniser said about all faces.

    ``used`` [N]: rows of the files; ``vectors`` [N, D]; ``trust`` [N]; ``sample``: row of N ->
    its chip, for some of them.
    """

    used: list[int]
    vectors: F32
    trust: F64
    sample: dict[int, U8]


def _recognizer(
    package: Package, detector: Package | None, run: _Run
) -> tuple[Report, list[Plot | Bars]]:
    files = _files(run.data)
    names = _subjects(run.data, files)
    model = load(package, run.options, batch_max=_BATCH)
    assert isinstance(model, Recognizer)
    model.warm_up()
    try:
        faces = _embed(model, _faces(package, detector, files, run), len(files), run)
        genuine, impostor = _pairs(run.data, [files[i] for i in faces.used])
        if not len(genuine) or not len(impostor):
            raise _refuse("it needs two pictures of one person, and a second person")
        subject = np.array([names[i] for i in faces.used], np.int64)
        found, plots = _verification(package, faces, subject, genuine, impostor, run)
        if package.manifest.ood is None or package.manifest.ood.source == "none":
            found["ood"] = {"source": "none: every face is trusted; see the manual to calibrate it"}
        else:
            found["ood"], more = _trust(package, model, faces, genuine, impostor, run)
            plots += more
    finally:
        model.close()
    return found, plots


def _subjects(data: Path, files: Sequence[Path]) -> list[int]:
    """For each file a number for the person: of its folder, or its own outside of folders."""
    number: dict[Path, int] = {}
    out: list[int] = []
    for path in files:
        parts = path.relative_to(data).parts
        out.append(number.setdefault(data / parts[0], len(number)))
    return out


def _embed(
    model: Recognizer, faces: Iterator[tuple[int, tuple[U8, ...]]], files: int, run: _Run
) -> _Faces:
    chosen = np.random.default_rng(_SEED).permutation(files)[: 2 * run.settings.damaged]
    wanted = set(chosen.tolist())
    used: list[int] = []
    vectors: list[F32] = []
    trust: list[F32] = []
    sample: dict[int, U8] = {}
    for indices, (chips,) in _batches(faces):
        answer = model.begin(chips).finish()
        for row, index in enumerate(indices):
            if index in wanted and len(sample) < run.settings.damaged:
                sample[len(used) + row] = chips[row]
        used += indices
        # Copies: a runner may hand out views of buffers that it uses again.
        vectors.append(np.array(answer.vectors, np.float32))
        trust.append(np.array(answer.ood, np.float32))
    if len(used) < 2:
        raise _refuse("fewer than two pictures show a face")
    return _Faces(used, np.concatenate(vectors), np.concatenate(trust).astype(np.float64), sample)


def _verification(
    package: Package, faces: _Faces, subject: I64, genuine: I64, impostor: I64, run: _Run
) -> tuple[Report, list[Plot | Bars]]:
    same = measures.similarities(faces.vectors, genuine)
    other = measures.similarities(faces.vectors, impostor)
    match = package.thresholds.match
    assert match is not None
    accuracy = measures.accuracy_10_fold(same, other, seed=_SEED)
    at_far: Report = {}
    suggested: Report = {}
    for far in sorted(run.settings.fars or FARS, reverse=True):
        if far * len(other) < 1:
            at_far[f"{far:g}"] = {"threshold": None, "true_accept_rate": None, "interval": None}
            continue
        threshold = measures.threshold_at_far(other, far)
        at_far[f"{far:g}"] = {
            "threshold": threshold,
            "true_accept_rate": float((same >= threshold).mean()),
            "interval": list(
                measures.share_interval(same >= threshold, subject[genuine], seed=_SEED)
            ),
        }
        if far * len(other) >= 10 and far < 0.05:
            suggested = {"thresholds.match": round(threshold, 3), "for_false_accept_rate": far}
    eer_threshold, eer = measures.equal_error(same, other)
    accepted, passed = float((other >= match).mean()), float((same >= match).mean())
    found: Report = {
        "pictures": len(faces.used),
        "subjects": len(np.unique(subject)),
        "genuine_pairs": len(same),
        "impostor_pairs": len(other),
        "accuracy_10_fold": None if np.isnan(accuracy) else accuracy,
        "equal_error": {"threshold": eer_threshold, "rate": eer},
        "at_package_threshold": {
            "threshold": match,
            "false_accept_rate": accepted,
            "false_accept_interval": list(
                measures.share_interval(other >= match, subject[impostor], seed=_SEED)
            ),
            "true_accept_rate": passed,
            "true_accept_interval": list(
                measures.share_interval(same >= match, subject[genuine], seed=_SEED)
            ),
        },
        "at_false_accept_rate": at_far,
        "suggested": suggested,
    }
    mark = (f"match = {match:g}", accepted, passed)
    return found, _error_plots(same, other, "false accept rate", "true accept rate", mark)


def _trust(
    package: Package, model: Recognizer, faces: _Faces, genuine: I64, impostor: I64, run: _Run
) -> tuple[Report, list[Plot | Bars]]:
    """What the OOD score is worth: on the pictures as they are, and on damaged ones."""
    least = package.thresholds.ood
    assert least is not None
    trust = faces.trust
    shares = np.linspace(0, 0.5, 26)
    kept = np.random.default_rng(_SEED).permutation(len(impostor))[: max(len(genuine), 1000)]
    both = np.concatenate((genuine, impostor[kept]))
    same = np.arange(len(both)) < len(genuine)
    curve = measures.reject_curve(
        trust[both].min(1), measures.similarities(faces.vectors, both), same, shares
    )
    found: Report = {
        "threshold": least,
        "under_threshold": float((trust < least).mean()),
        "interval": list(measures.wilson(int((trust < least).sum()), len(trust))),
        "quantiles": {
            f"{q:g}": float(np.quantile(trust, q)) for q in (0.01, 0.02, 0.05, 0.25, 0.5, 0.75)
        },
        "suggested": _suggested_mapping(package, trust),
        "reject_curve": {"share": shares.tolist(), "error": curve.tolist()},
    }
    curves = [Curve("pictures as they are", shares, curve)]
    plots: list[Plot | Bars] = []
    if faces.sample:
        spoilt = _damaged(model, faces, run)
        clean = np.array([trust[row] for row in faces.sample])
        table = {
            kind: {
                "auroc": measures.auroc(clean, answer.ood),
                "under_threshold": float((answer.ood < least).mean()),
            }
            for kind, answer in spoilt.items()
        }
        found["damage"] = table
        found["damaged_faces"] = len(clean)
        found["damage_auroc_mean"] = float(np.mean([row["auroc"] for row in table.values()]))
        separation = {kind: row["auroc"] for kind, row in table.items()}
        plots.append(Bars("ood-damage", "AUROC of clean against damaged faces", separation))
        mixed = _mixed_quality(faces, spoilt, both, same, shares)
        if mixed is not None:
            found["reject_curve_half_damaged"] = {
                "share": shares.tolist(),
                "error": mixed.tolist(),
            }
            curves.append(Curve("one picture of half the pairs damaged", shares, mixed))
    rejected = "share of pairs rejected, least trusted first"
    plots.append(Plot("ood-reject", rejected, "verification error", curves))
    return found, plots


def _suggested_mapping(package: Package, trust: F64) -> Report:
    """A logistic mapping that gives the median face 0.9 and the worst 2 % less than 0.4.

    The raw value is won back from the score; where that saturates, nothing is suggested.
    """
    ood = package.manifest.ood
    assert ood is not None
    low = float(np.quantile(trust, 0.02))
    found: Report = {"thresholds.ood_with_the_mapping_as_it_is": low}
    inside = trust.clip(1e-6, 1 - 1e-6)
    if ood.mapping == "logistic" and float((inside == trust).mean()) > 0.95:
        raw = ood.center + ood.scale * np.log(inside / (1 - inside))
        median, worst = float(np.median(raw)), float(np.quantile(raw, 0.02))
        top, bottom = float(np.log(0.9 / 0.1)), float(np.log(0.4 / 0.6))
        if median > worst:
            scale = (median - worst) / (top - bottom)
            found["ood.center"] = median - top * scale
            found["ood.scale"] = scale
    return found


def _damaged(model: Recognizer, faces: _Faces, run: _Run) -> dict[str, Embeddings]:
    """The model's answers about the sample, spoilt in every way."""
    out: dict[str, Embeddings] = {}
    chips = list(faces.sample.values())
    for number, (kind, spoil) in enumerate(damage.KINDS.items()):
        run.progress("damaging", number, len(damage.KINDS))
        rng = np.random.default_rng(_SEED)
        answers = [
            model.begin(np.stack([spoil(chip, rng) for chip in chips[at : at + _BATCH]])).finish()
            for at in range(0, len(chips), _BATCH)
        ]
        out[kind] = Embeddings(
            np.concatenate([np.array(a.vectors) for a in answers]),
            np.concatenate([np.array(a.ood) for a in answers]),
        )
    return out


def _mixed_quality(
    faces: _Faces, spoilt: Mapping[str, Embeddings], both: I64, same: npt.NDArray[Any], shares: F64
) -> F64 | None:
    """The reject curve over pairs with a sampled face, which is damaged in half of them.

    Kinds come in turns; those that leave no face in the picture stay out. None where such
    pairs are too few to say anything.
    """
    rows = {row: at for at, row in enumerate(faces.sample)}
    kinds = [answer for kind, answer in spoilt.items() if kind != "scrambled"]
    similarity: list[float] = []
    trust: list[float] = []
    genuine: list[bool] = []
    for number, ((a, b), is_same) in enumerate(zip(both.tolist(), same.tolist(), strict=True)):
        if b not in rows:
            a, b = b, a
        if b not in rows:
            continue
        vector, score = faces.vectors[b], float(faces.trust[b])
        if len(genuine) % 2:
            answer = kinds[number % len(kinds)]
            vector, score = answer.vectors[rows[b]], float(answer.ood[rows[b]])
        similarity.append(float(faces.vectors[a] @ vector))
        trust.append(min(score, float(faces.trust[a])))
        genuine.append(is_same)
    if min(sum(genuine), len(genuine) - sum(genuine)) < 20:
        return None
    return measures.reject_curve(
        np.array(trust), np.array(similarity), np.array(genuine), shares
    )  # fmt: skip


def _pairs(data: Path, files: Sequence[Path]) -> tuple[I64, I64]:
    """Genuine and impostor pairs, as rows of ``files``."""
    listed = data / "pairs.csv"
    if not listed.is_file():
        if any(path.parent == data for path in files):
            raise _refuse("pictures lie outside of the subjects' folders; move them into one")
        return measures.pairs(np.array(_subjects(data, files), np.int64), seed=_SEED)
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
    return genuine, impostor


# -- liveness ---------------------------------------------------------------------------


def _liveness(
    package: Package, detector: Package | None, run: _Run
) -> tuple[Report, list[Plot | Bars]]:
    for name in ("live", "spoof"):
        if not (run.data / name).is_dir():
            raise _refuse(f"it needs the folders live and spoof; {name} is missing")
    files = _files(run.data / "live") + _files(run.data / "spoof")
    kind_of = [_kind(path.relative_to(run.data)) for path in files]
    shown = Counter(kind_of)
    model = load(package, run.options, batch_max=_BATCH)
    assert isinstance(model, LivenessModel)
    model.warm_up()
    kinds: dict[str, list[float]] = {}
    try:
        for indices, crops in _batches(_faces(package, detector, files, run)):
            answer = model.begin(crops).finish()
            for index, score in zip(indices, answer, strict=True):
                kinds.setdefault(kind_of[index], []).append(float(score))
    finally:
        model.close()
    live = np.array(kinds.pop("live", []), np.float64)
    if not len(live) or not kinds:
        raise _refuse("it needs at least one live face and one spoof")
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
    plots = _error_plots(live, spoof, "attacks accepted", "bona fide accepted", mark)
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
            suggested = {"thresholds.live": round(threshold, 3), "for_attack_accept_rate": rate}
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
    package: Package, reference: Package | None, run: _Run
) -> tuple[Report, list[Plot | Bars]]:
    if not (run.data / "boxes.json").is_file() and reference is not None:
        if reference.task is not Stage.DETECTOR:
            raise _refuse(f"the reference {reference.name} is no detector")
        truth: dict[Path, list[list[float]] | None] = dict.fromkeys(_files(run.data))
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
            picture = _read(path, run)
            if picture is None:
                continue
            count += 1
            marks: F32 | None = None
            if judge is not None:
                true = _detections(judge, picture)
                boxes, marks = true.boxes.astype(np.float64), true.landmarks
            else:
                boxes = np.array(rows, np.float64).reshape(-1, 4)
            finds.add(_detections(model, picture), boxes, marks, run.settings.min_face)
    finally:
        model.close()
        if judge is not None:
            judge.close()
    if not finds.side:
        raise _refuse(f"no readable picture has a face of {run.settings.min_face:g} pixels or more")
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
        found = json.loads(path.read_text())
        out = {
            str(name): [[float(v) for v in box] for box in boxes] for name, boxes in found.items()
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise _refuse(
            'it needs boxes.json: {"path": [[x, y, width, height], ...], ...}, in pixels; '
            "or name another detector to compare with: --reference"
        ) from error
    for name, boxes in out.items():
        inside = (data / name).resolve().is_relative_to(data.resolve())
        if not inside or Path(name).suffix.lower() not in _SUFFIXES or not (data / name).is_file():
            raise _refuse(f"boxes.json names {name}, which is no picture in the folder")
        if any(len(box) != 4 for box in boxes):
            raise _refuse(f"boxes.json: a box of {name} has not four numbers")
    return out


# -- plots ------------------------------------------------------------------------------


def _error_plots(
    genuine: F64, impostor: F64, false: str, true: str, mark: tuple[str, float, float]
) -> list[Plot | Bars]:
    """ROC and DET; what is under the smallest rate that can be seen is drawn at half of it."""
    _, accepted, rejected = measures.error_curve(genuine, impostor)
    least_x, least_y = 0.5 / len(impostor), 0.5 / len(genuine)
    x = np.maximum(accepted, least_x)
    label, mark_x, mark_y = mark
    mark_x = max(mark_x, least_x)
    return [
        Plot("roc", false, true, [Curve("", x, 1 - rejected)], "x", [(label, mark_x, mark_y)]),
        Plot(
            "det",
            false,
            f"1 - {true}",
            [Curve("", x, np.maximum(rejected, least_y))],
            "xy",
            [(label, mark_x, max(1 - mark_y, least_y))],
        ),
    ]


def _refuse(message: str) -> FacelaneError:
    return FacelaneError(Reason.ARGUMENT_INVALID, f"the evaluation cannot be made: {message}")
