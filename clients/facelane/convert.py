"""Between protobuf and the client's types, and the messages of streams.

Enum numbers that this client does not know become the member that promises least.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from typing import TypeVar, Unpack

from google.protobuf import duration_pb2, timestamp_pb2
from grpc_health.v1 import health_pb2

from facelane import errors, types
from facelane.v1 import (
    analysis_service_pb2,
    event_service_pb2,
    face_pb2,
    gallery_service_pb2,
)
from facelane.zones import areas, rule_report

_E = TypeVar("_E")
_UTC = dt.UTC

DEFAULT_GALLERY = "default"
_RATES = (0.1, 1000.0)

_ENCODING: dict[types.Encoding, face_pb2.PictureEncoding.ValueType] = {
    types.Encoding.JPEG: face_pb2.PICTURE_ENCODING_JPEG,
    types.Encoding.PNG: face_pb2.PICTURE_ENCODING_PNG,
    types.Encoding.WEBP: face_pb2.PICTURE_ENCODING_WEBP,
    types.Encoding.BGR24: face_pb2.PICTURE_ENCODING_BGR24,
    types.Encoding.RGB24: face_pb2.PICTURE_ENCODING_RGB24,
    types.Encoding.NV12: face_pb2.PICTURE_ENCODING_NV12,
    types.Encoding.H264: face_pb2.PICTURE_ENCODING_H264,
    types.Encoding.H265: face_pb2.PICTURE_ENCODING_H265,
}
_OVERLOAD: dict[types.Overload, analysis_service_pb2.OverloadPolicy.ValueType] = {
    types.Overload.LATEST_WINS: analysis_service_pb2.OVERLOAD_POLICY_LATEST_WINS,
    types.Overload.LOSSLESS: analysis_service_pb2.OVERLOAD_POLICY_LOSSLESS,
}
_DECISION: dict[int, types.Decision] = {
    face_pb2.DECISION_MATCH: types.Decision.MATCH,
    face_pb2.DECISION_UNKNOWN: types.Decision.UNKNOWN,
    face_pb2.DECISION_AMBIGUOUS: types.Decision.AMBIGUOUS,
    face_pb2.DECISION_REJECTED_OOD: types.Decision.REJECTED_OOD,
}
_VERDICT: dict[int, types.LivenessVerdict] = {
    face_pb2.LIVENESS_VERDICT_LIVE: types.LivenessVerdict.LIVE,
    face_pb2.LIVENESS_VERDICT_SPOOF: types.LivenessVerdict.SPOOF,
}
_STAGE: dict[int, types.Stage] = {
    face_pb2.STAGE_DETECTOR: types.Stage.DETECTOR,
    face_pb2.STAGE_RECOGNIZER: types.Stage.RECOGNIZER,
    face_pb2.STAGE_LIVENESS: types.Stage.LIVENESS,
}
_DROP: dict[int, types.DropReason] = {
    analysis_service_pb2.DROP_REASON_SUPERSEDED: types.DropReason.SUPERSEDED,
    analysis_service_pb2.DROP_REASON_TOO_OLD: types.DropReason.TOO_OLD,
    analysis_service_pb2.DROP_REASON_DRAINING: types.DropReason.DRAINING,
    analysis_service_pb2.DROP_REASON_STREAM_CLOSED: types.DropReason.STREAM_CLOSED,
    analysis_service_pb2.DROP_REASON_WAITING_FOR_KEY_FRAME: types.DropReason.WAITING_FOR_KEY_FRAME,
    analysis_service_pb2.DROP_REASON_THINNED: types.DropReason.THINNED,
}
_UPDATE: dict[int, types.StreamUpdateKind] = {
    analysis_service_pb2.STREAM_UPDATE_KIND_STAGE_LOST: types.StreamUpdateKind.STAGE_LOST,
    analysis_service_pb2.STREAM_UPDATE_KIND_STAGE_RESTORED: types.StreamUpdateKind.STAGE_RESTORED,
    analysis_service_pb2.STREAM_UPDATE_KIND_DRAINING: types.StreamUpdateKind.DRAINING,
    analysis_service_pb2.STREAM_UPDATE_KIND_TRACK_ENDED: types.StreamUpdateKind.TRACK_ENDED,
    analysis_service_pb2.STREAM_UPDATE_KIND_KEY_FRAME_WANTED: (
        types.StreamUpdateKind.KEY_FRAME_WANTED
    ),
    analysis_service_pb2.STREAM_UPDATE_KIND_RATE: types.StreamUpdateKind.RATE,
}


def _by_name(enum: type[_E], prefix: str, numbers: Mapping[str, int]) -> dict[int, _E]:
    """Pairs protobuf's ``PREFIX_NAME`` with the member ``NAME``."""
    members: dict[str, _E] = enum.__members__  # type: ignore[attr-defined]
    return {
        number: members[name.removeprefix(prefix)]
        for name, number in numbers.items()
        if name.removeprefix(prefix) in members
    }


