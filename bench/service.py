"""A real server in a process of its own, from its own command line, for one measurement."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

import facelane
import facelane.aio

START_S = 180.0
STOP_S = 40.0


class ServiceError(Exception):
    """The server did not do what the benchmark needs; its last words are in the message."""


class Service:
    """``facelane-server run`` on a Unix socket in a private folder; an async context manager.

    Leaving it stops the server with SIGTERM and kills what does not end in time.
    """

    def __init__(
        self,
        pools_toml: str,
        *,
        tables: str = "",
        start_s: float = START_S,
        environ: Mapping[str, str] | None = None,
        token: str | None = None,
        shards: int = 1,
    ) -> None:
        """``token``: a key's secret, where ``tables`` ask for keys. With several ``shards`` the
        server listens on a port of this machine instead."""
        self.shards = shards
        self._token = token
        self._pools = pools_toml
        self._tables = tables
        self._start_s = start_s
        self._environ = dict(environ or {})
        self._folder = tempfile.TemporaryDirectory(prefix="facelane-bench-")
        self.folder = Path(self._folder.name)
        self.target = f"unix:{self.folder}/grpc.sock"
        self.log = self.folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        config = self.folder / "server.toml"
        server = f'listen = "{self.target}"\n'
        if self.shards > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.target = f"127.0.0.1:{probe.getsockname()[1]}"
            server = f'listen = "{self.target}"\nshards = {self.shards}\n'
            if "[auth]" not in self._tables:
                server += '[auth]\nmode = "none"\n'
        config.write_text(
            f'state_dir = "{self.folder}/state"\nruntime_dir = "{self.folder}/run"\n'
            f'[server]\n{server}[metrics]\nlisten = ""\n'
            f'[log]\nformat = "json"\nlevel = "warning"\n{self._tables}\n{self._pools}\n'
        )
        for name in ("state", "run"):
            (self.folder / name).mkdir(mode=0o700)
        try:
            self._process = self._start(config)
            await self._until_serving()
        except BaseException:
            self._kill()
            raise
        return self

    def _start(self, config: Path) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "facelane_server", "run", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environ},
            )

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            self._kill()
            return
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(process.wait, STOP_S)
        except subprocess.TimeoutExpired:
            if error is None:
                raise ServiceError(f"the server did not stop:\n{self.last_words()}") from None
        finally:
            self._kill()

    def _kill(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()
            process.wait(10)
        self._folder.cleanup()

    async def _until_serving(self) -> None:
        deadline = time.monotonic() + self._start_s
        async with facelane.aio.Client(self.target, timeout=2.0, token=self._token) as client:
            while True:
                if self.process.poll() is not None:
                    raise ServiceError(
                        f"the server ended with {self.process.returncode}:\n{self.last_words()}"
                    )
                try:
                    if await client.health() == "SERVING":
                        return
                except facelane.FacelaneError:
                    pass
                if time.monotonic() > deadline:
                    raise ServiceError(
                        f"not serving after {self._start_s:g} s:\n{self.last_words()}"
                    )
                await asyncio.sleep(0.05)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not started"
        return self._process

    def last_words(self) -> str:
        """The end of the server's log."""
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""

    def front(self) -> psutil.Process:
        """The server's own process; of several shards their keeper."""
        return psutil.Process(self.process.pid)

    def fronts(self) -> list[psutil.Process]:
        """Those that serve: one, or the shards."""
        if self.shards == 1:
            return [self.front()]
        return [p for p in self.front().children() if "shard" in p.cmdline()]

    def workers(self) -> list[psutil.Process]:
        """Worker processes."""
        fronts = self.fronts()
        return [w for front in fronts for w in front.children(recursive=True)]

    def rss_mib(self) -> float:
        """Resident memory of the server and its workers; shared pages count in each."""
        everything = {self.front(), *self.fronts(), *self.workers()}
        total: int = sum(p.memory_info().rss for p in everything)
        return total / 2**20
