"""Lists of subjects in the order of their ids, which a store that is sealed does not have."""

from __future__ import annotations

import bisect
import threading
from collections import deque

import sqlalchemy as sa

from facelane_server.store.schema import GALLERY, keys, revision, subjects
from facelane_server.store.vault import BATCH, KEY_COLUMNS, OF_SUBJECT, Vault


class SortedIds:
    """The ids of each gallery's subjects in their order, which the blinded ones do not have.

    Read when first listed, and brought up to date by what has changed since. From any thread."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._guard = threading.Lock()
        self._gone: deque[int] = deque(maxlen=BATCH)
        """Deleted lately: a transaction of before may still see them."""
        self._seen: dict[str, int] = {}
        self._sorted: dict[str, list[tuple[str, int]]] = {}

    def after(self, connection: sa.Connection, gallery_id: str, last: str, count: int) -> list[int]:
        """The numbers of at most ``count`` subjects behind the id ``last``."""
        newest = revision(connection, GALLERY)
        with self._guard:
            if self._seen.get(gallery_id) != newest:
                self._read(connection, gallery_id)
                self._seen[gallery_id] = newest
            ids = self._sorted[gallery_id]
        begin = bisect.bisect_right(ids, last, key=lambda one: one[0])
        return [number for _, number in ids[begin : begin + count]]

    def forget(self, number: int) -> None:
        """A subject was deleted: its id does not wait here for the next listing."""
        with self._guard:
            self._gone.append(number)
            for gallery_id, ids in self._sorted.items():
                self._sorted[gallery_id] = [one for one in ids if one[1] != number]

    def clear(self) -> None:
        """Nobody knows who was deleted."""
        with self._guard:
            self._seen, self._sorted = {}, {}

    def _read(self, connection: sa.Connection, gallery_id: str) -> None:
        """Opens those that were not known, and leaves out those that are gone."""
        present = set(
            connection.scalars(sa.select(subjects.c.id).where(subjects.c.gallery_id == gallery_id))
        ).difference(self._gone)
        known = [one for one in self._sorted.get(gallery_id, ()) if one[1] in present]
        fresh = present.difference(number for _, number in known)
        query = (
            sa.select(subjects.c.id, subjects.c.sealed, *KEY_COLUMNS)
            .join(keys, OF_SUBJECT, isouter=True)
            .where(subjects.c.gallery_id == gallery_id)
        )
        if fresh and len(fresh) <= BATCH:
            query = query.where(subjects.c.id.in_(fresh))
        if fresh:
            for row in connection.execute(query).all():
                if row.id in fresh:
                    lock = self._vault.lock(connection, row.id, row)
                    person = self._vault.person(lock, row.id, row.sealed)
                    known.append((person.subject_id, row.id))
            known.sort()
        self._sorted[gallery_id] = known
