"""What a server learns that it can carry, and what it does about it: by rule and in simulation."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facelane_server.capacity import PERIOD_S, Capacity, Demand, Reading, fair_rates
from facelane_server.lanes.pace import Pace, Parts

TARGET_S = 0.1

demands = st.lists(
    st.tuples(
        st.floats(0.0, 60.0),
        st.sampled_from(["", "north", "south"]),
        st.integers(1, 100),
    ),
    min_size=1,
    max_size=12,
).map(
    lambda rows: [
        Demand(lane, fps, key, {"": 1, "north": 2, "south": 5}[key], weight)
        for lane, (fps, key, weight) in enumerate(rows)
    ]
)


# -- shares -------------------------------------------------------------------------------------


@given(demands, st.floats(0.0, 500.0))
def test_a_budget_is_used_and_never_exceeded_and_nobody_is_given_more_than_it_sends(
    wanted: list[Demand], budget: float
) -> None:
    rates = fair_rates(wanted, budget)
    offered = sum(d.fps for d in wanted)
    assert sum(rates.values()) == pytest.approx(min(budget, offered), abs=1e-6)
    for demand in wanted:
        assert 0.0 <= rates[demand.lane] <= demand.fps + 1e-9


@given(demands, st.floats(0.0, 500.0))
def test_whoever_gives_way_has_by_weight_as_much_as_anybody_of_its_key(
    wanted: list[Demand], budget: float
) -> None:
    rates = fair_rates(wanted, budget)
    for one, other in itertools.permutations(wanted, 2):
        if one.key == other.key and rates[one.lane] < one.fps - 1e-6:
            mine, its = rates[one.lane] / one.weight, rates[other.lane] / other.weight
            assert mine >= its - 1e-6


def test_keys_share_by_their_own_weight_however_many_streams_they_have() -> None:
    wanted = [Demand(0, 25.0, "few", 1), *(Demand(n, 25.0, "many", 1) for n in range(1, 10))]
    rates = fair_rates(wanted, 40.0)
    assert rates[0] == pytest.approx(20.0)
    assert rates[1] == pytest.approx(20.0 / 9)


# -- the pace of one stream ---------------------------------------------------------------------


@given(st.floats(0.5, 30.0), st.floats(5.0, 60.0), st.integers(0, 50))
def test_over_time_the_rate_is_taken_and_never_more_than_two_at_once(
    rate: float, fps: float, lane: int
) -> None:
    pace = Pace(lane)
    pace.change(rate, 0)
    taken = [n for n in range(int(fps * 60)) if pace.takes(int((n + 1) / fps * 1e9))]
    assert len(taken) == pytest.approx(min(rate, fps) * 60, abs=3)
    pace.change(None, 0)
    assert pace.takes(0)
    assert pace.takes(0)


# -- in simulation ------------------------------------------------------------------------------


@dataclass
class World:
    """Cameras before a server of two stages in a row, each with one worker; the newest picture of
    a stream replaces the one that waits for the first stage, which takes ``batch`` of them at a
    time, each after the first for ``more_s``; for ``slow_s`` it does little."""

    capacity: Capacity
    fps: list[float]
    detect_s: float
    recognize_s: float = 0.0
    faces: float = 1.0
    jitter: float = 0.3
    batch: int = 1
    more_s: float = 0.0
    slow_s: float = 0.0
    seed: int = 0
    now: float = 0.0
    thinned: list[float] = field(default_factory=list)
    """When some were."""
    ages: list[tuple[float, float]] = field(default_factory=list)
    """(when, age) of results."""
    answered: list[list[float]] = field(default_factory=list)
    """When, by stream."""

    def run(self, seconds: float) -> None:
        rng = random.Random(self.seed)
        paces = [Pace(lane) for lane in range(len(self.fps))]
        self.answered = [[] for _ in self.fps]
        events: list[tuple[float, int, str, int]] = []
        order = itertools.count()

        def at(when: float, what: str, lane: int) -> None:
            heapq.heappush(events, (when, next(order), what, lane))

        for lane, fps in enumerate(self.fps):
            at(rng.random() / fps, "frame", lane)
        at(PERIOD_S, "tick", 0)
        waiting: dict[int, float] = {}  # lane -> receipt; in the order of their turn
        chips: deque[tuple[int, float]] = deque()
        running: dict[str, list[tuple[int, float]]] = {"detect": [], "recognize": []}
        busy = {"detect": 0.0, "recognize": 0.0}
        begun = dict(busy)
        offered = [0] * len(self.fps)
        ages: list[float] = []
        results = 0

        def service(mean: float) -> float:
            return mean * rng.uniform(1 - self.jitter, 1 + self.jitter)

        def start() -> None:
            if not running["detect"] and waiting:
                lanes = list(itertools.islice(waiting, self.batch))
                running["detect"] = [(lane, waiting.pop(lane)) for lane in lanes]
                begun["detect"] = self.now
                took = service(self.detect_s) + self.more_s * (len(lanes) - 1)
                if 3.0 < self.now < 3.0 + self.slow_s:
                    took *= 40
                at(self.now + took, "detected", 0)
            if not running["recognize"] and chips:
                running["recognize"] = [chips.popleft()]
                begun["recognize"] = self.now
                at(self.now + service(self.recognize_s), "recognized", 0)

        while events and events[0][0] < seconds:
            self.now, _, what, lane = heapq.heappop(events)
            if what == "frame":
                offered[lane] += 1
                if lane in waiting or paces[lane].takes(int(self.now * 1e9)):
                    waiting[lane] = self.now  # keeps its turn
                at(self.now + 1.0 / self.fps[lane], "frame", lane)
            elif what == "tick":
                for name, jobs in running.items():
                    if jobs:
                        busy[name] += self.now - begun[name]
                        begun[name] = self.now
                rates = self.capacity.step(
                    Reading(
                        PERIOD_S,
                        [Demand(n, count / PERIOD_S) for n, count in enumerate(offered)],
                        results,
                        ages,
                        {name: used / PERIOD_S for name, used in busy.items()},
                        self.detect_s + self.recognize_s,
                        len(waiting) * self.detect_s + len(chips) * self.recognize_s,
                    )
                )
                if rates:
                    self.thinned.append(self.now)
                for n, pace in enumerate(paces):
                    pace.change(rates.get(n), int(self.now * 1e9))
                offered, ages, results = [0] * len(self.fps), [], 0
                busy = dict.fromkeys(busy, 0.0)
                at(self.now + PERIOD_S, "tick", 0)
            else:
                stage = "detect" if what == "detected" else "recognize"
                done, running[stage] = running[stage], []
                busy[stage] += self.now - begun[stage]
                for lane, since in done:
                    if stage == "detect" and self.recognize_s and rng.random() < self.faces:
                        chips.append((lane, since))
                        continue
                    results += 1
                    ages.append(self.now - since)
                    self.ages.append((self.now, self.now - since))
                    self.answered[lane].append(self.now)
            start()

    def p99(self, since: float) -> float:
        found = sorted(age for when, age in self.ages if when > since)
        return found[int(0.99 * len(found))]

    def rates(self, since: float) -> list[float]:
        return [sum(w > since for w in times) / (self.now - since) for times in self.answered]


def simulated(fps: list[float], **how: float) -> World:
    world = World(Capacity(TARGET_S, 2.0), fps, **how)  # type: ignore[arg-type]
    world.run(30.0)
    return world


STAGES = [
    pytest.param({"detect_s": 0.004}, 250.0, id="detector"),
    pytest.param({"detect_s": 0.002, "recognize_s": 0.005}, 200.0, id="recogniser"),
    pytest.param({"detect_s": 0.015, "recognize_s": 0.010, "faces": 0.5}, 66.0, id="slow"),
]


@pytest.mark.parametrize("fps", [5.0, pytest.param(12.5, marks=pytest.mark.slow), 25.0])
@pytest.mark.parametrize("times", [2, 4])
@pytest.mark.parametrize(("stages", "fits"), STAGES)
def test_over_what_fits_answers_keep_their_age_and_streams_their_equal_part(
    stages: dict[str, float], fits: float, times: int, fps: float
) -> None:
    world = simulated([fps] * max(2, round(times * fits / fps)), **stages)
    rates = world.rates(10.0)
    assert world.p99(10.0) <= 1.2 * TARGET_S
    assert max(rates) <= 1.1 * min(rates)
    assert sum(rates) >= 0.6 * fits


@pytest.mark.parametrize(("stages", "fits"), STAGES)
def test_within_what_fits_nothing_is_thinned(stages: dict[str, float], fits: float) -> None:
    world = simulated([12.5] * int(0.5 * fits / 12.5), **stages)
    assert world.capacity.budget is None
    assert min(world.rates(10.0)) == pytest.approx(12.5, rel=0.02)
    load = world.capacity.load
    assert load is not None
    assert 0.35 <= load.ratio <= 0.75
    assert load.thinned == 0


CARD = {"detect_s": 0.008, "more_s": 0.0005, "batch": 8}
"""Alone 125 pictures a second, and as busy as with the 700 that it does in batches."""


def test_a_moment_in_which_nothing_went_on_is_not_what_a_card_can_carry() -> None:
    """Decoders of many cameras are opened; from then on all fit as before."""
    world = simulated([25.0] * 20, **CARD, slow_s=1.5)
    assert world.thinned, "it could not know"
    assert world.thinned[-1] < 7.0
    assert min(world.rates(12.0)) > 24.0


def test_one_moment_is_not_too_much_and_two_in_a_row_or_what_waits_are() -> None:
    """A machine that others share stands still now and then, whatever has been taken."""
    wanted = [Demand(lane, 25.0) for lane in range(8)]
    young = Reading(PERIOD_S, wanted, 40, [0.3 * TARGET_S] * 40, {"detector": 0.9})
    late = replace(young, ages_s=[2 * TARGET_S] * 40)
    capacity = Capacity(TARGET_S, 2.0)
    for reading in (young, late, young, late, young):
        assert capacity.step(reading) == {}
    assert Capacity(TARGET_S, 2.0).step(replace(late, wait_s=2 * TARGET_S))
    capacity.step(late)
    assert capacity.step(late), "that is no moment"


def test_streams_that_open_beside_each_other_are_not_too_much() -> None:
    """Their decoders are opened meanwhile; but not for ever, whoever comes and goes."""
    capacity = Capacity(TARGET_S, 2.0)
    wanted = [Demand(lane, 25.0) for lane in range(32)]
    late = Reading(PERIOD_S, wanted, 2, [1.0], {"detector": 1.0}, 0.01, 1.0, opening=16)
    for _ in range(12):
        assert capacity.step(late) == {}
    assert capacity.step(late), "for three seconds"
    few = replace(late, opening=8)
    assert Capacity(TARGET_S, 2.0).step(few), "a few make no others late"


def test_the_budget_at_which_answers_were_late_is_come_near_to_slowly() -> None:
    capacity = overloaded()
    late_at = capacity.budget
    assert late_at is not None
    budgets = []
    for _ in range(40):
        wanted = [Demand(lane, 25.0) for lane in range(8)]
        answered = int((capacity.budget or 0.0) * PERIOD_S)
        capacity.step(Reading(PERIOD_S, wanted, answered, [0.01] * 20, {"detector": 0.9}))
        budgets.append(capacity.budget or 0.0)
    steps = [after / before for before, after in itertools.pairwise(budgets) if before and after]
    assert max(steps) <= 1.3, "it was late there a moment ago"


def test_video_is_not_thinned_so_far_that_what_it_decodes_together_makes_it_late() -> None:
    capacity = Capacity(TARGET_S, 2.0)
    demands = [Demand(lane, 25.0, video=lane < 8) for lane in range(16)]
    for _ in range(4):
        busy = {"detector": 1.0}
        rates = capacity.step(Reading(PERIOD_S, demands, 4, [1.0], busy, 0.01, 1.0))
    assert {rates[lane] for lane in range(8)} == {25.0 / 4}
    assert max(rates[lane] for lane in range(8, 16)) < 2.0


@dataclass
class Film:
    """Cameras of video before decoders that all its access units go through, one after the other;
    pictures that are taken go on to a detector that has time to spare, or has not. The newest
    picture of a stream replaces one that waits, which is decoded all the same."""

    capacity: Capacity
    cameras: int
    decode_s: float
    detect_s: float
    together: bool = False
    """Key frames of all cameras come at once."""
    fps: float = 25.0
    group: int = 25
    now: float = 0.0
    ages: list[tuple[float, float]] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)

    def run(self, seconds: float, counted: float) -> None:
        """``counted``: when what is kept of it begins."""
        rng = random.Random(3)
        lanes = range(self.cameras)
        self.answered = [0] * self.cameras
        paces, parts = [Pace(n) for n in lanes], [Parts(n) for n in lanes]
        units = [0 if self.together else rng.randrange(self.group) for _ in lanes]
        taken = [False] * self.cameras
        arrivals = sorted((rng.random() / self.fps, n) for n in lanes)
        under_way: dict[int, float] = {}  # the receipt of the picture that a worker has
        waiting: dict[int, float] = {}
        decoding: deque[tuple[int, float]] = deque()
        free_at = detector_free_at = busy = 0.0
        offered, ages, results = [0] * self.cameras, [], 0
        tick = PERIOD_S
        for step in range(int(seconds * self.fps)):
            for offset, lane in arrivals:
                self.now = step / self.fps + offset
                while decoding and free_at <= self.now:
                    which, upto = decoding.popleft()
                    free_at += self.decode_s
                    while which in under_way and under_way[which] <= upto:
                        detector_free_at = max(detector_free_at, free_at) + self.detect_s
                        busy += self.detect_s
                        results += 1
                        ages.append(detector_free_at - under_way.pop(which))
                        if self.now > counted:
                            self.ages.append((self.now, ages[-1]))
                            self.answered[which] += 1
                        if which in waiting:
                            under_way[which] = waiting.pop(which)
                if not decoding:
                    free_at = max(free_at, self.now)
                if self.now >= tick:
                    tick += PERIOD_S
                    self._step(offered, ages, results, busy, len(decoding), paces, parts)
                    offered, ages, results, busy = [0] * self.cameras, [], 0, 0.0
                offered[lane] += 1
                if units[lane] % self.group == 0:
                    taken[lane] = parts[lane].takes()
                units[lane] += 1
                if taken[lane]:
                    decoding.append((lane, self.now))
                    if lane in waiting or paces[lane].takes(int(self.now * 1e9)):
                        (waiting if lane in under_way else under_way)[lane] = self.now

    def _step(
        self,
        offered: list[int],
        ages: list[float],
        results: int,
        busy: float,
        waiting: int,
        paces: list[Pace],
        parts: list[Parts],
    ) -> None:
        demands = [
            Demand(n, count / PERIOD_S, video=True, group_s=self.group / self.fps)
            for n, count in enumerate(offered)
        ]
        rates = self.capacity.step(
            Reading(
                PERIOD_S,
                demands,
                results,
                ages,
                {"detector": 1.0 if waiting else min(1.0, busy / PERIOD_S)},
                self.decode_s + self.detect_s,
                waiting * self.decode_s,
                decoding_s=waiting * self.decode_s,
            )
        )
        for n, (pace, part) in enumerate(zip(paces, parts, strict=True)):
            rate = rates.get(n)
            part.part = 1.0 if rate is None else self.capacity.groups
            pace.change(None if rate is None else rate / part.part, int(self.now * 1e9))

    def share_below(self, age_s: float) -> float:
        return sum(age <= age_s for _, age in self.ages) / len(self.ages)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("times", "in_time"), [(1.3, 0.99), (2.0, 0.98), (4.0, 0.94)])
def test_where_decoding_is_what_is_short_whole_groups_of_pictures_are_left_out(
    times: float, in_time: float, together: bool
) -> None:
    film = Film(Capacity(TARGET_S, 2.0), 40, times / 1_000, 0.0002, together)
    film.run(90.0, counted=20.0)
    assert film.share_below(1.2 * TARGET_S) >= in_time
    assert 0.6 / times <= film.capacity.groups <= 1.15 / times
    assert sum(film.answered) / 70.0 >= 0.6 * 1_000 / times
    assert max(film.answered) <= 1.3 * min(film.answered)


@pytest.mark.parametrize("wait_s", [0.0, 0.8 * TARGET_S], ids=["", "piled up"])
def test_where_the_detector_is_what_is_short_every_group_of_pictures_is_taken(
    wait_s: float,
) -> None:
    """Until no stream of video gives way further, and answers are late all the same; what has piled
    up is let off first, whatever the streams' budget."""
    capacity = Capacity(TARGET_S, 2.0)
    demands = [Demand(lane, 25.0, video=True, group_s=1.0) for lane in range(8)]
    late = Reading(PERIOD_S, demands, 40, [2 * TARGET_S] * 40, {"detector": 1.0}, wait_s=wait_s)
    budgets = set()
    while not capacity._pinned:
        rates = capacity.step(replace(late, answered=int((capacity.budget or 160.0) * PERIOD_S)))
        assert capacity.groups == 1.0
        budgets.add(capacity.budget)
    assert len(budgets) > 4, "it is led down"
    assert set(rates.values()) == {25.0 / 4}
    for _ in range(12):
        capacity.step(replace(late, answered=12))
    assert capacity.groups < 1.0


