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
from facelane_fleet.messages import Order, Report, ServersOrder
from facelane_fleet.processes import ServerProcess
from facelane_fleet.readers import PULSE_PART, Readers

log = logging.getLogger("facelane_fleet")

STEP_S: Final = 0.1


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
        self._readers = Readers(self._lock_file, self._guard)
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
                self._readers.taken(order.taken)
        self._wake.set()
        return msgspec.json.encode(self.report())

    def recall(self) -> tuple[int, bytes | None]:
        """What was to be kept for the supervisor, and its number."""
        with self._guard:
            return self._memo_revision, self._memo

    def report(self) -> Report:
        """What is here now."""
        with self._guard:
            return Report(
                incarnation=self.incarnation,
                version=facelane.__version__,
                revision=self._applied,
                memo_revision=self._memo_revision,
                cameras=self._readers.cameras(),
                reports=self._readers.reports(),
                ended=list(self._readers.ended),
                servers=[self._servers[slot].report() for slot in sorted(self._servers)],
                bridge=self._readers.state() if self._locked else "LOCKED",
                bridges=self._readers.count(),
                bridge_restarts=self._readers.restarts(),
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
        self._readers.step(order, ours=self._is_ours(order))
        with self._guard:
            self._applied = order.revision
        for server in self._servers.values():
            server.step()

    def _step_servers(self, order: ServersOrder) -> None:
        for slot, server in list(self._servers.items()):
            if slot >= order.count or server.order.digest != order.digest:
                with self._guard:
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

    def _is_ours(self, order: Order) -> bool:
        """Whether the cameras are still this node's: the cluster says so, and the supervisor is
        not unheard for so long that it has given them to others."""
        unheard = time.monotonic() - self._heard_at
        return self._pulse() <= order.lease * PULSE_PART and unheard <= order.silence

    def _end(self) -> None:
        self._readers.stop()
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
