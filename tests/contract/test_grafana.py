"""The dashboards: current, of metrics and states that exist, read by Prometheus itself."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from tests.contract.test_alert_rules import exposed, needs_promtool
from tests.contract.test_release import ROOT, load

from facelane_bridge.camera import CameraState
from facelane_server.domain import Overload

FOLDER = ROOT / "deploy" / "grafana"


@pytest.fixture(scope="module")
def grafana() -> ModuleType:
    return load(FOLDER / "generate.py")


def expressions() -> list[str]:
    found = []
    for path in sorted((FOLDER / "dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        found += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        found += [
            match
            for one in dashboard["templating"]["list"]
            for match in re.findall(r"label_values\((\w+),", one["query"])
        ]
    return found


def test_they_are_current(grafana: ModuleType) -> None:
    names = {path.stem for path in (FOLDER / "dashboards").glob("*.json")}
    assert names == set(grafana.DASHBOARDS)
    for name in names:
        written = (FOLDER / "dashboards" / f"{name}.json").read_text()
        assert written == grafana.text(name), "run python deploy/grafana/generate.py"


async def test_every_metric_named_exists() -> None:
    named = set(re.findall(r"\bfacelane_\w+", " ".join(expressions())))
    assert len(named) >= 30
    assert named <= await exposed()


def test_states_named_exist() -> None:
    text = " ".join(expressions())
    assert set(re.findall(r'state!?="(\w+)"', text)) <= {state.value for state in CameraState}
    assert set(re.findall(r'outcome!?="(\w+)"', text)) <= {"result", "drop", "error"}
    assert set(re.findall(r'overload="(\w+)"', text)) <= {policy.value for policy in Overload}


@needs_promtool
def test_prometheus_reads_every_expression(tmp_path: Path) -> None:
    # $__rate_interval and $instance are Grafana's to fill in.
    rules = [
        {
            "record": f"x:{n}",
            "expr": expr.replace("$__rate_interval", "5m").replace("$instance", ".*"),
        }
        for n, expr in enumerate(expressions())
    ]
    path = tmp_path / "all.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_panel_covers_another() -> None:
    for path in (FOLDER / "dashboards").glob("*.json"):
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(path.read_text())["panels"]:
            at = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(at["x"], at["x"] + at["w"])
                for y in range(at["y"], at["y"] + at["h"])
            }
            assert at["x"] + at["w"] <= 24
            assert not cells & taken, panel["title"]
            taken |= cells


def test_they_can_be_provisioned() -> None:
    for path in (FOLDER / "provisioning").rglob("*.yml"):
        assert yaml.safe_load(path.read_text())["apiVersion"] == 1
