"""A sink's position is not lost with its file, and a damaged file is not taken for a new one."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from facelane_events.position import Position


def saved(path: Path, *tokens: str) -> Path:
    with closing(Position(path)) as position:
        for token in tokens:
            position.save(token)
    return path


def token_in(path: Path) -> str:
    with closing(Position(path)) as position:
        return position.token


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_file_that_was_deleted_is_made_again(whole_folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "state" / "x.position"
    with closing(Position(path)) as position:
        position.save("before")
        if whole_folder:
            shutil.rmtree(path.parent)
        else:
            path.unlink()
        position.save("after")
    assert token_in(path) == "after"


def test_what_was_put_in_its_place_counts_no_more(tmp_path: Path) -> None:
    path = tmp_path / "x.position"
    backup = saved(tmp_path / "backup", *(f"old {number}" for number in range(9)))
    with closing(Position(path)) as position:
        position.save("before")
        backup.replace(path)
        position.save("after")
    assert token_in(path) == "after"


def test_nothing_that_was_never_saved_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "x.position"
    with closing(Position(path)):
        path.unlink()
    assert not path.exists()


@pytest.mark.parametrize("damage", ["both", "cut", "zeroed in part"])
def test_a_damaged_one_is_told(damage: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.position", "one", "two")
    data = bytearray(path.read_bytes())
    match damage:
        case "both":
            data[9] ^= 1
            data[4096 + 9] ^= 1
        case "cut":
            del data[5:]
        case _:
            data[:12] = data[4096 : 4096 + 12] = bytes(12)
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"x\.position is damaged.* delete it to begin"):
        Position(path)
    assert path.read_bytes()[: len(data)] == data
    path.unlink()
    assert token_in(path) == ""


@pytest.mark.parametrize("slot", [0, 1])
def test_one_of_the_two_is_enough(slot: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.position", "one", "two")
    data = bytearray(path.read_bytes())
    data[slot * 4096 + 9] ^= 1
    path.write_bytes(data)
    assert token_in(path) == ("one" if slot == 0 else "two")


def test_one_whose_first_token_did_not_arrive_is_new(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.position", "one")
    data = bytearray(path.read_bytes())
    at = next(slot for slot in (0, 4096) if data[slot + 3])
    data[at + 9] ^= 1
    path.write_bytes(data)
    assert token_in(path) == ""
