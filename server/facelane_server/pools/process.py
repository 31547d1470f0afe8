"""One child process that hosts workers: spawned, watched, its stderr read, reaped.

Processes are started by the thread of the event loop, and only there: a worker asks the
kernel to be killed when the *thread* that started it ends. A pidfd tells of their end
at once; nothing polls. What they write to stderr becomes log lines, bounded in length
and in number.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import structlog

from facelane_server import config, limits
from facelane_server.allocator import as_others
from facelane_server.ipc.channel import socket_pair

log = structlog.get_logger(__name__)

_READ_BYTES: Final = 64 * 1024
TERM_S: Final = 2.0
"""From SIGTERM, or the like, to what is harder."""


def is_halted(pid: int) -> bool:
    """False too for a process that is gone, or of which nothing can be known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat[stat.rfind(b")") + 2 :].startswith(b"T")


async def within(future: asyncio.Future[int | None], seconds: float) -> bool:
    done, _ = await asyncio.wait([future], timeout=seconds)
    return bool(done)


_NO_MPS: Final = {"CUDA_MPS_PIPE_DIRECTORY": "/nonexistent"}
"""Without it a worker would silently join whatever MPS daemon runs on the machine, and with
it share the fate of its clients; pools with ``isolation = "mps"`` name their daemon."""


@dataclass(frozen=True)
class Confined:
    """What a worker's process may do (see ``worker.sandbox``). ``read``: folders with models;
    ``write``: of fault tests. ``cards``: it may compute on a CUDA device. ``mps``: it talks to
    an MPS daemon, as the user that it is. ``tried``: a file in which workers that differ in no more
    than models remember what CUDA starts in; None = each tries that out."""

    sandbox: config.Sandbox = "auto"
    read: tuple[Path, ...] = ()
    write: tuple[Path, ...] = ()
    cards: bool = False
    mps: Path | None = None
    tried: int | None = None

    def with_folder(self, folder: Path | None) -> Confined:
        return self if folder is None else replace(self, read=(*self.read, folder))

    def with_member(self, other: Confined) -> Confined:
        """Of a process that serves both."""
        modes = {self.sandbox, other.sandbox}
        strictest = next(mode for mode in _MODES if mode in modes)
        read, write = (*self.read, *other.read), (*self.write, *other.write)
        cards = self.cards or other.cards
        tried = other.tried if self.tried is None else self.tried
        return replace(self, sandbox=strictest, read=read, write=write, cards=cards, tried=tried)

    def arguments(self) -> list[str]:
        found = [f"--sandbox={self.sandbox}", "--read="]
        found += [f"--read={path.resolve()}" for path in self.read]
        found += [f"--write={path.resolve()}" for path in self.write]
        found += ["--cards"] if self.cards else []
        found += [] if self.tried is None else [f"--tried={self.tried}"]
        return found if self.mps is None else [*found, f"--mps={self.mps}"]


BY_DEFAULT: Final = Confined()
_MODES: Final[tuple[config.Sandbox, ...]] = ("required", "auto", "off")


