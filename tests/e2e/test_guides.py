"""The README and the guides: their commands do what they say, and the Chinese pages are in step."""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import psutil
import pytest
from tests.fakes import clips
from tests.fakes.cameras import jpeg
from tests.running_server import RunningServer, toml
from tests.waiting import until

from facelane_bridge import config as bridge_config
from facelane_bridge.demo_clip import photos
from facelane_events import config as events_config
from facelane_server import config as server_config

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
CHINESE = sorted((ROOT / "docs/zh").glob("*.md"))
ALL = [ROOT / "README.md", *GUIDES, ROOT / "docs/fleet.md", ROOT / "docs/privacy.md"]
"""What the site has under "Guides", and its front page."""
LONG = frozenset(
    {"edge-box", "first-camera", "fleet", "gpu-server", "own-model", "privacy", "thresholds"}
)
"""Their commands measure models, or are those of the README and of other pages with other settings:
that each exists is asked by ``tests/contract/test_generated.py``, and the settings are read here in
every run."""
OTHERS = re.compile(r"(\{ \.)?(toml|ini|json|python|ts|text|cron)\b")


@dataclass(frozen=True)
class Block:
    info: str
    text: str

    @property
    def classes(self) -> set[str]:
        return set(re.findall(r"\.([\w-]+)", self.info)) if self.info.startswith("{") else set()

    @property
    def why(self) -> str:
        """Of commands that are not run: why not."""
        found = re.search(r'data-why="([^"]+)"', self.info)
        return found[1] if found else ""


def blocks(path: Path) -> list[Block]:
    found = re.findall(r"(?ms)^```[ ]*([^\n]*)\n(.*?)^```$", path.read_text())
    return [Block(info.strip(), text) for info, text in found]


def headings(path: Path) -> list[int]:
    """Their levels, in order."""
    plain = re.sub(r"(?ms)^```.*?^```$", "", path.read_text())
    return [len(marks) for marks in re.findall(r"(?m)^(#+) ", plain)]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_command_of_a_guide_is_run_or_says_why_not(path: Path) -> None:
    for block in blocks(path):
        if OTHERS.match(block.info):
            continue
        told = f"{path.name}: {block.info!r} {block.text[:60]!r}"
        assert "sh" in block.classes, f"{told}: commands are marked {{ .sh .run }} or .not-run"
        assert ("run" in block.classes) is not ("not-run" in block.classes), told
        assert bool(block.why) is ("not-run" in block.classes), f"{told}: data-why says why not"
        for test in re.findall(r"tests/[\w/]+\.py", block.why):
            assert (ROOT / test).is_file(), told


def of(path: Path, key: str) -> str:
    """The page's TOML that has a table of this name."""
    found = [b.text for b in blocks(path) if b.info == "toml" and f"{key}]" in b.text]
    return found[0] if found else ""


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_the_settings_of_a_guide_are_taken(path: Path) -> None:
    for block in blocks(path):
        if block.info != "toml":
            continue
        if "[[node]]" in block.text:
            continue  # its check is a command of the page
        if "[[sink]]" in block.text:
            events_config.parse(block.text)
        elif "[[camera]]" in block.text:
            bridge_config.parse(block.text)
        else:
            server_config.parse(block.text)


