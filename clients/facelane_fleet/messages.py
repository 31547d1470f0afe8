"""All that supervisor, nodes and people tell one another, in one place. Encoded as JSON: what
crosses Ray is bytes, no pickled classes, and never a frame."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from facelane_bridge.hosting import CameraReport, HostedCamera
from facelane_bridge.output import CameraTotals
from facelane_fleet.placement import Capacity, State

MAX_ENDED: Final = 4096
"""Books of ended runs that a node keeps until the supervisor has taken them over."""


class ServersOrder(msgspec.Struct, frozen=True, kw_only=True):
    """The servers that a node is to have. ``config``: of each, as of a file of its own, but for
    what the node fills in. ``digest``: of all this; another one means new servers."""

    count: int
    config: dict[str, Any]
    listen: str
    metrics: str
    state_dir: str
    ask: dict[str, Any]
    """``ServerSettings`` without a target: how the node speaks to them."""
    digest: str = ""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """To a node, each round: all that it is to have."""

    revision: int
    cameras: tuple[HostedCamera, ...] = ()
    servers: ServersOrder
    cameras_per_bridge: int = 16
    lease: float
    silence: float
    taken: int = 0
    """Books up to this number are taken over: they need not be told again."""
    memo: bytes | None = None
    """To be kept for the supervisor; ``None``: as before."""
    memo_revision: int = 0


class ServerReport(msgspec.Struct, kw_only=True):
    """One server of a node. ``state``: STARTING, SERVING, NOT_SERVING, BACKOFF, STOPPING."""

    slot: int
    state: str
    target: str
    pid: int = 0
    card: str = ""
    restarts: int = 0
    message: str = ""
    capacity_fps: float | None = None
    offered_fps: float | None = None
    room: int | None = None
    open_streams: int = 0
    digest: str = ""


class EndedRun(msgspec.Struct, kw_only=True):
    """The books of a run that is over."""

    number: int
    camera: str
    report: CameraReport


class Report(msgspec.Struct, kw_only=True):
    """From a node: what is there. ``revision``: of the orders that it follows; ``cameras``: those
    that it may still read, with their terms."""

    incarnation: str
    version: str
    revision: int
    memo_revision: int
    cameras: dict[str, int]
    reports: dict[str, CameraReport]
    ended: list[EndedRun]
    servers: list[ServerReport]
    bridge: str
    """RUNNING, ABSENT, BACKOFF; LOCKED while one of before has not ended."""
    bridges: int = 0
    bridge_restarts: int = 0


class Books(msgspec.Struct, kw_only=True):
    """A camera's frames over all its runs but the present one."""

    totals: CameraTotals
    runs: int = 0
    lost_runs: int = 0
    """Whose last frames are not known: their node or bridge was lost."""
    closed_term: int = 0
    """Runs up to this term were closed for a node that was given up: what it still tells of them,
    should it come back, is in the books."""


class Memo(msgspec.Struct, kw_only=True):
    """What outlives the supervisor: kept by every node, the newest counts."""

    number: int
    document: dict[str, Any]
    server_config: dict[str, Any]
    state: State
    books: dict[str, Books] = {}
    taken: dict[str, int] = {}
    """By incarnation of a node: the number of its last books that are in ``books``."""
    names: dict[str, str] = {}
    """Of nodes, by their ids."""
    targets: dict[str, str] = {}
    """Of servers: where they listen. An order must name them before they are heard of again."""
    capacity: dict[str, Capacity] = {}
    """Of servers, as far as it is learnt."""


class CameraStatus(msgspec.Struct, kw_only=True):
    """A camera for people. ``gap_s``: the longest time between two of its results within the last
    minute, over moves and losses; ``age_s``: since the newest."""

    name: str
    state: str
    reason: str = ""
    node: str = ""
    server: str = ""
    term: int = 0
    pinned: str = ""
    age_s: float | None = None
    gap_s: float = 0.0
    first_result_at: float | None = None
    last_result_at: float | None = None
    stream: CameraTotals = msgspec.field(default_factory=CameraTotals)
    """Of the present run."""
    total: CameraTotals = msgspec.field(default_factory=CameraTotals)
    runs: int = 0
    lost_runs: int = 0
    balanced: bool = True
    """Every frame that was told of has one outcome or is on its way."""


class NodeStatus(msgspec.Struct, kw_only=True):
    """A node for people. ``state``: UP, STARTING, SILENT, DRAINING, LOST."""

    id: str
    name: str
    address: str
    state: str
    cards: int = 0
    cameras: int = 0
    message: str = ""
    bridge: str = ""
    servers: list[ServerReport] = []


class Status(msgspec.Struct, kw_only=True):
    """The whole fleet."""

    fleet: str
    time: str
    supervisor_pid: int
    supervisor_since: str
    revision: int
    recovered: bool
    """Every node that is there has told what it has: cameras are placed from then on."""
    nodes: list[NodeStatus] = []
    cameras: list[CameraStatus] = []
    changes: list[str] = []
    """The last ones, newest last."""
