"""The bridge's command as a process: what it writes, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.bridge_scenes import (
    PICTURE,
)
from tests.fakes.cameras import HttpServer, send_stream, write_clip
from tests.fakes.scripted_server import (
    ScriptedServer,
)
from tests.waiting import until

# --- the command ---


def command(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "facelane_bridge", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]], str]:
    out, err = process.communicate(timeout=40)
    return process.returncode, [json.loads(line) for line in out.splitlines()], err


def test_the_command_writes_json_lines_and_a_summary(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        code, lines, err = finish(
            command("run", "--source", str(clip), "--pace", "fast", "--target", server.target)
        )
    assert code == 0, err
    assert [line["type"] for line in lines].count("result") == 20
    assert lines[-1]["type"] == "summary"
    assert lines[-1]["cameras"]["camera"]["results"] == 20
    assert "grace" not in err, "no subject in the logs"
    assert all(json.loads(line)["event"] for line in err.splitlines())


def test_sigterm_ends_it_cleanly_and_tells_systemd(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(30)
        with HttpServer(endless) as web, ScriptedServer() as server:
            file = tmp_path / "bridge.toml"
            file.write_text(
                f'[server]\ntarget = "{server.target}"\n[[camera]]\nname = "door"\n'
                f'source = "http://127.0.0.1:{web.port}/v"\n'
            )
            process = command(
                "run",
                str(file),
                env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"),
                     "WATCHDOG_USEC": "200000"},
            )  # fmt: skip
            said: list[bytes] = []
            while b"WATCHDOG=1" not in said or said.count(b"WATCHDOG=1") < 3:
                said.append(notified.recv(1000))
            assert b"READY=1" in said
            until(lambda: len(server.streams) == 1 and len(server.streams[0]) > 10)
            process.send_signal(signal.SIGTERM)
            code, lines, err = finish(process)
            assert code == 0, err
    totals = lines[-1]["cameras"]["door"]
    assert totals["frames"] == totals["results"] + totals["drops"] + totals["errors"] > 0
    assert totals["state"] == "STOPPED"


def endless(handler: BaseHTTPRequestHandler) -> None:
    def pictures() -> Any:
        for _ in range(3000):
            yield PICTURE
            time.sleep(0.01)  # the camera's pace

    with contextlib.suppress(OSError):  # the bridge goes away
        send_stream(handler, pictures())


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["run"], 2, "give either"),
        (["check", "--source", "none.mp4", "--cameras-only"], 3, ""),
        (["check", "--source", str(Path(__file__)), "--target", "unix:/nowhere"], 4, ""),
    ],
)
def test_wrong_use_is_told(arguments: list[str], code: int, text: str) -> None:
    process = command(*arguments)
    out, err = process.communicate(timeout=40)
    assert process.returncode == code
    assert text in err
    assert "Traceback" not in out + err


def test_run_ends_with_the_code_of_what_failed(tmp_path: Path) -> None:
    with ScriptedServer() as server:
        code, lines, _ = finish(
            command("run", "--source", str(tmp_path / "none.mp4"), "--target", server.target)
        )
        assert code == 3
    code, lines, _ = finish(
        command("run", "--source", "x.mp4", "--target", f"unix:{tmp_path}/none", "--wait", "0.1")
    )
    assert code == 4
    assert lines[-1]["cameras"]["camera"]["reason"] == "SERVER_UNREACHABLE"


def test_check_says_what_it_found(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        process = command("check", "--source", str(clip), "--target", server.target)
        out, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    assert "camera: ok, file, h264, 64x48, 10 fps, 2.0 s, passed on as it is" in out
    assert "SERVING" in out


def test_a_reader_of_the_output_that_goes_away(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        process = command("run", "--source", str(clip), "--loop", "--target", server.target)
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 5
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
        process.stderr.close()


def test_a_reader_of_the_table_that_goes_away(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        process = command(
            "run", "--table", "--source", str(clip), "--loop", "--target", server.target
        )
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 5
        assert process.stderr is not None
        said = process.stderr.read()
        assert "whoever read the results has gone" in said
        assert "Traceback" not in said
        assert "BrokenPipe" not in said
        process.stderr.close()


def test_a_reader_of_the_logs_that_goes_away_is_nobody_s_loss(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        process = command("run", "--source", str(clip), "--pace", "fast", "--target", server.target)
        assert process.stderr is not None
        process.stderr.close()
        assert process.stdout is not None
        lines = [json.loads(line) for line in process.stdout]
        process.stdout.close()
        assert process.wait(30) == 0
    assert lines[-1]["results"] == 20
    assert len(server.streams) == 1


def test_a_table_where_there_is_no_terminal(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        process = command(
            "run", "--table", "--source", str(clip), "--pace", "fast", "--target", server.target
        )
        out, _ = process.communicate(timeout=40)
    assert "grace 0.75 (ood 0.80) live" in out
    assert "20 frames = 20 results + 0 drops + 0 errors" in out
