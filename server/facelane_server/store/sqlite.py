"""A store in one SQLite file: taken, opened, brought up to date, and given back.

It holds biometric data. So the file is readable by its owner alone, deleted rows are
overwritten (``secure_delete``) and leave the write-ahead log at once, and errors never
hold a parameter of a statement.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final

import sqlalchemy as sa
import structlog
from sqlalchemy import exc

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.store.database import Database, Kind, unavailable

BUSY_TIMEOUT_MS: Final = 2_000
WRITER_TIMEOUT_MS: Final = 5_000
"""How long a change waits for those of other threads and processes."""
POOL_SIZE: Final = 4
POLL_S: Final = 0.05
"""Between two looks whether another process has committed: it wakes a thread, which an edge box
that has nothing to do pays for. Commits of our own are looked for at once."""
GATHER_S: Final = 0.005
"""Commits of our own that come together are told of together."""
_OF: Final = "facelane-forgotten"
_WRITERS: Final = 1 << 40
"""A byte of the file, far behind SQLite's own locks, that is whose who writes, or overwrites the
log. SQLite's own waiting lets some of eight writers starve: its pauses grow."""
_MARK: Final = b"a gallery lies beside this file\n"
"""In the lock's file, once there is one: an empty gallery file is then a damaged one."""

log = structlog.get_logger(__name__)


