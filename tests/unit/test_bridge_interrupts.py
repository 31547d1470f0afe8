"""Ctrl-C and SIGTERM on ``facelane-bridge`` while a camera takes the call and says nothing."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fakes.scripted_server import ScriptedServer

BRIDGE = (sys.executable, "-m", "facelane_bridge")


def start(
    folder: Path, silent: socket.socket, *words: str, target: str = "127.0.0.1:1"
) -> tuple[subprocess.Popen[str], socket.socket]:
    """The bridge's process, when it has called the camera; which has longer to open than a
    test may take."""
    file = folder / "bridge.toml"
    file.write_text(f"""
[server]
target = "{target}"
[[camera]]
name = "a"
source = "rtsp://127.0.0.1:{silent.getsockname()[1]}/x"
open_timeout = 600
""")
    process = subprocess.Popen(
        [*BRIDGE, *words, str(file)],
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


def test_an_interrupted_check_waits_for_no_camera(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process, call = start(tmp_path, silent, "check", "--cameras-only")
        with call:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert (out, err) == ("", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_a_hanging_camera_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    with ScriptedServer() as server, socket.create_server(("127.0.0.1", 0)) as silent:
        process, call = start(tmp_path, silent, "run", target=server.target)
        with call:
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert json.loads(out.splitlines()[-1])["type"] == "summary"
