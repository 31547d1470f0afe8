"""The tables, one set for every engine, and how a store of an earlier version becomes this one::

    schema_version  version
    meta            name, value: what the store is called by (``STORE_ID``)
    counters        name, value: the newest revision of ``GALLERY``, ``EVENTS``, ``AUDIT``
    galleries       gallery_id, settings, created
    subjects        id, gallery_id, subject_id, display_name, labels, etag, created, updated, sealed
    templates       id, template_id, subject (-> subjects.id, cascade), model_id, dim,
                    vector (float16, unit norm), ood_score, created, quality, correction
    chips           template_id (-> templates.template_id, cascade), encoding, chip
    requests        gallery_id, request_id, fingerprint, template_id, answer, created
    changes         revision, kind, subject, template_id: of ``GALLERY``, what readers follow
    events          sequence (revision of ``EVENTS``), kind, time, source, stream, gallery, body
                    (which names subjects by their numbers)
    audit           sequence (revision of ``AUDIT``), time, body, digest: append-only
    keys            key_id, kind, subject, wrapped, wrapped_by, created
    last_seen       subject (-> subjects.id, cascade), seen: to the hour, where retention asks
    confirmations   sequence (-> events.sequence, cascade), by, agrees, time: of candidates
    pictures        picture_id, subject (-> subjects.id, cascade), owner (of the key), time, sealed
    shards          shard_id, host, process, revision, lease: who reads, and how far it has come

Times are nanoseconds since the epoch. ``requests`` remembers enrolments for a day, so that
a client may repeat one safely; it is bounded by ``limits.MAX_REQUEST_IDS``.

A revision is taken in the transaction that it counts (``next_revision``), whose lock on the
counter is held until the commit: revisions become visible in their order, without a gap. A
subject's number is a revision too, so that none is ever used again.

To add a table: define it here, append a step to ``MIGRATIONS`` that makes it (``_make``, which
leaves alone what is there: a fresh store has been given all tables by the first step), and list it
in ``COPIED`` when ``store copy`` is to move it. To add a column: ``_add_column`` in a step. Then
``python -m tests.unit.stores.make`` writes the files that later versions are tested to take over.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, Final

import sqlalchemy as sa

from facelane_server import limits

GALLERY: Final = "gallery"
AUDIT: Final = "audit"
EVENTS: Final = "events"
COUNTERS: Final = (GALLERY, AUDIT, EVENTS)
"""In the order in which a transaction that needs several takes them."""
STORE_ID: Final = "store_id"
"""16 hexadecimal digits: another store, another history."""

metadata = sa.MetaData()

Number: Final = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
"""A revision, or what is numbered by one."""


def _name(length: int) -> sa.types.TypeEngine[str]:
    """In the order of its characters' codes on every engine, whatever the database's language."""
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


schema_version = sa.Table("schema_version", metadata, sa.Column("version", sa.Integer))

meta = sa.Table(
    "meta",
    metadata,
    sa.Column("name", _name(64), primary_key=True),
    sa.Column("value", sa.String(1024), nullable=False),
)

counters = sa.Table(
    "counters",
    metadata,
    sa.Column("name", _name(64), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

galleries = sa.Table(
    "galleries",
    metadata,
    sa.Column("gallery_id", _name(limits.MAX_ID_CHARS), primary_key=True),
    sa.Column("settings", sa.JSON, nullable=False),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
)

subjects = sa.Table(
    "subjects",
    metadata,
    sa.Column("id", Number, primary_key=True, autoincrement=False),
    sa.Column("gallery_id", _name(limits.MAX_ID_CHARS), nullable=False),
    sa.Column("subject_id", _name(limits.MAX_ID_CHARS), nullable=False),
    sa.Column("display_name", sa.String(limits.MAX_DISPLAY_NAME_BYTES), nullable=False),
    sa.Column("labels", sa.JSON, nullable=False),
    sa.Column("etag", sa.String(32), nullable=False),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
    sa.Column("updated_ns", sa.BigInteger, nullable=False),
    # Where the store is encrypted (``vault``): id, name and labels. ``subject_id`` is blinded then,
    # ``display_name`` and ``labels`` are empty, and a template's ``vector`` is sealed.
    sa.Column("sealed", sa.LargeBinary, nullable=True),
    sa.UniqueConstraint("gallery_id", "subject_id"),
)

templates = sa.Table(
    "templates",
    metadata,
    sa.Column("id", Number, primary_key=True),
    sa.Column("template_id", _name(32), nullable=False, unique=True),
    sa.Column(
        "subject",
        Number,
        sa.ForeignKey("subjects.id", ondelete="CASCADE"),
        nullable=False,
        index=True,
    ),
    sa.Column("model_id", _name(256), nullable=False, index=True),
    sa.Column("dim", sa.Integer, nullable=False),
    sa.Column("vector", sa.LargeBinary, nullable=False),
    sa.Column("ood_score", sa.Float, nullable=False),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
    sa.Column("quality", sa.Float, nullable=False, server_default="0"),
    # See ``records.Correction``.
    sa.Column("correction", sa.Integer, nullable=False, server_default="0"),
)

chips = sa.Table(
    "chips",
    metadata,
    sa.Column(
        "template_id",
        _name(32),
        sa.ForeignKey("templates.template_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("encoding", sa.String(16), nullable=False),
    sa.Column("chip", sa.LargeBinary, nullable=False),
)

requests = sa.Table(
    "requests",
    metadata,
    sa.Column("gallery_id", _name(limits.MAX_ID_CHARS), primary_key=True),
    sa.Column("request_id", _name(limits.MAX_ID_CHARS), primary_key=True),
    sa.Column("fingerprint", sa.LargeBinary, nullable=False),
    sa.Column("template_id", _name(32), nullable=False, index=True),
    sa.Column("answer", sa.JSON, nullable=True),
    sa.Column("created_ns", sa.BigInteger, nullable=False, index=True),
)

changes = sa.Table(
    "changes",
    metadata,
    sa.Column("revision", Number, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(24), nullable=False),
    # Numbers alone: what is said of somebody who was deleted since names nobody.
    sa.Column("subject", Number, nullable=False),
    sa.Column("template_id", _name(32), nullable=False),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("sequence", Number, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("time_ns", sa.BigInteger, nullable=False, index=True),
    sa.Column("source_id", sa.String(256), nullable=False),
    sa.Column("stream_id", sa.String(256), nullable=False),
    sa.Column("gallery_id", sa.String(limits.MAX_ID_CHARS), nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("sequence", Number, primary_key=True, autoincrement=False),
    sa.Column("time_ns", sa.BigInteger, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("key_id", _name(64), primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("subject", Number, nullable=True, index=True),
    sa.Column("wrapped", sa.LargeBinary, nullable=False),
    sa.Column("wrapped_by", _name(64), nullable=False, index=True),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
)

last_seen = sa.Table(
    "last_seen",
    metadata,
    sa.Column(
        "subject", Number, sa.ForeignKey("subjects.id", ondelete="CASCADE"), primary_key=True
    ),
    sa.Column("seen_ns", sa.BigInteger, nullable=False),
)

confirmations = sa.Table(
    "confirmations",
    metadata,
    sa.Column(
        "sequence", Number, sa.ForeignKey("events.sequence", ondelete="CASCADE"), primary_key=True
    ),
    sa.Column("by", _name(128), primary_key=True),
    sa.Column("agrees", sa.Boolean, nullable=False),
    sa.Column("time_ns", sa.BigInteger, nullable=False),
)

pictures = sa.Table(
    "pictures",
    metadata,
    sa.Column("picture_id", _name(32), primary_key=True),
    sa.Column(
        "subject",
        Number,
        sa.ForeignKey("subjects.id", ondelete="CASCADE"),
        nullable=True,
        index=True,
    ),
    # By whose key it is sealed: the subject's number, or one below zero, which is this picture's.
    sa.Column("owner", sa.BigInteger, nullable=False),
    sa.Column("time_ns", sa.BigInteger, nullable=False, index=True),
    sa.Column("sealed", sa.LargeBinary, nullable=False),
)

shards = sa.Table(
    "shards",
    metadata,
    sa.Column("shard_id", _name(64), primary_key=True),
    sa.Column("host", sa.String(128), nullable=False),
    sa.Column("process", sa.String(64), nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("lease_until_ns", sa.BigInteger, nullable=False),
)

COPIED: Final = (
    meta, counters, galleries, subjects, templates, chips, requests, changes, events,
    audit, keys, last_seen, confirmations, pictures,
)  # fmt: skip
"""What ``store copy`` moves, owners before what they own. ``shards`` belongs to those who run."""


def next_revision(connection: sa.Connection, counter: str) -> int:
    """The next number of a counter, whose lock the transaction holds from here to its end."""
    taken = connection.execute(
        sa.update(counters)
        .where(counters.c.name == counter)
        .values(value=counters.c.value + 1)
        .returning(counters.c.value)
    )
    return int(taken.scalar_one())


def revision(connection: sa.Connection, counter: str) -> int:
    """The newest number that this transaction sees."""
    found = connection.scalar(sa.select(counters.c.value).where(counters.c.name == counter))
    return int(found or 0)


def _make(connection: sa.Connection, *tables: sa.Table) -> None:
    metadata.create_all(connection, tables=list(tables), checkfirst=True)


def _add_column(connection: sa.Connection, table: str, column: str, kind: str) -> None:
    """``kind``: the column's type and constraints, with a default where it is NOT NULL."""
    present = {found["name"] for found in sa.inspect(connection).get_columns(table)}
    if column not in present:
        connection.execute(sa.text(f"ALTER TABLE {table} ADD COLUMN {column} {kind}"))


