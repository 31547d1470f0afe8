"""A proxy of the environment never stands between a client and its own machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from facelane.transport import endpoint
from tests.fakes import scripted_server as fake
from tests.fakes.collector import Collector
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


TRACES = """
import sys
from pathlib import Path
import facelane.tracing
from facelane_server import sampling, traces

tracing = facelane.tracing.Tracing.to(sys.argv[1], ratio=1, service="client")
with tracing._tracer.start_as_current_span("of a client"):
    pass
tracing.close()
server = traces._provider(sampling.Tracing(endpoint=sys.argv[1]))
with server.get_tracer("t").start_as_current_span("of a server"):
    pass
server.shutdown()
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_traces_for_a_collector_beside_it(host: str) -> None:
    environment = {"https_proxy": f"http://127.0.0.1:{free_port()}"}
    with Collector() as collector:
        endpoint = collector.endpoint.replace("127.0.0.1", host)
        done = subprocess.run(
            [sys.executable, "-c", TRACES, endpoint],
            env=environment, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert {span.name for span in collector.spans()} == {"of a client", "of a server"}


@pytest.mark.parametrize(
    ("target", "exempt"),
    [
        ("cameras.example:443", "*"),
        ("cameras.example:443", "x, *.example"),
        ("cameras.example:443", ".example"),
        ("cameras.example:443", "cameras.example:443"),
        ("10.1.2.3:443", "10.0.0.0/8"),
        ("[fd00::1]:443", "fd00::/8"),
        ("dns:///cameras.example:443", "a.example cameras.example"),
    ],
)
@pytest.mark.parametrize("variable", ["no_proxy", "NO_PROXY"])
def test_exemptions_as_curl_takes_them(
    target: str, exempt: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert endpoint(target, None, None).proxy == "https_proxy"
    monkeypatch.setenv(variable, exempt)
    made = endpoint(target, None, None)
    assert made.proxy == ""
    assert ("grpc.enable_http_proxy", 0) in made.options
    assert endpoint("other.test:443", None, None).proxy == ("" if exempt == "*" else "https_proxy")


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
