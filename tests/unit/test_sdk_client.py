"""The blocking client against a scripted server on real sockets."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.fakes import scripted_server as fake
from tests.waiting import until

import facelane

JPEG = b"\xff\xd8\xff\xe0" + b"x" * 60
PICTURE = facelane.Picture.encoded(JPEG)
QUICK = facelane.Reconnect(initial_delay=0.01, max_delay=0.05, jitter=0.0)


@pytest.fixture
def server() -> Iterator[fake.ScriptedServer]:
    with fake.ScriptedServer() as made:
        yield made


@pytest.fixture
def client(server: fake.ScriptedServer) -> Iterator[facelane.Client]:
    with facelane.Client(server.target, timeout=30.0) as made:
        yield made


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("facelane")}


# Streams.


def test_a_stream_from_open_to_summary(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    seen = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=2)))
    with client.analyze_stream(
        source_id="door",
        overload="lossless",
        max_frame_age=0.5,
        weight=20,
        reinference_interval=1.25,
        disable_tracking=True,
        skip_liveness=True,
        gallery="staff",
        max_faces=3,
        max_candidates=2,
        min_face_size=40,
    ) as stream:
        assert stream.opened is not None
        assert stream.opened.models == {"detector": "null@1"}
        assert stream.limits is not None
        assert stream.limits.window == fake.WINDOW
        assert stream.connected
        assert stream.send(PICTURE, stream_offset=0.25, capture_time=seen) == 1
        assert stream.send(PICTURE, frame_id=10) == 10
        stream.close_send()
        first, second = list(stream)
        assert not stream.connected
        assert stream.ended
    assert stream.summary == facelane.StreamSummary(
        received=2, results=2, faces=2, tracks=1, connections=1
    )

    config = server.streams[0][0].config
    assert config.source_id == "door"
    assert config.overload_policy == 2
    assert config.max_frame_age.nanos == 500_000_000
    assert config.reinference_interval.nanos == 250_000_000
    assert (config.weight, config.disable_tracking) == (20, True)
    options = config.options
    assert (options.skip_liveness, options.skip_recognition) == (True, False)
    assert (options.gallery_id, options.max_faces) == ("staff", 3)
    assert (options.max_candidates, options.min_face_size) == (2, 40)

    assert first.frame_id == 1
    assert first.stream_offset == 0.25
    assert first.capture_time == seen
    assert first.age == pytest.approx(0.0025)
    assert 0 < first.round_trip < 5
    assert second.frame_id == 10
    assert second.capture_time is None
    assert first.result is not None
    assert first.drop is None
    assert first.error is None
    face = first.result.faces[0]
    assert face.box == facelane.BoundingBox(10, 20, 60, 80)
    assert len(face.landmarks) == 5
    assert face.identity.matched
    assert face.identity.subject_id == "grace"
    assert face.identity.candidates[0].subject_id == "grace"
    assert face.liveness.verdict is facelane.LivenessVerdict.LIVE
    assert face.ood_score == pytest.approx(0.8)
    timing = first.result.timings[0]
    assert timing.stage is facelane.Stage.DETECTOR
    assert timing.service == pytest.approx(0.005)


def test_many_frames_through_a_small_window(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    server.scripts.append(fake.answering(window=3))
    outcomes = list(client.analyze([PICTURE] * 200))
    assert [o.frame_id for o in outcomes] == list(range(1, 201))
    assert server.streams[0][0].config.overload_policy == 2
    until(lambda: not threads(), what="no thread left")


def test_several_threads_share_a_client(client: facelane.Client) -> None:
    counts: list[int] = []

    def one() -> None:
        counts.append(sum(o.result is not None for o in client.analyze([PICTURE] * 50)))

    workers = [threading.Thread(target=one) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert counts == [50] * 6


def test_a_full_window_holds_send_back_and_try_send_declines(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    released = threading.Event()
    server.scripts.append(fake.silent(released, window=2))
    with client.analyze_stream() as stream:
        stream.send(PICTURE)
        assert stream.try_send(PICTURE) == 2
        assert stream.try_send(PICTURE) is None
        with pytest.raises(facelane.DeadlineExceededError) as caught:
            stream.send(PICTURE, timeout=0.05)
        assert caught.value.reason == "WINDOW_FULL"
        assert isinstance(caught.value, TimeoutError)
        released.set()
        # A place comes free by the answers alone; nobody has to read for that.
        assert stream.send(PICTURE) == 3
        stream.close_send()
        assert [o.frame_id for o in stream] == [1, 2, 3]


def test_one_thread_may_send_first_and_read_afterwards(client: facelane.Client) -> None:
    with client.analyze_stream(overload="lossless") as stream:
        for _ in range(100):
            stream.send(PICTURE)
        stream.close_send()
        assert len(list(stream)) == 100


def test_outcomes_that_nobody_reads_are_bounded(client: facelane.Client) -> None:
    with client.analyze_stream(buffer=6) as stream:
        for _ in range(6):
            stream.send(PICTURE)
        until(lambda: stream.summary.received == 6)
        assert stream.try_send(PICTURE) is None
        with pytest.raises(facelane.DeadlineExceededError) as caught:
            stream.send(PICTURE, timeout=0.05)
        assert caught.value.reason == "OUTCOMES_UNREAD"
        assert stream.recv(timeout=30) is not None
        assert stream.try_send(PICTURE) == 7


def test_recv_has_a_deadline(client: facelane.Client) -> None:
    with (
        client.analyze_stream() as stream,
        pytest.raises(facelane.DeadlineExceededError, match=r"within 0\.05 s"),
    ):
        stream.recv(timeout=0.05)


def test_sending_after_the_end_says_so(client: facelane.Client) -> None:
    with client.analyze_stream() as stream:
        stream.close_send()
        stream.close_send()
        with pytest.raises(facelane.StreamClosedError):
            stream.send(PICTURE)
        assert list(stream) == []
        assert stream.recv() is None
    with pytest.raises(facelane.StreamClosedError):
        stream.try_send(PICTURE)
    with pytest.raises(RuntimeError, match="opened once"):
        stream.__enter__()


def test_leaving_early_settles_what_is_in_flight(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    released = threading.Event()
    server.scripts.append(fake.silent(released))
    with client.analyze_stream() as stream:
        for _ in range(3):
            stream.send(PICTURE)
    released.set()
    outcomes = list(stream)
    assert [o.error.reason for o in outcomes if o.error] == ["CANCELLED"] * 3
    assert stream.summary.received == stream.summary.errors == 3


def test_closing_the_client_closes_its_streams(server: fake.ScriptedServer) -> None:
    released = threading.Event()
    server.scripts.append(fake.silent(released))
    client = facelane.Client(server.target)
    stream = client.analyze_stream().__enter__()
    stream.send(PICTURE)
    client.close()
    released.set()
    assert stream.ended
    assert len(list(stream)) == 1
    until(lambda: not threads(), what="no thread left")


def test_a_client_can_be_closed_while_others_use_it() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(60):
            client = facelane.Client("127.0.0.1:1")
            kept = [client.watch_events() for _ in range(300)]
            user = threading.Thread(target=watch_until_closed, args=(client, kept))
            user.start()
            client.close()
            user.join(30)
    finally:
        sys.setswitchinterval(before)


def watch_until_closed(client: facelane.Client, kept: list[facelane.EventStream]) -> None:
    with contextlib.suppress(RuntimeError):
        while True:
            kept.append(client.watch_events())


def test_drops_and_errors_are_told_apart(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    def script(requests: Iterator[fake.Request], context: fake.Context) -> Iterator[fake.Response]:
        next(requests)
        yield fake.opened()
        frames = [next(requests).frame for _ in range(4)]
        yield fake.outcome(frames[0], drop=fake.drop("SUPERSEDED"))
        broken = fake.status(
            grpc.StatusCode.INVALID_ARGUMENT, "PICTURE_CORRUPT", "cut off", offset="12"
        )
        yield fake.outcome(frames[1], error=broken)
        busy = fake.status(grpc.StatusCode.UNAVAILABLE, "WORKER_LOST", "again", retryable="true")
        yield fake.outcome(frames[2], error=busy)
        yield fake.outcome(frames[3])
        yield fake.summary(results=1, drops=1, errors=2)

    server.scripts.append(script)
    with client.analyze_stream() as stream:
        for _ in range(4):
            stream.send(PICTURE)
        stream.close_send()
        bodies = [o.body for o in stream]
    assert bodies[0] == facelane.FrameDrop(facelane.DropReason.SUPERSEDED)
    assert bodies[1] == facelane.FrameError(
        "PICTURE_CORRUPT", "cut off", retryable=False, metadata={"offset": "12"}
    )
    assert isinstance(bodies[2], facelane.FrameError)
    assert bodies[2].retryable
    assert isinstance(bodies[3], facelane.FrameResult)
    assert stream.summary.drops_by_reason == {"SUPERSEDED": 1}


@pytest.mark.parametrize(
    ("code", "reason", "kind", "retryable"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "CONFIG_INVALID", facelane.ArgumentError, False),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAM_LIMIT", facelane.OverloadedError, True),
        (grpc.StatusCode.UNAVAILABLE, "DRAINING", facelane.UnavailableError, True),
        (grpc.StatusCode.NOT_FOUND, "SUBJECT_NOT_FOUND", facelane.NotFoundError, False),
        (
            grpc.StatusCode.PERMISSION_DENIED,
            "PERMISSION_DENIED",
            facelane.PermissionDeniedError,
            False,
        ),
    ],
)
def test_a_refused_stream_raises_on_entering(
    server: fake.ScriptedServer,
    client: facelane.Client,
    code: grpc.StatusCode,
    reason: str,
    kind: type[facelane.FacelaneError],
    retryable: bool,
) -> None:
    server.scripts.append(fake.refusing(code, reason, "do this instead"))
    with pytest.raises(kind, match="do this instead") as caught, client.analyze_stream():
        pass
    assert caught.value.reason == reason
    assert caught.value.retryable is retryable
    until(lambda: not threads(), what="no thread left")


def test_nobody_there() -> None:
    with (
        facelane.Client("127.0.0.1:1", timeout=2.0) as client,
        pytest.raises(facelane.UnavailableError) as caught,
        client.analyze_stream(),
    ):
        pass
    assert caught.value.reason == "UNREACHABLE"
    assert "check that it runs" in caught.value.message


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


def test_a_frame_beyond_the_limit_is_refused_here(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    server.scripts.append(fake.answering(max_frame_bytes=100))
    with client.analyze_stream() as stream:
        with pytest.raises(facelane.PictureError) as caught:
            stream.send(facelane.Picture.encoded(JPEG * 2))
        assert caught.value.reason == "PICTURE_TOO_LARGE"
        assert stream.send(PICTURE) == 1


def test_a_capture_time_needs_a_zone(client: facelane.Client) -> None:
    with client.analyze_stream() as stream:
        with pytest.raises(facelane.ArgumentError, match="time zone"):
            stream.send(PICTURE, capture_time=datetime(2026, 1, 1))  # noqa: DTZ001
        assert stream.send(PICTURE, capture_time=datetime.now(UTC)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"overload": "newest"},
        {"max_frame_age": -1.0},
        {"max_frame_age": math.nan},
        {"max_faces": -1},
        {"max_candidates": 1 << 32},
        {"weight": -1},
        {"buffer": 0},
    ],
)
def test_options_that_make_no_sense(client: facelane.Client, options: dict[str, object]) -> None:
    with pytest.raises(facelane.ArgumentError):
        client.analyze_stream(**options)  # type: ignore[arg-type]


def test_a_number_that_makes_no_sense_is_named(client: facelane.Client) -> None:
    with pytest.raises(facelane.ArgumentError, match="max_candidates -1"):
        client.identify(PICTURE, max_candidates=-1)
    with pytest.raises(facelane.ArgumentError, match="page_size -1"):
        list(client.list_subjects(page_size=-1))
    with pytest.raises(facelane.ArgumentError, match="max_faces -1"):
        client.analyze_image(PICTURE, max_faces=-1)


def test_what_is_no_picture_says_how_to_make_one(client: facelane.Client) -> None:
    calls: list[Callable[[Any], object]] = [
        client.analyze_image,
        client.identify,
        lambda data: client.enroll("grace", data),
        lambda data: list(client.analyze([data])),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"bytes is no facelane\.Picture: .*Picture\.encoded"):
            call(JPEG)


def test_a_stream_that_was_not_entered_says_so(client: facelane.Client) -> None:
    stream = client.analyze_stream()
    uses: list[Callable[[], object]] = [
        lambda: stream.send(PICTURE),
        lambda: stream.try_send(PICTURE),
        lambda: next(stream),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match="with"):
            use()
    with stream:
        assert stream.send(PICTURE) == 1
    with pytest.raises(RuntimeError, match="opened once"):
        stream.__enter__()
    with pytest.raises(facelane.StreamClosedError):
        stream.send(PICTURE)


def test_a_closed_client_says_so(server: fake.ScriptedServer) -> None:
    client = facelane.Client(server.target)
    early = client.analyze_stream()
    client.close()
    uses: list[Callable[[], object]] = [
        client.server_info,
        client.health,
        client.analyze_stream,
        client.watch_events,
        lambda: list(client.analyze([PICTURE])),
        lambda: list(client.list_subjects()),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match="was closed"):
            use()
    with pytest.raises(RuntimeError, match="opened once"):
        early.__enter__()


# The convenience.


def test_analyze_raises_the_iterable_s_error_after_the_outcomes(client: facelane.Client) -> None:
    def frames() -> Iterator[facelane.Picture]:
        yield PICTURE
        yield PICTURE
        raise OSError("the camera is gone")

    got: list[int] = []
    outcomes = client.analyze(frames())
    with pytest.raises(OSError, match="camera is gone"):
        got.extend(o.frame_id for o in outcomes)
    assert got == [1, 2]


def test_analyze_raises_what_is_wrong_with_a_frame(client: facelane.Client) -> None:
    frames = [facelane.Frame(PICTURE, 1.0), facelane.Frame(PICTURE, 0.5)]
    outcomes = client.analyze(frames)
    assert next(outcomes).stream_offset == 1.0
    with pytest.raises(facelane.ArgumentError, match="go back"):
        next(outcomes)


def test_analyze_can_be_left(client: facelane.Client) -> None:
    def endless() -> Iterator[facelane.Picture]:
        while True:
            yield PICTURE

    outcomes = client.analyze(endless())
    assert next(outcomes).frame_id == 1
    outcomes.close()
    until(lambda: not threads(), what="no thread left")


def test_analyze_raises_when_the_stream_breaks(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    server.scripts.append(fake.breaking_after(answered=1, received=2))
    got: list[facelane.Outcome] = []
    outcomes = client.analyze([PICTURE] * 10)
    with pytest.raises(facelane.ConnectionLostError):
        got.extend(outcomes)
    assert got[0].result is not None
    assert all(o.error for o in got[1:])


# Single calls.


def test_analyze_image(server: fake.ScriptedServer, client: facelane.Client) -> None:
    result = client.analyze_image(PICTURE, gallery="staff", max_candidates=2)
    assert (result.width, result.height) == (640, 480)
    assert server.images[0].picture.data == JPEG
    assert server.images[0].options.gallery_id == "staff"


def test_a_call_is_retried_when_that_is_harmless(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    server.failures.extend([(grpc.StatusCode.UNAVAILABLE, "POOL_UNAVAILABLE", "soon")] * 2)
    enrollment = client.enroll("ada", PICTURE, display_name="Ada")
    assert enrollment.subject.template_count == 1
    ids = {request.request_id for request in server.enrolments}
    assert len(server.enrolments) == 3
    assert len(ids) == 1
    assert ids != {""}


def test_a_call_that_does_harm_is_not_retried(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    server.failures.append((grpc.StatusCode.UNAVAILABLE, "POOL_UNAVAILABLE", "soon"))
    with pytest.raises(facelane.UnavailableError):
        client.restart_worker("detector#0")
    assert len(server.admin) == 1


def test_the_gallery(server: fake.ScriptedServer, client: facelane.Client) -> None:
    made = client.create_subject("grace", display_name="Grace", labels={"team": "navy"})
    assert made.labels == {"team": "navy"}
    assert made.create_time is not None
    assert made.create_time.tzinfo is UTC
    with pytest.raises(facelane.AlreadyExistsError) as exists:
        client.create_subject("grace")
    assert exists.value.reason == "SUBJECT_EXISTS"

    changed = client.update_subject("grace", display_name="Grace H.", etag=made.etag)
    assert changed.display_name == "Grace H."
    assert changed.labels == {"team": "navy"}
    with pytest.raises(facelane.ConflictError):
        client.update_subject("grace", labels={}, etag=made.etag)
    with pytest.raises(facelane.ArgumentError, match="nothing to change"):
        client.update_subject("grace")
    assert client.get_subject("grace") == changed

    enrollment = client.enroll("grace", PICTURE)
    assert enrollment.template.model_id == "null@1"
    assert enrollment.face.identity.subject_id == "grace"
    assert client.list_templates("grace") == [enrollment.template]
    assert client.verify("grace", PICTURE).verified
    assert client.identify(PICTURE)[0].identity.matched
    client.delete_template(enrollment.template.template_id)
    with pytest.raises(facelane.NotFoundError) as unknown:
        client.delete_template("t9")
    assert unknown.value.reason == "TEMPLATE_NOT_FOUND"

    for number in range(5):
        client.create_subject(f"s{number}")
    assert [s.subject_id for s in client.list_subjects(page_size=2)] == [
        "grace", "s0", "s1", "s2", "s3", "s4",
    ]  # fmt: skip
    assert client.delete_subject("grace") == 1
    with pytest.raises(facelane.NotFoundError, match="enrol it first"):
        client.get_subject("grace")


@pytest.mark.parametrize("reason", ["NO_FACE", "MULTIPLE_FACES", "OOD_REJECTED", "SPOOF_SUSPECTED"])
def test_refused_enrolments(
    server: fake.ScriptedServer, client: facelane.Client, reason: str
) -> None:
    server.failures.append((grpc.StatusCode.FAILED_PRECONDITION, reason, "take another picture"))
    with pytest.raises(facelane.EnrollmentRefusedError) as caught:
        client.enroll("ada", PICTURE)
    assert caught.value.reason == reason
    assert not caught.value.retryable
    assert str(caught.value) == f"{reason}: take another picture"


def test_enrolling_for_a_subject_that_must_exist(client: facelane.Client) -> None:
    with pytest.raises(facelane.NotFoundError):
        client.enroll("ada", PICTURE, create_subject=False)


def test_a_message_larger_than_the_server_takes(client: facelane.Client) -> None:
    huge = facelane.Picture.encoded(b"\xff\xd8\xff" + bytes(9 << 20))
    with pytest.raises(facelane.PictureError) as caught:
        client.analyze_image(huge)
    assert caught.value.reason == "PICTURE_TOO_LARGE"


def test_a_call_has_a_deadline(server: fake.ScriptedServer, client: facelane.Client) -> None:
    server.released.clear()
    with pytest.raises(facelane.DeadlineExceededError) as caught:
        client.analyze_image(PICTURE, timeout=0.1)
    assert caught.value.reason == "DEADLINE_EXCEEDED"
    assert caught.value.retryable


def test_a_call_may_wait_for_ever(client: facelane.Client) -> None:
    for timeout in (math.inf, 1e12):
        assert client.server_info(timeout=timeout).version == "1.2.3"
    with pytest.raises(facelane.ArgumentError, match="timeout nan"):
        client.server_info(timeout=math.nan)


def test_a_server_that_is_not_ours(server: fake.ScriptedServer, client: facelane.Client) -> None:
    server.failures.append((grpc.StatusCode.UNIMPLEMENTED, "", "what?"))
    with pytest.raises(facelane.ServerError, match="older than the client") as caught:
        client.analyze_image(PICTURE)
    assert caught.value.metadata == {"grpc_status": "UNIMPLEMENTED", "grpc_message": "what?"}


def test_the_server_s_state(server: fake.ScriptedServer, client: facelane.Client) -> None:
    info = client.server_info()
    assert info.version == "1.2.3"
    assert info.start_time is not None
    assert info.models[0].task is facelane.Stage.RECOGNIZER
    assert info.models[0].thresholds == {"match": 0.5}
    assert info.limits.default_max_frame_age == 2.0
    (pool,) = client.pools()
    assert pool.state is facelane.PoolState.DEGRADED
    assert pool.workers[0].state is facelane.WorkerState.READY
    assert pool.workers[0].uptime == 90.0


def test_health(server: fake.ScriptedServer, client: facelane.Client) -> None:
    long_name = "facelane.v1." + "x" * 100
    server.health["facelane.v1.AnalysisService"] = 2
    assert client.health() == "SERVING"
    assert client.health("facelane.v1.AnalysisService") is facelane.HealthStatus.NOT_SERVING
    assert client.health(long_name) is facelane.HealthStatus.SERVICE_UNKNOWN


def test_waiting_for_a_server(server: fake.ScriptedServer, client: facelane.Client) -> None:
    client.wait_until_serving(30)
    server.health[""] = 2
    with pytest.raises(facelane.DeadlineExceededError, match="NOT_SERVING"):
        client.wait_until_serving(1.0, poll_interval=0.01)
    with (
        facelane.Client("127.0.0.1:1") as lonely,
        pytest.raises(facelane.DeadlineExceededError, match="UNREACHABLE"),
    ):
        lonely.wait_until_serving(1.0, poll_interval=0.01)


def test_what_was_heard_last_is_told(server: fake.ScriptedServer, client: facelane.Client) -> None:
    server.health = fake.LosingItsTongue(2)
    with pytest.raises(facelane.DeadlineExceededError, match="NOT_SERVING"):
        client.wait_until_serving(1.0, poll_interval=0.01)
    server.health.found.set()


def test_administration(server: fake.ScriptedServer, client: facelane.Client) -> None:
    assert client.restart_worker("detector#0") == facelane.WorkerRestarted(1, 2)
    assert client.reload_model("detector", "other@2").new_model_id == "other@2"
    client.drain(1.5)
    assert server.admin[-1].grace.seconds == 1
    assert server.admin[-1].grace.nanos == 500_000_000


# Events.


def test_events_carry_their_resume_token(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    server.events_stay_open = True
    with client.watch_events("4", kinds=["SUBJECT_SEEN"]) as events:
        got = [next(events) for _ in range(3)]
    assert [e.resume_token for e in got] == ["5", "6", "7"]
    assert events.resume_token == "7"
    assert got[0].kind is facelane.EventKind.SUBJECT_SEEN
    assert got[0].identity.subject_id == "grace"
    assert list(server.subscriptions[0].kinds) == [1]
    assert list(events) == []


def test_events_resume_by_themselves(server: fake.ScriptedServer, client: facelane.Client) -> None:
    with client.watch_events(reconnect=QUICK) as events:
        got = [next(events).sequence for _ in range(8)]
    assert got == list(range(1, 9))
    assert [s.resume_token for s in server.subscriptions] == ["", "3", "6"]


def test_a_quiet_subscription_resumes_where_it_began(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    server.events_before, server.event_burst = 7, 0
    with client.watch_events(reconnect=QUICK) as events:
        # Entering has subscribed, although nothing happened.
        assert [s.resume_token for s in server.subscriptions] == [""]
        assert events.resume_token == "7"
        server.event_burst = 1
        assert next(events).sequence == 8
    assert {s.resume_token for s in server.subscriptions[1:]} == {"7"}


def test_a_subscription_that_never_begins_is_given_up(server: fake.ScriptedServer) -> None:
    server.released.clear()
    with facelane.Client(server.target, timeout=0.2) as client:
        with pytest.raises(facelane.DeadlineExceededError, match="did not begin"):
            client.watch_events().__enter__()
        with client.watch_events(reconnect=QUICK) as events:
            # It goes on trying, and a server that comes to itself is heard.
            server.released.set()
            assert next(events).sequence == 1


def test_a_refused_subscription_raises_on_entering(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    server.failures.append((grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED", "no"))
    with pytest.raises(facelane.PermissionDeniedError):
        client.watch_events(reconnect=QUICK).__enter__()


def test_entering_waits_for_a_server_no_longer_than_its_timeout() -> None:
    with (
        facelane.Client("127.0.0.1:1", timeout=30) as lonely,
        pytest.raises(facelane.UnavailableError) as caught,
    ):
        lonely.watch_events().__enter__()
    assert caught.value.reason == "UNREACHABLE"
    forever = facelane.Reconnect(initial_delay=0.05, max_delay=0.05)
    with (
        facelane.Client("127.0.0.1:1", timeout=0.2) as lonely,
        lonely.watch_events(reconnect=forever),  # which would be longer than a test may take
    ):
        pass


def test_a_subscription_that_breaks_says_so(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    server.events_stay_open = True
    with client.watch_events() as events:
        for _ in range(3):
            next(events)
        server.stop()
        with pytest.raises(facelane.ConnectionLostError):
            next(events)


def test_events_end_with_an_error_when_nobody_resumes(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    events = client.watch_events()
    for _ in range(3):
        next(events)
    with pytest.raises(facelane.UnavailableError):
        next(events)


def test_lost_history_is_told_and_not_tried_again(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    server.failures.append((grpc.StatusCode.OUT_OF_RANGE, "HISTORY_LOST", "too old"))
    with pytest.raises(facelane.HistoryLostError):
        next(client.watch_events("1", reconnect=QUICK))


def test_events_can_be_closed_from_another_thread(
    server: fake.ScriptedServer, client: facelane.Client
) -> None:
    server.event_burst, server.events_stay_open = 1, True
    events = client.watch_events()
    next(events)
    closer = threading.Timer(0.05, events.close)
    closer.start()
    assert list(events) == []
    closer.join(30)


def test_a_wrong_kind_is_told_at_once(client: facelane.Client) -> None:
    with pytest.raises(facelane.ArgumentError, match="SUBJECT_SEEN"):
        client.watch_events(kinds=["SUBJECT"])


# Reaching the server.


def test_a_token_opens_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "token"
    secret.write_text("s3cret\n")
    with fake.ScriptedServer(token="s3cret") as server:
        with (
            facelane.Client(server.target) as nobody,
            pytest.raises(facelane.AuthenticationError) as caught,
        ):
            nobody.server_info()
        assert caught.value.reason == "UNAUTHENTICATED"
        with facelane.Client(server.target, token="s3cret") as given:
            assert given.server_info().version == "1.2.3"
            assert "s3cret" not in repr(given) + repr(vars(given))
        monkeypatch.setenv("FACELANE_TARGET", server.target)
        monkeypatch.setenv("FACELANE_TOKEN_FILE", str(secret))
        with facelane.Client() as from_file:
            assert from_file.target == server.target
            assert len(list(from_file.analyze([PICTURE]))) == 1
        monkeypatch.setenv("FACELANE_TOKEN", "wrong")
        with facelane.Client() as wrong, pytest.raises(facelane.AuthenticationError):
            wrong.server_info()


def test_a_token_is_the_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        fake.ScriptedServer(token="s3cret") as server,
        facelane.Client(server.target, token="s3cret\n") as read_carelessly,
    ):
        assert read_carelessly.server_info().version == "1.2.3"
    monkeypatch.setenv("FACELANE_TOKEN", "two words")
    for given in ("s3cret\nmore", "schlüssel", None):
        with pytest.raises(facelane.ArgumentError, match="the key alone") as caught:
            facelane.Client(token=given)
        assert "s3cret" not in str(caught.value)


def test_a_token_in_clear_text_to_another_machine_is_warned_about() -> None:
    with pytest.warns(facelane.InsecureTokenWarning, match="clear text"):
        facelane.Client("camera-host:50151", token="x").close()
    for local in ("localhost:1", "127.0.0.1:1", "[::1]:1", "unix:/run/x.sock"):
        facelane.Client(local, token="x").close()


def test_a_unix_socket(tmp_path: Path) -> None:
    with (
        fake.ScriptedServer(address=f"unix:{tmp_path}/s.sock") as server,
        facelane.Client(server.target) as client,
    ):
        assert client.health() == "SERVING"
