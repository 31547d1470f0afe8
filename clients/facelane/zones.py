"""Zones, lines, and what they tell: to and from protobuf."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from facelane import errors, types
from facelane.v1 import analysis_service_pb2 as pb
from facelane.v1 import event_service_pb2 as event_pb

_FACES: Final = {
    "all": pb.ZONE_FACES_ALL,
    "only": pb.ZONE_FACES_ONLY,
    "ignored": pb.ZONE_FACES_IGNORED,
}
_DIRECTIONS: Final = {
    event_pb.CROSSING_DIRECTION_IN: types.CrossingDirection.IN,
    event_pb.CROSSING_DIRECTION_OUT: types.CrossingDirection.OUT,
}


def areas(zones: Iterable[types.Zone], lines: Iterable[types.Line]) -> dict[str, Any]:
    """The fields of a stream's config. Raises ``ArgumentError`` for what is no zone or line; the
    server looks at the rest."""
    try:
        return {
            "zones": [_zone(zone) for zone in zones],
            "lines": [
                pb.Line(name=line.name, start=_point(line.start), end=_point(line.end))
                for line in lines
            ],
        }
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise errors.ArgumentError(
            errors.Reason.CONFIG_INVALID,
            f"a zone or a line that is none ({error}): points are pairs of fractions, durations "
            "are seconds, faces are 'all', 'only' or 'ignored'",
        ) from None


def _zone(zone: types.Zone) -> pb.Zone:
    message = pb.Zone(
        name=zone.name,
        polygon=[_point(point) for point in zone.polygon],
        faces=_FACES[zone.faces],
    )
    message.dwell.FromNanoseconds(round(zone.dwell * 1e9))
    message.unknown.FromNanoseconds(round(zone.unknown * 1e9))
    return message


def _point(point: tuple[float, float]) -> pb.RelativePoint:
    x, y = point
    return pb.RelativePoint(x=x, y=y)


def rule_report(message: event_pb.RuleReport) -> types.RuleReport:
    """What an event of a zone or a line says."""
    return types.RuleReport(
        message.name,
        message.dwell.seconds + message.dwell.nanos * 1e-9,
        message.inside,
        _DIRECTIONS.get(message.direction, types.CrossingDirection.UNSPECIFIED),
        message.in_count,
        message.out_count,
    )
