"""The audit log in the store: what stands in it, and that nothing is done that does not."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from tests.waiting import auntil
from typer.testing import CliRunner

from facelane_server import auditing, config, erasing, limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.gallery.gallery import Gallery
from facelane_server.gallery.trail import Trail
from facelane_server.store import audit, chain
from facelane_server.store.audit import Action, Actor, AuditLog, Deed, Pending
from facelane_server.store.chain import Receipt
from facelane_server.store.gallery import Store
from facelane_server.store.masterkey import Source
from facelane_server.store.opening import open_store, unlock
from facelane_server.store.records import NewTemplate
from facelane_server.store.schema import audit as audit_table
from facelane_server.store.vault import open_vault

DIM, MODEL = 64, "m@1"
NOTHING = "CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no'); END"


def vector(seed: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)


@contextlib.contextmanager
def opened(place: Path | str, folder: Path) -> Iterator[Store]:
    database = open_store(place)
    vault = open_vault(database, Source("", folder), mode="on")
    with contextlib.closing(Store(database, vault=vault)) as store:
        yield store


def entries(store: Store) -> list[dict[str, object]]:
    with store.database.reading() as connection:
        return [audit.shown(link) for link in audit.links(connection)]


def judged(store: Store) -> chain.Finding | None:
    with store.database.reading() as connection:
        head, stub = audit.heads(connection)
        public = store.audit.public(connection)
        return chain.verify(audit.links(connection), head, public=public, stub=stub)


def test_changes_stand_in_the_log_and_name_nobody(place: Path | str, tmp_path: Path) -> None:
    audit.acting(Actor("desk-1", "/facelane.v1.GalleryService/EnrollFace"))
    with opened(place, tmp_path) as store:
        store.create_subject("staff", "lovelace", "Ada Lovelace", {"team": "engine"})
        template = store.enroll("staff", "lovelace", NewTemplate(MODEL, vector(1), 0.8)).template
        store.update_subject("staff", "lovelace", display_name="Countess")
        store.delete_template("staff", template.template_id)
        store.delete_subject("staff", "lovelace")
        found = entries(store)
        assert [entry["action"] for entry in found] == [
            "SUBJECT_CREATED", "ENROLLED", "SUBJECT_UPDATED", "TEMPLATE_DELETED", "SUBJECT_DELETED",
        ]  # fmt: skip
        assert {(entry["by"], entry["gallery"]) for entry in found} == {("desk-1", "staff")}
        assert {entry["method"] for entry in found} == {"EnrollFace"}
        codes = {entry["subject"] for entry in found if "subject" in entry}
        assert codes == {store.audit.code("staff", "lovelace")}
        assert store.audit.code("staff", "bo") not in codes
        for word in ("lovelace", "Lovelace", "Countess", "engine"):
            assert word not in str(found)
        assert judged(store) is None
    audit.acting(audit.NOBODY)
    with opened(place, tmp_path) as store:
        store.create_subject("staff", "bo", "", {})
        assert judged(store) is None
        assert entries(store)[-1]["number"] == 6
        with contextlib.closing(open_store(place)) as other:
            plain = AuditLog(other, open_vault(other, Source("", tmp_path)))
            plain.write([Deed(Action.STARTED)])
        store.create_subject("staff", "cy", "", {})
        assert judged(store) is None, "two processes write one log"


def test_what_cannot_be_written_down_is_not_done(tmp_path: Path) -> None:
    path = tmp_path / "gallery.db"
    with opened(path, tmp_path) as store:
        kept = store.enroll("g", "ada", NewTemplate(MODEL, vector(1), 0.8), create_subject=True)
        with sqlite3.connect(path) as raw:
            raw.execute(NOTHING)
        for change in (
            lambda: store.create_subject("g", "bo", "", {}),
            lambda: store.enroll("g", "ada", NewTemplate(MODEL, vector(2), 0.8)),
            lambda: store.update_subject("g", "ada", display_name="x"),
            lambda: store.delete_template("g", kept.template.template_id),
            lambda: store.delete_subject("g", "ada"),
        ):
            with pytest.raises(FacelaneError) as refused:
                change()
            assert refused.value.reason is Reason.GALLERY_UNAVAILABLE
        assert store.counts() == (1, 1)
        assert store.get_subject("g", "ada").display_name == ""
        assert len(entries(store)) == 1
        with sqlite3.connect(path) as raw:
            raw.execute("DROP TRIGGER full")
        store.delete_subject("g", "ada")
        assert judged(store) is None


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_operations_and_what_is_done_to_the_file_is_found(count: int, tmp_path: Path) -> None:
    """The chain's own test changes more; here it is a database that somebody writes into."""
    path = tmp_path / "gallery.db"
    with opened(path, tmp_path) as store:
        for batch in range(count // 100):
            store.audit.write(
                [Deed(Action.LOOKED_UP, Actor(f"k{n % 9}"), "g") for n in range(batch, batch + 100)]
            )
        assert judged(store) is None
        with store.database.reading() as connection:
            assert connection.scalar(sa.select(sa.func.count()).select_from(audit_table)) == count
        dice = random.Random(3)
        statements = []
        for number in dice.sample(range(2, count - 1), 4):
            byte = dice.randrange(8)
            statements += [
                (
                    f"UPDATE audit SET body = CAST(replace(body, 'LOOKED', 'WORKED') AS BLOB) "
                    f"WHERE sequence = {number}"
                ),
                f"UPDATE audit SET time_ns = time_ns + {1 << byte} WHERE sequence = {number}",
                f"UPDATE audit SET digest = zeroblob(32) WHERE sequence = {number}",
                f"DELETE FROM audit WHERE sequence = {number}",
                f"DELETE FROM audit WHERE sequence > {number}",
                f"UPDATE audit SET body = CAST('{{}}' AS BLOB) WHERE sequence = {number}",
            ]
        statements += [
            "DELETE FROM meta WHERE name = 'audit_head'",
            (
                f"UPDATE meta SET value = replace(value, '{count}', '{count - 1}') "
                "WHERE name = 'audit_head'"
            ),
            f"DELETE FROM audit WHERE sequence = {count}",
            "DELETE FROM audit WHERE sequence = 1",
        ]
        for statement in statements:
            with store.database.writing() as connection:
                changed = connection.exec_driver_sql(statement).rowcount
                assert changed, statement
                head, stub = audit.heads(connection)
                public = store.audit.public(connection)
                found = chain.verify(audit.links(connection), head, public=public, stub=stub)
                assert found is not None, statement
                connection.rollback()
        assert judged(store) is None


def test_retention_leaves_a_stub(place: Path | str, tmp_path: Path) -> None:
    with opened(place, tmp_path) as store:
        for _ in range(10):
            store.audit.write([Deed(Action.LOOKED_UP)] * 3)
        with store.database.reading() as connection:
            early = [link.time_ns for link in audit.links(connection)][9]
        assert store.audit.prune(before_ns=early + 1, most=10**6) >= 10
        assert judged(store) is None
        assert store.audit.prune(before_ns=0, most=5) > 0
        assert len(entries(store)) == 6
        assert entries(store)[-1]["action"] == "PRUNED"
        assert judged(store) is None
        assert store.audit.prune(before_ns=2**62, most=10**6) == 5, "one is always left"
        assert store.audit.prune(before_ns=0, most=10**6) == 0
        store.audit.write([Deed(Action.STARTED)])
        assert judged(store) is None


def test_what_waits_is_bounded_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_AUDIT_PENDING", 5)
    pending = Pending()
    refusal = Deed(Action.REFUSED, Actor("", "/x/Y"), told=(("reason", "UNAUTHENTICATED"),))
    for _ in range(1000):
        pending.repeat(refusal)
    for _ in range(7):
        pending.add(Deed(Action.LOOKED_UP))
    taken = pending.take()
    assert [d.action for d in taken] == [Action.LOOKED_UP] * 4 + [Action.REFUSED, Action.GAP]
    assert dict(taken[4].told)["times"] == 1000
    assert dict(taken[5].told) == {"times": 3}
    assert pending.take() == []
    pending.add(Deed(Action.WATCHED))
    pending.put_back(taken)
    assert len(pending) <= 6
    assert pending.take()[-1].action is Action.GAP
    # While it cannot be written for long, and more comes than there is room for.
    for _ in range(20):
        for _ in range(9):
            pending.add(Deed(Action.LOOKED_UP))
        waited = pending.take()
        for _ in range(9):
            pending.add(Deed(Action.LOOKED_UP))
        pending.put_back(waited)
        assert len(pending) <= 6
    counted = [dict(d.told)["times"] if d.action is Action.GAP else 1 for d in pending.take()]
    assert sum(map(int, counted)) == 20 * 18, "nothing is lost without being counted"


async def test_look_ups_go_on_without_the_log_and_administration_does_not(tmp_path: Path) -> None:
    path = tmp_path / "gallery.db"
    gallery = await Gallery.open(path)
    trail = Trail(gallery, config.Audit(checkpoint=str(tmp_path / "checkpoints")))
    try:
        await trail.written(Action.ADMINISTERED)
        with sqlite3.connect(path) as raw:
            raw.execute(NOTHING)
        trail.note(Action.LOOKED_UP, gallery="g", faces=2)
        trail.note_repeated(Action.REFUSED, reason="UNAUTHENTICATED")
        with pytest.raises(FacelaneError):
            await trail.written(Action.ADMINISTERED)
        assert trail.trouble
        await trail._flush()
        assert trail.trouble
        with sqlite3.connect(path) as raw:
            raw.execute("DROP TRIGGER full")
        running = asyncio.create_task(trail.run())
        kept = tmp_path / "checkpoints"
        await auntil(lambda: kept.exists() and not trail.trouble, what="the log to go on")
        running.cancel()
    finally:
        await trail.close()
        await gallery.close()
    with contextlib.closing(Store(path)) as store:
        actions = [entry["action"] for entry in entries(store)]
        assert sorted(actions) == sorted(
            ["ADMINISTERED", "LOOKED_UP", "REFUSED", "STARTED", "RESUMED"]
        )
        kept = auditing._checkpoints(tmp_path / "checkpoints")
        with store.database.reading() as connection:
            assert audit.heads(connection)[0] in kept


async def test_what_is_on_its_way_at_the_end_is_written(tmp_path: Path) -> None:
    gallery = await Gallery.open(tmp_path / "gallery.db")
    trail = Trail(gallery, config.Audit())
    busy = threading.Event()
    try:
        waiting = asyncio.create_task(gallery.ask(lambda _: busy.wait(30)))
        trail.note(Action.VIEWED)
        running = asyncio.create_task(trail.run())
        await auntil(lambda: not len(trail._pending), what="what waits to be taken")
        running.cancel()
        closing = asyncio.create_task(trail.close())
        await asyncio.wait([running])
        busy.set()
        await asyncio.gather(waiting, closing)
    finally:
        busy.set()
        await gallery.close()
    with contextlib.closing(Store(tmp_path / "gallery.db")) as store:
        assert [entry["action"] for entry in entries(store)] == ["VIEWED", "STARTED"]


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "gallery.db"
    (tmp_path / "server.toml").write_text(f'state_dir = "{tmp_path}"\n')

    def run(*arguments: str) -> tuple[int, str, str]:
        option = ["--config", str(tmp_path / "server.toml")]
        done = CliRunner().invoke(auditing.app, [*arguments, *option])
        return done.exit_code, done.stdout, done.stderr

    audit.acting(Actor("desk-1"))
    with opened(path, tmp_path) as store:
        store.create_subject("staff", "ada", "", {})
        store.create_subject("staff", "bo", "", {})
        with store.database.reading() as connection:
            head = audit.heads(connection)[0]
        assert head is not None
        store.delete_subject("staff", "ada")
        audit.acting(audit.NOBODY)
        # Beside a server that runs.
        assert len(run("list")[1].splitlines()) == 3
        assert len(run("list", "--subject", "ada", "--gallery", "staff")[1].splitlines()) == 2
        assert "SUBJECT_DELETED" in run("list", "--action", "SUBJECT_DELETED", "--json")[1]
        assert run("list", "--by", "nobody")[1] == ""
        assert run("list", "--action", "NONE")[0] == 2
        code, said, told = run("verify")
        assert (code, "up to entry 3" in said, "--checkpoint" in told) == (0, True, True)
        kept = tmp_path / "kept"
        kept.write_text(f"Nov 27 facelane audit {head.text()}\n")
        assert run("verify", "--checkpoint", str(kept))[0] == 0
        assert run("export", str(tmp_path / "out.jsonl"))[0] == 0
        assert (tmp_path / "out.jsonl").stat().st_mode & 0o077 == 0, "who did what is nobody's"
        exported = ("verify", "--file", str(tmp_path / "out.jsonl"))
        assert run(*exported, "--key", head.key)[0] == 0
        assert run("verify", "--key", chain.Signer(bytes(32)).public)[0] == 1
    text = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "out.jsonl").write_text(text.replace("desk-1", "desk-2", 1))
    assert "entry 1: an entry was changed" in run(*exported)[2]
    # Cut back to what it was before: only what was kept elsewhere tells.
    with sqlite3.connect(path) as raw:
        raw.execute("DELETE FROM audit")
        raw.execute("DELETE FROM meta WHERE name = 'audit_head'")
    assert run("verify")[0] == 0
    assert "the log is gone" in run("verify", "--checkpoint", str(kept))[2]
    assert run("verify", "--checkpoint", str(tmp_path / "server.toml"))[0] == 1
    settings = config.load(tmp_path / "server.toml")
    with contextlib.closing(open_store(path)) as database:
        assert unlock(database, settings).encrypts


