"""The processes of a node: its servers and its bridge. Each ends with whoever started it.

The kernel kills them when the node's own process is gone, in whatever way (``facelane_bridge.
tether``), and until they are gone they hold its lock, so that the next one does not begin beside
them. All calls come from one thread, which lives as long as the node.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import tomli_w

import facelane
from facelane_bridge.config import ConfigError, ServerSettings
from facelane_bridge.hosting import HostedCamera, Keep, Told, Want
from facelane_bridge.tether import tethered
from facelane_fleet.config import split_address
from facelane_fleet.messages import ServerReport, ServersOrder

log = logging.getLogger("facelane_fleet")

ASK_S: Final = 1.0
ASK_TIMEOUT_S: Final = 3.0
STOP_S: Final = 25.0
"""A server that drains has ten seconds for its streams."""
BRIDGE_STOP_S: Final = 5.0
BACKOFF_S: Final = (0.5, 15.0)
STEADY_S: Final = 60.0
"""After so long the back-off begins anew."""
MAX_LINE_BYTES: Final = 8 << 20
ANALYSIS: Final = "facelane.v1.AnalysisService"


class Backoff:
    """When a process may be started again."""

    def __init__(self) -> None:
        self._wait = BACKOFF_S[0]
        self._next = 0.0
        self._started = 0.0
        self.restarts = -1

    def due(self, now: float) -> bool:
        return now >= self._next

    def started(self, now: float) -> None:
        self.restarts += 1
        self._started = now

    def ended(self, now: float) -> None:
        if now - self._started > STEADY_S:
            self._wait = BACKOFF_S[0]
        self._next = now + self._wait
        self._wait = min(self._wait * 2, BACKOFF_S[1])


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """SIGTERM, and SIGKILL for what does not end in time."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    if process.poll() is None:
        process.kill()
        process.wait(seconds)


class ServerProcess:
    """One server, on one card or the CPU."""

    def __init__(
        self,
        slot: int,
        order: ServersOrder,
        folder: Path,
        address: str,
        card: str,
        lock: int,
    ) -> None:
        self.slot = slot
        self.order = order
        self.card = card
        self._folder = folder
        self._lock = lock
        if order.listen == "unix":
            self._listen = self.target = f"unix:{folder}/server-{slot}.sock"
        else:
            host, port = split_address(order.listen, "listen")
            self._listen = f"{host}:{port + slot}"
            self.target = f"{address}:{port + slot}"
        self._process: subprocess.Popen[bytes] | None = None
        self._backoff = Backoff()
        self._ended = threading.Event()
        self._report = ServerReport(
            slot=slot, state="STARTING", target=self.target, card=card, digest=order.digest
        )
        self._served = False
        self._asking: threading.Thread | None = None

    def report(self) -> ServerReport:
        """What is known of it; from any thread."""
        return self._report

    def step(self) -> None:
        """Starts it, or again; tells how it fares."""
        now = time.monotonic()
        process = self._process
        if process is not None and process.poll() is not None:
            log.warning("server ended: slot=%d code=%s", self.slot, process.returncode)
            self._backoff.ended(now)
            self._process = process = None
            self._served = False
            self._say("BACKOFF", "it has ended: its log says why")
        if process is None and self._backoff.due(now):
            self._start(now)
        if self._asking is None:
            self._asking = threading.Thread(
                target=self._ask_for_ever, name=f"ask {self.slot}", daemon=True
            )
            self._asking.start()

    def stop(self) -> None:
        """Ends it within its grace; nothing is started any more."""
        self._ended.set()
        if self._process is not None:
            self._say("STOPPING", "")
            end(self._process, STOP_S)

    def kill(self) -> None:
        """Ends it now."""
        self._ended.set()
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_S)

    def _start(self, now: float) -> None:
        self._backoff.started(now)
        try:
            path = self._write()
            command = (sys.executable, "-m", "facelane_server", "run", "--config", str(path))
            environment = dict(os.environ)
            if self.card:
                environment["CUDA_VISIBLE_DEVICES"] = self.card
            self._process = subprocess.Popen(
                tethered(*command, by=signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                pass_fds=(self._lock,),
            )
        except OSError as error:
            self._backoff.ended(now)
            self._say("BACKOFF", f"it cannot be started: {error.strerror}")
            return
        self._say("STARTING", "")

    def _write(self) -> Path:
        order = self.order
        state = Path(order.state_dir)
        mine = self._folder / f"server-{self.slot}"
        own = state / "nodes" / self._folder.name / f"server-{self.slot}"
        for folder in (state, own, mine):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        config = dict(order.config)
        config["state_dir"], config["runtime_dir"] = str(own), str(mine)
        config["server"] = {**config.get("server", {}), "listen": self._listen}
        metrics = ""
        if order.metrics:
            host, port = split_address(order.metrics, "metrics")
            metrics = f"{host}:{port + self.slot}"
        config["metrics"] = {"listen": metrics}
        store = dict(config.get("store", {}))
        if not store.get("url"):
            # One gallery for the servers of this machine.
            gallery = dict(config.get("gallery", {}))
            gallery.setdefault("path", str(state / "gallery.db"))
            config["gallery"] = gallery
        if not store.get("master_key") and not store.get("url"):
            store["master_key"] = f"file:{_master_key(state)}"
        if store:
            config["store"] = store
        path = mine / "server.toml"
        path.write_text(tomli_w.dumps(config))
        path.chmod(0o600)
        return path

    def _say(self, state: str, message: str) -> None:
        process = self._process
        self._report = msgspec.structs.replace(
            self._report,
            state=state,
            message=message,
            pid=process.pid if process is not None else 0,
            restarts=max(0, self._backoff.restarts),
        )

    def _ask_for_ever(self) -> None:
        while not self._ended.wait(ASK_S):
            process = self._process
            if process is None or process.poll() is not None:
                continue
            try:
                self._ask()
            except Exception as error:
                log.warning("server not asked: slot=%d %s", self.slot, type(error).__name__)

    def _ask(self) -> None:
        settings = msgspec.convert({**self.order.ask, "target": self.target}, ServerSettings)
        try:
            with _client(settings) as client:
                while not self._ended.wait(ASK_S):
                    process = self._process
                    if process is None or process.poll() is not None:
                        return
                    self._take(client, process)
        except ConfigError as error:
            self._say("NOT_SERVING", str(error))

    def _take(self, client: facelane.Client, process: subprocess.Popen[bytes]) -> None:
        try:
            health = client.health(ANALYSIS, timeout=ASK_TIMEOUT_S)
            info = client.server_info(timeout=ASK_TIMEOUT_S)
        except facelane.FacelaneError as error:
            waiting = not self._served and error.reason in ("UNREACHABLE", "DEADLINE_EXCEEDED")
            self._say("STARTING" if waiting else "NOT_SERVING", f"{error.reason}: {error.message}")
            return
        if self._process is not process:
            return
        serving = health == facelane.HealthStatus.SERVING
        self._served = self._served or serving
        load = info.load
        self._report = msgspec.structs.replace(
            self._report,
            state="SERVING" if serving else ("NOT_SERVING" if self._served else "STARTING"),
            message="; ".join(one.message for one in info.degradations),
            pid=process.pid,
            capacity_fps=load.capacity_fps if load is not None else None,
            offered_fps=load.offered_fps if load is not None else None,
            room=load.headroom_streams if load is not None else None,
            open_streams=info.open_streams,
        )


def _client(settings: ServerSettings) -> facelane.Client:
    """A blocking client as the bridge would make it. Raises ``ConfigError``."""
    tls = None
    if settings.tls_ca:
        tls = facelane.Tls(
            ca_file=settings.tls_ca,
            cert_file=settings.tls_cert or None,
            key_file=settings.tls_key or None,
            server_name=settings.tls_server_name or None,
        )
    token: Callable[[], str] | str = ""
    if settings.token_file:
        path = Path(settings.token_file)

        def token() -> str:
            return path.read_text(encoding="utf-8-sig").strip()

    try:
        return facelane.Client(settings.target, token=token, tls=tls, proxy=False)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror})") from None
    except facelane.ArgumentError as error:
        raise ConfigError(error.message) from None


