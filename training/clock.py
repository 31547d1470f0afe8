"""Training by elapsed time: schedules, averages and checkpoints that a deadline cannot spoil."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Clock:
    """Runs from ``start`` (a ``time.time()``) for ``seconds``."""

    def __init__(self, start: float, seconds: float) -> None:
        self.start = start
        self.seconds = seconds

    @property
    def progress(self) -> float:
        """0 at the start, 1 when the time is over."""
        return min(1.0, max(0.0, (time.time() - self.start) / max(self.seconds, 1e-9)))

    @property
    def over(self) -> bool:
        return time.time() - self.start >= self.seconds


class CpuClock(Clock):
    """Runs for ``seconds`` of this process's own CPU time: other work on the machine, or a stop
    signal for a while, delays the schedule without shortening it."""

    def __init__(self, seconds: float) -> None:
        super().__init__(time.process_time(), seconds)

    @property
    def progress(self) -> float:
        return min(1.0, (time.process_time() - self.start) / max(self.seconds, 1e-9))

    @property
    def over(self) -> bool:
        return time.process_time() - self.start >= self.seconds


def cosine_rate(progress: float, peak: float, *, warm: float = 0.04, floor: float = 0.002) -> float:
    """Linear warm-up, then a cosine down to ``floor`` of the peak."""
    if progress < warm:
        return peak * max(progress / warm, 0.01)
    bend = 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))
    return peak * (floor + (1 - floor) * bend)


def decay_groups(network: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay on matrices and kernels, none on norms, biases, PReLU."""
    with_decay = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
    without = [p for p in network.parameters() if p.requires_grad and p.ndim <= 1]
    return [
        {"params": with_decay, "weight_decay": decay},
        {"params": without, "weight_decay": 0.0},
    ]


class Average:
    """Exponential moving average of a network's weights and batch norm statistics."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = deepcopy(network).eval()
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        self._decay = decay
        self._steps = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        mine, theirs = _floats(self.network), _floats(network)
        torch._foreach_mul_(mine, decay)
        torch._foreach_add_(mine, theirs, alpha=1 - decay)


def _floats(network: nn.Module) -> list[Tensor]:
    return [t.data for t in network.state_dict().values() if t.is_floating_point()]


def save(path: Path, **parts: Any) -> None:
    """Write a checkpoint so that a kill leaves the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(parts, partial)
    os.replace(partial, path)


def load_state(path: Path) -> dict[str, Tensor]:
    """The state of a checkpoint, or of the weights of a package (``.safetensors``)."""
    if path.suffix == ".safetensors":
        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["state"]
    return state


def half_state(network: nn.Module) -> dict[str, Tensor]:
    """The state on the host, floats as fp16 where they fit, contiguous, counters of batch norms
    left out."""
    out: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        out[name] = halved(value.detach().cpu()).contiguous()
    return out


def halved(value: Tensor) -> Tensor:
    """``value`` as fp16 if it is of floats that fp16 can hold: variances of pixels cannot be."""
    if not value.is_floating_point():
        return value
    half = value.half()
    return half if bool(torch.isfinite(half).all()) else value.float()


def grown_state(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state``, of this network or of a narrower one, in the shapes of ``network``.

    Loaded, the wider network gives the answers of the narrower one: channels that the state
    lacks are read by nothing that it has (their columns are zero). What is new keeps its
    random start and its gradients. Raises ValueError where the state is of no such network.
    """
    mine = network.state_dict()
    grown: dict[str, Tensor] = {}
    for name, value in state.items():
        if (
            name not in mine
            or value.shape[2:] != mine[name].shape[2:]
            or any(a > b for a, b in zip(value.shape, mine[name].shape, strict=True))
        ):
            raise ValueError("the checkpoint is of another network; train from the start")
        start = mine[name].clone()
        old = tuple(slice(0, size) for size in value.shape)
        if value.ndim > 1:
            start[old[0]] = 0
        start[old] = value.to(start)
        grown[name] = start
    return grown


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def mean(values: Iterable[float]) -> float:
    items = list(values)
    return sum(items) / len(items) if items else float("nan")
