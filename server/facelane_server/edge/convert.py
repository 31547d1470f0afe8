"""Protobuf to domain types and back. Requests are checked here for what needs
no state; ids and labels by whoever keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Self, TypeAlias

from google.protobuf import duration_pb2, timestamp_pb2

from facelane.v1 import analysis_service_pb2 as analysis_pb
from facelane.v1 import face_pb2 as pb
from facelane.v1 import gallery_service_pb2 as gallery_pb
from facelane_server import limits
from facelane_server.bulk import refuse_swollen
from facelane_server.config import Config
from facelane_server.domain import (
    Box,
    Decision,
    DropReason,
    Encoding,
    Face,
    FacelaneError,
    Frame,
    FrameDrop,
    FrameError,
    FrameResult,
    Identity,
    Keeping,
    Liveness,
    LivenessVerdict,
    Outcome,
    Overload,
    Picture,
    Reason,
    Stage,
)
from facelane_server.edge.errors import status
from facelane_server.edge.quotas import Quotas
from facelane_server.edge.roles import Caller, Similarities, Verb
from facelane_server.gallery.asked import Asked
from facelane_server.gallery.decide import Thresholds
from facelane_server.lanes import LaneOptions
from facelane_server.naming import DEFAULT_GALLERY, gallery_name, is_name
from facelane_server.pipeline import Plan
from facelane_server.sources import fitting, keeping

ENCODINGS: Final = {
    pb.PICTURE_ENCODING_JPEG: Encoding.JPEG,
    pb.PICTURE_ENCODING_PNG: Encoding.PNG,
    pb.PICTURE_ENCODING_WEBP: Encoding.WEBP,
    pb.PICTURE_ENCODING_BGR24: Encoding.BGR24,
    pb.PICTURE_ENCODING_RGB24: Encoding.RGB24,
    pb.PICTURE_ENCODING_NV12: Encoding.NV12,
    pb.PICTURE_ENCODING_H264: Encoding.H264,
    pb.PICTURE_ENCODING_H265: Encoding.H265,
}
STAGES: Final = {
    Stage.DETECTOR: pb.STAGE_DETECTOR,
    Stage.RECOGNIZER: pb.STAGE_RECOGNIZER,
    Stage.LIVENESS: pb.STAGE_LIVENESS,
}
DECISIONS: Final = {d: pb.Decision.Value(f"DECISION_{d.value}") for d in Decision}
VERDICTS: Final = {
    v: pb.LivenessVerdict.Value(f"LIVENESS_VERDICT_{v.value}") for v in LivenessVerdict
}
DROPS: Final = {d: analysis_pb.DropReason.Value(f"DROP_REASON_{d.value}") for d in DropReason}

DEFAULT_WEIGHT: Final = 10
_LEAST_RATE: Final = 0.0999  # a float32's tenth
_HIGHEST_RATE: Final = 1000.0
_NO_PICTURE: Final = Picture(Encoding.JPEG, b"")


def invalid(message: str, **metadata: str) -> FacelaneError:
    return FacelaneError(Reason.ARGUMENT_INVALID, message, metadata=metadata)


def gallery(gallery_id: str, caller: Caller, verb: Verb) -> str:
    """The gallery meant. Raises ARGUMENT_INVALID, and PERMISSION_DENIED for one that the
    caller's key is not for."""
    if len(gallery_id) > limits.MAX_ID_CHARS:
        gallery_name(gallery_id)  # raises, before it is compared with anything
    return gallery_name(caller.place(verb, gallery=gallery_id, default=DEFAULT_GALLERY)[0])