def test_groups_of_pictures_are_taken_again_when_they_fit() -> None:
    capacity = Capacity(TARGET_S, 2.0)
    demands = [Demand(lane, 25.0, video=lane < 4, group_s=1.0) for lane in range(8)]
    busy = {"detector": 1.0}
    late = Reading(PERIOD_S, demands, 40, [3 * TARGET_S] * 40, busy, decoding_s=TARGET_S)
    for _ in range(8):
        rates = capacity.step(late)
    assert capacity.groups < 1.0
    assert set(rates) == set(range(4)), "stills cost those who decode video nothing"
    assert capacity.budget is not None
    young = replace(late, answered=45, ages_s=[0.1 * TARGET_S] * 45, decoding_s=0.0)
    waiting = replace(young, ages_s=[0.6 * TARGET_S] * 45, decoding_s=0.08 * TARGET_S)
    for _ in range(4):
        capacity.step(waiting)
    before = capacity.groups
    for _ in range(12):
        capacity.step(waiting)
    assert capacity.groups == before, "nobody is late, and more would be"
    for _ in range(400):
        rates = capacity.step(young)
    assert (rates, capacity.groups, capacity.budget) == ({}, 1.0, None)


@pytest.mark.parametrize("cameras", [56, 112])
def test_over_what_fits_on_a_card_answers_keep_their_age_too(cameras: int) -> None:
    world = simulated([25.0] * cameras, **CARD)
    assert world.p99(10.0) <= 1.2 * TARGET_S
    rates = world.rates(10.0)
    assert max(rates) <= 1.1 * min(rates) + 0.2
    assert sum(rates) > 450


