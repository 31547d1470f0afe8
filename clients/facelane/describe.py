"""What the server says of itself, as the client's own types."""

from __future__ import annotations

import enum
from collections.abc import Callable
from datetime import UTC
from typing import TypeVar

from facelane import types
from facelane.convert import seconds
from facelane.v1 import face_pb2
from facelane.v1 import server_service_pb2 as pb

E = TypeVar("E", bound=enum.StrEnum)


def _member(kind: type[E], number: int, name: Callable[..., str], prefix: str) -> E:
    """``name``: of the protocol's own enum. What a newer server says is UNSPECIFIED."""
    try:
        return kind[name(number).removeprefix(prefix)]
    except (KeyError, ValueError):
        return kind["UNSPECIFIED"]


def _stage(number: int) -> types.Stage:
    return _member(types.Stage, number, face_pb2.Stage.Name, "STAGE_")


def _worker_state(number: int) -> types.WorkerState:
    return _member(types.WorkerState, number, pb.WorkerState.Name, "WORKER_STATE_")


def server_info(found: pb.GetServerInfoResponse) -> types.ServerInfo:
    """What the server is."""
    limits = found.limits
    return types.ServerInfo(
        found.version,
        found.start_time.ToDatetime(tzinfo=UTC) if found.HasField("start_time") else None,
        tuple(
            types.ModelInfo(
                m.name,
                m.version,
                m.model_id,
                _stage(m.task),
                m.license,
                m.description,
                dict(m.thresholds),
            )
            for m in found.models
        ),
        types.ServerLimits(
            limits.max_streams,
            limits.window,
            limits.max_frame_bytes,
            limits.max_message_bytes,
            limits.max_pixels,
            limits.max_faces,
            seconds(limits.default_max_frame_age),
        ),
        found.open_streams,
        found.draining,
        _load(found.load) if found.HasField("load") else None,
        tuple(types.Degradation(d.component, d.cause, d.message) for d in found.degradations),
        tuple(
            types.ShardInfo(
                s.shard, s.pid, _worker_state(s.state), s.open_streams, s.restarts, s.last_loss
            )
            for s in found.shards
        ),
    )


def _load(load: pb.ServerLoad) -> types.ServerLoad:
    return types.ServerLoad(
        load.offered_fps,
        load.capacity_fps,
        load.load,
        load.headroom_streams,
        load.thinned_streams,
    )


def pools(found: pb.ListPoolsResponse) -> list[types.PoolInfo]:
    """The pools."""
    return [
        types.PoolInfo(
            p.pool,
            _stage(p.task),
            _member(types.PoolState, p.state, pb.PoolState.Name, "POOL_STATE_"),
            p.model_id,
            p.isolation,
            p.queued,
            p.in_flight,
            p.completed,
            p.failed,
            tuple(
                types.WorkerInfo(
                    w.worker_id,
                    w.pid,
                    _worker_state(w.state),
                    w.device,
                    w.restarts,
                    w.last_loss,
                    w.memory_bytes,
                    seconds(w.uptime),
                    w.sandbox,
                )
                for w in p.workers
            ),
            p.memory_budget_bytes,
        )
        for p in found.pools
    ]
