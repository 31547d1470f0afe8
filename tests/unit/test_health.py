"""Health is told to each who watches at its own pace; who reads nothing keeps it from nobody."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from tests.waiting import auntil

from facelane_server.domain import Stage
from facelane_server.edge.health import NOT_SERVING, PROCESS, SERVING, Health

ABLE = dict.fromkeys(Stage, True)
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Reader:
    """Stands for the context of a call, whose peer takes what is written once it ``may``."""

    def __init__(self, *, reads: bool = True) -> None:
        self.may = asyncio.Event()
        if reads:
            self.may.set()
        self.told: list[int] = []
        self.writes = 0

    async def write(self, response: health_pb2.HealthCheckResponse) -> None:
        self.writes += 1
        await self.may.wait()
        self.told.append(response.status)

    async def abort(self, code: grpc.StatusCode, _details: str) -> None:
        raise LookupError(code)


def watch(health: Health, reader: Reader, name: str = "") -> asyncio.Task[None]:
    asked = health_pb2.HealthCheckRequest(service=name)
    context: Any = reader
    return asyncio.create_task(health.servicer.Watch(asked, context))


async def test_who_reads_nothing_keeps_health_from_nobody() -> None:
    health, stuck, quick = Health(), Reader(reads=False), Reader()
    calls = [watch(health, stuck), watch(health, quick)]
    await auntil(lambda: stuck.writes and quick.told == [NOT_SERVING])
    health.publish(ABLE, draining=False)
    await auntil(lambda: quick.told == [NOT_SERVING, SERVING])
    health.publish(ABLE | {Stage.LIVENESS: False}, draining=False)
    await auntil(lambda: quick.told == [NOT_SERVING, SERVING, NOT_SERVING])
    late = Reader()
    calls.append(watch(health, late))
    await auntil(lambda: late.told == [NOT_SERVING])
    health.publish(ABLE, draining=False)
    await auntil(lambda: late.told == [NOT_SERVING, SERVING])
    assert stuck.told == []
    stuck.may.set()
    await auntil(lambda: stuck.told == [NOT_SERVING, SERVING])
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_a_name_that_comes_later_is_told_when_it_is_there() -> None:
    health, reader = Health(), Reader()
    call = watch(health, reader, PROCESS)
    await auntil(lambda: reader.told == [UNKNOWN])
    health.publish({}, draining=False)
    await auntil(lambda: reader.told == [UNKNOWN, SERVING])
    call.cancel()


async def test_all_names_at_once_and_one_that_there_is_not() -> None:
    health, context = Health(), Reader()
    health.publish(ABLE, draining=True)
    peer: Any = context
    listed = await health.servicer.List(health_pb2.HealthListRequest(), peer)
    statuses = {name: one.status for name, one in listed.statuses.items()}
    assert statuses.pop(PROCESS) == SERVING
    assert set(statuses.values()) == {NOT_SERVING}
    asked = health_pb2.HealthCheckRequest(service=PROCESS)
    assert (await health.servicer.Check(asked, peer)).status == SERVING
    with pytest.raises(LookupError, match="NOT_FOUND"):
        await health.servicer.Check(health_pb2.HealthCheckRequest(service="nothing"), peer)
