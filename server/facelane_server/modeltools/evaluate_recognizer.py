"""What ``evaluate`` measures of a recogniser: verification at false accept rates, and what its
OOD score is worth, on the pictures as they are and on damaged ones."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from facelane_server.models.api import F32, U8, Embeddings, Recognizer
from facelane_server.models.package import Package
from facelane_server.models.promise import Promise
from facelane_server.modeltools import damage, impostors, measures, openset
from facelane_server.modeltools.report import Bars, Curve, Plot, Report
from facelane_server.modeltools.samples import (
    BATCH,
    F64,
    I64,
    SEED,
    Run,
    batches,
    error_plots,
    faces_of,
    picture_files,
    refuse,
)
from facelane_server.worker.networks.load import load

FARS: Final = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
PROMISE: Final = 0.001
"""The share of strangers named that the table of thresholds is for: the config's default."""
_PAIRS_ALONE: Final = (
    "the folders are not one for each person, and pairs.csv tells no more than pairs"
)
SEARCHED: Final = (1, 10, 100, 1_000, 10_000)
"""Sizes of galleries in that table."""


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


def evaluate_recognizer(
    package: Package, detector: Package | None, run: Run
) -> tuple[Report, list[Plot | Bars]]:
    files = picture_files(run.data, run)
    names = _subjects(run.data, files)
    # What is wrong with the lists is said before the measuring, which may take an hour.
    groups = _listed_groups(run.data)
    if (run.data / "pairs.csv").is_file() or any(path.parent == run.data for path in files):
        _pairs(run.data, files)
    model = load(package, run.options, batch_max=BATCH)
    assert isinstance(model, Recognizer)
    model.warm_up()
    try:
        faces = _embed(model, faces_of(package, detector, files, run), len(files), run)
        genuine, impostor = _pairs(run.data, [files[i] for i in faces.used])
        if not len(genuine) or not len(impostor):
            raise refuse("it needs two pictures of one person, and a second person")
        subject = np.array([names[i] for i in faces.used], np.int64)
        found, plots = _verification(package, faces, subject, genuine, impostor, run)
        spoilt = _damaged(model, faces, run) if faces.sample else {}
        used = [files[i] for i in faces.used]
        people = _folders_are_people(run.data, used, subject, genuine, impostor)
        if people:
            found |= _naming(package, faces, spoilt, subject, genuine, impostor)
            found |= _open_set(faces, subject)
            found |= _groups(
                groups, [path.relative_to(run.data).parts[0] for path in used], faces, subject
            )
        else:
            found |= {
                name: {"not_measured": _PAIRS_ALONE} for name in ("naming", "open_set", "groups")
            }
        if package.manifest.ood is None or package.manifest.ood.source == "none":
            found["ood"] = {"source": "none: every face is trusted; see the manual to calibrate it"}
        else:
            found["ood"], more = _trust(package, faces, spoilt, genuine, impostor)
            plots += more
            if people:
                found["ood"] |= _tellable_but_refused(package, faces, spoilt, subject)
    finally:
        model.close()
    return found, plots


def _folders_are_people(
    data: Path, files: Sequence[Path], subject: I64, genuine: I64, impostor: I64
) -> bool:
    """Whether every picture lies in the folder of the person whom it shows: beside pairs.csv they
    may lie anywhere, and pictures of one person would count as those of different ones."""
    torn = bool((subject[genuine[:, 0]] != subject[genuine[:, 1]]).any())
    mixed = bool((subject[impostor[:, 0]] == subject[impostor[:, 1]]).any())
    return not (torn or mixed or any(path.parent == data for path in files))


def _subjects(data: Path, files: Sequence[Path]) -> list[int]:
    """For each file a number for the person: of its folder, or its own outside of folders."""
    number: dict[Path, int] = {}
    out: list[int] = []
    for path in files:
        parts = path.relative_to(data).parts
        out.append(number.setdefault(data / parts[0], len(number)))
    return out


def _embed(
    model: Recognizer, faces: Iterator[tuple[int, tuple[U8, ...]]], files: int, run: Run
) -> _Faces:
    chosen = np.random.default_rng(SEED).permutation(files)[: 2 * run.settings.damaged]
    wanted = set(chosen.tolist())
    used: list[int] = []
    vectors: list[F32] = []
    trust: list[F32] = []
    sample: dict[int, U8] = {}
    for indices, (chips,) in batches(faces):
        answer = model.begin(chips).finish()
        for row, index in enumerate(indices):
            if index in wanted and len(sample) < run.settings.damaged:
                sample[len(used) + row] = chips[row]
        used += indices
        # Copies: a runner may hand out views of buffers that it uses again.
        vectors.append(np.array(answer.vectors, np.float32))
        trust.append(np.array(answer.ood, np.float32))
    if len(used) < 2:
        raise refuse("fewer than two pictures show a face")
    return _Faces(used, np.concatenate(vectors), np.concatenate(trust).astype(np.float64), sample)


