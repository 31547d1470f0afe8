"""``Pixels`` as torch operations, float32, for any device: the reference of the kernels.

The host's crops work with 5-bit fractions, so they differ by less than one grey level on average.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from facelane_server.models.api import F32
from facelane_server.worker.decoding.pixels import Layout, OnDevice, Pixels, records


class TorchPixels(Pixels):
    def letterbox(
        self, pictures: Sequence[OnDevice], sizes: Sequence[tuple[int, int]], canvases: Tensor
    ) -> None:
        for picture, (height, width), canvas in zip(pictures, sizes, canvases, strict=True):
            canvas.zero_()
            canvas[:height, :width].copy_(_scaled(picture, height, width))

    def cut(
        self,
        pictures: Sequence[OnDevice],
        faces: npt.NDArray[np.intp],
        maps: Sequence[F32],
        sizes: Sequence[int],
    ) -> Tensor:
        device = pictures[0].pixels.device
        out = records(len(faces), sizes, device)
        for number in np.unique(faces):
            picture = pictures[number]
            rows = np.flatnonzero(faces == number)
            planes = _bgr(picture)[None].expand(len(rows), -1, -1, -1)
            where = torch.from_numpy(rows).to(device)
            at = 0
            for found, size in zip(maps, sizes, strict=True):
                grid = _grid(torch.from_numpy(found[rows]).to(device), size, picture)
                sampled = F.grid_sample(
                    planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False
                )
                crops = _bytes(sampled).permute(0, 2, 3, 1).reshape(len(rows), -1)
                out[where, at : at + crops.shape[1]] = crops
                at += crops.shape[1]
        return out

    def plain_ends(self, pictures: Sequence[OnDevice]) -> list[bool]:
        ends = torch.stack([_bgr(picture, 8).reshape(3, -1) for picture in pictures])
        plain: list[bool] = (ends.amax(2) == ends.amin(2)).all(1).tolist()
        return plain


def _bgr(picture: OnDevice, last: int = 0) -> Tensor:
    """float32 [3, H, W]; of the ``last`` rows and columns alone where that is not 0."""
    pixels = picture.pixels
    if picture.layout is Layout.RGB_PLANES:
        return pixels[:, -last:, -last:].flip(0).float()
    if picture.layout is Layout.BGR:
        return pixels[-last:, -last:].permute(2, 0, 1).float()
    assert picture.chroma is not None
    factor, offset, v_red, u_green, v_green, u_blue = picture.colours
    luma = (pixels.float() - offset) * factor
    pairs = picture.chroma.reshape(len(picture.chroma), -1, 2).float() - 128.0
    u, v = (
        pairs[..., i].repeat_interleave(2, 0).repeat_interleave(2, 1)[: picture.height]
        for i in (0, 1)
    )
    planes = (luma + u_blue * u, luma + u_green * u + v_green * v, luma + v_red * v)
    return torch.stack(planes).clamp(0, 255)[:, -last:, -last:]


def _scaled(picture: OnDevice, height: int, width: int) -> Tensor:
    """uint8 [height, width, 3]."""
    planes = _bgr(picture)
    if (picture.height, picture.width) != (height, width):
        mode = "area" if averages(picture, height, width) else "bilinear"
        planes = F.interpolate(planes[None], (height, width), mode=mode)[0]
    return _bytes(planes).permute(1, 2, 0)


def averages(picture: OnDevice, height: int, width: int) -> bool:
    """Averaging costs more and pays only where pixels would be skipped."""
    return width * 2 < picture.width or height * 2 < picture.height


def _bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def _grid(maps: Tensor, size: int, picture: OnDevice) -> Tensor:
    """Where the pixels of N crops lie, as ``grid_sample`` wants it: [N, size, size, 2]."""
    steps = torch.arange(size, device=maps.device, dtype=torch.float32)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    found = maps[:, None, None]
    points = x[..., None] * found[..., 0] + y[..., None] * found[..., 1] + found[..., 2]
    points = points.clamp(found[..., 3], found[..., 4])
    # Pixel centres to [-1, 1] with align_corners=False.
    return torch.stack(
        (
            (points[..., 0] + 0.5) * (2.0 / picture.width) - 1.0,
            (points[..., 1] + 0.5) * (2.0 / picture.height) - 1.0,
        ),
        -1,
    )
