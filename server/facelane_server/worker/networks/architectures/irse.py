"""IR-SE-64 with the RTS heads: a recogniser that says how far its input is out of distribution.

After "Out-of-distribution face recognition" with Random Temperature Scaling (arXiv
2212.01015): an improved ResNet with squeeze-and-excitation, a linear embedding head
and a second head for the logarithm of the variance of the embedding's temperature.
Parameter names are those of the public checkpoint.

Input [N, 3, 112, 112] float RGB, (x/255 - 0.5)/0.5. Output: embedding [N, 512], not
normalised, and log-variance [N].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (64, 128, 256, 512)


class _Excitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # The 1x1 convolutions of a 1x1 map as products: a GPU has less to start.
        squeezed = torch.relu(F.linear(x.mean((2, 3)), self.fc1.weight.flatten(1)))
        gate = torch.sigmoid(F.linear(squeezed, self.fc2.weight.flatten(1)))
        return x * gate[:, :, None, None]


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = (
            nn.MaxPool2d(1, stride)
            if inputs == outputs
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            _Excitation(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.res_layer(x) + self.shortcut_layer(x)
        return out


class RtsIrSe(nn.Module):
    """The network. ``units``: bottlenecks of the four stages; ``alpha``: degrees of
    freedom of the second variance head, which only training uses (0 leaves it out)."""

    def __init__(
        self,
        units: Sequence[int] = (3, 8, 16, 3),
        embedding_dim: int = 512,
        alpha: int = 0,
    ) -> None:
        super().__init__()
        if len(units) != 4 or min(units) < 1:
            raise ValueError("units needs four positive numbers")
        blocks: list[nn.Module] = []
        inputs = WIDTHS[0]
        for width, count in zip(WIDTHS, units, strict=True):
            for i in range(count):
                blocks.append(_Bottleneck(inputs, width, 2 if i == 0 else 1))
                inputs = width
        self.features = nn.Sequential(
            nn.Sequential(
                nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False),
                nn.BatchNorm2d(WIDTHS[0]),
                nn.PReLU(WIDTHS[0]),
            ),
            nn.Sequential(*blocks),
            nn.Sequential(nn.BatchNorm2d(inputs), nn.Dropout(0.4), nn.Flatten()),
        )
        flat = inputs * 7 * 7
        self.features_backbone = nn.Sequential(
            nn.Linear(flat, embedding_dim), nn.BatchNorm1d(embedding_dim)
        )
        self.logvar_rts_backbone = nn.Sequential(nn.Linear(flat, 1), nn.BatchNorm1d(1))
        if alpha:
            self.logvar_rts_plus_backbone = nn.Sequential(
                nn.Linear(flat, alpha), nn.BatchNorm1d(alpha)
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = self.features(x)
        embedding: Tensor = self.features_backbone(flat)
        logvar: Tensor = self.logvar_rts_backbone(flat)
        return embedding, logvar[:, 0]
