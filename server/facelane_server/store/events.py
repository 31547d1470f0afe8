"""Events at rest: numbered in the order in which they become visible, for as long as they are kept.

An event names subjects by their numbers, which say nothing without the subjects' own rows, sealed
where the store is. A subject that was deleted has none: its events stay, and name nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from facelane_server import limits
from facelane_server.domain import Decision, Identity, RuleReport, TrackReport
from facelane_server.store.database import Database
from facelane_server.store.following import HistoryLostError
from facelane_server.store.schema import (
    EVENTS,
    STORE_ID,
    events,
    keys,
    meta,
    next_revision,
    revision,
    subjects,
)
from facelane_server.store.vault import KEY_COLUMNS, OF_SUBJECT, Vault


@dataclass(frozen=True, slots=True)
class EventRecord:
    """``sequence`` 0: not written yet. ``time_ns`` since the epoch. ``sender``: the name of the key
    whose stream it is about; empty for what others than streams tell, and in records of before.
    ``candidate``: the sequence of the event that was confirmed, 0 = none. ``as_of``: the gallery's
    revision by which its track is named, until it is written; 0 = by the names as they are then."""

    sequence: int
    kind: str
    time_ns: int
    source_id: str = ""
    stream_id: str = ""
    gallery_id: str = ""
    track: TrackReport | None = None
    pool: str = ""
    message: str = ""
    sender: str = ""
    rule: RuleReport | None = None
    candidate: int = 0
    as_of: int = 0


@dataclass(frozen=True, slots=True)
class _Body:
    track: TrackReport | None
    pool: str = ""
    message: str = ""
    sender: str = ""
    rule: RuleReport | None = None
    candidate: int = 0


_LAST: Final = (1 << 63) - 1
"""No number of an event is above it, nor of anything else that a store can be asked for."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Body).decode


def decoded(body: bytes) -> TrackReport | None:
    """What an event at rest says of a track, whose subjects are numbers there."""
    return _decode(body).track


def rule_of(body: bytes) -> RuleReport | None:
    """What an event at rest says of a zone or a line."""
    return _decode(body).rule


def candidate_of(body: bytes) -> int:
    """The candidate that an event at rest has come of; 0 = none."""
    return _decode(body).candidate


def renamed(track: TrackReport, names: Mapping[str, str]) -> TrackReport:
    """The report with other names for its subjects, and without those that have none."""
    identity = track.identity
    near = tuple(
        msgspec.structs.replace(c, subject_id=names[c.subject_id])
        for c in identity.candidates
        if c.subject_id in names
    )
    if identity.subject_id and identity.subject_id not in names:
        identity = Identity(Decision.NOT_EVALUATED)
        track = msgspec.structs.replace(track, picture="", best_similarity=None)
    else:
        name = names.get(identity.subject_id, "")
        identity = msgspec.structs.replace(identity, subject_id=name, candidates=near)
    return msgspec.structs.replace(track, identity=identity)


def without(track: TrackReport, subject_id: str) -> TrackReport:
    """The report without a subject: one that was named after it names nobody."""
    kept = track.identity.subjects - {subject_id}
    return renamed(track, {name: name for name in kept})


def history_id(database: Database) -> bytes:
    """8 bytes: of this store, and of no other."""
    with database.reading() as connection:
        found = connection.scalar(sa.select(meta.c.value).where(meta.c.name == STORE_ID))
    return bytes.fromhex(str(found))


def span(database: Database) -> tuple[int, int]:
    """(the newest event that is not kept any more, the newest of all)."""
    with database.reading() as connection:
        oldest = connection.scalar(sa.select(sa.func.min(events.c.sequence)))
        newest = revision(connection, EVENTS)
    return (newest if oldest is None else oldest - 1), newest


def append(database: Database, vault: Vault, batch: Sequence[EventRecord], *, again: bool) -> None:
    """Writes all of them in their order, or none. ``again``: an earlier try may have succeeded
    without telling; times of one writer are never the same twice, so that it can be known."""
    with database.writing(EVENTS) as connection:
        if again and _is_there(connection, batch[0]):
            return
        for record in batch:
            write(connection, vault, record)


def _is_there(connection: sa.Connection, record: EventRecord) -> bool:
    same = (
        sa.select(events.c.sequence)
        .where(events.c.time_ns == record.time_ns)
        .where(events.c.kind == record.kind)
        .where(events.c.stream_id == record.stream_id)
    )
    return connection.scalar(same) is not None


def write(connection: sa.Connection, vault: Vault, record: EventRecord) -> None:
    """In a transaction under ``EVENTS``."""
    track = record.track
    if track is not None and (named := track.identity.subjects):
        stored = {vault.blind("subject", record.gallery_id, name): name for name in named}
        query = (
            sa.select(subjects.c.id, subjects.c.subject_id)
            .where(subjects.c.gallery_id == record.gallery_id)
            .where(subjects.c.subject_id.in_(stored))
        )
        if record.as_of:
            # Numbers are revisions: a higher one is of somebody who was enrolled since, under the
            # name of whoever was meant.
            query = query.where(subjects.c.id <= record.as_of)
        known = connection.execute(query).all()
        track = renamed(track, {stored[row.subject_id]: str(row.id) for row in known})
    connection.execute(
        sa.insert(events).values(
            sequence=next_revision(connection, EVENTS),
            kind=record.kind,
            time_ns=record.time_ns,
            source_id=record.source_id,
            stream_id=record.stream_id,
            gallery_id=record.gallery_id,
            body=_encode(
                _Body(
                    track,
                    record.pool,
                    record.message,
                    record.sender,
                    record.rule,
                    record.candidate,
                )
            ),
        )
    )


