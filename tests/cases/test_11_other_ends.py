"""A PNG or a WebP that lacks nothing but its end, or tells another length than it has, is whole."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from facelane_server.domain import Encoding, FacelaneError, Reason
from facelane_server.worker.decoding.pictures import decode
from tests.cases.test_11_jpeg_without_an_end import photo

LENGTHS = {"none": 0, "one more": 1, "unknown": 0xFFFFFFFF, "too small": 4}


def encoded(suffix: str, *options: int) -> bytes:
    done, data = cv2.imencode(suffix, photo(), options)
    assert done
    return data.tobytes()


def refused(data: bytes, encoding: Encoding) -> bool:
    with pytest.raises(FacelaneError) as caught:
        decode(memoryview(data), encoding)
    return caught.value.reason is Reason.PICTURE_CORRUPT


@pytest.mark.parametrize("left", range(12))
def test_a_png_without_all_of_its_last_chunk(left: int) -> None:
    data = encoded(".png")
    assert np.array_equal(decode(memoryview(data[: len(data) - 12 + left]), Encoding.PNG), photo())


@pytest.mark.parametrize("missing", [13, 16, 17, 400])
def test_a_png_that_was_cut_stays_refused(missing: int) -> None:
    assert refused(encoded(".png")[:-missing], Encoding.PNG)


def webp(odd: bool) -> bytes:
    """Whose chunk has an odd number of bytes, and its padding behind it, or an even one."""
    found = (encoded(".webp", cv2.IMWRITE_WEBP_QUALITY, quality) for quality in range(80, 20, -1))
    if not odd:
        return next(found)
    # libwebp writes the padding into the chunk.
    padded = next(data for data in found if data[-1] == 0)
    size = int.from_bytes(padded[16:20], "little") - 1
    return padded[:16] + size.to_bytes(4, "little") + padded[20:]


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("quality", [80, 101])
@pytest.mark.parametrize("odd", [True, False])
def test_a_webp_of_another_length(odd: bool, quality: int, length: int) -> None:
    data = webp(odd) if quality < 101 else encoded(".webp", cv2.IMWRITE_WEBP_QUALITY, 101)
    told = length if length != 1 else len(data) - 7
    wrong = data[:4] + told.to_bytes(4, "little") + data[8:]
    whole = decode(memoryview(data), Encoding.WEBP)
    assert np.array_equal(decode(memoryview(wrong), Encoding.WEBP), whole)


def test_a_webp_without_its_padding() -> None:
    data = webp(True)
    whole = decode(memoryview(data), Encoding.WEBP)
    assert np.array_equal(decode(memoryview(data[:-1]), Encoding.WEBP), whole)


@pytest.mark.parametrize("length", [None, *LENGTHS.values()])
@pytest.mark.parametrize("missing", [2, 3, 500])
def test_a_webp_that_was_cut_stays_refused(missing: int, length: int | None) -> None:
    data = webp(False)[:-missing]
    if length is not None:
        data = data[:4] + length.to_bytes(4, "little") + data[8:]
    assert refused(data, Encoding.WEBP)
