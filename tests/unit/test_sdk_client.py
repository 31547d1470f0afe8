"""The blocking client beside a scripted server: streams."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import grpc
import pytest
from tests.fakes import scripted_server as fake
from tests.fakes.sdk_scenes import (
    PICTURE,
    threads,
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