def _version_1(connection: sa.Connection) -> None:
    metadata.create_all(connection)


def _version_2(connection: sa.Connection) -> None:
    _add_column(connection, "templates", "quality", "FLOAT NOT NULL DEFAULT 0")


def _version_3(connection: sa.Connection) -> None:
    """Revisions, so that several processes follow one store; events; room for keys and audit."""
    _make(
        connection, meta, counters, galleries, chips, changes, events, audit, keys,
        shards,
    )  # fmt: skip
    # What was numbered by SQLite keeps its number; later ones are above.
    used = connection.scalar(sa.select(sa.func.max(subjects.c.id))) or 0
    rows: list[dict[str, Any]] = [{"name": name, "value": 0} for name in COUNTERS]
    rows[0]["value"] = used
    connection.execute(sa.insert(counters), rows)
    connection.execute(sa.insert(meta).values(name=STORE_ID, value=secrets.token_hex(8)))
    oldest = sa.func.min(subjects.c.created_ns)
    for gallery_id, created_ns in connection.execute(
        sa.select(subjects.c.gallery_id, oldest).group_by(subjects.c.gallery_id)
    ).all():
        connection.execute(
            sa.insert(galleries).values(gallery_id=gallery_id, settings={}, created_ns=created_ns)
        )


def _version_4(connection: sa.Connection) -> None:
    """Room for what is sealed of a subject."""
    binary = "BYTEA" if connection.dialect.name == "postgresql" else "BLOB"
    _add_column(connection, "subjects", "sealed", binary)


def _version_5(connection: sa.Connection) -> None:
    """Room for retention, and for those who confirm who was seen."""
    _make(connection, last_seen, confirmations)


def _version_6(connection: sa.Connection) -> None:
    """Room for pictures of events, and for what people said of them."""
    _make(connection, pictures)
    _add_column(connection, "templates", "correction", "INTEGER NOT NULL DEFAULT 0")


MIGRATIONS: tuple[Callable[[sa.Connection], None], ...] = (
    _version_1,
    _version_2,
    _version_3,
    _version_4,
    _version_5,
    _version_6,
)
"""The n-th entry brings a store from version n to n + 1; entries are only appended. Later
ones spell out their statements: the tables above show the newest version alone."""
