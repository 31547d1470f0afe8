"""The nouns of the service, free of gRPC, torch, SQL and sockets.

Every layer above ``ipc`` speaks in these types; ``edge`` alone turns them into
protobuf. Coordinates are pixels of the frame as the client sent it, origin at
the top left, x to the right, y down.

They are msgspec structs because some twenty are made for every frame: ten times as cheap as
frozen dataclasses, and the garbage collector need not look at them (they form no cycles).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

import msgspec


class Encoding(enum.StrEnum):
    """How the bytes of a frame are to be read."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    BGR24 = "bgr24"
    RGB24 = "rgb24"
    NV12 = "nv12"
    H264 = "h264"
    """One access unit of video, Annex B; in streams only."""
    H265 = "h265"

    is_video: bool
    """Whether it takes pictures before it to decode one."""
    is_raw: bool

    def __init__(self, value: str) -> None:
        # Looked up for every frame, several times.
        self.is_video = value in ("h264", "h265")
        self.is_raw = value in ("bgr24", "rgb24", "nv12")


class Picture(msgspec.Struct, frozen=True, gc=False):
    """One picture as received. ``width``/``height``/``stride`` are zero unless raw.

    ``data`` is contiguous, and nobody changes it; a view where a copy would take long.
    ``stride`` is in bytes a row (of the Y plane for NV12, whose UV plane has the
    same stride and follows at ``stride * height``).
    """

    encoding: Encoding
    data: bytes | memoryview
    width: int = 0
    height: int = 0
    stride: int = 0


class Frame(msgspec.Struct, frozen=True, gc=False):
    """One frame of a stream."""

    frame_id: int
    picture: Picture
    stream_offset_ns: int
    capture_time_ns: int | None = None


class Overload(enum.StrEnum):
    """What a lane does with frames that arrive faster than they are served."""

    LATEST_WINS = "latest_wins"
    LOSSLESS = "lossless"


class DropReason(enum.StrEnum):
    """Why a frame that was received was never analysed."""

    SUPERSEDED = "SUPERSEDED"
    """A newer frame of the same stream took its place (LATEST_WINS)."""
    TOO_OLD = "TOO_OLD"
    """It exceeded the stream's maximum frame age before a worker was free."""
    DRAINING = "DRAINING"
    """The server is shutting down."""
    STREAM_CLOSED = "STREAM_CLOSED"
    """The stream ended before the frame was dispatched."""
    WAITING_FOR_KEY_FRAME = "WAITING_FOR_KEY_FRAME"
    """Video: it cannot be decoded without a key frame that is not there."""
    THINNED = "THINNED"
    """The server has more to do than it can in time: it takes an even part of every stream."""


