"""Measure the starter models on what no training saw; the figures of the report."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from facelane_server.modeltools import measures
from facelane_server.worker.networks.architectures.minifasnet import MiniFASNetPair
from facelane_server.worker.networks.architectures.mobilefacenet import MobileFaceNet
from facelane_server.worker.networks.architectures.yunet import YuNet
from training import cameras, corruptions, detector, imaging, liveness
from training.data import U8, load_photos, rightly_labelled
from training.ood import Material, Rts, score_all
from training.recognizer import student_input
from training.teacher import load_teacher

Report = dict[str, Any]
SCORES = (0.3, 0.4, 0.5, 0.55, 0.6, 0.62, 0.65, 0.66, 0.68, 0.7, 0.75, 0.8)
YUNET_SCORE = 0.7
"""From here YuNet's detections count as faces: the threshold of its package, as imported by
``facelane-server models import``. Figures that count its weaker ones too stand beside."""
LIVE_THRESHOLDS = tuple(round(0.01 * k, 2) for k in range(5, 96))


def verification(embeddings: Tensor, identity: np.ndarray) -> Report:
    """Verification figures of normalised embeddings [N, D]."""
    genuine, impostor = measures.pairs(identity, seed=7)
    vectors = embeddings.double().numpy()
    cosine = vectors @ vectors.T
    same, other = cosine[genuine[:, 0], genuine[:, 1]], cosine[impostor[:, 0], impostor[:, 1]]
    out: Report = {
        "identities": len(np.unique(identity)),
        "pictures": len(identity),
        "genuine_pairs": len(same),
        "impostor_pairs": len(other),
        "accuracy": measures.accuracy_10_fold(same, other, seed=8),
        "best_threshold": measures.best_threshold(same, other),
    }
    for name, far in (("1e-2", 1e-2), ("1e-3", 1e-3), ("1e-4", 1e-4), ("1e-5", 1e-5)):
        threshold = measures.threshold_at_far(other, far)
        out[f"tar_at_far_{name}"] = float((same >= threshold).mean())
        out[f"threshold_at_far_{name}"] = threshold
    return out


@torch.inference_mode()
def teacher_embeddings(data: Path, pictures: Tensor) -> Tensor:
    """[N, 512] normalised, of uint8 BGR crops."""
    network = load_teacher(data / "models").to(pictures.device)
    parts = [network(student_input(p.float() / 255))[0] for p in pictures.split(64)]
    return F.normalize(torch.cat(parts)).cpu()


def recognizer(
    network: MobileFaceNet,
    rts: Rts | None,
    data: Path,
    training: Material,
    held_out: Material,
    *,
    with_teacher: bool = True,
) -> Report:
    """Verification, OOD separation by kind of damage, reject curves, calibration."""
    torch.manual_seed(9)
    identity = held_out.identity.cpu().numpy()
    clean = score_all(network, rts, held_out.pictures)
    report: Report = {"verification": verification(clean["embedding"], identity)}
    right = rightly_labelled(data)
    if len(right) == len(identity) and not right.all():
        # Beside the figure of all pictures, never instead of it.
        report["verification_of_right_labels"] = verification(
            clean["embedding"][torch.from_numpy(right)], identity[right]
        )
    if with_teacher:
        vectors = teacher_embeddings(data, held_out.pictures)
        report["teacher_verification"] = verification(vectors, identity)
    report["open_set"] = open_set(clean["embedding"], identity, network, training)
    if "consistency" in clean:
        match = report["verification"]["threshold_at_far_1e-5"]
        report["trust"] = trust_curve(network, training, held_out, clean, match)
    if held_out.pictures.device.type == "cpu":
        # Minutes instead of an hour: people with several pictures, so that pairs remain.
        _, group, counts = np.unique(identity, return_inverse=True, return_counts=True)
        rows = np.flatnonzero(counts[group] > 1)[:CPU_DAMAGED]
        rows = rows if len(rows) else np.arange(len(identity))
        held_out = held_out.of(torch.from_numpy(rows))
        clean = {name: value[torch.from_numpy(rows)] for name, value in clean.items()}
        identity = identity[rows]
    report["damaged_pictures"] = len(identity)
    base = held_out.pictures.float() / 255
    damaged: dict[str, dict[str, Tensor]] = {}
    for name, spoil in (corruptions.KINDS | corruptions.HELD_OUT).items():
        parts = [spoil(part) for part in base.split(256)]
        damaged[name] = score_all(network, rts, torch.cat(parts))
    count = min(len(base), len(held_out.backgrounds))
    damaged["background"] = score_all(network, rts, held_out.backgrounds[:count])
    pattern = imaging.textures(min(400, len(base)), corruptions.SIZE, base)
    damaged["texture"] = score_all(network, rts, pattern)
    scores = [s for s in ("consistency", "rts", "norm") if s in clean]
    table: dict[str, dict[str, float]] = {
        kind: {s: measures.auroc(clean[s], rows[s]) for s in scores}
        for kind, rows in damaged.items()
    }
    tested = [k for k in table if k not in corruptions.HELD_OUT]
    report["ood_auroc"] = table
    report["ood_mean"] = {s: float(np.mean([table[k][s] for k in tested])) for s in scores}
    report["ood_mean_held_out_kinds"] = {
        s: float(np.mean([table[k][s] for k in corruptions.HELD_OUT])) for s in scores
    }
    report["ood_worst_gross"] = {
        s: min((table[k][s], k) for k in corruptions.GROSS) for s in scores
    }
    report["reject"] = reject(clean, damaged, identity, scores)
    return report


GALLERY = 1000
LEAD = 0.05
"""What the person must be nearer by than the nearest other one."""
CPU_PROBES, CPU_DAMAGED = 100, 200
"""So many pictures of those kept out are damaged where there is no GPU."""
SPLITS = 10


def _fillers(network: MobileFaceNet, training: Material) -> np.ndarray:
    """[<= GALLERY, D]: one picture each of people who were trained on, spread over all."""
    _, first = np.unique(training.identity.cpu().numpy(), return_index=True)
    picks = first[:: max(1, len(first) // GALLERY)][:GALLERY]
    return score_all(network, None, training.pictures[picks])["embedding"].double().numpy()


def open_set(
    vectors: Tensor, identity: np.ndarray, network: MobileFaceNet, training: Material
) -> Report:
    """FNIR by FPIR in the terms of NIST's FRTE 1:N: of the people kept out who have several
    pictures, half are enrolled with one, in ``SPLITS`` ways; all other kept-out people are
    strangers; people who were trained on fill the gallery. A stranger's false positive is a
    best similarity at or above the threshold; a mated probe is missed where its own is below
    it or not the best."""
    fill = _fillers(network, training)
    own = vectors.double().numpy()
    several = np.flatnonzero(np.bincount(np.unique(identity, return_inverse=True)[1]) > 1)
    group = np.unique(identity, return_inverse=True)[1]
    out: Report = {"gallery": GALLERY, "strangers": 0, "mated": 0, "fnir_at_fpir": {}}
    if len(several) < 2:
        return out
    rng = np.random.default_rng(15)
    strangers: list[np.ndarray] = []
    mated: list[np.ndarray] = []
    for _ in range(SPLITS):
        enrolled = rng.permutation(several)[: max(1, len(several) // 2)]
        templates = np.array([rng.choice(np.flatnonzero(group == g)) for g in enrolled])
        gallery = np.concatenate((own[templates], fill[: max(0, GALLERY - len(templates))]))
        inside = np.isin(group, enrolled)
        strangers.append((own[~inside] @ gallery.T).max(1))
        probes = np.flatnonzero(inside & ~np.isin(np.arange(len(group)), templates))
        cosines = own[probes] @ gallery.T
        at = np.array([int(np.flatnonzero(enrolled == group[p])[0]) for p in probes])
        right = cosines[np.arange(len(probes)), at]
        mated.append(np.where(right >= cosines.max(1), right, -1.0))
    no, yes = np.concatenate(strangers), np.concatenate(mated)
    out |= {"strangers": len(no), "mated": len(yes)}
    for fpir in (0.001, 0.003, 0.01, 0.03):
        threshold = measures.threshold_at_far(no, fpir)
        out["fnir_at_fpir"][f"{fpir:g}"] = {
            "threshold": threshold, "fnir": float((yes < threshold).mean()),
        }  # fmt: skip
    return out


def trust_curve(
    network: MobileFaceNet,
    training: Material,
    held_out: Material,
    clean: dict[str, Tensor],
    match: float,
) -> Report:
    """What the OOD score does to names, by every kind of damage and strength.

    Everybody kept out is enrolled with the first picture, people who were trained on beside
    them. ``cells``: for each kind and strength the logits of probes that are named rightly
    (the person near enough and nearer than all others), and of those named wrongly, with the
    person enrolled or taken out of the gallery.
    """
    torch.manual_seed(16)
    random.seed(16)
    group = np.unique(held_out.identity.cpu().numpy(), return_inverse=True)[1]
    _, first = np.unique(group, return_index=True)
    templates = clean["embedding"].double().numpy()[first]
    gallery = np.concatenate((templates, _fillers(network, training)))[: max(GALLERY, len(first))]
    probes = np.setdiff1d(np.arange(len(group)), first)
    probes = probes if len(probes) else first
    if held_out.pictures.device.type == "cpu":
        # Minutes instead of an hour.
        probes = np.random.default_rng(17).permutation(probes)[:CPU_PROBES]
    pictures = held_out.pictures[torch.from_numpy(probes).to(held_out.pictures.device)]
    base = pictures.float() / 255
    at = group[probes]

    def names(rows: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Named rightly, named wrongly (either way), the logit."""
        cosines = rows["embedding"].double().numpy() @ gallery.T
        every = np.arange(len(at))
        own = cosines[every, at].copy()
        cosines[every, at] = -1
        two = -np.sort(-cosines, axis=1)[:, :2]
        right = (own >= match) & (own - two[:, 0] >= LEAD)
        wrong = (two[:, 0] >= match) & (two[:, 0] - own >= LEAD)
        stranger = (two[:, 0] >= match) & (two[:, 0] - two[:, 1] >= LEAD)
        return right, wrong | stranger, rows["consistency"].double().numpy()

    cells: Report = {}
    logits: list[np.ndarray] = []
    rights: list[np.ndarray] = []
    for kind, spoil in cameras.KINDS.items():
        for strength in cameras.STRENGTHS:
            seen = torch.cat([spoil(part, strength) for part in base.split(256)])
            right, wrong, logit = names(score_all(network, None, (seen * 255).round() / 255))
            cells[f"{kind} {strength:g}"] = {
                "right": np.sort(logit[right]).round(2).tolist(),
                "wrong": np.sort(logit[wrong]).round(2).tolist(),
            }
            logits.append(logit)
            rights.append(right)
    right, wrong, logit = names(score_all(network, None, pictures))
    value, told = np.concatenate(logits), np.concatenate(rights)
    return {
        "match": match,
        "probes": len(at),
        "gallery": len(gallery),
        "median_clean": float(np.median(clean["consistency"].double().numpy())),
        "clean": {
            "right": np.sort(logit[right]).round(2).tolist(),
            "wrong": np.sort(logit[wrong]).round(2).tolist(),
        },
        "auroc_of_told": float(
            measures.auroc(torch.from_numpy(value[told]), torch.from_numpy(value[~told]))
        ),
        "cells": cells,
    }


