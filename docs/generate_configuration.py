"""Writes docs/configuration.md from config.py: names, types, defaults and docstrings.

usage: python docs/generate_configuration.py [--check]
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec

from facelane_server import areas, config
from facelane_server.gallery_rules import GalleryRules

TARGET = Path(__file__).with_name("configuration.md")

HEAD = """# Configuration

One TOML file, given by `facelane-server run --config FILE` or `FACELANE_CONFIG`. Every key has a
default; an empty file is a working CPU server on a Unix socket of its user. An unknown key is
refused, and the nearest right one named; `facelane-server check --config FILE` says what would run.

This page is generated from `server/facelane_server/config.py`.
"""


def docs_of(kind: type) -> dict[str, str]:
    """Docstrings that follow the fields of a class, and of those that it goes on from."""
    base = kind.__base__
    inherited = docs_of(base) if base and getattr(base, "__struct_fields__", ()) else {}
    return {**inherited, **_own_docs_of(kind)}


def _own_docs_of(kind: type) -> dict[str, str]:
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[node.target.id] = " ".join(str(after.value.value).split())
    return found


def type_name(kind: Any) -> str:
    if kind == areas.Point:
        return "[x, y]"
    if kind == tuple[areas.Point, ...]:
        return "list of [x, y]"
    name = getattr(kind, "__name__", str(kind))
    choices = [a for a in get_args(kind) if isinstance(a, str | int)]
    if choices:
        return " \\| ".join(f"`{c}`" for c in choices)
    if str(kind).endswith("Literal['auto']]"):
        return "int \\| `auto`"
    if str(kind).startswith("dict"):
        return "table"
    for base in ("tuple", "int", "float", "bool", "str"):
        if base in str(kind) or name == base:
            return {"tuple": "list of strings", "str": "string"}.get(base, base)
    return name


def toml(value: Any, unset: str) -> str:
    if value is msgspec.NODEFAULT:
        return "-"
    if value is None:
        return unset
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{v}"' for v in value) + "]`"
    if isinstance(value, dict):
        return "`{}`"
    return f"`{value}`"


def section(name: str, kind: type[msgspec.Struct], unset: str = "package's") -> list[str]:
    docs = docs_of(kind)
    lines = [f"## {name}", ""]
    if kind.__doc__:
        lines += [" ".join(kind.__doc__.split()), ""]
    lines += ["| key | type | default | |", "|---|---|---|---|"]
    for field in msgspec.structs.fields(kind):
        default = field.default
        if default is msgspec.NODEFAULT and field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        if isinstance(default, msgspec.Struct) or "areas." in str(field.type):
            continue
        lines.append(
            f"| `{field.name}` | {type_name(field.type)} | {toml(default, unset)} | "
            f"{docs.get(field.name, '')} |"
        )
    return [*lines, ""]


def page() -> str:
    parts = [HEAD, *section("Top level", config.Config)]
    for field in msgspec.structs.fields(config.Config):
        if isinstance(field.default, config.Pools):
            parts += section("[pools.detector], [pools.recognizer], [pools.liveness]", config.Pool)
            parts.append(
                "`recognizer = false` or `liveness = false` under `[pools]` leaves a stage out.\n"
            )
        elif isinstance(field.default, msgspec.Struct):
            parts += section(f"[{field.name}]", type(field.default))
        elif field.name == "galleries":
            parts += section("[galleries.NAME]", GalleryRules, "none")
    for name, area in (("zones", areas.Zone), ("lines", areas.Line)):
        parts += section(f"[[{name}]]", area)
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text() == page() else "docs/configuration.md is stale: make docs")
    TARGET.write_text(page())
