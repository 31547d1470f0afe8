"""What a message may weigh before it is parsed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facelane.v1 import analysis_service_pb2 as pb
from facelane.v1 import face_pb2
from facelane.v1 import gallery_service_pb2 as gallery_pb
from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.edge import sizes
from facelane_server.edge.roles import METHODS

MOST = limits.MAX_PLAIN_MESSAGE_BYTES
FRAME = pb.AnalyzeStreamRequest(
    frame=pb.Frame(frame_id=1, picture=face_pb2.Picture(encoding=1, data=bytes(2 * MOST)))
).SerializeToString()
CONFIG = pb.AnalyzeStreamRequest(config=pb.StreamConfig(weight=1)).SerializeToString()
ZONES = pb.AnalyzeStreamRequest(
    config=pb.StreamConfig(zones=[pb.Zone()] * MOST)
).SerializeToString()


def refused(method: str, data: bytes) -> bool:
    try:
        sizes.checked(method)(data)
    except FacelaneError as error:
        return error.reason is Reason.ARGUMENT_INVALID
    return False


def test_every_method_has_a_bound() -> None:
    assert set(METHODS) > set(sizes.PICTURES)
    assert sizes.STREAM in METHODS
    for method in (*METHODS, "/unknown/Method"):
        large = method in sizes.PICTURES
        most = MOST if method.startswith("/facelane.") else limits.MAX_NAME_BYTES
        assert refused(method, bytes(most + 1)) is not large, method
        assert not refused(method, bytes(most))


@pytest.mark.parametrize(
    ("data", "too_long"),
    [
        (FRAME, False),
        (FRAME[:-1], False),
        (ZONES, True),
        (FRAME + ZONES, True),
        (CONFIG + FRAME, True),
        (FRAME * 3, False),
        (b"\x12\x00" * MOST, True),
        (b"\xff" * (MOST + 1), True),
        (b"\x0b" + bytes(MOST), True),
        (bytes(MOST + 1), True),
    ],
    ids=["frame", "cut", "zones", "hidden", "both", "merged", "many", "no-tag", "group", "zeros"],
)  # fmt: skip
def test_a_frame_may_be_large_and_a_config_may_not(data: bytes, too_long: bool) -> None:
    assert refused(sizes.STREAM, data) is too_long


BOMB = (
    b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 64, 64, 8, 2, 0, 0, 0) + bytes(4)
) + bytes(2 * limits.MAX_PICTURE_EXTRAS)
PNG, JPEG = face_pb2.PICTURE_ENCODING_PNG, face_pb2.PICTURE_ENCODING_JPEG
OF_METHODS = {
    "AnalysisService/AnalyzeImage": pb.AnalyzeImageRequest,
    "GalleryService/EnrollFace": gallery_pb.EnrollFaceRequest,
    "GalleryService/VerifyFace": gallery_pb.VerifyFaceRequest,
    "GalleryService/IdentifyFace": gallery_pb.IdentifyFaceRequest,
}


def reason(method: str, data: bytes) -> Reason | None:
    try:
        sizes.checked(f"/facelane.v1.{method}")(data)
    except FacelaneError as error:
        return error.reason
    return None


@pytest.mark.parametrize("method", OF_METHODS)
def test_a_swollen_picture_is_refused_before_it_is_parsed(method: str) -> None:
    def message(encoding: int, data: bytes) -> bytes:
        picture = face_pb2.Picture(encoding=encoding, data=data)  # type: ignore[arg-type]
        return bytes(OF_METHODS[method](picture=picture).SerializeToString())

    bomb = message(PNG, BOMB)
    assert reason(method, bomb) is Reason.PICTURE_TOO_COSTLY
    assert reason(method, message(JPEG, BOMB)) is None, "for the decoder"
    assert reason(method, message(PNG, BOMB[: limits.MAX_PICTURE_EXTRAS // 2])) is None
    assert set(OF_METHODS) == {name.removeprefix("/facelane.v1.") for name in sizes.PICTURES}


@given(st.binary(max_size=40), st.binary(max_size=40), st.sampled_from(sorted(OF_METHODS)))
def test_whatever_comes_is_for_the_parser(begin: bytes, end: bytes, method: str) -> None:
    """Only a swollen picture is refused here, and nothing breaks."""
    data = begin + end * (limits.MAX_PICTURE_EXTRAS // max(1, len(end)) + 2)
    assert reason(method, data) in (None, Reason.PICTURE_TOO_COSTLY)
