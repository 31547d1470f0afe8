"""Protobuf to domain and back: nothing is lost, nothing unknown gets through."""

from __future__ import annotations

import enum

import pytest
from google.protobuf import duration_pb2, timestamp_pb2
from google.rpc import error_details_pb2

from facelane.v1 import analysis_service_pb2 as analysis_pb
from facelane.v1 import event_service_pb2 as event_pb
from facelane.v1 import face_pb2 as pb
from facelane.v1 import server_service_pb2 as server_pb
from facelane_server import config
from facelane_server.domain import (
    Box,
    Candidate,
    Decision,
    DropReason,
    Encoding,
    Face,
    FacelaneError,
    FrameDrop,
    FrameError,
    FrameResult,
    Identity,
    Liveness,
    LivenessVerdict,
    Outcome,
    Overload,
    Reason,
    Stage,
    StageTiming,
)
from facelane_server.edge import convert, errors, operations, whole
from facelane_server.edge.auth import Key
from facelane_server.edge.roles import ANYBODY, Role
from facelane_server.events import EventKind
from facelane_server.pools.report import PoolState
from facelane_server.pools.restart import Life

ALL = convert.View("exact")
CONFIG = config.Config()


@pytest.mark.parametrize(
    ("kinds", "table", "wire", "prefix"),
    [
        (Stage, convert.STAGES, pb.Stage, "STAGE_"),
        (Decision, convert.DECISIONS, pb.Decision, "DECISION_"),
        (LivenessVerdict, convert.VERDICTS, pb.LivenessVerdict, "LIVENESS_VERDICT_"),
        (DropReason, convert.DROPS, analysis_pb.DropReason, "DROP_REASON_"),
        (EventKind, operations._KINDS, event_pb.EventKind, "EVENT_KIND_"),
        (Life, whole.LIVES, server_pb.WorkerState, "WORKER_STATE_"),
        (
            Encoding,
            {v: k for k, v in convert.ENCODINGS.items()},
            pb.PictureEncoding,
            "PICTURE_ENCODING_",
        ),
    ],
)
def test_every_value_has_a_number_and_every_number_a_value(
    kinds: type[enum.Enum], table: dict[enum.Enum, int], wire: object, prefix: str
) -> None:
    assert set(table) == set(kinds)
    names = {wire.Name(number) for number in table.values()}  # type: ignore[attr-defined]
    assert names == {f"{prefix}{kind.name}" for kind in kinds}
    assert names | {f"{prefix}UNSPECIFIED"} == set(wire.keys())  # type: ignore[attr-defined]


def test_every_pool_state_has_a_number() -> None:
    assert set(operations._POOL_STATES) == set(PoolState)


def test_every_reason_has_a_code_and_an_error_info() -> None:
    for reason in Reason:
        status = errors.status(reason, "what to do", {"field": "x"}, retryable=True)
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert (info.reason, info.domain) == (reason.value, "facelane")
        assert dict(info.metadata) == {"field": "x", "retryable": "true"}
        assert status.code > 0


FACE = Face(
    track_id=7,
    box=Box(-1.5, 2, 30, 40),
    score=0.5,
    landmarks=((1, 2), (3, 4), (5, 6), (7, 8), (9, 10)),
    identity=Identity(Decision.MATCH, "ada", 0.75, (Candidate("ada", 0.75), Candidate("bo", 0.25))),
    liveness=Liveness(LivenessVerdict.SPOOF, 0.0),
    ood_score=0.0,
    recognized_now=True,
)


def test_similarities_are_for_those_who_may_see_them() -> None:
    key = Key("door", "0" * 64, ("analyze",))
    view = convert.View.of(key.caller(), "identify", "staff")
    seen = convert.identity(
        Identity(Decision.MATCH, "ada", 0.7654, FACE.identity.candidates, threshold=0.43), view
    )
    assert round(seen.similarity, 6) == 0.77
    assert [c.subject_id for c in seen.candidates] == ["ada"]
    below = Identity(Decision.UNKNOWN, "", 0.42, (Candidate("ada", 0.42),), threshold=0.43)
    hidden = convert.identity(below, view)
    assert not hidden.HasField("similarity")
    assert not hidden.candidates
    for scope in ("scores", "admin"):
        holder = Key("k", "0" * 64, ("analyze", scope)).caller()  # type: ignore[arg-type]
        exact = convert.View.of(holder, "identify", "staff")
        assert round(convert.identity(below, exact).similarity, 6) == 0.42
    assert convert.View.of(ANYBODY, "identify", "staff").similarities == "exact"
    role = Role("r", ("identify",), galleries=("staff",), similarities="withheld")
    mute = Key("k", "0" * 64, roles=("r",)).caller({"r": role})
    match = Identity(Decision.MATCH, "ada", 0.7654, FACE.identity.candidates, threshold=0.43)
    nothing = convert.identity(match, convert.View.of(mute, "identify", "staff"))
    assert (nothing.subject_id, nothing.HasField("similarity")) == ("ada", False)
    assert not nothing.candidates
    elsewhere = convert.identity(match, convert.View.of(mute, "identify", "visitors"))
    assert elsewhere == convert.identity(Identity(Decision.NOT_EVALUATED), ALL), "no name either"


