"""Recognition over any runner: chips in, unit vectors and OOD scores out."""

from __future__ import annotations

import numpy as np

from facelane_server.domain import FacelaneError, Reason
from facelane_server.models.api import (
    U8,
    AlignedCrop,
    Embeddings,
    Pending,
    Recognizer,
)
from facelane_server.worker.networks.runner import Runner, Ticket


class NetworkRecognizer(Recognizer):
    """A network that answers [n, D + 1]: the unit vector and the OOD score."""

    def __init__(
        self, runner: Runner, *, crop: AlignedCrop, embedding_dim: int, batch_max: int
    ) -> None:
        self.crop = crop
        self.embedding_dim = embedding_dim
        self.batch_max = batch_max
        self._runner = runner

    def warm_up(self) -> None:
        self._runner.warm_up()
        size = self.crop.size
        probe = self.begin(np.zeros((1, size, size, 3), np.uint8)).finish()
        if probe.vectors.shape[1] != self.embedding_dim:
            raise FacelaneError(
                Reason.MODEL_INVALID,
                f"the package declares output.embedding_dim {self.embedding_dim}, but the network "
                f"gives {probe.vectors.shape[1]}; correct the package",
            )

    def close(self) -> None:
        self._runner.close()

    def begin(self, chips: U8) -> Pending[Embeddings]:
        if not 1 <= len(chips) <= self.batch_max:
            raise ValueError("a batch has 1 to batch_max chips")
        (staged,) = self._runner.stage(len(chips), [chips.shape[1:3]])
        staged[...] = chips
        return _PendingEmbeddings(self._runner.launch())


class _PendingEmbeddings(Pending[Embeddings]):
    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket

    def finish(self) -> Embeddings:
        output = self._ticket.wait()
        return Embeddings(vectors=output[:, :-1], ood=output[:, -1])
