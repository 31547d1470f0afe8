"""The recogniser's teacher: an OpenVINO IR (XML + BIN) run as a torch module.

Only the layer types of face-reidentification-retail-0095 are known; anything else is
refused by name. Constants are folded at load, an ``Add`` of a per-channel constant that
follows a convolution becomes its bias, and every intermediate is freed after its last
use (a batch of 512 would otherwise keep some ten GiB alive).
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEACHER_STEM = "face-reidentification-retail-0095"
TEACHER_SIZE = 128
"""Side of the square input in pixels; BGR, 0..255."""


@dataclass(frozen=True)
class _Layer:
    id: str
    type: str
    attributes: dict[str, str]
    inputs: tuple[str, ...]


def _pair(text: str) -> tuple[int, int]:
    first, second = (int(part) for part in text.split(","))
    return first, second


@dataclass(frozen=True)
class _Step:
    """One operation: ``arguments`` name earlier results, ``weight``/``bias`` buffers."""

    type: str
    result: str
    arguments: tuple[str, ...]
    weight: str = ""
    bias: str = ""
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    frees: tuple[str, ...] = ()


class IrModule(nn.Module):
    """Interprets an IR. ``forward`` maps [N, 3, 128, 128] to [N, 256], not normalised."""

    def __init__(self, xml: Path) -> None:
        super().__init__()
        root = ET.parse(xml).getroot()
        blob = xml.with_suffix(".bin").read_bytes()
        layers, constants = _read(root, blob)
        self._steps = self._plan(layers, constants)
        self._input = next(layer.id for layer in layers if layer.type == "Parameter")
        self._output = next(layer.inputs[0] for layer in layers if layer.type == "Result")
        self._output = self._alias.get(self._output, self._output)
        self._steps = _with_frees(self._steps, self._output)

    def _constant(self, value: np.ndarray, key: str) -> str:
        name = f"c{key}"
        if name not in self._buffers:
            self.register_buffer(name, torch.from_numpy(value.astype(np.float32)))
        return name

    def _plan(self, layers: list[_Layer], constants: dict[str, np.ndarray]) -> list[_Step]:
        users: dict[str, list[_Layer]] = {}
        for layer in layers:
            for source in layer.inputs:
                users.setdefault(source, []).append(layer)
        self._alias: dict[str, str] = {}
        folded: set[str] = set()
        steps: list[_Step] = []
        for layer in layers:
            if layer.type in ("Parameter", "Result") or layer.id in constants:
                continue
            if layer.id in folded:
                continue
            inputs = tuple(self._alias.get(i, i) for i in layer.inputs)
            live = tuple(i for i in inputs if i not in constants)
            fixed = [i for i in inputs if i in constants]
            if layer.type in ("Convolution", "GroupConvolution"):
                value = constants[fixed[0]]
                groups = 1
                if layer.type == "GroupConvolution":
                    groups = value.shape[0]
                    value = value.reshape(groups * value.shape[1], *value.shape[2:])
                begin = _pair(layer.attributes["pads_begin"])
                if begin != _pair(layer.attributes["pads_end"]):
                    raise ValueError(f"layer {layer.id}: uneven padding is not supported")
                bias = ""
                after = users.get(layer.id, [])
                if len(after) == 1 and after[0].type == "Add":
                    other = next(i for i in after[0].inputs if i != layer.id)
                    if other in constants and constants[other].size == value.shape[0]:
                        bias = self._constant(constants[other].reshape(-1), other)
                        folded.add(after[0].id)
                        self._alias[after[0].id] = layer.id
                steps.append(
                    _Step(
                        "conv", layer.id, live, self._constant(value, fixed[0]), bias,
                        _pair(layer.attributes["strides"]), begin, groups,
                    )
                )  # fmt: skip
            elif layer.type == "PReLU":
                slope = self._constant(constants[fixed[0]].reshape(-1), fixed[0])
                steps.append(_Step("prelu", layer.id, live, slope))
            elif layer.type in ("Add", "Multiply"):
                weight = self._constant(constants[fixed[0]], fixed[0]) if fixed else ""
                steps.append(_Step(layer.type.lower(), layer.id, live, weight))
            elif layer.type == "AvgPool":
                steps.append(
                    _Step("pool", layer.id, live, kernel=_pair(layer.attributes["kernel"]))
                )
            elif layer.type == "Sigmoid":
                steps.append(_Step("sigmoid", layer.id, live))
            else:
                raise ValueError(f"layer {layer.id}: type {layer.type} is not supported")
        return steps

    def forward(self, pictures: Tensor) -> Tensor:
        """[N, 3, 128, 128] BGR 0..255 -> [N, 256]."""
        return self.with_maps(pictures)[0]

    def with_maps(self, pictures: Tensor, ends: Sequence[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """The answer, and what these of ``block_ends`` gave."""
        values: dict[str, Tensor] = {self._input: pictures}
        maps: list[Tensor] = []
        for step in self._steps:
            x = values[step.arguments[0]]
            weight = getattr(self, step.weight).to(x.dtype) if step.weight else None
            if step.type == "conv":
                assert weight is not None
                bias = getattr(self, step.bias).to(x.dtype) if step.bias else None
                y = F.conv2d(x, weight, bias, step.stride, step.padding, 1, step.groups)
            elif step.type == "prelu":
                assert weight is not None
                y = F.prelu(x, weight)
            elif step.type in ("add", "multiply"):
                other = weight if weight is not None else values[step.arguments[1]]
                y = x + other if step.type == "add" else x * other
            elif step.type == "pool":
                y = F.avg_pool2d(x, step.kernel)
            else:
                y = torch.sigmoid(x)
            values[step.result] = y
            if step.result in ends:
                maps.append(y)
            for name in step.frees:
                del values[name]
        return values[self._output].flatten(1), maps

    @property
    def block_ends(self) -> tuple[str, ...]:
        """The names of every bottleneck's result, in order (gated, then added to what it read
        where it may be), and of the map after the last of them that the head reads."""
        added = {
            name: step.result
            for step in self._steps
            if step.type == "add" and len(step.arguments) == 2
            for name in step.arguments
        }
        gated = [s.result for s in self._steps if s.type == "multiply" and len(s.arguments) == 2]
        last = [s.result for s in self._steps if s.type == "prelu"][-1]
        return (*(added.get(name, name) for name in gated), last)


def _with_frees(steps: list[_Step], output: str) -> list[_Step]:
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        for name in step.arguments:
            last[name] = index
    return [
        _Step(
            **{**vars(step), "frees": tuple(n for n, i in last.items() if i == k and n != output)}
        )
        for k, step in enumerate(steps)
    ]


def _read(root: ET.Element, blob: bytes) -> tuple[list[_Layer], dict[str, np.ndarray]]:
    """Layers in topological order, and the value of every constant (and its Convert)."""
    edges: dict[tuple[str, str], str] = {}
    for edge in root.iter("edge"):
        edges[edge.attrib["to-layer"], edge.attrib["to-port"]] = edge.attrib["from-layer"]
    found: dict[str, _Layer] = {}
    constants: dict[str, np.ndarray] = {}
    types = {"f16": np.float16, "f32": np.float32, "i64": np.int64, "i32": np.int32}
    for element in root.iter("layer"):
        data = element.find("data")
        attributes = dict(data.attrib) if data is not None else {}
        ports = element.find("input")
        inputs = tuple(
            edges[element.attrib["id"], port.attrib["id"]]
            for port in (ports if ports is not None else ())
        )
        layer = _Layer(element.attrib["id"], element.attrib["type"], attributes, inputs)
        found[layer.id] = layer
        if layer.type == "Const":
            start, size = int(attributes["offset"]), int(attributes["size"])
            shape = [int(part) for part in attributes["shape"].split(",") if part.strip()]
            kind = types[attributes["element_type"]]
            count = size // np.dtype(kind).itemsize
            raw = np.frombuffer(blob, kind, offset=start, count=count)
            constants[layer.id] = raw.reshape(shape)
    for layer in found.values():
        if layer.type == "Convert" and layer.inputs[0] in constants:
            constants[layer.id] = constants[layer.inputs[0]]
    ordered: list[_Layer] = []
    done: set[str] = set()
    stack = list(reversed(found.values()))
    while stack:
        layer = stack[-1]
        waits = [found[i] for i in layer.inputs if i not in done]
        if layer.id in done:
            stack.pop()
        elif waits:
            stack.extend(waits)
        else:
            done.add(layer.id)
            ordered.append(layer)
            stack.pop()
    return ordered, constants


def load_teacher(folder: Path) -> IrModule:
    """The teacher from ``folder``/face-reidentification-retail-0095.xml and .bin."""
    module = IrModule(folder / f"{TEACHER_STEM}.xml").eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module
