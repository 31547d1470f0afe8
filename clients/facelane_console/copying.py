"""What somebody gets who asks what is kept of them: all of it that this key may see, as a ZIP."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any, Final

import facelane
from facelane_console import shown

MOST_EVENTS: Final = 1000
MOST_PAGES: Final = 200
"""Of the history, 256 events each: so far back is looked."""
_MOST_BYTES: Final = 256 << 20


async def copy_of(client: facelane.aio.Client, subject: str, gallery: str) -> bytes:
    """``subject.json`` (the record, its templates without their vectors, what was corrected),
    ``events.json``, and ``pictures/`` by the numbers of events. Raises ``NotFoundError``.

    ``left_out`` of ``subject.json`` says what the key may not see, or what was too much.
    """
    record = shown.subject(await client.get_subject(subject, gallery=gallery))
    faces = await client.list_templates(subject, gallery=gallery)
    left_out: list[str] = []
    corrections: list[facelane.Correction] = []
    try:
        corrections = await client.list_corrections(subject, gallery=gallery)
    except facelane.PermissionDeniedError:
        left_out.append("corrections: the key may not read them")
    try:
        events = await _events(client, subject, record["gallery"], left_out)
    except facelane.PermissionDeniedError:
        events = []
        left_out.append("events: the key may not read them")
    pictures: dict[int, bytes] = {}
    held = 0
    for event in events:
        if not event.get("picture"):
            continue
        if held > _MOST_BYTES:
            left_out.append("pictures: there are too many")
            break
        try:
            kept = await client.event_picture(event["sequence"])
        except facelane.PermissionDeniedError:
            left_out.append("pictures: the key may not see them")
            break
        except facelane.NotFoundError:
            continue  # ended by retention, meanwhile
        pictures[event["sequence"]] = kept.picture
        held += len(kept.picture)
    told = {
        **record,
        "faces": [shown.template(one) for one in faces],
        "corrections": [shown.correction(one) for one in corrections],
        "left_out": left_out,
    }
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("subject.json", _text(told))
        archive.writestr("events.json", _text(events))
        for sequence, picture in pictures.items():
            archive.writestr(f"pictures/{sequence}.jpg", picture)
    return made.getvalue()


async def _events(
    client: facelane.aio.Client, subject: str, gallery: str, left_out: list[str]
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    before = 0
    for _ in range(MOST_PAGES):
        page, before = await client.list_events(before=before, gallery_ids=[gallery], page_size=256)
        found += [
            shown.event(one)
            for one in page
            if subject in (one.identity.subject_id, one.candidate_subject_id)
        ]
        if len(found) > MOST_EVENTS:
            left_out.append(f"events: only the newest {MOST_EVENTS} are here")
            return found[:MOST_EVENTS]
        if not before:
            return found
    left_out.append("events: the oldest were not looked through")
    return found


def _text(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
