"""The liveness model: the public MiniFASNet pair, taught small, dark, grey and coded faces.

The pair has seen real attacks and hardly a camera's film: it goes on from its own weights. A
scene is a photo placed with mirrored surroundings, a face of 15 pixels or one that fills it;
some are turned into an attack (print, replay, a sheet or screen held up); then film, light and
coding do to all of them what they do. What is asked for is the truth, of live faces and of
attacks alike: where nothing tells them apart any more, the best answer is the share of live
ones among what was shown, and the thresholds put that share between SPOOF and LIVE. On good
pictures the frozen pair is asked too, so that what it knows of real attacks stays.
"""

from __future__ import annotations

import json
import math
import random
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from facelane_server.worker.networks.architectures.minifasnet import LIVE_CLASS, MiniFASNetPair
from training import cameras, imaging
from training.clock import (
    Average,
    Clock,
    cosine_rate,
    decay_groups,
    half_state,
    load_state,
    save,
    set_rate,
)
from training.data import load_photos
from training.imaging import column, rand

NARROW, WIDE, CROP = 2.7, 4.0, 80
SIDE = 256
ATTACKS = 0.38
"""Share of attacks in a batch; one minus it is what an undecidable face should score."""
KEPT_SIZES = (40, 200)
"""Widths of faces (pixels) on which the frozen pair is asked."""
TURNED, TURN = 0.5, 25.0
"""Share of the scenes that are turned, and by how many degrees at most: a telephone is hardly ever
held upright, and a head neither."""
AT_THE_EDGE = 0.15
"""Share of the scenes whose face may be cut by the picture's edge."""
NEAR = 0.25
"""Share of the scenes with a face of more than its photo's size: filmed, these are the hardest."""


@dataclass(frozen=True)
class Options:
    batch: int = 384
    rate: float = 4e-4
    save_every_s: float = 30.0
    limit: int = 0
    resume: Path | None = None
    keep: float = 0.3
    """Weight of the frozen pair's answer on good pictures."""
    stay: float = 0.0
    """How strongly the weights are drawn to the pair's: times the learning rate, the share of the
    way back in a step. What the pair knows of real attacks no drawn attack asks for."""


def load_pair(folder: Path) -> MiniFASNetPair:
    """The public pair, frozen."""
    pair = MiniFASNetPair()
    for network, name in (
        (pair.v2, "2.7_80x80_MiniFASNetV2.pth"),
        (pair.v1se, "4_0_0_80x80_MiniFASNetV1SE.pth"),
    ):
        state = torch.load(folder / name, map_location="cpu", weights_only=True)
        network.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    for parameter in pair.parameters():
        parameter.requires_grad_(False)
    return pair.eval()


def load_student(path: Path) -> MiniFASNetPair:
    """The network of a checkpoint, as it will be shipped (fp16 weights, computed in fp32)."""
    network = MiniFASNetPair()
    network.load_state_dict(load_state(path), strict=False)
    return network.eval()


def context_crop(pictures: Tensor, boxes: Tensor, scale: float, size: int = CROP) -> Tensor:
    """Each picture's box enlarged by ``scale``, shifted inside, shrunk if it does not fit.

    ``pictures`` [N, 3, H, W]; ``boxes`` [N, 4] x, y, w, h. The arithmetic, its truncations
    included, is that of Silent-Face-Anti-Spoofing's ``CropImage`` with a bilinear resize.
    """
    height, width = pictures.shape[-2:]
    x, y, w, h = boxes.unbind(1)
    factor = torch.minimum(
        torch.minimum((height - 1) / h, (width - 1) / w), torch.full_like(w, scale)
    )
    new_w, new_h = w * factor, h * factor
    left, top = x + w / 2 - new_w / 2, y + h / 2 - new_h / 2
    right, bottom = left + new_w, top + new_h
    shift_x = (-left).clamp(min=0) - (right - (width - 1)).clamp(min=0)
    shift_y = (-top).clamp(min=0) - (bottom - (height - 1)).clamp(min=0)
    left, right = (left + shift_x).trunc(), (right + shift_x).trunc()
    top, bottom = (top + shift_y).trunc(), (bottom + shift_y).trunc()
    at = (torch.arange(size, device=pictures.device) + 0.5) / size
    gx = left[:, None] + at * (right - left + 1)[:, None]
    gy = top[:, None] + at * (bottom - top + 1)[:, None]
    n = len(boxes)
    grid = torch.stack(
        (
            (gx * 2 / width - 1)[:, None, :].expand(n, size, size),
            (gy * 2 / height - 1)[:, :, None].expand(n, size, size),
        ),
        3,
    )
    return F.grid_sample(pictures, grid, "bilinear", "border", align_corners=False)


