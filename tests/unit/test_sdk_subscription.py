"""The state of a subscription to events, with a clock by hand."""

from __future__ import annotations

import math

import pytest

import facelane
from facelane.subscription import Subscription
from facelane.v1 import event_service_pb2

Response = event_service_pb2.WatchEventsResponse
BROKEN = facelane.UnavailableError("UNREACHABLE", "gone", metadata={"grpc_status": "UNAVAILABLE"})


def made(reconnect: facelane.Reconnect | None = None, token: str = "") -> Subscription:
    return Subscription(token, ["SUBJECT_SEEN"], reconnect, 10.0, lambda: 0.5)


def test_the_time_to_the_first_response_counts_from_the_call() -> None:
    core = made()
    core.call(100.0)
    assert core.patience(100.0, math.inf) == 10.0
    # Whoever waits again has what is left, not all of it anew.
    assert core.patience(107.0, math.inf) == 3.0
    assert core.patience(130.0, math.inf) == 0.0
    assert core.patience(100.0, 104.0) == 4.0
    core.receive(Response(resume_token="r1"))
    assert core.patience(500.0, math.inf) == math.inf
    core.call(600.0)
    assert core.patience(601.0, math.inf) == 9.0


def test_it_goes_on_after_what_arrived() -> None:
    core = made(token="r0")
    assert core.call(0.0).resume_token == "r0"
    core.receive(Response(resume_token="r1"))
    assert not core.inbox
    event = event_service_pb2.Event(sequence=7)
    core.receive(Response(resume_token="r2", event=event))
    assert [e.sequence for e in core.inbox] == [7]
    # A response without a token takes none away.
    core.receive(Response(event=event))
    assert core.resume_token == core.call(1.0).resume_token == "r2"


def test_without_reconnect_an_end_is_an_error() -> None:
    core = made()
    with pytest.raises(facelane.UnavailableError) as ended:
        core.failed(None, 0.0, math.inf)
    assert ended.value.reason == "DRAINING"
    core.receive(Response(resume_token="r1"))
    with pytest.raises(facelane.ConnectionLostError):
        core.failed(BROKEN, 0.0, math.inf)
    with pytest.raises(facelane.DeadlineExceededError, match="within 10 s"):
        core.failed(core.never_began(), 0.0, math.inf)


def test_tries_are_spread_counted_and_forgotten() -> None:
    policy = facelane.Reconnect(max_attempts=2, initial_delay=1.0, jitter=0.0)
    core = made(policy)
    assert core.failed(BROKEN, 0.0, math.inf) == 1.0
    assert core.failed(BROKEN, 0.0, math.inf) == 2.0
    with pytest.raises(facelane.UnavailableError):
        core.failed(BROKEN, 0.0, math.inf)
    core.receive(Response(resume_token="r1", event=event_service_pb2.Event(sequence=7)))
    assert core.failed(BROKEN, 0.0, math.inf) == 1.0
    # Nothing is due before the deadline: the caller's, not the stream's, end.
    assert core.failed(BROKEN, 0.0, 1.5) is None
    refused = facelane.PermissionDeniedError("PERMISSION_DENIED", "no")
    with pytest.raises(facelane.PermissionDeniedError):
        core.failed(refused, 0.0, math.inf)


def test_what_begins_and_breaks_at_once_backs_off_and_is_given_up() -> None:
    """As a proxy does that will not have long calls: it begins each time, and tells of nothing."""
    policy = facelane.Reconnect(max_attempts=3, initial_delay=1.0, jitter=0.0)
    core = made(policy)
    waits = []
    for _ in range(3):
        core.call(0.0)
        core.receive(Response(resume_token="r1"))
        waits.append(core.failed(BROKEN, 0.5, math.inf))
    assert waits == [1.0, 2.0, 4.0]
    core.call(0.0)
    core.receive(Response(resume_token="r1"))
    with pytest.raises(facelane.ConnectionLostError):
        core.failed(BROKEN, 0.5, math.inf)
    # One that held for a while was a connection, though nothing happened.
    core.call(0.0)
    core.receive(Response(resume_token="r1"))
    assert core.failed(BROKEN, 3600.0, math.inf) == 1.0
