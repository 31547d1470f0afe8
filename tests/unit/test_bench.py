"""The benchmarks' own arithmetic: a wrong percentile would be believed."""

from __future__ import annotations

import json
import math
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from bench import drawing, page
from bench import isolation as iso
from bench.load import Answer, Measured
from bench.recovery import Good, HealthLog, outage
from bench.report import COLUMNS, RESULTS, Report, Row, shown_columns
from bench.stats import Summary, percentile, ratio
from hypothesis import given
from hypothesis import strategies as st

from facelane_server.domain import Stage

floats = st.floats(-1e6, 1e6)


def test_a_model_that_fell_back_is_told_of(tmp_path: Path) -> None:
    log = tmp_path / "detector.log"
    tenant = iso.Tenant(Stage.DETECTOR, None, log)  # type: ignore[arg-type]
    log.write_text("[info] worker ready\n")
    assert not tenant.in_full_precision
    log.write_text("[warning] model disagrees with full precision and runs eagerly in it\n")
    assert tenant.in_full_precision


class TestPercentile:
    @given(st.lists(floats, min_size=2, max_size=50), st.integers(1, 99))
    def test_like_the_standard_library(self, values: list[float], q: int) -> None:
        wanted = statistics.quantiles(values, n=100, method="inclusive")[q - 1]
        assert percentile(values, q) == pytest.approx(wanted, abs=1e-6)

    def test_edges(self) -> None:
        assert math.isnan(percentile([], 50))
        assert percentile([3.0], 99) == 3.0
        assert percentile([2.0, 1.0], 0) == 1.0
        assert percentile([2.0, 1.0], 100) == 2.0

    def test_summary(self) -> None:
        found = Summary.of([0.001, 0.003, 0.002], elapsed_s=0.5)
        assert found.p50_ms == pytest.approx(2.0)
        assert found.max_ms == pytest.approx(3.0)
        assert found.throughput_per_s == pytest.approx(6.0)
        assert math.isnan(Summary.of([], 0.0).throughput_per_s)

    def test_ratio_to_nothing(self) -> None:
        assert ratio(3.0, 2.0) == 1.5
        assert math.isnan(ratio(3.0, 0.0))
        assert math.isnan(ratio(3.0, math.nan))


class TestOutage:
    def test_a_hole_is_found(self) -> None:
        good = [Good(t, t + 0.01) for t in (0.0, 0.5, 1.0, 3.5, 4.0)]
        found = outage(good, killed=1.2, until=5.0)
        assert found.first_good_s == pytest.approx(2.31)
        assert found.gap_s == pytest.approx(2.5)
        assert found.end == pytest.approx(3.51)

    def test_an_answer_to_an_old_request_is_no_recovery(self) -> None:
        """It was on its way when the worker was killed."""
        good = [Good(1.0, 1.01), Good(1.1, 1.25), Good(3.0, 3.01)]
        assert outage(good, killed=1.2, until=5.0).first_good_s == pytest.approx(1.81)

    def test_never_again(self) -> None:
        found = outage([Good(1.0, 1.01)], killed=1.2, until=31.2)
        assert found.first_good_s is None
        assert found.gap_s == pytest.approx(30.19)

    def test_nothing_was_ever_good(self) -> None:
        found = outage([], killed=1.0, until=4.0)
        assert found.first_good_s is None
        assert found.gap_s == pytest.approx(3.0)


class TestHealthLog:
    def test_moments(self) -> None:
        health = HealthLog([(0.9, True), (1.1, True), (1.2, False), (2.0, True)])
        assert health.first(serving=False, since=1.0) == pytest.approx(0.2)
        assert health.first(serving=True, since=1.2) == pytest.approx(0.8)
        assert HealthLog([(0.9, True)]).first(serving=False, since=0.0) is None

    def test_a_late_answer_weighs_as_long_as_it_took(self) -> None:
        """Ten quick lies do not outweigh five seconds of silence."""
        lies = [(t / 10, True) for t in range(11)]
        health = HealthLog([*lies, (6.0, False)])
        assert health.claimed(0.0, 6.0) == pytest.approx(1 / 6)
        assert math.isnan(HealthLog().claimed(0.0, 1.0))


class TestMeasured:
    def test_every_frame_is_accounted_for(self) -> None:
        kinds = ["result", "result", "drop", "error"]
        answers = [Answer(0, float(i), 0.1, 0.05, kind) for i, kind in enumerate(kinds)]
        measured = Measured(answers=answers, sent=5)
        assert measured.counts() == {
            "frames": 5,
            "results": 2,
            "drops": 1,
            "errors": 1,
            "lost": 1,
        }


class TestReport:
    def test_the_stored_form(self, tmp_path: Path) -> None:
        report = Report("overhead")
        report.add(Row("facelane", "one", p50_ms=1.23456, p99_ms=math.nan, extra={"lost": 0}))
        assert report.aim("lost:", 0, 0, at_most=True)
        assert not report.aim("speed:", math.nan, 1, at_most=False)
        path = report.write(tmp_path, ["python", "-m", "bench", "overhead"])
        document = json.loads(path.read_text())
        assert document["schema"] == 1
        assert path.name == f"overhead-{document['machine']['name']}-{document['date'][:10]}.json"
        assert document["command"] == "python -m bench overhead"
        [row] = document["rows"]
        assert set(row) == {*COLUMNS, "lost"}
        assert row["p50_ms"] == 1.235
        assert row["p99_ms"] is None, "JSON has no nan"
        assert "MISSED" in document["notes"][1]
        report.part = "null"
        part = report.write(tmp_path, [])
        assert part.name == path.name.replace("overhead-", "overhead-null-"), "never the whole's"
        assert document["versions"]["python"]

    def test_extra_figures_do_not_hide_the_common_ones(self) -> None:
        with pytest.raises(AssertionError):
            Row("a", "b", extra={"p50_ms": 1.0}).as_json()

    def test_columns(self) -> None:
        rows = [Row("a", "s", extra={"n": 1}).as_json(), Row("b", "s", extra={"n": 2}).as_json()]
        shown, same = shown_columns(rows)
        assert shown == ["deployment", "n"]
        assert same == {"scenario": "s"}


