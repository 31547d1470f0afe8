"""Face detection over any runner: sizes, padding, suppression, crops."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import cv2
import numpy as np
import numpy.typing as npt

from facelane_server import limits
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
from facelane_server.worker.networks.candidates import WIDTH, believed, select
from facelane_server.worker.networks.runner import Runner, Ticket

if TYPE_CHECKING:
    from facelane_server.worker.decoding.device_pictures import Cutting, DevicePictures
    from facelane_server.worker.decoding.pixels import OnDevice


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
    """A network that answers with candidates [n, K, 15] in pixels of its input, best first, or
    with those that suppression left.

    Pictures are scaled down to ``max_side``, put at the top left of the input and padded
    with black to multiples of 32, or to the smallest of the runner's canvases that holds them.
    Each input shape is one batch. Where the runner computes on a card all of it is done there.
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
        score_turned: float | None = None,
    ) -> None:
        """``score_turned``: what a face that is turned to the side needs; None = ``score``."""
        self.crops = crops
        self.batch_max = batch_max
        self.decodes = runner.pictures is not None and runner.pictures.decodes
        self._runner = runner
        self._suppressed = runner.pictures is not None and runner.pictures.pixels.suppresses
        self._max_side = max_side
        self._score = score
        self._least = score if score_turned is None else min(score, score_turned)
        self._nms = nms

    @property
    def device_pictures(self) -> DevicePictures | None:
        """What brings pictures to the card that it computes on; None on a CPU."""
        return self._runner.pictures

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
            shapes[self._canvas(place)].append(i)
        there = self._runner.pictures
        if there is None:
            return Immediate(self._on_host(pictures, max_faces, fits, shapes))
        brought = [_on_device(picture, there) for picture in pictures]
        launched: list[tuple[list[int], Ticket]] = []
        for shape, rows in shapes.items():
            fill = functools.partial(
                there.place,
                [brought[i] for i in rows],
                [(fits[i].height, fits[i].width) for i in rows],
            )
            launched.append((rows, self._runner.run(len(rows), shape, fill)))
        return _PendingDetections(self, brought, list(max_faces), fits, launched)

    def _canvas(self, place: _Fit) -> tuple[int, int]:
        """Height and width of the smallest input that holds a picture."""
        holding = [
            (height, width)
            for height, width in self._runner.canvases
            if height >= place.height and width >= place.width
        ]
        return min(holding, default=(_padded(place.height), _padded(place.width)))

    def _on_host(
        self,
        pictures: Sequence[U8 | DevicePicture],
        max_faces: Sequence[int],
        fits: Sequence[_Fit],
        shapes: Mapping[tuple[int, int], list[int]],
    ) -> list[Detections]:
        found: dict[int, Detections] = {}
        for shape, indices in shapes.items():
            (canvases,) = self._runner.stage(len(indices), [shape])
            for canvas, i in zip(canvases, indices, strict=True):
                picture = pictures[i]
                assert not isinstance(picture, DevicePicture), "no pictures on a device here"
                _place(picture, fits[i], canvas)
            for candidates, i in zip(self._runner.launch().wait(), indices, strict=True):
                picture = pictures[i]
                assert not isinstance(picture, DevicePicture)
                rows = self.faces(candidates, max_faces[i])
                boxes, landmarks = _in_pictures(rows, np.array([fits[i].scale], np.float32))
                crops = cut(picture, boxes, landmarks, self.crops)
                found[i] = Detections(boxes, rows[:, 0], landmarks, crops)
        return [found[i] for i in range(len(pictures))]

    def faces(self, candidates: F32, limit: int) -> F32:
        """The rows of one picture's faces."""
        rows, _ = self.faces_of([candidates], [limit])
        return rows

    def faces_of(
        self, candidates: Sequence[F32], limits_of: Sequence[int]
    ) -> tuple[F32, npt.NDArray[np.intp]]:
        """The rows of all pictures' faces [n, 15], and how many are of each."""
        turned = self._least < self._score
        kept: list[F32] = []
        for found, limit in zip(candidates, limits_of, strict=True):
            if self._suppressed:
                kept.append(found[: int((found[:, 0] > 0).sum())])
            else:
                most = limits.MAX_FACES if turned else limit
                kept.append(select(found, score=self._least, iou=self._nms, limit=most))
        rows = np.concatenate(kept)
        counts = np.array([len(each) for each in kept], np.intp)
        # Once for all of them: a picture has few, and a call costs the same for many.
        there = np.ones(len(rows), bool)
        if turned:
            there = believed(rows, score=self._score, turned=self._least)
        whose = np.repeat(np.arange(len(kept)), counts)
        before = np.cumsum(there) - there
        ahead = before - np.repeat(np.append(before, 0)[np.cumsum(counts) - counts], counts)
        there &= ahead < np.asarray(limits_of, np.intp)[whose]
        return rows[there], np.bincount(whose[there], minlength=len(kept))


