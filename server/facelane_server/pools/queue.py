"""Which tasks go next: weighted fair on three levels, earliest deadline first among equals.

Streams and single pictures share the pool first, then the keys of each among one another,
then the lanes of each key. A key's weight is the operator's; a lane's weight, which the
client chooses, divides its own key's share and nobody else's. A share that nobody uses is
everybody's.

Every level is start-time fair queueing. Each child's next task has a start tag in the
level's virtual time, ``max(virtual time, the child's last finish tag)``; taking it moves
the finish tag to ``start + 1 / weight``. Virtual time moves on by ``1 / W`` for every task
taken, W being the weights of the children that wait, and never lags behind the start tag
taken: so a stream of ever new lanes, each with one task, cannot starve those that were
there before. Who was silent gets its turn at once but no credit for the silence, and who
floods waits for its share. A task that is withdrawn before it is taken costs nothing.

While all that waits goes into the next batch there is nothing to be fair about: what has come since
the queue was empty is placed in the levels once some of it has to wait for another's.

Pure: no clock, no loop. All operations are O(log n) but the removal of a task out of the
middle of its lane, which is short (a lane holds at most its window).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Hashable
from typing import Final, TypeVar

from facelane_server.pools.tasks import AnyTask

_SLACK: Final = 256
"""Dead heap entries and idle children tolerated before they are swept out."""
_MOST_FRESH: Final = 32
"""Tasks without a place in the levels, which are gone through one by one."""
_STREAMS_SHARE: Final = 4
"""Of the streams, against single pictures' 1, while both wait."""

C = TypeVar("C", bound="_Lane")


class _Lane:
    """What waits of one lane. Like a ``_Level``, a child of one."""

    def __init__(self, finish: float) -> None:
        self.start = self.finish = finish
        self.next: AnyTask | None = None
        """Its first task, as of when the level above was told of it."""
        self.turn = 0
        """Changes with the head; heap entries of another turn are dead."""
        self.weight = 0
        """As counted in the level above; 0 while nothing waits."""
        self.waiting: deque[AnyTask] = deque()

    def head(self) -> AnyTask | None:
        return self.waiting[0] if self.waiting else None

    def weight_of(self, head: AnyTask) -> int:
        return head.weight


class _Level(_Lane):
    """Children that share; ``waiting`` stays empty."""

    def __init__(self, finish: float = 0.0) -> None:
        super().__init__(finish)
        self.children: dict[Hashable, _Lane] = {}
        self.heads: list[tuple[float, int, int, Hashable]] = []
        """(start tag, deadline, turn, child)"""
        self.virtual = 0.0
        self.total = 0
        """Weight of the children that wait."""

    def head(self) -> AnyTask | None:
        first = self.first()
        return None if first is None else first[1].next

    def first(self) -> tuple[Hashable, _Lane] | None:
        """The child whose turn it is."""
        heads = self.heads
        while heads:
            _, _, turn, name = heads[0]
            child = self.children.get(name)
            if child is not None and child.turn == turn:
                return name, child
            heapq.heappop(heads)
        return None

    def child(self, name: Hashable, kind: type[C]) -> C:
        found = self.children.get(name)
        if found is None:
            if len(self.children) > 2 * len(self.heads) + _SLACK:
                self.children = {
                    n: c for n, c in self.children.items() if c.weight or c.finish > self.virtual
                }
            found = self.children[name] = kind(self.virtual)
        assert isinstance(found, kind)
        return found

    def renew(self, name: Hashable, child: _Lane, start: float, turn: int) -> None:
        """The child has another head, or none any more."""
        before, child.turn = child.turn, turn
        head = child.next = child.head()
        weight = 0 if head is None else child.weight_of(head) or 1
        self.total += weight - child.weight
        child.weight = weight
        if head is None:
            if child.finish <= self.virtual:
                del self.children[name]
            return
        child.start = start
        if self.heads and self.heads[0][2] == before:
            heapq.heapreplace(self.heads, (start, head.deadline_ns, turn, name))
            return
        if len(self.heads) > 2 * len(self.children) + _SLACK:
            self.heads = [e for e in self.heads if self._is_live(e)]
            heapq.heapify(self.heads)
        heapq.heappush(self.heads, (start, head.deadline_ns, turn, name))

    def _is_live(self, entry: tuple[float, int, int, Hashable]) -> bool:
        child = self.children.get(entry[3])
        return child is not None and child.turn == entry[2]


class _Key(_Level):
    """The lanes of one key."""

    def weight_of(self, head: AnyTask) -> int:
        return head.sender.weight


class _Kind(_Level):
    """The keys of the streams, or of single pictures."""

    def weight_of(self, head: AnyTask) -> int:
        return _STREAMS_SHARE if head.sender.live else 1


_Path = list[tuple[_Level, Hashable, _Lane]]
"""Level, child's name, child."""


