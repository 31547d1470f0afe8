"""Picture operations on batches, on whatever device the batch is.

Pictures are float [N, 3, H, W], BGR, 0..1. Functions return new tensors and clamp only
where they say so. Randomness comes from the generators of the caller's device.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def rand(n: int, low: float, high: float, like: Tensor) -> Tensor:
    """[n] uniform in [low, high)."""
    return torch.rand(n, device=like.device) * (high - low) + low


def column(values: Tensor) -> Tensor:
    """[n] -> [n, 1, 1, 1]."""
    return values[:, None, None, None]


def gaussian_blur(pictures: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``sigma`` pixels, the same for the whole batch; borders mirrored."""
    radius = max(1, min(math.ceil(3 * sigma), pictures.shape[-1] - 1))
    at = torch.arange(-radius, radius + 1, device=pictures.device, dtype=pictures.dtype)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    n, c, h, w = pictures.shape
    flat = pictures.reshape(n * c, 1, h, w)
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="reflect"), kernel[None, None, None])
    flat = F.conv2d(
        F.pad(flat, (0, 0, radius, radius), mode="reflect"), kernel[None, None, :, None]
    )
    return flat.reshape(n, c, h, w)


def low_resolution(pictures: Tensor, size: int, *, up: str = "bilinear") -> Tensor:
    """Scale down to ``size`` pixels (area mean) and up again with ``up``."""
    small = F.interpolate(pictures, size=(size, size), mode="area")
    full = pictures.shape[-2:]
    if up == "nearest":
        return F.interpolate(small, size=full, mode="nearest")
    return F.interpolate(small, size=full, mode=up, align_corners=False).clamp(0, 1)


def noise(pictures: Tensor, sigma: Tensor | float) -> Tensor:
    """Add Gaussian noise of standard deviation ``sigma`` (a number or [N]); clamped."""
    amount = column(sigma) if isinstance(sigma, Tensor) else sigma
    return (pictures + torch.randn_like(pictures) * amount).clamp(0, 1)


_LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
"""The luminance quantisation table of the JPEG standard (ITU-T T.81, annex K)."""


@lru_cache(maxsize=8)
def _dct(device: torch.device) -> Tensor:
    k = torch.arange(8, dtype=torch.float32)
    basis = torch.cos((2 * k[None] + 1) * k[:, None] * math.pi / 16) * 0.5
    basis[0] *= 1 / math.sqrt(2)
    return basis.to(device)


@lru_cache(maxsize=8)
def _table(device: torch.device) -> Tensor:
    return torch.tensor(_LUMINANCE, dtype=torch.float32, device=device).reshape(8, 8)


def jpeg(pictures: Tensor, quality: Tensor) -> Tensor:
    """Quantise 8x8 DCT blocks of luma and (half-resolution) chroma as JPEG does.

    ``quality`` [N] in 1..100. Sides must be multiples of 16.
    """
    x = pictures.float() * 255
    blue, green, red = x[:, 0], x[:, 1], x[:, 2]
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.stack(((blue - luma) * 0.564, (red - luma) * 0.713), 1)
    chroma = F.avg_pool2d(chroma, 2)
    scale = torch.where(quality < 50, 5000 / quality.clamp(min=1), 200 - 2 * quality) / 100
    luma = _quantise(luma[:, None] - 128, scale)[:, 0] + 128
    chroma = _quantise(chroma, scale * 1.3)
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    blue = luma + chroma[:, 0] / 0.564
    red = luma + chroma[:, 1] / 0.713
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return (torch.stack((blue, green, red), 1) / 255).clamp(0, 1).to(pictures.dtype)


