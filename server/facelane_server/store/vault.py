"""The keys of one store, and what is sealed with them: vectors, names, labels, ids.

A vault is open (``encrypts``) or absent: then everything lies in the store as it is, as in the
galleries of before. Which of both is the store's own matter, written in its ``meta``; so no process
mistakes one for the other. Keys of subjects are read as they are needed; index and epoch keys are
kept, and read again when a row names one that another process has made.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec
import sqlalchemy as sa
import structlog

from facelane_server.config import ConfigError
from facelane_server.domain import FacelaneError, Reason
from facelane_server.store import envelope
from facelane_server.store.database import Database
from facelane_server.store.envelope import Lock, SealBrokenError
from facelane_server.store.masterkey import Source
from facelane_server.store.schema import (
    GALLERY,
    audit,
    chips,
    keys,
    meta,
    revision,
    subjects,
    templates,
)
from facelane_server.store.schema import requests as requests_table
from facelane_server.wiping import wipe

log = structlog.get_logger(__name__)

Mode = Literal["auto", "on", "off"]
ENCRYPTION: Final = "encryption"
"""In ``meta``: ``SEALED`` where the store is; ``DUE``: and has to be written anew, since what
lay open is left in its free pages."""
ERASURE: Final = "erasure"
"""In ``meta``: the revision of the newest deletion that waits for the epoch's turn."""
SEALED: Final = "1"
DUE: Final = "due"
NO_MASTER_KEY: Final = "NO_MASTER_KEY"
"""The cause where the store is locked by a key that this process is not given."""
_ASK_AGAIN_S: Final = 5.0
BATCH: Final = 2_000
"""Rows of a transaction that goes over all subjects: other writers wait for no more."""

KEY_COLUMNS: Final = (keys.c.wrapped, keys.c.wrapped_by)
"""What ``Vault.lock`` needs of a row, from a join with ``OF_SUBJECT``."""
IS_EPOCH: Final = keys.c.key_id.between("epoch-", "epoch.")
"""By name, which the index finds among the keys of all subjects."""
OF_SUBJECT: Final = (keys.c.subject == subjects.c.id) & (keys.c.kind == "subject")


@dataclass(frozen=True, slots=True)
class Person:
    """What is said of a subject, and sealed."""

    subject_id: str
    display_name: str
    labels: Mapping[str, str]


def broken(name: str) -> FacelaneError:
    return FacelaneError(
        Reason.GALLERY_UNAVAILABLE,
        f"{name}: the gallery is damaged, or its keys are of another store: what is sealed in it "
        "cannot be opened; restore a backup of the whole store",
    )


