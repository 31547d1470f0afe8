"""A real PostgreSQL server for tests, from Debian's package: begun once a session, in a folder of
its own, on a Unix socket of its own; each test has a database of its own in it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import sqlalchemy as sa

from tests.waiting import until

WITHOUT = "no PostgreSQL here: apt-get install postgresql (Debian), and pip install psycopg"


def programs() -> Path | None:
    """The folder of PostgreSQL's own programs, newest version; None without one."""
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "postgres").exists():
            return folder
    found = shutil.which("postgres")
    return None if found is None else Path(found).parent


def present() -> bool:
    with contextlib.suppress(ImportError):
        import psycopg as _  # noqa: F401

        return programs() is not None
    return False


class Postgres:
    """One server. ``kill`` and ``start`` are an operator's accident; ``url`` a database in it.
    ``address``: of this machine, where it listens beside its socket."""

    def __init__(self, folder: Path, address: str = "") -> None:
        found = programs()
        assert found is not None
        self._programs = found
        self._folder = folder
        self._as: tuple[str, ...] = ()
        if os.geteuid() == 0:
            # It refuses to run as root. By a program: with ``user`` Python forks in full, and a
            # child of a process whose threads are in gRPC may not live to become another program.
            owner = pwd.getpwnam("postgres")
            os.chown(folder, owner.pw_uid, owner.pw_gid)
            self._as = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")
        self._databases = 0
        self.address = address
        self.port = 5432
        self._process: subprocess.Popen[bytes] | None = None
        self._run("initdb", "-D", str(folder / "data"), "-U", "facelane", "-A", "trust", "-N")
        if address:
            with (folder / "data" / "pg_hba.conf").open("a") as rules:
                rules.write("host all facelane samenet trust\n")

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [*self._as, str(self._programs / program), *arguments],
            check=True,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            timeout=60,
        )

    def start(self) -> None:
        settings = {
            "listen_addresses": self.address,
            "port": str(self.port),
            "unix_socket_directories": str(self._folder),
            # The machine is not switched off in tests.
            "fsync": "off",
            "full_page_writes": "off",
            "max_connections": "200",
            # On a small disk too.
            "min_wal_size": "32MB",
            "max_wal_size": "64MB",
        }
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *self._as,
                    str(self._programs / "postgres"), "-D", str(self._folder / "data"),
                    *(f"-c{name}={value}" for name, value in settings.items()),
                ],
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )  # fmt: skip
        until(self._answers, what="PostgreSQL")

    def _answers(self) -> bool:
        assert self._process is not None
        ended = self._process.poll()
        assert ended is None, (
            f"it ended with {ended}:\n{(self._folder / 'log').read_text()[-1900:]}"
        )
        engine = sa.create_engine(self._address("postgres"), poolclass=sa.NullPool)
        with contextlib.suppress(sa.exc.OperationalError), engine.connect() as connection:
            return bool(connection.scalar(sa.text("SELECT true")))
        return False

    @property
    def runs(self) -> bool:
        """Whether it has not ended by itself."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """kill -9: the postmaster and every backend."""
        if self._process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                postmaster = psutil.Process(self._process.pid)
                # Or it begins another backend, whose memory is in the way of the next start.
                postmaster.suspend()
                until(lambda: postmaster.status() == psutil.STATUS_STOPPED, what="it stands still")
                everyone = [*postmaster.children(), postmaster]
                for one in everyone:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
                psutil.wait_procs(everyone[:-1], timeout=30)
            self._process.wait(30)
            self._process = None

    def stop(self) -> None:
        """As a restart does: sessions are ended, what was committed is kept."""
        self._end(signal.SIGINT)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(30)
            self._process = None

    def _address(self, database: str) -> sa.URL:
        return sa.URL.create(
            "postgresql+psycopg",
            username="facelane",
            database=database,
            query={"host": str(self._folder)},
        )

    def url(self) -> str:
        """Of a fresh database, by ``address`` where there is one."""
        self._databases += 1
        name = f"facelane_{self._databases}"
        engine = sa.create_engine(
            self._address("postgres"), poolclass=sa.NullPool, isolation_level="AUTOCOMMIT"
        )
        with engine.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name} STRATEGY file_copy"))
        address = self._address(name).set(drivername="postgresql")
        if self.address:
            address = address.set(host=self.address, port=self.port, query={})
        return address.render_as_string(hide_password=False)


@contextlib.contextmanager
def running(address: str = "", folder: Path | None = None) -> Iterator[Postgres]:
    """``folder``: an empty one that any user may enter, on a disk of its own for instance."""
    # Not in pytest's folder, which is its user's alone.
    folder = folder or Path(tempfile.mkdtemp(prefix="facelane-postgres-"))
    try:
        folder.chmod(0o755)
        server = Postgres(folder, address)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
