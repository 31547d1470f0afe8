"""Pictures of events at rest: sealed, bounded by age and number, gone with whom they show.

A picture of somebody who is named is sealed with that subject's key and deleted with the subject.
One of somebody whom nobody knows has a key of its own, kept like a subject's under a number below
zero, which no subject has: what is done to keys of subjects is done to these. A store that is not
encrypted keeps none.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.store.database import Database
from facelane_server.store.envelope import Lock
from facelane_server.store.schema import GALLERY, keys, pictures, subjects
from facelane_server.store.vault import Vault

ERASE_EVERY_S: Final = 3600.0
"""Keys that retention has deleted are opened by none that is left after so long, or with the next
subject that is deleted."""


@dataclass(frozen=True, slots=True)
class Photo:
    """JPEGs of one face: ``around``, with its surroundings, and ``chip``, as the recogniser saw it
    (empty where there is none)."""

    around: bytes
    chip: bytes = b""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Photo).decode


def opened_photo(vault: Vault, lock: Lock, row: sa.Row[Any]) -> Photo:
    """Of a row of the table, with its owner's lock. Raises GALLERY_UNAVAILABLE."""
    return _decode(vault.picture(lock, row.picture_id, row.sealed))


def new_id() -> str:
    return secrets.token_hex(16)


class Pictures:
    """Of one store, from any thread. Every method is one transaction; all raise
    GALLERY_UNAVAILABLE."""

    def __init__(self, database: Database, vault: Vault) -> None:
        self._database = database
        self._vault = vault
        self._erased_s = -ERASE_EVERY_S
        self._owes = False
        """Keys were deleted since, which the present epoch's would still open."""

    @property
    def are_kept(self) -> bool:
        """Whether this store can keep any."""
        return self._vault.encrypts

    def add(
        self,
        picture_id: str,
        photo: Photo,
        time_ns: int,
        *,
        gallery_id: str,
        subject_id: str,
        as_of: int = 0,
    ) -> bool:
        """``subject_id``: who is named, empty = nobody. ``as_of``: see ``EventRecord``. False, and
        nothing is kept, where that subject is not there any more."""
        if not self.are_kept:
            return False
        with self._database.writing(GALLERY) as connection:
            number = self._number(connection, gallery_id, subject_id) if subject_id else None
            if subject_id and (number is None or (as_of and number > as_of)):
                return False
            self._insert(connection, picture_id, photo, time_ns, number)
        return True

    def get(self, picture_id: str) -> Photo | None:
        """None where it is not there: not yet, or not any more."""
        query = sa.select(pictures).where(pictures.c.picture_id == picture_id)
        with self._database.reading() as connection:
            row = connection.execute(query).first()
            if row is None:
                return None
            return opened_photo(self._vault, self._vault.lock_of(connection, row.owner), row)

    def give(self, picture_id: str, gallery_id: str, subject_id: str) -> bool:
        """The picture shows this subject: its key seals it from now on. False where either is
        gone."""
        with self._database.writing(GALLERY) as connection:
            row = connection.execute(
                sa.select(pictures).where(pictures.c.picture_id == picture_id)
            ).first()
            number = self._number(connection, gallery_id, subject_id)
            if row is None or number is None:
                return False
            lock = self._vault.lock_of(connection, row.owner)
            photo = opened_photo(self._vault, lock, row)
            self._delete(connection, [row.picture_id], [row.owner])
            self._insert(connection, picture_id, photo, row.time_ns, number)
        return True

    def prune(self, *, keep: int, before_ns: int) -> int:
        """Deletes the oldest: those beyond ``keep``, and those from before ``before_ns``; at most
        ``limits.MAX_PICTURES_PRUNED`` at a time. How many that were."""
        with self._database.writing(GALLERY) as connection:
            total = connection.scalar(sa.select(sa.func.count()).select_from(pictures)) or 0
            oldest = (
                sa.select(pictures.c.picture_id, pictures.c.owner, pictures.c.time_ns)
                .order_by(pictures.c.time_ns)
                .limit(limits.MAX_PICTURES_PRUNED)
            )
            rows = connection.execute(oldest).all() if total else ()
            beyond = max(0, total - keep)
            gone = [row for n, row in enumerate(rows) if n < beyond or row.time_ns < before_ns]
            if gone:
                self._delete(connection, [r.picture_id for r in gone], [r.owner for r in gone])
            now_s = time.monotonic()
            due = (self._owes or gone) and now_s - self._erased_s >= ERASE_EVERY_S
            if due:
                self._vault.erased(connection)
        if due:
            self._owes, self._erased_s = False, now_s
        elif gone:
            self._owes = True
        if gone:
            self._database.forget_deleted()
        return len(gone)

    def _number(self, connection: sa.Connection, gallery_id: str, subject_id: str) -> int | None:
        found: int | None = connection.scalar(
            sa.select(subjects.c.id)
            .where(subjects.c.gallery_id == gallery_id)
            .where(subjects.c.subject_id == self._vault.blind("subject", gallery_id, subject_id))
        )
        return found

    def _insert(
        self,
        connection: sa.Connection,
        picture_id: str,
        photo: Photo,
        time_ns: int,
        number: int | None,
    ) -> None:
        lock: Lock
        if number is None:
            owner = -1 - secrets.randbits(62)
            lock = self._vault.new_lock(connection, owner)
        else:
            owner = number
            lock = self._vault.lock_of(connection, number)
        connection.execute(
            sa.insert(pictures).values(
                picture_id=picture_id,
                subject=number,
                owner=owner,
                time_ns=time_ns,
                sealed=self._vault.sealed_picture(lock, picture_id, _encode(photo)),
            )
        )

    def _delete(self, connection: sa.Connection, ids: list[str], owners: list[int]) -> None:
        connection.execute(sa.delete(pictures).where(pictures.c.picture_id.in_(ids)))
        own = [owner for owner in owners if owner < 0]
        if own:
            connection.execute(sa.delete(keys).where(keys.c.subject.in_(own)))


def not_found() -> FacelaneError:
    return FacelaneError(
        Reason.PICTURE_NOT_FOUND,
        "there is no picture of this event: none was kept, retention has ended it, or whom it "
        "showed was deleted",
    )
