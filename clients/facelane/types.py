"""What the client speaks in: frozen values, free of protobuf and gRPC.

Coordinates are pixels of the picture as it was sent, origin at the top left, x to the
right, y down. Durations are seconds. Wall-clock times are timezone-aware UTC datetimes.
A value that a newer server sends and this client does not know becomes the member that
promises least (``UNSPECIFIED``, ``NOT_EVALUATED``, ``UNDECIDED``), never a match.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeAlias, TypedDict

from facelane.errors import PictureError, Reason

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Bytes-like. ``Picture.raw`` takes any object with the buffer protocol, numpy arrays too."""


class Encoding(enum.StrEnum):
    """How the bytes of a picture are to be read."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    BGR24 = "bgr24"
    """Raw, three bytes a pixel, blue first (OpenCV's order)."""
    RGB24 = "rgb24"
    """Raw, three bytes a pixel, red first."""
    NV12 = "nv12"
    """Raw 4:2:0: a Y plane of ``stride * height`` bytes, then the interleaved UV plane."""

    @property
    def is_raw(self) -> bool:
        """Whether the bytes are pixels, so that width and height must be told."""
        return self in _RAW


_RAW = frozenset({Encoding.BGR24, Encoding.RGB24, Encoding.NV12})

# First bytes of formats that people send by mistake, to name them in the error.
_UNSUPPORTED_MAGIC = (
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"%PDF", "PDF"),
)


def _sniff(data: bytes) -> Encoding:
    if data[:3] == b"\xff\xd8\xff":
        return Encoding.JPEG
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return Encoding.PNG
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return Encoding.WEBP
    found = next((name for magic, name in _UNSUPPORTED_MAGIC if data.startswith(magic)), "")
    if not found and data[4:8] == b"ftyp":
        found = "HEIC, AVIF or MP4"
    raise PictureError(
        Reason.ENCODING_UNSUPPORTED,
        f"the bytes are {found or 'not a picture that is known here'}: send JPEG, PNG or WebP, "
        "or pixels with Picture.raw",
    )


