"""The protocol can be compiled elsewhere with what its page names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.fakes import scripted_server as fake

PROTOS = Path(__file__).resolve().parents[2] / "protos"
PAGE = (PROTOS / "README.md").read_text()


def test_what_is_not_ours_is_named() -> None:
    imported = {
        path
        for proto in PROTOS.rglob("*.proto")
        for path in re.findall(r'^import "(.*)";', proto.read_text(), re.MULTILINE)
    }
    foreign = {path for path in imported if not path.startswith(("facelane/", "google/protobuf/"))}
    assert foreign
    assert all(path in PAGE for path in foreign)


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_the_page_s_program_for_node(tmp_path: Path) -> None:
    """Runs where NODE_PATH has its packages; elsewhere it is a program at least."""
    (script,) = re.findall(r"^```js\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    with fake.ScriptedServer() as server:
        script = script.replace('"127.0.0.1:50151"', json.dumps(server.target))
        (tmp_path / "page.js").write_text(script)
        words = ["node", str(tmp_path / "page.js")]
        done = subprocess.run(
            words, cwd=PROTOS.parent, capture_output=True, text=True, timeout=60, check=False
        )
    if "Cannot find module" in done.stderr:
        pytest.skip("no @grpc/grpc-js, @grpc/proto-loader, google-proto-files in NODE_PATH")
    assert done.stdout == "1.2.3\n", done.stderr