def test_an_erasure_has_a_receipt_that_can_be_judged(tmp_path: Path) -> None:
    state, path = tmp_path / "state", tmp_path / "state" / "gallery.db"
    state.mkdir()
    (tmp_path / "server.toml").write_text(f'state_dir = "{state}"\n')
    kept = tmp_path / "receipt"

    def verify(*arguments: str) -> tuple[int, str]:
        option = ["verify", str(kept), "--config", str(tmp_path / "server.toml")]
        done = CliRunner().invoke(erasing.app, [*option, *arguments])
        return done.exit_code, done.output

    with opened(path, state) as store:
        for name in ("lovelace", "hopper"):
            new = NewTemplate(MODEL, vector(len(name)), 0.8)
            store.enroll("staff", name, new, create_subject=True)
        backup = tmp_path / "backup.db"
        with sqlite3.connect(path) as raw:
            raw.execute(f"VACUUM INTO '{backup}'")
        gone = store.delete_subject("staff", "lovelace")
        kept.write_text(gone.receipt + "\n")
        assert "lovelace" not in gone.receipt
        code, said = verify()
        assert (code, "epoch key of that time" in said) == (1, True)
        list(store.erasing())
        everything = ("--scan", str(state), "--subject", "lovelace")
        assert verify(*everything) == (0, verify()[1])
        # Where it is left, and where it is planted.
        code, said = verify("--scan", str(backup))
        assert (code, "backup.db: something of the subject" in said) == (1, True)
        (state / "note").write_bytes(bytes(100) + b"lovelace")
        assert "note: something of the subject at byte 100" in verify(*everything)[1]
        link = tmp_path / "link"
        link.symlink_to(state / "note")
        assert "something of the subject" in verify("--scan", str(link), *everything[2:])[1]
        (state / "note").unlink()
        # Nobody is said to be gone from where nothing was looked at.
        for elsewhere in (link, tmp_path / "stat"):
            code, said = verify("--scan", str(elsewhere))
            assert (code, elsewhere.name in said or "note" in said) == (1, True)
        (tmp_path / "empty.jpg").touch()
        code, said = verify("--scan", str(state), "--picture", str(tmp_path / "empty.jpg"))
        assert (code, "it is empty" in said) == (1, True)
        for name in ("templates", "code", "entry", "time_ns"):
            forged = gone.receipt.replace(f'"{name}":', f'"{name}":1', 1)
            if name == "code":
                forged = gone.receipt.replace('"code":"', '"code":"0', 1)
            kept.write_text(forged)
            assert verify()[0] == 1, name
        kept.write_text("{}")
        assert "no receipt" in verify()[1]
        kept.write_text(gone.receipt)
        assert verify("--key", chain.Signer(bytes(32)).public)[0] == 1
        store.audit.prune(before_ns=2**62, most=10**6)
        assert verify()[0] == 0, "the entry has ended, the receipt has not"