def script(path: Path) -> str:
    """One shell, as a reader has: it ends with the first command that fails."""
    lines = []
    for block in blocks(path):
        if "run" not in block.classes:
            continue
        if "background" in block.classes:
            command = block.text.strip()
            assert "\n" not in command, "one command, which does not end"
            lines.append(f"FACELANE_CONFIG=$OWN_CONFIG {command} >>background.log 2>&1 &")
        else:
            lines.append(block.text)
    # What is in the background runs still, when it is looked for.
    lines.append("read -r _")
    lines.append('for job in $(jobs -p); do kill -0 "$job"; done')
    return "\n".join(lines)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in ALL],
    ids=lambda path: path.stem,
)
def test_the_commands_of_a_guide_run(path: Path, server: RunningServer, tmp_path: Path) -> None:
    commands = script(path)
    assert commands.count("\n") >= 2, "a guide has commands"
    for number, name in enumerate(["photo", "hopper1", "hopper2", "door"], 1):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(number))
    clips.write(tmp_path, "MPEG-4", frames=10)
    if "people/" in commands:
        for name, photo in photos().items():
            folder = tmp_path / "people" / name
            folder.mkdir(parents=True)
            picture = cv2.imread(str(photo.path))
            for number, scale in enumerate((1.0, 0.8, 0.6)):
                small = cv2.resize(picture, None, fx=scale, fy=scale)
                cv2.imwrite(str(folder / f"{number}.jpg"), small)
    if fleet := of(path, "[node]"):
        (tmp_path / "fleet.toml").write_text(fleet)
        (tmp_path / "server.toml").write_text('[store]\nurl = "postgresql://db.example/facelane"\n')
    elif "server.toml" in commands:
        (tmp_path / "server.toml").write_bytes(server.config.read_bytes())
    if sinks := of(path, "[sink]"):
        (tmp_path / "events.toml").write_text(sinks)
    own = tmp_path / "own"
    own.mkdir()
    (own / "server.toml").write_text(toml(own))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FACELANE_TARGET": server.target,
        "FACELANE_CONFIG": str(server.config),
        "OWN_CONFIG": str(own / "server.toml"),
        "HOME": str(tmp_path),
        "NO_COLOR": "1",
    }
    with (tmp_path / "log").open("wb") as log:
        shell = subprocess.Popen(
            ["bash", "-euxo", "pipefail", "-c", commands],
            cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            assert shell.stdin is not None
            if "facelane-server run" in commands:
                # In the background: it is there once its socket is.
                until(
                    lambda: shell.poll() is not None or (own / "grpc.sock").exists(),
                    100, "the guide's own server",
                )  # fmt: skip
            shell.stdin.write(b"\n")
            shell.stdin.close()
            code = shell.wait(300)
        finally:
            for left in psutil.process_iter(["pid"]):
                with contextlib.suppress(psutil.Error, ProcessLookupError):
                    if os.getpgid(left.pid) == shell.pid:
                        left.terminate()
            shell.wait(30)
    assert code == 0, (tmp_path / "log").read_text()[-6000:]


def links(path: Path) -> set[str]:
    """Where they lead, as of the English page that a Chinese one stands for."""
    found = set()
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if "://" in target or target.startswith("#"):
            found.add(target)
            continue
        to = posixpath.normpath(f"{path.parent.relative_to(ROOT)}/{target}")
        page = to.removeprefix("docs/zh/").partition("#")[0]
        if to.startswith("docs/zh/"):
            to = to.replace("docs/zh/", f"docs/{english(page).parent.relative_to(ROOT / 'docs')}/")
        found.add(posixpath.normpath(to))
    return found


def english(name: str) -> Path:
    """The page that a Chinese one stands for."""
    guide = ROOT / "docs/guides" / name
    return guide if guide.is_file() else ROOT / "docs" / name


@pytest.mark.parametrize("path", CHINESE, ids=lambda path: path.stem)
def test_a_chinese_page_is_in_step(path: Path) -> None:
    original = english(path.name)
    assert headings(path) == headings(original), "the same headings"
    assert blocks(path) == blocks(original), "the same commands and settings"
    assert links(path) == links(original), "the same links"
    rows = [path.read_text().count("\n|"), original.read_text().count("\n|")]
    assert rows[0] == rows[1], "the same tables"


def test_the_chinese_readme_has_nothing_that_the_english_one_lacks() -> None:
    english, chinese = ROOT / "README.md", ROOT / "README.zh-CN.md"
    known = blocks(english)
    for block in blocks(chinese):
        assert block in known, block.text
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
