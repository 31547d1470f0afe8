"""Which task goes next."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from facelane_server.pools.queue import FairQueue, _Level
from facelane_server.pools.tasks import ANYBODY, AnyTask, LivenessRequest, Sender, Task

REQUEST = LivenessRequest(())


def task(lane: int, *, weight: int = 1, deadline: int = 1000, sender: Sender = ANYBODY) -> AnyTask:
    future: Any = Future()  # only asked whether it is done
    return Task(REQUEST, lane, weight, deadline, future, sender=sender)


def take(queue: FairQueue, most: int) -> list[AnyTask]:
    return queue.take(most, lambda _: True)


def test_one_lane_is_served_in_order() -> None:
    queue = FairQueue()
    tasks = [task(1) for _ in range(5)]
    for item in tasks:
        queue.put(item)
    assert take(queue, 3) == tasks[:3]
    assert take(queue, 3) == tasks[3:]
    assert len(queue) == 0


def test_among_equals_the_earliest_deadline_goes_first() -> None:
    queue = FairQueue()
    late, early, middle = task(1, deadline=30), task(2, deadline=10), task(3, deadline=20)
    for item in (late, early, middle):
        queue.put(item)
    assert take(queue, 3) == [early, middle, late]


def test_a_lane_that_was_alone_shares_with_the_first_that_comes() -> None:
    queue = FairQueue()
    alone = [task(1, deadline=10 + n) for n in range(5)]
    for item in alone:
        queue.put(item)
    assert queue.next_deadline() == 10
    assert take(queue, 2) == alone[:2]
    assert queue.withdraw(alone[2])
    newer = task(1, deadline=14)
    assert queue.replace(alone[3], newer)
    assert queue.next_deadline() == 14
    others = [task(2, deadline=20) for _ in range(2)]
    for item in others:
        queue.put(item)
    assert take(queue, 2) == [newer, others[0]]
    assert queue.expire(19) == [alone[4]]
    assert take(queue, 2) == [others[1]]
    assert len(queue) == 0


def test_what_goes_into_one_batch_goes_by_turns_and_is_charged_to_nobody() -> None:
    queue = FairQueue()
    first, second = task(1, deadline=10), task(1, deadline=11)
    other, heavy = task(2, deadline=5), task(2, deadline=30)
    for item in (first, second, other, heavy):
        queue.put(item)
    assert queue.next_deadline() == 5
    assert take(queue, 4) == [other, first, second, heavy]
    assert queue.next_deadline() is None
    tasks = [task(1, deadline=20), *(task(3, deadline=30) for _ in range(2))]
    for item in tasks:
        queue.put(item)
    assert take(queue, 2) == tasks[:2], "lane 1 owes nothing for the two that it had"
    assert take(queue, 2) == tasks[2:]


def test_of_one_batch_what_does_not_fit_goes_next() -> None:
    queue = FairQueue()
    tasks = [task(1 + n % 3, deadline=10 + n) for n in range(6)]
    for item in tasks:
        queue.put(item)
    room = iter([True, True, False])
    assert queue.take(8, lambda _: next(room)) == tasks[:2]
    late, early = task(4, deadline=20), task(5, deadline=1)
    queue.put(late)
    queue.put(early)
    assert take(queue, 8) == [early, *tasks[2:5], late, tasks[5]]
    assert len(queue) == 0


def test_what_is_too_much_for_one_batch_is_shared_however_it_came() -> None:
    """A flood of one key's that came first, and was not taken yet when another's came."""
    for count in (5, 200):
        queue = FairQueue()
        flood = [task(n, deadline=1, sender=Sender("greedy")) for n in range(count)]
        quiet = task(1000, deadline=10_000, sender=Sender("quiet"))
        for item in (*flood, quiet):
            queue.put(item)
        assert quiet in take(queue, 2)


def test_a_flood_does_not_delay_a_quiet_lane() -> None:
    queue = FairQueue()
    for _ in range(100):
        queue.put(task(1, deadline=1))
    take(queue, 10)
    quiet = task(2, deadline=10_000)
    queue.put(quiet)
    assert quiet in take(queue, 2)


def test_weights_are_shares() -> None:
    queue = FairQueue()
    for _ in range(300):
        queue.put(task(1, weight=3))
        queue.put(task(2, weight=1))
    served = Counter(item.lane for item in take(queue, 200))
    assert 148 <= served[1] <= 152
    assert served[1] + served[2] == 200


def test_silence_earns_no_credit() -> None:
    queue = FairQueue()
    for _ in range(50):
        queue.put(task(1))
    take(queue, 25)
    for _ in range(50):
        queue.put(task(2))
    served = Counter(item.lane for item in take(queue, 20))
    assert abs(served[1] - served[2]) <= 1


def test_a_frame_that_is_replaced_costs_its_lane_nothing() -> None:
    """LATEST_WINS withdraws and submits for every frame: that must not cost the lane."""
    queue = FairQueue()
    waiting = task(1, deadline=10_000)
    queue.put(waiting)
    for _ in range(20):
        queue.put(task(2))
        queue.put(task(3))
    served: Counter[int] = Counter()
    for turn in range(30):
        assert queue.withdraw(waiting) or served[1]
        waiting = task(1, deadline=10_000 + turn)
        queue.put(waiting)
        got = take(queue, 1)[0]
        served[got.lane] += 1
        if got is waiting:
            waiting = task(1, deadline=20_000)
            queue.put(waiting)
    assert abs(served[1] - 10) <= 1


def test_a_quicker_camera_is_not_starved_by_its_own_newer_frames() -> None:
    """Each replaces what waits of it before its turn would come: the turn stays."""
    queue = FairQueue()
    waiting: dict[int, AnyTask] = {}
    served: Counter[int] = Counter()
    for now in range(1, 4_000):
        for lane in range(40):
            if now % (33 if lane < 4 else 40) == lane:
                newer = task(lane, deadline=now + 1_000)
                if lane not in waiting or not queue.replace(waiting[lane], newer):
                    queue.put(newer)
                waiting[lane] = newer
        if now % 5 == 0 and len(queue):
            (got,) = take(queue, 1)
            served[got.lane] += 1
            del waiting[got.lane]
    assert max(served.values()) <= 1.1 * min(served[lane] for lane in range(33)) + 1


def test_the_task_behind_a_withdrawn_one_moves_up() -> None:
    queue = FairQueue()
    first, second = task(1, deadline=10), task(1, deadline=20)
    other = task(2, deadline=30)
    for item in (first, second, other):
        queue.put(item)
    queue.withdraw(first)
    assert take(queue, 1) == [second]


def test_what_came_back_goes_first_and_the_suspect_alone() -> None:
    queue = FairQueue()
    waiting = [task(1) for _ in range(4)]
    for item in waiting:
        queue.put(item)
    suspects = [task(2), task(3)]
    innocent = task(4)
    queue.put_back(innocent, alone=False)
    for item in reversed(suspects):
        queue.put_back(item, alone=True)
    assert take(queue, 8) == [suspects[0]]
    assert take(queue, 8) == [suspects[1]]
    assert take(queue, 8) == [innocent, *waiting]


def test_a_batch_ends_at_the_first_task_that_does_not_fit_but_is_never_empty() -> None:
    queue = FairQueue()
    tasks = [task(1) for _ in range(3)]
    for item in tasks:
        queue.put(item)
    assert queue.take(3, lambda _: False) == tasks[:1]
    room = iter([True, False])
    assert queue.take(3, lambda _: next(room)) == tasks[1:2]


def test_expiry_takes_out_exactly_what_is_due() -> None:
    queue = FairQueue()
    tasks = [task(lane % 3, deadline=deadline) for lane, deadline in enumerate(range(10, 60, 5))]
    for item in tasks:
        queue.put(item)
    queue.put_back(late := task(9, deadline=12), alone=True)
    assert queue.next_deadline() == 10
    assert set(queue.expire(25)) == {*tasks[:4], late}
    assert queue.next_deadline() == 30
    assert len(queue) == 6
    assert late not in take(queue, 10)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=120),
    st.integers(1, 8),
)
def test_backlogged_lanes_get_their_shares(plan: list[tuple[int, int]], batch: int) -> None:
    """While lanes stay backlogged, normalised service differs by at most one task each: the
    bound of start-time fair queueing."""
    queue = FairQueue()
    weights = dict(plan)
    left = Counter(lane for lane, _ in plan)
    for lane, _ in plan:
        queue.put(task(lane, weight=weights[lane]))
    served: Counter[int] = Counter()
    backlogged = set(left)
    while len(queue):
        for item in take(queue, batch):
            served[item.lane] += 1
            left[item.lane] -= 1
            if not left[item.lane]:
                backlogged.discard(item.lane)
            for a in backlogged:
                for b in backlogged:
                    gap = served[a] / weights[a] - served[b] / weights[b]
                    assert gap <= 1 / weights[a] + 1 / weights[b] + 1e-9


# -- keys ---------------------------------------------------------------------------------


def test_a_clients_weight_divides_its_own_keys_share() -> None:
    """Eight streams of weight 100 with one key, against one of weight 1 with another."""
    queue = FairQueue()
    for _ in range(200):
        for lane in range(8):
            queue.put(task(lane, weight=100, sender=Sender("greedy")))
        queue.put(task(9, weight=1, sender=Sender("modest")))
    served = Counter(item.lane for item in take(queue, 200))
    assert 98 <= served[9] <= 102
    assert all(11 <= served[lane] <= 14 for lane in range(8))


def test_a_keys_weight_is_its_share() -> None:
    queue = FairQueue()
    for _ in range(200):
        queue.put(task(1, weight=100, sender=Sender("visitors", 1)))
        queue.put(task(2, weight=1, sender=Sender("doors", 3)))
    served = Counter(item.lane for item in take(queue, 200))
    assert 148 <= served[2] <= 152


def test_single_pictures_cannot_take_the_streams_share_nor_streams_theirs() -> None:
    """A hundred calls, each a lane of its own, however many keys they come with."""
    queue = FairQueue()
    for number in range(1000):
        queue.put(task(number, sender=Sender(f"caller{number % 50}", live=False)))
        queue.put(task(-1 - number % 3, sender=Sender(f"camera{number % 2}")))
    served = Counter(item.sender.live for item in take(queue, 500))
    assert 398 <= served[True] <= 402
    assert served[False] == 500 - served[True]


def test_a_share_that_nobody_uses_is_everybodys() -> None:
    queue = FairQueue()
    for _ in range(20):
        queue.put(task(1, sender=Sender("a", live=False)))
    assert len(take(queue, 20)) == 20


def test_what_waits_of_a_key_is_known() -> None:
    queue = FairQueue()
    first, second = (task(lane, sender=Sender("a")) for lane in (1, 2))
    for item in (first, second, task(1, sender=Sender("b"))):
        queue.put(item)
    assert (queue.waiting_of("a"), queue.waiting_of("b"), queue.waiting_of("c")) == (2, 1, 0)
    queue.withdraw(first)
    assert queue.waiting_of("a") == 1
    take(queue, 2)
    assert queue.waiting_of("a") == queue.waiting_of("b") == 0


SENDERS = st.builds(Sender, st.sampled_from("abc"), st.integers(1, 4), st.booleans())


@given(st.lists(st.tuples(SENDERS, st.integers(0, 3), st.integers(1, 100)), max_size=120))
def test_nobody_waits_longer_than_the_keys_before_it(
    plan: list[tuple[Sender, int, int]],
) -> None:
    """Bounded waiting: whatever a key's streams claim, between two turns of a backlogged key
    another of its kind has at most as many as their weights say, and one."""
    queue = FairQueue()
    weights = {(s.live, s.key): s.weight for s, _, _ in plan}
    left: Counter[tuple[bool, str]] = Counter()
    for sender, lane, weight in plan:
        name = (sender.live, sender.key)
        left[name] += 1
        fixed = Sender(sender.key, weights[name], sender.live)
        queue.put(task(lane, weight=weight, sender=fixed))
    served: Counter[tuple[bool, str]] = Counter()
    while len(queue):
        (item,) = take(queue, 1)
        name = (item.sender.live, item.sender.key)
        served[name] += 1
        left[name] -= 1
        for a in left:
            for b in left:
                if left[a] and left[b] and a[0] == b[0]:
                    gap = served[a] / weights[a] - served[b] / weights[b]
                    assert gap <= 1 / weights[a] + 1 / weights[b] + 1e-9


class QueueMachine(RuleBasedStateMachine):
    """Against a plain set: nothing is lost, nothing comes twice, order in a lane holds."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue()
        self.model: list[AnyTask] = []
        self.gone: list[AnyTask] = []

    @rule(
        lane=st.integers(0, 4),
        weight=st.integers(1, 3),
        deadline=st.integers(0, 100),
        sender=st.builds(Sender, st.just("k"), st.just(1), st.booleans()),
    )
    def put(self, lane: int, weight: int, deadline: int, sender: Sender) -> None:
        item = task(10 * lane + sender.live, weight=weight, deadline=deadline, sender=sender)
        self.queue.put(item)
        self.model.append(item)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.model))
        assert self.queue.withdraw(item)
        assert not self.queue.withdraw(item)
        self.model.remove(item)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), deadline=st.integers(0, 100))
    def replace(self, data: st.DataObject, deadline: int) -> None:
        item = data.draw(st.sampled_from(self.model))
        newer = task(item.lane, weight=item.weight, deadline=deadline, sender=item.sender)
        assert self.queue.replace(item, newer) is (item not in self.gone)
        assert not self.queue.replace(task(item.lane, sender=item.sender), newer)
        if item not in self.gone:
            self.model[self.model.index(item)] = newer

    @rule(most=st.integers(1, 6))
    def take(self, most: int) -> None:
        batch = take(self.queue, most)
        assert len(batch) <= most
        assert bool(batch) == bool(self.model)
        for item in batch:
            older = [o for o in self.model if o.lane == item.lane and o not in self.gone]
            if item not in self.gone:
                assert older[0] is item, "a lane is served in order"
            self.model.remove(item)
            if item in self.gone:
                self.gone.remove(item)
        if batch:
            self.last = batch[-1]

    @precondition(lambda self: getattr(self, "last", None) is not None)
    @rule(alone=st.booleans())
    def put_back(self, alone: bool) -> None:
        item, self.last = self.last, None  # type: ignore[assignment]
        self.queue.put_back(item, alone=alone)
        self.model.append(item)
        self.gone.append(item)

    @rule(now=st.integers(0, 100))
    def expire(self, now: int) -> None:
        due = {item for item in self.model if item.deadline_ns <= now}
        assert set(self.queue.expire(now)) == due
        self.model = [item for item in self.model if item not in due]

    @invariant()
    def agrees(self) -> None:
        assert len(self.queue) == len(self.model)
        assert set(self.queue.tasks()) == set(self.model)
        expected = min((item.deadline_ns for item in self.model), default=None)
        assert self.queue.next_deadline() == expected


class TestQueueMachine(QueueMachine.TestCase):
    settings = settings(max_examples=20, stateful_step_count=40)


@pytest.mark.slow
class TestQueueMachineAtLength(QueueMachine.TestCase):
    settings = settings(max_examples=60, stateful_step_count=40)


def test_memory_does_not_grow_with_what_has_passed() -> None:
    queue = FairQueue()
    kept = task(-1, deadline=10**9)
    queue.put(kept)
    for number in range(5_000):
        queue.put(task(number, deadline=10**9))
        for item in take(queue, 1):
            if item is kept:
                queue.put(kept)
    levels = [queue._root]
    for level in levels:
        levels += [c for c in level.children.values() if isinstance(c, _Level)]
        assert max(len(level.children), len(level.heads)) < 1_500
    assert len(levels) == 3
    assert len(queue._deadlines) < 1_500
    assert len(queue._by_key) == 1
