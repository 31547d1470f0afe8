"""The workers of a pool: brought up, watched, ended and brought up again.

``restart`` decides what a worker's life does next; here it is done. A worker is in
service only after it did what it is for: it has loaded, warmed up, answered a canary
inference and loaded the newest gallery; the canary is repeated while it serves.

Workers serve in generations: those that serve, those that a reload warms beside them,
and those that retire. Of those that serve and are ready, at most ``workers`` are active;
the others are spares.

Everything here runs on one event loop and never blocks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from typing import Any, Final, Protocol

import structlog

from facelane_server import config
from facelane_server.domain import FacelaneError, Reason
from facelane_server.ipc.channel import ChannelError
from facelane_server.ipc.messages import InferDone, InferFailed
from facelane_server.models.package import Package
from facelane_server.pools import canary, host, restart
from facelane_server.pools.briefing import Briefing
from facelane_server.pools.clock import Clock
from facelane_server.pools.feed import GalleryFeed
from facelane_server.pools.handle import ReadyHandle, UnreadyHandle, WorkerLostError
from facelane_server.pools.hang import HangWatch
from facelane_server.pools.host import Launcher, Link
from facelane_server.pools.report import PoolChange, WorkerInfo
from facelane_server.pools.restart import Action, Happening, Life, Notice
from facelane_server.pools.rounds import Rounds
from facelane_server.pools.schedule import HUNG
from facelane_server.pools.tasks import AnyTask, Job, Task
from facelane_server.pools.worker import Worker

log = structlog.get_logger(__name__)

_MS: Final = 1_000_000
_S: Final = 1_000_000_000
_ATTACH_NS: Final = 2 * _S
"""What systemd or a container's runtime needs to start an external worker again."""
_CANARY_LANE: Final = -1
_NICE_BESIDE: Final = 15
_NICE_AGAIN: Final = 5


class Owner(Protocol):
    """What a crew reports to its pool."""

    def worker_answered(self, worker: Worker, job: Job, message: InferDone | InferFailed) -> None:
        """Call ``finish`` when the answer was read."""

    def jobs_came_back(self, jobs: Sequence[Job], reason: str, *, overlaps: bool) -> None:
        """The worker that had them is gone."""

    def excuses(self, jobs: Sequence[Job], reason: str, *, overlaps: bool) -> bool:
        """Whether what a worker was lost over is not the worker's fault."""

    def crew_changed(self) -> None:
        """A life went on."""

    def tell(self, change: PoolChange, worker: Worker | None, reason: str) -> None: ...