_HEALTH = _by_name(
    types.HealthStatus, "", dict(health_pb2.HealthCheckResponse.ServingStatus.items())
)
_WARNING = _by_name(
    types.EnrollWarning, "ENROLL_WARNING_", dict(gallery_service_pb2.EnrollWarning.items())
)
_EVENT_KIND = _by_name(types.EventKind, "EVENT_KIND_", dict(event_service_pb2.EventKind.items()))
_EVENT_NUMBER = {k: event_service_pb2.EventKind.Value(f"EVENT_KIND_{k}") for k in types.EventKind}
_ASKED_KINDS = {kind.value: n for kind, n in _EVENT_NUMBER.items() if n}


def duration(seconds: float) -> duration_pb2.Duration:
    """A protobuf duration of ``seconds``, which must not be negative."""
    if not seconds >= 0 or seconds > 3e8:
        raise errors.ArgumentError(
            errors.Reason.ARGUMENT_INVALID, f"a duration of {seconds} s: give 0 or more seconds"
        )
    whole = int(seconds)
    nanos = min(round((seconds - whole) * 1e9), 999_999_999)
    return duration_pb2.Duration(seconds=whole, nanos=nanos)


def seconds(value: duration_pb2.Duration) -> float:
    """A protobuf duration in seconds."""
    return value.seconds + value.nanos * 1e-9


def timestamp(value: dt.datetime) -> timestamp_pb2.Timestamp:
    """A protobuf timestamp; a datetime without a zone is refused rather than guessed."""
    if value.tzinfo is None:
        raise errors.ArgumentError(
            errors.Reason.ARGUMENT_INVALID,
            "capture_time has no time zone: use datetime.now(timezone.utc)",
        )
    result = timestamp_pb2.Timestamp()
    result.FromDatetime(value)
    return result


def _moment(value: timestamp_pb2.Timestamp) -> dt.datetime | None:
    try:
        return dt.datetime.fromtimestamp(value.seconds, _UTC) + dt.timedelta(
            microseconds=value.nanos // 1000
        )
    except (ValueError, OverflowError, OSError):
        # Outside of the years 1 to 9999: nothing to tell, and no reason to fail.
        return None


# Requests.


def count(name: str, value: int) -> int:
    """A number that protobuf can hold, or an error that names it."""
    if not 0 <= value < 1 << 32:
        raise errors.ArgumentError(
            errors.Reason.ARGUMENT_INVALID, f"{name} {value}: give 0 or a positive number"
        )
    return value


def _rate(per_second: float) -> float:
    if per_second and not _RATES[0] <= per_second <= _RATES[1]:
        raise errors.ArgumentError(
            errors.Reason.CONFIG_INVALID,
            f"analysis_fps {per_second}: give {_RATES[0]:g} to {_RATES[1]:g} pictures a second, or "
            "0 for all",
        )
    return per_second


def size(value: types.Picture) -> int:
    """Bytes of a picture. What is no picture is named here, where it came in."""
    if not isinstance(value, types.Picture):
        raise TypeError(
            f"{type(value).__name__} is no facelane.Picture: make one with Picture.encoded, "
            "Picture.from_file, Picture.raw or Picture.access_unit"
        )
    return len(value.data)


