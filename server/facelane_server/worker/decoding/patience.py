"""Decoding with an end to one's patience.

What a picture costs is bounded before it is decoded (``headers``); this is for what those
bounds do not foresee. A decoding that outlasts its time is given up: it is that picture's
own failure, its thread runs on beside (nobody can stop it), and a fresh one takes the rest.
OpenCV lets go of the GIL while it decodes, so the loop stays able to answer.

Calls of one lane of video are made one after the other, in the order in which they were begun,
whichever run they are of (``Lanes``).
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Final, Generic, TypeVar, cast

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.worker.journal import log_event, log_exception

Found = TypeVar("Found")

_OWN_WORK: Final = 0.4
"""Share of its time that a picture must have computed for to be blamed: on a machine that has
no processor to spare, the time was somebody else's."""
_LOOK_S: Final = 0.001
"""How often whoever waits for a run looks after what it does meanwhile."""


class _Decoding(Generic[Found]):
    """One picture's, or one lane's of a job. ``lane``: None = of no lane. ``ended`` is called once
    it has, by its thread."""

    def __init__(self, call: Callable[[], Found], lane: int | None) -> None:
        self._call = call
        self.lane = lane
        self.ended: Callable[[], None] = _nothing
        self.ready = math.inf
        """When it was its turn among its lane's; from then on it waits for a thread."""
        self.began: float | None = None
        self.done = False
        self.cancelled = False
        self.found: Found | None = None
        self.failure: BaseException | None = None
        self.queued = False
        """It is with the threads; else others of its lane are before it."""
        self._takers = itertools.count()
        self._clock = 0
        self._computed = 0.0

    def __call__(self) -> bool:
        """Makes the call, once, however many threads it is given to; whether this one was it."""
        if next(self._takers):
            return False
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._computed = time.clock_gettime(self._clock)
        self.began = time.monotonic()
        try:
            self.found = self._call()
        except BaseException as error:
            self.failure = error
        self.done = True
        self.ended()
        return True

    def cancel(self) -> bool:
        """Whether it had not begun, and never will."""
        if not self.cancelled:
            self.cancelled = not next(self._takers)
        return self.cancelled

    def computed(self) -> float:
        """Seconds of the processor that it has had."""
        return time.clock_gettime(self._clock) - self._computed


class Run(Generic[Found]):
    """Calls that were begun together."""

    def __init__(self, tasks: Sequence[_Decoding[Found]], deadline: float) -> None:
        self.tasks = tasks
        self.deadline = deadline
        self.found: dict[int, Found | FacelaneError] = {}
        self.failure: BaseException | None = None
        """That a call has raised."""
        self._ended: set[int] = set()
        self._over = threading.Event()
        if not tasks:
            self._over.set()
        for number, task in enumerate(tasks):
            task.ended = functools.partial(self.end, number)

    @property
    def is_over(self) -> bool:
        """All have ended or were given up."""
        return self._over.is_set()

    def wait(self, timeout_s: float) -> None:
        self._over.wait(timeout_s)

    @property
    def waited_s(self) -> float:
        """How long its calls waited for a thread, on average, of those that have had one."""
        waits = [task.began - task.ready for task in self.tasks if task.began is not None]
        return max(0.0, sum(waits) / len(waits)) if waits else 0.0

    def end(self, number: int) -> None:
        """A call has ended, or nobody waits for it any more."""
        self._ended.add(number)
        if len(self._ended) == len(self.tasks):
            self._over.set()


class _Threads:
    """So many, until ``leave``, or until nobody has them. A thread of a library's pool brings twice
    the locks, and every lock is one more wait for the GIL. What waits for them is bounded by the
    jobs that a worker is given."""

    def __init__(self, count: int, first: Callable[[], None]) -> None:
        """``first``: what each does before all else."""
        tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.submit = tasks.put
        self.leave = weakref.finalize(self, _dismiss, tasks, count)
        """Once they have done what is theirs: those that are not stuck."""
        for number in range(count):
            name = f"decode-{number}"
            threading.Thread(target=_work, args=(tasks, first), name=name, daemon=True).start()


def _work(tasks: SimpleQueue[Callable[[], None] | None], first: Callable[[], None]) -> None:
    try:
        first()
    except Exception as error:  # what is decoded then says what is wrong
        log_exception("a thread that decodes could not settle in", error)
    while (task := tasks.get()) is not None:
        task()
        del task  # it may be all that keeps the threads


def _dismiss(tasks: SimpleQueue[Callable[[], None] | None], count: int) -> None:
    for _ in range(count):
        tasks.put(None)


