"""What operators do to a server that works: kill, restart, reload, drain, watch."""

from __future__ import annotations

import itertools
import os
import queue
import signal
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import grpc
import psutil
import pytest
from google.protobuf import duration_pb2, timestamp_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.e2e import wire
from tests.e2e.conftest import Start
from tests.running_server import THREAD_POOLS, RunningServer, free_port, toml
from tests.waiting import until

import facelane
from facelane.v1 import analysis_service_pb2 as pb
from facelane.v1 import analysis_service_pb2_grpc as pb_grpc
from facelane.v1 import event_service_pb2, event_service_pb2_grpc

HEALTH = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
QUICK = "backoff_initial_s = 0.3\nbackoff_max_s = 0.4"
"""Long enough for a loss to be seen, short enough for a test."""


def short_grace(text: str) -> str:
    return text.replace("[server]", "[server]\ndrain_grace_s = 2.0")


class Load:
    """A lossless stream that is kept busy by a thread of its own until ``finish``."""

    def __init__(self, client: facelane.Client, **options: Any) -> None:
        self.outcomes: list[facelane.Outcome] = []
        self.updates: list[facelane.StreamUpdate] = []
        self.failure: Exception | None = None
        options.setdefault("overload", "lossless")
        self.stream = client.analyze_stream(on_update=self.updates.append, **options)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=t) for t in (self._send, self._read)]

    def _send(self) -> None:
        number = 0
        # Some 100 frames a second: a load, and room on two cores for who is tested.
        while not self._stop.wait(0.01):
            try:
                self.stream.send(wire.picture(number % 4), timeout=0.5)
                number += 1
            except facelane.DeadlineExceededError:
                continue
            except facelane.FacelaneError:
                return
        self.stream.close_send()

    def _read(self) -> None:
        try:
            self.outcomes.extend(self.stream)
        except facelane.FacelaneError as error:
            self.failure = error

    def results(self) -> int:
        return sum(outcome.result is not None for outcome in self.outcomes)

    def more(self, count: int = 20) -> None:
        """Waits for so many more outcomes."""
        wanted = len(self.outcomes) + count
        until(lambda: len(self.outcomes) >= wanted or self.failure, what="more outcomes")

    def finish(self) -> facelane.StreamSummary:
        """Half-closes, reads the rest, and gives the count."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        return self.stream.summary

    def __enter__(self) -> Self:
        self.stream.__enter__()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self.stream.close()
        for thread in self._threads:
            thread.join(30)


def pool(client: facelane.Client, name: str) -> facelane.PoolInfo:
    return next(p for p in client.pools() if p.pool == name)


def kill_worker(client: facelane.Client, name: str) -> int:
    pid = pool(client, name).workers[0].pid
    os.kill(pid, signal.SIGKILL)
    return pid


@contextmanager
def watched_health(target: str, service: str) -> Iterator[queue.SimpleQueue[str]]:
    """The statuses that a watcher is told, as they come."""
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    with wire.channel(target) as channel:
        call = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=service), timeout=60
        )

        def read() -> None:
            try:
                for response in call:
                    told.put(HEALTH[response.status])
            except grpc.RpcError:
                pass

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield told
        finally:
            call.cancel()
            reader.join(30)


# -- health ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose workers tests may kill: they are back soon, and all is as it was."""
    folder = tmp_path_factory.mktemp("quick")
    with RunningServer(folder, toml(folder, wire.pools(every=QUICK))) as made:
        made.wait_serving()
        yield made


def test_health_follows_the_pools(quick: RunningServer) -> None:
    names = ("", "facelane.v1.AnalysisService", "facelane.pool.detector")
    with (
        quick.client() as client,
        watched_health(quick.target, names[0]) as whole,
        watched_health(quick.target, names[1]) as service,
        watched_health(quick.target, names[2]) as detector,
        watched_health(quick.target, "facelane.pool.liveness") as other,
        watched_health(quick.target, "facelane.process") as process,
    ):
        queues = (whole, service, detector)
        assert [q.get(timeout=30) for q in (*queues, other, process)] == ["SERVING"] * 5
        kill_worker(client, "detector")
        assert [q.get(timeout=30) for q in queues] == ["NOT_SERVING"] * 3
        assert [q.get(timeout=30) for q in queues] == ["SERVING"] * 3
        assert other.empty(), "another pool was not touched"
        assert process.empty()
        assert client.health("facelane.no.such.service") == "SERVICE_UNKNOWN"


