"""A server whose standard streams were closed runs as with /dev/null, and nothing that prints
writes into a file of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import facelane
from facelane_server.store.gallery import Store
from facelane_server.store.vault import Vault
from tests.e2e import wire
from tests.running_server import toml


def closed(folder: Path, command: str, streams: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["/bin/sh", "-c", f'exec "$0" -m facelane_server {command} {streams}', sys.executable],
        cwd=folder,
    )


def test_a_terminal_that_cannot_show_a_name(tmp_path: Path) -> None:
    """Of a folder, of a source: all else is told."""
    folder = tmp_path / "画像"
    folder.mkdir()
    (tmp_path / "good.toml").write_text(toml(folder, listen=f"unix:{folder}/grpc.sock"))
    done = subprocess.run(
        [sys.executable, "-m", "facelane_server", "check", "--config", "good.toml"],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "latin-1"},
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"/??/grpc.sock" in done.stdout


SLOW = pytest.mark.slow
"""One that is closed; `make test` closes all."""


@pytest.mark.parametrize(
    "streams", [pytest.param("2>&-", marks=SLOW), "0<&- 1>&- 2>&-", "2>/dev/full"]
)
def test_the_server_runs_without_them(tmp_path: Path, streams: str) -> None:
    (tmp_path / "server.toml").write_text(toml(tmp_path, wire.pools()))
    for name in ("state", "run"):
        (tmp_path / name).mkdir(mode=0o700)
    process = closed(tmp_path, "run --config server.toml", streams)
    try:
        with facelane.Client(f"unix:{tmp_path}/grpc.sock", timeout=60) as client:
            client.wait_until_serving(timeout=60)
            client.enroll("grace", wire.picture())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(30)
    path = tmp_path / "state" / "gallery.db"
    with closing(Store(path, vault=Vault(str(path), None, ()))) as store:  # counts need no key
        assert store.counts() == (1, 1)


@pytest.mark.parametrize(
    "streams",
    [
        pytest.param("2>&-", marks=SLOW),
        pytest.param("1>&-", marks=SLOW),
        "0<&- 1>&- 2>&-",
        "2>/dev/full",
    ],
)
def test_commands_end_as_they_would(tmp_path: Path, streams: str) -> None:
    (tmp_path / "good.toml").write_text(toml(tmp_path))
    (tmp_path / "bad.toml").write_text("[serve]\n")
    assert closed(tmp_path, "check --config good.toml", streams).wait(60) == 0
    assert closed(tmp_path, "check --config bad.toml", streams).wait(60) == 78
