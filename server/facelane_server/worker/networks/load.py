"""A package and a device to a model that is ready to be warmed up.

The heavy modules (torch, ONNX Runtime) are imported only when a package needs them, so
a worker of null models starts in a fraction of a second.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, assert_never

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.ipc.messages import CropSpecMessage, Load
from facelane_server.models.api import (
    AlignedCrop,
    ContextCrop,
    CropSpec,
    DeviceOptions,
    Model,
)
from facelane_server.models.architectures import ARCHITECTURES
from facelane_server.models.package import (
    DETECTOR_STRIDE,
    Manifest,
    Package,
    WeightsFile,
    invalid,
    read_package,
)
from facelane_server.naming import hint
from facelane_server.worker.networks.null import NullDetector, NullLiveness, NullRecognizer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from facelane_server.worker.decoding.device_pictures import DevicePictures
    from facelane_server.worker.networks.runner import Runner


_NULL_OPTIONS: Final = ("faces", "decode")


def load_model(message: Load) -> tuple[Model, str, str]:
    """(model, model id, device) of a Load message. Torch is imported only by models that
    need it. Raises FacelaneError(MODEL_INVALID) and whatever the runtime raises."""
    package = read_package(Path(message.package))
    device = message.device
    if package.manifest.runtime == "null":
        device = "cpu"
    elif device == "auto":
        device = _auto_device()
    options = DeviceOptions(
        device=device,
        precision=message.precision,
        graphs=message.graphs,
        threads=message.threads,
        stream_priority=message.stream_priority,
        memory_mib=message.memory_mib if device.startswith("cuda") else 0,
        decode=message.decode,
    )
    model = load(
        package,
        options,
        batch_max=message.batch_max or batch_for(package, device),
        crops=tuple(_crop_spec(spec) for spec in message.crops),
        max_side=message.max_side,
        extra=message.options,
    )
    return model, package.model_id, device


def batch_for(package: Package, device: str) -> int:
    """Where batches pay. A CPU computes their items one after the other: a detector gains
    nothing (its working set leaves the cache), small networks gain a quarter, and a picture
    that cannot wait waits for all that came with it."""
    if package.manifest.runtime == "null" or device.startswith("cuda"):
        return limits.BATCH
    return 1 if package.manifest.task is Stage.DETECTOR else limits.BATCH // 2


def _crop_spec(spec: CropSpecMessage) -> CropSpec:
    return ContextCrop(spec.scale, spec.size) if spec.scale else AlignedCrop(spec.size)


def _auto_device() -> str:
    if not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg")):
        return "cpu"
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def load(
    package: Package,
    options: DeviceOptions,
    *,
    batch_max: int,
    crops: tuple[CropSpec, ...] = (),
    max_side: int = 0,
    extra: Mapping[str, str] | None = None,
) -> Model:
    """The package's model on a device, its weights checked and loaded.

    ``crops``: what a detector is to cut out for the models behind it. ``max_side``:
    overrides a detector package's own. ``extra`` may hold ``faces`` (``3``) and
    ``decode`` (``true``, ``false``) for a null detector; other keys are ignored. Call
    ``warm_up`` before the first batch.

    Raises FacelaneError: MODEL_INVALID (the file, key or shape at fault is named),
    CONFIG_INVALID (no such device).
    """
    manifest = package.manifest
    max_side = _padded(max_side or manifest.input.max_side)
    if manifest.runtime == "null":
        return _null(package, batch_max, crops, extra or {})
    runner = (
        _onnx_runner(package, options, max_side)
        if manifest.runtime == "onnx"
        else _torch_runner(package, options, batch_max, max_side)
    )
    if manifest.task is Stage.DETECTOR:
        from facelane_server.worker.networks.detector import NetworkDetector

        thresholds = manifest.thresholds
        assert thresholds.score is not None
        assert thresholds.nms is not None
        return NetworkDetector(
            runner,
            crops=crops,
            max_side=max_side,
            score=thresholds.score,
            score_turned=thresholds.score_turned,
            nms=thresholds.nms,
            batch_max=batch_max,
        )
    if manifest.task is Stage.RECOGNIZER:
        from facelane_server.worker.networks.recognizer import NetworkRecognizer

        return NetworkRecognizer(
            runner,
            crop=_aligned_crop(package),
            embedding_dim=package.embedding_dim,
            batch_max=batch_max,
        )
    if manifest.task is Stage.LIVENESS:
        from facelane_server.worker.networks.liveness import NetworkLiveness

        return NetworkLiveness(runner, crops=_context_crops(package), batch_max=batch_max)
    assert_never(manifest.task)


def build_network(manifest: Manifest) -> nn.Module:
    """The manifest's architecture with its options, weights as initialised.

    Raises ValueError for options that it does not have or cannot take.
    """
    architecture = ARCHITECTURES[manifest.architecture]
    factory = getattr(importlib.import_module(architecture.module), architecture.factory)
    known = [p for p in inspect.signature(factory).parameters if p != "self"]
    for option in manifest.options:
        if option not in known:
            raise ValueError(
                f"{manifest.architecture} has no option {option}; {hint(option, known)}"
            )
    try:
        network: nn.Module = factory(**manifest.options)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{manifest.architecture} cannot be built: {error}") from error
    return network


def network_with_weights(package: Package) -> nn.Module:
    """The package's torch network on the CPU, float32, in evaluation mode.

    Raises FacelaneError(MODEL_INVALID) naming the file, key or shape at fault.
    """
    import torch

    manifest = package.manifest
    if package.random_weights:
        # The generator of this thread alone; other models keep their streams.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(manifest.random_seed or 0)
            network = _build(package)
        return network.eval()
    network = _build(package)
    for part in manifest.weights:
        target = network
        if part.part:
            found = dict(network.named_children()).get(part.part)
            if found is None:
                names = ", ".join(name for name, _ in network.named_children())
                raise invalid(
                    package.folder, f"weights.part {part.part} is no part of the model ({names})"
                )
            target = found
        _fill(package, part, target, _state(package, part))
    covered = {part.part for part in manifest.weights}
    if "" not in covered:
        for name, child in network.named_children():
            if name not in covered and any(True for _ in child.parameters()):
                raise invalid(package.folder, f"no weights file fills the part {name}")
    return network.eval()


def _build(package: Package) -> nn.Module:
    try:
        return build_network(package.manifest)
    except ValueError as error:
        raise invalid(package.folder, f"options: {error}") from error


def _state(package: Package, part: WeightsFile) -> dict[str, Tensor]:
    """The tensors of a weights file, by name, float32 where they are floating."""
    data = package.read_weights(part)
    if part.file.endswith(".safetensors"):
        tensors = _safetensors(package, part, data)
    else:
        tensors = _checkpoint(package, part, data)
    return {
        name.removeprefix("module."): t.float() if t.is_floating_point() else t
        for name, t in tensors.items()
    }


def _safetensors(package: Package, part: WeightsFile, data: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load as parse

    try:
        return parse(data)
    except MemoryError:
        raise
    except Exception as error:  # of two libraries, whose kinds differ by what is wrong
        raise invalid(package.folder, f"{part.file} is not a safetensors file: {error}") from error


def _checkpoint(package: Package, part: WeightsFile, data: bytes) -> dict[str, Tensor]:
    try:
        return read_checkpoint(data)
    except ValueError as error:
        raise invalid(package.folder, f"{part.file} {error}") from error


def read_checkpoint(data: bytes) -> dict[str, Tensor]:
    """The tensors of a torch checkpoint, or of the ``state_dict`` inside of it.

    Raises ValueError for anything but plain tensors; code in it is never run.
    """
    import torch

    try:
        with warnings.catch_warnings():
            # About pickle protocols: the file is either read or refused.
            warnings.simplefilter("ignore", UserWarning)
            found: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a reader of pickles raises whatever its bytes lead it to
        raise ValueError(
            "is not a checkpoint of plain tensors; files that hold code are refused"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in found.items()
    ):
        raise ValueError("holds no state dict of named tensors")
    for name, tensor in found.items():
        if not _is_plain(tensor):
            raise ValueError(f"holds {name}, which is no plain tensor: save it dense, in full")
    return dict(found)


def _is_plain(tensor: Tensor) -> bool:
    """Dense, with each of its values in the file: a few bytes can call themselves terabytes."""
    import torch

    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _fill(
    package: Package, part: WeightsFile, network: nn.Module, state: dict[str, Tensor]
) -> None:
    own = network.state_dict()
    # Counts of training batches say nothing at inference; many files leave them out.
    own = {k: v for k, v in own.items() if not k.endswith("num_batches_tracked")}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    if missing := [k for k in own if k not in state]:
        raise invalid(
            package.folder,
            f"{part.file} lacks the key {missing[0]} ({len(missing)} missing in all)",
        )
    if unexpected := [k for k in state if k not in own]:
        raise invalid(
            package.folder,
            f"{part.file} has the unexpected key {unexpected[0]} ({len(unexpected)} in all); "
            "check the architecture's options",
        )
    for key, tensor in own.items():
        if state[key].shape != tensor.shape:
            raise invalid(
                package.folder,
                f"{part.file}: {key} has shape {list(state[key].shape)}, but the architecture "
                f"needs {list(tensor.shape)}",
            )
        if not state[key].isfinite().all():
            raise invalid(package.folder, f"{part.file}: {key} holds values that are not finite")
    network.load_state_dict(state, strict=False)


def _torch_runner(
    package: Package, options: DeviceOptions, batch_max: int, max_side: int
) -> Runner:
    from facelane_server.worker.device import is_cuda, open_device
    from facelane_server.worker.networks import serving, torch_runner

    open_device(options)
    manifest = package.manifest
    network = network_with_weights(package)
    on_card = is_cuda(options.device)
    if manifest.task is Stage.DETECTOR:
        pictures = _pictures(options) if on_card else None
        served: serving.Served = serving.ServedDetector(
            network, manifest.input, suppress=_suppression(manifest, pictures)
        )
        if on_card:
            return torch_runner.CudaRunner(
                served,
                canvases=canvases(max_side),
                batch_max=batch_max,
                options=options,
                pictures=pictures,
            )
    elif manifest.task is Stage.RECOGNIZER:
        assert manifest.ood is not None
        served = serving.ServedRecognizer(network, manifest.input, manifest.ood)
    else:
        served = serving.ServedLiveness(network, manifest.input)
    shapes = _shapes(package, max_side)
    if not on_card:
        return torch_runner.CpuRunner(served, warm_shapes=shapes)
    return torch_runner.CudaRunner(served, shapes=shapes, batch_max=batch_max, options=options)


def canvases(max_side: int) -> list[tuple[int, int]]:
    """Heights and widths of what a card's graphs take: a square, which holds any picture, and
    what a picture of 16:9 fills, as most cameras' do. One of 4:3 gained 6 % over the square."""
    wide = _padded(max_side * 9 // 16)
    return [(max_side, max_side), (wide, max_side)] if wide < max_side else [(max_side, max_side)]


def _pictures(options: DeviceOptions) -> DevicePictures:
    """What brings pictures to the card, and who decodes JPEG. Raises FacelaneError(CONFIG_INVALID)
    where the card was asked for and cannot."""
    from facelane_server.worker.decoding.device_pictures import DevicePictures
    from facelane_server.worker.journal import log_event

    pictures = DevicePictures(options.device)
    if options.decode != "cpu":
        try:
            pictures.add_nvjpeg()
        except FacelaneError as error:
            if options.decode != "auto":
                raise
            log_event("JPEG is decoded on the host", cause=error.message)
    return pictures


def _suppression(
    manifest: Manifest, pictures: DevicePictures | None
) -> Callable[[Tensor], Tensor] | None:
    """On the card where there are kernels for it."""
    if pictures is None:
        return None
    from facelane_server.worker.decoding.cuda_pixels import CudaPixels

    if not isinstance(pictures.pixels, CudaPixels):
        return None
    score, iou = manifest.thresholds.score_turned, manifest.thresholds.nms
    score = manifest.thresholds.score if score is None else score
    assert score is not None
    assert iou is not None
    return functools.partial(pictures.pixels.suppress, score=score, iou=iou)


def _onnx_runner(package: Package, options: DeviceOptions, max_side: int) -> Runner:
    from facelane_server.worker.networks.onnx_runtime import OnnxRunner

    return OnnxRunner(package, options, warm_shapes=_shapes(package, max_side))


def _shapes(package: Package, max_side: int) -> list[tuple[int, int]]:
    """Heights and widths of the inputs: the crops', or a detector's typical picture."""
    if package.task is Stage.DETECTOR:
        return [(_padded(max_side * 3 // 4), max_side)]
    return [(crop.size, crop.size) for crop in package.crops]


def _null(
    package: Package, batch_max: int, crops: tuple[CropSpec, ...], extra: Mapping[str, str]
) -> Model:
    chosen = {k: _literal(v) for k, v in extra.items() if k in _NULL_OPTIONS}
    options = {**package.manifest.options, **chosen}
    if package.task is Stage.DETECTOR:
        return NullDetector(
            crops=crops,
            faces=int(options.get("faces", 1)),
            decode=bool(options.get("decode", True)),
            batch_max=batch_max,
        )
    if package.task is Stage.RECOGNIZER:
        return NullRecognizer(
            crop=_aligned_crop(package),
            embedding_dim=package.embedding_dim,
            batch_max=batch_max,
        )
    return NullLiveness(crops=_context_crops(package), batch_max=batch_max)


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FacelaneError(
            Reason.CONFIG_INVALID, f"the model option value {text!r} is neither number nor boolean"
        ) from error


def _aligned_crop(package: Package) -> AlignedCrop:
    return next(crop for crop in package.crops if isinstance(crop, AlignedCrop))


def _context_crops(package: Package) -> tuple[ContextCrop, ...]:
    return tuple(crop for crop in package.crops if isinstance(crop, ContextCrop))


def _padded(side: int) -> int:
    return -(-side // DETECTOR_STRIDE) * DETECTOR_STRIDE
