"""Pictures made to cost much, while cameras run."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

import pytest
from tests.e2e import wire
from tests.e2e.conftest import Start
from tests.e2e.test_operations import Load
from tests.unit.test_picture_budget import chunk, png, progressive, rows

import facelane

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
