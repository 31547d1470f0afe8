"""A JPEG that lacks nothing but its end marker is whole; one that was cut off is not."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from facelane_server.domain import Encoding, FacelaneError, Reason
from facelane_server.modeltools.verify import synthetic_picture
from facelane_server.worker.decoding.pictures import decode, silence_opencv

KINDS = {
    "plain": [],
    "restarts": [cv2.IMWRITE_JPEG_RST_INTERVAL, 3],
    "progressive": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
}

silence_opencv()


def jpeg(picture: np.ndarray, kind: str = "plain", quality: int = 80) -> bytes:
    done, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality, *KINDS[kind]])
    assert done
    return data.tobytes()


def photo(height: int = 246, width: int = 330) -> np.ndarray:
    """Sides that are no multiple of a block's, content up to the last pixel."""
    noise = np.random.default_rng(1).integers(0, 60, (height, width, 3), np.uint8)
    return cv2.add(synthetic_picture(height, width, 3), noise)


def decoded(data: bytes) -> np.ndarray:
    return decode(memoryview(data), Encoding.JPEG)


def refused(data: bytes) -> Reason:
    with pytest.raises(FacelaneError) as caught:
        decoded(data)
    return caught.value.reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [b"", b"\xff", b"\xff\xff\xff"], ids=["none", "half", "fill"])
def test_without_the_end_marker_it_is_whole(kind: str, tail: bytes) -> None:
    data = jpeg(photo(), kind)
    assert np.array_equal(decoded(data[:-2] + tail), decoded(data))


def test_so_is_one_that_the_next_picture_follows_at_once() -> None:
    data = jpeg(photo())
    assert np.array_equal(decoded(data[:-2] + data), decoded(data))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.97, 0.995])
def test_a_cut_one_stays_refused(kind: str, kept: float) -> None:
    data = jpeg(photo(), kind)
    cut = data[: int(len(data) * kept)]
    assert refused(cut) is Reason.PICTURE_CORRUPT
    if kind != "progressive":  # whose early scans are a picture already, only blurred
        assert refused(cut + b"\xff\xd9") is Reason.PICTURE_CORRUPT


@pytest.mark.parametrize("interval", range(1, 9))
def test_a_cut_at_a_restart_is_seen_too(interval: int) -> None:
    data = jpeg(photo(), "restarts")
    at = data.index(bytes((0xFF, 0xD0 + interval % 8)), len(data) // 2)
    assert refused(data[:at]) is Reason.PICTURE_CORRUPT
    assert refused(data[:at] + b"\xff\xd9") is Reason.PICTURE_CORRUPT


@pytest.mark.parametrize("stray", [b"\0", b"stray", b"\xff\0\xff\0", bytes(300)])
def test_bytes_between_the_segments_are_passed_over(stray: bytes) -> None:
    """Old cameras write some; every decoder skips them."""
    data = jpeg(photo())
    for marker in (b"\xff\xdb", b"\xff\xc0", b"\xff\xc4", b"\xff\xda"):
        at = data.index(marker)
        assert np.array_equal(decoded(data[:at] + stray + data[at:]), decoded(data))


def test_the_first_picture_of_several_is_taken() -> None:
    """MPO, as telephones with two cameras write it, and motion photos: more follows the end."""
    first, second = jpeg(photo()), jpeg(photo(64, 64))
    index = b"\xff\xe2\x00\x0aMPF\0MM\0*"
    data = first[:2] + index + first[2:] + second + b"ftypmp42" + bytes(100)
    assert np.array_equal(decoded(data), decoded(first))


@pytest.mark.shared
def test_the_case_as_it_was_found(shared: Path) -> None:
    data = (shared / "cases/11-jpeg-without-eoi/noeoi.jpg").read_bytes()
    assert decoded(data).shape == (512, 512, 3)
