"""Who stands where: the tasks that any worker can take, and those of each worker's video.

A lane of video belongs to one worker at a time, whose decoder knows what came before. It is given
to the worker with the fewest, and stays there until that one is gone; with a key frame, which
needs nothing of what came before, it may move to one that has fewer. What has no worker to
belong to waits with the others, and belongs to whoever takes it.

A worker has so many decoders and no more. Where all are taken, a key that has more than its part of
them gives up its newest lane for one of a key that has less: nobody's video is shut out by the
number of another's.

Each queue is fair in itself (``queue``); a worker that finds tasks in both takes from each by the
shares of the keys that wait there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from facelane_server import limits
from facelane_server.pools.queue import FairQueue
from facelane_server.pools.tasks import AnyTask, VideoRequest

S = TypeVar("S")


class _Own:
    """A worker's queue beside the one for all."""

    def __init__(self, lanes: Iterable[int] = ()) -> None:
        self.queue = FairQueue()
        self.lanes = set(lanes)
        self.turns = 0.0
        self.turns_of_all = 0.0
        self.passed: dict[int, AnyTask] = {}
        """The newest picture of each lane that nobody looks at, if no decoder has had it."""

    def pick(self, shared: FairQueue) -> FairQueue:
        """Whose turn it is, both having tasks."""
        if self.turns <= self.turns_of_all:
            self.turns += 1 / self.queue.share
            chosen = self.queue
        else:
            self.turns_of_all += 1 / shared.share
            chosen = shared
        least = min(self.turns, self.turns_of_all)
        self.turns -= least
        self.turns_of_all -= least
        return chosen


