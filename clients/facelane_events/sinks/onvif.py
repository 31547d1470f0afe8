"""Events as ONVIF has them over MQTT: topics, and JSON in place of XML. Pure.

ONVIF Core Specification, "Event Broker" (topic structure, JSON event payload, property events), as
Profile M asks for it; topics and names of items after its Analytics Service Specification: the
rules FaceRecognition, FieldDetector (a zone: whether anybody is inside), LoiteringDetector (who is
so for long), LineDetector and LineCounting (a line). What ONVIF has no topic or item for stands
under the alias ``facelane``.

What is so until it is told otherwise, a property, is retained by the broker: FieldDetector,
LoiteringDetector, counters. A property that is no more is a message of no bytes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from facelane.types import CrossingDirection, Event, EventKind
from facelane_events.message import Message

PAYLOAD_PREFIX: Final = "onvif-ej"
ALIAS: Final = "facelane"
RULE: Final = "FaceRecognition"
FACE: Final = "RuleEngine/Recognition/Face"
INSIDE: Final = "RuleEngine/FieldDetector/ObjectsInside"
LOITERING: Final = "RuleEngine/LoiteringDetector/ObjectIsLoitering"
CROSSED: Final = "RuleEngine/LineDetector/Crossed"
COUNTER: Final = "RuleEngine/CountAggregation/Counter"

_TOPICS: Final = {
    EventKind.SUBJECT_SEEN: FACE,
    EventKind.ZONE_ENTERED: INSIDE,
    EventKind.ZONE_LEFT: INSIDE,
    EventKind.ZONE_DWELL: LOITERING,
    EventKind.ZONE_UNKNOWN: f"RuleEngine/FieldDetector/{ALIAS}:ZoneUnknown",
    EventKind.LINE_CROSSED: CROSSED,
}


@dataclass(frozen=True, slots=True)
class Told:
    """One message."""

    topic: str
    body: bytes
    retain: bool = False


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


def messages(prefix: str, event: Message) -> list[Told]:
    """What to publish: one message; for a line that was crossed the counter of that way too; and
    when nobody is left in a zone, that nobody loiters there."""
    local, rule = local_topic(event), event.event.rule if event.event is not None else None
    found = [Told(topic(prefix, event), payload(event), retain=local in (INSIDE, LOITERING))]
    if rule is None:
        return found
    if event.kind == EventKind.ZONE_LEFT and not rule.inside:
        found.append(Told(_topic(prefix, LOITERING, source(event)), b"", retain=True))
    elif event.kind == EventKind.LINE_CROSSED:
        inwards = rule.direction is CrossingDirection.IN
        counted = source(event) | {"Rule": f"{rule.name}-{'in' if inwards else 'out'}"}
        count = rule.in_count if inwards else rule.out_count
        body = _body(event, counted, {"Count": count})
        found.append(Told(_topic(prefix, COUNTER, counted), body, retain=True))
    return found


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
    elif event.kind is EventKind.LINE_CROSSED:
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
