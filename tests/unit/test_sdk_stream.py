"""The stream's state machine: what holds whatever the server does."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from facelane import errors, types
from facelane.stream import HALF_CLOSE, STEADY, Message, Obstacle, Phase, StreamCore

RESULT = types.FrameResult(640, 480, ())
LOST = errors.ConnectionLostError("CONNECTION_LOST", "gone")
FOREVER = types.Reconnect(jitter=0.0)
NOW = 1.0


def opened(window: int = 4, max_frame_bytes: int = 0) -> types.StreamOpened:
    return types.StreamOpened("s", types.StreamLimits(window, max_frame_bytes))


def core(
    *,
    window: int = 4,
    buffer: int = 16,
    reconnect: types.Reconnect | None = None,
    is_open: bool = True,
    max_frame_bytes: int = 0,
) -> StreamCore[int]:
    made: StreamCore[int] = StreamCore(
        now=0.0, reconnect=reconnect, buffer=buffer, random_unit=lambda: 0.5
    )
    if is_open:
        made.receive(opened(window, max_frame_bytes), 0.0)
    return made


def submit(
    stream: StreamCore[int],
    now: float = 1.0,
    size: int = 1,
    *,
    write: bool = True,
    **more: float,
) -> int:
    """Submits a frame, and writes it unless told not to."""
    number = stream.submit(size, lambda number, _offset: number, now=now, **more)  # type: ignore[arg-type]
    if write:
        assert stream.next_payload(NOW) == number
    return number


def outcome(number: int, body: object = RESULT) -> types.Outcome:
    return types.Outcome(number, 0.0, None, body)  # type: ignore[arg-type]


class Life(RuleBasedStateMachine):
    """Any order of sends, answers, breaks and closes; the model is three lists of ids."""

    @initialize(
        window=st.integers(1, 5),
        buffer=st.integers(1, 8),
        reconnect=st.sampled_from([None, FOREVER, types.Reconnect(max_attempts=2, jitter=0)]),
    )
    def start(self, window: int, buffer: int, reconnect: types.Reconnect | None) -> None:
        self.now = 0.0
        self.window = window
        self.core: StreamCore[int] = StreamCore(
            now=0.0, reconnect=reconnect, buffer=buffer, random_unit=lambda: 0.5
        )
        self.buffer = max(buffer, window)
        self.submitted: list[int] = []
        self.written: list[int] = []
        self.taken: list[types.Outcome] = []
        self.counts = [0, 0, 0]

    def tick(self) -> float:
        self.now += 0.001
        return self.now

    @precondition(lambda self: self.core.phase is Phase.CONNECTING)
    @rule()
    def open(self) -> None:
        self.core.receive(opened(self.window), self.tick())
        self.written.clear()
        self.counts = [0, 0, 0]

    @rule(gap=st.integers(1, 3))
    def send(self, gap: int) -> None:
        try:
            obstacle = self.core.obstacle()
        except errors.FacelaneError:
            return
        if obstacle is not None:
            return
        wanted = (self.submitted[-1] if self.submitted else 0) + gap
        number = self.core.submit(1, lambda n, _: n, now=self.tick(), frame_id=wanted)
        assert number == wanted
        self.submitted.append(number)

    @rule()
    def write(self) -> None:
        payload = self.core.next_payload(self.now)
        if isinstance(payload, int):
            self.written.append(payload)

    @precondition(lambda self: self.written)
    @rule(kind=st.integers(0, 2))
    def answer(self, kind: int) -> None:
        bodies = (
            RESULT,
            types.FrameDrop(types.DropReason.SUPERSEDED),
            types.FrameError("PICTURE_CORRUPT", ""),
        )
        self.core.receive(outcome(self.written.pop(0), bodies[kind]), self.tick())
        self.counts[kind] += 1

    @precondition(lambda self: self.core.phase in (Phase.OPEN, Phase.FINISHING))
    @rule()
    def drain(self) -> None:
        self.core.receive(types.StreamUpdate(types.StreamUpdateKind.DRAINING), self.tick())

    @precondition(lambda self: self.core.phase is Phase.FINISHING and not self.written)
    @rule()
    def sum_up(self) -> None:
        r, d, e = self.counts
        self.core.receive(types.StreamSummary(r + d + e, r, d, e), self.tick())
        self.core.disconnected(None, self.tick())

    @precondition(lambda self: self.core.live)
    @rule(retryable=st.booleans())
    def break_connection(self, retryable: bool) -> None:
        error = LOST if retryable else errors.PermissionDeniedError("PERMISSION_DENIED", "no")
        self.core.disconnected(error, self.tick())
        self.written.clear()

    @precondition(lambda self: self.core.phase is Phase.BACKOFF)
    @rule()
    def retry(self) -> None:
        assert self.core.retry_at > self.now
        self.now = self.core.retry_at
        self.core.connecting(self.now)

    @rule()
    def take(self) -> None:
        found = self.core.take()
        if found is not None:
            self.taken.append(found)

    @rule()
    def close_send(self) -> None:
        self.core.close_send()

    @precondition(lambda self: len(self.submitted) > 6)
    @rule()
    def abort(self) -> None:
        self.core.abort()
        self.written.clear()

    @invariant()
    def one_outcome_each_in_order(self) -> None:
        ids = [o.frame_id for o in self.taken]
        assert ids == self.submitted[: len(ids)]

    @invariant()
    def bounded(self) -> None:
        summary = self.core.summary()
        in_flight = len(self.submitted) - summary.received
        unread = summary.received - len(self.taken)
        assert 0 <= in_flight <= self.window
        assert unread + in_flight <= self.buffer

    @invariant()
    def accounts(self) -> None:
        s = self.core.summary()
        assert s.received == s.results + s.drops + s.errors
        assert s.drops == sum(s.drops_by_reason.values())
        assert s.lost <= s.errors

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        self.core.abort()
        while (found := self.core.take()) is not None:
            self.taken.append(found)
        self.one_outcome_each_in_order()
        assert len(self.taken) == len(self.submitted)
        assert self.core.exhausted


class TestLife(Life.TestCase):
    settings = settings(max_examples=50, stateful_step_count=40)


@pytest.mark.slow
class TestManyLives(Life.TestCase):
    settings = settings(max_examples=150, stateful_step_count=40)


def test_frames_are_numbered_and_dated_by_themselves() -> None:
    stream = core()
    seen: list[tuple[int, float]] = []
    for now in (1.0, 2.5):
        stream.submit(1, lambda n, offset: seen.append((n, offset)) or n, now=now)  # type: ignore[func-returns-value]
    assert seen == [(1, 1.0), (2, 2.5)]


def test_window_then_buffer_hold_the_sender_back() -> None:
    stream = core(window=2, buffer=3)
    submit(stream)
    submit(stream)
    assert stream.obstacle() is Obstacle.WINDOW
    for number in (1, 2):
        stream.receive(outcome(number), 2.0)
    submit(stream)
    assert stream.obstacle() is Obstacle.UNREAD
    stream.take()
    assert stream.obstacle() is None


def test_a_frame_beyond_the_limit_is_refused_and_takes_no_id() -> None:
    stream = core(max_frame_bytes=100)
    with pytest.raises(errors.PictureError) as caught:
        submit(stream, size=101)
    assert caught.value.reason == "PICTURE_TOO_LARGE"
    assert submit(stream, size=100) == 1


@pytest.mark.parametrize("number", [0, 5, 4, 1 << 64])
def test_ids_must_increase(number: int) -> None:
    stream = core()
    submit(stream, frame_id=5)
    with pytest.raises(errors.ArgumentError) as caught:
        submit(stream, frame_id=number)
    assert caught.value.reason == "FRAME_ID_NOT_INCREASING"
    assert submit(stream) == 6


def test_media_time_must_not_go_back() -> None:
    stream = core()
    submit(stream, stream_offset=3.0)
    with pytest.raises(errors.ArgumentError, match="must not go back"):
        submit(stream, stream_offset=2.9)
    # A frame without one never precedes one with one.
    offsets: list[float] = []
    stream.submit(1, lambda _n, offset: offsets.append(offset) or 0, now=1.0)  # type: ignore[func-returns-value]
    assert offsets == [3.0]


def test_a_builder_that_raises_leaves_no_trace() -> None:
    stream = core()

    def explode(_number: int, _offset: float) -> int:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        stream.submit(1, explode, now=1.0)
    assert submit(stream) == 1
    assert stream.next_payload(NOW) is None


@pytest.mark.parametrize(
    "said",
    [
        [outcome(2)],
        [outcome(1), outcome(1)],
        [outcome(9)],
        [opened()],
        [types.StreamSummary(received=1, results=1)],
        [outcome(1), types.StreamSummary(received=2, results=1, drops=1)],
        [outcome(1), types.StreamSummary(received=2, results=1)],
    ],
    ids=["skipped", "twice", "invented", "opened twice", "early sum", "wrong sum", "odd sum"],
)
def test_a_server_that_breaks_the_rules_is_told_so(said: list[Message]) -> None:
    stream = core()
    submit(stream)
    submit(stream)
    for message in said[:-1]:
        stream.receive(message, 2.0)
    with pytest.raises(errors.ProtocolError):
        stream.receive(said[-1], 2.0)


def test_an_outcome_before_its_frame_was_written_breaks_the_rules() -> None:
    stream = core()
    submit(stream, write=False)
    with pytest.raises(errors.ProtocolError, match="before its receipt"):
        stream.receive(outcome(1), 2.0)


def test_nothing_but_opened_may_come_first() -> None:
    for message in (outcome(1), types.StreamSummary()):
        with pytest.raises(errors.ProtocolError):
            core(is_open=False).receive(message, 1.0)


def test_unknown_messages_are_passed_over() -> None:
    assert core().receive(None, 1.0) is None


def test_round_trip_is_from_send_to_arrival() -> None:
    stream = core()
    submit(stream, now=2.0)
    stream.receive(outcome(1), 2.25)
    taken = stream.take()
    assert taken is not None
    assert taken.round_trip == pytest.approx(0.25)


def test_frames_in_flight_are_lost_with_the_connection() -> None:
    stream = core(reconnect=FOREVER)
    for _ in range(3):
        submit(stream)
    stream.receive(outcome(1), 2.0)
    update = stream.disconnected(LOST, 3.0)
    assert update is not None
    assert update.kind is types.StreamUpdateKind.CONNECTION_LOST
    bodies = [taken.body for taken in iter(stream.take, None)]
    assert bodies[0] == RESULT
    assert all(
        isinstance(b, types.FrameError) and b.reason == "CONNECTION_LOST" and b.retryable
        for b in bodies[1:]
    )
    assert len(bodies) == 3
    assert stream.obstacle() is Obstacle.NOT_CONNECTED
    stream.connecting(stream.retry_at)
    again = stream.receive(opened(), 4.0)
    assert again is not None
    assert again.kind is types.StreamUpdateKind.RECONNECTED
    assert submit(stream, now=5.0) == 4
    assert stream.summary().lost == 2
    assert stream.summary().connections == 2


def test_back_off_grows_up_to_its_bound_and_resets_on_an_outcome() -> None:
    policy = types.Reconnect(initial_delay=1.0, max_delay=5.0, jitter=0.0)
    stream = core(reconnect=policy)
    delays = []
    now = 0.0
    for _ in range(5):
        stream.disconnected(LOST, now)
        delays.append(stream.retry_at - now)
        now = stream.retry_at
        stream.connecting(now)
        # Being opened is no progress: a server that dies of every stream is given time.
        stream.receive(opened(), now)
    assert delays == [1.0, 2.0, 4.0, 5.0, 5.0]
    submit(stream, now=now)
    stream.receive(outcome(1), now)
    now += STEADY
    stream.disconnected(LOST, now)
    assert stream.retry_at - now == 1.0


def test_what_breaks_within_a_second_backs_off_although_it_brought_outcomes() -> None:
    """A proxy that ends every stream at its first megabyte is not knocked at five times a
    second; and yet it is no failure in a row that ``max_attempts`` counts."""
    policy = types.Reconnect(max_attempts=2, initial_delay=1.0, max_delay=5.0, jitter=0.0)
    stream = core(reconnect=policy, is_open=False)
    delays, now = [], 0.0
    for number in range(1, 6):
        stream.connecting(now)
        stream.receive(opened(), now)
        submit(stream, now=now)
        stream.receive(outcome(number), now)
        now += STEADY / 2
        stream.disconnected(LOST, now)
        delays.append(stream.retry_at - now)
        now = stream.retry_at
    assert delays == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_token_that_was_renewed_is_tried_once_and_at_once() -> None:
    refused = errors.AuthenticationError("UNAUTHENTICATED", "who?")
    stream = core(is_open=False)
    stream.connecting(1.0)
    stream.disconnected(refused, 2.0, renewed=True)
    assert (stream.phase, stream.retry_at) == (Phase.BACKOFF, 2.0)
    stream.connecting(2.0)
    stream.disconnected(refused, 3.0, renewed=True)
    assert (stream.phase, stream.error) == (Phase.ENDED, refused)


@pytest.mark.parametrize("reconnect", [None, types.Reconnect()])
def test_an_open_stream_whose_token_ends_comes_back_only_if_it_may(
    reconnect: types.Reconnect | None,
) -> None:
    refused = errors.AuthenticationError("UNAUTHENTICATED", "who?")
    stream = core(reconnect=reconnect, is_open=False)
    stream.connecting(1.0)
    stream.receive(opened(), 1.0)
    submit(stream, now=1.0)
    stream.disconnected(refused, 9.0, renewed=True)
    lost = stream.take()
    assert lost is not None
    assert lost.error is not None
    assert lost.error.reason == "CONNECTION_LOST"
    assert stream.phase is (Phase.ENDED if reconnect is None else Phase.BACKOFF)
    assert stream.error is (refused if reconnect is None else None)


def test_jitter_stays_within_its_share() -> None:
    policy = types.Reconnect(initial_delay=1.0, max_delay=8.0, jitter=0.25)
    assert policy.delay(1, 0.0) == 0.75
    assert policy.delay(1, 1.0) == 1.25
    assert policy.delay(100_000, 0.5) == 8.0


@pytest.mark.parametrize(
    "bad",
    [
        {"max_attempts": -1},
        {"initial_delay": 0},
        {"initial_delay": 20.0},
        {"multiplier": 0.5},
        {"jitter": 1.0},
    ],
)
def test_a_back_off_that_makes_no_sense_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="are needed"):
        types.Reconnect(**bad)  # type: ignore[arg-type]


def test_attempts_are_bounded() -> None:
    stream = core(reconnect=types.Reconnect(max_attempts=2), is_open=False)
    for _ in range(2):
        stream.disconnected(LOST, 1.0)
        assert stream.phase is Phase.BACKOFF
        stream.connecting(stream.retry_at)
    stream.disconnected(LOST, 9.0)
    assert stream.phase is Phase.ENDED
    assert stream.error is LOST


def test_what_cannot_pass_is_not_tried_again() -> None:
    stream = core(reconnect=FOREVER, is_open=False)
    refused = errors.AuthenticationError("UNAUTHENTICATED", "no")
    stream.disconnected(refused, 1.0)
    assert stream.error is refused
    with pytest.raises(errors.AuthenticationError):
        stream.obstacle()


@pytest.mark.parametrize("code", ["CANCELLED", "INTERNAL", "UNKNOWN", "UNAVAILABLE"])
def test_grpc_s_words_for_a_dead_connection_are_one_error(code: str) -> None:
    stream = core()
    stream.disconnected(errors.ServerError("X", "", metadata={"grpc_status": code}), 1.0)
    assert isinstance(stream.error, errors.ConnectionLostError)
    assert stream.error.retryable


def test_an_end_without_a_summary_is_a_broken_connection() -> None:
    stream = core()
    stream.disconnected(None, 1.0)
    assert isinstance(stream.error, errors.ConnectionLostError)


def test_draining_with_reconnect_finishes_and_comes_back() -> None:
    stream = core(reconnect=FOREVER)
    submit(stream, write=False)
    stream.receive(types.StreamUpdate(types.StreamUpdateKind.DRAINING), 1.0)
    assert stream.obstacle() is Obstacle.NOT_CONNECTED
    assert stream.next_payload(NOW) == 1
    assert stream.next_payload(NOW) is HALF_CLOSE
    stream.receive(outcome(1), 1.1)
    stream.receive(types.StreamSummary(received=1, results=1, tracks=2), 1.2)
    assert stream.disconnected(None, 1.3) is None
    assert stream.phase is Phase.BACKOFF
    assert stream.summary().lost == 0
    assert stream.summary().tracks == 2


def test_draining_without_reconnect_is_only_told() -> None:
    stream = core()
    update = stream.receive(types.StreamUpdate(types.StreamUpdateKind.DRAINING), 1.0)
    assert update is stream.updates[0]
    assert stream.obstacle() is None


def test_a_server_that_sums_up_and_then_says_draining_has_settled_a_closed_stream() -> None:
    stream = core()
    submit(stream)
    stream.close_send()
    assert stream.next_payload(NOW) is HALF_CLOSE
    stream.receive(outcome(1), 1.0)
    stream.receive(types.StreamSummary(received=1, results=1), 1.0)
    stream.disconnected(errors.UnavailableError("DRAINING", "bye"), 1.1)
    assert stream.error is None


def test_closing_while_backing_off_ends_the_stream() -> None:
    stream = core(reconnect=FOREVER)
    stream.disconnected(LOST, 1.0)
    stream.close_send()
    assert stream.exhausted
    with pytest.raises(errors.StreamClosedError):
        stream.obstacle()


def test_abort_settles_as_cancelled_and_again_is_harmless() -> None:
    stream = core()
    submit(stream)
    stream.abort()
    stream.abort()
    taken = stream.take()
    assert taken is not None
    assert taken.error is not None
    assert taken.error.reason == "CANCELLED"
    assert not taken.error.retryable
    assert stream.summary().lost == 0
    assert stream.disconnected(LOST, 2.0) is None


def test_overdue() -> None:
    stream: StreamCore[int] = StreamCore(now=0.0, stall_timeout=5.0, connect_timeout=2.0)
    assert stream.overdue(1.9) is None
    late = stream.overdue(2.0)
    assert isinstance(late, errors.UnavailableError)
    stream.receive(opened(), 1.0)
    # Nothing in flight: a camera may rest as long as it likes.
    assert stream.overdue_at() is None
    submit(stream, now=50.0)
    assert stream.overdue(54.9) is None
    assert isinstance(stream.overdue(55.0), errors.ConnectionLostError)
    stream.receive(outcome(1), 54.0)
    stream.close_send()
    assert stream.next_payload(NOW) is HALF_CLOSE
    assert stream.overdue(58.9) is None
    assert isinstance(stream.overdue(59.0), errors.ConnectionLostError)


def test_a_camera_that_rested_leaves_the_server_its_time_to_sum_up() -> None:
    stream: StreamCore[int] = StreamCore(now=0.0, stall_timeout=5.0)
    stream.receive(opened(), 1.0)
    submit(stream, now=1.0)
    stream.receive(outcome(1), 2.0)
    stream.close_send()
    assert stream.next_payload(100.0) is HALF_CLOSE
    assert stream.overdue(104.9) is None
    assert isinstance(stream.overdue(105.0), errors.ConnectionLostError)


@pytest.mark.parametrize("bad", [{"buffer": 0}, {"stall_timeout": 0.0}])
def test_options_that_make_no_sense_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(errors.ArgumentError):
        StreamCore(now=0.0, **bad)  # type: ignore[arg-type]


def test_updates_are_bounded() -> None:
    stream = core()
    for number in range(1000):
        stream.receive(types.StreamUpdate(types.StreamUpdateKind.TRACK_ENDED, track_id=number), 1.0)
    assert len(stream.updates) == 256
    assert stream.updates[-1].track_id == 999
