"""Events as ONVIF has them over MQTT: topics, and JSON in place of XML. Pure.

ONVIF Core Specification, "Event Broker" (topic structure, JSON event payload, property events), as
Profile M asks for it; topics and names of items after its Analytics Service Specification: the
rules FaceRecognition, FieldDetector (a zone: whether anybody is inside), LoiteringDetector (who is
so for long), LineDetector and LineCounting (a line). What ONVIF has no topic or item for stands
under the alias ``facelane``.

What is so until it is told otherwise, a property, is retained by the broker: FieldDetector,
LoiteringDetector, counters. A property that is no more is a message of no bytes. A zone has one
LoiteringDetector, whose ``ObjectId`` is the list of those who loiter: it changes when one of them
leaves, and ends with the last of them, whoever else is in the zone.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

from facelane.types import CrossingDirection, Event, EventKind
from facelane_events.message import HISTORY_LOST, Message

PAYLOAD_PREFIX: Final = "onvif-ej"
ALIAS: Final = "facelane"
RULE: Final = "FaceRecognition"
FACE: Final = "RuleEngine/Recognition/Face"
INSIDE: Final = "RuleEngine/FieldDetector/ObjectsInside"
LOITERING: Final = "RuleEngine/LoiteringDetector/ObjectIsLoitering"
CROSSED: Final = "RuleEngine/LineDetector/Crossed"
MAX_ZONES: Final = 10_000
MAX_LOITERING: Final = 256
"""Of a zone; of more, those that were told of last. A sink that is not told who leaves (``kinds``)
would tell of ever more."""
COUNTER: Final = "RuleEngine/CountAggregation/Counter"

_TOPICS: Final = {
    EventKind.SUBJECT_SEEN: FACE,
    EventKind.ZONE_ENTERED: INSIDE,
    EventKind.ZONE_LEFT: INSIDE,
    EventKind.ZONE_DWELL: LOITERING,
    EventKind.ZONE_UNKNOWN: f"RuleEngine/FieldDetector/{ALIAS}:ZoneUnknown",
    EventKind.LINE_CROSSED: CROSSED,
}


_ENDS: Final = (EventKind.STREAM_OPENED, EventKind.STREAM_CLOSED, HISTORY_LOST)
"""Tracks end before their stream does; what is left is from before a restart, or unknown."""


@dataclass(frozen=True, slots=True)
class Told:
    """One message."""

    topic: str
    body: bytes
    retain: bool = False


@dataclass
class _Zone:
    """``since``: who loiters there, by track, and when each came in."""

    occupied: bool = False
    since: dict[str, datetime] = field(default_factory=dict)


Key: TypeAlias = tuple[str, str, str]
"""A zone: the source's, the gallery's and its own name."""


class Zones:
    """What was told of zones: nobody else says what ends with a stream that died."""

    def __init__(self) -> None:
        self._zones: OrderedDict[Key, _Zone] = OrderedDict()

    def of(self, event: Event, name: str) -> _Zone:
        key = (event.source_id, event.gallery, name)
        found = self._zones.setdefault(key, _Zone())
        self._zones.move_to_end(key)
        if len(self._zones) > MAX_ZONES:
            self._zones.popitem(last=False)
        return found

    def emptied(self, source_id: str | None) -> list[tuple[Key, _Zone]]:
        """Of a source, ``None`` = of all: those where somebody was; now nobody is."""
        found = []
        for key, zone in self._zones.items():
            if source_id in (None, key[0]) and (zone.occupied or zone.since):
                found.append((key, _Zone(zone.occupied, zone.since)))
                zone.occupied, zone.since = False, {}
        return found


def local_topic(event: Message) -> str:
    """The ONVIF topic without its namespace."""
    for kind, found in _TOPICS.items():
        if event.kind == kind:
            return found
    name = f"{ALIAS}:{event.kind.title().replace('_', '')}"
    if _of_a_face(event):
        return f"RuleEngine/Recognition/{name}"
    return f"{'VideoSource' if event.source_id else 'Device'}/{name}"


def source(event: Message) -> dict[str, str]:
    """Where it was seen; nothing of what happens to the server itself."""
    if not event.source_id:
        return {}
    found = {"VideoSource": event.source_id}
    if event.event is not None and _of_a_face(event):
        rule = event.event.rule
        if rule is None:  # FaceRecognition has no analytics configuration
            return found | {"Rule": RULE}
        found |= {"AnalyticsConfiguration": event.event.gallery or ALIAS, "Rule": rule.name}
    return found


def _of_a_face(event: Message) -> bool:
    seen = event.kind == EventKind.SUBJECT_SEEN
    return seen or (event.event is not None and event.event.track is not None)


def messages(prefix: str, event: Message, zones: Zones | None = None) -> list[Told]:
    """What to publish: one message; for a line that was crossed the counter of that way too; who
    still loiters where one has left; and, where a stream or the server's history is over, what is
    so no more. ``zones``: what was told before, which this adds to: call it once an event."""
    zones = Zones() if zones is None else zones
    found = [Told(topic(prefix, event), payload(event), retain=local_topic(event) == INSIDE)]
    rule = event.event.rule if event.event is not None else None
    if event.kind in _ENDS:
        everywhere = event.event is None
        for key, zone in zones.emptied(None if everywhere else event.source_id):
            where = {"VideoSource": key[0], "AnalyticsConfiguration": key[1] or ALIAS}
            where["Rule"] = key[2]
            if zone.occupied:
                body = _body(event, where, {"IsInside": False, f"{ALIAS}:Inside": 0})
                found.append(Told(_topic(prefix, INSIDE, where), body, retain=True))
            if zone.since:
                found.append(Told(_topic(prefix, LOITERING, where), b"", retain=True))
    if rule is None or event.event is None:
        return found
    who = event.event.track.global_track_id if event.event.track is not None else ""
    if event.kind == EventKind.ZONE_ENTERED:
        zones.of(event.event, rule.name).occupied = rule.inside > 0
    elif event.kind == EventKind.ZONE_LEFT:
        zone = zones.of(event.event, rule.name)
        zone.occupied = rule.inside > 0
        loitered = zone.since.pop(who, None) is not None
        if not zone.occupied:
            zone.since.clear()
        if loitered or not zone.occupied:
            found.append(_loitering(prefix, event, zone))
    elif event.kind == EventKind.ZONE_DWELL:
        zone = zones.of(event.event, rule.name)
        now = event.time or datetime.now(UTC)
        zone.since[who] = now - timedelta(seconds=rule.dwell or 0.0)
        while len(zone.since) > MAX_LOITERING:
            del zone.since[next(iter(zone.since))]
        found = [_loitering(prefix, event, zone)]
    elif event.kind == EventKind.LINE_CROSSED:
        inwards = rule.direction is CrossingDirection.IN
        counted = source(event) | {"Rule": f"{rule.name}-{'in' if inwards else 'out'}"}
        count = rule.in_count if inwards else rule.out_count
        body = _body(event, counted, {"Count": count})
        found.append(Told(_topic(prefix, COUNTER, counted), body, retain=True))
    return found


def _loitering(prefix: str, event: Message, zone: _Zone) -> Told:
    """Who loiters in a zone, and since when one of them does."""
    where = source(event)
    body = b""
    if zone.since:
        # A list of ONVIF's (xs:list) is one text.
        told = {"ObjectId": " ".join(zone.since), "Since": _utc(min(zone.since.values()))}
        body = _body(event, where, told)
    return Told(_topic(prefix, LOITERING, where), body, retain=True)


def topic(prefix: str, event: Message) -> str:
    """``TopicPrefix "/" PayloadPrefix "/" LocalTopic [ "/&" Source ]``."""
    return _topic(prefix, local_topic(event), source(event))


def _topic(prefix: str, local: str, origin: dict[str, str]) -> str:
    found = f"{prefix}/{PAYLOAD_PREFIX}/{local}"
    values = [_level(value) for value in origin.values()]
    return f"{found}/&{'/'.join(values)}" if values else found


def _level(value: str) -> str:
    """One level of a topic: ONVIF leaves out what MQTT gives a meaning."""
    return re.sub(r"[#+\x00]", "", value).replace("/", "_")


def payload(event: Message) -> bytes:
    """``{"UtcTime": …, "Source": {…}, "Data": {…}}``; UTF-8."""
    data: dict[str, Any] = {}
    if event.event is not None:
        data = _data(event.event) if event.event.rule is None else _rule_data(event.event)
    return _body(event, source(event), data)


def _body(event: Message, origin: dict[str, str], data: dict[str, Any]) -> bytes:
    # A duplicate has the id of the first.
    body = {
        "UtcTime": _utc(event.time),
        "Source": origin,
        "Data": {**data, f"{ALIAS}:EventId": event.id},
    }
    return json.dumps(body, ensure_ascii=False).encode()


def _rule_data(event: Event) -> dict[str, Any]:
    """Of zones and lines, as their rules have it; of the face no more than which it is."""
    rule = event.rule
    assert rule is not None
    if event.kind is EventKind.ZONE_UNKNOWN:
        return _data(event)
    found: dict[str, Any] = {}
    who = event.track.global_track_id if event.track is not None else ""
    if event.kind in (EventKind.ZONE_ENTERED, EventKind.ZONE_LEFT):
        # ``ObjectId`` would be all who are inside: this one says who came or went.
        found = {"IsInside": rule.inside > 0, f"{ALIAS}:Inside": rule.inside}
        if who:
            found[f"{ALIAS}:ObjectId"] = who
        return found
    if who:
        found["ObjectId"] = who
    if event.kind is EventKind.ZONE_DWELL:
        now = event.event_time or datetime.now(UTC)
        found["Since"] = _utc(now - timedelta(seconds=rule.dwell or 0.0))
    if event.kind is EventKind.LINE_CROSSED:
        found[f"{ALIAS}:Direction"] = rule.direction.value
    return found


def _data(event: Event) -> dict[str, Any]:
    found: dict[str, Any] = {}
    track = event.track
    if event.identity.similarity is not None:
        # A cosine; ONVIF's likelihoods begin at 0.
        found["Likelihood"] = round(min(max(event.identity.similarity, 0.0), 1.0), 4)
    if event.identity.subject_id:
        # ONVIF's ``Label`` is a list that the person is on (Whitelisted, Blacklisted), no name.
        found["EnrollmentID"] = event.identity.subject_id
        if track is not None and track.display_name:
            found[f"{ALIAS}:DisplayName"] = track.display_name
    if track is not None:
        found["ObjectId"] = track.global_track_id
        found[f"{ALIAS}:Liveness"] = event.liveness.verdict.value
        found[f"{ALIAS}:Gallery"] = event.gallery
    if event.pool:
        found[f"{ALIAS}:Pool"] = event.pool
    if event.message:
        found[f"{ALIAS}:Message"] = event.message
    return found


def _utc(moment: datetime | None) -> str:
    moment = (moment or datetime.now(UTC)).astimezone(UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
