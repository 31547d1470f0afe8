"""The command scales down what is above a server's limits, and says so."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from facelane.cli import stills


def written(path: Path, width: int, height: int) -> Path:
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2] = (255, 0, 0)
    assert cv2.imwrite(str(path), picture)
    return path


@pytest.mark.parametrize(
    ("name", "width", "height", "sent"),
    [
        ("photo.jpg", 8_160, 6_120, (4_080, 3_060)),
        ("wide.jpg", 12_000, 1_500, (11_313, 1_414)),
        ("scan.png", 4_100, 4_000, (4_049, 3_950)),
    ],
)
def test_it_is_scaled_down_and_told(
    name: str,
    width: int,
    height: int,
    sent: tuple[int, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = written(tmp_path / name, width, height)
    assert stills.dimensions(path.read_bytes()) == (width, height)
    picture = stills.load_picture(path)
    assert stills.dimensions(picture.data) == sent
    assert sent[0] * sent[1] <= 16_000_000
    found = stills.decode(picture.data)
    assert found[0, 0, 0] > 200 > 50 > found[-1, 0, 0], "the same picture"
    told = capsys.readouterr().err
    assert f"{width}x{height}" in told
    assert f"{sent[0]}x{sent[1]}" in told


def test_a_photo_on_its_side_is_turned_as_well(tmp_path: Path) -> None:
    data = written(tmp_path / "photo.jpg", 8_000, 4_200).read_bytes()
    tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    body = b"Exif\0\0" + tiff
    turned = data[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + data[2:]
    (tmp_path / "photo.jpg").write_bytes(turned)
    assert stills.dimensions(turned) == (8_000, 4_200), "a preview's size is not the picture's"
    width, height = stills.dimensions(stills.load_picture(tmp_path / "photo.jpg").data)
    assert (width, height) == (2_100, 4_000)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_what_a_server_takes_goes_as_it_is(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / f"picture{suffix}", 640, 480)
    assert stills.dimensions(path.read_bytes()) == (640, 480)
    assert stills.load_picture(path).data == path.read_bytes()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8" + b"\xff" * 9, b"\xff\xd8ab\xff\xd9"]
)
def test_dimensions_of_nothing(data: bytes) -> None:
    assert stills.dimensions(data) == (0, 0)


@pytest.mark.shared
def test_the_case_as_it_was_found(shared: Path) -> None:
    picture = stills.load_picture(shared / "cases/28-photo-of-50-megapixels/big.jpg")
    width, height = stills.dimensions(picture.data)
    assert 8_000_000 < width * height <= 16_000_000


@pytest.mark.shared
def test_a_png_on_its_side_is_turned(shared: Path) -> None:
    """Case 16; what the test makes itself is beside the folders' tests."""
    data = (shared / "cases/16-png-exif-orientation/exif6.png").read_bytes()
    assert stills.exif_orientation(data) == 6