class _PendingDetections(Pending[list[Detections]]):
    """Of a batch on a card, the faces of all its pictures at once: once the network has ended their
    crops are cut, and once those are on the host it is finished."""

    def __init__(
        self,
        detector: NetworkDetector,
        pictures: list[OnDevice],
        max_faces: list[int],
        fits: list[_Fit],
        launched: list[tuple[list[int], Ticket]],
    ) -> None:
        self._detector = detector
        self._pictures = pictures
        self._max_faces = max_faces
        self._fits = fits
        self._launched = launched
        self._cutting: Cutting | None = None

    def poll(self) -> bool:
        if self._cutting is None:
            if not all(ticket.is_ready for _, ticket in self._launched):
                return False
            self._cutting = self._cut()
        return self._cutting.is_ready

    def finish(self) -> list[Detections]:
        cutting = self._cutting or self._cut()
        found: list[Detections] = []
        at = 0
        for count, chips in zip(self._counts, cutting.fetch(), strict=True):
            own, at = slice(at, at + count), at + count
            scores = self._rows[own, 0]
            found.append(Detections(self._boxes[own], scores, self._landmarks[own], chips))
        return found

    def _cut(self) -> Cutting:
        """Waits for the network."""
        there = self._detector.device_pictures
        assert there is not None
        candidates: list[F32] = [np.zeros((0, WIDTH), np.float32)] * len(self._pictures)
        for indices, ticket in self._launched:
            for found, i in zip(ticket.wait(), indices, strict=True):
                candidates[i] = found
        self._rows, counts = self._detector.faces_of(candidates, self._max_faces)
        self._counts = counts.tolist()
        scales = np.array([place.scale for place in self._fits], np.float32)
        self._boxes, self._landmarks = _in_pictures(self._rows, np.repeat(scales, counts, 0))
        return there.cut(
            self._pictures, self._counts, self._boxes, self._landmarks, self._detector.crops
        )


def _on_device(picture: U8 | DevicePicture, there: DevicePictures) -> OnDevice:
    if not isinstance(picture, DevicePicture):
        return there.upload(picture)
    # What the runner's pictures decoded: their class needs torch, so it is known by its base.
    return cast("OnDevice", picture)


def _in_pictures(rows: F32, scales: F32) -> tuple[F32, F32]:
    """Boxes [N, 4] and landmarks [N, 5, 2] in pixels of the pictures; ``scales`` [N or 1, 2]."""
    boxes = (rows[:, 1:5].reshape(-1, 2, 2) / scales[:, None]).reshape(-1, 4)
    return boxes, rows[:, 5:].reshape(-1, 5, 2) / scales[:, None]


def _size(picture: U8 | DevicePicture) -> tuple[int, int]:
    """Height and width."""
    if isinstance(picture, DevicePicture):
        return picture.height, picture.width
    return picture.shape[0], picture.shape[1]


def _place(picture: U8, place: _Fit, canvas: U8) -> None:
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
    canvas[place.height :] = 0
    canvas[: place.height, place.width :] = 0
