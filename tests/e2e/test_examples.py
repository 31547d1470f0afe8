"""The door and the alarm of ``examples/``: their rules, and as programs beside a server."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest
from tests.e2e import wire
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
        told = [line for line in door.lines if line.get("closed")]
        assert {(line["closed"], line["stream"]) for line in told} == {("UNKNOWN", unknown)}
        line = door.wait_for(lambda line: line.get("open"))
        assert (line["open"], line["stream"]) == ("ada-of-the-door", ada)
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
