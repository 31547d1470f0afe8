"""Pictures made to cost much, while cameras run."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler

import pytest
from tests.e2e import wire
from tests.e2e.conftest import Start
from tests.e2e.test_operations import Load
from tests.fakes.cameras import HttpServer, send_stream
from tests.unit.test_picture_budget import chunk, png, progressive, rows
from tests.waiting import auntil

import facelane
from facelane_bridge import config
from facelane_bridge.bridge import Bridge
from facelane_bridge.output import Callback, ErrorLine, Line

BOMBS = [
    progressive(64, 4_000),
    progressive(2_000, 500),
    progressive(1_920, 300, components=3),
    png(64, bytes(1 << 23)),
    png(64, rows(64), before=chunk(b"teSt", b"") * 20_000),
    b"\xff\xd8" + (b"\xff\xfe\x00\x02" * 5_000) + b"\xff\xd9",
]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_thousand_in_a_row_cost_no_worker_and_no_camera_a_frame(start: Start) -> None:
    server = start()
    with ExitStack() as stack:
        client = stack.enter_context(server.client())
        cameras = [stack.enter_context(Load(client, source_id=f"camera-{i}")) for i in range(8)]
        before = {p.pool: [(w.pid, w.restarts) for w in p.workers] for p in client.pools()}
        refused: Counter[str] = Counter()
        attacker = stack.enter_context(server.client())
        stream = stack.enter_context(
            attacker.analyze_stream(overload="lossless", source_id="attacker")
        )
        sent = 0
        pictures = [facelane.Picture.encoded(data) for data in BOMBS]
        while sent < 1_000:
            burst = min(8, 1_000 - sent)
            for number in range(sent, sent + burst):
                stream.send(pictures[number % len(pictures)], timeout=30)
            sent += burst
            for _ in range(burst):
                outcome = next(stream)
                assert outcome.error is not None, outcome
                refused[outcome.error.reason] += 1
        for camera in cameras:
            camera.more(20)
        for camera in cameras:
            summary = camera.finish()
            assert camera.failure is None
            assert summary.received == summary.results > 0
        assert set(refused) <= {"PICTURE_TOO_COSTLY", "TOO_MANY_BAD_PICTURES"}, refused
        assert refused["PICTURE_TOO_COSTLY"] >= 3
        after = {p.pool: [(w.pid, w.restarts) for w in p.workers] for p in client.pools()}
        assert after == before, "the same processes serve"
        assert client.health() == "SERVING"
        assert len(client.analyze_image(wire.picture()).faces) == 1


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_camera_that_sends_them_through_the_bridge_blinds_itself_alone(
    start: Start,
) -> None:
    """A bridge takes whatever a camera says is a JPEG, and no key stands before that."""
    server = await asyncio.to_thread(start)
    bombs = [data for data in BOMBS if data.startswith(b"\xff\xd8")]
    sent = {"hostile": 0, "honest": 0}
    enough = threading.Event()

    def play(name: str, pictures: list[bytes]) -> Callable[[BaseHTTPRequestHandler], None]:
        def respond(handler: BaseHTTPRequestHandler) -> None:
            def endless() -> Iterator[bytes]:
                while not enough.is_set():
                    yield pictures[sent[name] % len(pictures)]
                    sent[name] += 1
                    enough.wait(0.02)  # the camera's pace

            with contextlib.suppress(OSError):  # the bridge has gone
                send_stream(handler, endless(), close=False)

        return respond

    with (
        HttpServer(play("hostile", bombs)) as hostile,
        HttpServer(play("honest", [wire.encoded(seed=n) for n in range(4)])) as honest,
        server.client() as client,
    ):
        before = {p.pool: [(w.pid, w.restarts) for w in p.workers] for p in client.pools()}
        lines: list[Line] = []
        settings = config.from_mapping(
            {
                "results": "all",
                "server": {"target": server.target},
                "camera": [
                    {"name": name, "source": f"http://127.0.0.1:{web.port}/v", "kind": "mjpeg"}
                    for name, web in (("hostile", hostile), ("honest", honest))
                ],
            }
        )
        running = Bridge(settings, Callback(lines.append))
        task = asyncio.create_task(running.run())

        def seen() -> bool:
            return bool(running.totals) and (
                sent["hostile"] >= 1_000 and running.totals["honest"].results >= 100
            )

        await auntil(seen, timeout=120)
        totals = running.totals["honest"]
        assert totals.errors == 0
        after = {p.pool: [(w.pid, w.restarts) for w in p.workers] for p in client.pools()}
        assert after == before, "the same processes serve"
        assert client.health() == "SERVING"
        enough.set()
        running.stop()
        await asyncio.wait_for(task, 60)
        errors = [line for line in lines if isinstance(line, ErrorLine)]
        reasons = {line.reason for line in errors if line.camera == "hostile"}
        # The bridge finds no picture at all in the last of them.
        assert "PICTURE_TOO_COSTLY" in reasons
        assert reasons <= {"PICTURE_TOO_COSTLY", "PICTURE_CORRUPT", "TOO_MANY_BAD_PICTURES"}, (
            reasons
        )
        assert running.totals["hostile"].results == 0