def picture(
    message: pb.Picture,
    config: Config,
    *,
    in_stream: bool = False,
    data: bytes | memoryview | None = None,
) -> Picture:
    """A picture whose bytes are bounded and whose encoding is known. ``data``: its bytes, where
    they are not in the message."""
    encoding = ENCODINGS.get(message.encoding)
    if encoding is None:
        raise FacelaneError(
            Reason.ENCODING_UNSUPPORTED,
            "picture.encoding must be one of JPEG, PNG, WEBP, BGR24, RGB24, NV12, and in streams "
            "H264, H265",
        )
    if encoding.is_video and not in_stream:
        raise FacelaneError(
            Reason.ENCODING_UNSUPPORTED,
            "an access unit of video is no single picture; send it in a stream",
        )
    if data is None:
        data = message.data
    if not data:
        raise FacelaneError(Reason.PICTURE_EMPTY, "picture.data is empty")
    if len(data) > config.limits.max_frame_bytes:
        raise FacelaneError(
            Reason.PICTURE_TOO_LARGE,
            f"the picture has {len(data)} bytes; this server takes up to "
            f"{config.limits.max_frame_bytes}: send a smaller or more compressed one",
            metadata={"max_frame_bytes": str(config.limits.max_frame_bytes)},
        )
    if encoding.is_raw:
        return Picture(encoding, data, message.width, message.height, message.stride)
    refuse_swollen(data, encoding)
    return Picture(encoding, data)


def plan(options: analysis_pb.AnalysisOptions, config: Config, gallery_id: str) -> Plan:
    """What to run behind the detector, in a gallery that the caller's key is for. Raises
    ``FacelaneError``."""
    if options.max_candidates > limits.MAX_CANDIDATES:
        raise invalid(f"max_candidates must be 0-{limits.MAX_CANDIDATES}", field="max_candidates")
    ceiling = config.limits.max_faces
    return Plan(
        recognize=not options.skip_recognition,
        liveness=not options.skip_liveness,
        gallery_id=gallery_id,
        max_faces=min(options.max_faces or ceiling, ceiling),
        max_candidates=options.max_candidates,
        min_face_size=options.min_face_size,
    )


_GRAINS: Final[dict[Similarities, float]] = {"exact": 0.0, "rounded": 0.01, "withheld": 0.05}


_Naming: TypeAlias = (
    analysis_pb.AnalysisOptions | gallery_pb.VerifyFaceRequest | gallery_pb.IdentifyFaceRequest
)


def naming(
    options: _Naming,
    caller: Caller,
    gallery_id: str,
    source_id: str | None,
) -> Asked | None:
    """What a caller asks of names. Raises ``FacelaneError``."""
    share = options.false_naming if options.HasField("false_naming") else None
    match = options.match_threshold if options.HasField("match_threshold") else None
    if share is None and match is None:
        return None
    if share is not None and match is not None:
        raise invalid("give one of false_naming and match_threshold", field="match_threshold")
    if share is not None and not 0.0 < share < 1.0:  # nor NaN
        raise invalid("false_naming must be between 0 and 1, both excluded", field="false_naming")
    if match is not None and not 0.0 <= match <= 1.0:
        raise invalid("match_threshold must be 0-1", field="match_threshold")
    there = {"gallery": gallery_id, "source": source_id}
    return Asked(
        share,
        match,
        looser=caller.may("loosen-naming", **there),
        grain=_GRAINS[caller.similarities("identify", **there)],
    )


def names_by(thresholds: Thresholds | None, recognised: bool) -> dict[str, float]:
    """What ``StreamOpened`` says of the stream's names."""
    if thresholds is None or not recognised:
        return {}
    if thresholds.promise is None:
        return {"match_threshold": max(thresholds.match, thresholds.least)}
    told = {"false_naming": thresholds.promise.false_naming}
    return {**told, "match_threshold": thresholds.least} if thresholds.least > -1.0 else told


