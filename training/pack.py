"""Pack the data and the teachers into one folder of less than 60 MB.

``python -m training.pack --shared DIR --out DIR`` reads ``DIR/data`` and ``DIR/models``,
marks the identities that are kept out, lets YuNet label the photos, re-encodes what is
only trained on, and records the hashes. Crops of identities kept out stay byte for byte.

``--things DIR…`` are folders of pictures that show no person: Debian's tuxpaint-stamps-default
(cut-outs of animals, vehicles, food, planets), gnome-backgrounds and mate-backgrounds, unpacked.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from training.clutter import plain_ground, shapes
from training.data import CELEBA, LFW, U8, is_held_out, sha256
from training.teacher import TEACHER_FILE, pack_teacher

PHOTO_QUALITY = 75
CELEBA_QUALITY = 78
LFW_QUALITY = 80
LABEL_SCORE = 0.5
"""Faces that YuNet scores below this are left out of the labels."""

MODELS = (
    "yunet_n.pth",
    "2.7_80x80_MiniFASNetV2.pth",
    "4_0_0_80x80_MiniFASNetV1SE.pth",
)


THING = 320
THINGS_QUALITY = 80
THINGS_LEFT_OUT = {
    "people", "faces", "money", "cartoon", "apes", "toys", "halloween", "christmas", "hanukkah",
    "newyears", "easter", "military", "math", "filled", "outlined",
}  # fmt: skip
"""Folders of drawn or printed people, of drawings with faces, and of letters."""


def _slices(archive: Any) -> list[bytes]:
    blob, offsets = archive["jpeg"], archive["offsets"]
    return [bytes(blob[offsets[i] : offsets[i + 1]]) for i in range(len(offsets) - 1)]


def _webp(encoded: bytes, quality: int) -> bytes:
    picture = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    done, out = cv2.imencode(".webp", picture, [cv2.IMWRITE_WEBP_QUALITY, quality])
    if not done:
        raise ValueError("a picture could not be re-encoded")
    return out.tobytes()


def _join(parts: Sequence[bytes]) -> tuple[U8, npt.NDArray[np.int64]]:
    offsets = np.cumsum([0] + [len(part) for part in parts]).astype(np.int64)
    return np.frombuffer(b"".join(parts), np.uint8), offsets


def pack_crops(data: Path, out: Path, limit: int = 0) -> None:
    """Both crop sets (the first ``limit`` of each) into ``out``/crops.npz; identities are
    renumbered, no names are kept."""
    parts: list[bytes] = []
    identity: list[int] = []
    held: list[bool] = []
    source: list[int] = []
    with np.load(data / "celeba299.npz") as archive:
        numbers = {v: i for i, v in enumerate(sorted(set(archive["identity"].tolist())))}
        pairs = list(zip(_slices(archive), archive["identity"].tolist(), strict=True))
        for encoded, who in pairs[: limit or None]:
            parts.append(_webp(encoded, CELEBA_QUALITY))
            identity.append(numbers[who])
            held.append(False)
            source.append(CELEBA)
        base = len(numbers)
    with np.load(data / "lfw_train.npz") as archive:
        rows = zip(_slices(archive), archive["identity"].tolist(), archive["names"], strict=True)
        for encoded, who, name in list(rows)[: limit or None]:
            kept_out = is_held_out(str(name).split("/")[0])
            parts.append(encoded if kept_out else _webp(encoded, LFW_QUALITY))
            identity.append(base + who)
            held.append(kept_out)
            source.append(LFW)
    blob, offsets = _join(parts)
    np.savez(
        out / "crops.npz",
        blob=blob,
        offsets=offsets,
        identity=np.array(identity, np.int64),
        heldout=np.array(held),
        source=np.array(source, np.int64),
    )


def pack_photos(data: Path, models: Path, out: Path, limit: int = 0) -> None:
    """The photos into ``out``/photos.npz, with YuNet's faces (score at least 0.5)."""
    from training.detector import load_yunet, merge_faces

    network = load_yunet(models / "yunet_n.pth")
    parts: list[bytes] = []
    held: list[bool] = []
    faces: list[npt.NDArray[np.float32]] = []
    with np.load(data / "lfw_train_photos.npz") as archive:
        encoded = _slices(archive)
        names = [str(name) for name in archive["names"]]
    for raw, name in list(zip(encoded, names, strict=True))[: limit or None]:
        small = _webp(raw, PHOTO_QUALITY)
        picture = cv2.imdecode(np.frombuffer(small, np.uint8), cv2.IMREAD_COLOR)
        tensor = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        with torch.inference_mode():
            found = merge_faces(network, tensor, LABEL_SCORE)[0]
        parts.append(small)
        held.append(is_held_out(name.split("/")[0]))
        faces.append(found.numpy().astype(np.float32))
    blob, offsets = _join(parts)
    first = np.cumsum([0] + [len(rows) for rows in faces]).astype(np.int64)
    np.savez(
        out / "photos.npz",
        blob=blob,
        offsets=offsets,
        heldout=np.array(held),
        faces=np.concatenate(faces),
        first=first,
    )


