"""``ViewService``: which streams there are, and a look at one."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Collection
from typing import Final

from facelane.v1 import view_service_pb2 as pb
from facelane.v1 import view_service_pb2_grpc as pb_grpc
from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.edge import convert, gate, looks, whole
from facelane_server.edge.errors import Context
from facelane_server.edge.looks import Looks
from facelane_server.edge.quotas import Quotas
from facelane_server.edge.roles import Caller
from facelane_server.edge.streams import StreamRegistry
from facelane_server.edge.whole import Siblings
from facelane_server.gallery.trail import Trail
from facelane_server.lanes import Lane
from facelane_server.shards import messages
from facelane_server.sources import View
from facelane_server.store.audit import Action
from facelane_server.viewing import Box, Seen, Sight, Sights, Wish

_ENCODINGS: Final = {ours: theirs for theirs, ours in convert.ENCODINGS.items()}
_LIST_S: Final = 2.0
_LEAST_FPS: Final = 0.0999  # a float32's tenth


class ViewService(pb_grpc.ViewServiceServicer):
    def __init__(
        self,
        settings: View,
        streams: StreamRegistry,
        sights: Sights,
        quotas: Quotas,
        trail: Trail,
        tracks: Callable[[int], int],
        siblings: Siblings | None = None,
    ) -> None:
        """``tracks``: how many a lane has."""
        self.looks = Looks(self.show)
        """What other shards are shown."""
        self._siblings = siblings
        self._settings = settings
        self._streams = streams
        self._sights = sights
        self._quotas = quotas
        self._trail = trail
        self._tracks = tracks

    async def ListStreams(
        self, request: pb.ListStreamsRequest, context: Context
    ) -> pb.ListStreamsResponse:
        if len(request.source_ids) > limits.MAX_EVENT_FILTERS:
            raise convert.invalid(
                f"at most {limits.MAX_EVENT_FILTERS} source_ids; list all instead",
                field="source_ids",
            )
        caller, wanted = gate.caller(), tuple(request.source_ids)
        return pb.ListStreamsResponse(streams=[one for _, one in await self._all(wanted, caller)])

    def listed(self, source_ids: Collection[str], caller: Caller) -> pb.ListStreamsResponse:
        """Of this process."""
        return pb.ListStreamsResponse(
            streams=[
                self._open_stream(lane, sight)
                for lane, sight in self._visible(caller)
                if not source_ids or lane.options.source_id in source_ids
            ]
        )

    async def _all(
        self, source_ids: tuple[str, ...], caller: Caller
    ) -> list[tuple[int, pb.OpenStream]]:
        """Of all shards, each with the one that has it."""
        if self._siblings is None:
            return [(0, one) for one in self.listed(source_ids, caller).streams]
        question = messages.ListStreams(source_ids=source_ids, caller=looks.packed(caller))
        answers = await self._siblings.ask(question, timeout_s=_LIST_S)
        return [
            (answer.shard, one)
            for answer in answers
            if answer.failure is None
            for one in pb.ListStreamsResponse.FromString(answer.body).streams
        ]

    async def WatchStream(  # type: ignore[override]
        self, request: pb.WatchStreamRequest, context: Context
    ) -> None:
        caller = gate.caller()
        wish_of(request)
        self._check_named(request, caller)
        siblings, here = self._siblings, request.stream_id
        if siblings is not None and here not in {lane.stream_id for lane in self._streams.lanes}:
            found = [
                (one.open_time.ToNanoseconds(), shard, one.stream_id)
                for shard, one in await self._all(
                    (request.source_id,) if request.source_id else (), caller
                )
                if request.stream_id in ("", one.stream_id)
            ]
            if not found:
                raise _not_found()
            _, shard, request.stream_id = max(found)
            request.source_id = ""
            if shard != siblings.index:
                question = messages.WatchStream(
                    request=request.SerializeToString(), caller=looks.packed(caller)
                )
                answers = await siblings.ask(question, shard=shard, timeout_s=_LIST_S)
                if not answers:
                    raise _not_found()
                async with contextlib.aclosing(looks.seen(whole.good(answers[0]), shard)) as seen:
                    async for response in seen:
                        await context.write(response)
                return
        await self.show(request, caller, context.write)

    async def show(
        self, request: pb.WatchStreamRequest, caller: Caller, write: looks.Write
    ) -> None:
        """A stream of this process, to its end."""
        wish = wish_of(request)
        lane, sight = self._meant(request, caller)
        source_id, gallery_id = lane.options.source_id, lane.options.plan.gallery_id
        self._trail.note(Action.VIEWED, gallery=gallery_id, source=source_id)
        view = convert.View.of(caller, "identify", gallery_id, source_id).bounded(
            self._quotas,
            caller,
            caller.lookups_per_minute("identify", gallery=gallery_id, source=source_id),
        )
        changed = asyncio.Event()
        group = lane.footage.group
        units = None if group is None else group.units(0, len(group) - 1)
        box = sight.watch(wish, changed.set, units)
        try:
            await write(pb.WatchStreamResponse(opened=self._open_stream(lane, sight)))
            while (seen := await _next(box, changed)) is not None:
                await write(_response(seen, lane.stream_id, view))
        finally:
            sight.leave(box)

    def _visible(self, caller: Caller) -> list[tuple[Lane, Sight]]:
        if not self._settings.enabled:
            return []
        found = []
        for lane in self._streams.lanes:
            sight = self._sights.of(lane.lane_id)
            if sight is not None and not lane.options.private and _may(caller, lane):
                found.append((lane, sight))
        return found

    def _check_named(self, request: pb.WatchStreamRequest, caller: Caller) -> None:
        """Raises PERMISSION_DENIED for a place that the key is not for."""
        if bool(request.stream_id) is bool(request.source_id):
            raise convert.invalid("name either stream_id or source_id", field="stream_id")
        if request.source_id and not caller.may("view", source=request.source_id):
            caller.place("view", source=request.source_id)

    def _meant(self, request: pb.WatchStreamRequest, caller: Caller) -> tuple[Lane, Sight]:
        """Raises STREAM_NOT_FOUND."""
        for lane, sight in reversed(self._visible(caller)):
            if request.stream_id in ("", lane.stream_id) and (
                not request.source_id or request.source_id == lane.options.source_id
            ):
                return lane, sight
        raise _not_found()

    def _open_stream(self, lane: Lane, sight: Sight) -> pb.OpenStream:
        totals, figures = lane.totals, sight.figures()
        message = pb.OpenStream(
            stream_id=lane.stream_id,
            source_id=lane.options.source_id,
            gallery_id=lane.options.plan.gallery_id,
            open_time=convert.timestamp(sight.opened_ns),
            outcome_fps=figures.outcome_fps,
            result_fps=figures.result_fps,
            age_median=convert.duration(figures.age_median_ns),
            age_p95=convert.duration(figures.age_p95_ns),
            tracks=self._tracks(lane.lane_id),
            received=totals.received,
            results=totals.results,
            drops=totals.drops,
            errors=totals.errors,
            watchers=sight.watchers,
        )
        if sight.encoding is not None:
            message.encoding = _ENCODINGS[sight.encoding]
        return message


def _not_found() -> FacelaneError:
    return FacelaneError(
        Reason.STREAM_NOT_FOUND,
        "no such stream is open, or it is private, or of a gallery or source that the key may "
        "not view; ListStreams lists those that can be looked at",
    )


def _may(caller: Caller, lane: Lane) -> bool:
    plan = lane.options.plan
    return caller.may("view", gallery=plan.gallery_id, source=lane.options.source_id)


def wish_of(request: pb.WatchStreamRequest) -> Wish:
    fps = request.max_fps or limits.VIEW_FPS
    if not _LEAST_FPS <= fps <= limits.MAX_VIEW_FPS:  # nor NaN
        raise convert.invalid(
            f"max_fps must be 0.1-{limits.MAX_VIEW_FPS:g}, or 0 for {limits.VIEW_FPS:g}",
            field="max_fps",
        )
    return Wish(fps, request.results_only, request.key_frames_only)


async def _next(box: Box, changed: asyncio.Event) -> Seen | None:
    """The next picture that is due; None once the stream has ended."""
    while True:
        changed.clear()
        now_ns = time.monotonic_ns()
        seen = box.take(now_ns)
        if seen is not None:
            return seen
        due_s = box.due_in_s(now_ns)
        if box.closed and math.isinf(due_s):
            return None
        if math.isinf(due_s):
            await changed.wait()
        else:
            # What comes meanwhile takes the place of what waits.
            await asyncio.sleep(due_s)


def _response(seen: Seen, stream_id: str, view: convert.View) -> pb.WatchStreamResponse:
    response = pb.WatchStreamResponse()
    message = response.picture
    picture = message.picture
    picture.encoding = _ENCODINGS[seen.picture.encoding]
    picture.data = bytes(seen.picture.data)
    picture.width, picture.height = seen.picture.width, seen.picture.height
    picture.stride = seen.picture.stride
    message.key_frame = seen.key
    message.skipped = seen.skipped
    if seen.outcome is not None:
        convert.fill_outcome(message.outcome, seen.outcome, stream_id, view)
    return response
