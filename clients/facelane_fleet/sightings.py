"""What the supervisor remembers of what it has seen."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

from facelane_fleet.messages import Report


class NodeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A node as Ray knows it."""

    id: str
    name: str
    address: str
    cards: int = 0


@dataclass(slots=True)
class Known:
    """What the supervisor remembers of a node."""

    info: NodeInfo
    alive: bool = True
    dead_since: float | None = None
    heard_at: float | None = None
    first_seen: float = 0.0
    report: Report | None = None
    answered: bool = False
    serving_at: dict[int, float] = field(default_factory=dict)
    """By server: when it last served."""


@dataclass(slots=True)
class Seen:
    """What is known of a camera's results: for its gaps, over moves and losses."""

    term: int = 0
    last_result_at: float | None = None
    gaps: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=256))
