"""Ctrl-C and SIGTERM on ``facelane-bridge`` while a camera takes the call and says nothing."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time

import pytest
from tests.fakes.scripted_server import ScriptedServer

BRIDGE = (sys.executable, "-m", "facelane_bridge")


def start(silent: socket.socket, *words: str) -> tuple[subprocess.Popen[str], socket.socket]:
    """The bridge's process, when it has called the camera."""
    source = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/x"
    process = subprocess.Popen(
        [*BRIDGE, *words, "--source", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    silent.settimeout(30)
    try:
        return process, silent.accept()[0]
    except BaseException:
        process.kill()
        process.communicate()
        raise


def test_an_interrupted_check_waits_for_no_camera() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process, call = start(silent, "check", "--cameras-only")
        with call:
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
            took = time.monotonic() - begun
    assert process.returncode == 130, err
    assert (out, err) == ("", "")
    assert took < 9.0  # a camera has 10 s to open


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_a_hanging_camera_behind(number: signal.Signals) -> None:
    with ScriptedServer() as server, socket.create_server(("127.0.0.1", 0)) as silent:
        process, call = start(silent, "run", "--target", server.target)
        with call:
            begun = time.monotonic()
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
            took = time.monotonic() - begun
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert json.loads(out.splitlines()[-1])["type"] == "summary"
    assert took < 9.0  # a camera has 10 s to open
