"""Without $HOME, as a user without an account, as containers run things: said in a sentence."""

from __future__ import annotations

import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from facelane_events import cli as events
from facelane_events.config import ConfigError as EventsError
from facelane_server import config, folders
from facelane_server.doctor.installation import check_gallery
from facelane_server.doctor.report import Status


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> Any:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_STATE_HOME", "STATE_DIRECTORY", "RUNTIME_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


def runtime(settings: config.Config) -> None:
    with folders.runtime_dir(settings):
        pass


@pytest.mark.parametrize(
    ("find", "text", "name"),
    [
        (folders.state_path, "", "state_dir"),
        (folders.state_path, 'state_dir = "~/here"', "state_dir"),
        (folders.gallery_path, "", "state_dir"),
        (folders.gallery_path, '[gallery]\npath = "~/g.db"', "gallery.path"),
        (folders.gallery_path, '[store]\nurl = "sqlite:///~/g.db"', "store.url"),
        (runtime, 'runtime_dir = "~/run"', "runtime_dir"),
    ],
)
def test_what_the_server_wants(find: Callable[[Any], Any], text: str, name: str) -> None:
    with pytest.raises(config.ConfigError, match=rf"{name}: .*\$HOME is not set.* set {name} to"):
        find(config.parse(text))


def test_the_doctor_says_so() -> None:
    found = check_gallery(config.Config())
    assert found.status is Status.FAIL
    assert "$HOME is not set" in found.detail


def test_a_folder_that_is_named_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folders.state_path(config.parse(f'state_dir = "{tmp_path}"')) == tmp_path
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert folders.state_path(config.Config()) == tmp_path / "facelane"
    assert events.state_folder("") == tmp_path / "facelane-events"


def test_where_positions_are_kept() -> None:
    with pytest.raises(EventsError, match=r"\$HOME is not set.* set state_dir"):
        events.state_folder("")
