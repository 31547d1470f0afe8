"""The detector: YuNet, grown wider and taught turned, small and dark faces.

It goes on from YuNet's public weights: the channels that are new are read by nothing at first,
so that it begins with YuNet's very answers. Every training picture is a new scene: photos pasted
at many scales and angles over textures or each other, some of it at night, blurred, noisy or
compressed. YuNet's answer at every anchor, to the scene before the lights went out, is the
target: so faces in the dark are learnt, and what YuNet knows stays. Of faces that were turned or
shrunk it is known where they are, whatever YuNet says. Where no photo lies (textures, drawn
pictures), the target is "no face". Scenes that the network gets most wrong are kept and shown
again.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from facelane_server.worker.networks.architectures.yunet import STRIDES, DenseHeads, YuNet, decode
from training import imaging
from training.clock import (
    Average,
    Clock,
    cosine_rate,
    decay_groups,
    grown_state,
    half_state,
    load_state,
    save,
    set_rate,
)
from training.clutter import clutter
from training.data import CELEBA, Photos, load_crops, load_photos, load_things
from training.grounds import Grounds, drawers
from training.imaging import column, rand

WIDTHS = (16, 64, 64, 128, 128, 128)
"""None less than YuNet's. A run may also go on from a narrower network than this."""
SCORE = 0.6
NMS_IOU = 0.4
CROPS, ODD, DARK = 0.15, 0.3, 0.15
"""Shares of a layer's pictures that are crops, of its layers that are put out of shape, and of
scenes with a dark ground."""
PHOTO = 250
LABEL_SCORE = 0.7
"""From here a face that YuNet found in a photo as it is is known to be one."""
FACES_MAX = 100
EXACT = 0.5
"""From this share of the time on nothing is computed in bfloat16, whose eight bits are a tenth of a
pixel of a landmark."""
LEVELS = (36.0, 100.0)
"""Sizes of faces (pixels) up to which the fine and the middle stride tell them."""
LARGE_SIDE = 640
GROUND = 320
"""The side of grounds."""
AGAINST = 2.0
"""Of a refining run: how much more a face counts that is none."""
MOSAIC, LARGE = 0.25, 0.2
"""Shares of the batches."""
Plan = tuple[tuple[int, float, float], ...]
PLANS: tuple[Plan, ...] = (
    ((0, 0.9, 1.35),),
    ((0, 1.1, 3.2),),
    ((0, 1.4, 3.4),),
    ((0, 0.8, 1.8), (1, 0.3, 0.6)),
    ((0, 0.5, 1.1), (0, 0.5, 1.0), (1, 0.25, 0.55), (2, 0.12, 0.26)),
    ((1, 0.3, 0.6), (1, 0.25, 0.5), (2, 0.15, 0.28), (2, 0.1, 0.25)),
    ((0, 0.5, 1.0), (0, 0.5, 0.8), (0, 0.5, 0.8), (0, 0.5, 0.8)),
)
"""Layers of a scene: (level of the photos' pyramid, smallest, largest scale)."""
LARGE_PLANS: tuple[Plan, ...] = (
    ((0, 1.8, 4.5),),
    ((0, 2.5, 7.0),),
    ((0, 3.0, 7.0), (0, 0.5, 1.0)),
    ((0, 0.9, 2.5), (0, 0.5, 1.2), (1, 0.25, 0.6), (2, 0.12, 0.26)),
)


@dataclass(frozen=True)
class Options:
    """``side``: of the square scenes, a multiple of 32."""

    side: int = 320
    batch: int = 96
    rate: float = 5e-4
    hard: int = 24
    """Scenes of a batch that come from the bank of hard ones."""
    save_every_s: float = 30.0
    limit: int = 0
    resume: Path | None = None
    half: bool = True
    """Compute in bfloat16 up to ``EXACT``."""
    refine: bool = False
    """Go on from a finished network, against what it takes for faces, and hold what it finds."""
    between: float = 0.3
    """Of a refining run: how far from the network that it goes on from to what it has learnt the
    one lies that is kept."""
    drawers: int = 6
    """Processes of a refining run that draw pictures without faces."""


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
    state = load_state(path)
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


class Faces(NamedTuple):
    """Faces whose place in a scene is known, however small, turned or dark they are.

    ``rows`` [N, M, 14] x, y, w, h, five landmarks (x, y), in pixels of the scene; ``seen``
    [N, M]: whether there is such a face and nothing lies over it.
    """

    rows: Tensor
    seen: Tensor


