"""Without a place for temporary files the server runs, or says in a sentence what to set."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from facelane_server import config, folders
from tests.e2e import wire
from tests.running_server import RunningServer, toml


def nowhere() -> str:
    raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_what_to_set_is_said(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(**_: object) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    with (
        pytest.raises(config.AddressError, match="set runtime_dir") as said,
        folders.runtime_dir(config.Config()),
    ):
        pass
    assert os.strerror(number) in str(said.value)


def test_a_server_without_sockets_makes_no_folder_for_them(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    text = toml(tmp_path, wire.pools()).replace(f'runtime_dir = "{tmp_path}/run"\n', "")
    assert "runtime_dir" not in text
    with RunningServer(tmp_path, text, env={"TMPDIR": str(scratch)}) as server:
        server.wait_serving()
        assert not list(scratch.glob(f"{folders.RUN_PREFIX}*"))
