"""The fleet's mind: looks at the nodes, has cameras placed, tells the nodes. Knows no Ray.

A round: which nodes there are, what they tell, where cameras go (``placement``), and an order to
each. All that must outlive it, a ``Memo``, goes along with the orders and is kept by the nodes; one
that begins anew takes the newest that any of them has, and places nothing before every node that is
there has answered or is gone. A node is gone once Ray has given it up for ``lease`` seconds, within
which its bridge has let go by itself, or has been silent for longer than it waits itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from facelane_bridge.config import ConfigError
from facelane_bridge.hosting import CameraReport, HostedCamera
from facelane_bridge.output import CameraTotals
from facelane_fleet import accounts, placement, statuses
from facelane_fleet.config import from_tables
from facelane_fleet.messages import Memo, Order, Report, ServersOrder, Status
from facelane_fleet.placement import Capacity, NodeSeen, ServerSeen, State
from facelane_fleet.sightings import Known, NodeInfo, Seen

log = logging.getLogger("facelane_fleet")

ROUND_S: Final = 0.5
ANSWER_S: Final = 1.0
"""A node's answer is waited for so long; one that comes later counts in the next round."""
START_PATIENCE_S: Final = 120.0
"""New cameras wait so long for servers that are starting."""
KEEP_S: Final = 60.0
"""What servers can carry is kept for the next supervisor as often as this."""
MAX_CHANGES_KEPT: Final = 100


class Cluster(Protocol):
    """What the supervisor needs of Ray."""

    def nodes(self) -> list[NodeInfo]:
        """Those that live."""
        ...

    def exchange(self, orders: Mapping[str, bytes], seconds: float) -> dict[str, bytes]:
        """Gives nodes their orders; the reports of those that have answered in time. What a node
        of before has not taken yet is not heaped up. A node without an agent gets one."""
        ...

    def recall(self, nodes: list[NodeInfo], seconds: float) -> dict[str, tuple[int, bytes | None]]:
        """What nodes keep for the supervisor, of those that have answered."""
        ...

    def forget(self, node: str) -> None:
        """The node is gone."""
        ...


class CommandError(Exception):
    """An order of people's that cannot be followed; the message says what to do instead."""