def test_a_lost_second_stage_degrades_in_band_and_is_told(quick: RunningServer) -> None:
    with (
        quick.client() as client,
        watched_health(quick.target, "") as whole,
        watched_health(quick.target, "facelane.v1.AnalysisService") as service,
        Load(client, disable_tracking=True) as load,
    ):
        assert [q.get(timeout=30) for q in (whole, service)] == ["SERVING"] * 2
        load.more(20)
        kill_worker(client, "liveness")
        assert [whole.get(timeout=30) for _ in range(2)] == ["NOT_SERVING", "SERVING"]
        assert service.empty(), "streams go on"
        load.more(40)
        summary = load.finish()
    assert summary.received == summary.results, summary
    missing = [o for o in load.outcomes if o.result and o.result.missing_stages]
    assert missing
    for outcome in missing:
        assert outcome.result is not None
        assert outcome.result.missing_stages == ("liveness",)
        for face in outcome.result.faces:
            assert (face.liveness.verdict, face.liveness.score) == ("UNDECIDED", None)
    kinds = [u.kind for u in load.updates if u.stage == "liveness"]
    assert kinds == ["STAGE_LOST", "STAGE_RESTORED"]


# -- workers and models -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("detector", marks=pytest.mark.slow),
        "recognizer",
        pytest.param("liveness", marks=pytest.mark.slow),
    ],
)
def test_a_worker_is_restarted_under_load_and_no_frame_is_lost(
    quick: RunningServer, name: str
) -> None:
    with quick.client() as client, Load(client) as load:
        load.more()
        before = pool(client, name).workers[0].pid
        answer = client.restart_worker(f"{name}#0", timeout=20)
        assert answer.old_pid == before
        assert answer.new_pid not in (0, before)
        load.more()
        summary = load.finish()
    assert summary.results == summary.received > 40
    assert not psutil.pid_exists(before)


def test_no_such_worker_pool_or_model(server: RunningServer) -> None:
    with server.client() as client:
        for name in ("detector#9", "nobody#0", "", "detector"):
            with pytest.raises(facelane.NotFoundError) as missing:
                client.restart_worker(name)
            assert missing.value.reason == "WORKER_NOT_FOUND"
        with pytest.raises(facelane.NotFoundError) as missing:
            client.reload_model("nobody")
        assert missing.value.reason == "POOL_NOT_FOUND"
        for model in ("no-such-package", "/no/such/folder", "null-recognizer"):
            with pytest.raises(facelane.ArgumentError) as refused:
                client.reload_model("detector", model)
            assert refused.value.reason == "MODEL_INVALID"
        assert len(client.analyze_image(wire.picture()).faces) == 1


@pytest.mark.slow
def test_a_model_is_reloaded_under_load_and_no_frame_is_lost(start: Start, tmp_path: Path) -> None:
    server = start()
    two = wire.null_detector(tmp_path, 2)
    with server.client() as client, Load(client, disable_tracking=True) as load:
        load.more()
        answer = client.reload_model("detector", str(two), timeout=30)
        assert answer.old_model_id.startswith("null-detector@1.0.0#")
        assert answer.new_model_id.startswith("null-detector-2@1.0.0#")
        load.more(60)
        summary = load.finish()
        models = {m.task: m.name for m in client.server_info().models}
    assert models["detector"] == "null-detector-2"
    assert summary.results == summary.received
    counts = [len(o.result.faces) for o in load.outcomes if o.result]
    assert counts[0] == 1
    assert counts[-1] == 2
    assert counts == sorted(counts), "the swap happens once"


