"""What a lane is given, and what it tells besides outcomes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from facelane_server.areas import Line, Zone
from facelane_server.domain import DropReason, Keeping, Outcome, Overload, Sighting, Stage
from facelane_server.pipeline import Plan

if TYPE_CHECKING:
    from facelane_server.lanes.lane import Lane

_DEFAULT_PLAN: Final = Plan()


@dataclass(frozen=True, slots=True)
class LaneOptions:
    """A stream's config, checked. ``weight``: share of the pools under load
    among the lanes of one sender."""

    source_id: str = ""
    plan: Plan = _DEFAULT_PLAN
    overload: Overload = Overload.LATEST_WINS
    max_frame_age_ns: int = 1_000_000_000
    weight: int = 10
    tracking: bool = True
    reinference_interval_ns: int = 3_000_000_000
    analysis_fps: float = 0.0
    """Pictures a second of media time; 0 = all."""
    private: bool = False
    """Nobody looks at it, and no picture of it is kept."""
    zones: tuple[Zone, ...] = ()
    lines: tuple[Line, ...] = ()
    pictures: Keeping = Keeping.NONE
    """Of which of its faces events keep pictures."""

    @property
    def keeps_portraits(self) -> bool:
        return self.pictures is not Keeping.NONE


@dataclass(frozen=True, slots=True)
class TrackEnded:
    """A track of the stream ended."""

    track_id: int


@dataclass(frozen=True, slots=True)
class StageChanged:
    """A stage that the stream asked for stopped answering, or answers again."""

    stage: Stage
    available: bool


@dataclass(frozen=True, slots=True)
class LaneDraining:
    """The server ends within ``grace_ns``; frames that still come are dropped."""

    grace_ns: int


@dataclass(frozen=True, slots=True)
class RateChanged:
    """From now on so many pictures a second are analysed, and the others are dropped as THINNED;
    0 = all are."""

    fps: float


@dataclass(frozen=True, slots=True)
class KeyFrameWanted:
    """Frames of video are dropped until the next key frame."""


Update = TrackEnded | StageChanged | LaneDraining | RateChanged | KeyFrameWanted


@dataclass(frozen=True, slots=True)
class Tally:
    """What happened in a lane since it was asked before. ``ages_ns``: of its results, the newest
    of them where there are many. ``video``: it brings no stills. ``opening``: it had no result
    before. ``group``: frames from one key frame to the next, 0 = not known."""

    received: int
    results: int
    ages_ns: tuple[int, ...]
    video: bool = False
    opening: bool = False
    group: int = 0


@dataclass(frozen=True, slots=True)
class LaneTotals:
    """``received = results + drops + errors`` once a lane has settled."""

    received: int
    results: int
    drops: int
    errors: int
    faces: int
    tracks: int
    drops_by_reason: dict[DropReason, int]


class LaneObserver(Protocol):
    """Who watches lanes: metrics and the event feed. Called on the event loop; must not raise."""

    def outcome(self, lane: Lane, outcome: Outcome) -> None: ...

    def sighted(self, lane: Lane, sighting: Sighting) -> None:
        """A track is in a picture whose outcome is about to be given; told in their order."""

    def track_ended(self, lane: Lane, track_id: int) -> None: ...

    def tracks(self, lane_id: int) -> int:
        """Tracks of a lane that have begun and not ended, as far as it counts them."""


class SilentObserver:
    """Watches nothing."""

    def outcome(self, lane: Lane, outcome: Outcome) -> None:
        """Nothing."""

    def sighted(self, lane: Lane, sighting: Sighting) -> None:
        """Nothing."""

    def track_ended(self, lane: Lane, track_id: int) -> None:
        """Nothing."""

    def tracks(self, lane_id: int) -> int:
        """None are counted."""
        del lane_id
        return 0


class Told:
    """What a lane's faces tell (``FaceListener``), as its observer hears it."""

    def __init__(self, lane: Lane, observer: LaneObserver) -> None:
        self.sighted = functools.partial(observer.sighted, lane)
        self.ended = functools.partial(observer.track_ended, lane)
