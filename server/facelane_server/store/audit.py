"""The audit log in the store: who did what, chained and signed (``chain``).

An entry names who acted (a key, never its secret), the method, the gallery, and a code that
stands for the subject: whoever knows an id can find what was done with it, and nobody learns an id
from the log, which outlives subjects. No vector, no picture, no name of anybody who is enrolled.

A change of a gallery and its entry are one transaction: what cannot be written down is not done.
"""

from __future__ import annotations

import enum
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from facelane_server import limits
from facelane_server.store import envelope
from facelane_server.store.chain import START, Head, Link, Receipt, Signer, digest_of
from facelane_server.store.database import Database
from facelane_server.store.schema import (
    AUDIT,
    STORE_ID,
    audit,
    keys,
    meta,
    next_revision,
    pictures,
    subjects,
    templates,
)
from facelane_server.store.vault import IS_EPOCH, Vault
from facelane_server.wiping import wipe

HEAD: Final = "audit_head"
STUB: Final = "audit_stub"
"""In ``meta``: see ``chain``."""
SIGNING: Final = "signing"
"""The key, in ``keys``; locked by the master key where the store is encrypted."""


class Action(enum.StrEnum):
    """What can have happened."""

    STARTED = "STARTED"
    ENROLLED = "ENROLLED"
    SUBJECT_CREATED = "SUBJECT_CREATED"
    SUBJECT_UPDATED = "SUBJECT_UPDATED"
    SUBJECT_DELETED = "SUBJECT_DELETED"
    TEMPLATE_DELETED = "TEMPLATE_DELETED"
    CORRECTED = "CORRECTED"
    """Somebody said of an event's face who it is (``says`` IS), or is not (NOT)."""
    CORRECTION_UNDONE = "CORRECTION_UNDONE"
    LOOKED_UP = "LOOKED_UP"
    """A single picture was compared: with a gallery (``faces``: how many) or with a subject."""
    STREAM_OPENED = "STREAM_OPENED"
    WATCHED = "WATCHED"
    VIEWED = "VIEWED"
    """A stream was looked at (``source``)."""
    PICTURE_SEEN = "PICTURE_SEEN"
    """An event's picture was looked at (``event``: its number)."""
    ADMINISTERED = "ADMINISTERED"
    REFUSED = "REFUSED"
    EXPORTED = "EXPORTED"
    """All that is held of a subject was written out for a request of access."""
    CONFIRMED = "CONFIRMED"
    """A key has confirmed, or denied (``agrees``), that a subject was seen (``event``)."""
    KEYS_CHANGED = "KEYS_CHANGED"
    RELOADED = "RELOADED"
    PRUNED = "PRUNED"
    """Retention has ended older entries."""
    RESUMED = "RESUMED"
    """The log could not be written for a while, and can again."""
    GAP = "GAP"
    """So many entries (``times``) could not be kept while the store was away."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who makes a call. ``by``: the name of the key or certificate, empty = the server itself, or
    whoever may without a key."""

    by: str = ""
    method: str = ""


NOBODY: Final = Actor()
_acting: ContextVar[Actor] = ContextVar("acting", default=NOBODY)


def acting(actor: Actor) -> None:
    """All that this task does from here on is this actor's."""
    _acting.set(actor)


def actor() -> Actor:
    return _acting.get()


@dataclass(frozen=True, slots=True)
class Deed:
    """Something that was done. ``subject``: an id, which stands in the log as a code."""

    action: Action
    actor: Actor = NOBODY
    gallery: str = ""
    subject: str = ""
    told: tuple[tuple[str, str | int], ...] = ()

    def body(self, code: str) -> bytes:
        entry: dict[str, Any] = {
            "action": self.action.value,
            "by": self.actor.by,
            "method": self.actor.method.rpartition("/")[2],
            "gallery": self.gallery,
            "subject": code,
            **dict(self.told),
        }
        return msgspec.json.encode({k: v for k, v in entry.items() if v != ""})


