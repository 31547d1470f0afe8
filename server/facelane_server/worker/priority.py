"""Processor time of a worker that is not ready yet.

Importing a runtime and warming a model up takes a core for seconds. Where others answer
meanwhile, that work steps back for theirs: by nice, and by the nice of its session's
autogroup where the kernel schedules those, which makes nice mean nothing between sessions
(sched(7)). Nothing is lowered that this process may not raise again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from facelane_server.worker.journal import log_event

_AUTOGROUP: Final = Path("/proc/self/autogroup")
_RAISE_S: Final = 2.0
_CAP_SYS_NICE: Final = 23


def step_back(nice: int) -> Callable[[], None]:
    """Lower this process, which must be alone in its session, to ``nice`` (1 to 19). Call
    before it has threads; what is returned raises all that it has then. Never fails: without
    the rights it does nothing."""
    own, group = os.getpriority(os.PRIO_PROCESS, 0), _autogroup()
    lowered = own < nice and _may_have(own)
    grouped = group is not None and group < nice and (group >= 0 or _may_have(group))
    if lowered:
        with contextlib.suppress(OSError):  # a system call filter
            os.setpriority(os.PRIO_PROCESS, 0, nice)
    if grouped:
        grouped = _set_autogroup(nice)

    def step_forward() -> None:
        if lowered:
            for thread in _threads():
                with contextlib.suppress(OSError):  # it ended
                    os.setpriority(os.PRIO_PROCESS, thread, own)
        if grouped and group is not None and not _set_autogroup(group):
            log_event("priority not raised again", level="warning", autogroup_nice=nice)

    return step_forward


def _may_have(nice: int) -> bool:
    """CAP_SYS_NICE, or RLIMIT_NICE (``LimitNICE=`` of a unit) of at least 20 - nice."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NICE)
    if soft == resource.RLIM_INFINITY or soft >= 20 - nice:
        return True
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_SYS_NICE & 1)
    return False


def _threads() -> list[int]:
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir("/proc/self/task")]
    return [0]  # no /proc: this thread at least


def _autogroup() -> int | None:
    """Nice of the session's autogroup; None where there are none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(_AUTOGROUP.read_text().split()[-1])  # "/autogroup-42 nice 0"
    return None


def _set_autogroup(nice: int) -> bool:
    """The kernel takes one change in 100 ms from all unprivileged processes together."""
    end = time.monotonic() + _RAISE_S
    while True:
        try:
            _AUTOGROUP.write_text(str(nice))
        except OSError as error:
            if error.errno != errno.EAGAIN or time.monotonic() > end:
                return False
            time.sleep(0.02)
        else:
            return True
