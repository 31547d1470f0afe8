"""Liveness over any runner: context crops in, scores out."""

from __future__ import annotations

from collections.abc import Sequence

from facelane_server.models.api import F32, U8, ContextCrop, LivenessModel, Pending
from facelane_server.worker.networks.runner import Runner, Ticket


class NetworkLiveness(LivenessModel):
    """A network that answers [n, 1]: the score, higher = bona fide."""

    def __init__(self, runner: Runner, *, crops: tuple[ContextCrop, ...], batch_max: int) -> None:
        self.crops = crops
        self.batch_max = batch_max
        self._runner = runner

    def warm_up(self) -> None:
        self._runner.warm_up()

    def close(self) -> None:
        self._runner.close()

    def begin(self, crops: Sequence[U8]) -> Pending[F32]:
        if len(crops) != len(self.crops) or len({len(array) for array in crops}) != 1:
            raise ValueError("give as many crops of each of the model's specs")
        if not 1 <= len(crops[0]) <= self.batch_max:
            raise ValueError("a batch has 1 to batch_max crops")
        staged = self._runner.stage(len(crops[0]), [array.shape[1:3] for array in crops])
        for target, array in zip(staged, crops, strict=True):
            target[...] = array
        return _PendingScores(self._runner.launch())


class _PendingScores(Pending[F32]):
    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket

    def finish(self) -> F32:
        return self._ticket.wait()[:, 0]
