"""What a pool tells of itself."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from facelane_server.domain import Stage
from facelane_server.pools.restart import Life


class PoolState(enum.StrEnum):
    """What a pool can do now."""

    STARTING = "STARTING"
    """No worker was ready yet."""
    SERVING = "SERVING"
    DEGRADED = "DEGRADED"
    """Fewer workers than configured; the others serve."""
    NOT_SERVING = "NOT_SERVING"
    """No worker can infer."""
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"


class PoolChange(enum.StrEnum):
    """What ``on_change`` tells of."""

    STATE = "STATE"
    WORKER_READY = "WORKER_READY"
    WORKER_LOST = "WORKER_LOST"
    WORKER_QUARANTINED = "WORKER_QUARANTINED"
    WORKER_RESTARTING = "WORKER_RESTARTING"
    """On purpose: by an operator, or because it outgrew its memory budget."""
    MODEL_RELOADED = "MODEL_RELOADED"


@dataclass(frozen=True, slots=True)
class PoolEvent:
    """A change of a pool. ``reason``: of a loss, else empty."""

    change: PoolChange
    pool: str
    state: PoolState
    worker_id: str = ""
    pid: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Work:
    """What the workers of a pool have done. ``busy_ns``: the time in which each had a job, of all
    together, since the start; ``answers``: tasks of those jobs. ``queued`` tasks of streams that
    are in a hurry wait now, for ``workers`` that take them. ``waited_ns``: of all ``jobs``
    together, how long the video in each waited for those who decode it, on average."""

    busy_ns: int
    answers: int
    queued: int
    workers: int
    waited_ns: int = 0
    jobs: int = 0


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """``life`` of an idle spare is READY too. ``uptime_s``: since it became ready."""

    worker_id: str
    pid: int
    life: Life
    device: str
    restarts: int
    last_loss: str
    memory_mib: int
    uptime_s: float
    spare: bool
    sandbox: str = ""
    """What its process is confined by, as it says itself."""
    decoders: int = 0
    """Streams of video that it decodes."""


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """Counters are since the start of the server."""

    pool: str
    stage: Stage
    state: PoolState
    model_id: str
    isolation: str
    queued: int
    in_flight: int
    completed: int
    failed: int
    retried: int
    losses: int
    workers: tuple[WorkerInfo, ...]
    replayed: int = 0
    """Groups of pictures of video that were decoded again."""
    budget_mib: int = 0
    """Of each worker, on its device; 0 = none was given."""
