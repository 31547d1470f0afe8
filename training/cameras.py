"""What cameras do to faces: twenty kinds at any strength, for training and for the tests.

A kind takes aligned crops (float [N, 3, 112, 112], BGR, 0..1) and a strength in 0..1: 0 hardly
shows, 1 leaves little of most faces. :func:`camera` gives every crop one to three of those that
are trained on; ``HELD_OUT`` are kept for the tests.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from training import imaging
from training.imaging import column, rand

Kind = Callable[[Tensor, float], Tensor]


def _between(low: float, high: float, strength: float) -> float:
    """Geometric: the eye and the networks feel ratios."""
    return low * (high / low) ** strength


def crop_px(strength: float) -> int:
    """Side of the crop as the camera saw it; a face is about two thirds of it."""
    return round(_between(72, 10, strength))


def small(x: Tensor, strength: float) -> Tensor:
    up = random.choice(("bilinear", "bicubic"))
    return imaging.low_resolution(x, crop_px(strength), up=up)


def video(x: Tensor, strength: float) -> Tensor:
    """Coded small: coarse steps in blocks that lie anywhere, thin colour, blocks filtered."""
    side = 16 * max(2, round(_between(7, 2, strength)))
    coded = F.interpolate(x, size=(side, side), mode="area")
    shift = (random.randrange(8), random.randrange(8))
    quality = torch.full((len(x),), _between(60, 9, strength), device=x.device)
    coded = imaging.jpeg(coded.roll(shift, (2, 3)), quality).roll((-shift[0], -shift[1]), (2, 3))
    coded = imaging.gaussian_blur(coded, _between(0.3, 0.7, strength))
    full = F.interpolate(coded, size=x.shape[-2:], mode="bilinear", align_corners=False)
    return full.clamp(0, 1)


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    radius = kernel.shape[-1] // 2
    flat = F.pad(x.flatten(0, 1)[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(flat, (kernel / kernel.sum()).to(x)[None, None]).reshape(x.shape)


def motion(x: Tensor, strength: float) -> Tensor:
    """A streak at any angle, slightly bent."""
    length = _between(3, 20, strength)
    radius = math.ceil(length / 2)
    kernel = torch.zeros(2 * radius + 1, 2 * radius + 1)
    angle, bend = random.uniform(0, math.pi), random.uniform(-0.4, 0.4)
    for step in range(-16, 17):
        along = step / 16
        turn = angle + bend * along
        row, at = along * length / 2 * math.sin(turn), along * length / 2 * math.cos(turn)
        kernel[round(radius + row), round(radius + at)] += 1
    return _filtered(x, kernel)


def defocus(x: Tensor, strength: float) -> Tensor:
    radius = _between(0.8, 6.0, strength)
    at = torch.arange(-math.ceil(radius), math.ceil(radius) + 1)
    far = (at[:, None].square() + at[None].square()).sqrt()
    return _filtered(x, (radius + 0.5 - far).clamp(0, 1))


def soft(x: Tensor, strength: float) -> Tensor:
    return imaging.gaussian_blur(x, _between(0.5, 4.5, strength))


def grain(x: Tensor, strength: float) -> Tensor:
    return imaging.noise(x, _between(0.02, 0.3, strength))


def dark(x: Tensor, strength: float) -> Tensor:
    out = imaging.expose(x, _between(0.6, 0.05, strength), random.uniform(1.0, 1.4))
    return (imaging.noise(out, 0.012) * 255).round() / 255


def bright(x: Tensor, strength: float) -> Tensor:
    return imaging.expose(x, _between(1.25, 4.5, strength))


def infrared(x: Tensor, strength: float) -> Tensor:
    """Grey of one's own mixture, flat, lit from the lens, glowing, with grain."""
    share = torch.rand(len(x), 3, 1, 1, device=x.device) + 0.1
    grey = (x * share / share.sum(1, keepdim=True)).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    out = grey.clamp(1e-4, 1) ** _between(0.9, 0.5, strength)
    glow = imaging.gaussian_blur(out, 4.0)
    out = out * (1 - 0.4 * strength) + glow * 0.5 * strength
    return imaging.noise(out, _between(0.005, 0.08, strength))


