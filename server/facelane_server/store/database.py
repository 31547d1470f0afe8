"""What every engine of the store does: transactions, with errors that say what to do next.

One ``Database`` is one store that was opened. It is used from any thread, and by as many processes
as its engine takes: one machine's for SQLite (``sqlite``), any for PostgreSQL (``postgres``).
Neither errors nor logs ever hold a parameter of a statement.
"""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import ClassVar, Final, Literal, TypeVar

import sqlalchemy as sa

from facelane_server.domain import FacelaneError, Reason
from facelane_server.store import schema

Kind = Literal["sqlite", "postgresql"]
T = TypeVar("T")

BUSY_S: Final = 60.0
"""A process that begins waits so long for others that begin."""
_BUSY: Final = ("BUSY", "POOL", "SQLITE_BUSY", "SQLITE_LOCKED", "40", "55", "57014")
"""How causes begin that are others' at work."""


def perhaps_done() -> FacelaneError:
    """GALLERY_UNAVAILABLE for a change of which nobody knows whether it was made."""
    return unavailable(
        "the gallery's store did not answer; a change may have been made: read again, or repeat "
        "an enrolment with the same request_id",
        retryable=True,
    )


def unavailable(
    message: str, *, cause: str = "", retryable: bool = False, **told: str
) -> FacelaneError:
    metadata = {**told, **({"cause": cause} if cause else {})}
    return FacelaneError(
        Reason.GALLERY_UNAVAILABLE, message, metadata=metadata, retryable=retryable
    )


class Database(abc.ABC):
    """A store that was opened and brought up to date; ``close`` ends it.

    Every method but ``trouble`` and ``close`` raises GALLERY_UNAVAILABLE: retryable where the store
    may come back by itself, final where somebody has to mend it.
    """

    kind: ClassVar[Kind]
    name: str
    """As it is called in messages: a path, or an address without its password."""

    @abc.abstractmethod
    def reading(self) -> contextlib.AbstractContextManager[sa.Connection]:
        """A transaction that sees one state of the store throughout, and changes nothing."""

    @abc.abstractmethod
    def writing(self, *counters: str) -> contextlib.AbstractContextManager[sa.Connection]:
        """A transaction that may change. Whoever writes under a counter (``schema.COUNTERS``)
        excludes all others who do, in every process, from here to the commit; several are taken
        in the order of ``schema.COUNTERS``."""

    @abc.abstractmethod
    def check(self) -> str:
        """Empty when the store is sound, else what is wrong; reads all of it."""

    @abc.abstractmethod
    def trouble(self) -> str:
        """Why no change can be kept now, in capitals; empty = it can. Never waits."""

    @abc.abstractmethod
    def forget_deleted(self) -> None:
        """Overwrites what was just deleted, as far as the engine can. Never raises."""

    @abc.abstractmethod
    def wait_for_change(self, timeout_s: float) -> bool:
        """Whether something may have been committed, by whomever, since the last call; waits for it
        at most so long. One thread calls it. Never raises: a store that is away has not changed,
        and has when it is back."""

    @abc.abstractmethod
    def rewrite(self) -> None:
        """Writes the store anew, so that nothing is left of what it held before."""

    @abc.abstractmethod
    def close(self) -> None:
        """Idempotent; ends a wait within its timeout."""

    @abc.abstractmethod
    def end_waiting(self) -> None:
        """Frees what ``wait_for_change`` holds, in its thread."""

    @abc.abstractmethod
    def _hold_schema(self, connection: sa.Connection) -> None:
        """Until the transaction ends, nobody else changes the schema."""

    @property
    @abc.abstractmethod
    def _otherwise(self) -> str:
        """What to set for another store to be used."""

    # -- the schema --------------------------------------------------------------------------

    def migrate(self, *, look: bool = False) -> None:
        """Brings the schema up to date; with ``look``, only sees to it that it is."""
        newest = len(schema.MIGRATIONS)
        begin = self.reading() if look else self.writing()
        with begin as connection:
            if not look:
                self._hold_schema(connection)
            version = self._version(connection)
            if look and version != newest:
                raise unavailable(
                    f"{self.name} was not made by this version of facelane: start the server once"
                )
            if version > newest:
                raise unavailable(
                    f"{self.name} was made by a newer facelane (schema {version}; this one knows "
                    f"up to {newest}): install that one, or set {self._otherwise}"
                )
            for step in schema.MIGRATIONS[version:]:
                step(connection)
            if version != newest:
                connection.execute(sa.delete(schema.schema_version))
                connection.execute(sa.insert(schema.schema_version).values(version=newest))

    def _version(self, connection: sa.Connection) -> int:
        present = set(sa.inspect(connection).get_table_names())
        if schema.schema_version.name in present:
            return int(connection.scalar(sa.select(schema.schema_version.c.version)) or 0)
        # A file is one program's; a database may be shared, as long as no name is taken twice.
        foreign = present if self.kind == "sqlite" else present & set(schema.metadata.tables)
        if foreign:
            raise unavailable(
                f"{self.name} is a database of another program; set {self._otherwise} to another"
            )
        return 0


def patiently(begin: Callable[[], T], patience_s: float = BUSY_S) -> T:
    """What a process does when it begins, again while the store is busy: with others that begin
    beside it, each of which looks after tables and keys. Raises what it raises in the end, and at
    once whatever else."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return begin()
        except FacelaneError as error:
            if (
                not error.metadata.get("cause", "").startswith(_BUSY)
                or time.monotonic() >= deadline
            ):
                raise
        time.sleep(0.05)


@contextlib.contextmanager
def opening(database: Database) -> Iterator[None]:
    """Closes a database whose opening does not succeed."""
    try:
        yield
    except BaseException:
        database.close()
        raise
