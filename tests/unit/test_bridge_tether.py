"""A tethered command ends with its parent, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest
from tests.waiting import until

from facelane_bridge.tether import tethered

PARENT = """\
import subprocess, sys
from facelane_bridge.tether import tethered
child = subprocess.Popen(tethered(sys.executable, "-c", sys.argv[1]), stdout=subprocess.PIPE)
child.stdout.readline()  # it runs
print(child.pid, flush=True)
child.wait()
"""
CHILD = "import time; print(flush=True); time.sleep(60)"


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_it_ends_when_its_parent_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_it_does_not_start_without_its_parent() -> None:
    words = tethered(sys.executable, "-c", "print('started')")
    words[words.index(str(os.getpid()))] = str(os.getppid())
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_exit_codes_and_signals_are_the_commands_own() -> None:
    words = tethered(sys.executable, "-c", "import sys; sys.exit(7)")
    assert subprocess.run(words, timeout=30, check=False).returncode == 7
    with subprocess.Popen(tethered(sys.executable, "-c", CHILD), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
