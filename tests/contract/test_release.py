"""``make release``: what it refuses, and what it makes."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def release() -> ModuleType:
    return load(ROOT / "deploy" / "release.py")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# Changelog\n\n## Unreleased\n\n- a\n\n## 1.2.3 - 2027-01-02\n", "Unreleased"),
        ("# Changelog\n\n## Unreleased\n\n## 1.2.2 - 2027-01-02\n\n- b\n", "1.2.2"),
        ("# Changelog\n\n## 1.2.3\n\n- b\n", "newest section"),
        ("# Changelog\n", "no section"),
    ],
)
def test_a_changelog_that_is_not_ready(release: ModuleType, text: str, says: str) -> None:
    with pytest.raises(release.ReleaseError, match=re.escape(says)):
        release.check_changelog(text, "1.2.3")


def test_a_changelog_that_is(release: ModuleType) -> None:
    release.check_changelog("# C\n\n## Unreleased\n\n## 1.2.3 - 2027-01-02\n\n- b\n", "1.2.3")
    assert re.fullmatch(r"\d+\.\d+\.\d+(rc\d+)?", release.version(ROOT))


def test_the_bill_of_materials_names_what_is_needed_and_no_tool(release: ModuleType) -> None:
    # It is judged by CycloneDX's own schema where it is made.
    found = json.loads(release.bom("1.2.3"))
    assert found["metadata"]["component"]["version"] == "1.2.3"
    names = {part["name"].lower() for part in found["components"]}
    assert {"grpcio", "torch", "aiomqtt", "sqlalchemy", "av"} <= names
    assert not {"pytest", "ruff", "mypy", "hypothesis"} & names
    needs = {one["ref"]: one.get("dependsOn", []) for one in found["dependencies"]}
    (root,) = [ref for ref in needs if ref.startswith("pkg:pypi/facelane@")]
    assert any(ref.startswith("pkg:pypi/grpcio@") for ref in needs[root])


@pytest.mark.slow
def test_a_release_is_made_of_a_clean_tree(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(
        ".venv*", ".git", "node_modules", "__pycache__", ".*_cache", "dist", "build", "results",
        "training", ".hypothesis",
    )  # fmt: skip
    shutil.copytree(ROOT, tree, ignore=ignored, symlinks=True)
    text = (tree / "CHANGELOG.md").read_text()
    (tree / "CHANGELOG.md").write_text(text.replace("## Unreleased", "## 0.1.0 - 2027-01-02", 1))

    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *words],
            cwd=tree, check=True, timeout=60, capture_output=True,
        )  # fmt: skip

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(tree / "deploy/release.py"), "--out", str(tmp_path / "out")],
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip

    git("init", "-q")
    refused = run()
    assert (refused.returncode, "not committed" in refused.stderr) == (1, True), refused.stderr
    git("add", "-A")
    git("commit", "-q", "-m", "all")
    done = run()
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=out, check=True)
    names = {path.name for path in out.iterdir()}
    assert names == {
        "SHA256SUMS", "facelane-0.1.0.cdx.json", "facelane-0.1.0.tar.gz",
        "facelane-0.1.0-py3-none-any.whl",
    }  # fmt: skip
    with zipfile.ZipFile(out / "facelane-0.1.0-py3-none-any.whl") as wheel:
        inside = wheel.namelist()
    assert "facelane_events/service.py" in inside
    assert not [name for name in inside if name.startswith("tests")]
    again = run()
    assert "not empty" in again.stderr