def grey_tight(x: Tensor, strength: float) -> Tensor:
    """Without colour and with hardly anything around the face."""
    n, size = len(x), x.shape[-1]
    grid = imaging.affine_grid(
        n, size, x,
        degrees=torch.zeros(n, device=x.device),
        scale=torch.full((n,), 1 + 0.5 * strength, device=x.device),
        shift=torch.zeros(n, 2, device=x.device),
    )  # fmt: skip
    return imaging.sample(x, grid, "border").mean(1, keepdim=True).expand(-1, 3, -1, -1)


def _grid_of(x: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(x.shape[-1], device=x.device, dtype=torch.float32)
    y, across = torch.meshgrid(at, at, indexing="ij")
    return y[None, None], across[None, None]


def _painted(x: Tensor, mask: Tensor, tone: Tensor) -> Tensor:
    shade = 1 + 0.15 * imaging.smooth_field(len(x), 1, 4, x.shape[-1], x)
    return (x * (1 - mask) + (tone * shade).clamp(0, 1) * mask).clamp(0, 1)


def mask(x: Tensor, strength: float) -> Tensor:
    """A face mask from the chin up; at full strength to above the nose's tip."""
    n = len(x)
    y, across = _grid_of(x)
    top = column(rand(n, -3, 3, x)) + 98 - 42 * strength
    bend = ((across - 56) / 56).square() * column(rand(n, 0, 14, x))
    inside = torch.sigmoid((y - top - bend) * 2) * torch.sigmoid((50 - (across - 56).abs()) / 2)
    pale, dark_tone = (
        torch.rand(n, 3, 1, 1, device=x.device) * 0.3 + 0.65,
        torch.rand_like(x[:, :, :1, :1]),
    )
    use = column((torch.rand(n, device=x.device) < 0.6).float())
    return _painted(x, inside, pale * use + dark_tone * (1 - use))


def sunglasses(x: Tensor, strength: float) -> Tensor:
    n = len(x)
    y, across = _grid_of(x)
    wide, high = 13 + 8 * strength, 8 + 6 * strength
    lens = torch.zeros(n, 1, *x.shape[-2:], device=x.device)
    power = random.choice((2, 2, 4))
    for centre in (38.3, 73.5):
        u = (across - centre - column(rand(n, -2, 2, x))) / wide
        v = (y - 53 - column(rand(n, -3, 3, x))) / high
        lens = torch.maximum(lens, torch.sigmoid((1 - u.abs() ** power - v.abs() ** power) * 6))
    bridge = torch.sigmoid(2 - (y - 49).abs()) * torch.sigmoid((45 - (across - 56).abs()) * 1)
    lens = torch.maximum(lens, bridge)
    return _painted(
        x, lens * min(1.0, 0.45 + 0.8 * strength), torch.rand_like(x[:, :, :1, :1]) * 0.25
    )


def stretch(x: Tensor, strength: float) -> Tensor:
    """The picture as it is when its aspect was got wrong, either way."""
    n, size = len(x), x.shape[-1]
    ratio = _between(1.06, 1.7, strength)
    way = torch.where(torch.rand(n, device=x.device) < 0.5, ratio, 1 / ratio)
    grid = imaging.affine_grid(
        n, size, x,
        degrees=torch.zeros(n, device=x.device), scale=torch.ones(n, device=x.device),
        shift=torch.zeros(n, 2, device=x.device), aspect=way.sqrt(),
    )  # fmt: skip
    return imaging.sample(x, grid, "reflection")


def turned(x: Tensor, strength: float) -> Tensor:
    n = len(x)
    sign = torch.where(torch.rand(n, device=x.device) < 0.5, -1.0, 1.0)
    grid = imaging.affine_grid(
        n, x.shape[-1], x,
        degrees=sign * _between(6, 70, strength), scale=torch.ones(n, device=x.device),
        shift=torch.zeros(n, 2, device=x.device),
    )  # fmt: skip
    return imaging.sample(x, grid, "reflection")


def misplaced(x: Tensor, strength: float) -> Tensor:
    """Landmarks that were off."""
    n = len(x)
    angle = rand(n, 0, 2 * math.pi, x)
    shift = torch.stack((torch.cos(angle), torch.sin(angle)), 1) * _between(0.02, 0.3, strength)
    grid = imaging.affine_grid(
        n, x.shape[-1], x,
        degrees=torch.zeros(n, device=x.device),
        scale=torch.exp(rand(n, -0.3, 0.3, x) * strength), shift=shift,
    )  # fmt: skip
    return imaging.sample(x, grid, "reflection")


def blocks(x: Tensor, strength: float) -> Tensor:
    return imaging.jpeg(x, torch.full((len(x),), _between(45, 3, strength), device=x.device))


def haze(x: Tensor, strength: float) -> Tensor:
    veil = column(rand(len(x), 0.6, 0.95, x))
    thick = min(0.93, _between(0.2, 0.95, strength))
    thick_map = (thick * (1 + 0.15 * imaging.smooth_field(len(x), 1, 3, x.shape[-1], x))).clamp(
        0, 0.97
    )
    return ((x * (1 - thick_map) + veil * thick_map) * 255).round() / 255


def hidden(x: Tensor, strength: float) -> Tensor:
    """A hand, a cup, a shoulder: something before a part of the face."""
    n, size = len(x), x.shape[-1]
    y, across = _grid_of(x)
    angle = rand(n, 0, 2 * math.pi, x)
    reach = column(rand(n, 0.9, 1.1, x)) * (52 - 50 * strength)
    along = column(torch.cos(angle)) * (across - 56) + column(torch.sin(angle)) * (y - 66)
    inside = torch.sigmoid((along - reach) / 1.5)
    texture = imaging.textures(n, size, x)
    plain = torch.rand(n, 3, 1, 1, device=x.device).expand_as(x)
    use = column((torch.rand(n, device=x.device) < 0.5).float())
    return _painted(x, inside, texture * use + plain * (1 - use))


def cast(x: Tensor, strength: float) -> Tensor:
    """Sodium light: little blue, less green."""
    far = torch.tensor([0.2, 0.65, 1.4], device=x.device)[None, :, None, None]
    return (x * (1 + (far - 1) * strength)).clamp(0, 1)


def shadow(x: Tensor, strength: float) -> Tensor:
    """Light from one side."""
    n = len(x)
    y, across = _grid_of(x)
    angle = rand(n, 0, 2 * math.pi, x)
    along = column(torch.cos(angle)) * (across - 56) + column(torch.sin(angle)) * (y - 56)
    return x * (1 - torch.sigmoid(along / 4) * min(0.97, 0.4 + 0.6 * strength))


KINDS: dict[str, Kind] = {
    "small": small, "video": video, "motion": motion, "defocus": defocus, "soft": soft,
    "grain": grain, "dark": dark, "bright": bright, "infrared": infrared,
    "grey_tight": grey_tight, "mask": mask, "sunglasses": sunglasses, "stretch": stretch,
    "turned": turned, "misplaced": misplaced, "blocks": blocks, "haze": haze, "hidden": hidden,
    "cast": cast, "shadow": shadow,
}  # fmt: skip
HELD_OUT = ("cast", "shadow")
STRENGTHS = (0.25, 0.5, 0.75, 1.0)

_ORDER: tuple[tuple[str, ...], ...] = (
    ("mask", "sunglasses", "hidden", "stretch", "turned", "misplaced", "grey_tight", "", ""),
    ("infrared", "dark", "bright", "haze", "defocus", "motion", "soft", "", ""),
    ("small", "small", "small", "video", "video", "blocks", "grain", "", ""),
)
"""As it happens: to the scene, in light and lens, in sensor and coding; "" leaves them alone."""
_EACH = (0.35, 0.5, 0.65)
"""Shares of the crops that each of the three does something to."""


def camera(pictures: Tensor, hardest: float = 1.0) -> Tensor:
    """A copy of ``pictures`` as cameras give them, strengths up to ``hardest``."""
    x = pictures.clone()
    for kinds, share in zip(_ORDER, _EACH, strict=True):
        rows = torch.randperm(len(x), device=x.device)[: round(len(x) * share)]
        for kind, part in zip(kinds, rows.tensor_split(len(kinds)), strict=True):
            if kind and len(part):
                x[part] = KINDS[kind](x[part], hardest * random.random()).to(x.dtype)
    return x
