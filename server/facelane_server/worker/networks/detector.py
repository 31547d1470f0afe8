"""Face detection over any runner: sizes, padding, suppression, crops."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from facelane_server.models.api import (
    F32,
    U8,
    CropSpec,
    Detections,
    Detector,
    DevicePicture,
    Immediate,
    Pending,
)
from facelane_server.models.package import DETECTOR_STRIDE
from facelane_server.worker.decoding.crops import cut
from facelane_server.worker.networks.candidates import select
from facelane_server.worker.networks.runner import Runner, Ticket


@dataclass(frozen=True, slots=True)
class _Fit:
    """A picture's place in the network's input: ``height`` x ``width`` at the top left."""

    height: int
    width: int
    scale: tuple[float, float]
    """Network pixels a picture pixel, x and y."""


def fit(height: int, width: int, max_side: int) -> _Fit:
    """Scale down to ``max_side`` on the longer side; never up."""
    longest = max(height, width)
    if longest <= max_side:
        return _Fit(height, width, (1.0, 1.0))
    new_height = max(1, round(height * max_side / longest))
    new_width = max(1, round(width * max_side / longest))
    return _Fit(new_height, new_width, (new_width / width, new_height / height))


def _padded(side: int) -> int:
    return -(-side // DETECTOR_STRIDE) * DETECTOR_STRIDE


class NetworkDetector(Detector):
    """A network that answers with candidates [n, K, 15] in pixels of its input.

    Pictures are scaled down to ``max_side``, put at the top left of the input and padded
    with black to multiples of 32, or to the runner's fixed square. Each input shape is
    one batch. Pictures that the runner decoded on its device are scaled and cropped there.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        crops: tuple[CropSpec, ...],
        max_side: int,
        score: float,
        nms: float,
        batch_max: int,
    ) -> None:
        self.crops = crops
        self.batch_max = batch_max
        self.decodes = runner.pictures is not None
        self._runner = runner
        self._max_side = max_side
        self._score = score
        self._nms = nms
        self._used: dict[int, tuple[int, int]] = {}
        """Height and width of what lies in each of the runner's kept canvases, by address."""

    def warm_up(self) -> None:
        self._runner.warm_up()

    def close(self) -> None:
        self._runner.close()

    def decode(self, jpegs: Sequence[memoryview]) -> list[DevicePicture | None]:
        if self._runner.pictures is None:
            return super().decode(jpegs)
        return self._runner.pictures.decode(jpegs)

    def begin(
        self, pictures: Sequence[U8 | DevicePicture], max_faces: Sequence[int]
    ) -> Pending[list[Detections]]:
        if not 1 <= len(pictures) <= self.batch_max or len(pictures) != len(max_faces):
            raise ValueError("a batch has 1 to batch_max pictures, and a max_faces for each")
        fits = [fit(*_size(picture), self._max_side) for picture in pictures]
        shapes: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for i, place in enumerate(fits):
            side = self._runner.fixed_side
            shape = (side, side) if side else (_padded(place.height), _padded(place.width))
            shapes[shape].append(i)
        launched: list[tuple[list[int], Ticket]] = []
        for shape, indices in shapes.items():
            (canvases,) = self._runner.stage(len(indices), [shape])
            placed = []
            for row, (canvas, i) in enumerate(zip(canvases, indices, strict=True)):
                picture = pictures[i]
                if isinstance(picture, DevicePicture):
                    assert self._runner.pictures is not None
                    place = fits[i]
                    scaled = self._runner.pictures.scaled(picture, place.height, place.width)
                    placed.append((row, scaled))
                else:
                    _place(picture, fits[i], canvas, self._dirt(canvas, fits[i]))
            launched.append((indices, self._runner.launch(placed)))
        pending = _PendingDetections(self, list(pictures), list(max_faces), fits, launched)
        return pending if self._runner.fixed_side else Immediate(pending.finish())

    def _dirt(self, canvas: U8, place: _Fit) -> tuple[int, int]:
        """How far down and to the right the canvas may not be black."""
        if not self._runner.keeps_content:
            return canvas.shape[0], canvas.shape[1]
        address = int(canvas.__array_interface__["data"][0])
        before = self._used.get(address, (0, 0))
        self._used[address] = place.height, place.width
        return before

    def faces(
        self, candidates: F32, picture: U8 | DevicePicture, place: _Fit, limit: int
    ) -> Detections:
        """The faces of one picture from its candidates; without crops as yet when the picture
        lies on the device."""
        rows = select(candidates, score=self._score, iou=self._nms, limit=limit)
        scale = np.array(place.scale, np.float32)
        boxes = (rows[:, 1:5].reshape(-1, 2, 2) / scale).reshape(-1, 4)
        landmarks = rows[:, 5:].reshape(-1, 5, 2) / scale
        return Detections(
            boxes=boxes,
            scores=rows[:, 0],
            landmarks=landmarks,
            crops=()
            if isinstance(picture, DevicePicture)
            else cut(picture, boxes, landmarks, self.crops),
        )

    def cut_on_device(self, faces: Sequence[tuple[DevicePicture, Detections]]) -> list[Detections]:
        """The same with the crops of pictures that lie on the device."""
        pictures = self._runner.pictures
        if pictures is None or not faces:
            return []
        crops = pictures.cut(
            [(picture, found.boxes, found.landmarks) for picture, found in faces], self.crops
        )
        return [replace(found, crops=cut) for (_, found), cut in zip(faces, crops, strict=True)]


class _PendingDetections(Pending[list[Detections]]):
    def __init__(
        self,
        detector: NetworkDetector,
        pictures: list[U8 | DevicePicture],
        max_faces: list[int],
        fits: list[_Fit],
        launched: list[tuple[list[int], Ticket]],
    ) -> None:
        self._detector = detector
        self._pictures = pictures
        self._max_faces = max_faces
        self._fits = fits
        self._launched = launched

    def finish(self) -> list[Detections]:
        found: dict[int, Detections] = {}
        for indices, ticket in self._launched:
            for row, i in zip(ticket.wait(), indices, strict=True):
                found[i] = self._detector.faces(
                    row, self._pictures[i], self._fits[i], self._max_faces[i]
                )
        there = [
            (i, picture)
            for i, picture in enumerate(self._pictures)
            if isinstance(picture, DevicePicture)
        ]
        crops = self._detector.cut_on_device([(picture, found[i]) for i, picture in there])
        for (i, _), complete in zip(there, crops, strict=True):
            found[i] = complete
        return [found[i] for i in range(len(self._pictures))]


def _size(picture: U8 | DevicePicture) -> tuple[int, int]:
    """Height and width."""
    if isinstance(picture, DevicePicture):
        return picture.height, picture.width
    return picture.shape[0], picture.shape[1]


def _place(picture: U8, place: _Fit, canvas: U8, dirty: tuple[int, int]) -> None:
    inside = canvas[: place.height, : place.width]
    if picture.shape[:2] == (place.height, place.width):
        inside[...] = picture
    else:
        # Averaging costs more and pays only when pixels would be skipped.
        halved = place.width * 2 < picture.shape[1] or place.height * 2 < picture.shape[0]
        cv2.resize(
            picture,
            (place.width, place.height),
            dst=inside,
            interpolation=cv2.INTER_AREA if halved else cv2.INTER_LINEAR,
        )
    canvas[place.height : dirty[0], : dirty[1]] = 0
    canvas[: place.height, place.width : dirty[1]] = 0
