"""`facelane-server liveness`: from a source's tracks to its thresholds, and back."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.faces import THRESHOLDS, Stage, detected, evidence, signature
from tests.running_server import toml
from typer.testing import CliRunner

from facelane_server import calibrating, config, served
from facelane_server.cli import app as server_app
from facelane_server.config import ConfigError
from facelane_server.domain import (
    Box,
    Decision,
    Identity,
    Liveness,
    LivenessVerdict,
    TrackReport,
)
from facelane_server.events import EventKind
from facelane_server.lanes import LaneOptions
from facelane_server.lanes.faces import Faces
from facelane_server.liveness import records
from facelane_server.liveness.band import LivenessBand
from facelane_server.liveness.sequential import SequentialTest
from facelane_server.models.catalog import Catalog
from facelane_server.pipeline import Plan
from facelane_server.store import events
from facelane_server.store.audit import links, shown
from facelane_server.store.opening import open_store
from facelane_server.store.vault import open_vault

HOUR_NS = 3600 * 1_000_000_000
HELD_UP = [0.8 + 0.001 * n for n in range(80)]
"""Of living people whom the null model's threshold, 0.9, mostly leaves UNDECIDED."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "server.toml").write_text(toml(tmp_path))
    return tmp_path


def ended(place: Path, source: str, scores: Iterable[float | None], *, ago_ns: int = 0) -> None:
    """Tracks of a source end with these scores."""
    database = open_store(place / "state" / "gallery.db")
    vault = open_vault(database)
    verdict = LivenessVerdict.UNDECIDED
    nobody = Identity(Decision.UNKNOWN)
    batch = [
        events.EventRecord(
            0, EventKind.TRACK_ENDED.value, time.time_ns() - ago_ns + n, source, "s", "default",
            TrackReport(n + 1, 0, 1, None, 5, Box(0, 0, 1, 1), nobody, Liveness(verdict, score)),
        )
        for n, score in enumerate(scores)
    ]  # fmt: skip
    events.append(database, vault, batch, again=False)
    database.close()


def run(place: Path, *words: str, stdin: bytes | None = None) -> Any:
    command = [*words, "--config", str(place / "server.toml")]
    return CliRunner().invoke(calibrating.app, command, input=stdin)


def kept(place: Path) -> records.Records:
    return records.read(place / "state")


def test_a_source_is_calibrated_shown_and_forgotten(place: Path) -> None:
    ended(place, "door", [*HELD_UP, None, 0.1])
    ended(place, "gate", [0.1] * 80)
    ended(place, "door", [0.1] * 80, ago_ns=2 * HOUR_NS)
    told = run(place, "calibrate", "door")
    assert told.exit_code == 0, told.output
    assert "80 tracks, 1 refused by far" in told.output
    assert "SIGHUP" in told.output
    band = kept(place)["door"].band
    assert 0.8 < band.live < 0.9
    assert "LIVE from" in run(place, "list").output
    checked = CliRunner().invoke(server_app, ["check", "--config", str(place / "server.toml")])
    assert f"liveness of door: LIVE from {band.live:.3f}" in checked.output
    assert "not in force" not in checked.output
    assert run(place, "forget", "door").exit_code == 0
    assert kept(place) == {}
    assert run(place, "forget", "door").exit_code == calibrating.EX_REFUSED
    assert "no source" in run(place, "list").output
    database = open_store(place / "state" / "gallery.db")
    with database.reading() as connection:
        written = [shown(link) for link in links(connection)]
    database.close()
    said = [(w["action"], w["method"], w["source"]) for w in written if "source" in w]
    assert said == [
        ("ADMINISTERED", "liveness calibrate", "door"),
        ("ADMINISTERED", "liveness forget", "door"),
    ]


def test_a_dry_run_changes_nothing_and_json_says_all(place: Path) -> None:
    ended(place, "door", HELD_UP)
    told = run(place, "calibrate", "door", "--dry-run", "--json")
    found = json.loads(told.output)
    assert found["band"]["live"] == found["interval"][1]
    assert found["live_before"] < found["live_after"]
    assert kept(place) == {}
    assert not (place / "state" / records.NAME).exists()


@pytest.mark.parametrize(
    ("scores", "says"),
    [([], "TOO_FEW"), (HELD_UP[:58], "TOO_FEW"), ([0.8] * 60 + [0.1] * 40, "REFUSED_BY_FAR")],
)
def test_what_tells_too_little_is_refused_and_says_why(
    place: Path, scores: list[float], says: str
) -> None:
    ended(place, "other", [0.9])
    ended(place, "door", scores) if scores else None
    told = run(place, "calibrate", "door")
    assert told.exit_code == calibrating.EX_REFUSED
    assert says in told.output
    assert kept(place) == {}


