"""A real server in a process of its own, for end-to-end and fault tests."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

import facelane
from tests.forked import Fork, begin
from tests.waiting import until

NULL_POOLS = """
[pools.detector]
model = "null-detector"
[pools.recognizer]
model = "null-recognizer"
[pools.liveness]
model = "null-liveness"
"""
THREAD_POOLS = NULL_POOLS.replace('"\n', '"\nisolation = "thread"\n')
"""The same in one process besides the server's: where a test is not about processes, fewer are
enough, and cost a third less to start."""


def toml(folder: Path, pools: str = NULL_POOLS, extra: str = "", listen: str = "") -> str:
    """A config that keeps everything inside of ``folder``."""
    return f"""
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
{extra if not extra.lstrip().startswith("[") else ""}
[server]
listen = "{listen or f"unix:{folder}/grpc.sock"}"
[metrics]
listen = ""
{extra if extra.lstrip().startswith("[") else ""}
{pools}
"""


_ports = itertools.count(os.getpid() * 37)


def free_port() -> int:
    """A port of this machine for a server that must be told one. It lies below those that the
    kernel gives to whoever asks for any, so nobody gets it by chance before the server does."""
    while True:
        port = 20_000 + next(_ports) % 12_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class RunningServer:
    """``facelane-server run`` on a config. Owns the process; ``stop`` ends it."""

    def __init__(
        self,
        folder: Path,
        config: str,
        *,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        forked: bool = True,
    ) -> None:
        """``prefix``: a command that becomes the server, in a network of its own for instance.
        ``forked``: from a process that has imported it, which costs a third (``tests.forked``);
        not where how it begins is what is tested."""
        self.folder = folder
        self.config = folder / "server.toml"
        self.config.write_text(config)
        self.log = folder / "server.log"
        for name in ("state", "run"):
            (folder / name).mkdir(exist_ok=True, mode=0o700)
        self._log_file = self.log.open("ab")
        arguments = ["run", "--config", str(self.config)]
        self.process: Fork | subprocess.Popen[bytes]
        environment = {**os.environ, **(env or {})}
        if forked and not prefix:
            self.process = begin(arguments, self._log_file, environment)
        else:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "facelane_server", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=self._log_file,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    @property
    def target(self) -> str:
        return f"unix:{self.folder}/grpc.sock"

    def client(self, **options: object) -> facelane.Client:
        return facelane.Client(self.target, **{"timeout": 100.0} | options)  # type: ignore[arg-type]

    def wait_serving(self, timeout: float = 100.0, service: str = "") -> None:
        """Until health answers SERVING."""

        def serving() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.text()[-4000:]}"
            with self.client(timeout=2.0) as client:
                try:
                    return client.health(service) == "SERVING"
                except facelane.FacelaneError:
                    return False

        try:
            until(serving, timeout, f"{service or 'server'} SERVING")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()[-4000:]}") from None

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def lines(self) -> list[dict[str, Any]]:
        """The log's lines that are whole: it may be writing one."""
        whole, _, _ = self.text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM, and the exit code; kills what does not end in time."""
        if self.process.poll() is None:
            children = self.children()
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(30)
                self._log_file.close()
                raise AssertionError(f"did not stop:\n{self.text()[-4000:]}") from None
            gone, alive = psutil.wait_procs(children, timeout=5)
            del gone
            assert not alive, f"workers outlived the server: {alive}"
        self._log_file.close()
        return self.process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()