class Reason(enum.StrEnum):
    """Machine-readable reasons of errors: ``ErrorInfo.reason`` on the wire (AIP-193).

    ``error_reason.proto`` is the list, and says what each means; a test compares.
    """

    # The picture.
    PICTURE_EMPTY = "PICTURE_EMPTY"
    PICTURE_CORRUPT = "PICTURE_CORRUPT"
    PICTURE_TOO_SMALL = "PICTURE_TOO_SMALL"
    PICTURE_TOO_LARGE = "PICTURE_TOO_LARGE"
    PICTURE_TOO_COSTLY = "PICTURE_TOO_COSTLY"
    ENCODING_UNSUPPORTED = "ENCODING_UNSUPPORTED"
    ENCODING_MISMATCH = "ENCODING_MISMATCH"
    RAW_LAYOUT_INVALID = "RAW_LAYOUT_INVALID"
    ENCODING_CHANGED = "ENCODING_CHANGED"
    VIDEO_UNSUPPORTED = "VIDEO_UNSUPPORTED"
    PARAMETER_SETS_MISSING = "PARAMETER_SETS_MISSING"
    # The stream.
    CONFIG_MISSING = "CONFIG_MISSING"
    CONFIG_REPEATED = "CONFIG_REPEATED"
    CONFIG_INVALID = "CONFIG_INVALID"
    FRAME_ID_NOT_INCREASING = "FRAME_ID_NOT_INCREASING"
    MESSAGE_EMPTY = "MESSAGE_EMPTY"
    SLOW_READER = "SLOW_READER"
    STREAM_LIMIT = "STREAM_LIMIT"
    CAPACITY = "CAPACITY"
    DRAINING = "DRAINING"
    # The work.
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    POOL_UNAVAILABLE = "POOL_UNAVAILABLE"
    POOL_OVERLOADED = "POOL_OVERLOADED"
    TOO_MANY_BAD_PICTURES = "TOO_MANY_BAD_PICTURES"
    WORKER_LOST = "WORKER_LOST"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    POISONED = "POISONED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"
    # The gallery.
    SUBJECT_NOT_FOUND = "SUBJECT_NOT_FOUND"
    SUBJECT_EXISTS = "SUBJECT_EXISTS"
    TEMPLATE_NOT_FOUND = "TEMPLATE_NOT_FOUND"
    GALLERY_FULL = "GALLERY_FULL"
    GALLERY_UNAVAILABLE = "GALLERY_UNAVAILABLE"
    NO_FACE = "NO_FACE"
    MULTIPLE_FACES = "MULTIPLE_FACES"
    OOD_REJECTED = "OOD_REJECTED"
    SPOOF_SUSPECTED = "SPOOF_SUSPECTED"
    NO_CONTEXT = "NO_CONTEXT"
    LIVENESS_UNDECIDED = "LIVENESS_UNDECIDED"
    TEMPLATES_LOST = "TEMPLATES_LOST"
    FACE_OF_ANOTHER = "FACE_OF_ANOTHER"
    NO_TEMPLATES = "NO_TEMPLATES"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    ARGUMENT_INVALID = "ARGUMENT_INVALID"
    ETAG_MISMATCH = "ETAG_MISMATCH"
    # The caller.
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    NAMING_TOO_LOOSE = "NAMING_TOO_LOOSE"
    NAMING_NOT_MEASURED = "NAMING_NOT_MEASURED"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    # Events and administration.
    RESUME_TOKEN_INVALID = "RESUME_TOKEN_INVALID"  # noqa: S105 - a reason, not a secret
    HISTORY_LOST = "HISTORY_LOST"
    STREAM_NOT_FOUND = "STREAM_NOT_FOUND"
    EVENT_NOT_FOUND = "EVENT_NOT_FOUND"
    PICTURE_NOT_FOUND = "PICTURE_NOT_FOUND"
    POOL_NOT_FOUND = "POOL_NOT_FOUND"
    WORKER_NOT_FOUND = "WORKER_NOT_FOUND"
    MODEL_INVALID = "MODEL_INVALID"


class FacelaneError(Exception):
    """An error with a reason that a program can act on.

    ``message`` says what is wrong and what to do next; it never holds a subject's
    name, an embedding or a picture. ``metadata`` values are short strings.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})
        self.retryable = retryable


class Box(msgspec.Struct, frozen=True, gc=False):
    """An axis-aligned box in pixels; ``x``, ``y`` may lie outside of the frame."""

    x: float
    y: float
    width: float
    height: float


Landmarks = tuple[tuple[float, float], ...]
"""Five points (x, y): eye at the picture's left, the other eye, nose, mouth corner at
the picture's left, the other mouth corner (the order of the ArcFace template)."""


class DetectedFace(msgspec.Struct, frozen=True, gc=False):
    """A face of one picture before any model behind the detector has seen it. ``score`` in
    [0, 1]; ``crops`` in the order that the detector pool was configured with;
    ``signature``: how it looks, roughly (``limits.SIGNATURE_BYTES``), or empty."""

    box: Box
    score: float
    landmarks: Landmarks
    crops: tuple[bytes, ...] = ()
    signature: bytes = b""


