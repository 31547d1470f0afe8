"""The packed training data: reading it, and the rule that keeps identities out of training.

``training.pack`` writes the folder that this module reads::

    manifest.json       sha256 of every source and of every packed file
    crops.npz           aligned 112x112 crops: jpeg/webp bytes, offsets, identity, heldout, source
    photos.npz          250x250 photos: bytes, offsets, heldout, YuNet's faces in each
    things.npz          320x320 pictures of things without faces: bytes, offsets (if there are any)
    models/             the teachers' files, unchanged

No name of a person or picture travels in it: identities are numbers.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

HELD_OUT_SHARE = 0.15
CELEBA, LFW = 0, 1

U8 = npt.NDArray[np.uint8]


def is_held_out(name: str) -> bool:
    """Whether the identity called ``name`` is kept out of every training (15 % are).

    The rule looks at nothing but the name, so that adding or removing pictures never
    moves an identity from one side to the other.
    """
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_SHARE


@dataclass(frozen=True)
class Crops:
    """``pictures`` [N, 112, 112, 3] uint8 BGR, ``identity`` [N] int64, ``source`` [N] 0 or 1."""

    pictures: U8
    identity: npt.NDArray[np.int64]
    source: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Photos:
    """``pictures`` [N, 250, 250, 3] uint8 BGR; the faces of photo i are rows
    ``first[i]:first[i + 1]`` of ``faces`` [M, 15]: x, y, w, h, five landmarks (x, y), score."""

    pictures: U8
    faces: npt.NDArray[np.float32]
    first: npt.NDArray[np.int64]

    def main_face(self) -> npt.NDArray[np.float32]:
        """[N, 15]: the best-scored face of each photo; score 0 where there is none."""
        out = np.zeros((len(self.pictures), 15), np.float32)
        for index in range(len(self.pictures)):
            faces = self.faces[self.first[index] : self.first[index + 1]]
            if len(faces):
                centre = faces[:, :2] + faces[:, 2:4] / 2 - 125
                # The subject of an LFW photo is its central face, not always the best-scored.
                out[index] = faces[np.argmin(np.abs(centre).sum(1) - 20 * faces[:, 14])]
        return out


def decode_all(blob: U8, offsets: npt.NDArray[np.int64], picks: npt.NDArray[np.int64]) -> U8:
    """Decode the chosen pictures (all of one size) to [N, H, W, 3] uint8 BGR."""

    def one(index: int) -> U8:
        picture = cv2.imdecode(blob[offsets[index] : offsets[index + 1]], cv2.IMREAD_COLOR)
        if picture is None:
            raise ValueError(f"packed picture {index} does not decode; pack the data again")
        return picture

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(one, picks.tolist())))


def load_crops(folder: Path, *, held_out: bool, limit: int = 0) -> Crops:
    """The crops to train on, or those kept out. ``limit`` > 0 spreads that many over all."""
    with np.load(folder / "crops.npz") as packed:
        picks = np.flatnonzero(packed["heldout"] == held_out)
        if limit:
            picks = picks[:: max(1, len(picks) // limit)][:limit]
        pictures = decode_all(packed["blob"], packed["offsets"], picks)
        return Crops(pictures, packed["identity"][picks], packed["source"][picks])


WRONG_LABELS = ("25eb49559f017736", "8370464df64368f0")
"""SHA-256 (first 16 digits) of encoded crops kept out of training that show somebody else than
their label says, seen by eye: one is of the man beside, one is a known error of LFW."""


def rightly_labelled(folder: Path) -> npt.NDArray[np.bool_]:
    """[N]: for each crop of ``load_crops(folder, held_out=True)``, whether its label is right."""
    with np.load(folder / "crops.npz") as packed:
        blob, offsets = packed["blob"], packed["offsets"]
        picks = np.flatnonzero(packed["heldout"])
        digests = [
            hashlib.sha256(blob[offsets[i] : offsets[i + 1]].tobytes()).hexdigest() for i in picks
        ]
    return np.array([digest[:16] not in WRONG_LABELS for digest in digests])


def load_photos(folder: Path, *, held_out: bool, limit: int = 0) -> Photos:
    """The photos to train on, or those of identities kept out."""
    with np.load(folder / "photos.npz") as packed:
        picks = np.flatnonzero(packed["heldout"] == held_out)
        if limit:
            picks = picks[:: max(1, len(picks) // limit)][:limit]
        pictures = decode_all(packed["blob"], packed["offsets"], picks)
        first = packed["first"]
        rows = [packed["faces"][first[i] : first[i + 1]] for i in picks]
        counts = np.cumsum([0] + [len(row) for row in rows])
        return Photos(pictures, np.concatenate(rows), counts.astype(np.int64))


def load_things(folder: Path, limit: int = 0) -> U8:
    """[N, 320, 320, 3] BGR: pictures of real things without faces; none where none were packed."""
    if not (folder / "things.npz").exists():
        return np.zeros((0, 320, 320, 3), np.uint8)
    with np.load(folder / "things.npz") as packed:
        picks = np.arange(len(packed["offsets"]) - 1)[: limit or None]
        return decode_all(packed["blob"], packed["offsets"], picks)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(folder: Path) -> dict[str, Any]:
    """What ``training.pack`` recorded; checked against the files that are there."""
    recorded: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    for name, digest in recorded["packed"].items():
        if sha256(folder / name) != digest:
            raise ValueError(f"{name} is not what was packed; run training.pack again")
    return recorded
