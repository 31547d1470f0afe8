"""Several processes on one store: each follows the others, and a deletion waits for all of them."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from tests.unit.test_gallery_index import Recogniser
from tests.waiting import auntil

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.gallery import gallery as gallery_module
from facelane_server.gallery.gallery import Gallery
from facelane_server.gallery.snapshot import AddTemplate, changes_of
from facelane_server.store import schema, sqlite
from facelane_server.store.chain import Receipt
from facelane_server.store.database import unavailable
from facelane_server.store.gallery import Store
from facelane_server.store.opening import open_store
from facelane_server.store.readers import Reader
from facelane_server.store.records import Correction, NewTemplate
from facelane_server.store.sqlite import SqliteFile

DIM = 16
MODEL = "m@1"


def vector(seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return values / np.linalg.norm(values)


async def served(place: Path | str) -> Gallery:
    gallery = await Gallery.open(place)
    assert await gallery.serve(MODEL, DIM, Recogniser().publish)
    return gallery


@pytest.fixture
async def two(place: Path | str) -> AsyncIterator[tuple[Gallery, Gallery]]:
    first, second = await served(place), await served(place)
    yield first, second
    await first.close()
    await second.close()


async def test_what_fails_behind_a_commit_is_told_and_followed_again(
    two: tuple[Gallery, Gallery], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the memory that recognisers share, for one: the change stands, and nobody is told that
    nothing was done."""
    gallery, _ = two
    await gallery.create_subject("g", "ada", "", {})
    follow = gallery._follow
    failures = iter([OSError(27, "File too large")])

    def fail_once() -> int:
        for failure in failures:
            raise failure
        return follow()

    monkeypatch.setattr(gallery, "_follow", fail_once)
    with pytest.raises(FacelaneError) as told:
        await gallery.delete_subject("g", "ada")
    assert (told.value.reason, told.value.retryable) == (Reason.GALLERY_UNAVAILABLE, True)
    assert "may have been made" in told.value.message
    await auntil(lambda: not gallery.knows("g", "ada"))


async def test_what_one_enrols_another_finds(two: tuple[Gallery, Gallery]) -> None:
    first, second = two
    made = await first.enroll("g", "a", vector=vector(1), ood_score=0.9, create_subject=True)
    await auntil(lambda: second.knows("g", "a"))
    assert second.similarity("g", "a", vector(1).tobytes()) > 0.99
    assert second.searched("g") == 1
    await second.delete_template("g", made.template.template_id)
    assert not first.knows("g", "a"), "it was told before the call returned"
    await second.enroll("g", "a", vector=vector(2), ood_score=0.9)
    await auntil(lambda: first.knows("g", "a"))


async def test_a_deletion_is_everywhere_when_its_call_returns(
    two: tuple[Gallery, Gallery],
) -> None:
    first, second = two
    for n in range(20):
        await first.enroll("g", "a", vector=vector(n), ood_score=0.9, create_subject=True)
        await auntil(lambda: second.knows("g", "a"))
        forgotten: list[int] = []
        second.on_forgotten = [forgotten.append]
        await first.delete_subject("g", "a")
        assert not second.knows("g", "a")
        await auntil(lambda told=forgotten: len(told) == 1)


async def test_a_process_that_does_not_answer_holds_the_confirmation_up_and_not_the_deletion(
    place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery_module, "CONFIRMED_TIMEOUT_S", 0.05)
    gallery = await served(place)
    silent = Reader(gallery._store.database, lease_s=300.0)  # of this very process: it lives
    silent.join(0)
    await gallery.enroll("g", "a", vector=vector(1), ood_score=0.9, create_subject=True)
    with pytest.raises(FacelaneError) as told:
        await gallery.delete_subject("g", "a")
    assert (told.value.reason, told.value.retryable) == (Reason.GALLERY_UNAVAILABLE, True)
    assert told.value.metadata["cause"] == "NOT_CONFIRMED"
    assert Receipt.parse(told.value.metadata["receipt"]).templates == 1
    assert not gallery.knows("g", "a")
    with pytest.raises(FacelaneError) as again:
        await gallery.delete_subject("g", "a")
    assert again.value.metadata["cause"] == "NOT_CONFIRMED"
    silent.renew(1 << 40)
    with pytest.raises(FacelaneError) as gone:
        await gallery.delete_subject("g", "a")
    assert gone.value.reason is Reason.SUBJECT_NOT_FOUND
    await gallery.close()


