"""The model packages that a config names, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from facelane_server import config, folders, limits
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.gallery.decide import Thresholds
from facelane_server.gallery_rules import Naming
from facelane_server.liveness.band import LivenessBand
from facelane_server.liveness.records import Records, RecordsError, read
from facelane_server.liveness.sequential import SequentialTest
from facelane_server.models.api import ContextCrop, CropSpec
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import Package
from facelane_server.models.promise import Promise

DEFAULT_MODELS: Final = {stage: f"facelane-{stage.value}" for stage in Stage}


def catalog(settings: config.Config) -> Catalog:
    """Where packages are looked for."""
    return Catalog([Path(folder).expanduser() for folder in settings.models.path])


@dataclass(frozen=True, slots=True)
class ServedModels:
    """The packages that the config names, and what follows from them."""

    packages: Mapping[Stage, Package]
    crops: tuple[CropSpec, ...]
    """What the detector cuts for each face."""
    positions: Mapping[Stage, tuple[int, ...]]
    """Where each stage's crops are among them."""
    thresholds: Thresholds
    portrait: int | None = None
    """Where the crop for events' pictures is among them, where any are kept."""

    @property
    def context(self) -> float:
        """How many times its box liveness wants to see around a face, in the closest of its
        crops; 0 = nothing. Wider ones shrink to what a picture has, as in their training: a face
        that fills a telephone's picture is judged, a portrait cut at the chin is not."""
        package = self.packages.get(Stage.LIVENESS)
        if package is None or package.manifest.runtime == "null":
            return 0.0
        return min((c.scale for c in package.crops if isinstance(c, ContextCrop)), default=0.0)

    @classmethod
    def resolve(cls, settings: config.Config, *, calibrated: bool = False) -> Self:
        """Reads the manifests, and as ``calibrated`` the calibrations of the state folder, which
        the service alone may be able to. Raises ``FacelaneError(MODEL_INVALID)`` and
        ``ConfigError``."""
        known = catalog(settings)
        packages = {}
        for stage, pool in settings.stages.items():
            package = known.resolve(pool.model or DEFAULT_MODELS[stage])
            if package.task is not stage:
                raise FacelaneError(
                    Reason.MODEL_INVALID,
                    f"pools.{stage}.model: {package.name} is a {package.task.value}, not a {stage}",
                )
            packages[stage] = package
        crops: list[CropSpec] = []
        positions: dict[Stage, tuple[int, ...]] = {}
        for stage in (Stage.RECOGNIZER, Stage.LIVENESS):
            if stage in packages:
                for crop in packages[stage].crops:
                    if crop not in crops:
                        crops.append(crop)
                positions[stage] = tuple(crops.index(c) for c in packages[stage].crops)
        portrait = None
        if settings.keeps_pictures:
            crops.append(ContextCrop(limits.PORTRAIT_SCALE, limits.PORTRAIT_SIDE))
            portrait = len(crops) - 1
        records = calibrations(settings) if calibrated else None
        chosen = thresholds(packages, settings.identity, records)
        return cls(packages, tuple(crops), positions, chosen, portrait)


def thresholds_of(packages: Mapping[Stage, Package], settings: config.Config) -> Thresholds:
    """``thresholds``, with the calibrations of the state folder. Raises ``ConfigError``."""
    return thresholds(packages, settings.identity, calibrations(settings))


def calibrations(settings: config.Config) -> Records:
    """Those of the state folder, whether they hold or not. Raises ``ConfigError``."""
    try:
        return read(folders.state_path(settings))
    except RecordsError as error:
        raise config.ConfigError(str(error)) from None


def thresholds(
    packages: Mapping[Stage, Package], chosen: config.Identity, records: Records | None = None
) -> Thresholds:
    """The packages' thresholds, with the config's overrides.

    The match threshold follows from ``false_naming`` where the recogniser's package says how
    similar different people are to it; else, or where the config has ``match_threshold``, it is
    a bare cosine. ``records``: calibrations of liveness, of which those hold that are of this model
    and these thresholds.
    """

    def pick(stage: Stage, name: str, override: float | None, without: float) -> float:
        if override is not None:
            return override
        if stage not in packages:
            return without
        value = getattr(packages[stage].thresholds, name)
        return without if value is None else float(value)

    recognizer = packages.get(Stage.RECOGNIZER)
    bands = () if recognizer is None else recognizer.manifest.impostors

    def naming(general: Thresholds, own: Naming | config.Identity) -> Thresholds:
        if own.match_threshold is not None:
            return replace(general, match=own.match_threshold, promise=None)
        if own.false_naming is not None and bands:
            return replace(general, promise=Promise(own.false_naming, bands))
        return general

    try:
        plain = Thresholds(
            match=pick(Stage.RECOGNIZER, "match", None, 1.0),
            margin=pick(Stage.RECOGNIZER, "margin", chosen.margin, 0.05),
            ood=pick(Stage.RECOGNIZER, "ood", chosen.ood_threshold, 0.4),
            live=pick(Stage.LIVENESS, "live", chosen.live_threshold, 1.0),
            spoof=pick(Stage.LIVENESS, "spoof", chosen.spoof_threshold, 0.0),
            looks=chosen.agreeing_looks,
            enroll_ood=chosen.enroll_ood,
            bands=tuple(bands),
        )
        if chosen.false_live is not None:
            plain = replace(plain, test=SequentialTest(chosen.false_live, chosen.false_spoof))
        judge = packages.get(Stage.LIVENESS)
        if judge is not None and records:
            base = LivenessBand(plain.live, plain.spoof)
            holding = {
                name: one.band
                for name, one in records.items()
                if not one.stale(judge.model_id, base)
            }
            plain = replace(plain, calibrated=holding)
        general = naming(plain, chosen)
        return replace(
            general,
            galleries={name: naming(general, own) for name, own in chosen.galleries.items()},
            sources={name: naming(general, own) for name, own in chosen.sources.items()},
        )
    except ValueError as error:
        raise config.ConfigError(f"identity: {error}") from None
