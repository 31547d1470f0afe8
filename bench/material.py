"""What the benchmarks run on: model packages, and frames made of two public-domain photos.

Frames are made once and kept as JPEG files, so that every deployment gets the same bytes.
The photos come with Python packages that the `demo` extra installs: Grace Hopper
(matplotlib's sample data) and Eileen Collins (scikit-image's). On a machine without them,
`--frames DIR` takes a folder of JPEG files.
"""

from __future__ import annotations

import importlib.util
import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from facelane_server.domain import Stage
from facelane_server.models.api import CropSpec
from facelane_server.models.catalog import SHIPPED, Catalog
from facelane_server.models.package import Package

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

SHARED: Final = Path(
    os.environ.get("FACELANE_SHARED", Path(__file__).resolve().parents[2] / "shared")
)
_PUBLIC: Final = {
    Stage.DETECTOR: ("yunet", "yunet-n", ("yunet_n.pth",)),
    Stage.RECOGNIZER: ("mobilefacenet-onnx", "mbf-512", ("mbf_512_fp32.onnx",)),
    Stage.LIVENESS: (
        "minifasnet",
        "minifasnet-pair",
        ("2.7_80x80_MiniFASNetV2.pth", "4_0_0_80x80_MiniFASNetV1SE.pth"),
    ),
}
# Where the faces are in the two photos: x, y of the middle, height of the face, pixels.
_FACES: Final = {"grace_hopper.jpg": (262, 205, 190), "astronaut.png": (224, 112, 115)}


class MissingError(Exception):
    """Something that the benchmark needs is not on this machine; the message says what."""


# -- models -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Models:
    """One package a stage, and where they come from."""

    packages: dict[Stage, Package]
    origin: str

    @property
    def crops(self) -> tuple[CropSpec, ...]:
        """What the detector cuts out: for the recogniser, then for liveness."""
        found: list[CropSpec] = []
        for stage in (Stage.RECOGNIZER, Stage.LIVENESS):
            found += self.packages[stage].crops
        return tuple(found)

    def pools_toml(self, extra: str = "", **per_stage: str) -> str:
        """``[pools.*]`` sections; ``extra`` goes into each, ``per_stage`` into one."""
        return "".join(
            f'[pools.{stage}]\nmodel = "{package.folder}"\n{extra}\n'
            f"{per_stage.get(str(stage), '')}\n"
            for stage, package in self.packages.items()
        )

    @property
    def name(self) -> str:
        """For tables; ``listed`` says what it means."""
        return self.origin if self.origin == "null" else f"{self.origin} models"

    @property
    def listed(self) -> str:
        return f"{self.name}: {', '.join(p.model_id for p in self.packages.values())}"


def null_models(*, decoding: bool = True) -> Models:
    """Models that compute nothing: what is left is the service's own cost.

    Without ``decoding`` the detector does not even look at the pictures, and what is left
    is transport, scheduling and the processes.
    """
    catalog = Catalog()
    packages = {s: catalog.resolve(f"null-{s}") for s in Stage}
    if not decoding:
        packages[Stage.DETECTOR] = catalog.resolve("null-detector-blind")
    return Models(packages, "null")


def real_models(cache_folder: Path) -> Models:
    """The starter models that ship; without them the public ones, imported.

    Raises MissingError where neither is there.
    """
    starter, _ = Catalog().scan()
    shipped = {p.task: p for p in starter if p.folder.is_relative_to(SHIPPED[0])}
    if set(shipped) == set(Stage):
        return Models({stage: shipped[stage] for stage in Stage}, "starter")
    if not (SHARED / "models").is_dir():
        raise MissingError(
            "no models: this checkout has no starter models, and the folder with public ones "
            f"({SHARED}) is not here; name it with FACELANE_SHARED"
        )
    return Models({stage: _imported(stage, cache_folder / "models") for stage in Stage}, "public")


