"""NVIDIA MPS: who owns its control daemon, and how it begins and ends.

Under MPS the workers of a card run at the same time instead of by turns, each with its
share of the multiprocessors. The daemon that makes this so listens in a directory: a
server that finds one there (``CUDA_MPS_PIPE_DIRECTORY``, a systemd unit of its own) uses
it and leaves it alone; otherwise it starts one for itself and ends it. The end is seen
to by a guard process that holds the read end of a pipe: when the server ends, by
whatever cause, the guard reads end of file and tells the daemon to quit.

What MPS costs: an illegal access by one worker takes every worker of the card with it,
because they share one context on it. Each of them then ends as poisoned and is
started again; the daemon brings a new server for them once the last has left. A worker
that is killed in the middle of its work (a hang) may do the same to its neighbours.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog

from facelane_server.domain import FacelaneError, Reason

log = structlog.get_logger(__name__)

CONTROL: Final = "nvidia-cuda-mps-control"
_FOLDERS: Final = ("/usr/local/nvidia/bin", "/usr/local/cuda/bin", "/opt/nvidia/bin")
"""Where container images put the driver's programs, off the PATH."""
START_S: Final = 20.0
ASK_S: Final = 5.0
QUIT_S: Final = 15.0
_GUARD: Final = 'cat > /dev/null; echo "quit -t 5" | "$0" > /dev/null 2>&1'


class MpsDaemon:
    """A control daemon that workers can reach behind ``pipe_directory``.

    ``start``, then ``close`` after the last worker has ended.
    """

    def __init__(self, pipe_directory: Path, guard: subprocess.Popen[bytes] | None) -> None:
        self.pipe_directory = pipe_directory
        self._guard = guard

    @property
    def owned(self) -> bool:
        """It was started here, and ends with us."""
        return self._guard is not None

    @classmethod
    async def start(cls, directory: Path, *, environ: Mapping[str, str] | None = None) -> MpsDaemon:
        """The daemon behind ``$CUDA_MPS_PIPE_DIRECTORY`` if that is set and one answers there,
        else one of our own in ``directory`` (made, mode 0700).

        Raises FacelaneError(CONFIG_INVALID) when MPS cannot be had.
        """
        outside = dict(os.environ if environ is None else environ)
        control = _find_control(outside)
        given = outside.get("CUDA_MPS_PIPE_DIRECTORY", "")
        if given and await _answers(control, outside):
            log.info("MPS daemon found", pipe_directory=given)
            return cls(Path(given), None)
        pipes, logs = directory / "pipe", directory / "log"
        for folder in (directory, pipes, logs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = {
            **outside,
            "CUDA_MPS_PIPE_DIRECTORY": str(pipes),
            "CUDA_MPS_LOG_DIRECTORY": str(logs),
        }
        code, words = await _run([control, "-d"], environment, b"", START_S)
        if code != 0 or not await _answers(control, environment):
            raise _unusable(
                f"{CONTROL} did not start ({_last_words(logs) or words or f'exit code {code}'})"
            )
        # After the daemon, so that it does not hold the pipe open.
        guard = _guard(control, directory, environment)
        log.info("MPS daemon started", pipe_directory=str(pipes))
        return cls(pipes, guard)

    async def close(self) -> None:
        """End the daemon if it is ours; bounded. Safe to call twice."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        assert guard.stdin is not None
        with contextlib.suppress(OSError):
            guard.stdin.close()
        try:
            await asyncio.to_thread(guard.wait, QUIT_S)
        except subprocess.TimeoutExpired:
            guard.kill()
            await asyncio.to_thread(guard.wait)
            log.warning("MPS daemon did not quit in time", timeout_s=QUIT_S)


def _guard(
    control: str, directory: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    # A lock on the directory, which the guard alone keeps: until the daemon was told to quit
    # nobody may take its pipes away, not even a server that tidies up after this one.
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Held by the guard of the server before, in a directory that outlives servers: as good.
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, control],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=dict(environment),
            pass_fds=(lock,),
            start_new_session=True,
        )
    finally:
        os.close(lock)


def control_program(environ: Mapping[str, str]) -> str | None:
    """Where NVIDIA's control program is; None where it is not installed."""
    path = os.pathsep.join((environ.get("PATH", os.defpath), *_FOLDERS))
    return shutil.which(CONTROL, path=path)


def _find_control(environ: Mapping[str, str]) -> str:
    found = control_program(environ)
    if found is None:
        raise _unusable(f"{CONTROL} is not installed (it comes with NVIDIA's driver)")
    return found


async def _answers(control: str, environment: Mapping[str, str]) -> bool:
    code, _ = await _run([control], environment, b"get_server_list\n", ASK_S)
    return code == 0


async def _run(
    command: list[str], environment: Mapping[str, str], words: bytes, timeout_s: float
) -> tuple[int | None, str]:
    """Exit code (None = killed after the timeout) and the end of what it printed."""

    def call() -> tuple[int | None, str]:
        # Into a file-less pipe only for the commands that end; a daemon must not inherit it.
        quiet = subprocess.DEVNULL if len(command) > 1 else subprocess.PIPE
        try:
            done = subprocess.run(
                command,
                input=words,
                stdout=quiet,
                stderr=subprocess.STDOUT if quiet == subprocess.PIPE else quiet,
                env=dict(environment),
                timeout=timeout_s,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return None, f"no answer in {timeout_s:g} s"
        except OSError as error:
            return None, os.strerror(error.errno or 0)
        return done.returncode, (done.stdout or b"").decode(errors="replace").strip()[-200:]

    return await asyncio.to_thread(call)


def _last_words(logs: Path) -> str:
    for name in ("control.log", "server.log"):
        with contextlib.suppress(OSError):
            lines = (logs / name).read_text(errors="replace").strip().splitlines()
            if lines:
                return lines[-1][-200:]
    return ""


def _unusable(why: str) -> FacelaneError:
    return FacelaneError(
        Reason.CONFIG_INVALID,
        f"isolation = 'mps' cannot be had: {why}; install it, or choose isolation = 'process'",
    )
