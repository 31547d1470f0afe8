"""Which camera is where: pure. State and what was seen of the nodes, to the next state.

A camera is *held* by one node, whose bridge reads it, for one server, on the same node where that
can be. Nodes are told the whole set that they hold, so an order that is lost is in the next one.

No camera has two owners. It is given to another node only when the one that held it has said that
it has it no more (after it was told so: ``revision``), or is *gone*: the caller says so once that
node's bridge cannot run any more. Every time a camera is given out has a number, its ``term``.

Places go by load: a server's cameras over what it can carry, of which servers tell. What has lost
its place is placed at once; what could merely stand better is moved a few at a time, and only where
that makes the fullest less full.
"""

from __future__ import annotations

import enum
import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

import msgspec

ALIKE: Final = 0.6
"""A server that can carry so much of what the largest can is taken for as large."""
SLACK: Final = 0.25
"""Servers of unlike capacity are even enough within this."""
SMOOTHING: Final = 0.01
"""What one round's word on a server's capacity counts: a minute's together."""


class Struct(msgspec.Struct, frozen=True, kw_only=True):
    pass


class Wish(Struct, frozen=True):
    """A camera as placement sees it. ``nodes``: names or patterns of those that can reach it;
    empty = all."""

    name: str
    nodes: tuple[str, ...] = ()


class Capacity(Struct, frozen=True):
    """What a server can carry by its own words: ``fps``, pictures a second in time, smoothed.
    ``sure``: how much of a minute's words that is, 0-1. While it has little to do it says nothing,
    so one word of a moment in which its machine had other work would stand for as long."""

    fps: float = 0.0
    sure: float = 0.0

    def heard(self, fps: float) -> Capacity:
        """With one word more; the first ones are a plain mean."""
        sure = self.sure + SMOOTHING * (1.0 - self.sure)
        return Capacity(fps=self.fps + SMOOTHING / sure * (fps - self.fps), sure=sure)


class ServerSeen(Struct, frozen=True):
    """A server. ``usable``: it serves, or has not been away for long. ``starting``: it will soon,
    so that new cameras may wait for it. ``capacity``: ``None`` until it has told of it. ``room``:
    cameras more that it says would fit."""

    id: str
    usable: bool
    starting: bool = False
    capacity: Capacity | None = None
    room: int | None = None


class NodeSeen(Struct, frozen=True):
    """A node that is there. ``answered``: it told how it fares in this round, as of the orders of
    ``revision``, and reads ``cameras``, those among them that it is letting go."""

    id: str
    name: str
    answered: bool = True
    revision: int = 0
    cameras: frozenset[str] = frozenset()
    servers: tuple[ServerSeen, ...] = ()
    bridges: bool = True


class Held(Struct, frozen=True):
    """Who has a camera. ``since``: the revision in which it came, or was told to go. ``to``: the
    server that it goes to."""

    node: str
    server: str
    term: int
    since: int
    leaving: bool = False
    to: str = ""


class State(Struct, frozen=True):
    """All that must outlive the supervisor."""

    revision: int = 0
    term: int = 0
    held: dict[str, Held] = {}
    draining: frozenset[str] = frozenset()
    """Names of nodes."""
    pins: dict[str, str] = {}
    """Cameras, and the name of the node that somebody chose for them."""
    seen: frozenset[str] = frozenset()
    """Cameras that have had a place: these are not kept waiting for a better one."""


class Policy(Struct, frozen=True):
    """``moves``: cameras that are under way at one time because others think it better.
    ``placements``: those placed in a round. ``per_server``: the most that a server is given."""

    moves: int = 4
    placements: int = 64
    per_server: int = 64


class Why(enum.StrEnum):
    """Why a camera has no place."""

    NO_SERVER = "NO_SERVER"
    NO_NODE = "NO_NODE"
    NO_ROOM = "NO_ROOM"
    PENDING = "PENDING"


