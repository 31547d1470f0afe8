"""What pages, and the files of deploy/, say of commands, settings of the environment, metrics and
files is so: every command that they name, with its options, is one that there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.contract.test_release import ROOT, load

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
DEPLOYED = sorted(
    path
    for path in (ROOT / "deploy").rglob("*")
    if path.is_file() and path.suffix != ".json" and "__pycache__" not in path.parts
)
PROGRAM = re.compile(
    r"(?:\$ )?(?:sudo (?:-u \S+ )?)?(?:(?:/opt/facelane|@VENV@)/bin/)?"
    r"(facelane(?:-(?:server|bridge|console|events|fleet))?) +([^`\n]+)"
)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def manual() -> ModuleType:
    return load(ROOT / "docs/generate_manual.py")


@cache
def command(program: str) -> Any:
    return manual().PAGES[program]()


def spoken(path: Path) -> Iterator[str]:
    """The code of a page; of other files what stands in backticks, and programs with their path."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"\\\n\s*(?:[#;]\s*)?", "", text)
    if path.suffix != ".md":
        yield from re.findall(r"`([^`\n]+)`", text)
        yield from re.findall(r"(?:/opt/facelane|@VENV@)/bin/[^'\n]+", text)
        return
    for block in re.findall(r"(?ms)^ *```[^\n]*\n(.*?)^ *```", text):
        yield from block.splitlines()
    plain = re.sub(r"(?ms)^ *```.*?^ *```", "", text)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", plain))


def wrong(program: str, rest: str) -> str:
    """What of a command is not there; "" = nothing."""
    page = command(program)
    flags = dict(options(page))
    value = False
    for word in re.split(r"\s+", re.sub(r"\s(?:#|[|&;>]).*", "", f" {rest} ")):
        word = word.strip("'\"()[],.:;…")
        if not word:
            continue
        if value:
            value = False
        elif word.startswith("-") and word != "-":
            flag = word.partition("=")[0]
            if flag not in flags and flag not in ("--help", "--version"):
                return f"{page.name} has no {flag}"
            value = flags.get(flag, False) and "=" not in word
        elif page.commands:
            below = {one.name.rpartition(" ")[2]: one for one in page.commands}
            if word not in below:
                # A placeholder, or a sentence that goes on.
                known = re.fullmatch(r"[a-z][a-z-]+", word) is None
                return "" if known else f"{page.name} has no command {word}"
            page = below[word]
            flags |= options(page)
    return ""


def options(page: Any) -> dict[str, bool]:
    """By flag: whether a value follows."""
    found = {}
    for text, _ in page.options:
        *others, last = re.split(r", ?|/", text)
        takes = len(last.split()) > 1
        for flag in (*others, last):
            if flag.startswith("-"):
                found[flag.split()[0]] = takes
    return found


@pytest.mark.parametrize("path", [*PAGES, *DEPLOYED], ids=named)
def test_commands_and_their_options_exist(path: Path) -> None:
    found = []
    for line in spoken(path):
        said = PROGRAM.match(line.strip())
        if said and (why := wrong(*said.groups())):
            found.append(f"{why}: {line.strip()[:120]}")
    assert found == []


def test_a_command_that_does_not_exist_would_be_found() -> None:
    assert wrong("facelane-server", "keys new door --role camera  # prints it") == ""
    assert "no command kees" in wrong("facelane-server", "kees new door")
    assert "no --rolle" in wrong("facelane-server", "keys new door --rolle camera")
    assert wrong("facelane", "--target unix:/x server health") == ""
    assert "no command healt" in wrong("facelane", "--target unix:/x server healt")


@cache
def sources() -> str:
    """Everything that reads or says something."""
    kinds = (".py", ".ts", ".tsx", ".go", ".proto", ".sh", ".toml", ".service", ".conf", ".env")
    folders = ("server", "clients", "protos", "bench", "tests", "examples", "deploy", "docs")
    texts = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci/run"]
    for folder in folders:
        texts += [
            path
            for path in (ROOT / folder).rglob("*")
            if path.suffix in kinds and not {"node_modules", "static"} & set(path.parts)
            and path != Path(__file__)
        ]  # fmt: skip
    return "\n".join(path.read_text(encoding="utf-8") for path in texts)


OTHERS = re.compile(
    r"PIP_|RAY_|CUDA_|PG[A-Z]|XDG_|OTEL_|OMP_|NO_|SOURCE_DATE|LD_|MALLOC_|FRONT_DOOR"
)
"""Words that belong to other programs, and an example's own."""


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_words_variables_and_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    missing = [
        word
        for word in sorted(set(re.findall(r"\b[A-Z][A-Z0-9]+(?:_[A-Z0-9]+)+\b", text)))
        if word not in sources() and not OTHERS.match(word)
    ]
    places = re.findall(
        r"`((?:server|clients|deploy|bench|tests|docs|examples|training|protos)/[\w./@-]+)`", text
    )
    assert missing == []
    beside = ROOT, ROOT / "deploy/systemd"  # whose examples are installed
    found = [place for place in places if not any((base / place).exists() for base in beside)]
    assert found == []