def no_faces(n: int, like: Tensor) -> Faces:
    rows = torch.zeros(n, FACES_MAX, 14, device=like.device)
    return Faces(rows, torch.zeros(n, FACES_MAX, dtype=torch.bool, device=like.device))


def _filled(rows: Tensor, seen: Tensor) -> Faces:
    """At most ``FACES_MAX`` of the faces, those that are seen first."""
    order = seen.float().argsort(dim=1, descending=True, stable=True)[:, :FACES_MAX]
    out = no_faces(len(rows), rows)
    count = order.shape[1]
    out.rows[:, :count] = rows.gather(1, order[..., None].expand(-1, -1, rows.shape[2]))
    out.seen[:, :count] = seen.gather(1, order)
    return out


class Scenes:
    """Composes scenes from photos uint8 [N, 3, 250, 250] with the faces that YuNet found in them
    upright and at their own size, and crops of faces [M, 3, S, S] if there are any, that lie on
    the device; on ``grounds`` or textures.

    Photos of the press hardly show a profile, and no face that fills a screen: crops come
    large, some layers are squeezed, bent as a head turns, warped or cut in two, and some lie
    on the dark. What that makes of a face, YuNet says. Of faces that are turned or made small
    it is known where they are.
    """

    def __init__(
        self,
        photos: Tensor,
        crops: Tensor | None = None,
        faces: Tensor | None = None,
        grounds: Grounds | None = None,
        bare: float = 1 / 6,
    ) -> None:
        """``faces`` [N, K, 15]: as ``data.Photos`` has them, padded with zeros. ``bare``: the share
        of scenes that are grounds alone."""
        self.photos = photos
        self.grounds = grounds
        self._crops = crops
        self._bare = bare
        self._faces = torch.zeros(len(photos), 1, 15, device=photos.device)
        if faces is not None:
            self._faces = faces.to(photos.device)
        self._levels = [photos]
        for _ in range(2):
            smaller = F.avg_pool2d(self._levels[-1].float(), 2)
            self._levels.append(smaller.round().to(torch.uint8))

    def _ground(self, n: int, side: int) -> Tensor:
        photos = self._levels[0]
        canvas = imaging.textures(n, side, photos)
        if self.grounds is not None:
            rows = torch.arange(0, n, 2, device=photos.device)
            ground = self.grounds.pictures[self.grounds.pick(len(rows))].float().div(255)
            angle = rand(len(rows), -20, 20, photos) + 90.0 * random.randrange(4)
            # As large as they are drawn, in a large scene too.
            small = math.log(side / ground.shape[-1])
            grid = imaging.affine_grid(
                len(rows), side, photos,
                degrees=angle,
                scale=torch.exp(rand(len(rows), -0.2 - small, 1.0 - 0.5 * small, photos)),
                shift=(torch.rand(len(rows), 2, device=photos.device) - 0.5) * 0.5,
            )  # fmt: skip
            canvas[rows] = imaging.sample(ground, grid, "reflection")
        dark = torch.rand(n, device=photos.device) < DARK
        return canvas * column(torch.where(dark, rand(n, 0.0, 0.3, photos), 1.0))

    def mosaic(self, n: int, side: int) -> tuple[Tensor, Tensor, Faces]:
        """As ``compose``, of many photos in rows: faces of 8 to 45 pixels."""
        across = random.randint(3, 12 if side <= 320 else 24)
        tile = side // across
        level = 0 if tile > 100 else 1 if tile > 50 else 2
        source = self._levels[level]
        count = n * across * across
        picks = torch.randint(len(source), (count,), device=source.device)
        tiles = torch.cat(
            [
                F.interpolate(
                    part.float().div(255), size=(tile, tile), mode="bilinear",
                    align_corners=False, antialias=tile < source.shape[-1] // 2,
                )
                for part in (source[rows] for rows in picks.split(2048))
            ]
        )  # fmt: skip
        sheet = tiles.reshape(n, across, across, 3, tile, tile).permute(0, 3, 1, 4, 2, 5)
        sheet = sheet.reshape(n, 3, across * tile, across * tile)
        canvas, cover = self._ground(n, side), torch.zeros(n, 1, side, side, device=source.device)
        full = across * tile
        bare = int(n * self._bare)
        canvas[bare:, :, :full, :full] = sheet[bare:]
        cover[bare:, :, :full, :full] = 1
        face = self._faces[picks, 0]
        at = torch.arange(count, device=source.device) % (across * across)
        corner = torch.stack((at % across, at // across), 1).float() * tile
        rows = face[:, :14] * (tile / self.photos.shape[-1])
        rows[:, 0:2] += corner
        rows[:, 4:] += corner.repeat(1, 5)
        seen = (face[:, 14] >= LABEL_SCORE).reshape(n, -1)
        seen[:bare] = False
        return canvas, cover, _filled(rows.reshape(n, -1, 14), seen)

    def compose(self, n: int, side: int) -> tuple[Tensor, Tensor, Faces]:
        """Scenes [n, 3, side, side] in 0..1, the mask [n, 1, side, side] of their photos, and
        the faces whose place is known.

        The first of them, a share of ``bare``, hold grounds alone.
        """
        photos = self._levels[0]
        canvas = self._ground(n, side)
        cover = torch.zeros(n, 1, side, side, device=photos.device)
        bare = column((torch.arange(n, device=photos.device) < int(n * self._bare)).float())
        known, free = [], []
        # Large photos first, small ones over them; each layer has its own octave of scales.
        for level, low, high in random.choice(PLANS if side < LARGE_SIDE else LARGE_PLANS):
            source = self._levels[level]
            picks = torch.randint(len(source), (n,), device=photos.device)
            layer = source[picks].float().div(255)
            face = self._faces[picks]
            valid = face[:, :, 14] >= LABEL_SCORE
            if self._crops is not None:
                rows = torch.randperm(n, device=photos.device)[: max(1, int(n * CROPS))]
                picks = torch.randint(len(self._crops), (len(rows),), device=photos.device)
                crop = self._crops[picks].float().div(255)
                layer[rows] = F.interpolate(
                    crop, size=layer.shape[-2:], mode="bilinear", align_corners=False
                )
                valid[rows] = False
            scale = torch.exp(rand(n, math.log(low), math.log(high), photos))
            draw = torch.rand(n, device=photos.device)
            degrees = torch.where(draw < 0.2, rand(n, -100, 100, photos), rand(n, -6, 6, photos))
            degrees = torch.where(draw > 0.75, rand(n, -45, 45, photos), degrees)
            # In fractions of the photo: the scene's side is side / (250 * scale) photos.
            span = side / (250 * scale)
            reach = torch.maximum((span - 1) / 2, torch.full_like(span, 0.12)).clamp(max=4)
            shift = (torch.rand(n, 2, device=photos.device) - 0.5) * 2 * reach[:, None]
            odd = (torch.rand(n, device=photos.device) < ODD).float()
            flip = torch.rand(n, device=photos.device) < 0.5
            grid = imaging.affine_grid(
                n, side, photos,
                degrees=degrees, scale=1 / span, shift=shift, flip=flip,
                aspect=torch.exp(rand(n, -0.2, 0.65, photos) * odd),
                elastic=rand(n, 0, 8, photos) * odd,
            )  # fmt: skip
            # A head that turns: one half of the face grows narrow.
            bend = column(rand(n, -0.45, 0.45, photos) * odd)[:, 0]
            inside = grid[..., 0].clamp(-1, 1)
            grid = torch.stack((grid[..., 0] + bend * (1 - inside.square()), grid[..., 1]), 3)
            drawn_mask = imaging.sample(torch.ones_like(layer[:, :1]), grid) * (1 - bare)
            drawn_mask = drawn_mask * (1 - column(odd) * halves(n, side, photos))
            drawn = imaging.sample(layer, grid, "border")
            canvas = canvas * (1 - drawn_mask) + drawn * drawn_mask
            cover = torch.maximum(cover, drawn_mask)
            place = placed(face[:, :, :14], degrees, 1 / span, shift, flip, side)
            for index, rows_before in enumerate(known):
                free[index] &= _under(drawn_mask, rows_before, side).amax(2) < 0.3
            known.append(place)
            whole = _under(drawn_mask, place, side).amin(2) > 0.9
            free.append(valid & whole & (odd[:, None] == 0))
        return canvas.clamp(0, 1), cover, _filled(torch.cat(known, 1), torch.cat(free, 1))


def placed(
    faces: Tensor, degrees: Tensor, scale: Tensor, shift: Tensor, flip: Tensor, side: int
) -> Tensor:
    """Where ``affine_grid`` of these arguments puts faces [N, K, 14] of a 250-pixel photo in a
    scene of ``side``; boxes stay upright, around the turned ones."""
    angle = degrees * (math.pi / 180)
    mirror = 1 - 2 * flip.float()
    cos, sin = torch.cos(angle), torch.sin(angle)
    points = torch.cat((faces[..., :2] + faces[..., 2:4] / 2, faces[..., 4:]), 2)
    points = points.unflatten(2, (6, 2)) * (2 / PHOTO) - 1
    points = (points - 2 * shift[:, None, None]) * scale[:, None, None, None]
    x, y = points.unbind(3)
    c, s, m = (v[:, None, None] for v in (cos, sin, mirror))
    # The inverse of the rows (cos m, -sin; sin m, cos), whose determinant is m.
    u, v = (c * x + s * y) * m, c * y - s * x
    out = (torch.stack((u, v), 3) + 1) * (side / 2)
    size = faces[..., 2:4] * (scale * side / PHOTO)[:, None, None]
    c2, s2 = cos.square()[:, None], sin.square()[:, None]
    w2, h2 = size[..., 0].square(), size[..., 1].square()
    extent = torch.stack((w2 * c2 + h2 * s2, w2 * s2 + h2 * c2), 2).sqrt()
    five = out[:, :, 1:]
    swapped = five[:, :, [1, 0, 2, 4, 3]]
    five = torch.where(flip[:, None, None, None], swapped, five)
    return torch.cat((out[:, :, 0] - extent / 2, extent, five.flatten(2)), 2)


def _under(mask: Tensor, rows: Tensor, side: int) -> Tensor:
    """[N, M, 6]: ``mask`` [N, 1, side, side] at each face's middle and landmarks; 0 outside."""
    points = torch.cat((rows[..., :2] + rows[..., 2:4] / 2, rows[..., 4:]), 2).unflatten(2, (6, 2))
    return F.grid_sample(mask, points * (2 / side) - 1, "nearest", align_corners=False)[:, 0]


def with_known(
    heads: DenseHeads, score: Tensor, faces: Faces, worth: Tensor, side: int
) -> tuple[DenseHeads, Tensor]:
    """Add to YuNet's answer (``score`` [N, A] its probabilities) the known faces that it gave
    less than it could: turned ones, and small ones. ``worth`` [N, M]: a face's probability.
    Where its own answer is about a known face, the face's place and landmarks are put right:
    those that it gave the face upright and at full size are better."""
    steps, places, levels = [], [], []
    for level, stride in enumerate(STRIDES):
        at = torch.arange(side // stride, device=score.device, dtype=torch.float32)
        y, x = torch.meshgrid(at, at, indexing="ij")
        places.append(torch.stack((x, y), 2).reshape(-1, 2))
        steps.append(torch.full((at.numel() ** 2,), float(stride), device=score.device))
        levels.append(torch.full((at.numel() ** 2,), level, device=score.device))
    grid, step, level_of = torch.cat(places), torch.cat(steps), torch.cat(levels)
    size = (faces.rows[..., 2] * faces.rows[..., 3]).sqrt()
    centre = faces.rows[..., :2] + faces.rows[..., 2:4] / 2
    level_own = (size > LEVELS[0]).long() + (size > LEVELS[1]).long()
    apart = (centre[:, :, None] - (grid * step[:, None])[None, None]).abs().amax(3)
    told = (score[:, None] * (apart < 0.3 * size[..., None])).amax(2)
    wanting = faces.seen & (told < 0.5 * worth) & (worth > 0)
    reach = torch.maximum(0.18 * size[..., None], 0.6 * step[None, None])
    mine = (apart < reach) & (level_of[None, None] == level_own[..., None]) & wanting[..., None]
    hit, which = (mine * worth[..., None]).max(1)
    use = hit > score
    about = (apart < 0.3 * size[..., None]) & faces.seen[..., None]
    nearest = torch.where(about, apart / size.clamp(min=1)[..., None], torch.inf).min(1)
    own = (score > 0.1) & torch.isfinite(nearest.values) & ~use
    which = torch.where(own, nearest.indices, which)
    row = faces.rows.gather(1, which[..., None].expand(-1, -1, 14))
    middle = row[..., :2] + row[..., 2:4] / 2
    box = torch.cat(
        (middle / step[:, None] - grid, (row[..., 2:4] / step[:, None]).clamp(min=1e-3).log()), 2
    )
    points = row[..., 4:].unflatten(2, (5, 2)) / step[:, None, None] - grid[:, None]
    place = (use | own)[..., None]
    merged = DenseHeads(
        heads.cls, heads.obj,
        torch.where(place, box, heads.box.float()),
        torch.where(place, points.flatten(2), heads.points.float()),
    )  # fmt: skip
    return merged, torch.where(use, hit, score)


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
        self._faces = no_faces(size, like)
        self._error = torch.zeros(size, device=like.device)

    def draw(self, n: int) -> tuple[Tensor, Tensor, Faces]:
        """``n`` scenes [n, 3, side, side] in 0..1, their masks, and known faces.

        Drawn ones count as forgiven by half, so that what was learnt makes room.
        """
        rows = torch.randperm(len(self._error), device=self._error.device)[:n]
        self._error[rows] *= 0.5
        faces = Faces(self._faces.rows[rows], self._faces.seen[rows])
        return self._scenes[rows].float() / 255, self._cover[rows].float() / 255, faces

    def offer(self, scenes: Tensor, cover: Tensor, faces: Faces, error: Tensor, n: int) -> None:
        """Put the ``n`` worst of a batch in the place of the ``n`` least bad kept ones."""
        worst, best = error.topk(n).indices, (-self._error).topk(n).indices
        better = error[worst] > self._error[best]
        rows, picks = best[better], worst[better]
        self._scenes[rows] = (scenes[picks] * 255).round().to(torch.uint8)
        self._cover[rows] = (cover[picks] * 255).round().to(torch.uint8)
        self._faces.rows[rows], self._faces.seen[rows] = faces.rows[picks], faces.seen[picks]
        self._error[rows] = error[picks]


@dataclass(frozen=True)
class Lesson:
    """A batch of scenes ``canvas`` in 0..1, as YuNet sees them, and as the student does, with
    YuNet's answer and what is known beside."""

    canvas: Tensor
    cover: Tensor
    faces: Faces
    seen: Tensor
    target: DenseHeads
    score: Tensor


def worst_error(student: DenseHeads, target: Tensor) -> Tensor:
    """[N]: the highest probability that the student gives where the target has no face, or
    half of the most that it lacks where there is one, whichever is more."""
    p = student.cls.detach().float().sigmoid() * student.obj.detach().float().sigmoid()
    return torch.maximum((p * (target < 0.1)).amax(1), 0.5 * (target - p).amax(1))


def soften(scenes: Tensor) -> tuple[Tensor, Tensor]:
    """What lenses and coding do to some of the scenes: blur, grain, compression. And [N]: how
    many pixels a thing needs to be seen beside what that took."""
    x = scenes.clone()
    n = len(x)
    need = torch.full((n,), 9.0, device=x.device)

    def rows(share: float) -> Tensor:
        return torch.randperm(n, device=x.device)[: max(1, int(n * share))]

    for _ in range(2):
        soft = rows(0.12)
        sigma = math.exp(random.uniform(-1.0, 1.8))
        x[soft] = imaging.gaussian_blur(x[soft], sigma)
        need[soft] += 6 * sigma
    grain = rows(0.12)
    x[grain] = imaging.noise(x[grain], rand(len(grain), 0.005, 0.08, x))
    need[grain] += 4
    packed = rows(0.3)
    x[packed] = imaging.jpeg(x[packed], rand(len(packed), 12, 90, x))
    need[packed] += 4
    return x, need


def light(scenes: Tensor) -> Tensor:
    """What light and sensors do to four fifths of the scenes: colour, contrast, uneven light,
    infrared, haze, night. A student that is asked for what YuNet saw before learns to see it."""
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
    x[lit] = (x[lit] * (0.9 + 0.6 * field).clamp(0.08, 1.6)).clamp(0, 1)
    grey = rows(0.15)
    x[grey] = x[grey].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    veiled = rows(0.08)
    thick = column(rand(len(veiled), 0.1, 0.7, x))
    x[veiled] = x[veiled] * (1 - thick) + thick * column(rand(len(veiled), 0.5, 0.9, x))
    night = rows(0.3)
    dim = rand(len(night), 0.06, 0.5, x)
    x[night] = imaging.expose(x[night], dim, rand(len(night), 1, 1.4, x))
    x[night] = imaging.noise(x[night], rand(len(night), 0.0, 0.25, x) * dim)
    out[some] = (x * 255).round() / 255
    return out


def anchor_cover(cover: Tensor) -> Tensor:
    """[N, A]: how much of each anchor's cell is photo."""
    return torch.cat([F.avg_pool2d(cover, stride).flatten(1) for stride in STRIDES], 1)


def held(
    target: DenseHeads, score: Tensor, before: DenseHeads, cover: Tensor
) -> tuple[DenseHeads, Tensor]:
    """What is asked for, where a photo lies no less than what the network said ``before``:
    [N, A] the probabilities of that, and boxes and landmarks as they were then."""
    kept = (before.cls * before.obj).float() * (anchor_cover(cover) > 0.5)
    more = (kept > score)[..., None]
    merged = DenseHeads(
        target.cls, target.obj,
        torch.where(more, before.box.float(), target.box.float()),
        torch.where(more, before.points.float(), target.points.float()),
    )  # fmt: skip
    return merged, torch.maximum(score, kept)


def distillation_loss(
    student: DenseHeads, teacher: DenseHeads, target: Tensor, against: float = 1.0
) -> Tensor:
    """``student`` in logits, ``teacher`` in probabilities, ``target`` [N, A] its scores.
    ``against``: how much more a face counts that is none."""
    log_p = F.logsigmoid(student.cls.float()) + F.logsigmoid(student.obj.float())
    log_p = log_p.clamp(max=-1e-5)
    p = log_p.exp()
    cross = -(target * log_p + (1 - target) * torch.log1p(-p))
    # Subtracting the target's own entropy changes no gradient but shows when it fits.
    amount = target.sum().clamp(min=1)
    weight = torch.where(target < 0.05, against, 1.0)
    score = (cross * (p.detach() - target).abs() * weight).sum() / amount
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
    shape = (box.sum(1, keepdim=True) + 1.0 * points.sum(1, keepdim=True)) * weight
    return score + 2.0 * shape.sum() / amount


CLUTTER = 1200
"""Pictures drawn to be grounds."""
MINED = 4000
"""Of a refining run: kept of those that are drawn meanwhile."""


def first_grounds(data: Path, device: torch.device, options: Options, seed: int) -> Grounds:
    """Drawn pictures; of a refining run those of real things too, and room for more."""
    count = 24 if options.limit else CLUTTER
    drawn = torch.from_numpy(clutter(count // 4 if options.refine else count, GROUND, seed))
    if not options.refine:
        return Grounds(drawn.permute(0, 3, 1, 2).contiguous().to(device))
    things = torch.from_numpy(load_things(data, options.limit))
    room = drawn[torch.arange(4 * count if options.limit else MINED) % len(drawn)]
    pictures = torch.cat((room, things)).permute(0, 3, 1, 2).contiguous().to(device)
    return Grounds(pictures, real=len(things))


def between(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """The state that lies ``share`` of the way from ``one`` to ``other``, which went on from it:
    better than the other at what only the one was taught, and the reverse."""
    return {
        name: torch.lerp(value, other[name], share) if value.is_floating_point() else value
        for name, value in one.items()
    }


def faces_of(photos: Photos, most: int = 4) -> Tensor:
    """[N, ``most``, 15]: the faces of each photo, its subject first, padded with zeros."""
    out = torch.zeros(len(photos.pictures), most, 15)
    for index, main in enumerate(torch.from_numpy(photos.main_face())):
        rows = torch.from_numpy(photos.faces[photos.first[index] : photos.first[index + 1]])
        others = rows[(rows[:, :2] - main[:2]).abs().sum(1) > 0][: most - 1]
        out[index, 0], out[index, 1 : 1 + len(others)] = main, others
    return out


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
        faces_of(photos),
        first_grounds(data, device, options, seed),
        bare=1 / 3 if options.refine else 1 / 6,
    )
    teacher = load_yunet(data / "models" / "yunet_n.pth").to(device)
    network = YuNet(WIDTHS).to(device, memory_format=torch.channels_last)
    before = load_state(options.resume) if options.resume else teacher.state_dict()
    network.load_state_dict(grown_state(network, before), strict=False)
    network.eval()
    first = Average(network, 0.0).network if options.refine else None
    average = Average(network, 0.998)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        decay_groups(network, 1e-3), lr=options.rate, betas=(0.9, 0.98), fused=fused
    )
    bank = HardScenes(16 * options.batch, options.side, scenes.photos)

    large = options.side * LARGE_SIDE // 320

    @torch.no_grad()
    def lesson(again: tuple[Tensor, Tensor, Faces] | None) -> Lesson:
        if drawing and scenes.grounds and (drawn := drawing.taken()) is not None:
            scenes.grounds.learn(network, drawn)
        draw = random.random()
        side, n = options.side, options.batch - (len(again[0]) if again else 0)
        if draw < LARGE:
            side, n, again = large, max(6, options.batch // 4), None
        if random.random() < MOSAIC:
            canvas, cover, faces = scenes.mosaic(n, side)
        else:
            canvas, cover, faces = scenes.compose(n, side)
        canvas, need = soften(canvas)
        size = (faces.rows[..., 2] * faces.rows[..., 3]).sqrt()
        # What is left of a face after that: none is asked for that nobody would see.
        faces = Faces(faces.rows, faces.seen & (size >= need[:, None]))
        if again:
            canvas, cover = torch.cat((canvas, again[0])), torch.cat((cover, again[1]))
            faces = Faces(*(torch.cat(pair) for pair in zip(faces, again[2], strict=True)))
        target = teacher((canvas * 255).contiguous(memory_format=torch.channels_last))
        score = (target.cls * target.obj).float() * (anchor_cover(cover) > 0.5)
        size = (faces.rows[..., 2] * faces.rows[..., 3]).sqrt()
        # The smaller, the less sure: a score of .7 (probability .5) at 9 pixels, .9 from 16.
        worth = (0.5 + (size - 9) / 7 * 0.32).clamp(0.5, 0.82) * faces.seen
        target, score = with_known(target, score, faces, worth, side)
        if first is not None:
            shown = (canvas * 255).contiguous(memory_format=torch.channels_last)
            target, score = held(target, score, first(shown), cover)
        seen = (light(canvas) * 255).contiguous(memory_format=torch.channels_last)
        return Lesson(canvas, cover, faces, seen, target, score)

    log: list[dict[str, float]] = []
    step, saved, begun = 0, time.time(), time.time()
    # The batch norms keep YuNet's statistics: batches of crowds, of close-ups and of textures have
    # each their own, which no other picture has.
    threads = torch.get_num_threads()
    # The next batch is made while this one is learnt. Only its maker draws random numbers
    # meanwhile, so that a seed still fixes them all.
    with (
        drawers(options.drawers, GROUND, seed) if options.refine else nullcontext() as drawing,
        ThreadPoolExecutor(1, initializer=lambda: torch.set_num_threads(threads)) as maker,
    ):
        coming = maker.submit(lesson, None)
        while not clock.over:
            set_rate(optimizer, cosine_rate(clock.progress, options.rate))
            now = coming.result()
            hard = min(options.hard, options.batch // 4) if step >= 32 else 0
            coming = maker.submit(lesson, bank.draw(hard) if hard else None)
            half = options.half and clock.progress < EXACT
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                answer = network.logits(now.seen)
            loss = distillation_loss(answer, now.target, now.score, AGAINST if first else 1.0)
            if now.canvas.shape[-1] == options.side:
                worst = worst_error(answer, now.score)
                bank.offer(now.canvas, now.cover, now.faces, worst, options.batch // 6)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            average.update(network)
            step += 1
            if step % 100 == 0 or step == 1:
                row = {"step": step, "s": time.time() - begun, "loss": loss.item()}
                log.append(row)
                (out / "detector-log.json").write_text(json.dumps(log))
                print("detector", json.dumps(row), flush=True)
            if time.time() - saved > options.save_every_s:
                save(out / "detector.pt", state=half_state(average.network), step=step)
                saved = time.time()
    if first is not None:
        average.network.load_state_dict(
            between(first.state_dict(), average.network.state_dict(), options.between)
        )
    save(out / "detector.pt", state=half_state(average.network), step=step, finished=True)
    return average.network
