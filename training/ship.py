"""Turn a finished run into the three packages that the server ships.

``python -m training.ship --run DIR --data DIR --out DIR`` writes a folder for each model:
weights as fp16 safetensors, ``model.toml`` with thresholds from the run's measurements,
``CARD.md`` with its figures. The OOD score's mapping is fitted on the identities that were kept
out; the card tells how one half of them fares with a mapping fitted on the other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from facelane_server.models.package import MANIFEST, Package, read_package
from facelane_server.modeltools import reference
from facelane_server.modeltools.importer import to_toml
from facelane_server.worker.networks.architectures.mobilefacenet import MobileFaceNet
from training import cards
from training.data import load_crops
from training.detector import NMS_IOU, widths_of
from training.liveness import NARROW
from training.ood import OOD_THRESHOLD, fit_ood, score_all, sigmoid
from training.recognizer import options_of

VERSIONS = {"detector": "1.3.0", "recognizer": "1.2.0", "liveness": "1.1.1"}
NAMES = tuple(VERSIONS)
LICENSE = "evaluation and research only, see CARD.md"
MATCH_FAR = 1e-4
"""Share of impostor pairs that the match threshold lets through."""
MARGIN = 0.05


def calibrate_ood(state: Mapping[str, Tensor], data: Path) -> dict[str, float]:
    """The mapping, fitted on clean faces of the identities kept out of training.

    ``clean_refused``: the share of them that falls under the threshold when the mapping is
    fitted on the other half of the identities; ``clean_refused_in_sample``: with the mapping
    that is shipped.
    """
    network = MobileFaceNet(**options_of(state), ood_head="trust")
    network.load_state_dict(dict(state))
    crops = load_crops(data, held_out=True)
    pictures = torch.from_numpy(crops.pictures).permute(0, 3, 1, 2)
    values = score_all(network.eval(), None, pictures, 64)["consistency"].double().numpy()

    def refused(fitted: npt.NDArray[np.bool_], tested: npt.NDArray[np.bool_]) -> float:
        centre, scale = fit_ood(values[fitted])
        return float((sigmoid((values[tested] - centre) / scale) < OOD_THRESHOLD).mean())

    # The identities' numbers follow their names' order: halves by parity mix the alphabet.
    even = crops.identity % 2 == 0
    everyone = np.ones_like(even)
    centre, scale = fit_ood(values)
    return {
        "center": centre,
        "scale": scale,
        "clean_refused": (refused(even, ~even) + refused(~even, even)) / 2,
        "clean_refused_in_sample": refused(everyone, everyone),
    }


def write_package(
    folder: Path, state: Mapping[str, Tensor], manifest: Mapping[str, Any], card: str
) -> Package:
    """One package with its reference answers; reading it back checks it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, weights)
    weights.chmod(0o644)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    whole = {
        "schema": 1,
        "name": folder.name,
        "version": VERSIONS[manifest["task"]],
        **manifest,
        "license": LICENSE,
        "card": "CARD.md",
        "weights": [{"file": weights.name, "sha256": digest}],
    }
    (folder / MANIFEST).write_text(to_toml(whole), encoding="utf-8")
    (folder / "CARD.md").write_text(card, encoding="utf-8")
    package = read_package(folder)
    reference.record(package)
    return package


def _state(path: Path) -> dict[str, Tensor]:
    parts = torch.load(path, map_location="cpu", weights_only=True)
    state: dict[str, Tensor] = parts["state"]
    kept = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    return {k: v.half() if v.is_floating_point() else v for k, v in kept.items()}


def _rounded(value: float, digits: int = 3) -> float:
    return round(value, digits)


def ship_detector(run: Path, out: Path, report: Mapping[str, Any], score: float) -> Package:
    state = _state(run / "detector.pt")
    manifest = {
        "task": "detector",
        "architecture": "yunet",
        "description": "starter detector: five landmarks, distilled from YuNet",
        "options": {"widths": widths_of(state)},
        "input": {"color": "bgr", "max_side": 640},
        "thresholds": {"score": score, "nms": NMS_IOU},
        "memory": {"weights_mib": 1.0, "activations_mib_per_item": 24.0},
        "provenance": _provenance(report),
    }
    parameters = sum(v.numel() for k, v in state.items() if ".running_" not in k)
    card = cards.detector(report, score, parameters)
    return write_package(out / "facelane-detector", state, manifest, card)