async def test_a_recogniser_that_is_slow_holds_no_confirmation_up(
    place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it takes in a new base, for one, of a million: its process names the subject no more
    as soon as it has read of the deletion."""
    monkeypatch.setattr(gallery_module, "FOLLOWED_TIMEOUT_S", 0.05)
    slow = Recogniser()
    first, second = await served(place), await Gallery.open(place)
    assert await second.serve(MODEL, DIM, slow.publish)
    await first.enroll("g", "a", vector=vector(1), ood_score=0.9, create_subject=True)
    await auntil(lambda: second.knows("g", "a"))
    slow.gate.clear()
    await first.delete_subject("g", "a")
    assert not second.knows("g", "a")
    slow.gate.set()
    await first.close()
    await second.close()


async def test_nobody_is_served_before_the_recognisers_have_the_gallery(
    place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody would be a stranger, for as long as it takes to take a large one in."""
    monkeypatch.setattr(gallery_module, "PUBLISHED_TIMEOUT_S", 0.0)
    slow = Recogniser()
    slow.gate.clear()
    gallery = await Gallery.open(place)
    serving = asyncio.create_task(gallery.serve(MODEL, DIM, slow.publish))
    await slow.entered.wait()
    await gallery.counts()  # behind all that ``serve`` asked of the store
    assert not serving.done()
    slow.gate.set()
    assert await serving
    assert slow.versions
    await gallery.close()


async def test_a_process_that_died_holds_nobody_up(place: Path | str) -> None:
    gallery = await served(place)
    database = gallery._store.database
    dead = Reader(database, lease_s=300.0)
    child = started("-c", "input()")
    dead._process = f"{child.pid}:{Path(f'/proc/{child.pid}/stat').read_text().split()[21]}"
    dead.join(0)
    await gallery.enroll("g", "a", vector=vector(1), ood_score=0.9, create_subject=True)
    assert dead._database is database
    child.kill()
    child.communicate()
    # One on a machine that was lost: its lease is over.
    lost = Reader(database, lease_s=-1.0)
    lost._host = "another"
    lost.join(0)
    await gallery.delete_subject("g", "a")
    with database.reading() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(schema.shards)) == 1
    await gallery.close()


