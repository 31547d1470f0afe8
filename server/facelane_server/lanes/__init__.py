"""One stream: its order, its window (``lane``), and the faces in it (``faces``)."""

from __future__ import annotations

from facelane_server.lanes.allowance import Allowance
from facelane_server.lanes.lane import Lane
from facelane_server.lanes.types import (
    KeyFrameWanted,
    LaneDraining,
    LaneObserver,
    LaneOptions,
    LaneTotals,
    RateChanged,
    SilentObserver,
    StageChanged,
    Tally,
    TrackEnded,
    Update,
)

__all__ = [
    "Allowance",
    "KeyFrameWanted",
    "Lane",
    "LaneDraining",
    "LaneObserver",
    "LaneOptions",
    "LaneTotals",
    "RateChanged",
    "SilentObserver",
    "StageChanged",
    "Tally",
    "TrackEnded",
    "Update",
]