def after(database: Database, vault: Vault, seen: int) -> list[EventRecord]:
    """At most ``limits.MAX_EVENT_BATCH`` events behind ``seen``, none left out. Raises
    HistoryLostError when what comes next is not kept any more, or the store is behind ``seen``."""
    with database.reading() as connection:
        rows = connection.execute(
            sa.select(events)
            .where(events.c.sequence > seen)
            .order_by(events.c.sequence)
            .limit(limits.MAX_EVENT_BATCH)
        ).all()
        if (rows and rows[0].sequence != seen + 1) or (
            not rows and revision(connection, EVENTS) != seen
        ):
            raise HistoryLostError
        return named(connection, vault, rows)


def named(
    connection: sa.Connection, vault: Vault, rows: Sequence[sa.Row[Any]]
) -> list[EventRecord]:
    """Rows of events as what they say, with the subjects' ids."""
    found = [(row, _decode(row.body)) for row in rows]
    tracks = [body.track for _, body in found if body.track is not None]
    names = _names(connection, vault, {n for t in tracks for n in t.identity.subjects})
    return [
        EventRecord(
            row.sequence,
            row.kind,
            row.time_ns,
            row.source_id,
            row.stream_id,
            row.gallery_id,
            None if body.track is None else renamed(body.track, names),
            body.pool,
            body.message,
            body.sender,
            body.rule,
            body.candidate,
        )
        for row, body in found
    ]


def one(database: Database, vault: Vault, sequence: int) -> EventRecord | None:
    """The event of a number, while it is kept."""
    if sequence > _LAST:
        return None
    with database.reading() as connection:
        rows = connection.execute(sa.select(events).where(events.c.sequence == sequence)).all()
        return next(iter(named(connection, vault, rows)), None)


def confirmed(candidate: EventRecord, kind: str, now_ns: int) -> EventRecord:
    """What is told once people have said that a candidate is the one."""
    return replace(candidate, sequence=0, kind=kind, time_ns=now_ns, candidate=candidate.sequence)


def before(
    database: Database,
    vault: Vault,
    sequence: int,
    count: int,
    *,
    kinds: Sequence[str] = (),
    source_ids: Sequence[str] = (),
    gallery_ids: Sequence[str] = (),
) -> list[EventRecord]:
    """At most ``count`` events before ``sequence`` (0 = from the newest on), the newest first; of
    those kinds, sources and galleries alone, where some are named."""
    query = sa.select(events).order_by(events.c.sequence.desc()).limit(count)
    if 0 < sequence <= _LAST:
        query = query.where(events.c.sequence < sequence)
    for column, wanted in (
        (events.c.kind, kinds),
        (events.c.source_id, source_ids),
        (events.c.gallery_id, gallery_ids),
    ):
        if wanted:
            query = query.where(column.in_(wanted))
    with database.reading() as connection:
        return named(connection, vault, connection.execute(query).all())


def reports(
    database: Database, kind: str, source_id: str, since_ns: int, count: int
) -> list[TrackReport]:
    """What events of a kind and a source said of their tracks, whose subjects are numbers here; the
    newest ``count`` of them since ``since_ns``, newest first."""
    query = (
        sa.select(events.c.body)
        .where(events.c.time_ns >= since_ns)
        .where(events.c.kind == kind)
        .where(events.c.source_id == source_id)
        .order_by(events.c.sequence.desc())
        .limit(count)
    )
    with database.reading() as connection:
        found = (decoded(row.body) for row in connection.execute(query))
        return [track for track in found if track is not None]


def _names(connection: sa.Connection, vault: Vault, numbers: Iterable[str]) -> dict[str, str]:
    """Of the subjects that are there."""
    wanted = [int(number) for number in numbers]
    if not wanted:
        return {}
    query = sa.select(subjects.c.id, subjects.c.subject_id).where(subjects.c.id.in_(wanted))
    if not vault.encrypts:
        return {str(row.id): row.subject_id for row in connection.execute(query)}
    sealed = query.add_columns(subjects.c.sealed, *KEY_COLUMNS).join(keys, OF_SUBJECT, isouter=True)
    return {
        str(row.id): vault.person(
            vault.lock(connection, row.id, row), row.id, row.sealed
        ).subject_id
        for row in connection.execute(sealed).all()
    }


def prune(database: Database, *, keep: int, before_ns: int) -> int:
    """Forgets the oldest: those beyond ``keep``, and those that happened before ``before_ns``; at
    most ``limits.MAX_EVENTS_PRUNED`` at a time. How many that were."""
    with database.writing(EVENTS) as connection:
        oldest = connection.scalar(sa.select(sa.func.min(events.c.sequence)))
        if oldest is None:
            return 0
        newest = revision(connection, EVENTS)
        young = connection.scalar(
            sa.select(sa.func.min(events.c.sequence)).where(events.c.time_ns >= before_ns)
        )
        first = max(newest - keep + 1, newest + 1 if young is None else young)
        first = min(first, oldest + limits.MAX_EVENTS_PRUNED)
        if first <= oldest:
            return 0
        gone = connection.execute(sa.delete(events).where(events.c.sequence < first))
        return int(gone.rowcount)
