"""The tables, in portable types so that another database can follow::

    schema_version  version
    subjects        id, gallery_id, subject_id, display_name, labels, etag, created, updated
    templates       id, template_id, subject (-> subjects.id, cascade), model_id, dim,
                    vector (float16, unit norm), ood_score, created, quality
    requests        gallery_id, request_id, fingerprint, template_id, answer, created

Times are nanoseconds since the epoch. ``requests`` remembers enrolments for a day, so that
a client may repeat one safely; it is bounded by ``limits.MAX_REQUEST_IDS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import sqlalchemy as sa

from facelane_server import limits

metadata = sa.MetaData()

schema_version = sa.Table("schema_version", metadata, sa.Column("version", sa.Integer))

subjects = sa.Table(
    "subjects",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("gallery_id", sa.String(limits.MAX_ID_CHARS), nullable=False),
    sa.Column("subject_id", sa.String(limits.MAX_ID_CHARS), nullable=False),
    sa.Column("display_name", sa.String(limits.MAX_DISPLAY_NAME_BYTES), nullable=False),
    sa.Column("labels", sa.JSON, nullable=False),
    sa.Column("etag", sa.String(32), nullable=False),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
    sa.Column("updated_ns", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("gallery_id", "subject_id"),
)

templates = sa.Table(
    "templates",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("template_id", sa.String(32), nullable=False, unique=True),
    sa.Column(
        "subject",
        sa.Integer,
        sa.ForeignKey("subjects.id", ondelete="CASCADE"),
        nullable=False,
        index=True,
    ),
    sa.Column("model_id", sa.String(256), nullable=False, index=True),
    sa.Column("dim", sa.Integer, nullable=False),
    sa.Column("vector", sa.LargeBinary, nullable=False),
    sa.Column("ood_score", sa.Float, nullable=False),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
    sa.Column("quality", sa.Float, nullable=False, server_default="0"),
)

requests = sa.Table(
    "requests",
    metadata,
    sa.Column("gallery_id", sa.String(limits.MAX_ID_CHARS), primary_key=True),
    sa.Column("request_id", sa.String(limits.MAX_ID_CHARS), primary_key=True),
    sa.Column("fingerprint", sa.LargeBinary, nullable=False),
    sa.Column("template_id", sa.String(32), nullable=False, index=True),
    sa.Column("answer", sa.JSON, nullable=True),
    sa.Column("created_ns", sa.BigInteger, nullable=False, index=True),
)


def _version_1(connection: sa.Connection) -> None:
    metadata.create_all(connection)


def _version_2(connection: sa.Connection) -> None:
    if "quality" not in {
        column["name"] for column in sa.inspect(connection).get_columns("templates")
    }:
        connection.execute(
            sa.text("ALTER TABLE templates ADD COLUMN quality FLOAT NOT NULL DEFAULT 0")
        )


MIGRATIONS: Final[tuple[Callable[[sa.Connection], None], ...]] = (_version_1, _version_2)
"""The n-th entry brings a store from version n to n + 1; entries are only appended. Later
ones spell out their statements: the tables above show the newest version alone."""
