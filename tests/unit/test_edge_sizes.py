"""What a message may weigh before it is parsed."""

from __future__ import annotations

import pytest

from facelane.v1 import analysis_service_pb2 as pb
from facelane.v1 import face_pb2
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
    assert set(METHODS) > sizes.PICTURES
    assert sizes.STREAM in METHODS
    for method in (*METHODS, "/unknown/Method"):
        large = method in sizes.PICTURES
        assert refused(method, bytes(MOST + 1)) is not large, method
        assert not refused(method, bytes(MOST))


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