def keep_rts(report: Report, recorded: Report) -> None:
    """Put the RTS figures of ``recorded`` into ``report``; both must be of the same trunk."""
    if "rts" in report["ood_mean"] or "rts" not in recorded.get("ood_mean", {}):
        return
    for name in ("accuracy", "tar_at_far_1e-3"):
        if abs(report["verification"][name] - recorded["verification"][name]) > 0.002:
            return
    for kind, row in report["ood_auroc"].items():
        row["rts"] = recorded["ood_auroc"][kind]["rts"]
    for name in ("ood_mean", "ood_mean_held_out_kinds", "ood_worst_gross", "reject"):
        report[name]["rts"] = recorded[name]["rts"]


def reject(
    clean: dict[str, Tensor],
    damaged: dict[str, dict[str, Tensor]],
    identity: np.ndarray,
    scores: list[str],
) -> Report:
    """Verification error over the share rejected, on pairs of mixed quality.

    One picture of each pair stays clean; half of the others are damaged, by every kind
    that keeps the picture's subject in it, in turns.
    """
    rng = np.random.default_rng(10)
    kinds = [k for k in damaged if k not in ("background", "texture")]
    genuine, impostor = measures.pairs(identity, seed=7)
    impostor = rng.permutation(impostor)[: len(genuine)]
    both = np.concatenate((genuine, impostor))
    same = np.arange(len(both)) < len(genuine)
    kind = rng.integers(0, 2 * len(kinds), len(both))
    vectors = {k: damaged[k]["embedding"].double().numpy() for k in kinds}
    plain = clean["embedding"].double().numpy()
    probe = np.stack(
        [
            vectors[kinds[k]][row] if k < len(kinds) else plain[row]
            for k, row in zip(kind, both[:, 1], strict=True)
        ]
    )
    similarity = (plain[both[:, 0]] * probe).sum(1)
    shares = np.linspace(0, 0.5, 26)
    out: Report = {"share": shares.tolist()}
    for score in scores:
        first = clean[score].double().numpy()[both[:, 0]]
        values = {k: damaged[k][score].double().numpy() for k in kinds}
        own = clean[score].double().numpy()
        second = np.array(
            [
                values[kinds[k]][row] if k < len(kinds) else own[row]
                for k, row in zip(kind, both[:, 1], strict=True)
            ]
        )
        curve = measures.reject_curve(np.minimum(first, second), similarity, same, shares)
        out[score] = curve.tolist()
    return out


