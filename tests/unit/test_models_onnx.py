"""ONNX files as they come: with sizes that are fixed in them, and outputs that are not ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facelane_server.domain import FacelaneError, Reason
from facelane_server.models.api import DeviceOptions, Model
from facelane_server.models.package import Package
from facelane_server.modeltools.importer import import_model
from facelane_server.modeltools.verify import verify
from facelane_server.worker.networks.load import load

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

HEADS = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}
FREE: Sequence[Any] = ("n", 3, "h", "w")


def save(
    path: Path, nodes: list[Any], given: Sequence[Any], outputs: list[str], weights: dict[str, Any]
) -> Path:
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "network",
        [onnx.helper.make_tensor_value_info("x", kind, list(given))],
        [onnx.helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = [onnx.helper.make_opsetid("", 13)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def recognizer(path: Path, given: Sequence[Any] = ("n", 3, 112, 112)) -> Path:
    """The mean colour, and a projection to 16 numbers."""
    rng = np.random.default_rng(5)
    node = onnx.helper.make_node
    nodes = [
        node("GlobalAveragePool", ["x"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("MatMul", ["f", "w"], ["y"]),
    ]
    weights = {"w": rng.normal(size=(given[1], 16)).astype(np.float32)}
    return save(path, nodes, given, ["y"], weights)


def detector(
    path: Path, given: Sequence[Any] = FREE, names: Callable[[str], str] = lambda name: name
) -> Path:
    """YuNet's outputs out of block means."""
    rng = np.random.default_rng(5)
    node = onnx.helper.make_node
    nodes, weights = [], {"cells": np.array([0, -1, 3], np.int64)}
    outputs = []
    for stride in (8, 16, 32):
        nodes += [
            node("AveragePool", ["x"], [f"p{stride}"], kernel_shape=[stride] * 2,
                 strides=[stride] * 2),
            node("Transpose", [f"p{stride}"], [f"t{stride}"], perm=[0, 2, 3, 1]),
            node("Reshape", [f"t{stride}", "cells"], [f"c{stride}"]),
        ]  # fmt: skip
        for head, width in HEADS.items():
            name = f"{head}_{stride}"
            weights[f"w_{name}"] = (rng.normal(size=(3, width)) / 300).astype(np.float32)
            if width == 1:
                nodes.append(node("MatMul", [f"c{stride}", f"w_{name}"], [f"logit_{name}"]))
                nodes.append(node("Sigmoid", [f"logit_{name}"], [names(name)]))
            else:
                nodes.append(node("MatMul", [f"c{stride}", f"w_{name}"], [names(name)]))
            outputs.append(names(name))
    return save(path, nodes, given, outputs, weights)


def package(recipe: str, source: Path, **changes: Any) -> Package:
    return import_model(
        recipe, [source], source.parent / "models", name=source.stem, overrides=changes
    )


def mine(source: Path, **changes: Any) -> Package:
    return package("onnx-recognizer", source, **{"output": {"embedding_dim": 16}, **changes})


def ready(found: Package) -> Model:
    model = load(found, DeviceOptions(), batch_max=4)
    model.warm_up()
    return model


def refusal(found: Package) -> str:
    with pytest.raises(FacelaneError) as caught:
        ready(found)
    assert caught.value.reason is Reason.MODEL_INVALID
    return caught.value.message


def test_a_file_for_one_item_at_a_time_serves_batches(tmp_path: Path) -> None:
    colours = np.array([[250, 10, 20], [30, 200, 90], [5, 6, 220]], np.uint8)
    chips = np.broadcast_to(colours[:, None, None], (3, 112, 112, 3))
    free = ready(mine(recognizer(tmp_path / "free.onnx")))
    single = ready(mine(recognizer(tmp_path / "single.onnx", (1, 3, 112, 112))))
    expected = free.begin(chips).finish()  # type: ignore[attr-defined]
    found = single.begin(chips).finish()  # type: ignore[attr-defined]
    assert found.vectors.shape == (3, 16)
    np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-6)
    assert (found.vectors @ found.vectors.T)[~np.eye(3, dtype=bool)].max() < 0.99, "all different"


def test_so_does_a_detector(tmp_path: Path) -> None:
    for given in (FREE, (1, 3, "h", "w")):
        found = package("onnx-detector", detector(tmp_path / f"{given[0]}.onnx", given))
        result = verify(found)
        assert result.passed, result.checks


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((4, 3, 112, 112), "takes 4 items and no other number"),
        (("n", 3, 128, 128), "takes 128x128, but input.width and input.height say 112x112"),
        (("n", 112, 112, 3), r"shape ['n', 112, 112, 3], but pictures come as [items, 3,"),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    tmp_path: Path, given: Sequence[Any], message: str
) -> None:
    assert message in refusal(mine(recognizer(tmp_path / "net.onnx", given)))


def test_a_detector_for_one_size_is_refused(tmp_path: Path) -> None:
    found = package("onnx-detector", detector(tmp_path / "net.onnx", ("n", 3, 320, 640)))
    assert "takes pictures of 640x320 alone" in refusal(found)


def test_outputs_of_another_shape_are_named(tmp_path: Path) -> None:
    swapped = {"bbox_16": "kps_16", "kps_16": "bbox_16"}
    source = detector(tmp_path / "net.onnx", names=lambda name: swapped.get(name, name))
    message = refusal(package("onnx-detector", source))
    assert "the ONNX output bbox_16 has shape [1, 1200, 10]" in message
    assert "[1, 1200, 4] is decoded" in message


def test_outputs_of_other_names_are_listed(tmp_path: Path) -> None:
    source = detector(tmp_path / "net.onnx", names=lambda name: f"out_{name}")
    message = refusal(package("onnx-detector", source))
    assert "has no output cls_8; it has out_cls_8, " in message
