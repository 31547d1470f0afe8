"""Keys that lock keys, and where the master key comes from."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from facelane_server.config import ConfigError
from facelane_server.store import envelope, masterkey
from facelane_server.store.envelope import OVERHEAD, Lock, SealBrokenError
from facelane_server.store.masterkey import Source

KEY = "ab" * 32


@given(st.binary(max_size=300), st.text(max_size=20), st.data())
def test_what_is_sealed_opens_with_its_key_in_its_place_alone(
    plain: bytes, where: str, data: st.DataObject
) -> None:
    lock = Lock.of(envelope.new_key())
    sealed = lock.seal(plain, where)
    assert len(sealed) == len(plain) + OVERHEAD
    assert lock.open(sealed, where) == plain
    assert lock.seal(plain, where) != sealed
    changed = bytearray(sealed)
    changed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    short = sealed[: data.draw(st.integers(0, len(sealed) - 1))]
    for damaged, place, key in (
        (bytes(changed), where, lock),
        (short, where, lock),
        (sealed, where + "x", lock),
        (sealed, where, Lock.of(envelope.new_key())),
    ):
        with pytest.raises(SealBrokenError):
            key.open(damaged, place)


def test_a_key_is_told_by_its_name_alone() -> None:
    key = envelope.new_key()
    lock = Lock.of(key)
    assert lock.name == Lock.of(key).name != Lock.of(envelope.new_key()).name
    assert lock.name not in key.hex()
    assert key.hex() not in repr(lock)
    with pytest.raises(ValueError, match="32 bytes"):
        Lock.of(key[:-1])


def test_blinded_names_depend_on_every_part() -> None:
    key = envelope.new_key()
    assert envelope.blinded(key, "a", "bc") == envelope.blinded(key, "a", "bc")
    others = {
        envelope.blinded(key, "a", "bc"),
        envelope.blinded(key, "ab", "c"),
        envelope.blinded(key, "abc"),
        envelope.blinded(envelope.new_key(), "a", "bc"),
    }
    assert len(others) == 4
    assert all(len(word) == 64 for word in others)


def test_every_source_gives_the_same_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "elsewhere.key"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("FACELANE_TEST_KEY", KEY)
    expected = Lock.of(bytes.fromhex(KEY)).name
    for setting in (
        f"file:{file}",
        "credential:elsewhere.key",
        "env:FACELANE_TEST_KEY",
        f"command:{sys.executable} -c \"print('{KEY}')\"",
    ):
        source = Source(setting, tmp_path)
        assert [lock.name for lock in source.read()] == [expected]
        assert KEY not in source.name
    file.write_text(f"{'cd' * 32}\n{KEY}\n")
    assert [lock.name for lock in Source(f"file:{file}", tmp_path).read()][1] == expected


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("env:FACELANE_NO_SUCH", "64 hexadecimal"),
        ("credential:absent", "CREDENTIALS_DIRECTORY"),
        ("file:/nonexistent/key", "No such file"),
        ("command:false", "gave no key"),
        ("command:/nonexistent/program", "gave no key"),
        ("command:echo hunter2", "64 hexadecimal"),
        ("vault:x", "write file:PATH"),
        ("env:", "write file:PATH"),
    ],
)
def test_sources_that_give_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, says: str
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(ConfigError, match=says) as wrong:
        Source(setting, tmp_path).read()
    assert "hunter2" not in str(wrong.value)


def test_a_first_start_makes_a_key_and_says_where_it_should_go(tmp_path: Path) -> None:
    source = Source("", tmp_path / "state")
    assert source.read() == ()
    with capture_logs() as logs:
        [made] = source.make()
    [line] = logs
    assert "keep a copy" in line["event"]
    path = tmp_path / "state" / masterkey.FILE_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().strip() not in str(logs)
    assert [lock.name for lock in source.read()] == [made.name]
    assert [lock.name for lock in source.make()] == [made.name], "another shard was first"
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="readable by others"):
        source.read()
