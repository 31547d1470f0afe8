"""Pictures: what is refused, with which reason, before and after decoding."""

from __future__ import annotations

import contextlib
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from facelane_server.domain import Encoding, FacelaneError, Reason
from facelane_server.modeltools.verify import synthetic_picture
from facelane_server.worker.decoding.headers import examine, sniff
from facelane_server.worker.decoding.pictures import decode, silence_opencv

PICTURE = synthetic_picture(96, 128, 3)
COMPRESSED = [Encoding.JPEG, Encoding.PNG, Encoding.WEBP]
MAX = 1_000_000

silence_opencv()


def encoded(encoding: Encoding, picture: np.ndarray = PICTURE, *parameters: int) -> bytes:
    ok, data = cv2.imencode(f".{encoding.value}", picture, list(parameters))
    assert ok
    return data.tobytes()


def reason_of(data: bytes, encoding: Encoding, **raw: int) -> Reason:
    with pytest.raises(FacelaneError) as caught:
        decode(memoryview(data), encoding, **{"max_pixels": MAX, **raw})
    return caught.value.reason


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", body)
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + png_chunk(b"IEND", b"")
    )


def jpeg_resized(width: int, height: int) -> bytes:
    """A real JPEG whose header claims another size."""
    data = bytearray(encoded(Encoding.JPEG))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("encoding", COMPRESSED)
def test_what_is_whole_is_decoded(encoding: Encoding) -> None:
    data = encoded(encoding)
    picture = decode(memoryview(data), encoding, max_pixels=MAX)
    assert picture.shape == PICTURE.shape
    assert picture.dtype == np.uint8
    assert picture.flags.c_contiguous
    error = np.abs(picture.astype(int) - PICTURE).mean()
    assert error < (0.01 if encoding is Encoding.PNG else 12)


@pytest.mark.parametrize(
    ("encoding", "parameters"),
    [
        (Encoding.JPEG, (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)),
        (Encoding.JPEG, (cv2.IMWRITE_JPEG_RST_INTERVAL, 4)),
        (Encoding.WEBP, (cv2.IMWRITE_WEBP_QUALITY, 50)),
        (Encoding.WEBP, (cv2.IMWRITE_WEBP_QUALITY, 101)),
    ],
)
def test_variants_of_the_formats(encoding: Encoding, parameters: tuple[int, ...]) -> None:
    data = encoded(encoding, PICTURE, *parameters)
    header = examine(memoryview(data), encoding)
    assert (header.width, header.height) == (128, 96)
    assert decode(memoryview(data), encoding).shape == (96, 128, 3)


@pytest.mark.parametrize("shape", [(96, 128), (96, 128, 4)])
def test_grey_and_alpha_become_bgr(shape: tuple[int, ...]) -> None:
    data = encoded(Encoding.PNG, np.full(shape, 77, np.uint8))
    assert decode(memoryview(data), Encoding.PNG).shape == (96, 128, 3)


@pytest.mark.parametrize("encoding", COMPRESSED)
def test_bytes_after_the_end_are_legal(encoding: Encoding) -> None:
    data = encoded(encoding) + b"after the end \xff\xd8\xff"
    assert decode(memoryview(data), encoding).shape == PICTURE.shape


@pytest.mark.parametrize("encoding", COMPRESSED)
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_a_picture_cut_off_is_refused(encoding: Encoding, kept: float) -> None:
    data = encoded(encoding)
    assert reason_of(data[: int(len(data) * kept)], encoding) is Reason.PICTURE_CORRUPT


@pytest.mark.parametrize("kept", [0.2, 0.4, 0.6, 0.9])
def test_missing_jpeg_data_under_an_end_marker_are_refused(kept: float) -> None:
    noisy = np.random.default_rng(1).integers(0, 100, (256, 256, 3), np.uint8)
    data = encoded(Encoding.JPEG, noisy)
    assert (
        reason_of(data[: int(len(data) * kept)] + b"\xff\xd9", Encoding.JPEG)
        is Reason.PICTURE_CORRUPT
    )


def test_a_grey_canvas_is_no_damage() -> None:
    canvas = np.full((240, 320, 3), 128, np.uint8)
    canvas[40:136, 50:178] = PICTURE
    for picture in (canvas, np.full((64, 64, 3), 128, np.uint8)):
        data = encoded(Encoding.JPEG, picture)
        assert decode(memoryview(data), Encoding.JPEG).shape == picture.shape


def test_a_jpeg_that_lies_about_its_size() -> None:
    assert reason_of(jpeg_resized(128, 200), Encoding.JPEG) is Reason.PICTURE_CORRUPT
    assert reason_of(jpeg_resized(10_000, 10_000), Encoding.JPEG, max_pixels=0) in (
        Reason.PICTURE_CORRUPT,
        Reason.PICTURE_TOO_LARGE,
    )
    assert reason_of(jpeg_resized(16_000, 3_000), Encoding.JPEG, max_pixels=50_000_000) is (
        Reason.PICTURE_CORRUPT
    )


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (0, 0, Reason.PICTURE_TOO_SMALL),
        (1, 1, Reason.PICTURE_TOO_SMALL),
        (15, 4000, Reason.PICTURE_TOO_SMALL),
        (10_000, 10_000, Reason.PICTURE_TOO_LARGE),
        (20_000, 20, Reason.PICTURE_TOO_LARGE),
        (2**31 - 1, 2**31 - 1, Reason.PICTURE_TOO_LARGE),
    ],
)
def test_sizes_are_refused_before_anything_is_decoded(
    width: int, height: int, reason: Reason
) -> None:
    assert reason_of(png_header(width, height), Encoding.PNG) is reason


