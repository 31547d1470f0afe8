"""A node of a fleet with real bridges and servers, as the supervisor would order them. No Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from bench.fleet_rig import NULL_SERVER, Cameras
from tests.fakes.cameras import jpeg
from tests.fakes.scripted_server import ScriptedServer
from tests.running_server import free_port
from tests.waiting import until

import facelane
from facelane_bridge.config import CameraSettings, ServerSettings
from facelane_bridge.hosting import HostedCamera
from facelane_fleet import node as node_module
from facelane_fleet.messages import Order, Report, ServersOrder
from facelane_fleet.node import Node

LEASE = 12.0
"""Longer than this machine may stand still: within it a bridge has to hear of its node."""


class Driven:
    """A node and whoever orders it about."""

    def __init__(self, folder: Path, target: str, cameras: Cameras) -> None:
        self.pulse_age = 0.0
        self.folder = folder
        self.target = target
        self.cameras = cameras
        self.revision = 0
        self.node = Node("test", "127.0.0.1", (), lambda: self.pulse_age)
        self.wanted: dict[str, int] = {}
        self.servers = 0
        self.server_config: dict[str, Any] = dict(NULL_SERVER)
        self.listen, self.digest, self.taken = "unix", "one", 0
        self.memo: bytes | None = None

    def order(self, **changed: object) -> Order:
        return msgspec.structs.replace(
            Order(
                revision=self.revision,
                cameras=tuple(
                    HostedCamera(
                        term=term,
                        camera=CameraSettings(name=name, source=self.cameras.url(name)),
                        server=ServerSettings(target=self.target, proxy=False),
                    )
                    for name, term in self.wanted.items()
                ),
                servers=ServersOrder(
                    count=self.servers,
                    config=self.server_config,
                    listen=self.listen,
                    metrics="",
                    state_dir=str(self.folder / "state"),
                    ask=msgspec.to_builtins(ServerSettings(target="unix:/", proxy=False)),
                    digest=self.digest,
                ),
                lease=LEASE,
                silence=600.0,
                taken=self.taken,
                memo=self.memo,
                memo_revision=self.revision,
            ),
            **changed,
        )

    def tick(self, **changed: object) -> Report:
        data = self.node.tick(msgspec.json.encode(self.order(**changed)))
        return msgspec.json.decode(data, type=Report)

    def want(self, **cameras: int) -> None:
        self.revision += 1
        self.wanted = cameras
        self.tick()

    def results(self, name: str, term: int) -> int:
        report = self.tick().reports.get(name)
        return report.totals.results if report is not None and report.term == term else 0


@pytest.fixture
def driven(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Driven]:
    # Paths of sockets are short.
    runtime = tmp_path_factory.mktemp("r")
    monkeypatch.setattr(node_module, "runtime_folder", lambda: runtime)
    with ScriptedServer() as server, Cameras(20.0, jpeg()) as cameras:
        made = Driven(tmp_path, server.target, cameras)
        try:
            yield made
        finally:
            made.node.close()
            assert not list(runtime.iterdir())


def bridges() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        try:
            if "facelane_bridge" in child.cmdline() and "host" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


def test_cameras_come_and_go_and_their_books_balance(driven: Driven) -> None:
    driven.want(a=1, b=2)
    until(lambda: min(driven.results(term=1, name="a"), driven.results(term=2, name="b")) > 2)
    assert driven.tick().cameras == {"a": 1, "b": 2}
    driven.want(b=2)
    until(lambda: driven.tick().cameras == {"b": 2})
    report = driven.tick()
    assert report.revision == driven.revision
    assert [(run.number, run.camera, run.report.term) for run in report.ended] == [(1, "a", 1)]
    totals = report.ended[0].report.totals
    assert totals.balanced
    assert totals.results > 2
    assert driven.cameras.readers("a") == 0
    # Told until it is taken over.
    driven.taken = 1
    driven.tick()
    assert not driven.tick().ended
    # Another term is another run.
    driven.want(b=3)
    until(lambda: driven.results(term=3, name="b"))
    assert driven.cameras.most_readers == {"a": 1, "b": 1}


@pytest.mark.slow
def test_an_order_of_before_is_not_followed(driven: Driven) -> None:
    driven.want(a=1)
    until(lambda: driven.results(term=1, name="a"))
    driven.tick(revision=driven.revision - 1, cameras=())
    ended = driven.results(term=1, name="a")
    until(lambda: driven.results(term=1, name="a") > ended)
    driven.memo = b"newest"
    driven.revision = 7
    driven.tick()
    driven.tick(memo=b"older", memo_revision=3)
    assert driven.node.recall() == (7, b"newest")


def test_a_bridge_that_dies_is_started_again_and_its_books_are_closed(driven: Driven) -> None:
    driven.want(a=1)
    until(lambda: driven.results(term=1, name="a"))
    (bridge,) = bridges()
    bridge.kill()
    until(lambda: driven.tick().ended)
    run = driven.tick().ended[0].report
    assert run.totals.balanced
    assert run.totals.reason == "BRIDGE_LOST"
    until(lambda: driven.results(term=1, name="a"))
    assert driven.tick().bridge_restarts == 1
    assert driven.cameras.most_readers == {"a": 1}


def test_a_node_that_the_cluster_has_given_up_lets_its_cameras_go(driven: Driven) -> None:
    driven.want(a=1)
    until(lambda: driven.results(term=1, name="a"))
    driven.pulse_age = 60.0
    until(lambda: not driven.cameras.readers("a"))
    until(lambda: not driven.tick().cameras)
    driven.pulse_age = 0.0
    until(lambda: driven.results(term=1, name="a"))


@pytest.mark.slow
def test_a_node_has_as_many_bridges_as_its_cameras_take(driven: Driven) -> None:
    names = ("a", "b", "c")

    def tick() -> Report:
        return driven.tick(cameras_per_bridge=2)

    def settled(**cameras: int) -> bool:
        reports = tick().reports
        return all(n in reports and reports[n].totals.results for n in cameras)

    driven.revision, driven.wanted = 1, dict.fromkeys(names, 1)
    until(lambda: settled(a=1, b=1, c=1))
    assert tick().bridges == len(bridges()) == 2
    # One is lost: its cameras alone begin anew.
    before = tick().reports
    bridges()[0].kill()
    until(lambda: tick().ended)
    lost = {run.camera for run in tick().ended}
    assert 1 <= len(lost) < 3
    until(lambda: settled(a=1, b=1, c=1))
    now = tick().reports
    for name in set(names) - lost:
        assert now[name].first_result_at == before[name].first_result_at
    driven.revision, driven.wanted = 2, {"a": 1}
    until(lambda: tick().cameras == {"a": 1})
    assert set(driven.cameras.most_readers.values()) == {1}
    driven.revision, driven.wanted = 3, {}
    until(lambda: not tick().cameras)
    until(lambda: tick().bridges == len(bridges()) == 1)


@pytest.mark.slow
def test_a_bridge_lets_go_when_its_node_hangs(driven: Driven) -> None:
    """Its host is silent: it does not wait to be told."""
    driven.want(a=1)
    until(lambda: driven.results(term=1, name="a"))
    driven.node._step = lambda: None  # type: ignore[method-assign]
    until(lambda: not driven.cameras.readers("a"))


@pytest.mark.slow
def test_another_process_of_a_node_waits_until_the_first_has_gone(driven: Driven) -> None:
    driven.want(a=1)
    until(lambda: driven.results(term=1, name="a"))
    second = Node("test", "127.0.0.1", (), lambda: 0.0)
    try:
        order = msgspec.json.encode(driven.order())
        for _ in range(3):
            report = msgspec.json.decode(second.tick(order), type=Report)
            assert report.bridge == "LOCKED"
            assert not report.cameras
    finally:
        second._closing.set()
        second._thread.join(30)
    assert driven.results(term=1, name="a")


NODE = """
import sys, time
from pathlib import Path
from facelane_fleet import node as node_module
from facelane_fleet.node import Node
node_module.runtime_folder = lambda: Path(sys.argv[1])
node = Node("child", "127.0.0.1", (), lambda: 0.0)
for line in sys.stdin:
    node.tick(line.encode())
