"""The bridge's lines, its table, the frames' handover and systemd's notify protocol."""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
import threading
from pathlib import Path

import pytest
from rich.console import Console
from tests.waiting import auntil

import facelane
from facelane_bridge import notify
from facelane_bridge.handover import LOSSLESS_ROOM, Handover
from facelane_bridge.output import (
    CameraTotals,
    CameraView,
    DropLine,
    ErrorLine,
    FaceLine,
    JsonLines,
    OutputClosedError,
    ResultLine,
    StateLine,
    SummaryLine,
    Table,
    describe,
    face_line,
    merge,
    percentile,
)
from facelane_bridge.sources import CapturedFrame


def face(**changes: object) -> FaceLine:
    values = {
        "track_id": 1,
        "box": (1.0, 2.0, 3.0, 4.0),
        "score": 0.9,
        "landmarks": ((1.0, 2.0),) * 5,
        "decision": "MATCH",
        "subject_id": "grace",
        "similarity": 0.71,
        "ood_score": 0.9,
        "liveness": "LIVE",
        "liveness_score": 0.99,
        "recognized_now": True,
    } | changes
    return FaceLine(**values)  # type: ignore[arg-type]


def result(number: int = 1, *faces: FaceLine, camera: str = "a") -> ResultLine:
    return ResultLine(
        time="t",
        camera=camera,
        frame_id=number,
        offset_s=number / 10,
        captured="t",
        latency_ms=float(number),
        age_ms=1.0,
        width=64,
        height=48,
        faces=faces,
    )


def state(name: str, previous: str = "CONNECTING") -> StateLine:
    return StateLine(time="t", camera="a", state=name, previous=previous, reason="R")


# --- lines ---


def test_a_face_is_written_with_all_that_is_known() -> None:
    line = face_line(
        facelane.Face(
            track_id=7,
            box=facelane.BoundingBox(1.04, 2, 3, 4),
            score=0.912345,
            landmarks=(facelane.Point(1.26, 2),),
            identity=facelane.Identity(
                facelane.Decision.MATCH, "grace", 0.712345, (facelane.Candidate("grace", 0.7),)
            ),
            liveness=facelane.Liveness(facelane.LivenessVerdict.SPOOF, 0.1),
            ood_score=None,
        )
    )
    assert line == FaceLine(
        track_id=7,
        box=(1.0, 2, 3, 4),
        score=0.9123,
        landmarks=((1.3, 2),),
        decision="MATCH",
        subject_id="grace",
        similarity=0.7123,
        ood_score=None,
        liveness="SPOOF",
        liveness_score=0.1,
        recognized_now=False,
        candidates=(("grace", 0.7),),
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "grace 0.71 (ood 0.90) live"),
        ({"decision": "REJECTED_OOD", "ood_score": 0.1}, "not trustworthy (ood 0.10) live"),
        ({"decision": "UNKNOWN", "liveness": "UNDECIDED"}, "unknown (ood 0.90)"),
        ({"decision": "NOT_EVALUATED", "ood_score": None, "liveness": "SPOOF"}, "face spoof"),
    ],
)
def test_a_face_in_words(changes: dict[str, object], text: str) -> None:
    assert describe(face(**changes)) == text


def test_percentiles() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.99) == 3
    values = [float(n) for n in range(100)]
    assert (percentile(values, 0.5), percentile(values, 0.99)) == (50, 99)


def test_the_summary_adds_up() -> None:
    summary = merge(
        {
            "a": CameraTotals(frames=5, results=3, drops=1, errors=1, faces=2),
            "b": CameraTotals(frames=4, results=4, faces=1),
        }
    )
    assert (summary.frames, summary.results, summary.drops, summary.errors, summary.faces) == (
        9, 7, 1, 1, 3,
    )  # fmt: skip
    assert summary.cameras["a"].balanced
    assert not CameraTotals(frames=5, results=3, in_flight=2).balanced


# --- JSON lines ---


async def test_lines_arrive_whole_and_in_order() -> None:
    reading, writing = os.pipe()
    lines: list[bytes] = []

    def read() -> None:
        with os.fdopen(reading, "rb") as file:
            lines.extend(file)

    reader = threading.Thread(target=read)
    reader.start()
    async with JsonLines(writing) as output:
        for number in range(3000):  # more than the pipe and the queue hold
            await output.emit(result(number, face()))
    os.close(writing)
    reader.join(30)
    parsed = [json.loads(line) for line in lines]
    assert [line["frame_id"] for line in parsed] == list(range(3000))
    assert parsed[0]["type"] == "result"
    assert parsed[0]["faces"][0]["subject_id"] == "grace"


