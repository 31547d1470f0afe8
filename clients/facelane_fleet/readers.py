"""A node's bridges, and which of them reads which camera.

A bridge is one process and carries so many cameras as a core does; further ones take the others. A
camera stays with its bridge, and comes back to it while that has not let it go: so two of a node
never read it at once. Called from the thread that owns the node's processes; what bridges tell
comes from threads of theirs, under ``guard``.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Final

from facelane_bridge.hosting import CameraReport, HostedCamera, Told
from facelane_fleet.accounts import closed
from facelane_fleet.messages import MAX_ENDED, EndedRun, Order
from facelane_fleet.processes import Backoff, BridgeProcess

log = logging.getLogger("facelane_fleet")

KEEP_PART: Final = 8
"""A bridge hears so many words within its lease."""
PULSE_PART: Final = 0.4
"""Of the lease: the cluster may be unheard for so long; the rest is the bridges' own lease."""


class Reader:
    """One bridge and its cameras; ``out``: those, with their terms, that it has been given and not
    said to have ended."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self.wanted: tuple[HostedCamera, ...] = ()
        self.out: dict[str, int] = {}
        self.reports: dict[str, CameraReport] = {}
        self.backoff = Backoff()
        self._bridge: BridgeProcess | None = None
        self._sent: tuple[HostedCamera, ...] = ()
        self._kept_at = 0.0

    @property
    def running(self) -> bool:
        return self._bridge is not None and self._bridge.alive

    def step(self, lease: float, now: float) -> None:
        """Starts the bridge, or again, and tells it what is new."""
        bridge = self._bridge
        if bridge is not None and not bridge.alive:
            log.warning("a bridge ended: cameras=%d", len(self.out))
            self._lose()
            self.backoff.ended(now)
            bridge = None
        if bridge is None and self.wanted and self.backoff.due(now):
            self.backoff.started(now)
            bridge = self._bridge = BridgeProcess(
                lease * (1.0 - PULSE_PART), self._readers.lock_file, self._told
            )
        if bridge is None:
            return
        bridge.flush()
        if self.wanted != self._sent:
            with self._readers.guard:
                self.out |= {one.camera.name: one.term for one in self.wanted}
            bridge.want(self.wanted)
            self._sent, self._kept_at = self.wanted, now
        elif now - self._kept_at >= lease / KEEP_PART:
            bridge.keep()
            self._kept_at = now

    def stop(self) -> None:
        """Ends the bridge; its cameras are free."""
        if self._bridge is not None:
            self._bridge.stop()
            self._lose()

    def _told(self, told: Told) -> None:
        with self._readers.guard:
            for name, report in told.ended.items():
                self._over(name, report)
            for name, report in told.cameras.items():
                if name in self.out:
                    self.reports[name] = report

    def _over(self, name: str, report: CameraReport) -> None:
        """The books of a run are closed. With the guard held."""
        self._readers.close_run(name, report)
        wanted = any(one.camera.name == name and one.term == report.term for one in self._sent)
        if self.out.get(name) == report.term and not wanted:
            del self.out[name]
        known = self.reports.get(name)
        if known is not None and known.term == report.term:
            del self.reports[name]

    def _lose(self) -> None:
        """The bridge has ended: what it had last told is what there is."""
        assert self._bridge is not None
        self._bridge.reap()
        with self._readers.guard:
            self._bridge = None
            self._sent = ()
            for name, report in list(self.reports.items()):
                self._over(name, closed(report, "BRIDGE_LOST"))
            self.out.clear()
            self.reports.clear()


class Readers:
    """All bridges of a node. ``lock_file``: a descriptor that they hold as long as they live."""

    def __init__(self, lock_file: int, guard: threading.Lock) -> None:
        self.lock_file = lock_file
        self.guard = guard
        self.ended: list[EndedRun] = []
        self._number = 0
        self._all: list[Reader] = []
        self._by_camera: dict[str, Reader] = {}
        self._restarts = 0

    def step(self, order: Order, *, ours: bool) -> None:
        """Follows an order; ``ours``: whether the cameras are still this node's."""
        now = time.monotonic()
        if not ours:
            if any(reader.out for reader in self._all):
                log.warning("out of touch: cameras are let go")
            for reader in self._all:
                reader.stop()
            return
        self._assign(order)
        for reader in list(self._all):
            reader.step(order.lease, now)
            idle = not reader.wanted and not reader.out
            if idle and reader is not self._all[0]:
                reader.stop()
                with self.guard:
                    self._restarts += max(0, reader.backoff.restarts)
                    self._all.remove(reader)
                # One that was let go of since they were given out comes to another bridge.
                kept = {name: one for name, one in self._by_camera.items() if one is not reader}
                self._by_camera = kept

    def _assign(self, order: Order) -> None:
        wanted: dict[Reader, list[HostedCamera]] = {reader: [] for reader in self._all}
        names = {one.camera.name for one in order.cameras}
        for name, reader in list(self._by_camera.items()):
            if name not in names and name not in reader.out:
                del self._by_camera[name]
        fresh = []
        for one in order.cameras:
            known = self._by_camera.get(one.camera.name)
            if known is None:
                fresh.append(one)
            else:
                wanted[known].append(one)
        for one in fresh:
            free = min(wanted, key=lambda each: len(wanted[each]), default=None)
            if free is None or len(wanted[free]) >= order.cameras_per_bridge:
                free = Reader(self)
                with self.guard:
                    self._all.append(free)
                wanted[free] = []
            self._by_camera[one.camera.name] = free
            wanted[free].append(one)
        for reader, cameras in wanted.items():
            reader.wanted = tuple(cameras)

    def stop(self) -> None:
        """Ends all bridges, side by side."""
        endings = [threading.Thread(target=reader.stop) for reader in self._all]
        for ending in endings:
            ending.start()
        for ending in endings:
            ending.join()

    # With the guard held.

    def close_run(self, camera: str, report: CameraReport) -> None:
        self._number += 1
        self.ended.append(EndedRun(number=self._number, camera=camera, report=report))
        del self.ended[:-MAX_ENDED]

    def taken(self, number: int) -> None:
        """Books up to this number need not be told again."""
        self.ended = [run for run in self.ended if run.number > number]

    def cameras(self) -> dict[str, int]:
        """Those that may still be read here, with their terms."""
        return {name: term for reader in self._all for name, term in reader.out.items()}

    def reports(self) -> dict[str, CameraReport]:
        """What is told of each."""
        return {name: one for reader in self._all for name, one in reader.reports.items()}

    def state(self) -> str:
        """RUNNING, ABSENT or BACKOFF."""
        if any(reader.wanted and not reader.running for reader in self._all):
            return "BACKOFF"
        return "RUNNING" if any(reader.running for reader in self._all) else "ABSENT"

    def count(self) -> int:
        """Bridges that run."""
        return sum(reader.running for reader in self._all)

    def restarts(self) -> int:
        return self._restarts + sum(max(0, reader.backoff.restarts) for reader in self._all)
