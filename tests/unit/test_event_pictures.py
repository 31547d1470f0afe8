"""Pictures of events: which shot, of whom, sealed by whose key, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from tests.unit.test_store_vault import MODEL, opened, vector
from tests.waiting import auntil

from facelane_server import config, limits
from facelane_server.config import ConfigError
from facelane_server.domain import (
    Box,
    Decision,
    FacelaneError,
    Identity,
    Keeping,
    Liveness,
    LivenessVerdict,
    Portrait,
    Reason,
    Stage,
    TrackReport,
)
from facelane_server.events import EventKind
from facelane_server.events.pictures import BestShots, EventPictures, wanted
from facelane_server.ipc.channel import ProtocolError
from facelane_server.ipc.messages import EncodeDone
from facelane_server.pools.slots import Codec
from facelane_server.pools.tasks import EncodeAnswer, EncodeRequest
from facelane_server.sources import Source, keeping
from facelane_server.standing import cancelled
from facelane_server.store import audit
from facelane_server.store import pictures as stored
from facelane_server.store.gallery import Store
from facelane_server.store.pictures import Photo, Pictures, new_id
from facelane_server.store.records import Correction, NewTemplate
from facelane_server.store.schema import GALLERY, keys, pictures, templates

JPEG = b"\xff\xd8\xff\xe0 a face"
PHOTO = Photo(JPEG, JPEG + b" as a chip")
ADA = Identity(Decision.MATCH, "ada", 0.7)
UNKNOWN = Identity(Decision.UNKNOWN)


def portrait(promise: float) -> Portrait:
    return Portrait(b"chip", b"around", promise)


def report(identity: Identity = ADA, track_id: int = 7) -> TrackReport:
    live = Liveness(LivenessVerdict.LIVE)
    return TrackReport(track_id, 0, 1, None, None, Box(0, 0, 1, 1), identity, live)


# -- pure ------------------------------------------------------------------------------------


def test_the_clearest_shot_of_a_track_is_kept_and_others_make_room() -> None:
    shots = BestShots(most=2)
    for promise in (0.4, 0.9, 0.6):
        shots.note(1, 7, portrait(promise))
    assert shots.best(1, 7) == portrait(0.9)
    shots.note(1, 8, portrait(0.1))
    shots.note(2, 7, portrait(0.2))
    assert shots.best(1, 7) is None, "touched longest ago"
    assert len(shots) == 2
    shots.forget(1)
    assert len(shots) == 1
    shots.forget(2, 7)
    assert len(shots) == 0


@pytest.mark.parametrize(
    ("kind", "identity", "kept"),
    [
        (EventKind.SUBJECT_SEEN, ADA, {Keeping.ALL}),
        (EventKind.SPOOF_SUSPECTED, ADA, {Keeping.ALL}),
        (EventKind.UNKNOWN_SEEN, UNKNOWN, {Keeping.ALL, Keeping.UNKNOWN}),
        (EventKind.SPOOF_SUSPECTED, UNKNOWN, {Keeping.ALL, Keeping.UNKNOWN}),
        (EventKind.TRACK_STARTED, UNKNOWN, set()),
    ],
)
def test_which_events_have_a_picture(
    kind: EventKind, identity: Identity, kept: set[Keeping]
) -> None:
    assert {how for how in Keeping if wanted(kind, identity, how)} == kept


def test_a_source_says_more_than_its_gallery_and_private_most() -> None:
    sources = {
        "door-1": Source(pictures=Keeping.NONE),
        "door-*": Source(pictures=Keeping.ALL),
        "ward-*": Source(private=True, pictures=Keeping.ALL),
    }
    assert keeping(Keeping.NONE, None, sources, "hall") is Keeping.NONE
    assert keeping(Keeping.NONE, Keeping.UNKNOWN, sources, "hall") is Keeping.UNKNOWN
    assert keeping(Keeping.ALL, None, sources, "door-1") is Keeping.NONE
    assert keeping(Keeping.NONE, Keeping.UNKNOWN, sources, "door-2") is Keeping.ALL
    assert keeping(Keeping.ALL, None, sources, "ward-3") is Keeping.NONE


def test_off_unless_somebody_says_so() -> None:
    assert not config.Config().keeps_pictures
    for text in (
        '[events]\npictures = "all"',
        '[galleries.staff]\npictures = "unknown"',
        '[sources."door-*"]\npictures = "all"',
    ):
        assert config.parse(text).keeps_pictures
    with pytest.raises(ConfigError, match=r"events\.pictures"):
        config.parse('[events]\npictures = "some"')


def test_jpegs_of_a_worker_are_looked_at() -> None:
    codec = Codec(Stage.DETECTOR, [112])
    request = EncodeRequest((bytes(12), bytes(27)), (2, 3))
    slot = bytearray(1024)
    items, end = codec.write([request], memoryview(slot))
    assert (items[0].sides, end >= 39) == ((2, 3), True)  # type: ignore[union-attr]
    answer = bytearray(JPEG * 2 + bytes(100))
    view, size = memoryview(answer), len(JPEG)
    read, _ = codec.read(request, EncodeDone(0, (size, size)), view)
    assert read == EncodeAnswer((JPEG, JPEG))
    for wrong in (
        EncodeDone(0, (size,)),
        EncodeDone(1, (size, size)),
        EncodeDone(0, (size, len(answer))),
    ):
        with pytest.raises(ProtocolError):
            codec.read(request, wrong, view)
    with pytest.raises(FacelaneError):
        Codec(Stage.RECOGNIZER, [112]).cost(request)


# -- at rest ---------------------------------------------------------------------------------


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


def enrolled(store: Store) -> Pictures:
    store.enroll("staff", "ada", NewTemplate(MODEL, vector(1), 0.9), create_subject=True)
    return Pictures(store.database, store.vault)


def count(store: Store, table: sa.Table) -> int:
    with store.database.reading() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def test_a_picture_is_sealed_and_gone_with_whom_it_shows(place: Path | str, tmp_path: Path) -> None:
    with opened(place, tmp_path) as store:
        kept = enrolled(store)
        mine, other = new_id(), new_id()
        not_her = NewTemplate(MODEL, vector(2), 0.9, correction=Correction.NOT)
        store.enroll("staff", "ada", not_her)
        assert kept.add(mine, PHOTO, 1, gallery_id="staff", subject_id="ada")
        assert kept.add(other, PHOTO, 2, gallery_id="staff", subject_id="")
        assert kept.get(mine) == kept.get(other) == PHOTO
        assert not kept.add(new_id(), PHOTO, 3, gallery_id="staff", subject_id="nobody")
        if isinstance(place, Path):
            assert JPEG not in everything(place.parent)
        gone = store.delete_subject("staff", "ada")
        assert kept.get(mine) is None
        assert kept.get(other) == PHOTO
        assert count(store, templates) == 0, "what she is not goes too"
        assert count(store, pictures) == 1
        with store.database.reading() as connection:
            assert not audit.has_rows(connection, gone.number)
        # The keys of the erased are opened by none that is left; that of the other goes on.
        assert sum(1 for _ in store.erasing()) >= 0
        assert kept.get(other) == PHOTO
    with opened(place, tmp_path) as store:
        assert Pictures(store.database, store.vault).get(other) == PHOTO


def test_retention_by_age_and_number(tmp_path: Path) -> None:
    with opened(tmp_path / "gallery.db", tmp_path) as store:
        kept = enrolled(store)
        before = count(store, keys)
        ids = [new_id() for _ in range(6)]
        for at, picture_id in enumerate(ids):
            who = "ada" if at % 2 else ""
            assert kept.add(picture_id, PHOTO, at, gallery_id="staff", subject_id=who)
        assert count(store, keys) == before + 3, "one for each that shows nobody known"
        assert kept.prune(keep=100, before_ns=0) == 0
        assert kept.prune(keep=100, before_ns=2) == 2
        assert kept.prune(keep=3, before_ns=0) == 1
        assert [kept.get(one) is None for one in ids] == [True] * 3 + [False] * 3
        assert count(store, pictures) == 3
        assert count(store, keys) == before + 1
        assert kept.prune(keep=1, before_ns=100) == 3
        assert count(store, keys) == before
        with store.database.writing(GALLERY) as connection:
            assert store.vault.is_erasure_due(connection)


def test_keys_that_retention_deletes_within_an_hour_of_others_are_erased_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no further picture comes of age."""
    now_s = [1e6]
    monkeypatch.setattr(stored.time, "monotonic", lambda: now_s[0])

    def is_due() -> bool:
        with store.database.reading() as connection:
            return store.vault.is_erasure_due(connection)

    with opened(tmp_path / "gallery.db", tmp_path) as store:
        kept = enrolled(store)
        for at in range(4):
            kept.add(new_id(), PHOTO, at, gallery_id="staff", subject_id="")
        for before_ns, due in ((2, True), (4, False)):
            assert kept.prune(keep=100, before_ns=before_ns) == 2
            assert is_due() is due
            list(store.erasing())
            now_s[0] += 30
        assert kept.prune(keep=100, before_ns=4) == 0
        assert not is_due(), "not each of them by itself"
        now_s[0] += stored.ERASE_EVERY_S
        assert kept.prune(keep=100, before_ns=4) == 0
        assert is_due()
        list(store.erasing())
        assert kept.prune(keep=100, before_ns=4) == 0
        assert not is_due(), "once"