def _by_turns(tasks: list[AnyTask]) -> list[AnyTask]:
    """Each lane's in their order, lanes by their weights, among equals the earliest deadline first:
    what the levels come to, but for kinds and keys."""
    if len(tasks) == 1:
        return tasks
    finish: dict[int, float] = {}
    order: list[tuple[float, int, int, AnyTask]] = []
    for number, task in enumerate(tasks):
        start = finish.get(task.lane, 0.0)
        finish[task.lane] = start + 1.0 / (task.weight or 1)
        order.append((start, task.deadline_ns, number, task))
    order.sort()
    return [entry[3] for entry in order]


class FairQueue:
    """The tasks of one pool that wait for a worker."""

    def __init__(self) -> None:
        self._root = _Level()
        self._front: deque[tuple[AnyTask, bool]] = deque()
        """Tasks that come back from a lost worker; True = to be taken alone."""
        self._queued: set[AnyTask] = set()
        self.count = 0
        """Tasks that wait."""
        self._by_key: dict[str, int] = {}
        self._deadlines: list[tuple[int, int, AnyTask]] = []
        self._sequence = 0
        self._fresh: list[AnyTask] = []
        """All that waits, in the order in which it came, since the queue was empty: it has no place
        in the levels, nor among the deadlines, until some of it has to wait for the rest."""

    def __len__(self) -> int:
        return self.count

    def __contains__(self, task: AnyTask) -> bool:
        return task in self._queued

    def waiting_of(self, key: str) -> int:
        """Tasks that wait of a key."""
        return self._by_key.get(key, 0)

    @property
    def share(self) -> float:
        """Weights of those that wait: streams by their keys, single pictures as a quarter."""
        self._place_fresh()
        kinds = self._root.children.values()
        waiting = [kind for kind in kinds if isinstance(kind, _Kind) and kind.weight]
        return sum(k.total if k.weight > 1 else 1 / _STREAMS_SHARE for k in waiting) or 1.0

    def has_lane(self, task: AnyTask) -> bool:
        """Whether another task of its lane waits."""
        return any(other.lane == task.lane for other in self._queued)

    def in_order(self) -> list[AnyTask]:
        """All that is queued, each once, in the order of deadlines."""
        self._place_fresh()
        # One that was taken and came back stands there more than once.
        ordered = dict.fromkeys(task for _, _, task in sorted(self._deadlines))
        return [task for task in ordered if task in self._queued]

    @property
    def next_is_alone(self) -> bool:
        """The next task came back to be taken alone."""
        return bool(self._front) and self._front[0][1]

    def put(self, task: AnyTask) -> None:
        """Queue a task behind those of its lane."""
        if not self._queued or 0 < len(self._fresh) < _MOST_FRESH:
            self._count(task)
            self._fresh.append(task)
            return
        self._place_fresh()
        self._count(task)
        self._place(task)

    def _place_fresh(self) -> None:
        """It is to be decided whose turn it is."""
        fresh, self._fresh = self._fresh, []
        for task in fresh:
            self._place(task)

    def _place(self, task: AnyTask) -> None:
        path = self._path(task)
        lane = path[2][2]
        lane.waiting.append(task)
        self._note_deadline(task)
        if len(lane.waiting) == 1:
            self._renew(path)

    def put_back(self, task: AnyTask, *, alone: bool) -> None:
        """Queue a task that was taken before in front of all others; ``alone`` = it must not
        share a batch, because its last one killed a worker."""
        self._place_fresh()
        self._front.appendleft((task, alone))
        self._count(task)
        self._note_deadline(task)

    def withdraw(self, task: AnyTask) -> bool:
        """Take a task out. False when it is not queued."""
        if task not in self._queued:
            return False
        self._forget(task)
        if self._fresh:
            self._fresh.remove(task)
            return True
        for entry in self._front:
            if entry[0] is task:
                self._front.remove(entry)
                return True
        path = self._path(task)
        lane = path[2][2]
        was_head = lane.waiting[0] is task
        lane.waiting.remove(task)
        if was_head:
            self._renew(path)
        return True

    def replace(self, task: AnyTask, by: AnyTask) -> bool:
        """Put a task in another's place, with the other's turn; both are of one lane. False when
        that one is not queued, or came back from a lost worker."""
        if task not in self._queued:
            return False
        if self._fresh:
            self._forget(task)
            self._count(by)
            self._fresh[self._fresh.index(task)] = by
            return True
        path = self._path(task)
        lane = path[2][2]
        if task not in lane.waiting:
            return False
        lane.waiting[lane.waiting.index(task)] = by
        for _, _, child in path:
            if child.next is task:
                child.next = by
        self._forget(task)
        self._count(by)
        self._note_deadline(by)
        return True

    def take(self, most: int, accept: Callable[[AnyTask], bool]) -> list[AnyTask]:
        """The next batch of at most ``most`` tasks. ``accept`` is asked for each in turn and
        ends the batch with False (it does not fit); the first one is always taken."""
        if self._fresh:
            if len(self._fresh) <= most or self._is_one_lane():
                return self._take_fresh(most, accept)
            self._place_fresh()
        batch: list[AnyTask] = []
        while self._front and len(batch) < most:
            task, alone = self._front[0]
            if batch and (alone or not accept(task)):
                return batch
            if not batch:
                accept(task)
            self._front.popleft()
            self._forget(task)
            batch.append(task)
            if alone:
                return batch
        while len(batch) < most and (path := self._first()) is not None:
            head = path[2][2].waiting[0]
            if not accept(head) and batch:
                break
            self._take(head, path)
            batch.append(head)
        if not self._queued:
            self._start_anew()
        return batch

    def _is_one_lane(self) -> bool:
        first = self._fresh[0]
        return all(
            task.lane == first.lane and task.sender is first.sender for task in self._fresh[1:]
        )

    def _take_fresh(self, most: int, accept: Callable[[AnyTask], bool]) -> list[AnyTask]:
        """All of it, or of one lane as much as there is room for. What does not fit into the bytes
        of a batch goes next: nobody waits for long, and nobody is charged."""
        fresh = _by_turns(self._fresh)
        batch: list[AnyTask] = []
        for task in fresh[:most]:
            if not accept(task) and batch:
                break
            self._forget(task)
            batch.append(task)
        self._fresh = fresh[len(batch) :]
        if not self._fresh:
            self._start_anew()
        return batch

    def _start_anew(self) -> None:
        """Nobody competes, so nobody has anything to be fair about."""
        if self._root.children or self._root.heads:
            self._root = _Level()
        self._deadlines.clear()

    def next_deadline(self) -> int | None:
        """The earliest deadline of a queued task."""
        if self._fresh:
            return min([task.deadline_ns for task in self._fresh])
        deadlines = self._deadlines
        while deadlines and deadlines[0][2] not in self._queued:
            heapq.heappop(deadlines)
        return deadlines[0][0] if deadlines else None

    def expire(self, now_ns: int) -> list[AnyTask]:
        """Take out the tasks whose deadline has come."""
        expired: list[AnyTask] = []
        for task in [task for task in self._fresh if task.deadline_ns <= now_ns]:
            expired.append(task)
            self.withdraw(task)
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

    def _first(self) -> _Path | None:
        """The way to the lane whose turn it is; None when nothing waits there."""
        first = self._root.first()
        if first is None:
            return None
        kind = first[1]
        assert isinstance(kind, _Level)
        second = kind.first()
        key = second and second[1]
        assert second is not None
        assert isinstance(key, _Level)
        third = key.first()
        assert third is not None
        return [(self._root, *first), (kind, *second), (key, *third)]

    def _path(self, task: AnyTask) -> _Path:
        """From the root down to the task's lane."""
        sender = task.sender
        kind = self._root.child(sender.live, _Kind)
        key = kind.child(sender.key, _Key)
        lane = key.child(task.lane, _Lane)
        return [(self._root, sender.live, kind), (kind, sender.key, key), (key, task.lane, lane)]

    def _count(self, task: AnyTask) -> None:
        assert task not in self._queued, "it waits already"
        self._queued.add(task)
        self.count += 1
        key = task.sender.key
        self._by_key[key] = self._by_key.get(key, 0) + 1

    def _note_deadline(self, task: AnyTask) -> None:
        self._sequence += 1
        if len(self._deadlines) > 2 * len(self._queued) + _SLACK:
            self._deadlines = [e for e in self._deadlines if e[2] in self._queued]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (task.deadline_ns, self._sequence, task))

    def _forget(self, task: AnyTask) -> None:
        self._queued.remove(task)
        self.count -= 1
        key = task.sender.key
        self._by_key[key] -= 1
        if not self._by_key[key]:
            del self._by_key[key]

    def _renew(self, path: _Path) -> None:
        """The lane at the end of the path has another head, at no cost."""
        for level, name, child in reversed(path):
            waited = child.weight > 0
            start = child.start if waited else max(level.virtual, child.finish)
            self._sequence += 1
            was_first = waited and level.first() == (name, child)
            level.renew(name, child, start, self._sequence)
            if level.weight and not was_first and level.first() != (name, child):
                return  # the level's own head is the same as before

    def _take(self, task: AnyTask, path: _Path) -> None:
        self._forget(task)
        path[-1][2].waiting.popleft()
        for level, name, child in reversed(path):
            level.virtual = max(level.virtual + 1.0 / level.total, child.start)
            child.finish = child.start + 1.0 / child.weight
            self._sequence += 1
            level.renew(name, child, child.finish, self._sequence)
