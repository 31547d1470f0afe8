"""Models that compute nothing: the interface's specification, a fake for fault tests, and
the load of benchmarks that measure everything but the networks. They need no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from facelane_server.models.api import (
    F32,
    U8,
    AlignedCrop,
    ContextCrop,
    CropSpec,
    Detections,
    Detector,
    DevicePicture,
    Embeddings,
    Immediate,
    LivenessModel,
    Pending,
    Recognizer,
)


class NullDetector(Detector):
    """``faces`` fixed faces in every picture, side by side, whatever it shows.

    With ``decode`` false it does not look at pictures at all: they need not be decoded
    (``needs_pixels``), boxes are in the unit square, and crops are black.
    """

    def __init__(
        self,
        *,
        crops: tuple[CropSpec, ...] = (),
        faces: int = 1,
        decode: bool = True,
        batch_max: int = 8,
    ) -> None:
        self.crops = crops
        self.batch_max = batch_max
        self.needs_pixels = decode
        self._faces = faces

    def warm_up(self) -> None:
        pass

    def begin(
        self, pictures: Sequence[U8 | DevicePicture], max_faces: Sequence[int]
    ) -> Pending[list[Detections]]:
        return Immediate(
            [self._detect(p, limit) for p, limit in zip(pictures, max_faces, strict=True)]
        )

    def _detect(self, picture: U8 | DevicePicture, limit: int) -> Detections:
        assert not isinstance(picture, DevicePicture), "it decodes nothing"
        count = min(self._faces, limit)
        height, width = picture.shape[:2] if self.needs_pixels else (1, 1)
        column = width / max(count, 1)
        side = min(column, height) / 2
        boxes = np.zeros((count, 4), np.float32)
        boxes[:, 0] = (np.arange(count) + 0.5) * column - side / 2
        boxes[:, 1] = (height - side) / 2
        boxes[:, 2:] = side
        # Eyes, nose and mouth corners where an upright face has them in its box.
        face = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]], np.float32)
        landmarks = boxes[:, None, :2] + face * np.float32(side)
        if self.needs_pixels:
            # Only a detector that looks at pixels needs OpenCV.
            from facelane_server.worker.decoding.crops import cut

            crops = cut(picture, boxes, landmarks, self.crops)
        else:
            crops = tuple(np.zeros((count, s.size, s.size, 3), np.uint8) for s in self.crops)
        return Detections(
            boxes=boxes,
            scores=np.full(count, 0.99, np.float32),
            landmarks=landmarks.astype(np.float32),
            crops=crops,
        )


class NullRecognizer(Recognizer):
    """A unit vector drawn from a hash of the chip: equal chips match, others do not."""

    def __init__(
        self, *, crop: AlignedCrop | None = None, embedding_dim: int = 512, batch_max: int = 8
    ) -> None:
        self.crop = crop or AlignedCrop()
        self.embedding_dim = embedding_dim
        self.batch_max = batch_max

    def warm_up(self) -> None:
        pass

    def begin(self, chips: U8) -> Pending[Embeddings]:
        vectors = np.stack([self._embed(chip) for chip in chips])
        return Immediate(Embeddings(vectors=vectors, ood=np.ones(len(chips), np.float32)))

    def _embed(self, chip: U8) -> F32:
        # A stream of bytes from the chip's hash, as numbers around zero.
        stream = hashlib.shake_128(chip.tobytes()).digest(2 * self.embedding_dim)
        vector = np.frombuffer(stream, "<i2").astype(np.float32) + np.float32(0.5)
        return vector / np.linalg.norm(vector)


class NullLiveness(LivenessModel):
    """Every face is live."""

    def __init__(self, *, crops: tuple[ContextCrop, ...], batch_max: int = 8) -> None:
        self.crops = crops
        self.batch_max = batch_max

    def warm_up(self) -> None:
        pass

    def begin(self, crops: Sequence[U8]) -> Pending[F32]:
        return Immediate(np.ones(len(crops[0]), np.float32))