class Scenes:
    """Photos uint8 [N, 3, 250, 250] with one face box each, on the device."""

    def __init__(self, photos: Tensor, boxes: Tensor) -> None:
        self.photos, self.boxes = photos, boxes

    def compose(self, n: int, *, upright: bool = False) -> tuple[Tensor, Tensor]:
        """[n, 3, 256, 256] in 0..1 and the face's box [n, 4] in it. ``upright``: none is turned
        or cut by the picture's edge.

        The last quarter shows the photo as it is, upright in the middle at its own scale.
        """
        device = self.photos.device
        picks = torch.randint(len(self.photos), (n,), device=device)
        photo = self.photos[picks].float().div(255)
        box = self.boxes[picks]
        scale = torch.exp(rand(n, math.log(0.16), math.log(2.6), photo))
        near = torch.rand(n, device=device) < NEAR
        scale = torch.where(near, torch.exp(rand(n, 0.0, math.log(2.6), photo)), scale)
        flip = torch.rand(n, device=device) < 0.5
        plain = torch.arange(n, device=device) >= n - n // 4
        scale = torch.where(plain, torch.ones_like(scale), scale)
        turn = (torch.rand(n, device=device) * 2 - 1) * math.radians(TURN)
        turn = turn * (torch.rand(n, device=device) < TURNED)
        turn = torch.where(plain | upright, torch.zeros_like(turn), turn)
        cos, sin = torch.cos(turn)[:, None], torch.sin(turn)[:, None]
        # The scene's centre, in photo pixels, wanders around the face's centre.
        centre = box[:, :2] + box[:, 2:] / 2
        edge = torch.rand(n, device=device) < (0 if upright else AT_THE_EDGE)
        # A third of a face, at most, lies outside the picture.
        far = (SIDE - 0.3 * box[:, 2:].amax(1) * scale).clamp(min=0.35 * SIDE)
        reach = torch.where(edge, far, torch.full_like(far, 0.35 * SIDE)) / scale
        centre = centre + (torch.rand(n, 2, device=device) - 0.5) * reach[:, None]
        middle = torch.full_like(centre, photo.shape[-1] / 2)
        centre = torch.where(plain[:, None], middle, centre)
        at = torch.arange(SIDE, device=device) + 0.5 - SIDE / 2
        mirror = torch.where(flip, -1.0, 1.0)[:, None]
        # Of a pixel of the scene: mirrored, turned, shrunk.
        u = (at[None] * mirror)[:, None, :].expand(n, SIDE, SIDE)
        v = at[None, :, None].expand(n, SIDE, SIDE)
        c, s, k = (value[:, :, None] for value in (cos, sin, scale[:, None]))
        gx = column(centre[:, 0])[:, 0] + (c * u - s * v) / k
        gy = column(centre[:, 1])[:, 0] + (s * u + c * v) / k
        grid = torch.stack((gx, gy), 3) * (2 / photo.shape[-1]) - 1
        scene = F.grid_sample(photo, grid, "bilinear", "reflection", align_corners=False)
        away = (box[:, :2] + box[:, 2:] / 2 - centre) * scale[:, None]
        across = (cos * away[:, :1] + sin * away[:, 1:]) * mirror
        middle = torch.cat((across, cos * away[:, 1:] - sin * away[:, :1]), 1) + SIDE / 2
        # The upright box around a turned ellipse.
        wide, high = (box[:, 2:] * scale[:, None]).split(1, 1)
        extent = torch.cat(
            (torch.hypot(wide * cos, high * sin), torch.hypot(high * cos, wide * sin)), 1
        )
        # Twice what the boxes of two detectors differ by on the same faces.
        jitter = 1 + 0.06 * torch.randn(n, 4, device=device)
        extent = extent * jitter[:, 2:]
        corner = middle - extent / 2 + extent * (jitter[:, :2] - 1)
        return scene, torch.cat((corner, extent), 1)


