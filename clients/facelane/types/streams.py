"""A stream: its options and limits, the outcome of every frame, and the count."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypedDict

from facelane.types.faces import FrameResult, Stage
from facelane.types.zones import Line, Zone


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
    WAITING_FOR_KEY_FRAME = "WAITING_FOR_KEY_FRAME"
    """Video: it cannot be decoded without a key frame that did not come or is no longer kept."""
    THINNED = "THINNED"
    """The server has more streams than it can serve in time: it takes an even part of each; the
    update RATE says how much."""


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
    by this machine's; both in seconds. ``stream_id``: of the stream on the server; track
    ids are unique within it, and a stream that reconnects is another one.
    """

    frame_id: int
    stream_offset: float
    capture_time: datetime | None
    body: FrameResult | FrameDrop | FrameError
    age: float = 0.0
    round_trip: float = 0.0
    stream_id: str = ""

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


class NamingOptions(TypedDict, total=False):
    """How sure names must be, beside what the server asks for; one of them at most."""

    false_naming: float | None
    """The share of strangers that may be named here, in (0, 1); ``None`` = as the server is set
    up. A lower one makes names rarer and surer; a higher one is refused with NAMING_TOO_LOOSE
    unless the key's role has ``loosen-naming``."""
    match_threshold: float | None
    """Instead: the least cosine of a match, in [0, 1], besides what the server asks for."""


class AnalysisOptions(NamingOptions, total=False):
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
    """Share of the pools under load relative to other streams of the same key, 1-100; 0 = 10."""
    reinference_interval: float | None
    """Seconds of media time after which a track is recognised again. ``None``: the server's."""
    disable_tracking: bool
    """Recognise every face of every frame instead of once a track."""
    analysis_fps: float
    """At most so many pictures a second of media time are analysed, 0.1-1000; 0 = all. The
    others are dropped as SUPERSEDED at once; of video they are decoded where it takes them."""
    private: bool
    """Nobody may look at this stream (``watch_stream``), and no event keeps a picture of it."""
    zones: Sequence[Zone]
    """Of this stream, besides those that the server has for its source."""
    lines: Sequence[Line]
    """The same of lines across which faces are counted."""


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
    """The server accepted the stream. ``models`` maps a stage to name@version. ``false_naming``:
    the share of strangers that may be named in it, ``match_threshold``: the least cosine of a
    match; both ``None`` where nobody is named. ``move``: it did not accept it, because another of
    its processes has more room, and the client goes there by itself: to this target, or, where that
    is empty, to the same one on a new connection."""

    stream_id: str
    limits: StreamLimits
    models: Mapping[str, str] = field(default_factory=dict)
    server_version: str = ""
    false_naming: float | None = None
    match_threshold: float | None = None
    move: str | None = None


class StreamUpdateKind(enum.StrEnum):
    """Something about the stream that is not about one frame."""

    UNSPECIFIED = "UNSPECIFIED"
    STAGE_LOST = "STAGE_LOST"
    """A stage stopped answering; results name it in ``missing_stages``."""
    STAGE_RESTORED = "STAGE_RESTORED"
    DRAINING = "DRAINING"
    """The server is going away. A stream with ``reconnect`` finishes and comes back."""
    TRACK_ENDED = "TRACK_ENDED"
    KEY_FRAME_WANTED = "KEY_FRAME_WANTED"
    """Video: frames are dropped until the next key frame; ask the camera for one if you can."""
    RATE = "RATE"
    """The server analyses ``rate_fps`` pictures a second of this stream from now on, and drops the
    others as THINNED: it has more streams than it can serve in time. 0 = all again."""
    CONNECTION_LOST = "CONNECTION_LOST"
    """Told by the client itself: the connection broke, and it will try again."""
    RECONNECTED = "RECONNECTED"
    """Told by the client itself: a new connection is open."""


@dataclass(frozen=True, slots=True)
class StreamUpdate:
    """``grace``: for DRAINING, the seconds for which the server goes on answering. ``rate_fps``:
    for RATE, analysed pictures a second; 0 = all."""

    kind: StreamUpdateKind
    stage: Stage = Stage.UNSPECIFIED
    track_id: int = 0
    message: str = ""
    grace: float = 0.0
    rate_fps: float = 0.0


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
