"""Networks dressed for service: uint8 pictures in, one float32 tensor out.

What a host would otherwise do to every batch (normalisation, channel order, resizing,
decoding, unit length, calibration) is part of the module, so that it runs on the
device, and a CUDA graph captures all of it. Inputs are uint8 [n, H, W, 3] BGR.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelane_server.domain import FacelaneError, Reason
from facelane_server.models.package import Input, Ood
from facelane_server.worker.networks.architectures.folding import fold
from facelane_server.worker.networks.architectures.yunet import decode
from facelane_server.worker.networks.candidates import TOP

_COMPARED = 64
"""Candidates of a picture that two ways of running a detector must agree on: the faces are
among the first of them."""


class Prepare(nn.Module):
    """uint8 [n, H, W, 3] BGR to the network's input [n, 3, height, width]."""

    mean: Tensor
    inverse: Tensor

    def __init__(self, spec: Input) -> None:
        super().__init__()
        self._rgb = spec.color == "rgb"
        self._size = (spec.height, spec.width)
        self._plain = spec.mean == (0.0, 0.0, 0.0) and spec.std == (1.0, 1.0, 1.0)
        self.register_buffer("mean", torch.tensor(spec.mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer(
            "inverse",
            torch.tensor(spec.std, dtype=torch.float32).reciprocal().view(1, 3, 1, 1),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures.permute(0, 3, 1, 2).to(self.mean.dtype)
        if self._rgb:
            x = x.flip(1)
        if self._size != (0, 0) and tuple(x.shape[2:]) != self._size:
            x = F.interpolate(x, self._size, mode="bilinear", align_corners=False)
        if not self._plain:
            x = (x - self.mean) * self.inverse
        return x.contiguous(memory_format=torch.channels_last)


class Served(nn.Module):
    """A network with everything around it."""

    def __init__(self, network: nn.Module, spec: Input) -> None:
        super().__init__()
        self.prepare = Prepare(spec)
        self.network = network.eval()
        fold(self.network)
        self.requires_grad_(requires_grad=False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def conclude(self, output: Tensor) -> Tensor:
        """What of the output goes to the host. It is captured with the network, but what is
        compared is the output."""
        return output

    @staticmethod
    @abstractmethod
    def agreement(reference: Tensor, output: Tensor) -> float:
        """How alike two outputs for the same input are: 1 = the same, and a cosine of
        0.999 or more = the same for all that follows."""


class ServedDetector(Served):
    """Output [n, K, 15]: the best K candidates, best first. ``suppress``: leaves the faces of
    them on the device; None = suppression is the host's."""

    def __init__(
        self, network: nn.Module, spec: Input, *, suppress: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__(network, spec)
        self._suppress = suppress

    def conclude(self, output: Tensor) -> Tensor:
        return output if self._suppress is None else self._suppress(output)

    def forward(self, pictures: Tensor) -> Tensor:
        height, width = pictures.shape[1:3]
        return decode(self.network(self.prepare(pictures)), height, width, best=TOP)

    @staticmethod
    def agreement(reference: Tensor, output: Tensor) -> float:
        # Near-equal scores may change places, so each of the best is looked for among all:
        # its score, and its box and landmarks in units of the box's size.
        worst = 0.0
        for a, b in zip(reference.double(), output.double(), strict=True):
            a = a[a[:, 0].topk(min(_COMPARED, len(a))).indices]
            score = (a[:, None, 0] - b[None, :, 0]).abs()
            place = (a[:, None, 1:] - b[None, :, 1:]).abs().amax(2)
            size = a[:, 3:5].amax(1).clamp(min=1.0)
            worst = max(worst, float((score + place / size[:, None]).amin(1).max()))
        # As for a score: a difference of 0.02 counts as much as a cosine of 0.999.
        return 1.0 - worst / 20.0


class ServedRecognizer(Served):
    """Output [n, D + 1]: the unit vector and the OOD score."""

    def __init__(self, network: nn.Module, spec: Input, ood: Ood) -> None:
        super().__init__(network, spec)
        self._ood = ood

    def forward(self, pictures: Tensor) -> Tensor:
        embedding, logit = self.network(self.prepare(pictures))
        embedding = embedding.float()
        norm = torch.linalg.vector_norm(embedding, dim=1, keepdim=True)
        if self._ood.source == "none":
            score = torch.ones_like(norm[:, 0])
        elif self._ood.source == "norm":
            score = self._map(norm[:, 0])
        elif logit is None:
            raise FacelaneError(
                Reason.MODEL_INVALID,
                f"ood.source is {self._ood.source}, but the network with these options gives no "
                "OOD output: switch its head on in [options], or take ood.source = norm",
            )
        else:
            score = self._map(logit.float())
        return torch.cat((embedding / norm.clamp(min=1e-6), score[:, None]), 1)

    def _map(self, value: Tensor) -> Tensor:
        if self._ood.mapping == "exp":
            return value.exp().clamp(max=1.0)
        return ((value - self._ood.center) / self._ood.scale).sigmoid()

    @staticmethod
    def agreement(reference: Tensor, output: Tensor) -> float:
        a, b = reference.double(), output.double()
        cosine = float(F.cosine_similarity(a[:, :-1], b[:, :-1], dim=1).min())
        # A score that moves by 0.02 counts as much as a cosine that falls to 0.999.
        return min(cosine, 1.0 - float((a[:, -1] - b[:, -1]).abs().max()) / 20.0)


class ServedLiveness(Served):
    """Output [n, 1]: the score."""

    def forward(self, *crops: Tensor) -> Tensor:
        score: Tensor = self.network(*(self.prepare(crop) for crop in crops))
        return score.float()[:, None]

    @staticmethod
    def agreement(reference: Tensor, output: Tensor) -> float:
        return 1.0 - float((reference.double() - output.double()).abs().max()) / 20.0


def check_pictures(shapes: Sequence[tuple[int, int]], count: int) -> list[Tensor]:
    """Fixed pictures to compare two ways of running a network: smooth colour noise, uint8
    [count, H, W, 3] for each (H, W). The same on every machine."""
    generator = torch.Generator().manual_seed(20)
    pictures: list[Tensor] = []
    for height, width in shapes:
        coarse = torch.rand((count, 3, 9, 9), generator=generator)
        fine = torch.rand((count, 3, height, width), generator=generator)
        smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
        mixed = (smooth * 230 + fine * 25).clamp(0, 255).to(torch.uint8)
        pictures.append(mixed.permute(0, 2, 3, 1).contiguous())
    return pictures
