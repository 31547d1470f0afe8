"""MobileFaceNet-class recognisers: inverted bottlenecks with PReLU, 112x112 to a vector.

After "MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on
Mobile Devices" (Chen, Liu, Gao, Han; 2018). One class serves the family: the widths,
the head and whether batch norms are still separate are options, so that it covers
both networks trained here and public ones whose batch norms are already folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facelane_server.worker.networks.architectures.folding import Foldable

STARTER_STAGES = ((64, 4, 128, 128), (128, 6, 256, 256), (128, 2, 512, 256))
"""(channels, residual blocks, expansion of the strided block, expansion of the others)."""
MAX_SIDE = 512


class _Unit(Foldable):
    """Convolution, batch norm (unless folded), PReLU (unless linear)."""

    FOLDS: ClassVar = (("conv", "norm"),)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        norm: bool = True,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(
            inputs, outputs, kernel, stride, padding, groups=groups, bias=not norm
        )
        self.norm: nn.Module = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        self.act: nn.Module = nn.Identity() if linear else nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.norm(self.conv(x)))
        return out


class _Gate(nn.Module):
    """Squeeze and excitation: each channel times what the means of all say of it.

    After "Squeeze-and-Excitation Networks" (Hu, Shen, Sun; 2018).
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.act = nn.PReLU(channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        share = self.excite(self.act(self.squeeze(x.mean((2, 3))))).sigmoid()
        out: Tensor = x * share[:, :, None, None]
        return out


class _Bottleneck(nn.Module):
    """1x1 expansion, 3x3 depthwise (with the stride), 1x1 linear projection, gate (if any)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        expansion: int,
        *,
        stride: int,
        norm: bool,
        attention: int = 0,
    ) -> None:
        super().__init__()
        self.expand = _Unit(inputs, expansion, norm=norm)
        self.depthwise = _Unit(
            expansion, expansion, 3, stride=stride, padding=1, groups=expansion, norm=norm
        )
        self.project = _Unit(expansion, outputs, norm=norm, linear=True)
        self.gate: nn.Module = _Gate(outputs, attention) if attention else nn.Identity()
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.gate(self.project(self.depthwise(self.expand(x))))
        return x + out if self.residual else out


class _GlobalDepthwiseHead(Foldable):
    """A depthwise kernel over the whole map, then a linear layer and its batch norm."""

    FOLDS: ClassVar = (("linear", "norm"),)

    def __init__(self, channels: int, embedding_dim: int, *, norm: bool, side: int) -> None:
        super().__init__()
        self.depthwise = _Unit(channels, channels, side, groups=channels, norm=norm, linear=True)
        self.linear: nn.Module = nn.Linear(channels, embedding_dim, bias=not norm)
        self.norm: nn.Module = nn.BatchNorm1d(embedding_dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(self.depthwise(x).flatten(1)))
        return out


class _FlattenHead(Foldable):
    """A 1x1 convolution to few channels, flattened, then linear and its batch norm."""

    FOLDS: ClassVar = (("linear", "norm"),)

    def __init__(
        self, channels: int, neck: int, embedding_dim: int, *, norm: bool, side: int
    ) -> None:
        super().__init__()
        self.reduce = _Unit(channels, neck, norm=norm)
        self.linear: nn.Module = nn.Linear(neck * side * side, embedding_dim, bias=not norm)
        self.norm: nn.Module = nn.BatchNorm1d(embedding_dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(self.reduce(x).flatten(1)))
        return out


class TrustHead(nn.Module):
    """A small network that says how far a face can be trusted: one logit, higher = clean.

    It reads the mean and the spread of feature maps and the logarithm of the embedding's
    norm; it is trained after the trunk, which it leaves as it is. Early maps still show
    noise and clipping that the last one has learnt to ignore. ``channels``: of each map.
    """

    def __init__(self, channels: Sequence[int], hidden: int = 64) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * sum(channels) + 1, hidden)
        self.act = nn.PReLU(hidden)
        self.out = nn.Linear(hidden, 1)

    @staticmethod
    def summary(maps: Sequence[Tensor], embedding: Tensor) -> Tensor:
        """The head's input [N, 2 * channels + 1], float32."""
        # In float32: a variance of squares overflows the range of half precision.
        parts: list[Tensor] = []
        for features in maps:
            flat = features.flatten(2).float()
            mean = flat.mean(2)
            spread = (flat - mean[:, :, None]).square().mean(2).add(1e-6).sqrt()
            parts += [mean, spread]
        parts.append(embedding.float().square().sum(1, keepdim=True).add(1e-6).log().mul(0.5))
        return torch.cat(parts, 1)

    def forward(self, maps: Sequence[Tensor], embedding: Tensor) -> Tensor:
        summary = self.summary(maps, embedding).to(self.hidden.weight.dtype)
        logit: Tensor = self.out(self.act(self.hidden(summary)))
        return logit[:, 0]


class MobileFaceNet(nn.Module):
    """The network.

    ``stages``: rows of (channels, residual blocks, expansion of the strided block,
    expansion of the residual blocks). ``head``: ``gdc`` or ``flatten`` (to ``neck``
    channels). ``norm=False``: batch norms are already folded into the convolutions.
    ``ood_head``: ``none`` or ``trust`` (:class:`TrustHead`). ``attention``: each bottleneck
    ends in a squeeze-and-excitation gate of that reduction; 0 = none. ``side``: the crop is
    resized to that many pixels before the first layer, a multiple of 16.

    Input [N, 3, 112, 112]. Output: embedding [N, ``embedding_dim``], not normalised,
    and the OOD logit [N], or None without an OOD head.
    """

    def __init__(
        self,
        stem: int = 64,
        stages: Sequence[Sequence[int]] = STARTER_STAGES,
        features: int = 512,
        head: str = "gdc",
        neck: int = 64,
        embedding_dim: int = 512,
        norm: bool = True,
        ood_head: str = "none",
        attention: int = 0,
        side: int = 112,
    ) -> None:
        super().__init__()
        if len(stages) != 3 or any(len(stage) != 4 for stage in stages):
            raise ValueError("stages needs three rows of four numbers")
        if head not in ("gdc", "flatten"):
            raise ValueError("head must be gdc or flatten")
        if ood_head not in ("none", "trust"):
            raise ValueError("ood_head must be none or trust")
        if side % 16 or not 16 <= side <= MAX_SIDE:
            raise ValueError(f"side must be a multiple of 16, at most {MAX_SIDE}")
        narrowest = min(channels for channels, *_ in stages)
        if not 0 <= attention <= narrowest:
            raise ValueError(f"attention must be 0 or a reduction of at most {narrowest} channels")
        self.side = side
        self.stem = _Unit(3, stem, 3, stride=2, padding=1, norm=norm)
        self.stem_depthwise = _Unit(stem, stem, 3, padding=1, groups=stem, norm=norm)
        rows: list[nn.Module] = []
        inputs = stem
        for channels, blocks, first, others in stages:
            widths = [(inputs, first, 2)] + [(channels, others, 1)] * blocks
            row = [
                _Bottleneck(i, channels, expansion, stride=stride, norm=norm, attention=attention)
                for i, expansion, stride in widths
            ]
            rows.append(nn.Sequential(*row))
            inputs = channels
        self.stages = nn.Sequential(*rows)
        self.features = _Unit(inputs, features, norm=norm)
        self.head: nn.Module = (
            _GlobalDepthwiseHead(features, embedding_dim, norm=norm, side=side // 16)
            if head == "gdc"
            else _FlattenHead(features, neck, embedding_dim, norm=norm, side=side // 16)
        )
        maps = (stages[0][0], stages[1][0], features)
        self.ood_head: nn.Module | None = TrustHead(maps) if ood_head == "trust" else None

    def entry(self, x: Tensor) -> Tensor:
        """The map that the first stage reads, [N, ``stem``, ``side`` / 2, ``side`` / 2]."""
        if x.shape[-1] != self.side:
            size = (self.side, self.side)
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        out: Tensor = self.stem_depthwise(self.stem(x))
        return out

    def trunk(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The embedding, and the maps that the OOD head reads: the outputs of the first
        two stages and of ``features``."""
        first = self.stages[0](self.entry(x))
        second = self.stages[1](first)
        features = self.features(self.stages[2](second))
        return self.head(features), (first, second, features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        embedding, maps = self.trunk(x)
        if self.ood_head is None:
            return embedding, None
        return embedding, self.ood_head(maps, embedding)
