"""Draws docs/figures from two public-domain portraits, by the very command of the manual.

usage: python docs/generate_figures.py

The pictures are variants of Grace Hopper's portrait (shipped with matplotlib) and of Eileen
Collins's (shipped with scikit-image): enough for the shape of the curves, not for a measurement.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import cv2
import matplotlib as mpl
import numpy as np
import skimage

from facelane_server.models.catalog import Catalog
from facelane_server.modeltools.evaluate import Settings, evaluate

FIGURES = Path(__file__).with_name("figures")
PORTRAITS = {
    "hopper": Path(mpl.get_data_path()) / "sample_data" / "grace_hopper.jpg",
    "collins": Path(skimage.__file__).parent / "data" / "astronaut.png",
}
VARIANTS = 24


def variant(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another shot of the same scene: turned, scaled, lit, blurred and compressed a little."""
    height, width = picture.shape[:2]
    turn = cv2.getRotationMatrix2D(
        (width / 2, height / 2), rng.uniform(-12, 12), rng.uniform(0.5, 1.0)
    )
    out = cv2.warpAffine(picture, turn, (width, height), borderMode=cv2.BORDER_REPLICATE)
    if rng.random() < 0.5:
        out = out[:, ::-1]
    out = cv2.GaussianBlur(out, (0, 0), rng.uniform(0.3, 2.5))
    out = out * rng.uniform(0.45, 1.25) + rng.normal(0, rng.uniform(1, 14), out.shape)
    return out.clip(0, 255).astype(np.uint8)


def main() -> None:
    rng = np.random.default_rng(1)
    # Text as text: small files, and the same wherever it is drawn.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "facelane"})
    with tempfile.TemporaryDirectory() as scratch:
        data, out = Path(scratch) / "data", Path(scratch) / "out"
        for name, path in PORTRAITS.items():
            (data / name).mkdir(parents=True)
            portrait = cv2.imread(str(path))
            for number in range(VARIANTS):
                shot = variant(portrait, rng)
                cv2.imwrite(
                    str(data / name / f"{number}.jpg"), shot, [cv2.IMWRITE_JPEG_QUALITY, 80]
                )
        catalog = Catalog()
        evaluate(
            catalog.resolve("facelane-recognizer"),
            data,
            out,
            detector=catalog.resolve("facelane-detector"),
            settings=Settings(damaged=48),
        )
        FIGURES.mkdir(exist_ok=True)
        for name in ("ood-reject", "det"):
            shutil.copyfile(out / f"{name}.svg", FIGURES / f"evaluate-{name}.svg")


if __name__ == "__main__":
    main()
