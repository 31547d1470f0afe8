"""The blocking client and connections that fail, hang, break and come back."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tests.fakes import scripted_server as fake
from tests.fakes.sdk_scenes import (
    PICTURE,
    QUICK,
)
from tests.waiting import until

import facelane


@pytest.fixture
def server() -> Iterator[fake.ScriptedServer]:
    with fake.ScriptedServer() as made:
        yield made


@pytest.fixture
def client(server: fake.ScriptedServer) -> Iterator[facelane.Client]:
    with facelane.Client(server.target, timeout=30.0) as made:
        yield made


def test_a_server_that_never_opens_is_given_up(server: fake.ScriptedServer) -> None:
    released = threading.Event()

    def script(requests: Iterator[fake.Request], context: fake.Context) -> Iterator[fake.Response]:
        released.wait(30)
        yield fake.opened()

    server.scripts.append(script)
    with (
        facelane.Client(server.target, timeout=0.2) as client,
        pytest.raises(facelane.UnavailableError, match="did not open the stream"),
        client.analyze_stream(),
    ):
        pass
    released.set()


def test_a_hanging_server_is_noticed(server: fake.ScriptedServer, client: facelane.Client) -> None:
    released = threading.Event()
    server.scripts.append(fake.silent(released))
    with client.analyze_stream(stall_timeout=0.1) as stream:
        stream.send(PICTURE)
        outcome = stream.recv(timeout=30)
        assert outcome is not None
        assert outcome.error is not None
        assert outcome.error.reason == "CONNECTION_LOST"
        with pytest.raises(facelane.ConnectionLostError, match="hangs"):
            stream.recv(timeout=30)
    released.set()


def test_a_hanging_server_is_noticed_by_a_camera_that_only_tries(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    released = threading.Event()
    server.scripts.append(fake.silent(released, window=1))
    told: list[facelane.StreamUpdate] = []
    with client.analyze_stream(stall_timeout=0.1, reconnect=QUICK, on_update=told.append) as stream:
        stream.send(PICTURE)
        until(lambda: stream.try_send(PICTURE) == 2, what="the stream to come back")
        assert stream.summary.connections == 2
        assert [u.kind.value for u in told] == ["CONNECTION_LOST", "RECONNECTED"]
    released.set()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([fake.outcome(fake.analysis_service_pb2.Frame(frame_id=7))], "frame 7 where 1 was due"),
        ([fake.opened()], "opened the stream twice"),
        ([fake.summary(results=5)], "counted 5"),
    ],
)
def test_a_server_that_breaks_the_rules(
    server: fake.ScriptedServer,
    client: facelane.Client,
    said: list[fake.Response],
    words: str,
) -> None:
    server.scripts.append(fake.saying(*said))
    with client.analyze_stream(reconnect=QUICK) as stream:
        stream.send(PICTURE)
        outcome = stream.recv(timeout=30)
        assert outcome is not None
        assert outcome.error is not None
        with pytest.raises(facelane.ProtocolError, match=words):
            stream.recv(timeout=30)


def test_a_client_may_wait_for_ever(server: fake.ScriptedServer) -> None:
    with (
        facelane.Client(server.target, timeout=math.inf) as client,
        client.analyze_stream(stall_timeout=math.inf) as stream,
    ):
        stream.send(PICTURE)
        stream.close_send()
        assert len(list(stream)) == 1
        with client.watch_events() as events:
            assert next(events).sequence == 1


def test_a_wait_of_no_length_ends_at_once(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    released = threading.Event()
    server.scripts.append(fake.silent(released, window=1))
    with client.analyze_stream() as stream:
        stream.send(PICTURE)
        with pytest.raises(facelane.DeadlineExceededError):
            stream.send(PICTURE, timeout=math.nan)
        with pytest.raises(facelane.DeadlineExceededError):
            stream.recv(timeout=math.nan)
    released.set()


def out_of_range(
    requests: Iterator[fake.Request], context: fake.Context
) -> Iterator[fake.Response]:
    """A server whose clock is beyond all years."""
    next(requests)
    yield fake.opened()
    for request in requests:
        response = fake.outcome(request.frame)
        response.outcome.capture_time.seconds = 1 << 60
        yield response
    yield fake.summary(results=1)


def test_a_time_that_no_calendar_knows_is_no_time(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    server.scripts.append(out_of_range)
    with client.analyze_stream() as stream:
        stream.send(PICTURE)
        stream.close_send()
        (outcome,) = list(stream)
    assert outcome.result is not None
    assert outcome.capture_time is None


def garbled(requests: Iterator[fake.Request], context: fake.Context) -> Iterator[fake.Response]:
    """A proxy whose error cannot be read."""
    next(requests)
    context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
    context.abort(grpc.StatusCode.UNAVAILABLE, "go away")
    yield fake.opened()


def test_details_that_cannot_be_read_leave_the_status(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    server.scripts.append(garbled)
    with (
        pytest.raises(facelane.UnavailableError, match="go away") as caught,
        client.analyze_stream(),
    ):
        pass
    assert caught.value.reason == "UNREACHABLE"
    server.scripts.append(garbled)
    with client.analyze_stream(reconnect=QUICK) as stream:
        stream.send(PICTURE)
        outcome = stream.recv(timeout=30)
        assert outcome is not None
        assert outcome.result is not None


def test_a_reader_ends_with_an_error_whatever_happens_to_it(
    client: facelane.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(_pb: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(facelane.convert, "stream_message", explode)
    with (
        pytest.raises(facelane.ProtocolError, match="ZeroDivisionError") as caught,
        client.analyze_stream(reconnect=QUICK),
    ):
        pass
    assert "secret" not in str(caught.value)


def test_a_broken_connection_without_reconnect(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    server.scripts.append(fake.breaking_after(answered=1, received=3))
    with client.analyze_stream() as stream:
        for _ in range(3):
            stream.send(PICTURE)
        got = [stream.recv(timeout=30) for _ in range(3)]
        assert [o.frame_id for o in got if o] == [1, 2, 3]
        assert [o.error.reason for o in got if o and o.error] == ["CONNECTION_LOST"] * 2
        with pytest.raises(facelane.ConnectionLostError, match="give reconnect"):
            next(stream)
        with pytest.raises(facelane.ConnectionLostError):
            stream.send(PICTURE)


def test_reconnect_keeps_counting_and_loses_nothing(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    server.scripts.extend(
        [
            fake.breaking_after(answered=2, received=4),
            fake.refusing(grpc.StatusCode.UNAVAILABLE, "DRAINING"),
            fake.breaking_after(answered=0, received=1),
        ]
    )
    updates: list[facelane.StreamUpdate] = []
    pictures = [PICTURE] * 30
    with client.analyze_stream(
        reconnect=QUICK, overload="lossless", on_update=updates.append
    ) as stream:
        got: list[facelane.Outcome] = []
        reader = threading.Thread(target=lambda: got.extend(stream))
        reader.start()
        for picture in pictures:
            stream.send(picture, timeout=math.inf)
        stream.close_send()
        reader.join(30)
        assert not reader.is_alive()
        summary = stream.summary
    assert [o.frame_id for o in got] == list(range(1, 31))
    lost = [o for o in got if o.error and o.error.reason == "CONNECTION_LOST"]
    assert len(lost) == summary.lost == summary.errors > 0
    assert summary.received == 30
    assert summary.connections == 3
    kinds = [u.kind.value for u in updates]
    assert kinds == ["CONNECTION_LOST", "RECONNECTED", "CONNECTION_LOST", "RECONNECTED"]
    # Ids go on over connections, on the wire too.
    on_wire = [r.frame.frame_id for s in server.streams for r in s[1:]]
    assert on_wire == sorted(on_wire)


def test_reconnect_waits_for_a_server_that_starts_later(tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/s.sock"
    with (
        facelane.Client(target, timeout=0.1) as client,
        client.analyze_stream(reconnect=QUICK, overload="lossless") as stream,
    ):
        # Not an error: the stream goes on trying by itself.
        assert stream.opened is None
        assert stream.limits is None
        assert stream.try_send(PICTURE) is None
        with pytest.raises(facelane.DeadlineExceededError) as caught:
            stream.send(PICTURE)
        assert caught.value.reason == "NOT_CONNECTED"
        with fake.ScriptedServer(address=target):
            assert stream.send(PICTURE, timeout=30) == 1
            outcome = stream.recv(timeout=30)
            assert outcome is not None
            assert outcome.result is not None


def test_reconnect_gives_up_when_told_to() -> None:
    policy = facelane.Reconnect(max_attempts=2, initial_delay=0.01)
    with (
        facelane.Client("127.0.0.1:1", timeout=30) as client,
        pytest.raises(facelane.UnavailableError),
        client.analyze_stream(reconnect=policy),
    ):
        pass


def test_a_server_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/s.sock"
    first = fake.ScriptedServer(address=target)
    with (
        facelane.Client(target, timeout=30) as client,
        client.analyze_stream(reconnect=QUICK) as stream,
    ):
        stream.send(PICTURE)
        assert stream.recv(timeout=30) is not None
        first.stop()
        until(lambda: not stream.connected, what="the loss to be noticed")
        with fake.ScriptedServer(address=target):
            assert stream.send(PICTURE, timeout=30) == 2
            outcome = stream.recv(timeout=30)
            assert outcome is not None
            assert outcome.result is not None


def test_draining_finishes_and_comes_back(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    def draining(
        requests: Iterator[fake.Request], context: fake.Context
    ) -> Iterator[fake.Response]:
        next(requests)
        yield fake.opened()
        first = next(requests)
        yield fake.update("DRAINING", message="maintenance")
        yield fake.outcome(first.frame)
        count = 1
        for request in requests:  # until the client half-closes
            count += 1
            yield fake.outcome(request.frame)
        yield fake.summary(results=count)
        fake.abort(context, grpc.StatusCode.UNAVAILABLE, "DRAINING")

    server.scripts.append(draining)
    with client.analyze_stream(reconnect=QUICK, overload="lossless") as stream:
        for _ in range(20):
            stream.send(PICTURE)
        stream.close_send()
        outcomes = list(stream)
    assert all(o.result for o in outcomes)
    assert stream.summary.connections == 2
    assert stream.summary.lost == 0
    assert stream.updates.popleft().message == "maintenance"


def test_updates_reach_the_callback_and_its_failure_harms_nobody(
    server: fake.ScriptedServer, client: facelane.Client, caplog: pytest.LogCaptureFixture
) -> None:
    def script(requests: Iterator[fake.Request], context: fake.Context) -> Iterator[fake.Response]:
        next(requests)
        yield fake.opened()
        lost = fake.face_pb2.STAGE_LIVENESS
        yield fake.update("STAGE_LOST", stage=lost)
        yield fake.update("TRACK_ENDED", track_id=9)
        for request in requests:
            yield fake.outcome(request.frame)
        yield fake.summary(results=1)

    server.scripts.append(script)
    seen: list[facelane.StreamUpdate] = []

    def callback(update: facelane.StreamUpdate) -> None:
        seen.append(update)
        raise RuntimeError("the user's")

    with client.analyze_stream(on_update=callback) as stream:
        stream.send(PICTURE)
        stream.close_send()
        assert len(list(stream)) == 1
    assert [u.kind.value for u in seen] == ["STAGE_LOST", "TRACK_ENDED"]
    assert seen[0].stage is facelane.Stage.LIVENESS
    assert seen[1].track_id == 9
    assert "on_update raised" in caplog.text