def test_a_reloaded_model_is_judged_by_its_own_thresholds(start: Start, tmp_path: Path) -> None:
    manifest = Path("server/facelane_server/models/builtin/null-recognizer/model.toml")
    text = (Path(__file__).parents[2] / manifest).read_text()
    strict = tmp_path / "strict"
    strict.mkdir()
    (strict / "model.toml").write_text(
        text.replace('"1.0.0"', '"2.0.0"').replace("match = 0.5", "match = 1.0")
    )
    server = start()
    with server.client() as client:
        client.enroll("ada", wire.picture())
        assert client.verify("ada", wire.picture()).threshold == pytest.approx(0.5)
        with pytest.raises(facelane.RefusedError) as refused:
            client.reload_model("recognizer", str(strict))
        assert refused.value.reason == "TEMPLATES_LOST"
        done = client.reload_model("recognizer", str(strict), forget_templates=True)
        assert (done.templates_not_searched, done.remembered) == (1, False)
        recognizer = next(m for m in client.server_info().models if m.task == "recognizer")
        assert recognizer.version == "2.0.0"
        assert recognizer.thresholds["match"] == 1.0
        # Templates of another model are never compared: enrolled again, by the new one.
        (face,) = client.identify(wire.picture())
        assert face.identity.decision == "UNKNOWN"
        client.enroll("ada", wire.picture())
        assert client.verify("ada", wire.picture()).threshold == 1.0


def test_a_model_that_cannot_be_loaded_leaves_the_old_one(
    quick: RunningServer, tmp_path: Path
) -> None:
    broken = wire.null_detector(tmp_path, 3)
    (broken / "model.toml").write_text("schema = 1\nname = ")
    with quick.client() as client, Load(client) as load:
        load.more()
        with pytest.raises(facelane.ArgumentError) as refused:
            client.reload_model("detector", str(broken))
        assert refused.value.reason == "MODEL_INVALID"
        load.more()
        summary = load.finish()
        assert client.health() == "SERVING"
    assert summary.results == summary.received


# -- the end ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "by", ["SIGTERM", *(pytest.param(by, marks=pytest.mark.slow) for by in ("SIGINT", "Drain"))]
)
def test_draining_under_load_gives_every_frame_its_outcome(start: Start, by: str) -> None:
    server = start(edit=short_grace)
    with server.client() as client:
        with Load(client) as lossless, Load(client, overload="latest_wins") as camera:
            lossless.more()
            camera.more()
            if by == "Drain":
                client.drain(grace=1.9)
            else:
                server.process.send_signal(signal.Signals[by])
            for load in (lossless, camera):
                until(lambda load=load: load.stream.ended, what="the stream to end")
            summaries = [lossless.finish(), camera.finish()]
        assert server.process.wait(30) == 0
    for load, summary in zip((lossless, camera), summaries, strict=True):
        assert summary.received == summary.results + summary.drops + summary.errors
        ids = [outcome.frame_id for outcome in load.outcomes]
        assert ids == sorted(set(ids))
        assert [u.kind for u in load.updates if u.kind == "DRAINING"] == ["DRAINING"]
        # The server's own word, before the end, and not a connection that broke.
        assert load.failure is not None
        assert load.failure.reason == "DRAINING"  # type: ignore[attr-defined]
        assert load.failure.retryable  # type: ignore[attr-defined]
    log = server.text()
    assert "Traceback" not in log
    assert '"event": "ended"' in log
    assert not Path(server.target.removeprefix("unix:")).exists()


def test_a_client_that_goes_when_told_is_not_kept_waiting(start: Start) -> None:
    server = start(
        THREAD_POOLS,
        edit=lambda text: text.replace("[server]", "[server]\ndrain_grace_s = 300"),
    )
    with wire.channel(server.target) as channel, wire.RawStream(channel) as stream:
        stream.open()
        stream.write(wire.frame(1))
        stream.outcome()
        server.process.send_signal(signal.SIGTERM)
        assert stream.read().update.kind == pb.STREAM_UPDATE_KIND_DRAINING
        stream.write(wire.frame(2))
        *_, outcome, last = stream.rest()
        assert outcome.outcome.drop.reason == pb.DROP_REASON_DRAINING
        assert last.summary.received == 2
        assert stream.call.code() is grpc.StatusCode.OK
    assert server.process.wait(60) == 0, "long before the grace is over"


