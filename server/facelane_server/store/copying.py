"""All of one store into another, of whichever engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import sqlalchemy as sa

from facelane_server.store.database import Database, unavailable
from facelane_server.store.schema import (
    COPIED,
    COUNTERS,
    audit,
    events,
    galleries,
    keys,
    meta,
    requests,
    subjects,
    templates,
)
from facelane_server.store.schema import counters as counters_table

_ROWS: Final = 500
"""Rows that are in memory at a time."""
_FILLED_BY_USE: Final = (galleries, subjects, templates, requests, events, audit, keys)
_NUMBERED_BY_ENGINE: Final = (templates,)


def copy(source: Database, target: Database, told: Callable[[str, int], None]) -> None:
    """Everything as of one moment, numbers and the store's identity included, so that resume tokens
    and readers go on with the copy. ``told``: each table's name and rows.

    Raises GALLERY_UNAVAILABLE: ``target`` is not empty (then it stays as it is), or what both do.
    """
    with source.reading() as old, target.writing(*COUNTERS) as new:
        for table in _FILLED_BY_USE:
            if new.scalar(sa.select(sa.literal(1)).select_from(table).limit(1)):
                raise unavailable(
                    f"{target.name} is not empty ({table.name}); copy into a fresh store"
                )
        for table in (meta, counters_table):  # as a fresh store has them
            new.execute(sa.delete(table))
        for table in COPIED:
            count = 0
            for rows in _batches(old, table):
                new.execute(sa.insert(table), rows)
                count += len(rows)
            if new.scalar(sa.select(sa.func.count()).select_from(table)) != count:
                raise unavailable(f"{target.name}: not all rows of {table.name} have arrived")
            told(table.name, count)
        if target.kind == "postgresql":
            for table in _NUMBERED_BY_ENGINE:
                top = sa.select(sa.func.max(table.c.id)).scalar_subquery()
                sequence = sa.func.pg_get_serial_sequence(table.name, "id")
                new.execute(sa.select(sa.func.setval(sequence, sa.func.coalesce(top, 1))))


def _batches(connection: sa.Connection, table: sa.Table) -> Iterator[list[dict[str, Any]]]:
    columns = sa.inspect(connection).get_columns(table.name)
    known = [table.c[column["name"]] for column in columns if column["name"] in table.c]
    query = sa.select(*known).order_by(*table.primary_key.columns)
    with connection.execution_options(yield_per=_ROWS).execute(query) as rows:
        for part in rows.mappings().partitions():
            yield [dict(row) for row in part]
