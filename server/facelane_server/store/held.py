"""How long subjects have been held, and when each was last seen: what retention looks at."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from facelane_server.store.gallery import Store
from facelane_server.store.schema import GALLERY, audit, keys, last_seen, subjects
from facelane_server.store.vault import KEY_COLUMNS, OF_SUBJECT

DAY_NS: Final = 24 * 3600 * 1_000_000_000
HOUR_NS: Final = 3600 * 1_000_000_000
"""When somebody was seen is kept to the hour: nobody's comings and goings."""


@dataclass(frozen=True, slots=True)
class Held:
    """A subject as retention sees it. ``seen_ns`` 0: never. ``etag``: of this state of it."""

    number: int
    subject_id: str
    labels: Mapping[str, str]
    etag: str
    made_ns: int
    seen_ns: int


def held(store: Store, *, gallery_id: str, after: int, count: int) -> list[Held]:
    """At most ``count`` subjects of a gallery, by their numbers behind ``after``."""
    query = (
        sa.select(
            subjects.c.id,
            subjects.c.subject_id,
            subjects.c.labels,
            subjects.c.etag,
            subjects.c.created_ns,
            subjects.c.sealed,
            last_seen.c.seen_ns,
            *KEY_COLUMNS,
        )
        .join_from(subjects, last_seen, last_seen.c.subject == subjects.c.id, isouter=True)
        .join(keys, OF_SUBJECT, isouter=True)
        .where(subjects.c.gallery_id == gallery_id, subjects.c.id > after)
        .order_by(subjects.c.id)
        .limit(count)
    )
    found = []
    with store.database.reading() as connection:
        for row in connection.execute(query).all():
            subject_id, labels = row.subject_id, row.labels
            if store.vault.encrypts:
                person = store.vault.person(
                    store.vault.lock(connection, row.id, row), row.id, row.sealed
                )
                subject_id, labels = person.subject_id, person.labels
            seen_ns = row.seen_ns or 0
            found.append(Held(row.id, subject_id, labels, row.etag, row.created_ns, seen_ns))
    return found


def note_seen(store: Store, *, seen: Mapping[tuple[str, str], int]) -> None:
    """(gallery, subject id) -> when, in nanoseconds since the epoch. Whoever is gone is not noted,
    and an earlier time takes no later one's place."""
    with store.database.writing(GALLERY) as connection:
        for (gallery_id, subject_id), at_ns in seen.items():
            hour_ns = at_ns - at_ns % HOUR_NS
            number = connection.scalar(
                sa.select(subjects.c.id)
                .where(subjects.c.gallery_id == gallery_id)
                .where(
                    subjects.c.subject_id == store.vault.blind("subject", gallery_id, subject_id)
                )
            )
            if number is None:
                continue
            known = connection.scalar(
                sa.select(last_seen.c.seen_ns).where(last_seen.c.subject == number)
            )
            if known is None:
                connection.execute(sa.insert(last_seen).values(subject=number, seen_ns=hour_ns))
            elif known < hour_ns:
                connection.execute(
                    sa.update(last_seen)
                    .where(last_seen.c.subject == number)
                    .values(seen_ns=hour_ns)
                )


def set_right(store: Store, *, gallery_ids: Collection[str], now_ns: int) -> int | None:
    """Times that lie ahead of ``now_ns`` were given by a clock that was wrong: they are now from
    here on, or nobody of that time would ever be let go. How many those were; None, and all stays
    as it is, where it is this clock that seems to be wrong."""
    with store.database.writing(GALLERY) as connection:
        made = subjects.c.gallery_id.in_(gallery_ids) & (subjects.c.created_ns > now_ns)
        owners = sa.select(subjects.c.id).where(subjects.c.gallery_id.in_(gallery_ids))
        seen = last_seen.c.subject.in_(owners) & (last_seen.c.seen_ns > now_ns)
        if not any(
            connection.scalar(sa.select(column).where(ahead).limit(1))
            for column, ahead in ((subjects.c.id, made), (last_seen.c.subject, seen))
        ):
            return 0
        if _is_behind(connection, now_ns):
            return None
        hour_ns = now_ns - now_ns % HOUR_NS
        changed = (
            connection.execute(sa.update(subjects).where(made).values(created_ns=now_ns)),
            connection.execute(sa.update(last_seen).where(seen).values(seen_ns=hour_ns)),
        )
        return sum(one.rowcount for one in changed)


def _is_behind(connection: sa.Connection, now_ns: int) -> bool:
    """Whether ``now_ns`` is of a clock that has lost the time (a machine without a battery, before
    it has asked anybody): by the audit log, what was done at later times took longer than all that
    was done since. To take such times for now would let everybody go once the clock is right."""
    ahead = audit.c.time_ns > now_ns
    first_ns, last_ns, last = connection.execute(
        sa.select(
            sa.func.min(audit.c.time_ns),
            sa.func.max(audit.c.time_ns),
            sa.func.max(audit.c.sequence),
        ).where(ahead)
    ).one()
    if last is None:
        return False
    since_ns = connection.scalar(
        sa.select(sa.func.min(audit.c.time_ns)).where(audit.c.sequence > last)
    )
    lived_ns = now_ns - (now_ns if since_ns is None else since_ns)
    return bool(last_ns - first_ns > max(DAY_NS, lived_ns))


def id_of(store: Store, gallery_id: str, number: int) -> str:
    """The id of a subject; empty where it is not there."""
    found = held(store, gallery_id=gallery_id, after=number - 1, count=1)
    return found[0].subject_id if found and found[0].number == number else ""
