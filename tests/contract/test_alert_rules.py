"""The alert rules: judged by Prometheus's own tool, and about metrics and states that exist."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import urllib3
from tests.running_server import free_port

from facelane_bridge.metrics import serve_metrics
from facelane_bridge.output import CameraTotals
from facelane_server.capacity import Load
from facelane_server.domain import Overload
from facelane_server.keeper.exposition import merged
from facelane_server.observability.metrics import GalleryReading, Metrics, Sources
from facelane_server.shards.messages import Standing

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "prometheus"
RULES = (FOLDER / "facelane.rules.yml").read_text()
PAGE = (FOLDER.parents[1] / "docs" / "operations.md").read_text()

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="needs promtool: apt-get install --no-install-recommends prometheus",
)


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [("check", "rules", "facelane.rules.yml"), ("test", "rules", "facelane.rules.test.yml")],
    ids=" ".join,
)
def test_promtool(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *command], cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


async def exposed() -> set[str]:
    """What the server and the bridge tell, with the parts of histograms."""

    async def cameras() -> dict[str, CameraTotals]:
        return {}

    address = f"127.0.0.1:{free_port()}"
    with serve_metrics(address, cameras):
        answer = await asyncio.to_thread(
            urllib3.request, "GET", f"http://{address}/metrics", timeout=30, retries=False
        )
    sources = Sources(load=lambda: Load(1.0, 2.0, 1, 0), gallery=lambda: GalleryReading(1, 1))
    exposition = Metrics(sources).exposition().decode() + answer.data.decode()
    of_shards = merged({}, [Standing(shard=0, pid=1, life="READY", takes=True, restarts=0)])
    exposition += of_shards.decode()
    found: set[str] = set()
    for name, kind in re.findall(r"(?m)^# TYPE (\w+) (\w+)", exposition):
        parts = ("_bucket", "_count", "_sum") if kind == "histogram" else ("",)
        found |= {name + part for part in parts}
    return found


async def test_every_metric_named_exists() -> None:
    named = set(re.findall(r"\bfacelane_\w+", "".join(_expressions())))
    assert len(named) >= 10
    assert named <= await exposed()


def test_labels_have_values_that_are_told() -> None:
    of_outcome = set(re.findall(r'outcome="(\w+)"', RULES))
    assert of_outcome
    assert of_outcome <= {"result", "drop", "error"}
    of_overload = set(re.findall(r'overload="(\w+)"', RULES))
    assert of_overload == {Overload.LATEST_WINS.value}


def test_every_alert_is_explained_once() -> None:
    alerts = re.findall(r"- alert: (\w+)", RULES)
    assert len(alerts) == len(set(alerts)) == len(_expressions())
    for alert in alerts:
        assert f"`{alert}`" in PAGE, alert


def _expressions() -> list[str]:
    """Each rule's ``expr``, folded lines included."""
    return re.findall(r"(?m)^ +expr: ((?:.*\n)(?: {10}.*\n)*)", RULES)