class Supervisor:
    """See the module. Calls from any thread; ``round`` from one."""

    def __init__(
        self,
        document: dict[str, Any],
        server_config: dict[str, Any],
        cluster: Cluster,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._clock = clock
        self._lock = threading.RLock()
        self._settings = from_tables(document, server_config)
        self._memo = Memo(number=0, document=document, server_config=server_config, state=State())
        self._encoded = b""
        self._known: dict[str, Known] = {}
        self._seen: dict[str, Seen] = {}
        self._recalled: set[str] = set()
        self._strange: set[str] = set()
        """Nodes whose answers are not understood."""
        self._recovered = False
        self._asked: tuple[dict[str, Any], dict[str, Any]] | None = None
        """The configuration that people gave before it was known what nodes remember."""
        self._kept_at = clock()
        self._since = datetime.now(UTC)
        self._unplaced: dict[str, placement.Why] = {}
        self._changes: deque[str] = deque(maxlen=MAX_CHANGES_KEPT)
        self._touch()

    # What people ask.

    def apply(self, document: dict[str, Any], server_config: dict[str, Any]) -> str:
        """Another configuration. Raises ``ConfigError``."""
        settings = from_tables(document, server_config)
        _ = settings.fleet.state_dir or default_state(settings.fleet.name)
        with self._lock:
            if settings.fleet.name != self._settings.fleet.name:
                raise ConfigError("a fleet keeps its name: end this one first (down)")
            if not self._recovered:
                self._asked = document, server_config
                return "changed"
            if document == self._memo.document and server_config == self._memo.server_config:
                return "unchanged"
            self._settings = settings
            self._memo.document, self._memo.server_config = document, server_config
            pins = self._memo.state.pins
            self._set_state(
                pins={name: node for name, node in pins.items() if name in settings.cameras}
            )
            return "changed"

    def drain(self, node: str, on: bool) -> str:
        """Has a node's cameras moved off, and gives it none. Raises ``CommandError``."""
        with self._lock:
            self._check_recovered()
            draining = self._memo.state.draining
            if node not in self._names() and node not in draining:
                raise CommandError(f"there is no node {node!r}; there are: {self._listed()}")
            self._set_state(draining=(draining | {node}) if on else (draining - {node}))
            here = sum(
                self._memo.names.get(held.node) == node for held in self._memo.state.held.values()
            )
            if not on:
                return f"{node} takes cameras again"
            others = self._names() - self._memo.state.draining
            if here and not others:
                return f"{node} drains; {here} cameras stay on it until another node is there"
            return f"{node} drains: {here} cameras move to {', '.join(sorted(others)) or '-'}"

    def move(self, camera: str, node: str, anywhere: bool) -> str:
        """Has a camera moved to a node, "" for the emptiest other one, where it then stays, or
        anywhere. Raises ``CommandError``."""
        with self._lock:
            self._check_recovered()
            if camera not in self._settings.cameras:
                raise CommandError(f"there is no camera {camera!r}: look at `status`")
            pins = dict(self._memo.state.pins)
            if anywhere:
                pins.pop(camera, None)
                self._set_state(pins=pins)
                return f"{camera} goes where there is most room"
            held = self._memo.state.held.get(camera)
            now = self._memo.names.get(held.node, "") if held is not None else ""
            target = node or self._emptiest(camera, now)
            if target not in self._names():
                raise CommandError(f"there is no node {target!r}; there are: {self._listed()}")
            wish = placement.Wish(name=camera, nodes=self._settings.reach.get(camera, ()))
            if not placement.reaches(wish, target):
                raise CommandError(
                    f"{camera} is read by {', '.join(wish.nodes)} alone: change its `nodes`, `up`"
                )
            if target in self._memo.state.draining:
                raise CommandError(f"{target} drains: `drain --undo {target}` first")
            given = self._settings.node(target)
            if not given.servers or not given.bridges:
                raise CommandError(f"{target} has no servers of its own, or reads no cameras")
            pins[camera] = target
            self._set_state(pins=pins)
            if now == target:
                return f"{camera} is on {target}"
            if self._is_full(target):
                return (
                    f"{camera} moves to {target} as soon as there is room: its servers have "
                    "max_cameras each, move or take away others"
                )
            return f"{camera} moves to {target}"

    def wants_servers(self, node: str) -> bool:
        """Whether a node of this name is to have servers, and so its cards."""
        return self._settings.node(node).servers != 0

    def status(self, window: float = statuses.GAP_WINDOW_S) -> Status:
        """Everything, for people. ``window``: gaps of the last so many seconds."""
        with self._lock:
            return statuses.build(
                self._memo,
                self._settings,
                self._known,
                self._seen,
                self._unplaced,
                list(self._changes),
                since=self._since,
                pid=os.getpid(),
                window=window,
                recovered=self._recovered,
            )

    def _emptiest(self, camera: str, now: str) -> str:
        wish = placement.Wish(name=camera, nodes=self._settings.reach.get(camera, ()))
        counts = {
            name: 0
            for name in self._names() - self._memo.state.draining - {now}
            if placement.reaches(wish, name)
            and self._settings.node(name).servers
            and self._settings.node(name).bridges
        }
        if not counts:
            raise CommandError(f"there is no other node for {camera}: add one")
        for held in self._memo.state.held.values():
            name = self._memo.names.get(held.node, "")
            if name in counts:
                counts[name] += 1
        return min(counts, key=lambda name: (self._is_full(name), counts[name], name))

    def _is_full(self, node: str) -> bool:
        """Whether no server of a node of this name may be given one camera more."""
        given = placement.counts(self._memo.state)
        servers = [
            f"{known.info.id}/{one.slot}"
            for known in self._known.values()
            if known.alive and known.info.name == node and known.report is not None
            for one in known.report.servers
        ]
        most = self._settings.policy.per_server
        return bool(servers) and all(given[server] >= most for server in servers)

    def _check_recovered(self) -> None:
        """Raises ``CommandError``: what nodes remember would take the place of what is said now."""
        if not self._recovered:
            unheard = sorted(
                known.info.name
                for known in self._known.values()
                if known.alive and known.info.id not in self._recalled
            )
            raise CommandError(
                "the supervisor has just begun, and waits for what its nodes remember "
                f"({', '.join(unheard) or 'none is there yet'}): try again in a moment"
            )

    def _names(self) -> set[str]:
        return {known.info.name for known in self._known.values() if known.alive}

    def _listed(self) -> str:
        return ", ".join(sorted(self._names())) or "none yet"

    # A round.

    def round(self) -> None:
        """Looks, decides, tells."""
        infos = self._cluster.nodes()
        with self._lock:
            self._notice(infos)
            recovering = [
                known.info
                for known in self._known.values()
                if known.alive and known.info.id not in self._recalled
            ]
        if not self._recovered:
            self._recover(recovering)
        with self._lock:
            if not self._recovered:
                return
            self._place()
            orders = self._orders()
        answers = self._cluster.exchange(orders, ANSWER_S)
        with self._lock:
            self._hear(answers)

    def _notice(self, infos: list[NodeInfo]) -> None:
        now = self._clock()
        living = {info.id: info for info in infos}
        for id_, info in living.items():
            known = self._known.get(id_)
            if known is None:
                known = self._known[id_] = Known(info, first_seen=now)
                self._tell(f"node {info.name} is there")
            known.info, known.alive, known.dead_since = info, True, None
            if self._memo.names.get(id_) != info.name:
                self._memo.names[id_] = info.name
                self._touch()
        for id_ in {held.node for held in self._memo.state.held.values()} - self._known.keys():
            # Of before this supervisor, and not among the living.
            name = self._memo.names.get(id_, id_)
            self._known[id_] = Known(
                NodeInfo(id=id_, name=name, address=""), alive=False, dead_since=now
            )
        for id_, known in self._known.items():
            if id_ not in living and known.alive:
                known.alive, known.dead_since, known.answered = False, now, False
                self._tell(f"node {known.info.name} is lost")

    def _recover(self, asked: list[NodeInfo]) -> None:
        """Takes the newest memo that a node has, once all have answered."""
        answers = self._cluster.recall(asked, ANSWER_S) if asked else {}
        with self._lock:
            for id_, (number, data) in answers.items():
                self._recalled.add(id_)
                if data is not None and number > self._memo.number:
                    self._remember(number, data)
            if not self._known:
                return
            gone = self._gone()
            if all(
                id_ in self._recalled or id_ in gone
                for id_, known in self._known.items()
                if known.alive
            ):
                self._recovered = True
                self._touch()
                if self._asked is not None:
                    self.apply(*self._asked)
                    self._asked = None
                held = len(self._memo.state.held)
                self._tell(f"the supervisor has begun: {held} cameras have a place")

    def _remember(self, number: int, data: bytes) -> None:
        """What of a memo can be gone on with; of another version of facelane not all, perhaps."""
        memo = self._memo
        try:
            found = msgspec.json.decode(data, type=Memo)
        except msgspec.DecodeError as error:
            log.error("what a node remembers is not understood: %s", error)
            memo.number = number  # or nodes would keep theirs, and not this one's
            return
        try:
            self._settings = from_tables(found.document, found.server_config)
        except ConfigError as error:
            log.error("the kept configuration is not understood: %s", error)
            # Places and books are: cameras go on where they are.
            found.document, found.server_config = memo.document, memo.server_config
            self._settings = from_tables(memo.document, memo.server_config)
        self._memo = found

    def _gone(self) -> set[str]:
        now, fleet = self._clock(), self._settings.fleet
        found = set()
        for id_, known in self._known.items():
            dead = known.dead_since is not None and now - known.dead_since >= fleet.lease
            heard = known.heard_at if known.heard_at is not None else known.first_seen
            if dead or (known.alive and now - heard >= fleet.silence + fleet.lease):
                found.add(id_)
        return found

    def _place(self) -> None:
        gone = self._gone()
        state = self._memo.state
        for camera, held in state.held.items():
            if held.node in gone:
                self._close_books(camera, held.node, held.term)
        done = placement.plan(
            state,
            self._settings.wishes,
            [self._look(known) for known in self._known.values() if known.info.id not in gone],
            gone=gone,
            policy=self._settings.policy,
        )
        self._unplaced = done.unplaced
        for change in done.changes:
            node = self._memo.names.get(change.node, change.node)
            self._tell(f"{change.camera} {change.what}: {node} {change.why}".rstrip())
        if done.state is not state:
            self._memo.state = done.state
            self._touch()
        for id_ in gone:
            known = self._known[id_]
            if not known.alive:
                del self._known[id_]
                self._strange.discard(id_)
                self._memo.names.pop(id_, None)
                targets = self._memo.targets
                for server in [one for one in targets if one.startswith(f"{id_}/")]:
                    del targets[server]
                    self._memo.capacity.pop(server, None)
                if known.report is not None:
                    self._memo.taken.pop(known.report.incarnation, None)
                self._cluster.forget(id_)

    def _close_books(self, camera: str, node: str, term: int) -> None:
        """A run whose node is gone."""
        known = self._known.get(node)
        report = known.report.reports.get(camera) if known and known.report else None
        if report is None or report.term != term:
            report = CameraReport(term=term, totals=CameraTotals())
        closed = accounts.closed(report, "NODE_LOST")
        accounts.book(self._memo.books, camera, closed, lost=True, given_up=True)

    def _look(self, known: Known) -> NodeSeen:
        """A node as placement sees it."""
        info, report = known.info, known.report
        servers = []
        now = self._clock()
        if report is None and known.alive:
            # New cameras wait for those that are to come.
            young = now - known.first_seen < START_PATIENCE_S
            servers = [
                ServerSeen(id=f"{info.id}/{slot}", usable=False, starting=young)
                for slot in range(self._servers_order(info).count)
            ]
        for one in report.servers if report is not None else ():
            at = known.serving_at.get(one.slot)
            away = at is None or now - at > self._settings.fleet.patience
            starting = at is None and now - known.first_seen < START_PATIENCE_S
            servers.append(
                ServerSeen(
                    id=f"{info.id}/{one.slot}",
                    usable=known.alive and not away,
                    starting=known.alive and starting,
                    capacity=self._memo.capacity.get(f"{info.id}/{one.slot}"),
                    room=one.room,
                )
            )
        return NodeSeen(
            id=info.id,
            name=info.name,
            answered=known.answered and known.alive,
            revision=report.revision if report is not None else 0,
            cameras=frozenset(report.cameras if report is not None else ()),
            servers=tuple(servers),
            bridges=self._settings.node(info.name).bridges and known.alive,
        )

    def _orders(self) -> dict[str, bytes]:
        memo, settings = self._memo, self._settings
        if not self._encoded:
            self._encoded = msgspec.json.encode(memo)
        orders = {}
        rolling = False
        for known in sorted(self._known.values(), key=lambda known: known.info.name):
            if not known.alive:
                continue
            info, report = known.info, known.report
            servers = self._servers_order(info)
            if report is not None and known.serving_at:
                # New settings for one node's servers after the other.
                behind = any(one.digest != servers.digest for one in report.servers)
                serving = sum(one.state == "SERVING" for one in report.servers)
                if behind and rolling:
                    servers = self._as_they_are(known, servers)
                rolling = rolling or behind or serving < servers.count
            kept = report is not None and report.memo_revision >= memo.number
            order = Order(
                revision=memo.state.revision,
                cameras=tuple(self._cameras_of(info.id)),
                servers=servers,
                cameras_per_bridge=settings.bridges.cameras,
                lease=settings.fleet.lease,
                silence=settings.fleet.silence,
                taken=memo.taken.get(report.incarnation, 0) if report is not None and kept else 0,
                memo=None if kept else self._encoded,
                memo_revision=memo.number,
            )
            orders[info.id] = msgspec.json.encode(order)
        return orders

    def _cameras_of(self, node: str) -> list[HostedCamera]:
        found = []
        for camera, held in sorted(placement.orders(self._memo.state, node).items()):
            target = self._target(held.server)
            if camera in self._settings.cameras and target:
                found.append(
                    HostedCamera(
                        term=held.term,
                        camera=self._settings.cameras[camera],
                        server=self._settings.server_for(target),
                    )
                )
        return found

    def _target(self, server: str) -> str:
        return self._memo.targets.get(server, "")

    def _servers_order(self, info: NodeInfo) -> ServersOrder:
        settings = self._settings
        given = settings.node(info.name).servers
        fleet = settings.fleet
        order = ServersOrder(
            count=max(1, info.cards) if given < 0 else given,
            config=settings.server_config,
            listen=settings.servers.listen,
            metrics=settings.servers.metrics,
            state_dir=fleet.state_dir or default_state(fleet.name),
            ask=msgspec.to_builtins(settings.server_for("unix:/")),
        )
        digest = hashlib.sha256(
            msgspec.json.encode(msgspec.structs.replace(order, count=0), order="sorted")
        ).hexdigest()[:16]
        return msgspec.structs.replace(order, digest=digest)

    def _as_they_are(self, known: Known, wanted: ServersOrder) -> ServersOrder:
        """An order that leaves a node's servers alone."""
        assert known.report is not None
        return msgspec.structs.replace(
            wanted, digest=known.report.servers[0].digest, count=len(known.report.servers)
        )

    def _hear(self, answers: Mapping[str, bytes]) -> None:
        now = self._clock()
        learnt = False
        for id_, known in self._known.items():
            data = answers.get(id_)
            known.answered = data is not None
            if data is None:
                continue
            try:
                report = msgspec.json.decode(data, type=Report)
            except (TypeError, msgspec.DecodeError):
                # One that speaks otherwise keeps nobody from hearing the others.
                known.answered = False
                if id_ not in self._strange:
                    self._strange.add(id_)
                    self._tell(f"{known.info.name} has another version of facelane, it seems")
                continue
            self._strange.discard(id_)
            if report.revision > self._memo.state.revision:
                # Of a supervisor whose memo was not understood: what is older is not obeyed.
                state = msgspec.structs.replace(self._memo.state, revision=report.revision)
                self._memo.state = state
                self._set_state()
            before = known.report
            if before is not None and before.incarnation != report.incarnation:
                # Its bridge ended with it: what it had last told is what there is.
                known.serving_at.clear()
                for server in before.servers:
                    self._memo.capacity.pop(f"{id_}/{server.slot}", None)
                for camera, one in before.reports.items():
                    accounts.book(
                        self._memo.books, camera, accounts.closed(one, "NODE_LOST"), lost=True
                    )
                self._memo.taken.pop(before.incarnation, None)
                self._touch()
                self._tell(f"the agent of {known.info.name} began anew")
            known.report, known.heard_at = report, now
            for server in report.servers:
                name = f"{id_}/{server.slot}"
                if self._memo.targets.get(name) != server.target:
                    self._memo.targets[name] = server.target
                    self._touch()
                if server.state == "SERVING":
                    known.serving_at[server.slot] = now
                if server.capacity_fps:
                    capacity = self._memo.capacity.get(name, Capacity())
                    self._memo.capacity[name] = capacity.heard(server.capacity_fps)
                    learnt = True
            if accounts.take_over(self._memo, report.incarnation, report.ended):
                self._touch()
            for camera, one in report.reports.items():
                self._note(camera, one)
            for run in report.ended:
                self._note(run.camera, run.report)
        if learnt and now - self._kept_at >= KEEP_S:
            self._kept_at = now
            self._touch()

    def _note(self, camera: str, report: CameraReport) -> None:
        """The times of a camera's results."""
        seen = self._seen.setdefault(camera, Seen())
        if report.term < seen.term or report.last_result_at is None:
            return
        if report.gap_s:
            seen.gaps.append((report.last_result_at, report.gap_s))
        if report.term > seen.term:
            first = report.first_result_at or report.last_result_at
            if seen.last_result_at is not None:
                seen.gaps.append((first, first - seen.last_result_at))
            seen.term = report.term
        seen.last_result_at = max(seen.last_result_at or 0.0, report.last_result_at)

    # State.

    def _set_state(self, **changed: Any) -> None:
        state = self._memo.state
        self._memo.state = msgspec.structs.replace(state, revision=state.revision + 1, **changed)
        self._touch()

    def _touch(self) -> None:
        """The memo is another one than nodes have."""
        self._memo.number += 1
        self._encoded = b""

    def _tell(self, text: str) -> None:
        log.info("%s", text)
        self._changes.append(f"{datetime.now(UTC):%H:%M:%S} {text}")


def default_state(fleet: str) -> str:
    """Where a fleet keeps what must last, on every node. Raises ``ConfigError``."""
    try:
        base = os.environ.get("XDG_STATE_HOME", "") or str(Path.home() / ".local" / "state")
    except RuntimeError:  # as in containers that run as any user
        raise ConfigError(
            "there is no place for the fleet's state where its supervisor runs, since $HOME is not "
            "set there and this user has no account: set state_dir in [fleet]"
        ) from None
    return str(Path(base) / "facelane-fleet" / fleet)