@pytest.mark.slow
def test_a_picture_under_way_is_answered_before_the_end(start: Start) -> None:
    server = start(wire.pools(detector="options = { 'fail.slow_ms' = '2500' }"))
    with wire.channel(server.target) as channel, server.client() as client:
        call = pb_grpc.AnalysisServiceStub(channel).AnalyzeImage.future(
            pb.AnalyzeImageRequest(picture=wire.pb_picture()), timeout=wire.CALL_S
        )
        until(lambda: pool(client, "detector").in_flight)
        server.process.send_signal(signal.SIGTERM)
        assert len(call.result().result.faces) == 1
    assert server.process.wait(30) == 0


@pytest.mark.parametrize("window", [pytest.param(64, marks=pytest.mark.slow), 2])
def test_a_draining_server_takes_no_new_work(start: Start, window: int) -> None:
    # Frames that take a while keep the drain going; with the small window the server may not
    # even be reading when it is told to end.
    server = start(
        wire.pools(detector="options = { 'fail.slow_ms' = '200' }\nbatch_max = 1"),
        f"[limits]\nwindow = {window}",
        edit=lambda text: text.replace("[server]", "[server]\ndrain_grace_s = 60"),
    )
    late = window == 2
    with wire.channel(server.target) as channel, wire.RawStream(channel) as stream:
        stream.open()
        stream.write(*(wire.frame(number) for number in range(1, 6)))
        stream.outcome()
        with server.client() as client:
            assert len(client.analyze_image(wire.picture()).faces) == 1
            server.process.send_signal(signal.SIGTERM)
            until(lambda: client.server_info().draining)
            assert client.health() == "NOT_SERVING"
            assert client.health("facelane.process") == "SERVING"
            with pytest.raises(facelane.UnavailableError) as refused:
                client.analyze_image(wire.picture())
            assert refused.value.reason == "DRAINING"
            with pytest.raises(facelane.UnavailableError) as refused, client.analyze_stream():
                pass
            assert refused.value.reason == "DRAINING"
            assert refused.value.retryable
            if late:
                stream.write(wire.frame(6))
            told = []
            try:
                for message in stream.call:
                    told.append(message)
                    if message.outcome.frame_id == 5 + late:
                        client.drain(grace=0.5)  # the shorter one counts: now it may end
            except grpc.RpcError as error:
                ended = wire.refusal(error)
        assert ended == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        summary = told[-1].summary
        outcomes = [m.outcome.frame_id for m in told if m.WhichOneof("message") == "outcome"]
        assert outcomes == list(range(2, 6 + late))
        assert summary.received == 5 + late == summary.results + summary.drops
        assert set(summary.drops_by_reason) <= {"DRAINING"}
        assert (summary.drops > 0) == late
    assert server.process.wait(30) == 0


def test_a_killed_server_leaves_no_process_and_its_gallery(start: Start) -> None:
    server = start()
    workers = server.children()
    assert len(workers) == 3
    with server.client() as client, Load(client) as load:
        client.enroll("lasting", wire.picture())
        load.more()
        server.process.kill()
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive
        load.finish()
        assert load.failure is not None
    # Its socket lies there; the next server takes it over.
    server.process.wait(30)
    path = Path(server.target.removeprefix("unix:"))
    assert path.is_socket()
    again = RunningServer(server.folder, server.config.read_text())
    with again:
        again.wait_serving()
        with again.client() as client:
            assert client.identify(wire.picture())[0].identity.subject_id == "lasting"


def test_a_second_server_does_not_take_the_socket_of_the_first(server: RunningServer) -> None:
    folder = server.folder / "second"
    folder.mkdir()
    second = RunningServer(
        folder,
        server.config.read_text().replace("/state", "/second/state").replace("/run", "/second/run"),
    )
    assert second.process.wait(30) == 69
    second.stop()
    assert "another server answers" in second.text()
    with server.client() as client:
        assert client.health() == "SERVING"


# -- reading ----------------------------------------------------------------------------------


