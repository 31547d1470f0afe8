"""A fleet on one machine: Ray's nodes as processes, cameras that know who reads them, and the
fleet's own command. For the benchmark and for tests."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Self

import msgspec
import psutil
import tomli_w

from facelane_fleet.messages import CameraStatus, Status

HEALTH: Final = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""As docs/fleet.md advises: a node that is lost is known after three seconds."""
NULL_SERVER: Final[Mapping[str, Any]] = {
    "pools": {
        "detector": {"model": "null-detector"},
        "recognizer": {"model": "null-recognizer"},
        "liveness": {"model": "null-liveness"},
    },
    "log": {"level": "warning"},
}
COMMAND_S: Final = 120.0
BEGIN_S: Final = 120.0


class Cameras:
    """HTTP-MJPEG cameras, ``/NAME`` each, that remember how many read them at one time."""

    def __init__(self, fps: float, picture: bytes) -> None:
        self.most_readers: dict[str, int] = defaultdict(int)
        self.given: dict[str, int] = defaultdict(int)
        """Pictures that a reader was sent."""
        self._readers: dict[str, list[socket.socket]] = defaultdict(list)
        self._lock = threading.Lock()
        cameras = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                cameras._serve(self, fps, picture)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(30)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/{name}"

    def readers(self, name: str) -> int:
        with self._lock:
            return len([one for one in self._readers[name] if not _closed(one)])

    def _serve(self, handler: BaseHTTPRequestHandler, fps: float, picture: bytes) -> None:
        name, connection = handler.path.strip("/"), handler.connection
        with self._lock:
            # One that has closed its end reads no more, whether its thread has seen that or not.
            there = [one for one in self._readers[name] if not _closed(one)]
            there.append(connection)
            self._readers[name] = there
            self.most_readers[name] = max(self.most_readers[name], len(there))
        part = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(picture)
        with contextlib.suppress(OSError):
            handler.send_response(200)
            handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            handler.end_headers()
            due = time.monotonic()
            while not _closed(connection, max(0.0, due - time.monotonic())):
                handler.wfile.write(part + picture + b"\r\n")
                self.given[name] += 1
                due += 1.0 / fps
        with self._lock, contextlib.suppress(ValueError):
            self._readers[name].remove(connection)


def _closed(connection: socket.socket, wait: float = 0.0) -> bool:
    """Whether the other end has gone, waiting so long for it to go."""
    try:
        readable, _, _ = select.select([connection], [], [], wait)
        return bool(readable) and not connection.recv(1, socket.MSG_PEEK)
    except (OSError, ValueError):
        return True


def _patiently(begin: Callable[[], Any]) -> Any:
    """Ray gives its own processes half a minute to start, which a busy machine may take."""
    for _ in range(2):
        try:
            return begin()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return begin()