def _encoding(name: Encoding | str) -> Encoding:
    try:
        return Encoding(name)
    except ValueError:
        raise PictureError(
            Reason.ENCODING_UNSUPPORTED, f"encoding {name!r}: give one of {', '.join(Encoding)}"
        ) from None


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture to send. Build it with ``encoded``, ``from_file`` or ``raw``.

    EXIF orientation is not applied by the server: rotate before sending.
    ``width``, ``height`` (pixels) and ``stride`` (bytes a row, 0 = packed) are zero unless
    the encoding is raw.
    """

    encoding: Encoding
    data: bytes = field(repr=False)
    width: int = 0
    height: int = 0
    stride: int = 0

    @classmethod
    def encoded(
        cls, data: Buffer, encoding: Encoding | Literal["jpeg", "png", "webp"] | None = None
    ) -> Picture:
        """A compressed picture; its encoding is read from the first bytes unless given.

        Raises:
            PictureError: no bytes (PICTURE_EMPTY), or not JPEG, PNG or WebP
                (ENCODING_UNSUPPORTED).
        """
        chosen = None if encoding is None else _encoding(encoding)
        if not isinstance(data, bytes):
            data = bytes(data)
        if not data:
            raise PictureError(
                Reason.PICTURE_EMPTY, "the picture has no bytes: check what was read"
            )
        if chosen is None:
            chosen = _sniff(data)
        if chosen.is_raw:
            raise PictureError(
                Reason.ENCODING_MISMATCH, f"{chosen} is raw: use Picture.raw with width and height"
            )
        return cls(chosen, data)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Picture:
        """A compressed picture read from a file.

        Raises:
            OSError: the file cannot be read.
            PictureError: as for ``encoded``.
        """
        return cls.encoded(Path(path).read_bytes())

    @classmethod
    def raw(
        cls,
        buffer: object,
        *,
        width: int = 0,
        height: int = 0,
        encoding: Encoding | Literal["bgr24", "rgb24", "nv12"] = Encoding.BGR24,
        stride: int = 0,
    ) -> Picture:
        """Pixels: any object with the buffer protocol, one byte an element.

        A numpy array of shape (height, width, 3), dtype uint8, tells its own size, and a
        view of one (a crop) is packed. For NV12 a 2-D array has shape
        (height * 3 / 2, width). Otherwise give ``width`` and ``height`` in pixels, and
        ``stride`` in bytes where rows are padded.

        Raises:
            PictureError: the buffer's size does not fit the layout (RAW_LAYOUT_INVALID), it
                is empty (PICTURE_EMPTY), or the encoding is none (ENCODING_UNSUPPORTED).
        """
        chosen = _encoding(encoding)
        if not chosen.is_raw:
            raise PictureError(
                Reason.ENCODING_MISMATCH, f"{chosen} is compressed: use Picture.encoded"
            )
        try:
            view = memoryview(buffer)  # type: ignore[arg-type]
        except TypeError:
            raise PictureError(
                Reason.RAW_LAYOUT_INVALID,
                f"{type(buffer).__name__} has no buffer: give bytes or a uint8 array",
            ) from None
        if view.itemsize != 1:
            raise PictureError(
                Reason.RAW_LAYOUT_INVALID,
                f"elements of {view.itemsize} bytes: convert the pixels to 8 bits first",
            )
        if view.ndim > 1 and view.shape is not None:
            width, height = _shape_of(view.shape, chosen, width, height)
        data = view.tobytes()
        _check_layout(chosen, len(data), width, height, stride)
        return cls(chosen, data, width, height, stride)


def _shape_of(shape: Sequence[int], encoding: Encoding, width: int, height: int) -> tuple[int, int]:
    """Width and height of an array; those that were also given must agree."""
    if encoding is Encoding.NV12:
        fits = len(shape) == 2 and shape[0] % 3 == 0
        found = (shape[-1], shape[0] * 2 // 3)
    else:
        fits = len(shape) == 3 and shape[2] == 3
        found = (shape[1], shape[0])
    if not fits:
        wanted = "(height * 3 / 2, width)" if encoding is Encoding.NV12 else "(height, width, 3)"
        raise PictureError(
            Reason.RAW_LAYOUT_INVALID,
            f"an array of shape {tuple(shape)}: {encoding} needs {wanted}",
        )
    if (width and width != found[0]) or (height and height != found[1]):
        raise PictureError(
            Reason.RAW_LAYOUT_INVALID,
            f"the array is {found[0]}x{found[1]}, but {width}x{height} was given: leave both out",
        )
    return found


def _check_layout(encoding: Encoding, size: int, width: int, height: int, stride: int) -> None:
    if not size:
        raise PictureError(Reason.PICTURE_EMPTY, "the buffer is empty: check what was read")
    if width <= 0 or height <= 0 or stride < 0:
        raise PictureError(
            Reason.RAW_LAYOUT_INVALID,
            f"{width}x{height}, stride {stride}: raw pixels need a positive width and height",
        )
    nv12 = encoding is Encoding.NV12
    if nv12 and (width % 2 or height % 2):
        raise PictureError(
            Reason.RAW_LAYOUT_INVALID, f"{width}x{height}: NV12 needs an even width and height"
        )
    row = width if nv12 else width * 3
    pitch = stride or row
    rows = height * 3 // 2 if nv12 else height
    if pitch < row or size != pitch * rows:
        raise PictureError(
            Reason.RAW_LAYOUT_INVALID,
            f"{size} bytes for {width}x{height} {encoding} with stride {stride}: "
            f"{max(pitch, row) * rows} are needed; check the size, the encoding and the stride",
        )


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture of a stream, for ``Client.analyze``.

    ``stream_offset`` is media time since the start of the stream in seconds and must not
    decrease; ``None`` takes the time since the stream was opened.
    """

    picture: Picture
    stream_offset: float | None = None
    capture_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """A point in pixels."""

    x: float
    y: float


@dataclass(frozen=True, slots=True)
class BoundingBox:
    """An axis-aligned box in pixels; its corner may lie outside of the picture."""

    x: float
    y: float
    width: float
    height: float


