"""What lies on its side, by EXIF or a telephone's display matrix, is upright when it is sent."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from facelane_bridge.sources import SourceError, SourceReason
from tests.cases.cameras import failure, frames
from tests.cases.test_26_folders_told import lying

RED, BLUE = (0, 0, 255), (255, 0, 0)
SIDES = {
    1: (RED, BLUE), 2: (BLUE, RED), 3: (BLUE, RED), 4: (RED, BLUE),
    5: (RED, BLUE), 6: (RED, BLUE), 7: (BLUE, RED), 8: (BLUE, RED),
}  # fmt: skip
"""Of a picture, red at its left and blue at its right, that is to be turned so: left and right, or
from 5 on top and bottom."""


def near(pixel: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixel.astype(int) - colour).max() < 40)


def ends_of(data: bytes, *, upright: bool) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """Size, and what is at two opposite sides: left and right, or top and bottom."""
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    assert pixels is not None
    height, width = pixels.shape[:2]
    if upright:
        return (width, height), pixels[6, width // 2], pixels[-6, width // 2]
    return (width, height), pixels[height // 2, 6], pixels[height // 2, -6]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("max_side", [0, 32])
def test_stills_of_a_folder(suffix: str, orientation: int, max_side: int, tmp_path: Path) -> None:
    data = lying(suffix, orientation)
    (tmp_path / f"photo{suffix}").write_bytes(data)
    (frame,) = frames(str(tmp_path), 9, pace="fast", max_side=max_side)
    assert (frame.data == data) == (orientation == 1 and not max_side)
    size, first, last = ends_of(frame.data, upright=orientation > 4)
    long, short = (32, 24) if max_side else (64, 48)
    assert size == ((short, long) if orientation > 4 else (long, short))
    assert near(first, SIDES[orientation][0])
    assert near(last, SIDES[orientation][1])


def clip(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Red at its left and blue at its right, with a track's matrix."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32], pixels[:, 32:] = RED, BLUE
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="bgr24")))
        out.mux(stream.encode())
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = ((number << 16 & 0xFFFFFFFF).to_bytes(4, "big") for number in matrix)
    data[at : at + 36] = a + b + bytes(4) + c + d + bytes(12) + b"\x40\x00\x00\x00"
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize(
    ("matrix", "orientation"),
    [((0, 1, -1, 0), 6), ((-1, 0, 0, -1), 3), ((0, -1, 1, 0), 8), ((1, 0, 0, 1), 1)],
)
@pytest.mark.parametrize("video", ["auto", "decode"])
def test_a_telephone_s_video(
    matrix: tuple[int, int, int, int], orientation: int, video: str, tmp_path: Path
) -> None:
    path = clip(tmp_path / "clip.mp4", matrix)
    found = frames(str(path), 9, pace="fast", video=video)
    assert len(found) == 3
    assert {frame.video is None for frame in found} == {orientation > 1 or video == "decode"}
    if found[0].video is None:
        size, first, last = ends_of(found[0].data, upright=orientation > 4)
        assert size == ((48, 64) if orientation > 4 else (64, 48))
        assert near(first, SIDES[orientation][0])
        assert near(last, SIDES[orientation][1])


def test_what_cannot_be_turned_is_not_passed_on_where_that_is_wanted(tmp_path: Path) -> None:
    path = clip(tmp_path / "clip.mp4", (0, 1, -1, 0))
    error: SourceError = failure(str(path), pace="fast", video="pass")
    assert error.reason is SourceReason.NOT_PASSABLE
    assert "lie on their side" in error.message


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".jpe", ".jif", ".jfif"])
def test_a_jpeg_under_any_of_its_names(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"photo{suffix}").write_bytes(lying(".jpg", 1))
    assert len(frames(str(tmp_path), 9, pace="fast")) == 1
