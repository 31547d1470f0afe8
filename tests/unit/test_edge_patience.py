"""A slow reader is ended in time; a stood-still server blames nobody."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from facelane_server.domain import FacelaneError, Reason
from facelane_server.edge import errors, gate
from facelane_server.edge.analysis import _Patience
from facelane_server.edge.awake import Awake


async def test_what_does_not_end_is_cancelled_in_time() -> None:
    task = asyncio.current_task()
    assert task is not None
    patience = _Patience(task, 0.1)
    began = time.monotonic()
    patience.begin()
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await asyncio.Event().wait()
    task.uncancel()
    patience.end()
    assert cancelled.value.args == (_Patience.LOST,)
    assert time.monotonic() - began >= 0.09


async def test_a_leap_of_the_clock_is_not_the_peers_fault() -> None:
    """The loop stands still for longer than the patience; what was written meanwhile counts."""
    task = asyncio.current_task()
    assert task is not None
    patience = _Patience(task, 0.4)
    written = asyncio.Event()
    patience.begin()
    time.sleep(0.6)  # noqa: ASYNC251 - the loop is meant to stand still
    # gRPC tells of the write by a thread of its own, some turns later.
    asyncio.get_running_loop().call_later(0.05, written.set)
    await written.wait()
    patience.end()
    await asyncio.sleep(0)
    assert not task.cancelling()


async def test_nothing_is_left_to_fire() -> None:
    task = asyncio.current_task()
    assert task is not None
    patience = _Patience(task, 0.02)
    for _ in range(3):
        patience.begin()
        patience.end()
    await asyncio.sleep(0.1)  # past the patience
    assert not task.cancelling()
    patience.begin()
    patience.close()
    await asyncio.sleep(0.1)  # past the patience
    assert not task.cancelling()


async def test_each_thing_begun_has_all_of_the_time() -> None:
    task = asyncio.current_task()
    assert task is not None
    patience = _Patience(task, 0.2)
    for _ in range(12):  # together three times as long
        patience.begin()
        await asyncio.sleep(0.05)  # a quarter of the patience
        patience.end()
    assert not task.cancelling()
    patience.begin()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.Event().wait()
    task.uncancel()


# -- single calls -------------------------------------------------------------------------------


class Slow:
    """Of a call's context what writes: gRPC tells that it was written some turns after the loop
    stood still for a while."""

    def __init__(self) -> None:
        self.told: list[object] = []

    async def write(self, message: object) -> None:
        loop = asyncio.get_running_loop()
        taken = loop.create_future()
        await asyncio.sleep(0)
        time.sleep(0.6)  # noqa: ASYNC251 - the loop is meant to stand still
        loop.call_later(0.05, taken.set_result, None)
        await taken
        self.told.append(message)

    async def abort(self, code: object, *_rest: object) -> None:
        await self.write(code)
        raise grpc.aio.AbortError


async def test_the_answer_of_a_single_call_outlives_a_leap_of_the_clock() -> None:
    slow = Slow()
    await gate.write(slow, "answer", 0.4)  # type: ignore[arg-type]
    assert slow.told == ["answer"]


async def test_so_does_the_status_of_a_call_that_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(errors, "ABORT_S", 0.4)
    slow = Slow()
    with pytest.raises(grpc.aio.AbortError):
        await errors.abort(slow, FacelaneError(Reason.DRAINING, "it ends"))  # type: ignore[arg-type]
    assert slow.told == [grpc.StatusCode.UNAVAILABLE]


async def test_a_timeout_in_quarters_ends_too() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with Awake(0.1):
            await asyncio.Event().wait()
    assert time.monotonic() - began >= 0.09
    async with Awake(0.02):
        pass
    await asyncio.sleep(0.1)  # past it: nothing is left to fire


async def test_whoever_is_cancelled_is_not_taken_for_late() -> None:
    async def call() -> None:
        async with Awake(100):
            await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
