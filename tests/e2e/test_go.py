"""The Go example: made of the protos, against a real server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fakes.cameras import jpeg
from tests.running_server import RunningServer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "go"
GOCODE = Path("/usr/share/gocode")
TOOLS = ("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc")
PICTURES = 8


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with what Debian has, without a network."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)} (packages in CONTRIBUTING.md)")
    for name in ("grpc", "protobuf"):
        if not (GOCODE / "src/google.golang.org" / name).is_dir():
            pytest.skip(f"needs golang-google-{name}-dev (packages in CONTRIBUTING.md)")
    folder = tmp_path_factory.mktemp("go")
    source = folder / "src/example.org/facelane"
    source.mkdir(parents=True)
    shutil.copy(EXAMPLE / "main.go", source)
    environment = os.environ | {
        "GO111MODULE": "off",
        "GOPATH": f"{folder}:{GOCODE}",
        "GOCACHE": os.environ.get("GOCACHE", str(folder / "cache")),
        "GOFLAGS": "-p=2",
        "PYTHON": sys.executable,
    }
    built = folder / "faces"
    for command in (
        ["sh", str(EXAMPLE / "generate.sh"), str(source)],
        ["go", "build", "-o", str(built), "."],
    ):
        done = subprocess.run(
            command, cwd=source, env=environment, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    return built


def ran(program: Path, target: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), str(folder)], env=os.environ | {"FACELANE_TARGET": target},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_folder_has_an_outcome_each(program: Path, server: RunningServer, tmp_path: Path) -> None:
    for number in range(PICTURES):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / f"{PICTURES}.jpg").write_bytes(b"\xff\xd8\xff no picture")
    done = ran(program, server.target, tmp_path)
    assert done.returncode == 0, done.stderr
    *lines, last = map(json.loads, done.stdout.splitlines())
    assert [line["frame"] for line in lines] == list(range(1, PICTURES + 2))
    assert [line["kind"] for line in lines] == ["result"] * PICTURES + ["error"]
    assert all(
        face["track"] and face["decision"] for line in lines for face in line.get("faces", [])
    )
    assert any("faces" in line for line in lines)
    assert last["summary"] == {
        "received": PICTURES + 1, "results": PICTURES, "drops": 0, "errors": 1,
    }  # fmt: skip


@pytest.mark.slow
def test_what_goes_wrong_is_told(program: Path, tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    done = ran(program, f"unix:{tmp_path}/nobody.sock", tmp_path)
    assert done.returncode == 1
    assert "Unavailable" in done.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    done = ran(program, f"unix:{tmp_path}/nobody.sock", empty)
    assert done.returncode == 1
    assert "no *.jpg" in done.stderr