def test_metrics_over_http(start: Start) -> None:
    port = free_port()
    server = start(
        THREAD_POOLS, edit=lambda text: text.replace('listen = ""', f'listen = "127.0.0.1:{port}"')
    )
    with server.client() as client:
        for outcome in client.analyze([wire.picture()] * 10):
            assert outcome.result is not None
        client.enroll("grace-of-the-metrics", wire.picture())
        for _ in range(2):
            with pytest.raises(facelane.NotFoundError):
                client.get_subject("nobody-of-the-metrics")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        assert response.headers["content-type"].startswith("text/plain")
        text = response.read().decode()
    samples = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")
    )
    assert any(float(v) == 10 for k, v in samples.items() if "outcome" in k), text
    assert any(float(v) == 1 for k, v in samples.items() if "templates" in k), text
    assert samples['facelane_calls_refused_total{reason="SUBJECT_NOT_FOUND"}'] == "2.0"
    for stage in ("detector", "recognizer", "liveness"):
        assert f'pool="{stage}"' in text
    assert "of-the-metrics" not in text


def test_reflection_lists_the_services(server: RunningServer) -> None:
    with wire.channel(server.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=wire.CALL_S
        )
    names = {service.name for service in answer.list_services_response.service}
    assert names >= {
        "facelane.v1.AnalysisService", "facelane.v1.GalleryService",
        "facelane.v1.EventService", "facelane.v1.ServerService",
        "facelane.v1.AdminService", "grpc.health.v1.Health",
    }  # fmt: skip


def test_the_server_says_what_it_is(server: RunningServer) -> None:
    with server.client() as client:
        info = client.server_info()
        pools = client.pools()
    assert {m.name for m in info.models} == {"null-detector", "null-recognizer", "null-liveness"}
    assert info.limits.window == 64
    assert info.limits.max_message_bytes == 33 << 20
    assert not info.draining
    for told in pools:
        assert told.state == "SERVING"
        assert told.isolation == "process"
        (worker,) = told.workers
        assert worker.worker_id == f"{told.pool}#0"
        assert worker.state == "READY"
        assert psutil.Process(worker.pid).ppid() == server.process.pid


# -- events -----------------------------------------------------------------------------------


def test_events_tell_who_was_seen_and_resume(start: Start) -> None:
    server = start(THREAD_POOLS)
    with server.client() as client:
        client.enroll("ada-of-the-events", wire.picture(1), display_name="Ada")
        told: queue.SimpleQueue[facelane.Event] = queue.SimpleQueue()
        with client.watch_events() as events:
            reader = threading.Thread(target=lambda: [told.put(event) for event in events])
            reader.start()
            try:
                frames = [facelane.Frame(wire.picture(1), stream_offset=k * 0.1) for k in range(12)]
                list(client.analyze(frames, source_id="door-1"))
                seen = []
                while (
                    not seen or seen[-1].kind != "STREAM_CLOSED" or seen[-1].source_id != "door-1"
                ):
                    seen.append(told.get(timeout=60))
            finally:
                events.close()
                reader.join(30)
        door = [event for event in seen if event.source_id == "door-1"]
        kinds = [event.kind for event in door]
        told = ["STREAM_OPENED", "TRACK_STARTED", "SUBJECT_SEEN", "TRACK_ENDED", "STREAM_CLOSED"]
        assert kinds == told
        named = door[2]
        assert all(event.track for event in door[1:4])
        over = door[3].track
        assert over is not None
        assert over.global_track_id == f"{named.stream_id}/{named.track_id}"
        assert over.last_offset - over.first_offset == pytest.approx(1.1)
        assert over.looks >= 1
        assert over.display_name == "Ada"
        assert named.identity.subject_id == "ada-of-the-events"
        assert named.liveness.verdict == "LIVE"
        assert named.track_id
        assert named.stream_id == door[0].stream_id
        assert [e.sequence for e in seen] == sorted(e.sequence for e in seen)
        # Resumed after the opening: the rest again, the same.
        with client.watch_events(resume_token=door[0].resume_token) as again:
            assert [next(again).sequence for _ in range(4)] == [e.sequence for e in door[1:]]
        with client.watch_events(
            resume_token=door[0].resume_token, kinds=["SUBJECT_SEEN"]
        ) as again:
            assert next(again).identity == named.identity
        with (
            pytest.raises(facelane.ArgumentError) as invalid,
            client.watch_events(resume_token="nonsense"),
        ):
            pass
        assert invalid.value.reason == "RESUME_TOKEN_INVALID"
        token = seen[-1].resume_token
    server.stop()
    successor = RunningServer(server.folder, server.config.read_text())
    with successor:
        successor.wait_serving()
        with successor.client() as client:
            # What was told is found again by the next life, and what came after it.
            with client.watch_events(resume_token=door[0].resume_token) as again:
                assert [next(again) for _ in range(4)] == door[1:]
            with client.watch_events(resume_token=token) as again:
                assert next(again).sequence == seen[-1].sequence + 1
            with client.watch_events(door[0].resume_token, source_ids=["door-1"]) as again:
                assert [next(again).kind for _ in range(4)] == kinds[1:]
            assert client.get_subject("ada-of-the-events").template_count == 1
            assert client.server_info().degradations == ()