class Decision(enum.StrEnum):
    """The outcome of open-set identification of one face."""

    MATCH = "MATCH"
    UNKNOWN = "UNKNOWN"
    AMBIGUOUS = "AMBIGUOUS"
    REJECTED_OOD = "REJECTED_OOD"
    NOT_EVALUATED = "NOT_EVALUATED"
    """The recogniser was switched off for the stream, or could not answer."""


class LivenessVerdict(enum.StrEnum):
    """ISO/IEC 30107-3: bona fide, attack, no response."""

    LIVE = "LIVE"
    SPOOF = "SPOOF"
    UNDECIDED = "UNDECIDED"


class Stage(enum.StrEnum):
    """The stages of the pipeline; also the tasks that a model package can have."""

    DETECTOR = "detector"
    RECOGNIZER = "recognizer"
    LIVENESS = "liveness"


STAGES: Final = tuple(Stage)
"""To go over an enumeration takes ten times as long."""


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A subject whose best template is near the probe. ``similarity`` is a cosine, [-1, 1]."""

    subject_id: str
    similarity: float


class Identity(msgspec.Struct, frozen=True, gc=False):
    """Who a face is, as far as the evidence carries."""

    decision: Decision
    subject_id: str = ""
    similarity: float | None = None
    """Cosine to the best candidate; ``None`` when nothing was compared."""
    candidates: tuple[Candidate, ...] = ()
    threshold: float | None = None
    """What ``similarity`` was compared with."""
    certain: bool = True
    """Whether this look alone may name a track; else a second one has to agree."""

    @property
    def subjects(self) -> set[str]:
        """Whoever is named, candidates included."""
        named: set[str] = set()
        self.tell(named)
        return named

    def tell(self, named: set[str]) -> None:
        """Whoever is named, candidates included, put to others."""
        if self.subject_id:
            named.add(self.subject_id)
        for candidate in self.candidates:
            named.add(candidate.subject_id)


class Liveness(msgspec.Struct, frozen=True, gc=False):
    """``score`` in [0, 1], higher = bona fide; ``None`` when the stage did not answer.
    ``no_context``: it was not asked, because the picture shows too little around the face."""

    verdict: LivenessVerdict
    score: float | None = None
    no_context: bool = False


class Keeping(enum.StrEnum):
    """Of which faces events keep pictures."""

    NONE = "none"
    UNKNOWN = "unknown"
    """Of those that nobody is named for."""
    ALL = "all"


class Portrait(msgspec.Struct, frozen=True, gc=False):
    """What a picture of a face would show: BGR, side x side x 3 uint8. ``chip``: as the recogniser
    saw it; ``around``: with its surroundings. ``promise`` in [0, 1], higher = clearer."""

    chip: bytes
    around: bytes
    promise: float


class Sighting(msgspec.Struct, frozen=True, gc=False):
    """A track in one picture: where it is and what is known of it.

    ``at_ns``: media time. ``capture_time_ns``: the camera's clock, since the epoch.
    ``looked``: the recogniser ran on this very picture. ``ood_score`` in [0, 1]. ``size``: width
    and height of the picture. ``doubtful``: it is not certain that this is still the same face.
    ``portrait``: where pictures are kept, and something looked at the face. ``as_of``: the revision
    of the gallery by which it is named: whoever was enrolled later is another, whatever the name.
    """

    track_id: int
    box: Box
    at_ns: int
    capture_time_ns: int | None
    identity: Identity
    liveness: Liveness
    ood_score: float | None = None
    looked: bool = False
    size: tuple[int, int] = (0, 0)
    doubtful: bool = False
    portrait: Portrait | None = None
    as_of: int = 0


class TrackReport(msgspec.Struct, frozen=True, gc=False):
    """A track as far as it has come. Offsets: media time; capture times: the camera's clock.

    ``best_ood_score``: of the looks that were trusted; ``best_similarity``: to whom is named now,
    or while nobody is, to the nearest. ``looks``: of the recogniser. ``picture``: by which the
    event's picture is kept, empty = none is.
    """

    track_id: int
    first_ns: int
    last_ns: int
    first_capture_ns: int | None
    last_capture_ns: int | None
    box: Box
    identity: Identity
    liveness: Liveness
    ood_score: float | None = None
    best_ood_score: float | None = None
    looks: int = 0
    best_similarity: float | None = None
    picture: str = ""


class Direction(enum.StrEnum):
    """Of a crossing; see ``areas.Line``."""

    IN = "IN"
    OUT = "OUT"


class RuleReport(msgspec.Struct, frozen=True, gc=False):
    """What a zone or a line has to tell. ``dwell_ns``: media time that the track has been in the
    zone. ``inside``: tracks in the zone now. ``direction``: of a crossing. ``entered``, ``left``:
    crossings of the line since the stream began, this one included."""

    name: str
    dwell_ns: int = 0
    inside: int = 0
    direction: Direction | None = None
    entered: int = 0
    left: int = 0


class Face(msgspec.Struct, frozen=True, gc=False):
    """One face of one frame. ``ood_score`` is in [0, 1], higher = more trustworthy."""

    track_id: int
    box: Box
    score: float
    landmarks: Landmarks
    identity: Identity
    liveness: Liveness
    ood_score: float | None = None
    recognized_now: bool = False
    """The recogniser ran on this very frame; else the values are the track's."""
    evidence_age_ns: int | None = None
    """Media time since the look that says what is shown; ``None`` = nothing is."""
    links_since_evidence: int = 0
    """Pictures of the track since that look."""