def picture(value: types.Picture) -> face_pb2.Picture:
    """A picture for the wire."""
    size(value)
    return face_pb2.Picture(
        encoding=_ENCODING[value.encoding],
        data=value.data,
        width=value.width,
        height=value.height,
        stride=value.stride,
    )


def analysis_options(
    *,
    skip_recognition: bool = False,
    skip_liveness: bool = False,
    gallery: str = DEFAULT_GALLERY,
    max_faces: int = 0,
    max_candidates: int = 0,
    min_face_size: int = 0,
    false_naming: float | None = None,
    match_threshold: float | None = None,
) -> analysis_service_pb2.AnalysisOptions:
    """``types.AnalysisOptions`` for the wire."""
    return analysis_service_pb2.AnalysisOptions(
        skip_recognition=skip_recognition,
        skip_liveness=skip_liveness,
        gallery_id=gallery,
        max_faces=count("max_faces", max_faces),
        max_candidates=count("max_candidates", max_candidates),
        min_face_size=count("min_face_size", min_face_size),
        false_naming=false_naming,
        match_threshold=match_threshold,
    )


def stream_config(
    *,
    source_id: str = "",
    overload: types.Overload | str = types.Overload.LATEST_WINS,
    max_frame_age: float | None = None,
    weight: int = 0,
    reinference_interval: float | None = None,
    disable_tracking: bool = False,
    analysis_fps: float = 0.0,
    private: bool = False,
    zones: Iterable[types.Zone] = (),
    lines: Iterable[types.Line] = (),
    **options: Unpack[types.AnalysisOptions],
) -> analysis_service_pb2.AnalyzeStreamRequest:
    """The first message of a stream."""
    try:
        policy = types.Overload(overload)
    except ValueError:
        known = " or ".join(types.Overload)
        raise errors.ArgumentError(
            errors.Reason.CONFIG_INVALID, f"overload {overload!r}: give {known}"
        ) from None
    config = analysis_service_pb2.StreamConfig(
        source_id=source_id,
        options=analysis_options(**options),
        overload_policy=_OVERLOAD[policy],
        weight=count("weight", weight),
        disable_tracking=disable_tracking,
        analysis_fps=_rate(analysis_fps),
        private=private,
        **areas(zones, lines),
    )
    if max_frame_age is not None:
        config.max_frame_age.CopyFrom(duration(max_frame_age))
    if reinference_interval is not None:
        config.reinference_interval.CopyFrom(duration(reinference_interval))
    return analysis_service_pb2.AnalyzeStreamRequest(config=config)


def frame(
    frame_id: int,
    value: types.Picture,
    stream_offset: float,
    capture_time: timestamp_pb2.Timestamp | None,
) -> analysis_service_pb2.AnalyzeStreamRequest:
    """One frame of a stream."""
    return analysis_service_pb2.AnalyzeStreamRequest(
        frame=analysis_service_pb2.Frame(
            frame_id=frame_id,
            picture=picture(value),
            stream_offset=duration(stream_offset),
            capture_time=capture_time,
        )
    )


def watch_events_request(
    resume_token: str,
    kinds: Iterable[types.EventKind | str],
    source_ids: Iterable[str] = (),
    gallery_ids: Iterable[str] = (),
) -> event_service_pb2.WatchEventsRequest:
    """A subscription."""
    return event_service_pb2.WatchEventsRequest(
        resume_token=resume_token,
        kinds=event_kinds(kinds),
        source_ids=source_ids,
        gallery_ids=gallery_ids,
    )


def event_kinds(
    kinds: Iterable[types.EventKind | str],
) -> list[event_service_pb2.EventKind.ValueType]:
    """Kinds of events that are asked for. Raises ArgumentError."""
    try:
        return [_ASKED_KINDS[kind] for kind in kinds]
    except KeyError as unknown:
        raise errors.ArgumentError(
            errors.Reason.ARGUMENT_INVALID,
            f"kinds: {str(unknown.args[0])!r} is none; give some of {', '.join(_ASKED_KINDS)}, or "
            "none for all",
        ) from None