@pytest.mark.parametrize("year_s", [-62_135_596_800, 253_402_300_799])
def test_no_clock_of_a_camera_keeps_events_from_being_told(
    server: RunningServer, year_s: int
) -> None:
    """Of a camera without one, as some languages' empty time says it, or with a broken one."""
    with server.client() as client, client.watch_events() as events:
        with wire.channel(server.target) as channel, wire.RawStream(channel) as stream:
            opened = stream.open(source_id="no-clock")
            clock = timestamp_pb2.Timestamp(seconds=year_s)
            stream.write(wire.frame(1, capture_time=clock))
            assert stream.outcome().capture_time == clock
            far = duration_pb2.Duration(seconds=315_576_000_000)
            stream.write(wire.frame(2, stream_offset=far))
            assert wire.reason_of(stream.outcome().error) == "ARGUMENT_INVALID"
            stream.rest()
        told = itertools.takewhile(lambda event: event.kind != "STREAM_CLOSED", events)
        kinds = [event.kind for event in told if event.stream_id == opened.stream_id]
        assert kinds[:2] == ["STREAM_OPENED", "TRACK_STARTED"]
        assert kinds[-1] == "TRACK_ENDED"


def test_a_watcher_to_whom_nothing_happened_misses_nothing(server: RunningServer) -> None:
    """Not even what happens while its connection is broken."""
    with server.client() as client:
        with client.watch_events(kinds=["STREAM_OPENED"]) as events:
            token = events.resume_token
        list(client.analyze([wire.picture()], source_id="meanwhile"))
        with client.watch_events(token, kinds=["STREAM_OPENED"]) as events:
            assert next(events).source_id == "meanwhile"


@pytest.mark.slow
def test_a_quiet_subscription_is_not_taken_for_an_attack(server: RunningServer) -> None:
    """Clients ping while nothing happens; gRPC's default ends their connection for it."""
    options = [
        ("grpc.keepalive_time_ms", 1_100),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    with grpc.insecure_channel(server.target, options=options) as channel:
        stub = event_service_pb2_grpc.EventServiceStub(channel)
        # No event is of this kind here: nothing is said but where the watch begins, and pings.
        call = stub.WatchEvents(
            event_service_pb2.WatchEventsRequest(
                kinds=[event_service_pb2.EVENT_KIND_DEVICE_MEMORY]
            ),
            timeout=7.0,
        )
        with pytest.raises(grpc.RpcError) as ended:
            assert [said.HasField("event") for said in call] == []
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED, ended.value.details()


def test_events_tell_of_a_lost_pool(quick: RunningServer) -> None:
    told: queue.SimpleQueue[facelane.Event] = queue.SimpleQueue()
    with quick.client() as client, client.watch_events(kinds=["POOL_CHANGED"]) as events:
        reader = threading.Thread(target=lambda: [told.put(event) for event in events])
        reader.start()

        try:
            kill_worker(client, "recognizer")
            # What the tests before have done to other pools may be told only now.
            while (event := told.get(timeout=30)).pool != "recognizer":
                pass
        finally:
            events.close()
            reader.join(30)
    assert "SERVING" in event.message
