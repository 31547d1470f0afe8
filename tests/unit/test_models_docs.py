"""docs/models.md against the code: every key, every option, every package and recipe."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import typer.main
from typer.testing import CliRunner

from facelane_server.models import package
from facelane_server.models.architectures import ARCHITECTURES
from facelane_server.models.catalog import Catalog
from facelane_server.modeltools import damage, measures, reference
from facelane_server.modeltools.cli import app
from facelane_server.modeltools.importer import RECIPES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
TEXT = PAGE.read_text()


def keys(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(kind):
        nested = package._struct_in(field.type)
        if nested is None:
            yield prefix + field.name
        else:
            yield from keys(nested, f"{prefix}{field.name}.")


def test_the_reference_names_every_key_and_no_other() -> None:
    section = TEXT.split("### Reference of model.toml")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([a-z0-9_.]+)`", row)]
    assert sorted(named) == sorted(keys(package.Manifest))


def test_the_whole_manifest_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(
        r"<!-- manifest: \w+ -->\n```toml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL
    )
    (tmp_path / "model.toml").write_text(block)
    found = package.read_package(tmp_path)
    assert found.model_id.startswith("my-recogniser@1.0.0#")
    assert set(tomllib.loads(block)) <= set(package.Manifest.__struct_fields__)


def test_architectures_packages_and_recipes_are_told() -> None:
    for name in ARCHITECTURES:
        assert f"`{name}`" in TEXT
    for found in Catalog().scan()[0]:
        assert f"`{found.name}`" in TEXT
    table = TEXT.split("## Import public weights")[1].split("```")[0]
    assert re.findall(r"^\| `([a-z-]+)`", table, re.MULTILINE) == list(RECIPES)


def commands() -> list[str]:
    fences = re.split(r"^ *```.*\n", TEXT, flags=re.MULTILINE)
    inside = "\n".join(fences[1::2])
    lines = [line.split("#")[0].strip() for line in inside.splitlines()]
    return sorted({line for line in lines if line.startswith("facelane-server models ")})


@pytest.mark.parametrize("line", commands())
def test_commands_have_the_options_that_are_shown(line: str) -> None:
    command, *arguments = shlex.split(line)[2:]
    known = typer.main.get_group(app).commands[command]
    options = {option for param in known.params for option in param.opts + param.secondary_opts}
    assert {a for a in arguments if a.startswith("--")} <= options
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_there_are_commands() -> None:
    assert {line.split()[2] for line in commands()} == {
        "list", "show", "verify", "evaluate", "import",
    }  # fmt: skip


def test_figures_in_the_text_are_those_of_the_code() -> None:
    tolerance = reference.Tolerance()
    assert f"{tolerance.score:g} in scores, {tolerance.pixels:g} pixels" in TEXT
    assert f"cosine of {tolerance.cosine:g}" in TEXT
    assert len(damage.KINDS) == 16
    assert "in sixteen ways" in TEXT
    assert measures.MAX_IMPOSTOR_PAIRS == 2_000_000
    assert "two million\n  impostor pairs" in TEXT