def lane_options(message: analysis_pb.StreamConfig, config: Config, caller: Caller) -> LaneOptions:
    """A stream's config, all but its zones and lines. Raises ``FacelaneError``: CONFIG_INVALID,
    or PERMISSION_DENIED for a source or a gallery that the caller's key is not for."""
    try:
        if message.source_id and not is_name(message.source_id):
            raise invalid("source_id must be 0-64 of letters, digits, and - _ .")
        if message.weight > 100:
            raise invalid("weight must be 0-100")
        rate = message.analysis_fps
        if rate and not _LEAST_RATE <= rate <= _HIGHEST_RATE:  # nor NaN
            raise invalid("analysis_fps must be 0.1-1000, or 0 for all")
        lossless = message.overload_policy == analysis_pb.OVERLOAD_POLICY_LOSSLESS
        if not lossless and message.overload_policy not in (
            analysis_pb.OVERLOAD_POLICY_UNSPECIFIED,
            analysis_pb.OVERLOAD_POLICY_LATEST_WINS,
        ):
            raise invalid("overload_policy is unknown")
        age_ms = config.limits.lossless_frame_age_ms if lossless else config.limits.max_frame_age_ms
        age_ns = age_ms * 1_000_000
        if message.HasField("max_frame_age"):
            age_ns = duration_ns(message.max_frame_age, "max_frame_age")
            if not 1_000_000 <= age_ns <= 3_600_000_000_000:
                raise invalid("max_frame_age must be between 1 ms and 1 h")
        if len(message.options.gallery_id) > limits.MAX_ID_CHARS:
            gallery_name(message.options.gallery_id)  # raises, before it is compared with anything
        interval_ns = int(config.tracking.reinference_interval_s * 1e9)
        if message.HasField("reinference_interval"):
            interval_ns = duration_ns(message.reinference_interval, "reinference_interval")
            if interval_ns < 0:
                raise invalid("reinference_interval must not be negative")
        there, source_id = caller.place(
            "analyze",
            gallery=message.options.gallery_id,
            default=DEFAULT_GALLERY,
            source=message.source_id,
        )
        gallery_id = gallery_name(there)
        found = fitting(config.sources, source_id)
        private = message.private or any(source.private for source in found)
        return LaneOptions(
            source_id=source_id,
            plan=replace(
                plan(message.options, config, gallery_id),
                source_id=source_id,
                naming=naming(message.options, caller, gallery_id, source_id),
            ),
            overload=Overload.LOSSLESS if lossless else Overload.LATEST_WINS,
            max_frame_age_ns=age_ns,
            weight=message.weight or DEFAULT_WEIGHT,
            tracking=not message.disable_tracking,
            reinference_interval_ns=interval_ns,
            analysis_fps=rate,
            private=private,
            pictures=Keeping.NONE
            if private
            else keeping(
                config.events.pictures,
                rules.pictures if (rules := config.galleries.get(gallery_id)) else None,
                config.sources,
                source_id,
            ),
        )
    except FacelaneError as error:
        if error.reason is Reason.PERMISSION_DENIED:
            raise
        raise FacelaneError(
            Reason.CONFIG_INVALID, f"stream config: {error.message}", metadata=error.metadata
        ) from None


def duration_ns(message: duration_pb2.Duration, field: str) -> int:
    if abs(message.seconds) > 315_576_000_000 or abs(message.nanos) > 999_999_999:
        raise invalid(f"{field} is not a valid duration", field=field)
    return message.seconds * 1_000_000_000 + message.nanos


def timestamp_ns(message: timestamp_pb2.Timestamp, field: str) -> int:
    """Nanoseconds since the epoch; years 1 to 9999, as protobuf has it."""
    in_calendar = -62_135_596_800 <= message.seconds <= 253_402_300_799
    if not in_calendar or not 0 <= message.nanos <= 999_999_999:
        raise invalid(f"{field} is not a valid timestamp", field=field)
    return message.seconds * 1_000_000_000 + message.nanos


def duration(ns: int) -> duration_pb2.Duration:
    seconds, nanos = divmod(ns, 1_000_000_000)
    return duration_pb2.Duration(seconds=seconds, nanos=nanos)


def timestamp(ns: int) -> timestamp_pb2.Timestamp:
    """Of a wall clock in nanoseconds since the epoch."""
    seconds, nanos = divmod(ns, 1_000_000_000)
    return timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos)