class Vault:
    """See the module. Made by ``open_vault``. All methods may be called from any thread."""

    def __init__(self, name: str, source: Source | None, masters: Sequence[Lock]) -> None:
        self.encrypts = bool(masters)
        self._name = name
        self._source = source
        self._masters = {lock.name: lock for lock in masters}
        self._master = masters[0] if masters else None
        self._index = b""
        self._epochs: dict[str, Lock] = {}
        self._epoch = ""
        self._asked_s = -_ASK_AGAIN_S
        """When the source was asked last for a key that another process locks with by now."""
        self._guard = threading.Lock()

    # -- names and persons -------------------------------------------------------------------

    def blind(self, *parts: str) -> str:
        """What stands for a name in the store; the last part itself where nothing is sealed."""
        return envelope.blinded(self._index, *parts) if self.encrypts else parts[-1]

    def lock(self, connection: sa.Connection, number: int, row: Any) -> Lock:
        """A subject's lock, from a row with ``KEY_COLUMNS``."""
        return self.unlocked(connection, number, row.wrapped, row.wrapped_by)

    def unlocked(
        self, connection: sa.Connection, number: int, wrapped: bytes | None, wrapped_by: str
    ) -> Lock:
        """The same from ``KEY_COLUMNS`` themselves."""
        if wrapped is None:
            raise broken(self._name)
        epoch = self._epochs.get(wrapped_by)
        if epoch is None:
            self._read_keys(connection)
            epoch = self._epochs.get(wrapped_by)
        if epoch is None:
            raise broken(self._name)
        return Lock.taking(self._opened(epoch, wrapped, f"key {number}"), "subject")

    def new_lock(self, connection: sa.Connection, number: int) -> Lock:
        """A fresh key for a subject, kept in the store."""
        # Another process may have gone on to a newer epoch: of the keys of an older one none is
        # to be made any more.
        if self._newest(connection) != self._epoch:
            self._read_keys(connection)
        key = envelope.new_key()
        connection.execute(sa.insert(keys), [self._key_row(number, key)])
        return Lock.taking(key, "subject")

    def lock_of(self, connection: sa.Connection, number: int) -> Lock:
        """A subject's lock, by its number."""
        row = connection.execute(
            sa.select(*KEY_COLUMNS).where(keys.c.subject == number, keys.c.kind == "subject")
        ).first()
        if row is None:
            raise broken(self._name)
        return self.lock(connection, number, row)

    def sealed_person(self, lock: Lock, number: int, person: Person) -> bytes:
        plain = msgspec.json.encode([person.subject_id, person.display_name, person.labels])
        return lock.seal(plain, f"person {number}")

    def person(self, lock: Lock, number: int, sealed: bytes) -> Person:
        subject_id, display_name, labels = _PERSON.decode(
            self._opened(lock, sealed, f"person {number}")
        )
        return Person(subject_id, display_name, labels)

    def subject_id(self, lock: Lock, number: int, sealed: bytes) -> str:
        """Of the person, and no more."""
        return _PERSON.decode(self._opened(lock, sealed, f"person {number}"))[0]

    def vector(self, lock: Lock, template_id: str, sealed: bytes) -> bytes:
        return self._opened(lock, sealed, f"vector {template_id}")

    def sealed_vector(self, lock: Lock, template_id: str, plain: bytes) -> bytes:
        return lock.seal(plain, f"vector {template_id}")

    def chip(self, lock: Lock, template_id: str, sealed: bytes) -> bytes:
        return self._opened(lock, sealed, f"chip {template_id}")

    def sealed_chip(self, lock: Lock, template_id: str, plain: bytes) -> bytes:
        return lock.seal(plain, f"chip {template_id}")

    def picture(self, lock: Lock, picture_id: str, sealed: bytes) -> bytes:
        return self._opened(lock, sealed, f"picture {picture_id}")

    def sealed_picture(self, lock: Lock, picture_id: str, plain: bytes) -> bytes:
        return lock.seal(plain, f"picture {picture_id}")

    def answer(self, lock: Lock, template_id: str, kept: Mapping[str, Any]) -> Any:
        """What was kept with a request."""
        sealed = bytes.fromhex(kept.get("sealed", ""))
        return msgspec.json.decode(self._opened(lock, sealed, f"answer {template_id}"))

    def sealed_answer(
        self, lock: Lock, template_id: str, answer: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        sealed = lock.seal(msgspec.json.encode(answer), f"answer {template_id}")
        return {"sealed": sealed.hex()}

    def _opened(self, lock: Lock, sealed: bytes, where: str) -> bytes:
        try:
            return lock.open(sealed, where)
        except SealBrokenError:
            raise broken(self._name) from None

    # -- secrets of the store itself -----------------------------------------------------------

    def secret(self, connection: sa.Connection, kind: str) -> bytes:
        """32 bytes that the store keeps for a purpose of its own, made when first asked for (in
        a transaction that writes)."""
        row = connection.execute(sa.select(keys).where(keys.c.key_id == kind)).first()
        if row is not None:
            return self._unwrapped(row)
        assert self._master is not None
        key = envelope.new_key()
        self._keep(connection, kind, kind, key)
        return key

    # -- life of the keys --------------------------------------------------------------------

    def begin(self, connection: sa.Connection) -> None:
        """The first keys of a store, which is sealed from here on."""
        self._index = envelope.new_key()
        self._keep(connection, "index", "index", self._index)
        self._new_epoch(connection)
        # What the store kept for itself while it lay open, like the audit log's key.
        assert self._master is not None
        for row in connection.execute(sa.select(keys).where(keys.c.wrapped_by == "")).all():
            sealed = self._master.seal(row.wrapped, f"key {row.key_id}")
            connection.execute(
                sa.update(keys)
                .where(keys.c.key_id == row.key_id)
                .values(wrapped=sealed, wrapped_by=self._master.name)
            )
        connection.execute(sa.insert(meta).values(name=ENCRYPTION, value=DUE))

    def take(self, connection: sa.Connection) -> None:
        """Reads the keys of a store that is sealed. Raises ``ConfigError`` for the wrong master
        key."""
        try:
            self._read_keys(connection)
        except FacelaneError as error:
            if error.metadata.get("cause") == NO_MASTER_KEY:
                raise ConfigError(error.message) from None
            raise
        if not self._index:
            raise broken(self._name)

    def offered(self) -> tuple[Lock, ...]:
        """The master keys that the source gives by now; it may take its time. Raises
        ``ConfigError``."""
        return () if self._source is None or not self.encrypts else self._source.read()

    def _take_over(self, connection: sa.Connection, offered: Sequence[Lock]) -> None:
        """Locks with the first of these from now on. Raises ``ConfigError``, and keeps those that
        it has, where they do not open all that the store holds: what was then locked with them
        would be lost with a key that was given by mistake."""
        if not offered:
            return
        names = {lock.name for lock in offered}
        query = sa.select(keys.c.wrapped_by).where(keys.c.kind != "subject").distinct()
        if missing := set(connection.scalars(query)) - names - {""}:
            raise ConfigError(self._not_given(min(missing)))
        self._masters = {lock.name: lock for lock in offered}
        self._master = offered[0]

    def rewrap(self, connection: sa.Connection, offered: Sequence[Lock] = ()) -> int:
        """Locks everything with the newest of the master keys that are ``offered``; how many keys
        that were. Raises ``ConfigError``, and changes nothing, where the one of before is not given
        any more."""
        self._take_over(connection, offered)
        if self._master is None:
            return 0
        old = connection.execute(
            sa.select(keys)
            .where(keys.c.kind != "subject")
            .where(keys.c.wrapped_by != self._master.name)
        ).all()
        for row in old:
            key = self._unwrapped(row)
            sealed = self._master.seal(key, f"key {row.key_id}")
            wipe(key)
            connection.execute(
                sa.update(keys)
                .where(keys.c.key_id == row.key_id)
                .values(wrapped=sealed, wrapped_by=self._master.name)
            )
        return len(old)

    def turn_epoch(self, database: Database) -> str:
        """All of ``turning``; the new epoch's name."""
        for _ in self.turning(database):
            pass
        return self._epoch

    def turning(self, database: Database, offered: Sequence[Lock] | None = None) -> Iterator[None]:
        """Wraps all subjects' keys under a fresh epoch key and destroys the old ones: a key that
        was deleted before can be opened by nobody any more. One transaction a step; may be
        ended at any point, and begun again. ``offered``: the master keys, where they were asked
        for already."""
        offered = self.offered() if offered is None else offered
        with database.writing(GALLERY) as connection:
            self._read_keys(connection)
            try:
                self._take_over(connection, offered)
            except ConfigError as error:
                log.error("the store keeps its master key", problem=str(error))
            begun_at = revision(connection, GALLERY)
            self._new_epoch(connection)
            newest = self._epoch
        while self._move(database, newest, begun_at):
            yield
        database.forget_deleted()

    def _move(self, database: Database, newest: str, begun_at: int) -> bool:
        """Wraps some keys of older epochs under this one; False once there were none, and no key
        of those epochs is left either. Another process that has begun a newer one is let be."""
        with database.writing(GALLERY) as connection:
            older = (keys.c.kind == "subject") & (keys.c.wrapped_by < newest)
            rows = connection.execute(
                sa.select(keys.c.key_id, keys.c.subject, *KEY_COLUMNS).where(older).limit(BATCH)
            ).all()
            if not rows:
                connection.execute(sa.delete(keys).where(IS_EPOCH, keys.c.key_id < newest))
                self._read_keys(connection)
                connection.execute(
                    sa.delete(meta)
                    .where(meta.c.name == ERASURE)
                    .where(sa.cast(meta.c.value, sa.BigInteger) <= begun_at)
                )
                return False
            self._read_keys(connection)
            lock = self._epochs.get(newest)
            if lock is None:  # another process went on to a newer epoch, and has done with this one
                return False
            moved = []
            for row in rows:
                old, where = self._epochs.get(row.wrapped_by), f"key {row.subject}"
                if old is None:
                    raise broken(self._name)
                key = self._opened(old, row.wrapped, where)
                sealed = lock.seal(key, where)
                wipe(key)
                moved.append({"which": row.key_id, "sealed": sealed})
            connection.execute(
                sa.update(keys)
                .where(keys.c.key_id == sa.bindparam("which"))
                .values(wrapped=sa.bindparam("sealed"), wrapped_by=newest),
                moved,
            )
        return True

    def erased(self, connection: sa.Connection) -> None:
        """Deletions of this transaction are waiting for the epoch's turn."""
        connection.execute(sa.delete(meta).where(meta.c.name == ERASURE))
        now = revision(connection, GALLERY)
        connection.execute(sa.insert(meta).values(name=ERASURE, value=str(now)))

    def is_erasure_due(self, connection: sa.Connection) -> bool:
        """Whether keys were deleted that the present epoch key would still open."""
        query = sa.select(meta.c.value).where(meta.c.name == ERASURE)
        return self.encrypts and connection.scalar(query) is not None

    def seal_all(self, connection: sa.Connection) -> int:
        """Seals a gallery that lies open; how many subjects it had."""
        self.begin(connection)
        numbers = connection.scalars(sa.select(subjects.c.id).order_by(subjects.c.id)).all()
        for begin in range(0, len(numbers), BATCH):
            self._seal(connection, numbers[begin : begin + BATCH])
        # Kept for a day, for clients that repeat an enrolment, under digests that can be guessed.
        connection.execute(sa.delete(requests_table))
        return len(numbers)

    def _seal(self, connection: sa.Connection, numbers: Sequence[int]) -> None:
        made = {number: envelope.new_key() for number in numbers}
        connection.execute(
            sa.insert(keys), [self._key_row(number, key) for number, key in made.items()]
        )
        locks = {number: Lock.taking(key, "subject") for number, key in made.items()}
        people = []
        for row in connection.execute(sa.select(subjects).where(subjects.c.id.in_(numbers))).all():
            person = Person(row.subject_id, row.display_name, row.labels)
            columns = self.columns(locks[row.id], row.id, row.gallery_id, person)
            people.append({"which": row.id, **{f"new_{k}": v for k, v in columns.items()}})
        names = ("subject_id", "display_name", "labels", "sealed")
        connection.execute(
            sa.update(subjects)
            .where(subjects.c.id == sa.bindparam("which"))
            .values({name: sa.bindparam(f"new_{name}") for name in names}),
            people,
        )
        found = connection.execute(
            sa.select(templates.c.template_id, templates.c.subject, templates.c.vector).where(
                templates.c.subject.in_(numbers)
            )
        ).all()
        vectors = [
            {
                "which": row.template_id,
                "sealed": self.sealed_vector(locks[row.subject], row.template_id, row.vector),
            }
            for row in found
        ]
        if vectors:
            connection.execute(
                sa.update(templates)
                .where(templates.c.template_id == sa.bindparam("which"))
                .values(vector=sa.bindparam("sealed")),
                vectors,
            )

        pictures = connection.execute(
            sa.select(chips.c.template_id, templates.c.subject, chips.c.chip)
            .join_from(chips, templates, chips.c.template_id == templates.c.template_id)
            .where(templates.c.subject.in_(numbers))
        ).all()
        if pictures:
            connection.execute(
                sa.update(chips)
                .where(chips.c.template_id == sa.bindparam("which"))
                .values(chip=sa.bindparam("sealed")),
                [
                    {
                        "which": row.template_id,
                        "sealed": self.sealed_chip(locks[row.subject], row.template_id, row.chip),
                    }
                    for row in pictures
                ],
            )

    def _key_row(self, number: int, key: bytes) -> dict[str, Any]:
        return {
            "key_id": f"subject-{number}",
            "kind": "subject",
            "subject": number,
            "wrapped": self._epochs[self._epoch].seal(key, f"key {number}"),
            "wrapped_by": self._epoch,
            "created_ns": time.time_ns(),
        }

    def columns(
        self, lock: Lock | None, number: int, gallery_id: str, person: Person
    ) -> dict[str, Any]:
        """A subject's columns in the store."""
        if lock is None:
            return {
                "subject_id": person.subject_id,
                "display_name": person.display_name,
                "labels": dict(person.labels),
            }
        return {
            "subject_id": self.blind("subject", gallery_id, person.subject_id),
            "display_name": "",
            "labels": {},
            "sealed": self.sealed_person(lock, number, person),
        }

    def _new_epoch(self, connection: sa.Connection) -> None:
        # In the order of their making, whatever the clocks of several machines say.
        before = self._newest(connection)
        after = int(before.split("-")[1]) + 1 if before else 0
        # Later than the deletions that it is made for, also where the clock was set back since.
        newest = sa.select(audit.c.time_ns).order_by(audit.c.sequence.desc()).limit(BATCH)
        told_ns = connection.scalar(sa.select(sa.func.max(newest.subquery().c.time_ns))) or 0
        after = max(after, told_ns + 1)
        name = f"epoch-{max(time.time_ns(), after):020d}-{secrets.token_hex(4)}"
        key = envelope.new_key()
        self._keep(connection, name, "epoch", key)
        with self._guard:
            self._epochs[name] = Lock.taking(key, name)
            self._epoch = name

    def _keep(self, connection: sa.Connection, key_id: str, kind: str, key: bytes) -> None:
        assert self._master is not None
        connection.execute(
            sa.insert(keys).values(
                key_id=key_id,
                kind=kind,
                subject=None,
                wrapped=self._master.seal(key, f"key {key_id}"),
                wrapped_by=self._master.name,
                created_ns=time.time_ns(),
            )
        )

    def _newest(self, connection: sa.Connection) -> str:
        # Their names begin with the time.
        query = sa.select(sa.func.max(keys.c.key_id)).where(IS_EPOCH)
        return connection.scalar(query) or ""

    def _read_keys(self, connection: sa.Connection) -> None:
        rows = connection.execute(
            sa.select(keys).where(IS_EPOCH | (keys.c.key_id == "index"))
        ).all()
        epochs = {}
        for row in rows:
            if row.kind == "index":
                self._index = self._index or self._unwrapped(row)
            else:
                epochs[row.key_id] = self._epochs.get(row.key_id) or Lock.taking(
                    self._unwrapped(row), row.key_id
                )
        with self._guard:
            self._epochs = epochs
            self._epoch = max(epochs, default="")

    def _unwrapped(self, row: sa.Row[Any]) -> bytes:
        master = self._masters.get(row.wrapped_by) or self._given_by_now(row.wrapped_by)
        if master is None:
            raise FacelaneError(
                Reason.GALLERY_UNAVAILABLE,
                self._not_given(row.wrapped_by),
                metadata={"cause": NO_MASTER_KEY},
            )
        return self._opened(master, row.wrapped, f"key {row.key_id}")

    def _given_by_now(self, name: str) -> Lock | None:
        """A key that another process locks with since it was rotated, and this one was not told."""
        if time.monotonic() - self._asked_s < _ASK_AGAIN_S:
            return None
        self._asked_s = time.monotonic()
        try:
            offered = self.offered()
        except ConfigError:
            return None
        found = {lock.name: lock for lock in offered}
        if name not in found:
            return None
        self._masters = {**self._masters, **found}
        if offered[0].name == name:
            self._master = offered[0]
        return found[name]

    def _not_given(self, name: str) -> str:
        named = "none" if self._source is None else self._source.name
        return (
            f"{self._name} is locked by the master key {name}, which store.master_key ({named}) "
            "does not give: without that key nothing in it can be read"
        )


_PERSON: Final = msgspec.json.Decoder(tuple[str, str, dict[str, str]])


def locked_by(database: Database) -> set[str]:
    """The names of the master keys that lock a store."""
    with database.reading() as connection:
        query = sa.select(keys.c.wrapped_by).where(keys.c.kind != "subject").distinct()
        return set(connection.scalars(query))


def is_sealed(database: Database) -> bool:
    with database.reading() as connection:
        return bool(_state(connection))


def _state(connection: sa.Connection) -> str:
    """Of the encryption: empty, ``SEALED``, or ``DUE`` while what lay open may be left."""
    return connection.scalar(sa.select(meta.c.value).where(meta.c.name == ENCRYPTION)) or ""


def open_vault(
    database: Database, source: Source | None = None, *, mode: Mode = "off", look: bool = False
) -> Vault:
    """The vault of a store.

    ``mode``, for stores that are not sealed: ``auto`` seals new ones, ``on`` seals old ones too (at
    once: 100,000 templates take half a minute), ``off`` none. A store that is sealed stays
    so. Raises ``ConfigError`` where the master key is not to be had, and GALLERY_UNAVAILABLE.
    """
    if is_sealed(database):
        masters = () if source is None else source.read()
        if not masters:
            raise ConfigError(
                f"{database.name} is encrypted, and its master key is not to be had"
                + ("" if source is None else f" ({source.name})")
                + "; set store.master_key, or put the key's file back"
            )
        vault = Vault(database.name, source, masters)
        with database.reading() as connection:
            vault.take(connection)
            due = _state(connection) == DUE
        if not look and len(masters) > 1:
            with database.writing(GALLERY) as connection:
                vault.rewrap(connection)
        if due and not look:
            _write_anew(database)
        return vault
    with database.reading() as connection:
        is_new = not connection.scalar(sa.select(sa.func.count()).select_from(subjects))
    wanted = mode == "on" or (mode == "auto" and is_new)
    if look or source is None or not wanted:
        if mode == "auto" and not look:
            log.warning(
                "the gallery lies on the disk as it is: store.encryption = 'on' encrypts it",
                store=database.name,
            )
        return Vault(database.name, None, ())
    vault = Vault(database.name, source, source.read() or source.make())
    with database.writing(GALLERY) as connection:
        if _state(connection):  # another process was first
            vault.take(connection)
            return vault
        done = vault.seal_all(connection)
    _write_anew(database)
    if done:
        log.info("the gallery was encrypted", subjects=done)
    return vault


def _write_anew(database: Database) -> None:
    database.rewrite()
    with database.writing(GALLERY) as connection:
        connection.execute(sa.update(meta).where(meta.c.name == ENCRYPTION).values(value=SEALED))