def test_one_camera_before_a_processor_that_is_too_slow_for_it_keeps_that_one_at_work() -> None:
    for service in (0.05, 0.09, 0.15, 0.4):
        world = simulated([25.0], detect_s=service)
        assert world.rates(10.0)[0] >= 0.75 / service, service


def overloaded(**of_one: object) -> Capacity:
    """A capacity that has seen two seconds of answers twice as old as they should be."""
    capacity = Capacity(TARGET_S, 2.0)
    wanted = [Demand(lane, 25.0) for lane in range(7)]
    wanted.append(Demand(7, 25.0, **of_one))  # type: ignore[arg-type]
    for _ in range(8):
        capacity.step(Reading(PERIOD_S, wanted, 25, [2 * TARGET_S] * 25, {"detector": 1.0}))
    return capacity


def test_how_many_more_fit_is_a_number_that_can_be_told() -> None:
    """A file that was sent long ago, and is still being worked off, sends next to nothing."""
    capacity = Capacity(0.1, 2.0)
    for number in range(600):
        sent = 256.0 if number == 0 else 0.0
        demand = Demand(1, sent, lossless=True)
        capacity.step(Reading(0.25, [demand], 1, [], {"detector": 1.0}))
    load = capacity.load
    assert load is not None
    assert 0 < load.headroom < 1 << 32