# Answers.


def _identity(pb: face_pb2.Identity) -> types.Identity:
    decision = _DECISION.get(pb.decision, types.Decision.NOT_EVALUATED)
    return types.Identity(
        decision,
        pb.subject_id if decision is types.Decision.MATCH else "",
        pb.similarity if pb.HasField("similarity") else None,
        tuple([types.Candidate(c.subject_id, c.similarity) for c in pb.candidates]),
        pb.threshold if pb.HasField("threshold") else None,
    )


def _liveness(pb: face_pb2.Liveness) -> types.Liveness:
    return types.Liveness(
        _VERDICT.get(pb.verdict, types.LivenessVerdict.UNDECIDED),
        pb.score if pb.HasField("score") else None,
        pb.reason == face_pb2.LIVENESS_REASON_NO_CONTEXT,
    )


def face(pb: face_pb2.Face) -> types.Face:
    """One face."""
    box = pb.box
    return types.Face(
        pb.track_id,
        types.BoundingBox(box.x, box.y, box.width, box.height),
        pb.score,
        tuple([types.Point(p.x, p.y) for p in pb.landmarks]),
        _identity(pb.identity),
        _liveness(pb.liveness),
        pb.ood_score if pb.HasField("ood_score") else None,
        pb.recognized_now,
        seconds(pb.evidence_age) if pb.HasField("evidence_age") else None,
        pb.links_since_evidence,
    )


def _stage(number: int) -> types.Stage:
    return _STAGE.get(number, types.Stage.UNSPECIFIED)


def frame_result(pb: face_pb2.FrameResult) -> types.FrameResult:
    """A picture that was analysed."""
    return types.FrameResult(
        pb.width,
        pb.height,
        tuple([face(f) for f in pb.faces]),
        tuple(
            [
                types.StageTiming(_stage(t.stage), seconds(t.queue), seconds(t.service))
                for t in pb.timings
            ]
        ),
        tuple([_stage(s) for s in pb.missing_stages]),
    )


def _body(
    pb: analysis_service_pb2.FrameOutcome,
) -> types.FrameResult | types.FrameDrop | types.FrameError:
    kind = pb.WhichOneof("outcome")
    if kind == "result":
        return frame_result(pb.result)
    if kind == "drop":
        return types.FrameDrop(_DROP.get(pb.drop.reason, types.DropReason.UNSPECIFIED))
    if kind == "error":
        info = errors.error_info(pb.error)
        if info is None:
            return types.FrameError(errors.Reason.INTERNAL, pb.error.message)
        metadata = dict(info.metadata)
        return types.FrameError(
            info.reason,
            pb.error.message,
            errors.is_retryable(info.reason, metadata, default=False),
            metadata,
        )
    # An outcome of a kind that is not known here still settles its frame.
    return types.FrameError(
        errors.Reason.INTERNAL, "an outcome that this client does not know: update facelane"
    )


def _opened(pb: analysis_service_pb2.StreamOpened) -> types.StreamOpened:
    limits = pb.limits
    return types.StreamOpened(
        pb.stream_id,
        types.StreamLimits(
            # A server that announces no window still takes one frame at a time.
            max(1, limits.window),
            limits.max_frame_bytes,
            limits.max_pixels,
            limits.max_faces,
            seconds(limits.max_frame_age) if limits.HasField("max_frame_age") else None,
        ),
        dict(pb.models),
        pb.server_version,
        pb.false_naming if pb.HasField("false_naming") else None,
        pb.match_threshold if pb.HasField("match_threshold") else None,
        pb.move.target if pb.HasField("move") else None,
    )


def _outcome(pb: analysis_service_pb2.FrameOutcome) -> types.Outcome:
    return types.Outcome(
        pb.frame_id,
        seconds(pb.stream_offset),
        _moment(pb.capture_time) if pb.HasField("capture_time") else None,
        _body(pb),
        seconds(pb.age),
        stream_id=pb.stream_id,
    )


