"""A store in PostgreSQL 15 or newer, for servers on several machines (extra ``postgres``).

Connections are made when they are needed and made anew when the server has been away, so a restart
or a failover costs the transactions that were under way and no more. Nothing waits for ever: not
connecting, not a statement, not a lock, not a network that is cut.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, ClassVar, Final

import sqlalchemy as sa
from sqlalchemy import exc

from facelane_server.domain import FacelaneError, Reason
from facelane_server.store import schema
from facelane_server.store.database import Database, Kind, opening, unavailable

MIN_VERSION: Final = 15
CONNECT_TIMEOUT_S: Final = 3
STATEMENT_TIMEOUT_MS: Final = 8_000
LOCK_TIMEOUT_MS: Final = 5_000
POOL_SIZE: Final = 4
POOL_TIMEOUT_S: Final = 5.0
_SCHEMA_LOCK: Final = 0x66616365_6C616E65
"""``facelane``: of all transactions that change the schema."""

_CHANNEL: Final = "facelane"
_RETRY_S: Final = 0.5

# A peer that went away without a word is noticed after about so long.
_NETWORK: Final = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 8_000,
}


def connection_url(url: str) -> sa.URL:
    """The URL for SQLAlchemy. Raises GALLERY_UNAVAILABLE for what is none."""
    try:
        made = sa.make_url(url)
    except exc.ArgumentError:
        raise unavailable(
            "store.url cannot be read; write postgresql://user@host:5432/database"
        ) from None
    return made.set(drivername="postgresql+psycopg")


class PostgresDatabase(Database):
    """One database. ``url``: ``postgresql://user:password@host:port/database``; what it leaves out
    comes from libpq's environment, ``~/.pgpass`` and service file."""

    kind: ClassVar[Kind] = "postgresql"

    def __init__(self, url: str, *, look: bool = False) -> None:
        made = connection_url(url)
        self.url = made
        self.name = made.set(drivername="postgresql").render_as_string(hide_password=True)
        self._look = look
        self._lock = threading.Lock()
        self._trouble = ""
        self._closed = threading.Event()
        self._listening: Any = None
        """The driver's own connection, which hears of commits."""
        self._held: sa.Connection | None = None
        try:
            import psycopg as _  # noqa: F401  # the extra, before anything is begun
        except ImportError:
            raise unavailable(
                "store.url names PostgreSQL, and its driver is not installed: pip install "
                "'facelane[postgres]'"
            ) from None
        options = (
            f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c lock_timeout={LOCK_TIMEOUT_MS} "
            f"-c idle_in_transaction_session_timeout={4 * STATEMENT_TIMEOUT_MS}"
        )
        query = dict(made.query)
        given = query.pop("options", "")
        merged = {
            "application_name": "facelane-server",
            **_NETWORK,
            "options": " ".join(
                (*((given,) if isinstance(given, str) else given), options)
            ).strip(),
        }
        # What the URL says itself comes before ours.
        arguments: dict[str, Any] = {k: v for k, v in merged.items() if k not in query}
        self.engine = sa.create_engine(
            made.set(query=query),
            connect_args=arguments,
            hide_parameters=True,
            pool_size=POOL_SIZE,
            max_overflow=POOL_SIZE,
            pool_timeout=POOL_TIMEOUT_S,
            pool_pre_ping=True,
            pool_recycle=1800,
        )
        sa.event.listen(self.engine, "checkin", self._given_back)
        # One state throughout for readers, and the newest for writers, who hold their counters.
        self._readers = self.engine.execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )
        self._writers = self.engine.execution_options(isolation_level="READ COMMITTED")
        with opening(self):
            self._require_version()
            self.migrate(look=look)

    @property
    def _otherwise(self) -> str:
        return "store.url"

    def _require_version(self) -> None:
        with self.reading() as connection:
            found = (
                int(connection.exec_driver_sql("SHOW server_version_num").scalar_one()) // 10_000
            )
            if found < MIN_VERSION:
                raise unavailable(
                    f"{self.name} is PostgreSQL {found}; facelane needs {MIN_VERSION} or newer"
                )

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        with self._transaction(self._readers) as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self, *counters: str) -> Iterator[sa.Connection]:
        if self._look:
            raise unavailable(f"{self.name} was opened to be looked at")
        with self._transaction(self._writers) as connection:
            for name in sorted(counters, key=schema.COUNTERS.index):
                connection.execute(
                    sa.select(schema.counters.c.value)
                    .where(schema.counters.c.name == name)
                    .with_for_update()
                )
            yield connection
            if counters:
                # Told when it is committed, and not otherwise.
                connection.execute(sa.select(sa.func.pg_notify(_CHANNEL, "")))

    @contextlib.contextmanager
    def _transaction(self, engine: sa.Engine) -> Iterator[sa.Connection]:
        try:
            with engine.begin() as connection:
                yield connection
        except (exc.DBAPIError, exc.TimeoutError) as error:
            told = self._told(error)
            self._trouble = told.metadata.get("trouble", "")
            raise told from error
        self._trouble = ""

    def _told(self, error: exc.DBAPIError | exc.TimeoutError) -> FacelaneError:
        if isinstance(error, exc.TimeoutError):
            return unavailable(
                "too many wait for the store; try again", cause="POOL", retryable=True
            )
        if isinstance(error, exc.DataError):
            # What was asked for, and not the store: a text with a character of code 0, for one.
            return FacelaneError(
                Reason.ARGUMENT_INVALID,
                "the store takes no such value; send text without control characters",
            )
        original = error.orig
        state: str = getattr(original, "sqlstate", None) or ""
        cause = state or type(original).__name__
        if state.startswith("53") or state == "58030":
            return unavailable(
                f"{self.name}: the store has no room (disk, memory or connections); free some and "
                "try again",
                cause=cause,
                trouble="DISK_FULL",
                retryable=True,
            )
        if state == "25006":
            return unavailable(
                f"{self.name} takes no changes now (a standby, or made read-only); name the "
                "primary in store.url, or wait for the failover to end",
                cause=cause,
                trouble="READ_ONLY",
                retryable=True,
            )
        if state.startswith(("40", "55")) or state == "57014":
            return unavailable("the store is busy; try again", cause=cause, retryable=True)
        if state.startswith(("28", "3D", "42501")):
            return unavailable(
                f"{self.name}: the store lets this server not in ({cause}); check user, password, "
                "database and rights",
                cause=cause,
                trouble="REFUSED",
            )
        lost = not state or state.startswith(("08", "57P")) or error.connection_invalidated
        if lost:
            return unavailable(
                f"{self.name}: the store cannot be reached; a change may have been made: read "
                "again, or repeat an enrolment with the same request_id",
                cause=cause,
                trouble="UNREACHABLE",
                retryable=True,
            )
        return unavailable(
            f"{self.name}: the store cannot be used ({cause}); see PostgreSQL's log", cause=cause
        )

    def check(self) -> str:
        """PostgreSQL looks after its own pages; here, that rows belong to somebody."""
        with self.reading() as connection:
            lone = connection.scalar(
                sa.select(sa.func.count())
                .select_from(schema.templates)
                .where(schema.templates.c.subject.not_in(sa.select(schema.subjects.c.id)))
            )
        return f"{lone} rows of templates belong to none of subjects" if lone else ""

    def trouble(self) -> str:
        return self._trouble

    def forget_deleted(self) -> None:
        """Nothing there: dead rows are PostgreSQL's to overwrite, and stand in its log until then.
        What was deleted is unreadable because its key is. Here, what compiled statements keep."""
        self.engine.clear_compiled_cache()

    def rewrite(self) -> None:
        engine = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql("SET statement_timeout = 0")
            for table in ("subjects", "templates", "requests", "keys"):
                connection.exec_driver_sql(f"VACUUM FULL {table}")

    def wait_for_change(self, timeout_s: float) -> bool:
        try:
            heard = self._listening
            if heard is None:
                heard = self._listening = self._listen()
                return True  # whatever happened before
            if any(True for _ in heard.notifies(timeout=timeout_s, stop_after=1)):
                return True
            heard.execute("SELECT 1")  # whether anybody is there
            if self._trouble == "UNREACHABLE":
                self._trouble = ""
        except Exception as error:
            # Whatever it is, it is the connection's: the next call begins with another.
            told = self._told(error) if isinstance(error, exc.DBAPIError) else None
            self._trouble = "UNREACHABLE" if told is None else told.metadata.get("trouble", "")
            self._hang_up()
            self._closed.wait(min(timeout_s, _RETRY_S))
        return False

    def _listen(self) -> Any:
        connection = self.engine.connect()
        try:
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            raw = connection.connection.driver_connection
            assert raw is not None
            connection.detach()  # from the pool: it is ours until it is closed
            raw.execute(f"LISTEN {_CHANNEL}")
        except BaseException:
            connection.close()
            raise
        self._held = connection
        return raw

    def _hang_up(self) -> None:
        held, raw = self._held, self._listening
        self._held = self._listening = None
        # The driver's own too: one whose server is gone is not closed with what holds it.
        for one in (held, raw):
            if one is not None:
                with contextlib.suppress(Exception):
                    one.close()

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            self.engine.dispose()

    def _given_back(self, connection: Any, _record: object) -> None:
        """Into a pool that is gone, by a call that was under way when the store was closed."""
        if self._closed.is_set() and connection is not None:
            connection.close()

    def end_waiting(self) -> None:
        self._hang_up()

    def _hold_schema(self, connection: sa.Connection) -> None:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