@torch.inference_mode()
def detect_all(network: YuNet, pictures: Tensor, score: float) -> list[Tensor]:
    out: list[Tensor] = []
    for part in pictures.split(32):
        out += detector.merge_faces(network, part.float(), score)
    return out


def agreement(found: list[Tensor], truth: list[Tensor], smallest: float = 24.0) -> Report:
    """Recall, precision (IoU 0.5) and landmark error of ``found`` against ``truth`` [M, 15].

    Faces count from ``smallest`` pixels (the geometric mean of the sides). A found face that
    matches a smaller true one, or the reverse, counts neither way.
    """
    hits = missed = false = 0
    errors: list[float] = []
    for mine, theirs in zip(found, truth, strict=True):
        taken: set[int] = set()
        for face in theirs:
            overlaps = detector.iou(face[:4], mine[:, :4]) if len(mine) else torch.zeros(0)
            best = int(overlaps.argmax()) if len(overlaps) else -1
            matched = best >= 0 and float(overlaps[best]) >= 0.5 and best not in taken
            if matched:
                taken.add(best)
            if float((face[2] * face[3]).sqrt()) < smallest:
                continue
            if not matched:
                missed += 1
                continue
            hits += 1
            gap = (mine[best, 4:14] - face[4:14]).reshape(5, 2).norm(dim=1).mean()
            errors.append(float(gap / face[2]))
        for index, face in enumerate(mine):
            if index not in taken and float((face[2] * face[3]).sqrt()) >= smallest:
                false += 1
    return {
        "faces": hits + missed,
        "recall": hits / max(1, hits + missed),
        "precision": hits / max(1, hits + false),
        "landmark_error_of_width": float(np.mean(errors)) if errors else float("nan"),
    }


