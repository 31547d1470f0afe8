"""The console's page that is committed is what its sources build, to the byte."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

CONSOLE = Path(__file__).resolve().parents[2] / "clients" / "facelane_console"
WEB, STATIC = CONSOLE / "web", CONSOLE / "static"
MODULES = WEB / "node_modules" / ".bin"


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.skipif(
    not MODULES.is_dir(), reason="needs its modules: npm ci --prefix clients/facelane_console/web"
)
def test_the_committed_page_is_what_is_built(tmp_path: Path) -> None:
    for command in (
        [MODULES / "tsc", "--noEmit"],
        [MODULES / "vite", "build", "--outDir", tmp_path, "--emptyOutDir", "--logLevel", "error"],
    ):
        done = subprocess.run(
            command, cwd=WEB, timeout=120, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    committed = files(STATIC)
    del committed["manifest.json"]  # what it was built of: `make console` writes it
    assert files(tmp_path) == committed, "run `make console`"
