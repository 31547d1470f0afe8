"""Zones and lines in a camera's picture: what they are, and whether they can be. Pure.

Points are fractions of the picture, x to the right and y down, 0 to 1, so they hold for every size
that a camera sends. A face is where the middle of its box is.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec

from facelane_server import limits
from facelane_server.naming import is_name

Point = tuple[float, float]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=86_400.0)]
Faces = Literal["all", "only", "ignored"]

_AT_THE_END: Final = 1e-9
"""Of a line's length: what rounding may move a crossing that is at its end."""
_NO_AREA: Final = 1e-6
"""Of the picture: a zone as small as that holds no face's middle."""
_SAME: Final = 1e-6
"""Of the picture: an edge as short as that has no direction that could be computed with."""


class Area(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    """What events call it: 1-64 letters, digits, and ``- _ .``; once a stream."""
    sources: tuple[str, ...] = ()
    """In whose pictures it lies: source ids, or patterns such as ``front-*``."""

    def lies_in(self, source_id: str) -> bool:
        return any(fnmatch.fnmatchcase(source_id, pattern) for pattern in self.sources)


class Zone(Area, frozen=True, kw_only=True, forbid_unknown_fields=True):
    polygon: tuple[Point, ...]
    """Its corners, in their order around it, three at least."""
    dwell_s: Seconds = 0.0
    """ZONE_DWELL is told of a track that has been in it for so long (media time); 0 = never."""
    unknown_s: Seconds = 0.0
    """ZONE_UNKNOWN is told of a trusted face that nobody knows and that has been in it for so long;
    0 = never."""
    faces: Faces = "all"
    """``only``: faces outside of all such zones are ignored, as if they had not been found.
    ``ignored``: those inside are."""


class Line(Area, frozen=True, kw_only=True, forbid_unknown_fields=True):
    start: Point
    """Where it begins."""
    end: Point
    """Where it ends. IN is a crossing towards the side that is to the right of whoever looks from
    ``start`` to ``end`` in the picture: down, where it goes from the left to the right."""


def problem(areas: Iterable[Area], *, placed: bool = False) -> str:
    """Why these cannot be one stream's (``placed``: one configuration's) zones and lines, and what
    to do; empty = they can."""
    names: list[tuple[str, tuple[str, ...]]] = []
    zones = lines = 0
    for area in areas:
        kind = "zone" if isinstance(area, Zone) else "line"
        if not is_name(area.name):
            return f"{kind} `{area.name[:64]}`: a name has 1-64 of letters, digits, and - _ ."
        found = _of_zone(area) if isinstance(area, Zone) else ""
        if isinstance(area, Line):
            found = _of_line(area)
        if placed and not found:
            found = _of_sources(area.sources)
        if found:
            return f"{kind} `{area.name}`: {found}"
        for name, sources in names:
            if name == area.name and (not placed or set(sources) & set(area.sources)):
                return f"two zones or lines are called `{area.name}`; events tell them by name"
        names.append((area.name, area.sources))
        zones += isinstance(area, Zone)
        lines += isinstance(area, Line)
    if not placed and max(zones, lines) > limits.MAX_AREAS:
        return f"a stream has at most {limits.MAX_AREAS} zones and as many lines"
    return ""


def nearly(source_id: str, sources: Iterable[str]) -> str:
    """The one of these sources that was likely meant by a name that is none of them; else ""."""
    names = [source for source in sources if source != source_id]
    return next(iter(difflib.get_close_matches(source_id, names, n=1, cutoff=0.8)), "")


def _of_sources(sources: Sequence[str]) -> str:
    if not sources:
        return 'sources is missing: name the cameras, such as ["front-door"], or all by ["*"]'
    for source in sources:
        if not is_name(source.replace("*", "a").replace("?", "a")):
            return (
                f"source `{source[:64]}` can be no camera's: a source id has 1-64 of letters, "
                "digits, and - _ ., a pattern * and ? besides"
            )
    return ""


def _of_points(points: Iterable[Point]) -> str:
    for x, y in points:
        if not (0.0 <= x <= 1.0 and 0.0 <= y <= 1.0):  # nor NaN
            return (
                f"the point ({x:g}, {y:g}) lies outside of the picture; points are fractions of "
                "it, 0 to 1: divide pixels by its width and height"
            )
    return ""


def _of_zone(zone: Zone) -> str:
    points = zone.polygon
    if len(points) < 3:
        return f"it has {len(points)} points; a polygon has three at least"
    if len(points) > limits.MAX_ZONE_POINTS:
        return f"it has {len(points)} points; give {limits.MAX_ZONE_POINTS} at most"
    if found := _of_points(points):
        return found
    for seconds, name in ((zone.dwell_s, "dwell_s"), (zone.unknown_s, "unknown_s")):
        if not 0.0 <= seconds <= 86_400.0:
            return f"{name} is {seconds:g}; give seconds, 0 to 86400"
    edges = list(_edges(points))
    for k, (a, b) in enumerate(edges):
        if math.dist(a, b) < _SAME:
            return f"its points {k + 1} and {(k + 1) % len(points) + 1} are the same; leave one out"
    spans = [(min(a[0], b[0]), max(a[0], b[0])) for a, b in edges]
    for k, first in enumerate(edges):
        left, right = spans[k]
        for other in range(k + 1, len(edges)):
            if spans[other][1] < left or spans[other][0] > right:
                continue  # beside each other: they have no point in common
            beside = other == k + 1 or (k == 0 and other == len(edges) - 1)
            if _fold_back(first, edges[other]) if beside else _meet(first, edges[other]):
                return (
                    f"it crosses itself: the edge from point {k + 1} meets that from point "
                    f"{other + 1}; give the corners in their order around the zone"
                )
    if _area(points) < _NO_AREA:
        return "it has no area; its points lie on one line"
    return ""


def _of_line(line: Line) -> str:
    if found := _of_points((line.start, line.end)):
        return found
    if math.dist(line.start, line.end) < 1e-3:
        return "start and end are the same point"
    return ""


Edge = tuple[Point, Point]


def _edges(points: Sequence[Point]) -> Iterator[Edge]:
    return zip(points, (*points[1:], points[0]), strict=True)


def _turn(a: Point, b: Point, c: Point) -> float:
    """Positive where c lies to the right of whoever looks from a to b (y is down)."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _within(a: Point, b: Point, p: Point) -> bool:
    return min(a[0], b[0]) <= p[0] <= max(a[0], b[0]) and min(a[1], b[1]) <= p[1] <= max(a[1], b[1])


def _meet(first: Edge, second: Edge) -> bool:
    """Whether two edges have a point in common."""
    (a, b), (c, d) = first, second
    abc, abd, cda, cdb = _turn(a, b, c), _turn(a, b, d), _turn(c, d, a), _turn(c, d, b)
    # No products: those of small numbers are 0.
    if min(abc, abd) < 0 < max(abc, abd) and min(cda, cdb) < 0 < max(cda, cdb):
        return True
    return (
        (abc == 0 and _within(a, b, c))
        or (abd == 0 and _within(a, b, d))
        or (cda == 0 and _within(c, d, a))
        or (cdb == 0 and _within(c, d, b))
    )


def _fold_back(first: Edge, second: Edge) -> bool:
    """Whether two edges with a corner in common lie on one another."""
    common = set(first) & set(second)
    if len(common) > 1:
        return True
    [shared] = common
    a = first[0] if first[1] == shared else first[1]
    b = second[0] if second[1] == shared else second[1]
    along = (a[0] - shared[0]) * (b[0] - shared[0]) + (a[1] - shared[1]) * (b[1] - shared[1])
    return _turn(shared, a, b) == 0 and along > 0


def _area(points: Sequence[Point]) -> float:
    return abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in _edges(points))) / 2


# -- where a point lies --------------------------------------------------------------------


def holds(points: Sequence[Point], at: Point) -> bool:
    """Whether a point lies inside of a polygon; on its border it may or may not."""
    x, y = at
    inside = False
    ax, ay = points[-1]
    for bx, by in points:
        if (ay > y) is not (by > y):
            inside ^= x < ax + (y - ay) / (by - ay) * (bx - ax)
        ax, ay = bx, by
    return inside


def depth(points: Sequence[Point], at: Point) -> float:
    """How far inside of a polygon a point lies; negative = outside of it by so much. Far dearer
    than ``holds``."""
    nearest = min(_distance(a, b, at) for a, b in _edges(points))
    return nearest if holds(points, at) else -nearest


def _distance(a: Point, b: Point, p: Point) -> float:
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = ((p[0] - a[0]) * dx + (p[1] - a[1]) * dy) / (dx * dx + dy * dy)
    along = min(1.0, max(0.0, along))
    return math.hypot(p[0] - a[0] - along * dx, p[1] - a[1] - along * dy)


def beyond(start: Point, end: Point, at: Point) -> float:
    """How far a point lies on the IN side of a line, without its ends; negative = on the other."""
    return _turn(start, end, at) / math.dist(start, end)


def passes(start: Point, end: Point, before: Point, now: Point) -> bool:
    """Whether the way from ``before`` to ``now``, which are on two sides of the line, meets it
    between its ends."""
    first, second = _turn(start, end, before), _turn(start, end, now)
    if first == second:
        return False
    share = first / (first - second)
    at = (before[0] + share * (now[0] - before[0]), before[1] + share * (now[1] - before[1]))
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = ((at[0] - start[0]) * dx + (at[1] - start[1]) * dy) / (dx * dx + dy * dy)
    return -_AT_THE_END <= along <= 1.0 + _AT_THE_END


def scaled(points: Iterable[Point], size: tuple[int, int]) -> tuple[Point, ...]:
    """Fractions as pixels of a picture of this size."""
    return tuple((x * size[0], y * size[1]) for x, y in points)


@dataclass(frozen=True, slots=True)
class Mask:
    """Which faces count at all."""

    only: tuple[tuple[Point, ...], ...]
    ignored: tuple[tuple[Point, ...], ...]

    @classmethod
    def of(cls, zones: Iterable[Zone]) -> Mask | None:
        """``None``: all do."""
        only = tuple(zone.polygon for zone in zones if zone.faces == "only")
        ignored = tuple(zone.polygon for zone in zones if zone.faces == "ignored")
        return cls(only, ignored) if only or ignored else None

    def keeps(self, at: Point) -> bool:
        """``at``: the middle of a face, in fractions of the picture."""
        if self.only and not any(holds(polygon, at) for polygon in self.only):
            return False
        return not any(holds(polygon, at) for polygon in self.ignored)
