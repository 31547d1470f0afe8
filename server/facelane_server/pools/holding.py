"""Lanes of video whose picture takes several jobs to decode, and what waits behind it: pure.

While such a picture is on its way the lane is given nothing else. A worker that was asked for the
one and the other would begin the group of pictures again for each, and come to the end of neither.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from facelane_server.domain import FacelaneError
from facelane_server.ipc.messages import PictureHeld
from facelane_server.pools.groups import Decoders
from facelane_server.pools.tasks import Answer, AnyTask, DetectAnswer, VideoRequest


@dataclass(slots=True)
class _Lane:
    first: AnyTask
    behind: list[AnyTask] = field(default_factory=list)
    """In the order in which they came."""


class Holding:
    """Of one pool. A picture is over when its future is done, however that came. What waits is
    bounded by the windows of its lanes."""

    def __init__(self) -> None:
        self._lanes: dict[int, _Lane] = {}

    def __len__(self) -> int:
        """Tasks that wait behind others."""
        return sum(len(lane.behind) for lane in self._lanes.values()) if self._lanes else 0

    def __contains__(self, lane: int) -> bool:
        found = self._lanes.get(lane)
        return found is not None and (not found.first.future.done() or bool(found.behind))

    def hold(self, task: AnyTask) -> bool:
        """A picture is not there yet. Whether it is asked for again: else one before it is, and
        it waits behind."""
        lane = self._lanes.get(task.lane)
        if task.future.done() or (lane is not None and lane.first is task):
            return True
        if lane is None or (lane.first.future.done() and not lane.behind):
            self._lanes[task.lane] = _Lane(task)
            return True
        task.dispatched_ns = 0
        self.put(task)
        return False

    def put(self, task: AnyTask) -> None:
        """Behind what came before it, of a lane that is held."""
        insort(self._lanes[task.lane].behind, task, key=lambda each: each.submitted_ns)

    def replace(self, task: AnyTask, by: AnyTask) -> bool:
        """False when it does not wait here."""
        lane = self._lanes.get(task.lane)
        if lane is None or task not in lane.behind:
            return False
        lane.behind[lane.behind.index(task)] = by
        return True

    def withdraw(self, task: AnyTask) -> bool:
        lane = self._lanes.get(task.lane)
        if lane is None or task not in lane.behind:
            return False
        lane.behind.remove(task)
        return True

    def tasks(self) -> Iterator[AnyTask]:
        """All that wait."""
        for lane in self._lanes.values():
            yield from lane.behind

    def next_deadline(self) -> int | None:
        return min((task.deadline_ns for task in self.tasks()), default=None)

    def expire(self, now_ns: int) -> list[AnyTask]:
        """Takes out those whose deadline has come."""
        expired = [task for task in self.tasks() if task.deadline_ns <= now_ns]
        for task in expired:
            self.withdraw(task)
        return expired

    def released(self) -> list[AnyTask]:
        """Takes out what waited behind pictures that are over, each lane's in their order."""
        over = [name for name, lane in self._lanes.items() if lane.first.future.done()]
        return [
            task for name in over for task in self._lanes.pop(name).behind if not task.future.done()
        ]

    def release(self, lane: int) -> list[AnyTask]:
        """The lane has ended: takes out what is still waited for behind its picture."""
        found = self._lanes.pop(lane, None)
        return [] if found is None else [t for t in found.behind if not t.future.done()]

    def clear(self) -> list[AnyTask]:
        """Takes out everything."""
        tasks = list(self.tasks())
        self._lanes.clear()
        return tasks


def note(
    task: AnyTask, answer: Answer | PictureHeld | FacelaneError, decoders: Decoders, now_ns: int
) -> None:
    """What an answer says of the lane's decoder, and of its group of pictures."""
    if not isinstance(task.request, VideoRequest):
        return
    wanted = task.request.wanted
    task.opening = isinstance(answer, PictureHeld) and answer.opening
    if task.ahead:
        # What is wrong with it is told to the next picture, for which all is decoded again.
        if not isinstance(answer, PictureHeld) or answer.position < 0 or answer.waits:
            decoders.forget([task.lane])
    elif isinstance(answer, PictureHeld) and answer.waits:
        pass  # the picture that it waits for has said how far the decoder is
    elif isinstance(answer, FacelaneError):
        decoders.forget([task.lane])
        # What follows needs what cannot be decoded; only where it was a matter of time it can.
        wanted.group.broken = wanted.group.broken or not answer.retryable
    elif isinstance(answer, DetectAnswer) or (isinstance(answer, PictureHeld) and answer.held):
        wanted.group.decoded(wanted.last)
        decoders.shown(task.lane)
    elif isinstance(answer, PictureHeld) and answer.position >= 0:
        decoders.at(task.lane, answer.position)
        if not (answer.opening or decoders.catches_up(task.lane)):
            task.behind_ns = task.behind_ns or now_ns
    else:
        decoders.forget([task.lane])
