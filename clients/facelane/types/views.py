"""A look at a stream: what is open, and its pictures with their outcomes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from facelane.types.pictures import Encoding, Picture
from facelane.types.streams import Outcome


@dataclass(frozen=True, slots=True)
class OpenStream:
    """A stream that is open. Rates (a second) and ages (seconds, from the receipt of a frame to its
    result) are those of the last seconds; the counts are those since it was opened.

    ``encoding``: of its newest frame, ``None`` before the first. ``tracks``: those that have begun
    and not ended. ``watchers``: who look at it now.
    """

    stream_id: str
    source_id: str
    gallery_id: str
    open_time: datetime | None
    encoding: Encoding | None
    outcome_fps: float = 0.0
    result_fps: float = 0.0
    age_median: float = 0.0
    age_p95: float = 0.0
    tracks: int = 0
    received: int = 0
    results: int = 0
    drops: int = 0
    errors: int = 0
    watchers: int = 0


@dataclass(frozen=True, slots=True)
class Correction:
    """Something that was said of an event's face, and holds: that it is ``subject_id``, or with
    ``is_not``, that it is not."""

    correction_id: str
    subject_id: str
    is_not: bool
    create_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class StreamPicture:
    """A picture as the server received it. ``outcome`` is ``None`` for access units from before the
    look, which later ones need. ``key_frame``: it can be decoded by itself. ``skipped``: pictures
    between the one before and this that were left out for this look's sake."""

    picture: Picture
    outcome: Outcome | None
    key_frame: bool = True
    skipped: int = 0
