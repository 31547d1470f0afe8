"""Exact cosine search of a gallery that lies on a CUDA device, as float16.

One probe, or few, are searched by kernels of our own (``search.cu``): they read the rows once, as
fast as the card reads memory, and score in float32. Many probes are scored by the card's matrix
product, in float16: there the best subjects' rows are scored again in float32, so that what comes
back is exact too. So is everything where the kernels cannot be had.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from facelane_server import limits
from facelane_server.wiping import wipe
from facelane_server.worker.faults import Fault, classify
from facelane_server.worker.journal import log_event
from facelane_server.worker.kernels import INT, LONG, POINTER, Kernels

if TYPE_CHECKING:
    from facelane_server.models.api import F32

SOURCE: Final = Path(__file__).with_name("search.cu")
SIGNATURES: Final = {
    "scores": (POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, LONG, INT),
    "best": (POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, LONG, INT, INT),
}
"""Of the kernels of ``search.cu``."""
NEVER: Final = -2.0
"""Below every cosine: of rows that were removed."""
_GONE_BELOW: Final = -1.5
FEW: Final = (1, 4)
"""So many probes have kernels; between them, those for more."""
_WIDEST: Final = 1_024
"""Vectors of so many numbers fit into a thread's registers, with the rows that it reads."""
_ROWS_A_GROUP: Final = 256
_SCORE_THREADS, _BEST_THREADS = 256, 512
_TEAM: Final = 8
"""Warps that share a group."""
_SIDE_BY_SIDE: Final = {1: 2, 4: 4}
"""Rows that a warp reads at a time, for so many probes."""
_WARP: Final = 32
_SCORES: Final = 2**24
"""By the matrix product so many at a time (64 MiB): few and large launches."""
_GROUP: Final = 512
"""There, the best subjects are looked for in so many of these that have the best one of theirs."""
_RESCORED: Final = 4
"""There, this many subjects more than asked for are scored again in float32."""

Places = tuple[tuple[int, float], ...]
"""(place of a subject in its segment, cosine), best first."""


class _Layout(NamedTuple):
    """Of one segment, on the device."""

    numbers: Tensor
    """int64 [rows] the subject's place of each row."""
    starts: Tensor
    """int64 [subjects] first row in the matrix, and how many."""
    lengths: Tensor
    longest: int
    groups: Tensor
    """int32 [groups + 1] first rows, relative to the segment, of about _ROWS_A_GROUP rows each."""
    group_subjects: Tensor
    """int32 [groups + 1] their first subjects."""
    first_of: Tensor
    """int32 [subjects + 1], relative to the segment."""


class _Desk:
    """What searches by kernels need besides the rows, one search at a time: kept, because to ask
    for it takes as long as to search ten thousand rows."""

    def __init__(self, device: torch.device, dim: int) -> None:
        self.lock = threading.Lock()
        most, pinned = FEW[-1], device.type == "cuda"
        self.staged = torch.zeros((most, dim), dtype=torch.float32, pin_memory=pinned)
        self.given: F32 = self.staged.numpy()
        """Zeros again after each search."""
        self.probes = torch.zeros((most, dim), dtype=torch.float32, device=device)
        # A kernel writes into the host's memory.
        answers = 2 * most * limits.MAX_CANDIDATES
        self.answers = torch.zeros(answers, dtype=torch.int32, pin_memory=pinned)
        self.read: npt.NDArray[np.int32] = self.answers.numpy()
        self._scored = torch.empty(0, dtype=torch.float32, device=device)

    def scored(self, numbers: int) -> Tensor:
        """At least so many."""
        if len(self._scored) < numbers:
            self._scored = torch.empty(0, dtype=torch.float32, device=self._scored.device)
            self._scored = torch.empty(numbers, dtype=torch.float32, device=self._scored.device)
        return self._scored


