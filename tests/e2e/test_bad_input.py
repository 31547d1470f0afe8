"""Bad input gets a clear error, in its place in the stream, and hurts nobody else."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, timestamp_pb2
from tests.e2e import wire
from tests.running_server import RunningServer

import facelane
from facelane.v1 import analysis_service_pb2 as pb
from facelane.v1 import analysis_service_pb2_grpc as pb_grpc
from facelane.v1 import face_pb2
from facelane.v1 import gallery_service_pb2 as gallery_pb
from facelane.v1 import gallery_service_pb2_grpc as gallery_grpc

JPEG, PNG, WEBP, BGR, RGB, NV12 = 1, 2, 3, 4, 5, 6
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def png_claiming(width: int, height: int) -> bytes:
    """A PNG with a valid header of any size and next to nothing in it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 64)), chunk(b"IEND", b"")]
    )


def raw(encoding: int, width: int, height: int, size: int, stride: int = 0) -> face_pb2.Picture:
    return wire.pb_picture(bytes(size), encoding, width=width, height=height, stride=stride)


WHOLE = wire.encoded()
BAD_PICTURES: dict[str, tuple[face_pb2.Picture, str]] = {
    "no bytes": (wire.pb_picture(b""), "PICTURE_EMPTY"),
    "no picture": (face_pb2.Picture(), "ENCODING_UNSUPPORTED"),
    "an encoding of tomorrow": (wire.pb_picture(WHOLE, 99), "ENCODING_UNSUPPORTED"),
    "a truncated JPEG": (wire.pb_picture(WHOLE[: len(WHOLE) // 2]), "PICTURE_CORRUPT"),
    "a JPEG cut in its header": (wire.pb_picture(WHOLE[:20]), "PICTURE_CORRUPT"),
    "a JPEG of three bytes": (wire.pb_picture(WHOLE[:3]), "PICTURE_CORRUPT"),
    "a JPEG that lies about its size": (
        wire.pb_picture(wire.jpeg_claiming(4000, 3000)),
        "PICTURE_CORRUPT",
    ),
    "a JPEG header of 100 megapixels before no data": (
        wire.pb_picture(wire.jpeg_claiming(10_000, 10_000)),
        "PICTURE_TOO_LARGE",
    ),
    "a JPEG of 100 megapixels": (
        wire.pb_picture(wire.jpeg_claiming(10_000, 10_000)[:-2] + bytes(1 << 20) + b"\xff\xd9"),
        "PICTURE_TOO_LARGE",
    ),
    "a PNG of 100 megapixels": (
        wire.pb_picture(png_claiming(10_000, 10_000), PNG),
        "PICTURE_TOO_LARGE",
    ),
    "a PNG of 2^31 pixels a side": (
        wire.pb_picture(png_claiming(2**31 - 1, 2**31 - 1), PNG),
        "PICTURE_TOO_LARGE",
    ),
    "a JPEG of 0x0": (wire.pb_picture(wire.jpeg_claiming(0, 0)), "PICTURE_TOO_SMALL"),
    "a PNG of 0x0": (wire.pb_picture(png_claiming(0, 0), PNG), "PICTURE_TOO_SMALL"),
    "a JPEG of 1x1": (wire.pb_picture(wire.encoded(1, 1)), "PICTURE_TOO_SMALL"),
    "a WebP of 1x1": (wire.pb_picture(wire.encoded(1, 1, 0, ".webp"), WEBP), "PICTURE_TOO_SMALL"),
    "a PNG said to be a JPEG": (
        wire.pb_picture(wire.encoded(suffix=".png"), JPEG),
        "ENCODING_MISMATCH",
    ),
    "text": (wire.pb_picture(b"no picture at all " * 10), "ENCODING_MISMATCH"),
    "a PNG with a flipped bit": (
        wire.pb_picture(
            (png := wire.encoded(suffix=".png"))[:60] + bytes([png[60] ^ 1]) + png[61:], PNG
        ),
        "PICTURE_CORRUPT",
    ),
    "raw without a size": (raw(BGR, 0, 0, 64 * 64 * 3), "RAW_LAYOUT_INVALID"),
    "raw with a byte too few": (raw(BGR, 64, 64, 64 * 64 * 3 - 1), "RAW_LAYOUT_INVALID"),
    "raw with rows too many": (raw(RGB, 64, 64, 64 * 80 * 3), "RAW_LAYOUT_INVALID"),
    "raw with a stride below a row": (raw(BGR, 64, 64, 64 * 64 * 3, 191), "RAW_LAYOUT_INVALID"),
    "raw with a stride beyond its bytes": (
        raw(BGR, 64, 64, 64 * 64 * 3, 256),
        "RAW_LAYOUT_INVALID",
    ),
    "raw of 2^32 pixels a side": (
        raw(BGR, 2**32 - 1, 2**32 - 1, 64 * 64 * 3),
        "PICTURE_TOO_LARGE",
    ),
    "NV12 without its colours": (raw(NV12, 64, 64, 64 * 64), "RAW_LAYOUT_INVALID"),
    "NV12 of an odd size": (raw(NV12, 63, 63, 63 * 63 * 3 // 2), "RAW_LAYOUT_INVALID"),
    "raw of 1x1": (raw(BGR, 1, 1, 3), "PICTURE_TOO_SMALL"),
    "more bytes than a picture may have": (
        wire.pb_picture(WHOLE + bytes(17 << 20)),
        "PICTURE_TOO_LARGE",
    ),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_an_error_in_its_place(channel: grpc.Channel, name: str) -> None:
    bad, reason = BAD_PICTURES[name]
    with wire.RawStream(channel) as stream:
        stream.open()
        stream.write(wire.frame(1), wire.frame(2, bad), wire.frame(3))
        *told, last = stream.rest()
        outcomes = [m.outcome for m in told if m.WhichOneof("message") == "outcome"]
    assert [o.frame_id for o in outcomes] == [1, 2, 3]
    assert [o.WhichOneof("outcome") for o in outcomes] == ["result", "error", "result"]
    assert wire.reason_of(outcomes[1].error) == reason
    summary = last.summary
    assert (summary.received, summary.results, summary.drops, summary.errors) == (3, 2, 0, 1)
    assert stream.call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_refuses_a_single_call(channel: grpc.Channel, name: str) -> None:
    bad, reason = BAD_PICTURES[name]
    analysis = pb_grpc.AnalysisServiceStub(channel)
    with pytest.raises(grpc.RpcError) as refused:
        analysis.AnalyzeImage(pb.AnalyzeImageRequest(picture=bad), timeout=wire.CALL_S)
    assert wire.refusal(refused.value) == (INVALID, reason)


def test_a_bad_picture_enrols_nobody(channel: grpc.Channel) -> None:
    gallery = gallery_grpc.GalleryServiceStub(channel)
    bad, reason = BAD_PICTURES["a truncated JPEG"]
    request = gallery_pb.EnrollFaceRequest(subject_id="cut-off", picture=bad, create_subject=True)
    with pytest.raises(grpc.RpcError) as refused:
        gallery.EnrollFace(request, timeout=wire.CALL_S)
    assert wire.refusal(refused.value) == (INVALID, reason)
    with pytest.raises(grpc.RpcError) as missing:
        gallery.GetSubject(gallery_pb.GetSubjectRequest(subject_id="cut-off"), timeout=wire.CALL_S)
    assert wire.refusal(missing.value) == (grpc.StatusCode.NOT_FOUND, "SUBJECT_NOT_FOUND")


@pytest.mark.parametrize("encoding", [JPEG, PNG, WEBP, BGR, RGB, NV12])
def test_good_pictures_of_every_encoding_are_taken(channel: grpc.Channel, encoding: int) -> None:
    suffix = {JPEG: ".jpg", PNG: ".png", WEBP: ".webp"}
    body = (
        wire.pb_picture(wire.encoded(suffix=suffix[encoding]), encoding)
        if encoding in suffix
        else raw(encoding, 64, 48, 64 * 48 * 3 // (2 if encoding == NV12 else 1))
    )
    with wire.RawStream(channel) as stream:
        stream.open()
        stream.write(wire.frame(7, body))
        outcome = stream.outcome()
    assert outcome.frame_id == 7
    size = (outcome.result.width, outcome.result.height)
    assert size == ((96, 80) if encoding in suffix else (64, 48))
    assert len(outcome.result.faces) == 1


def test_a_padded_stride_is_taken(channel: grpc.Channel) -> None:
    with wire.RawStream(channel) as stream:
        stream.open()
        # The last row may end with its pixels, or with its padding.
        stream.write(wire.frame(1, raw(BGR, 64, 48, 256 * 48, 256)))
        outcome = stream.outcome()
    assert outcome.WhichOneof("outcome") == "result", outcome


# -- the order of messages -----------------------------------------------------------------


def test_a_frame_before_the_config_ends_the_stream(channel: grpc.Channel) -> None:
    with wire.RawStream(channel) as stream:
        stream.write(wire.frame(1))
        assert stream.failure() == (INVALID, "CONFIG_MISSING")


def test_a_stream_without_any_message_is_refused(channel: grpc.Channel) -> None:
    with wire.RawStream(channel) as stream:
        stream.half_close()
        assert stream.failure() == (INVALID, "CONFIG_MISSING")


def test_a_second_config_ends_the_stream(channel: grpc.Channel) -> None:
    with wire.RawStream(channel) as stream:
        stream.open()
        stream.write(wire.config())
        assert stream.failure() == (INVALID, "CONFIG_REPEATED")


def test_an_empty_message_ends_the_stream(channel: grpc.Channel) -> None:
    with wire.RawStream(channel) as stream:
        stream.open()
        stream.write(pb.AnalyzeStreamRequest())
        assert stream.failure() == (INVALID, "MESSAGE_EMPTY")


@pytest.mark.parametrize("second", [5, 4, 0])
def test_frame_ids_that_go_back_end_the_stream(channel: grpc.Channel, second: int) -> None:
    with wire.RawStream(channel) as stream:
        stream.open()
        stream.write(wire.frame(5))
        assert stream.outcome().frame_id == 5
        stream.write(wire.frame(second))
        assert stream.failure() == (INVALID, "FRAME_ID_NOT_INCREASING")


def test_the_extreme_frame_ids(channel: grpc.Channel) -> None:
    with wire.RawStream(channel) as stream:
        stream.open()
        stream.write(wire.frame(0), wire.frame(2**64 - 1))
        assert [stream.outcome().frame_id for _ in range(2)] == [0, 2**64 - 1]


BAD_CONFIGS: dict[str, dict[str, Any]] = {
    "a source with a slash": {"source_id": "door/1"},
    "a source of 65 letters": {"source_id": "d" * 65},
    "a weight of 101": {"weight": 101},
    "a policy of tomorrow": {"overload_policy": 9},
    "an age of nothing": {"max_frame_age": duration_pb2.Duration()},
    "an age of a day": {"max_frame_age": duration_pb2.Duration(seconds=86_400)},
    "an age that is no duration": {"max_frame_age": duration_pb2.Duration(seconds=2**62)},
    "a negative interval": {"reinference_interval": duration_pb2.Duration(seconds=-1)},
    "too many candidates": {"options": pb.AnalysisOptions(max_candidates=11)},
    "a gallery with a space": {"options": pb.AnalysisOptions(gallery_id="a b")},
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_ends_the_stream(channel: grpc.Channel, name: str) -> None:
    with wire.RawStream(channel) as stream:
        stream.write(wire.config(**BAD_CONFIGS[name]))
        assert stream.failure() == (INVALID, "CONFIG_INVALID")


BAD_TIMES: dict[str, dict[str, Any]] = {
    "media time that goes back": {"stream_offset": duration_pb2.Duration(seconds=1)},
    "negative media time": {"stream_offset": duration_pb2.Duration(seconds=-1, nanos=-5)},
    "media time beyond any duration": {"stream_offset": duration_pb2.Duration(seconds=2**63 - 1)},
    "nanoseconds beyond a second": {"stream_offset": duration_pb2.Duration(nanos=2**31 - 1)},
    "a capture time beyond any calendar": {
        "capture_time": timestamp_pb2.Timestamp(seconds=2**63 - 1, nanos=2**31 - 1),
    },
    "a negative fraction of a capture time": {"capture_time": timestamp_pb2.Timestamp(nanos=-1)},
}


@pytest.mark.parametrize("name", BAD_TIMES)
def test_a_bad_time_is_an_error_of_its_frame(channel: grpc.Channel, name: str) -> None:
    late = {"stream_offset": duration_pb2.Duration(seconds=10)}
    with wire.RawStream(channel) as stream:
        stream.open()
        stream.write(
            wire.frame(1, **late),
            wire.frame(2, **{**late, **BAD_TIMES[name]}),
            wire.frame(3, **late),
        )
        outcomes = [stream.outcome() for _ in range(3)]
        assert [o.WhichOneof("outcome") for o in outcomes] == ["result", "error", "result"]
        assert wire.reason_of(outcomes[1].error) == "ARGUMENT_INVALID"
        assert stream.rest()[-1].summary.received == 3


def test_times_are_echoed_to_the_nanosecond(channel: grpc.Channel) -> None:
    offset = duration_pb2.Duration(seconds=3, nanos=999_999_999)
    captured = timestamp_pb2.Timestamp(seconds=-5, nanos=7)
    with wire.RawStream(channel) as stream:
        stream.open()
        stream.write(wire.frame(1, stream_offset=offset, capture_time=captured), wire.frame(2))
        outcome = stream.outcome()
    assert (outcome.stream_offset, outcome.capture_time) == (offset, captured)
    assert 0 <= outcome.age.ToNanoseconds() < 10**10


# -- sizes ---------------------------------------------------------------------------------


def test_a_message_of_64_mb_ends_its_own_call_alone(
    server: RunningServer, channel: grpc.Channel, client: facelane.Client
) -> None:
    with wire.channel(server.target) as other, wire.RawStream(other) as neighbour:
        neighbour.open()
        with wire.RawStream(channel) as stream:
            stream.open()
            stream.write(wire.frame(1), wire.frame(2, wire.pb_picture(bytes(64 << 20))))
            with pytest.raises(grpc.RpcError) as refused:
                for _ in stream.call:
                    pass
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        neighbour.write(wire.frame(1))
        assert neighbour.outcome().WhichOneof("outcome") == "result"
    assert len(client.analyze_image(wire.picture()).faces) == 1


MANY = 2_000_000
SWOLLEN = {
    "AnalysisService/AnalyzeStream": b"\x0a" + b"\x80\x89\x7a" + b"\x52\x00" * (MANY // 2),
    "EventService/WatchEvents": b"\x10\x01" * MANY,
    "GalleryService/CreateSubject": b"\x22\x00" * MANY,
    "GalleryService/UpdateSubject": b"\x12\x02\x0a\x00" * MANY,
    "GalleryService/ListSubjects": b"\x12\x00" * MANY,
}


@pytest.mark.parametrize("method", SWOLLEN)
def test_a_small_request_with_millions_of_entries_is_not_even_parsed(
    channel: grpc.Channel, method: str
) -> None:
    call = channel.stream_stream(f"/facelane.v1.{method}")
    with pytest.raises(grpc.RpcError) as error:
        list(call(iter([SWOLLEN[method]]), timeout=wire.CALL_S))
    code, reason = wire.refusal(error.value)
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ARGUMENT_INVALID")
    assert "has at most" in error.value.details()


def test_the_sdk_refuses_a_frame_that_the_server_would(client: facelane.Client) -> None:
    with client.analyze_stream(overload="lossless") as stream:
        with pytest.raises(facelane.PictureError) as refused:
            stream.send(facelane.Picture.encoded(WHOLE + bytes(17 << 20)))
        assert refused.value.reason == "PICTURE_TOO_LARGE"
        stream.send(wire.picture())
        stream.close_send()
        assert [outcome.result is not None for outcome in stream] == [True]


def test_errors_tell_nothing_but_the_fault(channel: grpc.Channel) -> None:
    """No bytes of the picture and no path of the server in a message."""
    secret = b"a-face-that-nobody-may-see " * 8
    with wire.RawStream(channel) as stream:
        stream.open()
        stream.write(wire.frame(1, wire.pb_picture(secret)))
        error = stream.outcome().error
    assert b"nobody" not in error.SerializeToString()
    assert "/" not in error.message
    assert error.message.split(";")[-1].strip(), "what to do next"


# -- the gallery ---------------------------------------------------------------------------


def test_an_unknown_subject_is_told_for_every_call(client: facelane.Client) -> None:
    calls = (
        lambda: client.get_subject("nobody-here"),
        lambda: client.delete_subject("nobody-here"),
        lambda: client.list_templates("nobody-here"),
        lambda: client.verify("nobody-here", wire.picture()),
        lambda: client.enroll("nobody-here", wire.picture(), create_subject=False),
    )
    for call in calls:
        with pytest.raises(facelane.NotFoundError) as missing:
            call()
        assert missing.value.reason == "SUBJECT_NOT_FOUND"
        assert "nobody-here" not in missing.value.message, "names stay out of errors"


def test_names_that_are_no_names(client: facelane.Client) -> None:
    for name in ("", "a b", "ä", "x" * 129, "../../etc/passwd", "a\nb", "a\0b"):
        with pytest.raises(facelane.ArgumentError) as refused:
            client.create_subject(name)
        assert refused.value.reason == "ARGUMENT_INVALID"
        assert not name or name not in refused.value.message
