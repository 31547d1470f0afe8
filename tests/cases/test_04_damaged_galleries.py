"""A damaged gallery is refused before it is served, and never served as an empty one."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from facelane_server.domain import FacelaneError, Reason
from facelane_server.store.gallery import Store
from facelane_server.store.records import NewTemplate
from tests.running_server import RunningServer, toml
from tests.waiting import until

DIM = 64
MODEL = "m@1#aa"


def filled(path: Path, people: int = 12) -> Path:
    rng = np.random.default_rng(1)
    store = Store(path)
    for number in range(people):
        vector = rng.normal(size=DIM).astype(np.float32)
        vector /= np.linalg.norm(vector)
        new = NewTemplate(MODEL, vector, 0.9)
        store.enroll("default", f"person-{number}", new, create_subject=True)
    store.close()
    return path


def emptied_page(path: Path, name: str, kind: int) -> None:
    """The root page of a table (kind 13) or an index (10) becomes an empty leaf: well formed,
    and all that was on it is missing without an error."""
    with closing(sqlite3.connect(path)) as connection:
        [(page,)] = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)
        ).fetchall()
        [(size,)] = connection.execute("PRAGMA page_size").fetchall()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(bytes([kind, 0, 0, 0, 0, size >> 8, size & 255, 0]) + bytes(size - 8))


def without_subjects(path: Path) -> None:
    emptied_page(path, "subjects", 13)


def without_an_index(path: Path) -> None:
    emptied_page(path, "ix_templates_subject", 10)


def with_templates_of_nobody(path: Path) -> None:
    """As another program leaves it, which does not heed what belongs together."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM subjects WHERE subject_id = 'person-3'")
        connection.commit()


def with_a_vector_of_zeros(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE templates SET vector = zeroblob(?) WHERE id = 5", (2 * DIM,))
        connection.commit()


def with_a_vector_of_noise(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        noise = np.random.default_rng(2).bytes(2 * DIM)
        connection.execute("UPDATE templates SET vector = ? WHERE id = 5", (noise,))
        connection.commit()


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def of_no_bytes(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize(
    "damage",
    [
        without_subjects, without_an_index, with_templates_of_nobody, with_a_vector_of_zeros,
        with_a_vector_of_noise, cut_off, of_no_bytes,
    ],
)  # fmt: skip
def test_no_row_is_lost_without_a_word(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = filled(tmp_path / "gallery.db")
    damage(path)
    with pytest.raises(FacelaneError) as refused, closing(Store(path)) as store:
        list(store.vectors(MODEL, DIM))
    assert refused.value.reason is Reason.GALLERY_UNAVAILABLE
    assert not refused.value.retryable
    assert "damaged" in refused.value.message
    assert "backup" in refused.value.message


def test_a_sound_gallery_opens_again_and_again(tmp_path: Path) -> None:
    path = filled(tmp_path / "gallery.db")
    for _ in range(2):
        store = Store(path)
        assert len(list(store.vectors(MODEL, DIM))) == 12
        store.close()
    # Moved away to begin anew, as the message says.
    path.rename(tmp_path / "old.db")
    store = Store(path)
    assert store.counts() == (0, 0)
    store.close()


def test_the_server_does_not_start_with_it(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    without_subjects(filled(tmp_path / "state" / "gallery.db"))
    with RunningServer(tmp_path, toml(tmp_path)) as server:
        until(lambda: server.process.poll() is not None, what="the end")
        assert server.process.returncode == 78
        assert "the gallery's file is damaged" in server.text()
        assert "Traceback" not in server.text()
