"""Pictures of video that nobody looks at, decoded by real workers beside those that are wanted."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import pytest
from tests.fakes.access_units import clip
from tests.real_pool import RealPool, real_pool

from facelane_server import annexb, limits
from facelane_server.domain import Encoding, FacelaneError, Reason, Stage
from facelane_server.pools.groups import Group, Wanted
from facelane_server.pools.tasks import DetectAnswer, Task, VideoRequest

pytestmark = pytest.mark.timeout(120)
COUNT = 20


def task(lane: int, group: Group, picture: int, *, ahead: bool = False) -> Task[Any]:
    wanted = Wanted(lane, group, picture, picture + group.delay)
    return Task(
        VideoRequest(wanted, 0 if ahead else 4, 10_000_000, ahead),
        lane,
        1,
        time.monotonic_ns() + 100 * 10**9,
        asyncio.get_running_loop().create_future(),
    )


def group(bframes: int) -> Group:
    units = clip("h264", COUNT, keyint=COUNT, bframes=bframes)[:COUNT]
    found = annexb.examine(units[0], Encoding.H264, 0).format
    assert found is not None
    made = Group(Encoding.H264, found, 1 << 24)
    for unit in units:
        assert made.append(unit)
    return made


async def looked_at(made: RealPool, lane: int, group: Group, picture: int) -> None:
    one = task(lane, group, picture)
    made.pool.submit(one)
    answer = await asyncio.wait_for(one.future, 100)
    assert isinstance(answer, DetectAnswer)
    assert (answer.width, answer.height) == (320, 240)


def to_be_sent(made: RealPool, lane: int, group: Group, picture: int) -> int:
    """Access units, for this picture to be looked at."""
    (seat,) = made.pool._crew.seats()
    span = seat.decoders.span(Wanted(lane, group, picture, picture + group.delay))
    assert span is not None
    return span.last - span.first + 1


@pytest.mark.parametrize("bframes", [0, 3])
async def test_what_nobody_looks_at_makes_no_picture_wait(bframes: int) -> None:
    first, second = group(bframes), group(bframes)
    async with real_pool(Stage.DETECTOR) as made:
        await looked_at(made, 1, first, 0)
        await looked_at(made, 2, second, 0)
        for number in range(1, 6):
            made.pool.pass_by(task(1, first, number, ahead=True))
            await looked_at(made, 2, second, number)
        assert to_be_sent(made, 1, first, 6) == 1
        await looked_at(made, 1, first, 6)
        # Nothing else is to be done: with the next picture is soon enough.
        for number in range(7, 10):
            made.pool.pass_by(task(1, first, number, ahead=True))
        assert to_be_sent(made, 1, first, 10) == 4
        await looked_at(made, 1, first, 10)
        info = made.pool.info()
        assert (info.completed, info.failed, info.replayed, info.in_flight) == (9, 0, 0, 0)


async def test_streams_that_end_over_a_picture_leave_no_decoder_behind() -> None:
    """Where an answer says that a decoder is of no use, its worker has it all the same."""
    made_of = group(0)
    async with real_pool(Stage.DETECTOR) as made:
        for lane in range(1, limits.MAX_DECODERS + 2):
            await looked_at(made, lane, made_of, 0)
            again = task(lane, made_of, 0)  # it was shown, and let go of
            made.pool.submit(again)
            with pytest.raises(FacelaneError) as raised:
                await asyncio.wait_for(again.future, 100)
            assert raised.value.reason is Reason.PICTURE_CORRUPT
            made.pool.release(lane)
            made_of = group(0)
        info = made.pool.info()
        assert (info.losses, info.workers[0].decoders) == (0, 0)


async def test_a_worker_that_ends_over_it_costs_no_picture() -> None:
    first, second = group(0), group(0)
    async with real_pool(Stage.DETECTOR) as made:
        await looked_at(made, 1, first, 0)
        await looked_at(made, 2, second, 0)
        (pid,) = made.pids()
        os.kill(pid, signal.SIGSTOP)
        made.pool.pass_by(task(1, first, 1, ahead=True))
        one = task(2, second, 1)
        made.pool.submit(one)
        await asyncio.sleep(0)
        assert (made.pool.in_flight, made.pool.queued) == (1, 0)
        os.kill(pid, signal.SIGKILL)
        await asyncio.wait_for(one.future, 100)
        assert one.attempts == 1
        await looked_at(made, 1, first, 2)
        info = made.pool.info()
        assert (info.completed, info.failed, info.retried) == (4, 0, 1)