class TestPage:
    def test_newest_of_each_machine_without_smoke_runs(self, tmp_path: Path) -> None:
        def store(name: str, machine: str, date: str, smoke: bool = False, part: str = "") -> None:
            document = {
                "bench": "overhead",
                "part": part,
                "date": date,
                "smoke": smoke,
                "machine": {"name": machine},
            }
            (tmp_path / name).write_text(json.dumps(document))

        store("overhead-a-1.json", "a", "2026-01-01T00:00:00Z")
        store("overhead-a-2.json", "a", "2026-01-02T00:00:00Z")
        store("overhead-a-3.json", "a", "2026-01-03T00:00:00Z", smoke=True)
        store("overhead-b-1.json", "b", "2026-01-01T00:00:00Z")
        store("overhead-old-a-1.json", "a", "2026-01-01T12:00:00Z", part="old")
        store("overhead-new-a-1.json", "a", "2026-01-03T00:00:00Z", part="new")
        store("overhead-new-c-1.json", "c", "2026-01-01T00:00:00Z", part="new")
        found = page.newest(tmp_path, "overhead")
        assert [(d["machine"]["name"], d["part"], d["date"][:10]) for d in found] == [
            ("a", "", "2026-01-02"),
            ("a", "new", "2026-01-03"),
            ("b", "", "2026-01-01"),
            ("c", "new", "2026-01-01"),
        ]

    def test_the_page_is_what_the_stored_results_say(self) -> None:
        text = page.PAGE.read_text()
        assert text == page.filled(text, RESULTS), "run: python -m bench.page"

    def test_stored_results_keep_to_the_schema(self) -> None:
        for path in RESULTS.glob("*.json"):
            document = json.loads(path.read_text())
            assert document["schema"] == 1, path.name
            assert not document["smoke"], f"{path.name} is no result"
            part = document.get("part", "")
            named = "-".join(filter(None, [document["bench"], part, document["machine"]["name"]]))
            assert path.name == f"{named}-{document['date'][:10]}.json"
            for row in document["rows"]:
                assert set(COLUMNS) <= set(row), path.name


class TestIsolation:
    @staticmethod
    def found(p99_ms: float, throughput_per_s: float) -> iso.Found:
        """Beside a neighbour under MPS with shares; alone it is 2 ms and 100 a second."""
        found = iso.Found()
        for deployment, p99, throughput in (
            (iso.ALONE, 2.0, 100.0),
            (iso.MPS_SHARES, p99_ms, throughput_per_s),
        ):
            found.add(deployment, iso.NOISY, Stage.RECOGNIZER, {"p99_ms": p99})
            found.add(deployment, iso.NOISY, Stage.DETECTOR, {"throughput_per_s": throughput})
        return found

    def test_ratios_are_to_what_each_has_alone(self) -> None:
        assert iso.noisy_ratios(self.found(3.0, 60.0), iso.MPS_SHARES) == (1.5, 0.6)

    def test_the_share_that_keeps_both_bounds_best_is_recommended(self) -> None:
        found = self.found(4.0, 64.0)  # the neighbour slows it too much
        assert iso.recommended(found) == iso.MPS_SHARES
        for share, p99, throughput in ((50, 2.4, 50.0), (80, 3.1, 80.0)):
            name = iso.neighbour_name(share)
            found.add(name, iso.NOISY, Stage.RECOGNIZER, {"p99_ms": p99})
            found.add(name, iso.NOISY, Stage.DETECTOR, {"throughput_per_s": throughput})
        assert iso.recommended(found) == iso.neighbour_name(80)
        assert iso.recommended(iso.Found()) == ""

    def test_without_what_it_is_alone_no_share_is_judged(self) -> None:
        found = self.found(3.0, 64.0)
        del found.answers[iso.ALONE, iso.NOISY, Stage.RECOGNIZER]
        assert iso.recommended(found) == ""

    def test_shares_are_told_of_those_that_are_limited(self) -> None:
        assert iso.share_of(iso.neighbour_name(80), Stage.DETECTOR) == 80
        assert iso.share_of(iso.neighbour_name(80), Stage.RECOGNIZER) == 100
        assert iso.share_of(iso.MPS_SHARES, Stage.LIVENESS) == iso.SHARES[Stage.LIVENESS]
        assert iso.share_of(iso.MPS, Stage.DETECTOR) is None


class TestDrawing:
    def test_well_formed_and_to_scale(self) -> None:
        bars = [drawing.Bar("alone <1>", 2.0, 4.0), drawing.Bar("threads", 5.0, 10.0)]
        text = drawing.bars("A & B", [drawing.Panel("one", bars), drawing.Panel("none", [])])
        root = ET.fromstring(text)
        space = "{http://www.w3.org/2000/svg}"
        widths = [float(rect.attrib["width"]) for rect in root.iter(f"{space}rect")]
        assert len(widths) == 4
        assert widths[0] / widths[2] == pytest.approx(0.4, abs=0.01)
        assert widths[1] / widths[0] == pytest.approx(0.5, abs=0.01)
        assert all(width <= drawing.WIDTH for width in widths)
