"""Puts stored results into docs/benchmarks.md: ``python -m bench.page [--check]``.

Between ``<!-- results:NAME -->`` and ``<!-- end -->`` stands what the newest stored results of
each machine say, as Markdown; nothing there is typed by hand. A whole run supersedes parts
that were run before it; of a part that was run later, both are shown.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.report import RESULTS, cell, shown_columns

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
_BLOCK: Final = re.compile(r"<!-- results:(\w+) -->\n.*?<!-- end -->", re.DOTALL)
_ACROSS: Final = 10


def newest(folder: Path, bench: str) -> list[dict[str, Any]]:
    """For each machine the newest whole run of a benchmark, then the newest of each part that
    was run later; smoke runs do not count."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{bench}-*.json")):
        document = json.loads(path.read_text())
        if document["bench"] != bench or document.get("smoke"):
            continue
        key = document["machine"]["name"], document.get("part", "")
        if key not in found or found[key]["date"] <= document["date"]:
            found[key] = document
    return [
        document
        for (machine, _), document in sorted(found.items())
        if document["date"] >= found.get((machine, ""), document)["date"]
    ]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    rule = [":--" if index < left else "--:" for index in range(len(head))]
    rows = [head, rule, *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _rows(rows: Sequence[dict[str, Any]], *, scenario_outside: bool) -> str:
    columns, same = shown_columns(rows)
    if scenario_outside:
        columns = [name for name in columns if name != "scenario"]
    text = ""
    if len(columns) <= _ACROSS:
        words = sum(name in ("deployment", "scenario", "model") for name in columns)
        lines = [[cell(row.get(name)) for name in columns] for row in rows]
        text = _table(columns, lines, words)
    else:
        figures = [name for name in columns if name != "deployment"]
        head = ["", *(str(row["deployment"]) for row in rows)]
        text = _table(head, [[n, *(cell(row.get(n)) for row in rows)] for n in figures])
    if scenario_outside:
        same.pop("scenario", None)
    if same:
        said = ", ".join(f"{name} {cell(value)}" for name, value in same.items())
        text += f"\nIn all rows: {said}.\n"
    return text


def markdown(document: dict[str, Any]) -> str:
    """One stored result: machine, command, tables, and what its benchmark had to say."""
    machine = document["machine"]
    card = ", ".join(gpu["name"] for gpu in machine.get("gpus", []))
    where = f"{card + ', ' if card else ''}{machine['cpu']}, {machine['cores']} cores"
    versions = document["versions"]
    built = ", ".join(f"{n} {versions[n]}" for n in ("python", "torch") if n in versions)
    parts = [f"**{where}**, {built}, {document['date'][:10]}: `{document['command']}`\n"]
    rows = document["rows"]
    columns, _ = shown_columns(rows)
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    if len(columns) <= _ACROSS or len(scenarios) == 1:
        parts.append(_rows(rows, scenario_outside=False))
    else:
        for scenario in scenarios:
            group = [row for row in rows if row["scenario"] == scenario]
            parts.append(f"{scenario[:1].upper()}{scenario[1:]}:\n")
            parts.append(_rows(group, scenario_outside=True))
    notes = [note for note in document["notes"] if "drawn:" not in note]
    parts.append("\n".join(f"* {note}" for note in notes) + "\n")
    return "\n".join(parts)


def filled(page: str, folder: Path) -> str:
    """The page with every block written anew."""

    def block(found: re.Match[str]) -> str:
        texts = [markdown(document) for document in newest(folder, found[1])]
        body = "\n".join(texts) if texts else "Not run yet.\n"
        return f"<!-- results:{found[1]} -->\n\n{body}\n<!-- end -->"

    return _BLOCK.sub(block, page)


def main() -> int:
    page = PAGE.read_text()
    fresh = filled(page, RESULTS)
    if "--check" in sys.argv[1:]:
        if page != fresh:
            print("docs/benchmarks.md is not what the stored results say: python -m bench.page")
            return 1
        return 0
    PAGE.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
