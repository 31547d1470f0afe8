"""The gRPC server: its options, its services, its address, its keys and certificates."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Mapping
from typing import Final

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
    view_service_pb2_grpc,
)
from facelane.v1.view_service_pb2 import WatchStreamRequest
from facelane_server import __version__, addresses, config, limits
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.edge import address, looks
from facelane_server.edge.analysis import AnalysisService
from facelane_server.edge.auth import Authenticator
from facelane_server.edge.controls import Controls
from facelane_server.edge.gallery import GalleryService
from facelane_server.edge.gate import Gate
from facelane_server.edge.health import SERVICES, Health
from facelane_server.edge.load import LoadWatch
from facelane_server.edge.operations import AdminService, EventService, ServerService
from facelane_server.edge.pictures import Seen, SinglePictures
from facelane_server.edge.quotas import Quotas
from facelane_server.edge.streams import StreamRegistry
from facelane_server.edge.tls import Certificates, Presented
from facelane_server.edge.view import ViewService
from facelane_server.edge.whole import Siblings
from facelane_server.events import EventFeed, EventPictures
from facelane_server.gallery.gallery import Gallery
from facelane_server.gallery.trail import Trail
from facelane_server.lanes import LaneObserver
from facelane_server.pipeline import Pipeline
from facelane_server.shards.messages import (
    DescribePools,
    DescribeServer,
    ListStreams,
    Question,
    ReloadModel,
    RestartWorker,
    WatchStream,
)
from facelane_server.standing import begun
from facelane_server.store.audit import Action
from facelane_server.traces import Traces, watching
from facelane_server.viewing import Sights

log = structlog.get_logger(__name__)

LEAVE_MARGIN_S: Final = 5.0

OPTIONS: Final = (
    ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
    # A client that vanished without a word is noticed within a minute.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # The pings of clients that have nothing to say, at least this far apart; by default a quiet
    # subscription would be cut off after a minute or two.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    # What a stranger holds is little, and for a short time.
    ("grpc.max_concurrent_streams", limits.MAX_STREAMS_PER_CONNECTION),
    ("grpc.server.max_pending_requests", limits.MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", 2 * limits.MAX_PENDING_CALLS),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # A connection keeps the last it was told, in the clear: also the id of who has been deleted.
    ("grpc.max_connection_idle_ms", 20_000),
)


def _options(*, shared: bool) -> list[tuple[str, int]]:
    """With a bound on connections that leaves descriptors for everything else. ``shared``: other
    shards listen on the same port."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < 0:
        files = limits.MAX_CONNECTIONS + limits.RESERVED_DESCRIPTORS
    room = max(files - limits.RESERVED_DESCRIPTORS, files // 2)
    reuse = ("grpc.so_reuseport", int(shared))
    return [
        *OPTIONS,
        reuse,
        ("grpc.max_allowed_incoming_connections", min(room, limits.MAX_CONNECTIONS)),
    ]


class Edge:
    """What clients meet. Made before anything is started; ``open`` lets them in."""

    def __init__(self, settings: config.Config, siblings: Siblings | None = None) -> None:
        """Reads keys and certificates. Raises ``ConfigError``. ``siblings``: of a server that has
        several shards."""
        self._settings = settings
        self._siblings = siblings
        self.quotas = Quotas(settings, elsewhere=None if siblings is None else siblings.holdings)
        self.streams = StreamRegistry()
        self.sights = Sights()
        self.traces: Traces | None = None
        self.load = LoadWatch(settings.limits, self.streams)
        self.health = Health()
        if siblings is not None:
            self.health.shared = siblings.changed
        self._authenticator = Authenticator.of(settings)
        certificates = Certificates.read(settings.tls)
        self._certificates = Presented(certificates) if certificates else None
        self._gate = Gate(
            self._authenticator,
            self.quotas,
            first_message_s=settings.limits.first_message_s,
            slow_reader_s=settings.limits.slow_reader_s,
        )
        self._expiry: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None
        self._describing: ServerService | None = None
        self._admin: AdminService | None = None
        self._view: ViewService | None = None
        self._leaving: asyncio.Task[None] | None = None

    async def open(
        self,
        pipeline: Pipeline,
        gallery: Gallery,
        events: EventFeed,
        controls: Controls,
        observer: LaneObserver,
        trail: Trail,
        kept: EventPictures,
        seen: Seen,
    ) -> None:
        """Registers the services, binds the address and serves. ``seen``: told of whoever is named
        or verified in single pictures. Raises ``AddressError``."""
        settings = self._settings
        self._gate.trail = trail
        pictures = SinglePictures(settings, pipeline, self.streams, seen, self.traces)
        self.load.begin(controls.pools)
        server = self._server = grpc.aio.server(
            interceptors=[self._gate], options=_options(shared=self._siblings is not None)
        )
        analysis_service_pb2_grpc.add_AnalysisServiceServicer_to_server(
            AnalysisService(
                settings,
                pipeline,
                self.streams,
                pictures,
                watching(self.traces, observer),
                controls,
                self.load,
                self.quotas,
                trail,
                self.sights,
                self._siblings,
                self.traces,
            ),
            server,
        )
        self._view = ViewService(
            settings.view,
            self.streams,
            self.sights,
            self.quotas,
            trail,
            observer.tracks,
            self._siblings,
        )
        if self._siblings is not None:
            await self._view.looks.open()
        view_service_pb2_grpc.add_ViewServiceServicer_to_server(self._view, server)
        gallery_service_pb2_grpc.add_GalleryServiceServicer_to_server(
            GalleryService(
                settings,
                gallery,
                pictures,
                pipeline,
                controls,
                events,
                self.quotas,
                trail,
                kept,
            ),
            server,
        )
        describing = self._describing = ServerService(
            settings, controls, self.streams, pipeline, self.load, self._siblings
        )
        server_service_pb2_grpc.add_ServerServiceServicer_to_server(describing, server)
        admin = self._admin = AdminService(controls, self._siblings)
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
        event_service_pb2_grpc.add_EventServiceServicer_to_server(
            EventService(events, gallery, kept, trail, settings.galleries), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health.servicer, server)
        if settings.server.reflection:
            reflection.enable_server_reflection(
                (*SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME), server
            )
        if self._certificates is not None:
            _tell_problem(self._certificates.current)
        listen = settings.listen
        address.bind(server, listen, self._certificates, group=settings.server.socket_group)
        await server.start()
        self._expiry = begun(self._gate.watch_expiry, "key-expiry")
        log.info("listening", address=listen, version=__version__)
        if not (self._authenticator.required or addresses.is_local(listen)):
            log.warning("other machines can reach the server, and need no key", address=listen)

    async def answer(self, question: Question) -> bytes:
        """What another shard asks of this one. Raises ``FacelaneError``."""
        if self._describing is None or self._admin is None or self._view is None:
            raise FacelaneError(
                Reason.POOL_UNAVAILABLE, "the shard is starting; try again", retryable=True
            )
        match question:
            case DescribeServer():
                return self._describing.info().SerializeToString()
            case DescribePools():
                return self._describing.own_pools().SerializeToString()
            case RestartWorker():
                done = await self._admin.restart_worker(question.worker_id)
                return done.SerializeToString()
            case ReloadModel():
                return (await self._admin.reload_model(question)).SerializeToString()
            case ListStreams():
                caller = looks.unpacked(question.caller)
                return self._view.listed(question.source_ids, caller).SerializeToString()
            case WatchStream():
                asked = WatchStreamRequest.FromString(question.request)
                return self._view.looks.ticket(asked, looks.unpacked(question.caller))
        raise AssertionError(question)

    def leave_port(self, grace_s: float) -> None:
        """Takes no more connections, which go to other shards; those that are there go on for
        ``grace_s`` and a little."""
        if self._server is not None:
            self._leaving = asyncio.create_task(self._server.stop(grace_s + LEAVE_MARGIN_S))

    async def close(self) -> None:
        """Ends what is still open within a second."""
        if self._expiry is not None:
            self._expiry.cancel()
        self.load.close()
        if self._server is not None:
            await self._server.stop(1.0)
        if self._view is not None:
            await self._view.looks.close()
        if self._leaving is not None:
            await self._leaving

    def stages_changed(self, can_infer: Mapping[Stage, bool]) -> bool:
        """Tells health and the open streams what the pools can do now; whether health changed."""
        changed = self.health.publish(can_infer, draining=self.streams.draining)
        self.streams.stages_changed()
        return bool(changed)

    def reload(self, fresh: config.Config) -> bool:
        """Takes over keys, and certificates where the files have changed; whether they had.
        Raises ``ConfigError``, and keeps everything then."""
        # First, and whatever else can be read.
        self.reload_denied()
        # Whether clients need keys is decided by where the server listens now, not by where it
        # would listen after a restart.
        inforce = msgspec.structs.replace(
            fresh, server=self._settings.server, tls=self._settings.tls
        )
        config.check(inforce, source="reload")
        before = self._authenticator.callers
        self._authenticator.reload(inforce)
        self._gate.recheck()
        changed = sorted({caller.name for caller in before ^ self._authenticator.callers})
        if self._gate.trail is not None and changed:
            self._gate.trail.note(Action.KEYS_CHANGED, keys=" ".join(changed))
        return fresh.tls == self._settings.tls and self._renew_certificates()

    def reload_denied(self) -> None:
        """Ends the calls of those who are denied now. Needs nothing that could be wrong."""
        if self._authenticator.reload_denied():
            self._gate.denied()

    def calls_by_key(self) -> dict[tuple[str, str, bool], int]:
        """Calls by key or certificate, verb, and whether they were let in."""
        return dict(self._authenticator.counts)

    def _renew_certificates(self) -> bool:
        """Present what the files hold now; whether it is something new."""
        if self._certificates is None:
            return False
        try:
            fresh = Certificates.read(self._settings.tls)
        except config.ConfigError as error:
            log.error("certificates not renewed, and the next start will fail", problem=str(error))
            return False
        assert fresh is not None
        if fresh == self._certificates.current:
            return False
        _tell_problem(fresh)
        self._certificates.current = fresh
        return True


def _tell_problem(certificates: Certificates) -> None:
    if problem := certificates.facts().problem:
        log.warning("the server's certificate", problem=problem)