def frame(
    message: analysis_pb.Frame,
    config: Config,
    *,
    elapsed_ns: int = 0,
    data: bytes | memoryview | None = None,
) -> tuple[Frame, FacelaneError | None]:
    """A frame, and what is wrong with it if anything is.

    A fault is no exception here: the frame still has its place in the stream, where the
    fault is told. What is at fault is left out of the frame. ``elapsed_ns``: time since the
    stream was opened, the media time of a frame whose client gives none. ``data``: see
    ``picture``.
    """
    body, offset_ns, capture_ns, fault = _NO_PICTURE, 0, None, None
    try:
        if message.HasField("stream_offset"):
            given_ns = duration_ns(message.stream_offset, "stream_offset")
            if given_ns < 0:
                raise invalid("stream_offset must not be negative", field="stream_offset")
            if given_ns > limits.MAX_MEDIA_NS:
                raise invalid(
                    "stream_offset is media time since the start of the stream, and is more than a "
                    "hundred years",
                    field="stream_offset",
                )
            offset_ns = given_ns
        else:
            offset_ns = elapsed_ns
        if message.HasField("capture_time"):
            capture_ns = timestamp_ns(message.capture_time, "capture_time")
        body = picture(message.picture, config, in_stream=True, data=data)
    except FacelaneError as error:
        fault = error
    return Frame(message.frame_id, body, offset_ns, capture_ns), fault


class Meter:
    """Which faces of a call are named, where a role bounds how many may be in a minute: each
    track once. ``credit``: look-ups that have been counted already."""

    def __init__(self, take: Callable[[], bool], *, credit: int = 0) -> None:
        self._take = take
        self._credit = credit
        self._named: dict[tuple[int, str], None] = {}

    def names(self, track_id: int, value: Identity) -> bool:
        if value.decision not in _TELLING or value.similarity is None:
            return True
        what = (track_id, value.subject_id)
        if track_id and what in self._named:
            return True
        if self._credit:
            self._credit -= 1
        elif not self._take():
            return False
        if len(self._named) >= limits.MAX_METERED_TRACKS:
            del self._named[next(iter(self._named))]
        self._named[what] = None
        return True


_TELLING: Final = (Decision.MATCH, Decision.UNKNOWN, Decision.AMBIGUOUS)
_UNNAMED: Final = Identity(Decision.NOT_EVALUATED)


@dataclass(frozen=True, slots=True)
class View:
    """What a caller may see of who a face is. Similarities: all (``exact``); nothing below the
    threshold of a match and two digits above (``rounded``); none. Of strangers' faces, asked for
    often enough, they rebuild a template. ``names``: whether it may see who somebody is."""

    similarities: Similarities
    names: bool = True
    meter: Meter | None = None

    @classmethod
    def of(
        cls, caller: Caller, verb: Verb, gallery_id: str | None, source_id: str | None = None
    ) -> Self:
        """What this verb shows of a gallery; ``identify`` alone may be withheld."""
        return cls(
            caller.similarities(verb, gallery=gallery_id, source=source_id),
            verb != "identify" or caller.may(verb, gallery=gallery_id, source=source_id),
        )

    def bounded(
        self, quotas: Quotas, caller: Caller, per_minute: float, *, credit: int = 0
    ) -> Self:
        """With no more names than the caller may see in a minute."""
        if not self.names or per_minute == float("inf"):
            return self
        take = partial(quotas.may_look_up, caller, per_minute)
        return replace(self, meter=Meter(take, credit=credit))

    def similarity(self, value: float | None, of: Identity) -> float | None:
        if self.similarities == "exact" or value is None:
            return value
        if self.similarities == "withheld" or of.threshold is None or value < of.threshold:
            return None
        return round(value, 2)


# Outcomes are written where they belong: a message that is made first and then put into another
# is copied, at every level, for every frame. A field that is set, if to 0, makes all above it
# present.


def identity(value: Identity, view: View, track_id: int = 0) -> pb.Identity:
    message = pb.Identity()
    _fill_identity(message, value, view, track_id)
    return message


