"""The recogniser: a MobileFaceNet distilled from a larger world's one on endless pictures.

The teacher sees good pictures: varied, mixed, warped. The student sees the same ones and, beside
them, what cameras make of a third of them (``cameras.py``): there it is to give the answer of the
good picture. Directions must agree, and so must the cosines between all pictures of a batch.
Answers alone teach slowly: the maps of the teacher's bottlenecks, which have as many channels,
are a hint (after "FitNets", Romero et al., 2015) that fades out. Late in a training a margin is
asked for between each picture's other one and the nearest strangers, mined from the last
thousands, so that good and spoilt pictures of a person keep together.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from facelane_server.worker.networks.architectures.folding import Foldable, fold
from facelane_server.worker.networks.architectures.mobilefacenet import MobileFaceNet
from training.augment import mixed_faces, pure_faces
from training.cameras import camera
from training.clock import (
    Average,
    Clock,
    cosine_rate,
    decay_groups,
    half_state,
    save,
    set_rate,
)
from training.data import load_crops
from training.ranks import Ranks
from training.teacher import load_teacher

STEM, NECK = 64, 64
STAGES = ((128, 4, 128, 192), (256, 6, 256, 320), (256, 2, 512, 512))
"""As many bottlenecks as the teacher has, of as many channels, so that each can hint."""
ATTENTION = 8
HINTS_END = 0.8
"""The part of a training after which there are no hints."""
GENUINE_WEIGHT = 2.0
CAMERA_WEIGHT = 0.7
MARGIN, MARGIN_WEIGHT, SOFTNESS, NEAREST = 0.25, 0.2, 0.1, 8
MEMORY = 16_384
"""So many of the latest good pictures' answers are kept to find the nearest strangers in."""


@dataclass(frozen=True)
class Options:
    batch: int = 384
    """Pictures that the teacher sees in a step; the student sees half as many more."""
    rate: float = 2.5e-3
    average: float = 0.999
    compile: bool = True
    save_every_s: float = 30.0
    limit: int = 0
    resume: Path | None = None
    refine_rate: float = 2e-3
    """Peak of a run that goes on from a finished one."""
    hint: float = 2.0
    """Weight of the hints at the start; it falls to zero."""
    refine_hint: float = 0.5
    drawers: int = 6
    """Processes that draw the pictures: a hundred small operations cost them longer than the
    networks need to learn from what comes of it."""
    at_once: int = 8
    """Lessons that are drawn together: an operation costs a card as long for few pictures."""


def new_student() -> MobileFaceNet:
    return MobileFaceNet(stem=STEM, stages=STAGES, head="flatten", neck=NECK, attention=ATTENTION)