class Lanes:
    """Whose turn it is, of the calls of each lane. Of any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, deque[tuple[_Decoding[Any], Callable[[], None]]]] = {}
        """The first of each has its turn."""

    def enter(self, task: _Decoding[Any], start: Callable[[], None]) -> None:
        """``start`` is called once those before it have left."""
        if task.lane is not None:
            with self._lock:
                queue = self._waiting.setdefault(task.lane, deque())
                queue.append((task, start))
                if len(queue) > 1:
                    return
        start()

    def leave(self, task: _Decoding[Any]) -> None:
        """It has ended, or was given up; of both the first counts."""
        if task.lane is None:
            return
        with self._lock:
            queue = self._waiting.get(task.lane)
            if not queue or queue[0][0] is not task:
                return
            queue.popleft()
            if not queue:
                del self._waiting[task.lane]
                return
            start = queue[0][1]
        start()


class Decoders:
    """Threads that decode. Used by one thread.

    ``picture_s``: what one picture may take; ``job_s``: all pictures of a run together. ``lanes``:
    shared by all who take calls of the same lanes; ``given_up``: told of a lane before its next
    call has its turn; ``first``: what each thread does before all else.
    """

    def __init__(
        self,
        threads: int,
        picture_s: float,
        job_s: float,
        lanes: Lanes | None = None,
        given_up: Callable[[int], None] | None = None,
        first: Callable[[], None] | None = None,
    ) -> None:
        self._first = first or _nothing
        self._threads = threads
        self._picture_s = picture_s
        self._job_s = job_s
        self._lanes = lanes or Lanes()
        self._given_up = given_up
        self._abandoned: list[_Decoding[Any]] = []
        self._open: list[Run[Any]] = []
        """Begun and not settled, the oldest first."""
        self._changing = threading.Lock()
        self._pool = _Threads(threads, self._first)

    @property
    def worn_out(self) -> bool:
        """So many decodings run on beside that the process had better end."""
        self._abandoned = [one for one in self._abandoned if not one.done]
        return len(self._abandoned) > limits.MAX_ABANDONED_DECODERS

    def run(
        self, calls: Sequence[Callable[[], Found]], meanwhile: Callable[[], None] | None = None
    ) -> list[Found | FacelaneError]:
        """What becomes of calls, at once: ``begin`` and ``settle``."""
        return self.settle(self.begin(calls), meanwhile)

    def begin(
        self,
        calls: Sequence[Callable[[], Found]],
        lanes: Sequence[int | None] = (),
        *,
        unasked: bool = False,
    ) -> Run[Found]:
        """They are made behind those of the runs before; ``settle`` is to be called for each run.
        ``lanes``: of the calls, empty = of none. ``unasked``: nobody waits for them, so their time
        begins now and not when somebody does."""
        whose = lanes or [None] * len(calls)
        tasks = [_Decoding(call, lane) for call, lane in zip(calls, whose, strict=True)]
        run = Run(tasks, time.monotonic() + self._job_s if unasked else math.inf)
        self._open.append(run)
        for task in tasks:
            self._lanes.enter(task, functools.partial(self._queue, task))
        return run

    def _queue(self, task: _Decoding[Any]) -> None:
        """Of any thread."""
        with self._changing:
            task.queued = True
            task.ready = time.monotonic()
            self._pool.submit(functools.partial(self._make, task))

    def _make(self, task: _Decoding[Any]) -> None:
        if task() or task.cancelled:
            self._lanes.leave(task)

    def settle(
        self, run: Run[Found], meanwhile: Callable[[], None] | None = None
    ) -> list[Found | FacelaneError]:
        """Once for each run: the result of each call; PICTURE_TOO_COSTLY for one that was given up,
        DEADLINE_EXCEEDED (retryable) for what there was no time for. Raises what a call has.

        ``meanwhile``: called again and again while they are waited for."""
        run.deadline = min(run.deadline, time.monotonic() + self._job_s)
        try:
            while True:
                look = self.look_after(run)
                if run.failure is not None:
                    raise run.failure
                if len(run.found) == len(run.tasks):
                    return [run.found[i] for i in range(len(run.tasks))]
                while not run.is_over and (left := look - time.monotonic()) > 0:
                    if meanwhile is None:
                        run.wait(left)
                    else:
                        meanwhile()
                        run.wait(min(left, _LOOK_S))
        finally:
            self._open.remove(run)

    def look_after(self, run: Run[Any]) -> float:
        """Gives up what has outlasted its time; when there will be something to give up."""
        now = time.monotonic()
        look = run.deadline if now < run.deadline else now + self._picture_s / 4
        stuck = False
        for i, task in enumerate(run.tasks):
            if i in run.found:
                continue
            if task.done:
                run.failure = run.failure or task.failure
                run.found[i] = cast("Any", task.found)
                continue
            due = (now if task.began is None else task.began) + self._picture_s
            late = now >= run.deadline
            error = self._verdict(task, over=late) if now >= min(due, run.deadline) else None
            if error is None:
                look = min(look, due if due > now else now + self._picture_s / 4)
                continue
            run.found[i] = error
            if not task.cancel():
                self._abandoned.append(task)
                stuck = True
                if task.lane is not None:
                    if self._given_up is not None:
                        self._given_up(task.lane)
                    self._lanes.leave(task)
            run.end(i)
        if stuck:
            self._afresh()
        return look

    def _afresh(self) -> None:
        """New threads, and what has not begun given to them, of all runs: there may be no thread
        left that is not stuck."""
        with self._changing:
            self._pool.leave()
            self._pool = _Threads(self._threads, self._first)
            for run in self._open:
                for task in run.tasks:
                    if task.queued and task.began is None:
                        self._pool.submit(functools.partial(self._make, task))

    def _verdict(self, task: _Decoding[Found], *, over: bool) -> FacelaneError | None:
        if task.began is not None and task.computed() >= _OWN_WORK * self._picture_s:
            log_event("a picture was given up", level="warning", seconds=round(task.computed(), 2))
            return FacelaneError(
                Reason.PICTURE_TOO_COSTLY,
                f"the picture was given up after {self._picture_s:g} s of decoding; save it "
                "again as a plain one",
            )
        if not over:
            return None
        return FacelaneError(
            Reason.DEADLINE_EXCEEDED,
            "the pictures before it took too long to decode; send it again",
            retryable=True,
        )


def _nothing() -> None:
    pass
