"""All that a store holds of one subject, for a request of access."""

from __future__ import annotations

import base64
import datetime as dt
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from facelane_server.domain import RuleReport
from facelane_server.naming import gallery_name
from facelane_server.store import audit as log
from facelane_server.store.audit import Action, Deed
from facelane_server.store.chips import ENCODING
from facelane_server.store.envelope import Lock
from facelane_server.store.events import decoded, rule_of
from facelane_server.store.gallery import Store
from facelane_server.store.pictures import opened_photo
from facelane_server.store.records import Correction, subject_missing
from facelane_server.store.schema import (
    chips,
    confirmations,
    events,
    last_seen,
    pictures,
    requests,
    subjects,
    templates,
)
from facelane_server.store.vault import Person


@dataclass(frozen=True, slots=True)
class Export:
    """``said``: as JSON can say it. ``pictures``: name of a file -> PNG, or JPEG of an event."""

    said: dict[str, Any]
    pictures: dict[str, bytes]


def export(store: Store, gallery_id: str, subject_id: str) -> Export:
    """Written down in the audit log first, or not done. Raises SUBJECT_NOT_FOUND and
    GALLERY_UNAVAILABLE."""
    gallery_id = gallery_name(gallery_id)
    with store.database.reading() as connection:
        number = _number(connection, store, gallery_id, subject_id)
    if number is None:
        raise subject_missing()
    store.audit.write([Deed(Action.EXPORTED, log.actor(), gallery_id, subject_id)])
    with store.database.reading() as connection:
        row = connection.execute(sa.select(subjects).where(subjects.c.id == number)).first()
        if row is None:
            raise subject_missing()
        lock = store.vault.lock_of(connection, number) if store.vault.encrypts else None
        person = (
            Person(row.subject_id, row.display_name, row.labels)
            if lock is None
            else store.vault.person(lock, number, row.sealed)
        )
        shown = dict(_chips(connection, store, lock, number))
        of_events = dict(_event_pictures(connection, store, lock, number))
        faces = list(_faces(connection, store, lock, number, shown))
        seen_ns = connection.scalar(
            sa.select(last_seen.c.seen_ns).where(last_seen.c.subject == number)
        )
        said = {
            "gallery": gallery_id,
            "subject_id": person.subject_id,
            "display_name": person.display_name,
            "labels": dict(person.labels),
            "number": number,
            "created": _time(row.created_ns),
            "updated": _time(row.updated_ns),
            "last_seen": _time(seen_ns) if seen_ns else None,
            "templates": [face for face in faces if face["correction"] != "NOT"],
            "corrections": [face for face in faces if face["correction"] == "NOT"],
            "enrolments_remembered": list(_requests(connection, store, lock, number)),
            "events": list(_events(connection, gallery_id, number, of_events)),
            # Those of events that are not kept any more are here alone.
            "event_pictures": [
                {"time": _time(at_ns), "files": sorted(files)}
                for at_ns, files in of_events.values()
            ],
            "audit": list(_audit(connection, store, gallery_id, subject_id)),
        }
    for _, files in of_events.values():
        shown |= files
    return Export(said, shown)


def _number(
    connection: sa.Connection, store: Store, gallery_id: str, subject_id: str
) -> int | None:
    found: int | None = connection.scalar(
        sa.select(subjects.c.id)
        .where(subjects.c.gallery_id == gallery_id)
        .where(subjects.c.subject_id == store.vault.blind("subject", gallery_id, subject_id))
    )
    return found


def _time(at_ns: int) -> str:
    return dt.datetime.fromtimestamp(at_ns / 1e9, dt.UTC).isoformat(timespec="seconds")


def _faces(
    connection: sa.Connection,
    store: Store,
    lock: Lock | None,
    number: int,
    shown: Collection[str],
) -> Iterator[dict[str, Any]]:
    """Templates, and what somebody said that the subject is not."""
    rows = connection.execute(
        sa.select(templates).where(templates.c.subject == number).order_by(templates.c.id)
    )
    for row in rows.all():
        vector = row.vector
        if lock is not None:
            vector = store.vault.vector(lock, row.template_id, vector)
        name = f"{row.template_id}.png"
        says = Correction(row.correction)
        yield {
            "template_id": row.template_id,
            "model": row.model_id,
            "ood_score": row.ood_score,
            "quality": row.quality,
            "correction": says.name if says else None,
            "created": _time(row.created_ns),
            "picture": name if name in shown else None,
            "vector": {
                "values": row.dim,
                "type": "float16, little endian, base64",
                "data": base64.b64encode(vector).decode(),
            },
        }