def _master_key(state: Path) -> Path:
    """The key of a gallery that several servers of this machine open; made once."""
    path = state / "master.key"
    mine = state / f".master.{os.getpid()}.{secrets.token_hex(4)}"
    if not path.exists():
        descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(mine, path)
        mine.unlink()
    return path


class BridgeProcess:
    """The bridge of a node: its cameras by lines, what it tells of them."""

    def __init__(self, lease: float, lock: int, on_told: Callable[[Told], None]) -> None:
        self._on_told = on_told
        self._encoder = msgspec.json.Encoder()
        command = (
            sys.executable, "-m", "facelane_bridge", "--log-level", "warning",
            "host", "--lease", f"{lease:g}",
        )  # fmt: skip
        self._process = subprocess.Popen(
            tethered(*command, by=signal.SIGKILL),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(lock,),
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._unsent = b""
        self._reader = threading.Thread(target=self._read, name="bridge", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def want(self, cameras: tuple[HostedCamera, ...]) -> None:
        """Tells the bridge its cameras, all of them."""
        self._write(Want(cameras=cameras))

    def keep(self) -> None:
        """Nothing has changed."""
        if not self._unsent:
            self._write(Keep())

    def _write(self, message: Want | Keep) -> None:
        self._unsent += self._encoder.encode(message) + b"\n"
        self.flush()

    def flush(self) -> None:
        """As much as the bridge takes; one that takes nothing ends by its lease."""
        assert self._process.stdin is not None
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                sent = os.write(self._process.stdin.fileno(), self._unsent)
                self._unsent = self._unsent[sent:]

    def _read(self) -> None:
        assert self._process.stdout is not None
        decoder = msgspec.json.Decoder(Told)
        while line := self._process.stdout.readline(MAX_LINE_BYTES):
            with contextlib.suppress(msgspec.DecodeError):
                self._on_told(decoder.decode(line))

    def stop(self) -> None:
        """End-of-file, then force; what it still tells is heard."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(BRIDGE_STOP_S)
        end(self._process, BRIDGE_STOP_S)
        self.reap()

    def reap(self) -> None:
        """After its end: the rest of what it told, and its pipes."""
        self._reader.join(BRIDGE_STOP_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