class Lineup(Generic[S]):
    """``S``: a worker."""

    def __init__(self) -> None:
        self._shared = FairQueue()
        self._own: dict[S, _Own] = {}
        self._homes: dict[int, S] = {}
        self._keys: dict[int, str] = {}
        """Whose the lanes are that belong to a worker."""

    def __len__(self) -> int:
        count = self._shared.count
        for own in self._own.values():
            count += own.queue.count
        return count

    def __contains__(self, task: AnyTask) -> bool:
        if not self._own:
            return task in self._shared
        return any(task in queue for queue in self._queues())

    def _queues(self) -> Iterator[FairQueue]:
        yield self._shared
        for own in self._own.values():
            yield own.queue

    # -- in and out -----------------------------------------------------------------------

    def has_home(self, task: AnyTask, seats: Sequence[S]) -> bool:
        """Whether some worker has room for the task's lane, or is given some."""
        if not isinstance(task.request, VideoRequest) or not seats:
            return True
        return self._home(task, seats) is not None or (
            self._make_room(task.sender.key) and self._home(task, seats) is not None
        )

    def _make_room(self, key: str) -> bool:
        """Whether a lane of a key with more than its part has given up its place."""
        lanes = Counter(self._keys.values())
        lanes[key] += 0
        greedy, most = max(lanes.items(), key=lambda item: item[1])
        part = len(self._keys) // len(lanes)
        if lanes[key] >= part or most <= part:
            return False
        self.release(next(lane for lane in reversed(self._keys) if self._keys[lane] == greedy))
        return True

    def put(self, task: AnyTask, seats: Sequence[S] = ()) -> None:
        """Queue a task behind those of its lane; ``seats``: the workers that there are."""
        if not isinstance(task.request, VideoRequest):
            self._shared.put(task)
            return
        home = self._home(task, seats)
        (self._shared if home is None else self._own[home].queue).put(task)

    def put_back(self, task: AnyTask, *, alone: bool) -> None:
        """See ``FairQueue``: in front of all, where its lane belongs now."""
        home = self._homes.get(task.lane) if isinstance(task.request, VideoRequest) else None
        (self._shared if home is None else self._own[home].queue).put_back(task, alone=alone)

    def withdraw(self, task: AnyTask) -> bool:
        if not self._own:
            return self._shared.withdraw(task)
        return any(queue.withdraw(task) for queue in self._queues())

    def replace(self, task: AnyTask, by: AnyTask) -> bool:
        if not self._own:
            return self._shared.replace(task, by)
        return any(queue.replace(task, by) for queue in self._queues())

    def expire(self, now_ns: int) -> list[AnyTask]:
        if not self._own:
            return self._shared.expire(now_ns)
        expired = self._shared.expire(now_ns) if self._shared.count else []
        for own in self._own.values():
            if own.queue.count:
                expired += own.queue.expire(now_ns)
        return expired

    def next_deadline(self) -> int | None:
        if not self._own:
            return self._shared.next_deadline()
        first = self._shared.next_deadline() if self._shared.count else None
        for own in self._own.values():
            if own.queue.count:
                at = own.queue.next_deadline()
                if first is None or (at is not None and at < first):
                    first = at
        return first

    def waiting_of(self, key: str) -> int:
        if not self._own:
            return self._shared.waiting_of(key)
        return sum(queue.waiting_of(key) for queue in self._queues())

    def tasks(self) -> list[AnyTask]:
        return [task for queue in self._queues() for task in queue.tasks()]

    def clear(self) -> list[AnyTask]:
        return [task for queue in self._queues() for task in queue.clear()]

    @property
    def has_homes(self) -> bool:
        """Some lanes belong to a worker."""
        return bool(self._homes)

    # -- lanes and their workers ------------------------------------------------------------

    def settle(self, seats: Sequence[S]) -> None:
        """These workers there are: what belonged to others belongs to them."""
        if not self._own:
            return
        for seat in [seat for seat in self._own if seat not in seats]:
            own = self._own.pop(seat)
            for lane in own.lanes:
                del self._homes[lane], self._keys[lane]
            for task in own.queue.in_order():
                own.queue.withdraw(task)
                self.put(task, seats)

    def release(self, lane: int) -> None:
        """The lane has ended."""
        home = self._homes.pop(lane, None)
        if home is not None:
            del self._keys[lane]
            self._own[home].lanes.discard(lane)
            self._own[home].passed.pop(lane, None)

    def _home(self, task: AnyTask, seats: Sequence[S]) -> S | None:
        """Of the task's lane; a new one if it has none, or better begins in another place."""
        home = self._homes.get(task.lane)
        if home is not None and (home not in seats or not self._may_move(task, home)):
            return home
        fewest = min(seats, key=self._load, default=None)
        if fewest is None or (home is not None and self._load(fewest) + 1 >= self._load(home)):
            return home
        if self._load(fewest) >= limits.MAX_DECODERS:
            return home
        self._move(task, fewest)
        return fewest

    def _may_move(self, task: AnyTask, home: S) -> bool:
        """With a key frame, unless pictures before it still wait there."""
        assert isinstance(task.request, VideoRequest)
        return task.request.wanted.picture == 0 and not self._own[home].queue.has_lane(task)

    def _load(self, seat: S) -> int:
        own = self._own.get(seat)
        return len(own.lanes) if own else 0

    def _move(self, task: AnyTask, seat: S) -> None:
        lane = task.lane
        self.release(lane)
        self._homes[lane], self._keys[lane] = seat, task.sender.key
        self._own.setdefault(seat, _Own()).lanes.add(lane)

    # -- what nobody looks at ---------------------------------------------------------------

    def pass_by(self, task: AnyTask) -> None:
        """A picture of a lane of video that is only to be decoded."""
        home = self._homes.get(task.lane)
        if home is not None:
            self._own[home].passed[task.lane] = task

    def passed(self, seat: S) -> list[AnyTask]:
        """What may be decoded by this worker now, of each lane the newest, those that wait longest
        first. Not of lanes that have a task that waits: its picture would be passed over."""
        own = self._own.get(seat) if self._own else None
        if own is None or not own.passed:
            return []
        waiting = {task.lane for task in own.queue.tasks()}
        return [task for lane, task in own.passed.items() if lane not in waiting]

    def forget_passed(self, lane: int) -> None:
        """Its access units go with a job, or with the lane's next picture."""
        home = self._homes.get(lane)
        if home is not None:
            self._own[home].passed.pop(lane, None)

    # -- what goes next -------------------------------------------------------------------

    def is_alone(self, seat: S) -> bool | None:
        """Whether the next task for this worker must be alone; None when there is none."""
        own = self._own.get(seat) if self._own else None
        if own is not None and own.queue.count:
            return own.queue.next_is_alone or (
                self._shared.count > 0 and self._shared.next_is_alone
            )
        return self._shared.next_is_alone if self._shared.count else None

    def take(self, seat: S, most: int, accept: Callable[[AnyTask], bool]) -> list[AnyTask]:
        """The next batch for this worker; see ``FairQueue``."""
        own, queue = self._own.get(seat) if self._own else None, self._shared
        if own is not None and own.queue.count:
            queue = own.pick(queue) if queue.count else own.queue
        batch = queue.take(most, accept)
        if queue is self._shared:
            for task in batch:
                if isinstance(task.request, VideoRequest) and self._homes.get(task.lane) != seat:
                    self._move(task, seat)
        return batch