class Process:
    """One child process: spawned, watched by pidfd, its stderr read, reaped."""

    def __init__(
        self,
        name: str,
        channels: int,
        threads: int,
        environment: Mapping[str, str],
        nice: int = 0,
        confined: Confined = BY_DEFAULT,
    ) -> None:
        """Raises OSError when it cannot be started."""
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int | None] = self._loop.create_future()
        pairs = [socket_pair() for _ in range(channels)]
        theirs = [worker.fileno() for _, worker in pairs]
        command = [sys.executable, "-P", "-m", "facelane_server.worker"]
        command += [f"--threads={threads}", f"--nice={nice}"]
        command += [f"--channel={fd}" for fd in theirs]
        command += confined.arguments()
        try:
            self._child = subprocess.Popen(
                command,
                pass_fds=theirs if confined.tried is None else [*theirs, confined.tried],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**as_others(os.environ), **_NO_MPS, **environment},
                start_new_session=True,  # a Ctrl-C in the terminal is the server's to handle
            )
        except BaseException:
            for server, _ in pairs:
                server.close()
            raise
        finally:
            for _, worker in pairs:
                worker.close()
        self.sockets = [server for server, _ in pairs]
        self.pid = self._child.pid
        assert self._child.stderr is not None
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError:  # no descriptor left: nobody would see its end
            self._child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(TERM_S)
            self._child.stderr.close()
            for server in self.sockets:
                server.close()
            raise
        self._output = _OutputReader(self._child.stderr.fileno(), name, self.pid, self._loop)
        self._loop.add_reader(self._pidfd, self._reap)

    def signal(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _reap(self) -> None:
        code = self._child.wait()  # returns at once: the pidfd is readable
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._output.close()
        assert self._child.stderr is not None
        self._child.stderr.close()
        if not self.exited.done():
            self.exited.set_result(code)


_OF_PICTURES: Final = (
    b"Corrupt JPEG data",
    b"Premature end of JPEG",
    b"Inconsistent progression sequence",
    b"Invalid SOS parameters",
    b"Unknown Adobe color transform",
    b"Warning: unknown JFIF revision",
    b"libpng ",
)
"""What decoders write to stderr about a client's picture, whose outcome says what matters."""


class _OutputReader:
    """Turns a worker's stderr into log lines."""

    def __init__(self, fd: int, name: str, pid: int, loop: asyncio.AbstractEventLoop) -> None:
        self._fd = fd
        self._loop = loop
        self._log = log.bind(worker=name, worker_pid=pid)
        self._partial = b""
        self._second = 0
        self._lines = 0
        self._suppressed = 0
        os.set_blocking(fd, False)
        loop.add_reader(fd, self._readable)

    def close(self) -> None:
        """Read what is left; the descriptor stays its owner's."""
        for _ in range(16):
            if not self._readable():
                break
        if self._partial:
            self._line(self._partial)
            self._partial = b""
        self._report_suppressed()
        self._loop.remove_reader(self._fd)

    def _readable(self) -> bool:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._fd)
            return False
        *lines, rest = (self._partial + data).split(b"\n")
        for line in lines:
            self._line(line)
        if len(rest) > limits.MAX_WORKER_LINE_BYTES:
            self._line(rest)
            rest = b""
        self._partial = rest
        return True

    def _line(self, line: bytes) -> None:
        if not line.strip() or line.startswith(_OF_PICTURES):
            return
        second = int(time.monotonic())
        if second != self._second:
            self._report_suppressed()
            self._second, self._lines = second, 0
        self._lines += 1
        if self._lines > limits.MAX_WORKER_LINES_PER_S:
            self._suppressed += 1
            return
        text = line[: limits.MAX_WORKER_LINE_BYTES].decode("utf-8", "replace").rstrip()
        fields = _fields_of(text)
        if fields is None:
            self._log.warning("worker output", text=text)
        else:
            level = _LEVELS.get(str(fields.pop("worker_level", "")), logging.INFO)
            self._log.log(level, "worker message", **fields)

    def _report_suppressed(self) -> None:
        if self._suppressed:
            self._log.warning("worker output suppressed", lines=self._suppressed)
            self._suppressed = 0


def _fields_of(text: str) -> dict[str, Any] | None:
    """The fields of a worker's JSON line, its event under ``message``."""
    if not text.startswith("{"):
        return None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    message = fields.pop("event", "")
    return {
        "message": message,
        **{f"worker_{k}" if k in _TAKEN else k: v for k, v in fields.items()},
    }


_LEVELS: Final = {"error": logging.ERROR, "warning": logging.WARNING}
_TAKEN: Final = frozenset({
    "event", "message", "level", "worker", "worker_pid", "timestamp",
    # What a logger's methods take by name, or act upon.
    "self", "method_name", "exc_info", "stack_info", "exception", "stack",
})  # fmt: skip
