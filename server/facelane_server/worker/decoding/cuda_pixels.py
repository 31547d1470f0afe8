"""``Pixels`` by the kernels of ``pixels.cu``, a launch a batch each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from facelane_server import limits
from facelane_server.models.api import F32
from facelane_server.worker.decoding.pixels import OnDevice, Pixels, records
from facelane_server.worker.decoding.torch_pixels import averages
from facelane_server.worker.kernels import FLOAT, INT, POINTER, Kernels
from facelane_server.worker.networks.candidates import TOP, WIDTH

SOURCE: Final = Path(__file__).with_name("pixels.cu")
PICTURE: Final = np.dtype(
    [
        ("pixels", np.uint64),
        ("chroma", np.uint64),
        ("height", np.int32),
        ("width", np.int32),
        ("pitch", np.int32),
        ("layout", np.int32),
        ("to_height", np.int32),
        ("to_width", np.int32),
        ("average", np.int32),
        ("unused", np.int32),
        ("colour", np.float32, 6),
    ],
    align=True,
)
CROP: Final = np.dtype(
    [
        ("offset", np.int64),
        ("picture", np.int32),
        ("size", np.int32),
        ("map", np.float32, 10),
    ],
    align=True,
)
"""Both as ``pixels.cu`` has them."""
_THREADS: Final = 256
_SIGNATURES: Final = {
    "letterbox": (POINTER, POINTER, INT, INT),
    "crops": (POINTER, POINTER, POINTER),
    "plain_ends": (POINTER, POINTER),
    "suppress": (POINTER, POINTER, INT, INT, FLOAT, FLOAT),
}


class CudaPixels(Pixels):
    """Of one device, whose context is current. Raises RuntimeError where the kernels cannot be
    compiled or loaded, ImportError where the library for it is not installed."""

    suppresses = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._kernels = Kernels(SOURCE, _SIGNATURES, device, ["--fmad=false"])

    def letterbox(
        self, pictures: Sequence[OnDevice], sizes: Sequence[tuple[int, int]], canvases: Tensor
    ) -> None:
        count, height, width = canvases.shape[:3]
        assert canvases.is_contiguous()
        assert count == len(pictures)
        table = self._there(picture_table(pictures, sizes))
        blocks = -(-height * width // _THREADS), count
        self._kernels.launch("letterbox", blocks, _THREADS, table, canvases, height, width)

    def cut(
        self,
        pictures: Sequence[OnDevice],
        faces: npt.NDArray[np.intp],
        maps: Sequence[F32],
        sizes: Sequence[int],
    ) -> Tensor:
        out = records(len(faces), sizes, self._device)
        if not len(faces):
            return out
        crops = crop_table(faces, maps, sizes)
        # One copy for both tables, by way of memory of its own: whoever cuts waits for the crops.
        seen = picture_table(pictures)
        size = seen.nbytes + crops.nbytes
        if len(self._staging) < size:
            self._staging = torch.empty(2 * size, dtype=torch.uint8, pin_memory=True)
        staged = self._staging.numpy()
        staged[: seen.nbytes], staged[seen.nbytes : size] = (
            seen.view(np.uint8),
            crops.view(np.uint8),
        )
        table = self._staging[:size].to(self._device, non_blocking=True)
        self._kernels.launch("crops", (len(crops), 1), _THREADS, table, table[seen.nbytes :], out)
        return out

    def plain_ends(self, pictures: Sequence[OnDevice]) -> list[bool]:
        plain = torch.empty(len(pictures), dtype=torch.uint8, device=self._device)
        table = self._there(picture_table(pictures))
        self._kernels.launch("plain_ends", (len(pictures), 1), 64, table, plain)
        return [bool(one) for one in plain.tolist()]

    def suppress(self, candidates: Tensor, score: float, iou: float) -> Tensor:
        """``candidates.select`` for candidates float32 [n, K, 15], each picture's best first:
        [n, limits.MAX_FACES, 15]; score 0 = there are no more. A graph may capture it."""
        count, rows, width = candidates.shape
        assert rows <= TOP
        assert width == WIDTH
        assert candidates.dtype == torch.float32
        candidates = candidates.contiguous()
        kept = candidates.new_empty((count, limits.MAX_FACES, WIDTH))
        blocks = count, 1
        self._kernels.launch(
            "suppress", blocks, TOP, candidates, kept, rows, limits.MAX_FACES, score, iou
        )
        return kept

    def _there(self, table: npt.NDArray[Any]) -> Tensor:
        """A table on the device, by way of memory that the copy need not be waited for."""
        data = torch.from_numpy(table.view(np.uint8))
        return data.pin_memory().to(self._device, non_blocking=True)


def picture_table(
    pictures: Sequence[OnDevice], sizes: Sequence[tuple[int, int]] | None = None
) -> npt.NDArray[Any]:
    """Rows of PICTURE."""
    table = np.zeros(len(pictures), PICTURE)
    for row, (picture, size) in enumerate(
        zip(pictures, sizes or [(1, 1)] * len(pictures), strict=True)
    ):
        chroma = 0 if picture.chroma is None else picture.chroma.data_ptr()
        average = averages(picture, *size)
        table[row] = (
            picture.pixels.data_ptr(), chroma, picture.height, picture.width, picture.pitch,
            picture.layout, *size, average, 0, picture.colours,
        )  # fmt: skip
    return table


def crop_table(
    faces: npt.NDArray[np.intp], maps: Sequence[F32], sizes: Sequence[int]
) -> npt.NDArray[Any]:
    """Rows of CROP: those of the first spec, then of the second."""
    lengths = [3 * size * size for size in sizes]
    table = np.zeros((len(sizes), len(faces)), CROP)
    table["picture"] = faces
    table["offset"] = np.arange(len(faces)) * sum(lengths)
    for rows, found, size, before in zip(
        table, maps, sizes, np.cumsum([0, *lengths[:-1]]), strict=True
    ):
        rows["offset"] += before
        rows["size"] = size
        rows["map"] = found.reshape(-1, 10)
    return table.reshape(-1)