def film(scenes: Tensor, hardest: float = 1.0) -> Tensor:
    """What light, lenses, film and coding do, to live faces and attacks alike."""
    x = scenes.clamp(1e-4, 1)
    n = len(x)

    def rows(share: float) -> Tensor:
        return torch.randperm(n, device=x.device)[: max(1, int(n * share))]

    x = x ** column(torch.exp(rand(n, -0.35, 0.35, x)))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * column(torch.exp(rand(n, -0.3, 0.2, x))) + mean
    x = x * (1 + 0.06 * torch.randn(n, 3, 1, 1, device=x.device)) + column(rand(n, -0.06, 0.06, x))
    x = x.clamp(0, 1)
    warm = rows(0.2)
    x[warm] = x[warm] * torch.exp(0.3 * torch.randn(len(warm), 3, 1, 1, device=x.device))
    grey = rows(0.15)
    x[grey] = x[grey].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    night = rows(0.35)
    gain = torch.exp(rand(len(night), math.log(0.1), 0.0, x) * hardest)
    x[night] = imaging.noise(x[night].clamp(0, 1) * column(gain), 0.02 * gain)
    x = x.clamp(0, 1)
    for kind in (cameras.motion, cameras.defocus, cameras.soft, cameras.haze):
        some = rows(0.05)
        x[some] = kind(x[some], 0.7 * hardest * random.random())
    for _ in range(2):
        some = rows(0.1)
        x[some] = imaging.gaussian_blur(x[some], random.uniform(0.3, 1.2))
    some = rows(0.25)
    x[some] = imaging.noise(x[some], rand(len(some), 0.003, 0.03, x))
    some = rows(0.45)
    x[some] = imaging.jpeg(x[some], rand(len(some), 12, 95, x))
    some = rows(0.2)
    x[some] = imaging.gaussian_blur(imaging.jpeg(x[some], rand(len(some), 10, 60, x)), 0.5)
    some = rows(0.12)
    x[some] = imaging.sharpen(x[some], rand(len(some), 0.2, 1.0, x))
    some = rows(0.08)
    x[some] = imaging.few_colours(x[some], rand(len(some), 14, 48, x))
    return (x * 255).round() / 255