"""


@pytest.mark.slow
def test_whatever_a_node_has_started_ends_with_it(
    driven: Driven, tmp_path_factory: pytest.TempPathFactory
) -> None:
    driven.revision, driven.wanted, driven.servers = 1, {"a": 1}, 1
    runtime = tmp_path_factory.mktemp("c")
    with subprocess.Popen(
        [sys.executable, "-c", NODE, str(runtime)], stdin=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(driven.order()) + b"\n")
        process.stdin.flush()
        until(lambda: driven.cameras.readers("a") == 1)
        started = psutil.Process(process.pid).children(recursive=True)
        until(lambda: len(psutil.Process(process.pid).children()) == 2)
        process.kill()
        until(lambda: not any(one.is_running() for one in started))
    assert driven.cameras.readers("a") == 0


@pytest.mark.slow
def test_servers_of_a_node_share_a_gallery_and_are_started_again(driven: Driven) -> None:
    driven.servers = 2
    driven.revision = 1
    until(lambda: [one.state for one in driven.tick().servers] == ["SERVING"] * 2)
    first, second = driven.tick().servers
    with facelane.Client(first.target) as one, facelane.Client(second.target) as two:
        one.enroll("grace", facelane.Picture.encoded(jpeg(7, 640, 480)))
        until(lambda: [subject.subject_id for subject in two.list_subjects()] == ["grace"])
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: driven.tick().servers[0].restarts == 1)
    until(lambda: [one.state for one in driven.tick().servers] == ["SERVING"] * 2)
    # Other settings: other servers.
    pids = {one.pid for one in driven.tick().servers}
    driven.listen, driven.digest = f"127.0.0.1:{free_port()}", "two"
    driven.server_config = {**NULL_SERVER, "auth": {"mode": "none"}}
    until(
        lambda: (
            [one.state for one in driven.tick().servers] == ["SERVING"] * 2
            and {one.digest for one in driven.tick().servers} == {"two"}
        )
    )
    report = driven.tick()
    assert not pids & {one.pid for one in report.servers}
    with facelane.Client(report.servers[1].target) as client:
        assert [subject.subject_id for subject in client.list_subjects()] == ["grace"]
