"""What readers of a gallery follow: all templates once, then every change in its order.

A change stands in the log with numbers alone (of the subject; a template's random id), so that the
log names nobody. What was added and removed again before a reader came to it is not told: the later
change is there, and says nothing that the reader knows.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

import numpy as np
import sqlalchemy as sa

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.store.records import F16, Correction, StoredVector
from facelane_server.store.schema import GALLERY, changes, keys, next_revision, revision, subjects
from facelane_server.store.schema import templates as templates_table
from facelane_server.store.vault import KEY_COLUMNS, OF_SUBJECT, Vault

UNIT_TOLERANCE: Final = 0.01
"""Stored vectors have unit norm up to the rounding of float16."""
ROWS: Final = 2_000
"""Vectors that are read and opened together: 2 MB of 512 values."""
_SEALED: Final = ("number", "wrapped", "wrapped_by", "sealed", "template_id", "vector")


class ChangeKind(enum.StrEnum):
    SUBJECT = "SUBJECT"
    """Made, or its name or labels changed."""
    TEMPLATE_ADDED = "TEMPLATE_ADDED"
    TEMPLATE_REMOVED = "TEMPLATE_REMOVED"
    SUBJECT_REMOVED = "SUBJECT_REMOVED"


@dataclass(frozen=True, slots=True)
class StoredChange:
    """``added``: of TEMPLATE_ADDED, unless it is gone again or of another model."""

    revision: int
    kind: ChangeKind
    subject: int
    template_id: str = ""
    added: StoredVector | None = None


class HistoryLostError(Exception):
    """The log has forgotten what comes next for this reader: it has to take all in again."""


def append(
    connection: sa.Connection, kind: ChangeKind, *, subject: int = 0, template_id: str = ""
) -> int:
    """Writes a change of a transaction under ``GALLERY``; its revision. ``subject`` 0: the subject
    is made by this change, and the revision is its number."""
    number = next_revision(connection, GALLERY)
    connection.execute(
        sa.insert(changes).values(
            revision=number, kind=kind.value, subject=subject or number, template_id=template_id
        )
    )
    if number % limits.CHANGES_PRUNED_EVERY == 0:
        connection.execute(
            sa.delete(changes).where(changes.c.revision <= number - limits.MAX_CHANGES_KEPT)
        )
    return number


def after(
    connection: sa.Connection, seen: int, model_id: str, dim: int, name: str, vault: Vault
) -> list[StoredChange]:
    """At most ``limits.MAX_CHANGE_BATCH`` changes behind revision ``seen``, oldest first, none left
    out. Raises HistoryLostError, and GALLERY_UNAVAILABLE for a damaged vector."""
    rows = connection.execute(
        sa.select(changes)
        .where(changes.c.revision > seen)
        .order_by(changes.c.revision)
        .limit(limits.MAX_CHANGE_BATCH)
    ).all()
    newest = revision(connection, GALLERY)
    if (not rows and newest != seen) or (rows and rows[0].revision != seen + 1):
        # Forgotten, or the store is another one: of an earlier state, for example a backup.
        raise HistoryLostError
    wanted = [row.template_id for row in rows if row.kind == ChangeKind.TEMPLATE_ADDED]
    found: dict[str, StoredVector] = {}
    if wanted and model_id:
        query = _vectors(model_id, vault).where(templates_table.c.template_id.in_(wanted))
        rows_of = connection.execute(query).all()
        found = {one.template_id: one for one in _opened(connection, rows_of, dim, name, vault)}
    return [
        StoredChange(
            row.revision,
            ChangeKind(row.kind),
            row.subject,
            row.template_id,
            found.get(row.template_id) if row.kind == ChangeKind.TEMPLATE_ADDED else None,
        )
        for row in rows
    ]


def last_removal(connection: sa.Connection) -> int:
    """The revision of the newest change that took a template away; 0 = none is remembered."""
    removing = (ChangeKind.TEMPLATE_REMOVED.value, ChangeKind.SUBJECT_REMOVED.value)
    newest = sa.select(sa.func.max(changes.c.revision)).where(changes.c.kind.in_(removing))
    return int(connection.scalar(newest) or 0)


def vectors(
    connection: sa.Connection, model_id: str, dim: int, name: str, vault: Vault
) -> Iterator[StoredVector]:
    """All templates of one model, in the order of gallery, subject (by number), age.

    A row whose vector does not have ``dim`` values, or no unit norm, is a damaged store:
    GALLERY_UNAVAILABLE.
    """
    # The order first, of numbers alone: a sort that carried the vectors along would write all of
    # them into temporary files.
    order = (
        sa.select(templates_table.c.id)
        .join_from(templates_table, subjects)
        .where(templates_table.c.model_id == model_id)
        .order_by(
            subjects.c.gallery_id,
            subjects.c.id,
            templates_table.c.correction == Correction.NOT,
            templates_table.c.id,
        )
    )
    ids = connection.scalars(order).all()
    query = _vectors(model_id, vault).add_columns(templates_table.c.id.label("row"))
    for begin in range(0, len(ids), ROWS):
        wanted = ids[begin : begin + ROWS]
        found = connection.execute(query.where(templates_table.c.id.in_(wanted))).all()
        places = {row.row: row for row in found}
        rows = [places[one] for one in wanted if one in places]
        yield from _opened(connection, rows, dim, name, vault)


def _opened(
    connection: sa.Connection, rows: Sequence[sa.Row[Any]], dim: int, name: str, vault: Vault
) -> list[StoredVector]:
    """In the order of ``rows``."""
    if not rows:
        return []
    if vault.encrypts:
        subject_ids, found = _unsealed(connection, rows, vault)
    else:
        subject_ids = [row.subject_id for row in rows]
        found = [row.vector for row in rows]
    for row, one in zip(rows, found, strict=True):
        if len(one) != 2 * dim:
            raise FacelaneError(
                Reason.GALLERY_UNAVAILABLE,
                f"{name}: a template of the serving model has {len(one)} bytes instead of "
                f"{2 * dim}; restore a backup of the gallery",
                metadata={"template_id": row.template_id},
            )
    matrix: F16 = np.frombuffer(b"".join(found), np.float16).reshape(len(rows), dim)
    wide = matrix.astype(np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    wrong = np.flatnonzero(~(np.abs(lengths - 1.0) < UNIT_TOLERANCE))
    if len(wrong):
        raise FacelaneError(
            Reason.GALLERY_UNAVAILABLE,
            f"{name}: the gallery's file is damaged: a template's vector is none; restore a backup "
            "of the gallery, or delete that template",
            metadata={"template_id": rows[wrong[0]].template_id},
        )
    return [
        StoredVector(
            row.gallery_id,
            subject_id,
            row.template_id,
            vector,
            row.number,
            row.quality,
            row.correction == Correction.NOT,
        )
        for row, subject_id, vector in zip(rows, subject_ids, matrix, strict=True)
    ]


def _unsealed(
    connection: sa.Connection, rows: Sequence[sa.Row[Any]], vault: Vault
) -> tuple[list[str], list[bytes]]:
    """The subjects' ids and the vectors; a key is opened once for rows that follow each other."""
    subject_ids: list[str] = []
    found: list[bytes] = []
    before, lock, subject_id = 0, None, ""
    # By place: a hundred thousand of them are read before a server serves.
    places = itemgetter(*map(rows[0]._fields.index, _SEALED))
    for number, wrapped, wrapped_by, sealed, template_id, vector in map(places, rows):
        if lock is None or number != before:
            before = number
            lock = vault.unlocked(connection, number, wrapped, wrapped_by)
            subject_id = vault.subject_id(lock, number, sealed)
        subject_ids.append(subject_id)
        found.append(vault.vector(lock, template_id, vector))
    return subject_ids, found


def _vectors(model_id: str, vault: Vault) -> sa.Select[Any]:
    """With the subjects' keys, where there are any."""
    query = (
        sa.select(
            subjects.c.gallery_id,
            subjects.c.subject_id,
            subjects.c.id.label("number"),
            templates_table.c.template_id,
            templates_table.c.vector,
            templates_table.c.quality,
            templates_table.c.correction,
        )
        .join_from(templates_table, subjects)
        .where(templates_table.c.model_id == model_id)
    )
    if not vault.encrypts:
        return query
    return query.add_columns(subjects.c.sealed, *KEY_COLUMNS).join(keys, OF_SUBJECT, isouter=True)
