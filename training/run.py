"""Train, measure and collect everything within a wall-clock budget.

``python -m training.run --data DIR --out DIR [--budget-s 560] [--smoke]``

The three trainings run as processes of their own on one device. While the recogniser
compiles, detector and liveness have the device to themselves; they end early, and the
recogniser has it alone for the rest. Whatever a process reached when the budget ends is
kept: checkpoints are written while training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from facelane_server.worker.networks.architectures.mobilefacenet import MobileFaceNet
from training import data as packed
from training import detector, evaluate, liveness, ood, recognizer
from training.clock import Clock, CpuClock, half_state, save

STAGES = ("detector", "liveness", "recognizer")
PARTS = ("trunk", "trust")
"""Of the recogniser: all but its OOD head; a new OOD head for a finished one."""
ENDS = {"detector": 0.32, "liveness": 0.28, "recognizer": 0.775, "consistency": 0.86, "rts": 0.92}
"""When each training ends, as a share of the budget."""
RESUMED_ENDS = {
    "detector": 0.44, "liveness": 0.36, "recognizer": 0.80, "consistency": 0.86, "rts": 0.91,
}  # fmt: skip
"""The same for a run that goes on from a finished one, of about five minutes."""
ALONE_ENDS = {"recognizer": 0.875, "consistency": 0.92, "rts": 0.945}
"""The same for a run of the recogniser alone, which then has all of the device."""
TRUNK_ENDS = {"recognizer": 0.965, "detector": 0.25, "liveness": 0.2}
"""The same for its trunk, which another run goes on from; the others train while it compiles."""
TRUST_ENDS = {"trust": 0.18, "rts": 0.27, "detector": 0.95, "liveness": 0.9}
"""The same for a new OOD head of a finished recogniser, with the others for the rest."""
TRUST_ALONE_ENDS = {"trust": 0.7, "rts": 0.73}
"""The same without others; what is left is for the measuring."""
OWN_ENDS = {
    "detector": 0.95, "liveness": 0.4, "recognizer": 0.86, "trust": 0.9, "consistency": 0.92,
    "rts": 0.94,
}  # fmt: skip
"""The same where the recogniser has cards of its own; the recogniser's head is a run of its own."""
PACKAGED = "facelane-*/weights.safetensors"
OTHERS_ENDS = {"detector": 0.92, "liveness": 0.88}
"""The same where the recogniser is left alone."""
SMOKE_LIMIT = 32


def _device() -> torch.device:
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        return torch.device("cuda")
    return torch.device("cpu")


def _write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def _ends(arguments: argparse.Namespace) -> dict[str, float]:
    if set(arguments.only) <= set(OTHERS_ENDS):
        return OTHERS_ENDS
    if arguments.only == ["trust"]:
        return TRUST_ALONE_ENDS
    if arguments.cards > 1:
        return OWN_ENDS | ({"recognizer": 0.955} if "trunk" in arguments.only else {})
    if "trunk" in arguments.only:
        return TRUNK_ENDS
    if "trust" in arguments.only:
        return TRUST_ENDS
    if arguments.only == ["recognizer"]:
        return ALONE_ENDS
    return RESUMED_ENDS if arguments.resume else ENDS


def _resumed(arguments: argparse.Namespace, stage: str) -> Path | None:
    """What the stage goes on from, if the finished run has it, or if packages lie there: then
    their weights. Of a recogniser the form that is shipped will do."""
    names = [f"{stage}.pt", f"{stage}-shipped.pt"]
    names += [] if stage == "recognizer" else [f"facelane-{stage}/weights.safetensors"]
    paths = [arguments.resume / name for name in names] if arguments.resume else []
    return next((path for path in paths if path.exists()), None)


def _clock(arguments: argparse.Namespace, stage: str, start: float) -> Clock:
    if arguments.cpu_s:
        return CpuClock(arguments.cpu_s)
    return Clock(time.time(), start + arguments.budget_s * _ends(arguments)[stage] - time.time())


def run_detector(arguments: argparse.Namespace, start: float) -> None:
    device = _device()
    options = detector.Options(
        resume=_resumed(arguments, "detector"), refine=arguments.refine, between=arguments.between
    )
    options = replace(options, rate=options.rate * arguments.rate)
    if device.type == "cpu":
        options = replace(options, batch=24, hard=6, drawers=1)
    if arguments.smoke:
        options = replace(options, side=96, batch=4, limit=SMOKE_LIMIT, drawers=1)
    clock = _clock(arguments, "detector", start)
    detector.train(arguments.data, arguments.out, clock, device, options)
    measure_detector(arguments)


