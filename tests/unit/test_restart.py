"""The life of a worker as a pure function."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facelane_server.pools import restart
from facelane_server.pools.restart import Action, Event, Happening, Life, Policy, Worker

POLICY = Policy(
    limit=3, window_s=100.0, initial_s=1.0, max_s=8.0, quarantine_s=50.0, start_timeout_s=20.0
)


def half() -> float:
    return 0.5


def run(worker: Worker, *events: tuple[Event, float]) -> tuple[Worker, tuple[Action, ...]]:
    actions: tuple[Action, ...] = ()
    for event, now in events:
        worker, actions = restart.step(worker, event, now, POLICY, half)
    return worker, actions


def ready(now: float = 0.0) -> Worker:
    worker, actions = restart.start(Worker(), now, POLICY)
    assert actions == (Action.SPAWN,)
    worker, actions = run(
        worker,
        (Event(Happening.HELLO), now),
        (Event(Happening.WARMING), now),
        (Event(Happening.READY), now),
    )
    assert actions == (Action.JOIN,)
    return worker


def test_a_life_without_trouble() -> None:
    worker = ready()
    assert worker.life is Life.READY
    assert worker.wake_at is None
    worker, actions = run(worker, (Event(Happening.STOP), 5.0))
    assert (worker.life, actions) == (Life.DRAINING, (Action.LEAVE, Action.DRAIN))
    worker, actions = run(worker, (Event(Happening.GONE, clean=True), 6.0))
    assert (worker.life, actions, worker.losses) == (Life.EXITED, (), ())


def test_a_loss_leaves_at_once_and_waits_until_the_process_is_reaped() -> None:
    worker, actions = run(ready(), (Event(Happening.LOSS, "HUNG"), 1.0))
    assert (worker.life, actions) == (Life.LOST, (Action.LEAVE, Action.KILL))
    assert worker.wake_at is None
    worker, actions = run(worker, (Event(Happening.GONE, "HUNG"), 3.0))
    assert (worker.life, actions) == (Life.BACKOFF, ())
    assert worker.wake_at == pytest.approx(3.0 + 0.75)
    assert worker.reason == "HUNG"


def test_back_off_doubles_and_ends_in_quarantine_with_one_try_after_it() -> None:
    worker = ready()
    waits = []
    now = 0.0
    for _ in range(3):
        worker, _ = run(
            worker, (Event(Happening.LOSS, "EXITED"), now), (Event(Happening.GONE), now)
        )
        assert worker.wake_at is not None
        waits.append(worker.wake_at - now)
        now = worker.wake_at
        if worker.life is Life.QUARANTINED:
            break
        worker, actions = run(worker, (Event(Happening.TIMER), now))
        assert actions == (Action.SPAWN,)
        worker = replace(worker, life=Life.READY, wake_at=None)
    assert waits == pytest.approx([0.75, 1.5, 50.0])
    assert worker.life is Life.QUARANTINED
    worker, actions = run(worker, (Event(Happening.TIMER), now))
    assert (worker.life, actions) == (Life.SPAWNED, (Action.SPAWN,))
    worker, _ = run(
        worker, (Event(Happening.LOSS, "LOAD_FAILED"), now), (Event(Happening.GONE), now)
    )
    assert worker.life is Life.QUARANTINED


def test_a_limit_that_is_never_reached_is_one_too() -> None:
    endless = replace(POLICY, limit=100_000, window_s=1e6)
    worker = replace(ready(), losses=tuple(float(n) for n in range(2_000)))
    worker, _ = restart.step(worker, Event(Happening.LOSS, "EXITED"), 2_000.0, endless, half)
    worker, _ = restart.step(worker, Event(Happening.GONE), 2_000.0, endless, half)
    assert (worker.life, worker.wake_at) == (Life.BACKOFF, 2_000.0 + 0.75 * endless.max_s)


def test_old_losses_are_forgiven() -> None:
    worker = ready()
    for now in (0.0, 101.0, 202.0, 303.0, 404.0):
        worker, _ = run(worker, (Event(Happening.LOSS), now), (Event(Happening.GONE), now))
        assert worker.life is Life.BACKOFF
        worker = replace(worker, life=Life.READY, wake_at=None)


def test_a_clean_exit_is_no_crash() -> None:
    worker, actions = run(ready(), (Event(Happening.GONE, "LEFT", clean=True), 9.0))
    assert (worker.life, actions, worker.losses) == (Life.BACKOFF, (Action.LEAVE,), ())


def test_a_clean_exit_before_ready_is_one() -> None:
    worker, _ = restart.start(Worker(), 0.0, POLICY)
    worker, _ = run(worker, (Event(Happening.GONE, "EXITED", clean=True), 1.0))
    assert worker.life is Life.BACKOFF
    assert len(worker.losses) == 1


def test_start_has_a_deadline() -> None:
    worker, _ = restart.start(Worker(), 0.0, POLICY)
    worker, _ = run(worker, (Event(Happening.HELLO), 1.0), (Event(Happening.TIMER), 19.9))
    assert worker.life is Life.LOADING
    worker, actions = run(worker, (Event(Happening.TIMER), 20.0))
    assert (worker.life, actions, worker.reason) == (
        Life.LOST,
        (Action.KILL,),
        "START_TIMEOUT",
    )


def test_restart_drains_and_comes_back_without_a_loss() -> None:
    worker, actions = run(ready(), (Event(Happening.RESTART), 1.0))
    assert (worker.life, actions) == (Life.DRAINING, (Action.LEAVE, Action.DRAIN))
    worker, actions = run(worker, (Event(Happening.GONE, clean=True), 2.0))
    assert (worker.life, actions) == (Life.SPAWNED, (Action.SPAWN,))
    assert (worker.losses, worker.restarts) == ((), 1)


def test_a_drain_that_hangs_is_killed() -> None:
    worker, _ = run(ready(), (Event(Happening.STOP), 0.0))
    worker, actions = run(worker, (Event(Happening.TIMER), 31.0))
    assert (worker.life, actions) == (Life.DRAINING, (Action.KILL,))
    worker, _ = run(worker, (Event(Happening.GONE), 32.0))
    assert worker.life is Life.EXITED


def test_stop_ends_a_quarantine_and_restart_shortens_it() -> None:
    quarantined = Worker(life=Life.QUARANTINED, wake_at=99.0, losses=(1.0, 2.0, 3.0))
    worker, actions = run(quarantined, (Event(Happening.STOP), 5.0))
    assert (worker.life, worker.wake_at, actions) == (Life.EXITED, None, ())
    worker, actions = run(quarantined, (Event(Happening.RESTART), 5.0))
    assert (worker.life, worker.losses, actions) == (Life.SPAWNED, (), (Action.SPAWN,))


EVENTS = st.builds(
    Event, st.sampled_from(Happening), st.sampled_from(["EXITED", "HUNG"]), st.booleans()
)


@given(st.lists(st.tuples(EVENTS, st.floats(0.0, 30.0)), max_size=60), st.floats(0.0, 0.999))
def test_whatever_happens_the_owner_is_never_left_without_a_next_step(
    script: list[tuple[Event, float]], noise: float
) -> None:
    now = 0.0
    worker, actions = restart.start(Worker(), now, POLICY)
    processes = actions.count(Action.SPAWN)
    joined = False
    stopped = False
    for event, pause in script:
        now += pause
        if event.what is Happening.GONE and processes == 0:
            continue  # a process that does not exist is not reaped
        before = worker
        worker, actions = restart.step(worker, event, now, POLICY, lambda: noise)
        if event.what is Happening.GONE:
            processes -= 1
        processes += actions.count(Action.SPAWN)
        assert 0 <= processes <= 1, "never two processes of one worker, none reaped twice"
        for action in actions:
            if action is Action.JOIN:
                assert not joined
                joined = True
            elif action is Action.LEAVE:
                assert joined
                joined = False
        assert joined == (worker.life is Life.READY), "only a ready worker takes jobs"
        assert (processes == 1) == (worker.life not in restart.WAITING | {Life.EXITED})
        if worker.life in restart.WAITING | restart.STARTING:
            assert worker.wake_at is not None, "it would wait for ever"
        if worker.life in restart.WAITING and before.life not in restart.WAITING:
            assert worker.wake_at is not None
            assert now < worker.wake_at <= now + POLICY.quarantine_s
        assert len(worker.losses) <= POLICY.limit
        if event.what is Happening.STOP:
            stopped = True
        elif event.what is Happening.RESTART and worker.life is Life.SPAWNED:
            stopped = False
        if stopped and Action.SPAWN in actions:
            assert event.what is Happening.RESTART, "a stopped worker does not come back by itself"
