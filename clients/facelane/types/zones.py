"""Zones and lines in a camera's picture, and what they tell."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Zone:
    """A part of the picture; a face is where the middle of its box is.

    ``polygon``: its corners in their order around it, each (x, y) in fractions of the picture, 0
    to 1. ``dwell``: ZONE_DWELL is told of a track that has been in it for so many seconds of
    media time; ``unknown``: ZONE_UNKNOWN of a trusted face that nobody knows; 0 = never.
    ``faces``: ``only`` those inside of such zones count at all, or those inside are ``ignored``.
    """

    name: str
    polygon: Sequence[tuple[float, float]]
    dwell: float = 0.0
    unknown: float = 0.0
    faces: Literal["all", "only", "ignored"] = "all"


@dataclass(frozen=True, slots=True)
class Line:
    """A line across which faces are counted, between two points in fractions of the picture.

    IN is towards the side that is to the right of whoever looks from ``start`` to ``end`` in the
    picture: down, where it goes from the left to the right.
    """

    name: str
    start: tuple[float, float]
    end: tuple[float, float]


class CrossingDirection(enum.StrEnum):
    """See ``Line``."""

    UNSPECIFIED = "UNSPECIFIED"
    IN = "IN"
    OUT = "OUT"


@dataclass(frozen=True, slots=True)
class RuleReport:
    """What a zone or a line has to tell.

    Of zones: ``dwell``, seconds of media time that the track has been in it, and ``inside``, the
    tracks that are in it now. Of lines: ``direction``, and the crossings since the stream began.
    """

    name: str
    dwell: float = 0.0
    inside: int = 0
    direction: CrossingDirection = CrossingDirection.UNSPECIFIED
    in_count: int = 0
    out_count: int = 0