def few_colours(pictures: Tensor, levels: Tensor) -> Tensor:
    """As animated pictures of a small palette show them: ``levels`` [N] steps of luma and half as
    many of each chroma, half of the pictures with the steps hidden by an ordered dither."""
    size = pictures.shape[-1]
    blue, green, red = pictures[:, 0], pictures[:, 1], pictures[:, 2]
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    bayer = torch.tensor([[0.0, 2.0], [3.0, 1.0]], device=pictures.device) / 4
    bayer = bayer.repeat(2, 2) + bayer.repeat_interleave(2, 0).repeat_interleave(2, 1) / 4
    dither = bayer.repeat(size // 4, size // 4) - 0.5
    dithered = torch.arange(len(pictures), device=pictures.device) % 2
    amount = dither * dithered[:, None, None]
    steps = levels[:, None, None]

    def stepped(plane: Tensor, count: Tensor) -> Tensor:
        return (plane * count + amount).round() / count

    luma, blue_less, red_less = (
        stepped(luma, steps), stepped(blue - luma, steps / 2), stepped(red - luma, steps / 2)
    )  # fmt: skip
    blue, red = luma + blue_less, luma + red_less
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return torch.stack((blue, green, red), 1).clamp(0, 1)


def _quantise(planes: Tensor, scale: Tensor) -> Tensor:
    n, c, h, w = planes.shape
    basis = _dct(planes.device)
    # A side which is no multiple of 8 (chroma of 112: 56) never occurs for our sizes.
    blocks = planes.reshape(n, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    steps = (_table(planes.device) * scale[:, None, None, None, None, None]).clamp(min=1)
    coefficients = torch.round((basis @ blocks @ basis.T) / steps) * steps
    blocks = basis.T @ coefficients @ basis
    return blocks.transpose(3, 4).reshape(n, c, h, w)


def smooth_field(n: int, channels: int, cells: int, size: int, like: Tensor) -> Tensor:
    """[n, channels, size, size] smooth noise of about unit deviation, ``cells`` knots a side."""
    knots = torch.randn(n, channels, cells, cells, device=like.device)
    return F.interpolate(knots, size=(size, size), mode="bicubic", align_corners=True)


def affine_grid(
    n: int,
    size: int,
    like: Tensor,
    *,
    degrees: Tensor,
    scale: Tensor,
    shift: Tensor,
    flip: Tensor | None = None,
    elastic: float | Tensor = 0.0,
    aspect: Tensor | None = None,
) -> Tensor:
    """A sampling grid [n, size, size, 2]. ``shift`` [n, 2] is in fractions of the side,
    ``scale`` > 1 enlarges the content, ``aspect`` [n] > 1 makes it narrower and as much taller,
    ``elastic`` (a number or [n]) is the warp's deviation in pixels."""
    angle = degrees * (math.pi / 180)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    mirror = torch.ones_like(cos) if flip is None else 1 - 2 * flip.float()
    wide = torch.ones_like(cos) if aspect is None else aspect
    theta = torch.stack(
        (
            torch.stack((cos * mirror * wide, -sin / wide, shift[:, 0] * 2), 1),
            torch.stack((sin * mirror * wide, cos / wide, shift[:, 1] * 2), 1),
        ),
        1,
    )
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    if isinstance(elastic, Tensor) or elastic > 0:
        amount = column(elastic) if isinstance(elastic, Tensor) else elastic
        field = smooth_field(n, 2, 5, size, like) * (amount * 2 / size)
        grid = grid + field.permute(0, 2, 3, 1)
    return grid


def sample(pictures: Tensor, grid: Tensor, padding: str = "zeros") -> Tensor:
    """Bilinear sampling, borders black unless said."""
    return F.grid_sample(pictures, grid, "bilinear", padding, align_corners=False)


def expose(pictures: Tensor, gain: Tensor | float, gamma: Tensor | float = 1.0) -> Tensor:
    """``(picture ** gamma) * gain``, clipped like a sensor does."""
    gain_ = column(gain) if isinstance(gain, Tensor) else gain
    gamma_ = column(gamma) if isinstance(gamma, Tensor) else gamma
    return (pictures.clamp(1e-4, 1) ** gamma_ * gain_).clamp(0, 1)


def sharpen(pictures: Tensor, amount: Tensor) -> Tensor:
    """Unsharp mask of radius 1."""
    return (pictures + column(amount) * (pictures - gaussian_blur(pictures, 1.0))).clamp(0, 1)


def rectangle_mask(n: int, size: int, low: float, high: float, like: Tensor) -> Tensor:
    """[n, 1, size, size]: 1 inside one random rectangle each, sides in low..high of the size."""
    at = (torch.arange(size, device=like.device) + 0.5) / size
    half = torch.rand(n, 2, device=like.device) * (high - low) / 2 + low / 2
    centre = torch.rand(n, 2, device=like.device)
    inside = (at[None, None] - centre[:, :, None]).abs() < half[:, :, None]
    return (inside[:, 1, :, None] & inside[:, 0, None, :])[:, None].to(torch.float32)


def textures(n: int, size: int, like: Tensor) -> Tensor:
    """[n, 3, size, size] things that are no face: gratings, checks, cloth, blobs, noise, edges.

    Families take turns over the batch, so that any slice of it holds all of them.
    """
    device = like.device
    at = torch.linspace(-1, 1, size, device=device)
    y, x = torch.meshgrid(at, at, indexing="ij")
    angle = rand(n, 0, math.pi, like)
    period = torch.exp(rand(n, math.log(2), math.log(40), like))
    u = column(torch.cos(angle)) * x + column(torch.sin(angle)) * y
    v = column(torch.cos(angle)) * y - column(torch.sin(angle)) * x
    f = column(period) * math.pi
    field = smooth_field(n, 1, 6, size, like)
    fine = F.interpolate(
        torch.rand(n, 1, max(2, size // 6), max(2, size // 6), device=device),
        size=(size, size), mode="nearest",
    )  # fmt: skip
    grain, film = torch.rand(n, 1, size, size, device=device), torch.randn_like(field)
    first = int(torch.randint(8, (1,), device=device))
    pattern = torch.empty(n, 1, size, size, device=device)
    # Every family is drawn on its own rows alone: the other seven eighths would be thrown away.
    for family in range(8):
        rows = slice((family - first) % 8, None, 8)
        wave, cross, blobs = f[rows] * u[rows], f[rows] * v[rows], field[rows]
        if family == 0:
            drawn = 0.5 + 0.5 * torch.sin(wave)
        elif family == 1:
            drawn = (torch.sin(wave) * torch.sin(cross) > 0).float()
        elif family == 2:
            drawn = 0.5 + 0.25 * torch.sin(wave) + 0.25 * torch.sin(2.3 * cross)
        elif family == 3:
            drawn = torch.sigmoid(6 * blobs)
        elif family == 4:
            drawn = grain[rows]
        elif family == 5:
            drawn = fine[rows]
        elif family == 6:
            drawn = torch.sigmoid(20 * torch.sin(0.3 * (wave + 0.3 * f[rows] * blobs)))
        else:
            drawn = 0.5 + 0.3 * blobs + 0.15 * film[rows]
        pattern[rows] = drawn.clamp(0, 1)
    dark = torch.rand(n, 3, 1, 1, device=device) * 0.7
    light = torch.rand(n, 3, 1, 1, device=device) * 0.7 + 0.3
    shade = 1 + 0.25 * smooth_field(n, 1, 3, size, like)
    return ((dark + pattern * (light - dark)) * shade).clamp(0, 1)
