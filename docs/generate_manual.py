"""Writes manual pages and shells' completions, from what the commands say of themselves.

usage: python docs/generate_manual.py FOLDER

``FOLDER/man1/*.1``; ``FOLDER/bash``, ``FOLDER/zsh``, ``FOLDER/fish`` with a file for each command.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import shtab
import typer.completion
import typer.main

import facelane
import facelane.cli.app
import facelane_bridge.cli
import facelane_console.cli
import facelane_events.cli
import facelane_fleet.cli
import facelane_server.cli

SHELLS: Final = ("bash", "zsh", "fish")
FILES: Final = {"bash": "{}", "zsh": "_{}", "fish": "{}.fish"}


@dataclass
class Page:
    """A command, or one of its commands, as a manual page shows it."""

    name: str
    """With those it stands below: ``facelane gallery list``."""
    about: str
    usage: str = ""
    options: list[tuple[str, str]] = field(default_factory=list)
    epilog: str = ""
    commands: list[Page] = field(default_factory=list)


def of_click(name: str, command: Any) -> Page:
    """A typer (click) command."""
    page = Page(name, inspect.cleandoc(command.help or command.short_help or ""))
    page.epilog = inspect.cleandoc(getattr(command, "epilog", None) or "")
    context = command.make_context(name, [], resilient_parsing=True)
    records = (one.get_help_record(context) for one in command.get_params(context))
    page.options = [record for record in records if record]
    page.usage = " ".join([name, *command.collect_usage_pieces(context)])
    for sub, found in getattr(command, "commands", {}).items():
        if not found.hidden:
            page.commands.append(of_click(f"{name} {sub}", found))
    return page


def of_argparse(name: str, parser: argparse.ArgumentParser, about: str = "") -> Page:
    page = Page(name, parser.description or about, epilog=parser.epilog or "")
    page.usage = " ".join(parser.format_usage().split()[1:])
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            page.commands = [
                of_argparse(f"{name} {sub}", found, helps.get(sub, ""))
                for sub, found in action.choices.items()
            ]
        elif action.help != argparse.SUPPRESS:
            value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
            if action.choices and not action.metavar:
                value = " {" + ",".join(map(str, action.choices)) + "}"
            flags = ", ".join(action.option_strings)
            text = (action.help or "") % {**vars(action), "prog": parser.prog}
            page.options.append(((flags + value).strip(), text))
    return page


PAGES: Final[dict[str, Callable[[], Page]]] = {
    "facelane": lambda: of_click("facelane", typer.main.get_command(facelane.cli.app.app)),
    "facelane-server": lambda: of_click(
        "facelane-server", typer.main.get_command(facelane_server.cli.whole())
    ),
    "facelane-bridge": lambda: of_argparse("facelane-bridge", facelane_bridge.cli._parser()),
    "facelane-console": lambda: of_argparse("facelane-console", facelane_console.cli.parser()),
    "facelane-events": lambda: of_argparse("facelane-events", facelane_events.cli._parser()),
    "facelane-fleet": lambda: of_argparse("facelane-fleet", facelane_fleet.cli._parser()),
}
PARSERS: Final[dict[str, Callable[[], argparse.ArgumentParser]]] = {
    "facelane-bridge": facelane_bridge.cli._parser,
    "facelane-console": facelane_console.cli.parser,
    "facelane-events": facelane_events.cli._parser,
    "facelane-fleet": facelane_fleet.cli._parser,
}


def _text(words: str) -> str:
    """Plain text for roff: without rich's and markdown's marks."""
    words = re.sub(r"\[/?[a-z ]+\]", "", words).replace("`", "").replace("**", "")
    words = words.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(
        "\\&" + line if line.startswith((".", "'")) else line for line in words.splitlines()
    )


def _paragraphs(words: str) -> Iterator[str]:
    for number, part in enumerate(re.split(r"\n\s*\n", words.strip())):
        if number:
            yield ".PP"
        yield _text(part)


def roff(page: Page) -> str:
    """The page, its commands each in a section of its own."""
    first = re.split(r"(?<=[.;])\s|\n", page.about.strip())[0].rstrip(".")
    lines = [
        f'.TH "{page.name.upper()}" "1" "" "facelane {facelane.__version__}" "User Commands"',
        ".SH NAME",
        f"{_text(page.name)} \\- {_text(first)}",
        ".SH SYNOPSIS",
        f".B {_text(page.usage)}",
        ".SH DESCRIPTION",
        *_paragraphs(page.about),
    ]
    lines += _options(page, ".SH OPTIONS")
    below = list(_below(page))
    if below:
        lines.append(".SH COMMANDS")
    for sub in below:
        lines += [f'.SS "{_text(sub.name)}"', f".B {_text(sub.usage)}", ".PP"]
        lines += [*_paragraphs(sub.about), *_options(sub, "")]
    if page.epilog:
        lines += [".SH NOTES", *_paragraphs(page.epilog)]
    lines += [".SH SEE ALSO", "/usr/share/doc/facelane"]
    return "\n".join(line for line in lines if line) + "\n"


def _below(page: Page) -> Iterator[Page]:
    """All commands that do something, in order."""
    for sub in page.commands:
        if not sub.commands:
            yield sub
        yield from _below(sub)


def _options(page: Page, head: str) -> Iterator[str]:
    if page.options:
        yield head
    for flags, text in page.options:
        yield ".TP"
        yield f".B {_text(flags)}"
        yield _text(" ".join(text.split())) or "\\&"


def completion(name: str, shell: str) -> str:
    """The script that makes ``shell`` complete the command's words."""
    if name in PARSERS:
        return str(shtab.complete(PARSERS[name](), shell=shell))
    variable = f"_{name.replace('-', '_')}_COMPLETE".upper()
    return typer.completion.get_completion_script(
        prog_name=name, complete_var=variable, shell=shell
    )


def main(folder: Path) -> None:
    for shell in SHELLS:
        (folder / shell).mkdir(parents=True, exist_ok=True)
    (folder / "man1").mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (folder / "man1" / f"{name}.1").write_text(roff(page()))
        for shell in SHELLS:
            text = completion(name, shell).rstrip() + "\n"
            (folder / shell / FILES[shell].format(name)).write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