class AuditLog:
    """The log of one store. From any thread."""

    def __init__(
        self, database: Database, vault: Vault, *, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._database = database
        self._vault = vault
        self._clock_ns = clock_ns
        self._codes = b""
        self._signer: Signer | None = None
        self._log_id = ""

    def append(self, connection: sa.Connection, deeds: Sequence[Deed]) -> Head:
        """Adds entries in a transaction under ``AUDIT``; the head that was signed."""
        signer = self._opened(connection)
        before = self._newest_digest(connection)
        rows, number, time_ns = [], 0, self._clock_ns()
        for deed in deeds:
            number = next_revision(connection, AUDIT)
            body = deed.body(self.code(deed.gallery, deed.subject))
            before = digest_of(before, number, time_ns, body)
            rows.append({"sequence": number, "time_ns": time_ns, "body": body, "digest": before})
        connection.execute(sa.insert(audit), rows)
        head = signer.head(self._log_id, number, time_ns, before)
        _put(connection, HEAD, head.text())
        return head

    def write(self, deeds: Sequence[Deed]) -> Head:
        """The same, in a transaction of its own. Raises GALLERY_UNAVAILABLE."""
        with self._database.writing(AUDIT) as connection:
            return self.append(connection, deeds)

    def receipt(
        self, connection: sa.Connection, deed: Deed, head: Head, number: int, templates: int
    ) -> str:
        """For a deletion (``deed``, at the ``head`` that it was written down with)."""
        due = head.time_ns + limits.ERASED_WITHIN_NS if self._vault.encrypts else 0
        receipt = Receipt(
            log=head.log,
            entry=head.number,
            time_ns=head.time_ns,
            gallery=deed.gallery,
            subject=number,
            code=self.code(deed.gallery, deed.subject),
            templates=templates,
            by=deed.actor.by,
            keys_gone_by_ns=due,
            key="",
            signature="",
        )
        return self._opened(connection).receipt(receipt).text()

    def prune(self, *, before_ns: int, most: int) -> int:
        """Ends entries that are older, or too many, and puts a signed stub in their place; how
        many those were."""
        with self._database.writing(AUDIT) as connection:
            newest = connection.scalar(sa.select(sa.func.max(audit.c.sequence))) or 0
            old = (audit.c.time_ns < before_ns) | (audit.c.sequence <= newest - most)
            last = connection.scalar(
                sa.select(sa.func.max(audit.c.sequence)).where(old, audit.c.sequence < newest)
            )
            if last is None:
                return 0
            row = connection.execute(sa.select(audit).where(audit.c.sequence == last)).one()
            signer = self._opened(connection)
            stub = signer.head(self._log_id, last, row.time_ns, row.digest, stub=True)
            gone = connection.execute(sa.delete(audit).where(audit.c.sequence <= last)).rowcount
            _put(connection, STUB, stub.text())
            told = (("times", gone), ("up_to", last))
            self.append(connection, [Deed(Action.PRUNED, told=told)])
            return int(gone)

    def code(self, gallery_id: str, subject_id: str) -> str:
        """What stands for a subject in the log; empty for none. Once something was written."""
        if not subject_id:
            return ""
        return envelope.blinded(self._codes, gallery_id, subject_id)[:32]

    def public(self, connection: sa.Connection) -> str:
        """The key that the log is to be signed by, as this store's own keys have it."""
        return self._opened(connection).public

    def _opened(self, connection: sa.Connection) -> Signer:
        if self._signer is not None:
            return self._signer
        if self._vault.encrypts:
            key = self._vault.secret(connection, SIGNING)
        else:
            query = sa.select(keys.c.wrapped).where(keys.c.key_id == SIGNING)
            key = connection.scalar(query) or b""
            if not key:
                key = envelope.new_key()
                connection.execute(
                    sa.insert(keys).values(
                        key_id=SIGNING,
                        kind=SIGNING,
                        subject=None,
                        wrapped=key,
                        wrapped_by="",
                        created_ns=self._clock_ns(),
                    )
                )
        self._log_id = _get(connection, STORE_ID)
        # The key may be one that this very transaction makes; were it undone, the next one
        # would sign with another.
        signer = Signer(key)
        self._codes = hashlib.sha256(b"facelane audit codes\0" + key).digest()
        if self._vault.encrypts:
            wipe(key)
        if _get(connection, HEAD):
            self._signer = signer
        return signer

    def _newest_digest(self, connection: sa.Connection) -> bytes:
        newest = connection.scalar(
            sa.select(audit.c.digest).order_by(audit.c.sequence.desc()).limit(1)
        )
        return START if newest is None else bytes(newest)


def links(connection: sa.Connection, after: int = 0) -> Iterator[Link]:
    """The entries behind a number, oldest first."""
    query = sa.select(audit).where(audit.c.sequence > after).order_by(audit.c.sequence)
    with connection.execution_options(yield_per=4096).execute(query) as rows:
        for row in rows:
            yield Link(row.sequence, row.time_ns, bytes(row.body), bytes(row.digest))


def heads(connection: sa.Connection) -> tuple[Head | None, Head | None]:
    """The head and the stub. Raises ``ValueError`` for what is none."""
    head, stub = _get(connection, HEAD), _get(connection, STUB)
    return (Head.parse(head) if head else None), (Head.parse(stub) if stub else None)


def has_rows(connection: sa.Connection, number: int) -> bool:
    """Whether anything of a subject is left: itself, templates, a key, events."""
    return any(
        connection.scalar(sa.select(sa.func.count()).where(column == number))
        for column in (
            subjects.c.id,
            templates.c.subject,
            keys.c.subject,
            pictures.c.subject,
        )
    )


def oldest_epoch_ns(connection: sa.Connection) -> int:
    """When the oldest key was made that opens subjects' keys."""
    query = sa.select(sa.func.min(keys.c.key_id)).where(IS_EPOCH)
    name = connection.scalar(query) or ""
    return int(name.split("-")[1]) if name else 0


def shown(link: Link) -> dict[str, Any]:
    """An entry for people and exports; one that cannot be read says so."""
    entry: dict[str, Any] = {"number": link.number, "time_ns": link.time_ns}
    try:
        body = msgspec.json.decode(link.body, type=dict[str, Any])
    except msgspec.DecodeError:
        body = {"action": "UNREADABLE"}
    return {**entry, **body, "digest": link.digest.hex()}


def _get(connection: sa.Connection, name: str) -> str:
    return connection.scalar(sa.select(meta.c.value).where(meta.c.name == name)) or ""


def _put(connection: sa.Connection, name: str, value: str) -> None:
    changed = connection.execute(sa.update(meta).where(meta.c.name == name).values(value=value))
    if not changed.rowcount:
        connection.execute(sa.insert(meta).values(name=name, value=value))


class Pending:
    """Entries that wait to be written together: look-ups, refusals, what is too frequent for a
    transaction of its own. Bounded: what finds no room is counted, and told as a GAP. The
    same refusal again and again is one entry with ``times``."""

    def __init__(self) -> None:
        self._deeds: list[Deed] = []
        self._repeated: dict[Deed, int] = {}
        self._lost = 0

    def __len__(self) -> int:
        return len(self._deeds) + len(self._repeated) + bool(self._lost)

    def add(self, deed: Deed) -> None:
        if len(self) >= limits.MAX_AUDIT_PENDING:
            self._lost += 1
        else:
            self._deeds.append(deed)

    def repeat(self, deed: Deed) -> None:
        """Of a kind that strangers can make as many of as they like."""
        if deed in self._repeated:
            self._repeated[deed] += 1
        elif len(self) >= limits.MAX_AUDIT_PENDING:
            self._lost += 1
        else:
            self._repeated[deed] = 1

    def take(self) -> list[Deed]:
        """All of them; nothing is left."""
        deeds = [
            *self._deeds,
            *(
                Deed(d.action, d.actor, d.gallery, d.subject, (*d.told, ("times", times)))
                for d, times in self._repeated.items()
            ),
        ]
        if self._lost:
            deeds.append(Deed(Action.GAP, told=(("times", self._lost),)))
        self._deeds, self._repeated, self._lost = [], {}, 0
        return deeds

    def put_back(self, deeds: Sequence[Deed]) -> None:
        """They could not be written."""
        room = max(0, limits.MAX_AUDIT_PENDING - len(self))
        self._deeds = [*deeds[:room], *self._deeds]
        # Of those that were lost before, the entry says how many.
        self._lost += sum(
            int(dict(deed.told)["times"]) if deed.action is Action.GAP else 1
            for deed in deeds[room:]
        )
