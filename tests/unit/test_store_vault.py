"""What a store holds when it is encrypted, and what its keys do."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs
from typer.testing import CliRunner

from facelane_server import cli, config
from facelane_server.config import ConfigError
from facelane_server.domain import (
    Box,
    Candidate,
    Decision,
    FacelaneError,
    Identity,
    Liveness,
    LivenessVerdict,
    Reason,
    RuleReport,
    TrackReport,
)
from facelane_server.store import audit, chain, events
from facelane_server.store import vault as vault_module
from facelane_server.store.database import Database, unavailable
from facelane_server.store.envelope import Lock, new_key
from facelane_server.store.events import EventRecord
from facelane_server.store.export import export
from facelane_server.store.gallery import Store
from facelane_server.store.masterkey import FILE_NAME, Source
from facelane_server.store.opening import key_source, open_store, unlock
from facelane_server.store.pictures import Photo, Pictures, new_id
from facelane_server.store.records import Correction, NewTemplate, RequestKey
from facelane_server.store.schema import (
    GALLERY,
    confirmations,
    keys,
    last_seen,
    pictures,
    subjects,
    templates,
)
from facelane_server.store.vault import Mode, Vault, is_sealed, open_vault

DIM, MODEL = 512, "m@1"
NAMES = ("ada.lovelace", "grace.hopper", "hedy.lamarr")
CHIP = np.random.default_rng(5).integers(0, 256, 112 * 112 * 3, np.uint8).tobytes()
PICTURE = np.random.default_rng(6).integers(0, 256, 9000, np.uint8).tobytes()
MARKS = ("Lovelace, Countess", "analytical-engine", "badge-4711")


def vector(seed: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    values = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return values / np.linalg.norm(values)


@contextlib.contextmanager
def opened(place: Path | str, folder: Path, mode: Mode = "on") -> Iterator[Store]:
    database = open_store(place)
    try:
        store = Store(database, vault=open_vault(database, Source("", folder), mode=mode))
    except BaseException:
        database.close()
        raise
    with contextlib.closing(store):
        yield store


def fill(store: Store) -> None:
    for number, name in enumerate(NAMES):
        store.create_subject("staff", name, MARKS[0], {MARKS[1]: MARKS[2]})
        request = RequestKey(f"enrol-{name}", b"f" * 32)
        new = NewTemplate(MODEL, vector(number), 0.8)
        store.enroll("staff", name, new, request=request, answer={"said": MARKS[1]})


def keep_more(store: Store) -> None:
    """All else that is kept of people: chips, corrections, pictures of events, events, answers of
    those who confirm, retention's times, and what was done."""
    with_chip = NewTemplate(MODEL, vector(7), 0.8, 0.5, CHIP)
    store.enroll("staff", NAMES[0], with_chip)
    not_her = NewTemplate(MODEL, vector(8), 0.8, 0.5, correction=Correction.NOT)
    store.enroll("staff", NAMES[0], not_her)
    of_events = Pictures(store.database, store.vault)
    for name in (NAMES[0], ""):
        photo = Photo(b"\xff\xd8\xff" + PICTURE, PICTURE[::-1])
        assert of_events.add(new_id(), photo, 1, gallery_id="staff", subject_id=name)
    near = tuple(Candidate(name, 0.7) for name in NAMES)
    identity = Identity(Decision.MATCH, NAMES[0], 0.8, candidates=near)
    track = TrackReport(
        1, 0, 1, None, None, Box(0, 0, 1, 1), identity, Liveness(LivenessVerdict.LIVE)
    )
    rule = RuleReport("gate", dwell_ns=2_000_000_000)
    told = [
        EventRecord(0, "SUBJECT_SEEN", n, "door", "s", "staff", track, rule=rule) for n in (1, 2)
    ]
    events.append(store.database, store.vault, told, again=False)
    with store.database.writing(GALLERY) as connection:
        number = connection.scalar(sa.select(sa.func.min(subjects.c.id)))
        connection.execute(sa.insert(last_seen).values(subject=number, seen_ns=1))
        connection.execute(
            sa.insert(confirmations).values(sequence=1, by="guard", agrees=True, time_ns=1)
        )
    who = audit.Actor("front-desk", "IdentifyFace")
    store.audit.write([audit.Deed(audit.Action.LOOKED_UP, who, "staff", NAMES[1])])
    said = export(store, "staff", NAMES[0]).said
    assert NAMES[0].encode() in json.dumps(said).encode()
    assert said["enrolments_remembered"][0]["answer"] == {"said": MARKS[1]}
    first, _ = said["events"]
    assert first["box"] == [0, 0, 1, 1]
    assert first["zone_or_line"] == {"name": "gate", "seconds_in_it": 2.0, "crossing": None}
    of_another = export(store, "staff", NAMES[1]).said["events"][0]
    assert (of_another["named"], of_another["similarity"]) == (False, 0.7)


