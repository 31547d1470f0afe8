"""Servers for the end-to-end tests. With null models one costs about a second of a processor."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from tests.e2e import wire
from tests.measuring import processes_traced
from tests.running_server import RunningServer, toml

import facelane

Start = Callable[..., RunningServer]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with null models for tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("server")
    with ExitStack() as stack:
        with processes_traced():
            made = stack.enter_context(RunningServer(folder, toml(folder)))
            made.wait_serving()
        yield made


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts servers that the test may hurt; ends them."""
    with ExitStack() as stack:

        def begin(
            pools: str = "",
            extra: str = "",
            listen: str = "",
            *,
            edit: Callable[[str], str] = str,
            wait: bool = True,
            forked: bool = True,
        ) -> RunningServer:
            folder = tmp_path_factory.mktemp("own")
            text = toml(folder, pools or wire.pools(), extra, listen)
            made = RunningServer(folder, edit(text), forked=forked)
            stack.push(made)
            if wait:
                made.wait_serving()
            return made

        yield begin


@pytest.fixture
def client(server: RunningServer) -> Iterator[facelane.Client]:
    with server.client() as made:
        yield made


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with wire.channel(server.target) as made:
        yield made


def attach(path: Path, log: Path) -> subprocess.Popen[bytes]:
    """Starts a worker as a systemd unit or a container would."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "facelane_server.worker", "--attach", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


# What threads do is what most tests' servers do (``THREAD_POOLS``).
@pytest.fixture(
    scope="module", params=["process", pytest.param("thread", marks=pytest.mark.slow), "external"]
)
def hosted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server for each way to host workers that needs no GPU."""
    folder = tmp_path_factory.mktemp(request.param)
    pools = wire.pools(every=f'isolation = "{request.param}"')
    # Two for each pool: when the model is reloaded one leaves, and the other, which waited
    # as a spare, takes its place.
    stages = ("detector", "recognizer", "liveness") * 2 if request.param == "external" else ()
    with RunningServer(folder, toml(folder, pools)) as made:
        workers = [attach(folder / "run" / f"{s}.sock", folder / "worker.log") for s in stages]
        try:
            made.wait_serving()
            yield made
            made.stop()
            # They were told to leave; nobody had to kill them.
            assert [worker.wait(30) for worker in workers] == [0] * len(workers)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                worker.wait(30)
