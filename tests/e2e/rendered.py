"""Films of people in one place before a camera, made of portraits: each is turned and scaled so
that the eyes lie where those of all others do, and shakes a little, as cameras do."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

import facelane

Array = npt.NDArray[np.uint8]
WIDTH, HEIGHT = 640, 480
EYES = ((290.0, 210.0), (350.0, 210.0))
"""Where the eyes are: of a face some 130 pixels wide."""
WALL = 25.0
"""Sigma in pixels: of a face so blurred nothing is left."""


@dataclass(frozen=True)
class Portrait:
    """``eyes``: in pixels of ``picture``."""

    picture: Array
    eyes: tuple[tuple[float, float], tuple[float, float]]

    def placed(self, dx: float = 0.0, dy: float = 0.0) -> Array:
        """The picture with the eyes at ``EYES`` + (dx, dy), before a wall of its own soft colours:
        mirrored, it would show more faces, cut by the film's edges."""
        (ax, ay), (bx, by) = self.eyes
        (px, py), (qx, qy) = EYES
        turn = complex(qx - px, qy - py) / complex(bx - ax, by - ay)
        move = complex(px + dx, py + dy) - turn * complex(ax, ay)
        matrix = np.array([[turn.real, -turn.imag, move.real], [turn.imag, turn.real, move.imag]])
        size = (WIDTH, HEIGHT)
        shown = cv2.warpAffine(
            self.picture, matrix, size, flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT
        )
        whole = np.full(self.picture.shape[:2], 255, np.uint8)
        inside = cv2.warpAffine(whole, matrix, size, flags=cv2.INTER_AREA)[..., None] / 255.0
        wall = cv2.GaussianBlur(shown, (0, 0), WALL)
        return (shown * inside + wall * (1 - inside)).round().astype(np.uint8)


def portrait(client: facelane.Client, path: Path, face: int = 0) -> Portrait:
    """Of a photo: its ``face``-th face, the largest first."""
    picture = cv2.imread(str(path))
    ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert ok
    found = client.analyze_image(facelane.Picture.encoded(data.tobytes()), skip_liveness=True).faces
    chosen = sorted(found, key=lambda f: -f.box.width)[face]
    left, right = chosen.landmarks[:2]
    return Portrait(picture, ((left.x, left.y), (right.x, right.y)))


@dataclass(frozen=True)
class Shot:
    """``frames`` pictures of somebody. ``portrait`` None: nobody is there."""

    portrait: Portrait | None
    frames: int
    blur: float = 0.0
    """Sigma in pixels."""
    covered: bool = False
    """A hand, or what would be one, before nose and mouth."""


def film(shots: Sequence[Shot], fps: int, seed: int) -> list[facelane.Frame]:
    """The pictures of all shots, cut hard, as JPEG frames with media time."""
    chance = random.Random(seed)
    frames = []
    for shot in shots:
        for _ in range(shot.frames):
            picture = _picture(shot, chance)
            ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])
            assert ok
            frames.append(
                facelane.Frame(
                    facelane.Picture.encoded(data.tobytes()), stream_offset=len(frames) / fps
                )
            )
    return frames


def _picture(shot: Shot, chance: random.Random) -> Array:
    noise = np.random.default_rng(chance.getrandbits(32)).normal(0, 2, (HEIGHT, WIDTH, 1))
    if shot.portrait is None:
        picture = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    else:
        picture = shot.portrait.placed(chance.uniform(-1.5, 1.5), chance.uniform(-1.5, 1.5))
    if shot.covered:
        (px, py), (qx, _) = EYES
        middle = (int((px + qx) / 2), int(py + 55))
        cv2.ellipse(picture, middle, (60, 42), 0, 0, 360, (96, 116, 156), cv2.FILLED)
    if shot.blur:
        picture = cv2.GaussianBlur(picture, (0, 0), shot.blur)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)