def _verification(
    package: Package, faces: _Faces, subject: I64, genuine: I64, impostor: I64, run: Run
) -> tuple[Report, list[Plot | Bars]]:
    same = measures.similarities(faces.vectors, genuine)
    other = measures.similarities(faces.vectors, impostor)
    match = package.thresholds.match
    assert match is not None
    accuracy = measures.accuracy_10_fold(same, other, seed=SEED)
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
                measures.share_interval(same >= threshold, subject[genuine], seed=SEED)
            ),
        }
        if far * len(other) >= 10 and far < 0.05:
            suggested = {
                "thresholds.match": measures.rounded_up(threshold),
                "for_false_accept_rate": far,
            }
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
                measures.share_interval(other >= match, subject[impostor], seed=SEED)
            ),
            "true_accept_rate": passed,
            "true_accept_interval": list(
                measures.share_interval(same >= match, subject[genuine], seed=SEED)
            ),
        },
        "at_false_accept_rate": at_far,
        "suggested": suggested,
    }
    mark = (f"match = {match:g}", accepted, passed)
    return found, error_plots(same, other, "false accept rate", "true accept rate", mark)


def _naming(
    package: Package,
    faces: _Faces,
    spoilt: Mapping[str, Embeddings],
    subject: I64,
    genuine: I64,
    impostor: I64,
) -> Report:
    """How similar different people are, and what follows from it for ``PROMISE``.

    Damaged looks take part, so that bad looks are measured too; pairs are those of all people.
    """
    least = package.thresholds.ood
    assert least is not None
    # What leaves no face in the picture is no look at anybody.
    bad = [answer for kind, answer in spoilt.items() if kind != "scrambled"]
    rows_of_bad = np.array(list(faces.sample), np.int64)
    good = faces.trust >= least
    try:
        rows = impostors.measure(
            np.concatenate([faces.vectors, *(answer.vectors for answer in bad)]),
            np.concatenate([faces.trust, *(answer.ood for answer in bad)]).astype(np.float64),
            np.concatenate([subject, *(subject[rows_of_bad] for _ in bad)]),
            faces.vectors[good],
            subject[good],
            least,
        )
    except impostors.TooFewError as error:
        return {"naming": {"not_measured": str(error)}}
    promise = Promise(PROMISE, rows)
    same = measures.similarities(faces.vectors, genuine)
    other = measures.similarities(faces.vectors, impostor)
    table: Report = {}
    for searched in SEARCHED:
        needed = np.array([promise.match(score, searched) for score in faces.trust])
        needed[~good] = np.inf
        named = same >= needed[genuine[:, 0]]
        wrong = other >= needed[impostor[:, 0]]
        low, high = measures.share_interval(wrong, subject[impostor], seed=SEED)
        table[f"{searched}"] = {
            "threshold": promise.match(1.0, searched),
            "of_the_worst_look": promise.match(least, searched),
            "strangers_named": min(1.0, float(wrong.mean()) * searched),
            "strangers_interval": [min(1.0, low * searched), min(1.0, high * searched)],
            "enrolled_over_it": float(named.mean()),
            "enrolled_interval": list(measures.share_interval(named, subject[genuine], seed=SEED)),
        }
    return {
        "naming": table,
        "impostors": {f"{row.ood:g}": msgspec.to_builtins(row) for row in rows},
    }


def _open_set(faces: _Faces, subject: I64) -> Report:
    """FNIR at FPIR, of as large galleries as there are people for."""
    table: Report = {}
    for enrolled in openset.GALLERIES:
        for templates in openset.TEMPLATES:
            rates = openset.identification(faces.vectors, subject, enrolled, templates, SEED)
            if rates is None:
                continue
            row: Report = {"mated": rates.mated, "non_mated": rates.non_mated}
            row["fillers"] = enrolled - rates.mated // openset.SPLITS
            for fpir, found in rates.fnir.items():
                row[f"threshold_at_fpir_{fpir:g}"] = found[0] if found else None
                row[f"fnir_at_fpir_{fpir:g}"] = found[1] if found else None
            table[f"{enrolled} people, {templates} of each"] = row
    least = min(openset.GALLERIES)
    few = f"needs {least + openset.LEAST_MATED} people, {least} of whom have two pictures or more"
    return {"open_set": table or {"not_measured": few}}


def _listed_groups(data: Path) -> dict[str, str] | None:
    """The group of each folder's person, of ``groups.csv`` (columns subject, group)."""
    listed = data / "groups.csv"
    if not listed.is_file():
        return None
    groups: dict[str, str] = {}
    for number, row in _table_of(listed):
        try:
            groups[row["subject"].strip()] = row["group"].strip()
        except (KeyError, AttributeError) as error:
            raise refuse(
                f"groups.csv, line {number}: needs the columns subject (the name of a folder) "
                "and group"
            ) from error
    return groups