class Decision(enum.StrEnum):
    """The outcome of open-set identification of one face."""

    MATCH = "MATCH"
    """One subject is near enough, and far enough from the next."""
    UNKNOWN = "UNKNOWN"
    """Nobody in the gallery is near enough."""
    AMBIGUOUS = "AMBIGUOUS"
    """Two subjects are near enough and too close to each other."""
    REJECTED_OOD = "REJECTED_OOD"
    """The OOD score is below the threshold: the face is not named."""
    NOT_EVALUATED = "NOT_EVALUATED"
    """Recognition was not asked for, or could not answer (see ``missing_stages``)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A subject that is near the probe. ``similarity`` is a cosine in [-1, 1]."""

    subject_id: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a face is, as far as the evidence carries.

    ``subject_id`` is empty unless the decision is MATCH. ``similarity`` is the cosine to
    the best candidate in [-1, 1], ``None`` when nothing was compared.
    """

    decision: Decision = Decision.NOT_EVALUATED
    subject_id: str = ""
    similarity: float | None = None
    candidates: tuple[Candidate, ...] = ()

    @property
    def matched(self) -> bool:
        """Whether the face was named."""
        return self.decision is Decision.MATCH


class LivenessVerdict(enum.StrEnum):
    """ISO/IEC 30107-3: bona fide, attack, no response."""

    LIVE = "LIVE"
    SPOOF = "SPOOF"
    UNDECIDED = "UNDECIDED"


@dataclass(frozen=True, slots=True)
class Liveness:
    """``score`` is in [0, 1], higher = bona fide; ``None`` when the stage did not answer."""

    verdict: LivenessVerdict = LivenessVerdict.UNDECIDED
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Face:
    """One face of one picture.

    ``score`` is the detection's in [0, 1]. ``landmarks`` are five points: the eye at the
    picture's left, the other eye, nose, mouth corner at the picture's left, the other.
    ``ood_score`` is in [0, 1], higher = more trustworthy, ``None`` when the recogniser did
    not answer. ``track_id`` is stable over the frames of one stream and 0 for single
    pictures. ``recognized_now``: the recogniser ran on this very frame; otherwise identity
    and OOD score are the best of the track so far.
    """

    track_id: int
    box: BoundingBox
    score: float
    landmarks: tuple[Point, ...]
    identity: Identity
    liveness: Liveness
    ood_score: float | None = None
    recognized_now: bool = False


class Stage(enum.StrEnum):
    """The stages of the pipeline; also what a model package is for."""

    UNSPECIFIED = "unspecified"
    DETECTOR = "detector"
    RECOGNIZER = "recognizer"
    LIVENESS = "liveness"


@dataclass(frozen=True, slots=True)
class StageTiming:
    """Seconds by the server's clock. ``queue``: waiting for a worker; ``service``: from
    dispatch to the answer, transport between processes included."""

    stage: Stage
    queue: float
    service: float


@dataclass(frozen=True, slots=True)
class FrameResult:
    """A picture that was analysed; ``width`` and ``height`` in pixels.

    ``missing_stages`` were asked for and could not answer. What they would have said is
    absent; an absent verdict is never LIVE and never a MATCH.
    """

    width: int
    height: int
    faces: tuple[Face, ...]
    timings: tuple[StageTiming, ...] = ()
    missing_stages: tuple[Stage, ...] = ()


class DropReason(enum.StrEnum):
    """Why a frame was given up before it was analysed."""

    UNSPECIFIED = "UNSPECIFIED"
    SUPERSEDED = "SUPERSEDED"
    """A newer frame of the same stream took its place (latest wins)."""
    TOO_OLD = "TOO_OLD"
    """It exceeded the stream's maximum frame age before a worker was free."""
    DRAINING = "DRAINING"
    """The server is going away."""
    STREAM_CLOSED = "STREAM_CLOSED"
    """The stream ended before the frame was dispatched."""


@dataclass(frozen=True, slots=True)
class FrameDrop:
    """A frame that was given up before it was analysed."""

    reason: DropReason


@dataclass(frozen=True, slots=True)
class FrameError:
    """A frame that could not be analysed. The stream goes on.

    ``reason`` is one of ``Reason``, or one that a newer server knows. ``retryable``: the
    same picture may be sent again.
    """

    reason: str
    message: str
    retryable: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Exactly one for every frame that was sent, in increasing ``frame_id``.

    ``stream_offset`` and ``capture_time`` are the frame's own. ``age`` is from receipt of
    the frame to its outcome by the server's clock, ``round_trip`` from ``send`` to arrival
    by this machine's; both in seconds.
    """

    frame_id: int
    stream_offset: float
    capture_time: datetime | None
    body: FrameResult | FrameDrop | FrameError
    age: float = 0.0
    round_trip: float = 0.0

    @property
    def result(self) -> FrameResult | None:
        """The result, or ``None`` for a drop or an error."""
        return self.body if isinstance(self.body, FrameResult) else None

    @property
    def drop(self) -> FrameDrop | None:
        """The drop, or ``None`` for a result or an error."""
        return self.body if isinstance(self.body, FrameDrop) else None

    @property
    def error(self) -> FrameError | None:
        """The error, or ``None`` for a result or a drop."""
        return self.body if isinstance(self.body, FrameError) else None


class Overload(enum.StrEnum):
    """What the server does with frames that arrive faster than they are served."""

    LATEST_WINS = "latest_wins"
    """The newest frame replaces the one that waits; the old one is told as dropped."""
    LOSSLESS = "lossless"
    """Every frame is analysed; the sender is held back."""


@dataclass(frozen=True, slots=True)
class Reconnect:
    """How a stream comes back after its connection broke.

    The n-th try in a row waits ``initial_delay * multiplier**(n-1)`` seconds, at most
    ``max_delay``, spread by ± ``jitter`` (a share, 0-1) so that many cameras do not come
    back at once. ``max_attempts`` tries in a row without an outcome end the stream;
    0 = never give up.
    """

    max_attempts: int = 0
    initial_delay: float = 0.2
    max_delay: float = 10.0
    multiplier: float = 2.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if self.max_attempts < 0 or not 0 < self.initial_delay <= self.max_delay:
            raise ValueError("max_attempts >= 0 and 0 < initial_delay <= max_delay are needed")
        if self.multiplier < 1 or not 0 <= self.jitter < 1:
            raise ValueError("multiplier >= 1 and 0 <= jitter < 1 are needed")

    def delay(self, attempt: int, unit: float) -> float:
        """Seconds before the ``attempt``-th try in a row (from 1); ``unit`` is random in [0, 1)."""
        # The exponent is capped: a float overflows after a thousand tries.
        grown = self.initial_delay * self.multiplier ** min(attempt - 1, 64)
        return min(self.max_delay, grown) * (1 + self.jitter * (2 * unit - 1))


class AnalysisOptions(TypedDict, total=False):
    """Which stages run behind the detector, and what the answer holds."""

    skip_recognition: bool
    """Do not identify."""
    skip_liveness: bool
    """Do not judge liveness."""
    gallery: str
    """The gallery to search; "default" unless given."""
    max_faces: int
    """At most this many faces a picture, best score first; 0 = the server's limit."""
    max_candidates: int
    """Candidates to list for each face, 0-10."""
    min_face_size: int
    """Ignore faces whose box is narrower than this, in pixels."""


