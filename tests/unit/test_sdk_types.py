"""Pictures, conversions and errors, without a server."""

from __future__ import annotations

import math
import pickle
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes import scripted_server as fake

import facelane
from facelane import convert, errors, transport
from facelane.v1 import analysis_service_pb2, face_pb2

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
WEBP = b"RIFF\x00\x00\x00\x00WEBP"

# Pictures.


@pytest.mark.parametrize(
    ("data", "encoding"),
    [(b"\xff\xd8\xff\xe0", "jpeg"), (PNG, "png"), (WEBP, "webp")],
)
def test_the_encoding_is_read_from_the_bytes(data: bytes, encoding: str) -> None:
    for given_as in (data, bytearray(data), memoryview(data)):
        picture = facelane.Picture.encoded(given_as)
        assert picture.encoding == encoding
        assert type(picture.data) is bytes
    assert facelane.Picture.encoded(b"anything", "jpeg").encoding is facelane.Encoding.JPEG


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (b"", "PICTURE_EMPTY", "no bytes"),
        (b"GIF89a...", "ENCODING_UNSUPPORTED", "GIF"),
        (b"BM......", "ENCODING_UNSUPPORTED", "BMP"),
        (b"....ftypheic", "ENCODING_UNSUPPORTED", "HEIC"),
        (b"hello", "ENCODING_UNSUPPORTED", "not a picture that is known"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, reason: str, words: str) -> None:
    with pytest.raises(facelane.PictureError, match=words) as caught:
        facelane.Picture.encoded(data)
    assert caught.value.reason == reason
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("start", [b"\0\0\1", b"\0\0\0\1"])
@pytest.mark.parametrize("encoding", ["h264", "h265"])
def test_an_access_unit_is_taken_as_it_is(start: bytes, encoding: str) -> None:
    data = start + b"\x65\x88"
    for given_as in (data, bytearray(data), memoryview(data)):
        picture = facelane.Picture.access_unit(given_as, encoding)  # type: ignore[arg-type]
        assert picture.encoding == encoding
        assert picture.encoding.is_video
        assert not picture.encoding.is_raw
        assert type(picture.data) is bytes
        assert picture.data == data
    message = convert.picture(picture)
    assert message.encoding == face_pb2.PictureEncoding.Value(
        f"PICTURE_ENCODING_{encoding.upper()}"
    )


@pytest.mark.parametrize(
    ("data", "encoding", "reason", "words"),
    [
        (b"", "h264", "PICTURE_EMPTY", "no bytes"),
        (b"\0\0\x02\x0a\x65\x88", "h264", "PICTURE_CORRUPT", "h264_mp4toannexb"),
        (b"\x65\x88", "h265", "PICTURE_CORRUPT", "no start code"),
        (b"\0\0\1\x65", "jpeg", "ENCODING_MISMATCH", "no video"),
        (b"\0\0\1\x65", "av1", "ENCODING_UNSUPPORTED", "give one of"),
    ],
)
def test_what_is_no_access_unit_is_named(
    data: bytes, encoding: str, reason: str, words: str
) -> None:
    with pytest.raises(facelane.PictureError, match=words) as caught:
        facelane.Picture.access_unit(data, encoding)  # type: ignore[arg-type]
    assert caught.value.reason == reason


def test_video_is_no_single_picture() -> None:
    with pytest.raises(facelane.PictureError, match=r"Picture\.access_unit"):
        facelane.Picture.encoded(b"\0\0\1\x65", facelane.Encoding.H264)  # type: ignore[arg-type]
    with pytest.raises(facelane.PictureError, match=r"Picture\.access_unit"):
        facelane.Picture.raw(b"\0", width=1, height=1, encoding="h265")  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.05, -1.0, 2000.0, math.nan, math.inf])
def test_a_rate_of_analyses_that_cannot_be(rate: float) -> None:
    with pytest.raises(facelane.ArgumentError, match="analysis_fps") as caught:
        convert.stream_config(analysis_fps=rate)
    assert caught.value.reason == "CONFIG_INVALID"
    assert convert.stream_config(analysis_fps=7.5).config.analysis_fps == 7.5