def test_a_lossless_stream_has_its_part_and_is_not_thinned() -> None:
    capacity = overloaded(lossless=True)
    load = capacity.load
    assert load is not None
    assert load.thinned == 7
    assert load.ratio > 1.0
    assert load.headroom == 0


def test_one_more_is_refused_only_while_streams_give_way_and_where_each_would_have_too_little() -> (
    None
):
    capacity = overloaded()
    there = [Demand(lane, 0.0) for lane in range(8)]
    assert capacity.room(Demand(99, 0.0), there) is None, "about 9 a second are left for each"
    assert capacity.budget is not None
    many = [Demand(lane, 0.0) for lane in range(8, 100)]
    assert capacity.room(Demand(100, 0.0), [*there, *many]) == int(capacity.budget / 2.0)
    assert capacity.room(Demand(100, 0.0), []) is None, "the first is always let in"
    assert Capacity(TARGET_S, 2.0).load is None


def test_the_streams_of_one_key_keep_out_nobody_elses() -> None:
    capacity = overloaded()
    assert capacity.budget is not None
    many = [Demand(lane, 0.0, "many") for lane in range(8, 100)]
    there = [Demand(lane, 0.0) for lane in range(8)]
    assert capacity.room(Demand(100, 0.0, "many"), [*there, *many]) is not None
    assert capacity.room(Demand(100, 0.0, "one"), [*there, *many]) is None
    fits = int((capacity.budget - 8 * 2.0) / 2 / 2.0)  # half of what the third key leaves
    few = [Demand(lane, 0.0, "few") for lane in range(200, 200 + fits)]
    assert capacity.room(Demand(100, 0.0, "few"), [*there, *many, *few[1:]]) is None
    assert capacity.room(Demand(100, 0.0, "few"), [*there, *many, *few]) is not None


