"""What a worker is asked to see whether it still computes rightly: pictures that both sides make.

What they have for an answer says the worker itself, once, in full precision, before it goes over
to what it serves with (``known``). Detectors see a drawn face, at the top of pictures of the
heights that its canvases have; the others see the same face.
"""

from __future__ import annotations

import functools
from typing import Final

import numpy as np

from facelane_server.models.api import U8

SIDE: Final = 96
MOST_FACES: Final = 4

_RIM, _HAIR, _SKIN, _LIPS = (150, 140, 120), (40, 45, 60), (150, 180, 225), (70, 70, 170)
_BROW, _WHITE, _PUPIL, _SHADE = (50, 60, 80), (240, 240, 240), (40, 40, 50), (90, 110, 160)
# Centre and radii, of the picture's side; colour, BGR.
_BLOBS: Final = (
    (0.5, 0.38, 0.36, 0.36, _HAIR),
    (0.5, 0.52, 0.28, 0.37, _SKIN),
    (0.385, 0.40, 0.085, 0.018, _BROW),
    (0.615, 0.40, 0.085, 0.018, _BROW),
    (0.385, 0.46, 0.06, 0.03, _WHITE),
    (0.615, 0.46, 0.06, 0.03, _WHITE),
    (0.385, 0.46, 0.028, 0.028, _PUPIL),
    (0.615, 0.46, 0.028, 0.028, _PUPIL),
    (0.5, 0.635, 0.06, 0.018, _SHADE),
    (0.5, 0.735, 0.11, 0.028, _LIPS),
)


@functools.cache
def face(side: int = SIDE) -> U8:
    """A drawn face, uint8 [side, side, 3], BGR; nobody's."""
    y, x = np.mgrid[:side, :side].astype(np.float32) / side
    drawn = np.empty((side, side, 3), np.float32)
    drawn[:] = _RIM
    for across, down, width, height, colour in _BLOBS:
        beyond = ((x - across) / width) ** 2 + ((y - down) / height) ** 2 - 1.0
        # Soft edges, as a lens has them.
        share = 1.0 / (1.0 + np.exp(np.minimum(beyond / 0.06, 60.0)))
        drawn += (np.array(colour, np.float32) - drawn) * share[..., None]
    drawn *= (1.08 - 0.2 * x)[..., None]
    return drawn.clip(0, 255).astype(np.uint8)


@functools.cache
def pictures(max_side: int) -> tuple[U8, ...]:
    """For a detector: the face, on pictures for each of the canvases that a card may have."""
    found = []
    for height in (SIDE, max_side):
        picture = np.full((max(height, SIDE), SIDE, 3), 96, np.uint8)
        picture[:SIDE] = face()
        found.append(picture)
    return tuple(found)


def batch_buckets(batch_max: int) -> list[int]:
    """Powers of two up to ``batch_max``, and itself: the batch sizes that graphs exist for."""
    sizes = [1 << i for i in range(batch_max.bit_length()) if 1 << i < batch_max]
    return [*sizes, batch_max]
