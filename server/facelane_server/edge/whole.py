"""What one shard answers for all shards of its server: their answers as one. Pure, but for
``Siblings``, by whom they are asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from facelane.v1 import admin_service_pb2 as admin_pb
from facelane.v1 import server_service_pb2 as pb
from facelane_server.domain import FacelaneError, Reason
from facelane_server.pools.restart import Life
from facelane_server.shards.board import Holdings, Seat
from facelane_server.shards.messages import ALL, Answer, Question, Standing

LIVES: Final = {life: pb.WorkerState.Value(f"WORKER_STATE_{life.name}") for life in Life}


class Siblings(Protocol):
    """The shards of one server, as one of them sees them."""

    index: int
    holdings: Holdings
    standings: tuple[Standing, ...]

    def seats(self) -> list[Seat]:
        """How many streams each has."""

    def move(self) -> str | None:
        """See ``Seat.move``."""

    def changed(self) -> None:
        """Health, perhaps."""

    async def ask(
        self, question: Question, *, shard: int = ALL, timeout_s: float = 5.0
    ) -> list[Answer]:
        """See ``Seat.ask``."""


def good(answer: Answer) -> bytes:
    """Raises what the shard raised."""
    failure = answer.failure
    if failure is None:
        return answer.body
    try:
        reason = Reason(failure.reason)
    except ValueError:
        reason = Reason.POOL_UNAVAILABLE
    raise FacelaneError(
        reason,
        failure.message,
        metadata=dict(failure.metadata) | {"shard": str(answer.shard)},
        retryable=failure.retryable,
    )


def server(
    answers: Iterable[Answer], standings: Sequence[Standing], seats: Sequence[Seat]
) -> pb.GetServerInfoResponse:
    """Sums where there is something to sum, and the first shard's word for what all have alike.
    Raises where no shard has answered."""
    found = [
        (one.shard, pb.GetServerInfoResponse.FromString(one.body))
        for one in answers
        if one.failure is None
    ]
    if not found:
        raise FacelaneError(Reason.POOL_UNAVAILABLE, "no shard answers; try again", retryable=True)
    whole = pb.GetServerInfoResponse()
    whole.CopyFrom(found[0][1])
    whole.ClearField("load")
    whole.ClearField("degradations")
    whole.open_streams = sum(info.open_streams for _, info in found)
    whole.draining = any(info.draining for _, info in found)
    loads = [info.load for _, info in found if info.HasField("load")]
    if loads:
        whole.load.offered_fps = sum(load.offered_fps for load in loads)
        whole.load.capacity_fps = sum(load.capacity_fps for load in loads)
        whole.load.headroom_streams = sum(load.headroom_streams for load in loads)
        whole.load.thinned_streams = sum(load.thinned_streams for load in loads)
        if whole.load.capacity_fps:
            whole.load.load = whole.load.offered_fps / whole.load.capacity_fps
    told = set()
    for _, info in found:
        for degradation in info.degradations:
            if (key := (degradation.component, degradation.cause)) not in told:
                told.add(key)
                whole.degradations.append(degradation)
    answered = {shard for shard, _ in found}
    streams = {seat.shard: seat.streams for seat in seats}
    for one in standings:
        whole.shards.add(
            shard=one.shard,
            pid=one.pid,
            state=LIVES[Life(one.life)],
            open_streams=streams.get(one.shard, 0),
            restarts=one.restarts,
            last_loss=one.lost,
        )
        if one.life != Life.READY:
            why = f" ({one.lost})" if one.lost else ""
            whole.degradations.add(
                component="shards",
                cause=one.life,
                message=f"shard {one.shard} does not serve{why}; the others do, and it is started "
                "again; see the server's log",
            )
        elif one.shard not in answered:
            whole.degradations.add(
                component="shards",
                cause="NO_ANSWER",
                message=f"shard {one.shard} does not answer; it is started again if it hangs",
            )
    return whole


def pools(answers: Iterable[Answer]) -> pb.ListPoolsResponse:
    """A pool of each name, with the workers of all shards, named ``shard/pool#index``."""
    whole = pb.ListPoolsResponse()
    by_name: dict[str, pb.PoolInfo] = {}
    states: dict[str, list[pb.PoolState.ValueType]] = {}
    for answer in answers:
        if answer.failure is not None:
            continue
        for pool in pb.ListPoolsResponse.FromString(answer.body).pools:
            for worker in pool.workers:
                worker.worker_id = f"{answer.shard}/{worker.worker_id}"
            states.setdefault(pool.pool, []).append(pool.state)
            known = by_name.get(pool.pool)
            if known is None:
                known = by_name[pool.pool] = whole.pools.add()
                known.CopyFrom(pool)
                continue
            known.workers.extend(pool.workers)
            for number in ("queued", "in_flight", "completed", "failed"):
                setattr(known, number, getattr(known, number) + getattr(pool, number))
    for name, pool in by_name.items():
        pool.state = _state(states[name])
    return whole


def _state(states: Sequence[pb.PoolState.ValueType]) -> pb.PoolState.ValueType:
    """Alike: so. Some can infer: DEGRADED. Else the first of what the others are."""
    if len(set(states)) == 1:
        return states[0]
    able = {pb.POOL_STATE_SERVING, pb.POOL_STATE_DEGRADED}
    return pb.POOL_STATE_DEGRADED if able & set(states) else min(states)


def worker(worker_id: str) -> tuple[int, str]:
    """The shard, and the worker's name in it. Raises WORKER_NOT_FOUND."""
    shard, slash, name = worker_id.partition("/")
    if not (slash and shard.isascii() and shard.isdecimal() and len(shard) < 4):
        raise FacelaneError(
            Reason.WORKER_NOT_FOUND,
            "there is no such worker; ListPools names them (shard/pool#number)",
        )
    return int(shard), name


def reloaded(answers: Sequence[Answer]) -> admin_pb.ReloadModelResponse:
    """Of the last shard; raises the first failure, and says who has the new model by then."""
    if not answers:
        raise FacelaneError(Reason.POOL_UNAVAILABLE, "no shard answers; try again", retryable=True)
    done = [one.shard for one in answers if one.failure is None]
    try:
        found = [admin_pb.ReloadModelResponse.FromString(good(one)) for one in answers]
    except FacelaneError as error:
        if not done:
            raise
        raise FacelaneError(
            error.reason,
            f"{error.message}; shards {', '.join(map(str, done))} have the new model, the others "
            "not: call again",
            metadata=error.metadata,
            retryable=error.retryable,
        ) from None
    whole = found[-1]
    whole.old_model_id = found[0].old_model_id
    whole.remembered = all(one.remembered for one in found)
    return whole
