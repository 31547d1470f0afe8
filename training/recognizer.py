"""The recogniser: a MobileFaceNet distilled from the teacher on endless augmented pictures.

Teacher and student see the same picture. The student's embedding goes through a linear map
to the teacher's 256 dimensions, where their directions must agree, and so must the cosines
between all pictures of a batch. The map becomes part of what is shipped: lifted back to 512
by orthonormal columns, its cosines stay the same. Answers alone teach slowly: what the
teacher's bottlenecks give is a hint (after "FitNets", Romero et al., 2015) that fades out.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facelane_server.worker.networks.architectures.folding import fold
from facelane_server.worker.networks.architectures.mobilefacenet import MobileFaceNet
from training.augment import training_batch
from training.clock import (
    Average,
    Clock,
    cosine_rate,
    decay_groups,
    grown_state,
    half_state,
    save,
    set_rate,
)
from training.data import load_crops
from training.teacher import TEACHER_SIZE, IrModule, load_teacher

TEACHER_DIM = 256
STAGES = ((64, 4, 128, 192), (128, 6, 384, 384), (128, 2, 512, 512))
"""As many bottlenecks as the teacher has, on maps of the same sides, so that each can hint;
wider ones. A run may start from a narrower or shallower network."""
ATTENTION = 8
HINTS = (0, 4, 5, 8, 11, 12, 14)
"""The bottlenecks that hint, counted through all stages; the map after the last does too."""
HINTS_END = 0.8
"""The part of a training after which there are no hints."""
GENUINE_WEIGHT = 2.0


@dataclass(frozen=True)
class Options:
    batch: int = 512
    rate: float = 2.5e-3
    average: float = 0.999
    compile: bool = True
    save_every_s: float = 30.0
    limit: int = 0
    resume: Path | None = None
    resume_rate: float = 2e-3
    """Peak of a run that goes on from a smaller network."""
    refine_rate: float = 1.2e-3
    """Peak of a run that goes on from this very network."""
    hint: float = 2.0
    """Weight of the hints at the start; it falls to zero."""
    refine_hint: float = 0.5


class Student(nn.Module):
    """The trunk and its map to the teacher's space."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = MobileFaceNet(stages=STAGES, attention=ATTENTION, side=TEACHER_SIZE)
        self.map = nn.Linear(512, TEACHER_DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.with_maps(x)[0]

    def with_maps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The answer, and the maps that hints are about."""
        maps: list[Tensor] = []
        x = self.trunk.entry(x)
        for index, block in enumerate(b for stage in self.trunk.stages for b in stage):  # type: ignore[attr-defined]
            x = block(x)
            if index in HINTS:
                maps.append(x)
        maps.append(self.trunk.features(x))
        out: Tensor = self.map(self.trunk.head(maps[-1]))
        return out, maps


def hinting(teacher: IrModule, student: Student) -> tuple[str, ...]:
    """The teacher's maps that hint, by name; none where the networks are of other depths."""
    ends = teacher.block_ends
    if sum(len(stage) for stage in student.trunk.stages) != len(ends) - 1:  # type: ignore[arg-type]
        return ()
    return (*(ends[index] for index in HINTS), ends[-1])


class Hints(nn.Module):
    """How far the student's maps are from the teacher's, each seen through a learned map of
    channels; 1 is the variance of the teacher's own."""

    def __init__(self, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
        """Of one batch, which fixes the means and variances."""
        super().__init__()
        self.see = nn.ModuleList()
        for place, (student, teacher) in enumerate(zip(mine, theirs, strict=True)):
            self.see.append(nn.Conv2d(student.shape[1], teacher.shape[1], 1))
            values = teacher.float()
            self.register_buffer(f"centre{place}", values.mean((0, 2, 3), keepdim=True))
            spread = values.std((0, 2, 3), keepdim=True).clamp(min=1e-3)
            self.register_buffer(f"spread{place}", spread)

    def forward(self, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        total = mine[0].new_zeros((), dtype=torch.float32)
        for place, see in enumerate(self.see):
            centre, spread = getattr(self, f"centre{place}"), getattr(self, f"spread{place}")
            wanted = (theirs[place].float() - centre) / spread
            total = total + (see(mine[place]).float() - wanted).square().mean()
        return total / len(self.see)


@torch.no_grad()
def load_grown(student: Student, state: dict[str, Tensor]) -> bool:
    """Load the state of this network or of a smaller one; True when it has grown.

    The larger network starts with the answers of the smaller one (see ``grown_state``):
    residual blocks that the state lacks begin as identities, the scale of their last norm is
    zero.
    """
    mine = student.state_dict()
    grown = grown_state(student, state)
    missing, _ = student.load_state_dict(grown, strict=False)
    # Counts of batches mean nothing here, and half-precision checkpoints leave them out.
    lacking = {_block_of(n) for n in missing if not n.endswith("num_batches_tracked")}
    if "" in lacking or lacking & {_block_of(name) for name in state}:
        raise ValueError("the checkpoint is of another network; train from the start")
    for name in lacking:
        block = student.get_submodule(name)
        nn.init.zeros_(block.project.norm.weight)  # type: ignore[union-attr, arg-type]
    return bool(lacking) or any(mine[n].shape != v.shape for n, v in state.items())


def _block_of(name: str) -> str:
    """The bottleneck that a parameter belongs to; empty if none."""
    found = re.match(r"trunk\.stages\.\d+\.\d+(?=\.)", name)
    return found.group(0) if found else ""


def options_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of the MobileFaceNet, batch norms folded, whose state this is."""
    options: dict[str, Any] = {"stages": stages_of(state), "norm": False}
    gate = state.get("stages.0.0.gate.squeeze.weight")
    if gate is not None:
        options["attention"] = gate.shape[1] // gate.shape[0]
    side = 16 * state["head.depthwise.conv.weight"].shape[-1]
    return options if side == 112 else {**options, "side": side}


def stages_of(state: Mapping[str, Tensor]) -> list[list[int]]:
    """The ``stages`` option of the MobileFaceNet whose state this is."""
    rows: list[list[int]] = []
    for stage in range(3):
        blocks = {int(n.split(".")[2]) for n in state if n.startswith(f"stages.{stage}.")}
        first = state[f"stages.{stage}.0.project.conv.weight"].shape
        other = state[f"stages.{stage}.1.project.conv.weight"].shape
        rows.append([first[0], len(blocks) - 1, first[1], other[1]])
    return rows


def student_input(pictures: Tensor) -> Tensor:
    """BGR 0..1 -> RGB (x - 127.5) / 127.5, channels last."""
    return (pictures.flip(1) * 2 - 1).contiguous(memory_format=torch.channels_last)


def teacher_input(pictures: Tensor) -> Tensor:
    """BGR 0..1 [N, 3, 112, 112] -> BGR 0..255 [N, 3, 128, 128]."""
    size = (TEACHER_SIZE, TEACHER_SIZE)
    larger = F.interpolate(pictures, size=size, mode="bilinear", align_corners=False)
    return (larger * 255).contiguous(memory_format=torch.channels_last)


def loss_of(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and its direction part (1 - mean cosine).

    Row i and row i + N/2 show the same person; their cosines count once more.
    """
    mine, theirs = F.normalize(student.float()), F.normalize(teacher.float())
    direction = 1 - (mine * theirs).sum(1).mean()
    gap = (mine @ mine.T - theirs @ theirs.T).square()
    genuine = gap.diagonal(len(mine) // 2).mean()
    return direction + 20 * gap.mean() + GENUINE_WEIGHT * genuine, direction


class Pairs:
    """Draws pictures, and for each another one of the same person (itself, if the only one)."""

    def __init__(self, identity: Tensor) -> None:
        self._order = identity.argsort()
        _, group, counts = torch.unique(identity, return_inverse=True, return_counts=True)
        first = counts.cumsum(0) - counts
        place = torch.empty_like(self._order)
        place[self._order] = torch.arange(len(identity), device=identity.device)
        self._first, self._count = first[group], counts[group]
        self._own = place - self._first

    def draw(self, n: int) -> Tensor:
        """[n] picture numbers, n even; the second half are the partners of the first."""
        picks = torch.randint(len(self._order), (n // 2,), device=self._order.device)
        count = self._count[picks]
        step = (torch.rand(n // 2, device=picks.device) * (count - 1)).long() + 1
        partner = self._first[picks] + (self._own[picks] + step) % count
        return torch.cat((picks, self._order[partner]))


@torch.no_grad()
def lift(student: Student) -> MobileFaceNet:
    """The network to ship: batch norms folded, the map merged into the last layer.

    [512 -> 256] map, then 256 orthonormal columns up to 512: one 512 x 512 matrix.
    """
    trunk = deepcopy(student.trunk).float().eval().cpu()
    fold(trunk)
    weights = trunk.state_dict()
    generator = torch.Generator().manual_seed(512)
    square = torch.randn(512, TEACHER_DIM, generator=generator, dtype=torch.float64)
    columns, _ = torch.linalg.qr(square)
    whole = columns @ student.map.weight.detach().double().cpu()
    weights["head.linear.weight"] = (whole @ weights["head.linear.weight"].double()).float()
    weights["head.linear.bias"] = (whole @ weights["head.linear.bias"].double()).float()
    shipped = MobileFaceNet(**options_of(weights))
    shipped.load_state_dict(weights)
    return shipped.eval()


Taught = tuple[Tensor, list[Tensor]]
"""The teacher's answer, and its maps that hint."""


def _time_parts(
    draw: Callable[[], Tensor],
    teach: Callable[[Tensor], Taught],
    learn: Callable[[Tensor, Taught], object],
) -> None:
    """Print what a step's parts cost on the device: where the next second is to be saved."""
    rows: dict[str, float] = {}
    batch = draw()
    with torch.no_grad():
        taught = teach(batch)
    parts: dict[str, Callable[[], object]] = {
        "draw": draw, "teach": lambda: teach(batch), "learn": lambda: learn(batch, taught),
    }  # fmt: skip
    for name, part in parts.items():
        with torch.set_grad_enabled(name == "learn"):
            for rounds in (3, 10):
                torch.cuda.synchronize()
                begun = time.time()
                for _ in range(rounds):
                    part()
                torch.cuda.synchronize()
                rows[name] = round(1000 * (time.time() - begun) / rounds, 2)
    print("recognizer", json.dumps({"step_ms": rows}), flush=True)


def train(
    data: Path, out: Path, deadline: float, device: torch.device, options: Options, seed: int = 1
) -> Student:
    """Train until ``deadline`` (a ``time.time()``); the schedule starts after compiling."""
    torch.manual_seed(seed)
    random.seed(seed)
    crops = load_crops(data, held_out=False, limit=options.limit)
    pictures = torch.from_numpy(crops.pictures).permute(0, 3, 1, 2).contiguous().to(device)
    cuda = device.type == "cuda"
    teacher = load_teacher(data / "models").to(device)
    if cuda:
        teacher = teacher.half().to(memory_format=torch.channels_last)
    student = Student().to(device, memory_format=torch.channels_last)
    rate, hint_weight = options.rate, options.hint
    if options.resume is not None:
        parts = torch.load(options.resume, map_location=device, weights_only=True)
        grown = load_grown(student, parts["state"])
        rate = options.resume_rate if grown else options.refine_rate
        hint_weight = options.refine_hint
    average = Average(student, options.average)
    pairs = Pairs(torch.from_numpy(crops.identity).to(device))

    def draw(progress: float = 0.0) -> Tensor:
        if options.resume is not None:
            # It has seen the wild ones: from here on, more and more faces as they are served.
            progress = 0.4 + 0.6 * progress
        return training_batch(pictures[pairs.draw(options.batch)], progress)

    ends = hinting(teacher, student)

    def teach(x: Tensor) -> Taught:
        large = teacher_input(x).half() if cuda else teacher_input(x)
        return teacher.with_maps(large, ends)

    with torch.no_grad():
        batch = draw()
        maps = student.eval().with_maps(student_input(batch))[1]
        taught = teach(batch)
        hints = Hints(maps, taught[1]).to(device) if ends else None
        del maps
    if options.resume is not None:
        seen = parts.get("hints", {})
        shapes = {k: v.shape for k, v in seen.items()}
        if hints and shapes == {k: v.shape for k, v in hints.state_dict().items()}:
            hints.load_state_dict(seen)
        else:
            # Hints through maps yet to be learnt would spoil what it has.
            hint_weight = 0.0
    optimizer = torch.optim.AdamW(
        [*decay_groups(student, 0.02), *(decay_groups(hints, 0.0) if hints else [])],
        lr=rate, betas=(0.9, 0.98), fused=cuda,
    )  # fmt: skip

    def learn(x: Tensor, taught: Taught) -> tuple[Tensor, Tensor]:
        """The student's answer, and how far it is from the hints."""
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            answer, maps = student.with_maps(student_input(x))
            far = hints(maps, taught[1]) if hints else answer.new_zeros(())
        return answer, far

    teach_fast, learn_fast = teach, learn
    begun = time.time()
    if options.compile and cuda:
        try:
            teach_fast = torch.compile(teach, dynamic=False)
            learn_fast = torch.compile(learn, dynamic=False)
            student.train()
            with torch.no_grad():
                taught = teach_fast(batch)
            print("recognizer", json.dumps({"teacher_compiled_s": time.time() - begun}), flush=True)
            answer, far = learn_fast(batch, taught)
            (loss_of(answer, taught[0])[0] + far).backward()
            torch.cuda.synchronize()
        except Exception as error:
            print("recognizer", json.dumps({"compile_failed": repr(error)[:2000]}), flush=True)
            teach_fast, learn_fast = teach, learn
    compiled_s = time.time() - begun
    if cuda:

        def whole(x: Tensor, taught: Taught) -> None:
            answer, far = learn_fast(x, taught)
            (answer.float().sum() + far).backward()

        _time_parts(draw, teach_fast, whole)
    optimizer.zero_grad(set_to_none=True)
    print("recognizer", json.dumps({"compile_s": compiled_s}), flush=True)
    log: list[dict[str, float]] = []
    clock = Clock(time.time(), deadline - time.time())
    step, saved = 0, time.time()
    directions: list[Tensor] = []
    while not clock.over:
        set_rate(optimizer, cosine_rate(clock.progress, rate))
        with torch.no_grad():
            batch = draw(clock.progress)
            taught = teach_fast(batch)
        student.train()
        optimizer.zero_grad(set_to_none=True)
        answer, far = learn_fast(batch, taught)
        loss, direction = loss_of(answer, taught[0])
        fading = hint_weight * max(0.0, 1 - clock.progress / HINTS_END)
        (loss + fading * far).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        average.update(student)
        step += 1
        directions.append(direction.detach())
        if cuda and step % 4 == 0:
            # Keeps the host at most a few steps ahead, so that the deadline holds.
            directions[-min(4, len(directions))].item()
        if step % 100 == 0 or step == 1:
            value = float(torch.stack(directions).mean())
            directions.clear()
            elapsed = time.time() - clock.start
            row = {
                "step": step,
                "s": round(elapsed, 1),
                "one_minus_cos": value,
                "hint": far.item(),
                "pictures_per_s": round(step * options.batch / elapsed),
            }
            log.append(row)
            (out / "recognizer-log.json").write_text(json.dumps(log))
            if step % 500 == 0 or step <= 100:
                print("recognizer", json.dumps(row), flush=True)
        if time.time() - saved > options.save_every_s:
            save(out / "recognizer.pt", state=half_state(average.network), step=step)
            saved = time.time()
    save(
        out / "recognizer.pt", state=half_state(average.network), step=step, finished=True,
        compile_s=compiled_s, hints=half_state(hints) if hints else {},
    )  # fmt: skip
    return average.network
