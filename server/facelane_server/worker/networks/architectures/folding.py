"""Batch normalisation folded into the convolution or linear layer before it.

In evaluation a batch norm is an affine map per channel; merged into the weights of
the layer before, it costs nothing. A block says which of its attributes form such
pairs (``FOLDS``); ``fold`` rewrites a whole network in place, and its outputs stay
the same up to rounding.
"""

from __future__ import annotations

import itertools
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

Network = TypeVar("Network", bound=nn.Module)


class Foldable(nn.Module):
    """A block that names its (layer, batch norm) attribute pairs."""

    FOLDS: ClassVar[tuple[tuple[str, str], ...]] = ()


def fold(network: nn.Module) -> None:
    """Fold every declared pair of ``network`` (in evaluation mode) in place."""
    if network.training:
        raise ValueError("fold a network in evaluation mode: call eval() first")
    for block in list(network.modules()):
        if isinstance(block, Foldable):
            for layer_name, norm_name in block.FOLDS:
                _fold_pair(block, layer_name, norm_name)
        elif isinstance(block, nn.Sequential):
            names = [name for name, _ in block.named_children()]
            for layer_name, norm_name in itertools.pairwise(names):
                _fold_pair(block, layer_name, norm_name)


class Affine(nn.Module):
    """A batch norm in evaluation mode, as one multiplication and addition a channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            scale = (norm.running_var.double() + norm.eps).rsqrt()
            if norm.affine:
                scale = scale * norm.weight.double()
            shift = -norm.running_mean.double() * scale
            if norm.affine:
                shift = shift + norm.bias.double()
        for name, value in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, value.float().view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


def plain_affine(network: Network) -> Network:
    """Replace the batch norms that could not be folded (a padded convolution follows them)
    by ``Affine``, in place: one kernel each on a GPU instead of two."""
    for block in list(network.modules()):
        for name, child in block.named_children():
            if isinstance(child, nn.BatchNorm2d) and child.running_mean is not None:
                setattr(block, name, Affine(child))
    return network


def _fold_pair(block: nn.Module, layer_name: str, norm_name: str) -> None:
    layer = getattr(block, layer_name)
    norm = getattr(block, norm_name, None)
    if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
        setattr(block, layer_name, fuse_conv_bn_eval(layer, norm))
    elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
        setattr(block, layer_name, fuse_linear_bn_eval(layer, norm))
    else:
        return
    setattr(block, norm_name, nn.Identity())
