"""An event as it is delivered: JSON, filtered and templated. Pure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import datetime
from string import Template
from typing import Any, Final

import msgspec

from facelane.types import Event
from facelane_events.config import Sink

HISTORY_LOST: Final = "HISTORY_LOST"
"""The kind of the message that stands for events which the server no longer has."""


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """``id`` is the same however often the event is delivered. ``body``: UTF-8."""

    id: str
    kind: str
    source_id: str
    time: datetime | None
    body: bytes
    event: Event | None = None
    """None of HISTORY_LOST."""


def event_id(event: Event) -> str:
    """Its number, and when it was: an older server numbers anew with every start."""
    moment = int(event.event_time.timestamp() * 1000) if event.event_time else 0
    return f"{event.sequence}-{moment}"


def wanted(sink: Sink, event: Event, moment: datetime) -> bool:
    """Whether the sink's filters let it pass. ``moment``: when it happened, in local time."""
    if sink.kinds and event.kind not in sink.kinds:
        return False
    if sink.sources and not any(_matches(pattern, event.source_id) for pattern in sink.sources):
        return False
    if sink.labels:
        has = event.track.labels if event.track else {}
        if any(has.get(key) != value for key, value in sink.labels.items()):
            return False
    return sink.within_hours(moment)


def _matches(pattern: str, source: str) -> bool:
    if pattern.endswith("*"):
        return bool(source) and source.startswith(pattern[:-1])
    return source == pattern


def message(sink: Sink, event: Event) -> Message:
    """The event for this sink."""
    number = event_id(event)
    if sink.template:
        body = Template(sink.template).safe_substitute(_fields(event, number)).encode()
    else:
        body = msgspec.json.encode(payload(event, number))
    return Message(number, event.kind.value, event.source_id, event.event_time, body, event)


def payload(event: Event, number: str) -> dict[str, Any]:
    """The event's fields as the ``facelane`` command prints them, with ``id`` for the token."""
    found = dataclasses.asdict(event)
    del found["resume_token"]
    return {"type": "event", "id": number, **found}


def history_lost(moment: datetime) -> Message:
    """Told once, in place of what cannot be delivered any more."""
    number = f"lost-{int(moment.timestamp() * 1000)}"
    body = {
        "type": "event",
        "id": number,
        "kind": HISTORY_LOST,
        "event_time": moment,
        "message": "events between the last one and now were not kept by the server",
    }
    return Message(number, HISTORY_LOST, "", moment, msgspec.json.encode(body))


def _fields(event: Event, number: str) -> Mapping[str, str]:
    track = event.track
    plain = {
        "id": number,
        "kind": event.kind.value,
        "time": event.event_time.isoformat() if event.event_time else "",
        "source_id": event.source_id,
        "stream_id": event.stream_id,
        "gallery": event.gallery,
        "subject_id": event.identity.subject_id,
        "display_name": track.display_name if track else "",
        "decision": event.identity.decision.value,
        "liveness": event.liveness.verdict.value,
        "message": event.message,
        "pool": event.pool,
        "track": track.global_track_id if track else "",
        "rule": event.rule.name if event.rule else "",
        "direction": event.rule.direction.value if event.rule else "",
    }
    return {key: json.dumps(value, ensure_ascii=False)[1:-1] for key, value in plain.items()}
