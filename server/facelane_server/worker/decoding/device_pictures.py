"""Pictures on their way to the detector's device, where they stay: the host hands over JPEG data,
or pixels that it decoded itself, and gets back boxes, landmarks and crops.

JPEG is decoded by nvJPEG, through torchvision. What nvJPEG is not given, or does not take, the
worker decodes on the host: progressive, grey or CMYK files, those with a colour transform of
Adobe's, and pictures that end in one plain block, because such an end may be a decoder's filler
for data that are missing, and the host's decoder tells the one from the other.

Two streams beside the network's, so that no batch waits for another's: pictures arrive on
``stream``, and the crops of an earlier batch are cut on another. A picture's memory is free again
when its crops are cut, which ends all that reads it.

nvJPEG's engine heeds no stream: it writes into its memory at once, whatever is still queued for
that memory. So ``stream`` is waited for before each decoding, and after it: nobody promises
either that it has read the data before it has decoded them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from facelane_server.domain import FacelaneError, Reason
from facelane_server.models.api import F32, U8, CropSpec, DevicePicture
from facelane_server.worker.decoding.pixels import Layout, OnDevice, Pixels, crop_maps
from facelane_server.worker.decoding.torch_pixels import TorchPixels
from facelane_server.worker.faults import Fault, classify
from facelane_server.worker.journal import log_event

Decode = Callable[[list[Tensor]], list[Tensor]]
"""uint8 data [bytes] each, on the host, to uint8 RGB [3, H, W] each, on the device."""

_TOLD_EVERY_S: Final = 60.0
_RGB: Final = 3
"""What torchvision calls ImageReadMode.RGB."""
_ALIKE: Final = 4.0
"""Grey levels on average that a trial picture may differ from the host's decoding."""


