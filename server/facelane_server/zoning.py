"""From the sightings of a stream's tracks to what happens in its zones and at its lines: pure.

ZONE_ENTERED and ZONE_LEFT when a track comes into a zone and leaves it, or ends in it. ZONE_DWELL
when it has been there for the zone's ``dwell_s``, ZONE_UNKNOWN when it has had a trusted face there
that nobody knows for ``unknown_s``; each once a stay. LINE_CROSSED when it crosses a line.

**Jitter.** A face shakes from picture to picture, the more the larger it is. It is beyond a
border when its middle is by ``MARGIN`` of its width, or, of a zone, for ``SETTLED_NS``; in between
nothing changes.

**Counting.** A crossing is counted of a track that was seen beyond the line on both sides, and
whose way between them met the line between its ends. So a track that comes, flickers or ends at
the line counts nothing, and one that shakes there counts once. What was not seen is not guessed:
a face that passes while nobody sees it is not counted, and one that is lost behind the line and
found before it again (a new track in its place, within ``GHOST_NS``) is not counted a second time
for the same direction.

**Doubt.** While it is not certain that a track still has the same face (a cut of the scene, two
that come apart), lines wait: where the doubt is settled the way goes on from before, where another
face has come there is another track, and a doubt that lasts for ``DOUBT_NS`` begins the way anew.
Zones do not wait: somebody is there, whoever it is.

All times are media time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from facelane_server import areas, limits
from facelane_server.areas import Line, Point, Zone
from facelane_server.domain import Box, Decision, Direction, RuleReport, Sighting
from facelane_server.events import EventKind

MARGIN: Final = 0.25
SETTLED_NS: Final = 500_000_000
DOUBT_NS: Final = 1_000_000_000
GHOST_NS: Final = 3_000_000_000
GHOST_WIDTHS: Final = 1.0
"""How far from where a track was lost one may begin that is taken for the same face."""

_NAMELESS: Final = (Decision.UNKNOWN, Decision.AMBIGUOUS)

Telling = tuple[EventKind, RuleReport]


@dataclass(slots=True)
class _Stay:
    """A track and a zone."""

    inside: bool = False
    since_ns: int = 0
    """Since when it has been inside."""
    turned_ns: int | None = None
    """Since when its middle has been on the other side of the border."""
    dwelt: bool = False
    unknown_ns: int | None = None
    unknown_told: bool = False


@dataclass(slots=True)
class _Way:
    """A track and a line."""

    side: int = 0
    """The last side that it was seen beyond the line on; 0 = on none yet."""
    point: Point | None = None
    """Where it was last."""
    met: bool = False
    """It passed from one side of the line to the other between the line's ends, last time."""
    counted: int = 0
    """The side that the last crossing led to; of a ghost too."""


@dataclass(slots=True)
class _Followed:
    """One track."""

    box: Box
    at_ns: int
    stays: list[_Stay]
    ways: list[_Way]
    doubt_ns: int | None = None


@dataclass(slots=True)
class _Counts:
    entered: int = 0
    left: int = 0


@dataclass(slots=True)
class _Pixels:
    """The areas in a picture of one size."""

    size: tuple[int, int] = (0, 0)
    zones: list[tuple[Point, ...]] = field(default_factory=list)
    lines: list[tuple[Point, ...]] = field(default_factory=list)


