"""YuNet: a small anchor-free face detector with five landmarks.

After "YuNet: A Tiny Millisecond-level Face Detector" (Wu, Peng, Yu; 2023). The
parameter names are those of the authors' training code, so that its public
checkpoints load by name; widths are options, so that smaller ones can be trained.

Input [N, 3, H, W] float, **BGR 0..255**, H and W multiples of 32. Output: the dense
heads of strides 8, 16 and 32 joined along the anchors, A = HW/64 + HW/256 + HW/1024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelane_server.worker.networks.architectures.folding import Foldable
from facelane_server.worker.networks.architectures.packing import Packable

STRIDES = (8, 16, 32)


class DenseHeads(NamedTuple):
    """What the network says at every anchor, in units of its stride.

    ``cls`` and ``obj`` [N, A] are probabilities, ``box`` [N, A, 4] (dx, dy, log w,
    log h), ``points`` [N, A, 10] (dx, dy of the five landmarks).
    """

    cls: Tensor
    obj: Tensor
    box: Tensor
    points: Tensor


class _PointDepth(Foldable, Packable):
    """1x1 convolution, depthwise 3x3, and unless it is a head, batch norm and ReLU."""

    FOLDS: ClassVar = (("conv2", "bn"),)
    RELUS: ClassVar = (("conv2", "act"),)

    def __init__(self, inputs: int, outputs: int, *, head: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs)
        self.head = head
        if not head:
            self.bn: nn.Module = nn.BatchNorm2d(outputs)
            self.act: nn.Module = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        if self.head:
            return x
        out: Tensor = self.act(self.bn(x))
        return out


class _Stem(Foldable, Packable):
    FOLDS: ClassVar = (("conv1", "bn1"),)
    RELUS: ClassVar = (("conv1", "act"),)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.bn1: nn.Module = nn.BatchNorm2d(width)
        self.act: nn.Module = nn.ReLU(inplace=True)
        self.conv2 = _PointDepth(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.act(self.bn1(self.conv1(x))))
        return out


class _Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = _PointDepth(inputs, inputs)
        self.conv2 = _PointDepth(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x))
        return out


class _Pool(Packable):
    """The largest of every 2x2."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2)

    def for_cpu(self) -> nn.Module:
        return _PoolOfHalves()


class _PoolOfHalves(nn.Module):
    """The same. torch's own remembers for each where it was, and takes two or three times as
    long."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


class _Backbone(nn.Module):
    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.pool: nn.Module = _Pool()
        self.model0 = _Stem(widths[0])
        for i in range(1, 6):
            self.add_module(f"model{i}", _Stage(widths[i - 1], widths[i]))

    def forward(self, x: Tensor) -> list[Tensor]:
        kept: list[Tensor] = []
        for i in range(6):
            x = self.get_submodule(f"model{i}")(x)
            if i >= 3:
                kept.append(x)
            if i in (0, 2, 3, 4):
                x = self.pool(x)
        return kept


class _Neck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(_PointDepth(width, width) for _ in STRIDES)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        fine, middle, coarse = maps
        coarse = self.lateral_convs[2](coarse)
        middle = self.lateral_convs[1](middle + F.interpolate(coarse, scale_factor=2.0))
        fine = self.lateral_convs[0](fine + F.interpolate(middle, scale_factor=2.0))
        return [fine, middle, coarse]


def _flat(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class _Head(Packable):
    def __init__(self, width: int) -> None:
        super().__init__()

        def per_level(outputs: int) -> nn.ModuleList:
            return nn.ModuleList(_PointDepth(width, outputs, head=True) for _ in STRIDES)

        self.multi_level_share_convs = nn.ModuleList(
            nn.Sequential(_PointDepth(width, width)) for _ in STRIDES
        )
        self.multi_level_cls = per_level(1)
        self.multi_level_bbox = per_level(4)
        self.multi_level_obj = per_level(1)
        self.multi_level_kps = per_level(10)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shared = [conv(x) for conv, x in zip(self.multi_level_share_convs, maps, strict=True)]

        def joined(heads: nn.ModuleList) -> Tensor:
            return torch.cat([_flat(h(x)) for h, x in zip(heads, shared, strict=True)], 1)

        return (
            joined(self.multi_level_cls)[..., 0],
            joined(self.multi_level_obj)[..., 0],
            joined(self.multi_level_bbox),
            joined(self.multi_level_kps),
        )

    def for_cpu(self) -> nn.Module:
        return _JoinedHead(self)


class _JoinedHead(nn.Module):
    """A ``_Head`` whose four outputs of a level are one map, of two convolutions instead of eight:
    those of one, four and ten channels leave most of a processor's lanes empty."""

    def __init__(self, head: _Head) -> None:
        super().__init__()
        kinds = (head.multi_level_cls, head.multi_level_obj, head.multi_level_bbox,
                 head.multi_level_kps)  # fmt: skip
        self.shared = head.multi_level_share_convs
        self.outputs = nn.ModuleList()
        for parts in zip(*kinds, strict=True):
            states = [part.state_dict() for part in parts]
            joined = {name: torch.cat([state[name] for state in states]) for name in states[0]}
            outputs, inputs = joined["conv1.weight"].shape[:2]
            whole = _PointDepth(inputs, outputs, head=True).eval().requires_grad_(False)
            whole.load_state_dict(joined)
            self.outputs.append(whole)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        levels = zip(self.outputs, self.shared, maps, strict=True)
        answer = torch.cat([_flat(output(shared(x))) for output, shared, x in levels], 1)
        return answer[..., 0], answer[..., 1], answer[..., 2:6], answer[..., 6:]