def test_a_picture_becomes_a_subjects(tmp_path: Path) -> None:
    with opened(tmp_path / "gallery.db", tmp_path) as store:
        kept = enrolled(store)
        picture_id = new_id()
        kept.add(picture_id, PHOTO, 1, gallery_id="staff", subject_id="")
        before = count(store, keys)
        assert not kept.give(picture_id, "staff", "nobody")
        assert kept.give(picture_id, "staff", "ada")
        assert kept.get(picture_id) == PHOTO
        assert count(store, keys) == before - 1
        store.delete_subject("staff", "ada")
        assert kept.get(picture_id) is None
        assert not kept.give(picture_id, "staff", "ada")


def test_a_store_that_lies_open_keeps_none(tmp_path: Path) -> None:
    with contextlib.closing(Store(tmp_path / "gallery.db")) as store:
        kept = enrolled(store)
        assert not kept.are_kept
        assert not kept.add(new_id(), PHOTO, 1, gallery_id="staff", subject_id="ada")
        assert count(store, pictures) == 0


# -- on the way ------------------------------------------------------------------------------


async def test_of_shots_that_made_room_none_is_held(tmp_path: Path) -> None:
    async def encode(sources: tuple[bytes, ...]) -> tuple[bytes, ...]:
        return tuple(JPEG + source for source in sources)

    with opened(tmp_path / "gallery.db", tmp_path) as store:
        pictures_ = EventPictures(enrolled(store), encode, keep=10, keep_days=1.0)
        pictures_._shots = BestShots(most=1)
        task = asyncio.create_task(pictures_.run())
        shots = [Portrait(b"", b"%d" % track, 0.5) for track in range(3)]
        unheld = [sys.getrefcount(shots[track]) for track in range(3)]
        for track in range(3):
            pictures_.note(1, track, shots[track])
            taken = pictures_.take(
                1, EventKind.SUBJECT_SEEN, report(ADA, track), gallery_id="staff",
                keeping=Keeping.ALL,
            )  # fmt: skip
            await pictures_.get(taken)
        held = [sys.getrefcount(shots[track]) - unheld[track] for track in range(3)]
        assert held == [0, 0, 1], "tracks that go on are many more than shots that are kept"
        await cancelled(task)
        pictures_.close()


