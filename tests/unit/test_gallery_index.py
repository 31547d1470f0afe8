"""Snapshots: what the recognisers get, in which order, and who is named from them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import mmap
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from tests.waiting import auntil

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.gallery import index as index_module
from facelane_server.gallery import snapshot
from facelane_server.gallery.gallery import Gallery
from facelane_server.gallery.index import GalleryIndex
from facelane_server.gallery.snapshot import (
    AddTemplate,
    Change,
    RemoveSubject,
    RemoveTemplate,
    SubjectKey,
)
from facelane_server.ipc.gallery_log import Added, LogReader
from facelane_server.ipc.messages import (
    GalleryDelta,
    GallerySnapshot,
    decode_to_worker,
    encode,
)
from facelane_server.store.records import RequestKey

DIM = 16
F32 = npt.NDArray[np.float32]


def vector(seed: int, dim: int = DIM) -> F32:
    values = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return values / np.linalg.norm(values)


class Numbers:
    """Of subjects, as the store gives them: another one for each life of a name."""

    def __init__(self) -> None:
        self._next = 0
        self._of: dict[SubjectKey, int] = {}

    def __call__(self, gallery: str, subject: str) -> int:
        if (gallery, subject) not in self._of:
            self._next += 1
            self._of[gallery, subject] = self._next
        return self._of[gallery, subject]

    def gone(self, gallery: str, subject: str) -> int:
        number = self(gallery, subject)
        del self._of[gallery, subject]
        return number


numbers = Numbers()


def add(gallery: str, subject: str, template: int) -> AddTemplate:
    half = vector(template).astype(np.float16)
    return AddTemplate(numbers(gallery, subject), gallery, subject, f"t{template}", half)


def remove(gallery: str, subject: str, template: int) -> RemoveTemplate:
    return RemoveTemplate(numbers(gallery, subject), f"t{template}")


def remove_all(gallery: str, subject: str) -> RemoveSubject:
    return RemoveSubject(numbers.gone(gallery, subject))


Content = dict[SubjectKey, list[bytes]]


def read(message: GallerySnapshot, fd: int) -> list[tuple[str, int, bytes]]:
    """A snapshot as a worker reads it, from the file alone: (gallery, subject index, vector)."""
    if message.rows == 0:
        assert os.fstat(fd).st_size == 0
        return []
    size = message.rows * message.dim * 2
    mapped = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    matrix = np.frombuffer(mapped, np.float16, message.rows * message.dim)
    matrix = matrix.reshape(message.rows, message.dim)
    indices = np.frombuffer(mapped, np.int32, message.rows, offset=size)
    assert os.fstat(fd).st_size == size + 4 * message.rows
    assert (np.diff(indices) >= 0).all(), "rows of a subject must lie together"
    found = []
    for gallery, first, end in message.galleries:
        assert first == len(found)
        found += [(gallery, int(indices[row]), matrix[row].tobytes()) for row in range(first, end)]
    assert len(found) == message.rows
    return found


class Recogniser:
    """Stands where the pool stands: keeps what was published, as a worker would read it."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.bases: list[int] = []
        self.models: list[str] = []
        self.content: Content = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = asyncio.Event()
        self.failures = 0
        self.bytes_read = 0
        self._rows: list[tuple[str, int, bytes] | None] = []
        self._late: list[tuple[str, int, bytes] | None] = []
        self._log = LogReader()

    async def publish(
        self, message: GallerySnapshot, fd: int, delta: GalleryDelta | None, log: int
    ) -> None:
        self.entered.set()
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise FacelaneError(Reason.POOL_UNAVAILABLE, "no worker", retryable=True)
        assert decode_to_worker(encode(message)) == message
        if message.version not in self.bases:
            self.bases.append(message.version)
            self._rows, self._late, self._log = [*read(message, fd)], [], LogReader()
            self.bytes_read += os.fstat(fd).st_size
        version = message.version
        if delta is not None:
            assert decode_to_worker(encode(delta)) == delta
            assert delta.base == message.version
            version = delta.version
            for operation in self._log.read(log, delta.log_bytes):
                if isinstance(operation, Added):
                    vector = bytes(operation.vector)
                    self._late.append((operation.gallery, operation.subject, vector))
                    self.bytes_read += len(operation.vector)
                elif operation.row >= 0:
                    self._rows[operation.row] = None
                else:
                    self._late[-1 - operation.row] = None
        if version not in self.versions:
            self.versions.append(version)
            self.models.append(message.model_id)
        self.content = {}
        for row in (*self._rows, *self._late):
            if row is not None:
                self.content.setdefault((row[0], str(row[1])), []).append(row[2])

    def named(self, index: GalleryIndex) -> dict[SubjectKey, set[bytes]]:
        """What was published, with its indices resolved."""
        out: dict[SubjectKey, set[bytes]] = {}
        for (gallery, number), vectors in self.content.items():
            key = index.resolve(self.versions[-1], int(number))
            assert key is not None
            assert key[0] == gallery
            assert len(set(vectors)) == len(vectors)
            out[key] = set(vectors)
        return out


