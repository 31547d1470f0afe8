"""A real keeper with two real shards: what clients meet, and what is left when one of them goes."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.e2e import wire
from tests.running_server import NULL_POOLS, RunningServer, free_port, toml
from tests.waiting import until

import facelane
from facelane.types import WorkerState

RECONNECT = facelane.Reconnect(initial_delay=0.02, max_delay=0.2)


class Sharded(RunningServer):
    """A server of several processes on a port of this machine."""

    def __init__(self, folder: Path, *, shards: int = 2, extra: str = "") -> None:
        self.port, self.metrics = free_port(), free_port()
        text = toml(folder, NULL_POOLS, extra, f"127.0.0.1:{self.port}")
        text = text.replace("[server]", f"[server]\nshards = {shards}\ndrain_grace_s = 5.0")
        scraped = f'[metrics]\nlisten = "127.0.0.1:{self.metrics}"'
        text = text.replace('[metrics]\nlisten = ""', scraped)
        super().__init__(folder, text if "[auth]" in extra else f'{text}\n[auth]\nmode = "none"')

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def shards(self) -> list[facelane.ShardInfo]:
        with self.client() as client:
            return list(client.server_info().shards)

    def shard(self, index: int) -> psutil.Process:
        return psutil.Process(self.shards()[index].pid)

    def wait_whole(self) -> None:
        """Until every shard serves and takes connections."""

        def whole() -> bool:
            with contextlib.suppress(facelane.FacelaneError):
                return all(s.state is WorkerState.READY for s in self.shards())
            return False

        until(whole, what="every shard READY")

    def http(self, path: str) -> tuple[int, str]:
        try:
            address = f"http://127.0.0.1:{self.metrics}{path}"
            with urllib.request.urlopen(address, timeout=10) as got:
                return got.status, got.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sharded]:
    with Sharded(tmp_path_factory.mktemp("sharded")) as made:
        made.wait_serving()
        made.wait_whole()
        yield made


class Camera:
    """A stream that sends one frame after another, and keeps count."""

    def __init__(self, client: facelane.Client, seed: int, **options: object) -> None:
        self.outcomes: list[facelane.Outcome] = []
        self._stop = threading.Event()
        self.stream = client.analyze_stream(
            overload="lossless",
            reconnect=RECONNECT,
            **options,  # type: ignore[arg-type]
        )
        self._picture = wire.picture(seed)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._reader = threading.Thread(
            target=lambda: self.outcomes.extend(self.stream), daemon=True
        )

    def start(self) -> None:
        self.stream.__enter__()
        self._thread.start()
        self._reader.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(facelane.DeadlineExceededError):
                self.stream.send(self._picture, timeout=0.1)
            time.sleep(0.04)  # a camera's pace
        self.stream.close_send()

    @property
    def results(self) -> int:
        return sum(outcome.result is not None for outcome in list(self.outcomes))

    @property
    def lost(self) -> int:
        return sum(outcome.error is not None for outcome in list(self.outcomes))

    def go_on(self, more: int = 3) -> None:
        """Until so many results more have come."""
        goal = self.results + more
        until(lambda: self.results >= goal, what=f"{more} results more of {self.results}")

    def end(self) -> None:
        self._stop.set()
        self._thread.join(30)
        self._reader.join(30)
        assert not self._reader.is_alive()
        self.stream.close()
        summary = self.stream.summary
        assert summary.received == summary.results + summary.drops + summary.errors
        ids = [outcome.frame_id for outcome in self.outcomes]
        assert ids == sorted(set(ids))


@contextlib.contextmanager
def cameras(client: facelane.Client, count: int) -> Iterator[list[Camera]]:
    made = [Camera(client, seed) for seed in range(count)]
    for one in made:
        one.start()
    try:
        for one in made:
            one.go_on()
        yield made
    finally:
        for one in made:
            one.end()


def test_one_answer_for_all_and_streams_are_spread(sharded: Sharded) -> None:
    with sharded.client() as client, cameras(client, 8):
        streams = [shard.open_streams for shard in sharded.shards()]
        assert sum(streams) == 8
        assert all(3 <= number <= 5 for number in streams), streams
        # Whichever shard is asked: a connection each.
        for _ in range(4):
            with sharded.client() as another:
                info = another.server_info()
                assert info.open_streams == 8
                assert not info.degradations
                assert another.health() == "SERVING"
                pools = {pool.pool: pool for pool in another.pools()}
                assert [w.worker_id for w in pools["detector"].workers] == [
                    "0/detector#0",
                    "1/detector#0",
                ]
                assert pools["detector"].completed > 0
    assert sharded.http("/health") == (200, "SERVING\n")
    assert sharded.http("/health/facelane.v1.AnalysisService")[0] == 200
    assert sharded.http("/health/nobody")[0] == 404
    status, text = sharded.http("/metrics")
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    results = {
        s.labels["shard"]: s.value
        for s in families["facelane_frames"].samples
        if s.labels.get("outcome") == "result"
    }
    assert set(results) == {"0", "1"}
    assert all(results.values())
    assert len(families["facelane_build_info"].samples) == 1


def test_what_is_enrolled_at_one_is_matched_at_every_one_and_deleted_everywhere(
    sharded: Sharded,
) -> None:
    def of_each() -> Iterator[facelane.Client]:
        """Connections, of which some lead to either shard."""
        for _ in range(8):
            with sharded.client() as client:
                yield client

    with sharded.client() as client, cameras(client, 4) as streams:
        client.enroll("grace", wire.picture(0), create_subject=True)
        # On streams of either shard, and by single calls.
        until(
            lambda: (
                [
                    face.identity.subject_id
                    for outcome in streams[0].outcomes[-1:]
                    if outcome.result
                    for face in outcome.result.faces
                ]
                == ["grace"]
            ),
            what="the name on a stream that was open",
        )
        for another in of_each():
            until(
                lambda a=another: _who(a) == ["grace"],  # type: ignore[misc]
                what="the name at every shard",
            )
        client.delete_subject("grace")
        for another in of_each():
            assert _who(another) == [""]


def _who(client: facelane.Client) -> list[str]:
    return [face.identity.subject_id for face in client.identify(wire.picture(0))]


@pytest.mark.slow
def test_streams_are_listed_and_looked_at_by_whichever_shard_is_asked(sharded: Sharded) -> None:
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(sharded.client())
        names = [f"door{number}" for number in range(6)]
        for number, name in enumerate(names):
            camera = Camera(client, number, source_id=name)
            camera.start()
            stack.callback(camera.end)
            camera.go_on()
        assert min(shard.open_streams for shard in sharded.shards()) >= 2
        # By connections that lead to either shard, each stream of both.
        for _ in range(4):
            with sharded.client() as another:
                listed = another.list_streams()
                assert sorted(one.source_id for one in listed) == names
                for one in listed:
                    with contextlib.closing(another.watch_stream(stream_id=one.stream_id)) as shown:
                        seen = next(shown)
                        number = names.index(one.source_id)
                        assert seen.picture.data == wire.encoded(seed=number)
        with sharded.client() as another:
            with contextlib.closing(another.watch_stream("door3", results_only=True)) as shown:
                for _ in range(3):
                    seen = next(shown)
                    assert seen.outcome is not None
                    assert seen.outcome.result is not None
                assert [one.watchers for one in client.list_streams(source_ids=["door3"])] == [1]
            until(
                lambda: [one.watchers for one in client.list_streams(source_ids=["door3"])] == [0],
                what="the end of the look",
            )
            with pytest.raises(facelane.NotFoundError) as caught:
                next(another.watch_stream("door9"))
            assert caught.value.reason == "STREAM_NOT_FOUND"
            last = another.watch_stream("door0")
            next(last)
            stack.close()
            assert sum(1 for _ in last) >= 0, "it ends with the stream, without an error"


def test_events_go_on_at_any_shard(sharded: Sharded) -> None:
    with sharded.client() as client, client.watch_events() as events:
        token = events.resume_token
        for number in range(6):
            with client.analyze_stream(source_id=f"camera{number}"):
                pass
        opened = [f"camera{number}" for number in range(6)]
        told: list[list[str]] = []
        for _ in range(4):
            with sharded.client() as another, another.watch_events(token) as again:
                found = []
                while len(found) < 6:
                    event = next(again)
                    if event.kind == "STREAM_OPENED":
                        found.append(event.source_id)
                # In the store's order, which is one for all; shards write theirs as they can.
                told.append(found)
        assert sorted(told[0]) == opened
        assert told == [told[0]] * 4


@pytest.mark.slow
def test_a_worker_is_restarted_and_a_model_reloaded_by_whichever_shard_is_asked(
    sharded: Sharded,
) -> None:
    with sharded.client() as client:
        done = client.restart_worker("1/liveness#0")
        assert done.old_pid != done.new_pid
        with pytest.raises(facelane.NotFoundError, match="shard/pool#number"):
            client.restart_worker("liveness#0")
        with pytest.raises(facelane.NotFoundError, match="no shard 7"):
            client.restart_worker("7/liveness#0")
        before = {w.worker_id: w.pid for p in client.pools() for w in p.workers}
        with cameras(client, 4) as streams:
            client.reload_model("detector")
            for stream in streams:
                stream.go_on()
                assert not stream.lost
        after = {w.worker_id: w.pid for p in client.pools() for w in p.workers}
        changed = {
            name.partition("/")[0]
            for name, pid in after.items()
            if "detector" in name and pid not in before.values()
        }
        assert changed == {"0", "1"}
        with pytest.raises(facelane.FacelaneError) as caught:
            client.reload_model("detector", "no-such-model")
        assert caught.value.reason == "MODEL_INVALID"


def test_a_killed_shard_takes_its_streams_with_it_and_nothing_else(sharded: Sharded) -> None:
    with sharded.client() as client, cameras(client, 6) as streams:
        victim = sharded.shard(1)
        workers = victim.children(recursive=True)
        victim.kill()
        for stream in streams:
            stream.go_on()
        lost = [stream for stream in streams if stream.stream.summary.connections > 1]
        kept = [stream for stream in streams if stream.stream.summary.connections == 1]
        assert lost, "the shard had streams"
        assert len(kept) >= 2, "the other one's did not notice"
        assert not any(stream.lost for stream in kept)
        told = [d.component for d in client.server_info().degradations]
        assert told in (["shards"], []), told
        sharded.wait_whole()
        assert sharded.shards()[1].restarts == 1
        assert sharded.shards()[1].last_loss == "SIGKILL"
        assert not client.server_info().degradations
        assert sharded.http("/health") == (200, "SERVING\n")
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive, "its workers ended with it"
        # Who comes now is sent where there is room.
        with cameras(client, 4):
            numbers = [shard.open_streams for shard in sharded.shards()]
            assert numbers[1] >= 2, numbers


@pytest.mark.slow
def test_while_a_shard_is_away_the_others_say_so(sharded: Sharded) -> None:
    """It is stopped: it hangs, and is replaced."""
    with sharded.client() as client, cameras(client, 2) as streams:
        sharded.shard(0).suspend()
        found = until(lambda: _asked(sharded), what="a degradation")
        assert "shard 0" in found[0].message
        until(lambda: "shard hangs" in sharded.text(), what="the keeper's verdict")
        sharded.wait_whole()
        assert sharded.shards()[0].last_loss == "HUNG"
        for stream in streams:
            stream.go_on()


def _asked(sharded: Sharded) -> list[facelane.Degradation]:
    """By a connection to a shard that answers."""
    with contextlib.suppress(facelane.FacelaneError), sharded.client(timeout=5.0) as client:
        return list(client.server_info().degradations)
    return []


@pytest.mark.slow
def test_hangup_reloads_one_after_the_other_and_streams_stay(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    first, second = "a" * 43, "b" * 43

    def write(*secrets: str) -> None:
        keys.write_text(
            "".join(
                f'[[keys]]\nname = "k{secret[0]}"\nsha256 = '
                f'"{hashlib.sha256(secret.encode()).hexdigest()}"\nscopes = ["admin"]\n'
                for secret in secrets
            )
        )
        keys.chmod(0o600)

    write(first)
    extra = f'[auth]\nkeys_file = "{keys}"\n'
    with Sharded(tmp_path, extra=extra) as server:
        until(lambda: '"serving"' in server.text() or _end(server), what="serving")
        with facelane.Client(server.target, token=first, timeout=30.0) as client:
            client.wait_until_serving()
            with cameras(client, 4) as streams:
                write(first, second)
                server.process.send_signal(signal.SIGHUP)
                until(lambda: server.text().count('"config reloaded"') == 3, what="reloads")
                for stream in streams:
                    stream.go_on()
                    assert stream.stream.summary.connections == 1
        lines = [line for line in server.text().splitlines() if '"config reloaded"' in line]
        assert '"shard": 0' in lines[0]
        assert '"shard": 1' in lines[1]
        assert '"shards": 2' in lines[2]
        for _ in range(4):
            with facelane.Client(server.target, token=second, timeout=30.0) as client:
                assert client.server_info().shards
        # What cannot be read changes nothing.
        server.config.write_text("nonsense")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "config not reloaded" in server.text(), what="the refusal")
        with facelane.Client(server.target, token=second, timeout=30.0) as client:
            client.drain(0.5)
        assert server.process.wait(60) == 0


def _end(server: Sharded) -> bool:
    assert server.process.poll() is None, server.text()[-3000:]
    return False


@pytest.mark.slow
def test_the_end_is_in_order_and_without_a_keeper_nothing_is_left(tmp_path: Path) -> None:
    server = Sharded(tmp_path)
    server.wait_serving()
    with server.client() as client, cameras(client, 4):
        processes = [*server.children()]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    assert "Traceback" not in server.text()
    assert server.text().count('"ended"') == 3
    server.stop()

    server = Sharded(tmp_path)
    server.wait_serving()
    processes = [*server.children()]
    slow = server.shard(0)
    slow.suspend()  # it hears of it late
    server.process.kill()
    server.process.wait(30)
    slow.resume()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive, "shards and workers end with their keeper"
    server.stop()


@pytest.mark.slow
def test_a_second_server_is_not_let_in(sharded: Sharded, tmp_path: Path) -> None:
    """Though ports are shared by those who ask for it."""
    other = Sharded(tmp_path)
    other.stop()
    text = other.config.read_text().replace(str(other.port), str(sharded.port))
    folder = tmp_path / "second"
    folder.mkdir()
    second = RunningServer(folder, text)
    assert second.process.wait(60) == 69
    assert "Address already in use" in second.text()
    second.stop()


@pytest.mark.slow
def test_what_cannot_be_started_ends_with_its_reason(tmp_path: Path) -> None:
    """As a server of one process does."""
    server = Sharded(tmp_path, extra='[gallery]\npath = "/proc/nowhere/gallery.db"\n')
    assert server.process.wait(60) in (69, 78)
    assert "/proc/nowhere" in server.text()
    server.stop()
