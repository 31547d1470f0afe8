"""``python -m facelane_bridge.tether PID SIGNAL COMMAND...``: become COMMAND; end when PID ends.

A process that crashes or is killed cannot stop what it started. On Linux the kernel can:
the parent-death signal is asked for here, in the child, and outlives exec. (Asked for
between fork and exec, by ``preexec_fn``, it would run Python in a copy of a process with
threads, whose locks nobody holds any more.) Elsewhere COMMAND runs untethered.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def tethered(*command: str, by: signal.Signals = signal.SIGTERM) -> list[str]:
    """``command`` (its program by path), to be started by this process's main thread, or by
    another that lives as long: the kernel takes the thread's end for the parent's.

    The signal ends it when this process is gone, in whatever way. Its process id is that of
    the child that is started: signals and exit codes are the command's own.
    """
    pid, number = str(os.getpid()), str(int(by))
    return [sys.executable, "-m", "facelane_bridge.tether", pid, number, *command]


def main(arguments: Sequence[str]) -> NoReturn:
    """Become the command; exit code 1 where the parent has ended already."""
    parent, number, *command = arguments
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != int(parent):  # it ended before the kernel was asked
        sys.exit(1)
    os.execv(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
