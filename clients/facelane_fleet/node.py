"""A node's own part: it has the servers and the cameras that it is told to have, and says so.

One thread owns all processes. ``tick`` only leaves an order and takes the newest report, so whoever
calls never waits for a process. Nothing here knows Ray: ``pulse`` says whether the cluster counts
this node among the living.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

import facelane
from facelane_bridge.hosting import CameraReport, HostedCamera, Told
from facelane_fleet.accounts import closed
from facelane_fleet.messages import MAX_ENDED, EndedRun, Order, Report, ServersOrder
from facelane_fleet.processes import Backoff, BridgeProcess, ServerProcess

log = logging.getLogger("facelane_fleet")

STEP_S: Final = 0.1
KEEP_PART: Final = 8
"""A bridge hears so many words within its lease."""
PULSE_PART: Final = 0.4
"""Of the lease: the cluster may be unheard for so long; the rest is the bridge's own lease."""


class Node:
    """Servers and a bridge on one machine. ``cards``: what CUDA_VISIBLE_DEVICES is for each server,
    "" for the CPU. ``pulse``: seconds since the cluster last said that this node lives."""

    def __init__(
        self, name: str, address: str, cards: Sequence[str], pulse: Callable[[], float]
    ) -> None:
        self.name = name
        self.incarnation = f"{name}-{secrets.token_hex(6)}"
        self._address = address
        self._cards = tuple(cards)
        self._pulse = pulse
        self._folder = runtime_folder() / _safe(name)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._lock_file = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        self._locked = False
        self._guard = threading.Lock()
        self._wake = threading.Event()
        self._closing: threading.Event = threading.Event()
        self._order: Order | None = None
        self._heard_at = time.monotonic()
        self._memo: bytes | None = None
        self._memo_revision = 0
        self._applied = 0
        self._sent: tuple[HostedCamera, ...] = ()
        self._kept_at = 0.0
        self._bridge: BridgeProcess | None = None
        self._backoff = Backoff()
        self._out: dict[str, int] = {}
        """Cameras, and their terms, that the bridge has been given and not said to have ended."""
        self._reports: dict[str, CameraReport] = {}
        self._ended: list[EndedRun] = []
        self._number = 0
        self._servers: dict[int, ServerProcess] = {}
        self._retiring: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._run, name="node", daemon=True)
        self._thread.start()

    # What the supervisor calls.

    def tick(self, data: bytes) -> bytes:
        """Takes an order, unless it is older than the last one; gives the report."""
        order = msgspec.json.decode(data, type=Order)
        with self._guard:
            self._heard_at = time.monotonic()
            if order.memo is not None and order.memo_revision >= self._memo_revision:
                self._memo, self._memo_revision = order.memo, order.memo_revision
            if self._order is None or order.revision >= self._order.revision:
                self._order = order
                self._ended = [run for run in self._ended if run.number > order.taken]
        self._wake.set()
        return msgspec.json.encode(self.report())

    def recall(self) -> tuple[int, bytes | None]:
        """What was to be kept for the supervisor, and its number."""
        with self._guard:
            return self._memo_revision, self._memo

    def report(self) -> Report:
        """What is here now."""
        with self._guard:
            if not self._locked:
                bridge = "LOCKED"
            elif self._bridge is not None and self._bridge.alive:
                bridge = "RUNNING"
            else:
                bridge = "BACKOFF" if self._sent else "ABSENT"
            return Report(
                incarnation=self.incarnation,
                version=facelane.__version__,
                revision=self._applied,
                memo_revision=self._memo_revision,
                cameras=dict(self._out),
                reports=dict(self._reports),
                ended=list(self._ended),
                servers=[self._servers[slot].report() for slot in sorted(self._servers)],
                bridge=bridge,
                bridge_restarts=max(0, self._backoff.restarts),
            )

    def close(self, seconds: float = 40.0) -> None:
        """Ends the bridge and the servers in order."""
        self._closing.set()
        self._wake.set()
        self._thread.join(seconds)

    # The thread that owns the processes.

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._wake.wait(STEP_S)
                self._wake.clear()
                try:
                    self._step()
                except Exception:
                    log.exception("a step of the node failed")
        finally:
            self._end()

    def _step(self) -> None:
        if not self._locked:
            # Whatever a process of this node of before has started must be gone.
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._locked = True
        with self._guard:
            order = self._order
        if order is None or not self._locked:
            return
        self._step_servers(order.servers)
        self._step_bridge(order)
        for server in self._servers.values():
            server.step()

    def _step_servers(self, order: ServersOrder) -> None:
        for slot, server in list(self._servers.items()):
            if slot >= order.count or server.order.digest != order.digest:
                del self._servers[slot]
                # Not while the cameras of the others wait.
                ending = threading.Thread(target=server.stop, name=f"stop {slot}", daemon=True)
                ending.start()
                self._retiring.append(ending)
        self._retiring = [thread for thread in self._retiring if thread.is_alive()]
        if self._retiring:
            return
        for slot in range(order.count):
            if slot not in self._servers:
                card = self._cards[slot % len(self._cards)] if self._cards else ""
                made = ServerProcess(
                    slot, order, self._folder, self._address, card, self._lock_file
                )
                with self._guard:
                    self._servers[slot] = made

    def _step_bridge(self, order: Order) -> None:
        now = time.monotonic()
        bridge = self._bridge
        if bridge is not None and not bridge.alive:
            log.warning("the bridge ended: cameras=%d", len(self._out))
            self._lose(bridge)
            self._backoff.ended(now)
            bridge = None
        wanted = order.cameras
        if not self._counts(order, now):
            if bridge is not None and self._out:
                log.warning("out of touch: cameras are let go")
                bridge.stop()
                self._lose(bridge)
            return
        if bridge is None and wanted and self._backoff.due(now):
            self._backoff.started(now)
            lease = order.lease * (1.0 - PULSE_PART)
            bridge = self._bridge = BridgeProcess(lease, self._lock_file, self._told)
            self._sent = ()
        if bridge is not None:
            bridge.flush()
            if wanted != self._sent:
                with self._guard:
                    self._out |= {one.camera.name: one.term for one in wanted}
                bridge.want(wanted)
                self._sent, self._kept_at = wanted, now
            elif now - self._kept_at >= order.lease / KEEP_PART:
                bridge.keep()
                self._kept_at = now
        with self._guard:
            self._applied = order.revision

    def _counts(self, order: Order, now: float) -> bool:
        """Whether the cameras are still this node's: the cluster says so, and the supervisor is
        not unheard for so long that it has given them to others."""
        return self._pulse() <= order.lease * PULSE_PART and now - self._heard_at <= order.silence

    def _told(self, told: Told, _lost: bool) -> None:
        with self._guard:
            for name, report in told.ended.items():
                self._over(name, report)
            for name, report in told.cameras.items():
                if name in self._out:
                    self._reports[name] = report

    def _over(self, name: str, report: CameraReport) -> None:
        """The books of a run are closed. With the guard held."""
        self._number += 1
        self._ended.append(EndedRun(number=self._number, camera=name, report=report))
        del self._ended[:-MAX_ENDED]
        if self._out.get(name) == report.term:
            again = any(one.camera.name == name and one.term == report.term for one in self._sent)
            if not again:
                del self._out[name]
        known = self._reports.get(name)
        if known is not None and known.term == report.term:
            del self._reports[name]

    def _lose(self, bridge: BridgeProcess) -> None:
        """A bridge has ended: what it had last told is what there is."""
        bridge.reap()
        with self._guard:
            self._bridge = None
            self._sent = ()
            for name, report in list(self._reports.items()):
                self._over(name, closed(report, "BRIDGE_LOST"))
            self._out.clear()
            self._reports.clear()

    def _end(self) -> None:
        bridge = self._bridge
        if bridge is not None:
            bridge.stop()
            self._lose(bridge)
        endings = [threading.Thread(target=one.stop) for one in self._servers.values()]
        for ending in endings:
            ending.start()
        for ending in (*endings, *self._retiring):
            ending.join()
        with contextlib.suppress(OSError):
            os.close(self._lock_file)
        shutil.rmtree(self._folder, ignore_errors=True)


def runtime_folder() -> Path:
    """Where nodes of this user keep sockets and what is written for servers: theirs alone. Raises
    ``OSError`` where the folder is somebody else's."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base and os.access(base, os.W_OK):
        folder = Path(base) / "facelane-fleet"
    else:
        folder = Path(tempfile.gettempdir()) / f"facelane-fleet-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not this user's alone: remove it")
    return folder


def _safe(name: str) -> str:
    """A short name for a folder: paths of sockets end at 107 characters."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:40]
