"""Manual pages and completions: every command and option is in them, and shells take them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from tests.contract.test_release import ROOT, load

COMMANDS = (
    "facelane", "facelane-server", "facelane-bridge", "facelane-console", "facelane-events",
    "facelane-fleet",
)  # fmt: skip


@pytest.fixture(scope="module")
def manual() -> ModuleType:
    return load(ROOT / "docs" / "generate_manual.py")


@pytest.fixture(scope="module")
def made(manual: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manual")
    manual.main(folder)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_has_every_command_and_option(manual: ModuleType, made: Path, name: str) -> None:
    text = (made / "man1" / f"{name}.1").read_text()
    plain = text.replace("\\-", "-")
    page = manual.PAGES[name]()
    below = list(manual._below(page))
    assert len(below) >= 2 or (name == "facelane-console" and len(page.options) >= 6)
    for one in [page, *below]:
        assert one is page or f'.SS "{one.name}"' in plain
        assert one.about, one.name
        for flags, about in one.options:
            assert manual._text(flags) in text, flags
            assert re.search(r"\w", re.sub(r"\[.*?\]", "", about)), (
                f"{one.name} {flags}: what it does"
            )
    # No line begins a request of roff that we did not write.
    known = (".TH", ".SH", ".SS", ".B ", ".TP", ".PP")
    assert [
        x for x in text.splitlines() if x.startswith((".", "'")) and not x.startswith(known)
    ] == []


def test_what_the_server_imports_only_when_asked_is_there_too(made: Path) -> None:
    text = (made / "man1" / "facelane-server.1").read_text().replace("\\-", "-")
    for command in (
        "models evaluate", "audit verify", "liveness calibrate", "erasure verify",
        "subjects export",
    ):  # fmt: skip
        assert f'.SS "facelane-server {command}"' in text


@pytest.mark.skipif(shutil.which("man") is None, reason="needs man: apt-get install man-db groff")
@pytest.mark.parametrize("name", COMMANDS)
def test_man_shows_it(made: Path, name: str) -> None:
    done = subprocess.run(
        ["man", "-l", str(made / "man1" / f"{name}.1")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"NAME\s+" + name + r"\s+(-|−|‐)\s+\w", done.stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("name", COMMANDS)
def test_shells_take_the_completions(manual: ModuleType, made: Path, shell: str, name: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"needs {shell}: apt-get install {shell}")
    path = made / shell / manual.FILES[shell].format(name)
    subprocess.run([program, "-n", str(path)], check=True, timeout=60)


def test_bash_completes_a_command(made: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    script = (
        f"source {made / 'bash' / 'facelane-events'}; COMP_WORDS=(facelane-events ch); "
        "COMP_CWORD=1; COMP_LINE='facelane-events ch'; COMP_POINT=18; "
        "$(complete -p facelane-events | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(
        [bash, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["check"]
