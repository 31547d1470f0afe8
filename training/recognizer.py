"""The recogniser: a MobileFaceNet distilled from the teacher on endless augmented pictures.

Teacher and student see the same picture. The student's embedding goes through a linear map
to the teacher's 256 dimensions, where their directions must agree, and so must the cosines
between all pictures of a batch. The map becomes part of what is shipped: lifted back to 512
by orthonormal columns, its cosines stay the same.
"""

from __future__ import annotations

import json
import random
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facelane_server.worker.models.architectures.folding import fold
from facelane_server.worker.models.architectures.mobilefacenet import MobileFaceNet
from training.augment import training_batch
from training.clock import Average, Clock, cosine_rate, decay_groups, save, set_rate
from training.data import load_crops
from training.teacher import TEACHER_SIZE, load_teacher

TEACHER_DIM = 256


@dataclass(frozen=True)
class Options:
    batch: int = 512
    rate: float = 2.5e-3
    average: float = 0.998
    compile: bool = True
    save_every_s: float = 30.0
    limit: int = 0
    resume: Path | None = None
    resume_rate: float = 1.6e-3


class Student(nn.Module):
    """The trunk and its map to the teacher's space."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = MobileFaceNet()
        self.map = nn.Linear(512, TEACHER_DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        embedding, _ = self.trunk(x)
        out: Tensor = self.map(embedding)
        return out


def student_input(pictures: Tensor) -> Tensor:
    """BGR 0..1 -> RGB (x - 127.5) / 127.5, channels last."""
    return (pictures.flip(1) * 2 - 1).contiguous(memory_format=torch.channels_last)


def teacher_input(pictures: Tensor) -> Tensor:
    """BGR 0..1 [N, 3, 112, 112] -> BGR 0..255 [N, 3, 128, 128]."""
    size = (TEACHER_SIZE, TEACHER_SIZE)
    larger = F.interpolate(pictures, size=size, mode="bilinear", align_corners=False)
    return (larger * 255).contiguous(memory_format=torch.channels_last)


def loss_of(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and its direction part (1 - mean cosine)."""
    mine, theirs = F.normalize(student.float()), F.normalize(teacher.float())
    direction = 1 - (mine * theirs).sum(1).mean()
    relation = F.mse_loss(mine @ mine.T, theirs @ theirs.T)
    return direction + 20 * relation, direction


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
    shipped = MobileFaceNet(norm=False)
    shipped.load_state_dict(weights)
    return shipped.eval()


def train(
    data: Path, out: Path, deadline: float, device: torch.device, options: Options, seed: int = 1
) -> Student:
    """Train until ``deadline`` (a ``time.time()``); the schedule starts after compiling."""
    torch.manual_seed(seed)
    random.seed(seed)
    crops = load_crops(data, held_out=False, limit=options.limit)
    pictures = torch.from_numpy(crops.pictures).permute(0, 3, 1, 2).contiguous().to(device)
    cuda = device.type == "cuda"
    teacher: nn.Module = load_teacher(data / "models").to(device)
    if cuda:
        teacher = teacher.half().to(memory_format=torch.channels_last)
    student = Student().to(device, memory_format=torch.channels_last)
    rate = options.rate
    if options.resume is not None:
        parts = torch.load(options.resume, map_location=device, weights_only=True)
        student.load_state_dict(parts["state"])
        rate = options.resume_rate
    average = Average(student, options.average)
    optimizer = torch.optim.AdamW(
        decay_groups(student, 0.02), lr=rate, betas=(0.9, 0.98), fused=cuda
    )

    def draw() -> Tensor:
        return training_batch(
            pictures[torch.randint(len(pictures), (options.batch,), device=device)]
        )

    def teach(x: Tensor) -> Tensor:
        answer: Tensor = teacher(teacher_input(x).half() if cuda else teacher_input(x))
        return answer

    def learn(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            answer: Tensor = student(student_input(x))
        return answer

    teach_fast, learn_fast = teach, learn
    begun = time.time()
    if options.compile and cuda:
        try:
            teach_fast = torch.compile(teach, dynamic=False)
            learn_fast = torch.compile(learn, dynamic=False)
            student.train()
            with torch.no_grad():
                batch = draw()
                target = teach_fast(batch)
            print("recognizer", json.dumps({"teacher_compiled_s": time.time() - begun}), flush=True)
            loss_of(learn_fast(batch), target)[0].backward()
            torch.cuda.synchronize()
        except Exception as error:
            print("recognizer", json.dumps({"compile_failed": repr(error)[:2000]}), flush=True)
            teach_fast, learn_fast = teach, learn
    compiled_s = time.time() - begun
    print("recognizer", json.dumps({"compile_s": compiled_s}), flush=True)
    log: list[dict[str, float]] = []
    clock = Clock(time.time(), deadline - time.time())
    step, saved = 0, time.time()
    directions: list[Tensor] = []
    while not clock.over:
        set_rate(optimizer, cosine_rate(clock.progress, rate))
        with torch.no_grad():
            batch = draw()
            target = teach_fast(batch).float()
        student.train()
        optimizer.zero_grad(set_to_none=True)
        loss, direction = loss_of(learn_fast(batch), target)
        loss.backward()
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
                "pictures_per_s": round(step * options.batch / elapsed),
            }
            log.append(row)
            (out / "recognizer-log.json").write_text(json.dumps(log))
            if step % 500 == 0 or step <= 100:
                print("recognizer", json.dumps(row), flush=True)
        if time.time() - saved > options.save_every_s:
            save(out / "recognizer.pt", state=average.network.state_dict(), step=step)
            saved = time.time()
    save(
        out / "recognizer.pt", state=average.network.state_dict(), step=step, finished=True,
        compile_s=compiled_s,
    )  # fmt: skip
    return average.network
