"""The composition root: what exists, in which order it starts, and in which it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Self

import structlog

from facelane_server import changing, config, folders, heap, limits, plan, scrubber, served
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.edge import errors
from facelane_server.edge.controls import Degradation, Reloaded
from facelane_server.edge.quotas import Kind
from facelane_server.edge.server import Edge
from facelane_server.events import EventFeed, EventJournal, EventKind
from facelane_server.gallery.decide import Thresholds
from facelane_server.gallery.erasure import keep_erased
from facelane_server.gallery.gallery import Gallery
from facelane_server.gallery.retention import Retention
from facelane_server.gallery.trail import Trail
from facelane_server.models.package import Package, read_package
from facelane_server.monitor import DeviceReading, Monitor
from facelane_server.notify import Notifier
from facelane_server.observability.http import MetricsServer
from facelane_server.observability.logs import configure_logging
from facelane_server.observability.metrics import GalleryReading, Metrics, Sources
from facelane_server.pipeline import Pipeline
from facelane_server.pools.host import Launchers
from facelane_server.pools.mps import MpsDaemon
from facelane_server.pools.pool import Pool
from facelane_server.pools.report import PoolChange, PoolEvent
from facelane_server.seat import Seat
from facelane_server.served import ServedModels
from facelane_server.standing import beside, cancelled
from facelane_server.store.audit import Action
from facelane_server.store.opening import place_of, unlock
from facelane_server.traces import exported
from facelane_server.watch import LaneWatch, keep_pictures

log = structlog.get_logger(__name__)


class App:
    """One server. ``running`` starts and ends it."""

    def __init__(
        self, settings: config.Config, path: Path | None, seat: Seat | None = None
    ) -> None:
        """``seat``: of a process that is one shard of several."""
        self.seat = seat
        self.settings = settings
        self.path = path
        self.models = ServedModels.resolve(settings, calibrated=True)
        self.started_ns = time.time_ns()
        self.events = EventFeed(recorded=True)
        self.edge = Edge(settings, seat)
        self.pools: dict[Stage, Pool] = {}
        self.notifier = Notifier.from_environment()
        self.metrics = Metrics(
            Sources(
                pools=lambda: [pool.info() for pool in self.pools.values()],
                devices=lambda: self.monitor.readings,
                gallery=self._gallery_reading,
                streams=lambda: len(self.edge.streams),
                watchers=lambda: self.events.watchers,
                load=lambda: self.edge.load.load,
                calls=self.edge.calls_by_key,
                lookups=lambda: self.edge.quotas.lookups,
            )
        )
        self.monitor = Monitor(
            settings.monitor, workers=self._workers, on_memory=self._device_memory
        )
        self._gallery: Gallery | None = None
        self._scrubber = scrubber.Scrubber(self._scrub_workers)
        self._trail: Trail | None = None
        self._journal: EventJournal | None = None
        self._pipeline: Pipeline | None = None
        self._changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._grace_s = settings.server.drain_grace_s
        self._told_ready = False
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[Reloaded]] = set()
        self._renewals: set[asyncio.Task[None]] = set()

    # -- what others ask -----------------------------------------------------------------

    def can_infer(self) -> dict[Stage, bool]:
        return {stage: pool.available for stage, pool in self.pools.items()}

    def model_ids(self) -> dict[str, str]:
        return {stage.value: pool.model_id for stage, pool in self.pools.items()}

    def degradations(self) -> list[Degradation]:
        found = []
        if self._gallery is not None and (cause := self._gallery.trouble):
            found.append(Degradation.of_store(cause))
        journal = self._journal
        if journal is not None and (journal.trouble or journal.dropped):
            found.append(Degradation.of_events(journal.trouble, journal.waiting, journal.dropped))
        return found

    def request_end(self, grace_s: float | None = None) -> None:
        """The whole server is to drain and end."""
        (self.request_stop if self.seat is None else self.seat.end_all)(grace_s)

    def request_stop(self, grace_s: float | None = None) -> None:
        """Drain and end this process. Safe to call twice: the shorter grace counts."""
        if grace_s is not None:
            self._grace_s = min(grace_s, self._grace_s)
        self._stop.set()

    def _workers(self) -> dict[int, str]:
        """pid → worker id."""
        return {
            worker.pid: worker.worker_id
            for pool in self.pools.values()
            for worker in pool.info().workers
            if worker.pid
        }

    def _device_memory(self, reading: DeviceReading, warned: bool, message: str) -> None:
        if self.seat is not None and not self.seat.leads:
            return  # one tells it for all
        log.warning("device memory", device=reading.device, warned=warned, use=message)
        self.events.publish(EventKind.DEVICE_MEMORY, message=message)

    def _gallery_reading(self) -> GalleryReading | None:
        gallery = self._gallery
        return None if gallery is None else GalleryReading(gallery.templates, gallery.version)

    # -- what happens ----------------------------------------------------------------------

    def _pool_changed(self, event: PoolEvent) -> None:
        self._changed.set()
        if event.change in (PoolChange.STATE, PoolChange.WORKER_QUARANTINED):
            self.events.publish(
                EventKind.POOL_CHANGED,
                pool=event.pool if self.seat is None else f"{self.seat.index}/{event.pool}",
                message=f"{event.change.value} {event.state.value}",
            )

    async def _publish_health(self) -> None:
        """Follows the pools: every change is told within one turn of the loop."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self.edge.stages_changed(self.can_infer()):
                self.notifier.status(self._status_line())

    def _status_line(self) -> str:
        able = self.can_infer()
        pools = ", ".join(f"{s.value} {'up' if up else 'DOWN'}" for s, up in able.items())
        amiss = "".join(f"; DEGRADED: {d.component} {d.cause}" for d in self.degradations())
        return f"{len(self.edge.streams)} streams; {pools}{amiss}"

    # -- life ------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Everything started, in order; everything ended, in the opposite one."""
        async with contextlib.AsyncExitStack() as stack:
            hosting = [pool.hosting for pool in self.settings.stages.values()]
            runtime = None
            named = bool(self.settings.runtime_dir)
            if named or any(kind.needs_mps or kind.attaches for kind in hosting):
                runtime = stack.enter_context(folders.runtime_dir(self.settings))
            stack.enter_context(errors.observed(self.metrics.refused))
            await self._start_pools(stack, runtime)
            gallery = await self._open_gallery(stack)
            self._journal = await self._keep_events(stack, gallery)
            pipeline = Pipeline(
                self.pools,
                crops=self.models.positions,
                thresholds=self.models.thresholds,
                max_pixels=self.settings.limits.max_pixels,
                known=gallery.knows,
                losses=gallery.losses,
                revision=lambda: gallery.revision,
                searched=gallery.searched,
                context=self.models.context,
                portrait=self.models.portrait,
                models={stage: one.model_id for stage, one in self.models.packages.items()},
            )
            self._pipeline = pipeline
            beside(stack, self._publish_health, "health")
            self._changed.set()
            stack.push_async_callback(self._end_reloads)
            retention = Retention(gallery, self.settings.galleries)
            pictures = keep_pictures(self.settings, gallery, pipeline)
            stack.callback(pictures.close)
            gallery.on_forgotten.append(pictures.forgotten)
            beside(stack, pictures.run, "event-pictures")
            watch = LaneWatch(
                self.metrics,
                self.events,
                gallery,
                settings=self.settings.events,
                seen=retention.seen,
                sights=self.edge.sights,
                placed=(*self.settings.zones, *self.settings.lines),
                pictures=pictures,
                confirmed=[n for n, rules in self.settings.galleries.items() if rules.confirm],
            )
            trail = self._trail = Trail(gallery, self.settings.audit)
            stack.push_async_callback(trail.close)
            self.edge.streams.on_opened = watch.opened
            self.edge.streams.on_closed = watch.closed
            self.edge.traces = await stack.enter_async_context(exported(self.settings, self.pools))
            stack.push_async_callback(self.edge.close)
            if self.seat is not None:
                self.seat.began(self.edge.streams)
            served = (gallery, self.events, self, watch, trail, pictures, retention.seen)
            if self.seat is None or await self.seat.allowed(self._stop):
                await self.edge.open(pipeline, *served)
            if self.seat is not None:
                self.seat.opened()
            scraped = await MetricsServer.start(
                self.settings.metrics, self.metrics.exposition, self.edge.health.find
            )
            if scraped is not None:
                stack.push_async_callback(scraped.close)
            self.monitor.start()
            stack.callback(self.monitor.close)
            beside(stack, self._enroll_again_after_start, "renewal")
            beside(stack, self.metrics.watch_loop, "loop-lag")
            beside(stack, lambda: self._watch_gallery(gallery), "gallery-file")
            beside(stack, trail.run, "audit")
            beside(stack, retention.run, "retention")
            beside(stack, lambda: keep_erased(gallery), "gallery-erasure")
            beside(stack, lambda: self.notifier.keep_alive(self._alive), "watchdog")
            yield self

    async def _watch_gallery(self, gallery: Gallery) -> None:
        """Tells when the gallery can keep no change, which would be lost; and when no place is
        left among those who watch events."""
        health, before = self.edge.health, ""
        while True:
            assert self._journal is not None
            unwritten = self._trail is not None and self._trail.trouble
            trouble = gallery.trouble or self._journal.trouble or ("AUDIT_LOG" if unwritten else "")
            takes = not self.edge.quotas.full(Kind.WATCHERS)
            if trouble != before:
                self.notifier.status(self._status_line())
            if trouble != before or takes is not health.takes_watchers:
                health.keeps_changes, health.takes_watchers = not trouble, takes
                self._changed.set()
            if trouble == "FILE_GONE" != before:
                log.error(
                    "the gallery's file was removed or replaced: changes are refused; put it "
                    "back, or restore a backup and restart the server"
                )
            elif trouble == "DISK_FULL" != before:
                log.error("the gallery's disk is full: changes are refused; free some space")
            elif trouble and trouble != before:
                log.error(
                    "DEGRADED: the store is away; recognition goes on from memory, changes are "
                    "refused, events wait",
                    cause=trouble,
                )
            elif before and not trouble:
                log.info("the gallery takes changes again", was=before)
            before = trouble
            await asyncio.sleep(limits.GALLERY_WATCH_S)

    def _alive(self) -> bool:
        """What feeds systemd's watchdog: the detector can infer. A pool says so only after a
        real inference, repeated while it is idle."""
        return self.pools[Stage.DETECTOR].available

    async def _start_pools(self, stack: contextlib.AsyncExitStack, runtime: Path | None) -> None:
        pipes = None
        if self.seat is not None:
            # Planned, and MPS begun, by the keeper for all.
            pipes = Path(self.seat.mps_pipes) if self.seat.mps_pipes else None
        else:
            planned = await plan.check(self.settings, self.models.packages)
            for line in planned.lines():
                log.info("memory plan", line=line)
        if self.seat is None and any(
            pool.hosting.needs_mps for pool in self.settings.stages.values()
        ):
            assert runtime is not None
            daemon = await MpsDaemon.start(runtime / "mps")
            stack.push_async_callback(daemon.close)
            pipes = daemon.pipe_directory
        launchers = Launchers(runtime, mps_pipe_directory=pipes, models=self.settings.models.path)
        stack.push_async_callback(launchers.close)
        for stage, settings in self.settings.stages.items():
            pool = Pool(
                stage,
                settings,
                self.models.packages[stage],
                launchers.for_pool(stage.value, settings),
                crops=self.models.crops if stage is Stage.DETECTOR else (),
                max_pixels=self.settings.limits.max_pixels,
                resolve=self._resolve_subject if stage is Stage.RECOGNIZER else None,
                on_change=self._pool_changed,
                budget_mib=plan.process_budget_mib(self.settings, stage),
            )
            self.pools[stage] = pool
        for pool in self.pools.values():
            await pool.start()
            stack.push_async_callback(pool.stop, 0.0)

    def _resolve_subject(self, version: int, index: int) -> tuple[str, str] | None:
        return None if self._gallery is None else self._gallery.resolve(version, index)

    async def _open_gallery(self, stack: contextlib.AsyncExitStack) -> Gallery:
        gallery = await Gallery.open(
            place_of(self.settings),
            max_templates=self.settings.gallery.max_templates,
            lease_s=self.settings.store.lease_s,
            unlock=lambda database: unlock(database, self.settings),
        )
        self._gallery = gallery
        stack.push_async_callback(gallery.close)
        recognizer = self.pools.get(Stage.RECOGNIZER)
        if recognizer is not None:
            package = recognizer.package
            await gallery.serve(package.model_id, package.embedding_dim, recognizer.publish_gallery)
        return gallery

    async def _keep_events(
        self, stack: contextlib.AsyncExitStack, gallery: Gallery
    ) -> EventJournal:
        kept = self.settings.events
        journal = EventJournal(
            gallery.database,
            gallery.vault,
            self.events,
            keep=kept.keep,
            keep_days=kept.keep_days,
        )
        stack.push_async_callback(journal.close)
        await journal.start(gallery.watch)
        stack.push_async_callback(self._scrubber.close)
        gallery.on_forgotten.append(self.forgotten)
        return journal

    def forgotten(self, _number: int = 0) -> None:
        """Something was deleted, by whomever."""
        self.events.forget_subject("", "")
        self._scrubber.note()

    def _scrub_workers(self) -> None:
        for pool in self.pools.values():
            pool.scrub()

    # -- while it runs -----------------------------------------------------------------------

    async def wait_ready(self) -> None:
        """READY is told once every pool has inferred; a server whose models cannot be loaded
        says so and goes on trying, NOT_SERVING meanwhile."""
        while not self._stop.is_set():
            if all(self.can_infer().values()):
                self.notifier.ready(self._status_line())
                self._told_ready = True
                log.info("serving", models=self.model_ids())
                return
            self.notifier.extend_timeout(30.0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limits.START_POLL_S):
                    await self._stop.wait()

    async def wait_stop(self) -> None:
        await self._stop.wait()

    async def drain(self) -> None:
        """Tells the streams, lets them and single pictures finish within the grace, then ends
        them."""
        self._told_ready = False
        self.notifier.stopping("draining")
        if self.seat is not None:
            self.seat.draining()
            self.edge.leave_port(self._grace_s)
        grace_ns = int(self._grace_s * 1e9)
        log.info("draining", streams=len(self.edge.streams), grace_s=self._grace_s)
        streams = self.edge.streams
        streams.drain(grace_ns)
        self._changed.set()
        # Told to go, clients send what they have begun and close their side. Whoever has not
        # done so by the last quarter of the grace is ended.
        begun = time.monotonic()
        for share in (0.75, 1.0):
            while (
                not self.edge.streams.at_rest and time.monotonic() < begun + share * self._grace_s
            ):
                self.notifier.extend_timeout(self._grace_s)
                await asyncio.sleep(0.02)
            streams.stop()
        # Last, so that watchers are told of the streams that ended.
        if self._journal is not None:
            await self._journal.flush()
        self.events.close()

    async def reload_model(
        self, pool_name: str, model: str, *, forget_templates: bool = False
    ) -> Reloaded:
        """See ``AdminService.ReloadModel``. Raises ``FacelaneError``.

        What was begun is carried through, whether its caller waits for it or not: workers of
        the new model with the thresholds or the templates of the old one would judge wrongly.
        One after the other, for the same reason.
        """
        reload = asyncio.create_task(
            self._reload_model(pool_name, model, forget_templates), name="reload model"
        )
        self._reloads.add(reload)
        reload.add_done_callback(self._reloads.discard)
        # A caller that gave up does not come for the error.
        reload.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(reload)

    async def _reload_model(self, pool_name: str, model: str, forget_templates: bool) -> Reloaded:
        pool = next((p for p in self.pools.values() if p.name == pool_name), None)
        if pool is None:
            raise FacelaneError(
                Reason.POOL_NOT_FOUND,
                f"there is no such pool; there are {', '.join(self.pools)}",
            )
        async with self._reloading:
            old = pool.package
            try:
                package = await asyncio.to_thread(self._read_package, model, old)
                packages = {p.stage: p.package for p in self.pools.values()} | {pool.stage: package}
                try:
                    thresholds = served.thresholds_of(packages, self.settings)
                except config.ConfigError as error:
                    raise FacelaneError(Reason.MODEL_INVALID, str(error)) from None
                if pool.stage is Stage.RECOGNIZER and not forget_templates:
                    assert self._gallery is not None
                    await changing.refuse_forgetting(self._gallery, old, package)
                assert self._pipeline is not None
                try:
                    await pool.reload(package)
                    self._judge_by(packages, thresholds)
                    self._pipeline.liveness_models += pool.stage is Stage.LIVENESS
                finally:
                    with contextlib.suppress(config.ConfigError):  # calibrated, taken over since
                        self._judge_by(*self._serving())
                if pool.stage is Stage.RECOGNIZER:
                    assert self._gallery is not None
                    if package.model_id != self._gallery.model_id:
                        await self._gallery.serve(
                            package.model_id, package.embedding_dim, pool.publish_gallery
                        )
                    await changing.enroll_again(self._pipeline, self._gallery, package)
            except FacelaneError as error:
                log.warning("model not reloaded", pool=pool.name, reason=error.reason.value)
                raise
        log.info("model reloaded", pool=pool.name, model=package.model_id)
        not_searched = 0
        if pool.stage is Stage.RECOGNIZER and self._gallery is not None:
            not_searched = (await self._gallery.counts())[1] - self._gallery.templates
        configured = self.settings.stages[pool.stage].model or served.DEFAULT_MODELS[pool.stage]
        try:
            after_restart = await asyncio.to_thread(self._read_package, configured, package)
            remembered = after_restart.model_id == package.model_id
        except FacelaneError:
            remembered = False
        return Reloaded(old.model_id, package.model_id, not_searched, remembered)

    def _serving(self) -> tuple[dict[Stage, Package], Thresholds]:
        """The models that serve, and their thresholds. Raises ``ConfigError``."""
        packages = {pool.stage: pool.package for pool in self.pools.values()}
        return packages, served.thresholds_of(packages, self.settings)

    def _judge_by(self, packages: Mapping[Stage, Package], thresholds: Thresholds) -> None:
        """A model's scores mean something by its own thresholds alone."""
        if self._pipeline is not None:
            models = {stage: one.model_id for stage, one in packages.items()}
            self._pipeline.judge_by(thresholds, models)

    async def _enroll_again_after_start(self) -> None:
        """For those whose recogniser was changed by the config."""
        pool = self.pools.get(Stage.RECOGNIZER)
        if pool is None or (self.seat is not None and self.seat.index):
            return
        while not pool.available:
            await asyncio.sleep(limits.START_POLL_S)
        async with self._reloading:
            assert self._pipeline is not None
            assert self._gallery is not None
            try:
                await changing.enroll_again(self._pipeline, self._gallery, pool.package)
            except FacelaneError as error:
                log.warning("nobody was enrolled again", reason=error.reason.value)

    async def _end_reloads(self) -> None:
        for task in (*self._reloads, *self._renewals):
            await cancelled(task)

    def _read_package(self, model: str, present: Package) -> Package:
        if not model:
            return read_package(present.folder)
        return served.catalog(self.settings).resolve(model)

    def reload_config(self) -> None:
        """SIGHUP: keys and renewed certificates at once; what needs a restart is named and left
        as it is."""
        # READY ends a reload, and tells more than that of a server that has not started yet.
        if self._told_ready:
            self.notifier.reloading()
        with contextlib.suppress(config.ConfigError):  # said by then
            self.take_over()
        if self._told_ready:
            self.notifier.ready(self._status_line())

    def take_over(self, fresh: config.Config | None = None) -> None:
        """What can be without a restart; None = of the file. Raises ``ConfigError``, and then it is
        said already."""
        self.edge.reload_denied()
        try:
            fresh = config.load(self.path) if fresh is None else fresh
            serving = self._serving()  # liveness may have been calibrated
            renewed = self.edge.reload(fresh)
        except config.ConfigError as error:
            log.error("config not reloaded", problem=str(error))
            self._note_reload(error="refused")
            raise
        applied = ["auth", "log", "liveness", *(["tls"] if renewed else [])]
        stale = [
            name
            for name in config.Config.__struct_fields__
            if name not in ("auth", "log") and getattr(fresh, name) != getattr(self.settings, name)
        ]
        configure_logging(fresh.log)
        self._judge_by(*serving)
        self._renew_keys()
        log.info("config reloaded", applied=applied, needs_restart=stale)
        self._note_reload(applied=" ".join(applied), needs_restart=" ".join(stale))

    def _note_reload(self, **told: str) -> None:
        if self._trail is not None:
            self._trail.note(Action.RELOADED, **told)

    def _renew_keys(self) -> None:
        """A master key that was rotated locks the store from now on."""
        gallery = self._gallery
        if gallery is None:
            return

        async def renew() -> None:
            try:
                if done := await gallery.renew_keys():
                    log.info("the store is locked by another master key now", keys=done)
            except (FacelaneError, config.ConfigError) as error:
                log.error("the store keeps its master key", problem=str(error))

        task = asyncio.create_task(renew(), name="master-key")
        self._renewals.add(task)
        task.add_done_callback(self._renewals.discard)


async def serve(
    settings: config.Config,
    path: Path | None = None,
    *,
    on_running: Callable[[App], None] | None = None,
    seat: Seat | None = None,
) -> int:
    """Runs a server until SIGTERM or SIGINT, or a shard until its keeper says so; the exit code.

    Raises ``ConfigError`` and ``FacelaneError`` for what cannot be started.
    """
    configure_logging(settings.log, shard=None if seat is None else seat.index)
    app = App(settings, path, seat)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, app.request_stop)
    # A terminal tells all of its processes; a shard hears of it from its keeper.
    loop.add_signal_handler(signal.SIGINT, app.request_stop if seat is None else lambda: None)
    loop.add_signal_handler(signal.SIGHUP, app.reload_config if seat is None else lambda: None)
    attending = None if seat is None else asyncio.create_task(seat.attend(app), name="seat")
    try:
        async with app.running():
            if on_running is not None:
                on_running(app)
            heap.settle()
            tending = asyncio.create_task(heap.tend(), name="heap")
            try:
                await app.wait_ready()
                await app.wait_stop()
                await app.drain()
            finally:
                await cancelled(tending)
    finally:
        if attending is not None:
            await cancelled(attending)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)
    log.info("ended")
    return 0