class Zoning:
    """The zones and lines of one stream, each with its name once."""

    def __init__(self, zones: Sequence[Zone], lines: Sequence[Line]) -> None:
        self._zones = tuple(zones)
        self._lines = tuple(lines)
        self._pixels = _Pixels()
        self._tracks: dict[int, _Followed] = {}
        self._ghosts: list[_Followed] = []
        """Tracks that have ended behind a line, the last one last."""
        self._counts = [_Counts() for _ in lines]
        self._now_ns = self._before_ns = 0
        """When the newest picture was taken, and the one before."""

    def __len__(self) -> int:
        """Tracks that are followed."""
        return len(self._tracks)

    def sighted(self, seen: Sighting) -> list[Telling]:
        """What is to be told after a sighting; in the order of the stream's outcomes."""
        width, height = seen.size
        if not width or not height:
            return []
        if self._pixels.size != seen.size:
            self._pixels = _Pixels(
                seen.size,
                [areas.scaled(zone.polygon, seen.size) for zone in self._zones],
                [areas.scaled((line.start, line.end), seen.size) for line in self._lines],
            )
        if seen.at_ns != self._now_ns:
            self._before_ns, self._now_ns = self._now_ns, seen.at_ns
        known = self._tracks.get(seen.track_id)
        if known is None:
            known = self._tracks[seen.track_id] = self._begun(seen)
        known.box, known.at_ns = seen.box, seen.at_ns
        return [*self._in_zones(known, seen), *self._at_lines(known, seen)]

    def ended(self, track_id: int) -> list[Telling]:
        """What is to be told when a track has ended."""
        known = self._tracks.pop(track_id, None)
        if known is None:
            return []
        if any(way.counted for way in known.ways):
            self._ghosts.append(known)
            del self._ghosts[: -limits.MAX_GHOSTS]
        told = []
        for number, stay in enumerate(known.stays):
            if stay.inside:
                stay.inside = False
                told.append(self._told(EventKind.ZONE_LEFT, number, known.at_ns - stay.since_ns))
        return told

    # -- zones -----------------------------------------------------------------------------

    def _in_zones(self, known: _Followed, seen: Sighting) -> Iterator[Telling]:
        at, margin, now_ns = _middle(seen.box), MARGIN * seen.box.width, seen.at_ns
        for number, (zone, stay) in enumerate(zip(self._zones, known.stays, strict=True)):
            polygon = self._pixels.zones[number]
            if areas.holds(polygon, at) is stay.inside:
                stay.turned_ns = None
            else:
                if stay.turned_ns is None:
                    stay.turned_ns = now_ns
                if abs(areas.depth(polygon, at)) >= margin or now_ns - stay.turned_ns >= SETTLED_NS:
                    yield from self._passed(number, stay, now_ns)
            if stay.inside:
                yield from self._stayed(number, zone, stay, seen)

    def _passed(self, number: int, stay: _Stay, now_ns: int) -> Iterator[Telling]:
        """The track has come in, or gone out."""
        turned_ns = now_ns if stay.turned_ns is None else stay.turned_ns
        stay.turned_ns = None
        if stay.inside:
            stay.inside = False
            yield self._told(EventKind.ZONE_LEFT, number, turned_ns - stay.since_ns)
            return
        stay.inside, stay.since_ns = True, turned_ns
        stay.dwelt, stay.unknown_ns, stay.unknown_told = False, None, False
        yield self._told(EventKind.ZONE_ENTERED, number, 0)

    def _stayed(self, number: int, zone: Zone, stay: _Stay, seen: Sighting) -> Iterator[Telling]:
        dwelt_ns = seen.at_ns - stay.since_ns
        if zone.dwell_s and not stay.dwelt and dwelt_ns >= zone.dwell_s * 1e9:
            stay.dwelt = True
            yield self._told(EventKind.ZONE_DWELL, number, dwelt_ns)
        if not zone.unknown_s or stay.unknown_told:
            return
        if seen.identity.decision is Decision.MATCH:
            stay.unknown_ns = None
        elif seen.identity.decision in _NAMELESS:
            if stay.unknown_ns is None:
                stay.unknown_ns = seen.at_ns
            if seen.at_ns - stay.unknown_ns >= zone.unknown_s * 1e9:
                stay.unknown_told = True
                yield self._told(EventKind.ZONE_UNKNOWN, number, dwelt_ns)

    def _told(self, kind: EventKind, number: int, dwell_ns: int) -> Telling:
        inside = sum(known.stays[number].inside for known in self._tracks.values())
        return kind, RuleReport(self._zones[number].name, dwell_ns=dwell_ns, inside=inside)

    # -- lines -----------------------------------------------------------------------------

    def _at_lines(self, known: _Followed, seen: Sighting) -> Iterator[Telling]:
        if not seen.doubtful:
            known.doubt_ns = None
        elif known.doubt_ns is None:
            known.doubt_ns = seen.at_ns
            return
        elif seen.at_ns - known.doubt_ns < DOUBT_NS:
            return
        at, margin = _middle(seen.box), MARGIN * seen.box.width
        for number, way in enumerate(known.ways):
            if known.doubt_ns is not None:
                known.ways[number] = way = _Way()
            start, end = self._pixels.lines[number]
            if self._crossed(way, start, end, at, margin):
                yield self._counted(number, way.side)
        if known.doubt_ns is not None:
            known.doubt_ns = seen.at_ns

    def _crossed(self, way: _Way, start: Point, end: Point, at: Point, margin: float) -> bool:
        """Whether the track is now beyond the line for the first time since it was beyond it on
        the other side, and has not been counted there before."""
        far = areas.beyond(start, end, at)
        if way.point is not None and (far < 0) is not (areas.beyond(start, end, way.point) < 0):
            way.met = areas.passes(start, end, way.point, at)
        way.point = at
        if abs(far) < max(margin, 1.0):
            return False
        side = 1 if far > 0 else -1
        before, way.side = way.side, side
        if before in (0, side):
            return False
        if not way.met:  # it went around the line's end
            way.counted = 0
            return False
        again = way.counted == side
        way.counted = side
        return not again

    def _counted(self, number: int, side: int) -> Telling:
        counts = self._counts[number]
        counts.entered += side > 0
        counts.left += side < 0
        return EventKind.LINE_CROSSED, RuleReport(
            self._lines[number].name,
            direction=Direction.IN if side > 0 else Direction.OUT,
            entered=counts.entered,
            left=counts.left,
        )

    # -- tracks ----------------------------------------------------------------------------

    def _begun(self, seen: Sighting) -> _Followed:
        """A track that begins, with what a ghost in its place has been counted for."""
        ways = [_Way() for _ in self._lines]
        if (ghost := self._ghost_of(seen)) is not None:
            for way, before in zip(ways, ghost.ways, strict=True):
                way.counted = before.counted
                before.counted = 0  # once
        return _Followed(seen.box, seen.at_ns, [_Stay() for _ in self._zones], ways)

    def _ghost_of(self, seen: Sighting) -> _Followed | None:
        """The nearest of those that were counted and are not seen any more, if any is near."""
        if not self._lines:
            return None
        self._ghosts = [g for g in self._ghosts if seen.at_ns - g.at_ns <= GHOST_NS]
        unseen = [k for k in self._tracks.values() if k.at_ns < self._before_ns]
        near = [
            (math.dist(_middle(ghost.box), _middle(seen.box)), k, ghost)
            for k, ghost in enumerate((*self._ghosts, *unseen))
            if any(way.counted for way in ghost.ways) and seen.at_ns - ghost.at_ns <= GHOST_NS
        ]
        reach = [
            item
            for item in near
            if item[0] <= GHOST_WIDTHS * max(item[2].box.width, seen.box.width)
        ]
        return min(reach)[2] if reach else None


def _middle(box: Box) -> Point:
    return box.x + box.width / 2, box.y + box.height / 2
