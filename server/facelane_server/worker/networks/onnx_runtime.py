"""Networks run by ONNX Runtime: the second runtime, for models that come as ONNX files.

It is an optional extra (``pip install facelane[onnx]``). Detectors need a declared
decode; recognisers and liveness networks are read as their package says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import cv2
import numpy as np

from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.models.api import F32, U8, DeviceOptions
from facelane_server.models.package import Input, Ood, Package, invalid
from facelane_server.worker.device import device_index, is_cuda
from facelane_server.worker.networks.candidates import HEADS, decode_yunet
from facelane_server.worker.networks.runner import Computed, Runner, Ticket

_DECODES: Final = {"yunet": tuple(f"{head}_{s}" for head in HEADS for s in (8, 16, 32))}


class OnnxRunner(Runner):
    """Runs a batch when it is launched."""

    def __init__(
        self, package: Package, options: DeviceOptions, *, warm_shapes: Sequence[tuple[int, int]]
    ) -> None:
        self._package = package
        self._warm_shapes = list(warm_shapes)
        self._session = _open(package, options)
        self._inputs = [node.name for node in self._session.get_inputs()]
        self._outputs = [node.name for node in self._session.get_outputs()]
        self._staged: tuple[U8, ...] = ()
        self._check_names()
        self._one_by_one = self._check_shapes()

    def stage(self, count: int, shapes: Sequence[tuple[int, int]]) -> tuple[U8, ...]:
        self._staged = tuple(np.empty((count, *shape, 3), np.uint8) for shape in shapes)
        return self._staged

    def launch(self) -> Ticket:
        spec = self._package.manifest.input
        feed = {
            name: prepare(pictures, spec)
            for name, pictures in zip(self._inputs, self._staged, strict=True)
        }
        return Computed(self._read(dict(zip(self._outputs, self._run(feed), strict=True))))

    def _run(self, feed: Mapping[str, F32]) -> list[Any]:
        if not self._one_by_one:
            return list(self._session.run(None, feed))
        count = len(next(iter(feed.values())))
        rows = [
            self._session.run(None, {name: batch[i : i + 1] for name, batch in feed.items()})
            for i in range(count)
        ]
        return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

    def warm_up(self) -> None:
        for array in self.stage(1, self._warm_shapes):
            array[...] = 0
        self.launch()

    def _read(self, outputs: Mapping[str, Any]) -> F32:
        manifest = self._package.manifest
        if manifest.task is Stage.DETECTOR:
            height, width = self._staged[0].shape[1:3]
            self._check_heads(outputs, height, width)
            return decode_yunet(outputs, height, width)
        if manifest.task is Stage.RECOGNIZER:
            assert manifest.ood is not None
            return _embeddings(
                outputs, manifest.output.embedding, manifest.output.ood, manifest.ood
            )
        scores = np.asarray(outputs[self._outputs[0]], np.float32)
        if manifest.output.softmax:
            scores = np.exp(scores - scores.max(1, keepdims=True))
            scores /= scores.sum(1, keepdims=True)
        column: F32 = scores[:, manifest.output.live_class, None]
        return column

    def _check_heads(self, outputs: Mapping[str, Any], height: int, width: int) -> None:
        """A row for each cell of each stride: a file whose outputs are other ones by these
        names is refused when it is loaded, by the shape that is wrong."""
        items = len(self._staged[0])
        for name in _DECODES["yunet"]:
            head, stride = name.split("_")
            cells = (height // int(stride)) * (width // int(stride))
            values = HEADS[head]
            if outputs[name].size != items * cells * values:
                raise invalid(
                    self._package.folder,
                    f"the ONNX output {name} has shape {list(outputs[name].shape)} for {items} "
                    f"pictures of {width}x{height}, but [{items}, {cells}, {values}] is decoded",
                )

    def _check_names(self) -> None:
        manifest, folder = self._package.manifest, self._package.folder
        wanted = [name for name in (manifest.output.embedding, manifest.output.ood) if name]
        wanted += _DECODES.get(manifest.output.decode, ())
        for name in wanted:
            if name not in self._outputs:
                raise invalid(
                    folder, f"the ONNX file has no output {name}; it has {', '.join(self._outputs)}"
                )
        expected = max(len(manifest.input.crops), 1)
        if len(self._inputs) != expected:
            raise invalid(
                folder, f"the ONNX file has {len(self._inputs)} inputs, but {expected} are declared"
            )
        source = manifest.ood.source if manifest.ood else "none"
        if source in ("head", "rts") and not manifest.output.ood:
            raise invalid(folder, f"ood.source is {source}: name the ONNX output in output.ood")

    def _check_shapes(self) -> bool:
        """Whether the file takes one item at a time. Sizes that are fixed in it must be those
        that it will be given: ONNX Runtime would say so at the first frame."""
        folder, spec = self._package.folder, self._package.manifest.input
        one_by_one = False
        for node in self._session.get_inputs():
            # A dimension that is free is a name or nothing.
            batch, channels, *size = [d if isinstance(d, int) else 0 for d in node.shape]
            if len(size) != 2 or channels not in (0, 3):
                raise invalid(
                    folder,
                    f"the ONNX input {node.name} has shape {node.shape}, but pictures come as "
                    "[items, 3, height, width]",
                )
            if batch > 1:
                raise invalid(
                    folder,
                    f"the ONNX input {node.name} takes {batch} items and no other number: export "
                    "it with a free first dimension (dynamic_axes), or with 1",
                )
            one_by_one = one_by_one or batch == 1
            height, width = size
            if self._package.task is Stage.DETECTOR:
                if height or width:
                    raise invalid(
                        folder,
                        f"the ONNX input {node.name} takes pictures of {width}x{height} alone, but "
                        "a detector sees every size: export it with free height and width "
                        "(dynamic_axes)",
                    )
            elif height not in (0, spec.height) or width not in (0, spec.width):
                raise invalid(
                    folder,
                    f"the ONNX input {node.name} takes {width}x{height}, but input.width and "
                    f"input.height say {spec.width}x{spec.height}: correct [input]",
                )
        return one_by_one


def prepare(pictures: U8, spec: Input) -> F32:
    """uint8 [n, H, W, 3] BGR to the network's input, float32 [n, 3, height, width]."""
    if spec.width and pictures.shape[1:3] != (spec.height, spec.width):
        pictures = np.stack([cv2.resize(p, (spec.width, spec.height)) for p in pictures])
    x = pictures.astype(np.float32)
    if spec.color == "rgb":
        x = x[..., ::-1]
    x -= np.asarray(spec.mean, np.float32)
    x /= np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _embeddings(outputs: Mapping[str, Any], vector: str, trust: str, ood: Ood) -> F32:
    raw = np.asarray(outputs[vector] if vector else next(iter(outputs.values())), np.float32)
    raw = raw.reshape(len(raw), -1)
    norm = np.linalg.norm(raw, axis=1, keepdims=True)
    if ood.source == "none":
        score = np.ones_like(norm)
    else:
        value = norm if ood.source == "norm" else np.asarray(outputs[trust]).reshape(-1, 1)
        if ood.mapping == "exp":
            score = np.exp(np.minimum(value, 0.0))
        else:
            score = 1.0 / (1.0 + np.exp(-((value - ood.center) / ood.scale).clip(-60, 60)))
    return np.concatenate((raw / norm.clip(min=1e-6), score), 1).astype(np.float32)


def _open(package: Package, options: DeviceOptions) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise FacelaneError(
            Reason.MODEL_INVALID,
            f"model {package.name} is an ONNX file, and ONNX Runtime is not installed; "
            "install facelane[onnx]",
            metadata={"model": package.name},
        ) from error
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if is_cuda(options.device):
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise FacelaneError(
                Reason.CONFIG_INVALID,
                f"model {package.name} is to run on {options.device}, but this ONNX Runtime has "
                "no CUDA; install onnxruntime-gpu, or set the pool's devices to cpu",
            )
        limit = options.memory_mib * 1024 * 1024
        cuda = {"device_id": device_index(options.device)} | (
            {"gpu_mem_limit": limit} if limit else {}
        )
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    (part,) = package.manifest.weights
    data = package.read_weights(part)
    try:
        return onnxruntime.InferenceSession(data, settings, providers=providers)
    except Exception as error:  # onnxruntime raises types of its own
        raise invalid(package.folder, f"{part.file} is not a usable ONNX file: {error}") from error
