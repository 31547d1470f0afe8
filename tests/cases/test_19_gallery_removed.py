"""A gallery's file that is removed or replaced under a running server takes no more changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import facelane
from facelane_server.domain import FacelaneError, Reason
from facelane_server.store.gallery import Store
from tests.cases.test_04_damaged_galleries import filled
from tests.e2e import wire
from tests.running_server import RunningServer, toml
from tests.waiting import until


def removed(path: Path) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


def replaced_by_a_copy(path: Path) -> None:
    copy = path.with_suffix(".copy")
    shutil.copy(path, copy)
    os.replace(copy, path)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def with_its_folder_away(path: Path) -> None:
    path.parent.rename(path.parent.with_name("away"))


@pytest.mark.parametrize("fate", [removed, replaced_by_a_copy, emptied, with_its_folder_away])
def test_no_change_goes_into_a_file_that_nobody_will_read(
    tmp_path: Path, fate: Callable[[Path], None]
) -> None:
    path = filled(tmp_path / "state" / "gallery.db")
    store = Store(path)
    try:
        store.create_subject("default", "before", "", {})
        assert store.trouble() == ""
        fate(path)
        assert store.trouble() == "FILE_GONE"
        with pytest.raises(FacelaneError) as refused:
            store.create_subject("default", "after", "", {})
        assert refused.value.reason is Reason.GALLERY_UNAVAILABLE
        assert refused.value.metadata["cause"] == "FILE_GONE"
        assert "restart" in refused.value.message
    finally:
        store.close()


def test_a_file_that_is_back_is_used_again(tmp_path: Path) -> None:
    path = filled(tmp_path / "state" / "gallery.db")
    store = Store(path)
    try:
        path.rename(tmp_path / "elsewhere")
        assert store.trouble() == "FILE_GONE"
        (tmp_path / "elsewhere").rename(path)
        assert store.trouble() == ""
        store.create_subject("default", "after", "", {})
    finally:
        store.close()


def test_the_server_says_so_and_goes_on_recognising(tmp_path: Path) -> None:
    with RunningServer(tmp_path, toml(tmp_path, wire.pools())) as server:
        server.wait_serving()
        with server.client() as client:
            client.enroll("grace", wire.picture())
            removed(tmp_path / "state" / "gallery.db")
            with pytest.raises(facelane.UnavailableError) as refused:
                client.enroll("ada", wire.picture(1))
            assert refused.value.reason == "GALLERY_UNAVAILABLE"
            until(lambda: client.health("facelane.v1.GalleryService") == "NOT_SERVING")
            assert client.health() == "SERVING"
            [face] = client.identify(wire.picture())
            assert face.identity.subject_id == "grace"
        assert "the gallery's file was removed or replaced" in server.text()
        assert "Traceback" not in server.text()
