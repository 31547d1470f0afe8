"""MiniFASNet: small liveness networks over one 80x80 context crop, and their mean.

The networks of Minivision's Silent-Face-Anti-Spoofing: a MobileFaceNet pruned to odd
widths, with squeeze-and-excitation in the SE variant. Parameter names are those of
the public checkpoints. Input [N, 3, 80, 80] float, **BGR 0..255**; three classes, of
which the second is "bona fide".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from facelane_server.worker.networks.architectures.folding import Foldable

LIVE_CLASS = 1


@dataclass(frozen=True, slots=True)
class _Plan:
    """Hidden widths of the residual blocks of the three stages, and where SE sits."""

    stages: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    excited: bool


_PLANS = {
    "v2": _Plan(((13, 13, 13, 13), (231, 52, 26, 77, 26, 26), (26, 26)), excited=False),
    "v1se": _Plan(((13, 26, 13, 52), (154, 52, 26, 52, 26, 26), (26, 26)), excited=True),
}
_STEPS = (103, 231, 308)
"""Hidden widths of the three strided blocks, the same in both variants."""


class _Unit(Foldable):
    FOLDS: ClassVar = (("conv", "bn"),)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(
            inputs, outputs, kernel, stride, padding, groups=groups, bias=False
        )
        self.bn: nn.Module = nn.BatchNorm2d(outputs)
        self.prelu: nn.Module = nn.Identity() if linear else nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.prelu(self.bn(self.conv(x)))
        return out


class _Excitation(Foldable):
    """Squeeze-and-excitation with batch norms in it."""

    FOLDS: ClassVar = (("fc1", "bn1"), ("fc2", "bn2"))

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1: nn.Module = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(channels // 4)
        self.fc2: nn.Module = nn.Conv2d(channels // 4, channels, 1, bias=False)
        self.bn2: nn.Module = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = torch.relu(self.bn1(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(self.bn2(self.fc2(squeezed)))


class _Block(nn.Module):
    def __init__(
        self, inputs: int, hidden: int, outputs: int, *, stride: int, excited: bool = False
    ) -> None:
        super().__init__()
        self.conv = _Unit(inputs, hidden)
        self.conv_dw = _Unit(hidden, hidden, 3, stride=stride, padding=1, groups=hidden)
        self.project = _Unit(hidden, outputs, linear=True)
        self.residual = stride == 1
        if excited:
            self.se_module = _Excitation(outputs)
        self.excited = excited

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.conv_dw(self.conv(x)))
        if self.excited:
            out = self.se_module(out)
        return x + out if self.residual else out


class _Residuals(nn.Module):
    """Residual blocks of one stage; in the SE variant the last one is excited."""

    def __init__(self, channels: int, hidden: Sequence[int], *, excited: bool) -> None:
        super().__init__()
        last = len(hidden) - 1
        self.model = nn.Sequential(
            *(
                _Block(channels, h, channels, stride=1, excited=excited and i == last)
                for i, h in enumerate(hidden)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


class MiniFASNet(Foldable):
    """One network; ``variant``: ``v2`` or ``v1se``. Output: class probabilities [N, 3]."""

    FOLDS: ClassVar = (("linear", "bn"),)

    def __init__(self, variant: str) -> None:
        super().__init__()
        if variant not in _PLANS:
            raise ValueError(f"variant must be one of {', '.join(_PLANS)}")
        plan = _PLANS[variant]
        self.conv1 = _Unit(3, 32, 3, stride=2, padding=1)
        self.conv2_dw = _Unit(32, 32, 3, padding=1, groups=32)
        self.conv_23 = _Block(32, _STEPS[0], 64, stride=2)
        self.conv_3 = _Residuals(64, plan.stages[0], excited=plan.excited)
        self.conv_34 = _Block(64, _STEPS[1], 128, stride=2)
        self.conv_4 = _Residuals(128, plan.stages[1], excited=plan.excited)
        self.conv_45 = _Block(128, _STEPS[2], 128, stride=2)
        self.conv_5 = _Residuals(128, plan.stages[2], excited=plan.excited)
        self.conv_6_sep = _Unit(128, 512)
        self.conv_6_dw = _Unit(512, 512, 5, groups=512, linear=True)
        self.linear: nn.Module = nn.Linear(512, 128, bias=False)
        self.bn: nn.Module = nn.BatchNorm1d(128)
        self.prob = nn.Linear(128, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2_dw(self.conv1(x))
        x = self.conv_3(self.conv_23(x))
        x = self.conv_4(self.conv_34(x))
        x = self.conv_5(self.conv_45(x))
        x = self.conv_6_dw(self.conv_6_sep(x)).flatten(1)
        logits: Tensor = self.prob(self.bn(self.linear(x)))
        return torch.softmax(logits.float(), 1)


class MiniFASNetPair(nn.Module):
    """V2 on the narrow crop and V1SE on the wide one as one model.

    Input: the two crops, each [N, 3, 80, 80]. Output [N] in [0, 1]: the mean of the
    two probabilities of being bona fide.
    """

    def __init__(self) -> None:
        super().__init__()
        self.v2 = MiniFASNet("v2")
        self.v1se = MiniFASNet("v1se")

    def forward(self, narrow: Tensor, wide: Tensor) -> Tensor:
        live: Tensor = self.v2(narrow)[:, LIVE_CLASS] + self.v1se(wide)[:, LIVE_CLASS]
        return live / 2