def _fill_identity(message: pb.Identity, value: Identity, view: View, track_id: int = 0) -> None:
    if not view.names or (view.meter is not None and not view.meter.names(track_id, value)):
        value = _UNNAMED
    message.decision = DECISIONS[value.decision]
    message.subject_id = value.subject_id
    if (shown := view.similarity(value.similarity, value)) is not None:
        message.similarity = shown
    if value.threshold is not None:
        message.threshold = value.threshold
    for candidate in value.candidates:
        if (shown := view.similarity(candidate.similarity, value)) is not None:
            message.candidates.add(subject_id=candidate.subject_id, similarity=shown)


def liveness(value: Liveness) -> pb.Liveness:
    message = pb.Liveness()
    _fill_liveness(message, value)
    return message


def _fill_liveness(message: pb.Liveness, value: Liveness) -> None:
    message.verdict = VERDICTS[value.verdict]
    if value.score is not None:
        message.score = value.score
    if value.no_context:
        message.reason = pb.LIVENESS_REASON_NO_CONTEXT


def box(value: Box) -> pb.BoundingBox:
    return pb.BoundingBox(x=value.x, y=value.y, width=value.width, height=value.height)


def face(value: Face, view: View) -> pb.Face:
    message = pb.Face()
    _fill_face(message, value, view)
    return message


def _fill_face(message: pb.Face, value: Face, view: View) -> None:
    message.track_id = value.track_id
    message.score = value.score
    place, where = message.box, value.box
    place.x, place.y, place.width, place.height = where.x, where.y, where.width, where.height
    add = message.landmarks.add
    for x, y in value.landmarks:
        add(x=x, y=y)
    _fill_identity(message.identity, value.identity, view, value.track_id)
    _fill_liveness(message.liveness, value.liveness)
    message.recognized_now = value.recognized_now
    message.links_since_evidence = value.links_since_evidence
    if value.ood_score is not None:
        message.ood_score = value.ood_score
    if value.evidence_age_ns is not None:
        _fill_duration(message.evidence_age, value.evidence_age_ns)


def faces(values: Iterable[Face], view: View) -> list[pb.Face]:
    return [face(value, view) for value in values]


def _fill_duration(message: duration_pb2.Duration, ns: int) -> None:
    message.seconds, message.nanos = divmod(ns, 1_000_000_000)


def result(value: FrameResult, view: View) -> pb.FrameResult:
    message = pb.FrameResult()
    _fill_result(message, value, view)
    return message


def _fill_result(message: pb.FrameResult, value: FrameResult, view: View) -> None:
    message.width = value.width
    message.height = value.height
    for shown in value.faces:
        _fill_face(message.faces.add(), shown, view)
    for timing in value.timings:
        told = message.timings.add(stage=STAGES[timing.stage])
        _fill_duration(told.queue, timing.queue_ns)
        _fill_duration(told.service, timing.service_ns)
    if value.missing_stages:
        message.missing_stages.extend(stages(value.missing_stages))


def stages(values: Sequence[Stage]) -> list[pb.Stage.ValueType]:
    return [STAGES[value] for value in values]


def outcome(value: Outcome, stream_id: str, view: View) -> analysis_pb.AnalyzeStreamResponse:
    """The message of a stream that tells an outcome."""
    response = analysis_pb.AnalyzeStreamResponse()
    fill_outcome(response.outcome, value, stream_id, view)
    return response


def fill_outcome(
    message: analysis_pb.FrameOutcome, value: Outcome, stream_id: str, view: View
) -> None:
    message.frame_id = value.frame_id
    message.stream_id = stream_id
    _fill_duration(message.stream_offset, value.stream_offset_ns)
    _fill_duration(message.age, value.age_ns)
    if value.capture_time_ns is not None:
        message.capture_time.CopyFrom(timestamp(value.capture_time_ns))
    body = value.body
    if isinstance(body, FrameResult):
        _fill_result(message.result, body, view)
    elif isinstance(body, FrameDrop):
        message.drop.reason = DROPS[body.reason]
    else:
        assert isinstance(body, FrameError)
        message.error.CopyFrom(
            status(body.reason, body.message, dict(body.metadata), retryable=body.retryable)
        )
