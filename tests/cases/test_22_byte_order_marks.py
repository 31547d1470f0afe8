"""Files of people that begin with a byte order mark are read as if it was not there."""

from __future__ import annotations

import codecs
import shutil
from pathlib import Path

import pytest

from facelane_bridge import config as bridge_config
from facelane_server import config
from facelane_server.edge.auth import new_key, read_keys
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import read_package


def marked(path: Path, text: str) -> Path:
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    return path


def test_the_servers_configuration(tmp_path: Path) -> None:
    path = marked(tmp_path / "server.toml", '[server]\nlisten = "unix:/run/x.sock"\n')
    assert config.load(path).server.listen == "unix:/run/x.sock"


def test_keys(tmp_path: Path) -> None:
    _, made = new_key("door", ("analyze",))
    [key] = read_keys(marked(tmp_path / "keys.toml", made.entry()))
    assert key.name == "door"


def test_a_model_package(tmp_path: Path) -> None:
    folder = tmp_path / "null-recognizer"
    shutil.copytree(Catalog().resolve("null-recognizer").folder, folder)
    manifest = folder / "model.toml"
    marked(manifest, manifest.read_text())
    assert read_package(folder).name == "null-recognizer"


def test_the_bridges_configuration(tmp_path: Path) -> None:
    path = marked(tmp_path / "bridge.toml", '[[camera]]\nname = "a"\nsource = "rtsp://c/1"\n')
    assert bridge_config.load(path).cameras[0].name == "a"


def test_another_encoding_is_told_and_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_bytes("[server]\n".encode("utf-16"))
    with pytest.raises(config.ConfigError, match="not UTF-8"):
        config.load(path)