def test_nothing_goes_on_referring_to_whoever_was_deleted(tmp_path: Path) -> None:
    """Compiled statements keep the values that they were first made with, for good."""
    with contextlib.closing(Store(tmp_path / "gallery.db")) as store:
        words = [f"{word} of somebody {len(word)}" for word in ("the-id", "the name", "a label")]
        subject_id, name, label = (word.replace(" ", "-") for word in words)
        before = [sys.getrefcount(word) for word in (subject_id, name, label)]
        store.create_subject("staff", subject_id, display_name=name, labels={"team": label})
        assert store.get_subject("staff", subject_id).display_name == name
        assert sys.getrefcount(subject_id) > before[0], "else this shows nothing"
        store.delete_subject("staff", subject_id)
        gc.collect()
        assert [sys.getrefcount(word) for word in (subject_id, name, label)] == before


def secrets_of() -> list[bytes]:
    words = [*NAMES, *MARKS, *(f"enrol-{name}" for name in NAMES)]
    plain = [vector(n).astype(np.float16).tobytes() for n in (*range(len(NAMES)), 7, 8)]
    shown = [CHIP, PICTURE, PICTURE[::-1]]
    return [word.encode() for word in words] + [one[:64] for one in (*plain, *shown)]


def test_a_stolen_disk_without_the_master_key_tells_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state" / "gallery.db"
    with opened(path, path.parent) as store:
        fill(store)
        keep_more(store)
        assert [s.subject_id for s in store.list_subjects("staff")[0]] == sorted(NAMES)
        # While it runs, the write-ahead log lies there too.
        everything = b"".join(p.read_bytes() for p in path.parent.iterdir())
    assert all(secret not in everything for secret in secrets_of())
    (path.parent / FILE_NAME).rename(tmp_path / "elsewhere")
    everything = b"".join(p.read_bytes() for p in path.parent.iterdir())
    assert all(secret not in everything for secret in secrets_of())
    # strings, and SQLite's own tools.
    with sqlite3.connect(path) as raw:
        dumped = "\n".join(raw.iterdump())
    assert all(word not in dumped for word in (*NAMES, *MARKS))
    assert all(secret.hex() not in dumped.lower() for secret in secrets_of())
    with contextlib.suppress(FileNotFoundError):
        shown = subprocess.run(["strings", "-n4", path], capture_output=True, check=True).stdout
        assert all(secret not in shown for secret in secrets_of())
    # The project's own code, with no key and with another one.
    for prepare in (lambda: None, lambda: Source("", path.parent).make()):
        prepare()
        with pytest.raises(ConfigError, match="master key") as refused, opened(path, path.parent):
            pass
        assert not any(name in str(refused.value) for name in NAMES)
    database = open_store(path)
    with contextlib.closing(Store(database, vault=Vault("x", None, ()))) as store:
        with pytest.raises(FacelaneError) as told:
            list(store.vectors(MODEL, DIM))
        assert told.value.reason is Reason.GALLERY_UNAVAILABLE
        with pytest.raises(FacelaneError) as told:
            store.get_subject("staff", NAMES[0])
        assert told.value.reason is Reason.SUBJECT_NOT_FOUND
        said = repr(events.after(database, store.vault, 0))
        assert not any(name in said for name in NAMES)
        kept = Pictures(database, store.vault)
        with database.reading() as connection:
            ids = connection.scalars(sa.select(pictures.c.picture_id)).all()
        assert len(ids) == 2
        for picture_id in ids:
            with pytest.raises(FacelaneError, match="without that key") as told:
                kept.get(picture_id)
            assert told.value.metadata["cause"] == vault_module.NO_MASTER_KEY
    # With the key it is whole: what a backup needs.
    (tmp_path / "elsewhere").replace(path.parent / FILE_NAME)
    with opened(path, path.parent) as store:
        found = {row.subject_id: row.vector for row in store.vectors(MODEL, DIM)}
        assert set(found) == set(NAMES)
        assert all(Pictures(store.database, store.vault).get(one) for one in ids)
        [first, _] = events.after(store.database, store.vault, 0)
        assert first.track is not None
        assert first.track.identity.subject_id == NAMES[0]
        assert np.allclose(found[NAMES[1]].astype(np.float32), vector(1), atol=1e-3)
        again = store.recall("staff", RequestKey(f"enrol-{NAMES[0]}", b"f" * 32))
        assert again is not None
        assert again.answer == {"said": MARKS[1]}