def _groups(
    groups: Mapping[str, str] | None, folders: Sequence[str], faces: _Faces, subject: I64
) -> Report:
    """False accept rates within groups. ``folders`` [N]: the name of each picture's."""
    if groups is None:
        return {"groups": {"not_measured": "there is no groups.csv (columns subject, group)"}}
    label = [groups.get(name, "") for name in folders]
    table: Report = {}
    for group in openset.within_groups(faces.vectors, subject, label, FARS, SEED):
        table[group.name] = {"people": group.people, "pairs": group.pairs} | {
            f"far_where_overall_{far:g}": rate for far, rate in group.far.items()
        }
    few = f"no group in groups.csv has {openset.LEAST_GROUP} people"
    return {"groups": table or {"not_measured": few}}


def _tellable_but_refused(
    package: Package, faces: _Faces, spoilt: Mapping[str, Embeddings], subject: I64
) -> Report:
    """Of the faces that would be named rightly, how many the OOD score refuses; of those that it
    lets pass, how many would be named wrongly. By kind of damage, and of clean ones."""
    least, match = package.thresholds.ood, package.thresholds.match
    assert least is not None
    assert match is not None
    rows = np.array(list(faces.sample), np.int64)
    clean = Embeddings(faces.vectors[rows], faces.trust[rows].astype(np.float32))
    table: Report = {}
    for kind, answer in {"clean": clean, **spoilt}.items() if len(rows) else ():
        own, other = openset.leave_one_out(answer.vectors, rows, faces.vectors, subject)
        told = openset.tellable(own, other, match)[own > -np.inf]
        wrong = ((other >= match) & (other > own))[own > -np.inf]
        passed = (answer.ood >= least)[own > -np.inf]
        if not len(told):
            return {}
        table[kind] = {
            "tellable": float(told.mean()),
            "tellable_but_refused": float((told & ~passed).sum() / max(1, told.sum())),
            "wrongly_named": float((wrong & passed).mean()),
        }
    return {"tellable": table}


def _trust(
    package: Package,
    faces: _Faces,
    spoilt: Mapping[str, Embeddings],
    genuine: I64,
    impostor: I64,
) -> tuple[Report, list[Plot | Bars]]:
    """What the OOD score is worth: on the pictures as they are, and on damaged ones."""
    least = package.thresholds.ood
    assert least is not None
    trust = faces.trust
    shares = np.linspace(0, 0.5, 26)
    kept = np.random.default_rng(SEED).permutation(len(impostor))[: max(len(genuine), 1000)]
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


def _damaged(model: Recognizer, faces: _Faces, run: Run) -> dict[str, Embeddings]:
    """The model's answers about the sample, spoilt in every way."""
    out: dict[str, Embeddings] = {}
    chips = list(faces.sample.values())
    for number, (kind, spoil) in enumerate(damage.KINDS.items()):
        run.progress("damaging", number, len(damage.KINDS))
        rng = np.random.default_rng(SEED)
        answers = [
            model.begin(np.stack([spoil(chip, rng) for chip in chips[at : at + BATCH]])).finish()
            for at in range(0, len(chips), BATCH)
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


def _table_of(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row by the names of the first line) of a CSV file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            for row in reader:
                yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise refuse(f"{path.name} is not UTF-8; save it as CSV in UTF-8") from error
    except (csv.Error, OSError) as error:
        raise refuse(f"{path.name} cannot be read: {error}") from error


def _pairs(data: Path, files: Sequence[Path]) -> tuple[I64, I64]:
    """Genuine and impostor pairs, as rows of ``files``."""
    listed = data / "pairs.csv"
    if not listed.is_file():
        if any(path.parent == data for path in files):
            raise refuse("pictures lie outside of the subjects' folders; move them into one")
        return measures.pairs(np.array(_subjects(data, files), np.int64), seed=SEED)
    row_of = {path.resolve(): row for row, path in enumerate(files)}
    sides: dict[str, list[tuple[int, int]]] = {"0": [], "1": []}
    for number, row in _table_of(listed):
        try:
            ends = [(data / row[key].strip()).resolve() for key in ("first", "second")]
            side = sides[row["same"].strip()]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise refuse(
                f"pairs.csv, line {number}: needs the columns first, second and same (0 or 1)"
            ) from error
        absent = next((end for end in ends if not end.is_file()), None)
        if absent is not None:
            raise refuse(f"pairs.csv, line {number}: there is no picture {absent}")
        # A picture without a face, or that is none, is listed in left_out.csv.
        if all(end in row_of for end in ends):
            side.append((row_of[ends[0]], row_of[ends[1]]))
    genuine, impostor = (np.array(sides[key], np.int64).reshape(-1, 2) for key in ("1", "0"))
    return genuine, impostor
