"""Who has said of a candidate that it is the one, or is not: in galleries where somebody is seen
only once people have looked (``gallery_rules.GalleryRules.confirm``).

Each answer and what follows from it are one transaction: the answer, its entry in the audit log,
and, with the last one, SUBJECT_SEEN. So every server of the store tells the same.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from facelane_server import limits
from facelane_server.domain import Decision, FacelaneError, Reason
from facelane_server.naming import gallery_name
from facelane_server.store import audit
from facelane_server.store import events as stored
from facelane_server.store.audit import Action, Deed
from facelane_server.store.gallery import Store
from facelane_server.store.schema import AUDIT, EVENTS, GALLERY, confirmations, events

CANDIDATE: Final = "SUBJECT_CANDIDATE"
SEEN: Final = "SUBJECT_SEEN"


class State(enum.StrEnum):
    """Of a candidate."""

    OPEN = "OPEN"
    CONFIRMED = "CONFIRMED"
    DENIED = "DENIED"


@dataclass(frozen=True, slots=True)
class Confirmation:
    """``agreed``: keys that said yes; ``needed``: how many it takes."""

    state: State
    agreed: int
    needed: int


def _missing() -> FacelaneError:
    return FacelaneError(
        Reason.EVENT_NOT_FOUND,
        "there is no such candidate in this gallery: its event is not kept any more, whom it named "
        "was deleted, or the number is of another event",
    )


def confirm(
    store: Store,
    *,
    gallery_id: str,
    sequence: int,
    by: str,
    agrees: bool,
    needed: int,
    at_source: Callable[[str], bool],
    now_ns: int,
) -> Confirmation:
    """What becomes of a candidate with one more answer. ``by``: the name of a key, which counts
    once; it may take back that it agreed, while that is open. ``needed`` at least 1.
    ``at_source``: whether it may answer for this source. Raises EVENT_NOT_FOUND,
    GALLERY_UNAVAILABLE."""
    gallery_id = gallery_name(gallery_id)
    if sequence > limits.MAX_SEQUENCE:
        raise _missing()
    with store.database.writing(GALLERY, AUDIT, EVENTS) as connection:
        row = connection.execute(
            sa.select(events).where(
                events.c.sequence == sequence,
                events.c.kind == CANDIDATE,
                events.c.gallery_id == gallery_id,
            )
        ).first()
        if row is None or not at_source(row.source_id):
            raise _missing()
        [record] = stored.named(connection, store.vault, [row])
        if record.track is None or record.track.identity.decision is not Decision.MATCH:
            raise _missing()
        answers = {
            one.by: one.agrees
            for one in connection.execute(
                sa.select(confirmations).where(confirmations.c.sequence == sequence)
            )
        }
        before = _state(answers, needed)
        if answers and _is_told(connection, row):
            return Confirmation(State.CONFIRMED, before.agreed, needed)
        # Where fewer have to agree than when it was asked, enough may have, and nobody was told.
        if before.state is State.DENIED or (
            before.state is State.OPEN and answers.get(by) is agrees
        ):
            return before
        ours = (confirmations.c.sequence == sequence) & (confirmations.c.by == by)
        connection.execute(sa.delete(confirmations).where(ours))
        connection.execute(
            sa.insert(confirmations).values(sequence=sequence, by=by, agrees=agrees, time_ns=now_ns)
        )
        told = (("event", sequence), ("agrees", "yes" if agrees else "no"))
        subject_id = record.track.identity.subject_id
        deed = Deed(Action.CONFIRMED, audit.actor(), gallery_id, subject_id, told)
        store.audit.append(connection, [deed])
        answers[by] = agrees
        after = _state(answers, needed)
        if after.state is State.CONFIRMED:
            stored.write(connection, store.vault, stored.confirmed(record, SEEN, now_ns))
    return after


def _is_told(connection: sa.Connection, candidate: sa.Row[Any]) -> bool:
    """Whether SUBJECT_SEEN has come of it, whatever the gallery's setting was then."""
    later = sa.select(events.c.body).where(
        events.c.sequence > candidate.sequence,
        events.c.kind == SEEN,
        events.c.stream_id == candidate.stream_id,
    )
    return any(
        stored.candidate_of(body) == candidate.sequence for body in connection.scalars(later)
    )


def _state(answers: dict[str, bool], needed: int) -> Confirmation:
    agreed = sum(answers.values())
    state = State.CONFIRMED if agreed >= needed else State.OPEN
    return Confirmation(State.DENIED if agreed < len(answers) else state, agreed, needed)
