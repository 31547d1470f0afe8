"""Events, console and fleet where standard streams are closed, or lead to a disk that is full."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.scripted_server import ScriptedServer
from tests.running_server import free_port
from tests.waiting import until

STREAMS = ["2>&-", ">&- 2>&- <&-", "2> /dev/full"]


def shell(words: list[str], streams: str) -> list[str]:
    return ["/bin/sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-m", *words]


def ends(words: list[str], streams: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        shell(words, streams), capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "RAY_ADDRESS": ""},
    )  # fmt: skip


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize(
    "words",
    [
        ["facelane_events", "check", "/nowhere.toml"],
        pytest.param(
            ["facelane_console", "--cert", "/nowhere", "--key", "/nowhere"], marks=pytest.mark.slow
        ),
        pytest.param(["facelane_fleet", "check", "/nowhere.toml"], marks=pytest.mark.slow),
    ],
    ids=lambda words: words[0],
)
def test_an_error_that_nobody_hears_is_an_exit_code(words: list[str], streams: str) -> None:
    done = ends(words, streams)
    assert done.returncode == 2, done
    # It is for people: never among what programs read.
    assert not done.stdout


@pytest.mark.parametrize("streams", STREAMS)
def test_events_are_delivered(streams: str, tmp_path: Path) -> None:
    """What is logged goes nowhere, least of all into the file that got the number of a stream."""
    kept = tmp_path / "events.jsonl"
    with ScriptedServer() as server:
        configuration = tmp_path / "events.toml"
        configuration.write_text(
            f'state_dir = "{tmp_path}"\n[server]\ntarget = "{server.target}"\n'
            f'[[sink]]\nname = "file"\ntype = "jsonl"\npath = "{kept}"\n'
        )
        words = ["facelane_events", "--log-level", "debug", "run", str(configuration)]
        with subprocess.Popen(shell(words, streams)) as running:
            try:
                until(lambda: kept.exists() and kept.read_bytes().count(b"\n") >= 3)
                running.send_signal(signal.SIGTERM)
                assert running.wait(30) == 0
            finally:
                running.kill()
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"SUBJECT_SEEN"}


@pytest.mark.parametrize("streams", STREAMS)
def test_the_console_is_there(streams: str) -> None:
    port = free_port()
    words = ["facelane_console", "--listen", f"127.0.0.1:{port}"]
    with subprocess.Popen(shell(words, streams), stdout=subprocess.PIPE) as running:
        try:

            def answers() -> bool:
                try:
                    with socket.create_connection(("127.0.0.1", port), 5) as asked:
                        asked.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                        return asked.recv(15).startswith(b"HTTP/1.1 200")
                except OSError:
                    assert running.poll() is None
                    return False

            until(answers)
            running.send_signal(signal.SIGTERM)
            assert running.wait(30) in (0, -signal.SIGTERM)
            assert running.stdout is not None
            assert not running.stdout.read()
        finally:
            running.kill()
