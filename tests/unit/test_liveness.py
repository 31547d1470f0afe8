"""What liveness scores are worth: the sequential test, calibrations and their file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from facelane_server.liveness import calibration, records
from facelane_server.liveness.band import LivenessBand
from facelane_server.liveness.calibration import Calibrated, Refusal, Refused, bounds, calibrate
from facelane_server.liveness.records import Record
from facelane_server.liveness.sequential import (
    CORRELATION,
    MOST,
    SequentialTest,
    evidence,
    together,
)

BASE = LivenessBand(0.85, 0.4)
SCORES = st.lists(st.floats(0, 1), max_size=300)


@st.composite
def bands(draw: st.DrawFn) -> LivenessBand:
    spoof, live = sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1))))
    return LivenessBand(live, spoof)


# -- the sequential test ---------------------------------------------------------------------------


def test_evidence_is_nothing_in_the_middle_and_bounded() -> None:
    assert evidence(0.625, 0.85, 0.4) == pytest.approx(0)
    assert evidence(1.0, 0.85, 0.4) == MOST
    assert evidence(0.0, 0.85, 0.4) == -MOST
    assert together(0.0, 0) == 0.0


@given(st.floats(0, 1), st.floats(0, 1), bands())
def test_a_higher_score_never_says_less(first: float, second: float, band: LivenessBand) -> None:
    low, high = sorted((first, second))
    assert evidence(low, band.live, band.spoof) <= evidence(high, band.live, band.spoof)


def test_looks_at_one_face_count_for_two_at_most() -> None:
    assert together(1.0, 1) == 1.0
    assert together(1000.0, 1000) == pytest.approx(1 / CORRELATION, abs=0.01)


def _tracks(mean: float, count: int, looks: int, seed: int) -> np.ndarray:
    """[count, looks]: evidence that is normal, calibrated (its variance is twice its mean) and
    correlated within a track."""
    rng = np.random.default_rng(seed)
    spread = math.sqrt(2 * abs(mean))
    common = rng.normal(size=(count, 1)) * math.sqrt(CORRELATION)
    own = rng.normal(size=(count, looks)) * math.sqrt(1 - CORRELATION)
    return np.asarray(mean + spread * (common + own))


@pytest.mark.parametrize("allowed", [0.01, 0.05])
@pytest.mark.parametrize("strength", [0.5, 1.5, 3.0])
def test_the_error_rates_hold_however_long_a_track_is(allowed: float, strength: float) -> None:
    test = SequentialTest(allowed, allowed)
    wrong = {}
    for name, mean in (("attack", -strength), ("live", strength)):
        said = np.cumsum(_tracks(mean, 20_000, 60, seed=1), 1)
        looks = np.arange(1, 61)
        total = said / (1 + (looks - 1) * CORRELATION)
        live = (total >= test.live_from).any(1)
        spoof = (total <= test.spoof_below).any(1)
        wrong[name] = float((live if name == "attack" else spoof).mean())
    # What Wald promises, and the chance of 20,000 draws.
    bound = allowed / (1 - allowed) + 3 * math.sqrt(allowed / 20_000)
    assert wrong["attack"] <= bound
    assert wrong["live"] <= bound


def test_shares_that_make_no_sense_are_refused() -> None:
    for wrong in ((0.0, 0.1), (0.1, 0.0), (0.5, 0.1), (0.1, 0.5)):
        with pytest.raises(ValueError, match="between"):
            SequentialTest(*wrong)


# -- calibration -----------------------------------------------------------------------------------


@settings(max_examples=200)
@given(SCORES, bands())
def test_a_calibration_stays_within_its_bounds(scores: list[float], base: LivenessBand) -> None:
    found = calibrate(scores, base)
    if isinstance(found, Refused):
        return
    loosest, strictest = bounds(base)
    assert loosest.live <= found.band.live <= strictest.live
    assert loosest.spoof <= found.band.spoof <= base.spoof
    assert found.tracks + found.far == len(scores)


@given(st.lists(st.floats(0.2, 1), min_size=59, max_size=120), st.floats(0, 0.5))
def test_better_scores_never_loosen(scores: list[float], more: float) -> None:
    before, after = calibrate(scores, BASE), calibrate([min(1, s + more) for s in scores], BASE)
    assert isinstance(before, Calibrated)
    assert isinstance(after, Calibrated)
    assert after.band.live >= before.band.live
    assert after.band.spoof >= before.band.spoof


def test_who_is_held_up_has_the_threshold_lowered_and_no_further() -> None:
    scores = np.linspace(0.76, 0.9, 300).tolist()
    found = calibrate(scores, BASE)
    assert isinstance(found, Calibrated)
    assert found.band.live == found.interval[1] < BASE.live
    assert found.band.spoof == BASE.spoof
    assert found.after.live > 0.9 > found.before.live
    worse = calibrate(np.linspace(0.5, 0.7, 300).tolist(), BASE)
    assert isinstance(worse, Calibrated)
    assert worse.band.live == bounds(BASE)[0].live == pytest.approx(0.7375)


def test_who_scores_more_than_needed_has_it_raised() -> None:
    found = calibrate(np.linspace(0.9, 0.99, 300).tolist(), BASE)
    assert isinstance(found, Calibrated)
    assert BASE.live < found.band.live == found.interval[0]
    best = calibrate([0.999] * 300, BASE)
    assert isinstance(best, Calibrated)
    assert best.band.live == bounds(BASE)[1].live == pytest.approx(0.925)


def test_what_the_tracks_do_not_contradict_stays() -> None:
    scores = [0.95] * 95 + [0.8] * 5
    found = calibrate(scores, BASE)
    assert isinstance(found, Calibrated)
    assert found.band == BASE


def test_few_tracks_and_attackers_calibrate_nothing() -> None:
    assert calibration.least_tracks() == 59
    few = calibrate([0.8] * 58, BASE)
    assert few == Refused(Refusal.TOO_FEW, 58, 0, 59)
    assert isinstance(calibrate([], BASE), Refused)
    dark = calibrate([0.8] * 80 + [0.1] * 20, BASE)
    assert dark == Refused(Refusal.REFUSED_BY_FAR, 80, 20, 59)
    # Some attackers among many people move nothing below what the people score.
    some = calibrate([0.95] * 200 + [0.3] * 4 + [0.1] * 5, BASE)
    assert isinstance(some, Calibrated)
    assert some.band.live >= BASE.live


@pytest.mark.parametrize("count", [60, 200, 1000])
def test_the_interval_holds_the_quantile_as_often_as_it_says(count: int) -> None:
    rng = np.random.default_rng(3)
    share, rounds = 0.05, 600
    # Of uniform scores the quantile is the share itself.
    found = [calibration.interval(sorted(rng.uniform(size=count)), share) for _ in range(rounds)]
    slack = 3 * math.sqrt(0.05 * 0.95 / rounds)
    assert np.mean([low <= share for low, _ in found]) >= calibration.CONFIDENCE - slack
    assert np.mean([high >= share for _, high in found]) >= calibration.CONFIDENCE - slack


@given(st.integers(0, 3000), st.floats(0.001, 0.5), st.sampled_from([0.01, 0.05, 0.5, 0.95, 0.99]))
def test_the_quantile_is_that_of_the_binomial(count: int, share: float, level: float) -> None:
    ours = calibration.binomial_quantile(level, count, share)
    theirs = int(binom.ppf(level, count, share))
    # Where the sum meets the level to the last digits either is right.
    assert ours == theirs or abs(binom.cdf(min(ours, theirs), count, share) - level) < 1e-9


# -- their file ------------------------------------------------------------------------------------


def record(**other: object) -> Record:
    made = {
        "model": "m@1#00000000", "base": BASE, "band": LivenessBand(0.8, 0.35), "tracks": 80,
        "far": 1, "made": "2026-01-01T00:00:00+00:00", "not_live": 0.05,
    }  # fmt: skip
    return Record(**{**made, **other})  # type: ignore[arg-type]


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    assert records.read(tmp_path) == {}
    records.write(tmp_path, {"door": record(), "gate": record(tracks=99)})
    assert records.read(tmp_path) == {"door": record(), "gate": record(tracks=99)}
    assert [path.name for path in tmp_path.iterdir()] == [records.NAME]


def test_a_record_holds_for_its_model_and_thresholds_alone() -> None:
    assert record().stale("m@1#00000000", BASE) == ""
    assert "m@1" in record().stale("m@2#00000000", BASE)
    assert "0.85" in record().stale("m@1#00000000", LivenessBand(0.9, 0.4))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"\xff", b'{"door": {}}', b"{" * 100_000],
    ids=["empty", "list", "bytes", "fields", "nested"],
)
def test_a_file_that_is_none_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    (tmp_path / records.NAME).write_bytes(content)
    with pytest.raises(records.RecordsError, match="remove it"):
        records.read(tmp_path)


@pytest.mark.parametrize("band", [{"live": 0.5, "spoof": 0.4}, {"live": 0.2, "spoof": 0.4}])
def test_an_edited_file_opens_no_door(tmp_path: Path, band: dict[str, float]) -> None:
    records.write(tmp_path, {"door": record()})
    path = tmp_path / records.NAME
    found = json.loads(path.read_text())
    found["door"]["band"] = band
    path.write_text(json.dumps(found))
    with pytest.raises(records.RecordsError, match="remove it"):
        records.read(tmp_path)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(records.RecordsError, match="written"):
        records.write(tmp_path / "missing", {})
