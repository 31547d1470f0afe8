"""A pool: the workers of one stage, and the tasks that wait for them.

Pull, not push: when a worker has room, it is given the best batch that exists now
(``queue``), up to ``batch_max`` and the bytes of a slot. Nothing waits for a batch to
fill. Idle workers come first; a second job is staged on a busy worker only while all are
busy, and only where overlap pays (a device, or jobs so short that the hop counts).

What a loss costs: the tasks in flight on the lost worker are tried once more, each
alone, in front of the queue and with their old deadline; a task that kills a second
worker is POISONED. Tasks that wait are not touched. When no worker can be back before a
task's deadline, it is refused at once instead of waiting.

A pool says it can infer only after each of its workers did so: a worker joins when it
has loaded, warmed up, loaded the newest gallery and answered a canary inference; when
idle, the canary is repeated.

Everything here runs on one event loop and never blocks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import structlog

from facelane_server import config, limits
from facelane_server.domain import Encoding, FacelaneError, Picture, Reason, Stage
from facelane_server.ipc import gallery_table
from facelane_server.ipc.channel import ChannelError, ProtocolError, close_all
from facelane_server.ipc.messages import (
    CropSpecMessage,
    GallerySnapshot,
    InferDone,
    InferFailed,
    Load,
)
from facelane_server.models.api import AlignedCrop, ContextCrop, CropSpec
from facelane_server.models.package import Package
from facelane_server.pools import host, restart
from facelane_server.pools.handle import Job, ReadyWorker, UnreadyWorker, WorkerLostError
from facelane_server.pools.host import Launcher, Link
from facelane_server.pools.queue import AnyTask, FairQueue
from facelane_server.pools.restart import Action, Event, Happening, Life
from facelane_server.pools.slots import Codec, SubjectResolver, failure_of
from facelane_server.pools.tasks import (
    DetectRequest,
    EmbedRequest,
    LivenessRequest,
    Request,
    Task,
)

log = structlog.get_logger(__name__)

_MS: Final = 1_000_000
_S: Final = 1_000_000_000
_OVERLAP_NS: Final = 5 * _MS
"""A CPU worker whose jobs are longer gains nothing from a staged one: the hop is short
beside them, and a staged frame can no longer be replaced by a newer one."""
_CANARY_SIDE: Final = 64
_CANARY_LANE: Final = -1
_ATTACH_S: Final = 2.0
"""What systemd or a container's runtime needs to start an external worker again."""
_GALLERY_TIMEOUT_S: Final = 30.0
_NICE_BESIDE: Final = 15
_NICE_AGAIN: Final = 5
_NOT_TO_BLAME: Final = frozenset(
    {"STOPPED", "RESTARTED", "DRAINED", "GALLERY_STALE", "OVER_BUDGET"}
)
"""Losses that the tasks in flight have nothing to do with."""


class PoolState(enum.StrEnum):
    """What a pool can do now."""

    STARTING = "STARTING"
    """No worker was ready yet."""
    SERVING = "SERVING"
    DEGRADED = "DEGRADED"
    """Fewer workers than configured; the others serve."""
    NOT_SERVING = "NOT_SERVING"
    """No worker can infer."""
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"


class PoolChange(enum.StrEnum):
    """What ``on_change`` tells of."""

    STATE = "STATE"
    WORKER_READY = "WORKER_READY"
    WORKER_LOST = "WORKER_LOST"
    WORKER_QUARANTINED = "WORKER_QUARANTINED"
    WORKER_RESTARTING = "WORKER_RESTARTING"
    """On purpose: by an operator, or because it outgrew its memory budget."""
    MODEL_RELOADED = "MODEL_RELOADED"


@dataclass(frozen=True, slots=True)
class PoolEvent:
    """A change of a pool. ``reason``: of a loss, else empty."""

    change: PoolChange
    pool: str
    state: PoolState
    worker_id: str = ""
    pid: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """``life`` of an idle spare is READY too. ``uptime_s``: since it became ready."""

    worker_id: str
    pid: int
    life: Life
    device: str
    restarts: int
    last_loss: str
    memory_mib: int
    uptime_s: float
    spare: bool


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """Counters are since the start of the server."""

    pool: str
    stage: Stage
    state: PoolState
    model_id: str
    isolation: str
    queued: int
    in_flight: int
    completed: int
    failed: int
    retried: int
    losses: int
    workers: tuple[WorkerInfo, ...]


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    """Time for a pool; tests bring their own."""

    def now_ns(self) -> int:
        """As ``time.monotonic_ns``."""

    def call_at(self, when_ns: int, callback: Callable[[], None]) -> Timer: ...


class LoopClock:
    """The running event loop's time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def call_at(self, when_ns: int, callback: Callable[[], None]) -> Timer:
        return self._loop.call_later(max(0.0, (when_ns - time.monotonic_ns()) / _S), callback)


class _Member:
    """One worker of the pool over all its lives."""

    def __init__(self, worker_id: str, device: str, package: Package, launcher: Launcher) -> None:
        self.worker_id = worker_id
        self.device = device
        self.package = package
        self.codec: Codec | None = None
        """For the package that the present process has loaded."""
        self.launcher = launcher
        self.life = restart.Worker()
        self.link: Link | None = None
        self.ready: ReadyWorker | None = None
        self.joined = False
        self.spawned_ns = 0
        self.ready_since_ns = 0
        self.service_ns = 0.0
        """Running mean of a job's time."""
        self.timer: Timer | None = None
        self.hang_timer: Timer | None = None
        self.bring_up: asyncio.Task[None] | None = None
        self.endings: set[asyncio.Task[None]] = set()

    @property
    def overlaps(self) -> bool:
        return self.ready is not None and self.ready.facts.device_name.startswith("cuda")


