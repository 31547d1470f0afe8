"""Pictures that are decoded on the device and stay there: nvJPEG, through torchvision.

The host hands over JPEG data and gets back boxes, landmarks and crops; the picture itself
never crosses the bus. What nvJPEG is not given, or does not take, the worker decodes on the
host: progressive, grey or CMYK files, those with a colour transform of Adobe's, and
pictures that end in one plain block, because such an end may be a decoder's filler for data
that are missing, and the host's decoder tells the one from the other.

Three streams, so that no batch waits for another's: torchvision decodes on one of its own,
``stream`` waits for it and scales, and the crops of an earlier batch are cut on a third.
torchvision writes into memory of ``stream`` without waiting for what is queued there, so
that is waited for before each decoding: the little that was still to be scaled.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from facelane_server.domain import FacelaneError, Reason
from facelane_server.models.api import F32, U8, CropSpec, DevicePicture
from facelane_server.worker.decoding import device_crops
from facelane_server.worker.faults import Fault, classify
from facelane_server.worker.journal import log_event

Decode = Callable[[list[Tensor]], list[Tensor]]
"""uint8 data [bytes] each, on the host, to uint8 RGB [3, H, W] each, on the device."""

_TOLD_EVERY_S: Final = 60.0
_ALIKE: Final = 4.0
"""Grey levels on average that a trial picture may differ from the host's decoding."""


class OnDevice(DevicePicture):
    """``pixels``: uint8 [H, W, 3], BGR."""

    def __init__(self, pixels: Tensor) -> None:
        self.height, self.width = pixels.shape[:2]
        self.pixels = pixels


