"""Grounds without faces for the detector's scenes: drawn while it learns, the hardest kept.

A thousand drawn pictures are soon known by heart. Here processes draw ever new ones; what the
network takes for faces stays, and comes more often, until it has learnt that. Pictures of real
things stay as well: of what looks like a face and is none, a program draws the least.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
from collections.abc import Iterator
from multiprocessing.queues import Queue

import numpy as np
import torch
from torch import Tensor

from facelane_server.worker.networks.architectures.yunet import YuNet
from training.clutter import draw_on
from training.data import U8

AGAIN = 32
"""Kept pictures that are looked at again with every lot of new ones."""


LOTS = 3
"""Taken at most for a step: more than six processes draw meanwhile."""


class Grounds:
    """Pictures uint8 [K, 3, S, S] on the device, and how much each is taken for a face.

    The last ``real`` of them stay; the others make room for worse ones.
    """

    def __init__(self, pictures: Tensor, real: int = 0) -> None:
        self.pictures = pictures
        self._worth = torch.zeros(len(pictures), device=pictures.device)
        self._mined = len(pictures) - real

    def pick(self, n: int) -> Tensor:
        """[n] rows: half of them any, half by how much they are taken for a face."""
        any_of_them = torch.randint(len(self.pictures), (n,), device=self._worth.device)
        worst = torch.multinomial(self._worth + 1e-3, n, replacement=True)
        return torch.where(torch.rand(n, device=self._worth.device) < 0.5, any_of_them, worst)

    @torch.no_grad()
    def learn(self, network: YuNet, pictures: Tensor) -> None:
        """Look at new ``pictures`` [N, 3, S, S] and some of the kept ones, and keep the worst."""
        again = torch.randint(len(self.pictures), (AGAIN,), device=self._worth.device)
        found = most(network, torch.cat((self.pictures[again], pictures.to(self.pictures.device))))
        self._worth[again] = found[:AGAIN]
        new = found[AGAIN:]
        count = min(len(new), self._mined)
        worst, least = new.topk(count), (-self._worth[: self._mined]).topk(count).indices
        better = worst.values > self._worth[least]
        rows = least[better]
        self.pictures[rows] = pictures.to(self.pictures.device)[worst.indices[better]]
        self._worth[rows] = worst.values[better]


def most(network: YuNet, pictures: Tensor) -> Tensor:
    """[N]: the highest probability of a face that the network gives in each picture, uint8."""
    x = pictures.float().contiguous(memory_format=torch.channels_last)
    heads = network(x)
    return (heads.cls * heads.obj).float().amax(1)


class Drawers:
    """Processes that draw pictures of ``side``."""

    def __init__(self, pictures: Queue[U8]) -> None:
        self._pictures = pictures

    def taken(self) -> Tensor | None:
        """The new pictures [N, 3, S, S] of some lots, if any are there."""
        lots: list[U8] = []
        with contextlib.suppress(queue.Empty):
            while len(lots) < LOTS:
                lots.append(self._pictures.get_nowait())
        if not lots:
            return None
        return torch.from_numpy(np.concatenate(lots).transpose(0, 3, 1, 2).copy())


@contextlib.contextmanager
def drawers(count: int, side: int, seed: int) -> Iterator[Drawers]:
    context = multiprocessing.get_context("spawn")
    pictures: Queue[U8] = context.Queue(4 * count)
    children = [
        context.Process(target=draw_on, args=(pictures, seed + k, side), daemon=True)
        for k in range(count)
    ]
    for child in children:
        child.start()
    try:
        yield Drawers(pictures)
    finally:
        for child in children:
            child.terminate()
        pictures.cancel_join_thread()
        for child in children:
            child.join()