def test_a_gallery_that_lay_open_is_encrypted_and_leaves_nothing_behind(
    place: Path | str, tmp_path: Path
) -> None:
    with opened(place, tmp_path, "off") as store:
        fill(store)
        numbers = {row.subject_id: row.subject for row in store.vectors(MODEL, DIM)}
    with capture_logs() as logs, opened(place, tmp_path, "auto") as store:
        assert not is_sealed(store.database)
    assert [line["event"] for line in logs if "encryption" in line["event"]] != []
    with opened(place, tmp_path, "on") as store:
        assert {row.subject_id: row.subject for row in store.vectors(MODEL, DIM)} == numbers
        subject = store.get_subject("staff", NAMES[0])
        assert (subject.display_name, subject.labels) == (MARKS[0], {MARKS[1]: MARKS[2]})
        if isinstance(place, Path):
            files = [p.read_bytes() for p in place.parent.iterdir()]
            assert all(secret not in b"".join(files) for secret in secrets_of())
    with opened(place, tmp_path, "off") as store:
        assert store.get_subject("staff", NAMES[2]).subject_id == NAMES[2], "it stays so"
        # The audit log goes on with the key that it had.
        store.create_subject("staff", "late", "", {})
        with store.database.reading() as connection:
            head, _ = audit.heads(connection)
            public = store.audit.public(connection)
            assert chain.verify(audit.links(connection), head, public=public) is None


def test_values_that_were_moved_do_not_open(tmp_path: Path) -> None:
    """Whoever can write to the disk cannot make one person another."""
    path = tmp_path / "gallery.db"
    with opened(path, tmp_path) as store:
        fill(store)
        with store.database.writing(GALLERY) as connection:
            rows = connection.execute(sa.select(templates.c.id, templates.c.vector)).all()
            for row, other in zip(rows, reversed(rows), strict=True):
                connection.execute(
                    sa.update(templates).where(templates.c.id == row.id).values(vector=other.vector)
                )
        with pytest.raises(FacelaneError, match="keys are of another store"):
            list(store.vectors(MODEL, DIM))


