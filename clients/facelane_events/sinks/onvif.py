"""Events as ONVIF has them over MQTT: topics, and JSON in place of XML. Pure.

ONVIF Core Specification, "Event Broker" (topic structure, JSON event payload), as Profile M
asks for it; names of items after its Analytics Service Specification, rule FaceRecognition.
What ONVIF has no topic for stands below one of its topics under the alias ``facelane``.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any, Final

from facelane.types import Event, EventKind
from facelane_events.message import Message

PAYLOAD_PREFIX: Final = "onvif-ej"
ALIAS: Final = "facelane"
RULE: Final = "FaceRecognition"
FACE: Final = "RuleEngine/Recognition/Face"


def local_topic(event: Message) -> str:
    """The ONVIF topic without its namespace."""
    if event.kind == EventKind.SUBJECT_SEEN:
        return FACE
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
        found |= {"AnalyticsConfiguration": event.event.gallery or ALIAS, "Rule": RULE}
    return found


def _of_a_face(event: Message) -> bool:
    seen = event.kind == EventKind.SUBJECT_SEEN
    return seen or (event.event is not None and event.event.track is not None)


def topic(prefix: str, event: Message) -> str:
    """``TopicPrefix "/" PayloadPrefix "/" LocalTopic [ "/&" Source ]``."""
    found = f"{prefix}/{PAYLOAD_PREFIX}/{local_topic(event)}"
    values = [_level(value) for value in source(event).values()]
    return f"{found}/&{'/'.join(values)}" if values else found


def _level(value: str) -> str:
    """One level of a topic: ONVIF leaves out what MQTT gives a meaning."""
    return re.sub(r"[#+\x00]", "", value).replace("/", "_")


def payload(event: Message) -> bytes:
    """``{"UtcTime": …, "Source": {…}, "Data": {…}}``; UTF-8."""
    data: dict[str, Any] = {} if event.event is None else _data(event.event)
    # A duplicate has the id of the first.
    body = {
        "UtcTime": _utc(event.time),
        "Source": source(event),
        "Data": {**data, "EventId": event.id},
    }
    return json.dumps(body, ensure_ascii=False).encode()


def _data(event: Event) -> dict[str, Any]:
    found: dict[str, Any] = {}
    track = event.track
    if event.identity.similarity is not None:
        # A cosine; ONVIF's likelihoods begin at 0.
        found["Likelihood"] = round(min(max(event.identity.similarity, 0.0), 1.0), 4)
    if event.identity.subject_id:
        found["Label"] = (track.display_name if track else "") or event.identity.subject_id
        found["EnrollmentID"] = event.identity.subject_id
    if track is not None:
        found["ObjectId"] = track.global_track_id
        found["Liveness"] = event.liveness.verdict.value
    if event.pool:
        found["Pool"] = event.pool
    if event.message:
        found["Message"] = event.message
    return found


def _utc(moment: datetime | None) -> str:
    moment = (moment or datetime.now(UTC)).astimezone(UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
