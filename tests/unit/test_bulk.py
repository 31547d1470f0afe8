"""Files that are far larger than their pixels could need."""

from __future__ import annotations

import random
import struct

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facelane_server import limits
from facelane_server.bulk import refuse_swollen
from facelane_server.domain import Encoding, FacelaneError, Reason

EXTRAS = bytes(limits.MAX_PICTURE_EXTRAS)
OF = {".png": Encoding.PNG, ".webp": Encoding.WEBP, ".jpg": Encoding.JPEG}


def file(suffix: str, width: int, height: int, flags: tuple[int, ...] = ()) -> bytes:
    noise = np.frombuffer(random.Random(1).randbytes(width * height * 3), np.uint8)
    ok, data = cv2.imencode(suffix, noise.reshape(height, width, 3), flags)
    assert ok
    return bytes(data)


def swollen(data: bytes, encoding: Encoding) -> bool:
    try:
        refuse_swollen(data, encoding)
    except FacelaneError as error:
        return error.reason is Reason.PICTURE_TOO_COSTLY
    return False


@pytest.mark.parametrize(
    ("suffix", "flags"),
    [(".png", ()), (".webp", (cv2.IMWRITE_WEBP_QUALITY, 101)), (".webp", (1, 90)), (".jpg", ())],
    ids=["png", "lossless", "lossy", "jpeg"],
)
def test_a_file_is_taken_whatever_its_pixels_and_a_swollen_one_is_not(
    suffix: str, flags: tuple[int, ...]
) -> None:
    encoding = OF[suffix]
    small = file(suffix, 64, 64, flags)
    assert not swollen(small, encoding)
    assert not swollen(small + EXTRAS[len(small) :], encoding), "profiles, texts, previews"
    # Where a JPEG says its size is found by a walk alone: that is the decoder's.
    assert swollen(small + EXTRAS + bytes(100_000), encoding) is (encoding is not Encoding.JPEG)
    large = file(suffix, 1_600, 1_200, flags)
    assert not swollen(large, encoding)
    assert not swollen(large + EXTRAS, encoding)


def test_a_canvas_counts() -> None:
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (63).to_bytes(3, "little") * 2
    assert swollen(b"RIFF" + bytes(4) + b"WEBP" + canvas + EXTRAS + bytes(30_000), Encoding.WEBP)


@given(st.binary(max_size=64), st.sampled_from([Encoding.PNG, Encoding.WEBP, Encoding.JPEG]))
def test_nothing_but_a_refusal(head: bytes, encoding: Encoding) -> None:
    swollen(head + EXTRAS, encoding)
    swollen(head, encoding)