def test_nobody_is_refused_for_a_first_guess() -> None:
    """While much is only beginning, next to nothing has been answered yet."""
    capacity = Capacity(TARGET_S, 2.0)
    there = [Demand(lane, 25.0) for lane in range(8)]
    slow = Reading(PERIOD_S, there, 1, [2 * TARGET_S], {"detector": 1.0})
    capacity.step(slow)
    assert capacity.budget is None, "it may have been a moment"
    for _ in range(4):
        capacity.step(slow)
        assert capacity.budget is not None
        assert capacity.budget < 2.0 * len(there)
        assert capacity.room(Demand(99, 0.0), there) is None
    capacity.step(slow)
    assert capacity.room(Demand(99, 0.0), there) is not None


def test_who_comes_when_the_others_have_left_is_not_measured_by_their_last_answers() -> None:
    capacity = overloaded()
    for _ in range(6):
        capacity.step(Reading(PERIOD_S, [Demand(0, 25.0)], 1, [TARGET_S], {"detector": 1.0}))
    assert capacity.budget is not None
    assert capacity.budget < 10.0
    come = [Demand(lane, 0.0) for lane in range(100, 110)]
    assert capacity.room(Demand(200, 0.0), [Demand(0, 0.0), *come]) is not None, "it still sends"
    assert capacity.room(Demand(200, 0.0), come) is None