def line(track: int, score: float | None, camera: str = "door") -> str:
    return json.dumps(
        {
            "type": "result", "camera": camera, "stream_id": "s", "time": "",
            "faces": [{"track_id": track, "liveness_score": score, "liveness": "LIVE"}],
        }
    )  # fmt: skip


def test_results_of_a_recording_will_do(place: Path) -> None:
    drop = json.dumps({"type": "drop", "camera": "door", "frame_id": 3})
    lines = [drop, ""]
    for n, score in enumerate(HELD_UP):
        # The last score of a track is the one.
        lines += [line(n + 1, 0.1), line(n + 1, score), line(n + 1, None), line(n + 1, 0.1, "gate")]
    told = run(place, "calibrate", "door", "--results", "-", stdin="\n".join(lines).encode())
    assert told.exit_code == 0, told.output
    assert kept(place)["door"].tracks == len(HELD_UP)
    # Pictures have no tracks: each face counts.
    assert len(calibrating.tracks_of([line(0, 0.9).encode()] * 3, "door")) == 3


@pytest.mark.parametrize(
    ("stdin", "says"),
    [(b"{", "line 1"), (b"[]", "line 1"), (line(1, 0.9, "gate").encode(), "results are of gate")],
)
def test_results_that_are_none_are_refused(place: Path, stdin: bytes, says: str) -> None:
    told = run(place, "calibrate", "door", "--results", "-", stdin=stdin)
    assert told.exit_code == 78
    assert says in told.output
    assert run(place, "calibrate", "a b").exit_code == 2
    missing = run(place, "calibrate", "door", "--results", str(place / "none"))
    assert missing.exit_code == 78


# -- in force --------------------------------------------------------------------------------------


def test_a_calibration_holds_for_its_model_until_the_file_goes(place: Path) -> None:
    ended(place, "door", HELD_UP)
    assert run(place, "calibrate", "door").exit_code == 0
    settings = config.load(place / "server.toml")
    found = served.ServedModels.resolve(settings, calibrated=True).thresholds
    assert found.liveness_at("door") == kept(place)["door"].band
    assert found.liveness_at("gate").live == found.live == 0.9
    stricter = config.parse(toml(place, extra="[identity]\nlive_threshold = 0.95"))
    assert served.ServedModels.resolve(stricter, calibrated=True).thresholds.calibrated == {}
    starter = Catalog([]).resolve("facelane-liveness")
    packages = {starter.task: starter}
    assert served.thresholds(packages, settings.identity, kept(place)).calibrated == {}
    (place / "state" / records.NAME).write_text("{")
    with pytest.raises(ConfigError, match="remove it"):
        served.ServedModels.resolve(settings, calibrated=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_check_of_another_user_says_what_it_did_not_look_at(place: Path) -> None:
    settings = config.load(place / "server.toml")
    models = served.ServedModels.resolve(settings)
    os.seteuid(51_300)
    try:
        [said] = calibrating.lines(settings, models)
    finally:
        os.seteuid(0)
    assert "not looked at" in said


def test_a_calibrated_source_s_tracks_are_judged_by_its_own_thresholds() -> None:
    verdicts = {}
    for source in ("door", "gate"):
        stage = Stage()
        stage.pipeline.thresholds = replaced(calibrated={"door": LivenessBand(0.7, 0.3)})
        options = LaneOptions(plan=Plan(source_id=source))
        stage.faces = Faces(stage.pipeline, options, stage.faces._params, stage)  # type: ignore[arg-type]
        [look] = stage.turn([detected(10, signature(1))], 0)
        stage.answer(look, evidence(None, live=0.75))
        [face] = stage.emit()
        verdicts[source] = face.liveness.verdict
        assert stage.pipeline.liveness(0.75, Plan(source_id=source)).verdict is verdicts[source]
    assert verdicts == {"door": LivenessVerdict.LIVE, "gate": LivenessVerdict.UNDECIDED}


def test_the_sequential_test_comes_from_the_configuration() -> None:
    settings = config.parse("[identity]\nfalse_live = 0.02\nfalse_spoof = 0.03")
    assert served.thresholds({}, settings.identity).test == SequentialTest(0.02, 0.03)
    assert served.thresholds({}, config.Identity()).test is None
    stage = Stage()
    stage.pipeline.thresholds = replaced(test=SequentialTest(0.01, 0.01))
    [look] = stage.turn([detected(10, signature(1))], 0)
    stage.answer(look, evidence(None, live=0.95))
    [face] = stage.emit()
    assert face.liveness.verdict is LivenessVerdict.UNDECIDED


def replaced(**other: Any) -> Any:
    import dataclasses

    return dataclasses.replace(THRESHOLDS, **other)
