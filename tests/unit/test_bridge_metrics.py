"""What the bridge tells of its cameras: to Prometheus, and which lines to whoever reads them."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
import urllib3
from tests.fakes.cameras import write_clip
from tests.fakes.scripted_server import ScriptedServer
from tests.waiting import auntil

from facelane_bridge import config, notify
from facelane_bridge.bridge import Bridge
from facelane_bridge.config import ConfigError, Results
from facelane_bridge.output import (
    Callback,
    DropLine,
    ErrorLine,
    FaceLine,
    Line,
    ResultLine,
    Selection,
    StateLine,
    UpdateLine,
)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def test_prometheus_is_told_of_each_camera(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    address = f"127.0.0.1:{free_port()}"
    with ScriptedServer() as server:
        bridge = Bridge(
            config.from_mapping(
                {
                    "server": {"target": server.target},
                    "metrics": address,
                    "camera": [
                        {"name": "door", "source": str(clip), "loop": True},
                        {"name": "gone", "source": str(tmp_path / "none.mp4")},
                    ],
                }
            ),
            Callback(lambda _: None),
        )
        running = asyncio.create_task(bridge.run())
        try:
            await auntil(lambda: bridge.totals.get("door") and bridge.totals["door"].results > 3)
            await auntil(lambda: bridge.totals["gone"].state == "FAILED")
            answer = await asyncio.to_thread(
                urllib3.request, "GET", f"http://{address}/metrics", timeout=10, retries=False
            )
        finally:
            bridge.stop()
            await asyncio.wait_for(running, 30)
    text = answer.data.decode()
    for line in (
        'facelane_bridge_camera_state{camera="door",state="STREAMING"} 1.0',
        'facelane_bridge_camera_state{camera="gone",state="FAILED"} 1.0',
        'facelane_bridge_camera_openings_total{camera="door"} 1.0',
        'facelane_bridge_camera_frames_total{camera="gone"} 0.0',
        'facelane_bridge_camera_frame_age_seconds{camera="door"}',
    ):
        assert line in text
    assert "grace" not in text, "no names of people in metrics"


@pytest.mark.parametrize("address", ["9153", "host:", "host:x", ":1", "h:99999"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        config.parse(f'metrics = "{address}"\n[[camera]]\nname = "a"\nsource = "x.mp4"')


async def test_an_address_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, ScriptedServer() as server:
        given = config.from_mapping(
            {
                "server": {"target": server.target},
                "metrics": f"127.0.0.1:{taken.getsockname()[1]}",
                "camera": [{"name": "a", "source": str(tmp_path / "none.mp4")}],
            }
        )
        with pytest.raises(ConfigError, match="cannot be served"):
            await Bridge(given, Callback(lambda _: None)).run()


def test_a_service_tells_what_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '[[camera]]\nname = "a"\nsource = "x.mp4"'
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert config.parse(text).results is Results.ALL
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    assert config.parse(text).results is Results.EVENTS
    assert config.parse('results = "off"\n' + text).results is Results.OFF


def face(track: int, decision: str = "MATCH", liveness: str = "LIVE") -> FaceLine:
    return FaceLine(
        track_id=track, box=(0, 0, 1, 1), score=0.9, landmarks=(), decision=decision,
        subject_id="grace" if decision == "MATCH" else "", similarity=0.7, ood_score=0.8,
        liveness=liveness, liveness_score=0.9, recognized_now=False,
    )  # fmt: skip


def result(*faces: FaceLine) -> ResultLine:
    return ResultLine(
        time="", camera="a", frame_id=1, offset_s=0, captured="", latency_ms=1, age_ms=1,
        width=1, height=1, faces=faces,
    )  # fmt: skip


def test_events_are_the_results_that_differ() -> None:
    selection = Selection(Results.EVENTS)
    for line, wanted in (
        (result(), False),
        (result(face(1, "UNKNOWN")), True),
        (result(face(1, "UNKNOWN")), False),
        (result(), False),
        (result(face(1, "UNKNOWN"), face(2)), True),
        (result(face(2), face(1, "UNKNOWN")), False),
        (result(face(2, liveness="SPOOF")), True),
        (result(face(1)), True),
    ):
        assert selection.wants(line) is wanted, line


def test_what_else_is_told() -> None:
    def wanted(results: Results) -> list[bool]:
        lines: list[Line] = [
            StateLine(time="", camera="a", state="STREAMING", previous="CONNECTING"),
            UpdateLine(time="", camera="a", kind="STAGE_LOST"),
            DropLine(time="", camera="a", frame_id=1, count=1, reason="TOO_OLD", where="server"),
            ErrorLine(time="", camera="a", frame_id=1, reason="X", message="", retryable=False),
            ErrorLine(time="", camera="a", frame_id=2, reason="X", message="", retryable=False),
            ErrorLine(time="", camera="b", frame_id=2, reason="X", message="", retryable=False),
        ]
        selection = Selection(results)
        return [selection.wants(line) for line in lines]

    assert wanted(Results.ALL) == [True] * 6
    assert wanted(Results.EVENTS) == [True, True, False, True, False, True]
    assert wanted(Results.OFF) == [True] + [False] * 5


async def test_a_service_waits_before_it_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(notify, "notify", lambda *words: said.extend(words))
    given = {"camera": [{"name": "gone", "source": str(tmp_path / "none.mp4")}]}
    with ScriptedServer() as server:
        settings = config.from_mapping({"server": {"target": server.target}, **given})
        bridge = Bridge(settings, Callback(lambda _: None), restart_pause=3600)
        running = asyncio.create_task(bridge.run())
        await auntil(lambda: any("failed: gone; ends in 3600 s" in word for word in said))
        assert not running.done()
        bridge.stop()
        report = await asyncio.wait_for(running, 30)
    assert report.failed == ("gone",)
