"""A stream's message is parsed around its picture, and means what protobuf says it does."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from facelane.v1 import analysis_service_pb2 as pb
from facelane.v1 import face_pb2
from facelane_server.edge import wire

JPEG = face_pb2.PICTURE_ENCODING_JPEG


@pytest.fixture(autouse=True, scope="module")
def everything_is_large() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "LEAST_BYTES", 1)
        yield


def put_together(parsed: wire.StreamMessage) -> pb.AnalyzeStreamRequest:
    whole = pb.AnalyzeStreamRequest()
    whole.CopyFrom(parsed.message)
    if whole.WhichOneof("message") == "frame" and parsed.data:
        whole.frame.picture.data = bytes(parsed.data)
    return whole


def agrees(data: bytes) -> wire.StreamMessage | None:
    """What was parsed; None where protobuf refuses the message, and this did too."""
    try:
        expected = pb.AnalyzeStreamRequest.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            wire.parse(data)
        return None
    parsed = wire.parse(data)
    assert put_together(parsed) == expected
    return parsed


frames = st.builds(
    lambda number, encoding, data, offset, size: pb.AnalyzeStreamRequest(
        frame=pb.Frame(
            frame_id=number,
            picture=face_pb2.Picture(
                encoding=encoding, data=data, width=size, height=size, stride=size
            ),
            stream_offset=None if offset is None else {"nanos": offset},
        )
    ),
    st.integers(0, 2**64 - 1),
    st.integers(0, 9),
    st.binary(max_size=300),
    st.none() | st.integers(0, 999_999_999),
    st.integers(0, 5_000),
)


def test_a_pictures_bytes_are_not_copied() -> None:
    whole = pb.AnalyzeStreamRequest(
        frame=pb.Frame(frame_id=7, picture=face_pb2.Picture(encoding=JPEG, data=b"\xff" * 40_000))
    ).SerializeToString()
    parsed = agrees(whole)
    assert parsed is not None
    assert isinstance(parsed.data, memoryview)
    assert parsed.data.obj is whole
    assert not parsed.message.frame.picture.data
    assert parsed.message.frame.frame_id == 7


def test_what_others_look_into_is_copied() -> None:
    for encoding in (face_pb2.PICTURE_ENCODING_H264, face_pb2.PICTURE_ENCODING_PNG, 99):
        picture = face_pb2.Picture(encoding=encoding, data=b"\1" * 40_000)
        whole = pb.AnalyzeStreamRequest(frame=pb.Frame(picture=picture)).SerializeToString()
        parsed = agrees(whole)
        assert parsed is not None
        assert isinstance(parsed.data, bytes)


def test_a_field_of_another_kind_is_no_picture() -> None:
    """A number where bytes should be is a field that nobody knows, and stays so."""
    fields = face_pb2.Picture.DESCRIPTOR.fields_by_name
    number = bytes([fields["encoding"].number << 3, JPEG, fields["data"].number << 3, 7])
    for body in (number, number + face_pb2.Picture(data=b"\1" * 99).SerializeToString()):
        sent = pb.Frame(frame_id=7, picture=face_pb2.Picture.FromString(body))
        parsed = agrees(pb.AnalyzeStreamRequest(frame=sent).SerializeToString())
        assert parsed is not None
        assert len(parsed.data) in (0, 99)


@given(frames)
def test_frames_mean_the_same(frame: pb.AnalyzeStreamRequest) -> None:
    assert agrees(frame.SerializeToString()) is not None


@given(st.lists(frames | st.just(pb.AnalyzeStreamRequest(config=pb.StreamConfig())), max_size=3))
def test_several_in_one_are_merged_as_ever(messages: list[pb.AnalyzeStreamRequest]) -> None:
    agrees(b"".join(message.SerializeToString() for message in messages))


@settings(max_examples=500)
@given(frames, st.data())
def test_damaged_messages_are_taken_or_refused_alike(
    frame: pb.AnalyzeStreamRequest, data: st.DataObject
) -> None:
    body = bytearray(frame.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body)))
        match data.draw(st.sampled_from(["cut", "insert", "change"])):
            case "cut":
                del body[at : at + data.draw(st.integers(1, 3))]
            case "insert":
                body[at:at] = data.draw(st.binary(min_size=1, max_size=12))
            case "change" if at < len(body):
                body[at] = data.draw(st.integers(0, 255))
    agrees(bytes(body))


@given(st.binary(max_size=60))
def test_anything_is_taken_or_refused_alike(data: bytes) -> None:
    agrees(data)
