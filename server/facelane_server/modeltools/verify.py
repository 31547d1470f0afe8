"""Is a package fit for service: hashes, keys, shapes, real inferences, recorded answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from facelane_server.domain import FacelaneError
from facelane_server.models.api import (
    U8,
    Detector,
    DeviceOptions,
    LivenessModel,
    Model,
    Recognizer,
)
from facelane_server.models.package import Package
from facelane_server.modeltools import reference
from facelane_server.worker.networks.load import load

_ROUNDS: Final = 5
_BATCH: Final = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found about one package. ``latency_ms``: one item, median."""

    model_id: str
    task: str
    random_weights: bool
    checks: tuple[Finding, ...]
    latency_ms: float | None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify(package: Package, options: DeviceOptions | None = None) -> Verification:
    """Load the package, run it on synthetic pictures and judge what comes out.

    Where the package has a ``check.json`` (see ``reference``), its model must give the
    answers recorded there.
    Never raises for a bad package: the failed check says what is wrong.
    """
    options = options or DeviceOptions()
    checks: list[Finding] = []
    latency: list[float] = []

    def attempt(name: str, action: Callable[[], str]) -> bool:
        try:
            checks.append(Finding(name, True, action()))
        except FacelaneError as error:
            checks.append(Finding(name, False, error.message))
        except Exception as error:  # whatever a broken model raises is the finding
            checks.append(Finding(name, False, f"{type(error).__name__}: {error}"))
        return checks[-1].passed

    models: list[Model] = []

    def load_it() -> str:
        models.append(load(package, options, batch_max=_BATCH))
        models[0].warm_up()
        return f"on {options.device}"

    def run_it() -> str:
        detail = _run(models[0], _sample(models[0], _BATCH))
        single = _sample(models[0], 1)
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            _run(models[0], single)
            latency.append((time.perf_counter() - started) * 1e3)
        return detail

    attempt("card", lambda: _card(package))
    sound = attempt("weights", lambda: _weights(package))
    if sound and attempt("load", load_it):
        attempt("inference", run_it)
        models[0].close()
        if (package.folder / reference.CHECK).exists():
            attempt("reference", lambda: _reference(package, options))
    return Verification(
        model_id=package.model_id,
        task=package.task.value,
        random_weights=package.random_weights,
        checks=tuple(checks),
        latency_ms=round(float(np.median(latency)), 2) if latency else None,
    )


def _card(package: Package) -> str:
    card = package.manifest.card
    if card and not (package.folder / card).is_file():
        raise FileNotFoundError(f"card {card} is missing from the package")
    return card or "none declared"


def _weights(package: Package) -> str:
    size = sum(len(package.read_weights(part)) for part in package.manifest.weights)
    if package.random_weights:
        return "random: timings only, results mean nothing"
    return f"{len(package.manifest.weights)} files, {size / 1e6:.2f} MB, SHA-256 as declared"


def _reference(package: Package, options: DeviceOptions) -> str:
    recorded = reference.read(package)
    assert recorded is not None
    model = reference.load_for_check(package, options, batch_max=1)
    try:
        model.warm_up()
        return reference.compare(recorded, reference.answer(model))
    finally:
        model.close()


def _sample(model: Model, count: int) -> list[U8]:
    """``count`` synthetic inputs: pictures, chips, or one stack for each crop."""
    if isinstance(model, Detector):
        return [synthetic_picture(480, 640, seed) for seed in range(count)]
    if isinstance(model, Recognizer):
        sizes = [model.crop.size]
    else:
        assert isinstance(model, LivenessModel)
        sizes = [spec.size for spec in model.crops]
    return [
        np.stack([synthetic_picture(size, size, seed) for seed in range(count)]) for size in sizes
    ]


def _run(model: Model, sample: list[U8]) -> str:
    """One batch through the model, its promises checked; says what came out."""
    if isinstance(model, Detector):
        faces = model.begin(sample, [8] * len(sample)).finish()
        _require(len(faces) == len(sample), "an answer for every picture")
        for found in faces:
            _require(bool(np.isfinite(found.boxes).all()), "finite boxes")
            _require(bool(((found.scores >= 0) & (found.scores <= 1)).all()), "scores in [0, 1]")
        return f"{sum(len(found.boxes) for found in faces)} faces in {len(sample)} pictures"
    count = len(sample[0])
    if isinstance(model, Recognizer):
        result = model.begin(sample[0]).finish()
        _require(result.vectors.shape == (count, model.embedding_dim), "declared dimension")
        norms = np.linalg.norm(result.vectors, axis=1)
        _require(bool(np.allclose(norms, 1.0, atol=1e-3)), "unit vectors")
        _require(bool(((result.ood >= 0) & (result.ood <= 1)).all()), "OOD scores in [0, 1]")
        return f"{model.embedding_dim}-d unit vectors"
    assert isinstance(model, LivenessModel)
    scores = model.begin(sample).finish()
    _require(scores.shape == (count,), "a score for every face")
    _require(bool(((scores >= 0) & (scores <= 1)).all()), "scores in [0, 1]")
    return "scores in [0, 1]"


def synthetic_picture(height: int, width: int, seed: int) -> U8:
    """A smooth colour gradient with an ellipse and some noise: no face, but a picture."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    red = 255 * x / width
    green = 255 * y / height
    inside = ((x / width - 0.5) / 0.2) ** 2 + ((y / height - 0.5) / 0.3) ** 2 < 1
    blue = np.where(inside, 200.0, 60.0)
    picture = np.stack((blue, green, red), -1) + random.normal(0, 6, (height, width, 3))
    return picture.clip(0, 255).astype(np.uint8)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"the model broke a promise of its task: {what}")