@pytest.fixture
async def recogniser() -> Recogniser:
    return Recogniser()


@pytest.fixture
async def index(recogniser: Recogniser) -> AsyncIterator[GalleryIndex]:
    made = GalleryIndex(DIM, recogniser.publish)
    made.start()
    yield made
    await made.close()


async def settled(index: GalleryIndex, revision: int) -> None:
    assert await index.published(revision, 10.0)


async def test_an_empty_gallery_is_published_too(
    index: GalleryIndex, recogniser: Recogniser
) -> None:
    await settled(index, 0)
    assert recogniser.versions == [1]
    assert recogniser.content == {}
    assert index.resolve(1, 0) is None


async def test_changes_reach_the_recogniser(index: GalleryIndex, recogniser: Recogniser) -> None:
    await settled(
        index, index.apply([add("g", "b", 1), add("g", "a", 2), add("f", "z", 3), add("g", "b", 4)])
    )
    bytes_of = {n: vector(n).astype(np.float16).tobytes() for n in range(10)}
    assert recogniser.named(index) == {
        ("f", "z"): {bytes_of[3]},
        ("g", "a"): {bytes_of[2]},
        ("g", "b"): {bytes_of[1], bytes_of[4]},
    }
    assert index.templates == 4
    await settled(index, index.apply([remove("g", "b", 1), remove_all("f", "z")]))
    assert recogniser.named(index) == {("g", "a"): {bytes_of[2]}, ("g", "b"): {bytes_of[4]}}
    await settled(index, index.apply([remove("g", "b", 4), remove_all("g", "a")]))
    assert recogniser.content == {}
    assert index.templates == 0


async def test_workers_cannot_change_the_file(index: GalleryIndex) -> None:
    await settled(index, index.rebase("", DIM, [add("g", "a", 1)]))
    fd = index._served.rows.base.fd
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    for wanted in (fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SEAL, 0x10):
        assert seals & wanted
    with pytest.raises(OSError, match=r"Bad file descriptor|Operation not permitted"):
        os.write(fd, b"x")
    with pytest.raises(OSError, match=r"Permission denied|Operation not permitted"):
        mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


async def test_what_is_removed_is_overwritten(index: GalleryIndex) -> None:
    """In the base, in the log, and in what the log is still to get."""
    await settled(index, index.rebase("", DIM, [add("g", "a", 1), add("g", "b", 2)]))
    await settled(index, index.apply([add("g", "c", 3), add("g", "d", 4)]))
    served = index._served

    def held(number: int) -> bool:
        needle = vector(number).astype(np.float16).tobytes()
        base = os.pread(served.rows.base.fd, 1 << 20, 0)
        return needle in base + os.pread(served.log.reader, 1 << 20, 0)

    assert [held(n) for n in range(1, 5)] == [True] * 4, "the test looks in the wrong place"
    changes = [remove_all("g", "a"), remove_all("g", "c"), add("g", "e", 5), remove("g", "e", 5)]
    await settled(index, index.apply(changes))
    assert [held(n) for n in range(1, 6)] == [False, True, False, True, False]