def test_a_bounded_view_names_each_track_once() -> None:
    left = [2]

    def take() -> bool:
        left[0] -= 1
        return left[0] >= 0

    meter = convert.Meter(take, credit=1)

    def named(track_id: int, subject: str = "ada") -> bool:
        value = Identity(Decision.MATCH, subject, 0.8, threshold=0.43)
        shown = convert.identity(value, convert.View("exact", meter=meter), track_id)
        return shown.subject_id == subject

    assert [named(1), named(1), named(2), named(1), named(3)] == [True] * 5
    assert [named(4), named(2), named(2, "bo")] == [False, True, False]
    pending = Identity(Decision.UNKNOWN)
    assert meter.names(9, pending), "nothing was compared"


def test_a_key_is_bound_to_its_sources_and_galleries() -> None:
    key = Key("k", "0" * 64, ("analyze",), sources=("door",), galleries=("staff",))
    bound = key.caller()
    config_of = analysis_pb.StreamConfig
    options = convert.lane_options(config_of(), CONFIG, bound)
    assert (options.source_id, options.plan.gallery_id) == ("door", "staff"), "the only ones"
    for wrong in (
        config_of(source_id="vault"),
        config_of(source_id="door", options=analysis_pb.AnalysisOptions(gallery_id="board")),
    ):
        with pytest.raises(FacelaneError) as refused:
            convert.lane_options(wrong, CONFIG, bound)
        assert refused.value.reason is Reason.PERMISSION_DENIED
        assert "vault" not in refused.value.message + "board"


def test_a_face() -> None:
    message = convert.face(FACE, ALL)
    assert (message.box.x, message.box.height) == (-1.5, 40)
    assert [(p.x, p.y) for p in message.landmarks] == list(FACE.landmarks)
    # A score of zero is a score, and not the absence of one.
    assert message.HasField("ood_score")
    assert message.liveness.HasField("score")
    assert [c.subject_id for c in message.identity.candidates] == ["ada", "bo"]
    unknown = Face(
        0, Box(0, 0, 1, 1), 0, (), Identity(Decision.UNKNOWN), Liveness(LivenessVerdict.UNDECIDED)
    )
    message = convert.face(unknown, ALL)
    assert not message.HasField("ood_score")
    assert not message.liveness.HasField("score")
    assert not message.identity.HasField("similarity")


def test_outcomes() -> None:
    result = FrameResult(
        4, 3, (FACE,), (StageTiming(Stage.LIVENESS, 5, 1_500_000_007),), (Stage.RECOGNIZER,)
    )
    message = convert.outcome(Outcome(2**63, 3_000_000_001, -1, result, 9), "s", ALL).outcome
    assert message.frame_id == 2**63
    assert (message.stream_offset.seconds, message.stream_offset.nanos) == (3, 1)
    assert (message.capture_time.seconds, message.capture_time.nanos) == (-1, 999_999_999)
    assert message.result.timings[0].service.ToNanoseconds() == 1_500_000_007
    assert list(message.result.missing_stages) == [pb.STAGE_RECOGNIZER]
    late = Outcome(1, 0, None, FrameDrop(DropReason.TOO_OLD), 9)
    message = convert.outcome(late, "s", ALL).outcome
    assert message.drop.reason == analysis_pb.DROP_REASON_TOO_OLD
    assert not message.HasField("capture_time")
    poisoned = Outcome(1, 0, None, FrameError(Reason.POISONED, "why"), 9)
    message = convert.outcome(poisoned, "s", ALL).outcome
    assert message.error.message == "why"