class StreamConfigOptions(AnalysisOptions, total=False):
    """The options of a stream that the server is told. All of them may be left out."""

    source_id: str
    """A name for the operator's logs and metrics: 0-64 letters, digits, ``-``, ``_``, ``.``."""
    overload: Overload | Literal["latest_wins", "lossless"]
    """``latest_wins`` unless given."""
    max_frame_age: float | None
    """Seconds; an older frame is dropped when a worker is free. ``None``: the server's."""
    weight: int
    """Share of the pools under load relative to other streams, 1-100; 0 = 10."""
    reinference_interval: float | None
    """Seconds of media time after which a track is recognised again. ``None``: the server's."""
    disable_tracking: bool
    """Recognise every face of every frame instead of once a track."""


class StreamOptions(StreamConfigOptions, total=False):
    """All options of a stream."""

    reconnect: Reconnect | None
    """Come back after a broken connection; ``None`` = the stream ends with an error."""
    buffer: int
    """Frames that may be in flight or unread at one time, at least the window; 1024."""
    stall_timeout: float
    """Seconds without any outcome, with frames in flight, after which the connection counts
    as broken; 30."""


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Bounds that hold for a stream. ``window``: frames without an outcome at one time.
    ``max_frame_age`` in seconds, ``None`` = no limit."""

    window: int
    max_frame_bytes: int = 0
    max_pixels: int = 0
    max_faces: int = 0
    max_frame_age: float | None = None


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The server accepted the stream. ``models`` maps a stage to name@version."""

    stream_id: str
    limits: StreamLimits
    models: Mapping[str, str] = field(default_factory=dict)
    server_version: str = ""


class StreamUpdateKind(enum.StrEnum):
    """Something about the stream that is not about one frame."""

    UNSPECIFIED = "UNSPECIFIED"
    STAGE_LOST = "STAGE_LOST"
    """A stage stopped answering; results name it in ``missing_stages``."""
    STAGE_RESTORED = "STAGE_RESTORED"
    DRAINING = "DRAINING"
    """The server is going away. A stream with ``reconnect`` finishes and comes back."""
    TRACK_ENDED = "TRACK_ENDED"
    CONNECTION_LOST = "CONNECTION_LOST"
    """Told by the client itself: the connection broke, and it will try again."""
    RECONNECTED = "RECONNECTED"
    """Told by the client itself: a new connection is open."""


@dataclass(frozen=True, slots=True)
class StreamUpdate:
    """``grace``: for DRAINING, the seconds for which the server goes on answering."""

    kind: StreamUpdateKind
    stage: Stage = Stage.UNSPECIFIED
    track_id: int = 0
    message: str = ""
    grace: float = 0.0


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """The count of a whole stream: ``received = results + drops + errors``.

    Over reconnections it is the sum. ``lost`` of the errors are frames that were in flight
    when a connection broke, ``connections`` is how many were opened.
    """

    received: int = 0
    results: int = 0
    drops: int = 0
    errors: int = 0
    faces: int = 0
    tracks: int = 0
    drops_by_reason: Mapping[str, int] = field(default_factory=dict)
    lost: int = 0
    connections: int = 1