def test_a_new_epoch_leaves_the_keys_of_the_erased_to_nobody(
    place: Path | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vault_module, "BATCH", 2)
    with opened(place, tmp_path) as store:
        fill(store)
        vault = store._vault
        with store.database.reading() as connection:
            stolen = connection.execute(
                sa.select(keys, subjects.c.sealed).join(subjects, keys.c.subject == subjects.c.id)
            ).all()
            old = connection.scalars(sa.select(keys.c.key_id).where(keys.c.kind == "epoch")).all()
        store.delete_subject("staff", NAMES[0])
        newest = vault.turn_epoch(store.database)
        with store.database.reading() as connection:
            left = connection.execute(sa.select(keys).where(keys.c.kind != "index")).all()
            assert {row.key_id for row in left if row.kind == "epoch"} == {newest}
            assert newest not in old
            assert {row.wrapped_by for row in left if row.kind == "subject"} == {newest}
            # Somebody kept the rows of before: all keys that are left open none of them.
            for row in stolen:
                with pytest.raises(FacelaneError):
                    vault.lock(connection, row.subject, row)
        assert {row.subject_id for row in store.vectors(MODEL, DIM)} == set(NAMES[1:])
        store.create_subject("staff", "new", "", {})
    with opened(place, tmp_path) as store:
        assert store.get_subject("staff", "new").subject_id == "new"


def test_a_turn_of_the_epoch_may_end_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vault_module, "BATCH", 1)

    class KilledError(Exception):
        pass

    for stop in range(1, 6):
        path = tmp_path / str(stop) / "gallery.db"
        with opened(path, path.parent) as store:
            fill(store)
            begun = itertools.count(1)
            real: Database = store.database

            class Dying:
                """Its process dies at the n-th transaction."""

                @contextlib.contextmanager
                def writing(
                    self,
                    *counters: str,
                    real: Database = real,
                    stop: int = stop,
                    begun: Iterator[int] = begun,
                ) -> Iterator[sa.Connection]:
                    with real.writing(*counters) as connection:
                        yield connection
                        if next(begun) == stop:
                            raise KilledError

            with pytest.raises(KilledError):
                store._vault.turn_epoch(Dying())  # type: ignore[arg-type]
        with opened(path, path.parent) as store:
            assert {row.subject_id for row in store.vectors(MODEL, DIM)} == set(NAMES)
            newest = store._vault.turn_epoch(store.database)
            with store.database.reading() as connection:
                epochs = sa.select(keys.c.key_id).where(keys.c.kind == "epoch")
                assert connection.scalars(epochs).all() == [newest]
            assert len(list(store.vectors(MODEL, DIM))) == len(NAMES)


def test_another_process_goes_on_to_another_epoch(place: Path | str, tmp_path: Path) -> None:
    with opened(place, tmp_path) as first, opened(place, tmp_path) as second:
        fill(first)
        first._vault.turn_epoch(first.database)
        assert {row.subject_id for row in second.vectors(MODEL, DIM)} == set(NAMES)
        second.create_subject("staff", "late", "", {})
        assert first.get_subject("staff", "late").subject_id == "late"


def test_two_processes_turn_the_epoch_at_once(
    place: Path | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vault_module, "BATCH", 1)
    with opened(place, tmp_path) as first, opened(place, tmp_path) as second:
        fill(first)
        turns = [store._vault.turning(store.database) for store in (first, second, first)]
        done = [object()] * len(turns)
        for at in [0, 1, 0, 2, 1, 1, 2, 0, *range(3), *range(3), *range(3), *range(3)]:
            next(turns[at], done)
            # Whoever reads meanwhile, and wherever it stands, all is there.
            for store in (first, second):
                assert {row.subject_id for row in store.vectors(MODEL, DIM)} == set(NAMES)
        with first.database.reading() as connection:
            query = sa.select(sa.func.count()).where(keys.c.kind == "epoch")
            assert connection.scalar(query) == 1