def measure_detector(arguments: argparse.Namespace) -> None:
    device = _device()
    network = detector.load_student(arguments.out / "detector.pt").to(device)
    report = evaluate.detector_report(
        network, arguments.data, device, SMOKE_LIMIT if arguments.smoke else 0
    )
    if arguments.media:
        clip = arguments.media / evaluate.CLIP
        report["clip"] = evaluate.clip_report(network, arguments.data, clip, device)
    _write(arguments.out / "detector.json", report)


def run_liveness(arguments: argparse.Namespace, start: float) -> None:
    device = _device()
    options = liveness.Options(
        resume=_resumed(arguments, "liveness"), keep=arguments.keep, stay=arguments.stay
    )
    if device.type == "cpu":
        options = replace(options, batch=60, rate=options.rate * arguments.rate)
    if arguments.smoke:
        options = replace(options, batch=10, limit=SMOKE_LIMIT)
    clock = _clock(arguments, "liveness", start)
    liveness.train(arguments.data, arguments.out, clock, device, options)
    measure_liveness(arguments)


def measure_liveness(arguments: argparse.Namespace) -> None:
    device = _device()
    network = liveness.load_student(arguments.out / "liveness.pt").to(device)
    limit = SMOKE_LIMIT if arguments.smoke else 0
    report = evaluate.liveness_report(network, arguments.data, device, limit)
    if arguments.media:
        report["proof"] = evaluate.proof_scores(network, arguments.data, arguments.media)
    _write(arguments.out / "liveness.json", report)


def _trained_trunk(
    arguments: argparse.Namespace, deadline: float, device: torch.device
) -> MobileFaceNet:
    """The recogniser without its OOD head, in the form that is shipped."""
    options = recognizer.Options(resume=_resumed(arguments, "recognizer"))
    if arguments.smoke:
        options = replace(options, batch=16, drawers=1, limit=SMOKE_LIMIT)
    student = recognizer.train(arguments.data, arguments.out, deadline, device, options)
    if int(os.environ.get("RANK", "0")):
        # The first rank does the rest.
        sys.exit(0)
    shipped = recognizer.lift(student)
    save(arguments.out / "recognizer-shipped.pt", state=half_state(shipped))
    return shipped


def run_recognizer(arguments: argparse.Namespace, start: float) -> None:
    device = _device()
    limit = SMOKE_LIMIT if arguments.smoke else 0
    ends = {name: start + share * arguments.budget_s for name, share in _ends(arguments).items()}
    # Read beside the compiler, which leaves most of the host idle.
    reader = ThreadPoolExecutor(1)
    materials = [
        reader.submit(ood.Material, arguments.data, device, limit, held_out=side)
        for side in (False, True)
    ]
    shipped = _trained_trunk(arguments, ends["recognizer"], device)
    material, held_out = (future.result() for future in materials)
    reader.shutdown()
    settings = ood.Options(limit=limit, batch=20 if arguments.smoke else 256)
    clock = Clock(time.time(), ends["consistency"] - time.time())
    whole = _with_trust_head(arguments, shipped, material, clock, settings)
    clock = Clock(time.time(), ends["rts"] - time.time())
    rts = ood.train_rts(shipped, material, arguments.out, clock, settings)
    # Measured in fp32 with the fp16 weights, as a CPU will serve them.
    network = whole.float().to(device, memory_format=torch.channels_last)
    report = evaluate.recognizer(network, rts, arguments.data, material, held_out)
    _write(arguments.out / "recognizer.json", report)


def run_trunk(arguments: argparse.Namespace, start: float) -> None:
    """The recogniser without its OOD head, for a run that another one goes on from."""
    device = _device()
    limit = SMOKE_LIMIT if arguments.smoke else 0
    deadline = start + _ends(arguments)["recognizer"] * arguments.budget_s
    shipped = _trained_trunk(arguments, deadline, device)
    crops = packed.load_crops(arguments.data, held_out=True, limit=limit)
    pictures = torch.from_numpy(crops.pictures).permute(0, 3, 1, 2).contiguous().to(device)
    network = ood.on_device(shipped, device).float()
    vectors = ood.score_all(network, None, pictures)["embedding"]
    report = evaluate.verification(vectors, crops.identity)
    print("trunk", json.dumps(report), flush=True)
    _write(arguments.out / "trunk.json", report)


