"""Several processes, one GPU each, that train one network: equal starts, mean gradients.

Ranks are told by the environment as ``torchrun`` tells them (RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT); without it there is one.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

ASK_EVERY = 4
"""Steps between two looks at whether the time is over: looking waits for the device."""


class Ranks:
    """This process's place among them."""

    def __init__(self, device: torch.device) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        return self.rank == 0

    @torch.no_grad()
    def same_start(self, network: nn.Module) -> None:
        """Give every rank the first one's weights."""
        if self.world > 1:
            for tensor in network.state_dict().values():
                dist.broadcast(tensor, 0)

    @torch.no_grad()
    def mean_gradients(self, network: nn.Module, over: bool, step: int) -> bool:
        """Replace gradients by their mean over the ranks. Whether all are to end after this
        step: one whose time is ``over`` ends them all, so that none waits for another."""
        if self.world == 1:
            return over
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        flags = torch.tensor([float(over)], device=gradients[0].device)
        flat: Tensor = torch.cat([*(g.flatten() for g in gradients), flags])
        dist.all_reduce(flat)
        for gradient, mean in zip(
            gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(mean.view_as(gradient) / self.world)
        return step % ASK_EVERY == 0 and bool(flat[-1] > 0)

    def leave(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()
