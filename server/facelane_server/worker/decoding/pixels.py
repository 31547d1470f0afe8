"""Pictures that lie on the device of their model, and what is done with their pixels there.

``cuda_pixels`` does it by one kernel a batch each, ``torch_pixels`` by torch operations a picture
each, on any device: that is the reference, and serves where the kernels cannot be had.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from facelane_server.models.api import F32, AlignedCrop, CropSpec, DevicePicture
from facelane_server.worker.decoding.crops import alignments, context_regions

_FAR: Final = 1e9
"""Beyond every picture: no bound."""

Colours = tuple[float, float, float, float, float, float]
"""Of NV12: luma's factor and offset, v in red, u and v in green, u in blue."""
BT601: Final[Colours] = (1.1643836, 16.0, 1.5960268, -0.3917623, -0.8129676, 2.0172321)
"""Limited range: what cameras of old, and OpenCV, mean by NV12."""
BT709: Final[Colours] = (1.1643836, 16.0, 1.7927411, -0.2132486, -0.5329093, 2.1124018)


class Layout(IntEnum):
    """As in ``pixels.cu``."""

    RGB_PLANES = 0
    BGR = 1
    NV12 = 2


class OnDevice(DevicePicture):
    """``pixels``: uint8 [3, H, W] of RGB, [H, W, 3] of BGR, or the [H, W] of NV12's luma, whose
    ``chroma`` is [H/2, W]. Rows may be further apart than they are long, pixels may not."""

    def __init__(
        self,
        pixels: Tensor,
        layout: Layout,
        *,
        chroma: Tensor | None = None,
        colours: Colours = BT601,
    ) -> None:
        self.pixels = pixels
        self.layout = layout
        self.chroma = chroma
        self.colours = colours
        self.height, self.width = pixels.shape[layout is Layout.RGB_PLANES :][:2]
        if layout is Layout.NV12 and (
            chroma is None
            or chroma.shape != (self.height // 2, self.width)
            or chroma.stride() != pixels.stride()
        ):
            raise ValueError("NV12 needs rows of chroma as far apart as those of luma")
        if layout is Layout.RGB_PLANES and pixels.stride(0) != self.height * pixels.stride(1):
            raise ValueError("planes lie one after the other")

    @classmethod
    def nv12(cls, surface: Tensor, height: int, colours: Colours = BT601) -> OnDevice:
        """``surface``: uint8 [H * 3 / 2, W], as decoders of video give it."""
        return cls(surface[:height], Layout.NV12, chroma=surface[height:], colours=colours)

    @property
    def pitch(self) -> int:
        """Bytes from a row to the next."""
        return int(self.pixels.stride(1 if self.layout is Layout.RGB_PLANES else 0))


class Pixels(ABC):
    """Queues its work on the device's current stream. Used by one thread."""

    suppresses: ClassVar[bool] = False
    """Whether it leaves of a detector's candidates the faces, too."""

    @abstractmethod
    def letterbox(
        self, pictures: Sequence[OnDevice], sizes: Sequence[tuple[int, int]], canvases: Tensor
    ) -> None:
        """Each picture, scaled to its height and width in ``sizes`` as the host scales (averaging
        where pixels would be skipped), to the top left of its row of ``canvases``
        (uint8 [n, H, W, 3], BGR); the rest black."""

    @abstractmethod
    def cut(
        self,
        pictures: Sequence[OnDevice],
        faces: npt.NDArray[np.intp],
        maps: Sequence[F32],
        sizes: Sequence[int],
    ) -> Tensor:
        """Records of crops, uint8 [N, bytes]: a face's crops one after the other, each
        [size, size, 3] BGR. ``faces[i]`` is the number of face i's picture, ``maps[k]``
        [N, 2, 5] takes pixels of crop k into it (``crop_maps``). To be waited for before the next
        call."""

    @abstractmethod
    def plain_ends(self, pictures: Sequence[OnDevice]) -> list[bool]:
        """Whether the last 8 x 8 pixels of each are of one colour. Waits."""


def crop_maps(spec: CropSpec, boxes: F32, landmarks: F32, bounds: npt.NDArray[np.intp]) -> F32:
    """Where the pixels of N crops lie in their pictures: [N, 2, 5], for x, then y: factor of x,
    factor of y, shift, least, most. ``bounds`` [N, 2]: widths and heights of the pictures."""
    maps = np.zeros((len(boxes), 2, 5), np.float32)
    if isinstance(spec, AlignedCrop):
        forth = alignments(landmarks, spec.size)
        # Of a similarity the inverse is its transpose over its squared factor.
        back = (
            forth[:, :, :2].transpose(0, 2, 1)
            / (forth[:, :1, 0] ** 2 + forth[:, 1:, 0] ** 2)[:, :, None]
        )
        maps[:, :, :2] = back
        maps[:, :, 2] = -(back @ forth[:, :, 2:])[:, :, 0]
        maps[:, :, 3], maps[:, :, 4] = -_FAR, _FAR
        return maps
    regions = context_regions(boxes, spec.scale, bounds)
    low = regions[:, :2]
    steps = (regions[:, 2:] - low) / spec.size
    maps[:, 0, 0], maps[:, 1, 1] = steps[:, 0], steps[:, 1]
    maps[:, :, 2] = 0.5 * steps - 0.5 + low
    maps[:, :, 3], maps[:, :, 4] = low, regions[:, 2:] - 1
    return maps


def records(count: int, sizes: Sequence[int], device: torch.device) -> Tensor:
    """Room for the records of ``count`` faces."""
    return torch.empty(
        (count, sum(3 * size * size for size in sizes)), dtype=torch.uint8, device=device
    )