async def test_from_a_look_to_the_store(tmp_path: Path) -> None:
    asked: list[tuple[bytes, ...]] = []
    may = asyncio.Event()

    async def encode(sources: tuple[bytes, ...]) -> tuple[bytes, ...]:
        asked.append(sources)
        await may.wait()
        if b"spoilt" in sources:
            raise FacelaneError(Reason.POOL_UNAVAILABLE, "no worker")
        return tuple(JPEG + source for source in sources)

    with opened(tmp_path / "gallery.db", tmp_path) as store:
        pictures_ = EventPictures(enrolled(store), encode, keep=10, keep_days=1.0)
        task = asyncio.create_task(pictures_.run())

        def take(track: int = 7, identity: Identity = ADA, how: Keeping = Keeping.ALL) -> str:
            return pictures_.take(
                1, EventKind.SUBJECT_SEEN, report(identity, track), gallery_id="staff", keeping=how
            )

        assert take() == "", "nothing has looked at it"
        pictures_.note(1, 7, portrait(0.5))
        assert take(how=Keeping.NONE) == ""
        picture_id = take()
        assert picture_id
        assert take() == picture_id, "the same shot says it again"
        pictures_.note(1, 7, Portrait(b"", b"better", 0.9))
        better = take()
        assert better not in ("", picture_id)
        pictures_.note(1, 8, Portrait(b"", b"spoilt", 0.9))
        spoilt = take(8)
        waiting = asyncio.create_task(pictures_.get(picture_id))
        await auntil(lambda: asked)
        assert not waiting.done(), "it is on its way"
        may.set()
        assert await waiting == Photo(JPEG + b"around", JPEG + b"chip")
        assert await pictures_.get(better) == Photo(JPEG + b"better", b"")
        for missing in (spoilt, "f" * 32):
            with pytest.raises(FacelaneError) as error:
                await pictures_.get(missing)
            assert error.value.reason is Reason.PICTURE_NOT_FOUND
        assert pictures_.dropped == 1
        pictures_.forget(1)
        assert take() == ""
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        pictures_.close()