def test_a_config_has_defaults() -> None:
    options = convert.lane_options(analysis_pb.StreamConfig(), CONFIG, ANYBODY)
    assert options.overload is Overload.LATEST_WINS
    assert options.max_frame_age_ns == 1_000_000_000
    assert options.weight == 10
    assert options.tracking
    assert options.plan.gallery_id == "default"
    assert (options.plan.recognize, options.plan.liveness) == (True, True)
    assert options.plan.max_faces == CONFIG.limits.max_faces
    lossless = convert.lane_options(
        analysis_pb.StreamConfig(
            overload_policy=analysis_pb.OVERLOAD_POLICY_LOSSLESS,
            options=analysis_pb.AnalysisOptions(max_faces=10_000, skip_liveness=True),
            reinference_interval=duration_pb2.Duration(),
            weight=100,
            disable_tracking=True,
        ),
        CONFIG,
        ANYBODY,
    )
    assert lossless.max_frame_age_ns == 60_000_000_000
    assert lossless.plan.max_faces == CONFIG.limits.max_faces, "the server's limit holds"
    assert not lossless.plan.liveness
    assert lossless.reinference_interval_ns == 0
    assert not lossless.tracking


@pytest.mark.parametrize("seconds", [315_576_000_001, -315_576_000_001])
def test_durations_beyond_protobufs_range(seconds: int) -> None:
    with pytest.raises(FacelaneError) as refused:
        convert.duration_ns(duration_pb2.Duration(seconds=seconds), "age")
    assert refused.value.metadata == {"field": "age"}


@pytest.mark.parametrize(
    ("seconds", "nanos", "valid"),
    [
        (0, 0, True),
        (-62_135_596_800, 0, True),
        (253_402_300_799, 999_999_999, True),
        (-62_135_596_801, 0, False),
        (253_402_300_800, 0, False),
        (0, -1, False),
        (0, 1_000_000_000, False),
    ],
)
def test_timestamps(seconds: int, nanos: int, valid: bool) -> None:
    message = timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos)
    if valid:
        assert convert.timestamp_ns(message, "t") == seconds * 10**9 + nanos
    else:
        with pytest.raises(FacelaneError):
            convert.timestamp_ns(message, "t")


@pytest.mark.parametrize("seconds", [315_576_000_000, (1 << 62) // 10**9 + 1])
def test_media_time_that_nothing_could_be_counted_from(seconds: int) -> None:
    message = analysis_pb.Frame(frame_id=1, picture=pb.Picture(encoding=1, data=b"x"))  # type: ignore[arg-type]
    message.stream_offset.seconds = seconds
    frame, fault = convert.frame(message, CONFIG)
    assert fault is not None
    assert fault.metadata == {"field": "stream_offset"}
    assert frame.stream_offset_ns == 0
    message.stream_offset.seconds = 1_800_000_000  # of who counts from 1970
    assert convert.frame(message, CONFIG)[1] is None


def test_a_frame_at_fault_keeps_its_place() -> None:
    message = analysis_pb.Frame(frame_id=5, picture=pb.Picture(encoding=1, data=b"x"))  # type: ignore[arg-type]
    frame, fault = convert.frame(message, CONFIG)
    assert (frame.frame_id, frame.picture.data, fault) == (5, b"x", None)
    message.picture.data = b""
    frame, fault = convert.frame(message, CONFIG)
    assert fault is not None
    assert fault.reason is Reason.PICTURE_EMPTY
    assert frame.frame_id == 5
    # What is at fault is left out, and nothing else takes its place.
    for seconds, nanos in ((-1, 0), (0, 2_000_000_000)):
        message.stream_offset.seconds, message.stream_offset.nanos = seconds, nanos
        frame, fault = convert.frame(message, CONFIG, elapsed_ns=5_000_000_000)
        assert fault is not None
        assert frame.stream_offset_ns == 0, "later frames with media time would have gone back"
    message.stream_offset.seconds, message.stream_offset.nanos = 3, 0
    message.capture_time.nanos = -1
    frame, fault = convert.frame(message, CONFIG)
    assert fault is not None
    assert (frame.stream_offset_ns, frame.capture_time_ns) == (3_000_000_000, None)
    message.stream_offset.seconds = -1
    frame, fault = convert.frame(message, CONFIG)
    assert fault is not None
    assert fault.reason is Reason.ARGUMENT_INVALID
    assert frame.stream_offset_ns == 0