def _with_trust_head(
    arguments: argparse.Namespace,
    trunk: MobileFaceNet,
    material: ood.Material,
    clock: Clock,
    settings: ood.Options,
) -> MobileFaceNet:
    """``trunk`` with a newly trained head, both rounded to fp16 as they are saved."""
    head = ood.train_consistency(trunk, material, arguments.out, clock, settings)
    state = half_state(trunk)
    whole = MobileFaceNet(**recognizer.options_of(state), ood_head="trust")
    whole.load_state_dict({**state, **{f"ood_head.{k}": v for k, v in half_state(head).items()}})
    save(arguments.out / "recognizer-shipped.pt", state=half_state(whole.eval()))
    return whole


def run_trust(arguments: argparse.Namespace, start: float) -> None:
    """A new OOD head for a finished recogniser, whose trunk stays as it is."""
    device = _device()
    limit = SMOKE_LIMIT if arguments.smoke else 0
    state = torch.load(
        arguments.resume / "recognizer-shipped.pt", map_location="cpu", weights_only=True
    )["state"]
    body = {k: v.float() for k, v in state.items() if not k.startswith("ood_head.")}
    trunk = MobileFaceNet(**recognizer.options_of(body))
    trunk.load_state_dict(body)
    material = ood.Material(arguments.data, device, limit, held_out=False)
    cuda = device.type == "cuda"
    settings = ood.Options(limit=limit) if cuda else ood.Options(limit=limit, batch=57)
    clock = _clock(arguments, "trust", start)
    _with_trust_head(arguments, trunk.eval(), material, clock, settings)
    rts = None
    if cuda:
        until = start + arguments.budget_s * _ends(arguments)["rts"]
        clock = Clock(time.time(), until - time.time())
        rts = ood.train_rts(trunk, material, arguments.out, clock, settings)
    measure_recognizer(arguments, rts)


def measure_recognizer(arguments: argparse.Namespace, rts: ood.Rts | None = None) -> None:
    """Measure the shipped form. Without the RTS head, which is not shipped and takes a GPU to
    train, its figures are those on record for the very same trunk."""
    device = _device()
    limit = SMOKE_LIMIT if arguments.smoke else 0
    parts = torch.load(arguments.out / "recognizer-shipped.pt", weights_only=True)
    state = {k: v.float() for k, v in parts["state"].items()}
    network = MobileFaceNet(**recognizer.options_of(state), ood_head="trust")
    network.load_state_dict(state)
    network = network.eval().to(device, memory_format=torch.channels_last)
    material, held_out = (
        ood.Material(arguments.data, device, limit, held_out=side) for side in (False, True)
    )
    report = evaluate.recognizer(network, rts, arguments.data, material, held_out)
    recorded = (arguments.resume or arguments.out) / "recognizer.json"
    if recorded.exists():
        evaluate.keep_rts(report, json.loads(recorded.read_text()))
    _write(arguments.out / "recognizer.json", report)


def _stage(arguments: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(arguments.only)))
    if arguments.measure:
        measure = {
            "detector": measure_detector,
            "liveness": measure_liveness,
            "recognizer": measure_recognizer,
        }
        measure[arguments.stage](arguments)
        return
    run = {
        "detector": run_detector,
        "liveness": run_liveness,
        "recognizer": run_recognizer,
        "trunk": run_trunk,
        "trust": run_trust,
    }
    run[arguments.stage](arguments, arguments.start)


def _places(stages: Sequence[str], cards: int, ranks: int) -> dict[str, list[dict[str, str]]]:
    """The environment of each process of each stage. Of four cards the recogniser gets two, and
    one to draw its pictures on (alone, one for each of the two); of fewer, all but the last,
    which the others share. Or ``ranks`` processes of it without a card."""
    out: dict[str, list[dict[str, str]]] = {}
    last = {"CUDA_VISIBLE_DEVICES": str(cards - 1)} if cards else {}
    trunk = next((s for s in stages if s in ("recognizer", "trunk")), "")
    for stage in stages:
        if stage != trunk:
            out[stage] = [last]
            continue
        own = min(2, max(1, cards - 1))
        count = ranks or own
        world = {
            "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517",
        }  # fmt: skip
        out[stage] = [
            {**world, "RANK": str(k), **_cards_of(k % own, own, cards, len(stages) == 1)}
            for k in range(count)
        ]
    return out


