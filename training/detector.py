"""The detector: a YuNet of smaller widths that learns YuNet's dense answers.

Every training picture is a new scene: photos pasted at many scales and angles over
textures or each other, some of it at night, blurred, noisy or compressed. Both networks look
at the same pixels, and YuNet's answer at every anchor is the target: a student that is asked
for the faces which YuNet saw before the lights went out learns to see faces in the dark.
Where no photo lies (textures), the target is "no face", whatever YuNet says. Scenes that the
student gets most wrong are kept and shown again. Beside the answers, the maps that YuNet's
heads read are a hint (after "FitNets", Romero et al., 2015) that fades out: most of a scene
holds no face, and there the answers alone teach little.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facelane_server.worker.networks.architectures.yunet import STRIDES, DenseHeads, YuNet, decode
from training import imaging
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
from training.data import CELEBA, load_crops, load_photos
from training.imaging import column, rand

WIDTHS = (16, 32, 64, 96, 96, 96)
"""A run may start from a narrower network, as the first editions were."""
SCORE = 0.6
NMS_IOU = 0.4
CROPS, ODD, DARK = 0.15, 0.3, 0.15
"""Shares of a layer's pictures that are crops, of its layers that are put out of shape, and of
scenes with a dark ground."""


@dataclass(frozen=True)
class Options:
    """``side``: of the square scenes, a multiple of 32."""

    side: int = 320
    batch: int = 96
    rate: float = 4e-3
    resume_rate: float = 2.5e-3
    """Peak of a run that goes on from a finished one."""
    hard: int = 24
    """Scenes of a batch that come from the bank of hard ones."""
    hint: float = 0.5
    """Weight of the hint at the start; it falls to zero."""
    save_every_s: float = 30.0
    limit: int = 0
    resume: Path | None = None
    half: bool = True
    """Compute in bfloat16."""


def load_yunet(path: Path) -> YuNet:
    """The public checkpoint as a frozen network."""
    network = YuNet()
    state = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(state["state_dict"])
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.eval()


def load_student(path: Path) -> YuNet:
    """The network of a checkpoint, as it will be shipped (fp16 weights, computed in fp32)."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state"]
    network = YuNet(widths_of(state))
    network.load_state_dict(state, strict=False)
    return network.eval()


def widths_of(state: Mapping[str, Tensor]) -> list[int]:
    """The ``widths`` option of the YuNet whose state this is."""
    return [len(state[f"backbone.model{i}.conv2.conv1.weight"]) for i in range(6)]


def iou(box: Tensor, others: Tensor) -> Tensor:
    """IoU of ``box`` [4] with ``others`` [N, 4], as (x, y, w, h)."""
    corner = torch.maximum(box[:2], others[:, :2])
    far = torch.minimum(box[:2] + box[2:4], others[:, :2] + others[:, 2:4])
    overlap = (far - corner).clamp(min=0).prod(1)
    return overlap / (box[2] * box[3] + others[:, 2] * others[:, 3] - overlap).clamp(min=1e-6)


@torch.inference_mode()
def merge_faces(network: YuNet, pictures: Tensor, score: float) -> list[Tensor]:
    """Faces [M, 15] of each picture (BGR 0..255): x, y, w, h, five (x, y), score; best first."""
    height, width = pictures.shape[-2:]
    padded = F.pad(pictures, (0, -width % 32, 0, -height % 32))
    found = decode(network(padded), *padded.shape[-2:]).cpu()
    out: list[Tensor] = []
    for candidates in found:
        rows = candidates[candidates[:, 0] >= score]
        rows = rows[rows[:, 0].argsort(descending=True)][:400]
        kept: list[Tensor] = []
        while len(rows):
            kept.append(torch.cat((rows[0, 1:], rows[0, :1])))
            rows = rows[1:][iou(rows[0, 1:5], rows[1:, 1:5]) <= NMS_IOU]
        out.append(torch.stack(kept) if kept else torch.zeros(0, 15))
    return out