def ship_recognizer(
    run: Path, out: Path, report: Mapping[str, Any], data: Path
) -> tuple[Package, dict[str, float]]:
    state = _state(run / "recognizer-shipped.pt")
    ood = calibrate_ood(state, data)
    got = report["recognizer"]["verification"]
    match = _rounded(got[f"threshold_at_far_{MATCH_FAR:.0e}".replace("e-0", "e-")], 2)
    manifest = {
        "task": "recognizer",
        "architecture": "mobilefacenet",
        "description": "starter recogniser: MobileFaceNet with a trust head, distilled",
        "options": {**options_of(state), "ood_head": "trust"},
        "input": {
            "width": 112,
            "height": 112,
            "color": "rgb",
            "mean": [127.5] * 3,
            "std": [127.5] * 3,
            "crops": [{"kind": "aligned", "size": 112}],
        },
        "output": {"embedding_dim": 512},
        "thresholds": {"match": match, "margin": MARGIN, "ood": OOD_THRESHOLD},
        "ood": {"source": "head", "center": ood["center"], "scale": ood["scale"]},
        "memory": {"weights_mib": 5.0, "activations_mib_per_item": 6.0},
        "provenance": _provenance(report),
    }
    parameters = sum(value.numel() for value in state.values())
    card = cards.recognizer(report, match, MATCH_FAR, ood, parameters)
    return write_package(out / "facelane-recognizer", state, manifest, card), ood


def ship_liveness(
    run: Path, out: Path, report: Mapping[str, Any], live: float, spoof: float
) -> Package:
    manifest = {
        "task": "liveness",
        "architecture": "liveness-net",
        "description": "starter liveness: one small network, distilled, simulated attacks",
        "input": {
            "width": 80,
            "height": 80,
            "color": "bgr",
            "crops": [{"kind": "context", "scale": NARROW, "size": 80}],
        },
        "thresholds": {"live": live, "spoof": spoof},
        "memory": {"weights_mib": 2.0, "activations_mib_per_item": 2.0},
        "provenance": _provenance(report),
    }
    card = cards.liveness(report, live, spoof)
    return write_package(out / "facelane-liveness", _state(run / "liveness.pt"), manifest, card)


def _provenance(report: Mapping[str, Any]) -> dict[str, Any]:
    sources = report["about"]["data"]["sources"]
    return {
        "recipe": "training/",
        "data": [f"{name} sha256:{digest}" for name, digest in sorted(sources.items())],
        "device": report["about"]["device"],
        "torch": report["about"]["torch"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="output of training.run")
    parser.add_argument("--data", type=Path, required=True, help="folder of training.pack")
    parser.add_argument("--out", type=Path, required=True, help="where the packages go")
    parser.add_argument("--score", type=float, default=0.65, help="the detector's threshold")
    parser.add_argument("--live", type=float, default=0.79)
    parser.add_argument("--spoof", type=float, default=0.5)
    parser.add_argument("--only", nargs="*", choices=NAMES, default=list(NAMES))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run, out = arguments.run, arguments.out
    report = json.loads((run / "report.json").read_text())
    packages: list[Package] = []
    if "detector" in arguments.only:
        packages.append(ship_detector(run, out, report, arguments.score))
    if "recognizer" in arguments.only:
        recognizer, ood = ship_recognizer(run, out, report, arguments.data)
        packages.append(recognizer)
        print("ood", json.dumps(ood))
    if "liveness" in arguments.only:
        packages.append(ship_liveness(run, out, report, arguments.live, arguments.spoof))
    for package in packages:
        print(package.model_id, package.thresholds)


if __name__ == "__main__":
    main()
