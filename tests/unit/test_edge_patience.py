"""A slow reader is ended in time; a stood-still server blames nobody."""

from __future__ import annotations

import asyncio
import time

import pytest

from facelane_server.edge.analysis import _Patience


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
