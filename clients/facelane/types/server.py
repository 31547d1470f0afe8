"""The server as operators see it: health, models, pools, and events."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from facelane.types.faces import BoundingBox, Identity, Liveness, Stage
from facelane.types.zones import RuleReport


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
class ServerLoad:
    """What the server carries, and what it could carry, learnt from its work of the last seconds.

    ``offered_fps``: pictures a second that streams send; ``capacity_fps``: those of this kind that
    it can analyse in time; ``load``: the one over the other, from 1 on streams are thinned;
    ``headroom_streams``: streams more that fit, at the rate of those that are open;
    ``thinned_streams``: those of which pictures are dropped as THINNED now.
    """

    offered_fps: float
    capacity_fps: float
    load: float
    headroom_streams: int
    thinned_streams: int = 0


@dataclass(frozen=True, slots=True)
class Degradation:
    """Something that the server goes on without. ``component``: ``store`` or ``events``;
    ``cause`` in capitals (FILE_GONE, DISK_FULL, UNREACHABLE, ...); ``message``: what follows from
    it, and what to do."""

    component: str
    cause: str
    message: str


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server is. ``load``: ``None`` while there was too little work to learn it from."""

    version: str
    start_time: datetime | None
    models: tuple[ModelInfo, ...]
    limits: ServerLimits
    open_streams: int = 0
    draining: bool = False
    load: ServerLoad | None = None
    degradations: tuple[Degradation, ...] = ()
    """Empty = nothing is amiss."""
    shards: tuple[ShardInfo, ...] = ()
    """Empty = the server is one process."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One process of a server that has several. ``last_loss``: why it was lost last, empty =
    never."""

    shard: int
    pid: int
    state: WorkerState
    open_streams: int
    restarts: int
    last_loss: str


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
    """``worker_id`` is pool#index, or shard/pool#index; ``uptime`` in seconds."""

    worker_id: str
    pid: int
    state: WorkerState
    device: str = ""
    restarts: int = 0
    last_loss: str = ""
    memory_bytes: int = 0
    uptime: float = 0.0
    sandbox: str = ""
    """What its process is confined by, such as ``landlock 7, seccomp``."""


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
    memory_budget_bytes: int = 0
    """What each worker may hold of its device; 0 = no budget is given."""


class EventKind(enum.StrEnum):
    """What happened."""

    UNSPECIFIED = "UNSPECIFIED"
    SUBJECT_SEEN = "SUBJECT_SEEN"
    """A track was given a name; told again when it is LIVE with that name."""
    UNKNOWN_SEEN = "UNKNOWN_SEEN"
    """A track has had a trusted face without a name for a while."""
    SPOOF_SUSPECTED = "SPOOF_SUSPECTED"
    STREAM_OPENED = "STREAM_OPENED"
    STREAM_CLOSED = "STREAM_CLOSED"
    POOL_CHANGED = "POOL_CHANGED"
    DEVICE_MEMORY = "DEVICE_MEMORY"
    """A device is above its memory warning level, or below it again."""
    TRACK_STARTED = "TRACK_STARTED"
    """A face came into a stream: one for every track, as TRACK_ENDED is."""
    TRACK_UPDATED = "TRACK_UPDATED"
    """A track's identity, its liveness or the trust in it changed."""
    TRACK_ENDED = "TRACK_ENDED"
    FACE_HIDDEN = "FACE_HIDDEN"
    """A face has not been trusted for a while: covered, turned away, blurred."""
    ZONE_ENTERED = "ZONE_ENTERED"
    ZONE_LEFT = "ZONE_LEFT"
    """A track has left a zone, or ended in it."""
    ZONE_DWELL = "ZONE_DWELL"
    """A track has been in a zone for as long as the zone says; once a stay."""
    ZONE_UNKNOWN = "ZONE_UNKNOWN"
    """A trusted face that nobody knows has been in a zone for as long; once a stay."""
    LINE_CROSSED = "LINE_CROSSED"
    SUBJECT_CANDIDATE = "SUBJECT_CANDIDATE"
    """Who it might be, in a gallery where people have to say so (``confirm_sighting``)."""


@dataclass(frozen=True, slots=True)
class TrackReport:
    """A track as far as it has come.

    ``global_track_id`` is unique over streams and restarts. Offsets are seconds of the
    stream's media time, capture times the camera's clock, ``best_ood_score`` that of the
    best trusted look, ``looks`` those of the recogniser. ``display_name`` and ``labels`` are
    of the subject that is named, for keys that may read the gallery. ``best_similarity``: to whom
    is named, or to the nearest, as the key may see it. ``has_picture``: ``event_picture`` has one.
    """

    global_track_id: str
    first_offset: float
    last_offset: float
    first_capture_time: datetime | None
    last_capture_time: datetime | None
    box: BoundingBox
    best_ood_score: float | None = None
    looks: int = 0
    display_name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    best_similarity: float | None = None
    has_picture: bool = False


@dataclass(frozen=True, slots=True)
class EventPicture:
    """JPEGs of an event's face: with its surroundings (224 x 224 pixels), and as the recogniser saw
    it (empty where there is none)."""

    picture: bytes
    chip: bytes = b""


@dataclass(frozen=True, slots=True)
class Event:
    """``resume_token`` given to ``watch_events`` goes on after this event. ``rule``: of zones and
    lines."""

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
    track: TrackReport | None = None
    rule: RuleReport | None = None
    candidate_sequence: int = 0
    """Of a SUBJECT_SEEN that was confirmed: the number of its SUBJECT_CANDIDATE."""
    candidate_subject_id: str = ""
    """Of a SUBJECT_CANDIDATE: who it might be. Its ``identity`` matches nobody."""


class SightingState(enum.StrEnum):
    """What became of a candidate."""

    UNSPECIFIED = "UNSPECIFIED"
    OPEN = "OPEN"
    CONFIRMED = "CONFIRMED"
    DENIED = "DENIED"


@dataclass(frozen=True, slots=True)
class Confirmation:
    """``agreed``: keys that have agreed so far; ``needed``: how many it takes."""

    state: SightingState
    agreed: int
    needed: int


@dataclass(frozen=True, slots=True)
class WorkerRestarted:
    """Process ids before and after a restart."""

    old_pid: int
    new_pid: int


@dataclass(frozen=True, slots=True)
class ModelReloaded:
    """Model ids before and after a reload. ``templates_not_searched``: of other models than
    the one that serves now. ``remembered``: a restart of the server comes back with it."""

    old_model_id: str
    new_model_id: str
    templates_not_searched: int = 0
    remembered: bool = True
