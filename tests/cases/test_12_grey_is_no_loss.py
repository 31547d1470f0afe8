"""Grey borders, privacy masks and grey pictures are pictures; what is missing is not grey."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from facelane_server.domain import Encoding, Reason
from facelane_server.worker.decoding.pictures import decode
from tests.cases.test_11_jpeg_without_an_end import KINDS, decoded, jpeg, photo, refused


def letterboxed(rows: int) -> np.ndarray:
    return cv2.copyMakeBorder(photo(), 0, rows, 0, 0, cv2.BORDER_CONSTANT, value=(128,) * 3)


def masked(left: int) -> np.ndarray:
    picture = photo()
    picture[150:, left:] = 128
    return picture


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "picture",
    [
        letterboxed(80),
        letterboxed(10),
        letterboxed(74)[:, :, 0],
        masked(0),
        masked(200),
        np.full((64, 64, 3), 128, np.uint8),
    ],
    ids=["letterbox", "thin border", "grey letterbox", "mask", "mask in a corner", "all grey"],
)
def test_grey_of_its_own_is_kept(kind: str, picture: np.ndarray) -> None:
    data = jpeg(picture, kind)
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(decoded(data), expected)
    assert np.array_equal(decoded(data[:-2]), expected), "nor does it need an end marker"


@pytest.mark.parametrize("kind", ["plain", "restarts"])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.8])
def test_what_is_missing_under_grey_is_seen(kind: str, kept: float) -> None:
    """The border is grey, and so is a decoder's filler; a part of the photo is gone."""
    data = jpeg(letterboxed(80), kind)
    cut = data[: int(len(data) * kept)]
    assert refused(cut + b"\xff\xd9") is Reason.PICTURE_CORRUPT


@pytest.mark.parametrize("name", ["letterbox444.jpg", "letterbox-grey.jpg"])
@pytest.mark.shared
def test_the_case_as_it_was_found(name: str, shared: Path) -> None:
    assert decoded((shared / "cases/12-jpeg-grey-letterbox" / name).read_bytes()).shape[0] == 640


# -- colours of other kinds -----------------------------------------------------------------


def test_see_through_parts_lie_on_white(tmp_path: Path) -> None:
    photo_ = photo()
    alpha = np.full(photo_.shape[:2], 255, np.uint8)
    alpha[:100] = 0
    alpha[100:110] = 128
    done, data = cv2.imencode(".png", np.dstack((photo_, alpha)))
    assert done
    found = decode(memoryview(data.tobytes()), Encoding.PNG)
    assert (found[:100] == 255).all(), "what nobody sees is not looked at either"
    assert np.array_equal(found[110:], photo_[110:])
    half = (photo_[100:110].astype(int) + 255) / 2
    assert np.abs(found[100:110] - half).max() <= 2


@pytest.mark.parametrize("value", [0, 255])
def test_a_fourth_byte_without_a_meaning_changes_nothing(value: int) -> None:
    wide = np.dstack((photo(), np.full(photo().shape[:2], value, np.uint8)))
    done, data = cv2.imencode(".png", wide)
    assert done
    assert np.array_equal(decode(memoryview(data.tobytes()), Encoding.PNG), photo())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_become_eight(channels: int) -> None:
    eight = np.dstack((photo(), np.full(photo().shape[:2], 255, np.uint8)))[..., :channels]
    sixteen = eight.astype(np.uint16) * 257
    done, data = cv2.imencode(".png", sixteen)
    assert done
    found = decode(memoryview(data.tobytes()), Encoding.PNG)
    expected = np.repeat(eight, 3, axis=2) if channels == 1 else eight[..., :3]
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "LA", "1"])
def test_modes_that_printers_and_scanners_write(mode: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    smooth = cv2.GaussianBlur(photo(), (0, 0), 3)
    source = image.fromarray(np.ascontiguousarray(smooth[..., ::-1]))
    suffix, encoding = (".jpg", Encoding.JPEG) if mode == "CMYK" else (".png", Encoding.PNG)
    path = tmp_path / f"picture{suffix}"
    converted = source.convert(mode)
    converted.save(path, quality=95)
    found = decode(memoryview(path.read_bytes()), encoding)
    expected = np.asarray(converted.convert("RGB"))[..., ::-1]
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 4
