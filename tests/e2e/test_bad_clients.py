"""Clients that do not read, vanish, or come in crowds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from tests.e2e import wire
from tests.e2e.conftest import Start
from tests.running_server import THREAD_POOLS, RunningServer, toml
from tests.waiting import until

import facelane
from facelane.v1 import analysis_service_pb2 as pb
from facelane.v1 import analysis_service_pb2_grpc as pb_grpc
from facelane_server import limits

THREAD = 'isolation = "thread"'
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def open_streams(server: RunningServer) -> int:
    with server.client() as client:
        return client.server_info().open_streams


def descriptors(server: RunningServer) -> int:
    return psutil.Process(server.process.pid).num_fds()


def test_a_client_that_never_reads_loses_its_stream_and_nobody_else(
    start: Start, tmp_path: Path
) -> None:
    # 32 faces a frame fill the connection's buffers soon.
    detector = wire.null_detector(tmp_path, 32)
    server = start(wire.pools(detector, every=THREAD), "[limits]\nslow_reader_s = 0.5\nwindow = 16")
    with (
        wire.channel(server.target, buffer=65_536) as channel,
        server.client() as neighbour,
        wire.RawStream(channel) as stream,
    ):
        stream.open(options=pb.AnalysisOptions(skip_recognition=True, skip_liveness=True))
        before = psutil.Process(server.process.pid).memory_info().rss
        stream.write(*(wire.frame(number) for number in range(1, 2_000)))
        # Flow control holds the rest of the frames: the server keeps a window of them.
        until(lambda: open_streams(server) == 0, what="the stream to be ended")
        assert len(neighbour.analyze_image(wire.picture()).faces) == 32
        grown = psutil.Process(server.process.pid).memory_info().rss - before
        assert grown < 64 << 20
        assert stream.failure() == (EXHAUSTED, "SLOW_READER")


def test_a_slow_reader_that_does_read_keeps_its_stream(start: Start, tmp_path: Path) -> None:
    """Flow control, not the deadline, is what slows a stream down."""
    detector = wire.null_detector(tmp_path, 32)
    server = start(wire.pools(detector, every=THREAD), "[limits]\nslow_reader_s = 20\nwindow = 4")
    with wire.channel(server.target) as channel, wire.RawStream(channel) as stream:
        stream.open(options=pb.AnalysisOptions(skip_recognition=True, skip_liveness=True))
        stream.write(*(wire.frame(number) for number in range(1, 101)))
        seen = []
        pause = threading.Event()
        for _ in range(100):
            seen.append(stream.outcome().frame_id)
            if len(seen) % 25 == 0:
                pause.wait(0.3)
        assert seen == list(range(1, 101))
        assert stream.rest()[-1].summary.results == 100


VANISHING = """
import os, sys
import facelane
from tests.e2e import wire
client = facelane.Client(sys.argv[1])
streams = [client.analyze_stream(overload="lossless") for _ in range(4)]
for stream in streams:
    stream.__enter__()
    for _ in range(20):
        stream.send(wire.picture())
print("under way", flush=True)
while True:
    for stream in streams:
        stream.recv()
        stream.send(wire.picture())
"""


def test_a_client_that_is_killed_leaves_nothing_behind(server: RunningServer) -> None:
    assert open_streams(server) == 0
    root = Path(__file__).resolve().parent.parent.parent

    def come_and_go() -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", VANISHING, server.target],
            stdout=subprocess.PIPE,
            cwd=root,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "under way\n"
            until(lambda: open_streams(server) == 4)
            os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()
            process.wait(30)
            process.stdout.close()
        until(lambda: open_streams(server) == 0, what="the lanes to be gone")

    come_and_go()
    before = descriptors(server)
    for _ in range(2):
        come_and_go()
    until(lambda: descriptors(server) <= before, what="no descriptor to be left")
    # What the dead client had under way holds no place in the pools either.
    with server.client() as client:
        until(lambda: not any(p.queued + p.in_flight for p in client.pools()))


def test_a_client_that_cancels_is_counted_once(server: RunningServer) -> None:
    position = len(server.text())
    with server.client() as client:
        # Many times: the moment at which the server hears of it differs.
        for _ in range(50):
            with client.analyze_stream(overload="lossless") as stream:
                for _ in range(5):
                    stream.send(wire.picture())
                # Left without half-closing.
        until(lambda: client.server_info().open_streams == 0, what="every place to be given back")
        assert len(client.analyze_image(wire.picture()).faces) == 1
    written = server.text()[position:]
    assert "Traceback" not in written
    assert '"error"' not in written, written


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with few places, all of which are given back."""
    folder = tmp_path_factory.mktemp("crowded")
    # However slow this machine is, places are what runs out.
    extra = "[limits]\nmax_streams = 64\nage_target_ms = 0"
    with RunningServer(folder, toml(folder, THREAD_POOLS, extra)) as made:
        made.wait_serving()
        yield made


