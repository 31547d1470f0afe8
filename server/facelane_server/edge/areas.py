"""Zones and lines of a stream: those that the server has for its source, and those it brings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final, TypeVar

from google.protobuf import duration_pb2

from facelane.v1 import analysis_service_pb2 as pb
from facelane_server import areas, limits
from facelane_server.areas import Faces, Line, Zone
from facelane_server.config import Config
from facelane_server.domain import FacelaneError, Reason
from facelane_server.lanes import LaneOptions

_FACES: Final[dict[int, Faces]] = {
    pb.ZONE_FACES_UNSPECIFIED: "all",
    pb.ZONE_FACES_ALL: "all",
    pb.ZONE_FACES_ONLY: "only",
    pb.ZONE_FACES_IGNORED: "ignored",
}


def placed(options: LaneOptions, message: pb.StreamConfig, config: Config) -> LaneOptions:
    """The options with the stream's zones and lines. Raises CONFIG_INVALID."""
    if max(len(message.zones), len(message.lines)) > limits.MAX_AREAS:
        raise _invalid(f"a stream has at most {limits.MAX_AREAS} zones and as many lines")
    own_zones = tuple(_zone(zone) for zone in message.zones)
    own_lines = tuple(
        Line(name=line.name, start=_point(line.start), end=_point(line.end))
        for line in message.lines
    )
    if (own_zones or own_lines) and not options.tracking:
        raise _invalid("zones and lines are about tracks; leave disable_tracking out")
    zones = (*_there(config.zones, options.source_id), *own_zones)
    lines = (*_there(config.lines, options.source_id), *own_lines)
    if found := areas.problem((*zones, *lines)):
        raise _invalid(found)
    return replace(options, zones=zones, lines=lines)


def _invalid(message: str) -> FacelaneError:
    return FacelaneError(
        Reason.CONFIG_INVALID, f"stream config: {message}", metadata={"field": "zones"}
    )


A = TypeVar("A", Zone, Line)


def _there(configured: Iterable[A], source_id: str) -> list[A]:
    return [area for area in configured if area.lies_in(source_id)]


def _zone(message: pb.Zone) -> Zone:
    faces = _FACES.get(message.faces)
    if faces is None:
        raise _invalid("a zone's faces are ALL, ONLY or IGNORED")
    return Zone(
        name=message.name,
        polygon=tuple(_point(point) for point in message.polygon),
        dwell_s=_seconds(message.dwell),
        unknown_s=_seconds(message.unknown),
        faces=faces,
    )


def _point(message: pb.RelativePoint) -> areas.Point:
    return message.x, message.y


def _seconds(message: duration_pb2.Duration) -> float:
    return message.seconds + message.nanos * 1e-9  # whatever it is: it is looked at later