def test_a_server_whose_streams_have_all_left_is_not_full() -> None:
    """Those that come to another shard would all stay there."""
    capacity = overloaded()
    assert capacity.budget is not None
    capacity.step(Reading(PERIOD_S, [], 3, [], {"detector": 1.0}))
    assert capacity.budget is None


def test_a_stream_that_comes_is_given_what_the_others_have() -> None:
    capacity = overloaded()
    assert capacity.budget is not None
    rate = capacity.first_rate(Demand(99, 0.0))
    assert rate == pytest.approx(capacity.budget / 9)
    assert Capacity(TARGET_S, 2.0).first_rate(Demand(0, 0.0)) is None


def test_a_pool_that_is_gone_lets_go_of_what_was_learnt() -> None:
    capacity = overloaded()
    for _ in range(12):
        capacity.step(Reading(PERIOD_S, [Demand(0, 25.0)], 0, [], {"detector": 0.0}))
    assert capacity.budget is None


def test_when_what_came_too_much_goes_all_is_taken_again() -> None:
    capacity = overloaded()
    for _ in range(60):
        rates = capacity.step(
            Reading(PERIOD_S, [Demand(0, 25.0)], 6, [0.01] * 6, {"detector": 0.25})
        )
    assert rates == {}
    assert capacity.budget is None
