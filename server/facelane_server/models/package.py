"""A model package: a folder with ``model.toml`` and the weights that it names.

The manifest says everything that the server must know about a model before it runs
it: task, architecture and options, input, thresholds, calibration, memory, licence.
It is read strictly: an unknown key is refused, and the nearest right one is named.
This module needs no torch, because the front reads packages too.

Example::

    schema = 1
    name = "yunet-n"
    version = "1.0.0"
    task = "detector"
    architecture = "yunet"
    license = "Apache-2.0"
    description = "YuNet, 78 k parameters"

    [[weights]]
    file = "yunet_n.pth"
    sha256 = "…64 hex digits…"

    [input]
    color = "bgr"
    max_side = 640

    [thresholds]
    score = 0.7
    nms = 0.3
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

import msgspec

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.models.api import AlignedCrop, ContextCrop, CropSpec
from facelane_server.models.architectures import ARCHITECTURES
from facelane_server.naming import hint

MANIFEST: Final = "model.toml"
SCHEMA: Final = 1
DETECTOR_STRIDE: Final = 32
"""Detector inputs are padded at the right and the bottom to a multiple of this."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,31}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_NESTED: Final = 16
"""Tables and lists in one another, in what is free to say anything."""
_SHOWN: Final = 64
"""Characters of what is wrong, in an error."""


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the manifest."""


class WeightsFile(_Table, frozen=True):
    """One weights file. ``part``: the submodule that it fills, for models of several."""

    file: str
    sha256: str
    part: str = ""


class Crop(_Table, frozen=True):
    """What the detector is to cut out for this model (see ``api.CropSpec``)."""

    kind: Literal["aligned", "context"]
    size: int
    scale: float = 0.0

    def spec(self) -> CropSpec:
        if self.kind == "aligned":
            return AlignedCrop(self.size)
        return ContextCrop(self.scale, self.size)


class Input(_Table, frozen=True):
    """What the network reads.

    ``width``, ``height``: of recognisers and liveness networks; where they differ from
    the crop's size, the crop is resized on the device. ``max_side``: of detectors, the
    longest side; larger pictures are scaled down to it, smaller ones are left as they
    are. ``mean`` and ``std`` are in the order of the network's channels, in grey
    levels 0..255.
    """

    width: int = 0
    height: int = 0
    max_side: int = 0
    color: Literal["bgr", "rgb"] = "bgr"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    crops: tuple[Crop, ...] = ()


class Output(_Table, frozen=True):
    """What the network says.

    ``embedding_dim``: of recognisers. The others are for ONNX files: ``decode`` of
    detectors (``yunet``: outputs ``cls_8`` … ``kps_32``); ``embedding`` and ``ood``
    name outputs of recognisers (default: the first output, and none);
    ``live_class`` and ``softmax`` of liveness networks.
    """

    embedding_dim: int = 0
    decode: Literal["", "yunet"] = ""
    embedding: str = ""
    ood: str = ""
    live_class: int = 1
    softmax: bool = True


class PackageThresholds(_Table, frozen=True):
    """Decision thresholds, those of the package's task required.

    Detector: ``score``, ``nms`` (IoU); ``score_turned`` (not required) is enough for a face that
    is turned to the side. Recogniser: ``match`` and ``margin`` (cosines),
    ``ood``. Liveness: LIVE from ``live`` up, SPOOF below ``spoof``, UNDECIDED between.
    """

    score: float | None = None
    score_turned: float | None = None
    nms: float | None = None
    match: float | None = None
    margin: float | None = None
    ood: float | None = None
    live: float | None = None
    spoof: float | None = None


class Ood(_Table, frozen=True):
    """How a recogniser's trust becomes a score in [0, 1].

    ``source``: ``norm`` (of the embedding), ``head`` (the network's own logit) or
    ``rts`` (its log-variance); ``none`` trusts every face, which only a null or a
    benchmark model should. ``mapping``: ``logistic`` = 1/(1 + exp(-(v - center)/scale)),
    or ``exp`` = exp(v) limited to 1.
    """

    source: Literal["norm", "head", "rts", "none"]
    mapping: Literal["logistic", "exp"] = "logistic"
    center: float = 0.0
    scale: float = 1.0


class Impostors(_Table, frozen=True):
    """How similar different people are to a recogniser (``models evaluate --write``).

    For probes whose OOD score is at least ``ood``, up to the next row's: ``similarity[k]`` is
    the cosine that a share of 10 ** -(k + 1) of ``pairs`` pairs reaches. Where the pairs are
    too few to count, ``measured`` tells from which share on, the row is a fitted tail.
    """

    ood: float
    pairs: int
    measured: float
    similarity: tuple[float, ...]


IMPOSTOR_DECADES: Final = 6
"""A row of ``Impostors`` goes from 10 % to one in a million."""


class Memory(_Table, frozen=True):
    """Estimates for the start-up plan, in MiB of device memory."""

    weights_mib: float = 0.0
    activations_mib_per_item: float = 0.0


class Manifest(_Table, frozen=True):
    """``model.toml``."""

    schema: int
    name: str
    version: str
    task: Stage
    license: str
    description: str
    runtime: Literal["torch", "onnx", "null"] = "torch"
    architecture: str = ""
    card: str = ""
    weights: tuple[WeightsFile, ...] = ()
    random_seed: int | None = None
    input: Input = Input()
    options: dict[str, Any] = {}
    output: Output = Output()
    thresholds: PackageThresholds = PackageThresholds()
    ood: Ood | None = None
    impostors: tuple[Impostors, ...] = ()
    memory: Memory = Memory()
    provenance: dict[str, Any] = {}


_REQUIRED_THRESHOLDS: Final[Mapping[Stage, tuple[str, ...]]] = {
    Stage.DETECTOR: ("score", "nms"),
    Stage.RECOGNIZER: ("match", "margin", "ood"),
    Stage.LIVENESS: ("live", "spoof"),
}


@dataclass(frozen=True, slots=True)
class Package:
    """A package that was read and whose manifest holds together; weights unread."""

    folder: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def task(self) -> Stage:
        return self.manifest.task

    @property
    def thresholds(self) -> PackageThresholds:
        return self.manifest.thresholds

    @property
    def embedding_dim(self) -> int:
        """Length of the embedding; 0 unless a recogniser."""
        return self.manifest.output.embedding_dim

    @property
    def random_weights(self) -> bool:
        """The weights are random numbers: timings mean something, results do not."""
        return self.manifest.random_seed is not None

    @property
    def crops(self) -> tuple[CropSpec, ...]:
        """What a detector must cut out for this model; empty for a detector."""
        return tuple(crop.spec() for crop in self.manifest.input.crops)

    @property
    def weights_digest(self) -> str:
        """64 hex digits that change whenever the weights do."""
        declared = [part.sha256 for part in self.manifest.weights]
        if len(declared) == 1:
            return declared[0]
        if not declared:
            # No file: what makes the outputs is the architecture and the seed.
            m = self.manifest
            declared = [
                json.dumps(
                    [m.runtime, m.architecture, m.random_seed, m.options, m.output.embedding_dim],
                    sort_keys=True,
                )
            ]
        return hashlib.sha256("\n".join(declared).encode()).hexdigest()

    @property
    def model_id(self) -> str:
        """``name@version#digest``: embeddings are comparable only within one model id."""
        return f"{self.name}@{self.manifest.version}#{self.weights_digest[:8]}"

    def with_score(self, score: float) -> Package:
        """The same detector with another score threshold: measuring looks below the served one."""
        thresholds = msgspec.structs.replace(self.thresholds, score=score, score_turned=None)
        return Package(self.folder, msgspec.structs.replace(self.manifest, thresholds=thresholds))

    def read_weights(self, part: WeightsFile) -> bytes:
        """The bytes of a weights file, its hash checked.

        Raises FacelaneError(MODEL_INVALID) when it is absent, outside of the package,
        too large or not what the manifest says.
        """
        path = self.weights_path(part)
        try:
            if path.stat().st_size > limits.MAX_WEIGHTS_BYTES:
                raise invalid(
                    self.folder, f"{part.file} is larger than {limits.MAX_WEIGHTS_BYTES} bytes"
                )
            data = path.read_bytes()
        except OSError as error:
            raise invalid(
                self.folder,
                f"weights file {part.file} cannot be read ({error.strerror}); "
                "import the model again or restore the file",
            ) from error
        actual = hashlib.sha256(data).hexdigest()
        if actual != part.sha256:
            raise invalid(
                self.folder,
                f"weights file {part.file} has SHA-256 {actual}, but {MANIFEST} declares "
                f"{part.sha256}; the file is damaged or was replaced: import the model again, or "
                "declare its hash if the change is yours",
            )
        return data

    def weights_path(self, part: WeightsFile) -> Path:
        """Where a weights file lies; refuses one that a link leads out of the package."""
        path = self.folder / part.file
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise invalid(self.folder, f"weights file {part.file} lies outside of the package")
        return path


def invalid(folder: Path, message: str) -> FacelaneError:
    """A MODEL_INVALID error about the package in ``folder``."""
    return FacelaneError(
        Reason.MODEL_INVALID,
        f"model package {folder.name}: {message}",
        metadata={"model": folder.name},
    )


def read_package(folder: Path) -> Package:
    """Read and check the manifest in ``folder``; the weights stay unread.

    Raises FacelaneError(MODEL_INVALID) with the key at fault.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        with path.open("rb") as stream:
            raw = stream.read(limits.MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise invalid(folder, f"{MANIFEST} cannot be read ({error.strerror})") from error
    if len(raw) > limits.MAX_MANIFEST_BYTES:
        raise invalid(folder, f"{MANIFEST} is larger than {limits.MAX_MANIFEST_BYTES} bytes")
    try:
        table = tomllib.loads(raw.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise invalid(folder, f"{MANIFEST} is not valid TOML: {error}") from error
    except RecursionError:
        raise invalid(folder, f"{MANIFEST} is not valid TOML: nested too deeply") from None
    except ValueError:
        raise invalid(
            folder, f"{MANIFEST} is not valid TOML: a number of too many digits"
        ) from None
    _refuse_unknown_keys(folder, table, Manifest, "")
    try:
        manifest = msgspec.convert(table, Manifest)
    except msgspec.ValidationError as error:
        raise invalid(folder, f"{MANIFEST}: {error}") from error
    _check(folder, manifest)
    return Package(folder, manifest)


def _refuse_unknown_keys(
    folder: Path, table: Mapping[str, Any], kind: type[_Table], where: str
) -> None:
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in table.items():
        if key not in fields:
            meant = hint(key, fields, label="known keys")
            raise invalid(folder, f"{MANIFEST}: unknown key {where}{key[:_SHOWN]}; {meant}")
        nested = _struct_in(fields[key])
        if nested is None:
            _refuse_unknown_choice(folder, f"{where}{key}", value, fields[key])
            continue
        for row in value if isinstance(value, list) else [value]:
            if isinstance(row, dict):
                _refuse_unknown_keys(folder, row, nested, f"{where}{key}.")


def _refuse_unknown_choice(folder: Path, key: str, value: object, hint: Any) -> None:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        known = [str(member.value) for member in hint]
    else:
        known = list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else []
    if known and value not in known:
        choices = ", ".join(choice for choice in known if choice)
        shown = repr(value[:_SHOWN]) if isinstance(value, str) else "no text"
        raise invalid(folder, f"{MANIFEST}: {key} is {shown}, but may be: {choices}")


def _struct_in(hint: Any) -> type[_Table] | None:
    """The table type in ``T``, ``T | None`` or ``tuple[T, ...]``."""
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and issubclass(candidate, _Table):
            return candidate
    return None


def _check(folder: Path, m: Manifest) -> None:
    def refuse(message: str) -> typing.NoReturn:
        raise invalid(folder, f"{MANIFEST}: {message}")

    if m.schema != SCHEMA:
        refuse(f"schema is {m.schema}, but this server reads schema {SCHEMA}")
    if not _NAME.fullmatch(m.name):
        refuse("name must be lower-case letters, digits, '.', '_' and '-', 64 at most")
    if not _VERSION.fullmatch(m.version):
        refuse("version must be letters, digits, '.', '+' and '-', 32 at most")
    _check_numbers(m, refuse)
    _check_weights(m, refuse)
    _check_architecture(m, refuse)
    for name in _REQUIRED_THRESHOLDS[m.task]:
        if getattr(m.thresholds, name) is None:
            refuse(f"thresholds.{name} is missing; a {m.task} needs it")
    for name in PackageThresholds.__struct_fields__:
        value = getattr(m.thresholds, name)
        low = -1.0 if name == "match" else 0.0
        if value is not None and not low <= value <= 1.0:
            refuse(f"thresholds.{name} is {value}, but must be in [{low:g}, 1]")
    if (m.thresholds.score_turned or 0.0) > (m.thresholds.score or 0.0):
        refuse("thresholds.score_turned must not be above thresholds.score")
    if any(not value > 0 for value in m.input.std):
        refuse("input.std must be positive")
    for crop in m.input.crops:
        if not 16 <= crop.size <= 1024:
            refuse("input.crops.size must be in [16, 1024]")
        if crop.kind == "context" and not 1.0 <= crop.scale <= 10.0:
            refuse("input.crops.scale of a context crop must be in [1, 10]")
    if m.ood is not None and not m.ood.scale > 0:
        refuse("ood.scale must be positive")
    if m.card and not _is_inside(m.card):
        refuse("card must be a file inside the package")
    _check_task(m, refuse)
    _check_impostors(m, refuse)


def _check_numbers(m: Manifest, refuse: typing.Callable[[str], typing.NoReturn]) -> None:
    if found := _endless(m, ""):
        refuse(f"{found} must be a finite number")
    for name in Memory.__struct_fields__:
        if getattr(m.memory, name) < 0:
            refuse(f"memory.{name} must not be negative")
    if m.random_seed is not None and not 0 <= m.random_seed < 1 << 63:
        refuse("random_seed must be in [0, 2**63)")
    for name, table in (("options", m.options), ("provenance", m.provenance)):
        if _nested(table):
            refuse(f"{name} may be nested {_MOST_NESTED} deep")
    try:
        json.dumps(m.options)
    except TypeError:
        refuse("options may be texts, numbers, true and false, and lists and tables of them")


def _nested(table: Mapping[str, Any]) -> bool:
    """Whether it is nested deeper than can be. Dotted keys nest as deep as the file is long."""
    level: list[Any] = [table]
    for _ in range(_MOST_NESTED):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        level = inner
    return bool(level)


def _endless(value: object, where: str) -> str:
    """Where a number of the manifest is infinite, or none; empty = nowhere. Options are the
    architecture's to judge."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else where
    if isinstance(value, tuple):
        return next((found for one in value if (found := _endless(one, where))), "")
    if isinstance(value, _Table):
        names = value.__struct_fields__
        parts = ((getattr(value, name), f"{where}.{name}".strip(".")) for name in names)
        return next((found for one, name in parts if (found := _endless(one, name))), "")
    return ""


def _check_task(m: Manifest, refuse: typing.Callable[[str], typing.NoReturn]) -> None:
    kinds = [crop.kind for crop in m.input.crops]
    if m.task is Stage.DETECTOR:
        if kinds:
            refuse("a detector takes whole pictures: leave out input.crops")
        if m.runtime != "null" and not 64 <= m.input.max_side <= 4096:
            refuse("input.max_side of a detector must be in [64, 4096]")
        if m.input.max_side % DETECTOR_STRIDE:
            refuse(f"input.max_side must be a multiple of {DETECTOR_STRIDE}")
        return
    if m.input.max_side:
        refuse("input.max_side is for detectors; give width and height")
    if m.runtime != "null" and not (16 <= m.input.width <= 1024 and 16 <= m.input.height <= 1024):
        refuse("input.width and input.height must be in [16, 1024]")
    if m.task is Stage.RECOGNIZER:
        if kinds != ["aligned"]:
            refuse("a recognizer needs exactly one input.crops row of kind aligned")
        if not 1 <= m.output.embedding_dim <= 4096:
            refuse("output.embedding_dim must be in [1, 4096]")
        if m.ood is None:
            refuse("a recognizer needs [ood]: say how its OOD score is made")
    else:
        if not kinds or set(kinds) != {"context"}:
            refuse("a liveness model needs input.crops rows of kind context")
        if (m.thresholds.spoof or 0.0) > (m.thresholds.live or 0.0):
            refuse("thresholds.spoof must not be above thresholds.live")


def _check_impostors(m: Manifest, refuse: typing.Callable[[str], typing.NoReturn]) -> None:
    if not m.impostors:
        return
    if m.task is not Stage.RECOGNIZER:
        refuse("impostors are for recognisers")
    scores = [row.ood for row in m.impostors]
    if scores != sorted(set(scores)) or not 0.0 <= scores[0] <= scores[-1] <= 1.0:
        refuse("impostors.ood must be in [0, 1] and rise from row to row")
    for row in m.impostors:
        cosines = list(row.similarity)
        if len(cosines) != IMPOSTOR_DECADES or cosines != sorted(set(cosines)):
            refuse(f"impostors.similarity must be {IMPOSTOR_DECADES} rising cosines")
        if not -1.0 <= cosines[0] <= cosines[-1] <= 1.0:
            refuse("impostors.similarity must be in [-1, 1]")
        if row.pairs < 1 or not 0.0 < row.measured <= 1.0:
            refuse("impostors.pairs must be positive and impostors.measured in (0, 1]")


def _check_weights(m: Manifest, refuse: typing.Callable[[str], typing.NoReturn]) -> None:
    for part in m.weights:
        if not _is_inside(part.file):
            refuse(f"weights.file {part.file!r} must be a file inside the package")
        if not _SHA256.fullmatch(part.sha256):
            refuse(f"weights.sha256 of {part.file} must be 64 lower-case hex digits")
    parts = [part.part for part in m.weights]
    if len(set(parts)) != len(parts):
        refuse("weights.part must differ between weights files")
    if m.runtime == "null":
        if m.weights or m.random_seed is not None or m.architecture:
            refuse("a null model has neither weights, architecture nor random_seed")
    elif bool(m.weights) == (m.random_seed is not None):
        refuse("give either weights or random_seed")
    if m.runtime == "onnx" and (len(m.weights) != 1 or not m.weights[0].file.endswith(".onnx")):
        refuse("runtime onnx needs exactly one weights file, ending in .onnx")
    if m.runtime == "onnx" and m.task is Stage.DETECTOR and not m.output.decode:
        refuse("output.decode is missing: say how the detector's outputs are read (yunet)")
    if m.runtime == "torch":
        for part in m.weights:
            if not part.file.endswith((".safetensors", ".pth", ".pt")):
                refuse(f"weights.file {part.file} must end in .safetensors, .pth or .pt")


def _check_architecture(m: Manifest, refuse: typing.Callable[[str], typing.NoReturn]) -> None:
    if m.runtime != "torch":
        if m.runtime == "onnx" and m.architecture:
            refuse("architecture is for runtime torch; an ONNX file holds its own")
        return
    known = ARCHITECTURES.get(m.architecture)
    if known is None:
        refuse(f"unknown architecture {m.architecture!r}; {hint(m.architecture, ARCHITECTURES)}")
    elif known.task is not m.task:
        refuse(f"architecture {m.architecture} is a {known.task}, not a {m.task}")


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return bool(file) and "\\" not in file and not path.is_absolute() and ".." not in path.parts
