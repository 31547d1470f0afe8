"""Pages of the site that are written while it is built: a hook of mkdocs.

The front pages are the READMEs, the protocol's page the protos, the SDK's page its docstrings.
Links from the documentation to files that are no pages lead to the source.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "https://facelane.invalid/source"
"""Stands for the source's address until whoever publishes the site sets `repo_url`."""
PYTHON = """# The Python library

::: facelane.Client

::: facelane.aio.Client

::: facelane.types

::: facelane.errors
"""


def protocol() -> str:
    """Services and messages with their comments, from the protos as they are."""
    parts = [
        "# The protocol",
        "",
        "gRPC, package `facelane.v1`. Comments are those of the protos.",
        "",
    ]
    paths = sorted((ROOT / "protos/facelane/v1").glob("*.proto"), key=_order)
    for path in paths:
        parts += [f"## {path.stem}", "", "```proto", _body(path.read_text()), "```", ""]
    return "\n".join(parts)


def _order(path: Path) -> tuple[bool, str]:
    return not path.stem.endswith("_service"), path.stem


def _body(text: str) -> str:
    return re.sub(r"(?m)^(syntax|package|import) .*\n+", "", text).strip()


def on_files(files: Files, config: Any) -> Files:
    for name, text in {
        "index.md": (ROOT / "README.md").read_text(),
        "zh/index.md": (ROOT / "README.zh-CN.md").read_text(),
        "reference/protocol.md": protocol(),
        "reference/python.md": PYTHON,
    }.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they are in the repository, to pages of the site or else to the source."""
    origin = {"index.md": "README.md", "zh/index.md": "README.zh-CN.md"}.get(
        page.file.src_uri, f"docs/{page.file.src_uri}"
    )

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        inside = {"README.md": "index.md", "README.zh-CN.md": "zh/index.md"}.get(
            path, path.removeprefix("docs/") if path.startswith("docs/") else ""
        )
        if inside and files.get_file_from_path(inside) is not None:
            base = posixpath.dirname(page.file.src_uri) or "."
            found = posixpath.relpath(inside, base)
        elif (ROOT / path).exists():
            base_url = (config.repo_url or SOURCE).rstrip("/")
            found = f"{base_url}/{path}"
        else:
            return match[0]
        return f"{match[1]}({found}{'#' + anchor if anchor else ''})"

    pieces = re.split(r"(?ms)(^```.*?^```)", markdown)
    return "".join(
        piece if piece.startswith("```") else re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", link, piece)
        for piece in pieces
    )