CLIP = "short_hamilton_clip.mp4"


def clip_report(network: YuNet, data: Path, clip: Path, device: torch.device) -> Report:
    """Agreement with YuNet over every frame of a clip at its own size, as a lane runs it."""
    teacher = detector.load_yunet(data / "models" / "yunet_n.pth").to(device)
    capture = cv2.VideoCapture(str(clip))
    found: list[Tensor] = []
    truth: list[Tensor] = []
    try:
        while True:
            more, frame = capture.read()
            if not more:
                break
            picture = torch.from_numpy(frame).permute(2, 0, 1)[None].to(device)
            truth += detect_all(teacher, picture, detector.SCORE)
            found += detect_all(network, picture, SCORES[0])
    finally:
        capture.release()
    return {"frames": len(truth), **_by_score(found, truth)}


def _by_score(found: list[Tensor], truth: list[Tensor]) -> Report:
    """Agreement at each threshold, with YuNet's detections and with its weaker ones too."""
    clear = [rows[rows[:, 14] >= YUNET_SCORE] for rows in truth]
    report: Report = {"by_score": {}, "by_score_of_weaker_too": {}}
    for score in SCORES:
        mine = [rows[rows[:, 14] >= score] for rows in found]
        report["by_score"][f"{score:g}"] = agreement(mine, clear)
        report["by_score_of_weaker_too"][f"{score:g}"] = agreement(mine, truth)
    return report