def test_500_streams_at_once(crowded: RunningServer) -> None:
    taken: list[wire.RawStream] = []
    with contextlib.ExitStack() as stack:
        # A connection carries 100; further calls would wait at their client.
        channels = [stack.enter_context(wire.channel(crowded.target)) for _ in range(5)]
        before = descriptors(crowded)
        streams: list[wire.RawStream] = []
        try:
            fates: Counter[str] = Counter()
            # Of more calls than may wait to be looked at gRPC turns some away without a word.
            for _ in range(2):
                assert limits.MAX_PENDING_CALLS >= 250
                wave = [wire.RawStream(channels[n % 5]) for n in range(250)]
                streams += wave
                for stream in wave:
                    stream.write(wire.config(), wire.frame(1))
                for stream in wave:
                    try:
                        fates[stream.read().WhichOneof("message") or ""] += 1
                        taken.append(stream)
                    except grpc.RpcError as error:
                        fates[wire.refusal(error)[1]] += 1
            assert fates == {"opened": 64, "STREAM_LIMIT": 436}
            for stream in taken:
                assert stream.outcome().WhichOneof("outcome") == "result"
                assert stream.rest()[-1].summary.results == 1
        finally:
            for stream in streams:
                stream.close()
        with crowded.client() as client:
            until(lambda: client.server_info().open_streams == 0)
            with client.analyze_stream() as again:
                again.send(wire.picture())
                again.close_send()
                assert [o.result is not None for o in again] == [True]
        until(lambda: descriptors(crowded) <= before + 5)


def test_500_connections_at_once(crowded: RunningServer) -> None:
    """As many connections, each with its own stream: the limit holds, the rest is refused."""
    channels = [grpc.insecure_channel(crowded.target, [("n", k)]) for k in range(500)]
    try:
        calls = [
            pb_grpc.AnalysisServiceStub(made).AnalyzeStream(
                iter([wire.config(), wire.frame(1)]), timeout=wire.CALL_S
            )
            for made in channels
        ]
        ends: Counter[str] = Counter()
        for call in calls:
            try:
                ends[list(call)[-1].WhichOneof("message") or ""] += 1
            except grpc.RpcError as error:
                # Of calls that wait to be looked at gRPC itself turns away those past the bound.
                turned_away = error.code() is grpc.StatusCode.CANCELLED
                ends["turned away" if turned_away else wire.refusal(error)[1]] += 1
        assert set(ends) <= {"summary", "STREAM_LIMIT", "turned away"}
        assert ends["turned away"] <= 500 - limits.MAX_PENDING_CALLS
        assert ends["summary"] >= 64
        assert ends.total() == 500
    finally:
        for made in channels:
            made.close()
    with crowded.client() as client:
        until(lambda: client.server_info().open_streams == 0)
        assert len(client.analyze_image(wire.picture()).faces) == 1


def test_a_stream_that_says_nothing_gives_its_place_back(start: Start) -> None:
    server = start(THREAD_POOLS, "[limits]\nmax_streams = 1\nfirst_message_s = 3")
    with wire.channel(server.target) as channel, wire.RawStream(channel) as silent:
        assert silent.failure() == (grpc.StatusCode.INVALID_ARGUMENT, "CONFIG_MISSING")
        with wire.RawStream(channel) as taken, wire.RawStream(channel) as refused:
            taken.open()
            refused.write(wire.config())
            assert refused.failure() == (EXHAUSTED, "STREAM_LIMIT")


@pytest.mark.slow
def test_single_calls_are_bounded(start: Start) -> None:
    """More pictures than the server works on at a time are refused, not queued for ever."""
    server = start(
        wire.pools(detector='options = { "fail.slow_load_ms" = "5000" }'),
        # Of what waits for the worker none is given up before it is back, however slow that is.
        "[limits]\nimage_timeout_ms = 100_000",
    )
    with server.client() as client:
        (worker,) = client.pools()[0].workers
        with wire.channel(server.target) as one, wire.channel(server.target) as other:
            # A connection carries 100; further calls would wait at their client.
            stubs = [pb_grpc.AnalysisServiceStub(channel) for channel in (one, other)]
            request = pb.AnalyzeImageRequest(picture=wire.pb_picture())
            # None is answered before all have been asked: the worker has to start again.
            os.kill(worker.pid, signal.SIGKILL)
            until(lambda: client.pools()[0].workers[0].pid != worker.pid, what="the loss")
            calls = [
                stubs[n % 2].AnalyzeImage.future(request, timeout=wire.CALL_S) for n in range(200)
            ]
            codes = Counter(call.code() for call in calls)
    # Those that a slow client asks only once the worker is back are answered too.
    assert codes.total() == codes[EXHAUSTED] + codes[grpc.StatusCode.OK]
    assert codes[grpc.StatusCode.OK] >= 128
    assert codes[EXHAUSTED]
    with server.client() as client:
        assert len(client.analyze_image(wire.picture()).faces) == 1


FLOOD = 300
"""Frames: the window some times over."""


@pytest.mark.slow
@pytest.mark.parametrize("overload", ["lossless", "latest_wins"])
def test_a_flood_gets_an_outcome_for_every_frame(
    server: RunningServer, overload: facelane.Overload
) -> None:
    with server.client() as client, client.analyze_stream(overload=overload) as stream:
        seen: list[int] = []

        def read() -> None:
            seen.extend(outcome.frame_id for outcome in stream)

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(FLOOD):
            stream.send(wire.picture(number % 3))
        stream.close_send()
        reader.join(30)
        assert not reader.is_alive()
        summary = stream.summary
    assert seen == list(range(1, FLOOD + 1))
    assert summary.received == FLOOD == summary.results + summary.drops + summary.errors
    assert summary.errors == 0
    if overload == "lossless":
        assert summary.drops == 0
    else:
        assert set(summary.drops_by_reason) <= {"SUPERSEDED", "TOO_OLD", "THINNED"}