def test_after_a_backup_was_restored_whoever_was_deleted_is_deleted_again(tmp_path: Path) -> None:
    state, path = tmp_path / "state", tmp_path / "state" / "gallery.db"
    state.mkdir()
    (tmp_path / "server.toml").write_text(f'state_dir = "{state}"\n')
    kept, backup = tmp_path / "receipts", tmp_path / "backup.db"

    def again() -> tuple[int, str]:
        command = ["again", str(kept), "--config", str(tmp_path / "server.toml")]
        done = CliRunner().invoke(erasing.app, command)
        return done.exit_code, done.output

    with opened(path, state) as store:
        for name in ("lovelace", "hopper"):
            store.create_subject("staff", name, "", {})
        with sqlite3.connect(path) as raw:
            raw.execute(f"VACUUM INTO '{backup}'")
        old = store.delete_subject("staff", "lovelace").receipt
        late = store.create_subject("staff", "late", "", {})
        kept.write_text(f"{old}\n{store.delete_subject('staff', late.subject_id).receipt}\n\n")
        list(store.erasing())
    for other in path.parent.glob("gallery.db*"):
        other.unlink()
    backup.rename(path)
    with opened(path, state) as store:
        assert len(store.list_subjects("staff")[0]) == 2, "she is back"
        # Whoever got the number of one who was deleted after the backup is somebody else.
        store.create_subject("staff", "new", "", {})
        code, said = again()
        assert (code, "1 of 2 were there again" in said) == (0, True)
        assert [s.subject_id for s in store.list_subjects("staff")[0]] == ["hopper", "new"]
        entry = entries(store)[-1]
        assert (entry["action"], entry["why"]) == ("SUBJECT_DELETED", "RESTORED")
        assert again()[1].startswith("0 of 2")
        assert judged(store) is None
        forged = chain.Receipt.parse(old)
        kept.write_text(chain.Signer(bytes(32)).receipt(forged).text())
        assert "not signed by this store" in again()[1]
        assert len(store.list_subjects("staff")[0]) == 2


