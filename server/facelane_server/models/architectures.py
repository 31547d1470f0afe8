"""The networks that a package's ``architecture`` can name.

An entry says which task it serves and where its class is; the module is imported only
when a model of it is built, so that null models and the front never import torch. To
add a network: write its module, add one line here.

Conventions of a network's ``forward``, float tensors in [N, 3, H, W]:

- detector: ``(x) -> DenseHeads`` (see ``yunet``);
- recognizer: ``(x) -> (embedding [N, D], OOD logit or log-variance [N] or None)``;
- liveness: ``(crop, ...) -> score [N]`` in [0, 1], one tensor for each declared crop.
"""

from __future__ import annotations

from dataclasses import dataclass

from facelane_server.domain import Stage


@dataclass(frozen=True, slots=True)
class Architecture:
    """``module``:``factory`` builds the network from the package's options."""

    task: Stage
    module: str
    factory: str


_HERE = "facelane_server.worker.networks.architectures"

ARCHITECTURES: dict[str, Architecture] = {
    "yunet": Architecture(Stage.DETECTOR, f"{_HERE}.yunet", "YuNet"),
    "mobilefacenet": Architecture(Stage.RECOGNIZER, f"{_HERE}.mobilefacenet", "MobileFaceNet"),
    "rts-irse": Architecture(Stage.RECOGNIZER, f"{_HERE}.irse", "RtsIrSe"),
    "minifasnet-pair": Architecture(Stage.LIVENESS, f"{_HERE}.minifasnet", "MiniFASNetPair"),
    "liveness-net": Architecture(Stage.LIVENESS, f"{_HERE}.liveness_net", "LivenessNet"),
}
