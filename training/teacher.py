"""The recogniser's teacher: the public mbf-512, as a frozen network of the server's own class.

``training.pack`` reads its ONNX file with the importer that ``facelane-server models import``
has, and keeps the weights in half precision.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from facelane_server.worker.networks.architectures.mobilefacenet import MobileFaceNet

TEACHER_SOURCE = "mbf_512_fp32.onnx"
TEACHER_FILE = "mbf-512.safetensors"


def pack_teacher(models: Path, out: Path) -> None:
    """``models``/mbf_512_fp32.onnx to ``out``/mbf-512.safetensors, with the network's options."""
    # Where models are only trained, what the importer needs may be missing.
    from facelane_server.modeltools.importer import import_model

    with tempfile.TemporaryDirectory() as scratch:
        package = import_model("mobilefacenet-onnx", [models / TEACHER_SOURCE], Path(scratch))
        weights = load_file(package.weights_path(package.manifest.weights[0]))
        options = json.dumps(dict(package.manifest.options))
    save_file(
        {name: value.half().contiguous() for name, value in weights.items()},
        out / TEACHER_FILE,
        {"options": options},
    )


def load_teacher(folder: Path) -> MobileFaceNet:
    """The teacher of a packed folder's ``models``, frozen, float32."""
    path = folder / TEACHER_FILE
    with safe_open(path, "pt") as file:
        options = json.loads(file.metadata()["options"])
    network = MobileFaceNet(**options)
    network.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.eval()
