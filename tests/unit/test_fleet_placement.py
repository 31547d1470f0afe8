"""Where cameras go: the pure core, in a world of nodes that are slow, deaf and mortal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facelane_fleet.placement import (
    Capacity,
    Held,
    NodeSeen,
    Policy,
    ServerSeen,
    State,
    Why,
    Wish,
    orders,
    plan,
)


@dataclass
class Node:
    """A node as it is: what its bridge reads, and for how many rounds that is still to last."""

    id: str
    servers: int = 1
    capacity: float | None = None
    sure: float = 1.0
    usable: bool = True
    bridges: bool = True
    revision: int = 0
    wanted: frozenset[str] = frozenset()
    running: dict[str, int] = field(default_factory=dict)
    """Cameras, and the rounds that letting go of them takes (once they are not wanted)."""
    alive: bool = True
    deaf: int = 0
    """Rounds in which it hears nothing and nobody hears it, while its bridge goes on."""

    def step(self, slow: int) -> None:
        for camera in list(self.running):
            if camera in self.wanted:
                self.running[camera] = slow
            elif self.running[camera] == 0:
                del self.running[camera]
            else:
                self.running[camera] -= 1
        for camera in self.wanted:
            self.running.setdefault(camera, slow)

    def seen(self) -> NodeSeen:
        return NodeSeen(
            id=self.id,
            name=self.id,
            answered=not self.deaf,
            revision=self.revision,
            cameras=frozenset(self.running) | self.wanted,
            servers=tuple(
                ServerSeen(
                    id=f"{self.id}/{slot}",
                    usable=self.usable,
                    capacity=self.capacity and Capacity(fps=self.capacity, sure=self.sure),
                )
                for slot in range(self.servers)
            ),
            bridges=self.bridges,
        )


class World:
    """Nodes, and a supervisor that remembers its state and nothing else."""

    def __init__(self, cameras: Iterable[Wish | str], policy: Policy | None = None) -> None:
        self.wishes = [Wish(name=one) if isinstance(one, str) else one for one in cameras]
        self.policy = policy or Policy()
        self.state = State()
        self.nodes: dict[str, Node] = {}
        self.gone: set[str] = set()
        self.unplaced: dict[str, Why] = {}
        self.slow = 0
        self.moves: Counter[str] = Counter()

    def add(self, *names: str, **facts: object) -> None:
        for name in names:
            self.nodes[name] = Node(name, **facts)  # type: ignore[arg-type]

    def kill(self, name: str) -> None:
        """It ends at once; the supervisor is told a round later."""
        node = self.nodes[name]
        node.alive = False
        node.running.clear()
        node.wanted = frozenset()

    def drain(self, *names: str) -> None:
        self.state = msgspec.structs.replace(
            self.state, draining=frozenset(names), revision=self.state.revision + 1
        )

    def pin(self, **pins: str) -> None:
        self.state = msgspec.structs.replace(
            self.state, pins=pins, revision=self.state.revision + 1
        )

    def round(self) -> None:
        before = self.state
        seen = [node.seen() for node in self.nodes.values() if node.alive]
        done = plan(self.state, self.wishes, seen, gone=self.gone, policy=self.policy)
        self.state, self.unplaced = done.state, done.unplaced
        left = [change.why for change in done.changes if change.what == "leaves"]
        if left and not set(left) & {"its server is away", "removed"}:
            # Others think it better: a few at a time.
            leaving = sum(held.leaving for held in self.state.held.values())
            assert leaving <= self.policy.moves, left
        for camera, held in self.state.held.items():
            old = before.held.get(camera)
            self.moves[camera] += old is not None and held.leaving and not old.leaving
        for name in self.gone:
            self.nodes.pop(name, None)
        self.gone = {name for name, node in self.nodes.items() if not node.alive}
        for node in self.nodes.values():
            if not node.alive:
                continue
            if node.deaf:
                node.deaf -= 1
            elif node.revision <= self.state.revision:
                node.revision = self.state.revision
                node.wanted = frozenset(orders(self.state, node.id))
            node.step(self.slow)
        self.check()

    def check(self) -> None:
        owners = Counter(camera for node in self.nodes.values() for camera in node.running)
        assert not [camera for camera, count in owners.items() if count > 1], owners
        assert not set(self.unplaced) & set(self.state.held)

    def settle(self, rounds: int = 200) -> None:
        """Until nothing changes any more."""
        for _ in range(rounds):
            before, deaf = self.state, any(node.deaf for node in self.nodes.values())
            self.round()
            quiet = (
                self.state is before
                and not self.gone
                and not any(held.leaving for held in self.state.held.values())
            )
            quiet = quiet and all(
                node.wanted == node.running.keys() for node in self.nodes.values()
            )
            if quiet and not deaf:
                return
        raise AssertionError(f"it never comes to rest: {self.spread()}")

    def spread(self) -> dict[str, int]:
        counts = Counter(held.server.partition("/")[0] for held in self.state.held.values())
        return {name: counts[name] for name in self.nodes}

    def at(self, camera: str) -> str:
        return self.state.held[camera].node


def cameras(count: int) -> list[str]:
    return [f"cam-{number:03d}" for number in range(count)]


def settled(count: int, *nodes: str, **facts: object) -> World:
    world = World(cameras(count))
    world.add(*nodes, **facts)
    world.settle()
    assert len(world.state.held) == count
    world.moves.clear()
    return world


def test_cameras_are_spread_evenly_and_then_left_alone() -> None:
    world = settled(25, "a", "b", "c")
    assert sorted(world.spread().values()) == [8, 8, 9]
    before = world.state
    world.round()
    assert world.state is before


@given(st.integers(0, 60), st.integers(1, 6), st.integers(1, 6))
def test_a_node_that_comes_costs_no_more_moves_than_it_takes_cameras(
    count: int, there: int, moves: int
) -> None:
    names = [f"n{number}" for number in range(there)]
    world = World(cameras(count), Policy(moves=moves))
    world.add(*names)
    world.settle()
    world.moves.clear()
    stays = {camera: world.at(camera) for camera in cameras(count)}
    world.add("new")
    world.settle()
    counts = world.spread().values()
    assert max(counts) - min(counts) <= 1
    moved = {camera for camera in cameras(count) if world.at(camera) != stays[camera]}
    assert {world.at(camera) for camera in moved} <= {"new"}
    assert world.moves.total() == len(moved) == world.spread()["new"]


@given(st.integers(0, 60), st.integers(2, 5), st.integers(0, 4))
def test_draining_moves_everything_off_and_nobody_else(count: int, there: int, slow: int) -> None:
    names = [f"n{number}" for number in range(there)]
    world = settled(count, *names)
    world.slow = slow
    stays = {camera: world.at(camera) for camera in cameras(count)}
    world.drain("n0")
    world.settle()
    assert world.spread()["n0"] == 0
    assert not world.nodes["n0"].running
    assert all(world.at(camera) == node for camera, node in stays.items() if node != "n0")
    assert len(world.state.held) == count
    world.drain()
    world.settle()
    counts = world.spread().values()
    assert max(counts) - min(counts) <= 1


def test_a_drained_node_that_is_the_only_one_keeps_its_cameras() -> None:
    world = settled(4, "a")
    world.drain("a")
    world.settle()
    assert world.spread() == {"a": 4}
    world.add("b")
    world.settle()
    assert world.spread() == {"a": 0, "b": 4}


@pytest.mark.parametrize("slow", [0, 3])
def test_what_is_under_way_to_a_node_that_is_drained_too_stays_where_it_was(slow: int) -> None:
    world = settled(9, "a", "b")
    world.slow = slow
    at = {camera: world.at(camera) for camera in cameras(9)}
    world.drain("a")
    world.round()
    assert any(held.leaving for held in world.state.held.values())
    world.drain("a", "b")
    world.settle()
    assert {camera: world.at(camera) for camera in cameras(9)} == at
    assert not world.unplaced
    # So is what it was to go to, if that is lost.
    world.drain("a")
    world.round()
    world.kill("b")
    world.settle()
    assert all(world.at(c) == "a" for c in cameras(9) if at[c] == "a")


@given(st.integers(1, 60), st.integers(2, 5))
def test_those_of_a_lost_node_are_placed_in_the_next_round_and_others_stay(
    count: int, there: int
) -> None:
    world = settled(count, *(f"n{number}" for number in range(there)))
    stays = {camera: world.at(camera) for camera in cameras(count)}
    world.kill("n0")
    world.round()  # it is seen
    world.round()
    assert len(world.state.held) == count
    assert all(world.at(c) == node for c, node in stays.items() if node != "n0")
    world.settle()
    assert world.moves.total() == 0


def test_what_is_full_is_full() -> None:
    world = World(cameras(10), Policy(per_server=3))
    world.add("a", "b")
    world.settle()
    assert world.spread() == {"a": 3, "b": 3}
    assert set(world.unplaced.values()) == {Why.NO_ROOM}
    assert len(world.unplaced) == 4
    world.add("c", servers=2)
    world.settle()
    assert not world.unplaced
    assert len(world.state.held) == 10


def test_only_so_many_are_placed_in_a_round() -> None:
    world = World(cameras(10), Policy(placements=4))
    world.add("a")
    world.round()
    assert len(world.state.held) == 4
    assert set(world.unplaced.values()) == {Why.PENDING}


def test_without_servers_or_nodes_that_reach_it_a_camera_waits_and_says_why() -> None:
    world = World([Wish(name="yard", nodes=("yard-*",)), "door"])
    world.round()
    assert world.unplaced == {"yard": Why.NO_SERVER, "door": Why.NO_SERVER}
    world.add("hall", usable=False)
    world.round()
    assert world.unplaced == {"yard": Why.NO_SERVER, "door": Why.NO_SERVER}
    world.nodes["hall"].usable = True
    world.settle()
    assert world.unplaced == {"yard": Why.NO_NODE}
    world.add("yard-1", servers=0)
    world.settle()
    # Read there, for a server elsewhere.
    held = world.state.held["yard"]
    assert (held.node, held.server) == ("yard-1", "hall/0")


def test_a_reader_with_a_server_of_its_own_is_preferred() -> None:
    world = World([Wish(name="yard", nodes=("yard-*",))])
    world.add("hall", "yard-1")
    world.settle()
    assert world.state.held["yard"].server == "yard-1/0"
    # Where it may be read changes.
    world.wishes = [Wish(name="yard", nodes=("hall",))]
    world.settle()
    assert world.at("yard") == "hall"


def test_capacity_counts() -> None:
    world = World(cameras(60), Policy(moves=8))
    world.add("big", capacity=400.0)
    world.add("small", capacity=100.0)
    world.settle()
    spread = world.spread()
    assert spread["big"] == pytest.approx(48, abs=5)
    # Learnt anew, a little otherwise: nothing moves.
    world.moves.clear()
    world.nodes["small"].capacity = 104.0
    world.settle()
    assert world.moves.total() == 0


@given(st.lists(st.floats(61.0, 99.0), min_size=2, max_size=5))
def test_servers_that_are_nearly_alike_are_alike(capacities: list[float]) -> None:
    world = World(cameras(30), Policy(moves=8))
    for number, capacity in enumerate(capacities):
        world.add(f"n{number}", capacity=capacity)
    world.settle()
    assert max(world.spread().values()) - min(world.spread().values()) <= 1


@given(
    st.lists(st.none() | st.lists(st.floats(8.0, 80.0), min_size=1, max_size=20), min_size=2),
    st.data(),
)
def test_what_servers_say_in_a_moment_does_not_stand(
    words: list[list[float] | None], data: st.DataObject
) -> None:
    """Their machine had other work as well, and they say nothing more while they have little to
    do."""
    world = World(cameras(24), Policy(moves=8))
    for number, said in enumerate(words):
        learnt = Capacity()
        for fps in said or ():
            learnt = learnt.heard(fps)
        world.add(f"n{number}", capacity=learnt.fps or None, sure=learnt.sure)
    world.settle()
    assert max(world.spread().values()) - min(world.spread().values()) <= 1
    drained = data.draw(st.sampled_from(sorted(world.nodes)))
    world.drain(drained)
    world.settle()
    assert world.spread()[drained] == 0
    world.drain()
    world.settle()
    assert max(world.spread().values()) - min(world.spread().values()) <= 1


def test_the_more_a_server_differs_the_fewer_words_it_takes() -> None:
    def words(fps: float) -> int:
        """Until it is given fewer."""
        learnt, number = Capacity(), 0
        spread = {"small": 10}
        while spread["small"] == 10:
            learnt, number = learnt.heard(fps), number + 1
            world = World(cameras(20), Policy(moves=8))
            world.add("big", capacity=400.0)
            world.add("small", capacity=learnt.fps, sure=learnt.sure)
            world.settle()
            spread = world.spread()
        return number

    assert 5 < words(10.0) < words(100.0) < words(200.0) < 120


def test_a_server_without_room_is_taken_last() -> None:
    state, wishes = State(), [Wish(name=name) for name in cameras(4)]
    seen = [
        NodeSeen(id=name, name=name, servers=(ServerSeen(id=f"{name}/0", usable=True, room=room),))
        for name, room in (("full", 0), ("free", 3))
    ]
    done = plan(state, wishes, seen)
    assert Counter(held.node for held in done.state.held.values()) == {"free": 3, "full": 1}


def test_a_camera_is_moved_and_stays_where_it_was_moved_to() -> None:
    world = settled(9, "a", "b", "c")
    camera = next(c for c in cameras(9) if world.at(c) == "a")
    world.pin(**{camera: "b"})
    world.settle()
    assert world.at(camera) == "b"
    world.kill("b")
    world.settle()
    assert world.at(camera) != "b"
    world.add("b")
    world.settle()
    assert world.at(camera) == "b"


def test_a_server_that_is_away_loses_its_cameras_to_others() -> None:
    world = settled(20, "a", "b")
    world.nodes["a"].usable = False
    world.settle()
    assert world.spread() == {"a": 0, "b": 20}
    world.nodes["a"].usable = True
    world.settle()
    assert world.spread() == {"a": 10, "b": 10}


def test_a_camera_that_is_no_longer_wanted_ends() -> None:
    world = settled(6, "a", "b")
    world.wishes = world.wishes[:2]
    world.settle()
    assert set(world.state.held) == set(cameras(2))
    assert {c for node in world.nodes.values() for c in node.running} == set(cameras(2))


def test_new_cameras_wait_for_servers_that_are_starting_and_lost_ones_do_not() -> None:
    wishes = [Wish(name=name) for name in cameras(9)]

    def seen(*starting: bool) -> list[NodeSeen]:
        return [
            NodeSeen(
                id=f"n{number}", name=f"n{number}",
                servers=(ServerSeen(id=f"n{number}/0", usable=not one, starting=one),),
            )
            for number, one in enumerate(starting)
        ]  # fmt: skip

    done = plan(State(), wishes, seen(False, True, True))
    assert len(done.state.held) == 3
    assert set(done.unplaced.values()) == {Why.PENDING}
    full = plan(done.state, wishes, seen(False, False, False)).state
    assert Counter(held.node for held in full.held.values()) == {"n0": 3, "n1": 3, "n2": 3}
    lost = plan(full, wishes, seen(False, True, True)[:2], gone={"n2"})
    assert not lost.unplaced


def test_nothing_is_taken_for_let_go_before_the_node_has_heard_that_it_should() -> None:
    held = Held(node="a", server="a/0", term=1, since=5, leaving=True, to="b/0")
    state = State(revision=5, term=1, held={"cam": held})
    both = [
        NodeSeen(id=name, name=name, revision=4, servers=(ServerSeen(id=f"{name}/0", usable=True),))
        for name in ("a", "b")
    ]
    # Its report is older than the order: that the camera is not in it says nothing.
    assert plan(state, [Wish(name="cam")], both).state.held["cam"].leaving
    heard = [msgspec.structs.replace(one, revision=5) for one in both]
    assert plan(state, [Wish(name="cam")], heard).state.held["cam"].node == "b"
    still = [msgspec.structs.replace(heard[0], cameras=frozenset({"cam"})), heard[1]]
    assert plan(state, [Wish(name="cam")], still).state.held["cam"].leaving


Fault = Callable[[World], None]
_NODES = ("n0", "n1", "n2", "n3")


@st.composite
def faults(draw: st.DrawFn) -> Fault:
    name = draw(st.sampled_from(_NODES))
    rounds = draw(st.integers(1, 5))
    kind = draw(st.sampled_from(("kill", "deaf", "ill", "well", "drain", "undrain", "pin", "slow")))

    def happen(world: World) -> None:
        node = world.nodes.get(name)
        match kind:
            case "kill" if node is not None and node.alive:
                world.kill(name)
            case "kill" if node is None:
                world.add(name)
            case "deaf" if node is not None:
                node.deaf = rounds
            case "ill" | "well" if node is not None:
                node.usable = kind == "well"
            case "drain":
                world.drain(*world.state.draining, name)
            case "undrain":
                world.drain()
            case "pin":
                world.pin(**{cameras(rounds)[-1]: name})
            case "slow":
                world.slow = rounds

    return happen


@settings(max_examples=150)
@given(st.integers(1, 20), st.lists(st.one_of(st.none(), faults()), max_size=40))
def test_whatever_happens_no_camera_has_two_owners_and_in_the_end_each_has_one(
    count: int, story: list[Fault | None]
) -> None:
    world = World(cameras(count), Policy(moves=3))
    world.add(*_NODES)
    for fault in story:
        if fault is not None:
            fault(world)
        world.round()
    world.drain()
    for node in world.nodes.values():
        node.usable = True
    world.add("last")
    world.settle()
    assert set(world.state.held) == set(cameras(count))
    running = Counter(c for node in world.nodes.values() for c in node.running)
    assert running == Counter(dict.fromkeys(cameras(count), 1))
    free = [name for name in world.nodes if name not in world.state.pins.values()]
    counts = [world.spread()[name] for name in free]
    assert max(counts) - min(counts) <= 1 or len(world.state.pins) > 1
