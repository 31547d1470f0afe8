"""Servers that begin as forks of a process which has imported what a server imports.

To start Python and import a server's modules takes a second of a processor, twice that where
coverage traces it: more than most tests let their server do. So one process of a test session does
it once (``python -m tests.forked``), and each server is a fork of it, that has touched nothing: no
thread, no channel, no open file. From there on a fork is what ``facelane-server`` is: its own
process, with the arguments, environment, folder and streams that it was given, and its own workers.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import coverage

from facelane_server.running import GRPC_SWITCHES

MODULES = (
    "facelane_server.app",
    "facelane_server.auditing",
    "facelane_server.calibrating",
    "facelane_server.cli",
    "facelane_server.erasing",
    "facelane_server.exporting",
    "facelane_server.modeltools.cli",
    "grpc.aio",
    "pydantic.type_adapter",
    "pynvml",
    "sqlalchemy.dialects.sqlite",
    "uvloop",
)
"""What a server has imported by the time that it serves."""
_TRACED = "COVERAGE_PROCESS_CONFIG"
_TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
"""For which a server would begin once again (``wiping.one_heap``)."""
_FIRST = {
    **_TUNABLES,
    "GRPC_VERBOSITY": "ERROR",  # as a server sets them, before gRPC is imported
    "GRPC_EXPERIMENTS": GRPC_SWITCHES,
    "OPENBLAS_NUM_THREADS": "1",  # nothing forks beside threads
}
_MOST_BYTES = 1 << 20
"""Of a request: arguments and an environment."""
_seconds: list[float] = []


def processor_seconds() -> float:
    """Of all forks that ended, with their own processes."""
    return sum(_seconds)


class Fork:
    """Of ``subprocess.Popen`` what tests use."""

    def __init__(self, pid: int, pidfd: int, status: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd, self._status = pidfd, status

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                told = self._status.recv(64)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("facelane-server", timeout or 0.0) from None
            assert told, "the process that forks has ended"
            code, seconds = told.split()
            _seconds.append(float(seconds))
            self.returncode = int(code)
            self._status.close()
            os.close(self._pidfd)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Nursery:
    """The process that forks. It ends with this one, and its forks with it."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(100.0)
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
                cwd=Path(__file__).parent.parent,
                env={name: value for name, value in os.environ.items() if name != _TRACED} | _FIRST,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        atexit.register(self._close)

    def begin(
        self,
        arguments: Sequence[str],
        output: IO[bytes],
        environment: Mapping[str, str],
        errors: IO[bytes],
    ) -> Fork:
        asked = {"arguments": arguments, "environment": dict(environment), "folder": os.getcwd()}
        status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            files = [output.fileno(), errors.fileno(), theirs.fileno()]
            with self._lock:
                socket.send_fds(self._control, [json.dumps(asked).encode()], files)
                told, [pidfd], _, _ = socket.recv_fds(self._control, 16, 1, socket.MSG_CMSG_CLOEXEC)
        return Fork(int(told), pidfd, status)

    def _close(self) -> None:
        self._control.close()
        self._process.wait(30)


@functools.cache
def _nursery() -> _Nursery:
    return _Nursery()


def begin(arguments: Sequence[str], output: IO[bytes], environment: Mapping[str, str]) -> Fork:
    """``facelane-server ARGUMENTS``. Traced by coverage where processes of this moment are."""
    return _nursery().begin(arguments, output, environment, output)


def completed(arguments: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """The same until it has ended, and what it has said."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        fork = _nursery().begin(arguments, output, os.environ, errors)
        try:
            code = fork.wait(timeout)
        except BaseException:
            fork.kill()
            fork.wait(30.0)
            raise
        said = []
        for file in (output, errors):
            file.seek(0)
            said.append(file.read().decode())
        return subprocess.CompletedProcess(arguments, code, *said)


# -- in the process that forks --------------------------------------------------------------------


def _serve(control: socket.socket) -> list[str]:
    """Forks until whoever asks has gone. Returns in each fork, with what it was asked to be."""
    living: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for ready in select.select([control, *living], [], [])[0]:
            if ready is not control:
                pid, status = living.pop(ready)
                _, ended, used = os.wait4(pid, 0)
                told = f"{os.waitstatus_to_exitcode(ended)} {used.ru_utime + used.ru_stime}"
                with contextlib.suppress(OSError):  # nobody wants to know any more
                    status.send(told.encode())
                status.close()
                os.close(ready)
                continue
            request, files, _, _ = socket.recv_fds(control, _MOST_BYTES, 3)
            if not request:
                for pidfd in living:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                # Without a file of coverage, while others are read: each fork tells the same.
                os.kill(os.getpid(), signal.SIGKILL)
            output, errors, status = files[0], files[1], socket.socket(fileno=files[2])
            pid = os.fork()
            if pid == 0:
                for held in (control, status, *(each for _, each in living.values())):
                    held.close()
                for pidfd in living:
                    os.close(pidfd)
                return _become(json.loads(request), output, errors)
            os.close(output)
            os.close(errors)
            pidfd = os.pidfd_open(pid)
            living[pidfd] = (pid, status)
            socket.send_fds(control, [str(pid).encode()], [pidfd])


def _become(asked: dict[str, Any], output: int, errors: int) -> list[str]:
    for number, file in ((1, output), (2, errors)):
        os.dup2(file, number)
        os.close(file)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"] | _TUNABLES)
    if _TRACED in os.environ:
        # What was executed by the imports, the process of the tests has executed traced.
        coverage.process_startup()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return list(asked["arguments"])


def _main() -> None:
    # A terminal's interrupt is for the tests, which end what they began.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in MODULES:
        with contextlib.suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
    with socket.socket(fileno=int(sys.argv[1])) as control:
        arguments = _serve(control)
    from facelane_server import cli

    sys.argv[:] = ["facelane-server", *arguments]
    cli.main()


if __name__ == "__main__":
    _main()