@pytest.mark.parametrize("name", ["jpg", "JPEG", "yuv420"])
def test_an_encoding_that_there_is_not(name: str) -> None:
    with pytest.raises(facelane.PictureError, match="give one of jpeg, png, webp") as caught:
        facelane.Picture.encoded(b"\xff\xd8\xff\xe0", name)  # type: ignore[arg-type]
    assert caught.value.reason == "ENCODING_UNSUPPORTED"
    with pytest.raises(facelane.PictureError, match=r"give one of .*nv12"):
        facelane.Picture.raw(b"abc", width=1, height=1, encoding=name)  # type: ignore[arg-type]


def test_a_picture_s_bytes_stay_out_of_its_repr() -> None:
    assert "xff" not in repr(facelane.Picture.encoded(b"\xff\xd8\xff\xe0"))


def test_a_picture_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    assert facelane.Picture.from_file(path).data == PNG
    assert facelane.Picture.from_file(str(path)).encoding == "png"


def test_an_array_tells_its_own_size() -> None:
    pixels = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
    picture = facelane.Picture.raw(pixels)
    assert (picture.width, picture.height, picture.stride) == (64, 48, 0)
    assert picture.data == pixels.tobytes()
    crop = facelane.Picture.raw(pixels[8:40, 16:48], encoding="rgb24")
    assert (crop.width, crop.height) == (32, 32)
    assert crop.data == pixels[8:40, 16:48].tobytes()
    nv12 = facelane.Picture.raw(np.zeros((72, 64), np.uint8), encoding="nv12")
    assert (nv12.width, nv12.height) == (64, 48)


def test_bytes_with_a_stride() -> None:
    picture = facelane.Picture.raw(bytes(200 * 10), width=64, height=10, stride=200)
    assert picture.stride == 200
    nv12 = facelane.Picture.raw(bytes(80 * 15), width=64, height=10, encoding="nv12", stride=80)
    assert nv12.encoding is facelane.Encoding.NV12


@pytest.mark.parametrize(
    ("buffer", "options", "words"),
    [
        (b"", {"width": 1, "height": 1}, "empty"),
        (bytes(10), {}, "positive width"),
        (bytes(10), {"width": 4, "height": -1}, "positive width"),
        (bytes(11), {"width": 2, "height": 2}, "12 are needed"),
        (bytes(40), {"width": 4, "height": 4, "stride": 10}, "48 are needed"),
        (bytes(12), {"width": 3, "height": 2, "encoding": "nv12"}, "even"),
        (np.zeros((4, 4), np.uint8), {}, "needs"),
        (np.zeros((4, 4, 4), np.uint8), {}, "height, width, 3"),
        (np.zeros((4, 4, 3), np.float32), {}, "8 bits"),
        (np.zeros((4, 4, 3), np.uint8), {"width": 5}, "leave both out"),
        (np.zeros((4, 4), np.uint8), {"encoding": "nv12"}, r"height \* 3 / 2"),
        ([1, 2, 3], {"width": 1, "height": 1}, "has no buffer"),
        (bytes(3), {"width": 1, "height": 1, "encoding": "jpeg"}, "Picture.encoded"),
    ],
)
def test_raw_layouts_that_cannot_be(buffer: object, options: dict[str, object], words: str) -> None:
    with pytest.raises(facelane.PictureError, match=words):
        facelane.Picture.raw(buffer, **options)  # type: ignore[arg-type]


def test_raw_is_not_encoded() -> None:
    with pytest.raises(facelane.PictureError, match=r"Picture\.raw"):
        facelane.Picture.encoded(b"xxx", "bgr24")  # type: ignore[arg-type]


# Conversions.


@given(st.floats(0, 3e8))
def test_durations_survive_the_wire(seconds: float) -> None:
    there = convert.duration(seconds)
    assert 0 <= there.nanos < 1_000_000_000
    assert convert.seconds(there) == pytest.approx(seconds, abs=2e-8 + seconds * 1e-15)


@pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf, 1e9])
def test_durations_that_make_no_sense(bad: float) -> None:
    with pytest.raises(facelane.ArgumentError):
        convert.duration(bad)


