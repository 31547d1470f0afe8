"""The bridge from camera to output, against a scripted server on real sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs
from tests.fakes.bridge_scenes import (
    run,
    settings,
    states,
)
from tests.fakes.cameras import jpeg, write_clip
from tests.fakes.scripted_server import (
    ScriptedServer,
    breaking_after,
    drop,
    opened,
    outcome,
    refusing,
    summary,
    update,
)
from tests.waiting import auntil

from facelane_bridge import runner
from facelane_bridge.bridge import Bridge
from facelane_bridge.output import (
    Callback,
    DropLine,
    ErrorLine,
    Line,
    ResultLine,
    SummaryLine,
    UpdateLine,
)


async def test_a_file_from_end_to_end(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        report, lines = await run(
            settings(
                server.target,
                {"name": "a", "source": str(clip), "pace": "fast", "gallery": "staff"},
            )
        )
    totals = report.summary.cameras["a"]
    assert (totals.frames, totals.results, totals.faces) == (20, 20, 20)
    assert totals.decisions == {"MATCH": 20}
    assert (report.failed, report.server_failed) == ((), False)
    assert states(lines) == ["STREAMING", "STOPPED"]
    first = next(line for line in lines if isinstance(line, ResultLine))
    assert (first.frame_id, first.offset_s, first.width) == (1, 0.0, 640)
    face = first.faces[0]
    assert (face.subject_id, face.decision, face.liveness) == ("grace", "MATCH", "LIVE")
    assert face.box == (10, 20, 60, 80)
    assert totals.p50_ms is not None
    assert totals.p50_ms <= (totals.p99_ms or 0)
    opening, *frames = server.streams[0]
    assert opening.config.source_id == "a"
    assert opening.config.options.gallery_id == "staff"
    offsets = [request.frame.stream_offset.ToNanoseconds() / 1e9 for request in frames]
    assert offsets == pytest.approx([index / 10 for index in range(20)], abs=1e-6)
    assert all(request.frame.HasField("capture_time") for request in frames)
    assert isinstance(lines[-1], SummaryLine)


async def test_cameras_do_not_touch_each_other(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer() as server:
        report, lines = await run(
            settings(
                server.target,
                {"name": "a", "source": str(clip), "pace": "fast"},
                {"name": "gone", "source": str(tmp_path / "none.mp4")},
                {"name": "wrong", "source": str(Path(__file__))},
                {"name": "b", "source": str(clip)},
            )
        )
    assert set(report.failed) == {"gone", "wrong"}
    assert report.summary.cameras["a"].results == 20
    assert report.summary.cameras["b"].frames == 20
    assert report.summary.cameras["gone"].reason == "NOT_FOUND"
    assert report.summary.cameras["wrong"].reason == "FORMAT_INVALID"
    assert report.summary.frames == 40
    assert states(lines, "gone") == ["FAILED"]


async def test_drops_errors_and_updates_are_told(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=4)

    def script(requests: Any, context: Any) -> Any:
        next(requests)
        yield opened()
        first, second, third, fourth = (next(requests).frame for _ in range(4))
        yield outcome(first)
        yield update("STAGE_LOST", stage=3, message="liveness is away")
        yield outcome(second, drop=drop("TOO_OLD"))
        bad = outcome(third)
        bad.outcome.error.code = 3
        bad.outcome.error.message = "the JPEG is cut short"
        yield bad
        yield outcome(fourth)
        yield summary(results=2, drops=1, errors=1, drops_by_reason={"TOO_OLD": 1})

    with ScriptedServer(script) as server:
        report, lines = await run(
            settings(server.target, {"name": "a", "source": str(clip), "pace": "fast"})
        )
    totals = report.summary.cameras["a"]
    assert (totals.results, totals.drops, totals.errors) == (2, 1, 1)
    assert totals.drops_by_reason == {"TOO_OLD": 1}
    (told,) = [line for line in lines if isinstance(line, DropLine)]
    assert (told.frame_id, told.count, told.reason, told.where) == (2, 1, "TOO_OLD", "server")
    (failed,) = [line for line in lines if isinstance(line, ErrorLine)]
    assert (failed.frame_id, failed.message) == (3, "the JPEG is cut short")
    (noted,) = [line for line in lines if isinstance(line, UpdateLine)]
    assert (noted.kind, noted.stage) == ("STAGE_LOST", "liveness")


async def test_a_picture_that_cannot_be_sent_is_an_error_of_its_own(tmp_path: Path) -> None:
    for name, data in {"a.jpg": jpeg(1), "b.jpg": b"", "c.jpg": b"zzz", "d.jpg": jpeg(2)}.items():
        (tmp_path / name).write_bytes(data)
    with ScriptedServer() as server:
        report, _lines = await run(
            settings(server.target, {"name": "a", "source": str(tmp_path), "pace": "fast"})
        )
    totals = report.summary.cameras["a"]
    assert (totals.frames, totals.results, totals.errors) == (4, 2, 2)
    assert totals.errors_by_reason == {"PICTURE_EMPTY": 1, "ENCODING_UNSUPPORTED": 1}


async def test_a_broken_connection_comes_back_and_nothing_is_lost(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with ScriptedServer(breaking_after(3, 5)) as server:
        report, _lines = await run(
            settings(server.target, {"name": "a", "source": str(clip), "pace": "fast"})
        )
        assert len(server.streams) == 2
    totals = report.summary.cameras["a"]
    assert totals.frames == 20
    assert totals.connections == 2
    assert set(totals.errors_by_reason) == {"CONNECTION_LOST"}
    assert 2 <= totals.errors <= 4, "only what was in flight"
    assert totals.drops == 0, "a lossless source waits"


async def test_a_server_that_refuses_ends_the_camera(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    script = refusing(grpc.StatusCode.NOT_FOUND, "SUBJECT_NOT_FOUND", "there is no such subject")
    with ScriptedServer(script) as server:
        report, _lines = await run(settings(server.target, {"name": "a", "source": str(clip)}))
    assert report.server_failed
    assert report.failed == ("a",)
    assert report.summary.cameras["a"].reason == "SUBJECT_NOT_FOUND"
    assert report.summary.frames == 0, "no camera is opened for nobody"


async def test_a_busy_server_is_tried_again(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    busy = refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAM_LIMIT", "too many streams")
    with ScriptedServer(busy) as server:
        report, _ = await run(
            settings(server.target, {"name": "a", "source": str(clip), "pace": "fast"})
        )
    assert report.summary.results == 20


async def test_a_server_that_opens_no_stream_is_not_called_absent(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    busy = refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAM_LIMIT", "too many streams")
    with ScriptedServer(*[busy] * 1000) as server, capture_logs() as logs:
        report, _ = await run(settings(server.target, {"name": "a", "source": str(clip)}, wait=0.2))
    assert report.server_failed
    (told,) = [line for line in logs if line["event"] == "server refused or absent"]
    assert "the server answers (SERVING) and opens no stream" in told["message"]


async def test_an_absent_server_is_given_up_after_the_wait(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    report, _lines = await run(
        settings(f"unix:{tmp_path}/none", {"name": "a", "source": str(clip)}, wait=0.2)
    )
    assert report.server_failed
    assert report.summary.cameras["a"].reason == "SERVER_UNREACHABLE"
    assert report.summary.frames == 0


async def test_what_is_waited_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An absent server is waited for without an end, but not without a word."""
    monkeypatch.setattr(runner, "CONNECT_HINT", 0.05)
    clip = write_clip(tmp_path / "clip.mp4")
    target = f"unix:{tmp_path}/server.sock"
    lines: list[Line] = []
    bridge = Bridge(
        settings(target, {"name": "a", "source": str(clip), "pace": "fast"}),
        Callback(lines.append),
    )
    with capture_logs() as logs:

        def told(event: str) -> list[bool]:
            return [line["target"] == target for line in logs if event in line["event"]]

        task = asyncio.create_task(bridge.run())
        await auntil(lambda: told("waiting for the server"), what="a word")
        with ScriptedServer(address=target):
            report = await asyncio.wait_for(task, 30)
    assert report.summary.results == 20
    assert told("waiting for the server") == [True]
    assert told("server reached") == [True]


async def test_stop_before_the_server_is_there(tmp_path: Path) -> None:
    lines: list[Line] = []
    bridge = Bridge(
        settings(f"unix:{tmp_path}/none", {"name": "a", "source": "rtsp://127.0.0.1:1/x"}),
        Callback(lines.append),
    )
    task = asyncio.create_task(bridge.run())
    await auntil(lambda: bridge.totals, what="the bridge runs")
    bridge.stop()
    report = await asyncio.wait_for(task, 60)
    assert report.summary.cameras["a"].state == "STOPPED"
    assert report.failed == ()
