"""The damage that the OOD scores are tested on. Three kinds are in no training."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from training import imaging

SIZE = 112


def _band(top: int, bottom: int) -> Callable[[Tensor], Tensor]:
    def cover(x: Tensor) -> Tensor:
        out = x.clone()
        out[:, :, top:bottom] = 0.0
        return out

    return cover


def motion_blur(x: Tensor, length: int = 15) -> Tensor:
    """A streak of ``length`` pixels at 30 degrees."""
    kernel = torch.zeros(length, length)
    middle = length // 2
    for step in torch.linspace(-middle, middle, 4 * length):
        row = round(middle + float(step) * math.sin(math.pi / 6))
        column = round(middle + float(step) * math.cos(math.pi / 6))
        kernel[row, column] = 1.0
    kernel = (kernel / kernel.sum()).to(x)
    flat = F.pad(x.flatten(0, 1)[:, None], (middle,) * 4, mode="reflect")
    return F.conv2d(flat, kernel[None, None]).reshape(x.shape)


def colour_cast(x: Tensor) -> Tensor:
    """Strong sodium light: little blue, less green."""
    return (x * torch.tensor([0.25, 0.7, 1.35], device=x.device)[None, :, None, None]).clamp(0, 1)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "blur_2": lambda x: imaging.gaussian_blur(x, 2.0),
    "blur_4": lambda x: imaging.gaussian_blur(x, 4.0),
    "16_px": lambda x: imaging.low_resolution(x, 16),
    "10_px": lambda x: imaging.low_resolution(x, 10),
    "noise_0.1": lambda x: imaging.noise(x, 0.1),
    "noise_0.25": lambda x: imaging.noise(x, 0.25),
    "lower_half": _band(62, 112),
    "eyes": _band(38, 64),
    "upside_down": lambda x: torch.rot90(x, 2, (2, 3)),
    "rotated_90": lambda x: torch.rot90(x, 1, (2, 3)),
    "over_exposed": lambda x: imaging.expose(x, 2.5),
    "under_exposed": lambda x: imaging.noise(imaging.expose(x, 0.12), 0.01),
}
"""Damage of a clean crop; ``background`` and ``texture`` (no face at all) come beside it."""

GROSS = (
    "blur_4", "10_px", "noise_0.25", "lower_half", "eyes",
    "upside_down", "rotated_90", "background", "texture",
)  # fmt: skip
"""Kinds that leave nobody to recognise, or half of one."""

HELD_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "motion_blur": motion_blur,
    "jpeg_blocks": lambda x: imaging.jpeg(x, torch.full((len(x),), 4.0, device=x.device)),
    "colour_cast": colour_cast,
}