def with_maps(network: MobileFaceNet, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The answer, and the maps that hints are about: of each bottleneck and of the neck."""
    maps: list[Tensor] = []
    x = network.entry(x)
    for block in (b for stage in network.stages for b in stage):  # type: ignore[attr-defined]
        x = block(x)
        maps.append(x)
    head = network.head
    x = head.reduce(network.features(x))  # type: ignore[operator]
    maps.append(x)
    out: Tensor = head.norm(head.linear(x.flatten(1)))  # type: ignore[operator]
    return out, maps


class Hints(nn.Module):
    """How far the student's maps are from the teacher's; 1 is the variance of the teacher's."""

    def __init__(self, theirs: list[Tensor]) -> None:
        """Of one batch, which fixes the variances."""
        super().__init__()
        for place, teacher in enumerate(theirs):
            variance = teacher.float().var((0, 2, 3), keepdim=True).clamp(min=1e-4)
            self.register_buffer(f"variance{place}", variance)

    def forward(self, mine: list[Tensor], theirs: list[Tensor]) -> Tensor:
        total = mine[0].new_zeros((), dtype=torch.float32)
        for place, (student, teacher) in enumerate(zip(mine, theirs, strict=True)):
            gap = (student[: len(teacher)].float() - teacher.float()).square()
            total = total + (gap / getattr(self, f"variance{place}")).mean()
        return total / len(mine)


def options_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of the MobileFaceNet, batch norms folded, whose state this is."""
    options: dict[str, Any] = {"stages": stages_of(state), "norm": False}
    stem = len(state["stem.conv.weight"])
    if stem != 64:
        options["stem"] = stem
    gate = state.get("stages.0.0.gate.squeeze.weight")
    if gate is not None:
        options["attention"] = gate.shape[1] // gate.shape[0]
    reduce = state.get("head.reduce.conv.weight")
    if reduce is not None:
        side = round((state["head.linear.weight"].shape[1] / len(reduce)) ** 0.5) * 16
        options |= {"head": "flatten", "neck": len(reduce)}
    else:
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
    """BGR 0..1 -> RGB (x - 127.5) / 127.5, channels last; the teacher's input too."""
    return (pictures.flip(1) * 2 - 1).contiguous(memory_format=torch.channels_last)


def distillation_loss(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; its directions' part (1 - mean cosine) on the teacher's own pictures [N], and on
    what cameras made of the first N / 2 of them.

    Row i and row i + N / 4 of these show the same person; their cosines count once more.
    """
    n = len(teacher)
    mine, theirs = F.normalize(student.float()), F.normalize(teacher.float())
    direction = 1 - (mine[:n] * theirs).sum(1).mean()
    spoilt = 1 - (mine[n:] * theirs[: n // 2]).sum(1).mean()
    gap = (mine[:n] @ mine[:n].T - theirs @ theirs.T).square()
    genuine = gap[: n // 2].diagonal(n // 4)[: n // 4].mean()
    loss = direction + CAMERA_WEIGHT * spoilt + 20 * gap.mean() + GENUINE_WEIGHT * genuine
    return loss, direction, spoilt


class Strangers:
    """The latest answers to good pictures and whose they are, to mine impostors from."""

    def __init__(self, size: int, dim: int, device: torch.device) -> None:
        self._vectors = torch.zeros(size, dim, device=device)
        self._identity = torch.full((size,), -1, device=device)
        self._next = 0

    def add(self, vectors: Tensor, identity: Tensor) -> None:
        at = (self._next + torch.arange(len(vectors), device=vectors.device)) % len(self._vectors)
        self._vectors[at], self._identity[at] = vectors.detach().float(), identity
        self._next = (self._next + len(vectors)) % len(self._vectors)

    def margin_loss(self, anchors: Tensor, partners: Tensor, identity: Tensor) -> Tensor:
        """How far the nearest strangers of ``anchors`` come within ``MARGIN`` of ``partners``."""
        near = anchors @ self._vectors.T
        near = near.masked_fill(identity[:, None] == self._identity[None], -1)
        worst = near.topk(NEAREST, 1).values
        own = (anchors * partners).sum(1, keepdim=True)
        return SOFTNESS * F.softplus((worst - own + MARGIN) / SOFTNESS).mean()


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
        return torch.cat((picks, self.partner(picks)))

    def partner(self, picks: Tensor) -> Tensor:
        """For each of the pictures ``picks`` another one of the same person, if there is one."""
        count = self._count[picks]
        step = (torch.rand(len(picks), device=picks.device) * (count - 1)).long() + 1
        return self._order[self._first[picks] + (self._own[picks] + step) % count]


@torch.no_grad()
def lift(student: MobileFaceNet) -> MobileFaceNet:
    """The network to ship: batch norms folded."""
    trunk = deepcopy(student).float().eval().cpu()
    fold(trunk)
    weights = trunk.state_dict()
    shipped = MobileFaceNet(**options_of(weights))
    shipped.load_state_dict(weights)
    return shipped.eval()


@torch.no_grad()
def unfold(state: Mapping[str, Tensor], pictures: Tensor) -> MobileFaceNet:
    """A student that answers as the shipped network of ``state`` does, with batch norms again:
    each takes on the mean and variance of what it sees of ``pictures`` [N, 3, 112, 112], 0..1."""
    shipped = MobileFaceNet(**options_of(state))
    shipped.load_state_dict({k: v for k, v in state.items() if not k.startswith("ood_head.")})
    shipped.to(pictures.device).eval()
    student = new_student().to(pictures.device)
    student.load_state_dict(shipped.state_dict(), strict=False)
    layers = dict(shipped.named_modules())

    def taking_on(norm: nn.Module, layer: nn.Module) -> Callable[[object, object, Tensor], None]:
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        assert layer.bias is not None

        def hook(_module: object, _inputs: object, out: Tensor) -> None:
            axes = (0, 2, 3) if out.ndim == 4 else (0,)
            variance, mean = torch.var_mean(out.float(), axes)
            norm.running_var, norm.running_mean = variance, mean - layer.bias
            norm.weight.copy_((variance + norm.eps).sqrt())
            norm.bias.copy_(mean)

        return hook

    hooks = []
    for name, block in student.named_modules():
        for layer, norm in block.FOLDS if isinstance(block, Foldable) else ():
            own = layers[f"{name}.{layer}"]
            hooks.append(own.register_forward_hook(taking_on(getattr(block, norm), own)))
    shipped.trunk(student_input(pictures))
    for handle in hooks:
        handle.remove()
    return student


@dataclass(frozen=True)
class Lesson:
    """``good`` [N] pictures for the teacher, the student's ``seen`` [3 N / 2], and who is on the
    first N / 2; all on the device, 0..1."""

    good: Tensor
    seen: Tensor
    identity: Tensor


class Lessons(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless lessons, drawn on ``device`` by each worker of a loader, as uint8 on the host:
    [3 N / 2] pictures, and who is on the first N / 2."""

    def __init__(self, data: Path, options: Options, device: str, end: float, seed: int) -> None:
        self._data, self._options, self._device = data, options, device
        self._begin, self._end, self._seed = time.time(), end, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        number = self._seed + (worker.id if worker else 0)
        torch.manual_seed(number)
        random.seed(number)
        crops = load_crops(self._data, held_out=False, limit=self._options.limit)
        device = torch.device(self._device)
        pictures = torch.from_numpy(crops.pictures).permute(0, 3, 1, 2).contiguous().to(device)
        identity = torch.from_numpy(crops.identity).to(device)
        pairs, half = Pairs(identity), self._options.batch // 2
        count = self._options.at_once
        while True:
            progress = min(1.0, (time.time() - self._begin) / (self._end - self._begin))
            if self._options.resume is not None:
                # It has seen the wild ones: more and more faces as they are served.
                progress = 0.4 + 0.6 * progress
            with torch.no_grad():
                own, other = pairs.draw(half * count), pairs.draw(half * count)
                pure = pure_faces(pictures[own])
                # Its first pictures are the good ones: each lesson is to have some.
                order = torch.randperm(len(other), device=device)
                mixed = mixed_faces(pictures[other], progress)[order]
                drawn = [(x * 255).round().to(torch.uint8) for x in (pure, mixed, camera(pure))]
            # Partners lie half of all apart, and are to lie half of a lesson apart.
            places = torch.arange(len(own), device=device).reshape(2, count, half // 2)
            for rows, more in zip(
                places.transpose(0, 1).flatten(1), drawn[1].split(half), strict=True
            ):
                seen = torch.cat((drawn[0][rows], more, drawn[2][rows]))
                yield seen.cpu(), identity[own[rows]].cpu()


Taught = tuple[Tensor, list[Tensor]]
"""The teacher's answer, and its maps that hint."""


def _time_parts(
    draw: Callable[[], Lesson],
    teach: Callable[[Tensor], Taught],
    learn: Callable[[Tensor, Taught], object],
) -> None:
    """Print what a step's parts cost on the device: where the next second is to be saved."""
    rows: dict[str, float] = {}
    batch = draw()
    with torch.no_grad():
        taught = teach(batch.good)
    parts: dict[str, Callable[[], object]] = {
        "draw": draw, "teach": lambda: teach(batch.good),
        "learn": lambda: learn(batch.seen, taught),
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
) -> MobileFaceNet:
    """Train until ``deadline`` (a ``time.time()``); the schedule starts after compiling.

    With several ranks, each learns from pictures of its own; the first one writes.
    """
    ranks = Ranks(device)
    torch.manual_seed(seed + 1000 * ranks.rank)
    random.seed(seed + 1000 * ranks.rank)
    cuda = device.type == "cuda"
    teacher = load_teacher(data / "models").to(device)
    if cuda:
        teacher = teacher.half().to(memory_format=torch.channels_last)
    student = new_student().to(device, memory_format=torch.channels_last)
    rate, hint_weight = options.rate, options.hint
    if options.resume is not None:
        parts = torch.load(options.resume, map_location=device, weights_only=True)
        state = {k: v.float() for k, v in parts["state"].items()}
        if "stem.norm.weight" in state:
            student.load_state_dict(state, strict=False)
        else:
            some = torch.from_numpy(load_crops(data, held_out=False, limit=512).pictures)
            pictures = some.permute(0, 3, 1, 2).to(device).float() / 255
            student = unfold(state, pictures).to(device, memory_format=torch.channels_last)
        rate, hint_weight = options.refine_rate, options.refine_hint
    ranks.same_start(student)
    average = Average(student, options.average)
    strangers = Strangers(MEMORY, student_dim(student), device)
    # A second card, if this process sees one, is there for drawing.
    place = f"cuda:{torch.cuda.device_count() - 1}" if cuda else "cpu"
    loader = DataLoader(
        Lessons(data, options, place, deadline, seed + 1000 * ranks.rank),
        batch_size=None,
        num_workers=options.drawers,
        multiprocessing_context="spawn",
        prefetch_factor=4,
        pin_memory=cuda,
    )
    lessons = iter(loader)

    def draw() -> Lesson:
        pictures, identity = next(lessons)
        seen = pictures.to(device, non_blocking=True).float().div_(255)
        return Lesson(seen[: options.batch], seen, identity.to(device, non_blocking=True))

    def teach(x: Tensor) -> Taught:
        seen = student_input(x)
        answer, maps = with_maps(teacher, seen.half() if cuda else seen)
        return answer, maps if hint_weight else []

    with torch.no_grad():
        batch = draw()
        taught = teach(batch.good)
        hints = Hints(taught[1]).to(device) if hint_weight else None
    optimizer = torch.optim.AdamW(
        decay_groups(student, 0.02), lr=rate, betas=(0.9, 0.98), fused=cuda
    )

    def learn(x: Tensor, taught: Taught) -> tuple[Tensor, Tensor]:
        """The student's answer, and how far it is from the hints."""
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            answer, maps = with_maps(student, student_input(x))
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
                taught = teach_fast(batch.good)
            print("recognizer", json.dumps({"teacher_compiled_s": time.time() - begun}), flush=True)
            answer, far = learn_fast(batch.seen, taught)
            (answer.float().sum() + far).backward()
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
    ranks.same_start(student)
    print("recognizer", json.dumps({"compile_s": compiled_s}), flush=True)
    log: list[dict[str, float]] = []
    clock = Clock(time.time(), deadline - time.time())
    step, saved, over = 0, time.time(), False
    rows: list[Tensor] = []
    while not over:
        set_rate(optimizer, cosine_rate(clock.progress, rate))
        with torch.no_grad():
            batch = draw()
            taught = teach_fast(batch.good)
        student.train()
        optimizer.zero_grad(set_to_none=True)
        answer, far = learn_fast(batch.seen, taught)
        loss, direction, spoilt = distillation_loss(answer, taught[0])
        fading = hint_weight * max(0.0, 1 - clock.progress / HINTS_END)
        vectors = F.normalize(answer.float())
        half = len(batch.identity)
        good, bad = vectors[:half], vectors[-half:]
        apart = strangers.margin_loss(
            torch.cat((good, bad)), good.roll(half // 2, 0).repeat(2, 1), batch.identity.repeat(2)
        )
        late = 1.0 if options.resume else min(1.0, max(0.0, clock.progress - 0.2) / 0.3)
        (loss + fading * far + MARGIN_WEIGHT * late * apart).backward()
        strangers.add(good, batch.identity)
        over = ranks.mean_gradients(student, clock.over, step)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        average.update(student)
        step += 1
        rows.append(torch.stack((direction, spoilt, apart, far)).detach())
        if cuda and step % 4 == 0:
            # Keeps the host at most a few steps ahead, so that the deadline holds.
            rows[-min(4, len(rows))].sum().item()
        if step % 100 == 0 or step == 1:
            values = torch.stack(rows).mean(0).tolist()
            rows.clear()
            elapsed = time.time() - clock.start
            row = {
                "step": step,
                "s": round(elapsed, 1),
                **dict(zip(("one_minus_cos", "camera", "margin", "hint"), values, strict=True)),
                "pictures_per_s": round(step * options.batch / elapsed),
            }
            log.append(row)
            if ranks.first:
                (out / "recognizer-log.json").write_text(json.dumps(log))
                if step % 500 == 0 or step <= 100:
                    print("recognizer", json.dumps(row), flush=True)
        if ranks.first and time.time() - saved > options.save_every_s:
            save(out / "recognizer.pt", state=half_state(average.network), step=step)
            saved = time.time()
    if ranks.first:
        save(
            out / "recognizer.pt", state=half_state(average.network), step=step, finished=True,
            compile_s=compiled_s,
        )  # fmt: skip
    ranks.leave()
    return average.network


def student_dim(student: MobileFaceNet) -> int:
    """How long the network's answers are."""
    return int(student.head.linear.out_features)  # type: ignore[union-attr, arg-type]
