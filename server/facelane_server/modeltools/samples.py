"""What evaluations read: a folder's pictures, their faces in batches, and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from facelane_server.domain import Encoding, FacelaneError, Reason
from facelane_server.models.api import U8, Detections, Detector, DeviceOptions
from facelane_server.models.package import Package
from facelane_server.modeltools import measures
from facelane_server.modeltools.report import Bars, Curve, Plot
from facelane_server.worker.decoding import pictures
from facelane_server.worker.networks.load import load

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]
"""(what is done, how many are done, of how many)."""

MAX_PICTURES: Final = 20_000
MAX_FACES: Final = 64
BATCH: Final = 16
SEED: Final = 1
SUFFIXES: Final = {
    ".jpg": Encoding.JPEG,
    ".jpeg": Encoding.JPEG,
    ".png": Encoding.PNG,
    ".webp": Encoding.WEBP,
}

UNREAD: Final = frozenset(
    (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".tif", ".tiff")
)
"""Endings of pictures too, of kinds that the service does not take."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    ``fars``: false accept rates (of attacks, for a liveness package) to find thresholds for;
    empty takes the task's usual ones. ``aligned``: the pictures are chips already, aligned to
    the ArcFace template (recognisers) or cut as the package declares (liveness, one crop).
    ``damaged``: how many faces the OOD score is tried on with every kind of damage; 0 leaves
    that out. ``min_face``: faces with a smaller geometric mean of their sides, in pixels,
    count neither for nor against a detector.
    """

    fars: tuple[float, ...] = ()
    aligned: bool = False
    damaged: int = 200
    min_face: float = 24.0
    plots: bool = True

    def __post_init__(self) -> None:
        if any(not 0 < far < 1 for far in self.fars):
            raise refuse("false accept rates lie between 0 and 1, such as 1e-3")


@dataclass
class Run:
    """What an evaluation carries along: where it reads, and what it left out."""

    data: Path
    options: DeviceOptions
    settings: Settings
    progress: Progress
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def skip(self, path: Path, reason: str) -> None:
        self.left_out.append((str(path.relative_to(self.data)), reason))

    def counts(self) -> dict[str, int]:
        return dict(Counter(reason for _, reason in self.left_out))


def picture_files(folder: Path, run: Run) -> list[Path]:
    """The pictures in ``folder`` that can be read; those of other kinds are left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = [path for path in files if path.suffix.lower() in SUFFIXES]
    for path in files:
        if path.suffix.lower() in UNREAD:
            run.skip(path, Reason.ENCODING_UNSUPPORTED.value)
    if len(found) > MAX_PICTURES:
        raise refuse(f"{folder} holds more than {MAX_PICTURES} pictures; take a part of them")
    return found


def read_picture(path: Path, run: Run) -> U8 | None:
    try:
        data = path.read_bytes()
        picture = pictures.decode(memoryview(data), SUFFIXES[path.suffix.lower()])
    except FacelaneError as error:
        run.skip(path, error.reason.value)
        return None
    except OSError:
        run.skip(path, "UNREADABLE")
        return None
    upright = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return picture if upright is None else np.asarray(upright, np.uint8)


def detections(detector: Detector, picture: U8) -> Detections:
    return detector.begin([picture], [MAX_FACES]).finish()[0]


def _main_face(found: Detections) -> int:
    """The largest face: who a picture of one person is of."""
    return int(np.argmax(found.boxes[:, 2] * found.boxes[:, 3]))


def faces_of(
    package: Package, detector: Package | None, files: Sequence[Path], run: Run
) -> Iterator[tuple[int, tuple[U8, ...]]]:
    """(index of the file, its main face's crops [size, size, 3]) of files with a face.

    Without ``detector`` the files are crops themselves.
    """
    sizes = [crop.size for crop in package.crops]
    if detector is None:
        if len(sizes) != 1:
            raise refuse("the model reads several crops of a face; leave out --aligned")
        for index, path in enumerate(files):
            run.progress("measuring", index, len(files))
            picture = read_picture(path, run)
            if picture is None:
                continue
            if picture.shape[0] != picture.shape[1]:
                run.skip(path, "NOT_SQUARE")
                continue
            how = cv2.INTER_AREA if len(picture) > sizes[0] else cv2.INTER_LINEAR
            yield index, (np.asarray(cv2.resize(picture, (sizes[0],) * 2, interpolation=how)),)
        return
    model = load(detector, run.options, batch_max=1, crops=package.crops)
    assert isinstance(model, Detector)
    model.warm_up()
    try:
        for index, path in enumerate(files):
            run.progress("measuring", index, len(files))
            picture = read_picture(path, run)
            if picture is None:
                continue
            found = detections(model, picture)
            if not len(found.boxes):
                run.skip(path, Reason.NO_FACE.value)
                continue
            best = _main_face(found)
            yield index, tuple(crop[best].copy() for crop in found.crops)
    finally:
        model.close()


def batches(
    faces: Iterator[tuple[int, tuple[U8, ...]]],
) -> Iterator[tuple[list[int], list[U8]]]:
    """Faces in batches: (indices of the files, one stack of crops for each spec)."""
    indices: list[int] = []
    crops: list[tuple[U8, ...]] = []
    for index, face in faces:
        indices.append(index)
        crops.append(face)
        if len(indices) == BATCH:
            yield indices, [np.stack(stack) for stack in zip(*crops, strict=True)]
            indices, crops = [], []
    if indices:
        yield indices, [np.stack(stack) for stack in zip(*crops, strict=True)]


def error_plots(
    genuine: F64, impostor: F64, false: str, true: str, mark: tuple[str, float, float]
) -> list[Plot | Bars]:
    """ROC and DET; what is under the smallest rate that can be seen is drawn at half of it."""
    _, accepted, rejected = measures.error_curve(genuine, impostor)
    least_x, least_y = 0.5 / len(impostor), 0.5 / len(genuine)
    x = np.maximum(accepted, least_x)
    label, mark_x, mark_y = mark
    mark_x = max(mark_x, least_x)
    return [
        Plot("roc", false, true, [Curve("", x, 1 - rejected)], "x", [(label, mark_x, mark_y)]),
        Plot(
            "det",
            false,
            f"1 - {true}",
            [Curve("", x, np.maximum(rejected, least_y))],
            "xy",
            [(label, mark_x, max(1 - mark_y, least_y))],
        ),
    ]


def refuse(message: str) -> FacelaneError:
    return FacelaneError(Reason.ARGUMENT_INVALID, f"the evaluation cannot be made: {message}")
