"""The bridge where standard streams are closed or speak little, and nothing can be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.cameras import write_clip
from tests.fakes.scripted_server import ScriptedServer

BRIDGE = f"{sys.executable} -m facelane_bridge"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", "-c", command], check=False, capture_output=True, text=True, timeout=60,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip.mp4", frames=5)


@pytest.mark.parametrize(
    "closed", ["2>&- <&-", *(pytest.param(one, marks=pytest.mark.slow) for one in ("2>&-", "<&-"))]
)
def test_a_run_with_closed_streams(clip: Path, closed: str) -> None:
    with ScriptedServer() as server:
        ran = shell(f"{BRIDGE} run --source {clip} --pace fast --target {server.target} {closed}")
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert lines[-1]["results"] == 5


@pytest.mark.parametrize("form", ["", "--table"])
def test_without_standard_output_nothing_gets_into_a_socket(clip: Path, form: str) -> None:
    with ScriptedServer() as server:
        ran = shell(f"{BRIDGE} run {form} --source {clip} --pace fast --target {server.target} >&-")
        assert ran.returncode == 0, ran.stderr
        assert len(server.streams) == 1
    assert "Traceback" not in ran.stderr


def test_a_terminal_of_ascii_and_no_place_for_files(clip: Path) -> None:
    with ScriptedServer() as server:
        ran = shell(
            f"cd / && {BRIDGE} run --table --source {clip} --pace fast --target {server.target}",
            PYTHONIOENCODING="ascii", LC_ALL="C", TMPDIR="/nowhere", HOME="/nowhere",
        )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "5 frames = 5 results" in ran.stdout


@pytest.mark.parametrize("choice", [pytest.param("off", marks=pytest.mark.slow), "events", "all"])
def test_which_lines_are_told(clip: Path, choice: str) -> None:
    with ScriptedServer() as server:
        ran = shell(
            f"{BRIDGE} run --results {choice} --source {clip} --pace fast --target {server.target}"
        )
    kinds = [json.loads(line)["type"] for line in ran.stdout.splitlines()]
    assert kinds.count("result") == {"off": 0, "events": 1, "all": 5}[choice]
    assert kinds[-1] == "summary"