async def test_no_more_wait_than_there_is_room_for(tmp_path: Path) -> None:
    async def encode(sources: tuple[bytes, ...]) -> tuple[bytes, ...]:
        raise AssertionError("nothing runs")

    with opened(tmp_path / "gallery.db", tmp_path) as store:
        pictures_ = EventPictures(enrolled(store), encode, keep=10, keep_days=1.0)
        taken = []
        for track in range(limits.MAX_PICTURES_WAITING + 2):
            pictures_.note(1, track, portrait(0.5))
            taken.append(
                pictures_.take(
                    1,
                    EventKind.SUBJECT_SEEN,
                    report(track_id=track),
                    gallery_id="staff",
                    keeping=Keeping.ALL,
                )
            )
        assert all(taken[:-2])
        assert taken[-2:] == ["", ""]
        assert pictures_.dropped == 2
        pictures_.close()


def test_a_detectors_worker_encodes() -> None:
    """The real work on real slots; what is mapped goes with the arrays on it."""
    import cv2

    from facelane_server.ipc.arena import Arena
    from facelane_server.ipc.messages import EncodeItem, Infer, Load
    from facelane_server.worker.networks.null import NullDetector
    from facelane_server.worker.work import DetectWork

    load = Load("d#0", "detector", "", "cpu", 4, 1, 1 << 20, 1 << 20)
    request, response = Arena.create("in", 1, 1 << 20), Arena.create("out", 1, 1 << 20)
    work = DetectWork(NullDetector(), load, request, response)
    around = np.full((224, 224, 3), 90, np.uint8)
    around[60:160, 60:160] = (20, 200, 250)
    chip = np.full((112, 112, 3), 30, np.uint8)
    data = around.tobytes() + chip.tobytes()
    request.slot(0)[: len(data)] = data
    finish, _ = work.begin(Infer(1, 0, [EncodeItem(0, (224, 112))]))
    [done] = finish()
    assert isinstance(done, EncodeDone)
    first, second = done.lengths
    jpegs = bytes(response.slot(0)[done.offset : done.offset + first + second])
    shown = cv2.imdecode(np.frombuffer(jpegs[:first], np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape == (224, 224, 3)
    assert np.abs(shown.astype(int) - around).mean() < 4
    assert cv2.imdecode(np.frombuffer(jpegs[first:], np.uint8), 1).shape == (112, 112, 3)
