"""A synthetic camera for the demo: twenty seconds, two people, and what makes it hard.

Photos of Grace Hopper and Eileen Collins (public domain, from matplotlib's and
scikit-image's wheels) move over a textured background as a camera would see them.
``SCRIPT`` says which stretch is what, for people and for the demo's own judgement.
Every frame is a function of its number: rendering twice gives the same pixels.
"""

from __future__ import annotations

import enum
import importlib.util
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

WIDTH, HEIGHT = 640, 480
FPS = 20
BLUR = 5.0
"""Sigma in pixels, of faces 100 pixels wide: at 4 they still resemble their photos by .6, and a
detector whose landmarks hold there lets them be named, rightly."""
HOPPER = "grace_hopper"
COLLINS = "eileen_collins"


class StretchKind(enum.StrEnum):
    """What the camera sees."""

    CLEAR = "clear"
    """A face as it was enrolled, in motion: to be named."""
    EMPTY = "empty"
    """Nobody."""
    BLURRED = "blurred"
    """Out of focus beyond recognition: never to be named."""
    DARK = "dark"
    """A twentieth of the light, and noise: never to be named."""
    OCCLUDED = "occluded"
    """The lower half of the face behind a board: named or not, but never wrongly."""
    RECAPTURED = "recaptured"
    """A photo on a screen, with its bezel, its grid and its glare: an attack."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """``start`` and ``end`` in seconds of media time; ``subjects`` are those in view."""

    kind: StretchKind
    start: float
    end: float
    subjects: tuple[str, ...] = ()

    def contains(self, offset: float) -> bool:
        return self.start <= offset < self.end


# Between two stretches of different quality nobody is in view for longer than the server
# keeps a track alive (1 s by default): a name that was earned in clear sight must not be
# carried by the track into the blur, or the demo would show the tracker and not the gate.
SCRIPT: tuple[Stretch, ...] = (
    Stretch(StretchKind.CLEAR, 0.0, 3.5, (HOPPER,)),
    Stretch(StretchKind.CLEAR, 3.5, 7.0, (COLLINS,)),
    Stretch(StretchKind.EMPTY, 7.0, 8.5),
    Stretch(StretchKind.BLURRED, 8.5, 10.5, (HOPPER, COLLINS)),
    Stretch(StretchKind.EMPTY, 10.5, 12.0),
    Stretch(StretchKind.DARK, 12.0, 14.0, (COLLINS,)),
    Stretch(StretchKind.EMPTY, 14.0, 15.3),
    Stretch(StretchKind.OCCLUDED, 15.3, 17.0, (HOPPER,)),
    Stretch(StretchKind.EMPTY, 17.0, 18.2),
    Stretch(StretchKind.RECAPTURED, 18.2, 20.0, (COLLINS,)),
)
SECONDS = SCRIPT[-1].end


def stretch_at(offset: float) -> Stretch:
    """The stretch at a media time in seconds; the last one after the end."""
    return next((stretch for stretch in SCRIPT if stretch.contains(offset)), SCRIPT[-1])


Rectangle = tuple[int, int, int, int]
"""x, y, width, height in pixels of the photo."""


@dataclass(frozen=True, slots=True)
class Photo:
    """A portrait, and what is needed to cut the person out of it."""

    path: Path
    face: Rectangle
    head: Rectangle
    """An ellipse inside of it is certainly the person."""
    person: tuple[Rectangle, ...]
    """Certainly the person."""
    background: tuple[Rectangle, ...]
    """Certainly not."""


class MissingPhotoError(Exception):
    """A photo's package is not installed; the message says which."""


