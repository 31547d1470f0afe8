"""A pool: the workers of one stage, and the tasks that wait for them.

``schedule`` decides what goes next and who is to blame, ``crew`` sees to the workers'
lives, ``reloading`` to other models; here they are driven: tasks in, batches out to the
workers, answers back to those who wait, and what an operator may ask: reload, restart, drain.

A pool says it can infer only after each of its workers did so (``crew``).

Everything here runs on one event loop and never blocks it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from facelane_server import config, limits
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.ipc.channel import ChannelError, ProtocolError
from facelane_server.ipc.messages import GalleryDelta, GallerySnapshot, InferDone, InferFailed
from facelane_server.models.api import CropSpec
from facelane_server.models.package import Package
from facelane_server.pools.briefing import Briefing
from facelane_server.pools.clock import Changes, Clock, LoopClock, Timer
from facelane_server.pools.crew import Crew
from facelane_server.pools.feed import GalleryFeed
from facelane_server.pools.handle import ReadyHandle, WorkerLostError
from facelane_server.pools.host import Launcher
from facelane_server.pools.reloading import Reloading
from facelane_server.pools.report import PoolChange, PoolEvent, PoolInfo, PoolState, Work
from facelane_server.pools.restart import Life
from facelane_server.pools.schedule import Ended, Schedule, unavailable
from facelane_server.pools.slots import SubjectResolver
from facelane_server.pools.tasks import AnyTask, Job, VideoRequest
from facelane_server.pools.worker import Worker

log = structlog.get_logger(__name__)

_REAP_S: Final = 15.0
"""Beyond the time to drain: what SIGTERM, a stack dump and SIGKILL take at most."""


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
        self._on_change = on_change
        self.on_answered: Callable[[Pool, Job, str], None] | None = None
        """Told of every job whose answer was given to those who wait, and of its worker; nothing
        unless something is traced."""
        self._clock = clock or LoopClock()
        self._briefing = Briefing(
            stage, settings, crops=crops, max_pixels=max_pixels, resolve=resolve
        )
        self._schedule = Schedule(self.name, self._briefing.codec(package))
        self._changes = Changes(self._clock)
        self._feed = GalleryFeed(self._changes)
        self._crew = Crew(
            self.name,
            settings,
            launcher,
            self._briefing,
            self._feed,
            self,
            clock=self._clock,
            rng=rng or random.Random(),
            budget_mib=settings.memory_mib if budget_mib is None else budget_mib,
        )
        self._reloading = Reloading(self, settings, launcher, self._crew, self._changes)
        self._state = PoolState.STOPPED
        self._dispatch_due = False
        self._deadline_timer: Timer | None = None
        self._deadline_at = 0
        self._completed = 0
        self._failed = 0
        self._busy_ns = 0
        self._waited_ns = 0
        self._done = 0
        self._replayed = 0
        self._answers = 0

    # -- what the server asks -------------------------------------------------------------

    @property
    def state(self) -> PoolState:
        return self._state

    @property
    def available(self) -> bool:
        """Some worker can infer now."""
        return bool(self._crew.active)

    @property
    def model_id(self) -> str:
        return self.package.model_id

    @property
    def queued(self) -> int:
        return self._schedule.queued

    @property
    def in_flight(self) -> int:
        return self._crew.in_flight

    def work(self) -> Work:
        """What its workers have done since the start."""
        now = self._clock.now_ns()
        jobs = [seat.jobs[0] for seat in self._crew.seats() if seat.jobs]
        under_way = sum(now - job.started_ns for job in jobs if job.started_ns)
        hurried = sum(t.sender.live and not t.sender.patient for t in self._schedule.waiting())
        workers = len(self._crew.active)
        busy_ns = self._busy_ns + under_way
        return Work(busy_ns, self._answers, hurried, workers, self._waited_ns, self._done)

    def info(self) -> PoolInfo:
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
            retried=self._schedule.retried,
            losses=self._crew.losses,
            replayed=self._replayed,
            workers=self._crew.info(),
            budget_mib=self._settings.memory_mib,
        )

    # -- tasks ----------------------------------------------------------------------------

    def submit(self, task: AnyTask) -> None:
        """Queue a task. Never raises and never blocks: a refusal comes through the future."""
        now = task.submitted_ns = self._clock.now_ns()
        if self.ending:
            refusal: FacelaneError | None = self.shutting_down()
        else:
            # Only lanes of video belong to a worker.
            video = isinstance(task.request, VideoRequest)
            seats = self._answering(now) if video else ()
            refusal = self._schedule.submit(task, now, self._crew.can_serve_by, seats)
        if refusal is not None:
            self._resolve([(task, refusal)])
            return
        if self._deadline_timer is None or task.deadline_ns < self._deadline_at:
            self._arm_deadline()
        self._schedule_dispatch()

    def replace(self, task: AnyTask, by: AnyTask) -> bool:
        """Put a task in the place, and the turn, of another of its lane. True when the other was
        still queued: its future is then the caller's to resolve. False: nothing has changed."""
        now = by.submitted_ns = self._clock.now_ns()
        if self.ending or not self._schedule.replace(task, by, now, self._crew.can_serve_by):
            return False
        self._arm_deadline()
        self._schedule_dispatch()
        return True

    def pass_by(self, task: AnyTask) -> None:
        """A picture of video that nobody looks at: its future is never resolved. It is decoded with
        what goes next to the lane's worker, or with the lane's next picture."""
        self._schedule.pass_by(task)

    def release(self, lane: int) -> None:
        """A lane of video has ended: nobody decodes it any more."""
        self._schedule.release(lane)
        for worker in self._crew.everyone():
            if worker.handle is not None:
                worker.handle.close_video(lane)

    def scrub(self) -> None:
        """Somebody was deleted: nothing of them is to be left in free memory of the workers."""
        for worker in self._crew.everyone():
            if worker.handle is not None:
                worker.handle.scrub()

    def withdraw(self, task: AnyTask) -> bool:
        """Take a task back. True when it was still queued: its future is then the caller's to
        resolve. False when a worker has it or had it: its future is resolved as usual."""
        if self._schedule.withdraw(task):
            return True
        if task.future.done():
            self._crew.cancel_if_abandoned(task)
        return False

    def _resolve(self, ended: Ended) -> None:
        if self._state is PoolState.STOPPED:
            ended = [*ended, *self._schedule.close()]  # tasks that came back too late
        if not ended:
            return
        now = self._clock.now_ns()
        for task, outcome in ended:
            task.finished_ns = now
            failed = isinstance(outcome, FacelaneError)
            self._failed += failed and not task.canary  # nobody asked for that one
            self._completed += not failed and not task.canary
            if task.future.done():
                continue
            if isinstance(outcome, FacelaneError):
                task.future.set_exception(outcome)
            else:
                task.future.set_result(outcome)

    @property
    def ending(self) -> bool:
        """It takes no more tasks, and nobody would end a worker that is started now."""
        return self._state in (PoolState.DRAINING, PoolState.STOPPED)

    def shutting_down(self) -> FacelaneError:
        return unavailable(self.name, "is shutting down")

    def _arm_deadline(self) -> None:
        deadline_ns = self._schedule.next_deadline()
        if deadline_ns is None:
            return
        if self._deadline_timer is not None:
            if self._deadline_at <= deadline_ns:
                return
            self._deadline_timer.cancel()
        self._deadline_at = deadline_ns
        self._deadline_timer = self._clock.call_at(deadline_ns, self._on_deadline)

    def _on_deadline(self) -> None:
        self._deadline_timer = None
        self._expire()
        self._arm_deadline()

    def _expire(self) -> None:
        self._resolve(self._schedule.expire(self._clock.now_ns(), serving=self.available))

    # -- dispatch -------------------------------------------------------------------------

    def _schedule_dispatch(self) -> None:
        """Dispatch at the end of this turn of the loop, so that what is submitted in one turn
        can go in one batch."""
        if not self._dispatch_due and self.available:
            self._dispatch_due = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatch_due = False
        if not self._schedule.queued:
            return
        now = self._clock.now_ns()
        if self._deadline_timer is None or self._deadline_at <= now:
            self._expire()
        while (given := self._schedule.next(self._answering(now))) is not None:
            handle, tasks = given
            if lost := self._schedule.without_pictures(tasks, handle):
                self._resolve(lost)
                tasks = [task for task in tasks if not task.future.done()]
            try:
                if tasks:
                    self._crew.give(handle, tasks)
                    self._replayed += handle.decoders.take_replayed()
            except (ValueError, OverflowError):
                handle.decoders.forget(task.lane for task in tasks)
                self._resolve(self._schedule.cannot_be_sent(tasks))
                self._arm_deadline()

    def _answering(self, now_ns: int) -> Sequence[ReadyHandle]:
        return self._schedule.answering(self._crew.seats(), now_ns)

    def worker_answered(self, worker: Worker, job: Job, message: InferDone | InferFailed) -> None:
        handle, codec, used = worker.handle, worker.codec, 0
        if handle is None or codec is None:
            return
        if isinstance(message, InferDone):
            self._waited_ns += 1_000 * message.waited_us
            self._done += 1
            try:
                ended, used = self._schedule.answered(
                    job,
                    message,
                    codec,
                    handle.response(job),
                    self._clock.now_ns(),
                    handle.decoders,
                )
            except Exception as error:
                handle.jobs.appendleft(job)
                if not isinstance(error, ProtocolError):
                    log.exception("answer not understood", pool=self.name)
                    error = ProtocolError(type(error).__name__)
                self._crew.lost(worker, WorkerLostError.by(error))
                return
        else:
            handle.decoders.forget(task.lane for task in job.tasks)
            # Nothing says how much of an answer was written before it failed.
            used = 0 if message.reason == Reason.CANCELLED else len(handle.response(job))
            ended = self._schedule.failed(job, message)
        self._resolve(ended)
        if self.on_answered is not None:
            self.on_answered(self, job, worker.worker_id)
        self._arm_deadline()
        if job.started_ns:
            self._busy_ns += self._clock.now_ns() - job.started_ns
        self._answers += job.size
        self._crew.finish(worker, job, message, used)
        self._crew.give_due_canary(worker)
        self._dispatch()

    def jobs_came_back(self, jobs: Sequence[Job], reason: str, *, overlaps: bool) -> None:
        now = self._clock.now_ns()
        self._resolve(self._schedule.taken_back(jobs, reason, now, overlaps=overlaps))
        self._arm_deadline()

    def excuses(self, jobs: Sequence[Job], reason: str, *, overlaps: bool) -> bool:
        return self._schedule.excuses(jobs, reason, self._clock.now_ns(), overlaps=overlaps)

    # -- state ----------------------------------------------------------------------------

    def crew_changed(self) -> None:
        self._set_state()
        if not self.available:
            self._resolve(self._schedule.refuse_hopeless(self._crew.can_serve_by))
        self._schedule_dispatch()
        self._changes.tell()

    def _set_state(self) -> None:
        if self.ending:
            return
        if len(self._crew.active) >= self._settings.workers:
            state = PoolState.SERVING
        elif self._crew.active:
            state = PoolState.DEGRADED
        elif self._state is not PoolState.STARTING or self._crew.has_lost:
            state = PoolState.NOT_SERVING
        else:
            state = PoolState.STARTING
        self._change_state(state)

    def _change_state(self, state: PoolState) -> None:
        if state is not self._state:
            previous, self._state = self._state, state
            log.info("pool state", pool=self.name, state=state, previous=previous)
            self.tell(PoolChange.STATE, None, "")

    def tell(self, change: PoolChange, worker: Worker | None, reason: str) -> None:
        if self._on_change is None:
            return
        worker_id, pid = (worker.worker_id, worker.pid) if worker else ("", 0)
        self._on_change(PoolEvent(change, self.name, self._state, worker_id, pid, reason))

    # -- start and stop -------------------------------------------------------------------

    async def start(self) -> None:
        """Launch all workers and return at once; see ``wait_ready``."""
        self._state = PoolState.STARTING
        self._crew.start(self.package)

    async def wait_ready(self, timeout: float) -> bool:
        """Until some worker serves; False when none did in time."""
        return await self._changes.until(lambda: self.available, timeout)

    async def drain(self, timeout: float) -> bool:
        """Take no more tasks; True when all that were taken have been answered in time."""
        self._change_state(PoolState.DRAINING)
        return await self._changes.until(lambda: not self.queued and not self.in_flight, timeout)

    async def stop(self, grace: float = 10.0) -> None:
        """Drain within ``grace`` seconds, fail the rest, end the workers. Idempotent."""
        if self._state is PoolState.STOPPED:
            return
        await self.drain(grace)
        self._change_state(PoolState.STOPPED)
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        self._resolve([])
        self._crew.dismiss()
        await self._changes.until(self._crew.gone, self._crew.policy.drain_timeout_s + _REAP_S)
        await self._crew.close()
        self._feed.close()

    # -- administration -------------------------------------------------------------------

    async def restart_worker(self, worker_id: str, timeout: float = 60.0) -> tuple[int, int]:
        """Drain one worker and start it again; (old pid, new pid).

        Raises FacelaneError: WORKER_NOT_FOUND, POOL_UNAVAILABLE when it does not come back
        within ``timeout`` seconds.
        """
        return await self._reloading.restart(worker_id, timeout)

    async def reload(self, package: Package, timeout: float | None = None) -> None:
        """Serve another package (or the same, read again) without losing a task.

        New workers are warmed beside the old ones, then take over, then the old ones are
        drained. Where there is no second place for them (a thread group, external workers)
        they are restarted in turn instead. On any failure, and when it is cancelled, the old
        package stays in service. Raises FacelaneError: MODEL_INVALID, POOL_UNAVAILABLE when
        the pool is stopped meanwhile.
        """
        await self._reloading.reload(package, timeout)
        self.tell(PoolChange.MODEL_RELOADED, None, "")

    def adopt(self, package: Package) -> None:
        """What is asked from now on is this package's."""
        self.package = package
        self._schedule.codec = self._briefing.codec(package)

    # -- the gallery ----------------------------------------------------------------------

    async def publish_gallery(
        self, snapshot: GallerySnapshot, fd: int, delta: GalleryDelta | None = None, log: int = -1
    ) -> None:
        """Hand a snapshot, and what came after it, to every worker; returns when all that are
        ready have loaded it, or were lost. Workers that become ready later load it first. The
        descriptors stay the caller's."""
        workers = [w for w in self._crew.everyone() if w.life is Life.READY and w.handle]
        handles = [w.handle for w in workers if w.handle]
        if self._feed.renew(snapshot, fd, delta, log):
            for worker, handle in zip(workers, handles, strict=True):
                try:
                    self._feed.send(handle, self._clock.now_ns())
                except ChannelError as error:
                    self._crew.lost(worker, WorkerLostError.by(error))
        await self._feed.loaded(handles, self._feed.version)
