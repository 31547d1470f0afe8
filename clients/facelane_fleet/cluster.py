"""Ray, and nothing else that knows it: an actor on every node, and one, anywhere, that supervises.

All are detached: they outlive the command that made them, and Ray starts them again where they end.
A node's actor is bound to its node and takes its cards, so that nobody else is given them; the
supervisor's begins elsewhere when its node is lost. Arguments and answers are bytes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from facelane_bridge.config import ConfigError
from facelane_fleet.node import Node
from facelane_fleet.sightings import NodeInfo
from facelane_fleet.statuses import GAP_WINDOW_S
from facelane_fleet.supervisor import ROUND_S, CommandError, Supervisor

log = logging.getLogger("facelane_fleet")

NAMESPACE: Final = "facelane-fleet"
PULSE_S: Final = 0.4
ASK_S: Final = 30.0
"""A command waits for the supervisor, which may just have been started again."""
CLOSE_S: Final = 60.0
"""Servers have their grace to drain."""


ray_nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
"""Nodes of the cluster, dead ones too."""


class FleetError(Exception):
    """The cluster or the fleet cannot be reached; the message says what to do."""


class Answer(msgspec.Struct, kw_only=True):
    """What the supervisor says to a command."""

    text: str = ""
    error: str = ""
    usage: bool = False
    """The error is one of the configuration."""


class Pulse:
    """Whether the cluster counts a node among the living, asked again and again by a thread of its
    own, because the answer may not come."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._at = time.monotonic()
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def age(self) -> float:
        """Seconds since it last did."""
        return time.monotonic() - self._at

    def _run(self) -> None:
        while True:
            asked = time.monotonic()
            with contextlib.suppress(Exception):
                if any(one["NodeID"] == self._node and one["Alive"] for one in ray_nodes()):
                    self._at = asked
            time.sleep(PULSE_S)


class NodeAgent:
    """The actor of a node."""

    def __init__(self, fleet: str, name: str, node: str, address: str) -> None:
        _log_to_stderr()
        cards = os.environ.get("CUDA_VISIBLE_DEVICES", "") if ray.get_gpu_ids() else ""
        self._node = Node(
            f"{fleet}-{name}", address, tuple(filter(None, cards.split(","))), Pulse(node).age
        )

    def tick(self, order: bytes) -> bytes:
        """An order for a report."""
        return self._node.tick(order)

    def recall(self) -> tuple[int, bytes | None]:
        """What it keeps for the supervisor."""
        return self._node.recall()

    def close(self) -> None:
        """Ends all that it has."""
        self._node.close(CLOSE_S)


class RayCluster:
    """``supervisor.Cluster`` on Ray. Calls from one thread."""

    def __init__(self, fleet: str, wants_cards: Callable[[str], bool]) -> None:
        self._fleet = fleet
        self._wants_cards = wants_cards
        self._infos: dict[str, NodeInfo] = {}
        self._agents: dict[str, Any] = {}
        self._pending: dict[str, Any] = {}

    def nodes(self) -> list[NodeInfo]:
        found = [
            NodeInfo(
                id=one["NodeID"],
                name=one["NodeName"] or one["NodeManagerAddress"],
                address=one["NodeManagerAddress"],
                cards=int(one["Resources"].get("GPU", 0)),
            )
            for one in ray_nodes()
            if one["Alive"]
        ]
        self._infos = {info.id: info for info in _told_apart(found)}
        return list(self._infos.values())

    def exchange(self, orders: Mapping[str, bytes], seconds: float) -> dict[str, bytes]:
        for node, order in orders.items():
            if node not in self._pending and node in self._infos:
                self._pending[node] = self._agent(node).tick.remote(order)
        return self._gathered(set(orders), seconds)

    def recall(self, nodes: list[NodeInfo], seconds: float) -> dict[str, tuple[int, bytes | None]]:
        for info in nodes:
            if info.id not in self._pending:
                self._pending[info.id] = self._agent(info.id).recall.remote()
        return self._gathered({info.id for info in nodes}, seconds)

    def forget(self, node: str) -> None:
        self._pending.pop(node, None)
        agent = self._agents.pop(node, None)
        if agent is not None:
            with contextlib.suppress(Exception):
                ray.kill(agent)

    def close(self) -> list[str]:
        """Ends the agents and all that they have; gives the names of nodes that did not answer."""
        closing = {
            node: agent.close.remote()
            for node, agent in self._agents.items()
            if node in self._infos
        }
        late = []
        until = time.monotonic() + CLOSE_S
        for node, reference in closing.items():
            try:
                ray.get(reference, timeout=max(0.1, until - time.monotonic()))
            except Exception as error:
                log.warning("a node did not end in order: %s", type(error).__name__)
                late.append(self._infos[node].name)
        for node in list(self._agents):
            self.forget(node)
        return late

    def _gathered(self, nodes: set[str], seconds: float) -> dict[str, Any]:
        waited = {reference: node for node, reference in self._pending.items() if node in nodes}
        if not waited:
            return {}
        ready, _ = ray.wait(list(waited), num_returns=len(waited), timeout=seconds)
        found = {}
        for reference in ready:
            node = waited[reference]
            del self._pending[node]
            try:
                found[node] = ray.get(reference, timeout=seconds)
            except ray.exceptions.ActorUnavailableError:
                pass  # it is being started again
            except ray.exceptions.RayActorError:
                self._agents.pop(node, None)  # for good: another is made
            except Exception as error:
                log.warning("a node's answer: %s", error)
        return found

    def _agent(self, node: str) -> Any:
        agent = self._agents.get(node)
        if agent is None:
            info = self._infos[node]
            cards = info.cards if self._wants_cards(info.name) else 0
            agent = (
                ray.remote(NodeAgent)
                .options(
                    name=f"{self._fleet}/node/{node}",
                    namespace=NAMESPACE,
                    get_if_exists=True,
                    lifetime="detached",
                    num_cpus=0,
                    num_gpus=cards,
                    max_restarts=-1,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                )
                .remote(self._fleet, info.name, node, info.address)
            )
            self._agents[node] = agent
        return agent


