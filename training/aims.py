r"""What the detector and liveness are meant to reach, measured: ``python -m training.aims``.

    W=server/facelane_server/models/starter/facelane-
    PYTHONPATH=server:. python -m training.aims --data .carry/training --media ../shared/media \
        --detector ${W}detector/weights.safetensors --liveness ${W}liveness/weights.safetensors

Faces are those of photos kept out of every training (``data.is_held_out``) and of clips that
nothing was trained on. The truth of a size, a profile, a clip is what YuNet finds there at its
package's threshold; that of a turned face is where it was found before it was turned.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from facelane_server.worker.networks import candidates
from facelane_server.worker.networks.architectures.minifasnet import LIVE_CLASS, MiniFASNetPair
from training import detector, evaluate, imaging, liveness
from training.clutter import KINDS, clutter
from training.data import U8, load_photos

Report = dict[str, Any]
SIDE = 640
"""Of the square scenes: the input of the shipped package."""
SIZES = ((12, 16), (16, 24), (24, 48), (48, 96), (96, 300), (300, 600))
"""Sizes of faces (pixels of the network's input, geometric mean of the sides)."""
SCORES = (0.5, 0.55, 0.6, 0.62, 0.65, 0.66, 0.68, 0.7, 0.75)
TURNS = (0, 30, 45, 60, 90)
LIGHTS = (0.5, 0.25)
CLUTTER = 300
TURNED, PROFILE = 0.25, 0.45
"""How far the nose lies beside the line from between the eyes to the mouth, in parts of that
line: from here a face is strongly turned, a profile."""
_SKIMAGE = (
    "brick.png cell.png chelsea.png chessboard_GRAY.png chessboard_RGB.png clock_motion.png"
    " coffee.png coins.png color.png grass.png gravel.png horse.png hubble_deep_field.jpg ihc.png"
    " logo.png microaneurysms.png moon.png motorcycle_left.png motorcycle_right.png page.png"
    " phantom.png retina.jpg rocket.jpg text.png"
)
SAMPLES = (
    ("skimage", "data", _SKIMAGE),
    ("matplotlib", "mpl-data/sample_data", "Minduka_Present_Blue_Pack.png logo2.png"),
)
"""Package, folder, and its pictures without people."""
CLIPS = (
    "short_hamilton_clip.mp4",
    "intel_classroom.gif",
    "intel_face-demographics-walking-and-pause.gif",
    "intel_face-demographics-walking.gif",
    "intel_head-pose-face-detection-female-and-male.gif",
)


def turn_of(rows: Tensor) -> Tensor:
    """[N]: how far each nose lies beside the line from between the eyes to the mouth, in its
    lengths."""
    five = rows[:, 4:14].reshape(-1, 5, 2)
    eyes, mouth = five[:, :2].mean(1), five[:, 3:].mean(1)
    down, aside = mouth - eyes, five[:, 2] - eyes
    across = aside[:, 0] * down[:, 1] - aside[:, 1] * down[:, 0]
    return across.abs() / down.square().sum(1).clamp(min=1e-3)


class Recall:
    """Counts, by kind, at which score true faces are found (IoU 0.5), and by how much their
    landmarks are off, in widths of the face."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}
        self._off: dict[str, list[float]] = {}

    def add(self, truth: Tensor, mine: Tensor, kinds: dict[str, Tensor]) -> None:
        """``truth`` [M, 14 or 15], ``mine`` [K, 15]; ``kinds``: masks [M]."""
        for index, face in enumerate(truth):
            near = mine[detector.iou(face[:4], mine[:, :4]) >= 0.5] if len(mine) else mine
            best = near[near[:, 14].argmax()] if len(near) else None
            gap = None if best is None else (best[4:14] - face[4:14]).reshape(5, 2).norm(dim=1)
            for kind, mask in kinds.items():
                if mask[index]:
                    self._found.setdefault(kind, []).append(
                        0.0 if best is None else float(best[14])
                    )
                    if gap is not None:
                        self._off.setdefault(kind, []).append(float(gap.mean() / face[2]))

    def report(self) -> Report:
        return {
            kind: {
                "faces": len(scores),
                "recall": {f"{at:g}": round(_share(scores, at), 4) for at in SCORES},
                "landmark_error_of_width": round(float(np.mean(self._off.get(kind, [np.nan]))), 4),
            }
            for kind, scores in sorted(self._found.items())
        }


def _share(scores: list[float], at: float) -> float:
    return float((np.array(scores) >= at).mean())


class Networks:
    """A detector, and YuNet at its package's threshold. ``gain``: what the score of a face that is
    turned to the side counts more, as where a package lets those pass at a lower one."""

    def __init__(self, data: Path, weights: Path, device: torch.device, gain: float = 0.0) -> None:
        self._device = device
        self._gain = gain
        self._teacher = detector.load_yunet(data / "models" / "yunet_n.pth").to(device)
        self._mine = detector.load_student(weights).to(device)

    def both(self, pictures: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The detector's finds from the lowest of ``SCORES`` and YuNet's in ``pictures``
        [N, 3, H, W], 0..255."""
        x = pictures.float().to(self._device)
        truth = detector.merge_faces(self._teacher, x, evaluate.YUNET_SCORE)
        mine = []
        for rows in detector.merge_faces(self._mine, x, SCORES[0] - self._gain):
            counted = rows.clone()
            counted[:, 14] += self._gain * (turn_of(rows) >= candidates.TURNED)
            mine.append(counted[counted[:, 14] >= SCORES[0]])
        return mine, truth


def crowd(photos: Tensor, size: float) -> Tensor:
    """[1, 3, SIDE, SIDE] 0..255: photos side by side, shrunk or enlarged so that their subjects
    have about ``size`` pixels (of a photo's 250 it has about 105)."""
    tile = round(250 * size / 105)
    across = -(-SIDE // tile)
    tiles = F.interpolate(
        photos[torch.randint(len(photos), (across * across,))].float(), size=(tile, tile),
        mode="bicubic", antialias=True, align_corners=False,
    ).clamp(0, 255).round()  # fmt: skip
    sheet = tiles.reshape(across, across, 3, tile, tile).permute(2, 0, 3, 1, 4)
    low = (across * tile - SIDE) // 2
    whole = sheet.reshape(3, across * tile, across * tile)
    return whole[None, :, low : low + SIDE, low : low + SIDE]


def by_size(networks: Networks, photos: Tensor, share: float) -> Report:
    """Recall of YuNet's finds, by size."""
    torch.manual_seed(21)
    count = Recall()
    for size, n in ((11, 3), (14, 5), (20, 6), (32, 12), (42, 16), (70, 40), (150, 40), (430, 100)):
        for k in range(max(1, round(n * share))):
            picture = crowd(photos, size * 1.3 ** (2 * k / n - 1))
            (mine,), (truth,) = networks.both(picture)
            whole = (truth[:, :2].amin(1) >= 0) & ((truth[:, :2] + truth[:, 2:4]).amax(1) <= SIDE)
            size_of = (truth[:, 2] * truth[:, 3]).sqrt()
            kinds = {f"{a}-{b}": whole & (size_of >= a) & (size_of < b) for a, b in SIZES}
            count.add(truth, mine, kinds)
    return count.report()


def turned(networks: Networks, photos: Tensor, faces: Tensor) -> tuple[Report, Report]:
    """Photos turned by degrees either way, and in half and quarter light: how many faces are
    found where they lie; the same of YuNet. ``faces`` [N, 15], of the photos as they are."""
    side = 320
    counts = Recall(), Recall()
    every = torch.ones(1, dtype=torch.bool)
    shades = [*((f"turned {d}", d, 1.0) for d in TURNS), *((f"light {v:g}", 0, v) for v in LIGHTS)]
    for rows in torch.arange(len(photos)).split(16):
        part, upright, n = photos[rows].float() / 255, faces[rows], len(rows)
        scale, flat = torch.full((n,), 250 / side), torch.zeros(n, 2)
        for kind, degrees, light in shades:
            angle = degrees * torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)
            grid = imaging.affine_grid(n, side, part, degrees=angle, scale=scale, shift=flat)
            scene = (imaging.sample(part, grid, "border") * light * 255).round()
            flip = torch.zeros(n, dtype=torch.bool)
            place = detector.placed(upright[:, None, :14], angle, scale, flat, flip, side)
            for count, found in zip(counts, networks.both(scene), strict=True):
                for true, mine in zip(place, found, strict=True):
                    count.add(true, mine, {kind: every})
    return counts[0].report(), counts[1].report()


def frames(path: Path) -> Iterator[Tensor]:
    """The pictures [1, 3, H, W] of a clip or an animated picture, at most ``SIDE`` wide."""
    capture = cv2.VideoCapture(str(path))
    try:
        while True:
            more, frame = capture.read()
            if not more:
                break
            yield torch.from_numpy(frame).permute(2, 0, 1)[None]
    finally:
        capture.release()


def clips(networks: Networks, media: Path, every: int) -> Report:
    """Recall of YuNet's finds by clip, and of those of profiles in all of them."""
    count = Recall()
    false: dict[str, list[float]] = {}
    for name in CLIPS:
        for number, picture in enumerate(frames(media / name)):
            if number % every:
                continue
            (mine,), (truth,) = networks.both(picture)
            turn = turn_of(truth)
            whole = torch.ones(len(truth), dtype=torch.bool)
            kinds = {name: whole, "clips' profiles": turn >= PROFILE}
            kinds["clips' turned"] = (turn >= TURNED) & (turn < PROFILE)
            count.add(truth, mine, kinds)
            for row in mine:
                if not len(truth) or float(detector.iou(row[:4], truth[:, :4]).max()) < 0.3:
                    false.setdefault(name, []).append(float(row[14]))
    report = count.report()
    for name, scores in false.items():
        finds = {f"{at:g}": int((np.array(scores) >= at).sum()) for at in SCORES}
        report[name]["finds_that_yunet_lacks"] = finds
    return report


def faceless(drawn: int) -> Iterator[tuple[str, U8]]:
    """``drawn`` pictures, of a seed of their own, and those of scikit-image and matplotlib that
    show nobody; BGR."""
    for side in (320, SIDE):
        for number, picture in enumerate(clutter(drawn // 2, side, 977 + side)):
            yield f"{list(KINDS)[number % len(KINDS)]} {side}", picture
    for package, folder, names in SAMPLES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for name in names.split():
            picture = cv2.imread(str(Path(spec.origin).parent / folder / name))
            if picture is not None:
                yield name, np.asarray(picture, np.uint8)


def false_finds(networks: Networks, drawn: int) -> Report:
    """How many finds on pictures without faces, and where; and how many of YuNet."""
    scores: list[float] = []
    out: Report = {"pictures": 0, "finds": {}, "finds_of_yunet": 0, "where": {}}
    for name, picture in faceless(drawn):
        shrink = SIDE / max(picture.shape)
        if shrink < 1:
            smaller = cv2.resize(picture, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
            picture = np.asarray(smaller, np.uint8)
        (mine,), (theirs,) = networks.both(torch.from_numpy(picture).permute(2, 0, 1)[None])
        out["pictures"] += 1
        out["finds_of_yunet"] += len(theirs)
        scores += mine[:, 14].tolist()
        if len(mine):
            out["where"].setdefault(name, []).extend(mine[:, 14].numpy().round(2).tolist())
    out["finds"] = {f"{at:g}": int((np.array(scores) >= at).sum()) for at in SCORES}
    return out


def verdicts(report: Report, live: float, spoof: float) -> Report:
    """What ``evaluate.liveness_report`` gave, at two thresholds in ISO/IEC 30107-3's terms, of
    faces that are judged (LIVE or SPOOF): of faces from 60 pixels as they are filmed, of darker
    ones, of attacks that no training saw."""

    def told(row: Report) -> tuple[float, float]:
        at = row["at_least"]["this"]
        return at[f"{live:g}"], 1 - at[f"{spoof:g}"]

    out: Report = {"live": {}, "attacks": {}}
    for name, row in {"photos": report["photos"], **report["live"]}.items():
        passed, refused = told(row)
        out["live"][name] = {
            "bpcer": round(refused / max(1e-9, passed + refused), 4),
            "undecided": round(1 - passed - refused, 4),
        }
    for name, row in report["attacks"].items():
        passed, refused = told(row)
        if row["held_out"]:
            out["attacks"][name] = {
                "apcer": round(passed / max(1e-9, passed + refused), 4),
                "undecided": round(1 - passed - refused, 4),
            }
    return out


@torch.inference_mode()
def filmed_people(
    network: MiniFASNetPair, data: Path, media: Path, live: float, spoof: float
) -> Report:
    """Verdicts on the living people of the clips, faces from 60 pixels."""
    teacher = detector.load_yunet(data / "models" / "yunet_n.pth")
    out: Report = {}
    for name in CLIPS:
        scores: list[float] = []
        for number, picture in enumerate(frames(media / name)):
            if number % 10 == 0:
                (faces,) = detector.merge_faces(teacher, picture.float(), evaluate.YUNET_SCORE)
                for box in faces[(faces[:, 2] * faces[:, 3]).sqrt() >= 60, :4]:
                    told = liveness.classes(network, picture.float() / 255, box[None])
                    scores.append(float(told[..., LIVE_CLASS].mean()))
        got = np.array(scores)
        out[name] = {
            "faces": len(got), "LIVE": round(_share(scores, live), 3),
            "SPOOF": round(1 - _share(scores, spoof), 3),
        }  # fmt: skip
    return out


def measure_detector(arguments: argparse.Namespace, weights: Path, device: torch.device) -> Report:
    photos = load_photos(arguments.data, held_out=True)
    faces = torch.from_numpy(photos.main_face())
    good = faces[:, 14] >= evaluate.YUNET_SCORE
    pictures = torch.from_numpy(photos.pictures).permute(0, 3, 1, 2)[good].contiguous()
    networks = Networks(arguments.data, weights, device, arguments.score - arguments.score_turned)
    every = max(1, round(1 / arguments.share))
    report = {"sizes": by_size(networks, pictures, arguments.share)}
    mine, theirs = turned(networks, pictures[::every], faces[good][::every])
    report |= {"turned": mine, "turned, YuNet": theirs}
    report["clips"] = clips(networks, arguments.media, every)
    report["faceless"] = false_finds(networks, round(CLUTTER * min(1.0, arguments.share)))
    return report


def measure_liveness(arguments: argparse.Namespace, weights: Path, device: torch.device) -> Report:
    """Of a run's ``liveness.pt``, the figures that lie beside it are taken."""
    network = liveness.load_student(weights)
    live, spoof = arguments.live, arguments.spoof
    measured = weights.with_name("liveness.json")
    if weights.name == "liveness.pt" and measured.exists():
        told = json.loads(measured.read_text())
    else:
        limit = 0 if arguments.share >= 1 else round(1000 * arguments.share)
        told = evaluate.liveness_report(network.to(device), arguments.data, device, limit)
    report: Report = {"thresholds": {"live": live, "spoof": spoof}, **verdicts(told, live, spoof)}
    report["proof"] = evaluate.proof_scores(network.cpu(), arguments.data, arguments.media)
    report["proof's views"] = evaluate.proof_views(network, arguments.data, arguments.media)
    report["clips"] = filmed_people(network, arguments.data, arguments.media, live, spoof)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of training.pack")
    parser.add_argument("--media", type=Path, required=True, help="folder with the clips")
    parser.add_argument("--detector", type=Path, help="its weights: .pt of a run, or .safetensors")
    parser.add_argument("--liveness", type=Path, help="the same")
    parser.add_argument("--score", type=float, default=0.65, help="the detector's thresholds")
    parser.add_argument("--score-turned", type=float, default=0.5)
    parser.add_argument("--live", type=float, default=0.75, help="liveness' thresholds")
    parser.add_argument("--spoof", type=float, default=0.35)
    parser.add_argument("--share", type=float, default=1.0, help="of the pictures, in a hurry")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report: Report = {}
    if arguments.detector:
        report["detector"] = measure_detector(arguments, arguments.detector, device)
    if arguments.liveness:
        report["liveness"] = measure_liveness(arguments, arguments.liveness, device)
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
