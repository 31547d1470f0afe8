"""The life of a worker as a pure function."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facelane_server.pools import restart
from facelane_server.pools.restart import Action, Happening, Life, Notice, Policy, State

POLICY = Policy(
    limit=3, window_s=100.0, initial_s=1.0, max_s=8.0, quarantine_s=50.0, start_timeout_s=20.0
)


def half() -> float:
    return 0.5


def run(worker: State, *notices: tuple[Notice, float]) -> tuple[State, tuple[Action, ...]]:
    actions: tuple[Action, ...] = ()
    for notice, now in notices:
        worker, actions = restart.step(worker, notice, now, POLICY, half)
    return worker, actions


def ready(now: float = 0.0) -> State:
    worker, actions = run(State(), (Notice(Happening.START), now))
    assert actions == (Action.SPAWN,)
    worker, actions = run(
        worker,
        (Notice(Happening.HELLO), now),
        (Notice(Happening.WARMING), now),
        (Notice(Happening.READY), now),
    )
    assert (worker.life, actions) == (Life.READY, ())
    return worker


def test_a_life_without_trouble() -> None:
    worker = ready()
    assert worker.life is Life.READY
    assert worker.wake_at is None
    worker, actions = run(worker, (Notice(Happening.STOP), 5.0))
    assert (worker.life, actions) == (Life.DRAINING, (Action.DRAIN,))
    worker, actions = run(worker, (Notice(Happening.GONE), 6.0))
    assert (worker.life, actions, worker.losses) == (Life.EXITED, (), ())


def test_a_loss_leaves_at_once_and_waits_until_the_process_is_reaped() -> None:
    worker, actions = run(ready(), (Notice(Happening.LOSS, "HUNG"), 1.0))
    assert (worker.life, actions) == (Life.LOST, (Action.KILL,))
    assert worker.wake_at is None
    worker, actions = run(worker, (Notice(Happening.GONE), 3.0))
    assert (worker.life, actions) == (Life.BACKOFF, ())
    assert worker.wake_at == pytest.approx(3.0 + 0.75)
    assert worker.reason == "HUNG"


def test_back_off_doubles_and_ends_in_quarantine_with_one_try_after_it() -> None:
    worker = ready()
    waits = []
    now = 0.0
    for _ in range(3):
        worker, _ = run(
            worker, (Notice(Happening.LOSS, "EXITED"), now), (Notice(Happening.GONE), now)
        )
        assert worker.wake_at is not None
        waits.append(worker.wake_at - now)
        now = worker.wake_at
        if worker.life is Life.QUARANTINED:
            break
        worker, actions = run(worker, (Notice(Happening.TIMER), now))
        assert actions == (Action.SPAWN,)
        worker = replace(worker, life=Life.READY, wake_at=None)
    assert waits == pytest.approx([0.75, 1.5, 50.0])
    assert worker.life is Life.QUARANTINED
    worker, actions = run(worker, (Notice(Happening.TIMER), now))
    assert (worker.life, actions) == (Life.SPAWNED, (Action.SPAWN,))
    worker, _ = run(
        worker, (Notice(Happening.LOSS, "LOAD_FAILED"), now), (Notice(Happening.GONE), now)
    )
    assert worker.life is Life.QUARANTINED


def test_a_limit_that_is_never_reached_is_one_too() -> None:
    endless = replace(POLICY, limit=100_000, window_s=1e6)
    worker = replace(ready(), losses=tuple(float(n) for n in range(2_000)))
    worker, _ = restart.step(worker, Notice(Happening.LOSS, "EXITED"), 2_000.0, endless, half)
    worker, _ = restart.step(worker, Notice(Happening.GONE), 2_000.0, endless, half)
    assert (worker.life, worker.wake_at) == (Life.BACKOFF, 2_000.0 + 0.75 * endless.max_s)


def test_old_losses_are_forgiven() -> None:
    worker = ready()
    for now in (0.0, 101.0, 202.0, 303.0, 404.0):
        worker, _ = run(worker, (Notice(Happening.LOSS), now), (Notice(Happening.GONE), now))
        assert worker.life is Life.BACKOFF
        worker = replace(worker, life=Life.READY, wake_at=None)


def test_a_ready_worker_that_leaves_costs_no_budget_only_the_first_back_off() -> None:
    worker, actions = run(ready(), (Notice(Happening.LEFT), 9.0))
    assert (worker.life, actions) == (Life.DRAINING, (Action.DRAIN,))
    worker, actions = run(worker, (Notice(Happening.GONE), 10.0))
    assert (worker.life, actions, worker.losses, worker.lost) == (Life.BACKOFF, (), (), 0)
    assert worker.wake_at == pytest.approx(10.75)
    worker, actions = run(worker, (Notice(Happening.TIMER), 11.0))
    assert (worker.life, actions, worker.restarts) == (Life.SPAWNED, (Action.SPAWN,), 1)


def test_a_loss_that_is_somebody_elses_fault_costs_no_budget() -> None:
    worker = ready()
    for now in range(10):
        worker, _ = run(
            worker,
            (Notice(Happening.LOSS, "HUNG", excused=True), float(now)),
            (Notice(Happening.GONE), float(now)),
        )
        assert (worker.life, worker.losses, worker.lost) == (Life.BACKOFF, (), now + 1)
        assert worker.wake_at == pytest.approx(now + 0.75), "and does not grow"
        worker = replace(worker, life=Life.READY, wake_at=None)
    worker, _ = run(worker, (Notice(Happening.LOSS), 11.0), (Notice(Happening.GONE), 11.0))
    assert worker.losses == (11.0,), "the next one is its own"


def test_one_that_leaves_before_it_is_ready_is_lost() -> None:
    worker, _ = run(State(), (Notice(Happening.START), 0.0))
    worker, actions = run(worker, (Notice(Happening.LEFT), 1.0))
    assert (worker.life, actions, worker.reason) == (Life.LOST, (Action.KILL,), "EXITED")
    worker, _ = run(worker, (Notice(Happening.GONE), 1.0))
    assert worker.life is Life.BACKOFF
    assert len(worker.losses) == worker.lost == 1


def test_one_that_drains_says_so_and_nothing_changes() -> None:
    worker, _ = run(ready(), (Notice(Happening.STOP), 0.0))
    assert run(worker, (Notice(Happening.LEFT), 1.0)) == (worker, ())


def test_the_time_to_start_begins_when_somebody_attaches() -> None:
    outside = replace(POLICY, attaches=True)
    worker, _ = restart.step(State(), Notice(Happening.START), 0.0, outside, half)
    assert (worker.life, worker.wake_at) == (Life.SPAWNED, None), "for the outside to do"
    worker, _ = restart.step(worker, Notice(Happening.ATTACHED), 1e6, outside, half)
    assert worker.wake_at == 1e6 + POLICY.start_timeout_s
    worker, _ = restart.step(worker, Notice(Happening.HELLO), 1e6, outside, half)
    worker, actions = restart.step(worker, Notice(Happening.TIMER), 1e6 + 20.0, outside, half)
    assert (actions, worker.reason) == ((Action.KILL,), "START_TIMEOUT")


@pytest.mark.parametrize(
    ("state", "when", "can"),
    [
        (State(Life.READY), 0.0, True),
        (State(Life.SPAWNED, wake_at=9.0), 1.0, True),
        (State(Life.LOST), 1.0, True),
        (State(Life.BACKOFF, wake_at=9.0), 9.5, True),
        (State(Life.BACKOFF, wake_at=9.0), 8.5, False),
        (State(Life.QUARANTINED, wake_at=9.0), 8.5, False),
        (State(Life.EXITED), 1e9, False),
    ],
)
def test_who_may_be_back_in_time(state: State, when: float, can: bool) -> None:
    assert restart.can_be_ready_by(state, when) is can


def test_start_has_a_deadline() -> None:
    worker, _ = run(State(), (Notice(Happening.START), 0.0))
    worker, _ = run(worker, (Notice(Happening.HELLO), 1.0), (Notice(Happening.TIMER), 19.9))
    assert worker.life is Life.LOADING
    worker, actions = run(worker, (Notice(Happening.TIMER), 20.0))
    assert (worker.life, actions, worker.reason) == (
        Life.LOST,
        (Action.KILL,),
        "START_TIMEOUT",
    )


def test_restart_drains_and_comes_back_without_a_loss() -> None:
    worker, actions = run(ready(), (Notice(Happening.RESTART), 1.0))
    assert (worker.life, actions) == (Life.DRAINING, (Action.DRAIN,))
    worker, actions = run(worker, (Notice(Happening.GONE), 2.0))
    assert (worker.life, actions) == (Life.SPAWNED, (Action.SPAWN,))
    assert (worker.losses, worker.restarts) == ((), 1)


def test_a_drain_that_hangs_is_killed() -> None:
    worker, _ = run(ready(), (Notice(Happening.STOP), 0.0))
    worker, actions = run(worker, (Notice(Happening.TIMER), 31.0))
    assert (worker.life, actions) == (Life.DRAINING, (Action.KILL,))
    worker, _ = run(worker, (Notice(Happening.GONE), 32.0))
    assert worker.life is Life.EXITED


def test_stop_ends_a_quarantine_and_restart_shortens_it() -> None:
    quarantined = State(life=Life.QUARANTINED, wake_at=99.0, losses=(1.0, 2.0, 3.0))
    worker, actions = run(quarantined, (Notice(Happening.STOP), 5.0))
    assert (worker.life, worker.wake_at, actions) == (Life.EXITED, None, ())
    worker, actions = run(quarantined, (Notice(Happening.RESTART), 5.0))
    assert (worker.life, worker.losses, actions) == (Life.SPAWNED, (), (Action.SPAWN,))


NOTICES = st.builds(Notice, st.sampled_from(Happening), st.sampled_from(["EXITED", "HUNG"]))


@given(st.lists(st.tuples(NOTICES, st.floats(0.0, 30.0)), max_size=60), st.floats(0.0, 0.999))
def test_whatever_happens_the_owner_is_never_left_without_a_next_step(
    script: list[tuple[Notice, float]], noise: float
) -> None:
    now = 0.0
    worker, actions = run(State(), (Notice(Happening.START), now))
    processes = actions.count(Action.SPAWN)
    stopped = False
    for notice, pause in script:
        now += pause
        if notice.what is Happening.GONE and processes == 0:
            continue  # a process that does not exist is not reaped
        before = worker
        worker, actions = restart.step(worker, notice, now, POLICY, lambda: noise)
        if notice.what is Happening.GONE:
            # Nobody reaps a process that was not drained or killed.
            processes -= before.life in (Life.DRAINING, Life.LOST)
        processes += actions.count(Action.SPAWN)
        assert 0 <= processes <= 1, "never two processes of one worker, none reaped twice"
        assert worker.lost - before.lost == (
            before.life in restart.ALIVE
            and Action.KILL in actions
            and worker.wake_at is None
            and (worker.life is Life.LOST or notice.what is Happening.LOSS)
        )
        assert (processes == 1) == (worker.life not in restart.WAITING | {Life.EXITED})
        if worker.life in restart.WAITING | restart.STARTING:
            assert worker.wake_at is not None, "it would wait for ever"
        if worker.life in restart.WAITING and before.life not in restart.WAITING:
            assert worker.wake_at is not None
            assert now < worker.wake_at <= now + POLICY.quarantine_s
        assert len(worker.losses) <= POLICY.limit
        if notice.what is Happening.STOP:
            stopped = True
        elif notice.what is Happening.START and worker.life is Life.SPAWNED:
            stopped = False
        assert not (stopped and Action.SPAWN in actions), "a stopped worker does not come back"