WHAT_TO_DO: Final = {
    Why.NO_SERVER: "no server is ready: look at the servers below, or add a node",
    Why.NO_NODE: "no node that may read it is there: start one, or change its `nodes`",
    Why.NO_ROOM: "every server has as many cameras as it may: add a node, or raise max_cameras",
    Why.PENDING: "placed with one of the next rounds",
}


@dataclass(frozen=True, slots=True)
class Change:
    """What a round did with a camera, for the log."""

    camera: str
    what: str
    """``placed``, ``leaves``, ``released``, ``lost``."""
    node: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """The next state, what changed, and why cameras have no place."""

    state: State
    changes: tuple[Change, ...]
    unplaced: dict[str, Why]


class _Round:
    """One step, on copies."""

    def __init__(
        self,
        state: State,
        wishes: Iterable[Wish],
        nodes: Iterable[NodeSeen],
        gone: Iterable[str],
        policy: Policy,
    ) -> None:
        self.before = state
        self.policy = policy
        self.held = dict(state.held)
        self.wishes = {wish.name: wish for wish in wishes}
        self.nodes = {node.id: node for node in nodes}
        self.gone = frozenset(gone)
        self.revision = state.revision + 1
        self.term = state.term
        self.changes: list[Change] = []
        self.unplaced: dict[str, Why] = {}
        self.servers: dict[str, tuple[NodeSeen, ServerSeen]] = {
            server.id: (node, server)
            for node in sorted(self.nodes.values(), key=lambda node: (node.name, node.id))
            for server in node.servers
        }
        self.weights = _weights([server for _, server in self.servers.values()])
        self.given: Counter[str] = Counter()

    # What is there.

    def open_servers(self) -> list[str]:
        """Servers that cameras may be given to."""
        return [
            id_
            for id_, (node, server) in self.servers.items()
            if server.usable and node.name not in self.before.draining
        ]

    def starting(self) -> int:
        """Servers that will take cameras soon."""
        return sum(
            server.starting and node.name not in self.before.draining
            for node, server in self.servers.values()
        )

    def may_read(self, wish: Wish, node: NodeSeen) -> bool:
        return node.bridges and node.name not in self.before.draining and reaches(wish, node.name)

    def counts(self) -> Counter[str]:
        return _counted(self.held)

    def moving(self) -> int:
        return sum(held.leaving for held in self.held.values())

    # What a round does, in this order.

    def settle(self) -> None:
        """Takes note of what has ended."""
        for camera, held in list(self.held.items()):
            node = self.nodes.get(held.node)
            if held.node in self.gone:
                del self.held[camera]
                self.changes.append(Change(camera, "lost", held.node))
            elif held.leaving and node is not None and node.answered:
                told = node.revision >= held.since
                if told and camera not in node.cameras:
                    del self.held[camera]
                    self.changes.append(Change(camera, "released", held.node))
                    if held.to and camera in self.wishes:
                        self.place(self.wishes[camera], held.to, held)

    def dismiss(self) -> None:
        """Ends those that nobody wants any more."""
        for camera, held in list(self.held.items()):
            if camera not in self.wishes and not held.leaving:
                self.leave(camera, held, "", "removed")

    def leave(self, camera: str, held: Held, to: str, why: str) -> None:
        self.held[camera] = msgspec.structs.replace(held, leaving=True, since=self.revision, to=to)
        self.changes.append(Change(camera, "leaves", held.node, why))

    def place(self, wish: Wish, first: str = "", before: Held | None = None) -> None:
        """Gives a camera that nobody has a place, ``first`` if that will do. ``before``: where it
        was until now, which is better than none, also where others ought to leave."""
        found, why = self.find(wish, first)
        if found is None and before is not None and self.may_stay(wish, before):
            found = before.server, before.node
        if found is None:
            self.unplaced[wish.name] = why
            return
        server, node = found
        self.term += 1
        self.given[server] += 1
        self.held[wish.name] = Held(node=node, server=server, term=self.term, since=self.revision)
        self.changes.append(Change(wish.name, "placed", node))

    def may_stay(self, wish: Wish, before: Held) -> bool:
        """Whether it can be where it was, drained or not: what it was to go to may have been
        drained meanwhile, or lost."""
        at, node = self.servers.get(before.server), self.nodes.get(before.node)
        return (
            at is not None
            and at[1].usable
            and node is not None
            and node.bridges
            and reaches(wish, node.name)
            and self.counts()[before.server] < self.policy.per_server
        )

    def find(
        self, wish: Wish, first: str = "", without: Sequence[str] = ()
    ) -> tuple[tuple[str, str] | None, Why]:
        """The server and the node whose bridge reads for it."""
        candidates = [id_ for id_ in self.open_servers() if id_ not in without]
        if not candidates:
            return None, Why.NO_SERVER
        readers = [node for node in self.nodes.values() if self.may_read(wish, node)]
        if not readers:
            return None, Why.NO_NODE
        counts = self.counts()
        candidates = [id_ for id_ in candidates if counts[id_] < self.policy.per_server]
        if not candidates:
            return None, Why.NO_ROOM
        starting = self.starting()
        if starting and wish.name not in self.before.seen:
            share = math.ceil(len(self.wishes) / (len(self.open_servers()) + starting))
            candidates = [id_ for id_ in candidates if counts[id_] < share]
            if not candidates:
                return None, Why.PENDING
        reading = {node.id for node in readers}
        # A node that can read the camera keeps its frames to itself.
        near = [id_ for id_ in candidates if self.servers[id_][0].id in reading]
        pin = self.before.pins.get(wish.name)
        pinned = [id_ for id_ in near if self.servers[id_][0].name == pin]
        chosen = pinned or near or candidates
        if first in chosen:
            server = first
        else:
            server = min(chosen, key=lambda id_: (self.crowded(id_), self.load(id_, counts, 1)))
        at = self.servers[server][0].id
        if at not in reading:
            by_node = Counter(held.node for held in self.held.values())
            at = min(reading, key=lambda id_: (by_node[id_], self.nodes[id_].name, id_))
        return (server, at), Why.PENDING

    def load(self, server: str, counts: Counter[str], more: int = 0) -> float:
        return (counts[server] + more) / self.weights[server]

    def crowded(self, server: str) -> bool:
        """Whether it says that no camera more fits."""
        room = self.servers[server][1].room
        return room is not None and room - self.given[server] <= 0

    def place_all(self) -> None:
        begun = 0
        for name, wish in sorted(self.wishes.items()):
            if name in self.held or name in self.unplaced:
                continue
            if begun >= self.policy.placements:
                self.unplaced[name] = Why.PENDING
                continue
            self.place(wish)
            begun += 1

    def misplaced(self, camera: str, held: Held) -> str:
        """Why a camera ought to be elsewhere; "" if it need not."""
        node = self.nodes.get(held.node)
        if node is None or not node.answered:
            return ""  # it would not hear of it
        wish = self.wishes[camera]
        at = self.servers.get(held.server)
        if at is None:
            host = self.nodes.get(held.server.rpartition("/")[0])
            if host is not None and not host.answered:
                return ""  # what it has is not known now
        if at is None or not at[1].usable:
            return "its server is away"
        if not reaches(wish, node.name) or not node.bridges:
            return "its node may not read it"
        if node.name in self.before.draining or at[0].name in self.before.draining:
            return "drained"
        pin = self.before.pins.get(camera)
        if pin and node.name != pin and reaches(wish, pin):
            there = [
                id_ for id_ in self.open_servers()
                if self.servers[id_][0].name == pin and self.servers[id_][0].bridges
            ]  # fmt: skip
            counts = self.counts()
            if any(counts[id_] < self.policy.per_server for id_ in there):
                return "moved"
        return ""

    def vacate(self) -> None:
        """Moves what stands where it should not, if there is another place for it."""
        for camera, held in sorted(self.held.items()):
            if held.leaving or camera not in self.wishes:
                continue
            why = self.misplaced(camera, held)
            lost = why == "its server is away"
            if not why or (not lost and self.moving() >= self.policy.moves):
                continue
            found, _ = self.find(self.wishes[camera], without=(held.server,) if lost else ())
            if found is not None and found != (held.server, held.node):
                self.leave(camera, held, found[0], why)

    def balance(self) -> None:
        """From the fullest to the emptiest, as long as that makes it less full."""
        while self.moving() < self.policy.moves and self._move_one():
            pass

    def _move_one(self) -> bool:
        counts = self.counts()
        opened = self.open_servers()
        slack = 0.0 if len({self.weights[id_] for id_ in opened}) <= 1 else SLACK
        fullest = sorted(opened, key=lambda id_: -self.load(id_, counts))
        for source in fullest:
            for target in reversed(fullest):
                after = self.load(target, counts, 1)
                if self.load(source, counts) * (1.0 - slack) <= after:
                    break
                if counts[target] >= self.policy.per_server or self.crowded(target):
                    continue
                camera = self._movable(source, target)
                if camera is not None:
                    self.leave(camera, self.held[camera], target, "balance")
                    return True
        return False

    def _movable(self, source: str, target: str) -> str | None:
        """The camera that has been there longest, among those that may go."""
        node = self.servers[target][0]
        here = [
            (held.term, camera)
            for camera, held in self.held.items()
            if held.server == source
            and not held.leaving
            and camera in self.wishes
            and camera not in self.before.pins
            and held.node in self.nodes
            and self.may_read(self.wishes[camera], node)
        ]
        return min(here)[1] if here else None

    def plan(self) -> Plan:
        self.settle()
        self.dismiss()
        self.place_all()
        self.vacate()
        if not self.unplaced and all(node.answered for node in self.nodes.values()):
            self.balance()
        if not self.changes:
            return Plan(self.before, (), self.unplaced)
        state = msgspec.structs.replace(
            self.before,
            revision=self.revision,
            term=self.term,
            held=self.held,
            seen=(self.before.seen | self.held.keys()) & self.wishes.keys(),
        )
        return Plan(state, tuple(self.changes), self.unplaced)


