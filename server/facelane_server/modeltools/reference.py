"""Reference outputs of a package on a drawn portrait: does it still answer as it did.

A package may carry ``check.json``: what its model said about a picture that this module
draws, when it was recorded (``facelane-server models verify --record``). Verifying computes
it again and compares. It catches what hashes and shapes cannot: another version of a
library, a device or a precision that changes results, input options that were edited.

The portrait is drawn with additions, multiplications, divisions and square roots alone,
which IEEE 754 rounds alike everywhere, so that every machine draws the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt

from facelane_server.domain import FacelaneError, Reason
from facelane_server.models.api import (
    U8,
    Detector,
    DeviceOptions,
    LivenessModel,
    Model,
    Recognizer,
)
from facelane_server.models.package import Package, invalid
from facelane_server.worker.decoding import crops
from facelane_server.worker.networks.load import load

F64 = npt.NDArray[np.float64]
_Numbers = tuple[float, ...]
_Window = tuple[slice, slice]

CHECK: Final = "check.json"
MAX_CHECK_BYTES: Final = 256 * 1024
LOW_SCORE: Final = 0.05
"""Faces count from here in a check, so that there is something to compare."""
CLEAR: Final = 0.1
"""Only faces this much above ``LOW_SCORE`` are compared: others come and go with rounding."""
FACES: Final = 3
PICTURE_SIZE: Final = (480, 640)
"""Height and width."""
FACE_BOX: Final = np.array([[241.0, 120.0, 158.0, 214.0]], np.float32)
FACE_LANDMARKS: Final = np.array(
    [[[284.0, 212.0], [356.0, 212.0], [320.0, 254.0], [289.0, 288.0], [351.0, 288.0]]],
    np.float32,
)
"""Where the drawn face is: what a perfect detector would say."""

Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far an answer may be from the recorded one.

    ``score``: of scores in [0, 1]; ``pixels``: of boxes and landmarks; ``cosine``: least
    cosine between the embeddings. The defaults leave room for fp16 on a GPU.
    """

    score: Fraction = 0.03
    pixels: Annotated[float, msgspec.Meta(gt=0)] = 1.5
    cosine: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.999


