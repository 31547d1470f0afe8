"""Which tasks go next: weighted fair over lanes, earliest deadline first among equals.

Start-time fair queueing. Every lane's next task has a start tag in virtual time,
``max(virtual time, the lane's last finish tag)``; taking it moves the lane's finish tag to
``start + 1 / weight``. Virtual time moves on by ``1 / W`` for every task taken, W being the
weights of the lanes that wait, and never lags behind the start tag taken: so a stream of
ever new lanes, each with one task, cannot starve those that were there before. A lane that
was silent gets its turn at once but no credit for its silence, and a lane that floods waits
for its share.
A task that is withdrawn before it is taken costs its lane nothing.

Pure: no clock, no loop. All operations are O(log n) but the removal of a task out of the
middle of its lane, which is short (a lane holds at most its window).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Final

from facelane_server.pools.tasks import AnyTask

_SLACK: Final = 256
"""Dead heap entries and idle lanes tolerated before they are swept out."""


class _Lane:
    __slots__ = ("finish", "start", "turn", "waiting", "weight")

    def __init__(self, finish: float) -> None:
        self.finish = finish
        self.start = finish
        self.turn = 0
        """Changes with the head; heap entries of another turn are dead."""
        self.waiting: deque[AnyTask] = deque()
        self.weight = 0
        """Of its head; 0 while nothing waits."""


class FairQueue:
    """The tasks of one pool that wait for a worker."""

    def __init__(self) -> None:
        self._lanes: dict[int, _Lane] = {}
        self._heads: list[tuple[float, int, int, int, int]] = []
        """(start tag, deadline, sequence, lane, turn)"""
        self._front: deque[tuple[AnyTask, bool]] = deque()
        """Tasks that come back from a lost worker; True = to be taken alone."""
        self._queued: set[AnyTask] = set()
        self._deadlines: list[tuple[int, int, AnyTask]] = []
        self._virtual = 0.0
        self._weight = 0
        """Sum over the lanes that wait."""
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, task: AnyTask) -> bool:
        return task in self._queued

    @property
    def next_is_alone(self) -> bool:
        """The next task came back to be taken alone."""
        return bool(self._front) and self._front[0][1]

    def put(self, task: AnyTask) -> None:
        """Queue a task behind those of its lane."""
        lane = self._lanes.get(task.lane)
        if lane is None:
            if len(self._lanes) > 2 * len(self._heads) + _SLACK:
                self._sweep_lanes()
            lane = self._lanes[task.lane] = _Lane(self._virtual)
        lane.waiting.append(task)
        self._register(task)
        if len(lane.waiting) == 1:
            self._new_head(task.lane, lane, max(self._virtual, lane.finish))

    def put_back(self, task: AnyTask, *, alone: bool) -> None:
        """Queue a task that was taken before in front of all others; ``alone`` = it must not
        share a batch, because its last one killed a worker."""
        self._front.appendleft((task, alone))
        self._register(task)

    def withdraw(self, task: AnyTask) -> bool:
        """Take a task out. False when it is not queued."""
        if task not in self._queued:
            return False
        self._queued.remove(task)
        for entry in self._front:
            if entry[0] is task:
                self._front.remove(entry)
                return True
        lane = self._lanes[task.lane]
        was_head = lane.waiting[0] is task
        lane.waiting.remove(task)
        if was_head:
            self._new_head(task.lane, lane, lane.start)
        return True

    def take(self, most: int, accept: Callable[[AnyTask], bool]) -> list[AnyTask]:
        """The next batch of at most ``most`` tasks. ``accept`` is asked for each in turn and
        ends the batch with False (it does not fit); the first one is always taken."""
        batch: list[AnyTask] = []
        while self._front and len(batch) < most:
            task, alone = self._front[0]
            if batch and (alone or not accept(task)):
                return batch
            if not batch:
                accept(task)
            self._front.popleft()
            self._queued.remove(task)
            batch.append(task)
            if alone:
                return batch
        heads = self._heads
        while heads and len(batch) < most:
            start, _, _, number, turn = heads[0]
            lane = self._lanes.get(number)
            if lane is None or lane.turn != turn:
                heapq.heappop(heads)
                continue
            task = lane.waiting[0]
            if not accept(task) and batch:
                break
            heapq.heappop(heads)
            lane.waiting.popleft()
            self._queued.remove(task)
            self._virtual = max(self._virtual + 1.0 / self._weight, start)
            lane.finish = start + 1.0 / max(task.weight, 1)
            self._new_head(number, lane, lane.finish)
            batch.append(task)
        if not self._queued:
            # Nobody competes, so nobody has anything to be fair about.
            self._lanes.clear()
            heads.clear()
            self._deadlines.clear()
            self._virtual = 0.0
            self._weight = 0
        return batch

    def next_deadline(self) -> int | None:
        """The earliest deadline of a queued task."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][2] not in self._queued:
            heapq.heappop(deadlines)
        return deadlines[0][0] if deadlines else None

    def expire(self, now_ns: int) -> list[AnyTask]:
        """Take out the tasks whose deadline has come."""
        expired: list[AnyTask] = []
        while (deadline := self.next_deadline()) is not None and deadline <= now_ns:
            task = heapq.heappop(self._deadlines)[2]
            self.withdraw(task)
            expired.append(task)
        return expired

    def clear(self) -> list[AnyTask]:
        """Take out everything."""
        tasks = list(self._queued)
        self.__init__()  # type: ignore[misc]
        return tasks

    def tasks(self) -> list[AnyTask]:
        """All that is queued, in no order."""
        return list(self._queued)

    def _register(self, task: AnyTask) -> None:
        self._queued.add(task)
        self._sequence += 1
        if len(self._deadlines) > 2 * len(self._queued) + _SLACK:
            self._deadlines = [e for e in self._deadlines if e[2] in self._queued]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (task.deadline_ns, self._sequence, task))

    def _new_head(self, number: int, lane: _Lane, start: float) -> None:
        self._sequence += 1
        lane.turn = self._sequence
        weight = max(lane.waiting[0].weight, 1) if lane.waiting else 0
        self._weight += weight - lane.weight
        lane.weight = weight
        if not lane.waiting:
            if lane.finish <= self._virtual:
                del self._lanes[number]
            return
        lane.start = start
        if len(self._heads) > 2 * len(self._lanes) + _SLACK:
            self._heads = [e for e in self._heads if self._is_live(e)]
            heapq.heapify(self._heads)
        heapq.heappush(
            self._heads,
            (start, lane.waiting[0].deadline_ns, self._sequence, number, lane.turn),
        )

    def _is_live(self, entry: tuple[float, int, int, int, int]) -> bool:
        lane = self._lanes.get(entry[3])
        return lane is not None and lane.turn == entry[4]

    def _sweep_lanes(self) -> None:
        idle = [n for n, lane in self._lanes.items() if not lane.waiting]
        for number in idle:
            if self._lanes[number].finish <= self._virtual:
                del self._lanes[number]
