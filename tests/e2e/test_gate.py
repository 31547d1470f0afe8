"""What a caller gets before and after its key is looked at; a server with keys on a socket."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import psutil
import pytest
from tests.e2e import wire
from tests.running_server import THREAD_POOLS, RunningServer, toml
from tests.waiting import until

import facelane
from facelane_server.edge.auth import Key, new_key

IMAGE = "/facelane.v1.AnalysisService/AnalyzeImage"
QUOTAS = "[quotas]\nstreams = 2\nwatchers = 1\n[limits]\nslow_reader_s = 1\n"


class Keyed:
    """A server, and the secrets of its keys."""

    def __init__(self, server: RunningServer, file: Path) -> None:
        self.server = server
        self.file = file
        self.keys: dict[str, Key] = {}
        self.secrets: dict[str, str] = {}

    def add(self, name: str, *scopes: str, **bounds: object) -> None:
        self.secrets[name], self.keys[name] = new_key(name, scopes, **bounds)  # type: ignore[arg-type]

    def write(self) -> None:
        self.file.write_text("\n".join(key.entry() for key in self.keys.values()))

    def reload(self) -> None:
        self.write()
        before = self.server.text().count("config reloaded")
        self.server.process.send_signal(signal.SIGHUP)
        until(lambda: self.server.text().count("config reloaded") > before, what="the reload")

    def client(self, name: str, **options: object) -> facelane.Client:
        return self.server.client(token=self.secrets[name], **options)

    def metadata(self, name: str) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self.secrets[name]}")]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed")
    file = folder / "keys.toml"
    auth = f'[auth]\nmode = "keys"\nkeys_file = "{file}"\n{QUOTAS}'
    # Written first: the server reads it as it starts.
    made = Keyed(None, file)  # type: ignore[arg-type]
    made.add("ops", "admin")
    made.add("door", "analyze", sources=("door-*",), galleries=("staff",))
    made.add("other", "analyze")
    made.add("hr", "gallery", galleries=("staff",))
    made.write()
    with RunningServer(folder, toml(folder, THREAD_POOLS, auth)) as server:
        made.server = server

        def serving() -> bool:
            with made.client("ops", timeout=2.0) as client:
                try:
                    return client.health() == "SERVING"
                except facelane.FacelaneError:
                    return False

        until(serving, 60, "SERVING")
        yield made


def refused(call: grpc.UnaryUnaryMultiCallable, data: bytes, metadata: object) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        call(data, timeout=wire.CALL_S, metadata=metadata)
    return error.value


def test_bytes_that_are_no_message(keyed: Keyed) -> None:
    with wire.channel(keyed.server.target) as channel:
        for method in (
            IMAGE,
            "/facelane.v1.GalleryService/ListSubjects",
            "/facelane.v1.EventService/WatchEvents",
            "/grpc.health.v1.Health/Check",
        ):
            call = channel.unary_unary(method)
            for garbage in (b"\xff" * 1_000, b"\x0a\xff\xff\xff\xff\x0f"):
                stranger = refused(call, garbage, None)
                assert stranger.code() is grpc.StatusCode.UNAUTHENTICATED
                known = refused(call, garbage, keyed.metadata("ops"))
                assert known.code() is grpc.StatusCode.INVALID_ARGUMENT, method
                assert wire.refusal(known)[1] == "ARGUMENT_INVALID"
        stream = channel.stream_stream("/facelane.v1.AnalysisService/AnalyzeStream")
        with pytest.raises(grpc.RpcError) as error:
            list(stream(iter([b"\xff"]), timeout=wire.CALL_S, metadata=keyed.metadata("other")))
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in keyed.server.text()


def test_nothing_is_taken_in_before_the_key(keyed: Keyed) -> None:
    process = psutil.Process(keyed.server.process.pid)
    body = bytes(30 << 20)
    with wire.channel(keyed.server.target) as channel:
        call = channel.unary_unary(IMAGE)
        refused(call, b"", None)
        before = process.memory_info().rss
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            calls = [
                call.future(body, timeout=wire.CALL_S, compression=compression) for _ in range(8)
            ]
            codes = {each.code() for each in calls}
            assert codes == {grpc.StatusCode.UNAUTHENTICATED}
        assert process.memory_info().rss - before < 30 << 20


def test_a_key_has_its_share_and_not_that_of_others(keyed: Keyed) -> None:
    with wire.channel(keyed.server.target) as channel, contextlib.ExitStack() as stack:

        def opened(name: str) -> wire.RawStream:
            stream = wire.RawStream(channel, keyed.metadata(name))
            stack.callback(stream.close)
            stream.write(wire.config())
            return stream

        for _ in range(2):
            assert opened("other").read().WhichOneof("message") == "opened"
        with pytest.raises(grpc.RpcError) as error:
            opened("other").read()
        assert wire.refusal(error.value) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUOTA_EXCEEDED",
        )
        assert opened("ops").read().WhichOneof("message") == "opened"


def test_who_reads_no_answer_holds_no_place(keyed: Keyed) -> None:
    """A watcher of events or of health, or a single call."""
    keyed.add("deaf", "admin")
    keyed.reload()
    log = keyed.server.text
    told = '"reason": "SLOW_READER", "event": "call refused or ended"'
    before = log().count(told)
    ((_, bearer),) = keyed.metadata("deaf")
    with contextlib.closing(wire.Deaf(keyed.server.target.removeprefix("unix:"))) as deaf:
        for number, method in enumerate((
            "/facelane.v1.EventService/WatchEvents",
            "/grpc.health.v1.Health/Watch",
            "/facelane.v1.ServerService/GetServerInfo",
            "/facelane.v1.GalleryService/ListSubjects",
        )):  # fmt: skip
            deaf.call(method, authorization=bearer)
            until(lambda n=number: log().count(told) == before + n + 1, what=method)
        # It may have one watcher, and has it again though it is still there.
        with keyed.client("deaf") as client, client.watch_events():
            pass


def test_a_camera_sends_as_itself_and_searches_its_own_gallery(keyed: Keyed) -> None:
    with keyed.client("door") as client:
        assert client.analyze_image(wire.picture(), gallery="staff") is not None
        for wrong in ({"gallery": "board"}, {"gallery": "default"}):
            with pytest.raises(facelane.PermissionDeniedError):
                client.analyze_image(wire.picture(), **wrong)
    with keyed.client("hr") as client, pytest.raises(facelane.PermissionDeniedError):
        list(client.list_subjects(gallery="board"))


def test_a_key_that_is_removed_ends_its_streams(keyed: Keyed) -> None:
    keyed.add("leaver", "analyze")
    keyed.add("shrinking", "analyze", "gallery")
    keyed.reload()
    with wire.channel(keyed.server.target) as channel, contextlib.ExitStack() as stack:
        streams = {}
        for name in ("leaver", "shrinking", "other"):
            streams[name] = wire.RawStream(channel, keyed.metadata(name))
            stack.callback(streams[name].close)
            streams[name].write(wire.config())
            assert streams[name].read().WhichOneof("message") == "opened"
        key = keyed.keys.pop("leaver")
        keyed.keys["shrinking"] = Key("shrinking", keyed.keys["shrinking"].sha256, ("analyze",))
        # Not the file ends them, and not their clients: the reload does, and nothing else.
        keyed.write()
        for stream in streams.values():
            stream.write(wire.frame(1))
            assert stream.outcome().frame_id == 1
        told = len(keyed.server.text())
        keyed.reload()
        for name, reason in (("leaver", "UNAUTHENTICATED"), ("shrinking", "PERMISSION_DENIED")):
            with pytest.raises(grpc.RpcError) as error:
                streams[name].read()
            assert wire.refusal(error.value)[1] == reason
        streams["other"].write(wire.frame(2))
        assert streams["other"].outcome().frame_id == 2
        assert key.name == "leaver"
        log = keyed.server.text()[told:]
        ends = [line for line in log.splitlines() if "call refused or ended" in line]
        assert len(ends) == 2
        assert log.index("config reloaded") < log.index("call refused or ended")


def test_a_key_that_expires_ends_its_streams(keyed: Keyed) -> None:
    with wire.channel(keyed.server.target) as channel:

        def opened(seconds: int) -> wire.RawStream | None:
            """A stream of a key that holds so long; None = it was over before."""
            soon = datetime.now(UTC) + timedelta(seconds=seconds)
            keyed.add("guest", "analyze", expires=soon)
            keyed.reload()
            made = wire.RawStream(channel, keyed.metadata("guest"))
            made.write(wire.config())
            try:
                assert made.read().WhichOneof("message") == "opened"
            except grpc.RpcError as refused:
                made.close()
                if wire.refusal(refused)[1] != "UNAUTHENTICATED":
                    raise
                return None
            return made

        # As long as this machine needs for a reload and a stream.
        stream = next(made for seconds in (3, 9, 27, 81) if (made := opened(seconds)))
        with pytest.raises(grpc.RpcError) as error:
            stream.read()
        assert wire.refusal(error.value)[1] == "UNAUTHENTICATED"
        assert "expired" in str(error.value.details())
        stream.close()