def _update(pb: analysis_service_pb2.StreamUpdate) -> types.StreamUpdate:
    return types.StreamUpdate(
        _UPDATE.get(pb.kind, types.StreamUpdateKind.UNSPECIFIED),
        _stage(pb.stage),
        pb.track_id,
        pb.message,
        seconds(pb.grace),
        pb.rate_fps,
    )


def _summary(pb: analysis_service_pb2.StreamSummary) -> types.StreamSummary:
    return types.StreamSummary(
        pb.received,
        pb.results,
        pb.drops,
        pb.errors,
        pb.faces,
        pb.tracks,
        dict(pb.drops_by_reason),
    )


def stream_message(
    pb: analysis_service_pb2.AnalyzeStreamResponse,
) -> types.StreamOpened | types.Outcome | types.StreamUpdate | types.StreamSummary | None:
    """A message of a stream; ``None`` for a kind that is not known here."""
    kind = pb.WhichOneof("message")
    if kind == "outcome":
        return _outcome(pb.outcome)
    if kind == "update":
        return _update(pb.update)
    if kind == "opened":
        return _opened(pb.opened)
    if kind == "summary":
        return _summary(pb.summary)
    return None


def subject(pb: face_pb2.Subject) -> types.Subject:
    """A subject."""
    return types.Subject(
        pb.subject_id,
        pb.gallery_id,
        pb.display_name,
        dict(pb.labels),
        pb.template_count,
        _moment(pb.create_time) if pb.HasField("create_time") else None,
        _moment(pb.update_time) if pb.HasField("update_time") else None,
        pb.etag,
    )


def template(pb: face_pb2.Template) -> types.Template:
    """A template."""
    return types.Template(
        pb.template_id,
        pb.subject_id,
        pb.model_id,
        pb.ood_score,
        _moment(pb.create_time) if pb.HasField("create_time") else None,
        pb.quality,
    )


def enrollment(pb: gallery_service_pb2.EnrollFaceResponse) -> types.Enrollment:
    """What enrolling made."""
    return types.Enrollment(
        subject(pb.subject),
        template(pb.template),
        face(pb.face),
        tuple([_WARNING.get(w, types.EnrollWarning.UNSPECIFIED) for w in pb.warnings]),
    )


def verification(pb: gallery_service_pb2.VerifyFaceResponse) -> types.Verification:
    """1:1."""
    return types.Verification(
        pb.verified,
        pb.similarity if pb.HasField("similarity") else None,
        pb.threshold,
        face(pb.face),
    )


def health(pb: health_pb2.HealthCheckResponse) -> types.HealthStatus:
    """grpc.health.v1."""
    return _HEALTH.get(pb.status, types.HealthStatus.UNKNOWN)


def event(pb: event_service_pb2.WatchEventsResponse) -> types.Event:
    """Something that happened."""
    e = pb.event
    return types.Event(
        e.sequence,
        _EVENT_KIND.get(e.kind, types.EventKind.UNSPECIFIED),
        _moment(e.event_time) if e.HasField("event_time") else None,
        pb.resume_token,
        e.source_id,
        e.stream_id,
        e.track_id,
        e.gallery_id,
        _identity(e.identity),
        _liveness(e.liveness),
        e.ood_score if e.HasField("ood_score") else None,
        e.pool,
        e.message,
        _track_report(e.track) if e.HasField("track") else None,
        rule_report(e.rule) if e.HasField("rule") else None,
        e.candidate_sequence,
        e.candidate_subject_id,
    )


def _track_report(pb: event_service_pb2.TrackReport) -> types.TrackReport:
    return types.TrackReport(
        pb.global_track_id,
        seconds(pb.first_offset),
        seconds(pb.last_offset),
        _moment(pb.first_capture_time) if pb.HasField("first_capture_time") else None,
        _moment(pb.last_capture_time) if pb.HasField("last_capture_time") else None,
        types.BoundingBox(pb.box.x, pb.box.y, pb.box.width, pb.box.height),
        pb.best_ood_score if pb.HasField("best_ood_score") else None,
        pb.looks,
        pb.display_name,
        dict(pb.labels),
        pb.best_similarity if pb.HasField("best_similarity") else None,
        pb.has_picture,
    )
