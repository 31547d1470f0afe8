"""The blocking client: arguments, single calls, events, tokens."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.fakes import scripted_server as fake
from tests.fakes.sdk_scenes import (
    JPEG,
    PICTURE,
    QUICK,
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
