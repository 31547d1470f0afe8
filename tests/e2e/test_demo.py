"""``make demo`` as a stranger runs it, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.waiting import until


def demo(tmp_path: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *(command or ("-m", "facelane_bridge.demo"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )


def servers_in(folder: Path) -> list[psutil.Process]:
    """Server processes whose config lies in ``folder``."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in part for part in process.info["cmdline"] or ())
    ]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_demo_names_both_people_and_leaves_nothing(tmp_path: Path) -> None:
    process = demo(tmp_path)
    out, err = process.communicate(timeout=220)
    assert process.returncode == 0, f"{out[-4000:]}\n{err[-4000:]}"
    line = json.loads(out.splitlines()[-1])
    assert line["frames"] == 400 == line["results"] + line["drops"] + line["errors"]
    assert set(line["subjects"]) == {"grace_hopper", "eileen_collins"}
    assert line["rejected_ood"] > 0
    assert 0 < line["p50_ms"] <= line["p99_ms"]
    assert list(tmp_path.iterdir()) == []
    assert servers_in(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_interrupted_demo_stops_its_server(tmp_path: Path) -> None:
    process = demo(tmp_path)
    try:
        server = until(lambda: servers_in(tmp_path), what="the server starts")[0]
        family = [server, *server.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(30)
    assert process.returncode == 130
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    assert list(tmp_path.iterdir()) == []


# A signal in the middle of grpc.aio's first initialisation: an exception raised there by the
# signal's handler makes the process crash, with the server running.
INTERRUPTED_INSIDE_GRPC = """\
import os, signal, socket, sys
from facelane_bridge.demo import main
original = socket.socketpair

def socketpair(*arguments):
    if "grpc" in sys._getframe(1).f_code.co_filename:
        socket.socketpair = original
        print("inside", flush=True)
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    return original(*arguments)

socket.socketpair = socketpair
sys.exit(main([]))
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_an_interrupt_inside_grpc_is_an_interrupt(tmp_path: Path, number: str) -> None:
    process = demo(tmp_path, "-c", INTERRUPTED_INSIDE_GRPC, number)
    try:
        out, err = process.communicate(timeout=90)
    finally:
        process.kill()
    assert "inside" in out.splitlines()
    assert process.returncode == 130, err
    assert err == ""
    assert servers_in(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_killed_demo_takes_its_server_along(tmp_path: Path) -> None:
    process = demo(tmp_path)
    try:
        server = until(lambda: servers_in(tmp_path), what="the server starts")[0]
        until(lambda: server.children(recursive=True), what="its workers start")
        family = [server, *server.children(recursive=True)]
    finally:
        process.kill()
        process.communicate(timeout=30)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
