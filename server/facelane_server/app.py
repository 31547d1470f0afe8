"""The composition root: what exists, in which order it starts, and in which it ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import grpc
import msgspec
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from facelane.v1 import (
    admin_service_pb2_grpc,
    analysis_service_pb2_grpc,
    event_service_pb2_grpc,
    gallery_service_pb2_grpc,
    server_service_pb2_grpc,
)
from facelane_server import __version__, config, limits, plan, tracking
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.edge import errors, health
from facelane_server.edge.analysis import AnalysisService, LaneRegistry
from facelane_server.edge.auth import Authenticator, AuthInterceptor
from facelane_server.edge.gallery import GalleryService
from facelane_server.edge.operations import AdminService, EventService, ServerService
from facelane_server.edge.tls import Certificates, Presented, validity
from facelane_server.events import EventFeed, EventKind
from facelane_server.gallery.decide import Thresholds
from facelane_server.gallery.gallery import Gallery
from facelane_server.models.api import CropSpec
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import Package, read_package
from facelane_server.monitor import DeviceReading, Monitor
from facelane_server.notify import Notifier
from facelane_server.observability.http import MetricsServer
from facelane_server.observability.logs import configure_logging
from facelane_server.observability.metrics import GalleryReading, Metrics, Sources
from facelane_server.pipeline import Pipeline
from facelane_server.pools.host import Launchers
from facelane_server.pools.mps import MpsDaemon
from facelane_server.pools.pool import Pool, PoolChange, PoolEvent
from facelane_server.watch import LaneWatch

log = structlog.get_logger(__name__)

DEFAULT_MODELS: Final = {
    Stage.DETECTOR: "facelane-detector",
    Stage.RECOGNIZER: "facelane-recognizer",
    Stage.LIVENESS: "facelane-liveness",
}
START_POLL_S: Final = 0.2
RUN_PREFIX: Final = "facelane-run-"


@dataclass(frozen=True, slots=True)
class ServedModels:
    """The packages that the config names, and what follows from them."""

    packages: Mapping[Stage, Package]
    crops: tuple[CropSpec, ...]
    """What the detector cuts for each face."""
    positions: Mapping[Stage, tuple[int, ...]]
    """Where each stage's crops are among them."""
    thresholds: Thresholds

    @classmethod
    def resolve(cls, settings: config.Config) -> Self:
        """Reads the manifests. Raises ``FacelaneError(MODEL_INVALID)``."""
        catalog = Catalog([Path(folder).expanduser() for folder in settings.models.path])
        packages = {}
        for name, pool in settings.stages.items():
            stage = Stage(name)
            package = catalog.resolve(pool.model or DEFAULT_MODELS[stage])
            if package.task is not stage:
                raise FacelaneError(
                    Reason.MODEL_INVALID,
                    f"pools.{name}.model: {package.name} is a {package.task.value}, not a {name}",
                )
            packages[stage] = package
        crops: list[CropSpec] = []
        positions: dict[Stage, tuple[int, ...]] = {}
        for stage in (Stage.RECOGNIZER, Stage.LIVENESS):
            if stage in packages:
                for crop in packages[stage].crops:
                    if crop not in crops:
                        crops.append(crop)
                positions[stage] = tuple(crops.index(c) for c in packages[stage].crops)
        return cls(packages, tuple(crops), positions, _thresholds(packages, settings.identity))


def _thresholds(packages: Mapping[Stage, Package], chosen: config.Identity) -> Thresholds:
    """The packages' thresholds, with the config's overrides."""

    def pick(stage: Stage, name: str, override: float | None, without: float) -> float:
        if override is not None:
            return override
        if stage not in packages:
            return without
        value = getattr(packages[stage].thresholds, name)
        return without if value is None else float(value)

    try:
        return Thresholds(
            match=pick(Stage.RECOGNIZER, "match", chosen.match_threshold, 1.0),
            margin=pick(Stage.RECOGNIZER, "margin", chosen.margin, 0.05),
            ood=pick(Stage.RECOGNIZER, "ood", chosen.ood_threshold, 0.4),
            live=pick(Stage.LIVENESS, "live", chosen.live_threshold, 1.0),
            spoof=pick(Stage.LIVENESS, "spoof", chosen.spoof_threshold, 0.0),
        )
    except ValueError as error:
        raise config.ConfigError(f"identity: {error}") from None