def _cards_of(first: int, own: int, cards: int, alone: bool) -> dict[str, str]:
    if not cards:
        return {}
    drawing = [own] if cards > own + 1 else []
    if alone and cards >= 2 * own and cards > 1:
        drawing = [own + first]
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, [first, *drawing]))}


def _seen_by(place: dict[str, str], visible: str) -> dict[str, str]:
    """``place``, whose cards are numbered as this process sees them, for a process that it starts:
    of all cards, or of those that ``visible`` lists."""
    if "CUDA_VISIBLE_DEVICES" not in place or not visible:
        return place
    cards = [name.strip() for name in visible.split(",")]
    own = [cards[int(k)] for k in place["CUDA_VISIBLE_DEVICES"].split(",")]
    return {**place, "CUDA_VISIBLE_DEVICES": ",".join(own)}


def summary(report: dict[str, Any]) -> str:
    """The report's main figures as markdown."""
    lines = ["# Starter models: what was measured", ""]
    about = report["about"]
    lines += [f"{about['device']}, torch {about['torch']}, {about['seconds']:.0f} s in all.", ""]
    got = report.get("recognizer", {})
    if got:
        lines += ["## Recogniser, identities never seen", ""]
        lines += ["| | accuracy | TAR@1e-2 | TAR@1e-3 | TAR@1e-4 |", "|---|---|---|---|---|"]
        for name in ("verification", "verification_of_right_labels", "teacher_verification"):
            if name in got:
                v = got[name]
                cells = [v["accuracy"], *(v[f"tar_at_far_1e-{k}"] for k in (2, 3, 4))]
                lines.append(f"| {name} | " + " | ".join(f"{c:.4f}" for c in cells) + " |")
        scores = list(got["ood_mean"])
        lines += ["", "## OOD, AUROC", "", "| damage | " + " | ".join(scores) + " |"]
        lines.append("|---" * (len(scores) + 1) + "|")
        rows = {**got["ood_auroc"], "mean": got["ood_mean"]}
        rows["mean of kinds kept out"] = got["ood_mean_held_out_kinds"]
        for kind, row in rows.items():
            lines.append(f"| {kind} | " + " | ".join(f"{row[s]:.4f}" for s in scores) + " |")
    for name in ("detector", "liveness"):
        if name in report:
            lines += ["", f"## {name.capitalize()}", "", "```json"]
            lines += [json.dumps(report[name], indent=1), "```"]
    return "\n".join(lines) + "\n"


