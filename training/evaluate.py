"""Measure the starter models on what no training saw; the figures of the report."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from facelane_server.modeltools import measures
from facelane_server.worker.networks.architectures.liveness_net import LivenessNet
from facelane_server.worker.networks.architectures.mobilefacenet import MobileFaceNet
from facelane_server.worker.networks.architectures.yunet import YuNet
from training import corruptions, detector, imaging, liveness
from training.augment import mild
from training.data import LFW, load_photos, rightly_labelled
from training.ood import OOD_THRESHOLD, Material, Rts, fit_ood, score_all, sigmoid
from training.recognizer import teacher_input
from training.teacher import load_teacher

Report = dict[str, Any]
SCORES = (0.3, 0.4, 0.5, 0.55, 0.6, 0.62, 0.65, 0.7, 0.75, 0.8)
YUNET_SCORE = 0.7
"""From here YuNet's detections count as faces: the threshold of its package, as imported by
``facelane-server models import``. Figures that count its weaker ones too stand beside."""
LIVE_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.79, 0.8, 0.85, 0.9)


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
    """[N, 256] normalised, of uint8 BGR crops."""
    network = load_teacher(data / "models").to(pictures.device)
    parts = [network(teacher_input(p.float() / 255)) for p in pictures.split(64)]
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
    if "consistency" in clean:
        report["mild"] = mild_refusals(network, base, clean)
        reference = score_all(network, None, training.pictures[training.source == LFW])
        values = reference["consistency"].double().numpy()
        median, low = float(np.median(values)), float(np.quantile(values, 0.02))
        scale = (median - low) / 2.603
        # sigma(2.197) = 0.9 at the median, sigma(2.197 - 2.603) = 0.4 at the 2 % quantile.
        centre = median - 2.197 * scale
        mapped = 1 / (1 + np.exp(-(clean["consistency"].double().numpy() - centre) / scale))
        celeba = training.pictures[training.source != LFW][:2000]
        report["ood_calibration"] = {
            "center": centre,
            "scale": scale,
            "held_out_clean_below_0.4": float((mapped < 0.4).mean()),
            "damaged_below_0.4": {
                kind: float(
                    (1 / (1 + np.exp(-(r["consistency"].double().numpy() - centre) / scale)) < 0.4)
                    .mean()
                )
                for kind, r in damaged.items()
            },
        }  # fmt: skip
        if len(celeba):
            other = score_all(network, None, celeba)["consistency"].double().numpy()
            mapped = 1 / (1 + np.exp(-(other - centre) / scale))
            report["ood_calibration"]["celeba_clean_below_0.4"] = float((mapped < 0.4).mean())
    return report


def mild_refusals(network: MobileFaceNet, base: Tensor, clean: dict[str, Tensor]) -> Report:
    """What the OOD threshold does to faces with the slight faults of video, by the mapping that
    is shipped (fitted on these clean faces)."""
    torch.manual_seed(14)
    random.seed(14)
    slight = score_all(network, None, torch.cat([mild(part) for part in base.split(256)]))
    centre, scale = fit_ood(clean["consistency"].double().numpy())
    trust = sigmoid((slight["consistency"].double().numpy() - centre) / scale)
    refused = trust < OOD_THRESHOLD
    fine = (slight["embedding"] * clean["embedding"]).sum(1).numpy() >= 0.9
    return {
        "faces": len(refused),
        "refused": float(refused.mean()),
        "recognisable": int(fine.sum()),
        "refused_of_recognisable": float(refused[fine].mean()) if fine.any() else 0.0,
        "refused_of_others": float(refused[~fine].mean()) if (~fine).any() else 0.0,
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


@torch.inference_mode()
def liveness_report(
    network: LivenessNet, data: Path, device: torch.device, limit: int = 0
) -> Report:
    """Agreement with the pair on crops kept out, and rejection of simulated attacks."""
    torch.manual_seed(13)
    photos = load_photos(data, held_out=True, limit=limit)
    faces = torch.from_numpy(photos.main_face())
    good = faces[:, 14] >= 0.7
    tensor = torch.from_numpy(photos.pictures).permute(0, 3, 1, 2)[good].contiguous().to(device)
    boxes = faces[good][:, :4].to(device)
    pair = liveness.load_pair(data / "models").to(device)

    def both(scene: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
        mine = [
            network(liveness.student_input(s, b))
            for s, b in zip(scene.split(64), box.split(64), strict=True)
        ]
        theirs = [
            liveness.pair_scores(pair, s, b)
            for s, b in zip(scene.split(64), box.split(64), strict=True)
        ]
        return torch.cat(mine).cpu(), torch.cat(theirs).cpu()

    mine, theirs = both(tensor.float() / 255, boxes)
    report: Report = {
        "crops": len(mine),
        "pair_live_share": float((theirs > 0.5).float().mean()),
        "correlation": float(np.corrcoef(mine.numpy(), theirs.numpy())[0, 1]),
        # The pair calls most crops live, so that agreement alone says little.
        "auroc_of_the_pairs_verdict": measures.auroc(mine[theirs > 0.5], mine[theirs <= 0.5]),
        "agreement": {
            f"{t:g}": float(((mine > t) == (theirs > 0.5)).float().mean()) for t in LIVE_THRESHOLDS
        },
        "live_at": {f"{t:g}": float((mine >= t).float().mean()) for t in LIVE_THRESHOLDS},
        "attacks": {},
    }
    scenes = liveness.Scenes(tensor, boxes)
    scene, box = scenes.compose(min(384, len(tensor) * 2))
    live_mine, _ = both(scene, box)
    report["composed_live_median"] = float(live_mine.median())
    kinds = {
        "print": liveness.print_attack(scene, box),
        "replay": liveness.replay_attack(scene, box),
        "held_up": liveness.held_up_attack(scene, box),
        **liveness.held_out_attacks(scene, box),
    }
    for name, attack in kinds.items():
        mine, theirs = both(attack, box)
        report["attacks"][name] = {
            "rejected_at": {f"{t:g}": float((mine < t).float().mean()) for t in LIVE_THRESHOLDS},
            "pair_rejected": float((theirs < 0.5).float().mean()),
            "held_out": name not in ("print", "replay", "held_up"),
        }
    return report