async def test_a_reader_that_does_not_read_holds_the_lines_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("facelane_bridge.output.FLUSH_TIMEOUT", 0.2)
    reading, writing = os.pipe()
    emitted = 0

    async def flood(output: JsonLines) -> None:
        nonlocal emitted
        while True:
            await output.emit(result(emitted, face()))
            emitted += 1

    async with JsonLines(writing) as output:
        flooding = asyncio.create_task(flood(output))
        await auntil(lambda: emitted > 1000)
        settled = -1
        while settled != emitted:
            settled = emitted
            await asyncio.sleep(0.1)  # long enough for thousands more, were they let
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
    assert emitted < 3000, "bounded"
    os.close(reading)
    os.close(writing)


async def test_a_reader_that_has_gone_is_told() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    async with JsonLines(writing) as output:
        await output.emit(result())
        await auntil(lambda: output.is_closed)
        with pytest.raises(OutputClosedError):
            await output.emit(result())
    os.close(writing)


async def test_a_pipe_that_does_not_wait_is_full_and_not_closed() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    count = 0

    def read() -> None:
        nonlocal count
        with os.fdopen(reading, "rb") as file:
            count = sum(1 for _ in file)

    reader = threading.Thread(target=read)
    async with JsonLines(writing) as output:
        for number in range(1000):  # more than the pipe holds
            await output.emit(result(number, face(), face()))
        reader.start()
    os.close(writing)
    await asyncio.to_thread(reader.join, 30)
    assert count == 1000
    assert not output.is_closed


# --- the table ---


async def test_plain_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facelane_bridge.output.PLAIN_INTERVAL", 30.0)  # a second may pass
    text = io.StringIO()
    async with Table(Console(file=text, width=200)) as table:
        await table.emit(state("STREAMING"))
        await table.emit(result(12, face()))
        await table.emit(result(13, face()))
        await table.emit(merge({"a": CameraTotals(frames=2, results=2, faces=2)}))
    lines = text.getvalue().splitlines()
    assert lines[0] == "a: CONNECTING → STREAMING R"
    assert "t=   1.2 s" in lines[1]
    assert "grace 0.71 (ood 0.90) live" in lines[1]
    assert len(lines) == 3, "at most one line an interval"
    assert lines[2] == "a: 2 frames = 2 results + 0 drops + 0 errors, 2 faces"


async def test_a_live_table_on_a_terminal() -> None:
    text = io.StringIO()
    console = Console(file=text, width=160, height=20, force_terminal=True)
    async with Table(console) as table:
        await table.emit(result(12, face(subject_id="[bold]x[/]")))
        await table.emit(state("STALLED", "STREAMING"))
    assert "STALLED" in text.getvalue()
    assert "[bold]x[/]" in text.getvalue(), "a name is text, not markup"


def test_what_the_table_counts() -> None:
    view = CameraView()
    for number in range(1, 7):
        view.take(result(number), now=100 + number / 10)
    view.take(
        DropLine(time="t", camera="a", frame_id=7, count=3, reason="X", where="bridge"), now=101
    )
    view.take(
        ErrorLine(time="t", camera="a", frame_id=10, reason="BAD", message="", retryable=False),
        now=101,
    )
    assert (view.results, view.drops, view.errors, view.note) == (6, 3, 1, "BAD")
    assert view.rate(101) == 2.0
    assert view.rate(200) == 0.0
    assert view.latency() == 4.0
    assert view.describe_faces() == "nobody"


def test_a_summary_is_one_line_of_its_own_kind() -> None:
    import msgspec

    line = json.loads(msgspec.json.encode(merge({})))
    assert line["type"] == "summary"
    assert msgspec.json.decode(msgspec.json.encode(merge({})), type=SummaryLine).frames == 0


# --- handover ---


def captured(media_time: float) -> CapturedFrame:
    return CapturedFrame(b"x", media_time, 0.0)


