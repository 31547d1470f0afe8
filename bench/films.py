"""Films of people who are known, and all that the models say of each of their faces.

``of_all``: a film with cuts of men who are enrolled from other photos; people who stand beside each
other, enrolled from their best picture of the same film; and the demo's clip, which says itself
who is in it.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bench import inprocess, material
from facelane_server.domain import Box, Candidate, DetectedFace

F32 = npt.NDArray[np.float32]
Image = npt.NDArray[np.uint8]

TRUSTED: Final = 0.4
"""Least OOD score of a look that somebody is enrolled from."""


@dataclass(frozen=True, slots=True)
class Film:
    """``shots``: who may be named in each, by the number of its first picture. ``sides``: where
    people stand beside each other, the borders between them in shares of the picture's width; each
    is then called by their place from the left, and in every shot."""

    name: str
    rate: float
    pictures: Callable[[], Iterator[Image]]
    shots: tuple[tuple[int, frozenset[str]], ...] = ()
    sides: tuple[float, ...] = ()
    photos: tuple[tuple[str, Path], ...] = ()
    """Of who is enrolled for this film alone."""

    def shot(self, index: int) -> int:
        """The number of the shot that a picture belongs to."""
        return bisect.bisect_right([first for first, _ in self.shots], index) - 1

    def place(self, face: DetectedFace, width: int) -> str:
        """What is called who stands there."""
        middle = (face.box.x + face.box.width / 2) / width
        return f"person {bisect.bisect_right(self.sides, middle) + 1} of {self.name}"

    def allowed(self, index: int, face: DetectedFace, width: int) -> frozenset[str]:
        """Who this face may be named."""
        if self.sides:
            return frozenset({self.place(face, width)})
        return self.shots[self.shot(index)][1]


def of_all(media: Path) -> list[Film]:
    """Those that are here, the one with the cuts first."""
    films = [
        Film(
            "short_hamilton_clip",
            29.97,
            _file(media / "short_hamilton_clip.mp4"),
            shots=(
                (0, frozenset({"lin_manuel_miranda", "alex_lacamoire"})),
                (20, frozenset({"alex_lacamoire"})),
                (82, frozenset({"lin_manuel_miranda"})),
                (211, frozenset({"obama"})),
            ),
        ),
        _side_by_side(media, "intel_face-demographics-walking-and-pause", (0.34, 0.6)),
        _side_by_side(media, "intel_head-pose-face-detection-female-and-male", (0.5,)),
    ]
    return [*films, _demo()]


def _side_by_side(media: Path, name: str, sides: tuple[float, ...]) -> Film:
    whoever = ((0, frozenset[str]()),)
    return Film(name, 12.5, _file(media / f"{name}.gif"), shots=whoever, sides=sides)


def _demo() -> Film:
    from facelane_bridge import demo_clip
    from facelane_bridge.demo_clip import StretchKind

    nobody = (StretchKind.EMPTY, StretchKind.BLURRED, StretchKind.DARK)
    return Film(
        "demo",
        demo_clip.FPS,
        lambda: demo_clip.Camera().frames(),
        shots=tuple(
            (
                round(stretch.start * demo_clip.FPS),
                frozenset() if stretch.kind in nobody else frozenset(stretch.subjects),
            )
            for stretch in demo_clip.SCRIPT
        ),
        photos=tuple((name, photo.path) for name, photo in demo_clip.photos().items()),
    )


def _file(path: Path) -> Callable[[], Iterator[Image]]:
    def pictures() -> Iterator[Image]:
        import cv2

        capture = cv2.VideoCapture(str(path))
        while (read := capture.read())[0]:
            yield read[1].astype(np.uint8)
        capture.release()

    return pictures


# -- what the models say ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """One face of one picture: all that the models say of it. ``allowed``: who it may be named."""

    face: DetectedFace
    ood: float
    candidates: tuple[Candidate, ...]
    live: float
    allowed: frozenset[str]


@dataclass(frozen=True, slots=True)
class Looked:
    """A film of which every face was looked at once. ``searched``: templates."""

    film: Film
    pictures: tuple[tuple[Seen, ...], ...]
    searched: int


class Looker:
    """The models, and whom they know from photos."""

    def __init__(self, models: material.Models, media: Path) -> None:
        self._loaded = inprocess.load_models(
            {str(stage): str(p.folder) for stage, p in models.packages.items()}, threads=1
        )
        self._names: list[str] = []
        self._rows: list[F32] = []
        for photo in sorted((media / "gallery").glob("*/*")):
            self._enrol(photo.parent.name, photo)

    def _enrol(self, name: str, photo: Path) -> None:
        found = inprocess.detect(self._loaded, _as_jpeg(photo))
        areas = [float(box[2] * box[3]) for box in found.boxes]
        if areas:
            self._names.append(name)
            self._rows.append(self._vector(found, int(np.argmax(areas)))[0])

    def _vector(self, found: Any, k: int) -> tuple[F32, float]:
        looked = inprocess.recognise(self._loaded, [crops[k : k + 1] for crops in found.crops])
        return looked.vectors[0], float(looked.ood[0])

    def look(self, film: Film, last: int) -> Looked:
        """All faces of the film's pictures, as far as ``last``."""
        import cv2

        from facelane_server.worker.appearance import signatures

        known: list[list[tuple[DetectedFace, F32, float, float]]] = []
        width = 1
        for number, picture in enumerate(film.pictures()):
            if number == last:
                break
            width = picture.shape[1]
            ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92])
            assert ok
            found = inprocess.detect(self._loaded, bytes(data))
            marks = signatures(found.crops[0])
            faces = []
            for k in range(len(found.boxes)):
                part = [crops[k : k + 1] for crops in found.crops]
                vector, ood = self._vector(found, k)
                key = f"{number}/{k}".encode()
                face = DetectedFace(
                    Box(*(float(v) for v in found.boxes[k])),
                    float(found.scores[k]),
                    tuple((float(x), float(y)) for x, y in found.landmarks[k]),
                    (key,) * len(found.crops),
                    marks[k].tobytes(),
                )
                live = float(inprocess.judge(self._loaded, part)[0])
                faces.append((face, vector, ood, live))
            known.append(faces)
        names, rows = self._enrolled(film, width, known)
        gallery = np.stack(rows)
        pictures = tuple(
            tuple(
                Seen(
                    face,
                    ood,
                    _ranked(gallery @ vector, names),
                    live,
                    film.allowed(number, face, width),
                )
                for face, vector, ood, live in faces
            )
            for number, faces in enumerate(known)
        )
        return Looked(film, pictures, len(names))

    def _enrolled(
        self, film: Film, width: int, known: list[list[tuple[DetectedFace, F32, float, float]]]
    ) -> tuple[list[str], list[F32]]:
        best: dict[str, tuple[float, F32]] = {}
        before = len(self._names)
        for name, photo in film.photos:
            self._enrol(name, photo)
        if film.sides:
            for face, vector, ood, _ in (item for faces in known for item in faces):
                who = film.place(face, width)
                if ood >= max(TRUSTED, best[who][0] if who in best else 0.0):
                    best[who] = (ood, vector)
        names = [*self._names, *best]
        rows = [*self._rows, *(vector for _, vector in best.values())]
        del self._names[before:], self._rows[before:]
        return names, rows


def _as_jpeg(photo: Path) -> bytes:
    import cv2

    picture = cv2.imread(str(photo))
    assert picture is not None
    ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert ok
    return bytes(data)


def _ranked(similarities: F32, names: Sequence[str]) -> tuple[Candidate, ...]:
    best: dict[str, float] = {}
    for name, similarity in zip(names, similarities.tolist(), strict=True):
        best[name] = max(similarity, best.get(name, -1.0))
    ranked = sorted(best.items(), key=lambda item: -item[1])
    return tuple(Candidate(name, similarity) for name, similarity in ranked[:2])