@given(st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2200, 1, 1)))  # noqa: DTZ001
def test_times_survive_the_wire(moment: datetime) -> None:
    aware = moment.replace(tzinfo=UTC)
    assert convert._moment(convert.timestamp(aware)) == aware


def test_every_member_has_a_number() -> None:
    for encoding in facelane.Encoding:
        assert convert._ENCODING[encoding]
    for overload in facelane.Overload:
        assert convert._OVERLOAD[overload]
    # What the protocol names, the client knows: nothing is silently UNSPECIFIED.
    for table, enum in (
        (convert._DECISION, face_pb2.Decision),
        (convert._VERDICT, face_pb2.LivenessVerdict),
        (convert._STAGE, face_pb2.Stage),
        (convert._DROP, analysis_service_pb2.DropReason),
        (convert._UPDATE, analysis_service_pb2.StreamUpdateKind),
    ):
        known = {member.name for member in table.values()}
        names = {
            name
            for name in enum.keys()  # noqa: SIM118 - not a mapping
            if not name.endswith("_UNSPECIFIED")
        }
        prefix_free = {n for n in names if not any(n.endswith(k) for k in known)}
        assert prefix_free <= {"DECISION_NOT_EVALUATED", "LIVENESS_VERDICT_UNDECIDED"}
    for kind in facelane.EventKind:
        assert kind in convert._EVENT_NUMBER


def test_numbers_from_a_newer_server_promise_least() -> None:
    pb = face_pb2.Face(
        identity=face_pb2.Identity(subject_id="x"), liveness=face_pb2.Liveness(score=0.9)
    )
    # An open enum keeps a number that has no name here.
    pb.identity.MergeFromString(b"\x08\x63")
    pb.liveness.MergeFromString(b"\x08\x63")
    face = convert.face(pb)
    assert face.identity.decision is facelane.Decision.NOT_EVALUATED
    assert face.identity.subject_id == ""
    assert not face.identity.matched
    assert face.liveness.verdict is facelane.LivenessVerdict.UNDECIDED
    assert face.ood_score is None


def test_an_empty_message_is_passed_over_and_an_empty_outcome_settles_its_frame() -> None:
    assert convert.stream_message(analysis_service_pb2.AnalyzeStreamResponse()) is None
    empty = fake.outcome(analysis_service_pb2.Frame(frame_id=3))
    empty.outcome.ClearField("outcome")
    outcome = convert.stream_message(empty)
    assert isinstance(outcome, facelane.Outcome)
    assert outcome.error is not None
    assert "update facelane" in outcome.error.message
    bare = fake.outcome(analysis_service_pb2.Frame(frame_id=3))
    bare.outcome.error.message = "no details"
    outcome = convert.stream_message(bare)
    assert isinstance(outcome, facelane.Outcome)
    assert outcome.error is not None
    assert outcome.error.reason == "INTERNAL"


def test_a_server_without_a_window_still_gets_a_frame() -> None:
    opened = convert.stream_message(fake.opened(window=0))
    assert isinstance(opened, facelane.StreamOpened)
    assert opened.limits.window == 1
    assert opened.limits.max_frame_age is None


# Errors.


def test_errors_survive_pickling() -> None:
    error = facelane.PictureError("PICTURE_CORRUPT", "cut off", metadata={"offset": "1"})
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is facelane.PictureError
    assert (again.reason, again.message, again.metadata) == (
        error.reason,
        error.message,
        error.metadata,
    )
    assert again.retryable is False
    assert str(again) == "PICTURE_CORRUPT: cut off"


def test_every_error_is_in_the_drawn_tree() -> None:
    def below(kind: type) -> set[type]:
        return {kind}.union(*(below(sub) for sub in kind.__subclasses__()))

    assert errors.__doc__ is not None
    for kind in below(facelane.FacelaneError):
        if kind.__module__ == errors.__name__:
            assert f" {kind.__name__} " in errors.__doc__.replace("\n", " \n")
            assert kind.__name__ in facelane.__all__


