"""The programs of ``examples/``: their rules, and as programs beside a server."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest
from tests.e2e import wire
from tests.fakes import clips
from tests.running_example import EXAMPLES, RunningExample
from tests.running_server import RunningServer
from tests.waiting import until

import facelane
from facelane import types

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OPENS = types.Event(
    sequence=1,
    kind=types.EventKind.SUBJECT_SEEN,
    event_time=NOW,
    resume_token="",
    source_id="front",
    stream_id="s",
    track_id=1,
    identity=types.Identity(types.Decision.MATCH, "ada", 0.9),
    liveness=types.Liveness(types.LivenessVerdict.LIVE, 0.9),
    track=types.TrackReport("s/1", 0.0, 1.0, None, None, types.BoundingBox(0, 0, 9, 9)),
)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_door_opens_once_for_a_name_that_is_live() -> None:
    door = example("door").Door("front")
    assert door.hears(OPENS, NOW) == "ada"
    assert door.hears(replace(OPENS, kind=types.EventKind.TRACK_UPDATED), NOW) == ""
    assert OPENS.track is not None
    again = replace(OPENS, track=replace(OPENS.track, global_track_id="s/2"))
    assert door.hears(again, NOW) == "ada"


@pytest.mark.parametrize(
    "change",
    [
        {"source_id": "back"},
        {"track": None},
        {"event_time": None},
        {"event_time": NOW - timedelta(seconds=3)},
        {"event_time": NOW + timedelta(seconds=3)},
        {"liveness": types.Liveness(types.LivenessVerdict.SPOOF, 0.1)},
        {"liveness": types.Liveness()},
        {"identity": types.Identity()},
        {"identity": types.Identity(types.Decision.UNKNOWN)},
        {"identity": types.Identity(types.Decision.REJECTED_OOD)},
    ],
    ids=str,
)
def test_all_else_leaves_it_closed(change: dict[str, object]) -> None:
    door = example("door").Door("front")
    assert door.hears(replace(OPENS, **change), NOW) == ""  # type: ignore[arg-type]
    assert door.hears(OPENS, NOW) == "ada", "and is not held against who comes then"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"source_id": "back"}, ""),
        ({"event_time": NOW - timedelta(seconds=3)}, "EVENT_TOO_OLD"),
        ({"liveness": types.Liveness(types.LivenessVerdict.SPOOF, 0.1)}, "SPOOF_SUSPECTED"),
        ({"liveness": types.Liveness()}, "NOT_KNOWN_TO_BE_LIVE"),
        ({"identity": types.Identity()}, "NOT_SURE_YET"),
        ({"identity": types.Identity(types.Decision.UNKNOWN)}, "UNKNOWN"),
        ({"identity": types.Identity(types.Decision.REJECTED_OOD)}, "NOT_TRUSTED"),
    ],
    ids=str,
)
def test_it_says_once_why_it_stays_closed(change: dict[str, object], why: str) -> None:
    door = example("door").Door("front")
    event = replace(OPENS, **change)  # type: ignore[arg-type]
    assert door.explains(event, NOW) == why
    assert door.explains(event, NOW) == ""


def test_the_door_forgets_who_has_long_passed() -> None:
    module = example("door")
    door = module.Door("front")
    assert OPENS.track is not None
    for number in range(module.REMEMBERED + 50):
        track = replace(OPENS.track, global_track_id=f"s/{number}")
        assert door.hears(replace(OPENS, track=track), NOW) == "ada"
    assert len(door._opened) == module.REMEMBERED


def test_the_alarm_is_about_its_source_and_about_pools() -> None:
    rule = example("alarm").rule
    spoof = replace(OPENS, kind=types.EventKind.SPOOF_SUSPECTED)
    told = {"alarm": "SPOOF_SUSPECTED", "stream": "s", "track": 1, "offset": 1.0}
    assert rule(spoof, "front") == told
    assert rule(spoof, "back") is None
    pool = replace(OPENS, kind=types.EventKind.POOL_CHANGED, pool="detector", message="DOWN")
    assert rule(replace(pool, source_id="", track=None), "front") == {"blind": "detector: DOWN"}


def test_both_beside_a_server(server: RunningServer, tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    at = ("--target", server.target, "--source", "example-front")
    command = (
        "--",
        sys.executable,
        "-c",
        f"import sys; open({str(opened)!r}, 'a').write(sys.argv[1])",
    )
    with (
        server.client() as client,
        RunningExample("door.py", *at, "--latest", "600", *command) as door,
        RunningExample("alarm.py", *at) as alarm,
    ):
        client.enroll("ada-of-the-door", wire.picture(31))
        for program in (door, alarm):
            program.wait_for(lambda line: line.get("listening"))

        def film(seed: int, source: str) -> str:
            frames = [facelane.Frame(wire.picture(seed), stream_offset=k * 0.1) for k in range(50)]
            return list(client.analyze(frames, source_id=source))[-1].stream_id

        film(31, "example-back")
        film(32, "example-back")
        unknown = film(32, "example-front")
        ada = film(31, "example-front")
        line = door.wait_for(lambda line: line.get("open"))
        assert (line["open"], line["stream"]) == ("ada-of-the-door", ada)
        # Events come in their order: what was before has been told.
        told = [line for line in door.lines if line.get("closed")]
        assert {(line["closed"], line["stream"]) for line in told} == {("UNKNOWN", unknown)}
        until(opened.exists, what="the command")
        line = alarm.wait_for(lambda line: line.get("alarm"))
        assert (line["alarm"], line["stream"]) == ("UNKNOWN_SEEN", unknown)
        assert len([line for line in door.lines if "closed" not in line]) == len(alarm.lines) == 2
    assert opened.read_text() == "ada-of-the-door"


@pytest.mark.parametrize(
    ("name", "says_so"),
    [
        (
            "door.py",
            lambda program: (
                "closed: " in program.complaints
                and {"closed": "UNREACHABLE"} in program.lines
                and all("closed" in line for line in program.lines)
            ),
        ),
        ("alarm.py", lambda program: any("blind" in line for line in program.lines)),
    ],
    ids=["door", "alarm"],
)
def test_without_a_server_they_say_so(
    name: str, says_so: Callable[[RunningExample], bool], tmp_path: Path
) -> None:
    at = ("--target", f"unix:{tmp_path}/nobody.sock", "--source", "front")
    with RunningExample(name, *at) as program:
        until(lambda: says_so(program), what="its complaint")


def test_attendance_counts_who_is_known_and_live_once_a_track() -> None:
    register = example("attendance").Register(frozenset({"front"}))
    assert register.hears(OPENS)
    updated = replace(OPENS, kind=types.EventKind.TRACK_UPDATED)
    later = replace(updated, event_time=NOW + timedelta(minutes=3), resume_token="later")
    assert not register.hears(later), "the same track"
    for change in (
        {"source_id": "back"},
        {"liveness": types.Liveness()},
        {"identity": types.Identity(types.Decision.UNKNOWN)},
    ):
        assert not register.hears(replace(later, **change))  # type: ignore[arg-type]
    again = example("attendance").Register(frozenset({"front"}), register.state())
    assert again.resume_token == "later"
    assert not again.hears(OPENS), "after a restart, delivered again"
    assert OPENS.track is not None
    back = replace(OPENS, track=replace(OPENS.track, global_track_id="t/1"))
    assert again.hears(replace(back, event_time=NOW + timedelta(hours=1)))
    [day] = again.days
    head, row = csv.reader(again.table(day).splitlines())
    assert head == ["subject", "first", "last", "times", "gates"]
    assert row[0] == "ada"
    first, last = datetime.fromisoformat(row[1]), datetime.fromisoformat(row[2])
    assert (first, last) == (NOW, NOW + timedelta(hours=1))
    assert row[3:] == ["2", "front"]


def test_attendance_says_when_events_were_lost_and_forgets_days() -> None:
    register = example("attendance").Register(frozenset({"front"}))
    register.hears(replace(OPENS, resume_token="token"))
    register.lost(NOW)
    assert register.resume_token == ""
    assert register.gaps == [NOW.isoformat(timespec="seconds")]
    register.forget(NOW.date() + timedelta(days=1))
    assert register.days, "yesterday may still come"
    register.forget(NOW.date() + timedelta(days=2))
    assert not register.days


def test_attendance_beside_a_server_that_it_outlives(server: RunningServer, tmp_path: Path) -> None:
    at = ("--target", server.target, "--gate", "attended", "--out", str(tmp_path / "out"))

    def film() -> None:
        frames = [facelane.Frame(wire.picture(33), stream_offset=k * 0.1) for k in range(50)]
        list(client.analyze(frames, source_id="attended"))

    with server.client() as client:
        client.enroll("grace-who-attends", wire.picture(33))
        with RunningExample("attendance.py", *at) as program:
            program.wait_for(lambda line: line.get("listening"))
            film()
            assert program.wait_for(lambda line: line.get("seen"))["seen"] == "grace-who-attends"
        film()  # while nobody listens
        with RunningExample("attendance.py", *at) as program:
            program.wait_for(lambda line: line.get("seen"))
        client.delete_subject("grace-who-attends")
    [table] = (tmp_path / "out").glob("*.csv")
    _, row = csv.reader(table.read_text().splitlines())
    assert (row[0], row[3], row[4]) == ("grace-who-attends", "2", "attended")
    assert table.stat().st_mode & 0o077 == 0


def test_a_folder_of_videos_is_gone_through(server: RunningServer, tmp_path: Path) -> None:
    """H.264 as it is, MPEG-4 decoded here, and a file that is no video."""
    videos = tmp_path / "videos"
    for kind in ("plain", "MPEG-4"):
        folder = videos / kind
        folder.mkdir(parents=True)
        clips.write(folder, kind, frames=10).rename(videos / f"{kind}.mp4")
        folder.rmdir()
    (videos / "broken.mp4").write_bytes(b"no video" * 100)

    def run() -> tuple[int, dict[str, dict[str, object]]]:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "videos.py"), str(videos), "--target", server.target,
             "--out", str(tmp_path / "found")],
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        lines = map(json.loads, done.stdout.splitlines())
        return done.returncode, {line["video"]: line for line in lines}

    code, lines = run()
    assert code == 1
    assert "failed" in lines.pop("broken.mp4")
    assert {line["results"] for line in lines.values()} == {10}
    assert {line["errors"] for line in lines.values()} == {0}
    for name, line in lines.items():
        found = (tmp_path / "found" / f"{name}.jsonl").read_text().splitlines()
        assert len(found) == line["appearances"] > 0
        for row in map(json.loads, found):
            assert 0 <= row["from"] <= row["to"] <= 1
    code, again = run()
    assert code == 1
    assert {again[name].get("done") for name in lines} == {"before"}