class Scenes:
    """Composes scenes from photos uint8 [N, 3, 250, 250], and crops of faces [M, 3, S, S] if
    there are any, that lie on the device.

    Photos of the press hardly show a profile, and no face that fills a screen: crops come
    large, some layers are squeezed, warped or cut in two, and some lie on the dark. What that
    makes of a face, YuNet says.
    """

    def __init__(self, photos: Tensor, crops: Tensor | None = None) -> None:
        self.photos = photos
        self._crops = crops
        self._levels = [photos]
        for _ in range(2):
            smaller = F.avg_pool2d(self._levels[-1].float(), 2)
            self._levels.append(smaller.round().to(torch.uint8))

    def compose(self, n: int, side: int) -> tuple[Tensor, Tensor]:
        """Scenes [n, 3, side, side] in 0..1 and the mask [n, 1, side, side] of their photos.

        The first sixth holds textures alone.
        """
        photos = self._levels[0]
        canvas = imaging.textures(n, side, photos)
        dark = torch.rand(n, device=photos.device) < DARK
        canvas = canvas * column(torch.where(dark, rand(n, 0.0, 0.3, photos), 1.0))
        cover = torch.zeros(n, 1, side, side, device=photos.device)
        bare = column((torch.arange(n, device=photos.device) < n // 6).float())
        # Large photos first, small ones over them; each layer has its own octave of scales.
        plans = random.choice(
            (
                ((0, 0.9, 1.35),),
                ((0, 1.1, 3.2),),
                ((0, 1.4, 3.4),),
                ((0, 0.8, 1.8), (1, 0.3, 0.6)),
                ((0, 0.5, 1.1), (0, 0.5, 1.0), (1, 0.25, 0.55), (2, 0.12, 0.26)),
                ((1, 0.3, 0.6), (1, 0.25, 0.5), (2, 0.15, 0.28), (2, 0.1, 0.25)),
                ((0, 0.5, 1.0), (0, 0.5, 0.8), (0, 0.5, 0.8), (0, 0.5, 0.8)),
            )
        )
        for level, low, high in plans:
            source = self._levels[level]
            picks = torch.randint(len(source), (n,), device=photos.device)
            layer = source[picks].float().div(255)
            if self._crops is not None:
                rows = torch.randperm(n, device=photos.device)[: max(1, int(n * CROPS))]
                picks = torch.randint(len(self._crops), (len(rows),), device=photos.device)
                crop = self._crops[picks].float().div(255)
                layer[rows] = F.interpolate(
                    crop, size=layer.shape[-2:], mode="bilinear", align_corners=False
                )
            scale = torch.exp(rand(n, math.log(low), math.log(high), photos))
            turned = torch.rand(n, device=photos.device) < 0.3
            degrees = torch.where(turned, rand(n, -35, 35, photos), rand(n, -6, 6, photos))
            # In fractions of the photo: the scene's side is side / (250 * scale) photos.
            span = side / (250 * scale)
            reach = torch.maximum((span - 1) / 2, torch.full_like(span, 0.12)).clamp(max=4)
            shift = (torch.rand(n, 2, device=photos.device) - 0.5) * 2 * reach[:, None]
            odd = (torch.rand(n, device=photos.device) < ODD).float()
            grid = imaging.affine_grid(
                n, side, photos,
                degrees=degrees, scale=1 / span, shift=shift,
                flip=torch.rand(n, device=photos.device) < 0.5,
                aspect=torch.exp(rand(n, -0.4, 0.4, photos) * odd),
                elastic=rand(n, 0, 8, photos) * odd,
            )  # fmt: skip
            mask = imaging.sample(torch.ones_like(layer[:, :1]), grid) * (1 - bare)
            mask = mask * (1 - column(odd) * halves(n, side, photos))
            drawn = imaging.sample(layer, grid, "border")
            canvas = canvas * (1 - mask) + drawn * mask
            cover = torch.maximum(cover, mask)
        return canvas.clamp(0, 1), cover


def halves(n: int, side: int, like: Tensor) -> Tensor:
    """[n, 1, side, side]: 1 on one side of a random line, which crosses three of four squares, some
    at a corner."""
    at = torch.linspace(-1, 1, side, device=like.device)
    y, x = torch.meshgrid(at, at, indexing="ij")
    angle = rand(n, 0, 2 * math.pi, like)
    along = column(torch.cos(angle)) * x + column(torch.sin(angle)) * y
    return (along > column(rand(n, -0.5, 2.0, like))).float()


class HardScenes:
    """The scenes with the worst false finds of late, and their masks; on the device."""

    def __init__(self, size: int, side: int, like: Tensor) -> None:
        self._scenes = torch.zeros(size, 3, side, side, dtype=torch.uint8, device=like.device)
        self._cover = torch.zeros(size, 1, side, side, dtype=torch.uint8, device=like.device)
        self._error = torch.zeros(size, device=like.device)

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """``n`` scenes [n, 3, side, side] in 0..1, mirrored by chance, and their masks.

        Drawn ones count as forgiven by half, so that what was learnt makes room.
        """
        rows = torch.randperm(len(self._error), device=self._error.device)[:n]
        self._error[rows] *= 0.5
        scenes, cover = self._scenes[rows].float() / 255, self._cover[rows].float() / 255
        flip = column((torch.rand(n, device=rows.device) < 0.5).float())
        return (
            scenes * (1 - flip) + scenes.flip(3) * flip,
            cover * (1 - flip) + cover.flip(3) * flip,
        )

    def offer(self, scenes: Tensor, cover: Tensor, error: Tensor, n: int) -> None:
        """Put the ``n`` worst of a batch in the place of the ``n`` least bad kept ones."""
        worst, best = error.topk(n).indices, (-self._error).topk(n).indices
        better = error[worst] > self._error[best]
        rows, picks = best[better], worst[better]
        self._scenes[rows] = (scenes[picks] * 255).round().to(torch.uint8)
        self._cover[rows] = (cover[picks] * 255).round().to(torch.uint8)
        self._error[rows] = error[picks]


@dataclass(frozen=True)
class Lesson:
    """A batch of scenes ``canvas`` in 0..1, as the networks see it, with YuNet's answer."""

    canvas: Tensor
    cover: Tensor
    seen: Tensor
    target: DenseHeads
    score: Tensor
    maps: dict[int, Tensor]


def worst_error(student: DenseHeads, target: Tensor) -> Tensor:
    """[N]: the highest probability that the student gives where the target has no face, or
    half of the most that it lacks where there is one, whichever is more."""
    p = student.cls.detach().float().sigmoid() * student.obj.detach().float().sigmoid()
    return torch.maximum((p * (target < 0.1)).amax(1), 0.5 * (target - p).amax(1))


def disturb(scenes: Tensor) -> Tensor:
    """What cameras do to four fifths of the scenes: colour, contrast, uneven light, night,
    blur, noise, compression. The others stay as they are."""
    out = scenes.clone()
    some = torch.randperm(len(out), device=out.device)[: max(1, len(out) * 4 // 5)]
    x = out[some].clamp(1e-4, 1)
    n = len(x)

    def rows(share: float) -> Tensor:
        return torch.randperm(n, device=x.device)[: max(1, int(n * share))]

    x = x ** column(torch.exp(rand(n, -0.5, 0.5, x)))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * column(torch.exp(rand(n, -0.5, 0.3, x))) + mean
    x = x * (1 + 0.1 * torch.randn(n, 3, 1, 1, device=x.device)) + column(rand(n, -0.1, 0.1, x))
    x = x.clamp(0, 1)
    lit = rows(0.2)
    field = imaging.smooth_field(len(lit), 1, 4, x.shape[-1], x)
    x[lit] = (x[lit] * (0.9 + 0.6 * field).clamp(0.03, 1.6)).clamp(0, 1)
    grey = rows(0.12)
    x[grey] = x[grey].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    night = rows(0.2)
    x[night] = imaging.expose(x[night], rand(len(night), 0.08, 0.5, x), rand(len(night), 1, 1.6, x))
    x[night] = imaging.noise(x[night], rand(len(night), 0.0, 0.06, x))
    for _ in range(2):
        soft = rows(0.15)
        x[soft] = imaging.gaussian_blur(x[soft], math.exp(random.uniform(-1.0, 1.8)))
    grain = rows(0.15)
    x[grain] = imaging.noise(x[grain], rand(len(grain), 0.005, 0.08, x))
    packed = rows(0.35)
    x[packed] = imaging.jpeg(x[packed], rand(len(packed), 12, 90, x))
    out[some] = x
    return out


def anchor_cover(cover: Tensor) -> Tensor:
    """[N, A]: how much of each anchor's cell is photo."""
    return torch.cat([F.avg_pool2d(cover, stride).flatten(1) for stride in STRIDES], 1)


def distillation_loss(student: DenseHeads, teacher: DenseHeads, target: Tensor) -> Tensor:
    """``student`` in logits, ``teacher`` in probabilities, ``target`` [N, A] its scores."""
    log_p = F.logsigmoid(student.cls.float()) + F.logsigmoid(student.obj.float())
    log_p = log_p.clamp(max=-1e-5)
    p = log_p.exp()
    cross = -(target * log_p + (1 - target) * torch.log1p(-p))
    # Subtracting the target's own entropy changes no gradient but shows when it fits.
    amount = target.sum().clamp(min=1)
    score = (cross * (p.detach() - target).abs()).sum() / amount
    near = target > 0.1
    weight = target[near][:, None]
    size = teacher.box[near][:, 2:].float().clamp(-4, 6).exp()
    extent = size.mean(1, keepdim=True)
    mine, theirs = student.box[near].float(), teacher.box[near].float()
    box = F.smooth_l1_loss(
        torch.cat((mine[:, :2] / size, mine[:, 2:]), 1),
        torch.cat((theirs[:, :2] / size, theirs[:, 2:]), 1),
        beta=0.02,
        reduction="none",
    )
    points = F.smooth_l1_loss(
        student.points[near].float() / extent,
        teacher.points[near].float() / extent,
        beta=0.02,
        reduction="none",
    )
    shape = (box.sum(1, keepdim=True) + 0.5 * points.sum(1, keepdim=True)) * weight
    return score + 2.0 * shape.sum() / amount


class Hint(nn.Module):
    """How far the maps that the student's heads read are from YuNet's, seen through a learned
    map of channels; 1 is the variance of YuNet's own."""

    def __init__(self, student: YuNet, teacher: YuNet) -> None:
        super().__init__()
        self._maps: dict[int, dict[int, Tensor]] = {0: {}, 1: {}}
        width, wanted = WIDTHS[-1], teacher.bbox_head.multi_level_cls[0].conv1.in_channels
        self.see = nn.ModuleList(nn.Conv2d(width, wanted, 1) for _ in range(2 * len(STRIDES)))
        for who, network in enumerate((student, teacher)):
            layers = (*network.neck.lateral_convs, *network.bbox_head.multi_level_share_convs)
            for place, layer in enumerate(layers):
                layer.register_forward_hook(self._keep(who, place))

    def _keep(self, who: int, place: int) -> Callable[[nn.Module, object, Tensor], None]:
        def keep(_layer: nn.Module, _inputs: object, answer: Tensor) -> None:
            self._maps[who][place] = answer

        return keep

    def taught(self) -> dict[int, Tensor]:
        """The maps of the teacher's latest answer."""
        return dict(self._maps[1])

    def forward(self, taught: dict[int, Tensor]) -> Tensor:
        total = torch.zeros((), device=taught[0].device)
        for place, see in enumerate(self.see):
            target = taught[place].float()
            spread = target.var((0, 2, 3), keepdim=True).clamp(min=1e-4)
            gap = (see(self._maps[0][place].float()) - target).square()
            total = total + (gap / spread).mean()
        return total / len(self.see)


def train(
    data: Path, out: Path, clock: Clock, device: torch.device, options: Options, seed: int = 2
) -> YuNet:
    """Train until ``clock`` is over; checkpoints and the log go to ``out``."""
    torch.manual_seed(seed)
    random.seed(seed)
    photos = load_photos(data, held_out=False, limit=options.limit)
    crops = load_crops(data, held_out=False, limit=options.limit)
    others = crops.pictures[crops.source == CELEBA]
    scenes = Scenes(
        torch.from_numpy(photos.pictures).permute(0, 3, 1, 2).contiguous().to(device),
        torch.from_numpy(others).permute(0, 3, 1, 2).contiguous().to(device)
        if len(others)
        else None,
    )
    teacher = load_yunet(data / "models" / "yunet_n.pth").to(device)
    network = YuNet(WIDTHS).to(device, memory_format=torch.channels_last)
    rate = options.rate
    if options.resume is not None:
        parts = torch.load(options.resume, map_location=device, weights_only=True)
        network.load_state_dict(grown_state(network, parts["state"]), strict=False)
        rate = options.resume_rate
    else:
        for heads in (network.bbox_head.multi_level_cls, network.bbox_head.multi_level_obj):
            for head in heads:
                torch.nn.init.constant_(head.conv2.bias, -2.5)
    average = Average(network, 0.998)
    hint = Hint(network, teacher).to(device)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        [*decay_groups(network, 1e-3), *decay_groups(hint.see, 0)],
        lr=rate, betas=(0.9, 0.98), fused=fused,
    )  # fmt: skip
    bank = HardScenes(16 * options.batch, options.side, scenes.photos)

    @torch.no_grad()
    def lesson(again: tuple[Tensor, Tensor] | None) -> Lesson:
        canvas, cover = scenes.compose(
            options.batch - (len(again[0]) if again else 0), options.side
        )
        canvas = disturb(canvas)
        if again:
            canvas, cover = torch.cat((canvas, again[0])), torch.cat((cover, again[1]))
        seen = (canvas * 255).contiguous(memory_format=torch.channels_last)
        target = teacher(seen)
        score = (target.cls * target.obj).float() * (anchor_cover(cover) > 0.5)
        return Lesson(canvas, cover, seen, target, score, hint.taught())

    log: list[dict[str, float]] = []
    step, saved, begun = 0, time.time(), time.time()
    threads = torch.get_num_threads()
    # The next batch is made while this one is learnt. Only its maker draws random numbers
    # meanwhile, so that a seed still fixes them all.
    with ThreadPoolExecutor(1, initializer=lambda: torch.set_num_threads(threads)) as maker:
        coming = maker.submit(lesson, None)
        while not clock.over:
            set_rate(optimizer, cosine_rate(clock.progress, rate))
            now = coming.result()
            hard = min(options.hard, options.batch // 4) if step >= 32 else 0
            coming = maker.submit(lesson, bank.draw(hard) if hard else None)
            network.train()
            with torch.autocast(device.type, torch.bfloat16, enabled=options.half):
                answer = network.logits(now.seen)
            loss = distillation_loss(answer, now.target, now.score)
            far = hint(now.maps)
            bank.offer(now.canvas, now.cover, worst_error(answer, now.score), options.batch // 6)
            optimizer.zero_grad(set_to_none=True)
            (loss + options.hint * (1 - clock.progress) * far).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            average.update(network)
            step += 1
            if step % 100 == 0 or step == 1:
                row = {"step": step, "s": time.time() - begun, "loss": loss.item()}
                row["hint"] = far.item()
                log.append(row)
                (out / "detector-log.json").write_text(json.dumps(log))
                print("detector", json.dumps(row), flush=True)
            if time.time() - saved > options.save_every_s:
                save(out / "detector.pt", state=half_state(average.network), step=step)
                saved = time.time()
    save(out / "detector.pt", state=half_state(average.network), step=step, finished=True)
    return average.network