def plan(
    state: State,
    wishes: Iterable[Wish],
    nodes: Iterable[NodeSeen],
    *,
    gone: Iterable[str] = (),
    policy: Policy | None = None,
) -> Plan:
    """One round. ``gone``: ids of nodes whose bridges cannot run any more."""
    return _Round(state, wishes, nodes, gone, policy or Policy()).plan()


def orders(state: State, node: str) -> dict[str, Held]:
    """What a node holds, by camera."""
    return {
        camera: held
        for camera, held in state.held.items()
        if held.node == node and not held.leaving
    }


def counts(state: State) -> Counter[str]:
    """Cameras by server, those on their way to it among them."""
    return _counted(state.held)


def _counted(held: Mapping[str, Held]) -> Counter[str]:
    return Counter(one.to if one.leaving else one.server for one in held.values())


def reaches(wish: Wish, node: str) -> bool:
    """Whether a node of this name can reach the camera."""
    return not wish.nodes or any(fnmatch.fnmatchcase(node, one) for one in wish.nodes)


def _weights(servers: Sequence[ServerSeen]) -> Mapping[str, float]:
    """What each can carry, relative to the largest. Who does not know it yet is as the middle of
    those that do, and who has told it for a moment not far from there: the more it differs, the
    fewer words it takes. What is nearly alike is alike: servers learn it from their work, and
    waver."""
    told = {server.id: server.capacity for server in servers if server.capacity is not None}
    if not told:
        return {server.id: 1.0 for server in servers}
    logs = {id_: math.log(one.fps) for id_, one in told.items()}
    usual = fmean(logs.values(), weights=[one.sure for one in told.values()])
    guessed = {server.id: usual for server in servers}
    guessed |= {id_: usual + told[id_].sure * (each - usual) for id_, each in logs.items()}
    largest = max(guessed.values())
    shares = {id_: math.exp(each - largest) for id_, each in guessed.items()}
    return {id_: 1.0 if share > ALIKE else share for id_, share in shares.items()}