def state_dir(settings: config.Config) -> Path:
    """Where the gallery lives; made when it is missing (mode 0700)."""
    chosen = settings.state_dir or os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if not chosen:
        base = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
        chosen = str(Path(base) / "facelane")
    return _made(
        "state_dir", Path(chosen).expanduser(), "set state_dir to a folder that it may write to"
    )


def _made(name: str, folder: Path, otherwise: str) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise config.ConfigError(
            f"{name} {folder} cannot be made: {error.strerror}; make it for this user, or "
            f"{otherwise}"
        ) from None
    return folder


@contextlib.contextmanager
def runtime_dir(settings: config.Config) -> Iterator[Path]:
    """Where sockets are made. A fresh private folder is removed at the end."""
    chosen = settings.runtime_dir or os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if chosen:
        yield _made("runtime_dir", Path(chosen).expanduser(), "leave runtime_dir empty")
        return
    with _private_folder() as folder:
        yield folder


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """A fresh folder of mode 0700, removed at the end.

    A server that is killed cannot remove its own: the next one does. A lock on the folder,
    which the kernel gives up together with the process, tells that nobody lives there; one on
    ``mps`` inside of it, that a daemon has still to be told to quit.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{RUN_PREFIX}*"):
        with contextlib.ExitStack() as stack:
            for needed in (left, left / "mps"):
                if not os.path.lexists(needed):
                    continue
                if (lock := _lock(needed)) is None:
                    break
                stack.callback(os.close, lock)
            else:
                shutil.rmtree(left, ignore_errors=True)
    # A server that starts at the same moment may find ours before we hold it, and remove it.
    while (lock := _lock(folder := Path(tempfile.mkdtemp(prefix=RUN_PREFIX)))) is None:
        continue
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds a folder of this user; None where it is held, or gone."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.ExitStack() as stack:
        try:
            lock = os.open(folder, flags)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(lock)
            if held.st_uid != os.geteuid() or not os.path.samestat(held, os.lstat(folder)):
                return None
        except OSError:
            return None
        stack.pop_all()
        return lock


class App:
    """One server. ``running`` starts and ends it."""

    def __init__(self, settings: config.Config, path: Path | None) -> None:
        self.settings = settings
        self.path = path
        self.models = ServedModels.resolve(settings)
        self.started_ns = time.time_ns()
        self.events = EventFeed()
        self.lanes = LaneRegistry(settings.limits.max_streams)
        self.health = health.Health()
        self.authenticator = Authenticator.of(settings)
        certificates = Certificates.read(settings.tls)
        self.certificates = Presented(certificates) if certificates else None
        self.pools: dict[Stage, Pool] = {}
        self.notifier = Notifier.from_environment()
        self.metrics = Metrics(
            Sources(
                pools=lambda: [pool.info() for pool in self.pools.values()],
                devices=lambda: self.monitor.readings,
                gallery=self._gallery_reading,
                streams=lambda: len(self.lanes),
                watchers=lambda: self.events.watchers,
            )
        )
        self.monitor = Monitor(
            settings.monitor, workers=self._workers, on_memory=self._device_memory
        )
        self._gallery: Gallery | None = None
        self._pipeline: Pipeline | None = None
        self._changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._grace_s = settings.server.drain_grace_s
        self._told_ready = False
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[tuple[str, str]]] = set()

    # -- what others ask -----------------------------------------------------------------

    def can_infer(self) -> dict[Stage, bool]:
        return {stage: pool.available for stage, pool in self.pools.items()}

    def model_ids(self) -> dict[str, str]:
        return {stage.value: pool.model_id for stage, pool in self.pools.items()}

    def request_stop(self, grace_s: float | None = None) -> None:
        """Drain and end. Safe to call twice: the shorter grace counts."""
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
                pool=event.pool,
                message=f"{event.change.value} {event.state.value}",
            )

    async def _publish_health(self) -> None:
        """Follows the pools: every change is told within one turn of the loop."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            changed = await self.health.publish(self.can_infer(), draining=self.lanes.draining)
            self.lanes.stages_changed()
            if changed:
                self.notifier.status(self._status_line())

    def _status_line(self) -> str:
        able = self.can_infer()
        pools = ", ".join(f"{s.value} {'up' if up else 'DOWN'}" for s, up in able.items())
        return f"{len(self.lanes)} streams; {pools}"

    # -- life ------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Everything started, in order; everything ended, in the opposite one."""
        async with contextlib.AsyncExitStack() as stack:
            runtime = stack.enter_context(runtime_dir(self.settings))
            stack.enter_context(errors.observed(self.metrics.refused))
            await self._start_pools(stack, runtime)
            gallery = await self._open_gallery(stack)
            pipeline = Pipeline(
                self.pools,
                crops=self.models.positions,
                thresholds=self.models.thresholds,
                max_pixels=self.settings.limits.max_pixels,
                known=gallery.knows,
            )
            self._pipeline = pipeline
            follower = asyncio.create_task(self._publish_health(), name="health")
            stack.push_async_callback(_cancel, follower)
            self._changed.set()
            stack.push_async_callback(self._end_reloads)
            await self._start_edge(stack, pipeline, gallery)
            scraped = await MetricsServer.start(self.settings.metrics, self.metrics.exposition)
            if scraped is not None:
                stack.push_async_callback(scraped.close)
            self.monitor.start()
            stack.callback(self.monitor.close)
            lag = asyncio.create_task(self.metrics.watch_loop(), name="loop-lag")
            stack.push_async_callback(_cancel, lag)
            keeper = asyncio.create_task(self.notifier.keep_alive(self._alive), name="watchdog")
            stack.push_async_callback(_cancel, keeper)
            yield self

    def _alive(self) -> bool:
        """What feeds systemd's watchdog: the detector can infer. A pool says so only after a
        real inference, repeated while it is idle."""
        return self.pools[Stage.DETECTOR].available

    async def _start_pools(self, stack: contextlib.AsyncExitStack, runtime: Path) -> None:
        planned = await plan.check(self.settings, self.models.packages)
        for line in planned.lines():
            log.info("memory plan", line=line)
        pipes = None
        if any(pool.isolation == "mps" for pool in self.settings.stages.values()):
            daemon = await MpsDaemon.start(runtime / "mps")
            stack.push_async_callback(daemon.close)
            pipes = daemon.pipe_directory
        launchers = Launchers(runtime, mps_pipe_directory=pipes)
        stack.push_async_callback(launchers.close)
        tracking.prepare()
        for name, settings in self.settings.stages.items():
            stage = Stage(name)
            pool = Pool(
                stage,
                settings,
                self.models.packages[stage],
                launchers.for_pool(name, settings),
                crops=self.models.crops if stage is Stage.DETECTOR else (),
                max_pixels=self.settings.limits.max_pixels,
                resolve=self._resolve_subject if stage is Stage.RECOGNIZER else None,
                on_change=self._pool_changed,
                budget_mib=plan.process_budget_mib(self.settings, name),
            )
            self.pools[stage] = pool
        for pool in self.pools.values():
            await pool.start()
            stack.push_async_callback(pool.stop, 0.0)

    def _resolve_subject(self, version: int, index: int) -> tuple[str, str] | None:
        return None if self._gallery is None else self._gallery.resolve(version, index)

    async def _open_gallery(self, stack: contextlib.AsyncExitStack) -> Gallery:
        chosen = self.settings.gallery.path
        path = Path(chosen).expanduser() if chosen else state_dir(self.settings) / "gallery.db"
        gallery = await Gallery.open(path, max_templates=self.settings.gallery.max_templates)
        self._gallery = gallery
        stack.push_async_callback(gallery.close)
        recognizer = self.pools.get(Stage.RECOGNIZER)
        if recognizer is not None:
            package = recognizer.package
            await gallery.serve(package.model_id, package.embedding_dim, recognizer.publish_gallery)
        return gallery

    async def _start_edge(
        self, stack: contextlib.AsyncExitStack, pipeline: Pipeline, gallery: Gallery
    ) -> None:
        watch = LaneWatch(self.metrics, self.events, gallery.is_empty)
        self.lanes.on_opened = watch.opened
        self.lanes.on_closed = watch.closed
        analysis = AnalysisService(
            self.settings,
            pipeline,
            self.lanes,
            observer=watch,
            models=self.model_ids,
            server_version=__version__,
        )
        server = grpc.aio.server(
            interceptors=[AuthInterceptor(self.authenticator)],
            options=[
                ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
                # A client that vanished without a word is noticed within a minute.
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.max_pings_without_data", 0),
                # The pings of clients that have nothing to say, at least this far apart; by
                # default a quiet subscription would be cut off after a minute or two.
                ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
                ("grpc.so_reuseport", 0),
            ],
        )
        analysis_service_pb2_grpc.add_AnalysisServiceServicer_to_server(analysis, server)
        gallery_service_pb2_grpc.add_GalleryServiceServicer_to_server(
            GalleryService(self.settings, gallery, analysis, pipeline), server
        )
        server_service_pb2_grpc.add_ServerServiceServicer_to_server(
            ServerService(
                self.settings,
                self.pools,
                self.lanes,
                started_ns=self.started_ns,
                thresholds=lambda: pipeline.thresholds,
            ),
            server,
        )
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminService(self.pools, self.reload_model, self.request_stop), server
        )
        event_service_pb2_grpc.add_EventServiceServicer_to_server(EventService(self.events), server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health.servicer, server)
        if self.settings.server.reflection:
            reflection.enable_server_reflection(
                (*health.SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME), server
            )
        if self.certificates is not None:
            problem, _ = validity(self.settings.tls)
            if problem:
                log.warning("the server's certificate", problem=problem)
        bind(server, self.settings.server.listen, self.certificates)
        await server.start()
        stack.push_async_callback(server.stop, 1.0)
        listen = self.settings.server.listen
        log.info("listening", address=listen, version=__version__)
        if not (self.authenticator.required or config.is_local(listen)):
            log.warning("other machines can reach the server, and need no key", address=listen)

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
                async with asyncio.timeout(START_POLL_S):
                    await self._stop.wait()

    async def wait_stop(self) -> None:
        await self._stop.wait()

    async def drain(self) -> None:
        """Tells the streams, lets them and single pictures finish within the grace, then ends
        them."""
        self._told_ready = False
        self.notifier.stopping("draining")
        grace_ns = int(self._grace_s * 1e9)
        log.info("draining", streams=len(self.lanes), grace_s=self._grace_s)
        self.lanes.drain(grace_ns)
        self._changed.set()
        # Told to go, clients send what they have begun and close their side. Whoever has not
        # done so by the last quarter of the grace is ended.
        begun = time.monotonic()
        for share in (0.75, 1.0):
            while not self.lanes.at_rest and time.monotonic() < begun + share * self._grace_s:
                self.notifier.extend_timeout(self._grace_s)
                await asyncio.sleep(0.02)
            self.lanes.stop()
        # Last, so that watchers are told of the streams that ended.
        self.events.close()

    async def reload_model(self, pool_name: str, model: str) -> tuple[str, str]:
        """See ``AdminService.ReloadModel``. Raises ``FacelaneError``.

        What was begun is carried through, whether its caller waits for it or not: workers of
        the new model with the thresholds or the templates of the old one would judge wrongly.
        One after the other, for the same reason.
        """
        reload = asyncio.create_task(self._reload_model(pool_name, model), name="reload model")
        self._reloads.add(reload)
        reload.add_done_callback(self._reloads.discard)
        # A caller that gave up does not come for the error.
        reload.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(reload)

    async def _reload_model(self, pool_name: str, model: str) -> tuple[str, str]:
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
                packages = {
                    **{p.stage: p.package for p in self.pools.values()},
                    pool.stage: package,
                }
                try:
                    thresholds = _thresholds(packages, self.settings.identity)
                except config.ConfigError as error:
                    raise FacelaneError(Reason.MODEL_INVALID, str(error)) from None
                await pool.reload(package)
                # A model's scores mean something by its own thresholds alone.
                assert self._pipeline is not None
                self._pipeline.thresholds = thresholds
                if pool.stage is Stage.RECOGNIZER:
                    assert self._gallery is not None
                    if package.model_id != self._gallery.model_id:
                        await self._gallery.serve(
                            package.model_id, package.embedding_dim, pool.publish_gallery
                        )
            except FacelaneError as error:
                log.warning("model not reloaded", pool=pool.name, reason=error.reason.value)
                raise
        log.info("model reloaded", pool=pool.name, model=package.model_id)
        return old.model_id, package.model_id

    async def _end_reloads(self) -> None:
        for reload in list(self._reloads):
            await _cancel(reload)

    def _read_package(self, model: str, present: Package) -> Package:
        if not model:
            return read_package(present.folder)
        return Catalog([Path(f).expanduser() for f in self.settings.models.path]).resolve(model)

    def _renew_certificates(self) -> bool:
        """Present what the files hold now; whether it is something new."""
        if self.certificates is None:
            return False
        try:
            fresh = Certificates.read(self.settings.tls)
        except config.ConfigError as error:
            log.error("certificates not renewed, and the next start will fail", problem=str(error))
            return False
        assert fresh is not None
        if fresh == self.certificates.current:
            return False
        problem, _ = validity(self.settings.tls)
        if problem:
            log.warning("the server's certificate", problem=problem)
        self.certificates.current = fresh
        return True

    def reload_config(self) -> None:
        """SIGHUP: keys and renewed certificates at once; what needs a restart is named and left
        as it is."""
        # READY ends a reload, and tells more than that of a server that has not started yet.
        if self._told_ready:
            self.notifier.reloading()
        try:
            fresh = config.load(self.path)
            # Whether clients need keys is decided by where the server listens now, not by
            # where it would listen after a restart.
            inforce = msgspec.structs.replace(
                fresh, server=self.settings.server, tls=self.settings.tls
            )
            config.check(inforce, source=str(self.path))
            self.authenticator.reload(inforce)
        except config.ConfigError as error:
            log.error("config not reloaded", problem=str(error))
        else:
            stale = [
                section
                for section in (
                    "server",
                    "tls",
                    "limits",
                    "models",
                    "pools",
                    "identity",
                    "tracking",
                    "gallery",
                    "metrics",
                    "monitor",
                    "state_dir",
                    "runtime_dir",
                )
                if getattr(fresh, section) != getattr(self.settings, section)
            ]
            applied = ["auth", "log"]
            if "tls" not in stale and self._renew_certificates():
                applied.append("tls")
            configure_logging(fresh.log)
            log.info("config reloaded", applied=applied, needs_restart=stale)
        if self._told_ready:
            self.notifier.ready(self._status_line())