def photos() -> dict[str, Photo]:
    """The two people by subject id, found in the installed wheels.

    Only the packages' folders are looked up; neither package is imported.
    """
    return {
        HOPPER: Photo(
            _package_file("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
            face=(177, 123, 178, 212),
            head=(176, 50, 180, 300),
            person=((90, 430, 350, 170), (190, 60, 160, 50)),
            background=((0, 0, 60, 330), (400, 0, 112, 300), (0, 0, 512, 30)),
        ),
        COLLINS: Photo(
            _package_file("skimage", "data/astronaut.png"),
            face=(178, 65, 91, 111),
            head=(162, 10, 124, 160),
            person=((195, 150, 95, 150), (60, 330, 290, 182)),
            background=(
                (0, 0, 130, 170),
                (320, 0, 192, 210),
                (0, 0, 512, 5),
                (0, 0, 60, 300),
                (0, 300, 20, 100),
                (385, 230, 127, 282),
            ),
        ),
    }


def _package_file(package: str, path: str) -> Path:
    spec = importlib.util.find_spec(package)
    file = Path(spec.origin).parent / path if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        raise MissingPhotoError(
            f"{package} is not installed here; install it with: pip install 'facelane[demo]'"
        )
    return file


class Camera:
    """Renders frames by number. ``frame`` gives ``HEIGHT`` x ``WIDTH`` x 3, BGR."""

    def __init__(self) -> None:
        self._background = _texture()
        # A camera's noise never repeats; seven fields in turn are enough to look at, and
        # a fifth of the time of a fresh one for every frame.
        random = np.random.default_rng(11)
        shape = (7, HEIGHT, WIDTH, 3)
        self._noise = random.standard_normal(shape, dtype=np.float32)
        self._portraits = {name: _Portrait(photo) for name, photo in photos().items()}

    def frames(self) -> Iterator[Image]:
        """All frames of the clip, in order."""
        for number in range(round(SECONDS * FPS)):
            yield self.frame(number)

    def frame(self, number: int) -> Image:
        """Frame ``number`` of the clip, 0 first."""
        # Half a frame's tolerance: 8.5 s is frame 170, whatever floats make of it.
        offset = (number + 0.001) / FPS
        stretch = stretch_at(offset)
        moment = (offset - stretch.start) / (stretch.end - stretch.start)
        scene = self._background.copy()
        match stretch.kind:
            case StretchKind.CLEAR if stretch.subjects == (HOPPER,):
                # A pan: she crosses the picture, and turns a little with it.
                x = 150 + 300 * moment
                self._paste(scene, HOPPER, x, 262, face_width=130, angle=3 * math.sin(6 * moment))
            case StretchKind.CLEAR:
                # A zoom: she comes nearer, at the other side.
                width = 88 + 60 * moment
                self._paste(scene, COLLINS, 200, 200 + 20 * moment, face_width=width, angle=-3)
            case StretchKind.BLURRED:
                self._paste(scene, HOPPER, 160 + 20 * moment, 278, face_width=100)
                self._paste(scene, COLLINS, 480 - 20 * moment, 230, face_width=100)
                scene = cv2.GaussianBlur(scene, (0, 0), BLUR).astype(np.float32)
            case StretchKind.DARK:
                self._paste(scene, COLLINS, 330 + 30 * moment, 220, face_width=110)
                scene *= 0.045
            case StretchKind.OCCLUDED:
                self._paste(scene, HOPPER, 330, 240, face_width=120)
                top = int(232 + 12 * math.sin(5 * moment))
                scene[top:, 250:410] = _board(HEIGHT - top, 160)
            case StretchKind.RECAPTURED:
                scene = self._screen(scene, moment)
            case _:
                pass
        sensor = 3.0 if stretch.kind is StretchKind.DARK else 2.0
        scene += sensor * self._noise[number % len(self._noise)]
        return np.clip(scene, 0, 255).astype(np.uint8)

    def _paste(
        self, scene: Floats, who: str, x: float, y: float, *, face_width: float, angle: float = 0.0
    ) -> None:
        self._portraits[who].paste(scene, x, y, face_width, angle)

    def _screen(self, scene: Floats, moment: float) -> Floats:
        """A tablet that shows her photo, held into the picture."""
        inner = np.full((300, 400, 3), 90.0, np.float32)
        self._portraits[COLLINS].paste(inner, 200, 125, 105, 0.0, whole=True)
        inner = cv2.GaussianBlur(inner, (0, 0), 0.8).astype(np.float32)
        # The camera's grid over the screen's: a beat that neither of them has.
        y, x = np.mgrid[0:300, 0:400].astype(np.float32)
        phase = 2 * math.pi * moment
        for channel, (period, tilt) in enumerate(((2.13, 0.11), (2.27, -0.07), (2.39, 0.05))):
            grid = np.sin(2 * math.pi * (x + tilt * y) / period + phase)
            lines = np.sin(2 * math.pi * (y - tilt * x) / (period + 0.17))
            inner[..., channel] *= 0.86 + 0.10 * grid + 0.06 * lines
        inner[..., 0] *= 1.12  # screens are blue
        inner = 30 + 0.9 * inner  # and their black glows
        glare = np.exp(-(((x - 320) / 60) ** 2 + ((y - 60) / 40) ** 2)) * 90
        inner += glare[..., None]
        tablet = np.full((360, 470, 3), 22.0, np.float32)
        tablet[30:330, 35:435] = inner
        wobble = 4 * math.sin(2 * math.pi * moment)
        corners = np.array(
            [[96 + wobble, 70], [560, 52 + wobble], [572, 420], [88, 408 + wobble]], np.float32
        )
        flat = np.array([[0, 0], [470, 0], [470, 360], [0, 360]], np.float32)
        warp = cv2.getPerspectiveTransform(flat, corners)
        size = (WIDTH, HEIGHT)
        mask = cv2.warpPerspective(np.ones((360, 470), np.float32), warp, size)[..., None]
        shown = cv2.warpPerspective(tablet, warp, size)
        return (scene * (1 - mask) + shown * mask).astype(np.float32)


class _Portrait:
    """A person cut out of a photo along the outline."""

    def __init__(self, photo: Photo) -> None:
        image = cv2.imread(str(photo.path), cv2.IMREAD_COLOR)
        if image is None:
            raise MissingPhotoError(f"{photo.path.name} cannot be read")
        pixels: Image = image.astype(np.uint8)
        self._image: Floats = pixels.astype(np.float32)
        x, y, self._face_width, face_height = photo.face
        self._centre = (x + self._face_width / 2, y + face_height / 2)
        self._outline = _outline(pixels, photo)
        self._whole: Floats = np.ones_like(self._outline)
        self._smoothed: dict[float, Floats] = {}

    def paste(
        self,
        scene: Floats,
        x: float,
        y: float,
        face_width: float,
        angle: float,
        *,
        whole: bool = False,
    ) -> None:
        """Put the face's centre at (x, y), in place; ``whole``: with the photo's background."""
        alpha = self._whole if whole else self._outline
        scale = face_width / self._face_width
        # Only the part of the scene that she covers, with room for the turn.
        half = scale * math.hypot(*alpha.shape)
        left, right = max(0, int(x - half)), min(scene.shape[1], int(x + half) + 1)
        top, bottom = max(0, int(y - half)), min(scene.shape[0], int(y + half) + 1)
        matrix = cv2.getRotationMatrix2D(self._centre, angle, scale)
        matrix[0, 2] += x - self._centre[0] - left
        matrix[1, 2] += y - self._centre[1] - top
        size = (right - left, bottom - top)
        shown = cv2.warpAffine(self._smooth(scale), matrix, size, flags=cv2.INTER_LINEAR)
        mask = cv2.warpAffine(alpha, matrix, size)[..., None]
        part = scene[top:bottom, left:right]
        part += (shown - part) * mask

    def _smooth(self, scale: float) -> Floats:
        """The photo without the detail that shrinking would turn into patterns."""
        if scale >= 0.9:
            return self._image
        step = round(scale, 1)
        if step not in self._smoothed:
            blurred = cv2.GaussianBlur(self._image, (0, 0), 0.4 / step)
            self._smoothed[step] = blurred.astype(np.float32)
        return self._smoothed[step]


def _outline(image: Image, photo: Photo) -> Floats:
    """1 where the person is, 0 elsewhere, soft between: GrabCut from the photo's hints."""
    mask = np.full(image.shape[:2], cv2.GC_PR_BGD, np.uint8)

    def mark(rectangles: tuple[Rectangle, ...], value: int) -> None:
        for x, y, width, height in rectangles:
            mask[y : y + height, x : x + width] = value

    mark(photo.background, cv2.GC_BGD)
    x, y, width, height = photo.head
    centre, axes = (x + width // 2, y + height // 2), (width // 2, height // 2)
    cv2.ellipse(mask, centre, axes, 0, 0, 360, cv2.GC_FGD, -1)
    mark(photo.person, cv2.GC_FGD)
    cv2.setRNGSeed(1)  # its clustering draws lots
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(image, mask, (0, 0, 0, 0), *models, 5, cv2.GC_INIT_WITH_MASK)
    person = np.isin(mask, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    _, labels, areas, _ = cv2.connectedComponentsWithStats(person)
    largest = 1 + int(areas[1:, cv2.CC_STAT_AREA].argmax())
    soft: Floats = cv2.GaussianBlur((labels == largest).astype(np.float32), (0, 0), 1.5)
    return soft


def _texture() -> Floats:
    """A wall that is not quite even, so that the detector has something to refuse."""
    random = np.random.default_rng(7)
    wall = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for cells, weight in ((4, 16), (12, 10), (40, 7), (160, 5)):
        grid = random.normal(0, 1, (cells * 3 // 4, cells)).astype(np.float32)
        layer = cv2.resize(grid, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        wall += weight * layer[..., None] * np.array([0.8, 0.9, 1.0], np.float32)
    slope = np.linspace(25, -25, HEIGHT, dtype=np.float32)[:, None, None]
    wall += slope + np.array([112, 124, 132], np.float32)
    for column in range(0, WIDTH, 80):
        wall[:, column : column + 2] -= 18
    # The camera is focused on people, not on the wall.
    return cv2.GaussianBlur(wall, (0, 0), 2.5).astype(np.float32)


def _board(height: int, width: int) -> Floats:
    rows = np.arange(height, dtype=np.float32)[:, None, None]
    board: Floats = np.zeros((height, width, 3), np.float32)
    board += 12 * np.sin(rows / 5.0) + np.array([60, 96, 138], np.float32)
    return board


def render(folder: Path, cancelled: threading.Event | None = None) -> Path:
    """Write ``camera.mp4`` and ``camera.json`` (the script) into ``folder``; the clip's path.

    Takes some seconds; ends early, with a clip that is cut short, when ``cancelled`` is set.
    """
    clip = folder / "camera.mp4"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        # As cameras encode: a picture that another one is needed for comes late.
        stream.options = {"crf": "18", "preset": "veryfast", "bf": "0"}
        for image in Camera().frames():
            if cancelled is not None and cancelled.is_set():
                break
            frame = av.VideoFrame.from_ndarray(image, format="bgr24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    script = {
        "width": WIDTH,
        "height": HEIGHT,
        "fps": FPS,
        "stretches": [asdict(stretch) for stretch in SCRIPT],
    }
    clip.with_suffix(".json").write_text(json.dumps(script, indent=2) + "\n")
    return clip
