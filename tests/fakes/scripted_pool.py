"""A pool that answers when, and in the order that, a test says."""

from __future__ import annotations

from typing import Any

import numpy as np

from facelane_server.domain import (
    Box,
    Candidate,
    DetectedFace,
    FacelaneError,
    Landmarks,
    Reason,
    Stage,
)
from facelane_server.gallery.decide import Thresholds
from facelane_server.pipeline import Pipeline
from facelane_server.pools.tasks import (
    Answer,
    DetectAnswer,
    EmbedAnswer,
    EmbedRequest,
    LivenessAnswer,
    Task,
)

LANDMARKS: Landmarks = ((15, 20), (35, 20), (25, 30), (18, 40), (32, 40))


class ScriptedPool:
    """``PoolPort``: tasks wait until they are begun, and run until they are answered."""

    def __init__(self) -> None:
        self.available = True
        self.waiting: list[Task[Any]] = []
        self.begun: list[Task[Any]] = []
        self.withdrawn = 0
        self.replaced = 0
        self.released: list[int] = []
        self.passed: list[Task[Any]] = []

    def submit(self, task: Task[Any]) -> None:
        task.submitted_ns = 1
        self.waiting.append(task)

    def withdraw(self, task: Task[Any]) -> bool:
        if task not in self.waiting:
            return False
        self.waiting.remove(task)
        self.withdrawn += 1
        return True

    def pass_by(self, task: Task[Any]) -> None:
        self.passed.append(task)

    def release(self, lane: int) -> None:
        self.released.append(lane)

    def replace(self, task: Task[Any], by: Task[Any]) -> bool:
        if task not in self.waiting:
            return False
        by.submitted_ns = 1
        self.waiting[self.waiting.index(task)] = by
        self.replaced += 1
        return True

    @property
    def tasks(self) -> list[Task[Any]]:
        return [*self.waiting, *self.begun]

    def begin(self, at: int = 0) -> Task[Any]:
        """A worker takes the task at this place of the queue."""
        task = self.waiting.pop(at)
        task.dispatched_ns = 2
        self.begun.append(task)
        return task

    def answer(self, answer: Answer | FacelaneError, at: int = 0) -> None:
        """Ends the task at this place among those that were begun."""
        if not self.begun:
            self.begin()
        task = self.begun.pop(at)
        task.finished_ns = 3
        if task.future.done():  # given up
            return
        if isinstance(answer, FacelaneError):
            task.future.set_exception(answer)
        else:
            task.future.set_result(answer)

    def expire(self, at: int = 0) -> None:
        """The deadline of a waiting task passes."""
        task = self.waiting.pop(at)
        task.future.set_exception(
            FacelaneError(Reason.DEADLINE_EXCEEDED, "too late", retryable=True)
        )


def faces(count: int = 1) -> DetectAnswer:
    """So many faces side by side, each with the two crops that the stages take."""
    return DetectAnswer(
        640,
        480,
        tuple(
            DetectedFace(
                Box(100.0 * k, 0.0, 50.0, 50.0),
                0.9,
                tuple((100.0 * k + x, y) for x, y in LANDMARKS),
                (b"chip", b"context"),
            )
            for k in range(count)
        ),
    )


def embedding(subject: str = "", similarity: float = 0.9, ood: float = 0.8) -> EmbedAnswer:
    candidates = (Candidate(subject, similarity),) if subject else ()
    return EmbedAnswer(ood, candidates, np.ones(4, np.float32).tobytes())


LIVE = LivenessAnswer(0.95)
LOST = FacelaneError(Reason.WORKER_LOST, "the worker is gone; try again", retryable=True)

THRESHOLDS = Thresholds(match=0.5, margin=0.05, ood=0.4, live=0.8, spoof=0.3)


class ScriptedPools:
    """The three pools and the pipeline over them."""

    def __init__(self, *stages: Stage) -> None:
        self.by_stage = {stage: ScriptedPool() for stage in stages or tuple(Stage)}
        self.pipeline = Pipeline(
            self.by_stage,
            crops={Stage.RECOGNIZER: (0,), Stage.LIVENESS: (1,)},
            thresholds=THRESHOLDS,
            max_pixels=1_000_000,
        )

    @property
    def detector(self) -> ScriptedPool:
        return self.by_stage[Stage.DETECTOR]

    @property
    def recognizer(self) -> ScriptedPool:
        return self.by_stage[Stage.RECOGNIZER]

    @property
    def liveness(self) -> ScriptedPool:
        return self.by_stage[Stage.LIVENESS]

    def answer_second(self, subject: str = "") -> None:
        """Answers whatever waits for the recogniser and for liveness."""
        for stage, pool in self.by_stage.items():
            if stage is not Stage.DETECTOR:
                while pool.tasks:
                    embed = isinstance(pool.tasks[0].request, EmbedRequest)
                    pool.answer(embedding(subject) if embed else LIVE)
