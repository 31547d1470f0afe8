"""A proxy of the environment never stands between a client and its own machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import scripted_server as fake
from tests.running_server import free_port

PROGRAM = """
import sys, asyncio, facelane
picture = facelane.Picture.encoded(b"\\xff\\xd8\\xff\\xe0" + bytes(60))
async def main(target):
    async with facelane.aio.Client(target, timeout=30) as client:
        assert await client.health() == "SERVING"
for target in sys.argv[1:]:
    with facelane.Client(target, timeout=30) as client:
        assert client.health() == "SERVING"
        assert len(list(client.analyze([picture]))) == 1
    asyncio.run(main(target))
"""


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_loopback_and_unix(variable: str, tmp_path: Path) -> None:
    environment = {variable: f"http://127.0.0.1:{free_port()}"}
    with (
        fake.ScriptedServer() as server,
        fake.ScriptedServer(address=f"unix:{tmp_path}/s.sock") as beside,
    ):
        named = server.target.replace("127.0.0.1", "localhost")
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, server.target, named, beside.target],
            env=environment, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_the_command_passes_a_proxy_by_and_says_where_one_is() -> None:
    """A name that this machine alone resolves to itself is another machine to gRPC."""
    proxy = {"https_proxy": f"http://user:s3cret@127.0.0.1:{free_port()}"}

    def health(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-m", "facelane.cli", "--timeout", "20", "--target", "192.0.2.1:9"]
        return subprocess.run(
            [*start, *words, "server", "health"],
            env=environment, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip

    by = health(**proxy)
    assert by.returncode == 4
    assert "https_proxy names" in by.stderr
    assert "--no-proxy" in by.stderr
    assert "s3cret" not in by.stderr
    past = health("--no-proxy", "--timeout", "0.5", **proxy)
    assert past.returncode == 4
    assert "proxy" not in past.stderr
