"""The benchmarks run, in tiny sizes, and leave a result behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "bench", *arguments, "--smoke"),
            *("--out", str(folder), "--cache", str(folder / "cache")),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_the_service_alone(tmp_path: Path) -> None:
    done = bench(tmp_path, "overhead:null")
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = tmp_path.glob("overhead-*.json")
    document = json.loads(path.read_text())
    assert document["smoke"] is True
    assert "overhead:null" in document["command"]
    rows = {row["deployment"]: row for row in document["rows"]}
    many = rows["facelane, 8 streams"]
    assert many["frames"] == 400
    assert many["lost"] == 0
    assert many["throughput_per_s"] > 0
    assert "smoke run" in done.stdout


def test_what_a_frame_costs_stands_beside_what_it_costs_at_least(tmp_path: Path) -> None:
    done = bench(tmp_path, "front:paced")
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = tmp_path.glob("front-paced-*.json")
    server, bare = json.loads(path.read_text())["rows"]
    # A camera that finds no room sends nothing.
    assert server["frames"] > 0 == server["lost"]
    assert bare["frames"] == bare["results"] > 0
    for row in (server, bare):
        assert row["loop_ms_a_frame"] > 0


def test_cameras_on_shards_need_neither_card_nor_models(tmp_path: Path) -> None:
    done = bench(tmp_path, "streams:720p-null", "--device", "cpu", "--shards", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = tmp_path.glob("streams-720p-null-shards2-*.json")
    document = json.loads(path.read_text())
    assert not [note for note in document["notes"] if "not measured" in note], document["notes"]
    assert document["rows"]


@pytest.mark.shared
def test_names_on_a_real_clip(tmp_path: Path) -> None:
    done = bench(tmp_path, "names:clip")
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = tmp_path.glob("names-clip-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["runs"] for row in rows if row["scenario"].startswith("answers up to")} == {2}
    assert all(row["wrong"] == 0 for row in rows)


def test_an_unknown_name_is_told(tmp_path: Path) -> None:
    done = bench(tmp_path, "overhaed")
    assert done.returncode == 2
    assert "overhead" in done.stderr


def test_what_cannot_run_is_told_and_leaves_no_result(tmp_path: Path) -> None:
    empty = tmp_path / "frames"
    empty.mkdir()
    done = bench(tmp_path, "streams", "--device", "cpu", "--frames", str(empty))
    assert done.returncode == 1
    assert "holds no JPEG files" in done.stdout
    assert not list(tmp_path.glob("*.json"))


def test_an_interrupted_run_leaves_no_server_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "bench", "front", "--smoke"),
            *("--out", str(tmp_path), "--cache", str(tmp_path)),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        me = psutil.Process(process.pid)

        def family() -> list[psutil.Process]:
            """The server and its workers, once there are some."""
            found = me.children(recursive=True)
            return found if len(found) >= 2 else []

        descendants = until(family, 120, "a server with workers")
        process.terminate()
        assert process.wait(60) == 143
        _, alive = psutil.wait_procs(descendants, timeout=30)
        assert not alive
    finally:
        process.kill()
        process.wait(30)


def test_what_was_measured_before_the_end_is_kept(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "bench", "isolation", "--smoke", "--device", "cpu"),
            *("--out", str(tmp_path), "--cache", str(tmp_path)),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:

        def rows() -> list[Any]:
            for path in tmp_path.glob("isolation-*.json"):
                with contextlib.suppress(ValueError):  # it is being written
                    found: list[Any] = json.loads(path.read_text())["rows"]
                    return found
            return []

        assert until(rows, 150, "a first measurement")
        process.terminate()
        assert process.wait(60) == 143
        [path] = tmp_path.glob("isolation-*.json")
        document = json.loads(path.read_text())
        assert document["rows"]
        assert not document["complete"]
    finally:
        process.kill()
        process.wait(30)