def test_a_master_key_is_rotated_while_the_server_runs(tmp_path: Path) -> None:
    path, file = tmp_path / "gallery.db", tmp_path / FILE_NAME
    with opened(path, tmp_path) as store:
        fill(store)
        vault = store._vault
        old, fresh = file.read_text().strip(), new_key().hex()
        assert store.renew_keys() == 0
        file.write_text(f"{fresh}\n{old}\n")
        with store.database.writing(GALLERY) as connection:
            # Index, epoch, and the audit log's.
            assert vault.rewrap(connection, vault.offered()) == 3
            assert vault.rewrap(connection) == 0
        file.write_text(f"{fresh}\n")
        store._vault.turn_epoch(store.database)
        store.create_subject("staff", "new", "", {})
    with opened(path, tmp_path) as store:
        assert len(list(store.vectors(MODEL, DIM))) == len(NAMES)
    file.write_text(f"{old}\n")
    with pytest.raises(ConfigError, match="does not give"), opened(path, tmp_path):
        pass
    # At a start too.
    newer = new_key().hex()
    file.write_text(f"{newer}\n{fresh}\n")
    with opened(path, tmp_path):
        pass
    file.write_text(f"{newer}\n")
    with opened(path, tmp_path) as store:
        assert len(list(store.vectors(MODEL, DIM))) == len(NAMES)


def test_a_key_that_does_not_open_the_store_locks_nothing_of_it(tmp_path: Path) -> None:
    """One that was put there by mistake, and taken away again: what was locked with it would be
    lost for good."""
    path, file = tmp_path / "gallery.db", tmp_path / FILE_NAME
    with opened(path, tmp_path) as store:
        fill(store)
        right = file.read_text()
        file.write_text(new_key().hex() + "\n")
        with pytest.raises(ConfigError, match="does not give"):
            store.renew_keys()
        store.delete_subject("staff", NAMES[0])
        list(store.erasing())
        assert list(store.erasing()) == [], "what was deleted is erased all the same"
        store.create_subject("staff", "new", "", {})
    file.write_text(right)
    with opened(path, tmp_path) as store:
        assert {row.subject_id for row in store.vectors(MODEL, DIM)} == set(NAMES[1:])
        assert store.get_subject("staff", "new").subject_id == "new"


def test_a_rotation_that_met_a_busy_store_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, file = tmp_path / "gallery.db", tmp_path / FILE_NAME
    with opened(path, tmp_path) as store:
        fill(store)
        file.write_text(f"{new_key().hex()}\n{file.read_text()}")

        @contextlib.contextmanager
        def busy(*_: str) -> Iterator[None]:
            raise unavailable("busy", cause="BUSY", retryable=True)
            yield

        with monkeypatch.context() as patched:
            patched.setattr(store.database, "writing", busy)
            with pytest.raises(FacelaneError):
                store.renew_keys()
        assert store.renew_keys() == 3