class Cutting:
    """Crops on their way to the host. ``done``: None = they are there."""

    def __init__(
        self,
        records: Tensor | None,
        done: torch.cuda.Event | None,
        counts: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        self._records = records
        self._done = done
        self._counts = counts
        self._sizes = sizes

    @property
    def is_ready(self) -> bool:
        return self._done is None or bool(self._done.query())  # type: ignore[no-untyped-call]

    def fetch(self) -> list[tuple[U8, ...]]:
        """Waits; of each picture the crops of its faces, [n, size, size, 3] for each spec."""
        if self._done is not None:
            self._done.synchronize()
        ends = np.cumsum([0, *(3 * size * size for size in self._sizes)])
        if self._records is None:
            cut: npt.NDArray[np.uint8] = np.zeros((sum(self._counts), int(ends[-1])), np.uint8)
        else:
            cut = np.asarray(self._records.numpy(), np.uint8)
        results: list[tuple[U8, ...]] = []
        at = 0
        for count in self._counts:
            rows, at = cut[at : at + count], at + count
            results.append(
                tuple(
                    rows[:, first:end].reshape(count, size, size, 3)
                    for first, end, size in zip(ends, ends[1:], self._sizes, strict=False)
                )
            )
        return results


class DevicePictures:
    """Pictures of one device. Used by one thread, but for ``arriving``.

    ``decode_jpegs``: nvJPEG, or what a test brings; None = every picture comes as pixels.
    """

    def __init__(
        self, device: str, decode_jpegs: Decode | None = None, pixels: Pixels | None = None
    ) -> None:
        self.device = torch.device(device)
        self._decode_jpegs = decode_jpegs
        self.pixels = pixels or _pixels(self.device)
        self._told = -_TOLD_EVERY_S
        self._here = threading.local()
        cuda = self.device.type == "cuda"
        # What these do is little, and somebody waits for it while another batch computes, of this
        # process or of another one on the card.
        self.stream, self._crops = (
            torch.cuda.Stream(self.device, priority=-1) if cuda else None  # type: ignore[no-untyped-call]
            for _ in range(2)
        )

    @property
    def decodes(self) -> bool:
        return self._decode_jpegs is not None

    def add_nvjpeg(self) -> None:
        """JPEG is decoded here from now on; tried out on one picture.

        Raises FacelaneError(CONFIG_INVALID) where nvJPEG is not installed or does not work.
        """
        try:
            _load_nvjpeg()
            decode = torch.ops.image.decode_jpegs_cuda
        except (AttributeError, ImportError, OSError, RuntimeError) as error:
            raise _unusable(
                f"torchvision's decoder cannot be loaded ({type(error).__name__}: {error})"
            ) from error

        def decode_jpegs(data: list[Tensor]) -> list[Tensor]:
            found: list[Tensor] = decode(data, _RGB, self.device)
            return found

        self._decode_jpegs = decode_jpegs
        try:
            self.try_out()
        except BaseException:
            self._decode_jpegs = None
            raise

    def try_out(self) -> None:
        """A picture of a usual size, against the host's decoding; this also makes nvJPEG take
        the memory that it needs. Raises FacelaneError(CONFIG_INVALID)."""
        y, x = np.mgrid[:1080, :1920]
        plain = np.stack((x % 256, y % 256, (x + y) // 12), -1).astype(np.uint8)
        _, data = cv2.imencode(".jpg", plain, [cv2.IMWRITE_JPEG_QUALITY, 90])
        expected = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
        assert expected is not None
        try:
            [found] = self._decode_all([np.asarray(data, np.uint8).reshape(-1)])
            pixels = found.cpu().numpy().transpose(1, 2, 0)
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
        if self._decode_jpegs is None:
            return found
        try:
            planes = self._decode_all([np.frombuffer(data, np.uint8) for data in jpegs])
            pictures = [OnDevice(one, Layout.RGB_PLANES) for one in planes]
            with self._on(self.stream), torch.inference_mode():
                ends = self.pixels.plain_ends(pictures)
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
        for i, (picture, plain) in enumerate(zip(pictures, ends, strict=True)):
            if not plain:
                found[i] = picture
        return found

    def arriving(self) -> contextlib.AbstractContextManager[None]:
        """What is queued in here is waited for before pictures are placed. Of any thread."""
        if getattr(self._here, "arrives", False):
            return contextlib.nullcontext()
        return self._arriving()

    @contextlib.contextmanager
    def _arriving(self) -> Iterator[None]:
        with self._on(self.stream), torch.inference_mode():
            yield

    def arrive_here(self) -> None:
        """Of this thread all is ``arriving``, for as long as it lives: to say so again and again
        takes longer, with the GIL in hand, than what most of it is for."""
        if self.stream is not None:
            torch.cuda.set_device(self.device)
            torch.cuda.set_stream(self.stream)
        self._here.mode = torch.inference_mode()
        self._here.mode.__enter__()
        self._here.arrives = True

    def upload(self, picture: U8) -> OnDevice:
        """``picture``: uint8 [H, W, 3], BGR, which may be overwritten afterwards."""
        with self.arriving():
            if self.device.type != "cuda":
                return OnDevice(torch.from_numpy(picture.copy()), Layout.BGR)
            staged = torch.empty(picture.shape, dtype=torch.uint8, pin_memory=True)
            staged.numpy()[...] = picture
            return OnDevice(staged.to(self.device, non_blocking=True), Layout.BGR)

    def place(
        self, pictures: Sequence[OnDevice], sizes: Sequence[tuple[int, int]], canvases: Tensor
    ) -> None:
        """``Pixels.letterbox`` on the current stream, after what has arrived."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.pixels.letterbox(pictures, sizes, canvases)

    def cut(
        self,
        pictures: Sequence[OnDevice],
        counts: Sequence[int],
        boxes: F32,
        landmarks: F32,
        specs: Sequence[CropSpec],
    ) -> Cutting:
        """Begins ``crops.cut`` for several pictures, whose arrival was waited for: ``counts[i]`` of
        the faces ``boxes`` [N, 4] and ``landmarks`` [N, 5, 2] lie in picture i. To be fetched
        before the next call."""
        sizes = [spec.size for spec in specs]
        faces = np.repeat(np.arange(len(pictures)), counts)
        if not (specs and len(faces)):
            return Cutting(None, None, counts, sizes)
        bounds = np.array([(picture.width, picture.height) for picture in pictures])[faces]
        maps = [crop_maps(spec, boxes, landmarks, bounds) for spec in specs]
        with self._on(self._crops), torch.inference_mode():
            found = self.pixels.cut(pictures, faces, maps, sizes)
            if self._crops is None:
                return Cutting(found, None, counts, sizes)
            there = torch.empty(found.shape, dtype=torch.uint8, pin_memory=True)
            there.copy_(found, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._crops)
        return Cutting(there, done, counts, sizes)

    def _decode_all(self, data: Sequence[U8]) -> list[Tensor]:
        assert self._decode_jpegs is not None
        # Copies: what comes from a worker's arena may not be written to, and torch would say so.
        encoded = [torch.from_numpy(one.copy()) for one in data]
        self._settle()
        with self._on(self.stream), torch.inference_mode():
            found = self._decode_jpegs(encoded)
        self._settle()
        return found

    def _settle(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def _on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        if stream is None:
            return contextlib.nullcontext()
        return torch.cuda.stream(stream)


def _pixels(device: torch.device) -> Pixels:
    if device.type != "cuda":
        return TorchPixels()
    from facelane_server.worker.decoding.cuda_pixels import CudaPixels

    try:
        return CudaPixels(device)
    except (ImportError, OSError, RuntimeError) as error:
        if classify(error) is not Fault.ORDINARY:
            raise
        log_event(
            "kernels for pictures cannot be had; torch operations do it, slower",
            level="warning",
            cause=f"{type(error).__name__}: {error}",
        )
        return TorchPixels()


def _load_nvjpeg() -> None:
    """The library of torchvision alone: the package, once imported, brings torch's compiler along,
    which writes files, and a worker's sandbox has none to write. Raises ImportError, OSError."""
    package = importlib.util.find_spec("torchvision")
    folders = package.submodule_search_locations if package is not None else None
    found = [file for folder in folders or () for file in Path(folder).glob("image*.so")]
    if not found:
        raise ImportError("it is not installed")
    torch.ops.load_library(str(found[0]))  # type: ignore[no-untyped-call]


def _unusable(why: str) -> FacelaneError:
    return FacelaneError(
        Reason.CONFIG_INVALID,
        f"decode = 'cuda' cannot be had: {why}; install facelane[nvjpeg], or set decode = 'cpu'",
    )
