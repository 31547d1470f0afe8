"""Faces spoilt on purpose: what a recogniser's OOD score ought to tell from a clean face.

Each kind takes a chip [size, size, 3] uint8 and gives one of the same shape. Strengths are
relative to the chip's size, and what is random comes from the generator given, so that an
evaluation can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import cv2
import numpy as np

from facelane_server.models.api import U8

Damage = Callable[[U8, np.random.Generator], U8]
_CHIP: Final = 112
"""The strengths are those for a chip of this size."""


def _blur(sigma: float) -> Damage:
    def apply(chip: U8, _: np.random.Generator) -> U8:
        return _u8(cv2.GaussianBlur(chip, (0, 0), sigma * len(chip) / _CHIP))

    return apply


def _small(side: int) -> Damage:
    def apply(chip: U8, _: np.random.Generator) -> U8:
        small = cv2.resize(chip, (side, side), interpolation=cv2.INTER_AREA)
        return _u8(cv2.resize(small, chip.shape[1::-1], interpolation=cv2.INTER_LINEAR))

    return apply


def _noise(share: float) -> Damage:
    def apply(chip: U8, rng: np.random.Generator) -> U8:
        return _u8(chip + rng.normal(0.0, 255.0 * share, chip.shape))

    return apply


def _covered(top: float, bottom: float) -> Damage:
    def apply(chip: U8, _: np.random.Generator) -> U8:
        out = chip.copy()
        out[round(top * len(chip)) : round(bottom * len(chip))] = 0
        return out

    return apply


def _exposed(factor: float) -> Damage:
    def apply(chip: U8, _: np.random.Generator) -> U8:
        return _u8(chip * factor)

    return apply


def _turned(quarters: int) -> Damage:
    def apply(chip: U8, _: np.random.Generator) -> U8:
        return np.ascontiguousarray(np.rot90(chip, quarters))

    return apply


def _moved(chip: U8, rng: np.random.Generator) -> U8:
    """A streak in a random direction, a seventh of the chip long."""
    length = max(3, len(chip) // 7) | 1
    kernel = np.zeros((length, length), np.float32)
    kernel[length // 2] = 1.0 / length
    turn = cv2.getRotationMatrix2D((length // 2, length // 2), float(rng.uniform(0, 180)), 1.0)
    streak = np.asarray(cv2.warpAffine(kernel, turn, (length, length)))
    return _u8(cv2.filter2D(chip, -1, streak / streak.sum()))


def _compressed(chip: U8, _: np.random.Generator) -> U8:
    done, data = cv2.imencode(".jpg", chip, [cv2.IMWRITE_JPEG_QUALITY, 4])
    assert done
    return _u8(cv2.imdecode(data, cv2.IMREAD_COLOR))


def _sodium(chip: U8, _: np.random.Generator) -> U8:
    """Street light: little blue, less green."""
    return _u8(chip * np.array([0.25, 0.7, 1.35]))


def _scrambled(chip: U8, rng: np.random.Generator) -> U8:
    """A four by four puzzle, wrongly put together: a face's colours without a face."""
    part = len(chip) // 4
    out = chip.copy()
    for to, source in enumerate(rng.permutation(16)):
        y, x = part * (to // 4), part * (to % 4)
        v, u = part * (source // 4), part * (source % 4)
        out[y : y + part, x : x + part] = chip[v : v + part, u : u + part]
    return out


KINDS: Final[Mapping[str, Damage]] = {
    "blur, sigma 2": _blur(2.0),
    "blur, sigma 4": _blur(4.0),
    "motion blur": _moved,
    "16 pixels": _small(16),
    "10 pixels": _small(10),
    "JPEG quality 4": _compressed,
    "noise 0.1": _noise(0.1),
    "noise 0.25": _noise(0.25),
    "lower half covered": _covered(0.55, 1.0),
    "eyes covered": _covered(0.34, 0.57),
    "over-exposed": _exposed(2.5),
    "under-exposed": _exposed(0.12),
    "sodium light": _sodium,
    "upside down": _turned(2),
    "on its side": _turned(1),
    "scrambled": _scrambled,
}


def _u8(values: object) -> U8:
    return np.asarray(np.clip(np.asarray(values), 0, 255), np.uint8)
