"""Public weights files turned into model packages.

Each recipe knows one public model: which files it consists of, how they are told
apart, and the input, thresholds and calibration that were measured for it. Files are
copied unchanged where they can be loaded as they are; the initialisers of an ONNX
recogniser are renamed into a safetensors file, so that running it needs no ONNX.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import tomli_w

from facelane_server.domain import FacelaneError, Reason
from facelane_server.models.package import MANIFEST, Package, read_package

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one public model becomes a package. ``parts``: one weights file each."""

    name: str
    title: str
    parts: tuple[str, ...]
    build: Callable[[Recipe, Sequence[Path], Path], dict[str, Any]]
    """(recipe, sources in the order of ``parts``, folder) -> manifest; writes the weights."""
    manifest: Mapping[str, Any] = field(default_factory=dict)


def import_model(
    recipe: str,
    sources: Sequence[Path],
    directory: Path,
    *,
    name: str = "",
    version: str = "1.0.0",
    overrides: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Package:
    """Make a package in ``directory`` from public weights files; it is complete or absent.

    ``recipe`` is a key of :data:`RECIPES`. ``overrides`` are merged into the manifest,
    tables key by key. Raises FacelaneError(MODEL_INVALID or ARGUMENT_INVALID).
    """
    found = RECIPES.get(recipe)
    if found is None:
        raise _refuse(f"no recipe is called {recipe}; there are: {', '.join(RECIPES)}")
    if len(sources) != len(found.parts):
        raise _refuse(f"recipe {recipe} takes {len(found.parts)} files: {', '.join(found.parts)}")
    for source in sources:
        if not source.is_file():
            raise _refuse(f"{source} is not a file")
    if len({source.name for source in sources}) != len(sources):
        raise _refuse("two of the files have one name; rename one")
    if name in (".", "..") or Path(name).name != name:
        raise _refuse(f"{name} names a folder elsewhere; --name is the package's, --into its place")
    final = directory / (name or found.name)
    if final.exists() and not replace:
        raise _refuse(f"{final} exists already; choose another --name, or --replace it")
    if final.exists() and not (final / MANIFEST).is_file():
        raise _refuse(f"{final} is no model package, and is not replaced; choose another --name")
    try:
        return _build(recipe, sources, final, version, overrides or {})
    except OSError as error:
        raise _refuse(f"{error.filename or directory}: {error.strerror or error}") from error


def _build(
    recipe: str,
    sources: Sequence[Path],
    final: Path,
    version: str,
    overrides: Mapping[str, Any],
) -> Package:
    """The package, in the place of one that is there."""
    found = RECIPES[recipe]
    directory = final.parent
    directory.mkdir(parents=True, exist_ok=True)
    # Built beside its final place and renamed: nobody ever reads half a package.
    with tempfile.TemporaryDirectory(prefix=".import-", dir=directory) as scratch:
        folder = Path(scratch) / final.name
        folder.mkdir()
        try:
            built = found.build(found, sources, folder)
        except (FacelaneError, OSError, MemoryError):
            raise
        except Exception as error:  # whatever a file leads its reader to
            names = ", ".join(source.name for source in sources)
            raise _refuse(f"{names}: not what recipe {recipe} takes ({error})") from error
        manifest = _merged(built, overrides)
        manifest["name"] = final.name
        manifest["version"] = version
        (folder / MANIFEST).write_bytes(tomli_w.dumps({"schema": 1, **manifest}).encode())
        package = read_package(folder)
        _try_weights(package)
        before = Path(scratch) / "before"
        if final.exists():
            final.rename(before)
        try:
            folder.rename(final)
        except OSError:
            if before.exists():
                before.rename(final)
            raise
    return read_package(final)


def guess_recipe(sources: Sequence[Path]) -> str:
    """The recipe that the files' names speak of; raises FacelaneError(ARGUMENT_INVALID)."""
    names = " ".join(sorted(source.name.lower() for source in sources))
    for words, recipe in (
        (("yunet", ".pth"), "yunet"),
        (("yunet", ".onnx"), "yunet-onnx"),
        (("minifasnetv1se", "minifasnetv2"), "minifasnet"),
        (("mbf", ".onnx"), "mobilefacenet-onnx"),
        (("rts",), "rts"),
    ):
        if all(word in names for word in words):
            return recipe
    raise _refuse(
        f"the files' names do not tell which model they are; name one of {', '.join(RECIPES)}"
    )


# -- recipes ----------------------------------------------------------------------------


def _copied(recipe: Recipe, sources: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Weights files as they are."""
    weights = []
    for source, part in zip(sources, recipe.parts, strict=True):
        shutil.copyfile(source, folder / source.name)
        row = {"file": source.name, "sha256": _sha256(folder / source.name)}
        weights.append(row if len(sources) == 1 else {**row, "part": part})
    return {**recipe.manifest, "weights": weights, "provenance": _provenance(sources)}


def _minifasnet(recipe: Recipe, sources: Sequence[Path], folder: Path) -> dict[str, Any]:
    """The pair in whichever order the files were named, where their names tell."""
    return _copied(recipe, sorted(sources, key=lambda file: "v1se" in file.name.lower()), folder)


def _mobilefacenet_onnx(recipe: Recipe, sources: Sequence[Path], folder: Path) -> dict[str, Any]:
    """A MobileFaceNet whose batch norms are folded: its initialisers by our names."""
    state, options = _mobilefacenet_state(sources[0])
    return _safetensors(recipe, sources, folder, state, options)


def _rts(recipe: Recipe, sources: Sequence[Path], folder: Path) -> dict[str, Any]:
    """The recogniser's keys of an RTS checkpoint; what only training needs is left out."""
    from facelane_server.worker.networks.load import read_checkpoint

    try:
        found = read_checkpoint(sources[0].read_bytes())
    except ValueError as error:
        raise _refuse(f"{sources[0].name} {error}") from error
    prefixes = ("features.", "features_backbone.", "logvar_rts_backbone.")
    state = {}
    for key, value in found.items():
        key = key.removeprefix("module.").removeprefix("backbone.")
        if key.startswith(prefixes):
            state[key] = value
    if not state:
        raise _refuse(f"{sources[0].name} has no key that begins with {', '.join(prefixes)}")
    return _safetensors(recipe, sources, folder, state, {})


def _safetensors(
    recipe: Recipe,
    sources: Sequence[Path],
    folder: Path,
    state: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    from safetensors.torch import save_file

    file = folder / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    return {
        **recipe.manifest,
        "options": dict(options),
        "weights": [{"file": file.name, "sha256": _sha256(file)}],
        "provenance": _provenance(sources),
    }


def _mobilefacenet_state(source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by our names, and the options of the network that they fit.

    The graph is a chain in the order of the network's modules, so layers are paired by
    order; every shape is then checked when the package is loaded.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise _refuse("reading an ONNX file needs facelane[onnx]") from error
    import numpy as np
    import torch
    from google.protobuf.message import DecodeError
    from torch import nn

    from facelane_server.worker.networks.architectures.mobilefacenet import MobileFaceNet

    try:
        graph = onnx.load(str(source)).graph
    except DecodeError as error:
        raise _refuse(f"{source.name} is not an ONNX file") from error
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    layers: dict[str, list[list[Any]]] = {"Conv": [], "PRelu": [], "Gemm": []}
    strides: list[int] = []
    for node in graph.node:
        if node.op_type in layers:
            layers[node.op_type].append([values[i] for i in node.input if i in values])
        if node.op_type == "Conv":
            strides.append(next((a.ints[0] for a in node.attribute if a.name == "strides"), 1))
    convolutions = [weights[0] for weights in layers["Conv"]]
    if len(convolutions) < 8 or len(layers["Gemm"]) != 1:
        raise _refuse(f"{source.name} is not a MobileFaceNet with a flattened head")
    options = _mobilefacenet_options([tuple(w.shape) for w in convolutions], strides)
    options["embedding_dim"] = int(layers["Gemm"][0][0].shape[0])
    network = MobileFaceNet(**options)
    state: dict[str, Tensor] = {}
    for kind, rows in ((nn.Conv2d, layers["Conv"]), (nn.PReLU, layers["PRelu"])):
        names = [name for name, module in network.named_modules() if isinstance(module, kind)]
        if len(names) != len(rows):
            raise _refuse(f"{source.name} has {len(rows)} layers where {len(names)} were expected")
        for name, row in zip(names, rows, strict=True):
            for tensor, what in zip(row, ("weight", "bias"), strict=False):
                flat = tensor.reshape(-1) if kind is nn.PReLU else tensor
                state[f"{name}.{what}"] = torch.from_numpy(np.array(flat, np.float32))
    for tensor, what in zip(layers["Gemm"][0], ("weight", "bias"), strict=True):
        state[f"head.linear.{what}"] = torch.from_numpy(np.array(tensor, np.float32))
    return state, options


def _mobilefacenet_options(
    shapes: Sequence[tuple[int, ...]], strides: Sequence[int]
) -> dict[str, Any]:
    """Options from the convolutions: two of the stem, three a bottleneck (expansion,
    depthwise, projection), two of the head. A strided depthwise begins a stage."""
    stages: list[list[int]] = []
    for i in range(2, len(shapes) - 2, 3):
        expansion, outputs = shapes[i][0], shapes[i + 2][0]
        if strides[i + 1] == 2:
            stages.append([outputs, 0, expansion, expansion])
        elif stages:
            stages[-1][1] += 1
            stages[-1][3] = expansion
    return {
        "stem": shapes[0][0],
        "stages": stages,
        "features": shapes[-2][0],
        "head": "flatten",
        "neck": shapes[-1][0],
        "norm": False,
    }


_ARCFACE_INPUT: Final[Mapping[str, Any]] = {
    "width": 112,
    "height": 112,
    "color": "rgb",
    "mean": [127.5, 127.5, 127.5],
    "std": [127.5, 127.5, 127.5],
    "crops": [{"kind": "aligned", "size": 112}],
}

_YUNET: Final[Mapping[str, Any]] = {
    "task": "detector",
    "license": "Apache-2.0",
    "description": "YuNet: face detector with five landmarks, 78 k parameters",
    "input": {"max_side": 640, "color": "bgr"},
    "thresholds": {"score": 0.7, "nms": 0.3},
    "memory": {"weights_mib": 1, "activations_mib_per_item": 48},
}

RECIPES: Final[Mapping[str, Recipe]] = {
    "yunet": Recipe(
        name="yunet-n",
        title="YuNet detector (yunet_n.pth)",
        parts=("yunet_n.pth",),
        build=_copied,
        manifest={**_YUNET, "architecture": "yunet"},
    ),
    "yunet-onnx": Recipe(
        name="yunet-n-onnx",
        title="YuNet detector as ONNX, any size (yunet_n_dynamic.onnx)",
        parts=("yunet_n_dynamic.onnx",),
        build=_copied,
        manifest={**_YUNET, "runtime": "onnx", "output": {"decode": "yunet"}},
    ),
    "mobilefacenet-onnx": Recipe(
        name="mbf-512",
        title="MobileFaceNet recogniser, 512-d (mbf_512_fp32.onnx)",
        parts=("mbf_512_fp32.onnx",),
        build=_mobilefacenet_onnx,
        manifest={
            "task": "recognizer",
            "architecture": "mobilefacenet",
            "license": "unclear: treat as non-commercial",
            "description": "MobileFaceNet-class recogniser, 512-d; OOD from the embedding's norm",
            "input": _ARCFACE_INPUT,
            "output": {"embedding_dim": 512},
            "thresholds": {"match": 0.34, "margin": 0.05, "ood": 0.4},
            "ood": {"source": "norm", "mapping": "logistic", "center": 6.46, "scale": 0.35},
            "memory": {"weights_mib": 14, "activations_mib_per_item": 10},
        },
    ),
    "minifasnet": Recipe(
        name="minifasnet-pair",
        title="MiniFASNet V2 and V1SE liveness (both .pth files)",
        parts=("v2", "v1se"),
        build=_minifasnet,
        manifest={
            "task": "liveness",
            "architecture": "minifasnet-pair",
            "license": "Apache-2.0",
            "description": "MiniFASNet V2 and V1SE, the mean of the two",
            "input": {
                "width": 80,
                "height": 80,
                "color": "bgr",
                "crops": [
                    {"kind": "context", "scale": 2.7, "size": 80},
                    {"kind": "context", "scale": 4.0, "size": 80},
                ],
            },
            "thresholds": {"live": 0.905, "spoof": 0.5},
            "memory": {"weights_mib": 4, "activations_mib_per_item": 6},
        },
    ),
    "rts": Recipe(
        name="rts-irse64",
        title="RTS recogniser, IR-SE-64 (a checkpoint with features.*, logvar_rts_backbone.*)",
        parts=("checkpoint",),
        build=_rts,
        manifest={
            "task": "recognizer",
            "architecture": "rts-irse",
            "license": "see the checkpoint's source",
            "description": "RTS face recogniser with its own OOD score, IR-SE-64, 512-d",
            "input": _ARCFACE_INPUT,
            "output": {"embedding_dim": 512},
            "thresholds": {"match": 0.34, "margin": 0.05, "ood": 0.4},
            "ood": {"source": "rts", "mapping": "exp"},
            "memory": {"weights_mib": 182, "activations_mib_per_item": 8},
        },
    ),
    "onnx-detector": Recipe(
        name="onnx-detector",
        title="any detector whose outputs are YuNet's, as ONNX",
        parts=("model.onnx",),
        build=_copied,
        manifest={
            **_YUNET,
            "license": "unknown",
            "description": "imported ONNX detector",
            "runtime": "onnx",
            "output": {"decode": "yunet"},
        },
    ),
    "onnx-recognizer": Recipe(
        name="onnx-recognizer",
        title="any 112x112 ArcFace recogniser as ONNX; calibrate its thresholds and [ood]",
        parts=("model.onnx",),
        build=_copied,
        manifest={
            "task": "recognizer",
            "runtime": "onnx",
            "license": "unknown",
            "description": "imported ONNX recogniser; its OOD score is not calibrated",
            "input": _ARCFACE_INPUT,
            "output": {"embedding_dim": 512},
            "thresholds": {"match": 0.4, "margin": 0.05, "ood": 0.4},
            "ood": {"source": "none"},
        },
    ),
    "onnx-liveness": Recipe(
        name="onnx-liveness",
        title="any liveness network over one context crop as ONNX",
        parts=("model.onnx",),
        build=_copied,
        manifest={
            "task": "liveness",
            "runtime": "onnx",
            "license": "unknown",
            "description": "imported ONNX liveness network",
            "input": {
                "width": 80,
                "height": 80,
                "crops": [{"kind": "context", "scale": 2.7, "size": 80}],
            },
            "thresholds": {"live": 0.9, "spoof": 0.5},
        },
    ),
}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = (
            _merged(old, value)
            if isinstance(old, Mapping) and isinstance(value, Mapping)
            else value
        )
    return result


def _provenance(sources: Sequence[Path]) -> dict[str, Any]:
    return {"files": [f"{source.name} sha256:{_sha256(source)}" for source in sources]}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _try_weights(package: Package) -> None:
    """Fail now rather than in a worker: read every key and shape once."""
    if package.manifest.runtime == "torch":
        from facelane_server.worker.networks.load import network_with_weights

        network_with_weights(package)
    else:
        for part in package.manifest.weights:
            package.read_weights(part)


def _refuse(message: str) -> FacelaneError:
    return FacelaneError(Reason.ARGUMENT_INVALID, f"the model cannot be imported: {message}")