class SupervisorActor:
    """The actor that supervises: a round, and another, and people's orders between them."""

    def __init__(self, fleet: str, document: bytes, server_config: bytes) -> None:
        _log_to_stderr()
        self._cluster = RayCluster(fleet, self._wants_cards)
        self._supervisor = Supervisor(
            msgspec.json.decode(document), msgspec.json.decode(server_config), self._cluster
        )
        self._over = threading.Event()
        self._rounds = threading.Thread(target=self._run, name="rounds", daemon=True)
        self._rounds.start()

    def _wants_cards(self, name: str) -> bool:
        return self._supervisor.wants_servers(name)

    def _run(self) -> None:
        while not self._over.wait(ROUND_S):
            try:
                self._supervisor.round()
            except Exception:
                log.exception("a round failed")

    def apply(self, document: bytes, server_config: bytes) -> bytes:
        """Another configuration."""
        return _answered(
            lambda: self._supervisor.apply(
                msgspec.json.decode(document), msgspec.json.decode(server_config)
            )
        )

    def drain(self, node: str, on: bool) -> bytes:
        """See ``Supervisor.drain``."""
        return _answered(lambda: self._supervisor.drain(node, on))

    def move(self, camera: str, node: str, anywhere: bool) -> bytes:
        """See ``Supervisor.move``."""
        return _answered(lambda: self._supervisor.move(camera, node, anywhere))

    def status(self, window: float = GAP_WINDOW_S) -> bytes:
        """See ``Supervisor.status``."""
        return msgspec.json.encode(self._supervisor.status(window))

    def close(self) -> bytes:
        """Ends every server and bridge of the fleet."""
        self._over.set()
        self._rounds.join(CLOSE_S)
        late = self._cluster.close()
        text = "every server and bridge has ended"
        if late:
            text = f"ended, except perhaps on {', '.join(late)}, which did not answer in time"
        return msgspec.json.encode(Answer(text=text))


def _answered(command: Callable[[], str]) -> bytes:
    try:
        return msgspec.json.encode(Answer(text=command()))
    except CommandError as error:
        return msgspec.json.encode(Answer(error=str(error)))
    except ConfigError as error:
        return msgspec.json.encode(Answer(error=str(error), usage=True))


def _told_apart(infos: list[NodeInfo]) -> list[NodeInfo]:
    """Nodes of one name get names of their own."""
    names = [info.name for info in infos]
    return [
        msgspec.structs.replace(info, name=f"{info.name}-{info.id[:6]}")
        if names.count(info.name) > 1
        else info
        for info in infos
    ]


def _log_to_stderr() -> None:
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("facelane_fleet").setLevel(logging.INFO)


# What the command does.


@contextlib.contextmanager
def connected(address: str, wait: float = 0.0) -> Iterator[None]:
    """A connection to the cluster at ``address``, waited for so many seconds. Raises
    ``FleetError``."""
    until = time.monotonic() + wait
    while not _connect(address):
        if time.monotonic() >= until:
            raise FleetError(
                f"no Ray cluster answers at {address!r}: begin one with "
                "`ray start --head --node-name NAME`, or give --address; where it wants a token, "
                "set RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH as `ray start` has them"
            )
        time.sleep(1.0)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str) -> bool:
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    except (ConnectionError, ValueError, RuntimeError, TimeoutError):
        return False
    return True


def supervisor(fleet: str) -> Any:
    """The supervisor of a fleet. Raises ``FleetError``."""
    try:
        return ray.get_actor(f"{fleet}/supervisor", namespace=NAMESPACE)
    except ValueError:
        raise FleetError(
            f"no fleet {fleet!r} runs in this cluster: `facelane-fleet up FLEET.toml` begins one"
        ) from None


def begin(fleet: str, document: bytes, server_config: bytes) -> Any:
    """The supervisor of a fleet, begun if there is none."""
    return (
        ray.remote(SupervisorActor)
        .options(
            name=f"{fleet}/supervisor",
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
        )
        .remote(fleet, document, server_config)
    )


def asked(reference: Any, seconds: float = ASK_S) -> bytes:
    """What the supervisor answers. Raises ``FleetError``."""
    try:
        answer: bytes = ray.get(reference, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        raise FleetError(
            f"the supervisor did not answer within {seconds:g} s: is a node with room for it "
            "there (`ray status`)?"
        ) from None
    except ray.exceptions.ActorUnavailableError:
        raise FleetError("the supervisor is being started again: try once more") from None
    except ray.exceptions.RayError as error:
        raise FleetError(f"the supervisor could not answer: {error}") from None
    return answer
