"""A process whose memory is its own: keys, templates and names are in it as they are.

No core is written of it, no other process of its user reads its memory or traces it (root's do:
``erasure verify --process``, debuggers), and none of its pages is written to swap where the limit
of locked memory lets it be so.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path
from typing import Final

PR_SET_DUMPABLE: Final = 4
_CAP_IPC_LOCK: Final = 14
_CURRENT, _FUTURE, _ON_FAULT = 1, 2, 4
"""See mlockall(2). Each page as it is first touched, not all that is mapped."""


def no_cores() -> None:
    """At the start."""
    # One byte, since a program that cores are piped to (systemd-coredump) is started for a limit
    # of 0 all the same.
    with contextlib.suppress(OSError, ValueError):  # less is allowed already
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


def seclude(*, lock: bool = True) -> bool:
    """From here on. ``lock``: in memory too, which happens where there is no limit to it
    (``LimitMEMLOCK=infinity``, ``--ulimit memlock=-1``, CAP_IPC_LOCK); whether it did. May be
    called again.

    What belongs to the process in /proc is root's then, and cannot be written to any more.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(AttributeError):  # no Linux
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if not lock or not _has_no_limit():
        return False
    with contextlib.suppress(AttributeError):
        return int(libc.mlockall(_CURRENT | _FUTURE | _ON_FAULT)) == 0
    return False


def _has_no_limit() -> bool:
    """Else it would be met by a mapping of later, which then fails."""
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        return True
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        held = next(line.split()[1] for line in lines if line.startswith("CapEff"))
        return bool(int(held, 16) >> _CAP_IPC_LOCK & 1)
    return False