class FoundFace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One face: ``box`` x, y, width, height; ``landmarks`` x, y of five points."""

    score: float
    box: _Numbers
    landmarks: _Numbers


class Answers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a model said. Detector: ``faces``. Recogniser: ``embeddings`` of the face upright
    and mirrored, ``scores`` their OOD scores. Liveness: ``scores`` of the same two."""

    faces: tuple[FoundFace, ...] = ()
    embeddings: tuple[_Numbers, ...] = ()
    scores: _Numbers = ()


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``check.json``. ``weights`` and ``picture`` are SHA-256 digests of what it is about."""

    schema: int
    weights: str
    picture: str
    answers: Answers
    tolerance: Tolerance = Tolerance()


def portrait() -> U8:
    """[480, 640, 3] BGR: a drawn face, en face, before a plain wall."""
    height, width = PICTURE_SIZE
    y, x = np.mgrid[:height, :width].astype(np.float64)
    picture = np.empty((height, width, 3))
    picture[:] = (150.0, 142.0, 130.0)
    picture *= (0.8 + 0.3 * x / width - 0.1 * y / height)[..., None]

    def paint(
        shape: tuple[_Window, F64], color: tuple[float, float, float], strength: float = 1.0
    ) -> None:
        window, depth = shape
        part = picture[window]
        part += (depth * strength)[..., None] * (np.array(color) - part)

    def blob(cx: float, cy: float, rx: float, ry: float, soft: float) -> tuple[_Window, F64]:
        """1 inside of an ellipse, 0 outside, falling over ``soft`` of its radius; and where."""
        reach = 1 + soft / 2
        window = (
            slice(max(0, int(cy - reach * ry)), int(cy + reach * ry) + 2),
            slice(max(0, int(cx - reach * rx)), int(cx + reach * rx) + 2),
        )
        u, v = (x[window] - cx) / rx, (y[window] - cy) / ry
        edge = ((1.0 - np.sqrt(u * u + v * v)) / soft + 0.5).clip(0.0, 1.0)
        smooth: F64 = edge * edge * (3.0 - 2.0 * edge)
        return window, smooth

    skin = (136.0, 168.0, 214.0)
    paint(blob(320, 520, 210, 150, 0.05), (92.0, 66.0, 48.0))  # shoulders
    paint(blob(320, 360, 48, 80, 0.12), (104.0, 134.0, 178.0))  # neck
    paint(blob(320, 196, 100, 118, 0.06), (30.0, 38.0, 52.0))  # hair
    paint(blob(238, 236, 14, 30, 0.15), (118.0, 148.0, 194.0))  # ears
    paint(blob(402, 236, 14, 30, 0.15), (118.0, 148.0, 194.0))
    paint(blob(320, 228, 80, 108, 0.05), skin)
    paint(blob(320, 138, 84, 38, 0.25), (30.0, 38.0, 52.0))  # fringe
    paint(blob(375, 250, 40, 100, 0.9), (96.0, 126.0, 172.0), 0.55)  # the shaded side
    paint(blob(300, 182, 50, 24, 0.9), (170.0, 198.0, 234.0), 0.5)  # forehead
    for side in (-1.0, 1.0):
        cx = 320 + side * 36
        paint(blob(cx, 208, 26, 18, 0.8), (92.0, 118.0, 160.0), 0.75)  # socket
        paint(blob(cx, 192, 23, 5, 0.6), (34.0, 42.0, 58.0), 0.9)  # brow
        paint(blob(cx, 212, 17, 7.5, 0.2), (226.0, 230.0, 234.0))  # eye
        paint(blob(cx, 212, 7.5, 7.5, 0.2), (60.0, 74.0, 92.0))
        paint(blob(cx, 212, 3.6, 3.6, 0.3), (14.0, 14.0, 16.0))
        paint(blob(cx - 2.5, 209.5, 1.8, 1.8, 0.5), (250.0, 250.0, 250.0))
        paint(blob(cx, 205, 19, 3.2, 0.6), (40.0, 50.0, 70.0), 0.9)  # lid
        paint(blob(320 + side * 52, 258, 24, 20, 0.9), (120.0, 138.0, 220.0), 0.35)  # cheek
        paint(blob(320 + side * 15, 261, 9, 6, 0.7), (84.0, 110.0, 156.0), 0.8)  # nostril
        paint(blob(320 + side * 9, 264, 4.5, 2.6, 0.6), (40.0, 52.0, 78.0), 0.85)
    paint(blob(331, 235, 9, 30, 0.9), (98.0, 128.0, 174.0), 0.6)  # nose
    paint(blob(316, 236, 6, 30, 0.9), (172.0, 200.0, 236.0), 0.5)
    paint(blob(319, 254, 11, 9, 0.8), (166.0, 194.0, 232.0), 0.5)
    paint(blob(320, 284, 32, 7, 0.35), (96.0, 98.0, 176.0), 0.9)  # lips
    paint(blob(320, 294, 25, 8, 0.4), (110.0, 112.0, 190.0), 0.9)
    paint(blob(320, 288, 32, 2.2, 0.6), (48.0, 46.0, 84.0), 0.95)
    paint(blob(320, 309, 22, 5, 0.9), (100.0, 130.0, 176.0), 0.5)  # chin
    return picture.clip(0.0, 255.0).astype(np.uint8)


def answer(model: Model) -> Answers:
    """What ``model`` says about the portrait. A detector is to be loaded at ``LOW_SCORE``."""
    picture = portrait()
    if isinstance(model, Detector):
        found = model.begin([picture], [FACES]).finish()[0]
        return Answers(
            faces=tuple(
                FoundFace(
                    score=round(float(score), 4),
                    box=_rounded(box, 2),
                    landmarks=_rounded(points, 2),
                )
                for score, box, points in zip(
                    found.scores, found.boxes, found.landmarks, strict=True
                )
            )
        )
    if isinstance(model, Recognizer):
        (chips,) = crops.cut(picture, FACE_BOX, FACE_LANDMARKS, [model.crop])
        known = [model.begin(chip).finish() for chip in (chips, _mirrored(chips))]
        return Answers(
            embeddings=tuple(_rounded(one.vectors, 4) for one in known),
            scores=tuple(round(float(one.ood[0]), 4) for one in known),
        )
    assert isinstance(model, LivenessModel)
    stacks = crops.cut(picture, FACE_BOX, FACE_LANDMARKS, model.crops)
    upright = model.begin(stacks).finish()
    mirrored = model.begin([_mirrored(stack) for stack in stacks]).finish()
    return Answers(scores=tuple(round(float(s[0]), 4) for s in (upright, mirrored)))


def record(package: Package, options: DeviceOptions | None = None) -> Path:
    """Run the model and write ``check.json``; a tolerance that it states already is kept.

    Raises FacelaneError: MODEL_INVALID (the model does not load),
    ARGUMENT_INVALID (the package cannot be written to).
    """
    before = read(package, strict=False)
    model = load_for_check(package, options or DeviceOptions(), batch_max=1)
    try:
        model.warm_up()
        given = answer(model)
    finally:
        model.close()
    found = Record(
        schema=1,
        weights=package.weights_digest,
        picture=_digest(portrait()),
        answers=given,
        tolerance=before.tolerance if before else Tolerance(),
    )
    path = package.folder / CHECK
    scratch = package.folder / f".{CHECK}.{os.getpid()}"
    try:
        scratch.write_bytes(msgspec.json.encode(found) + b"\n")
        scratch.replace(path)
    except OSError as error:
        raise FacelaneError(
            Reason.ARGUMENT_INVALID,
            f"{CHECK} cannot be written into the package {package.name} ({error.strerror}); "
            "copy the package to a folder of your own",
        ) from error
    finally:
        scratch.unlink(missing_ok=True)
    return path


def load_for_check(package: Package, options: DeviceOptions, *, batch_max: int) -> Model:
    """The model as ``answer`` wants it."""
    if package.thresholds.score is not None:
        package = package.with_score(min(LOW_SCORE, package.thresholds.score))
    return load(package, options, batch_max=batch_max)


def read(package: Package, *, strict: bool = True) -> Record | None:
    """The package's ``check.json``, or None without one.

    Raises FacelaneError(MODEL_INVALID) when it cannot be read; with ``strict`` also when it
    is about other weights or another picture.
    """
    path = package.folder / CHECK
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_CHECK_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise invalid(package.folder, f"{CHECK} cannot be read ({error.strerror})") from error
    again = "record it again: facelane-server models verify --record"
    if len(raw) > MAX_CHECK_BYTES:
        raise invalid(package.folder, f"{CHECK} is larger than {MAX_CHECK_BYTES} bytes")
    try:
        found = msgspec.json.decode(raw, type=Record)
    except msgspec.DecodeError as error:
        raise invalid(package.folder, f"{CHECK}: {error}; {again}") from error
    if strict and found.weights != package.weights_digest:
        raise invalid(package.folder, f"{CHECK} was recorded with other weights; {again}")
    if strict and (found.schema != 1 or found.picture != _digest(portrait())):
        raise invalid(package.folder, f"{CHECK} was recorded by another release; {again}")
    return found


def compare(recorded: Record, now: Answers) -> str:
    """What was compared, and the largest difference.

    Raises ValueError when an answer is farther from the recorded one than its tolerance.
    """
    was, tolerance = recorded.answers, recorded.tolerance
    scores, pixels, cosines = [0.0], [0.0], [1.0]
    for mine, others in ((was.faces, now.faces), (now.faces, was.faces)):
        for face in mine:
            if face.score < LOW_SCORE + CLEAR:
                continue
            if not others:
                raise ValueError(f"{len(now.faces)} faces found, {len(was.faces)} were recorded")
            other = min(others, key=lambda o: _distance(o.box, face.box))
            scores.append(abs(face.score - other.score))
            pixels.append(_distance(face.box, other.box))
            pixels.append(_distance(face.landmarks, other.landmarks))
    if len(was.scores) != len(now.scores) or len(was.embeddings) != len(now.embeddings):
        raise ValueError("the model answers in another form than was recorded")
    scores += [abs(a - b) for a, b in zip(was.scores, now.scores, strict=True)]
    for a, b in zip(was.embeddings, now.embeddings, strict=True):
        if len(a) != len(b):
            raise ValueError(f"embeddings have {len(b)} numbers where {len(a)} were recorded")
        product = float(np.linalg.norm(a) * np.linalg.norm(b))
        cosines.append(float(np.dot(a, b)) / max(product, 1e-12))
    parts = []
    for name, worst, bound, wrong in (
        ("score", max(scores), tolerance.score, max(scores) > tolerance.score),
        ("pixels", max(pixels), tolerance.pixels, max(pixels) > tolerance.pixels),
        ("cosine", min(cosines), tolerance.cosine, min(cosines) < tolerance.cosine),
    ):
        if wrong:
            raise ValueError(
                f"the answer about the drawn portrait is not the recorded one: {name} "
                f"{worst:.4g}, tolerance {bound:g}"
            )
        parts.append(f"{name} {worst:.4g}")
    kept = parts[::2] if was.embeddings else parts[:2] if was.faces else parts[:1]
    return "as recorded: " + ", ".join(kept)


def _rounded(values: npt.ArrayLike, digits: int) -> _Numbers:
    flat = np.asarray(values, np.float64).ravel()
    return tuple(round(float(v), digits) for v in flat)


def _mirrored(stack: U8) -> U8:
    return np.ascontiguousarray(stack[:, :, ::-1])


def _distance(a: _Numbers, b: _Numbers) -> float:
    """The largest difference of a coordinate."""
    return float(np.abs(np.subtract(a, b)).max())


def _digest(picture: U8) -> str:
    return hashlib.sha256(picture.tobytes()).hexdigest()