class Started:
    """Nodes as people begin them (docs/fleet.md): `ray start --block`, a process for each machine,
    of which one that is lost takes all with it that runs on it."""

    def __init__(self) -> None:
        self.address = f"127.0.0.1:{_free_port()}"
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def begin(self, name: str, cards: int) -> None:
        head = not self._nodes
        where = ["--head", "--port", self.address.rpartition(":")[2]] if head else []
        where += [] if head else ["--address", self.address]
        if head:
            where += ["--ray-client-server-port", str(_free_port()), "--include-dashboard", "false"]
        variables = {f"RAY_{key}": str(value) for key, value in HEALTH.items()}
        self._nodes[name] = subprocess.Popen(
            [
                sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where,
                "--node-name", name, "--node-ip-address", "127.0.0.1", "--num-cpus", "1",
                "--num-gpus", str(cards), "--object-store-memory", str(80 << 20),
                "--dashboard-agent-listen-port", str(_free_port()),
                "--min-worker-port", "0", "--max-worker-port", "0", "--disable-usage-stats",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **variables},
        )  # fmt: skip

    def lose(self, name: str) -> None:
        """As a machine loses its power."""
        process = self._nodes.pop(name)
        with contextlib.suppress(psutil.NoSuchProcess):
            everything = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for one in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait(30)

    def end(self) -> None:
        for name in reversed(list(self._nodes)):
            self.lose(name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(eq=False)
class Rig:
    """A cluster of nodes ``n0``, ``n1``, ... and a fleet of cameras ``cam-00``, ... in it.
    ``bare``: nodes are begun by `ray start`, instead of by Ray's own tests' means."""

    folder: Path
    cameras: int
    nodes: int
    fps: float = 2.0
    picture: bytes = b""
    server: Mapping[str, Any] = field(default_factory=lambda: NULL_SERVER)
    fleet: Mapping[str, Any] = field(default_factory=dict)
    bare: bool = False
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Self:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray
        from ray.cluster_utils import Cluster

        self.simulated = self._stack.enter_context(Cameras(self.fps, self.picture))
        self._nodes: dict[str, Any] = {}
        self._started: Started | None = None
        if self.bare:
            self._started = Started()
            self._stack.callback(self._started.end)
            self.address = self._started.address
            self.add_node()
            self._connect_when_begun()
        else:
            head = {
                **self._node_arguments(0), "include_dashboard": False, "_system_config": HEALTH
            }  # fmt: skip
            self._cluster: Any = _patiently(
                lambda: Cluster(initialize_head=True, head_node_args=head)
            )
            self._stack.callback(self._cluster.shutdown)
            self._nodes["n0"] = self._cluster.head_node
            self.address = self._cluster.address
        for _ in range(1, self.nodes):
            self.add_node()
        if not self.bare:
            self._connect()
        self._stack.callback(ray.shutdown)
        self._stack.callback(self._down)
        self.config = self.folder / "fleet.toml"
        (self.folder / "server.toml").write_text(tomli_w.dumps(dict(self.server)))
        self.write()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _connect(self) -> None:
        import ray

        ray.init(
            address=self.address, namespace="facelane-fleet", log_to_driver=False,
            configure_logging=False,
        )  # fmt: skip

    def _connect_when_begun(self) -> None:
        deadline = time.monotonic() + BEGIN_S
        while True:
            try:
                return self._connect()
            except (ConnectionError, RuntimeError, ValueError, TimeoutError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    def _node_arguments(self, number: int) -> dict[str, Any]:
        return {"num_cpus": 1, "object_store_memory": 80 << 20, "node_name": f"n{number}"}

    def names(self) -> list[str]:
        return [f"cam-{number:02d}" for number in range(self.cameras)]

    def write(self, cameras: list[str] | None = None) -> None:
        """The configuration, of these cameras or all."""
        document = {
            "fleet": {"state_dir": str(self.folder / "state"), **self.fleet},
            "servers": {"config": "server.toml"},
            "camera": [
                {"name": name, "source": self.simulated.url(name)}
                for name in (self.names() if cameras is None else cameras)
            ],
        }
        self.config.write_text(tomli_w.dumps(document))

    def add_node(self, cards: int = 0) -> str:
        """Another node, with cards as far as Ray knows; gives its name."""
        number = len(self._nodes)
        if self._started is not None:
            self._started.begin(f"n{number}", cards)
            self._nodes[f"n{number}"] = None
            return f"n{number}"
        node = _patiently(
            lambda: self._cluster.add_node(num_gpus=cards, **self._node_arguments(number))
        )
        self._nodes[f"n{number}"] = node
        return f"n{number}"

    def kill_node(self, name: str) -> None:
        """Its raylet is killed, and all that Ray runs on it ends with that."""
        node = self._nodes.pop(name)
        if self._started is not None:
            self._started.lose(name)
        else:
            self._cluster.remove_node(node, allow_graceful=False)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """``facelane-fleet``, as people call it."""
        return subprocess.run(
            [
                sys.executable, "-m", "facelane_fleet",
                "--address", self.address, *words,
            ],
            capture_output=True, text=True, timeout=COMMAND_S, check=False,
        )  # fmt: skip

    def up(self) -> None:
        done = self.command("up", str(self.config))
        if done.returncode:
            raise RuntimeError(done.stderr)

    def status(self, window: float = 60.0) -> Status | None:
        """``None`` while nobody answers. ``window``: gaps of the last so many seconds."""
        import ray

        try:
            actor: Any = ray.get_actor("default/supervisor", namespace="facelane-fleet")
            data: Any = ray.get(actor.status.remote(window), timeout=5)
        except (ValueError, ray.exceptions.RayError):
            return None
        return msgspec.json.decode(data, type=Status)

    def kill_supervisor(self) -> int:
        """Its process; gives the process id."""
        status = self.status()
        assert status is not None
        os.kill(status.supervisor_pid, signal.SIGKILL)
        return status.supervisor_pid

    def look(self, window: float = 60.0) -> dict[str, CameraStatus]:
        status = self.status(window)
        return {} if status is None else {one.name: one for one in status.cameras}

    def spread(self) -> dict[str, int]:
        """Cameras that stream, by node."""
        counts: dict[str, int] = defaultdict(int)
        for one in self.look().values():
            if one.state == "STREAMING":
                counts[one.node] += 1
        return dict(counts)

    def streaming(self, names: list[str] | None = None, since: float = 0.0) -> bool:
        """Whether these cameras have results of after that time."""
        found = self.look()
        wanted = self.names() if names is None else names
        return bool(found) and all(
            found[name].state == "STREAMING" and (found[name].last_result_at or 0.0) > since
            for name in wanted
        )

    def wait(self, condition: Callable[[], object], seconds: float, what: str) -> float:
        """Until it holds; gives the seconds. Raises ``TimeoutError`` with the fleet's status when
        nothing has changed in it for ``seconds``: a busy machine takes longer for each step."""
        begun = changed = time.monotonic()
        standing = self._standing()
        while not condition():
            if time.monotonic() - changed > seconds:
                before, standing = standing, self._standing()
                if standing == before:
                    raise TimeoutError(f"still for {seconds:g} s: {what}\n{self.text()}")
                changed = time.monotonic()
            time.sleep(0.2)
        return time.monotonic() - begun

    def _standing(self) -> object:
        """What changes on the way to where the fleet is going, and not when it is there."""
        status = self.status()
        if status is None:
            return None
        nodes = [
            (
                one.name,
                one.state,
                one.bridge,
                [(server.card, server.state) for server in one.servers],
            )
            for one in status.nodes
        ]
        cameras = [
            (one.name, one.state, one.node, one.term, one.first_result_at is not None)
            for one in status.cameras
        ]
        return status.supervisor_pid, status.recovered, nodes, cameras

    def text(self) -> str:
        from facelane_fleet import statuses

        status = self.status()
        if status is None:
            return "the supervisor does not answer"
        return statuses.table(status) + "\n" + "\n".join(status.changes[-60:])

    def as_json(self) -> Any:
        return json.loads(self.command("status", "--json").stdout)

    def _down(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.command("down")