def bind(server: grpc.aio.Server, listen: str, certificates: Presented | None) -> None:
    """Opens the port. Raises ``AddressError`` when it cannot be had now."""
    if listen.startswith("unix:"):
        path = _socket_path(listen)
        if path.is_socket():
            if _answers(path):
                raise config.AddressError(
                    f"server.listen: another server answers on {listen}; end it, or listen "
                    "elsewhere"
                )
            # What a killed server left behind.
            path.unlink()
    try:
        if certificates is not None:
            port = server.add_secure_port(listen, certificates.credentials())
        else:
            port = server.add_insecure_port(listen)
    except RuntimeError:
        port = 0
    if port == 0:
        # gRPC does not say why.
        why = _unusable(listen)
        raise config.AddressError(f"server.listen: cannot listen on {listen}: {why}")


def _socket_path(listen: str) -> Path:
    return Path(listen.removeprefix("unix:").removeprefix("//"))


def _unusable(listen: str) -> str:
    """Why an address cannot be listened on, and what to do."""
    if listen.startswith("unix:"):
        folder = _socket_path(listen).parent
        return (
            f"this user must be able to make a socket in {folder}, in a path of 107 bytes at most"
        )
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        for family, kind, _protocol, _name, address in found:
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
    except socket.gaierror as error:
        return f"{error.strerror}; write an address of this machine"
    except PermissionError:
        return "ports below 1024 are for root; take another"
    except OSError as error:
        advice = {
            errno.EADDRINUSE: "another process has the port; end it, or take another",
            errno.EADDRNOTAVAIL: "this machine has no such address (now); see `ip address`",
        }.get(error.errno or 0, "take another")
        return f"{os.strerror(error.errno) if error.errno else 'unknown'}: {advice}"
    return "another process had the port a moment ago"


def _answers(path: Path) -> bool:
    """Whether somebody accepts connections on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def serve(
    settings: config.Config,
    path: Path | None = None,
    *,
    on_running: Callable[[App], None] | None = None,
) -> int:
    """Runs a server until SIGTERM or SIGINT; the exit code.

    Raises ``ConfigError`` and ``FacelaneError`` for what cannot be started.
    """
    configure_logging(settings.log)
    app = App(settings, path)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, app.request_stop)
    loop.add_signal_handler(signal.SIGHUP, app.reload_config)
    try:
        async with app.running():
            if on_running is not None:
                on_running(app)
            await app.wait_ready()
            await app.wait_stop()
            await app.drain()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)
    log.info("ended")
    return 0
