"""The bridge and the real server: an end that meets, an outage on either side."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.cameras import HttpServer, jpeg, send_stream, write_clip
from tests.running_server import RunningServer, toml
from tests.waiting import auntil

from facelane_bridge import config
from facelane_bridge.bridge import Bridge
from facelane_bridge.output import Callback, Line, ResultLine, UpdateLine


def bridge(target: str, *cameras: dict[str, Any]) -> tuple[Bridge, list[Line]]:
    lines: list[Line] = []
    settings = config.from_mapping({"server": {"target": target}, "camera": list(cameras)})
    return Bridge(settings, Callback(lines.append)), lines


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_several_sources_at_once_lose_nothing(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=100, fps=25)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(10):
        (pictures / f"{number}.jpg").write_bytes(jpeg(number))
    (pictures / "5.jpg").write_bytes(jpeg(5)[:40])
    with RunningServer(tmp_path, toml(tmp_path)) as server:
        server.wait_serving()
        running, lines = bridge(
            server.target,
            {"name": "fast", "source": str(clip), "pace": "fast"},
            {"name": "folder", "source": str(pictures), "pace": "fast"},
            {"name": "live", "source": str(clip)},
        )
        report = await asyncio.wait_for(running.run(), 50)
    cameras = report.summary.cameras
    assert all(totals.balanced for totals in cameras.values())
    assert (cameras["fast"].frames, cameras["fast"].results) == (100, 100)
    assert (cameras["folder"].frames, cameras["folder"].drops) == (10, 0)
    assert cameras["live"].frames == 100
    assert cameras["live"].errors == 0
    assert report.failed == ()
    assert all(
        line.faces for line in lines if isinstance(line, ResultLine) and line.camera == "fast"
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "kill",
    [pytest.param(False, id="sigterm", marks=pytest.mark.slow), pytest.param(True, id="sigkill")],
)
async def test_a_server_that_goes_and_comes_back(tmp_path: Path, kill: bool) -> None:
    def endless(handler: Any) -> None:
        def pictures() -> Any:
            for number in range(6000):
                yield jpeg(number)
                time.sleep(0.02)  # the camera's pace

        try:
            send_stream(handler, pictures())
        except OSError:
            return  # the bridge has gone

    (folder := tmp_path / "s").mkdir()
    with HttpServer(endless) as web:
        server = RunningServer(folder, toml(folder))
        try:
            server.wait_serving()
            running, lines = bridge(
                server.target, {"name": "cam", "source": f"http://127.0.0.1:{web.port}/v"}
            )
            task = asyncio.create_task(running.run())

            def results() -> int:
                return running.totals["cam"].results if running.totals else 0

            await auntil(lambda: results() > 20)
            if kill:
                server.process.kill()
                await asyncio.to_thread(server.process.wait, 10)
            await asyncio.to_thread(server.stop)
            before = results()
            server = RunningServer(folder, toml(folder))
            await asyncio.to_thread(server.wait_serving)
            await auntil(lambda: results() > before + 20)
            running.stop()
            report = await asyncio.wait_for(task, 30)
        finally:
            server.stop()
    totals = report.summary.cameras["cam"]
    assert totals.balanced
    assert totals.openings == 1, "the camera is not blamed for the server"
    assert totals.connections == 2
    assert set(totals.errors_by_reason) <= {"CONNECTION_LOST"}
    kinds = [line.kind for line in lines if isinstance(line, UpdateLine)]
    assert "RECONNECTED" in kinds
    if not kill:
        assert "DRAINING" in kinds
        assert totals.errors == 0, "a drained server answers what it took"