def _chips(
    connection: sa.Connection, store: Store, lock: Lock | None, number: int
) -> Iterator[tuple[str, bytes]]:
    rows = connection.execute(
        sa.select(chips)
        .join(templates, chips.c.template_id == templates.c.template_id)
        .where(templates.c.subject == number)
    )
    for row in rows.all():
        chip = row.chip if lock is None else store.vault.chip(lock, row.template_id, row.chip)
        if row.encoding == ENCODING:
            yield f"{row.template_id}.png", _png(chip)


def _event_pictures(
    connection: sa.Connection, store: Store, lock: Lock | None, number: int
) -> Iterator[tuple[str, tuple[int, dict[str, bytes]]]]:
    """By what each is kept by: its time, and its files. A store that is not encrypted has none."""
    rows = connection.execute(
        sa.select(pictures).where(pictures.c.subject == number).order_by(pictures.c.time_ns)
    )
    for row in rows.all() if lock is not None else ():
        assert lock is not None
        photo = opened_photo(store.vault, lock, row)
        name = f"event-{row.picture_id}"
        files = {f"{name}.jpg": photo.around}
        if photo.chip:
            files[f"{name}-face.jpg"] = photo.chip
        yield row.picture_id, (row.time_ns, files)


def _requests(
    connection: sa.Connection, store: Store, lock: Lock | None, number: int
) -> Iterator[dict[str, Any]]:
    """Of the last day, with what they were answered; their ids are kept as codes."""
    rows = connection.execute(
        sa.select(requests.c.template_id, requests.c.created_ns, requests.c.answer)
        .join(templates, requests.c.template_id == templates.c.template_id)
        .where(templates.c.subject == number)
    )
    for row in rows.all():
        answer = row.answer
        if answer is not None and lock is not None:
            answer = store.vault.answer(lock, row.template_id, answer)
        yield {
            "template_id": row.template_id,
            "time": _time(row.created_ns),
            "answer": answer,
        }


def _events(
    connection: sa.Connection,
    gallery_id: str,
    number: int,
    of_events: Mapping[str, tuple[int, dict[str, bytes]]],
) -> Iterator[dict[str, Any]]:
    """Those that name the subject, first or among others who were like it."""
    query = sa.select(events).where(events.c.gallery_id == gallery_id).order_by(events.c.sequence)
    own = str(number)
    with connection.execution_options(yield_per=2_000).execute(query) as rows:
        for row in rows:
            track = decoded(row.body)
            if track is None or own not in track.identity.subjects:
                continue
            identity = track.identity
            named = identity.subject_id == own
            similar = [one.similarity for one in identity.candidates if one.subject_id == own]
            box = track.box
            yield {
                "sequence": row.sequence,
                "kind": row.kind,
                "time": _time(row.time_ns),
                "source_id": row.source_id,
                "stream_id": row.stream_id,
                "decision": identity.decision.value,
                "named": named,
                "similarity": identity.similarity if named else max(similar, default=None),
                "liveness": track.liveness.verdict.value,
                "ood_score": track.ood_score,
                "track_id": track.track_id,
                "seconds_of_the_stream": [track.first_ns / 1e9, track.last_ns / 1e9],
                "capture_times": [
                    _time(at_ns)
                    for at_ns in (track.first_capture_ns, track.last_capture_ns)
                    if at_ns is not None
                ],
                "box": [box.x, box.y, box.width, box.height],
                "zone_or_line": _rule(rule_of(row.body)),
                "pictures": sorted(of_events[track.picture][1])
                if named and track.picture in of_events
                else [],
                "confirmations": [
                    {"by": one.by, "agrees": one.agrees, "time": _time(one.time_ns)}
                    for one in connection.execute(
                        sa.select(confirmations).where(confirmations.c.sequence == row.sequence)
                    )
                ],
            }


def _rule(rule: RuleReport | None) -> dict[str, Any] | None:
    if rule is None:
        return None
    crossing = None if rule.direction is None else rule.direction.value
    return {"name": rule.name, "seconds_in_it": rule.dwell_ns / 1e9, "crossing": crossing}


def _audit(
    connection: sa.Connection, store: Store, gallery_id: str, subject_id: str
) -> Iterator[dict[str, Any]]:
    store.audit.public(connection)
    code = store.audit.code(gallery_id, subject_id)
    for link in log.links(connection):
        entry = log.shown(link)
        if entry.get("subject") == code:
            entry.pop("digest")
            yield {**entry, "time": _time(entry.pop("time_ns"))}


def _png(chip: bytes) -> bytes:
    """Of a square of BGR bytes."""
    side = int((len(chip) // 3) ** 0.5)
    rgb = bytearray(chip)
    rgb[0::3], rgb[2::3] = chip[2::3], chip[0::3]
    rows = b"".join(
        b"\0" + bytes(rgb[3 * side * row : 3 * side * (row + 1)]) for row in range(side)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