def test_a_machine_that_sleeps_does_not_outlive_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock that asyncio goes by stands still meanwhile, those of the others do not."""
    with contextlib.closing(SqliteFile(tmp_path / "gallery.db")) as database:
        monkeypatch.setattr(Reader, "needs_renewal", True)
        follower = Reader(database, lease_s=300.0)
        follower.join(0)
        assert (follower.is_fenced, follower.is_due) == (False, False)
        awake, slept = time.clock_gettime, [0.0]
        monkeypatch.setattr(
            time,
            "clock_gettime",
            lambda which: awake(which) + slept[0] * (which == time.CLOCK_BOOTTIME),
        )
        assert (follower.is_fenced, follower.is_due) == (False, False)
        slept[0] = 301.0
        assert (follower.is_fenced, follower.is_due) == (True, True), "nobody is named until then"
        assert follower.renew(0)
        assert (follower.is_fenced, follower.is_due) == (False, False)
        slept[0] += 80.0
        assert (follower.is_fenced, follower.is_due) == (False, True)


async def test_who_was_away_for_longer_than_its_lease_names_nobody(
    place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = await served(place)
    await gallery.enroll("g", "a", vector=vector(1), ood_score=0.9, create_subject=True)
    assert gallery.knows("g", "a")
    assert gallery.resolve(gallery.version, 0) == ("g", "a")
    alone = gallery._store.database.kind == "sqlite"
    assert gallery._reader._trusted_until == float("inf") or not alone
    gallery._reader._trusted_until = 0.0
    assert gallery.trouble == "FENCED"
    assert not gallery.knows("g", "a")
    assert gallery.resolve(gallery.version, 0) is None
    gallery._reader.renew(gallery._seen)
    if not alone:
        assert gallery.knows("g", "a")
    await gallery.close()


async def test_who_is_too_far_behind_takes_all_in_again(
    place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_CHANGES_KEPT", 4)
    monkeypatch.setattr(limits, "CHANGES_PRUNED_EVERY", 1)
    gallery = await served(place)
    with contextlib.closing(Store(open_store(place))) as other:
        with monkeypatch.context() as slow:
            # Nothing is heard for a while.
            slow.setattr(gallery._store, "changes", lambda *_: [])
            for n in range(12):
                other.enroll("g", f"s{n}", NewTemplate(MODEL, vector(n), 0.9), create_subject=True)
            other.delete_subject("g", "s3")
        await auntil(lambda: gallery.templates == 11)
        assert not gallery.knows("g", "s3")
        assert gallery.knows("g", "s11")
    await gallery.close()


async def test_who_was_too_far_behind_confirms_what_was_deleted_meanwhile(
    place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_CHANGES_KEPT", 4)
    monkeypatch.setattr(limits, "CHANGES_PRUNED_EVERY", 1)
    first, second = await served(place), await served(place)
    forgotten: list[int] = []
    second.on_forgotten.append(forgotten.append)
    await first.enroll("g", "a", vector=vector(1), ood_score=0.9, create_subject=True)
    await auntil(lambda: second.knows("g", "a"))
    with monkeypatch.context() as slow:
        slow.setattr(second._store, "changes", lambda *_: [])  # it hears nothing for a while
        with contextlib.closing(Store(open_store(place))) as other:
            gone = other.delete_subject("g", "a")
            for n in range(12):
                other.create_subject("g", f"s{n}", "", {})
    await auntil(lambda: not second.knows("g", "a"))
    await first._confirmed(gone.revision)
    await auntil(lambda: forgotten)
    await first.close()
    await second.close()


async def test_a_server_without_a_recogniser_follows_on_after_a_gap(
    place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_CHANGES_KEPT", 4)
    monkeypatch.setattr(limits, "CHANGES_PRUNED_EVERY", 1)
    gallery = await Gallery.open(place)
    with contextlib.closing(Store(open_store(place))) as other:
        with monkeypatch.context() as slow:
            slow.setattr(gallery._store, "changes", lambda *_: [])
            for n in range(12):
                other.create_subject("g", f"s{n}", "", {})
        await auntil(lambda: gallery.revision == 12)
    await gallery.close()


async def test_a_change_of_models_whose_store_goes_away_is_made_up_for(
    place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody would be named until the next start: of the old model's templates none is
    compared with the new one's faces."""
    gallery = await served(place)
    await gallery.enroll("g", "old", vector=vector(1), ood_score=0.9, create_subject=True)
    with contextlib.closing(Store(open_store(place))) as other:
        other.enroll("g", "new", NewTemplate("n@1", vector(2), 0.9), create_subject=True)

    @contextlib.contextmanager
    def away(*_: object) -> Iterator[None]:
        raise unavailable("the store is away", cause="UNREACHABLE", retryable=True)
        yield

    with monkeypatch.context() as cut:
        cut.setattr(gallery._store, "loading", away)
        with pytest.raises(FacelaneError):
            await gallery.serve("n@1", DIM, Recogniser().publish)
    await auntil(lambda: gallery.knows("g", "new"))
    assert not gallery.knows("g", "old")
    assert gallery.model_id == "n@1"
    await gallery.close()


async def test_a_template_that_was_deleted_without_an_answer_is_waited_for_again(
    place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery_module, "CONFIRMED_TIMEOUT_S", 0.05)
    gallery = await served(place)
    made = await gallery.enroll("g", "a", vector=vector(1), ood_score=0.9, create_subject=True)
    silent = Reader(gallery._store.database, lease_s=300.0)
    silent.join(0)
    for _ in range(2):
        with pytest.raises(FacelaneError) as told:
            await gallery.delete_template("g", made.template.template_id)
        assert told.value.metadata["cause"] == "NOT_CONFIRMED"
    silent.renew(1 << 40)
    with pytest.raises(FacelaneError) as gone:
        await gallery.delete_template("g", made.template.template_id)
    assert gone.value.reason is Reason.TEMPLATE_NOT_FOUND
    await gallery.close()