class YuNet(nn.Module):
    """The network. ``widths``: channels of the stem and the five stages; the last
    three must be equal, since the neck adds their maps."""

    strides: ClassVar[tuple[int, ...]] = STRIDES

    def __init__(self, widths: Sequence[int] = (16, 64, 64, 64, 64, 64)) -> None:
        super().__init__()
        if len(widths) != 6 or len(set(widths[3:])) != 1 or min(widths) < 1:
            raise ValueError("widths needs six positive numbers, the last three equal")
        self.backbone = _Backbone(widths)
        self.neck = _Neck(widths[-1])
        self.bbox_head = _Head(widths[-1])

    def logits(self, x: Tensor) -> DenseHeads:
        """As ``forward``, with ``cls`` and ``obj`` before the sigmoid (for training)."""
        return DenseHeads(*self.bbox_head(self.neck(self.backbone(x))))

    def forward(self, x: Tensor) -> DenseHeads:
        cls, obj, box, points = self.logits(x)
        return DenseHeads(cls.sigmoid(), obj.sigmoid(), box, points)


def decode(heads: DenseHeads, height: int, width: int, best: int = 0) -> Tensor:
    """Dense heads to candidates [N, A, 15]: score, x, y, w, h, five (x, y); float32 pixels
    of the network's input. The score is sqrt(cls * obj). ``best``: of at most so many, best
    first, instead of all."""
    device = heads.cls.device
    grids, steps = [], []
    for stride in STRIDES:
        rows = torch.arange(height // stride, device=device, dtype=torch.float32)
        columns = torch.arange(width // stride, device=device, dtype=torch.float32)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        grids.append(torch.stack((x, y), -1).reshape(-1, 2))
        steps.append(torch.full((x.numel(), 1), float(stride), device=device))
    grid, step = torch.cat(grids)[None], torch.cat(steps)[None]
    box, points = heads.box, heads.points
    score = (heads.cls.float().clamp(0, 1) * heads.obj.float().clamp(0, 1)).sqrt()
    if best:
        score, rows = score.topk(min(best, score.shape[1]), dim=1)
        box, points = (
            v.gather(1, rows[..., None].expand(-1, -1, v.shape[2])) for v in (box, points)
        )
        grid, step = grid[0][rows], step[0][rows]
    box = box.float()
    # A size of more than e**10 strides is no face, and its exponential may overflow.
    size = box[..., 2:].clamp(max=10.0).exp() * step
    corner = (grid + box[..., :2]) * step - size / 2
    places = points.float().reshape(*points.shape[:2], 5, 2)
    places = (places + grid[:, :, None, :]) * step[:, :, None, :]
    return torch.cat((score[..., None], corner, size, places.flatten(-2)), -1)