def _imported(stage: Stage, folder: Path) -> Package:
    recipe, name, files = _PUBLIC[stage]
    if not (folder / name / "model.toml").is_file():
        sources = [str(SHARED / "models" / file) for file in files]
        # In a process of its own: importing loads torch, and this process stays a client.
        code = (
            "import sys; from pathlib import Path\n"
            "from facelane_server.modeltools.importer import import_model\n"
            "import_model(sys.argv[1], [Path(p) for p in sys.argv[3:]], Path(sys.argv[2]))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, recipe, str(folder), *sources],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode != 0:
            raise MissingError(f"{name} could not be imported: {done.stderr.strip()[-500:]}")
    return Catalog([folder]).resolve(name)


# -- frames -----------------------------------------------------------------------------


@cache
def photo(name: str) -> Array:
    """One of the public-domain photos, BGR. Raises MissingError."""
    import cv2

    where = {
        "grace_hopper.jpg": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
        "astronaut.png": ("skimage", "data/astronaut.png"),
    }[name]
    spec = importlib.util.find_spec(where[0])
    path = Path(spec.origin).parent / where[1] if spec and spec.origin else Path()
    picture: Any = cv2.imread(str(path)) if path.is_file() else None
    if picture is None:
        raise MissingError(
            f"{name} of {where[0]} is not here: pip install 'facelane[demo]', or give a folder "
            "of JPEG files with --frames"
        )
    return picture  # type: ignore[no-any-return]


def _texture(width: int, height: int, seed: int) -> Array:
    """A background that costs a camera's encoder what a room does, and holds no face."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 190, (height // 60 + 2, width // 60 + 2, 3), dtype=np.uint8)
    grown = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(0, 3, (height, width, 1))
    return np.clip(grown + grain, 0, 255).astype(np.uint8)


def _paste(canvas: Array, name: str, centre: tuple[float, float], face_px: float) -> None:
    """Puts a photo's head and shoulders on the canvas, its face ``face_px`` high."""
    import cv2

    picture = photo(name)
    x, y, height = _FACES[name]
    reach = int(height * 1.1)
    top, left = max(0, y - reach), max(0, x - reach)
    cut = picture[top : y + reach, left : x + reach]
    scale = face_px / height
    cut = cv2.resize(cut, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    px, py = int(centre[0] - cut.shape[1] / 2), int(centre[1] - cut.shape[0] / 2)
    px = min(max(0, px), canvas.shape[1] - cut.shape[1])
    py = min(max(0, py), canvas.shape[0] - cut.shape[0])
    canvas[py : py + cut.shape[0], px : px + cut.shape[1]] = cut


def make_clip(count: int, width: int, height: int, codec: str, rate: float) -> list[bytes]:
    """``count`` access units (``h264``, ``h265``; Annex B) of a scene with two faces that move, at
    2 Mbit/s (720p) or 4, a key frame every second, as cameras encode: nothing out of order."""
    import io
    from fractions import Fraction

    import av
    import cv2
    import numpy as np

    library, form = {"h264": ("libx264", "h264"), "h265": ("libx265", "hevc")}[codec]
    every = round(rate)
    options = {
        "h264": {"x264-params": f"bframes=0:keyint={every}:scenecut=0:log-level=none"},
        "h265": {
            "x265-params": f"bframes=0:keyint={every}:scenecut=0:repeat-headers=1:log-level=none"
        },
    }[codec]
    units: list[bytes] = []
    with av.open(io.BytesIO(), "w", format=form) as container:
        stream = container.add_stream(library, rate=Fraction(rate).limit_denominator())
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 2_000_000 if height <= 720 else 4_000_000
        stream.options = {"preset": "veryfast", **options}
        for data in make_frames(count, width, height, (2,)):
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            assert picture is not None
            frame = av.VideoFrame.from_ndarray(np.asarray(picture, np.uint8), format="bgr24")
            units += [bytes(packet) for packet in stream.encode(frame)]
        units += [bytes(packet) for packet in stream.encode(None)]
    return units


def make_frames(
    count: int, width: int, height: int, faces: Sequence[int], *, seed: int = 1
) -> list[bytes]:
    """JPEG frames with moving faces; ``faces`` is how many each frame has, repeated.

    At most four: the two photos twice, each at a quarter of the picture.
    """
    import cv2
    import numpy as np

    rng = random.Random(seed)
    background = _texture(width, height, seed)
    found = []
    for index in range(count):
        canvas = background.copy()
        number = faces[index % len(faces)]
        for k in range(number):
            name = list(_FACES)[k % 2]
            columns = max(1, min(2, number))
            rows = math.ceil(number / columns)
            cell_w, cell_h = width / columns, height / rows
            face_px = min(cell_w, cell_h) * 0.34 * (0.9 + 0.1 * math.sin(index / 9 + k))
            x = (k % columns + 0.5 + 0.08 * math.sin(index / 7 + k)) * cell_w
            y = (k // columns + 0.5 + 0.06 * math.cos(index / 5 + k)) * cell_h
            _paste(canvas, name, (x, y), face_px)
        noise = np.random.default_rng(rng.getrandbits(32)).integers(
            -1, 2, canvas.shape, dtype=np.int16
        )
        noisy = np.clip(canvas.astype(np.int16) + noise, 0, 255).astype(np.uint8)
        ok, data = cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 85])
        assert ok
        found.append(data.tobytes())
    return found


def frames_of_size(count: int, size_bytes: int) -> list[bytes]:
    """640x480 JPEG frames of about ``size_bytes`` each, for models that do not look at them.

    They differ in a strip at the top alone, so that whatever is taken for a face is the same in
    each: tracks would else be looked at again in every frame, and that would be measured.
    """
    import cv2
    import numpy as np

    found = []
    for seed in range(count):
        grain = 4.0
        data = b""
        while len(data) < size_bytes:
            rng, own = np.random.default_rng(0), np.random.default_rng(seed)
            noisy = _texture(640, 480, 0) + rng.normal(0, grain, (480, 640, 1))
            noisy[:48] += own.normal(0, grain, (48, 640, 1))
            picture = np.clip(noisy, 0, 255).astype(np.uint8)
            for quality in range(30, 95, 2):
                _, encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
                data = encoded.tobytes()
                if len(data) >= size_bytes:
                    break
            grain *= 1.5
        found.append(data)
    return found


def frames_from(folder: Path) -> list[bytes]:
    """All JPEG files of a folder, by name. Raises MissingError when there is none."""
    found = [path.read_bytes() for path in sorted(folder.glob("*.jp*g"))]
    if not found:
        raise MissingError(f"{folder} holds no JPEG files")
    return found
