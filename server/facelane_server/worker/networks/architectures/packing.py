"""Convolutions as oneDNN runs them best on a CPU.

torch alone brings a convolution's weights into oneDNN's order anew for every picture, writes a map
and reads it again for the ReLU after it, and with one thread runs most of them by its own slow
code. Here the weights are brought into order once, and the ReLU is part of the convolution.
Outputs stay the same up to rounding. A block says which pairs it has (``RELUS``), and may have
a form of its own for a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

_OPERATOR = "_convolution_pointwise"
_WORTH = 3_000_000
"""Multiplications from which a convolution gains: a small one takes longer to be called. torch
leaves those by channel to oneDNN anyway."""


class Packable(nn.Module):
    """A block that names its (convolution, ReLU) attribute pairs."""

    RELUS: ClassVar[tuple[tuple[str, str], ...]] = ()

    def for_cpu(self) -> nn.Module:
        """What takes the block's place on a CPU: itself, if nothing does the same in less time."""
        return self


class PackedConv(nn.Module):
    """A convolution whose weights are in oneDNN's own order."""

    def __init__(self, conv: nn.Conv2d, size: Sequence[int], *, relu: bool) -> None:
        """``size``: of the inputs that the order is chosen for; others are taken too."""
        super().__init__()
        assert not isinstance(conv.padding, str)
        how = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
        self._how = how
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        self._weight: Tensor = reorder(conv.weight.detach().to_mkldnn(), *how, list(size))
        self._bias = None if conv.bias is None else conv.bias.detach()
        self._after = "relu" if relu else "none"

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._weight, self._bias, *self._how, self._after, [], ""
        )
        return out


def can_pack() -> bool:
    """Whether this build of torch has what it takes."""
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and hasattr(torch.ops.mkldnn, _OPERATOR)


class Packed:
    """The convolutions of ``network`` (float32, in evaluation mode, on a CPU) packed in place, for
    inputs like ``examples``."""

    def __init__(self, network: nn.Module, *examples: Tensor) -> None:
        self._before: list[tuple[nn.Module, str, nn.Module]] = []
        with torch.inference_mode():
            for block in list(network.modules()):
                for name, child in block.named_children():
                    if isinstance(child, Packable) and (own := child.for_cpu()) is not child:
                        self._put(block, name, own)
            sizes = _worth_packing(network, examples)
            for block in list(network.modules()):
                relus = dict(block.RELUS) if isinstance(block, Packable) else {}
                for name, child in block.named_children():
                    if isinstance(child, nn.Conv2d) and child in sizes:
                        act = relus.get(name, "")
                        fused = isinstance(getattr(block, act, None), nn.ReLU)
                        self._put(block, name, PackedConv(child, sizes[child], relu=fused))
                        if fused:
                            self._put(block, act, nn.Identity())

    def undo(self) -> None:
        """The network as it was."""
        while self._before:
            block, name, module = self._before.pop()
            setattr(block, name, module)

    def _put(self, block: nn.Module, name: str, module: nn.Module) -> None:
        self._before.append((block, name, getattr(block, name)))
        setattr(block, name, module)


def _worth_packing(network: nn.Module, examples: Sequence[Tensor]) -> dict[nn.Module, torch.Size]:
    """The convolutions that gain, and the size of what each reads."""
    sizes: dict[nn.Module, torch.Size] = {}

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        work = module.weight[0].numel() * output[0].numel()
        if work >= _WORTH or module.groups > 1:
            sizes[module] = inputs[0].shape

    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_hook(seen) for module in convolutions]
    network(*examples)
    for hook in hooks:
        hook.remove()
    return sizes