def test_a_receipt_holds_though_the_clock_was_set_back_since(tmp_path: Path) -> None:
    now = [2_000_000_000 * 10**9]  # of a clock that is ahead
    database = open_store(tmp_path / "gallery.db")
    vault = open_vault(database, Source("", tmp_path), mode="on")
    with contextlib.closing(Store(database, vault=vault, clock_ns=lambda: now[0])) as store:
        store.create_subject("staff", "lovelace", "", {})
        receipt = Receipt.parse(store.delete_subject("staff", "lovelace").receipt)
        now[0] -= 10**18
        settings = config.parse(f'state_dir = "{tmp_path}"')
        assert erasing.problems(receipt, settings, database)
        list(store.erasing())
        assert erasing.problems(receipt, settings, database) == []


def test_what_is_in_a_process_is_found(tmp_path: Path) -> None:
    signer = chain.Signer(bytes(32))
    receipt = signer.receipt(chain.Receipt("log", 1, 1, "staff", 4711, "c", 1, "", 0, "", ""))
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(bytes(range(256)) * 9)
    program = (
        "import sys; held = [b'Hedy' + b'Lamarr' * 3, bytes(range(256)) * 9]; "
        "print(flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            for words, there in (
                ((b"HedyLamarrLamarrLamarr",), True),
                ((erasing.mark(picture),), True),
                ((b"Lovelace" * 3,), False),
            ):
                wanted = erasing.patterns_of(receipt, "", words)
                assert (erasing.in_memory(child.pid, wanted) is not None) is there
        finally:
            child.kill()