def detector_report(network: YuNet, data: Path, device: torch.device, limit: int = 0) -> Report:
    """Agreement with YuNet on photos of identities kept out, and false finds in textures."""
    torch.manual_seed(12)
    photos = load_photos(data, held_out=True, limit=limit)
    pictures = torch.from_numpy(photos.pictures).permute(0, 3, 1, 2).contiguous().to(device)
    teacher = detector.load_yunet(data / "models" / "yunet_n.pth").to(device)
    truth = detect_all(teacher, pictures, detector.SCORE)
    low = detect_all(network, pictures, SCORES[0])
    texture = imaging.textures(200, 320, pictures) * 255
    on_texture = detect_all(network, texture, 0.05)
    worst = [float(rows[:, 14].max()) if len(rows) else 0.0 for rows in on_texture]
    report: Report = {"texture_top_score": max(worst), **_by_score(low, truth)}
    for score in SCORES:
        finds = sum(value >= score for value in worst)
        report["by_score"][f"{score:g}"]["textures_with_faces"] = finds
    return report


LIVE_SIZES = ((16, 40), (40, 60), (60, 110), (110, 240))
"""Widths of faces (pixels) that liveness is told apart by."""
FACES_OF_PROOF = {"liveness_T1.jpg": "live", "liveness_F1.jpg": "spoof", "liveness_F2.jpg": "spoof"}


