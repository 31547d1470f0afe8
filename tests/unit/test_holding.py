"""What waits behind a picture that takes several jobs to decode."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from facelane_server import annexb
from facelane_server.domain import Encoding, Stage
from facelane_server.ipc.messages import PictureHeld
from facelane_server.pools.groups import Decoders, Group, Wanted
from facelane_server.pools.holding import Holding, note
from facelane_server.pools.schedule import Schedule
from facelane_server.pools.slots import Codec
from facelane_server.pools.tasks import AnyTask, Task, VideoRequest

GROUP = Group(Encoding.H264, annexb.Format(64, 48, 8), 1 << 20)


def task(lane: int, submitted: int, deadline: int = 100) -> AnyTask:
    future: Any = Future()
    request = VideoRequest(Wanted(lane, GROUP, submitted, submitted), 1, 0)
    return Task(request, lane, 1, deadline, future, submitted_ns=submitted)


def test_behind_one_that_is_asked_for_again_all_wait_in_the_order_in_which_they_came() -> None:
    held = Holding()
    first, second, third, other = task(1, 1), task(1, 2), task(1, 3), task(2, 1)
    assert held.hold(first)
    held.put(third)
    second.dispatched_ns = 5
    assert not held.hold(second), "it was under way, and comes after the first"
    assert second.dispatched_ns == 0, "it may be superseded again"
    assert held.hold(first)
    assert held.hold(other), "another lane's"
    assert len(held) == 2
    assert held.released() == []
    first.future.set_result(None)
    assert 1 in held, "what comes now is behind those"
    assert held.released() == [second, third]
    assert 1 not in held
    assert 2 in held


def test_what_waits_is_replaced_withdrawn_and_expires() -> None:
    held = Holding()
    first, second, newer, third = task(1, 1), task(1, 2), task(1, 4), task(1, 3, deadline=50)
    held.hold(first)
    held.put(second)
    held.put(third)
    assert held.next_deadline() == 50
    assert held.expire(49) == []
    assert held.expire(50) == [third]
    assert held.replace(second, newer)
    assert not held.replace(second, newer)
    assert held.withdraw(newer)
    assert not held.withdraw(newer)
    assert not len(held)


def test_one_that_nobody_waits_for_holds_nothing() -> None:
    held, given_up = Holding(), task(1, 1)
    given_up.future.set_result(None)
    assert held.hold(given_up)
    assert 1 not in held


def test_of_a_lane_that_has_ended_nothing_is_kept() -> None:
    schedule = Schedule("detector", Codec(Stage.DETECTOR, []))
    first, waits = task(1, 1), task(1, 2)
    schedule._held.hold(first)
    assert schedule.submit(waits, 0, lambda _: True) is None
    assert schedule.queued == 1
    schedule.release(1)
    assert not schedule._held._lanes
    assert schedule.waiting() == [waits], "whoever is still waited for is"


def test_whose_decoder_is_being_opened_has_not_been_begun() -> None:
    one, decoders = task(1, 1), Decoders()
    note(one, PictureHeld(1, opening=True), decoders, 5)
    assert (one.opening, one.behind_ns) == (True, 0)
    note(one, PictureHeld(1), decoders, 6)
    assert (one.opening, one.behind_ns) == (False, 6), "it is at work"