class CardRows:
    """The matrix on a device. One transfer to it and one back for a batch of probes."""

    def __init__(self, matrix: npt.NDArray[np.float16], device: str) -> None:
        self._device = torch.device(device)
        with torch.inference_mode():
            # A copy: a tensor must not live on the mapping, which is read-only.
            held = np.array(matrix)
            self._matrix = torch.from_numpy(held).to(self._device)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
                wipe(held)
        self._layouts: dict[int, _Layout] = {}
        self._gone: Tensor | None = None
        """[rows] whether a row was removed; ``None`` = none was."""
        self._kernels = [kernels_for(self._device, matrix.shape[1], few) for few in FEW]
        with torch.inference_mode():
            self._desk = _Desk(self._device, matrix.shape[1]) if any(self._kernels) else None

    def remove(self, rows: Sequence[int]) -> None:
        """Overwrites rows: they are never found again."""
        with torch.inference_mode():
            at = torch.tensor(list(rows), device=self._device)
            gone = self._gone
            if gone is None:
                gone = torch.zeros(len(self._matrix), dtype=torch.bool, device=self._device)
            gone[at] = True
            self._matrix[at] = 0
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._gone = gone

    def best_of_subjects(
        self, probes: F32, first: int, starts: npt.NDArray[np.intp], last: int, keep: int
    ) -> list[Places]:
        """``probes`` [N, dim] → for each the best ``keep`` subjects of rows [first, last), where
        the k-th begins at ``starts[k]`` relative to first. Subjects of whom no row is left are not
        among them."""
        with torch.inference_mode():
            layout = self._layout(first, starts, last)
            for few, kernels in zip(FEW, self._kernels, strict=True):
                if kernels is not None and len(probes) <= few:
                    return self._by_kernels(kernels, few, probes, first, last, layout, keep)
            return self._by_product(probes, first, last, layout, keep)

    def _by_kernels(
        self,
        kernels: Kernels,
        few: int,
        probes: F32,
        first: int,
        last: int,
        layout: _Layout,
        keep: int,
    ) -> list[Places]:
        desk = self._desk
        assert desk is not None
        rows, count = last - first, len(layout.groups) - 1
        blocks = -(-count * _TEAM * _WARP // _SCORE_THREADS)
        with desk.lock:
            try:
                desk.given[: len(probes)] = probes
                desk.probes[:few].copy_(desk.staged[:few], non_blocking=True)
                scored = desk.scored(few * (rows + count))
                group_best = scored[few * rows :]
                kernels.launch(
                    "scores", (blocks, 1), _SCORE_THREADS, self._matrix[first], desk.probes,
                    None if self._gone is None else self._gone[first:],
                    layout.groups, scored, group_best, rows, count,
                )  # fmt: skip
                answers, wanted = desk.answers, len(probes) * keep
                kernels.launch(
                    "best", (len(probes), 1), _BEST_THREADS, scored, group_best,
                    layout.group_subjects, layout.first_of, answers, answers[wanted:],
                    rows, count, keep,
                )  # fmt: skip
                torch.cuda.current_stream(self._device).synchronize()
            finally:
                wipe(desk.given)
            found = desk.read[: 2 * wanted].reshape(2, len(probes), keep)
            return _told(found[0], found[1].view(np.float32))

    def _by_product(
        self, probes: F32, first: int, last: int, layout: _Layout, keep: int
    ) -> list[Places]:
        exact = torch.from_numpy(probes).to(self._device)
        count = len(layout.starts)
        groups = -(-count // _GROUP)
        # What only fills the last group up is below whoever is gone.
        best = torch.full(
            (len(probes), groups * _GROUP), NEVER - 1, dtype=torch.float32, device=self._device
        )
        gone = self._gone
        coarse = exact.half()
        rows_at_once = max(1, _SCORES // len(probes))
        for begin in range(first, last, rows_at_once):
            end = min(begin + rows_at_once, last)
            scores = (coarse @ self._matrix[begin:end].T).float()
            if gone is not None:
                scores.masked_fill_(gone[begin:end], NEVER)
            own = layout.numbers[begin - first : end - first]
            best.scatter_reduce_(1, own.expand(len(probes), -1), scores, "amax")
        chosen = _chosen(best, min(keep + _RESCORED, count))
        # Every template of the chosen subjects, scored again: [N, chosen, longest].
        offset = torch.arange(layout.longest, device=self._device)
        within = torch.minimum(offset, layout.lengths[chosen][..., None] - 1)
        rows = layout.starts[chosen][..., None] + within
        scored = torch.einsum("nsld,nd->nsl", self._matrix[rows].float(), exact)
        if gone is not None:
            scored.masked_fill_(gone[rows], NEVER)
        again = scored.amax(2)
        values, order = torch.topk(again, min(keep, again.shape[1]), dim=1)
        places = torch.gather(chosen, 1, order).int()
        packed = torch.stack([places, values.view(torch.int32)]).cpu().numpy()
        return _told(packed[0], packed[1].view(np.float32))

    def _layout(self, first: int, starts: npt.NDArray[np.intp], last: int) -> _Layout:
        layout = self._layouts.get(first)
        if layout is None:
            bounds = np.append(starts, last - first)
            lengths = np.diff(bounds)
            numbers = np.repeat(np.arange(len(starts)), lengths)
            cut = np.searchsorted(bounds, np.arange(0, last - first, _ROWS_A_GROUP))
            groups = np.unique(np.append(bounds[cut], last - first))
            group_subjects = np.searchsorted(bounds, groups)

            def there(values: npt.NDArray[Any], kind: type[np.signedinteger[Any]]) -> Tensor:
                return torch.from_numpy(np.ascontiguousarray(values, kind)).to(self._device)

            layout = _Layout(
                there(numbers, np.int64),
                there(starts + first, np.int64),
                there(lengths, np.int64),
                int(lengths.max()),
                there(groups, np.int32),
                there(group_subjects, np.int32),
                there(bounds, np.int32),
            )
            self._layouts[first] = layout
        return layout


def _told(places: npt.NDArray[np.int32], cosines: F32) -> list[Places]:
    return [
        tuple(
            (place, cosine)
            for place, cosine in zip(of_probe.tolist(), values.tolist(), strict=True)
            if cosine > _GONE_BELOW
        )
        for of_probe, values in zip(places, cosines, strict=True)
    ]


def _chosen(best: Tensor, count: int) -> Tensor:
    """The places [N, count] of the best of each row of ``best`` [N, groups x _GROUP]: they lie
    in the ``count`` groups whose own best ones are the best."""
    groups = best.shape[1] // _GROUP
    if groups <= count:
        return torch.topk(best, count, dim=1)[1]
    grouped = best.view(len(best), groups, _GROUP)
    where = torch.topk(grouped.amax(2), count, dim=1, sorted=False)[1]
    among = torch.gather(grouped, 1, where[..., None].expand(-1, -1, _GROUP)).flatten(1)
    at = torch.topk(among, count, dim=1)[1]
    return torch.gather(where, 1, at // _GROUP) * _GROUP + at % _GROUP


@functools.cache
def kernels_for(device: torch.device, dim: int, few: int) -> Kernels | None:
    """For vectors of ``dim`` and at most ``few`` probes; None where there are none for them."""
    if device.type != "cuda" or dim % 8 or dim > _WIDEST:
        return None
    flags = [
        f"-DDIM={dim}",
        f"-DPROBES={few}",
        f"-DMOST={limits.MAX_CANDIDATES}",
        f"-DROWS={_SIDE_BY_SIDE[few]}",
        f"-DTEAM={_TEAM}",
    ]
    try:
        return Kernels(SOURCE, SIGNATURES, device, flags)
    except (ImportError, OSError, RuntimeError) as error:
        if classify(error) is not Fault.ORDINARY:
            raise
        log_event(
            "the gallery is searched without kernels", cause=f"{type(error).__name__}: {error}"
        )
        return None
