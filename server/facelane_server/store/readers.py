"""Who follows a gallery, and how far each has come: so that a deletion can wait for all of them.

Every server process (a shard) that names people has a row. A change that takes somebody away is
confirmed when each row has reached its revision. A process that has died holds nobody up: on its
own machine its row is removed by whoever finds that it is gone; one on another machine counts until
its lease, which it renews, is over, and by its own clock it names nobody from a little before then.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from facelane_server.domain import FacelaneError
from facelane_server.store.database import Database
from facelane_server.store.schema import shards

_CLOCKS_APART: Final = 0.9
"""Of its lease, a reader trusts so much itself: clocks do not run alike."""


class Reader:
    """This process among those who follow a store. Calls may block, and raise GALLERY_UNAVAILABLE;
    ``is_fenced`` does neither."""

    def __init__(self, database: Database, *, lease_s: float) -> None:
        self.shard_id = secrets.token_hex(8)
        self._database = database
        self._lease_s = lease_s
        self._trusted_until = float("inf")
        self._renewed = 0.0
        self._host, self._process = _host(), _process(os.getpid())

    @property
    def is_fenced(self) -> bool:
        """Whether others may count this process as gone: what it knows may have been deleted.
        Never on SQLite, whose readers are of one machine and see each other's end."""
        return _now_s() > self._trusted_until

    @property
    def is_due(self) -> bool:
        """Whether ``renew`` is to be called, four times in a lease."""
        return self.needs_renewal and _now_s() - self._renewed >= self._lease_s / 4

    @property
    def needs_renewal(self) -> bool:
        return self._database.kind != "sqlite"

    def join(self, revision: int) -> None:
        """Before the gallery is read for the first time: with the revision 0."""
        begun = _now_s()
        self._come(revision)
        self._trust(begun)

    def _come(self, revision: int) -> None:
        with self._database.writing() as connection:
            connection.execute(
                sa.insert(shards).values(
                    shard_id=self.shard_id,
                    host=self._host,
                    process=self._process,
                    revision=revision,
                    lease_until_ns=self._lease(connection),
                )
            )

    def renew(self, revision: int) -> bool:
        """Has come so far, and is alive. False: others took it for gone, and have told that a
        deletion is confirmed which this process may not have read. It is there again, and is to
        follow the store and call this once more; until then nothing is trusted anew."""
        with self._database.writing() as connection:
            begun = _now_s()
            renewed = connection.execute(
                sa.update(shards)
                .where(shards.c.shard_id == self.shard_id)
                .values(revision=revision, lease_until_ns=self._lease(connection))
            )
        if not renewed.rowcount:
            self._come(revision)
            return False
        self._trust(begun)
        return True

    def lacking(self, revision: int) -> int:
        """How many other readers have not come so far; rows of those who are gone are removed."""
        with self._database.reading() as connection:
            now = self._now_ns(connection)
            behind = connection.execute(
                sa.select(shards).where(
                    shards.c.revision < revision, shards.c.shard_id != self.shard_id
                )
            ).all()
        gone = [row for row in behind if self._is_gone(row.host, row.process, row, now)]
        removed = 0
        if gone:
            with self._database.writing() as connection:
                for row in gone:
                    # Unless it has said in between that it is alive.
                    as_seen = shards.c.lease_until_ns == row.lease_until_ns
                    mine = sa.delete(shards).where(shards.c.shard_id == row.shard_id, as_seen)
                    removed += connection.execute(mine).rowcount
        return len(behind) - removed

    def leave(self) -> None:
        """Names nobody from here on. Never raises."""
        with contextlib.suppress(FacelaneError), self._database.writing() as connection:
            connection.execute(sa.delete(shards).where(shards.c.shard_id == self.shard_id))

    def _is_gone(self, host: str, process: str, row: sa.Row[tuple[object, ...]], now: int) -> bool:
        if host == self._host:
            return _process(int(process.partition(":")[0])) != process
        return int(row.lease_until_ns) < now

    def _trust(self, begun: float) -> None:
        self._renewed = begun
        if self.needs_renewal:
            self._trusted_until = begun + _CLOCKS_APART * self._lease_s

    def _lease(self, connection: sa.Connection) -> int:
        return self._now_ns(connection) + int(self._lease_s * 1e9)

    def _now_ns(self, connection: sa.Connection) -> int:
        """By one clock for all: the store's."""
        if self._database.kind == "sqlite":
            return time.time_ns()
        epoch = sa.func.extract("epoch", sa.func.clock_timestamp())
        return int(float(connection.scalar(sa.select(epoch)) or 0.0) * 1e9)


def _now_s() -> float:
    """Goes on while the machine sleeps, as others' clocks do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _host() -> str:
    """Where processes see each other: a boot of a machine, and its namespace of processes."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return secrets.token_hex(16)


def _process(pid: int) -> str:
    """Its number and when it began; another one with the same number began later. Empty = gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else f"{pid}:{fields[19]}"