class SqliteFile(Database):
    """One open file. GALLERY_UNAVAILABLE is retryable when the file is busy or the disk is full,
    final when it is damaged, another program's, or not ours to write."""

    kind: ClassVar[Kind] = "sqlite"

    def __init__(self, path: Path, *, look: bool = False) -> None:
        """Opens or creates the file, takes it for this process, brings its schema up to date.

        ``look``: only reads what is there, also beside a server that has taken the file.
        """
        self._path = path
        self.name = str(path)
        self._look = look
        self._writing = threading.Lock()
        """SQLite has one writer at a time; threads queue here, processes at the file."""
        self._log_is_full = True
        """It may hold what was deleted and could not be emptied; a killed server left it so."""
        self._forgotten = 0
        """How often something was deleted for good: connections of before hold some of it."""
        self._closed = threading.Event()
        self._stirred = threading.Event()
        """Set after a commit of our own, and at the end."""
        self._watching: sqlite3.Connection | None = None
        self._data_version = 0
        self._closing = contextlib.ExitStack()
        self._is_open = False
        try:
            if look:
                self._hold_file()
            else:
                self._take_file()
            self._engine = self._connect()
            self._closing.callback(self._engine.dispose)
            self.migrate(look=look)
            wrong = self.check()
            if wrong:
                raise self._damaged(wrong)
            if not look:
                with contextlib.suppress(OSError):  # no room: the next start tries again
                    os.pwrite(self._lock, _MARK, 0)
            self._is_open = True
        except BaseException:
            self._closing.close()
            raise

    def close(self) -> None:
        self._closed.set()
        self._stirred.set()
        self._closing.close()

    def wait_for_change(self, timeout_s: float) -> bool:
        """By ``data_version``, which a commit of any other connection changes."""
        deadline = time.monotonic() + timeout_s
        while not self._closed.is_set():
            try:
                if self._watching is None:
                    uri = f"{self._path.absolute().as_uri()}?mode=ro"
                    self._watching = sqlite3.connect(uri, uri=True, isolation_level=None)
                cursor = self._watching.execute("PRAGMA data_version")
                version = int(cursor.fetchone()[0])
                cursor.close()
            except sqlite3.Error:
                self.end_waiting()
                version = self._data_version
            if version != self._data_version:
                self._data_version = version
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                break
            if self._stirred.wait(min(POLL_S, left)):
                self._stirred.clear()
                self._closed.wait(GATHER_S)
        return False

    def end_waiting(self) -> None:
        if self._watching is not None:
            with contextlib.suppress(sqlite3.Error):
                self._watching.close()
            self._watching = None

    def check(self) -> str:
        """Empty when the file is sound, else what is wrong; reads all of it."""
        with self.reading() as connection:
            found = str(connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar_one())
            if found != "ok":
                return found
            # Rows whose owner is gone would be missing from every join, without a word.
            lone = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        return "" if lone is None else f"rows of {lone[0]} belong to none of {lone[2]}"

    def is_gone(self) -> bool:
        """Whether the path leads to this file no more: removed, replaced, emptied, or its folder
        is away. What is written now would be lost."""
        try:
            there = os.stat(self._path)
            mine = os.fstat(self._held)
        except OSError:
            return True
        # A new file is empty until the first transaction has written to it.
        emptied = self._is_open and not there.st_size
        return emptied or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino)

    def has_room(self) -> bool:
        """Whether the disk has room for changes. Below that nothing is written: SQLite maps one
        of its files into memory, which a full disk ends with SIGBUS."""
        try:
            found = os.statvfs(self._path.parent)
        except OSError:
            return True  # whatever it is, it is not for want of room
        return found.f_bavail * found.f_frsize >= limits.MIN_DISK_BYTES

    # opening

    def _take_file(self) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._closing.callback(os.close, lock)
            self._lock = lock
            self._lock_or_refuse(lock)
            if os.fstat(lock).st_size:
                if not self._path.exists():
                    log.warning("the gallery's file is gone; a new one is begun")
                elif not self._path.stat().st_size:
                    raise self._damaged("the file is empty")
            # SQLite gives its -wal and -shm files the mode of the main file. Kept open until
            # SQLite has closed it: closing it sooner would take SQLite's own locks along.
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._closing.callback(os.close, file)
            self._file = file
            self._hold_file()
            if os.fstat(file).st_mode & 0o077:
                os.fchmod(file, 0o600)
                log.warning("gallery file was readable by others; its mode is 0600 now")
            # The file itself too: whoever removes the lock's file must not let a second server in.
            self._lock_or_refuse(file)
            if not self.has_room():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise FacelaneError(
                Reason.GALLERY_UNAVAILABLE,
                f"{self._path}: the gallery cannot be opened: {error.strerror}; check the folder's "
                "owner and mode, or set gallery.path",
                # Space and descriptors come back by themselves, permissions do not.
                retryable=error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE),
            ) from None

    def _lock_or_refuse(self, descriptor: int) -> None:
        """With the servers of this machine; those of before version 3 wanted it alone."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            raise FacelaneError(
                Reason.GALLERY_UNAVAILABLE,
                f"{self._path}: another server, of an earlier version, uses this gallery; stop it, "
                "or give this one another file in gallery.path",
                retryable=True,
            ) from None

    def _hold_file(self) -> None:
        """Not opened, so that closing it takes no lock of SQLite's along; held, so that no other
        file gets its number."""
        try:
            self._held = os.open(self._path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            raise FacelaneError(
                Reason.GALLERY_UNAVAILABLE, f"{self._path}: there is no gallery yet"
            ) from None
        self._closing.callback(os.close, self._held)

    def _connect(self) -> sa.Engine:
        # hide_parameters: an SQL error must not print a vector or a name.
        url = sa.URL.create("sqlite", database=str(self._path))
        if self._look:
            query = {"mode": "ro", "uri": "true"}
            url = sa.URL.create("sqlite", database=self._path.absolute().as_uri(), query=query)
        engine = sa.create_engine(
            url,
            hide_parameters=True,
            pool_size=POOL_SIZE,
            max_overflow=POOL_SIZE,
            pool_timeout=BUSY_TIMEOUT_MS / 1000,
        )

        @sa.event.listens_for(engine, "connect")
        def prepare(connection: sqlite3.Connection, record: sa.pool.ConnectionPoolEntry) -> None:
            record.info[_OF] = self._forgotten
            # BEGIN is ours (below): the driver's own would start read transactions late.
            connection.isolation_level = None
            for pragma in (
                f"busy_timeout = {BUSY_TIMEOUT_MS}",
                *(() if self._look else ("journal_mode = WAL", "secure_delete = ON")),
                "synchronous = FULL",
                "foreign_keys = ON",
                "trusted_schema = OFF",
                # What is sorted goes into no temporary file.
                "temp_store = MEMORY",
            ):
                connection.execute(f"PRAGMA {pragma}").close()

        @sa.event.listens_for(engine, "checkin")
        def outdated(_connection: object, record: sa.pool.ConnectionPoolEntry) -> None:
            if record.info.get(_OF) != self._forgotten:
                record.invalidate()

        @sa.event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            writes = connection.get_execution_options().get("facelane_writes")
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

        return engine

    @property
    def _otherwise(self) -> str:
        return "gallery.path"

    def _hold_schema(self, connection: sa.Connection) -> None:
        """A transaction that writes has the whole file."""

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        with self._transaction(writes=False) as connection:
            yield connection
        if self._log_is_full and not self._look and self._writing.acquire(blocking=False):
            try:
                self._forget_deleted()
            finally:
                self._writing.release()

    @contextlib.contextmanager
    def writing(self, *counters: str) -> Iterator[sa.Connection]:
        """The whole file is one writer's, so the counters are too."""
        del counters
        if self._look:
            raise unavailable(f"{self._path} was opened to be looked at")
        if not self._writing.acquire(timeout=WRITER_TIMEOUT_MS / 1000):
            raise unavailable("the gallery's file is busy; try again", cause="BUSY", retryable=True)
        try:
            if not self._lock_writers(fcntl.F_WRLCK, WRITER_TIMEOUT_MS):
                raise unavailable(
                    "the gallery's file is busy; try again", cause="BUSY", retryable=True
                )
            try:
                with self._transaction(writes=True) as connection:
                    yield connection
            finally:
                self._lock_writers(fcntl.F_UNLCK, 0)
            self._stirred.set()
            if self._log_is_full:
                self._forget_deleted()
        finally:
            self._writing.release()

    def _lock_writers(self, kind: int, wait_ms: int) -> bool:
        """Of this process, which has one writer. A lock of the open file: no other descriptor's
        end gives it back."""
        wanted = struct.pack("hhqqi4x", kind, os.SEEK_SET, _WRITERS, 1, 0)
        deadline = time.monotonic() + wait_ms / 1000
        while True:
            try:
                fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, wanted)
            except BlockingIOError:
                pause = random.uniform(0.0005, 0.004)
                if self._closed.wait(pause) or time.monotonic() >= deadline:
                    return False
            else:
                return True

    @contextlib.contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[sa.Connection]:
        if self.is_gone():
            raise unavailable(
                f"{self._path}: the gallery's file was removed or replaced while the server ran, "
                "so nothing can be changed; put it back, or restore a backup and restart the "
                "server",
                cause="FILE_GONE",
            )
        engine = self._engine.execution_options(facelane_writes=writes)
        try:
            with engine.begin() as connection:
                yield connection
        except exc.DBAPIError as error:
            raise self._unavailable(error) from error
        except exc.TimeoutError:
            raise unavailable(
                "too many wait for the gallery; try again", cause="POOL", retryable=True
            ) from None

    def _unavailable(self, error: exc.DBAPIError) -> FacelaneError:
        name: str = getattr(error.orig, "sqlite_errorname", "") or type(error.orig).__name__
        told = {"cause": name}
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            message = "another process holds the gallery's file; try again"
            return FacelaneError(Reason.GALLERY_UNAVAILABLE, message, metadata=told, retryable=True)
        # On a full disk SQLite may fail to read, open or grow one of its files just as well.
        if name.startswith("SQLITE_FULL") or (
            name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN")) and not self.has_room()
        ):
            message = f"{self._path}: the disk is full; free some space and try again"
            return FacelaneError(Reason.GALLERY_UNAVAILABLE, message, metadata=told, retryable=True)
        if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
            return self._damaged(name)
        message = f"{self._path}: the gallery cannot be used ({name}); see the server's log"
        return FacelaneError(Reason.GALLERY_UNAVAILABLE, message, metadata=told)

    def _damaged(self, cause: str) -> FacelaneError:
        return FacelaneError(
            Reason.GALLERY_UNAVAILABLE,
            f"{self._path}: the gallery's file is damaged; stop the server, then restore a "
            "backup or move the file away to start an empty gallery",
            metadata={"cause": cause[:200]},
        )

    def trouble(self) -> str:
        """FILE_GONE, DISK_FULL."""
        if self.is_gone():
            return "FILE_GONE"
        return "" if self.has_room() else "DISK_FULL"

    def forget_deleted(self) -> None:
        with self._writing:
            self._forget_deleted()

    def rewrite(self) -> None:
        with self._writing:
            with contextlib.closing(self._engine.raw_connection()) as connection:
                connection.cursor().execute("VACUUM").close()
            self._forget_deleted()

    def _forget_deleted(self) -> None:
        """Empties the write-ahead log, which still holds what was just deleted.

        Never raises: the deletion stands. While another process reads the file (a backup), the
        log cannot be emptied; then the next transaction tries again.
        """
        # Nobody writes meanwhile, in no process: what is overwritten is not read any more.
        wait_ms = 0 if self._log_is_full else BUSY_TIMEOUT_MS
        if self._look or not self._lock_writers(fcntl.F_WRLCK, wait_ms):
            self._log_is_full = True
            return
        try:
            self._empty_log(wait_ms)
        finally:
            self._lock_writers(fcntl.F_UNLCK, 0)
            self._close_outdated()

    def _close_outdated(self) -> None:
        """Connections keep pages of the file, and what their statements were given last. Those that
        are in use end when they are given back. A fresh one is opened before: with the last one
        SQLite would take the log away. Statements that are kept compiled keep the values that
        they were first made with, too."""
        self._forgotten += 1
        self._engine.clear_compiled_cache()
        with contextlib.ExitStack() as idle, contextlib.suppress(exc.SQLAlchemyError):
            count = self._idle()
            for _ in range(count + 1 if count else 0):
                idle.enter_context(contextlib.closing(self._engine.raw_connection()))

    def _idle(self) -> int:
        pool = self._engine.pool
        return pool.checkedin() if isinstance(pool, sa.QueuePool) else 0

    def _empty_log(self, wait_ms: int) -> None:
        # Not through a transaction: a checkpoint inside of one is refused.
        try:
            with contextlib.closing(self._engine.raw_connection()) as connection:
                connection.cursor().execute(f"PRAGMA busy_timeout = {wait_ms}").close()
                try:
                    self._wipe_log(connection)
                    checkpoint = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
                    [(busy, *_)] = checkpoint.fetchall()
                finally:
                    connection.cursor().execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}").close()
            cause = "in use by another process" if busy else ""
        except (sqlite3.Error, exc.SQLAlchemyError) as error:
            cause = type(error).__name__
        if cause and not self._log_is_full:
            log.warning("write-ahead log not emptied; trying again", cause=cause)
        self._log_is_full = bool(cause)

    def _wipe_log(self, connection: sa.PoolProxiedConnection) -> None:
        """Overwrites the log before it is cut off: its blocks are given back as they are."""
        checkpoint = connection.cursor().execute("PRAGMA wal_checkpoint(RESTART)")
        [(busy, *_)] = checkpoint.fetchall()
        if busy:
            return
        with contextlib.suppress(OSError):
            descriptor = os.open(f"{self._path}-wal", os.O_WRONLY | os.O_CLOEXEC)
            try:
                left, at = os.fstat(descriptor).st_size, 0
                while left > 0:
                    written = os.pwrite(descriptor, bytes(min(left, limits.MIB)), at)
                    left, at = left - written, at + written
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