class Crew:
    """See the module. ``budget_mib``: of a worker's process; 0 = none."""

    def __init__(
        self,
        pool: str,
        settings: config.Pool,
        launcher: Launcher,
        briefing: Briefing,
        feed: GalleryFeed,
        owner: Owner,
        *,
        clock: Clock,
        rng: random.Random,
        budget_mib: int,
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._hosting = settings.hosting
        self._launcher = launcher
        self._briefing = briefing
        self._feed = feed
        self._owner = owner
        self._clock = clock
        self._random = rng.random
        self._budget_mib = budget_mib
        self.policy = restart.Policy(
            limit=settings.restart_limit,
            window_s=settings.restart_window_s,
            initial_s=settings.backoff_initial_s,
            max_s=settings.backoff_max_s,
            quarantine_s=settings.quarantine_s,
            start_timeout_s=settings.load_timeout_s,
            drain_timeout_s=max(2 * settings.job_timeout_ms / 1000, 1.0),
            attaches=self._hosting.attaches,
        )
        self._job_timeout_ns = settings.job_timeout_ms * _MS
        self.serving: list[Worker] = []
        self.warming: list[Worker] = []
        """Of a reload under way."""
        self._retiring: list[Worker] = []
        self.active: list[Worker] = []
        """Those that are given tasks."""
        self._seats: list[ReadyHandle] | None = None
        self.losses = 0
        self._numbers = 0
        self._jobs = 0
        self._rounds = Rounds(self, settings, feed, clock)
        for number in range(settings.workers):
            launcher.register(f"{self._pool}#{number}")

    # -- who there is ---------------------------------------------------------------------

    def everyone(self) -> list[Worker]:
        return [*self.serving, *self.warming, *self._retiring]

    @property
    def has_lost(self) -> bool:
        """Some worker of those that serve was lost before."""
        return any(w.state.lost for w in self.serving)

    @property
    def in_flight(self) -> int:
        handles = [w.handle for w in self.everyone() if w.handle]
        return sum(job.size for handle in handles for job in handle.jobs)

    def seats(self) -> list[ReadyHandle]:
        """Of those that are given tasks. Made once for all frames until that changes."""
        if self._seats is None:
            self._seats = [w.handle for w in self.active if w.handle]
        return self._seats

    def info(self) -> tuple[WorkerInfo, ...]:
        now = self._clock.now_ns()
        return tuple(
            WorkerInfo(
                worker_id=w.worker_id,
                pid=w.pid,
                life=w.life,
                device=w.handle.facts.device_name if w.handle else w.device,
                restarts=w.state.restarts,
                last_loss=w.state.reason,
                memory_mib=w.handle.memory_mib if w.handle else 0,
                uptime_s=(now - w.ready_since_ns) / _S if w.handle and w.ready_since_ns else 0.0,
                spare=w.life is Life.READY and w not in self.active,
                sandbox=w.handle.facts.sandbox if w.handle else "",
                decoders=len(w.handle.decoders) if w.handle else 0,
            )
            for w in self.everyone()
        )

    def can_serve_by(self, deadline_ns: int) -> bool:
        """Some worker can infer now, or may be able to by then."""
        return bool(self.active) or any(
            restart.can_be_ready_by(w.state, deadline_ns / _S) and not self._is_forsaken(w)
            for w in (*self.serving, *self.warming)
        )

    def _is_forsaken(self, worker: Worker) -> bool:
        """It should have attached by now, and did not."""
        waited = self._clock.now_ns() - worker.spawned_ns
        starting = worker.life is Life.SPAWNED and worker.link is None
        return self._hosting.attaches and starting and waited >= _ATTACH_NS

    # -- generations ----------------------------------------------------------------------

    def start(self, package: Package) -> None:
        self.serving = self.recruit(package)
        for worker in self.serving:
            self.happen(worker, Happening.START)
        self._rounds.begin()

    def recruit(self, package: Package) -> list[Worker]:
        """A new generation, not started."""
        devices = self._settings.devices
        found = []
        for _ in range(self._settings.workers + self._settings.spares):
            number, self._numbers = self._numbers, self._numbers + 1
            device = devices[number % len(devices)]
            found.append(Worker(f"{self._pool}#{number}", device, package))
        return found

    def retire(self, workers: list[Worker]) -> None:
        self._retiring += workers
        for worker in workers:
            self.happen(worker, Happening.STOP, "STOPPED")

    def dismiss(self) -> None:
        """Begin the end of all workers; see ``gone``."""
        self._rounds.close()
        for worker in self.everyone():
            self.happen(worker, Happening.STOP, "STOPPED")

    def gone(self) -> bool:
        return all(w.life is Life.EXITED for w in self.everyone())

    async def close(self) -> None:
        """After ``dismiss``: no timer and no task stays behind."""
        for worker in self.everyone():
            if worker.timer is not None:
                worker.timer.cancel()
            for ending in list(worker.endings):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([ending], timeout=5.0)

    def _settle(self) -> None:
        """After any change of a life: who is active."""
        ready = [w for w in self.serving if w.life is Life.READY]
        kept = [w for w in self.active if w in ready]
        spare = [w for w in ready if w not in kept]
        self.active = kept + spare[: max(self._settings.workers - len(kept), 0)]
        self._seats = None
        self._retiring = [w for w in self._retiring if w.life is not Life.EXITED]
        self._owner.crew_changed()

    def promote(self, fresh: list[Worker]) -> None:
        """A generation that has warmed up takes over; the one before it retires."""
        old, self.serving = self.serving, fresh
        self._settle()
        self.retire(old)

    # -- lives ----------------------------------------------------------------------------

    def happen(self, worker: Worker, what: Happening, reason: str = "", detail: str = "") -> None:
        self._happen(worker, Notice(what, reason, detail))

    def _happen(self, worker: Worker, notice: Notice) -> None:
        """Feed the state machine and do what it says."""
        before, reason = worker.state, notice.reason
        now = self._clock.now_ns() / _S
        state, actions = restart.step(before, notice, now, self.policy, self._random)
        worker.state = state
        lost = state.lost > before.lost
        if lost:
            self.losses += 1
            self._log_loss(worker, before.life, notice)
        for action in actions:
            self._perform(worker, action, state.reason if lost else reason or "STOPPED")
        if state.wake_at != before.wake_at or actions:
            self._arm_life(worker)
        if state.life is Life.QUARANTINED is not before.life:
            self._quarantined(worker)
        self._settle()
        if lost:
            self._owner.tell(PoolChange.WORKER_LOST, worker, state.reason)

    def lost(self, worker: Worker, error: WorkerLostError) -> None:
        """A worker is of no use any more, by whatever sign."""
        handle, excused = worker.handle, False
        if handle is not None and worker.life is Life.READY:
            excused = self._owner.excuses(handle.jobs, error.reason, overlaps=handle.overlaps)
        self._happen(worker, Notice(Happening.LOSS, error.reason, error.detail, excused))

    def _log_loss(self, worker: Worker, life: Life, notice: Notice) -> None:
        log.warning(
            "worker lost",
            pool=self._pool,
            worker=worker.worker_id,
            worker_pid=worker.pid,
            reason=worker.state.reason,
            detail=notice.detail,
            excused=notice.excused,
            life=life,
        )

    def _quarantined(self, worker: Worker) -> None:
        log.error(
            "worker quarantined",
            pool=self._pool,
            worker=worker.worker_id,
            reason=worker.state.reason,
            losses=len(worker.state.losses),
            retry_in_s=round(self.policy.quarantine_s, 1),
        )
        self._owner.tell(PoolChange.WORKER_QUARANTINED, worker, worker.state.reason)

    def _arm_life(self, worker: Worker) -> None:
        if worker.timer is not None:
            worker.timer.cancel()
            worker.timer = None
        if worker.state.wake_at is not None:
            worker.timer = self._clock.call_at(
                int(worker.state.wake_at * _S) + 1, lambda: self.happen(worker, Happening.TIMER)
            )

    def _perform(self, worker: Worker, action: Action, reason: str) -> None:
        if action is Action.SPAWN:
            worker.spawned_ns = self._clock.now_ns()
            worker.bring_up = asyncio.get_running_loop().create_task(
                self._bring_up(worker), name=f"bring up {worker.worker_id}"
            )
        elif action is Action.DRAIN:
            assert worker.handle is not None
            worker.handle.drain()
            self._end(worker, grace_s=self.policy.drain_timeout_s, reason="DRAINED")
        elif action is Action.KILL:
            self._end(worker, grace_s=0.0, reason=reason)

    async def _bring_up(self, worker: Worker) -> None:
        """From SPAWNED to READY. Cancelled when the life ends before."""
        unready: UnreadyHandle | None = None
        try:
            link = worker.link = await self._launcher.launch(
                worker.worker_id, self._nice(worker), worker.package.folder
            )
            self.happen(worker, Happening.ATTACHED)
            load = self._briefing.load(worker.package, worker.worker_id, worker.device)
            unready = UnreadyHandle(link, worker.worker_id, load)
            handle = await unready.ready(lambda what: self.happen(worker, Happening[what]))
            self._take_over(worker, handle)
            await self._send_canary(worker)
            while not self._feed.is_current(handle):
                self._feed.send(handle, self._clock.now_ns())
                await self._feed.loaded([handle], self._feed.version)
        except WorkerLostError as error:
            self.lost(worker, error)
        except ChannelError as error:
            self.lost(worker, WorkerLostError.by(error))
        except FacelaneError as error:
            self.lost(worker, WorkerLostError("CANARY_FAILED", error.message))
        except OSError as error:
            self.lost(worker, WorkerLostError("NOT_STARTED", error.strerror or str(error)))
        except Exception as error:
            log.exception("worker not brought up", pool=self._pool, worker=worker.worker_id)
            self.lost(worker, WorkerLostError("NOT_STARTED", type(error).__name__))
        else:
            self._welcome(worker, handle)
        finally:
            if unready is not None:
                unready.close()

    def _take_over(self, worker: Worker, handle: ReadyHandle) -> None:
        worker.handle, worker.ready_since_ns, self._seats = handle, 0, None
        hung = WorkerLostError(HUNG, "a job exceeded job_timeout_ms")
        worker.hang = HangWatch(
            handle, self._clock, self._job_timeout_ns, lambda: self.lost(worker, hung)
        )
        handle.on_answer = lambda _, job, message: self._owner.worker_answered(worker, job, message)
        handle.on_gallery = lambda _: self._owner.crew_changed()
        handle.on_drained = lambda _: self._left(worker)
        handle.on_lost = lambda _, error: self.lost(worker, error)
        self._briefing.check(worker.package, handle.facts)
        if self._is_over_budget(handle):
            raise WorkerLostError("OVER_BUDGET", "the model alone exceeds memory_mib")
        worker.codec = self._briefing.codec(worker.package)

    def _welcome(self, worker: Worker, handle: ReadyHandle) -> None:
        facts = handle.facts
        log.info(
            "worker ready",
            pool=self._pool,
            worker=worker.worker_id,
            worker_pid=worker.pid,
            device=facts.device_name,
            model=facts.model_id,
            load_ms=round(facts.load_ms, 1),
            warm_ms=round(facts.warm_ms, 1),
            latency_ms=round(facts.latency_ms, 3),
            memory_mib=facts.memory_mib,
        )
        worker.ready_since_ns = self._clock.now_ns()
        self.happen(worker, Happening.READY)
        self._owner.tell(PoolChange.WORKER_READY, worker, "")

    def _nice(self, worker: Worker) -> int:
        """While it loads: nobody waits for one that comes beside workers of this pool; for one
        that comes back alone somebody does, but other pools' frames pass first."""
        if self.active:
            return _NICE_BESIDE
        return _NICE_AGAIN if worker.state.restarts else 0

    def _left(self, worker: Worker) -> None:
        """Drained: by our wish, or by its own (SIGTERM from outside)."""
        log.info("worker leaves", pool=self._pool, worker=worker.worker_id)
        self.happen(worker, Happening.LEFT, detail="it left before it was ready")
        if worker.life is not Life.DRAINING:
            return  # that was a loss
        self._let_go(worker, "DRAINED")
        if worker.link is not None:
            worker.link.release()
        self._settle()

    def _end(self, worker: Worker, *, grace_s: float, reason: str) -> None:
        """See to the end of the present process, and report GONE."""
        if grace_s == 0:
            if worker.bring_up is not None and worker.bring_up is not asyncio.current_task():
                worker.bring_up.cancel()
            worker.bring_up = None
        # First of all: whatever becomes of its jobs, its process ends.
        ending = asyncio.get_running_loop().create_task(
            self._see_to_end(worker, worker.link, grace_s, reason), name=f"end {worker.worker_id}"
        )
        worker.endings.add(ending)
        ending.add_done_callback(worker.endings.discard)
        if grace_s == 0:
            self._let_go(worker, reason)

    async def _see_to_end(
        self, worker: Worker, link: Link | None, grace_s: float, reason: str
    ) -> None:
        code: int | None = None
        if link is not None:
            hung = reason in (HUNG, "START_TIMEOUT", "GALLERY_STALE")
            await host.end(link, grace_s=grace_s, dump=hung or grace_s > 0)
            code = link.exited.result()
        if worker.link is not link:
            return  # another ending of the same life was faster
        worker.link = None
        self._let_go(worker, reason)
        log.info("worker gone", pool=self._pool, worker=worker.worker_id, exit_code=code)
        self.happen(worker, Happening.GONE)

    def _let_go(self, worker: Worker, reason: str) -> None:
        """Of the present process: its jobs go back to the pool."""
        handle, worker.handle, self._seats = worker.handle, None, None
        if handle is None:
            return
        if worker.hang is not None:
            worker.hang.close()
        jobs = list(handle.jobs)
        handle.jobs.clear()
        handle.close()
        self._owner.jobs_came_back(jobs, reason, overlaps=handle.overlaps)

    # -- jobs -----------------------------------------------------------------------------

    def give(self, handle: ReadyHandle, tasks: list[AnyTask]) -> None:
        """Send a job; if the worker is gone, its tasks come back. Raises ValueError or
        OverflowError for a request that no message can carry."""
        worker = self._whose(handle)
        assert worker.codec is not None
        self._jobs += 1
        slot, view = handle.request_slot()
        now = self._clock.now_ns()
        for task in tasks:
            task.dispatched_ns = now
            task.model = handle.facts.model_id
        job = Job(self._jobs, slot, tasks, started_ns=0 if handle.jobs else now)
        try:
            requests = [task.request for task in tasks]
            items, job.request_used = worker.codec.write(requests, view, handle.decoders)
            if len(handle.decoders):
                handle.take_over([t.lane for t in tasks], [w.handle for w in self.everyone()])
            handle.send(job, items)
        except ChannelError as error:
            self._owner.jobs_came_back([job], "NOT_SENT", overlaps=False)
            # It may have left in order, or said why it ends: that counts, not our EPIPE.
            handle.receive_last()
            if worker.handle is handle:
                self.lost(worker, WorkerLostError.by(error))
            return
        assert worker.hang is not None
        worker.hang.begin()

    def finish(self, worker: Worker, job: Job, message: InferDone | InferFailed, used: int) -> None:
        """A job's answer was read: its place is free. ``used``: bytes of the response slot."""
        handle, now = worker.handle, self._clock.now_ns()
        if handle is None:
            return
        handle.done(job, used)
        if job.started_ns:
            handle.service_ns += 0.125 * (now - job.started_ns - handle.service_ns)
        if handle.jobs and not handle.jobs[0].started_ns:
            handle.jobs[0].started_ns = now
        # Before the next dispatch: what is retried shall not meet the same full memory.
        if self._is_over_budget(handle) or self._is_at_its_cap(message):
            self._recycle(worker, "OVER_BUDGET")

    def cancel_if_abandoned(self, task: AnyTask) -> None:
        """Whoever waited for the task is gone: a staged job that is waited for by nobody need
        not be begun."""
        for handle in (w.handle for w in self.everyone() if w.handle):
            for job in list(handle.jobs)[1:]:
                if task in job.tasks:
                    if not job.abandoned and all(t.future.done() for t in job.tasks):
                        job.abandoned = True
                        handle.cancel(job)
                    return

    def _send_canary(self, worker: Worker) -> asyncio.Future[Any]:
        """Built-in items through the worker, for a batch bucket and a picture in turn; a failure,
        or an answer that full precision does not agree with, loses the worker."""
        now = self._clock.now_ns()
        handle = worker.handle
        assert handle is not None
        requests = self._briefing.canaries(worker.package)
        which, count = canary.batch(requests, handle.batch_max, handle.canaries)
        known = handle.facts.known[which] if which < len(handle.facts.known) else None
        least = worker.package.manifest.thresholds.score or 0.0
        handle.canaries += 1
        handle.canary_ns, handle.canary_due = now, False

        def judge(done: asyncio.Future[Any]) -> None:
            # Asked for, whoever died: asyncio complains of what nobody has heard of.
            failed = not done.cancelled() and done.exception() is not None
            if done.cancelled() or worker.handle is not handle:
                return
            if failed:
                self.lost(worker, WorkerLostError("CANARY_FAILED"))
            elif known is not None and not canary.agrees(known, done.result(), least):
                why = f"full precision does not agree (a batch of {count})"
                self.lost(worker, WorkerLostError(canary.WRONG_ANSWER, why))

        tasks: list[AnyTask] = []
        for _ in range(count):
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            future.add_done_callback(judge)
            tasks.append(
                Task(
                    requests[which],
                    lane=_CANARY_LANE,
                    weight=1,
                    deadline_ns=now + self._job_timeout_ns,
                    future=future,
                    submitted_ns=now,
                    canary=True,
                )
            )
        self.give(handle, tasks)
        return tasks[0].future

    def give_due_canary(self, worker: Worker) -> None:
        handle = worker.handle
        if (
            handle is not None
            and handle.canary_due
            and worker.life is Life.READY
            and len(handle.jobs) < handle.places
            and handle.free_slots
        ):
            self._send_canary(worker)

    # -- troubles -------------------------------------------------------------------------

    def in_service(self) -> list[ReadyHandle]:
        ready = [w for w in (*self.serving, *self.warming) if w.life is Life.READY]
        return [w.handle for w in ready if w.handle]

    def handle_lost(self, handle: ReadyHandle, error: WorkerLostError) -> None:
        if not handle.closed:
            self.lost(self._whose(handle), error)

    def ask_canary(self, handle: ReadyHandle) -> None:
        self._send_canary(self._whose(handle))

    def recycle_if_too_large(self, handle: ReadyHandle) -> None:
        if not handle.closed and self._is_over_budget(handle):
            self._recycle(self._whose(handle), "OVER_BUDGET")

    def _whose(self, handle: ReadyHandle) -> Worker:
        for worker in self.active:
            if worker.handle is handle:
                return worker
        return next(w for w in self.everyone() if w.handle is handle)

    def _is_over_budget(self, handle: ReadyHandle) -> bool:
        return 0 < self._budget_mib < handle.memory_mib

    def _is_at_its_cap(self, message: InferDone | InferFailed) -> bool:
        """Out of memory inside a budget: the model fitted when it warmed up, so something grew
        since, and a process of its own has its cap just there."""
        return (
            self._budget_mib > 0
            and isinstance(message, InferFailed)
            and message.reason == Reason.OUT_OF_MEMORY
        )

    def _recycle(self, worker: Worker, reason: str) -> None:
        if worker.life is not Life.READY:
            return
        if self._hosting.shares_process:
            # Memory belongs to the process: only its end gives it back.
            self.lost(worker, WorkerLostError(reason, "the group's process grew too large"))
            return
        log.warning(
            "worker recycled",
            pool=self._pool,
            worker=worker.worker_id,
            reason=reason,
            memory_mib=worker.handle.memory_mib if worker.handle else 0,
            budget_mib=self._budget_mib,
        )
        self.restart(worker, reason)

    def restart(self, worker: Worker, reason: str) -> None:
        """Drain it and start it again; on purpose."""
        self._owner.tell(PoolChange.WORKER_RESTARTING, worker, reason)
        self.happen(worker, Happening.RESTART, reason)