class StageTiming(msgspec.Struct, frozen=True, gc=False):
    """Durations on the server in nanoseconds. ``queue_ns``: waiting for a worker;
    ``service_ns``: dispatch until the answer."""

    stage: Stage
    queue_ns: int
    service_ns: int


class FrameResult(msgspec.Struct, frozen=True, gc=False):
    """The outcome of a frame that was analysed."""

    width: int
    height: int
    faces: tuple[Face, ...]
    timings: tuple[StageTiming, ...] = ()
    missing_stages: tuple[Stage, ...] = ()
    """Stages that were asked for and could not answer: their fields are absent, and
    an absent verdict is never LIVE and never a MATCH."""


class FaceReading(msgspec.Struct, frozen=True, gc=False):
    """A face of a single picture with its embedding. ``vector``: float32 bytes of unit norm,
    empty when it was not asked for or the recogniser did not answer. ``face``: its OOD score
    and its liveness are those of this one shot."""

    face: Face
    vector: bytes | bytearray = b""
    candidates: tuple[Candidate, ...] = ()
    """Of the gallery that was searched, if any; for those who decide, not for callers."""
    chip: bytes = b""
    """What the recogniser saw, size x size x 3 uint8 BGR, where it was asked for."""


class Reading(msgspec.Struct, frozen=True, gc=False):
    """A single picture after all stages that were asked for; ``readings`` has one entry for
    each face of ``result``. ``model_id``: of the recogniser whose vectors these are; empty =
    the one that serves."""

    result: FrameResult
    readings: tuple[FaceReading, ...]
    model_id: str = ""


class FrameDrop(msgspec.Struct, frozen=True, gc=False):
    """The outcome of a frame that was given up before it was analysed."""

    reason: DropReason


class FrameError(msgspec.Struct, frozen=True, gc=False):
    """The outcome of a frame that could not be analysed."""

    reason: Reason
    message: str
    retryable: bool = False
    metadata: Mapping[str, str] = msgspec.field(default_factory=dict)


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """Exactly one for every frame received, in increasing ``frame_id``."""

    frame_id: int
    stream_offset_ns: int
    capture_time_ns: int | None
    body: FrameResult | FrameDrop | FrameError
    age_ns: int
    """From the frame's receipt to the outcome, on the server."""
