"""The ``models`` commands, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner, Result

from facelane_server.models.catalog import Catalog
from facelane_server.modeltools.cli import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A directory with a package whose manifest has a typo."""
    folder = tmp_path / "typo"
    folder.mkdir()
    (folder / "model.toml").write_text(tomli_w.dumps({"schema": 1, "nmae": "typo"}))
    return tmp_path


def test_list() -> None:
    result = run("list", "--json")
    assert result.exit_code == 0
    listed = {row["name"]: row for row in json.loads(result.stdout)["packages"]}
    assert listed["null-detector"]["task"] == "detector"
    assert listed["rts-irse64-random"]["random_weights"] is True
    assert listed["null-detector"]["random_weights"] is False
    table = run("list")
    assert table.exit_code == 0
    assert "detector" in table.stdout


def test_names_are_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name, command in (("facelane-recognizer", ["list"]), ("null-liveness", ["verify"])):
        table = run(*command, *([name] if command == ["verify"] else []))
        assert table.exit_code == 0, table.output
        assert max(len(line) for line in table.stdout.splitlines()) <= 80
        assert Catalog().resolve(name).model_id in table.stdout


def test_list_shows_what_is_broken(broken: Path) -> None:
    result = run("list", "--json", "-d", str(broken))
    (item,) = json.loads(result.stdout)["broken"]
    assert "unknown key nmae; did you mean name?" in item["error"]
    assert "did you mean name?" in run("list", "-d", str(broken)).stdout.replace("\n", " ")


def test_show() -> None:
    result = run("show", "rts-irse64-random", "--json")
    shown = json.loads(result.stdout)
    assert shown["manifest"]["ood"]["source"] == "rts"
    assert shown["model_id"].startswith("rts-irse64-random@1.0.0#")
    assert "random weights" in run("show", "rts-irse64-random").stdout


def test_show_of_what_is_not_there() -> None:
    result = run("show", "null-detectr")
    assert result.exit_code == 1
    assert "did you mean null-detector?" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize("name", ["x[onnx]", "[/x]", "[red]x", ":warning:"])
def test_messages_keep_their_brackets(name: str, tmp_path: Path) -> None:
    shown = name.rpartition("/")[2]
    assert shown in run("show", name).stderr.replace("\n", " ")
    folder = tmp_path / name.replace("/", ".")
    folder.mkdir()
    (folder / "model.toml").write_text(f"schema = '{name}'\n")
    listed = run("list", "-d", str(tmp_path))
    assert folder.name in listed.stdout.replace("\n", "")


def test_verify_passes_and_fails_by_exit_status(broken: Path, tmp_path: Path) -> None:
    good = run("verify", "null-detector", "null-liveness", "--json")
    assert good.exit_code == 0, good.stderr
    results = json.loads(good.stdout)["results"]
    assert [row["passed"] for row in results] == [True, True]
    assert {check["name"] for check in results[0]["checks"]} == {
        "card",
        "weights",
        "load",
        "inference",
    }
    folder = tmp_path / "bad"
    folder.mkdir()
    table = {
        "schema": 1,
        "name": "bad",
        "version": "1",
        "task": "detector",
        "architecture": "yunet",
        "license": "none",
        "description": "weights that are not there",
        "input": {"max_side": 64},
        "thresholds": {"score": 0.5, "nms": 0.3},
        "weights": [{"file": "weights.pth", "sha256": "0" * 64}],
    }
    (folder / "model.toml").write_text(tomli_w.dumps(table))
    bad = run("verify", str(folder))
    assert bad.exit_code == 1
    assert "failed" in bad.stdout


def test_import_tells_what_it_needs(tmp_path: Path) -> None:
    file = tmp_path / "something.pth"
    file.write_bytes(b"")
    result = run("import", str(file), "--into", str(tmp_path / "models"))
    assert result.exit_code == 1
    assert "name one of yunet" in result.stderr.replace("\n", " ")


@pytest.mark.shared
def test_import_of_a_public_model(shared: Path, tmp_path: Path) -> None:
    result = run("import", str(shared / "models" / "yunet_n.pth"), "--into", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("yunet-n@1.0.0#")
    assert run("verify", "yunet-n", "-d", str(tmp_path), "--json").exit_code == 0


def test_directories_come_from_the_configuration(broken: Path, tmp_path: Path) -> None:
    config = tmp_path / "facelane.toml"
    config.write_text(tomli_w.dumps({"models": {"path": [str(broken)]}}))
    result = run("list", "--json", "--config", str(config))
    assert len(json.loads(result.stdout)["broken"]) == 1
    # As the server does.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACELANE_CONFIG", str(config))
        patch.setenv("HOME", str(broken.parent))
        assert run("list", "--json").stdout == result.stdout
        config.write_text(tomli_w.dumps({"models": {"path": [f"~/{broken.name}"]}}))
        assert run("list", "--json").stdout == result.stdout
    config.write_text(tomli_w.dumps({"models": {"paths": [str(broken)]}}))
    wrong = run("list", "--config", str(config))
    assert wrong.exit_code == 1
    assert "did you mean" in wrong.stderr.replace("\n", " ")
