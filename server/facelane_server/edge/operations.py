"""``ServerService``, ``AdminService`` and ``EventService``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping
from functools import partial
from typing import Final

import structlog

from facelane.v1 import admin_service_pb2 as admin_pb
from facelane.v1 import admin_service_pb2_grpc as admin_grpc
from facelane.v1 import event_service_pb2 as event_pb
from facelane.v1 import event_service_pb2_grpc as event_grpc
from facelane.v1 import server_service_pb2 as pb
from facelane.v1 import server_service_pb2_grpc as pb_grpc
from facelane_server import __version__, limits
from facelane_server.config import Config
from facelane_server.domain import (
    Decision,
    Direction,
    FacelaneError,
    Identity,
    Reason,
    RuleReport,
    Stage,
    TrackReport,
)
from facelane_server.edge import convert, gate, whole
from facelane_server.edge.controls import Controls
from facelane_server.edge.errors import Context
from facelane_server.edge.load import LoadWatch
from facelane_server.edge.roles import Caller
from facelane_server.edge.streams import StreamRegistry
from facelane_server.events import Event, EventFeed, EventKind, EventPictures
from facelane_server.events.feed import Progress, event_not_found
from facelane_server.gallery.gallery import Gallery
from facelane_server.gallery.trail import Trail
from facelane_server.gallery_rules import GalleryRules
from facelane_server.naming import is_identifier, is_name
from facelane_server.pipeline import Pipeline
from facelane_server.pools.pool import Pool
from facelane_server.pools.report import PoolState
from facelane_server.shards import messages
from facelane_server.store.audit import Action
from facelane_server.store.confirmations import confirm
from facelane_server.store.events import without
from facelane_server.store.pictures import not_found

log = structlog.get_logger(__name__)

DESCRIBE_S: Final = 2.0
RESTART_S: Final = 300.0
RELOAD_S: Final = 600.0
"""Of each shard: models are loaded and warmed up meanwhile."""

_POOL_STATES: Final = {
    PoolState.STARTING: pb.POOL_STATE_STARTING,
    PoolState.SERVING: pb.POOL_STATE_SERVING,
    PoolState.DEGRADED: pb.POOL_STATE_DEGRADED,
    PoolState.NOT_SERVING: pb.POOL_STATE_NOT_SERVING,
    PoolState.DRAINING: pb.POOL_STATE_DRAINING,
    PoolState.STOPPED: pb.POOL_STATE_DRAINING,
}
_KINDS: Final = {kind: event_pb.EventKind.Value(f"EVENT_KIND_{kind.value}") for kind in EventKind}
_DIRECTIONS: Final = {
    Direction.IN: event_pb.CROSSING_DIRECTION_IN,
    Direction.OUT: event_pb.CROSSING_DIRECTION_OUT,
}
_PAGE: Final = 50
_BATCHES: Final = 20
"""Looked through for a page of those who do not hear all events."""
_KINDS_BACK: Final = {number: kind for kind, number in _KINDS.items()}


class ServerService(pb_grpc.ServerServiceServicer):
    def __init__(
        self,
        config: Config,
        controls: Controls,
        streams: StreamRegistry,
        pipeline: Pipeline,
        load: LoadWatch,
        siblings: whole.Siblings | None = None,
    ) -> None:
        self._config = config
        self._controls = controls
        self._streams = streams
        self._pipeline = pipeline
        self._load = load
        self._siblings = siblings

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        siblings = self._siblings
        if siblings is None:
            return self.info()
        answers = await siblings.ask(messages.DescribeServer(), timeout_s=DESCRIBE_S)
        return whole.server(answers, siblings.standings, siblings.seats())

    def info(self) -> pb.GetServerInfoResponse:
        """Of this process."""
        bounds = self._config.limits
        return pb.GetServerInfoResponse(
            version=__version__,
            start_time=convert.timestamp(self._controls.started_ns),
            models=[self._model(stage, pool) for stage, pool in self._controls.pools.items()],
            limits=pb.ServerLimits(
                max_streams=bounds.max_streams,
                window=bounds.window,
                max_frame_bytes=bounds.max_frame_bytes,
                max_message_bytes=limits.MAX_MESSAGE_BYTES,
                max_pixels=bounds.max_pixels,
                max_faces=bounds.max_faces,
                default_max_frame_age=convert.duration(bounds.max_frame_age_ms * 1_000_000),
            ),
            open_streams=len(self._streams),
            draining=self._streams.draining,
            load=self._server_load(),
            degradations=[
                pb.Degradation(component=d.component, cause=d.cause, message=d.message)
                for d in self._controls.degradations()
            ],
        )

    def _server_load(self) -> pb.ServerLoad | None:
        load = self._load.load
        if load is None:
            return None
        return pb.ServerLoad(
            offered_fps=load.offered,
            capacity_fps=load.capacity,
            load=load.ratio,
            headroom_streams=load.headroom,
            thinned_streams=load.thinned,
        )

    def _model(self, stage: Stage, pool: Pool) -> pb.ModelInfo:
        manifest = pool.package.manifest
        thresholds = self._pipeline.thresholds
        chosen: dict[Stage, dict[str, float | None]] = {
            Stage.DETECTOR: {
                "score": manifest.thresholds.score,
                "score_turned": manifest.thresholds.score_turned,
                "nms": manifest.thresholds.nms,
            },
            Stage.RECOGNIZER: {
                **(
                    {"match": thresholds.match}
                    if thresholds.promise is None
                    else {"false_naming": thresholds.promise.false_naming}
                ),
                "margin": thresholds.margin,
                "ood": thresholds.ood,
            },
            Stage.LIVENESS: {"live": thresholds.live, "spoof": thresholds.spoof},
        }
        in_force = chosen[stage]
        return pb.ModelInfo(
            name=manifest.name,
            version=manifest.version,
            model_id=pool.model_id,
            task=convert.STAGES[stage],
            license=manifest.license,
            description=manifest.description,
            thresholds={name: value for name, value in in_force.items() if value is not None},
        )

    async def ListPools(
        self, request: pb.ListPoolsRequest, context: Context
    ) -> pb.ListPoolsResponse:
        if self._siblings is None:
            return self.own_pools()
        return whole.pools(await self._siblings.ask(messages.DescribePools(), timeout_s=DESCRIBE_S))

    def own_pools(self) -> pb.ListPoolsResponse:
        """Of this process."""
        response = pb.ListPoolsResponse()
        for pool in self._controls.pools.values():
            info = pool.info()
            message = response.pools.add(
                pool=info.pool,
                task=convert.STAGES[info.stage],
                state=_POOL_STATES[info.state],
                model_id=info.model_id,
                isolation=info.isolation,
                queued=info.queued,
                in_flight=info.in_flight,
                completed=info.completed,
                failed=info.failed,
                memory_budget_bytes=info.budget_mib * limits.MIB,
            )
            for worker in info.workers:
                message.workers.add(
                    worker_id=worker.worker_id,
                    pid=worker.pid,
                    state=whole.LIVES[worker.life],
                    device=worker.device,
                    restarts=worker.restarts,
                    last_loss=worker.last_loss,
                    memory_bytes=worker.memory_mib * limits.MIB,
                    uptime=convert.duration(int(worker.uptime_s * 1e9)),
                    sandbox=worker.sandbox,
                )
        return response


class AdminService(admin_grpc.AdminServiceServicer):
    def __init__(self, controls: Controls, siblings: whole.Siblings | None = None) -> None:
        self._controls = controls
        self._siblings = siblings

    async def RestartWorker(
        self, request: admin_pb.RestartWorkerRequest, context: Context
    ) -> admin_pb.RestartWorkerResponse:
        if self._siblings is None:
            return await self.restart_worker(request.worker_id)
        shard, name = whole.worker(request.worker_id)
        asked = messages.RestartWorker(worker_id=name)
        answers = await self._siblings.ask(asked, shard=shard, timeout_s=RESTART_S)
        if not answers:
            raise FacelaneError(
                Reason.WORKER_NOT_FOUND,
                f"there is no shard {shard} now; ListPools names the workers that there are",
            )
        return admin_pb.RestartWorkerResponse.FromString(whole.good(answers[0]))

    async def restart_worker(self, worker_id: str) -> admin_pb.RestartWorkerResponse:
        """Of this process."""
        name = worker_id.partition("#")[0]
        pool = next((p for p in self._controls.pools.values() if p.name == name), None)
        if pool is None:
            raise FacelaneError(
                Reason.WORKER_NOT_FOUND,
                "there is no such worker; ListPools names them (pool#number)",
            )
        log.info("worker restart asked for", worker=worker_id)
        old, new = await pool.restart_worker(worker_id)
        return admin_pb.RestartWorkerResponse(old_pid=old, new_pid=new)

    async def ReloadModel(
        self, request: admin_pb.ReloadModelRequest, context: Context
    ) -> admin_pb.ReloadModelResponse:
        asked = messages.ReloadModel(
            pool=request.pool, model=request.model, forget_templates=request.forget_templates
        )
        if self._siblings is None:
            return await self.reload_model(asked)
        return whole.reloaded(await self._siblings.ask(asked, timeout_s=RELOAD_S))

    async def reload_model(self, asked: messages.ReloadModel) -> admin_pb.ReloadModelResponse:
        """Of this process."""
        done = await self._controls.reload_model(
            asked.pool, asked.model, forget_templates=asked.forget_templates
        )
        return admin_pb.ReloadModelResponse(
            old_model_id=done.old,
            new_model_id=done.new,
            templates_not_searched=done.not_searched,
            remembered=done.remembered,
        )

    async def Drain(
        self, request: admin_pb.DrainRequest, context: Context
    ) -> admin_pb.DrainResponse:
        grace = None
        if request.HasField("grace"):
            grace = convert.duration_ns(request.grace, "grace") / 1e9
            if grace < 0:
                raise convert.invalid("grace must not be negative", field="grace")
        self._controls.request_end(grace)
        return admin_pb.DrainResponse()


class EventService(event_grpc.EventServiceServicer):
    def __init__(
        self,
        feed: EventFeed,
        gallery: Gallery,
        pictures: EventPictures,
        trail: Trail,
        rules: Mapping[str, GalleryRules],
    ) -> None:
        self._feed = feed
        self._gallery = gallery
        self._pictures = pictures
        self._trail = trail
        self._rules = rules

    async def GetEventPicture(
        self, request: event_pb.GetEventPictureRequest, context: Context
    ) -> event_pb.GetEventPictureResponse:
        caller = gate.caller()
        event = await self._feed.find(request.sequence)
        if event is None:
            raise event_not_found()
        caller.require("view", gallery=event.gallery_id, source=event.source_id)
        for_confirmers(event, caller)
        if event.track is None or not event.track.picture:
            raise not_found()
        photo = await self._pictures.get(event.track.picture)
        self._trail.note(
            Action.PICTURE_SEEN,
            gallery=event.gallery_id,
            subject=event.track.identity.subject_id,
            source=event.source_id,
            event=event.sequence,
        )
        return event_pb.GetEventPictureResponse(picture_jpeg=photo.around, chip_jpeg=photo.chip)

    async def ConfirmSighting(
        self, request: event_pb.ConfirmSightingRequest, context: Context
    ) -> event_pb.ConfirmSightingResponse:
        caller = gate.caller()
        gallery_id = convert.gallery(request.gallery_id, caller, "confirm")
        rules = self._rules.get(gallery_id)
        if rules is None or not rules.confirm:
            raise convert.invalid(
                "gallery_id: nobody has to confirm anything there (galleries.NAME.confirm)",
                field="gallery_id",
            )
        done = await self._gallery.ask(
            partial(
                confirm,
                gallery_id=gallery_id,
                sequence=request.sequence,
                by=caller.name,
                agrees=request.agrees,
                needed=rules.confirm,
                at_source=lambda source: caller.may("confirm", gallery=gallery_id, source=source),
                now_ns=time.time_ns(),
            )
        )
        return event_pb.ConfirmSightingResponse(
            state=event_pb.SightingState.Value(f"SIGHTING_STATE_{done.state.value}"),
            agreed=done.agreed,
            needed=done.needed,
        )

    async def WatchEvents(  # type: ignore[override]
        self, request: event_pb.WatchEventsRequest, context: Context
    ) -> None:
        kinds, caller = kinds_of(request), gate.caller()
        with self._feed.watch(
            request.resume_token,
            kinds,
            source_ids=request.source_ids,
            gallery_ids=request.gallery_ids,
        ) as watcher:
            # Whoever has heard this misses nothing, even if nothing happens before its
            # connection breaks.
            await context.write(event_pb.WatchEventsResponse(resume_token=watcher.resume_token))
            progress = Progress(watcher.seen)
            async for event in watcher.steps():
                if event is None:
                    if progress.is_due(watcher.seen):
                        token = watcher.resume_token
                        await context.write(event_pb.WatchEventsResponse(resume_token=token))
                elif self._hears(caller, event):
                    progress.told(event.sequence)
                    await context.write(await self._told(event, caller))
                del event  # until the next one comes, nobody is kept here

    async def ListEvents(
        self, request: event_pb.ListEventsRequest, context: Context
    ) -> event_pb.ListEventsResponse:
        kinds, caller = kinds_of(request), gate.caller()
        count = min(request.page_size or _PAGE, limits.MAX_EVENT_BATCH)
        response = event_pb.ListEventsResponse()
        # Where the next page begins says that something was found: to those who do not hear all
        # of it, a filter would tell what happened where, one question after the other.
        if caller.unbound("events") and caller.unbound("confirm"):
            found = await self._feed.before(
                request.before_sequence,
                count,
                kinds=[kind.value for kind in kinds],
                source_ids=request.source_ids,
                gallery_ids=request.gallery_ids,
            )
            if len(found) == count:
                response.next_before_sequence = found[-1].sequence
        else:
            found, next_before = await self._heard(request, caller, kinds, count)
            response.next_before_sequence = next_before
        for event in found:
            response.events.append((await self._told(event, caller)).event)
        return response

    async def _heard(
        self,
        request: event_pb.ListEventsRequest,
        caller: Caller,
        kinds: Collection[EventKind],
        count: int,
    ) -> tuple[list[Event], int]:
        """A page of what the caller hears, and where the next one begins; fewer than asked for,
        perhaps none, where much lies between."""
        heard: list[Event] = []
        at = request.before_sequence
        for _ in range(_BATCHES):
            batch = await self._feed.before(at, limits.MAX_EVENT_BATCH)
            for event in batch:
                at = event.sequence
                if (
                    self._hears(caller, event)
                    and (not kinds or event.kind in kinds)
                    and (not request.source_ids or event.source_id in request.source_ids)
                    and (not request.gallery_ids or event.gallery_id in request.gallery_ids)
                ):
                    heard.append(event)
                    if len(heard) == count:
                        return heard, at
            if len(batch) < limits.MAX_EVENT_BATCH:
                return heard, 0
        return heard, at

    async def _told(self, event: Event, caller: Caller) -> event_pb.WatchEventsResponse:
        gallery_id, source_id = event.gallery_id or None, event.source_id or None
        message = _event(event, convert.View.of(caller, "events", gallery_id, source_id))
        named = message.identity.subject_id or message.candidate_subject_id
        if (
            event.track is not None
            and named
            and caller.may("gallery.read", gallery=event.gallery_id)
            and not await self._describe(message, named)
        ):
            track = without(event.track, named)
            return await self._told(dataclasses.replace(event, track=track), caller)
        return event_pb.WatchEventsResponse(event=message, resume_token=self._feed.token(event))

    @staticmethod
    def _hears(caller: Caller, event: Event) -> bool:
        """Candidates are for those who can say whether they are right."""
        if not caller.hears(event.source_id, event.gallery_id, event.sender):
            return False
        return event.kind is not EventKind.SUBJECT_CANDIDATE or caller.may(
            "confirm", gallery=event.gallery_id, source=event.source_id
        )

    async def _describe(self, message: event_pb.Event, subject_id: str) -> bool:
        """Adds what the gallery says of the subject, nothing when it cannot be asked; False when
        there is no such subject any more."""
        try:
            subject = await self._gallery.get_subject(message.gallery_id, subject_id)
        except FacelaneError as error:
            return error.reason is not Reason.SUBJECT_NOT_FOUND
        message.track.display_name = subject.display_name
        message.track.labels.update(subject.labels)
        return True


def for_confirmers(event: Event, caller: Caller) -> None:
    """Raises PERMISSION_DENIED for a candidate, where the caller is none of those who confirm."""
    if event.kind is EventKind.SUBJECT_CANDIDATE and not caller.may(
        "confirm", gallery=event.gallery_id, source=event.source_id
    ):
        raise FacelaneError(
            Reason.PERMISSION_DENIED,
            "the event waits for those who confirm it (the verb `confirm`)",
            metadata={"scope": "confirm"},
        )


def kinds_of(request: event_pb.WatchEventsRequest | event_pb.ListEventsRequest) -> list[EventKind]:
    """Those that are asked for. Raises ARGUMENT_INVALID for what no filter may be."""
    if len(request.source_ids) + len(request.gallery_ids) > limits.MAX_EVENT_FILTERS:
        raise convert.invalid(
            f"at most {limits.MAX_EVENT_FILTERS} source_ids and gallery_ids; ask for all of them "
            "instead",
            field="source_ids",
        )
    for field, named, can_be in (
        ("source_ids", request.source_ids, is_name),
        ("gallery_ids", request.gallery_ids, is_identifier),
    ):
        if not all(can_be(value) for value in named if value):
            raise convert.invalid(f"{field}: none of the server's can be called so", field=field)
    try:
        return [_KINDS_BACK[kind] for kind in set(request.kinds) if kind]
    except KeyError:
        raise convert.invalid("kinds: there is no such kind of event", field="kinds") from None


def _event(event: Event, view: convert.View) -> event_pb.Event:
    message = event_pb.Event(
        sequence=event.sequence,
        kind=_KINDS[event.kind],
        event_time=convert.timestamp(event.time_ns),
        source_id=event.source_id,
        stream_id=event.stream_id,
        gallery_id=event.gallery_id,
        pool=event.pool,
        message=event.message,
        candidate_sequence=event.candidate,
    )
    if event.track is not None:
        track = event.track
        message.track_id = track.track_id
        identity = track.identity
        if event.kind is EventKind.SUBJECT_CANDIDATE:
            message.candidate_subject_id = identity.subject_id
            identity = Identity(Decision.NOT_EVALUATED)
        message.identity.CopyFrom(convert.identity(identity, view))
        message.liveness.CopyFrom(convert.liveness(track.liveness))
        if track.ood_score is not None:
            message.ood_score = track.ood_score
        message.track.CopyFrom(_track_report(event.stream_id, track))
        similarity = view.similarity(track.best_similarity, track.identity)
        if similarity is not None:
            message.track.best_similarity = similarity
    if event.rule is not None:
        message.rule.CopyFrom(_rule_report(event.rule))
    return message


def _rule_report(rule: RuleReport) -> event_pb.RuleReport:
    report = event_pb.RuleReport(
        name=rule.name, inside=rule.inside, in_count=rule.entered, out_count=rule.left
    )
    if rule.direction is None:
        report.dwell.CopyFrom(convert.duration(rule.dwell_ns))
    else:
        report.direction = _DIRECTIONS[rule.direction]
    return report


def _track_report(stream_id: str, track: TrackReport) -> event_pb.TrackReport:
    report = event_pb.TrackReport(
        global_track_id=f"{stream_id}/{track.track_id}",
        first_offset=convert.duration(track.first_ns),
        last_offset=convert.duration(track.last_ns),
        box=convert.box(track.box),
        best_ood_score=track.best_ood_score,
        looks=track.looks,
        has_picture=bool(track.picture),
    )
    if track.first_capture_ns is not None:
        report.first_capture_time.CopyFrom(convert.timestamp(track.first_capture_ns))
    if track.last_capture_ns is not None:
        report.last_capture_time.CopyFrom(convert.timestamp(track.last_capture_ns))
    return report
