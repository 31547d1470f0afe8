"""What a model is to a worker: three tasks, one two-phase call each.

A worker calls ``begin`` with a batch, which queues all the work it can without
waiting for the device, and later ``finish``, which waits for that batch alone and
gives host values. Between the two the worker may ``begin`` the next batch, so that
decoding and copies overlap with compute. On a CPU ``begin`` computes at once.

All pictures that enter are ``uint8`` arrays, height x width x 3, **BGR**, C-contiguous.
Models convert to what their network wants (their package says what that is).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class AlignedCrop:
    """A face warped by a similarity transform so that its five landmarks meet the
    ArcFace template (112x112; scaled for other sizes), borders black."""

    size: int = 112


@dataclass(frozen=True, slots=True)
class ContextCrop:
    """The face's box enlarged by ``scale`` around its centre, shifted inside the
    picture and shrunk if it does not fit, resized to ``size`` x ``size``
    (Silent-Face-Anti-Spoofing's ``CropImage``)."""

    scale: float
    size: int = 80


CropSpec = AlignedCrop | ContextCrop


@dataclass(frozen=True, slots=True)
class Detections:
    """Faces of one picture, best score first, at most the ``max_faces`` asked for.

    ``boxes`` [N, 4] float32 (x, y, width, height) and ``landmarks`` [N, 5, 2] in
    pixels of the picture as given; ``scores`` [N] in [0, 1]. ``crops[k]`` is
    [N, size, size, 3] uint8 BGR for the k-th spec the detector was built with.
    """

    boxes: F32
    scores: F32
    landmarks: F32
    crops: tuple[U8, ...]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """``vectors`` [N, D] float32 with unit L2 norm; ``ood`` [N] in [0, 1], higher = trustworthy."""

    vectors: F32
    ood: F32


Out = TypeVar("Out")


class Pending(ABC, Generic[Out]):
    """A batch under way. ``finish`` is called once, in the order of ``begin``."""

    def poll(self) -> bool:
        """Does what can be done without waiting for the device; whether ``finish`` need not wait
        either. A model that cannot tell says so too."""
        return True

    @abstractmethod
    def finish(self) -> Out: ...


class Immediate(Pending[Out]):
    """A batch that was computed in ``begin``."""

    def __init__(self, value: Out) -> None:
        self._value = value

    def finish(self) -> Out:
        return self._value


class Model(ABC):
    """Common to the three tasks. A model is used by one thread.

    ``batch_max`` is the largest batch that ``begin`` takes. ``warm_up`` runs every
    batch bucket once (and captures CUDA graphs); after it no call allocates device
    memory that it does not give back.
    """

    batch_max: int

    @abstractmethod
    def warm_up(self) -> None: ...

    def close(self) -> None:  # noqa: B027 - optional
        """Free what the model holds outside of Python's own memory."""


def blank(width: int, height: int) -> U8:
    """A black picture that takes no memory, for models that look at no pixels; read-only."""
    return np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (height, width, 3))


class DevicePicture(ABC):
    """A picture that lies decoded on the model's device; ``height`` and ``width`` in pixels."""

    height: int
    width: int


class Detector(Model):
    """Pictures to faces and their crops.

    ``needs_pixels`` False: the detector does not look at pictures (a null model), so the
    worker may pass empty arrays instead of decoding them. ``decodes`` True: it takes JPEG
    data to its device, and ``begin`` takes what ``decode`` gave.
    """

    crops: tuple[CropSpec, ...]
    needs_pixels: bool = True
    decodes: bool = False

    def decode(self, jpegs: Sequence[memoryview]) -> list[DevicePicture | None]:
        """Plain JPEG files of checked sizes, decoded on the device; None for those that it leaves
        to the worker, broken ones among them."""
        return [None] * len(jpegs)

    @abstractmethod
    def begin(
        self, pictures: Sequence[U8 | DevicePicture], max_faces: Sequence[int]
    ) -> Pending[list[Detections]]:
        """``pictures`` may differ in size. ``max_faces[i]`` bounds the faces of picture i."""


class Recognizer(Model):
    """Aligned chips to embeddings and OOD scores."""

    crop: AlignedCrop
    embedding_dim: int

    @abstractmethod
    def begin(self, chips: U8) -> Pending[Embeddings]:
        """``chips`` [N, size, size, 3], 1 <= N <= batch_max."""


class LivenessModel(Model):
    """Context crops to liveness scores."""

    crops: tuple[ContextCrop, ...]

    @abstractmethod
    def begin(self, crops: Sequence[U8]) -> Pending[F32]:
        """``crops[k]`` [N, size, size, 3] for ``self.crops[k]``; scores [N] in [0, 1],
        higher = bona fide."""


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """How a model is to run.

    ``device``: ``cpu`` or ``cuda:N``. ``precision``: ``auto`` (fp16 on CUDA, fp32 on
    CPU), ``fp32`` or ``fp16``. ``graphs``: capture CUDA graphs for the batch buckets.
    ``threads``: intra-op CPU threads. ``stream_priority``: CUDA stream priority,
    negative = higher. ``memory_mib``: cap of the process's device memory, its CUDA
    context counted in (0 = none). ``decode``: who decodes a detector's JPEG frames: ``cpu``,
    ``cuda``, or ``auto``: the device where it can.
    """

    device: str = "cpu"
    precision: str = "auto"
    graphs: bool = True
    threads: int = 1
    stream_priority: int = 0
    memory_mib: int = 0
    decode: str = "cpu"
