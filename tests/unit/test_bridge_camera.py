"""A camera's state machine: its table, its patience, its back-off."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facelane_bridge.camera import (
    TRANSITIONS,
    Action,
    Camera,
    CameraState,
    Event,
    FrameArrived,
    HeldBack,
    Outlook,
    Policy,
    SourceEnded,
    SourceFailed,
    Stop,
    Tick,
    backoff_delay,
    deadline,
    start,
    step,
)

POLICY = Policy(open_timeout=10, stall_after=5, stall_limit=15, backoff_initial=1, backoff_max=30)


SOME: list[Event] = [FrameArrived(0, index / 100) for index in range(4)]


def run(events: list[Event], policy: Policy = POLICY, jitter: float = 1.0) -> Camera:
    camera, _ = start(0.0)
    for event in events:
        camera, _ = step(camera, event, policy, jitter)
    return camera


def test_starts_by_opening() -> None:
    camera, actions = start(5.0)
    assert camera.state is CameraState.CONNECTING
    assert actions == (Action.OPEN,)
    assert deadline(camera, POLICY) == 15.0


def test_the_first_frame_makes_it_stream() -> None:
    camera = run([FrameArrived(1.0, 0.0)])
    assert camera.state is CameraState.STREAMING
    assert deadline(camera, POLICY) == 13.0, "how far frames are apart is not known yet"
    for moment in (1.1, 1.2, 1.5):
        camera, _ = step(camera, FrameArrived(moment, moment), POLICY, 1.0)
    assert deadline(camera, POLICY) == 6.5


def test_no_frame_in_time_is_a_failed_attempt() -> None:
    camera, _ = start(0.0)
    camera, actions = step(camera, Tick(9.9), POLICY, 1.0)
    assert (camera.state, actions) == (CameraState.CONNECTING, ())
    camera, actions = step(camera, Tick(10.0), POLICY, 1.0)
    assert camera.state is CameraState.BACKOFF
    assert camera.reason == "OPEN_TIMEOUT"
    assert actions == (Action.CLOSE,)
    assert camera.retry_at == 11.0
    camera, actions = step(camera, Tick(11.0), POLICY, 1.0)
    assert (camera.state, actions) == (CameraState.CONNECTING, (Action.OPEN,))
    assert camera.openings == 2


def test_a_frozen_media_clock_stalls_although_frames_arrive() -> None:
    events: list[Event] = [FrameArrived(0.0, 0.0), FrameArrived(1.0, 1.0)]
    events += [FrameArrived(1.0 + i, 1.0) for i in range(1, 5)]
    camera = run([*events, Tick(6.0)])
    assert camera.state is CameraState.STALLED


def test_a_stalled_camera_whose_clock_moves_again_streams_again() -> None:
    camera = run([*SOME, Tick(5.0), FrameArrived(6.0, 0.0)])
    assert camera.state is CameraState.STALLED, "the same timestamp is no sign of life"
    camera, actions = step(camera, FrameArrived(7.0, 0.04), POLICY, 1.0)
    assert (camera.state, actions) == (CameraState.STREAMING, ())


def test_a_camera_stalled_for_too_long_is_opened_again() -> None:
    camera = run([*SOME, Tick(5.0)])
    camera, actions = step(camera, Tick(20.0), POLICY, 0.0)
    assert camera.state is CameraState.BACKOFF
    assert actions == (Action.CLOSE,)
    assert camera.retry_at == 20.5


def test_being_held_back_is_no_stall() -> None:
    camera = run([*SOME, HeldBack(4.0), Tick(8.0)])
    assert camera.state is CameraState.STREAMING
    assert run([*SOME, HeldBack(4.0), Tick(9.0)]).state is CameraState.STALLED


def test_being_held_back_before_any_frame_does_not_extend_the_opening() -> None:
    assert run([HeldBack(9.0), Tick(10.0)]).state is CameraState.BACKOFF


@pytest.mark.parametrize(
    ("outlook", "at_first", "proven"),
    [
        (Outlook.PASSING, "BACKOFF", "BACKOFF"),
        (Outlook.SELDOM, "BACKOFF", "BACKOFF"),
        (Outlook.UNPROVEN, "FAILED", "BACKOFF"),
        (Outlook.REFUSED, "FAILED", "BACKOFF"),
        (Outlook.HOPELESS, "FAILED", "FAILED"),
    ],
)
def test_an_end_is_for_good_by_what_was_before(
    outlook: Outlook, at_first: str, proven: str
) -> None:
    failed = SourceFailed(1.0, "AUTHENTICATION_FAILED", "no", outlook)
    assert run([failed]).state == at_first
    camera = run([FrameArrived(0.5, 0.0), failed])
    assert (camera.state, camera.reason) == (proven, "AUTHENTICATION_FAILED")
    assert camera.is_terminal == (deadline(camera, POLICY) is None)


def test_a_password_that_has_worked_is_sent_again_twice_in_the_first_minutes_and_then_seldom() -> (
    None
):
    refused = SourceFailed(0.0, "AUTHENTICATION_FAILED", "no", Outlook.REFUSED)
    camera = run([FrameArrived(0, 0.0)])
    now, waits = 0.0, []
    for _ in range(7):
        camera, _ = step(camera, replace(refused, now=now), POLICY, 0.0)
        assert camera.retry_at is not None
        waits.append(camera.retry_at - now)
        now = camera.retry_at
        camera, _ = step(camera, Tick(now), POLICY, 0.0)
    assert waits == [0.5, 60, 120, 240, 300, 300, 300]
    camera, _ = step(camera, FrameArrived(now, 0.0), POLICY, 0.0)
    assert camera.refusals == 0


def test_a_camera_that_answers_has_more_time_to_open_and_the_reason_says_what_came() -> None:
    camera, _ = start(0.0)
    camera, _ = step(camera, Tick(10.0, connected=True), POLICY, 1.0)
    assert camera.state is CameraState.CONNECTING
    assert deadline(camera, POLICY) == 25.0
    camera, _ = step(camera, Tick(25.0, True, "packets came, and no key frame"), POLICY, 1.0)
    assert camera.reason == "OPEN_TIMEOUT"
    assert camera.message.endswith("packets came, and no key frame")
    assert "is the camera on" in run([Tick(10.0)]).message


@pytest.mark.parametrize("apart", [1.0, 10.0])
def test_a_slow_camera_is_not_stalled(apart: float) -> None:
    camera, _ = start(0.0)
    for index in range(10):
        due = deadline(camera, POLICY)
        assert due is not None
        assert due > index * apart or index == 0
        camera, _ = step(camera, FrameArrived(index * apart, index * apart), POLICY, 1.0)
    assert camera.state is CameraState.STREAMING
    assert camera.openings == 1
    due = deadline(camera, POLICY)
    assert due is not None
    assert due <= 9 * apart + 25.0


def test_a_camera_that_ends_its_connections_is_not_left_longer_than_it_streamed() -> None:
    events: list[Event] = []
    now = 0.0
    for _ in range(6):
        events += [FrameArrived(now, 0.0), FrameArrived(now + 3, 3.0)]
        events += [SourceFailed(now + 3, "DISCONNECTED", ""), Tick(now + 6.0)]
        now += 6.0
    camera = run([*events, FrameArrived(now, 0.0), SourceFailed(now + 3, "DISCONNECTED", "")])
    assert camera.attempts == 7
    assert camera.retry_at == now + 6


def test_attempts_are_counted_and_spent() -> None:
    policy = Policy(max_attempts=3)
    camera, _ = start(0.0)
    for attempt in range(3):
        assert camera.attempts == attempt
        camera, _ = step(camera, SourceFailed(1.0, "CONNECT_FAILED", ""), policy, 0.5)
        if camera.state is CameraState.BACKOFF:
            camera, _ = step(camera, Tick(camera.retry_at or 0), policy, 0.5)
    assert camera.state is CameraState.FAILED


def test_only_a_camera_that_stays_up_is_forgiven() -> None:
    camera = run(
        [SourceFailed(0, "X", ""), Tick(2.0), FrameArrived(2.0, 0.0), FrameArrived(11.0, 9.0)]
    )
    assert camera.attempts == 1
    camera, _ = step(camera, FrameArrived(12.0, 10.0), POLICY, 1.0)
    assert camera.attempts == 0


def test_a_finite_source_ends() -> None:
    camera = run([FrameArrived(0, 0.0), SourceEnded(1.0)])
    assert (camera.state, camera.reason) == (CameraState.STOPPED, "ENDED")


def test_a_new_opening_has_a_new_media_clock() -> None:
    camera = run([FrameArrived(0, 100.0), SourceFailed(1, "X", ""), Tick(3), FrameArrived(4, 0.0)])
    assert camera.state is CameraState.STREAMING
    assert camera.media_time == 0.0


def test_a_late_word_of_a_reader_that_was_given_up_changes_nothing() -> None:
    camera = run([SourceFailed(0, "X", "")])
    for late in (FrameArrived(0.1, 1.0), SourceFailed(0.1, "Y", ""), SourceEnded(0.1)):
        assert step(camera, late, POLICY, 1.0) == (camera, ())


@pytest.mark.parametrize("terminal", [Stop(1.0), SourceEnded(1.0)])
def test_nothing_wakes_a_camera_that_has_ended(terminal: Event) -> None:
    camera = run([terminal])
    for event in (Tick(1e9), FrameArrived(2, 0), SourceFailed(2, "X", ""), Stop(3), HeldBack(3)):
        assert step(camera, event, POLICY, 1.0) == (camera, ())


def test_stopping_in_back_off_closes_nothing_twice() -> None:
    camera = run([SourceFailed(0, "X", "")])
    camera, actions = step(camera, Stop(0.1), POLICY, 1.0)
    assert (camera.state, actions) == (CameraState.STOPPED, ())


def test_delay_grows_and_is_bounded() -> None:
    assert [backoff_delay(n, POLICY, 1.0) for n in (1, 2, 3, 4, 5, 6, 7)] == [
        1, 2, 4, 8, 16, 30, 30,
    ]  # fmt: skip
    assert backoff_delay(1_000_000, POLICY, 0.0) == 15.0


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_delay_is_between_half_of_its_step_and_the_whole(attempts: int, jitter: float) -> None:
    whole = backoff_delay(attempts, POLICY, 1.0)
    assert whole / 2 <= backoff_delay(attempts, POLICY, jitter) <= whole <= POLICY.backoff_max


@pytest.mark.parametrize(
    "bad",
    [
        {"stall_after": 0},
        {"open_timeout": -1},
        {"backoff_initial": 0},
        {"backoff_initial": 5, "backoff_max": 1},
    ],
)
def test_a_senseless_policy_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Policy(**bad)  # type: ignore[arg-type]


def test_terminal_states_are_those_without_a_way_out() -> None:
    assert {state for state in CameraState if state.is_terminal} == {
        state for state, after in TRANSITIONS.items() if not after
    }
    assert set(TRANSITIONS) == set(CameraState)


EVENTS = st.one_of(
    st.floats(0, 60).map(lambda media: ("frame", media)),
    st.tuples(st.just("fail"), st.integers(0, len(Outlook) - 1)),
    st.just(("tick", 0.0)),
    st.just(("due", 0.0)),
    st.just(("held", 0.0)),
    st.sampled_from([("end", 0.0), ("stop", 0.0)]),
)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(EVENTS, st.floats(0, 20)), max_size=40),
    st.integers(0, 4),
    st.floats(0, 1, exclude_max=True),
)
def test_whatever_happens_the_invariants_hold(
    script: list[tuple[tuple[str, float], float]], max_attempts: int, jitter: float
) -> None:
    policy = Policy(max_attempts=max_attempts)
    camera, actions = start(0.0)
    now, open_sources = 0.0, 1
    assert actions == (Action.OPEN,)
    for (kind, value), gap in script:
        now += gap
        event: Event
        match kind:
            case "frame":
                event = FrameArrived(now, value)
            case "fail":
                event = SourceFailed(now, "X", "", list(Outlook)[int(value)])
            case "due":
                due = deadline(camera, policy)
                now = max(now, due) if due is not None and math.isfinite(due) else now
                event = Tick(now)
            case "held":
                event = HeldBack(now)
            case "end":
                event = SourceEnded(now)
            case "stop":
                event = Stop(now)
            case _:
                event = Tick(now)
        before = camera
        camera, actions = step(camera, event, policy, jitter)
        for action in actions:
            open_sources += 1 if action is Action.OPEN else -1
        # One source at most, and one exactly in the states that have one.
        assert open_sources == (
            1
            if camera.state in (CameraState.CONNECTING, CameraState.STREAMING, CameraState.STALLED)
            else 0
        )
        if camera.state is not before.state:
            assert camera.state in TRANSITIONS[before.state]
            assert camera.since == now
        # No state without a way on: either it is terminal or a tick is due.
        assert camera.is_terminal == (deadline(camera, policy) is None)
        assert max_attempts == 0 or camera.attempts <= max_attempts
        if kind == "due" and not before.is_terminal:
            assert camera.state is not before.state, "a deadline reached has to change something"


@given(jitter=st.floats(0, 1, exclude_max=True), took=st.floats(0, 30), failures=st.integers(0, 9))
def test_an_attempt_that_hung_is_part_of_the_wait(
    jitter: float, took: float, failures: int
) -> None:
    """Attempts are no closer together than before, and a camera that comes back while one hangs
    is not left alone for the whole of the wait as well."""
    policy = Policy()
    camera = replace(start(100.0)[0], attempts=failures)
    failed = SourceFailed(100.0 + took, "TIMEOUT", "no frame", Outlook.PASSING)
    after, _ = step(camera, failed, policy, jitter)
    assert after.retry_at is not None
    delay = backoff_delay(failures + 1, policy, jitter)
    assert after.retry_at >= 100.0 + delay - 1e-9
    assert after.retry_at <= 100.0 + max(delay, took + policy.backoff_initial) + 1e-9
    assert after.retry_at >= failed.now + min(delay, 0.5 * policy.backoff_initial) - 1e-9