def _mesh(like: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(SIDE, device=like.device, dtype=torch.float32)
    y, x = torch.meshgrid(at, at, indexing="ij")
    return y, x


def _carrier(n: int, low: float, high: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Two crossed phases [n, 1, SIDE, SIDE] of a screen with periods low..high pixels."""
    y, x = _mesh(like)
    angle = rand(n, 0, math.pi / 2, like)
    period = torch.exp(rand(n, math.log(low), math.log(high), like))
    cos, sin = column(torch.cos(angle)), column(torch.sin(angle))
    turn = column(2 * math.pi / period)
    return turn * (cos * x + sin * y), turn * (cos * y - sin * x)


def _edge(scenes: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Inside mask [n, 1, S, S] of a sheet or screen around the face, and its border band."""
    n = len(scenes)
    y, x = _mesh(scenes)
    centre = boxes[:, :2] + boxes[:, 2:] / 2
    half = boxes[:, 2:] * (torch.rand(n, 2, device=scenes.device) * 0.9 + 0.65)
    angle = column(rand(n, -0.3, 0.3, scenes))
    dx, dy = x - column(centre[:, 0]), y - column(centre[:, 1])
    u = torch.cos(angle) * dx + torch.sin(angle) * dy
    v = torch.cos(angle) * dy - torch.sin(angle) * dx
    outside = torch.maximum(u.abs() - column(half[:, 0]), v.abs() - column(half[:, 1]))
    inside = torch.sigmoid(-2 * outside)
    band = column(rand(n, 2, 14, scenes))
    return inside, torch.sigmoid(2 * (band - outside)) - inside


def _surround(n: int, like: Tensor) -> Tensor:
    plain = torch.rand(n, 3, 1, 1, device=like.device).expand(n, 3, SIDE, SIDE)
    shade = 1 + 0.2 * imaging.smooth_field(n, 1, 3, SIDE, like)
    texture = imaging.textures(n, SIDE, like)
    use = column((torch.rand(n, device=like.device) < 0.5).float())
    return ((plain * use + texture * (1 - use)) * shade).clamp(0, 1)


def spots(x: Tensor, boxes: Tensor) -> Tensor:
    """[n, 1, S, S]: how much of each pixel is burnt out by two lamps near the face, as a screen, a
    glossy print or a wall shows them: small and hard ones, wide and soft ones."""
    n = len(x)
    y, across = _mesh(x)
    centre, width = boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2]
    out = torch.zeros(n, 1, SIDE, SIDE, device=x.device)
    for _ in range(2):
        place = centre + (torch.rand(n, 2, device=x.device) - 0.5) * 2.4 * boxes[:, 2:]
        size = width * torch.exp(rand(n, math.log(0.03), math.log(0.7), x))
        flat, angle = column(rand(n, 0.4, 1.0, x)), column(rand(n, 0, math.pi, x))
        dx, dy = across - column(place[:, 0]), y - column(place[:, 1])
        along = torch.cos(angle) * dx + torch.sin(angle) * dy
        beside = (torch.cos(angle) * dy - torch.sin(angle) * dx) / flat
        far = (along.square() + beside.square()).sqrt() / column(size)
        hard = column((size < 0.15 * width).float())
        lamp = hard * torch.sigmoid((1 - far) * column(size).clamp(min=2)) + (1 - hard) * torch.exp(
            -far.square()
        ) * column(rand(n, 0.2, 0.9, x))
        out = torch.maximum(out, lamp * column((torch.rand(n, device=x.device) < 0.6).float()))
    return out


def glossy(x: Tensor, boxes: Tensor) -> Tensor:
    """What lies before it, mirrored in a smooth surface: lamps, and faintly another scene."""
    n = len(x)
    seen = imaging.gaussian_blur(x.roll(2, 0).flip(3), random.uniform(1.0, 5.0))
    amount = column(rand(n, 0.0, 0.22, x) * (torch.rand(n, device=x.device) < 0.6))
    x = x * (1 - 0.5 * amount) + amount * seen
    lamps = spots(x, boxes)
    return (x * (1 - lamps) + lamps).clamp(0, 1)


def print_attack(scenes: Tensor, boxes: Tensor) -> Tensor:
    """A photo on paper: halftone dots or dithering, flat contrast, paper tint, curl, edge."""
    n = len(scenes)
    x = imaging.gaussian_blur(scenes, random.uniform(0.4, 1.2))
    u, v = _carrier(n, 2.2, 6.0, x)
    dots = torch.sin(u) * torch.sin(v)
    lines = torch.sin(u)
    # Dots, lines, grain, or a glossy print whose grid is too fine to be seen.
    kind = column(torch.randint(4, (n,), device=x.device).float())
    screen = torch.where(kind == 0, dots, torch.where(kind == 1, lines, torch.zeros_like(dots)))
    grain = 0.08 * torch.randn(n, 1, SIDE, SIDE, device=x.device) * (kind == 2)
    hard = torch.sigmoid((x - 0.5 + 0.35 * screen) * 6)
    strength = column(rand(n, 0.15, 0.6, x)) * (kind < 2)
    x = x * (1 - strength) + hard * strength + grain
    low = column(rand(n, 0.08, 0.3, x))
    high = column(rand(n, 0.65, 0.92, x))
    x = low + x.clamp(0, 1) * (high - low)
    tint = 1 + torch.tensor([-0.08, 0.0, 0.05], device=x.device)[None, :, None, None] * column(
        rand(n, -0.6, 1.4, x)
    )
    x = x * tint * (1 + 0.12 * imaging.smooth_field(n, 1, 3, SIDE, x))
    inside, band = _edge(x, boxes)
    x = torch.where(kind == 3, glossy(x, boxes), x)
    edged = column((torch.rand(n, device=x.device) < 0.6).float())
    framed = x * inside + band * 0.9 + _surround(n, x) * (1 - inside - band).clamp(min=0)
    return (framed * edged + x * (1 - edged)).clamp(0, 1)


def replay_attack(scenes: Tensor, boxes: Tensor) -> Tensor:
    """A photo on a screen: moire, subpixels, bezel, glare, blue tint, low dynamic range."""
    n = len(scenes)
    x = scenes
    u, v = _carrier(n, 2.0, 9.0, x)
    second, _ = _carrier(n, 2.0, 5.0, x)
    amount = column(rand(n, 0.03, 0.16, x))
    phase = torch.tensor([0.0, 2.1, 4.2], device=x.device)[None, :, None, None]
    coloured = column((torch.rand(n, device=x.device) < 0.5).float())
    moire = torch.sin(u + phase * coloured) + 0.7 * torch.sin(second + 0.3 * v)
    x = x * (1 + amount * moire) + 0.3 * amount * moire
    low = column(rand(n, 0.02, 0.2, x))
    high = column(rand(n, 0.6, 0.98, x))
    x = low + x.clamp(0, 1) ** column(rand(n, 0.7, 1.3, x)) * (high - low)
    x = x * (
        1
        + torch.tensor([0.1, 0.0, -0.08], device=x.device)[None, :, None, None]
        * column(rand(n, -0.5, 1.5, x))
    )
    y, xx = _mesh(x)
    cx, cy = column(rand(n, 0, SIDE, x)), column(rand(n, 0, SIDE, x))
    radius = column(rand(n, 15, 70, x))
    glare = torch.exp(-(((xx - cx) ** 2 + (y - cy) ** 2) / (2 * radius**2)))
    x = x + glare * column(rand(n, 0.0, 0.7, x)) * column(
        (torch.rand(n, device=x.device) < 0.5).float()
    )
    mirror = column((torch.rand(n, device=x.device) < 0.4).float())
    x = glossy(x, boxes) * mirror + x * (1 - mirror)
    inside, band = _edge(x, boxes)
    bezel = column(rand(n, 0.0, 0.15, x))
    edged = column((torch.rand(n, device=x.device) < 0.6).float())
    framed = x * inside + band * bezel + _surround(n, x) * (1 - inside - band).clamp(min=0)
    x = (framed * edged + x * (1 - edged)).clamp(0, 1)
    rows = torch.randperm(n, device=x.device)[: n // 3]
    x[rows] = imaging.gaussian_blur(x[rows], random.uniform(0.4, 1.0))
    return x


def _polygon(n: int, dx: Tensor, dy: Tensor) -> Tensor:
    """[n, 1, S, S]: how far outside a polygon of three to eight straight sides around the face
    each pixel lies, in box widths (negative inside)."""
    sides = random.randint(3, 8)
    turn = rand(n, 0, 2 * math.pi, dx)
    outside = torch.full_like(dx, -10.0)
    for side in range(sides):
        angle = column(turn + 2 * math.pi * side / sides + 0.35 * (torch.rand_like(turn) - 0.5))
        # The polygon's sides keep 0.5 to 1.2 box widths from the face's middle.
        reach = column(rand(n, 0.5, 1.2, dx))
        outside = torch.maximum(outside, torch.cos(angle) * dx + torch.sin(angle) * dy - reach)
    return outside


def _screen(n: int, dx: Tensor, dy: Tensor) -> Tensor:
    """The same for an upright or tilted telephone with rounded corners."""
    tilt = column(rand(n, -0.4, 0.4, dx))
    u = torch.cos(tilt) * dx + torch.sin(tilt) * dy - column(rand(n, -0.15, 0.15, dx))
    v = torch.cos(tilt) * dy - torch.sin(tilt) * dx - column(rand(n, -0.15, 0.15, dx))
    corner = 0.12
    a = u.abs() - column(rand(n, 0.5, 0.95, dx)) + corner
    b = v.abs() - column(rand(n, 0.6, 1.2, dx)) + corner
    beyond = (a.clamp(min=0).square() + b.clamp(min=0).square() + 1e-9).sqrt()
    return beyond + torch.maximum(a, b).clamp(max=0) - corner


def held_up_attack(scenes: Tensor, boxes: Tensor) -> Tensor:
    """A sheet or a screen held up before another scene: its edges are seen.

    The sheet is a polygon of three to eight sides or a telephone (never round and closely
    trimmed: cut-outs are kept for the test), its edge straight or torn, with or without a
    margin, and casts a soft shadow; a telephone or tablet has a dark rim up to a third of the
    face's width, and mirrors what is before it. What it shows may be as clear and as rich in
    contrast as what is behind, so that the seam is all there is to see.
    """
    n = len(scenes)
    paper = torch.arange(n, device=scenes.device) % 2 == 0
    surface = scenes.clone()
    soft = torch.randperm(n, device=scenes.device)[: max(1, n * 3 // 4)]
    surface[soft] = imaging.gaussian_blur(surface[soft], random.uniform(0.3, 1.3))
    low, high = column(rand(n, 0.0, 0.3, scenes)), column(rand(n, 0.6, 1.0, scenes))
    surface = low + surface * (high - low)
    tint = 1 + 0.06 * torch.randn(n, 3, 1, 1, device=scenes.device)
    surface = surface * tint * (1 + 0.1 * imaging.smooth_field(n, 1, 3, SIDE, scenes))
    y, x = _mesh(scenes)
    centre = boxes[:, :2] + boxes[:, 2:] / 2
    dx = (x - column(centre[:, 0])) / column(boxes[:, 2])
    dy = (y - column(centre[:, 1])) / column(boxes[:, 3])
    screen = column(torch.arange(n, device=scenes.device) % 5 < 2)
    surface = torch.where(screen, glossy(surface, boxes), surface)
    outside = torch.where(screen, _screen(n, dx, dy), _polygon(n, dx, dy))
    torn = column(rand(n, 0.01, 0.06, scenes) * (torch.rand(n, device=scenes.device) < 0.35))
    outside = outside + torn * ~screen * imaging.smooth_field(n, 1, 32, SIDE, scenes)
    outside = outside * column(boxes[:, 2])
    sheet = torch.sigmoid(-1.5 * outside)
    margin = column(rand(n, 0, 12, scenes) * (torch.rand(n, device=scenes.device) < 0.6))
    bezel = column(boxes[:, 2] * rand(n, 0.02, 0.35, scenes))
    margin = torch.where(screen, bezel, margin)
    rim = (torch.sigmoid(1.5 * (margin - outside)) - sheet).clamp(min=0)
    rim_tone = torch.where(
        column(paper) & ~screen, column(rand(n, 0.7, 1, scenes)), column(rand(n, 0, 0.2, scenes))
    )
    shadow = 1 - column(rand(n, 0, 0.4, scenes)) * torch.sigmoid((6 + margin - outside) / 3)
    behind = scenes.roll(1, 0) * shadow
    return (surface * sheet + rim * rim_tone + behind * (1 - sheet - rim).clamp(min=0)).clamp(0, 1)


def bystander(scenes: Tensor, boxes: Tensor) -> Tensor:
    """Live scenes with something straight-edged beside the face: a poster, a screen, a sheet.

    Without them every straight edge would be a sign of an attack.
    """
    n = len(scenes)
    y, x = _mesh(scenes)
    centre = boxes[:, :2] + boxes[:, 2:] / 2
    away = torch.where(torch.rand(n, 2, device=scenes.device) < 0.5, -1.0, 1.0)
    away = away * (torch.rand(n, 2, device=scenes.device) * 0.4 + 1.1)
    # On one side of the face, or above or below it; seldom on both.
    axis = torch.randint(3, (n,), device=scenes.device)
    away[:, 0] = torch.where(axis == 0, away[:, 0] * 0.3, away[:, 0])
    away[:, 1] = torch.where(axis == 1, away[:, 1] * 0.3, away[:, 1])
    size = boxes[:, 2:].mean(1, keepdim=True)
    place = centre + away * boxes[:, 2:]
    dx = (x - column(place[:, 0])) / column(size[:, 0])
    dy = (y - column(place[:, 1])) / column(size[:, 0])
    # The sides keep at most 0.65 widths from its middle, but corners reach farther: where one
    # would cover the face, the face stands before it.
    outside = _polygon(n, dx / 0.55, dy / 0.55) * column(size[:, 0])
    across = (x - column(centre[:, 0])) / column(boxes[:, 2])
    down = (y - column(centre[:, 1])) / column(boxes[:, 3])
    face = (0.6 - (across.square() + down.square()).sqrt()) * column(size[:, 0])
    outside = torch.maximum(outside, face)
    sheet = torch.sigmoid(-1.5 * outside)
    rim = (torch.sigmoid(1.5 * (column(rand(n, 0, 6, scenes)) - outside)) - sheet).clamp(min=0)
    tone = torch.rand(n, 3, 1, 1, device=scenes.device)
    shown = scenes * (1 - sheet - rim).clamp(min=0) + scenes.roll(1, 0) * sheet + rim * tone
    # Lamps burn behind living people too.
    lit = torch.arange(n, device=scenes.device) % 3 == 0
    lamps = spots(scenes, boxes) * torch.sigmoid(-face) * column(lit)
    return shown * (1 - lamps) + lamps


def held_out_attacks(scenes: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """Attacks that no training saw: newsprint (square dots, one ink), a cut-out held before
    another scene, a projector (scan lines, washed out), and a copy of a copy on paper."""
    n = len(scenes)
    y, x = _mesh(scenes)
    grey = scenes.mean(1, keepdim=True)
    period = column(rand(n, 3.0, 5.5, scenes))
    cell = ((x % period) / period - 0.5).abs() + ((y % period) / period - 0.5).abs()
    ink = torch.sigmoid((grey - cell) * 10)
    newsprint = (0.15 + 0.65 * ink) * torch.tensor([0.86, 0.95, 1.0], device=x.device)[
        None, :, None, None
    ]
    scan = 0.5 + 0.5 * torch.sin(2 * math.pi * y / column(rand(n, 2.5, 5.0, scenes)))
    projector = 0.35 + 0.5 * imaging.gaussian_blur(scenes, 1.0) * (0.75 + 0.25 * scan)
    projector = projector * torch.tensor([1.08, 1.0, 0.9], device=x.device)[None, :, None, None]
    other = scenes.roll(1, 0)
    centre = boxes[:, :2] + boxes[:, 2:] / 2
    oval = ((x - column(centre[:, 0])) / column(boxes[:, 2] * 0.75)) ** 2 + (
        (y - column(centre[:, 1])) / column(boxes[:, 3] * 0.75)
    ) ** 2
    inside = torch.sigmoid((1 - oval) * 25)
    rim = torch.sigmoid((1.12 - oval) * 25) - inside
    paper = 0.2 + 0.55 * imaging.gaussian_blur(scenes, 0.8)
    cutout = paper * inside + rim * 0.95 + other * (1 - inside - rim).clamp(min=0)
    dither = (
        (scenes - 0.5) * 0.6
        + 0.5
        + 0.14
        * torch.sin(math.pi * (x + y))
        * torch.cos(2 * math.pi * x / column(rand(n, 2.2, 3.5, scenes)))
    )
    copy = 0.25 + 0.5 * imaging.gaussian_blur(dither, 0.6) + 0.04 * torch.randn_like(scenes)
    return {
        name: value.clamp(0, 1)
        for name, value in (
            ("newsprint", newsprint),
            ("projector", projector),
            ("cutout", cutout),
            ("copy", copy),
        )
    }


def classes(network: MiniFASNetPair, scenes: Tensor, boxes: Tensor) -> Tensor:
    """[2, N, 3]: both networks' class probabilities of scenes in 0..1."""
    picture = (scenes * 255).round()
    narrow = network.v2(context_crop(picture, boxes, NARROW))
    return torch.stack((narrow, network.v1se(context_crop(picture, boxes, WIDE))))


def train(
    data: Path, out: Path, clock: Clock, device: torch.device, options: Options, seed: int = 3
) -> MiniFASNetPair:
    """Train until ``clock`` is over; checkpoints and the log go to ``out``."""
    torch.manual_seed(seed)
    random.seed(seed)
    photos = load_photos(data, held_out=False, limit=options.limit)
    faces = torch.from_numpy(photos.main_face())
    good = faces[:, 14] >= 0.7
    pictures = torch.from_numpy(photos.pictures).permute(0, 3, 1, 2)[good].contiguous().to(device)
    scenes = Scenes(pictures, faces[good][:, :4].to(device))
    pair = load_pair(data / "models").to(device)
    network = deepcopy(pair)
    if options.resume is not None:
        network.load_state_dict(load_state(options.resume), strict=False)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    average = Average(network, 0.998)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        decay_groups(network, 0.0), lr=options.rate, betas=(0.9, 0.98), fused=fused
    )
    third = max(1, round(options.batch * ATTACKS / 3))
    attacks = 3 * third
    beside = attacks + (options.batch - attacks) // 5
    truth = torch.ones(options.batch, device=device)
    truth[:attacks] = 0
    log: list[dict[str, float]] = []
    step, saved, begun = 0, time.time(), time.time()
    while not clock.over:
        set_rate(optimizer, cosine_rate(clock.progress, options.rate))
        with torch.no_grad():
            scene, boxes = scenes.compose(options.batch)
            # Attacks are made of scenes of all kinds, the plain ones too.
            order = torch.randperm(options.batch, device=device)
            scene, boxes = scene[order], boxes[order]
            kinds = (print_attack, replay_attack, held_up_attack)
            spoofs = [
                kind(scene[k * third : (k + 1) * third], boxes[k * third : (k + 1) * third])
                for k, kind in enumerate(kinds)
            ]
            poster = bystander(scene[attacks:beside], boxes[attacks:beside])
            scene = torch.cat((*spoofs, poster, scene[beside:]))
            # A quarter of each stays as it is; on faces of some size the pair knows best there.
            filmed = torch.rand(options.batch, device=device) < 0.75
            kept = ~filmed & (boxes[:, 2] >= KEPT_SIZES[0]) & (boxes[:, 2] <= KEPT_SIZES[1])
            scene = torch.where(column(filmed), film(scene), scene)
            wanted = classes(pair, scene, boxes)
        # The batch norms keep the pair's statistics: those of drawn scenes would be others.
        network.eval()
        answer = classes(network, scene, boxes)
        live = answer[..., LIVE_CLASS].clamp(1e-4, 1 - 1e-4)
        loss = F.binary_cross_entropy(live.mean(0), truth) + 0.3 * F.binary_cross_entropy(
            live, truth.expand(2, -1)
        )
        # Where the pair errs on what is known, it is not asked.
        right = ((wanted.mean(0)[:, LIVE_CLASS] > 0.5) == (truth > 0.5)) & kept
        apart = -(wanted * answer.clamp(min=1e-6).log()).sum(2).mean(0)
        loss = loss + options.keep * (apart * right).sum() / right.sum().clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        if options.stay:
            back = min(1.0, options.stay * cosine_rate(clock.progress, options.rate))
            with torch.no_grad():
                for mine, theirs in zip(network.parameters(), pair.parameters(), strict=True):
                    mine.lerp_(theirs, back)
        average.update(network)
        step += 1
        if step % 100 == 0 or step == 1:
            score = live.detach().mean(0)
            row = {
                "step": step,
                "s": time.time() - begun,
                "loss": loss.item(),
                "live_of_live": float((score[attacks:] > 0.5).float().mean()),
                "live_of_attacks": float((score[:attacks] > 0.5).float().mean()),
            }
            log.append(row)
            (out / "liveness-log.json").write_text(json.dumps(log))
            print("liveness", json.dumps(row), flush=True)
        if time.time() - saved > options.save_every_s:
            save(out / "liveness.pt", state=half_state(average.network), step=step)
            saved = time.time()
    save(out / "liveness.pt", state=half_state(average.network), step=step, finished=True)
    return average.network
