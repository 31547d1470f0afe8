"""A process whose memory nobody else reads, and no disk gets."""

from __future__ import annotations

import resource
import subprocess
import sys

OTHERS = """
import ctypes, os, resource
from facelane_server import seclusion

def others_read_it():
    child = os.fork()
    if not child:
        try:
            open(f"/proc/{os.getppid()}/environ", "rb").read()
            os._exit(1)
        except PermissionError:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

if os.geteuid() == 0:  # whom everything is open to
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(seclusion.PR_SET_DUMPABLE, 1, 0, 0, 0)
seclusion.no_cores()
assert resource.getrlimit(resource.RLIMIT_CORE)[1] <= 1
before = others_read_it()
seclusion.seclude(lock=False)
seclusion.seclude(lock=False)
open("/proc/self/maps").read(), os.listdir("/proc/self/fd")
print(before, others_read_it())
"""

LOCKED = """
import mmap, os
from pathlib import Path
from facelane_server import seclusion, wiping

def locked_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmLck"))

assert not seclusion.seclude(lock=False)
assert locked_kib() == 0
held = seclusion.seclude()
before = locked_kib()
later = mmap.mmap(-1, 32 << 20)
later[: 4 << 20] = bytes(4 << 20)
wiping.scrub()
print(held, before > 0, locked_kib() - before >= 4 << 10)
"""


def said_by(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_other_process_of_its_user_reads_it() -> None:
    assert said_by(OTHERS) == "1 0"


def test_it_is_locked_in_memory_where_there_is_no_limit_to_that() -> None:
    held, *locked = said_by(LOCKED).split()
    # As a whole or not at all: whether it may be is the machine's matter.
    assert locked == [held, held]


def test_a_limit_is_left_alone() -> None:
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        lower = "import resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))"
    else:
        lower = ""
    program = (
        "import os",
        "from facelane_server import seclusion",
        lower,
        "os.geteuid() or (os.setgid(65534), os.setuid(65534))",  # without the capability
        "print(seclusion.seclude())",
    )
    assert said_by("\n".join(program)) == "False"
