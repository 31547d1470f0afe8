"""Decoding with an end to one's patience.

What a picture costs is bounded before it is decoded (``headers``); this is for what those
bounds do not foresee. A decoding that outlasts its time is given up: it is that picture's
own failure, its thread runs on beside (nobody can stop it), and a fresh one takes the rest.
OpenCV lets go of the GIL while it decodes, so the loop stays able to answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Final, Generic, TypeVar

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.worker.journal import log_event

Found = TypeVar("Found")

_OWN_WORK: Final = 0.4
"""Share of its time that a picture must have computed for to be blamed: on a machine that has
no processor to spare, the time was somebody else's."""


class _Decoding(Generic[Found]):
    """One picture's."""

    def __init__(self, call: Callable[[], Found]) -> None:
        self._call = call
        self.began: float | None = None
        self._clock = 0
        self._computed = 0.0

    def __call__(self) -> Found:
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._computed = time.clock_gettime(self._clock)
        self.began = time.monotonic()
        return self._call()

    def computed(self) -> float:
        """Seconds of the processor that it has had."""
        return time.clock_gettime(self._clock) - self._computed


class Decoders:
    """Threads that decode. Used by one thread.

    ``picture_s``: what one picture may take; ``job_s``: all pictures of a call together.
    """

    def __init__(self, threads: int, picture_s: float, job_s: float) -> None:
        self._threads = threads
        self._picture_s = picture_s
        self._job_s = job_s
        self._abandoned: list[Future[Any]] = []
        self._begun: tuple[list[_Decoding[Any]], list[Future[Any]], float] = [], [], 0.0
        self._pool = ThreadPoolExecutor(threads, "decode")

    @property
    def worn_out(self) -> bool:
        """So many decodings run on beside that the process had better end."""
        self._abandoned = [one for one in self._abandoned if not one.done()]
        return len(self._abandoned) > limits.MAX_ABANDONED_DECODERS

    def run(
        self, calls: Sequence[Callable[[], Found]], meanwhile: Callable[[], None] | None = None
    ) -> list[Found | FacelaneError]:
        """The result of each call; PICTURE_TOO_COSTLY for one that was given up,
        DEADLINE_EXCEEDED (retryable) for what there was no time for.

        ``meanwhile``: called once they are handed to the threads, if any are."""
        self.begin(calls)
        if meanwhile is not None and calls:
            meanwhile()
        return self.settle()

    def begin(self, calls: Sequence[Callable[[], Found]]) -> None:
        """As ``run``, which ``settle`` ends. Those that were begun before are settled first."""
        self.settle()
        tasks = [_Decoding(call) for call in calls]
        futures = [self._pool.submit(task) for task in tasks]
        self._begun = tasks, futures, time.monotonic() + self._job_s

    def settle(self) -> list[Any]:
        """The results of what was begun: see ``run``. Empty where nothing was."""
        (tasks, futures, deadline), self._begun = self._begun, ([], [], 0.0)
        found: dict[int, Any] = {}
        while True:
            now = time.monotonic()
            look = deadline if now < deadline else now + self._picture_s / 4
            stuck = False
            for i, (task, future) in enumerate(zip(tasks, futures, strict=True)):
                if i in found:
                    continue
                if future.done():
                    found[i] = future.result()
                    continue
                due = (now if task.began is None else task.began) + self._picture_s
                error = (
                    self._verdict(task, over=now >= deadline) if now >= min(due, deadline) else None
                )
                if error is None:
                    look = min(look, due if due > now else now + self._picture_s / 4)
                    continue
                found[i] = error
                if not future.cancel():
                    self._abandoned.append(future)
                    stuck = True
            if stuck:
                self._afresh(tasks, futures, found)
            pending = [future for i, future in enumerate(futures) if i not in found]
            if not pending:
                return [found[i] for i in range(len(tasks))]
            wait(pending, max(0.0, look - time.monotonic()))

    def _afresh(
        self,
        tasks: Sequence[_Decoding[Found]],
        futures: list[Future[Found]],
        found: Mapping[int, object],
    ) -> None:
        """New threads, and what has not begun handed to them."""
        self._pool.shutdown(wait=False)
        self._pool = ThreadPoolExecutor(self._threads, "decode")
        for i, task in enumerate(tasks):
            if i not in found and futures[i].cancel():
                futures[i] = self._pool.submit(task)

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