def pack_things(folders: Sequence[Path], out: Path, limit: int = 0) -> None:
    """Pictures of things into ``out``/things.npz: cut-outs twice, on grounds of all kinds, and
    pieces of several sizes of what fills its picture."""
    rng = np.random.default_rng(77)
    parts: list[bytes] = []
    paths = sorted(path for folder in folders for path in folder.rglob("*"))
    pictures = [path for path in paths if path.suffix in (".png", ".jpg", ".webp")]
    for path in [p for p in pictures if not THINGS_LEFT_OUT.intersection(p.parts)][: limit or None]:
        picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if picture is None or picture.ndim != 3 or min(picture.shape[:2]) < 40:
            continue
        thing = np.asarray(picture if picture.dtype == np.uint8 else picture // 257, np.uint8)
        made = [_cut_out(rng, thing) for _ in range(2)]
        if thing.shape[2] == 3:
            made = [_piece(rng, thing, share) for share in (1, 0.6, 0.35, 0.2) * 2]
        for one in made:
            done, encoded = cv2.imencode(".webp", one, [cv2.IMWRITE_WEBP_QUALITY, THINGS_QUALITY])
            if not done:
                raise ValueError(f"{path} could not be re-encoded")
            parts.append(encoded.tobytes())
    blob, offsets = _join(parts)
    np.savez(out / "things.npz", blob=blob, offsets=offsets)


def _piece(rng: np.random.Generator, picture: U8, share: float) -> U8:
    side = max(1, int(min(picture.shape[:2]) * share))
    y, x = (int(rng.integers(0, size - side + 1)) for size in picture.shape[:2])
    piece = picture[y : y + side, x : x + side]
    return np.asarray(cv2.resize(piece, (THING, THING), interpolation=cv2.INTER_AREA), np.uint8)


def _cut_out(rng: np.random.Generator, thing: U8) -> U8:
    """A thing with (or without) an alpha channel on a plain, mottled or cluttered ground."""
    ground = np.full((THING, THING, 3), rng.uniform(0, 255, 3) if rng.random() < 0.5 else 255.0)
    if rng.random() < 0.5:
        ground = rng.choice([shapes, plain_ground])(rng, THING).astype(np.float64)
    size = THING * rng.uniform(0.7, 1.0)
    scale = size / max(thing.shape[:2])
    small = np.asarray(
        cv2.resize(
            thing, None, fx=scale, fy=scale,
            interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC,
        )
    )[:THING, :THING]  # fmt: skip
    y, x = (int(rng.integers(0, THING - length + 1)) for length in small.shape[:2])
    share = small[..., 3:] / 255 if small.shape[2] == 4 else np.ones((*small.shape[:2], 1))
    under = ground[y : y + len(small), x : x + small.shape[1]]
    under[:] = under * (1 - share) + small[..., :3] * share
    return np.asarray(ground.clip(0, 255), np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--things", type=Path, nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=0, help="so many of each set, for a trial")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    (out / "models").mkdir(parents=True, exist_ok=True)
    data, models = arguments.shared / "data", arguments.shared / "models"
    for name in MODELS:
        shutil.copyfile(models / name, out / "models" / name)
    pack_teacher(models, out / "models")
    pack_crops(data, out, arguments.limit)
    pack_photos(data, models, out, arguments.limit)
    packed = ["crops.npz", "photos.npz", *(f"models/{name}" for name in (*MODELS, TEACHER_FILE))]
    if arguments.things:
        pack_things(arguments.things, out, arguments.limit)
        packed.append("things.npz")
    sources = ["celeba299.npz", "lfw_train.npz", "lfw_train_photos.npz"]
    record = {
        "sources": {name: sha256(data / name) for name in sources},
        "packed": {name: sha256(out / name) for name in packed},
    }
    (out / "manifest.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
