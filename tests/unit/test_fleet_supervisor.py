"""The supervisor's rounds, over nodes in this process that do as they are told: what it remembers,
and what it does when it begins anew. No Ray, no processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from facelane_bridge.config import ConfigError
from facelane_bridge.hosting import CameraReport
from facelane_bridge.output import CameraTotals
from facelane_fleet.messages import EndedRun, Order, Report, ServerReport
from facelane_fleet.sightings import NodeInfo
from facelane_fleet.supervisor import CommandError, Supervisor

LEASE = 5.0


class FakeNode:
    """Takes orders at once; results come of every camera."""

    def __init__(self, name: str, number: int = 1) -> None:
        self.name = name
        self.incarnation = f"{name}-{number}"
        self.order: Order | None = None
        self.memo: bytes | None = None
        self.memo_revision = 0
        self.ended: list[EndedRun] = []
        self.runs: dict[str, int] = {}
        self.deaf = False
        self.speaks_otherwise = False
        self.digests: list[str] = []
        self.state = "SERVING"
        self.capacity_fps: float | None = None
        self.results_at = 100.0

    def tick(self, data: bytes) -> bytes:
        order = msgspec.json.decode(data, type=Order)
        if order.memo is not None and order.memo_revision >= self.memo_revision:
            self.memo, self.memo_revision = order.memo, order.memo_revision
        if self.order is not None and order.revision < self.order.revision:
            return self.told()
        self.order = order
        self.ended = [run for run in self.ended if run.number > order.taken]
        wanted = {one.camera.name: one.term for one in order.cameras}
        for camera, term in list(self.runs.items()):
            if wanted.get(camera) != term:
                self.end(camera)
        self.runs = wanted
        if order.servers.digest not in self.digests:
            if self.digests:
                self.state = "STARTING"
            self.digests.append(order.servers.digest)
        return self.told()

    def told(self) -> bytes:
        if self.speaks_otherwise:
            return b'{"of": "another version"}'
        return msgspec.json.encode(self.report())

    def end(self, camera: str) -> None:
        number = self.ended[-1].number + 1 if self.ended else 1 + self.base
        report = CameraReport(
            term=self.runs.pop(camera), totals=CameraTotals(frames=5, results=5), ended=True
        )
        self.ended.append(EndedRun(number=number, camera=camera, report=report))
        self.base = number

    base = 0

    def report(self) -> Report:
        assert self.order is not None
        self.results_at += 0.5
        return Report(
            incarnation=self.incarnation,
            version="",
            revision=self.order.revision,
            memo_revision=self.memo_revision,
            cameras=dict(self.runs),
            reports={
                name: CameraReport(
                    term=term,
                    totals=CameraTotals(frames=6, results=4, in_flight=2, state="STREAMING"),
                    first_result_at=self.results_at,
                    last_result_at=self.results_at,
                )
                for name, term in self.runs.items()
            },
            ended=list(self.ended),
            servers=[
                ServerReport(
                    slot=slot, state=self.state, target=f"unix:/{self.name}/{slot}",
                    digest=self.order.servers.digest, capacity_fps=self.capacity_fps,
                )
                for slot in range(self.order.servers.count)
            ],
            bridge="RUNNING",
        )  # fmt: skip


class FakeCluster:
    def __init__(self, *names: str) -> None:
        self.there = {name: FakeNode(name) for name in names}
        self.forgotten: list[str] = []

    def nodes(self) -> list[NodeInfo]:
        return [NodeInfo(id=name, name=name, address="192.0.2.1") for name in self.there]

    def exchange(self, orders: Mapping[str, bytes], seconds: float) -> dict[str, bytes]:
        return {
            name: self.there[name].tick(order)
            for name, order in orders.items()
            if name in self.there and not self.there[name].deaf
        }

    def recall(self, nodes: list[NodeInfo], seconds: float) -> dict[str, tuple[int, bytes | None]]:
        return {
            info.id: (self.there[info.id].memo_revision, self.there[info.id].memo)
            for info in nodes
            if not self.there[info.id].deaf
        }

    def forget(self, node: str) -> None:
        self.forgotten.append(node)

    def owners(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, node in self.there.items():
            for camera in node.runs:
                assert camera not in found, "two owners"
                found[camera] = name
        return found


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def document(cameras: int = 6, **fleet: object) -> dict[str, Any]:
    return {
        "fleet": {"lease": LEASE, "state_dir": "/state", **fleet},
        "camera": [{"name": f"cam-{n}", "source": "rtsp://192.0.2.9/1"} for n in range(cameras)],
    }


class Fleet:
    def __init__(self, *names: str, cameras: int = 6) -> None:
        self.clock = Clock()
        self.cluster = FakeCluster(*names)
        self.cameras = cameras
        self.begin()

    def begin(self) -> None:
        """Another supervisor, that knows what its arguments say."""
        self.supervisor = Supervisor(document(self.cameras), {}, self.cluster, self.clock)

    def rounds(self, count: int = 1, seconds: float = 0.5) -> None:
        for _ in range(count):
            self.supervisor.round()
            self.cluster.owners()
            self.clock.now += seconds


@pytest.fixture
def fleet() -> Fleet:
    made = Fleet("a", "b", "c")
    made.rounds(6)
    assert len(made.cluster.owners()) == 6
    return made


def test_a_lost_nodes_cameras_wait_for_its_lease_and_are_placed_then(fleet: Fleet) -> None:
    owners = fleet.cluster.owners()
    lost = {camera for camera, node in owners.items() if node == "a"}
    del fleet.cluster.there["a"]
    fleet.rounds(9)
    assert not lost & fleet.cluster.owners().keys()
    assert {n.name: n.state for n in fleet.supervisor.status().nodes}["a"] == "LOST"
    fleet.rounds(4)
    assert fleet.cluster.owners().keys() == owners.keys()
    assert fleet.cluster.forgotten == ["a"]
    status = fleet.supervisor.status()
    for camera in status.cameras:
        assert camera.balanced
        assert camera.lost_runs == (camera.name in lost)
        if camera.name in lost:
            assert camera.total.errors_by_reason == {"NODE_LOST": 2}
    assert [node.name for node in status.nodes] == ["b", "c"]


def test_a_node_that_is_silent_keeps_its_cameras_until_it_has_let_them_go(fleet: Fleet) -> None:
    fleet.cluster.there["a"].deaf = True
    mine = dict(fleet.cluster.there["a"].runs)
    fleet.rounds(100)
    assert fleet.cluster.there["a"].runs == mine
    assert {n.name: n.state for n in fleet.supervisor.status().nodes}["a"] == "SILENT"
    # It would wait for `silence` itself.
    fleet.cluster.there["a"].runs.clear()
    fleet.rounds(40)
    assert mine.keys() <= fleet.cluster.owners().keys()
    fleet.supervisor.drain("a", on=True)
    # It comes back, and tells of the runs that were closed for it: they are in the books.
    books = {camera.name: camera.total.frames for camera in fleet.supervisor.status().cameras}
    fleet.cluster.there["a"].runs = dict(mine)
    for camera in mine:
        fleet.cluster.there["a"].end(camera)
    fleet.cluster.there["a"].deaf = False
    fleet.rounds(4)
    assert not fleet.cluster.there["a"].ended
    now = {camera.name: camera.total.frames for camera in fleet.supervisor.status().cameras}
    assert {name: now[name] for name in mine} == {name: books[name] for name in mine}


def test_a_supervisor_that_begins_anew_goes_on_with_what_nodes_remember(fleet: Fleet) -> None:
    fleet.supervisor.drain("a", on=True)
    fleet.supervisor.move("cam-1", "b", anywhere=False)
    fleet.rounds(8)
    before, books = fleet.cluster.owners(), fleet.supervisor.status()
    orders = {name: node.order for name, node in fleet.cluster.there.items()}
    fleet.begin()
    fleet.cluster.there["c"].deaf = True
    fleet.rounds(3)
    assert not fleet.supervisor.status().recovered
    # Nothing is ordered before it knows.
    assert {name: node.order for name, node in fleet.cluster.there.items()} == orders
    fleet.cluster.there["c"].deaf = False
    fleet.rounds(4)
    assert fleet.cluster.owners() == before
    status = fleet.supervisor.status()
    assert [n.state for n in status.nodes] == ["DRAINING", "UP", "UP"]
    assert {c.name: c.runs for c in status.cameras} == {c.name: c.runs for c in books.cameras}
    assert {c.name: c.total for c in status.cameras} == {c.name: c.total for c in books.cameras}
    assert next(c for c in status.cameras if c.name == "cam-1").pinned == "b"


@pytest.mark.parametrize("what", ["the configuration", "all of it"])
def test_what_another_version_remembers_keeps_nobody_from_going_on(what: str, fleet: Fleet) -> None:
    fleet.supervisor.move("cam-1", "b", anywhere=False)
    for on in (True, False) * 10:
        fleet.supervisor.drain("c", on=on)
    fleet.rounds(8)
    before = fleet.cluster.owners()
    node = fleet.cluster.there["a"]
    assert node.order is not None
    revision = node.order.revision
    for one in fleet.cluster.there.values():
        assert one.memo is not None
        memo = msgspec.json.decode(one.memo)
        if what == "all of it":
            memo["books"] = "elsewhere"
        else:
            memo["document"]["fleet"]["of_before"] = 1
        one.memo = msgspec.json.encode(memo)
    fleet.begin()
    fleet.rounds(6)
    if what == "the configuration":
        assert fleet.cluster.owners() == before
        pinned = {one.name: one.pinned for one in fleet.supervisor.status().cameras}
        assert pinned["cam-1"] == "b", "what was said is remembered"
    fleet.supervisor.drain("a", on=True)
    fleet.rounds(12)
    assert fleet.cluster.owners().keys() == before.keys()
    assert not node.runs, "it obeys"
    assert node.order.revision > revision
    assert node.memo is not None
    assert "of_before" not in node.memo.decode()
    assert "elsewhere" not in node.memo.decode()


def test_a_node_that_is_not_understood_keeps_nobody_from_hearing_the_others(fleet: Fleet) -> None:
    fleet.rounds(4)
    fleet.cluster.there["a"].speaks_otherwise = True
    fleet.rounds(3)
    status = fleet.supervisor.status()
    assert [one.state for one in status.nodes] == ["SILENT", "UP", "UP"]
    assert sum("another version" in one for one in status.changes) == 1
    fleet.cluster.there["a"].speaks_otherwise = False
    fleet.rounds(1)
    assert {one.state for one in fleet.supervisor.status().nodes} == {"UP"}


def test_a_node_that_dies_while_nobody_supervises(fleet: Fleet) -> None:
    owners = fleet.cluster.owners()
    fleet.begin()
    del fleet.cluster.there["a"]
    fleet.rounds(9)
    assert len(fleet.cluster.owners()) == 4
    fleet.rounds(5)
    assert fleet.cluster.owners().keys() == owners.keys()


def test_what_a_server_says_in_a_moment_keeps_no_cameras_from_it(fleet: Fleet) -> None:
    """And then nothing more: it has little to do."""
    there = fleet.cluster.there
    there["a"].capacity_fps, there["c"].capacity_fps = 5.0, 50.0
    fleet.rounds(8)
    there["a"].capacity_fps = there["c"].capacity_fps = None
    fleet.supervisor.drain("b", on=True)
    fleet.rounds(20)
    assert Counter(fleet.cluster.owners().values()) == {"a": 3, "c": 3}
    fleet.supervisor.drain("b", on=False)
    fleet.rounds(20)
    assert Counter(fleet.cluster.owners().values()) == {"a": 2, "b": 2, "c": 2}


def test_what_servers_have_said_for_long_counts_for_the_next_supervisor_too() -> None:
    fleet = Fleet("big", "small", cameras=12)
    there = fleet.cluster.there
    there["big"].capacity_fps, there["small"].capacity_fps = 60.0, 12.0
    fleet.rounds(400)
    spread = Counter(fleet.cluster.owners().values())
    assert spread["big"] >= 9
    before = fleet.cluster.owners()
    fleet.begin()
    fleet.rounds(100)
    assert fleet.cluster.owners() == before
    assert fleet.supervisor.status().changes[-1].endswith("12 cameras have a place")
    # Of another process nothing is known.
    there["small"].capacity_fps = None
    there["small"].incarnation = "small-2"
    fleet.rounds(50)
    assert Counter(fleet.cluster.owners().values()) == {"big": 6, "small": 6}


def test_an_agent_that_begins_anew_gets_its_cameras_again(fleet: Fleet) -> None:
    mine = dict(fleet.cluster.there["a"].runs)
    memo = fleet.cluster.there["a"].memo_revision
    fleet.cluster.there["a"] = FakeNode("a", 2)
    fleet.rounds(2)
    assert fleet.cluster.there["a"].runs == mine
    assert fleet.cluster.there["a"].memo_revision >= memo
    status = fleet.supervisor.status()
    assert {c.lost_runs for c in status.cameras if c.name in mine} == {1}
    assert all(c.balanced for c in status.cameras)


def test_books_are_told_once(fleet: Fleet) -> None:
    fleet.supervisor.drain("a", on=True)
    fleet.rounds(10)
    assert not fleet.cluster.there["a"].ended
    moved = [c for c in fleet.supervisor.status().cameras if c.runs == 2]
    assert len(moved) == 2
    assert {c.total.frames for c in moved} == {11}


def test_another_configuration(fleet: Fleet) -> None:
    assert fleet.supervisor.apply(document(6), {}) == "unchanged"
    assert fleet.supervisor.apply(document(8), {}) == "changed"
    fleet.rounds(6)
    assert len(fleet.cluster.owners()) == 8
    assert fleet.supervisor.apply(document(2), {}) == "changed"
    fleet.rounds(6)
    assert set(fleet.cluster.owners()) == {"cam-0", "cam-1"}
    with pytest.raises(ConfigError, match="keeps its name"):
        fleet.supervisor.apply(document(2, name="other"), {})
    with pytest.raises(ConfigError):
        fleet.supervisor.apply({"flet": {}}, {})
    # A supervisor that begins anew knows the newest.
    fleet.begin()
    fleet.rounds(3)
    assert len(fleet.supervisor.status().cameras) == 2


def test_new_settings_of_servers_reach_one_node_after_the_other(fleet: Fleet) -> None:
    fleet.supervisor.apply(document(), {"log": {"level": "error"}})
    nodes = fleet.cluster.there
    for number in range(1, 4):
        fleet.rounds(3)
        assert (
            sorted(len(node.digests) for node in nodes.values())
            == [1] * (3 - number) + [2] * number
        )
        for node in nodes.values():
            node.state = "SERVING"


def test_orders_that_cannot_be_followed_say_what_can(fleet: Fleet) -> None:
    for refused, told in (
        (lambda: fleet.supervisor.drain("x", on=True), "a, b, c"),
        (lambda: fleet.supervisor.move("x", "", anywhere=False), "no camera"),
        (lambda: fleet.supervisor.move("cam-1", "x", anywhere=False), "a, b, c"),
    ):
        with pytest.raises(CommandError, match=told):
            refused()
    fleet.supervisor.drain("a", on=True)
    with pytest.raises(CommandError, match="--undo"):
        fleet.supervisor.move("cam-1", "a", anywhere=False)
    here = fleet.cluster.owners()["cam-2"]
    assert "moves to" in fleet.supervisor.move("cam-2", "", anywhere=False)
    fleet.rounds(10)
    assert fleet.cluster.owners()["cam-2"] != here
    assert "most room" in fleet.supervisor.move("cam-2", "", anywhere=True)


def test_what_is_said_before_it_knows_is_kept_or_refused_and_never_undone(fleet: Fleet) -> None:
    fleet.supervisor.drain("a", on=True)
    fleet.rounds(8)
    fleet.begin()
    fleet.cluster.there["c"].deaf = True
    fleet.rounds(2)
    for refused in (
        lambda: fleet.supervisor.drain("b", on=True),
        lambda: fleet.supervisor.move("cam-1", "c", anywhere=False),
    ):
        with pytest.raises(CommandError, match=r"\(c\): try again"):
            refused()
    assert fleet.supervisor.apply(document(4), {}) == "changed"
    with pytest.raises(ConfigError):
        fleet.supervisor.apply({"flet": {}}, {})
    fleet.cluster.there["c"].deaf = False
    fleet.rounds(8)
    # The newer configuration, over what nodes remember of all else.
    assert set(fleet.cluster.owners()) == {f"cam-{n}" for n in range(4)}
    assert [n.state for n in fleet.supervisor.status().nodes] == ["DRAINING", "UP", "UP"]


def test_a_move_to_where_no_room_is_says_so_and_happens_when_there_is() -> None:
    fleet = Fleet("a", "b", cameras=4)
    fleet.rounds(6)
    fleet.supervisor.apply(document(4, max_cameras=2), {})
    fleet.rounds(2)
    camera = next(c for c, node in fleet.cluster.owners().items() if node == "a")
    other = next(c for c, node in fleet.cluster.owners().items() if node == "b")
    assert "as soon as there is room" in fleet.supervisor.move(camera, "b", anywhere=False)
    fleet.rounds(6)
    assert fleet.cluster.owners()[camera] == "a"
    kept = [n for n in range(4) if f"cam-{n}" != other]
    smaller = document(4, max_cameras=2)
    smaller["camera"] = [smaller["camera"][n] for n in kept]
    fleet.supervisor.apply(smaller, {})
    fleet.rounds(8)
    assert fleet.cluster.owners()[camera] == "b"


def test_a_camera_is_not_moved_to_a_node_that_has_no_servers_unless_somebody_says_so() -> None:
    fleet = Fleet("a", "b", "yard")
    given = document(6)
    given["servers"] = {"listen": "0.0.0.0:50151"}
    given["node"] = [{"name": "yard", "servers": 0}]
    fleet.supervisor.apply(given, {})
    fleet.rounds(6)
    here = fleet.cluster.owners()["cam-0"]
    assert fleet.supervisor.move("cam-0", "", anywhere=False) == (
        f"cam-0 moves to {'b' if here == 'a' else 'a'}"
    )
    with pytest.raises(CommandError, match="no servers of its own"):
        fleet.supervisor.move("cam-0", "yard", anywhere=False)


def test_what_has_no_other_place_stays_and_status_says_so() -> None:
    fleet = Fleet("a")
    fleet.rounds(4)
    assert "stay on it" in fleet.supervisor.drain("a", on=True)
    fleet.rounds(4)
    status = fleet.supervisor.status()
    assert {c.state for c in status.cameras} == {"STREAMING"}
    assert {c.reason for c in status.cameras} == {"its node drains, and it has no other place yet"}


def test_without_a_home_folder_it_says_which_setting_to_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)
    made = Fleet("a")
    given = document()
    del given["fleet"]["state_dir"]
    with pytest.raises(ConfigError, match="state_dir"):
        made.supervisor.apply(given, {})
    assert made.supervisor.apply(document(), {})
