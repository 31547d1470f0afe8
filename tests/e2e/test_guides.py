"""The guides: their commands do what they say, and the Chinese pages are in step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.fakes import clips
from tests.fakes.cameras import jpeg
from tests.running_server import RunningServer

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
CHINESE = sorted((ROOT / "docs/zh").glob("*.md"))
RUN = "{ .sh .run }"


@dataclass(frozen=True)
class Block:
    info: str
    text: str


def blocks(path: Path) -> list[Block]:
    found = re.findall(r"(?ms)^```[ ]*([^\n]*)\n(.*?)^```$", path.read_text())
    return [Block(info.strip(), text) for info, text in found]


def headings(path: Path) -> list[int]:
    """Their levels, in order."""
    plain = re.sub(r"(?ms)^```.*?^```$", "", path.read_text())
    return [len(marks) for marks in re.findall(r"(?m)^(#+) ", plain)]


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_the_commands_of_a_guide_run(path: Path, server: RunningServer, tmp_path: Path) -> None:
    """Those that need no root, network or camera: marked ``.run``."""
    commands = [block.text for block in blocks(path) if block.info == RUN]
    assert commands, "a guide has commands"
    (tmp_path / "photo.jpg").write_bytes(jpeg(1))
    clips.write(tmp_path, "MPEG-4", frames=10)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FACELANE_TARGET": server.target,
        "HOME": str(tmp_path),
        "NO_COLOR": "1",
    }
    # One shell, as a reader has: it ends with the first command that fails.
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", "\n".join(commands)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", CHINESE, ids=lambda path: path.stem)
def test_a_chinese_page_is_in_step(path: Path) -> None:
    english = ROOT / "docs/guides" / path.name
    assert headings(path) == headings(english), "the same headings"
    assert blocks(path) == blocks(english), "the same commands and settings"
    targets = re.compile(r"\]\(([^)]+)\)")
    links = {one.replace("../guides/", "") for one in targets.findall(path.read_text())}
    assert links == set(targets.findall(english.read_text())), "the same links"


def test_the_chinese_readme_has_nothing_that_the_english_one_lacks() -> None:
    english, chinese = ROOT / "README.md", ROOT / "README.zh-CN.md"
    known = [block.text for block in blocks(english)]
    for block in blocks(chinese):
        assert any(block.text in text for text in known), block.text
    for name in re.findall(r"`([A-Za-z_]+)`", chinese.read_text()):
        assert name in english.read_text(), name
    assert "README.zh-CN.md" in english.read_text()


@pytest.mark.slow
def test_the_site_is_built_without_a_dead_link(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    for page in ("index", "zh/index", "guides/first-camera", "reference/protocol"):
        assert (site / f"{page}.html").is_file(), page
    assert "AnalyzeStream" in (site / "reference/protocol.html").read_text()
    assert "watch_events" in (site / "reference/python.html").read_text()
    # Whoever reads it tells nobody else.
    text = (site / "index.html").read_text()
    assert not re.search(r'<(?:script|link)[^>]+(?:src|href)="https?://(?!facelane)', text)