@torch.inference_mode()
def liveness_report(
    network: MiniFASNetPair, data: Path, device: torch.device, limit: int = 0
) -> Report:
    """Scores of live faces and of simulated attacks, on photos of identities kept out: as they
    are, filmed, at every size; the public pair beside. Quantiles, so that thresholds can be
    chosen from the report alone."""
    torch.manual_seed(13)
    random.seed(13)
    photos = load_photos(data, held_out=True, limit=limit)
    faces = torch.from_numpy(photos.main_face())
    good = faces[:, 14] >= 0.7
    tensor = torch.from_numpy(photos.pictures).permute(0, 3, 1, 2)[good].contiguous().to(device)
    boxes = faces[good][:, :4].to(device)
    pair = liveness.load_pair(data / "models").to(device)

    told = _Told({"this": network, "pair": pair})
    told.add("photos", tensor.float() / 255, boxes)
    scenes = liveness.Scenes(tensor, boxes)
    # A few at a time: two thousand scenes and what is made of them fill the memory of a host.
    count = min(2048, len(tensor) * 4)
    piece, pieces = min(PIECE, count), max(1, count // PIECE)
    for _ in range(pieces):
        scene, box = scenes.compose(piece)
        fits = (box[:, 2] >= 60) & (box[:, 2] < 240)
        told.add("turned 60-240", scene[fits], box[fits])
        told.add("turned, filmed 60-240", liveness.film(scene[fits]), box[fits])
    attacked: list[tuple[Tensor, Tensor]] = []
    for _ in range(pieces):
        scene, box = scenes.compose(piece, upright=True)
        for how in ("clean", "half_light", "quarter_light", "grey", "filmed"):
            pictures = _shown(scene, how)
            for low, high in LIVE_SIZES:
                fits = (box[:, 2] >= low) & (box[:, 2] < high)
                told.add(f"{how} {low}-{high}", pictures[fits], box[fits])
        fits = (box[:, 2] >= 60) & (box[:, 2] <= 240)
        attacked.append((scene[fits][: ATTACKED // pieces], box[fits][: ATTACKED // pieces]))
    report: Report = {"photos": told.taken("photos"), "live": told.rest(), "attacks": {}}
    known = ("print", "replay", "held_up")
    for scene, box in attacked:
        kinds = {
            "print": liveness.print_attack(scene, box),
            "replay": liveness.replay_attack(scene, box),
            "held_up": liveness.held_up_attack(scene, box),
            **liveness.held_out_attacks(scene, box),
        }
        for name, attack in kinds.items():
            told.add(name, attack, box)
            told.add(f"{name}, filmed", liveness.film(attack, 0.5), box)
    for name, row in told.rest().items():
        report["attacks"][name] = {"held_out": name.split(",")[0] not in known, **row}
    return report


PIECE, ATTACKED = 256, 384
"""Scenes that are made at once, at most; faces that attacks are made of."""


def _shown(scene: Tensor, how: str) -> Tensor:
    if how == "grey":
        return scene.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    if how == "filmed":
        return liveness.film(scene)
    return scene * {"clean": 1.0, "half_light": 0.5, "quarter_light": 0.25}[how]


class _Told:
    """What networks say of faces, by kind: which share scores how much."""

    def __init__(self, networks: dict[str, MiniFASNetPair]) -> None:
        self._networks = networks
        self._scores: dict[str, dict[str, list[Tensor]]] = {}

    def add(self, kind: str, scene: Tensor, box: Tensor) -> None:
        rows = self._scores.setdefault(kind, {name: [] for name in self._networks})
        for name, network in self._networks.items():
            for some, its in zip(scene.split(64), box.split(64), strict=True):
                live = liveness.classes(network, some, its)[..., liveness.LIVE_CLASS].mean(0)
                rows[name].append(live.double().cpu())

    def taken(self, kind: str) -> Report:
        """``kind``'s report, and it is forgotten."""
        values = {name: torch.cat(rows).numpy() for name, rows in self._scores.pop(kind).items()}
        shares = {
            name: {f"{t:g}": float((scores >= t).mean()) for t in LIVE_THRESHOLDS}
            for name, scores in values.items()
        }
        return {"faces": len(values["this"]), "at_least": shares}

    def rest(self) -> Report:
        kinds = [kind for kind, rows in self._scores.items() if sum(map(len, rows["this"]))]
        return {kind: self.taken(kind) for kind in kinds}


VIEW_WIDTHS = (60, 80, 100, 130, 160, 200)
VIEW_TURNS = (-20, -10, 0, 10, 20)


def _proof(yunet: YuNet, path: Path) -> tuple[U8, Tensor]:
    """An example picture, BGR, and the box of its first face [1, 4]."""
    picture = cv2.imread(str(path))
    if picture is None:
        raise FileNotFoundError(path)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    return np.asarray(picture, np.uint8), detector.merge_faces(yunet, x, 0.7)[0][:1, :4]


@torch.inference_mode()
def proof_views(
    network: MiniFASNetPair, data: Path, media: Path, thresholds: Sequence[float] = LIVE_THRESHOLDS
) -> Report:
    """The same pictures as a camera sees them from elsewhere: smaller and larger, turned. How
    many of the views score how much, and the highest and the lowest; the pair beside."""
    yunet = detector.load_yunet(data / "models" / "yunet_n.pth")
    pair = liveness.load_pair(data / "models")
    out: Report = {}
    for name in FACES_OF_PROOF:
        picture, found = _proof(yunet, media / name)
        box = found[0].tolist()
        middle = (box[0] + box[2] / 2, box[1] + box[3] / 2)
        told: dict[str, list[float]] = {"this": [], "pair": []}
        for width in VIEW_WIDTHS:
            for turn in VIEW_TURNS:
                matrix = cv2.getRotationMatrix2D(middle, turn, width / box[2])
                matrix[:, 2] += np.array([320, 230]) - middle
                seen = cv2.warpAffine(
                    picture, matrix, (640, 480),
                    flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE,
                )  # fmt: skip
                view = torch.from_numpy(seen).permute(2, 0, 1)[None].float()
                faces = detector.merge_faces(yunet, view, 0.7)[0]
                if not len(faces):
                    continue
                away = faces[:, :2] + faces[:, 2:4] / 2 - torch.tensor([320.0, 230.0])
                face = faces[away.abs().sum(1).argmin(), :4]
                for who, model in (("this", network), ("pair", pair)):
                    live = liveness.classes(model, view / 255, face[None])
                    told[who].append(float(live[..., liveness.LIVE_CLASS].mean()))
        out[name] = {
            who: {
                "views": len(scores),
                "highest": round(max(scores), 3),
                "lowest": round(min(scores), 3),
                "at_least": {f"{t:g}": _share_from(scores, t) for t in thresholds},
            }
            for who, scores in told.items()
        }
    return out


def _share_from(scores: Sequence[float], least: float) -> float:
    return round(float((np.array(scores) >= least).mean()), 4)


@torch.inference_mode()
def proof_scores(network: MiniFASNetPair, data: Path, media: Path) -> Report:
    """The three example pictures of the pair's project: score here, and the pair's."""
    yunet = detector.load_yunet(data / "models" / "yunet_n.pth")
    pair = liveness.load_pair(data / "models")
    out: Report = {}
    for name in FACES_OF_PROOF:
        picture, box = _proof(yunet, media / name)
        x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        out[name] = {
            who: float(liveness.classes(model, x / 255, box)[..., liveness.LIVE_CLASS].mean())
            for who, model in (("this", network.cpu()), ("pair", pair))
        }
    return out
