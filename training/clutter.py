"""Pictures without faces, drawn by a program: fifteen kinds of what detectors take for faces."""

from __future__ import annotations

import math
from collections.abc import Callable
from multiprocessing.queues import Queue

import cv2
import numpy as np
import numpy.typing as npt

from training.data import U8

Rng = np.random.Generator
Draw = Callable[[Rng, int], U8]
_FONTS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_COMPLEX, cv2.FONT_HERSHEY_SCRIPT_COMPLEX)
_LETTERS = "ABCDEFGHKLMNOPRSTUVWXYZabcdeghkmnopqrsuvwxyz0123456789:;.,()%&@"


def _colour(rng: Rng) -> tuple[int, int, int]:
    blue, green, red = rng.integers(0, 256, 3).tolist()
    return blue, green, red


def _skin(rng: Rng) -> tuple[int, int, int]:
    tone = rng.uniform(0.25, 1.0)
    blue, green, red = (np.array([0.62, 0.75, 1.0]) * 235 * tone).astype(int).tolist()
    return blue, green, red


def plain_ground(rng: Rng, side: int) -> U8:
    """Plain, shaded or mottled."""
    corners = rng.uniform(0, 255, (2, 2, 3)) if rng.random() < 0.6 else np.full((2, 2, 3), 1.0)
    if corners.max() <= 1:
        corners = corners * rng.uniform(0, 255, 3)
    shaded = cv2.resize(corners, (side, side), interpolation=cv2.INTER_LINEAR)
    mottle = cv2.resize(rng.normal(0, rng.uniform(0, 30), (side // 8, side // 8, 3)), (side, side))
    return (shaded + mottle).clip(0, 255).astype(np.uint8)


def _text(rng: Rng, side: int) -> U8:
    picture = plain_ground(rng, side)
    size, tone = rng.uniform(0.4, 2.5), _colour(rng)
    for line in range(int(20 / size)):
        words = "".join(rng.choice(list(_LETTERS + "   "), 40))
        place = (int(rng.integers(-40, 40)), int((line + 1) * 26 * size))
        font = _FONTS[rng.integers(len(_FONTS))]
        cv2.putText(picture, words, place, font, size, tone, max(1, int(2 * size)), cv2.LINE_AA)
    return picture


def _fabric(rng: Rng, side: int) -> U8:
    """One motif of a few blobs, printed over and over."""
    cell = int(rng.integers(14, 90))
    motif = np.full((cell, cell, 3), _colour(rng), np.uint8)
    for _ in range(int(rng.integers(2, 7))):
        centre = (int(rng.integers(cell)), int(rng.integers(cell)))
        axes = (int(rng.integers(2, cell // 3 + 3)), int(rng.integers(2, cell // 3 + 3)))
        cv2.ellipse(motif, centre, axes, float(rng.uniform(0, 180)), 0, 360, _colour(rng), -1)
    times = side // cell + 2
    sheet = np.tile(motif, (times, times, 1))
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), float(rng.uniform(-45, 45)), 1)
    return np.asarray(
        cv2.warpAffine(sheet, turn, (side, side), borderMode=cv2.BORDER_REFLECT), np.uint8
    )


def _balls(rng: Rng, side: int) -> U8:
    """Shaded balls, plates, wheels: round, two-toned, lit."""
    picture = plain_ground(rng, side)
    for _ in range(int(rng.integers(3, 14))):
        centre = (int(rng.integers(side)), int(rng.integers(side)))
        radius, tone = int(rng.integers(8, side // 4)), np.array(_colour(rng), float)
        for part in np.linspace(1, 0.1, 6):
            shift = int(radius * (1 - part) * 0.3)
            at = (centre[0] - shift, centre[1] - shift)
            shade = (tone * (1.25 - 0.7 * part)).clip(0, 255)
            cv2.circle(picture, at, int(radius * part), shade.tolist(), -1, cv2.LINE_AA)
        for spoke in range(int(rng.integers(0, 7))):
            angle = 2 * math.pi * spoke / 6
            end = (
                centre[0] + int(radius * math.cos(angle)),
                centre[1] + int(radius * math.sin(angle)),
            )
            cv2.line(picture, centre, end, _colour(rng), 2, cv2.LINE_AA)
    return picture


def _hands(rng: Rng, side: int) -> U8:
    """Skin-coloured palms with fingers."""
    picture = plain_ground(rng, side)
    for _ in range(int(rng.integers(1, 5))):
        skin = _skin(rng)
        x, y = (int(v) for v in rng.integers(20, side - 20, 2))
        size, turn = int(rng.integers(14, 70)), float(rng.uniform(0, 360))
        cv2.ellipse(picture, (x, y), (size, int(size * 0.8)), turn, 0, 360, skin, -1, cv2.LINE_AA)
        for finger in range(5):
            angle = math.radians(turn + 40 * (finger - 2))
            end = (x + int(2.1 * size * math.cos(angle)), y + int(2.1 * size * math.sin(angle)))
            cv2.line(picture, (x, y), end, skin, max(2, size // 3), cv2.LINE_AA)
            shade = tuple(int(0.75 * v) for v in skin)
            cv2.line(picture, (x, y), end, shade, 1, cv2.LINE_AA)
    return picture


def _skins(rng: Rng, side: int) -> U8:
    """Arms, legs, backs: skin without features."""
    picture = plain_ground(rng, side)
    for _ in range(int(rng.integers(2, 8))):
        centre = (int(rng.integers(side)), int(rng.integers(side)))
        axes = (int(rng.integers(15, 120)), int(rng.integers(10, 60)))
        cv2.ellipse(picture, centre, axes, float(rng.uniform(0, 180)), 0, 360, _skin(rng), -1)
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.5, 5))), np.uint8)


def _fur(rng: Rng, side: int) -> U8:
    """Fur and grass: strokes that lie alike, with dark spots."""
    picture = plain_ground(rng, side)
    tone, lie = np.array(_colour(rng), float), rng.uniform(0, 2 * math.pi)
    for _ in range(900):
        x, y = rng.integers(0, side, 2).tolist()
        angle, length = lie + rng.normal(0, 0.4), rng.uniform(4, 18)
        end = (int(x + length * math.cos(angle)), int(y + length * math.sin(angle)))
        shade = (tone * rng.uniform(0.5, 1.3)).clip(0, 255).tolist()
        cv2.line(picture, (x, y), end, shade, 1, cv2.LINE_AA)
    for _ in range(int(rng.integers(0, 8))):
        centre = (int(rng.integers(side)), int(rng.integers(side)))
        cv2.circle(picture, centre, int(rng.integers(3, 14)), (20, 20, 25), -1, cv2.LINE_AA)
    return picture


def _animals(rng: Rng, side: int) -> U8:
    """Heads that are no person's: ears, eyes at the sides, a muzzle."""
    picture = _fur(rng, side)
    for _ in range(int(rng.integers(1, 4))):
        x, y = (int(v) for v in rng.integers(40, side - 40, 2))
        size, coat = int(rng.integers(15, 70)), _colour(rng)
        for way in (-1, 1):
            ear = np.array([[x + way * size, y - size // 3], [x + way * size, y - int(1.7 * size)],
                            [x + way * size // 4, y - int(0.8 * size)]])  # fmt: skip
            cv2.fillPoly(picture, [ear], coat, cv2.LINE_AA)
        cv2.ellipse(picture, (x, y), (int(1.1 * size), size), 0, 0, 360, coat, -1, cv2.LINE_AA)
        muzzle = tuple(int(min(255, 1.3 * v + 20)) for v in coat)
        cv2.ellipse(picture, (x, y + size // 2), (size // 2, size // 3), 0, 0, 360, muzzle, -1)
        cv2.circle(picture, (x, y + size // 3), max(1, size // 7), (15, 15, 20), -1)
        for way in (-1, 1):
            eye = (x + way * int(0.75 * size), y - size // 5)
            cv2.circle(picture, eye, max(1, size // 8), (10, 60, 60), -1, cv2.LINE_AA)
    return picture


def _windows(rng: Rng, side: int) -> U8:
    """Houses, shelves, sockets: boxes in rows, two dark ones over a bar among them."""
    picture = plain_ground(rng, side)
    step = int(rng.integers(18, 80))
    wide, high = (int(step * v) for v in rng.uniform(0.3, 0.9, 2))
    tones = [_colour(rng) for _ in range(3)]
    for y in range(0, side, step):
        for x in range(0, side, step):
            tone = tones[rng.integers(3)]
            cv2.rectangle(
                picture, (x, y), (x + wide, y + high), tone, -1 if rng.random() < 0.8 else 2
            )
    return picture


def _leaves(rng: Rng, side: int) -> U8:
    picture = plain_ground(rng, side)
    tone = np.array([rng.uniform(0, 90), rng.uniform(60, 220), rng.uniform(0, 200)])
    for _ in range(int(rng.integers(60, 350))):
        centre = (int(rng.integers(side)), int(rng.integers(side)))
        axes = (int(rng.integers(4, 26)), int(rng.integers(2, 10)))
        shade = (tone * rng.uniform(0.3, 1.2)).clip(0, 255).tolist()
        cv2.ellipse(picture, centre, axes, float(rng.uniform(0, 180)), 0, 360, shade, -1)
    return picture


def shapes(rng: Rng, side: int) -> U8:
    """Polygons over each other: rubble, furniture, abstract prints."""
    picture = plain_ground(rng, side)
    for _ in range(int(rng.integers(10, 60))):
        centre, reach = rng.uniform(0, side, 2), rng.uniform(5, 80)
        points = (centre + rng.normal(0, reach, (int(rng.integers(3, 7)), 2))).astype(np.int32)
        cv2.fillPoly(picture, [points], _colour(rng), cv2.LINE_AA)
    return picture


def _signs(rng: Rng, side: int) -> U8:
    """Round and square signs, buttons, clocks, with strokes and dots in them."""
    picture = plain_ground(rng, side)
    for _ in range(int(rng.integers(1, 9))):
        x, y = (int(v) for v in rng.integers(0, side, 2))
        size = int(rng.integers(10, 80))
        cv2.circle(picture, (x, y), size, _colour(rng), -1, cv2.LINE_AA)
        cv2.circle(picture, (x, y), int(0.8 * size), _colour(rng), -1, cv2.LINE_AA)
        for _ in range(int(rng.integers(1, 5))):
            ends = (np.array([x, y]) + rng.normal(0, 0.4 * size, (2, 2))).astype(int).tolist()
            cv2.line(picture, ends[0], ends[1], _colour(rng), max(2, size // 6), cv2.LINE_AA)
    return picture


def _waves(rng: Rng, side: int) -> U8:
    """Rings, ripples, wood."""
    y, x = np.mgrid[:side, :side].astype(np.float64)
    far = np.hypot(x - rng.uniform(0, side), (y - rng.uniform(0, side)) * rng.uniform(0.5, 2))
    bent = cv2.resize(rng.normal(0, 1, (6, 6)), (side, side), interpolation=cv2.INTER_CUBIC)
    wave = 0.5 + 0.5 * np.sin(far * 2 * math.pi / rng.uniform(5, 60) + rng.uniform(0, 6) * bent)
    dark, light = np.array(_colour(rng)), np.array(_colour(rng))
    return (dark + wave[..., None] * (light - dark)).clip(0, 255).astype(np.uint8)


def _lamps(rng: Rng, side: int) -> U8:
    """Headlamps, pots, helmets: domes of glass or metal that mirror what is around, in a rim."""
    picture = shapes(rng, side) if rng.random() < 0.6 else plain_ground(rng, side)
    picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.5, 4))), np.uint8)
    for _ in range(int(rng.integers(1, 8))):
        x, y = (int(v) for v in rng.integers(0, side, 2))
        size = int(np.exp(rng.uniform(np.log(8), np.log(side / 3))))
        axes, turn = (size, int(size * rng.uniform(0.65, 1.0))), float(rng.uniform(0, 180))
        rim = [int(rng.uniform(20, 230))] * 3
        cv2.ellipse(picture, (x, y), axes, turn, 0, 360, rim, -1, cv2.LINE_AA)
        inner = (max(2, int(0.86 * axes[0])), max(2, int(0.86 * axes[1])))
        # What is mirrored: soft blots of one tint, the brightest of them burnt out.
        cells = int(rng.integers(3, 7))
        blots = np.asarray(
            cv2.resize(
                rng.uniform(0, 1, (cells, cells)), (2 * size + 1, 2 * size + 1),
                interpolation=cv2.INTER_CUBIC,
            )
        ).clip(0, 1.2)  # fmt: skip
        tint = rng.uniform(0.55, 1.0, 3) if rng.random() < 0.7 else np.array([0.55, 0.75, 1.0])
        glass = (blots[..., None] ** rng.uniform(0.8, 2.5) * tint * rng.uniform(120, 330)).clip(
            0, 255
        )
        glass += rng.normal(0, rng.uniform(0, 12), glass.shape)
        mask = np.zeros((side, side), np.uint8)
        cv2.ellipse(mask, (x, y), inner, turn, 0, 360, 255, -1, cv2.LINE_AA)
        _lay(picture, glass, mask, x - size, y - size)
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.4, 1.5))), np.uint8)


def _lay(picture: U8, patch: npt.NDArray[np.float64], mask: U8, left: int, top: int) -> None:
    """``patch`` into ``picture`` from ``left``, ``top`` on, where ``mask`` of the picture is."""
    side = len(picture)
    low_x, low_y = max(0, left), max(0, top)
    high_x, high_y = min(side, left + patch.shape[1]), min(side, top + patch.shape[0])
    if low_x >= high_x or low_y >= high_y:
        return
    part = patch[low_y - top : high_y - top, low_x - left : high_x - left].clip(0, 255)
    share = mask[low_y:high_y, low_x:high_x, None] / 255
    under = picture[low_y:high_y, low_x:high_x]
    under[:] = (under * (1 - share) + part * share).astype(np.uint8)


def _wheels(rng: Rng, side: int) -> U8:
    """Tyres, fans, gears: a dark ring, spokes, a hub, and a bar across."""
    picture = shapes(rng, side) if rng.random() < 0.5 else plain_ground(rng, side)
    for _ in range(int(rng.integers(1, 5))):
        x, y = (int(v) for v in rng.integers(0, side, 2))
        size = int(np.exp(rng.uniform(np.log(14), np.log(side / 2.5))))
        squash, turn = float(rng.uniform(0.7, 1.0)), float(rng.uniform(0, 180))
        dark, metal = int(rng.uniform(10, 70)), int(rng.uniform(90, 230))
        for part, tone in ((1.0, dark), (0.74, metal), (0.68, int(rng.uniform(10, 110)))):
            axes = (max(1, int(size * part)), max(1, int(size * part * squash)))
            cv2.ellipse(picture, (x, y), axes, turn, 0, 360, [tone] * 3, -1, cv2.LINE_AA)
        spokes, thick = int(rng.integers(3, 13)), max(1, int(size * rng.uniform(0.03, 0.14)))
        for spoke in range(spokes):
            angle = 2 * math.pi * spoke / spokes + turn
            end = (x + int(0.7 * size * math.cos(angle)), y + int(0.7 * size * math.sin(angle)))
            cv2.line(picture, (x, y), end, [metal] * 3, thick, cv2.LINE_AA)
        cv2.circle(picture, (x, y), max(2, int(0.2 * size)), [min(255, metal + 20)] * 3, -1)
        if rng.random() < 0.5:
            angle = rng.uniform(0, 2 * math.pi)
            end = (x + int(1.4 * size * math.cos(angle)), y + int(1.4 * size * math.sin(angle)))
            bar = [int(rng.uniform(60, 220))] * 3
            cv2.line(picture, (x, y), end, bar, max(2, size // 4), cv2.LINE_AA)
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.4, 1.5))), np.uint8)


def _craters(rng: Rng, side: int) -> U8:
    """Dents and bumps in a grey or brown ground, lit from one side: craters, coins, plaster."""
    height = np.zeros((side, side))
    for cells, much in ((6, 8.0), (24, 2.0), (90, 0.5)):
        field = rng.normal(0, much * rng.uniform(0.2, 1.0), (cells, cells))
        height += cv2.resize(field, (side, side), interpolation=cv2.INTER_CUBIC)
    at = np.arange(side, dtype=np.float64)
    y, x = at[:, None], at[None]
    for _ in range(int(rng.integers(8, 60))):
        size = np.exp(rng.uniform(np.log(3), np.log(side / 7)))
        far = np.hypot(x - rng.uniform(0, side), (y - rng.uniform(0, side)) * rng.uniform(0.8, 1.3))
        dent = np.exp(-((far / size) ** 4)) - 0.35 * np.exp(-(((far - 1.1 * size) / size * 4) ** 2))
        height += dent * size * rng.uniform(-0.8, 0.3)
    light = rng.uniform(0, 2 * math.pi)
    slope = np.asarray(np.gradient(height))
    shade = slope[1] * math.cos(light) + slope[0] * math.sin(light)
    tone = np.ones(3) if rng.random() < 0.6 else np.array([0.6, 0.8, 1.0])
    lit = rng.uniform(70, 170) + shade * rng.uniform(40, 160)
    grain = rng.normal(0, rng.uniform(0, 6), (side, side))
    return np.asarray(((lit + grain)[..., None] * tone).clip(0, 255), np.uint8)


KINDS: dict[str, Draw] = {
    "text": _text, "fabric": _fabric, "balls": _balls, "hands": _hands, "skin": _skins,
    "fur": _fur, "animals": _animals, "windows": _windows, "leaves": _leaves,
    "shapes": shapes, "signs": _signs, "waves": _waves, "lamps": _lamps, "wheels": _wheels,
    "craters": _craters,
}  # fmt: skip


def clutter(n: int, side: int, seed: int) -> U8:
    """[n, side, side, 3] BGR, the kinds in turns; the same for the same seed."""
    rng = np.random.default_rng(seed)
    draws = list(KINDS.values())
    return np.stack([draws[i % len(draws)](rng, side) for i in range(n)])


def draw_on(pictures: Queue[U8], seed: int, side: int) -> None:
    """In a process of its own, for as long as it lives: ever new pictures [n, side, side, 3], half
    of them quarters of pictures of twice that side. Never those of ``clutter``."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng([seed, side])
    draws = list(KINDS.values())
    while True:
        some = [draws[k] for k in rng.integers(0, len(draws), 8)]
        small = [draw(rng, side) for draw in some]
        for draw in some[:2]:
            large = draw(rng, 2 * side)
            small += [large[y : y + side, x : x + side] for y in (0, side) for x in (0, side)]
        pictures.put(np.stack(small))
