"""LivenessNet: the starter liveness model, one small network over one context crop.

Input [N, 3, 80, 80] float, **BGR 0..255** (scaled inside). Output [N] in [0, 1],
higher = bona fide. Texture decides between skin and paper or screen, so the first
stages keep resolution longer than a classifier of this size usually would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from facelane_server.worker.networks.architectures.folding import Foldable


class _Unit(Foldable):
    FOLDS: ClassVar = (("conv", "norm"),)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(
            inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.norm: nn.Module = nn.BatchNorm2d(outputs)
        self.act: nn.Module = nn.Identity() if linear else nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.norm(self.conv(x)))
        return out


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        hidden = 2 * inputs
        self.expand = _Unit(inputs, hidden)
        self.depthwise = _Unit(hidden, hidden, 3, stride=stride, groups=hidden)
        self.project = _Unit(hidden, outputs, linear=True)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


class LivenessNet(nn.Module):
    """The network. ``stem``: channels after the first convolution (stride 2); ``stages``:
    rows of (channels, blocks), each of which halves the map with its first block."""

    def __init__(
        self,
        stem: int = 32,
        stages: Sequence[Sequence[int]] = ((48, 4), (96, 5), (128, 3)),
        hidden: int = 64,
    ) -> None:
        super().__init__()
        if not stages or any(len(stage) != 2 or min(stage) < 1 for stage in stages):
            raise ValueError("stages needs rows of two positive numbers")
        blocks: list[nn.Module] = [_Unit(3, stem, 3, stride=2), _Unit(stem, stem, 3, groups=stem)]
        inputs = stem
        for channels, count in stages:
            for index in range(count):
                blocks.append(_Block(inputs, channels, stride=2 if index == 0 else 1))
                inputs = channels
        self.trunk = nn.Sequential(*blocks)
        self.hidden = nn.Linear(2 * inputs, hidden)
        self.act = nn.PReLU(hidden)
        self.out = nn.Linear(hidden, 1)

    def logits(self, x: Tensor) -> Tensor:
        """[N] before the sigmoid (for training)."""
        flat = self.trunk((x - 127.5) / 127.5).flatten(2)
        pooled = torch.cat((flat.mean(2), flat.amax(2)), 1)
        logit: Tensor = self.out(self.act(self.hidden(pooled)))
        return logit[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).float().sigmoid()