def test_a_process_that_was_not_told_of_a_rotation_takes_the_key_that_is_given_by_now(
    place: Path | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / FILE_NAME
    with opened(place, tmp_path) as first, opened(place, tmp_path) as second:
        fill(first)
        assert len(list(second.vectors(MODEL, DIM))) == len(NAMES)
        old, fresh = file.read_text(), new_key().hex()
        file.write_text(f"{fresh}\n{old}")
        assert first.renew_keys() == 3
        first._vault.turn_epoch(first.database)
        file.write_text(old)  # not on this machine yet
        with pytest.raises(FacelaneError) as told:
            list(second.vectors(MODEL, DIM))
        assert told.value.metadata["cause"] == vault_module.NO_MASTER_KEY
        file.write_text(f"{fresh}\n")
        monkeypatch.setattr(vault_module, "_ASK_AGAIN_S", 0.0)
        assert len(list(second.vectors(MODEL, DIM))) == len(NAMES)
        second.create_subject("staff", "late", "", {})
        assert first.get_subject("staff", "late").subject_id == "late"


def test_where_the_key_comes_from_by_default(tmp_path: Path) -> None:
    settings = config.parse(f'state_dir = "{tmp_path}/state"')
    source = key_source(settings)
    assert source is not None
    assert source.path == tmp_path / "state" / FILE_NAME
    shared = '[store]\nurl = "postgresql://facelane@db/facelane"\n'
    assert key_source(config.parse(shared)) is None, "no folder is beside it"
    with pytest.raises(ConfigError, match="the same for every server"):
        key_source(config.parse(f'{shared}encryption = "on"'))
    database = open_store(tmp_path / "state" / "gallery.db")
    with contextlib.closing(database):
        assert unlock(database, settings).encrypts, "new galleries are"


def test_encryption_that_was_interrupted_is_finished_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gallery.db"
    with opened(path, tmp_path, "off") as store:
        fill(store)

    def dies(_database: Database) -> None:
        raise OSError

    with monkeypatch.context() as patched:
        patched.setattr(vault_module, "_write_anew", dies)
        with pytest.raises(OSError), opened(path, tmp_path):  # noqa: PT011
            pass
    with opened(path, tmp_path) as store:
        assert len(list(store.vectors(MODEL, DIM))) == len(NAMES)
        files = b"".join(p.read_bytes() for p in tmp_path.iterdir())
        assert all(secret not in files for secret in secrets_of())


def test_the_command_that_rotates(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text(f'state_dir = "{tmp_path}"\n')
    command = ["keys", "rotate-master", "--config", str(tmp_path / "server.toml")]

    def rotate() -> str:
        done = CliRunner().invoke(cli.app, command)
        return f"{done.exit_code} {done.stderr}"

    path, file = tmp_path / "gallery.db", tmp_path / FILE_NAME
    with opened(path, tmp_path) as store:
        fill(store)
        old = file.read_text().strip()
        assert "holds a new key and the old one" in rotate()
        assert old == file.read_text().split()[1]
        assert "78 facelane-server: the store is still locked by an older key" in rotate()
        assert store.renew_keys() == 3
        assert store.renew_keys() == 0
        assert rotate().startswith("0 the old key is taken out")
        assert old not in file.read_text()
        assert file.stat().st_mode & 0o777 == 0o600
    with opened(path, tmp_path) as store:
        assert len(list(store.vectors(MODEL, DIM))) == len(NAMES)
    assert all(word not in rotate() for word in file.read_text().split())


def test_deletions_have_the_epoch_turned(tmp_path: Path) -> None:
    with opened(tmp_path / "gallery.db", tmp_path) as store:
        fill(store)
        assert list(store.erasing()) == [], "nothing was deleted"
        store.delete_subject("staff", NAMES[0])
        steps = store.erasing()
        next(steps)
        # While it goes on, another one.
        store.delete_subject("staff", NAMES[1])
        list(steps)
        assert list(store.erasing()) == [None], "the second one has its own turn"
        assert list(store.erasing()) == []
        assert [row.subject_id for row in store.vectors(MODEL, DIM)] == [NAMES[2]]


def test_a_list_of_ids_does_not_remember_who_was_deleted(tmp_path: Path) -> None:
    with opened(tmp_path / "gallery.db", tmp_path) as store:
        fill(store)
        assert [s.subject_id for s in store.list_subjects("staff")[0]] == sorted(NAMES)
        with store.database.reading() as before:
            store.delete_subject("staff", NAMES[0])
            gone = next(
                number for name, number in store.listed._sorted["staff"] if name == NAMES[0]
            )
            store.listed.forget(gone)
            # Nor does who lists at this moment, in a transaction that began before.
            store.listed._seen.clear()
            store.listed.after(before, "staff", "", 10)
        assert [name for name, _ in store.listed._sorted["staff"]] == sorted(NAMES[1:])
        assert [s.subject_id for s in store.list_subjects("staff")[0]] == sorted(NAMES[1:])


def test_bytes_of_keys_are_overwritten_once_a_lock_has_them() -> None:
    key = new_key()
    lock = Lock.taking(key, "a")
    assert not any(key)
    assert lock.open(lock.seal(b"word", "here"), "here") == b"word"
    short = bytes(bytearray(b"0123456789"))
    with pytest.raises(ValueError, match="32 bytes"):
        Lock.taking(short)
    assert not any(short)