keys = st.tuples(st.sampled_from(["f", "g"]), st.sampled_from(["a", "b", "c"]))
operations = st.lists(st.tuples(st.sampled_from(["add", "one", "all"]), keys), max_size=12)


@settings(max_examples=60)
@given(st.lists(operations, max_size=6), st.integers(0, 8), st.data())
def test_any_history_ends_in_the_same_state_as_a_plain_model(
    batches: list[list[tuple[str, SubjectKey]]], heavy: int, data: st.DataObject
) -> None:
    """Batches of changes, each published, against a dict of sets; new bases are made meanwhile."""
    model: dict[SubjectKey, dict[str, bytes]] = {}
    recogniser: Recogniser

    async def play() -> None:
        nonlocal recogniser
        recogniser = Recogniser()
        index = GalleryIndex(DIM, recogniser.publish)
        index.start()
        number = 0
        bounds = pytest.MonkeyPatch()
        bounds.setattr(limits, "MIN_DELTA_ROWS", heavy)
        bounds.setattr(limits, "MAX_DELTA_ROWS", heavy)
        try:
            for batch in batches:
                changes: list[Change] = []
                for kind, key in batch:
                    held = model.setdefault(key, {})
                    if kind == "add":
                        number += 1
                        change = add(*key, number)
                        held[change.template_id] = change.vector.tobytes()
                        changes.append(change)
                    elif kind == "one" and held:
                        name = data.draw(st.sampled_from(sorted(held)))
                        del held[name]
                        changes.append(remove(*key, int(name[1:])))
                    elif kind == "all":
                        held.clear()
                        changes.append(remove_all(*key))
                await settled(index, index.apply(changes))
                expected = {key: set(held.values()) for key, held in model.items() if held}
                assert recogniser.named(index) == expected
                assert index.templates == sum(map(len, expected.values()))
                for name in ("f", "g"):
                    assert index.searched(name) == sum(
                        len(held) for key, held in expected.items() if key[0] == name
                    )
        finally:
            bounds.undo()
            await index.close()

    asyncio.run(play())


async def test_changes_during_a_publication_are_taken_together(
    index: GalleryIndex, recogniser: Recogniser
) -> None:
    await settled(index, 0)
    recogniser.gate.clear()
    recogniser.entered.clear()
    index.apply([add("g", "a", 1)])
    await asyncio.wait_for(recogniser.entered.wait(), 30)
    last = 0
    for n in range(2, 50):
        last = index.apply([add("g", f"s{n}", n)])
    assert not await index.published(last, 0.05)
    recogniser.gate.set()
    await settled(index, last)
    assert recogniser.versions == [1, 2, 3], "48 changes took more than one snapshot"
    assert len(recogniser.named(index)) == 49


async def test_a_deleted_subject_is_not_named_from_an_older_snapshot(
    index: GalleryIndex, recogniser: Recogniser
) -> None:
    await settled(index, index.apply([add("g", "a", 1), add("g", "b", 2)]))
    version = recogniser.versions[-1]
    assert index.resolve(version, 0) == ("g", "a")
    recogniser.gate.clear()
    index.apply([remove_all("g", "a")])
    # Before any recogniser knows.
    assert index.resolve(version, 0) is None
    assert index.similarity(("g", "a"), vector(1)) is None
    assert index.resolve(version, 1) == ("g", "b")
    # Somebody else under the same id is not who the old snapshot meant.
    revision = index.apply([add("g", "a", 3)])
    assert index.resolve(version, 0) is None
    recogniser.gate.set()
    await settled(index, revision)
    assert ("g", "a") in recogniser.named(index)
    assert index.resolve(version, 0) is None