def plots(report: dict[str, Any], out: Path) -> None:
    """Reject curve and OOD bars as PNG, where matplotlib is installed."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    got = report.get("recognizer")
    if not got:
        return
    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    for score in got["ood_mean"]:
        axes[0].plot(got["reject"]["share"], got["reject"][score], label=score)
    axes[0].set_xlabel("share rejected")
    axes[0].set_ylabel("verification error")
    axes[0].legend()
    kinds = list(got["ood_auroc"])
    scores = list(got["ood_mean"])
    for index, score in enumerate(scores):
        at = [k + 0.8 * index / len(scores) for k in range(len(kinds))]
        axes[1].barh(
            at, [got["ood_auroc"][k][score] for k in kinds], 0.8 / len(scores), label=score
        )
    axes[1].set_yticks(range(len(kinds)), kinds)
    axes[1].set_xlim(0.4, 1.0)
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(out / "ood.png", dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of training.pack")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=560.0)
    parser.add_argument(
        "--cpu-s", type=float, default=0.0,
        help="train detector and liveness for that much CPU time each, whatever the clock says",
    )  # fmt: skip
    parser.add_argument(
        "--rate", type=float, default=1.0,
        help="times the usual peak of the learning rate, for a run that goes on",
    )  # fmt: skip
    parser.add_argument(
        "--keep", type=float, default=liveness.Options.keep,
        help="liveness: the weight of the public pair's answers on good pictures",
    )  # fmt: skip
    parser.add_argument(
        "--stay", type=float, default=liveness.Options.stay,
        help="liveness: how strongly its weights are drawn to the public pair's",
    )  # fmt: skip
    parser.add_argument(
        "--refine", action="store_true",
        help="detector: go on from --resume, against what it takes for faces and is none",
    )  # fmt: skip
    parser.add_argument(
        "--between", type=float, default=detector.Options.between,
        help="with --refine: how far from what it went on from the kept detector lies",
    )  # fmt: skip
    parser.add_argument("--only", nargs="*", choices=[*STAGES, *PARTS], default=list(STAGES))
    parser.add_argument("--measure", action="store_true", help="train nothing, measure --out")
    parser.add_argument("--media", type=Path, help="folder with the clip to judge detectors by")
    parser.add_argument(
        "--resume",
        type=Path,
        help="a finished run to go on from, or the folder of the packages that are shipped; "
        "models that it lacks begin anew",
    )
    parser.add_argument(
        "--ranks", type=int, default=0,
        help="processes of the recogniser's training; 0: as many as cards are left for it",
    )  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to test the recipe")
    parser.add_argument("--stage", choices=[*STAGES, *PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--cards", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, default=time.time(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if (before := arguments.resume) and not any((*before.glob("*.pt"), *before.glob(PACKAGED))):
        parser.error(f"--resume {before}: no run's checkpoints (*.pt) nor packages are there")
    if len({"recognizer", *PARTS}.intersection(arguments.only)) > 1:
        parser.error("--only: recognizer, trunk and trust write the same files; take one")
    if "trust" in arguments.only and not arguments.resume:
        parser.error("--only trust needs --resume, a run with a finished recogniser")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.stage:
        _stage(arguments)
        return 0
    start: float = arguments.start
    recorded = packed.manifest(arguments.data)
    children: dict[str, subprocess.Popen[bytes]] = {}
    places = _places(arguments.only, torch.cuda.device_count(), arguments.ranks)
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": str((out / "inductor").resolve()),
        **os.environ,
        "PYTHONUNBUFFERED": "1",
    }
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    failed: list[str] = []
    with contextlib.ExitStack() as stack:
        for stage in arguments.only:
            command = [sys.executable, "-m", "training.run", "--stage", stage]
            command += ["--data", str(arguments.data), "--out", str(out)]
            command += ["--budget-s", str(arguments.budget_s), "--start", str(start)]
            command += ["--cards", str(torch.cuda.device_count())]
            command += ["--smoke"] if arguments.smoke else []
            command += ["--cpu-s", str(arguments.cpu_s), "--only", *arguments.only]
            command += ["--rate", str(arguments.rate)]
            command += ["--keep", str(arguments.keep), "--stay", str(arguments.stay)]
            command += ["--refine"] if arguments.refine else []
            command += ["--between", str(arguments.between)]
            command += ["--measure"] if arguments.measure else []
            command += ["--media", str(arguments.media)] if arguments.media else []
            command += ["--resume", str(arguments.resume)] if arguments.resume else []
            for rank, place in enumerate(places[stage]):
                name = stage if rank == 0 else f"{stage}-{rank}"
                children[name] = stack.enter_context(
                    subprocess.Popen(command, env={**environment, **_seen_by(place, visible)})
                )
        last = start + arguments.budget_s + (180 if arguments.smoke else 10)
        last += 1000 * arguments.cpu_s
        for stage, child in children.items():
            try:
                code = child.wait(max(1.0, last - time.time()))
            except subprocess.TimeoutExpired:
                child.kill()
                code = child.wait()
            if code:
                failed.append(stage)
    cuda = torch.cuda.is_available()
    report: dict[str, Any] = {
        "about": {
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
            "torch": torch.__version__,
            "seconds": time.time() - start,
            "failed": failed,
            "data": recorded,
        }
    }
    for stage in STAGES:
        path = out / f"{stage}.json"
        if path.exists():
            report[stage] = json.loads(path.read_text())
    _write(out / "report.json", report)
    (out / "report.md").write_text(summary(report))
    try:
        plots(report, out)
    except Exception:
        traceback.print_exc()
    with tarfile.open(out / "training.tar.gz", "w:gz") as archive:
        for path in sorted(out.iterdir()):
            # What goes back is kept small: the RTS head is measured here and shipped nowhere.
            kept = path.suffix in (".pt", ".json", ".md", ".png") and path.name != "rts.pt"
            if path.is_file() and kept:
                archive.add(path, path.name)
    print(json.dumps({"failed": failed, "seconds": time.time() - start}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