def test_a_wrong_checksum_is_refused() -> None:
    data = bytearray(encoded(Encoding.PNG))
    data[data.index(b"IDAT") + 40] ^= 1
    assert reason_of(bytes(data), Encoding.PNG) is Reason.PICTURE_CORRUPT


def test_an_animation_is_unsupported() -> None:
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + b"\x7f\0\0\x5f\0\0"
    data = b"RIFF" + struct.pack("<I", len(body)) + body
    assert reason_of(data, Encoding.WEBP) is Reason.ENCODING_UNSUPPORTED


@pytest.mark.parametrize("claimed", COMPRESSED)
@pytest.mark.parametrize("actual", COMPRESSED)
def test_the_encoding_must_be_true(claimed: Encoding, actual: Encoding) -> None:
    data = encoded(actual)
    assert sniff(memoryview(data)) is actual
    if claimed is not actual:
        assert reason_of(data, claimed) is Reason.ENCODING_MISMATCH


@pytest.mark.parametrize("encoding", list(Encoding))
def test_nothing_is_no_picture(encoding: Encoding) -> None:
    assert reason_of(b"", encoding, width=64, height=64) is Reason.PICTURE_EMPTY


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", [Encoding.BGR24, Encoding.RGB24])
def test_raw_pictures(encoding: Encoding, padding: int) -> None:
    source = PICTURE if encoding is Encoding.BGR24 else PICTURE[..., ::-1]
    rows = np.zeros((96, 128 * 3 + padding), np.uint8)
    rows[:, : 128 * 3] = source.reshape(96, -1)
    stride = rows.shape[1] if padding else 0
    picture = decode(memoryview(rows.tobytes()), encoding, width=128, height=96, stride=stride)
    assert np.array_equal(picture, PICTURE)


@pytest.mark.parametrize("padding", [0, 6])
def test_nv12(padding: int) -> None:
    i420 = cv2.cvtColor(cv2.GaussianBlur(PICTURE, (0, 0), 3), cv2.COLOR_BGR2YUV_I420)
    chroma = i420[96:].reshape(2, 48, 64)
    rows = np.zeros((144, 128 + padding), np.uint8)
    rows[:96, :128] = i420[:96]
    rows[96:, :128] = chroma.transpose(1, 2, 0).reshape(48, 128)
    picture = decode(
        memoryview(rows.tobytes()), Encoding.NV12, width=128, height=96, stride=128 + padding
    )
    expected = cv2.cvtColor(i420, cv2.COLOR_YUV2BGR_I420)
    assert np.abs(picture.astype(int) - expected).max() <= 2


@pytest.mark.parametrize(
    ("encoding", "raw"),
    [
        (Encoding.BGR24, {"width": 128, "height": 95}),
        (Encoding.BGR24, {"width": 127, "height": 96}),
        (Encoding.BGR24, {"width": 128, "height": 96, "stride": 383}),
        (Encoding.BGR24, {"width": 128, "height": 96, "stride": 385}),
        (Encoding.BGR24, {"width": 128, "height": 96, "stride": -384}),
        (Encoding.BGR24, {"width": -128, "height": -96}),
        (Encoding.BGR24, {"width": 0, "height": 96}),
        (Encoding.RGB24, {"width": 96, "height": 128, "stride": 128 * 3}),
        (Encoding.NV12, {"width": 128, "height": 96}),
        (Encoding.NV12, {"width": 127, "height": 96}),
    ],
)
def test_a_raw_layout_that_does_not_add_up(encoding: Encoding, raw: dict[str, int]) -> None:
    assert reason_of(PICTURE.tobytes(), encoding, **raw) is Reason.RAW_LAYOUT_INVALID


def test_exif_orientation_is_not_applied() -> None:
    """The contract of the protocol: pixels as stored."""
    data = encoded(Encoding.JPEG)
    tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    body = b"Exif\0\0" + tiff
    turned = data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
    assert decode(memoryview(turned), Encoding.JPEG).shape == (96, 128, 3)
    assert cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR).shape == (128, 96, 3)


def survives(data: bytes, encoding: Encoding, **raw: int) -> None:
    """Anything but FacelaneError fails the test."""
    with contextlib.suppress(FacelaneError):
        picture = decode(memoryview(data), encoding, **{"max_pixels": MAX, **raw})
        assert picture.ndim == 3
        assert 16 * 16 <= picture.shape[0] * picture.shape[1] <= MAX


@settings(max_examples=300)
@given(data=st.binary(max_size=400), encoding=st.sampled_from(list(Encoding)))
@example(data=b"\xff\xd8\xff", encoding=Encoding.JPEG)
@example(data=b"\xff\xd8\xff\xda\x00\x02\xff\xff\xff", encoding=Encoding.JPEG)
@example(data=b"\x89PNG\r\n\x1a\n", encoding=Encoding.PNG)
@example(data=b"RIFF\x04\0\0\0WEBP", encoding=Encoding.WEBP)
def test_arbitrary_bytes_raise_nothing_else(data: bytes, encoding: Encoding) -> None:
    magic = {
        Encoding.JPEG: b"\xff\xd8\xff",
        Encoding.PNG: b"\x89PNG\r\n\x1a\n",
        Encoding.WEBP: b"RIFF\x40\0\0\0WEBP",
    }
    survives(data, encoding, width=7, height=9)
    survives(magic.get(encoding, b"") + data, encoding, width=16, height=16)


@settings(max_examples=300)
@given(
    encoding=st.sampled_from(COMPRESSED),
    edits=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8),
    kept=st.floats(0, 1),
)
def test_damaged_pictures_raise_nothing_else(
    encoding: Encoding, edits: list[tuple[float, int]], kept: float
) -> None:
    data = bytearray(encoded(encoding))
    for where, value in edits:
        data[int(where * len(data))] = value
    survives(bytes(data[: int(kept * len(data))]), encoding)