async def test_changes_while_a_base_is_made_are_in_it(
    index: GalleryIndex, recogniser: Recogniser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MIN_DELTA_ROWS", 3)
    building, release = threading.Event(), threading.Event()
    real = index_module.compact

    def slow(cut: snapshot.Cut) -> snapshot.Base:
        building.set()
        assert release.wait(10)
        return real(cut)

    monkeypatch.setattr(index_module, "compact", slow)
    await settled(index, index.apply([add("g", name, n) for n, name in enumerate("abcd", 1)]))
    assert await asyncio.to_thread(building.wait, 10)
    older = recogniser.versions[-1]
    # The base that is being made holds the first person; the id now means a second one.
    await settled(index, index.apply([remove_all("g", "a"), add("g", "a", 5)]))
    await settled(index, index.apply([remove("g", "b", 2), add("h", "z", 6)]))
    assert recogniser.bases == [1], "what goes on waits for no base"
    release.set()
    await auntil(lambda: len(recogniser.bases) >= 2)
    bytes_of = {n: vector(n).astype(np.float16).tobytes() for n in range(10)}
    assert recogniser.named(index) == {
        ("g", "a"): {bytes_of[5]},
        ("g", "c"): {bytes_of[3]},
        ("g", "d"): {bytes_of[4]},
        ("h", "z"): {bytes_of[6]},
    }
    # Results that are under way since before still mean what they meant.
    named = [index.resolve(older, n) for n in range(5)]
    assert named[:4] == [None, None, ("g", "c"), ("g", "d")]
    gone = index._served.rows.base
    assert bytes_of[1] not in os.pread(gone.fd, 1 << 20, 0)


async def test_only_the_last_bases_are_resolved(
    index: GalleryIndex, recogniser: Recogniser
) -> None:
    for n in range(1, limits.MAX_BASES_KEPT + 5):
        await settled(index, index.rebase("", DIM, [add("g", "a", n)]))
    newest = recogniser.versions[-1]
    kept = [v for v in range(newest + 1) if index.resolve(v, 0) is not None]
    assert kept == list(range(newest - limits.MAX_BASES_KEPT + 1, newest + 1))
    for wrong in (-1, 1, 10**9):
        assert index.resolve(newest, wrong) is None


async def test_an_enrolment_costs_what_it_adds(index: GalleryIndex, recogniser: Recogniser) -> None:
    many = [add("g", f"s{n:05d}", n) for n in range(5_000)]
    await settled(index, index.rebase("", DIM, many))
    before = recogniser.bytes_read
    await settled(index, index.apply([add("g", "one-more", 9_999)]))
    assert recogniser.bytes_read - before == 2 * DIM
    await settled(index, index.apply([remove_all("g", "s00007")]))
    assert recogniser.bytes_read - before == 2 * DIM
    assert len(recogniser.named(index)) == 5_000


async def test_a_failed_publication_is_repeated(
    index: GalleryIndex, recogniser: Recogniser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "RETRY_S", 0.01)
    await settled(index, 0)
    recogniser.failures = 3
    await settled(index, index.apply([add("g", "a", 1)]))
    assert set(recogniser.named(index)) == {("g", "a")}


async def test_a_base_that_cannot_be_made_loses_no_change(
    index: GalleryIndex, recogniser: Recogniser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "RETRY_S", 0.001)
    monkeypatch.setattr(limits, "MIN_DELTA_ROWS", 1)
    real = index_module.compact
    failed: list[int] = []

    def failing(cut: snapshot.Cut) -> snapshot.Base:
        if len(failed) < 2:
            failed.append(1)
            raise MemoryError
        return real(cut)

    monkeypatch.setattr(index_module, "compact", failing)
    await settled(index, index.apply([add("g", "a", 1), add("g", "b", 2), add("g", "c", 3)]))
    await auntil(lambda: len(failed) == 2)
    await settled(index, index.apply([remove_all("g", "c"), add("g", "c", 6)]))
    await auntil(lambda: len(recogniser.bases) >= 2)
    bytes_of = {n: vector(n).astype(np.float16).tobytes() for n in range(10)}
    assert recogniser.named(index) == {
        ("g", "a"): {bytes_of[1]}, ("g", "b"): {bytes_of[2]}, ("g", "c"): {bytes_of[6]},
    }  # fmt: skip


def gallery_descriptors() -> int:
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return sum("facelane-gallery" in link for link in links)


async def test_no_descriptor_is_left(recogniser: Recogniser) -> None:
    gc.collect()
    assert gallery_descriptors() == 0
    index = GalleryIndex(DIM, recogniser.publish)
    index.start()
    for n in range(1, 10):
        await settled(index, index.apply([add("g", "a", n)]))
        # The snapshot's own, and the mapping's, of this version and the one before.
        assert 1 <= gallery_descriptors() <= 6
    await index.close()
    await index.close()
    del index
    gc.collect()
    assert gallery_descriptors() == 0


# -- store and index together -------------------------------------------------------------------


@pytest.fixture
async def gallery(tmp_path: Path, recogniser: Recogniser) -> AsyncIterator[Gallery]:
    opened = await Gallery.open(tmp_path / "gallery.db", max_templates=50)
    assert await opened.serve("m@1", DIM, recogniser.publish)
    yield opened
    await opened.close()


async def test_enrolled_is_published_when_the_call_returns(
    gallery: Gallery, recogniser: Recogniser
) -> None:
    made = await gallery.enroll("g", "a", vector=vector(1), ood_score=0.9, create_subject=True)
    assert len(recogniser.content) == 1
    assert gallery.similarity("g", "a", vector(1).tobytes()) == pytest.approx(1.0, abs=1e-3)
    assert gallery.knows("g", "a")
    assert not gallery.knows("default", "a")
    await gallery.delete_template("g", made.template.template_id)
    assert recogniser.content == {}
    with pytest.raises(FacelaneError) as caught:
        gallery.similarity("g", "a", vector(1).tobytes())
    assert caught.value.reason is Reason.NO_TEMPLATES
    await gallery.enroll("g", "a", vector=vector(1), ood_score=0.9)
    assert gallery.knows("g", "a")
    assert (await gallery.delete_subject("g", "a")).templates == 1
    assert not gallery.knows("g", "a")
    assert recogniser.content == {}
    assert gallery.templates == 0
    assert await gallery.counts() == (0, 0)


async def test_a_restart_publishes_what_was_stored(tmp_path: Path) -> None:
    path = tmp_path / "gallery.db"
    for round_ in range(2):
        recogniser = Recogniser()
        opened = await Gallery.open(path)
        await opened.serve("m@1", DIM, recogniser.publish)
        assert gallery_size(recogniser) == round_
        await opened.enroll("g", "a", vector=vector(round_), ood_score=0.9, create_subject=True)
        assert gallery_size(recogniser) == round_ + 1
        await opened.close()


def gallery_size(recogniser: Recogniser) -> int:
    return sum(map(len, recogniser.content.values()))


async def test_another_model_sees_only_its_own_templates(
    gallery: Gallery, recogniser: Recogniser
) -> None:
    await gallery.enroll("g", "a", vector=vector(1), ood_score=0.9, create_subject=True)
    old = recogniser.versions[-1]
    assert recogniser.models[-1] == "m@1"
    assert await gallery.serve("n@2", 2 * DIM, recogniser.publish)
    assert recogniser.content == {}
    assert recogniser.models[-1] == "n@2"
    assert gallery.resolve(old, 0) is None
    [kept] = await gallery.list_templates("g", "a")
    # A template of the other model is deleted without touching the index.
    await gallery.enroll("g", "a", vector=vector(2, 2 * DIM), ood_score=0.9)
    await gallery.delete_template("g", kept.template_id)
    assert gallery.templates == 1
    assert gallery_size(recogniser) == 1
    assert await gallery.serve("m@1", DIM, recogniser.publish)
    assert recogniser.content == {}
    assert recogniser.versions == sorted(set(recogniser.versions))


async def test_templates_of_other_models_are_counted_in_the_log(
    gallery: Gallery, recogniser: Recogniser
) -> None:
    await gallery.enroll("g", "a", vector=vector(1), ood_score=0.9, create_subject=True)
    with capture_logs() as logs:
        await gallery.serve("n@2", 2 * DIM, recogniser.publish)
        await gallery.serve("m@1", DIM, recogniser.publish)
    told = [line for line in logs if "enrol these subjects again" in line["event"]]
    assert [(line["log_level"], line["not_searched"]) for line in told] == [("warning", 1)]


async def test_which_galleries_are_empty(gallery: Gallery) -> None:
    await gallery.create_subject("a", "nobody-yet", "", {})
    await gallery.enroll("b", "x", vector=vector(1), ood_score=0.9, create_subject=True)
    assert [gallery.is_empty(name) for name in ("", "a", "b", "bb", "c")] == [
        True, True, False, True, True,
    ]  # fmt: skip
    await gallery.delete_subject("b", "x")
    assert gallery.is_empty("b")


async def test_how_many_templates_a_face_is_compared_with(gallery: Gallery) -> None:
    assert [gallery.searched(name) for name in ("a", "b", "")] == [0, 0, 0]
    for gallery_id, subject_id, number in (
        ("a", "x", 0),
        ("a", "x", 1),
        ("a", "y", 2),
        ("b", "x", 3),
    ):
        await gallery.enroll(
            gallery_id, subject_id, vector=np.eye(DIM, dtype=np.float32)[number % DIM],
            ood_score=0.9, create_subject=True,
        )  # fmt: skip
    assert [gallery.searched(name) for name in ("a", "b", "ab", "")] == [3, 1, 0, 0]


async def test_a_caller_that_goes_away_leaves_store_and_index_in_step(
    gallery: Gallery, recogniser: Recogniser
) -> None:
    for n in range(10):
        call = asyncio.create_task(
            gallery.enroll("g", f"s{n}", vector=vector(n), ood_score=0.9, create_subject=True)
        )
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    await gallery.enroll("g", "last", vector=vector(99), ood_score=0.9, create_subject=True)
    _subjects, templates = await gallery.counts()
    assert gallery.templates == templates == gallery_size(recogniser)


async def test_waiting_calls_are_bounded(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, release = threading.Event(), threading.Event()

    def hang(*_: object, **_kwargs: object) -> bool:
        entered.set()
        assert release.wait(20)
        return True

    monkeypatch.setattr(gallery._store, "list_templates", hang)
    calls = [
        asyncio.create_task(gallery.list_templates("g", "a"))
        for _ in range(limits.MAX_GALLERY_CALLS)
    ]
    assert await asyncio.to_thread(entered.wait, 10)
    with pytest.raises(FacelaneError) as caught:
        await gallery.list_templates("g", "a")
    assert (caught.value.reason, caught.value.retryable) == (Reason.GALLERY_UNAVAILABLE, True)
    # Giving up does not make room: the thread still has those calls before it.
    for call in calls[1:]:
        call.cancel()
    with pytest.raises(FacelaneError):
        await gallery.list_templates("g", "a")
    release.set()
    assert await calls[0]
    # Calls nobody waits for are not carried out, and the room is there again.
    assert await gallery.counts() == (0, 0)
    await asyncio.gather(*calls, return_exceptions=True)


async def test_a_slow_store_has_a_deadline(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(gallery._store, "list_templates", lambda *_, **_k: release.wait(20))
    monkeypatch.setattr("facelane_server.gallery.gallery.CALL_TIMEOUT_S", 0.05)
    with pytest.raises(FacelaneError) as caught:
        await gallery.list_templates("g", "a")
    assert (caught.value.reason, caught.value.retryable) == (Reason.GALLERY_UNAVAILABLE, True)
    release.set()


async def test_calls_after_close_are_refused(gallery: Gallery) -> None:
    await gallery.close()
    await gallery.close()
    with pytest.raises(FacelaneError) as caught:
        await gallery.counts()
    assert caught.value.reason is Reason.GALLERY_UNAVAILABLE


async def test_concurrent_repetitions_make_one_template(gallery: Gallery) -> None:
    key = RequestKey("r", b"x")
    made = await asyncio.gather(
        *(
            gallery.enroll(
                "g", "a", vector=vector(n), ood_score=0.9, create_subject=True, request=key
            )
            for n in range(8)
        )
    )
    assert len({enrolled.template.template_id for enrolled in made}) == 1
    assert [enrolled.created for enrolled in made].count(True) == 1
    assert gallery.templates == 1
