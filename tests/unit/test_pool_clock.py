"""The pools' timers are never early, whatever the loop thinks the time is."""

from __future__ import annotations

import asyncio
import time

import pytest
import uvloop

from facelane_server.pools.clock import LoopClock


@pytest.mark.parametrize("loops", [uvloop.new_event_loop, asyncio.new_event_loop])
@pytest.mark.parametrize("after_ns", [0, 300_000, 20_000_000])
def test_a_timer_set_late_in_a_turn_of_the_loop_is_not_early(loops: object, after_ns: int) -> None:
    async def fired() -> tuple[int, int]:
        clock = LoopClock()
        came: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        time.sleep(0.05)  # noqa: ASYNC251 - what the loop has for the time is of before
        due = clock.now_ns() + after_ns
        clock.call_at(due, lambda: came.set_result(time.monotonic_ns()))
        never = clock.call_at(due, lambda: came.set_result(0))
        never.cancel()
        return due, await came

    with asyncio.Runner(loop_factory=loops) as runner:  # type: ignore[arg-type]
        due, came = runner.run(fired())
    assert came >= due