class DevicePictures:
    """Decodes, scales and crops on one device. Used by one thread.

    ``decode_jpegs``: nvJPEG; a test on a CPU brings its own.
    """

    def __init__(self, device: str, decode_jpegs: Decode) -> None:
        self._device = torch.device(device)
        self._decode_jpegs = decode_jpegs
        self._told = -_TOLD_EVERY_S
        cuda = self._device.type == "cuda"
        self.stream: Any = torch.cuda.Stream(self._device) if cuda else None  # type: ignore[no-untyped-call]
        self._crops: Any = torch.cuda.Stream(self._device) if cuda else None  # type: ignore[no-untyped-call]

    @classmethod
    def open(cls, device: str) -> DevicePictures:
        """With nvJPEG, tried out on one picture.

        Raises FacelaneError(CONFIG_INVALID) where it is not installed or does not work.
        """
        try:
            from torchvision.io import ImageReadMode, decode_jpeg
        except (ImportError, RuntimeError) as error:
            raise _unusable(f"torchvision cannot be imported ({error})") from error

        def decode_jpegs(data: list[Tensor]) -> list[Tensor]:
            found: list[Tensor] = decode_jpeg(data, mode=ImageReadMode.RGB, device=device)
            return found

        pictures = cls(device, decode_jpegs)
        pictures.try_out()
        return pictures

    def try_out(self) -> None:
        """A picture of a usual size, against the host's decoding; this also makes nvJPEG take
        the memory that it needs. Raises FacelaneError(CONFIG_INVALID)."""
        y, x = np.mgrid[:1080, :1920]
        plain = np.stack((x % 256, y % 256, (x + y) // 12), -1).astype(np.uint8)
        _, data = cv2.imencode(".jpg", plain, [cv2.IMWRITE_JPEG_QUALITY, 90])
        expected = cv2.imdecode(data, cv2.IMREAD_COLOR)
        assert expected is not None
        try:
            [found] = self._decode_all([np.asarray(data, np.uint8).reshape(-1)])
            pixels = found.cpu().numpy()
        except Exception as error:
            if classify(error) is not Fault.ORDINARY:
                raise
            raise _unusable(f"{type(error).__name__}: {error}") from error
        if pixels.shape != expected.shape:
            raise _unusable("a picture decoded on the card has another size than on the host")
        apart = float(np.abs(pixels.astype(np.int16) - expected.astype(np.int16)).mean())
        if apart > _ALIKE:
            raise _unusable(f"a picture decoded on the card differs from the host's by {apart:.1f}")

    def decode(self, jpegs: Sequence[memoryview]) -> list[DevicePicture | None]:
        """Decoded pictures; None for those that the host should decode. The caller has examined
        them: they are plain. Raises only what costs the device: no memory, a poisoned context."""
        found: list[DevicePicture | None] = [None] * len(jpegs)
        try:
            pixels = self._decode_all([np.frombuffer(data, np.uint8) for data in jpegs])
            ends = self._plain_ends(pixels)
        except Exception as error:
            if classify(error) is not Fault.ORDINARY:
                raise
            now = time.monotonic()
            if now - self._told >= _TOLD_EVERY_S:
                self._told = now
                log_event(
                    "JPEG not decoded on the device; decoding on the host",
                    error=type(error).__name__,
                    pictures=len(jpegs),
                )
            return found
        for i, (picture, plain) in enumerate(zip(pixels, ends, strict=True)):
            if not plain:
                found[i] = OnDevice(picture)
        return found

    def scaled(self, picture: DevicePicture, height: int, width: int) -> Tensor:
        """uint8 [height, width, 3], scaled as the host does it: averaging where pixels would be
        skipped. Queued on ``stream``."""
        assert isinstance(picture, OnDevice)
        if (picture.height, picture.width) == (height, width):
            return picture.pixels
        with self._on(self.stream), torch.inference_mode():
            planes = picture.pixels.permute(2, 0, 1)[None].float()
            if width * 2 < picture.width or height * 2 < picture.height:
                planes = F.interpolate(planes, (height, width), mode="area")
            else:
                planes = F.interpolate(planes, (height, width), mode="bilinear")
            return planes[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)

    def cut(
        self,
        faces: Sequence[tuple[DevicePicture, F32, F32]],
        specs: Sequence[CropSpec],
    ) -> list[tuple[U8, ...]]:
        """``crops.cut`` for several pictures with their boxes and landmarks; waits for it."""
        if not specs:
            return [()] * len(faces)
        with self._on(self._crops), torch.inference_mode():
            pieces: list[Tensor] = []
            for picture, boxes, landmarks in faces:
                assert isinstance(picture, OnDevice)
                pieces += device_crops.cut(picture.pixels, boxes, landmarks, specs)
            # One copy for all of them, and one wait.
            flat = torch.cat([piece.reshape(-1) for piece in pieces]).cpu().numpy()
        results: list[tuple[U8, ...]] = []
        at = 0
        for first in range(0, len(pieces), len(specs)):
            crops: list[U8] = []
            for piece in pieces[first : first + len(specs)]:
                crops.append(flat[at : at + piece.numel()].reshape(piece.shape))
                at += piece.numel()
            results.append(tuple(crops))
        return results

    def _decode_all(self, data: Sequence[U8]) -> list[Tensor]:
        # Copies: what comes from a worker's arena may not be written to, and torch would say so.
        encoded = [torch.from_numpy(one.copy()) for one in data]
        self._settle()
        with self._on(self.stream), torch.inference_mode():
            found = [rgb.flip(0).permute(1, 2, 0) for rgb in self._decode_jpegs(encoded)]
        # Nobody promises that nvJPEG has read the data before it has decoded them.
        self._settle()
        return found

    def _settle(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def _plain_ends(self, pictures: Sequence[Tensor]) -> list[bool]:
        """Whether the last block of each is of one colour."""
        with self._on(self.stream), torch.inference_mode():
            ends = torch.stack([_last_block(pixels) for pixels in pictures])
            plain: list[bool] = (ends.amax(1) == ends.amin(1)).all(1).tolist()
        return plain

    def _on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        if stream is None:
            return contextlib.nullcontext()
        return torch.cuda.stream(stream)


def _last_block(pixels: Tensor) -> Tensor:
    """[64, 3]; sides are at least that of a block."""
    return pixels[-8:, -8:].reshape(-1, 3)


def _unusable(why: str) -> FacelaneError:
    return FacelaneError(
        Reason.CONFIG_INVALID,
        f"decode = 'cuda' cannot be had: {why}; install facelane[nvjpeg], or set decode = 'cpu'",
    )