@dataclass(frozen=True, slots=True)
class Subject:
    """Somebody who can be recognised. ``etag`` changes with every change."""

    subject_id: str
    gallery: str = "default"
    display_name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    template_count: int = 0
    create_time: datetime | None = None
    update_time: datetime | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Template:
    """One enrolled face of a subject. The embedding itself never leaves the server."""

    template_id: str
    subject_id: str
    model_id: str
    ood_score: float
    create_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Enrollment:
    """What enrolling made: the subject as it is now, the new template, the face used."""

    subject: Subject
    template: Template
    face: Face


@dataclass(frozen=True, slots=True)
class Verification:
    """1:1. ``similarity`` is a cosine in [-1, 1], ``None`` when the face was rejected;
    ``verified`` only when it reached ``threshold`` and the face could be trusted."""

    verified: bool
    similarity: float | None
    threshold: float
    face: Face


class HealthStatus(enum.StrEnum):
    """grpc.health.v1, per service and ("") in all."""

    UNKNOWN = "UNKNOWN"
    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model package in service. ``model_id`` is name@version#digest."""

    name: str
    version: str
    model_id: str
    task: Stage
    license: str = ""
    description: str = ""
    thresholds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What the server accepts; ``default_max_frame_age`` in seconds."""

    max_streams: int = 0
    window: int = 0
    max_frame_bytes: int = 0
    max_message_bytes: int = 0
    max_pixels: int = 0
    max_faces: int = 0
    default_max_frame_age: float = 0.0


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server is."""

    version: str
    start_time: datetime | None
    models: tuple[ModelInfo, ...]
    limits: ServerLimits
    open_streams: int = 0
    draining: bool = False


class PoolState(enum.StrEnum):
    """How a pool of workers fares."""

    UNSPECIFIED = "UNSPECIFIED"
    STARTING = "STARTING"
    SERVING = "SERVING"
    DEGRADED = "DEGRADED"
    """Some workers are gone, the others serve."""
    NOT_SERVING = "NOT_SERVING"
    DRAINING = "DRAINING"


class WorkerState(enum.StrEnum):
    """Where a worker is in its life."""

    UNSPECIFIED = "UNSPECIFIED"
    SPAWNED = "SPAWNED"
    LOADING = "LOADING"
    WARMING = "WARMING"
    READY = "READY"
    DRAINING = "DRAINING"
    EXITED = "EXITED"
    LOST = "LOST"
    BACKOFF = "BACKOFF"
    QUARANTINED = "QUARANTINED"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """``worker_id`` is pool#index, ``uptime`` in seconds."""

    worker_id: str
    pid: int
    state: WorkerState
    device: str = ""
    restarts: int = 0
    last_loss: str = ""
    memory_bytes: int = 0
    uptime: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """A pool: the workers that serve one model."""

    pool: str
    task: Stage
    state: PoolState
    model_id: str = ""
    isolation: str = ""
    queued: int = 0
    in_flight: int = 0
    completed: int = 0
    failed: int = 0
    workers: tuple[WorkerInfo, ...] = ()


class EventKind(enum.StrEnum):
    """What happened."""

    UNSPECIFIED = "UNSPECIFIED"
    SUBJECT_SEEN = "SUBJECT_SEEN"
    """A track was given a name."""
    UNKNOWN_SEEN = "UNKNOWN_SEEN"
    """A track ended without one."""
    SPOOF_SUSPECTED = "SPOOF_SUSPECTED"
    STREAM_OPENED = "STREAM_OPENED"
    STREAM_CLOSED = "STREAM_CLOSED"
    POOL_CHANGED = "POOL_CHANGED"
    DEVICE_MEMORY = "DEVICE_MEMORY"
    """A device is above its memory warning level, or below it again."""


@dataclass(frozen=True, slots=True)
class Event:
    """``resume_token`` given to ``watch_events`` goes on after this event."""

    sequence: int
    kind: EventKind
    event_time: datetime | None
    resume_token: str
    source_id: str = ""
    stream_id: str = ""
    track_id: int = 0
    gallery: str = ""
    identity: Identity = field(default_factory=Identity)
    liveness: Liveness = field(default_factory=Liveness)
    ood_score: float | None = None
    pool: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class WorkerRestarted:
    """Process ids before and after a restart."""

    old_pid: int
    new_pid: int


@dataclass(frozen=True, slots=True)
class ModelReloaded:
    """Model ids before and after a reload."""

    old_model_id: str
    new_model_id: str
