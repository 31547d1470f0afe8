"""The training recipe from end to end at tiny sizes: it proves the recipe, not the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from facelane_server.models.package import read_package
from facelane_server.modeltools.verify import verify

ROOT = Path(__file__).resolve().parents[2]
SET = 90
"""Pictures of each data set."""


def python(module: str, *arguments: str | Path) -> str:
    """Run a module of the repository; its output."""
    path = os.pathsep.join(str(ROOT / part) for part in ("server", "."))
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pack_train_and_ship(shared: Path, tmp_path: Path) -> None:
    data, run, out = (tmp_path / name for name in ("data", "run", "packages"))
    things = tmp_path / "things"
    things.mkdir()
    cv2.imwrite(str(things / "plain.png"), np.full((90, 90, 3), 77, np.uint8))
    python(
        "training.pack", "--shared", shared, "--out", data, "--limit", str(SET),
        "--things", things,
    )  # fmt: skip
    python(
        "training.run", "--data", data, "--out", run, "--smoke", "--budget-s", "20",
        "--cpu-s", "2",
    )  # fmt: skip
    report = json.loads((run / "report.json").read_text())
    assert report["about"]["failed"] == []
    assert set(report) == {"about", "detector", "liveness", "recognizer"}
    python(
        "training.aims", "--data", data, "--media", shared / "media", "--share", "0.02",
        "--detector", run / "detector.pt", "--liveness", run / "liveness.pt",
        "--out", run / "aims.json",
    )  # fmt: skip
    python("training.ship", "--run", run, "--data", data, "--out", out)
    # The way of the shipped weights: the trunk goes on, then gets a new head.
    for part, before in (("trunk", run), ("trust", tmp_path / "trunk")):
        python(
            "training.run", "--data", data, "--out", tmp_path / part, "--smoke",
            "--budget-s", "10", "--only", part, "--resume", before,
        )  # fmt: skip
    # And of the detector: against what it takes for faces.
    python(
        "training.run", "--data", data, "--out", tmp_path / "refined", "--smoke",
        "--budget-s", "20", "--cpu-s", "2", "--only", "detector", "--refine", "--resume", run,
    )  # fmt: skip
    refined = json.loads((tmp_path / "refined" / "report.json").read_text())
    assert refined["about"]["failed"] == []
    assert "things.npz" in refined["about"]["data"]["packed"]
    later = json.loads((tmp_path / "trust" / "report.json").read_text())
    assert later["about"]["failed"] == []
    assert later["recognizer"]["verification"]["pictures"] > 0
    for task in ("detector", "recognizer", "liveness"):
        package = read_package(out / f"facelane-{task}")
        found = verify(package)
        assert found.passed, [check for check in found.checks if not check.passed]
        assert (package.folder / package.manifest.card).read_text().startswith("# facelane-")