class Pool:
    """The workers of one stage.

    ``crops``: what a detector is to cut out for the models behind it, in this order;
    for the other stages leave it empty, their package says what they take.
    ``resolve``: subjects of gallery snapshots, for recognisers. ``on_change`` is called
    on the loop, must not block, and may ask the pool for its state. ``budget_mib``: of a
    worker's process, where it is another than ``settings.memory_mib`` (thread groups add
    theirs up); 0 = none.

    ``start`` first, ``stop`` last. All calls from the loop's thread.
    """

    def __init__(
        self,
        stage: Stage,
        settings: config.Pool,
        package: Package,
        launcher: Launcher,
        *,
        crops: tuple[CropSpec, ...] = (),
        max_pixels: int = limits.MAX_PIXELS,
        resolve: SubjectResolver | None = None,
        on_change: Callable[[PoolEvent], None] | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        budget_mib: int | None = None,
    ) -> None:
        self.stage = stage
        self.name = str(stage)
        self.package = package
        self._settings = settings
        self._budget_mib = settings.memory_mib if budget_mib is None else budget_mib
        self._launcher = launcher
        self._crops = crops
        self._max_pixels = max_pixels
        self._resolve = resolve
        self._on_change = on_change
        self._given_clock = clock
        self._running_clock: Clock | None = None
        self._random = (rng or random.Random()).random
        self._policy = restart.Policy(
            limit=settings.restart_limit,
            window_s=settings.restart_window_s,
            initial_s=settings.backoff_initial_s,
            max_s=settings.backoff_max_s,
            quarantine_s=settings.quarantine_s,
            start_timeout_s=settings.load_timeout_s,
            drain_timeout_s=max(2 * settings.job_timeout_ms / 1000, 1.0),
        )
        self._job_timeout_ns = settings.job_timeout_ms * _MS
        self._last_quarter_ns = self._job_timeout_ns // 4
        self._queue = FairQueue()
        self._codec = self._codec_for(package)
        self._members: list[_Member] = []
        """The serving generation."""
        self._warming: list[_Member] = []
        """Of a reload under way."""
        self._retiring: list[_Member] = []
        self._active: list[_Member] = []
        """Joined, at most ``workers``: those that are given tasks."""
        self._numbers = 0
        self._jobs = 0
        self._state = PoolState.STOPPED
        self._snapshot: tuple[GallerySnapshot, list[int]] | None = None
        self._gallery_waiters: set[asyncio.Future[None]] = set()
        self._dispatch_due = False
        self._deadline_timer: Timer | None = None
        self._deadline_at = 0
        self._tick_timer: Timer | None = None
        self._ticked_ns = 0
        self._progress: set[asyncio.Future[None]] = set()
        self._reloading = asyncio.Lock()
        self._completed = 0
        self._failed = 0
        self._retried = 0
        self._losses = 0
        if isinstance(launcher, host.GroupLauncher):
            for number in range(settings.workers):
                launcher.register(f"{self.name}#{number}")

    @property
    def _clock(self) -> Clock:
        if self._running_clock is None:
            self._running_clock = self._given_clock or LoopClock()
        return self._running_clock

    # -- what the server asks ---------------------------------------------------------

    @property
    def state(self) -> PoolState:
        return self._state

    @property
    def available(self) -> bool:
        """Some worker can infer now."""
        return bool(self._active)

    @property
    def model_id(self) -> str:
        return self.package.model_id

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        return sum(len(j.tasks) for m in self._everyone() if m.ready for j in m.ready.jobs)

    def info(self) -> PoolInfo:
        now = self._clock.now_ns()
        workers = [
            WorkerInfo(
                worker_id=m.worker_id,
                pid=m.link.pid if m.link else 0,
                life=m.life.life,
                device=m.ready.facts.device_name if m.ready else m.device,
                restarts=m.life.restarts,
                last_loss=m.life.reason,
                memory_mib=m.ready.memory_mib if m.ready else 0,
                uptime_s=(now - m.ready_since_ns) / _S if m.ready else 0.0,
                spare=m.joined and m not in self._active,
            )
            for m in self._everyone()
        ]
        return PoolInfo(
            pool=self.name,
            stage=self.stage,
            state=self._state,
            model_id=self.model_id,
            isolation=self._settings.isolation,
            queued=self.queued,
            in_flight=self.in_flight,
            completed=self._completed,
            failed=self._failed,
            retried=self._retried,
            losses=self._losses,
            workers=tuple(workers),
        )

    # -- tasks ------------------------------------------------------------------------

    def submit(self, task: AnyTask) -> None:
        """Queue a task. Never raises and never blocks: a refusal comes through the future."""
        now = self._clock.now_ns()
        task.submitted_ns = now
        refusal = self._refusal(task, now)
        if refusal is not None:
            self._fail(task, refusal)
            return
        self._queue.put(task)
        self._arm_deadline(task.deadline_ns)
        self._schedule_dispatch()

    def withdraw(self, task: AnyTask) -> bool:
        """Take a task back. True when it was still queued: its future is then the caller's to
        resolve. False when a worker has it or had it: its future is resolved as usual."""
        if self._queue.withdraw(task):
            return True
        if task.future.done():
            self._cancel_if_abandoned(task)
        return False

    def _refusal(self, task: AnyTask, now: int) -> FacelaneError | None:
        if self._ending:
            return _unavailable(self.name, "is shutting down")
        if len(self._queue) >= limits.MAX_POOL_QUEUE:
            return FacelaneError(
                Reason.POOL_OVERLOADED,
                f"the {self.name} pool has {limits.MAX_POOL_QUEUE} tasks waiting; send less, or "
                "add workers",
                retryable=True,
                metadata={"pool": self.name},
            )
        try:
            request, response = self._codec.cost(task.request)
        except FacelaneError as error:
            return error
        if request > limits.REQUEST_SLOT_BYTES or response > limits.RESPONSE_SLOT_BYTES:
            return FacelaneError(
                Reason.PICTURE_TOO_LARGE, "the picture does not fit between the processes"
            )
        if task.deadline_ns <= now:
            return _too_late(self.name)
        if not self._active and not self._can_be_back_by(task.deadline_ns):
            return _unavailable(self.name, "has no worker and none comes back in time")
        return None

    @property
    def _ending(self) -> bool:
        return self._state in (PoolState.DRAINING, PoolState.STOPPED)

    def _can_be_back_by(self, deadline_ns: int) -> bool:
        for member in (*self._members, *self._warming):
            life = member.life
            if life.life in restart.WAITING:
                if life.wake_at is not None and life.wake_at * _S < deadline_ns:
                    return True
            elif life.life is not Life.EXITED:
                if self._is_forsaken(member):
                    continue
                return True
        return False

    def _is_forsaken(self, member: _Member) -> bool:
        """An external worker that should have attached by now, and did not."""
        waited = self._clock.now_ns() - member.spawned_ns
        return (
            self._settings.isolation == "external"
            and member.link is None
            and waited >= _ATTACH_S * _S
        )

    def _refuse_hopeless(self) -> None:
        """After a loss: what cannot be served in time is told so now."""
        if self._active:
            return
        for task in self._queue.tasks():
            if not self._can_be_back_by(task.deadline_ns):
                self._queue.withdraw(task)
                self._fail(task, _unavailable(self.name, "has no worker and none is back in time"))

    def _fail(self, task: AnyTask, error: FacelaneError) -> None:
        if task.finished_ns == 0:
            task.finished_ns = self._clock.now_ns()
            self._failed += task.lane != _CANARY_LANE  # nobody asked for that one
        if not task.future.done():
            task.future.set_exception(error)

    def _cancel_if_abandoned(self, task: AnyTask) -> None:
        for member in self._everyone():
            if member.ready is None or len(member.ready.jobs) < 2:
                continue
            for job in list(member.ready.jobs)[1:]:
                if task in job.tasks:
                    if not job.abandoned and all(t.future.done() for t in job.tasks):
                        job.abandoned = True
                        member.ready.cancel(job)
                    return

    # -- deadlines --------------------------------------------------------------------

    def _arm_deadline(self, deadline_ns: int) -> None:
        if self._deadline_timer is not None:
            if self._deadline_at <= deadline_ns:
                return
            self._deadline_timer.cancel()
        self._deadline_at = deadline_ns
        self._deadline_timer = self._clock.call_at(deadline_ns, self._on_deadline)

    def _on_deadline(self) -> None:
        self._deadline_timer = None
        self._expire()
        upcoming = self._queue.next_deadline()
        if upcoming is not None:
            self._arm_deadline(upcoming)

    def _expire(self) -> None:
        for task in self._queue.expire(self._clock.now_ns()):
            if self._active:
                self._fail(task, _too_late(self.name))
            else:
                self._fail(task, _unavailable(self.name, "had no worker until the deadline"))

    # -- dispatch ---------------------------------------------------------------------

    def _schedule_dispatch(self) -> None:
        """Dispatch at the end of this turn of the loop, so that what is submitted in one turn
        can go in one batch."""
        if not self._dispatch_due and self._active:
            self._dispatch_due = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatch_due = False
        if len(self._queue):
            self._expire()
        while len(self._queue):
            member = self._next_worker(alone=self._queue.next_is_alone)
            if member is None:
                return
            assert member.ready is not None
            tasks = self._take_batch(member.ready.facts.batch_max)
            if not tasks:
                continue
            self._send(member, tasks)

    def _next_worker(self, *, alone: bool) -> _Member | None:
        """An idle worker; else, all being busy, the one whose staged place is free and whose
        first job began longest ago. Where jobs overlap, the end of a worker is blamed on both:
        ``alone`` = a task that may be the guilty one shares it with no other."""
        best: _Member | None = None
        for member in self._active:
            ready = member.ready
            assert ready is not None
            jobs = ready.jobs
            if not jobs:
                return member
            if len(jobs) >= limits.JOBS_PER_WORKER or not ready.free_slots:
                continue
            if not member.overlaps and member.service_ns > _OVERLAP_NS:
                continue
            if member.overlaps and (alone or any(task.attempts for task in jobs[0].tasks)):
                continue
            if best is None or jobs[0].started_ns < _jobs_of(best)[0].started_ns:
                best = member
        return best

    def _take_batch(self, most: int) -> list[AnyTask]:
        room = [limits.REQUEST_SLOT_BYTES, limits.RESPONSE_SLOT_BYTES]

        def accept(task: AnyTask) -> bool:
            request, response = self._codec.cost(task.request)
            if request > room[0] or response > room[1]:
                return False
            room[0] -= request
            room[1] -= response
            return True

        tasks = self._queue.take(most, accept)
        # A caller that gave up (cancelled future) costs no inference.
        return [task for task in tasks if not task.future.done()]

    def _send(self, member: _Member, tasks: list[AnyTask], *, canary: bool = False) -> None:
        ready = member.ready
        assert ready is not None
        self._jobs += 1
        slot, view = ready.request_slot()
        assert member.codec is not None
        now = self._clock.now_ns()
        for task in tasks:
            task.dispatched_ns = now
        job = Job(self._jobs, slot, tasks, canary=canary)
        if not ready.jobs:
            job.started_ns = now
        try:
            items, job.request_used = member.codec.write([task.request for task in tasks], view)
            ready.send(job, items)
        except (ValueError, OverflowError):
            self._cannot_be_sent(tasks)
            return
        except ChannelError as error:
            for task in reversed(tasks):
                if canary:
                    self._fail(task, _worker_lost(self.name))
                else:
                    self._retry(task, alone=False)
            # It may have left in order, or said why it ends: that counts, not our EPIPE.
            self._active = [m for m in self._active if m is not member]
            ready.receive_last()
            if member.ready is ready:
                self._lost(member, WorkerLostError("EXITED", str(error)))
            return
        if len(ready.jobs) == 1:
            self._watch(member)

    def _cannot_be_sent(self, tasks: list[AnyTask]) -> None:
        """A request that no message can carry: its own failure, and nobody else's."""
        for task in reversed(tasks):
            if len(tasks) > 1:
                self._retry(task, alone=True)
            else:
                log.error("request cannot be sent to a worker", pool=self.name)
                error = FacelaneError(Reason.INTERNAL, "the request cannot be sent to a worker")
                self._fail(task, error)

    # -- answers ----------------------------------------------------------------------

    def _answered(self, member: _Member, job: Job, message: InferDone | InferFailed) -> None:
        ready = member.ready
        if ready is None:
            return
        now = self._clock.now_ns()
        if isinstance(message, InferDone):
            used = self._read_answers(member, job, message, now)
            if used is None:
                return
            ready.last_success_ns = now
        else:
            used = 0
            self._job_failed(job, message)
        ready.done(job, used)
        if job.started_ns:
            member.service_ns += 0.125 * (now - job.started_ns - member.service_ns)
        if ready.jobs and not ready.jobs[0].started_ns:
            ready.jobs[0].started_ns = now
        # Before the next dispatch: what is retried shall not meet the same full memory.
        if self._over_budget(ready) or self._at_its_cap(message):
            self._recycle(member, "OVER_BUDGET")
        self._dispatch()

    def _read_answers(self, member: _Member, job: Job, message: InferDone, now: int) -> int | None:
        """Resolve a job's tasks; bytes used in the response slot, None when the worker was
        lost over its answer."""
        assert member.ready is not None
        assert member.codec is not None
        view = member.ready.response(job)
        used = 0
        try:
            if len(message.items) != len(job.tasks):
                raise ProtocolError("another number of answers than of items")
            answers = []
            for task, item in zip(job.tasks, message.items, strict=True):
                answer, end = member.codec.read(task.request, item, view)
                used = max(used, end)
                answers.append(answer)
        except ProtocolError as error:
            member.ready.jobs.appendleft(job)
            self._lost(member, WorkerLostError("PROTOCOL", str(error)))
            return None
        for task, answer in zip(job.tasks, answers, strict=True):
            task.finished_ns = now
            if isinstance(answer, FacelaneError):
                self._failed += not job.canary
                if not task.future.done():
                    task.future.set_exception(answer)
            else:
                self._completed += not job.canary
                if not task.future.done():
                    task.future.set_result(answer)
        return used

    def _job_failed(self, job: Job, message: InferFailed) -> None:
        alone = len(job.tasks) == 1
        for task in reversed(job.tasks):
            if task.future.done():
                continue
            task.attempts += 1
            # Out of memory may pass; an error that nobody foresaw may be one item's fault.
            again = message.retryable or (message.reason == Reason.INTERNAL and not alone)
            if not job.canary and again and task.attempts < limits.MAX_TASK_ATTEMPTS:
                self._retry(task, alone=True)
            else:
                self._fail(task, failure_of(message, task.attempts))

    def _retry(self, task: AnyTask, *, alone: bool) -> None:
        if self._state is PoolState.STOPPED:
            self._fail(task, _unavailable(self.name, "is shutting down"))
            return
        self._retried += 1
        task.dispatched_ns = 0
        # Once a suspect, always one: two of them in a batch would be condemned together.
        self._queue.put_back(task, alone=alone or task.attempts > 0)
        self._arm_deadline(task.deadline_ns)

    # -- a worker's troubles ------------------------------------------------------------

    def _watch(self, member: _Member) -> None:
        """See that the first job in flight ends in time. One timer a worker, which finds out
        when it fires whether there is a newer first job to wait for. The last quarter of the
        time is always waited for: if this process itself stood still (a paused machine), the
        clock leaps, and the answers that came meanwhile are read only after the timers."""
        if member.hang_timer is None:
            job = _jobs_of(member)[0]
            member.hang_timer = self._clock.call_at(
                job.started_ns + self._job_timeout_ns - self._last_quarter_ns,
                lambda: self._hang_check(member),
            )

    def _hang_check(self, member: _Member) -> None:
        member.hang_timer = None
        if member.ready is None or not member.ready.jobs:
            return
        job, now = member.ready.jobs[0], self._clock.now_ns()
        if now - job.started_ns < self._job_timeout_ns - self._last_quarter_ns:
            self._watch(member)
            return
        member.hang_timer = self._clock.call_at(
            max(job.started_ns + self._job_timeout_ns, now + self._last_quarter_ns),
            lambda: self._hang_verdict(member, job),
        )

    def _hang_verdict(self, member: _Member, job: Job) -> None:
        member.hang_timer = None
        if member.ready is None or not member.ready.jobs:
            return
        if member.ready.jobs[0] is job:
            self._lost(member, WorkerLostError("HUNG", "a job exceeded job_timeout_ms"))
        else:
            self._watch(member)

    def _tick(self) -> None:
        """Ping idle workers, and have them infer now and then."""
        interval = int(self._settings.ping_interval_s * _S)
        now = self._clock.now_ns()
        # If this process stood still (a paused machine), what it waits for may have come, and
        # is read after this.
        stood_still = now - self._ticked_ns > 2 * interval
        self._ticked_ns = now
        self._tick_timer = self._clock.call_at(now + interval, self._tick)
        for member in [*self._members, *self._warming]:
            ready = member.ready
            if ready is None or not member.joined:
                continue
            if stood_still:
                ready.wait_anew(now)
            if self._is_gallery_late(ready, now):
                self._lost(member, WorkerLostError("GALLERY_STALE"))
                continue
            if ready.ping_sent_ns:
                if not ready.jobs and now - ready.ping_sent_ns >= self._job_timeout_ns:
                    self._lost(member, WorkerLostError("HUNG", "no pong in time"))
                continue
            if ready.jobs:
                continue
            if now - ready.last_success_ns >= self._settings.canary_interval_s * _S:
                self._send_canary(member)
            else:
                ready.ping(now)
            if self._over_budget(ready):
                self._recycle(member, "OVER_BUDGET")

    def _is_gallery_late(self, ready: ReadyWorker, now: int) -> bool:
        """It goes on naming people by a gallery that is no more."""
        return (
            self._snapshot is not None
            and ready.gallery_version < self._snapshot[0].version
            and now - ready.gallery_sent_ns >= _GALLERY_TIMEOUT_S * _S
        )

    def _over_budget(self, ready: ReadyWorker) -> bool:
        budget = self._budget_mib
        return 0 < budget < ready.memory_mib

    def _at_its_cap(self, message: InferDone | InferFailed) -> bool:
        """Out of memory inside a budget: the model fitted when it warmed up, so something grew
        since, and a process of its own has its cap just there."""
        return (
            self._budget_mib > 0
            and isinstance(message, InferFailed)
            and message.reason == Reason.OUT_OF_MEMORY
        )

    def _send_canary(self, member: _Member) -> asyncio.Future[Any]:
        """One built-in item through the worker; a failure loses the worker."""
        now = self._clock.now_ns()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        task: AnyTask = Task(
            _canary_request(self.stage, self._codec_crops(member.package)),
            lane=_CANARY_LANE,
            weight=1,
            deadline_ns=now + self._job_timeout_ns,
            future=future,
            submitted_ns=now,
        )

        def judge(done: asyncio.Future[Any]) -> None:
            if done.cancelled() or done.exception() is None or member.ready is not ready:
                return
            self._lost(member, WorkerLostError("CANARY_FAILED"))

        ready = member.ready
        future.add_done_callback(judge)
        self._send(member, [task], canary=True)
        return future

    def _recycle(self, member: _Member, reason: str) -> None:
        if member.life.life is not Life.READY:
            return
        if self._settings.isolation == "thread":
            # Memory belongs to the process: only its end gives it back.
            self._lost(member, WorkerLostError(reason, "the group's process grew too large"))
            return
        log.warning(
            "worker recycled",
            pool=self.name,
            worker=member.worker_id,
            reason=reason,
            memory_mib=member.ready.memory_mib if member.ready else 0,
            budget_mib=self._budget_mib,
        )
        self._tell(PoolChange.WORKER_RESTARTING, member, reason)
        self._happen(member, Event(Happening.RESTART, reason))

    def _lost(self, member: _Member, error: WorkerLostError) -> None:
        """A worker is of no use any more, by whatever sign."""
        if member.life.life not in restart.ALIVE:
            return
        log.warning(
            "worker lost",
            pool=self.name,
            worker=member.worker_id,
            worker_pid=member.link.pid if member.link else 0,
            reason=error.reason,
            detail=error.detail,
            life=member.life.life,
        )
        self._losses += 1
        self._happen(member, Event(Happening.LOSS, error.reason))
        self._tell(PoolChange.WORKER_LOST, member, error.reason)

    def _take_back(self, member: _Member, reason: str) -> None:
        """The tasks in flight of a worker that is gone: retried, or given up."""
        ready = member.ready
        if ready is None:
            return
        jobs = list(ready.jobs)
        ready.jobs.clear()
        for place, job in reversed(list(enumerate(jobs))):
            # A staged job has not been begun by a worker that computes in order.
            blamed = reason not in _NOT_TO_BLAME and (place == 0 or member.overlaps)
            for task in reversed(job.tasks):
                if task.future.done():
                    continue
                if job.canary:
                    self._fail(task, _worker_lost(self.name))
                    continue
                task.attempts += blamed
                if task.attempts < limits.MAX_TASK_ATTEMPTS:
                    self._retry(task, alone=blamed)
                else:
                    self._fail(
                        task,
                        FacelaneError(
                            Reason.POISONED,
                            f"two workers of the {self.name} pool ended over this item; it is "
                            "not tried again",
                            metadata={"pool": self.name},
                        ),
                    )

    # -- lives ------------------------------------------------------------------------

    def _happen(self, member: _Member, event: Event) -> None:
        """Feed the state machine and do what it says."""
        before = member.life
        now = self._clock.now_ns() / _S
        member.life, actions = restart.step(member.life, event, now, self._policy, self._random)
        self._perform(member, actions, event)
        if member.life.wake_at != before.wake_at or actions:
            self._arm_life(member)
        if member.life.life is Life.QUARANTINED is not before.life:
            log.error(
                "worker quarantined",
                pool=self.name,
                worker=member.worker_id,
                reason=member.life.reason,
                losses=len(member.life.losses),
                retry_in_s=round(self._policy.quarantine_s, 1),
            )
            self._tell(PoolChange.WORKER_QUARANTINED, member, member.life.reason)
        self._settle()

    def _arm_life(self, member: _Member) -> None:
        if member.timer is not None:
            member.timer.cancel()
            member.timer = None
        if member.life.wake_at is not None:
            member.timer = self._clock.call_at(
                int(member.life.wake_at * _S) + 1, lambda: self._wake(member)
            )

    def _wake(self, member: _Member) -> None:
        member.timer = None
        if member.life.life in restart.STARTING and member.link is not None:
            self._lost(member, WorkerLostError("START_TIMEOUT"))
        elif member.life.life in restart.STARTING:
            # Nobody has attached yet, which is for the outside to do: no failure of ours.
            self._await_start(member)
        else:
            self._happen(member, Event(Happening.TIMER))

    def _await_start(self, member: _Member) -> None:
        """Give a starting worker its time from now on."""
        later = self._clock.now_ns() / _S + self._policy.start_timeout_s
        member.life = dataclasses.replace(member.life, wake_at=later)
        self._arm_life(member)

    def _perform(self, member: _Member, actions: tuple[Action, ...], event: Event) -> None:
        for action in actions:
            if action is Action.SPAWN:
                member.spawned_ns = self._clock.now_ns()
                member.bring_up = asyncio.get_running_loop().create_task(
                    self._bring_up(member), name=f"bring up {member.worker_id}"
                )
            elif action is Action.JOIN:
                member.joined = True
                member.ready_since_ns = self._clock.now_ns()
            elif action is Action.LEAVE:
                member.joined = False
            elif action is Action.DRAIN:
                assert member.ready is not None
                member.ready.drain()
                self._end(member, grace_s=self._policy.drain_timeout_s, reason="DRAINED")
            elif action is Action.KILL:
                self._end(member, grace_s=0.0, reason=event.reason or "STOPPED")

    async def _bring_up(self, member: _Member) -> None:
        """From SPAWNED to READY. Cancelled when the life ends before."""
        unready: UnreadyWorker | None = None
        try:
            link = await member.launcher.launch(member.worker_id, self._nice(member))
            member.link = link
            if self._settings.isolation == "external":
                self._await_start(member)  # which begins only now
            unready = UnreadyWorker(link, member.worker_id, self._load_for(member))
            ready = await unready.ready(lambda what: self._happen(member, Event(Happening[what])))
            member.ready = ready
            ready.on_answer = lambda _, job, message: self._answered(member, job, message)
            ready.on_gallery = lambda _: self._gallery_progress()
            ready.on_drained = lambda _: self._left(member)
            ready.on_lost = lambda _, error: self._lost(member, error)
            self._codec_check(member)
            member.codec = self._codec_for(member.package)
            if self._over_budget(ready):
                raise WorkerLostError("OVER_BUDGET", "the model alone exceeds memory_mib")
            await self._send_canary(member)
            while self._snapshot is not None and (
                ready.gallery_version < self._snapshot[0].version
            ):
                self._send_gallery(member)
                if member.ready is not ready:
                    return  # lost over it
                await self._gallery_loaded([member], self._snapshot[0].version)
            ready.last_success_ns = self._clock.now_ns()
        except asyncio.CancelledError:
            raise
        except WorkerLostError as error:
            self._lost(member, error)
        except ChannelError as error:
            self._lost(member, WorkerLostError("EXITED", str(error)))
        except FacelaneError as error:
            self._lost(member, WorkerLostError("CANARY_FAILED", error.message))
        except OSError as error:
            self._lost(member, WorkerLostError("NOT_STARTED", error.strerror or str(error)))
        except Exception as error:
            log.exception("worker not brought up", pool=self.name, worker=member.worker_id)
            self._lost(member, WorkerLostError("NOT_STARTED", type(error).__name__))
        else:
            log.info(
                "worker ready",
                pool=self.name,
                worker=member.worker_id,
                worker_pid=link.pid,
                device=ready.facts.device_name,
                model=ready.facts.model_id,
                load_ms=round(ready.facts.load_ms, 1),
                warm_ms=round(ready.facts.warm_ms, 1),
                latency_ms=round(ready.facts.latency_ms, 3),
                memory_mib=ready.facts.memory_mib,
            )
            self._happen(member, Event(Happening.READY))
            self._tell(PoolChange.WORKER_READY, member, "")
        finally:
            if unready is not None:
                unready.close()

    def _nice(self, member: _Member) -> int:
        """While it loads: nobody waits for one that comes beside workers of this pool; for one
        that comes back alone somebody does, but other pools' frames pass first."""
        if self.available:
            return _NICE_BESIDE
        return _NICE_AGAIN if member.life.restarts else 0

    def _end(self, member: _Member, *, grace_s: float, reason: str) -> None:
        """See to the end of the present process, and report GONE."""
        if grace_s == 0 and member.bring_up is not None:
            if member.bring_up is not asyncio.current_task():
                member.bring_up.cancel()
            member.bring_up = None
        if grace_s == 0 and member.ready is not None:
            self._take_back(member, reason)
            member.ready.close()
            member.ready = None
        ending = asyncio.get_running_loop().create_task(
            self._see_to_end(member, member.link, grace_s, reason),
            name=f"end {member.worker_id}",
        )
        member.endings.add(ending)
        ending.add_done_callback(member.endings.discard)

    async def _see_to_end(
        self, member: _Member, link: Link | None, grace_s: float, reason: str
    ) -> None:
        code: int | None = None
        if link is not None:
            hung = reason in ("HUNG", "START_TIMEOUT", "GALLERY_STALE")
            await host.end(link, grace_s=grace_s, dump=hung or grace_s > 0)
            code = link.exited.result()
        if member.link is not link:
            return  # another ending of the same life was faster
        member.link = None
        if member.ready is not None:
            self._take_back(member, reason)
            member.ready.close()
            member.ready = None
        log.info("worker gone", pool=self.name, worker=member.worker_id, exit_code=code)
        self._happen(member, Event(Happening.GONE, reason, clean=code == 0))

    def _left(self, member: _Member) -> None:
        """Drained: by our wish, or by its own (SIGTERM from outside)."""
        if member.life.life in restart.STARTING:
            self._lost(member, WorkerLostError("EXITED", "it left before it was ready"))
            return
        if member.life.life is Life.READY:
            log.info("worker leaves", pool=self.name, worker=member.worker_id)
            self._happen(member, Event(Happening.RESTART, "LEFT"))
        if member.ready is not None:
            self._take_back(member, "DRAINED")
            member.ready.close()
            member.ready = None
        if member.link is not None:
            member.link.release()
        self._settle()

    def _settle(self) -> None:
        """After any change: who is active, what state that makes, who waits for it."""
        joined = [m for m in self._members if m.joined and m.ready is not None]
        kept = [m for m in self._active if m in joined]
        spare = [m for m in joined if m not in kept]
        room = max(self._settings.workers - len(kept), 0)
        self._active = kept + spare[:room]
        self._retiring = [m for m in self._retiring if m.life.life is not Life.EXITED]
        self._set_state()
        self._refuse_hopeless()
        self._schedule_dispatch()
        self._gallery_progress()
        for waiter in list(self._progress):
            if not waiter.done():
                waiter.set_result(None)

    def _set_state(self) -> None:
        if self._ending:
            return
        if len(self._active) >= self._settings.workers:
            state = PoolState.SERVING
        elif self._active:
            state = PoolState.DEGRADED
        elif self._state is PoolState.STARTING and all(not m.life.losses for m in self._members):
            state = PoolState.STARTING
        else:
            state = PoolState.NOT_SERVING
        self._change_state(state)

    def _change_state(self, state: PoolState) -> None:
        if state is not self._state:
            previous, self._state = self._state, state
            log.info("pool state", pool=self.name, state=state, previous=previous)
            self._tell(PoolChange.STATE, None, "")

    def _tell(self, change: PoolChange, member: _Member | None, reason: str) -> None:
        if self._on_change is None:
            return
        self._on_change(
            PoolEvent(
                change,
                self.name,
                self._state,
                member.worker_id if member else "",
                member.link.pid if member and member.link else 0,
                reason,
            )
        )

    # -- start and stop -----------------------------------------------------------------

    async def start(self) -> None:
        """Launch all workers and return at once; see ``wait_ready``."""
        self._state = PoolState.STARTING
        self._members = [
            self._new_member(self.package)
            for _ in range(self._settings.workers + self._settings.spares)
        ]
        for member in self._members:
            self._begin_life(member)
        self._tick()

    async def wait_ready(self, timeout: float) -> bool:
        """Until some worker serves; False when none did in time."""
        return await self._until(lambda: self.available, timeout)

    async def drain(self, timeout: float) -> bool:
        """Take no more tasks; True when all that were taken have been answered in time."""
        self._change_state(PoolState.DRAINING)
        return await self._until(lambda: not self.queued and not self.in_flight, timeout)

    async def stop(self, grace: float = 10.0) -> None:
        """Drain within ``grace`` seconds, fail the rest, end the workers. Idempotent."""
        if self._state is PoolState.STOPPED:
            return
        await self.drain(grace)
        self._change_state(PoolState.STOPPED)
        for timer in (self._tick_timer, self._deadline_timer):
            if timer is not None:
                timer.cancel()
        self._tick_timer = self._deadline_timer = None
        for task in self._queue.clear():
            self._fail(task, _unavailable(self.name, "is shutting down"))
        for member in self._everyone():
            self._happen(member, Event(Happening.STOP, "STOPPED"))
        await self._until(
            lambda: all(m.life.life is Life.EXITED for m in self._everyone()),
            self._policy.drain_timeout_s + 15.0,
        )
        for member in self._everyone():
            if member.timer is not None:
                member.timer.cancel()
            if member.hang_timer is not None:
                member.hang_timer.cancel()
            for ending in list(member.endings):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([ending], timeout=5.0)
        for waiter in list(self._gallery_waiters):
            if not waiter.done():
                waiter.cancel()
        if self._snapshot is not None:
            close_all(self._snapshot[1])
            self._snapshot = None

    def _new_member(self, package: Package) -> _Member:
        number = self._numbers
        self._numbers += 1
        devices = self._settings.devices
        return _Member(
            f"{self.name}#{number}", devices[number % len(devices)], package, self._launcher
        )

    def _begin_life(self, member: _Member) -> None:
        member.life, actions = restart.start(member.life, self._clock.now_ns() / _S, self._policy)
        self._perform(member, actions, Event(Happening.TIMER))
        self._arm_life(member)

    async def _until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait for a condition that ``_settle`` or an answer may bring about."""
        deadline = self._clock.now_ns() + int(timeout * _S)
        while not condition():
            left = (deadline - self._clock.now_ns()) / _S
            if left <= 0:
                return False
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._progress.add(waiter)
            try:
                await asyncio.wait([waiter], timeout=min(left, 0.05))
            finally:
                self._progress.discard(waiter)
        return True

    # -- administration -----------------------------------------------------------------

    async def restart_worker(self, worker_id: str, timeout: float = 60.0) -> tuple[int, int]:
        """Drain one worker and start it again; (old pid, new pid).

        Raises FacelaneError: WORKER_NOT_FOUND, POOL_UNAVAILABLE when it does not come back
        within ``timeout`` seconds.
        """
        for member in self._members:
            if member.worker_id == worker_id:
                break
        else:
            known = ", ".join(m.worker_id for m in self._members)
            raise FacelaneError(
                Reason.WORKER_NOT_FOUND,
                f"the {self.name} pool has no worker of this id; it has: {known}",
                metadata={"pool": self.name},
            )
        if self._ending:  # a worker started now would have nobody to end it
            raise _unavailable(self.name, "is shutting down")
        old = member.link.pid if member.link else 0
        before = member.life.restarts
        self._tell(PoolChange.WORKER_RESTARTING, member, "RESTARTED")
        self._happen(member, Event(Happening.RESTART, "RESTARTED"))
        await self._until(lambda: _came_back(member, before) or self._ending, timeout)
        if not _came_back(member, before):
            raise _unavailable(self.name, "has not brought the worker back yet")
        return old, member.link.pid if member.link else 0

    async def reload(self, package: Package, timeout: float | None = None) -> None:
        """Serve another package (or the same, read again) without losing a task.

        New workers are warmed beside the old ones, then take over, then the old ones are
        drained. Workers of a thread group, and external ones, are restarted in turn
        instead, because there is no second place for them. On any failure, and when it is
        cancelled, the old package stays in service. Raises FacelaneError: MODEL_INVALID,
        POOL_UNAVAILABLE when the pool is stopped meanwhile.
        """
        if package.task is not self.stage:
            raise _invalid(package, f"it is a {package.task}, not a {self.stage}")
        if package.crops != self.package.crops:
            raise _invalid(package, "it takes other crops; restart the server with it instead")
        async with self._reloading:
            if self._ending:
                raise _unavailable(self.name, "is shutting down")
            bound = timeout if timeout is not None else self._settings.load_timeout_s
            if self._settings.isolation in ("thread", "external"):
                await self._reload_in_turn(package, bound)
            else:
                await self._reload_beside(package, bound)
        self._tell(PoolChange.MODEL_RELOADED, None, "")

    async def _reload_beside(self, package: Package, timeout: float) -> None:
        count = self._settings.workers + self._settings.spares
        fresh = self._warming = [self._new_member(package) for _ in range(count)]
        sound = False
        try:
            for member in fresh:
                self._begin_life(member)
            await self._until(
                lambda: (
                    all(m.life.life is Life.READY for m in fresh)
                    or any(m.life.losses for m in fresh)
                    or self._ending
                ),
                timeout,
            )
            sound = all(m.life.life is Life.READY for m in fresh) and not self._ending
        finally:
            self._warming = []
            if not sound:
                # Whoever asked may be gone (cancelled): nobody else would end them.
                self._retire(fresh)
        if not sound:
            raise self._not_reloaded(package, fresh)
        old, self._members = self._members, fresh
        self._adopt(package)
        self._settle()
        self._retire(old)

    def _retire(self, members: list[_Member]) -> None:
        self._retiring += members
        for member in members:
            self._happen(member, Event(Happening.STOP, "STOPPED"))

    async def _reload_in_turn(self, package: Package, timeout: float) -> None:
        old = self.package
        self._adopt(package)
        try:
            for member in self._members:
                member.package = package
                restarts = member.life.restarts
                self._happen(member, Event(Happening.RESTART, "RESTARTED"))
                # Which forgives what was lost before, with the old package.
                losses = member.life.losses

                await self._until(
                    lambda m=member, n=restarts, before=losses: (  # type: ignore[misc]
                        _came_back(m, n) or m.life.losses != before or self._ending
                    ),
                    timeout,
                )
                if not _came_back(member, restarts) or self._ending:
                    raise self._not_reloaded(package, [member])
        except BaseException:  # cancelled, too: never two models at once
            self._adopt(old)
            for other in self._members:
                if other.package is package:
                    other.package = old
                    if not self._ending:
                        self._happen(other, Event(Happening.RESTART, "RESTARTED"))
            raise

    def _not_reloaded(self, package: Package, members: list[_Member]) -> FacelaneError:
        if self._ending:
            return _unavailable(self.name, "is shutting down")
        reason = next((m.life.reason for m in members if m.life.reason), "START_TIMEOUT")
        return _invalid(package, f"its workers do not become ready ({reason}); see the log")

    def _adopt(self, package: Package) -> None:
        self.package = package
        self._codec = self._codec_for(package)

    # -- the gallery ------------------------------------------------------------------

    async def publish_gallery(self, snapshot: GallerySnapshot, fd: int) -> None:
        """Hand a snapshot to every worker; returns when all that are ready have loaded it.
        Workers that become ready later load it first. ``fd`` stays the caller's.

        A worker that cannot load it within a bound is replaced, because it would go on
        naming people by a gallery that is no more.
        """
        current = 0 if self._snapshot is None else self._snapshot[0].version
        if snapshot.version < current:
            raise ValueError("gallery versions must not go back")
        members = [m for m in self._everyone() if m.joined and m.ready is not None]
        if snapshot.version > current:
            matrix_fd = os.dup(fd)
            try:
                message, table_fd = gallery_table.detach(snapshot)
            except BaseException:
                os.close(matrix_fd)
                raise
            if self._snapshot is not None:
                close_all(self._snapshot[1])
            self._snapshot = (message, [matrix_fd, table_fd])
            for member in members:
                self._send_gallery(member)
        await self._gallery_loaded(members, snapshot.version)

    def _send_gallery(self, member: _Member) -> None:
        assert member.ready is not None
        assert self._snapshot is not None
        try:
            member.ready.publish(*self._snapshot, self._clock.now_ns())
        except ChannelError as error:
            self._lost(member, WorkerLostError("EXITED", str(error)))

    async def _gallery_loaded(self, members: list[_Member], version: int) -> None:
        """Until each of the workers has loaded ``version`` or is gone. ``_tick`` sees to it
        that one of both happens."""
        handles = [(m, m.ready) for m in members]
        while any(
            ready is not None and m.ready is ready and ready.gallery_version < version
            for m, ready in handles
        ):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._gallery_waiters.add(waiter)
            try:
                await waiter
            finally:
                self._gallery_waiters.discard(waiter)

    def _gallery_progress(self) -> None:
        for waiter in list(self._gallery_waiters):
            if not waiter.done():
                waiter.set_result(None)

    # -- what the workers are told --------------------------------------------------------

    def _everyone(self) -> list[_Member]:
        return [*self._members, *self._warming, *self._retiring]

    def _codec_crops(self, package: Package) -> tuple[CropSpec, ...]:
        return self._crops if self.stage is Stage.DETECTOR else package.crops

    def _codec_for(self, package: Package) -> Codec:
        return Codec(
            self.stage,
            [spec.size for spec in self._codec_crops(package)],
            embedding_dim=package.embedding_dim,
            resolve=self._resolve,
        )

    def _codec_check(self, member: _Member) -> None:
        facts = member.ready.facts if member.ready else None
        if facts is None:
            return
        if facts.embedding_dim != member.package.embedding_dim:
            raise WorkerLostError("PROTOCOL", "the model is not what its package says")
        if not 1 <= facts.batch_max <= (self._settings.batch_max or limits.MAX_BATCH):
            raise WorkerLostError("PROTOCOL", "it takes other batches than it was told")

    def _load_for(self, member: _Member) -> Load:
        settings = self._settings
        return Load(
            worker_id=member.worker_id,
            stage=self.stage,
            package=str(member.package.folder),
            device=member.device,
            batch_max=settings.batch_max,
            slots=limits.JOBS_PER_WORKER,
            request_slot_bytes=limits.REQUEST_SLOT_BYTES,
            response_slot_bytes=limits.RESPONSE_SLOT_BYTES,
            crops=tuple(_crop_message(spec) for spec in self._crops),
            precision=settings.precision,
            graphs=settings.graphs,
            threads=settings.threads,
            stream_priority=settings.stream_priority,
            memory_mib=settings.memory_mib,
            max_side=settings.max_side,
            max_pixels=self._max_pixels,
            decode=settings.decode,
            options=dict(settings.options),
        )


def _came_back(member: _Member, restarts: int) -> bool:
    """Ready in a later life than the one after so many restarts."""
    return member.life.restarts > restarts and member.life.life is Life.READY


def _jobs_of(member: _Member) -> Any:
    assert member.ready is not None
    return member.ready.jobs


def _crop_message(spec: CropSpec) -> CropSpecMessage:
    if isinstance(spec, AlignedCrop):
        return CropSpecMessage(spec.size)
    assert isinstance(spec, ContextCrop)
    return CropSpecMessage(spec.size, spec.scale)


def _canary_request(stage: Stage, crops: tuple[CropSpec, ...]) -> Request:
    """An even grey picture: cheap, and every model has an answer to it."""
    if stage is Stage.DETECTOR:
        data = b"\x60" * (_CANARY_SIDE * _CANARY_SIDE * 3)
        picture = Picture(Encoding.BGR24, data, _CANARY_SIDE, _CANARY_SIDE, _CANARY_SIDE * 3)
        return DetectRequest(picture, max_faces=1, max_pixels=limits.MAX_PIXELS)
    grey = tuple(b"\x60" * (spec.size * spec.size * 3) for spec in crops)
    if stage is Stage.RECOGNIZER:
        return EmbedRequest(grey[0])
    return LivenessRequest(grey)


def _unavailable(pool: str, why: str) -> FacelaneError:
    return FacelaneError(
        Reason.POOL_UNAVAILABLE,
        f"the {pool} pool {why}; try again later",
        retryable=True,
        metadata={"pool": pool},
    )


def _too_late(pool: str) -> FacelaneError:
    return FacelaneError(
        Reason.DEADLINE_EXCEEDED,
        f"no worker of the {pool} pool was free before the deadline; send less, or add workers",
        retryable=True,
        metadata={"pool": pool},
    )


def _worker_lost(pool: str) -> FacelaneError:
    return FacelaneError(
        Reason.WORKER_LOST,
        f"a worker of the {pool} pool ended; try again",
        retryable=True,
        metadata={"pool": pool},
    )


def _invalid(package: Package, why: str) -> FacelaneError:
    return FacelaneError(
        Reason.MODEL_INVALID,
        f"the model package {package.name} is not taken into service: {why}",
        metadata={"model": package.name},
    )