async def test_the_newest_frame_wins_and_the_others_are_counted() -> None:
    handover, reader = Handover(asyncio.get_running_loop(), lossless=False), object()
    handover.admit(reader, 0.0)
    for number in range(5):
        assert handover.offer(reader, captured(number))
    taken = await handover.take()
    assert taken.frame is not None
    assert (taken.frame.frame_id, taken.first_replaced, taken.replaced) == (5, 1, 4)
    assert handover.offered == 5
    handover.offer(reader, captured(6))
    handover.offer(reader, captured(7))
    handover.close()
    last = await handover.take()
    assert last.frame is not None
    assert (last.frame.frame_id, last.first_replaced, last.replaced) == (7, 6, 1)
    end = await handover.take()
    assert (end.frame, end.replaced) == (None, 0)


async def test_what_is_left_at_the_end_is_counted() -> None:
    handover, reader = Handover(asyncio.get_running_loop(), lossless=False), object()
    handover.admit(reader, 0.0)
    for number in range(3):
        handover.offer(reader, captured(number))
    handover.close()
    assert handover.discard() == (1, 3)
    assert handover.discard() == (4, 0)


async def test_a_lossless_handover_waits_and_shows_it() -> None:
    handover, reader = Handover(asyncio.get_running_loop(), lossless=True), object()
    handover.admit(reader, 0.0)
    offered: list[bool] = []

    def offer_all() -> None:
        offered.extend(handover.offer(reader, captured(n)) for n in range(LOSSLESS_ROOM + 2))

    thread = threading.Thread(target=offer_all)
    thread.start()
    await auntil(lambda: handover.is_holding)
    assert handover.offered == LOSSLESS_ROOM
    ids = []
    for _ in range(LOSSLESS_ROOM + 2):
        taken = await handover.take()
        assert taken.frame is not None
        assert taken.replaced == 0
        ids.append(taken.frame.frame_id)
    await asyncio.to_thread(thread.join, 5)
    assert ids == list(range(1, LOSSLESS_ROOM + 3))
    assert offered == [True] * (LOSSLESS_ROOM + 2)
    assert not handover.is_holding


async def test_a_fenced_reader_goes_free_and_counts_no_more() -> None:
    handover, old, new = Handover(asyncio.get_running_loop(), lossless=True), object(), object()
    handover.admit(old, 0.0)
    results: list[bool] = []

    def offer_all() -> None:
        results.extend(handover.offer(old, captured(n)) for n in range(LOSSLESS_ROOM + 1))

    thread = threading.Thread(target=offer_all)
    thread.start()
    await auntil(lambda: handover.is_holding)
    handover.fence()
    await asyncio.to_thread(thread.join, 5)
    assert results == [True] * LOSSLESS_ROOM + [False]
    handover.admit(new, 100.0)
    assert not handover.offer(old, captured(9))
    assert handover.offered == LOSSLESS_ROOM


async def test_media_time_never_goes_back_over_readers() -> None:
    handover = Handover(asyncio.get_running_loop(), lossless=False)
    offsets = []
    for base, times in ((0.0, (0.0, 5.0, 4.0)), (3.0, (0.0, 1.0)), (20.0, (0.0,))):
        reader = object()
        handover.admit(reader, base)
        for media_time in times:
            handover.offer(reader, captured(media_time))
            taken = await handover.take()
            assert taken.frame is not None
            offsets.append(taken.frame.offset)
    assert offsets == [0, 5, 5, 5, 6, 20]


async def test_progress_is_told_once() -> None:
    handover, reader = Handover(asyncio.get_running_loop(), lossless=False), object()
    woken = asyncio.Event()
    handover.watch(woken)
    handover.admit(reader, 0.0)
    threading.Thread(target=handover.offer, args=(reader, captured(3.5))).start()
    await asyncio.wait_for(woken.wait(), 30)
    progress = handover.progress()
    assert progress is not None
    assert progress[1] == 3.5
    assert handover.progress() is None


# --- systemd ---


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"facelane-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}" if abstract else str(tmp_path / "n"))
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else str(tmp_path / "n"))
        assert notify.notify("READY=1", "STATUS=x")
        assert sock.recv(100) == b"READY=1\nSTATUS=x"


def test_notify_without_anybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify.notify("READY=1")
    for nonsense in (str(tmp_path / "none"), "relative"):
        monkeypatch.setenv("NOTIFY_SOCKET", nonsense)
        assert not notify.notify("READY=1")


@pytest.mark.parametrize(
    ("variables", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "often"}, None),
    ],
)
def test_watchdog_interval(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], interval: float | None
) -> None:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert notify.watchdog_interval() == interval
