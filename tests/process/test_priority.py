"""A worker that loads steps back for those that serve, and comes forward when it is ready."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from tests.real_pool import real_pool
from tests.waiting import auntil

from facelane_server.pools.report import PoolChange

SCRIPT = """
import ctypes, os, sys, threading
from pathlib import Path
from facelane_server.worker.priority import step_back

def group():
    try:
        return Path("/proc/self/autogroup").read_text().split()[-1]
    except OSError:
        return "-"

def now():
    stop = threading.Event()
    seen = []
    thread = threading.Thread(target=lambda: (seen.append(os.getpriority(os.PRIO_PROCESS, 0)),
                                              stop.wait(10)))
    thread.start()
    return thread, stop, seen

if "nobody" in sys.argv:
    os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, as after an exec
forward = step_back(int(sys.argv[1]))
thread, stop, seen = now()
inside = os.getpriority(os.PRIO_PROCESS, thread.native_id)
print(os.getpriority(os.PRIO_PROCESS, 0), inside, group())
forward()
inside = os.getpriority(os.PRIO_PROCESS, thread.native_id)
print(os.getpriority(os.PRIO_PROCESS, 0), inside, group())
stop.set()
"""


def run(*arguments: str) -> list[list[str]]:
    """What the threads and the session have: before, and after coming forward."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        start_new_session=True,
    )
    return [line.split() for line in done.stdout.splitlines()]


def own() -> str:
    return str(os.getpriority(os.PRIO_PROCESS, 0))


def test_all_threads_come_forward_again() -> None:
    before, after = run("15")
    may = before[0] == "15"
    assert may or os.geteuid() != 0, "root has the right"
    assert before[:2] == (["15"] * 2 if may else [own()] * 2)
    assert after[:2] == [own()] * 2
    assert (before[2], after[2]) in (("15", "0"), ("-", "-"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_what_could_not_be_raised_again_is_not_lowered() -> None:
    """But the autogroup, which may always return to 0."""
    before, after = run("15", "nobody")
    assert before[:2] == after[:2] == [own()] * 2
    assert (before[2], after[2]) in (("15", "0"), ("-", "-"))


async def test_a_pool_comes_back_at_its_own_priority() -> None:
    async with real_pool(spares=1) as p:
        await auntil(lambda: len(p.changes(PoolChange.WORKER_READY)) == 2)
        killed = p.pids()
        os.kill(killed[0], signal.SIGKILL)
        await auntil(lambda: len(p.changes(PoolChange.WORKER_READY)) == 3)
        assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in p.pids()} == {int(own())}