def test_a_reader_that_says_in_time_that_it_lives_is_not_taken_away(
    place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(open_store(place)) as database:
        asking, late = Reader(database, lease_s=300.0), Reader(database, lease_s=-1.0)
        late._host = "another"
        late.join(3)

        def meanwhile(*_: object) -> bool:
            late._lease_s = 300.0
            assert late.renew(3)
            return True

        monkeypatch.setattr(asking, "_is_gone", meanwhile)
        assert asking.lacking(4) == 1, "it has not confirmed revision 4"
        monkeypatch.undo()
        assert asking.lacking(4) == 1
        assert late.renew(4)
        assert asking.lacking(4) == 0


async def test_who_was_taken_for_gone_follows_before_it_is_trusted_again(
    place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = await served(place)
    await gallery.enroll("g", "a", vector=vector(1), ood_score=0.9, create_subject=True)
    with contextlib.closing(Store(open_store(place))) as other:
        with monkeypatch.context() as deaf:
            deaf.setattr(gallery._store, "changes", lambda *_: [])
            gallery._reader._trusted_until = 0.0
            with other.database.writing() as connection:
                connection.execute(sa.delete(schema.shards))
            other.delete_subject("g", "a")
        follow = gallery._follow
        trusted: list[float] = []

        def noted() -> int:
            trusted.append(gallery._reader._trusted_until)
            return follow()

        monkeypatch.setattr(gallery, "_follow", noted)
        await gallery._acknowledge()
    assert not gallery.knows("g", "a")
    assert trusted[0] == 0.0
    await gallery.close()


def started(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


WRITER = """
import sys
import numpy as np
from pathlib import Path
from facelane_server.domain import FacelaneError
from facelane_server.store.database import patiently
from facelane_server.store.gallery import Store
from facelane_server.store.opening import open_store
from facelane_server.store.records import NewTemplate

place, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
where = place if place.startswith("postgresql") else Path(place)
store = patiently(lambda: Store(open_store(where)))
rng = np.random.default_rng(int(name))

def surely(change, *arguments, **options):
    while True:
        try:
            return change("g", *arguments, **options)
        except FacelaneError as error:
            # The others kept it from writing for as long as a change waits.
            if not error.retryable:
                raise

for n in range(count):
    new = NewTemplate("m@1", rng.standard_normal(16).astype(np.float32), 0.9)
    subject = f"p{name}-{n}"
    surely(store.enroll, subject, new, create_subject=True)
    print("+", subject, flush=True)
    # The same subjects as all others.
    surely(store.enroll, f"shared-{n // 3}", new, create_subject=True)
    print("+", f"shared-{n // 3}", flush=True)
    if n % 3 == 2:
        surely(store.delete_subject, subject)
        print("-", subject, flush=True)
"""


@pytest.mark.parametrize(
    ("processes", "count"), [(3, 3), pytest.param(8, 40, marks=pytest.mark.slow)]
)
async def test_many_processes_write_at_once_and_none_is_missed(
    place: Path | str, processes: int, count: int
) -> None:
    """Half of them are killed meanwhile: what they told is there, in every follower's memory."""
    open_store(place).close()
    gallery = await served(place)
    writers = [
        started("-c", WRITER, str(place), str(n), str(count if n % 2 else 1_000))
        for n in range(processes)
    ]
    told: list[str] = []
    for n, writer in enumerate(writers):
        if n % 2:
            told += (await asyncio.to_thread(writer.communicate))[0].splitlines()
    for n, writer in enumerate(writers):
        if n % 2 == 0:
            writer.kill()
            # A line that was cut off was not told.
            out = (await asyncio.to_thread(writer.communicate))[0]
            told += out[: out.rfind("\n") + 1].splitlines()
    assert all(w.returncode == (0 if n % 2 else -9) for n, w in enumerate(writers))
    there: set[str] = set()
    for line in told:
        kind, subject = line.split()
        (there.add if kind == "+" else there.discard)(subject)
    gone = {line.split()[1] for line in told if line[0] == "-"}
    # One whose writer was killed between deleting it and telling so is rightly away.
    own = {name for name in there if not name.startswith("shared")}
    perhaps = {name for name in own if int(name.rpartition("-")[2]) % 3 == 2}
    assert len(there) > processes // 2 * count * 2 // 3
    assert "shared-0" in there
    with contextlib.closing(Store(open_store(place))) as store:
        stored = {row.template_id: row.subject_id for row in store.vectors(MODEL, DIM)}
        newest = store.revision()
        names = set(stored.values())
        assert there - perhaps <= names, "what was acknowledged was lost"
        assert not gone & names, "what was deleted is back"
    await auntil(lambda: gallery._seen == newest)
    assert gallery.templates == len(stored)
    assert {name for name in names if not gallery.knows("g", name)} == set()
    assert [name for name in gone if gallery.knows("g", name)] == []
    await gallery.close()


def test_a_commit_of_our_own_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "POLL_S", 3_000.0)
    with contextlib.closing(open_store(tmp_path / "own.db")) as store:
        while store.wait_for_change(0.01):
            pass

        def commit() -> None:
            with store.writing(schema.GALLERY) as connection:
                schema.next_revision(connection, schema.GALLERY)

        with ThreadPoolExecutor(1) as others:
            committed = others.submit(commit)
            assert store.wait_for_change(300.0)
            committed.result()
            closed = others.submit(store.close)
            assert not store.wait_for_change(300.0), "the end is heard too"
            closed.result()
        store.end_waiting()


def test_a_commit_of_another_is_heard(place: Path | str) -> None:
    with (
        contextlib.closing(open_store(place)) as reader,
        contextlib.closing(open_store(place)) as w,
    ):
        while reader.wait_for_change(0.01):
            pass
        assert not reader.wait_for_change(0.01)
        with w.writing(schema.GALLERY) as connection:
            schema.next_revision(connection, schema.GALLERY)
        assert reader.wait_for_change(300.0), "not after its timeout alone"
        reader.end_waiting()


def test_what_a_subject_is_not_is_followed_beside_it(place: Path | str) -> None:
    """Added, read anew, undone, and gone with the subject, on each engine."""
    with contextlib.closing(Store(open_store(place))) as store:
        store.enroll("g", "ada", NewTemplate(MODEL, vector(1), 0.9), create_subject=True)
        said = store.enroll(
            "g", "ada", NewTemplate(MODEL, vector(2), 0.9, correction=Correction.NOT)
        )
        assert said.created
        assert said.subject.template_count == 1
        rows = list(store.vectors(MODEL, DIM))
        assert [row.negative for row in rows] == [False, True]
        number = rows[0].subject
        found = [c for one in store.changes(0, MODEL, DIM) for c in changes_of(one)]
        assert [c.number for c in found if isinstance(c, AddTemplate)] == [number, -number]
        assert [t.template_id for t in store.list_templates("g", "ada")] == [rows[0].template_id]
        [kept] = store.list_templates("g", "ada", corrections=True)
        assert kept.correction is Correction.NOT
        # What was enrolled is no correction, and is not undone as one.
        with pytest.raises(FacelaneError):
            store.delete_template("g", rows[0].template_id, undo=True)
        seen = store.revision()
        store.delete_template("g", kept.template_id, undo=True)
        [gone] = store.changes(seen, MODEL, DIM)
        assert {c.number for c in changes_of(gone)} == {number, -number}
        store.enroll("g", "ada", NewTemplate(MODEL, vector(2), 0.9, correction=Correction.NOT))
        # The same face may be somebody else's template, and be said again without a second row.
        store.enroll("g", "ada", NewTemplate(MODEL, vector(2), 0.9, correction=Correction.NOT))
        store.enroll("g", "bea", NewTemplate(MODEL, vector(2), 0.9), create_subject=True)
        assert sum(row.negative for row in store.vectors(MODEL, DIM)) == 1
        store.delete_subject("g", "ada")
        assert [row.subject_id for row in store.vectors(MODEL, DIM)] == ["bea"]


async def test_a_face_that_is_said_not_to_be_the_subject_does_not_verify(
    two: tuple[Gallery, Gallery],
) -> None:
    """Nor at the other server of the store; and taken back, it does again."""
    here, there = two
    near = vector(1) + 0.3 * vector(3)
    probe = (near / np.linalg.norm(near)).astype(np.float32).tobytes()
    await here.enroll("g", "ada", vector=vector(1), ood_score=0.9, create_subject=True)
    for gallery in two:
        await auntil(lambda gallery=gallery: gallery.knows("g", "ada"))
        assert gallery.similarity("g", "ada", probe) > 0.5
    said = await here.enroll(
        "g", "ada", vector=np.frombuffer(probe, np.float32), ood_score=0.9,
        correction=Correction.NOT,
    )  # fmt: skip
    for gallery in two:
        await auntil(lambda gallery=gallery: gallery.similarity("g", "ada", probe) == -1.0)
        assert gallery.similarity("g", "ada", vector(1).tobytes()) > 0.99
        assert (gallery.searched("g"), gallery.templates) == (1, 1)
    await there.delete_template("g", said.template.template_id, undo=True)
    for gallery in two:
        await auntil(lambda gallery=gallery: gallery.similarity("g", "ada", probe) > 0.5)
