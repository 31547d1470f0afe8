"""Restarts, reloads and drains under load: every frame keeps its outcome.

``tests/e2e/test_operations.py`` looks at each of them through the SDK; here all of them
come together, upon sixteen streams that keep their own books.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from tests.e2e import wire
from tests.faults import cells, traffic
from tests.running_server import RunningServer, toml
from tests.waiting import auntil, until

import facelane
from facelane.v1 import admin_service_pb2 as admin_pb
from facelane.v1 import admin_service_pb2_grpc as admin_grpc

PATTERNS = tuple(
    traffic.lossless(pace_s=0.03, video=n % 8 == 1)
    if n % 2
    else traffic.Pattern(pace_s=0.03, video=n % 8 == 0)
    for n in range(16)
)

RECONNECT = facelane.Reconnect(max_delay=0.5)


async def begin(
    channel: grpc.aio.Channel, stop: asyncio.Event, patterns: tuple[traffic.Pattern, ...] = PATTERNS
) -> list[asyncio.Task[traffic.Books]]:
    return [
        asyncio.create_task(traffic.stream(channel, pattern, stop, n, f"stream {n}"))
        for n, pattern in enumerate(patterns)
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_restarts_reloads_and_hangups_lose_nothing(tmp_path: Path) -> None:
    """RestartWorker and ReloadModel for every pool, and SIGHUP in between, twice."""
    with RunningServer(tmp_path, toml(tmp_path, wire.pools())) as server:
        server.wait_serving()
        stop = asyncio.Event()
        async with cells.connection(server) as channel:
            streams = await begin(channel, stop)
            admin = admin_grpc.AdminServiceStub(channel)
            for _ in range(2):
                for stage in cells.STAGES:
                    await admin.ReloadModel(admin_pb.ReloadModelRequest(pool=stage), timeout=30.0)
                    os.kill(server.process.pid, signal.SIGHUP)
                    cell = cells.Cell(server, channel, stage, random.Random(1))
                    restarted = await admin.RestartWorker(
                        admin_pb.RestartWorkerRequest(worker_id=await cell.worker_id()),
                        timeout=30.0,
                    )
                    assert restarted.old_pid != restarted.new_pid
            stop.set()
            books = await asyncio.gather(*streams)
        assert server.text().count("config reloaded") == 6
    for book, pattern in zip(books, PATTERNS, strict=True):
        assert not book.broken, book
        assert not book.ended, book
        assert book.results > 20
        if pattern.lossless:
            assert (book.results, book.drops.total(), book.errors.total()) == (book.sent, 0, 0)
        else:
            assert set(book.drops) <= {"SUPERSEDED", "TOO_OLD", "THINNED"}
            assert set(book.errors) <= cells.LATE


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_reload_alone_costs_no_result(tmp_path: Path) -> None:
    """The new workers stand beside the old ones: not even a stage goes missing."""
    with RunningServer(tmp_path, toml(tmp_path, wire.pools())) as server:
        server.wait_serving()
        stop = asyncio.Event()
        async with cells.connection(server) as channel:
            flow = traffic.lossless(pace_s=0.01, tracking=False)
            streams = await begin(channel, stop, (flow,) * 4)
            admin = admin_grpc.AdminServiceStub(channel)
            for stage in cells.STAGES:
                await admin.ReloadModel(admin_pb.ReloadModelRequest(pool=stage), timeout=30.0)
            stop.set()
            books = await asyncio.gather(*streams)
    for book in books:
        assert not book.broken, book
        assert (book.results, sum(book.missing.values())) == (book.sent, 0), book


@pytest.mark.parametrize("by", [pytest.param("SIGTERM", marks=pytest.mark.slow), "Drain"])
async def test_a_drain_under_faults_gives_every_frame_an_outcome(tmp_path: Path, by: str) -> None:
    """The server is told to go while its workers are being killed."""
    folder = tmp_path
    config = cells.configuration(folder).replace("[server]", "[server]\ndrain_grace_s = 60.0")
    with RunningServer(folder, config) as server:
        server.wait_serving()
        stop = asyncio.Event()
        async with cells.connection(server) as channel:
            streams = await begin(channel, stop)
            cell = cells.Cell(server, channel, "detector", random.Random(1))
            await asyncio.sleep(0.3)  # some traffic before
            await cell.kill(signal.SIGKILL)
            if by == "SIGTERM":
                server.process.send_signal(signal.SIGTERM)
            else:
                stub = admin_grpc.AdminServiceStub(channel)
                await stub.Drain(admin_pb.DrainRequest(), timeout=10.0)
            stop.set()
            books = await asyncio.wait_for(asyncio.gather(*streams), 100.0)
        await auntil(lambda: server.process.poll() is not None, what="the end")
        assert server.process.returncode == 0
        assert "Traceback" not in server.text(), server.text()[-6000:]
    # One that had not been let in when the drain began was refused, and nothing of it taken.
    let_in = [book for book in books if book.ended != "DRAINING" or book.outcomes]
    assert let_in
    for book in let_in:
        assert not book.broken, book
        assert book.outcomes == book.sent, book
        assert set(book.drops) <= {"DRAINING", "SUPERSEDED", "TOO_OLD", "THINNED"}
        assert set(book.errors) <= cells.LATE


@pytest.mark.slow
def test_the_sdk_goes_on_with_the_next_server(tmp_path: Path) -> None:
    """A stream with ``reconnect`` outlives a drained server and a killed one: each frame has
    one outcome, in order, those in flight at the cut as lost."""
    config = toml(tmp_path, wire.pools()).replace("[server]", "[server]\ndrain_grace_s = 0.5")
    server = RunningServer(tmp_path, config)
    outcomes: list[facelane.Outcome] = []
    sent = 0
    try:
        server.wait_serving()
        with (
            server.client() as client,
            client.analyze_stream(reconnect=RECONNECT, overload="lossless") as stream,
        ):
            reader = threading.Thread(target=lambda: outcomes.extend(stream))
            reader.start()

            def flow(wanted: int) -> None:
                """Sends until so many more results came."""
                nonlocal sent
                goal = sum(o.result is not None for o in list(outcomes)) + wanted
                deadline = time.monotonic() + 30.0
                while sum(o.result is not None for o in list(outcomes)) < goal:
                    assert time.monotonic() < deadline, f"{sent} sent, {len(outcomes)} outcomes"
                    try:
                        stream.send(wire.picture(sent % 4), timeout=0.2)
                        sent += 1
                    except facelane.DeadlineExceededError:
                        continue

            flow(50)
            for end in (signal.SIGTERM, signal.SIGKILL):
                children = server.children()
                server.process.send_signal(end)
                server.process.wait(30)
                until(lambda c=children: not any(p.is_running() for p in c))  # type: ignore[misc]
                server.stop()
                server = RunningServer(tmp_path, config)
                server.wait_serving()
                flow(50)
            stream.close_send()
            reader.join(30)
            assert not reader.is_alive()
            summary = stream.summary
    finally:
        server.stop()
    assert [o.frame_id for o in outcomes] == list(range(1, sent + 1))
    assert summary.received == sent == summary.results + summary.drops + summary.errors
    assert summary.results >= 150


def test_a_full_disk_under_the_log_costs_lines_only(tmp_path: Path) -> None:
    """Not even at the start, when most is logged."""
    (tmp_path / "server.toml").write_text(toml(tmp_path, wire.pools()))
    for name in ("state", "run"):
        (tmp_path / name).mkdir(mode=0o700)
    with Path("/dev/full").open("wb") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "facelane_server", "run", "--config", tmp_path / "server.toml"],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=full,
        )
    try:
        with facelane.Client(f"unix:{tmp_path}/grpc.sock", timeout=5.0) as client:
            client.wait_until_serving(timeout=30.0)
            assert len(client.analyze_image(wire.picture()).faces) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(30)