@pytest.mark.parametrize(
    ("reason", "metadata", "default", "expected"),
    [
        ("WORKER_LOST", {}, False, True),
        ("PICTURE_CORRUPT", {}, True, False),
        ("PICTURE_CORRUPT", {"retryable": "true"}, False, True),
        ("WORKER_LOST", {"retryable": "false"}, True, False),
        ("FROM_THE_FUTURE", {}, True, True),
        ("FROM_THE_FUTURE", {}, False, False),
    ],
)
def test_retryable(reason: str, metadata: dict[str, str], default: bool, expected: bool) -> None:
    assert errors.is_retryable(reason, metadata, default) is expected


# Reaching the server.


def test_health_statuses_are_read_and_those_of_the_future_are_unknown() -> None:
    for name, number in health_pb2.HealthCheckResponse.ServingStatus.items():
        assert convert.health(health_pb2.HealthCheckResponse(status=number)) == name
    assert convert.health(health_pb2.HealthCheckResponse(status=99)) == "UNKNOWN"  # type: ignore[arg-type]


def test_a_token_file_holds_one_token(tmp_path: Path) -> None:
    path = tmp_path / "token"
    for content in ("", "\n", "two words", "a\nb\n"):
        path.write_text(content)
        with pytest.raises(facelane.ArgumentError, match="one token"):
            transport.read_token(path)


def test_a_certificate_needs_its_key(tmp_path: Path) -> None:
    with pytest.raises(facelane.ArgumentError, match="give both"):
        facelane.Client("127.0.0.1:1", tls=facelane.Tls(cert_file=tmp_path / "c.pem"))


def test_a_root_that_is_not_pem_is_named(tmp_path: Path) -> None:
    (tmp_path / "root.der").write_bytes(b"0\x82\x03\x0c")
    with pytest.raises(facelane.ArgumentError, match=r"root\.der is not PEM"):
        facelane.Client("127.0.0.1:1", tls=facelane.Tls(ca_file=tmp_path / "root.der"))


def test_tls_with_client_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openssl = shutil.which("openssl")
    assert openssl is not None, "openssl makes the certificates of this test: install it"

    def run(*words: str) -> None:
        subprocess.run([openssl, *words], cwd=tmp_path, check=True, capture_output=True)

    run("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", "ca.key",
        "-out", "ca.pem", "-subj", "/CN=test-ca")  # fmt: skip
    for name in ("server", "client"):
        (tmp_path / f"{name}.ext").write_text("subjectAltName=DNS:facelane.test\n")
        run("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out",
            f"{name}.csr", "-subj", f"/CN={name}")  # fmt: skip
        run("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days",
            "2", "-CAcreateserial", "-extfile", f"{name}.ext", "-out", f"{name}.pem")  # fmt: skip
    read = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    credentials = grpc.ssl_server_credentials(
        [(read["server.key"], read["server.pem"])],
        root_certificates=read["ca.pem"],
        require_client_auth=True,
    )
    with fake.ScriptedServer(credentials=credentials, token="s3cret") as server:
        tls = facelane.Tls(
            ca_file=tmp_path / "ca.pem",
            cert_file=tmp_path / "client.pem",
            key_file=tmp_path / "client.key",
            server_name="facelane.test",
        )
        with facelane.Client(server.target, tls=tls, token="s3cret") as client:
            assert client.health() == "SERVING"
        # Without a certificate of its own the client is turned away.
        monkeypatch.setenv("FACELANE_TLS_CA", str(tmp_path / "ca.pem"))
        with (
            facelane.Client(server.target, timeout=2.0) as stranger,
            pytest.raises(facelane.UnavailableError),
        ):
            stranger.health()


def test_details_that_disagree_with_the_status_are_set_aside() -> None:
    class Odd(grpc.RpcError):
        """A proxy that rewrote the code and left the details."""

        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

        def details(self) -> str:
            return "gateway"

        def trailing_metadata(self) -> list[tuple[str, bytes]]:
            status = fake.status(grpc.StatusCode.NOT_FOUND, "SUBJECT_NOT_FOUND", "gateway")
            return [("grpc-status-details-bin", status.SerializeToString())]

    error = errors.from_rpc(Odd())
    assert isinstance(error, facelane.UnavailableError)
    assert error.reason == "UNREACHABLE"
    assert "gateway" in error.message
