"""Text of others is printed as it is: `pip install 'facelane[onnx]'`, a subject called `[/x]`.

Rich takes square brackets for markup and `:name:` for emoji unless it is told otherwise, and
drops them or fails. So every console is told once, where it is made, and style is given by
``Text``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for home in ("clients", "server") for path in (ROOT / home).rglob("*.py"))
OFF = {"markup": False, "emoji": False}
SPEAKS_OF = re.compile(
    r"onsole|\brich\b|command|callback|TextColumn|markup|Markdown|Option|Argument|Typer"
)
"""Text without any of it has no fault, and need not be parsed."""


def called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return ast.unparse(node.func).rpartition(".")[2]


def given(node: ast.Call) -> dict[str, object]:
    return {
        word.arg: word.value.value
        for word in node.keywords
        if word.arg and isinstance(word.value, ast.Constant)
    }


def faults(text: str) -> Iterator[str]:
    if not SPEAKS_OF.search(text):
        return
    tree = ast.parse(text)
    consoles = {"Console", "RichConsole"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(b) in consoles for b in node.bases):
            own = [
                call
                for call in ast.walk(node)
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__"
            ]
            if not any(OFF.items() <= given(call).items() for call in own):
                consoles.add(node.name)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and any(
                isinstance(mark, ast.Call) and called(mark) in ("command", "callback")
                for mark in node.decorator_list
            )
            and "[" in (ast.get_docstring(node) or "")
        ):
            yield f"{node.lineno}: a command's help with a bracket, which typer reads as markup"
        if isinstance(node, ast.ImportFrom) and node.module == "rich":
            yield f"{node.lineno}: rich's own print and the like read markup"
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        if name in consoles and not OFF.items() <= given(node).items():
            yield f"{node.lineno}: {name}() without markup=False, emoji=False"
        elif name == "TextColumn" and given(node).get("markup") is not False:
            yield f"{node.lineno}: TextColumn without markup=False"
        elif name in ("from_markup", "Markdown") or given(node).get("markup") is True:
            yield f"{node.lineno}: {name} reads markup"
        elif name == "status" and "console" in ast.unparse(node.func).lower():
            if not (node.args and isinstance(node.args[0], ast.Call)):
                yield f"{node.lineno}: status() reads markup: give Text"
        elif name in ("Option", "Argument", "Typer") and "[" in str(given(node).get("help", "")):
            yield f"{node.lineno}: help with a bracket, which typer reads as markup"


def test_no_text_goes_through_markup() -> None:
    found = [f"{p.relative_to(ROOT)}:{fault}" for p in FILES for fault in faults(p.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "wrong",
    [
        "Console()",
        "Console(markup=False)",
        "rich.console.Console(stderr=True, emoji=False)",
        "class Mine(Console):\n    pass\nMine()",
        "from rich import print",
        "Text.from_markup(name)",
        "self._console.status(f'verifying {name}')",
        "console.print(name, markup=True)",
        "TextColumn('{task.description}')",
        "typer.Option(help='needs facelane[onnx]')",
        "console.print(Markdown(text))",
        '@app.command(\'x\')\ndef x() -> None:\n    """Reads [[x, y]]."""',
    ],
)
def test_what_is_a_fault(wrong: str) -> None:
    assert list(faults(wrong))


def test_what_is_none() -> None:
    assert not list(faults("Console(markup=False, emoji=False)\nconsole.status(Text(name))"))
