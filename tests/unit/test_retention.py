"""How long people are kept: what the rules say, and that it is done."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from facelane_server import cli, config, exporting
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
    TrackReport,
)
from facelane_server.gallery.gallery import Gallery
from facelane_server.gallery.retention import Retention
from facelane_server.gallery_rules import (
    DAY_NS,
    Expiry,
    GalleryRules,
    SteadyClock,
    Why,
    consent_until_ns,
    why_not_kept,
)
from facelane_server.store import audit
from facelane_server.store import events as stored
from facelane_server.store.events import EventRecord
from facelane_server.store.held import HOUR_NS, held
from facelane_server.store.masterkey import Source
from facelane_server.store.pictures import Photo, Pictures
from facelane_server.store.records import Correction, NewTemplate
from facelane_server.store.vault import open_vault

DIM = 64
NOW = 1_800_000_000 * 1_000_000_000


def days(count: float) -> int:
    return int(count * DAY_NS)


def judged(
    rules: GalleryRules, *, made: float = 0.0, seen: float | None = None, **labels: str
) -> Why | None:
    """``made``, ``seen``: days ago."""
    seen_ns = 0 if seen is None else NOW - days(seen)
    return why_not_kept(rules, made_ns=NOW - days(made), seen_ns=seen_ns, labels=labels, now_ns=NOW)


def test_what_each_rule_ends() -> None:
    assert judged(GalleryRules(), made=36_000) is None
    assert judged(GalleryRules(delete_after_days=30), made=29.9, seen=0) is None
    assert judged(GalleryRules(delete_after_days=30), made=30, seen=0) is Why.DELETE_AFTER
    unseen = GalleryRules(unseen_days=90)
    assert judged(unseen, made=89) is None
    assert judged(unseen, made=400, seen=89) is None
    assert judged(unseen, made=400) is Why.UNSEEN
    assert judged(unseen, made=400, seen=91) is Why.UNSEEN
    consent = GalleryRules(consent_label="until")
    # 2027-01-15T08:00:00Z is now.
    assert judged(consent, until="2027-01-15") is None, "to the end of the day"
    assert judged(consent, until=" 2027-01-14 ") is Why.CONSENT_ENDED
    for said in ("", "never", "14.01.2020", "2020-13-01", "0000-00-00", "9999-12-31"):
        assert judged(consent, until=said) is None
    assert judged(consent, made=36_000) is None


@given(st.text())
def test_a_label_that_names_no_day_deletes_nobody(text: str) -> None:
    found = consent_until_ns(text)
    assert found is None or found > -math.inf


def test_a_clock_that_leaps_is_not_believed_at_once() -> None:
    clock = SteadyClock(settle_s=100.0, tolerance_s=60.0)
    passed = [clock.look(1_000_000.0 + t, t) for t in range(0, 130, 10)]
    assert passed == [False] * 10 + [True] * 3
    # Ahead by a year for ten seconds: nobody was deleted meanwhile.
    assert not clock.look(40_000_000.0, 130)
    assert clock.leapt
    assert not clock.look(1_000_140.0, 140)
    assert clock.leapt
    assert not clock.look(1_000_230.0, 230)
    assert not clock.leapt
    assert clock.look(1_000_240.0, 240)
    # A day back.
    assert not clock.look(1_000_250.0 - 86_400, 250)
    # A clock that drifts, or is slewed, is believed.
    slow = SteadyClock(settle_s=100.0, tolerance_s=60.0)
    assert [slow.look(t * 1.01, t) for t in range(0, 100_000, 10)][11:] == [True] * 9_989


@contextlib.asynccontextmanager
async def opened(place: Path | str, folder: Path, now: list[int]) -> AsyncIterator[Gallery]:
    gallery = await Gallery.open(
        place,
        clock_ns=lambda: now[0],
        unlock=lambda database: open_vault(database, Source("", folder), mode="on"),
    )
    try:
        yield gallery
    finally:
        await gallery.close()


def retention(gallery: Gallery, now: list[int], **rules: GalleryRules) -> Retention:
    return Retention(gallery, rules, wall_ns=lambda: now[0])


async def names(gallery: Gallery, gallery_id: str) -> list[str]:
    return [s.subject_id for s in (await gallery.list_subjects(gallery_id))[0]]


async def test_who_is_due_is_deleted_and_the_log_says_why(
    place: Path | str, tmp_path: Path
) -> None:
    now = [NOW]
    async with opened(place, tmp_path, now) as gallery:
        for gallery_id in ("visitors", "staff"):
            for name in ("ada", "bo", "cy"):
                labels = {"until": "2027-02-01"} if name == "cy" else {}
                await gallery.create_subject(gallery_id, name, "", labels)
        keeper = retention(
            gallery, now, visitors=GalleryRules(unseen_days=30, consent_label="until")
        )
        assert await keeper.round() == 0
        now[0] = NOW + days(20)
        keeper.seen("visitors", "ada")
        keeper.seen("staff", "ada")
        assert await keeper.round() == 1, "consent has ended"
        assert await names(gallery, "visitors") == ["ada", "bo"]
        now[0] = NOW + days(31)
        assert await keeper.round() == 1
        assert await names(gallery, "visitors") == ["ada"], "she was seen"
        now[0] = NOW + days(49)
        keeper.seen("visitors", "ada")
        now[0] = NOW + days(51)
        assert await keeper.round() == 0
        now[0] = NOW + days(80)
        assert await keeper.round() == 1
        assert await names(gallery, "visitors") == []
        assert await names(gallery, "staff") == ["ada", "bo", "cy"], "it has no rules"
        entries = await gallery.ask(_entries)
        told = [(e["why"], e["method"]) for e in entries if e["action"] == "SUBJECT_DELETED"]
        assert [why for why, _ in told] == ["CONSENT_ENDED", "UNSEEN", "UNSEEN"]


def _entries(store: object) -> list[dict[str, object]]:
    from facelane_server.store.gallery import Store

    assert isinstance(store, Store)
    with store.database.reading() as connection:
        return [{"why": "", "method": "", **audit.shown(one)} for one in audit.links(connection)]


async def test_when_somebody_was_seen_is_kept_to_the_hour(tmp_path: Path) -> None:
    now = [NOW + 1234]
    async with opened(tmp_path / "g.db", tmp_path, now) as gallery:
        await gallery.create_subject("visitors", "ada", "", {})
        keeper = retention(gallery, now, visitors=GalleryRules(unseen_days=1))
        keeper.seen("visitors", "ada")
        keeper.seen("visitors", "who is gone")
        await keeper.flush()
        [one] = await gallery.ask(lambda s: held(s, gallery_id="visitors", after=0, count=9))
        assert 0 <= now[0] - one.seen_ns < HOUR_NS
        assert one.seen_ns % HOUR_NS == 0
        now[0] -= 5 * HOUR_NS  # the clock steps back
        keeper.seen("visitors", "ada")
        await keeper.flush()
        [same] = await gallery.ask(lambda s: held(s, gallery_id="visitors", after=0, count=9))
        assert same == one


async def test_a_clock_that_has_lost_the_time_lets_nobody_go_once_it_is_right(
    tmp_path: Path,
) -> None:
    """A machine without a battery begins in the past, and is offline for longer than a clock is
    doubted: times of before are no wrong ones."""
    now = [NOW]
    async with opened(tmp_path / "g.db", tmp_path, now) as gallery:
        await gallery.create_subject("visitors", "ada", "", {})
        keeper = retention(gallery, now, visitors=GalleryRules(delete_after_days=30))
        now[0] = NOW + days(3)
        await gallery.create_subject("visitors", "bo", "", {})
        now[0] = NOW - days(2000)
        await gallery.create_subject("visitors", "made-in-the-past", "", {})
        now[0] += days(0.1)
        assert await keeper.round() == 0
        now[0] = NOW + days(4)
        assert await keeper.round() == 1, "of those, whose time was wrong"
        assert await names(gallery, "visitors") == ["ada", "bo"]
        now[0] = NOW + days(31)
        assert await keeper.round() == 1
        # A clock that was ahead for two days, and is right for longer.
        now[0] = NOW + days(9000)
        await gallery.create_subject("visitors", "cy", "", {})
        now[0] += days(2)
        await gallery.create_subject("visitors", "di", "", {})
        now[0] = NOW + days(31)
        await gallery.create_subject("visitors", "eve", "", {})
        assert await keeper.round() == 0
        now[0] = NOW + days(34)
        assert await keeper.round() == 1, "bo"
        now[0] = NOW + days(65)
        assert await keeper.round() == 3
        assert await names(gallery, "visitors") == []


def test_what_is_too_old_waits_while_the_clock_cannot_be_believed() -> None:
    wall, steady = [1_000_000.0], [0.0]
    expiry = Expiry(100 * 10**9, wall_ns=lambda: int(wall[0] * 1e9), monotonic=lambda: steady[0])

    def after(seconds: float, leap: float = 0.0) -> float:
        steady[0] += seconds
        wall[0] += seconds + leap
        before = expiry.before_ns()
        return before / 1e9 - (wall[0] - 100.0) if before else math.inf

    assert after(0) == pytest.approx(0.0, abs=1e-3)
    assert after(30) == pytest.approx(0.0, abs=1e-3)
    assert after(30, leap=400 * 86_400) == math.inf
    assert after(300) == math.inf
    assert after(30, leap=-400 * 86_400) == math.inf
    assert after(599) == math.inf
    assert after(2) == pytest.approx(0.0, abs=1e-3)


async def test_times_of_a_clock_that_was_ahead_keep_nobody_for_ever(tmp_path: Path) -> None:
    now = [NOW + days(20_000)]
    async with opened(tmp_path / "g.db", tmp_path, now) as gallery:
        await gallery.create_subject("visitors", "ada", "", {})
        keeper = retention(gallery, now, visitors=GalleryRules(delete_after_days=30))
        now[0] = NOW
        assert await keeper.round() == 0
        now[0] = NOW + days(31)
        assert await keeper.round() == 1


async def test_whoever_is_changed_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [NOW]
    async with opened(tmp_path / "g.db", tmp_path, now) as gallery:
        await gallery.create_subject("visitors", "ada", "", {"until": "2020-01-01"})
        keeper = retention(gallery, now, visitors=GalleryRules(consent_label="until"))
        delete = gallery.delete_subject

        async def later(gallery_id: str, subject_id: str, **more: str) -> object:
            await gallery.update_subject(gallery_id, subject_id, labels={"until": "2030-01-01"})
            return await delete(gallery_id, subject_id, **more)

        monkeypatch.setattr(gallery, "delete_subject", later)
        assert await keeper.round() == 0
        assert await names(gallery, "visitors") == ["ada"]


async def test_it_runs_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.waiting import auntil

    from facelane_server.gallery import retention as module

    monkeypatch.setattr(module, "LOOK_S", 0.01)
    now = [NOW]
    async with opened(tmp_path / "g.db", tmp_path, now) as gallery:
        await gallery.create_subject("visitors", "ada", "", {"until": "2020-01-01"})
        rules = {"visitors": GalleryRules(consent_label="until")}
        keeper = Retention(gallery, rules, settle_s=0.05, wall_ns=lambda: now[0])
        running = asyncio.create_task(keeper.run())
        try:
            await auntil(lambda: gallery.version >= 0 and not _left(gallery), what="her to be gone")
        finally:
            running.cancel()
        await Retention(gallery, {"staff": GalleryRules()}).run()  # nothing to do: it ends


def _left(gallery: Gallery) -> int:
    return gallery._store.counts()[0]


def test_what_the_configuration_takes() -> None:
    found = config.parse("[galleries.visitors]\ndelete_after_days = 30\nconsent_label = 'until'\n")
    assert found.galleries["visitors"] == GalleryRules(delete_after_days=30, consent_label="until")
    for text, says in (
        ("[galleries.visitors]\nforget = 1\n", "forget"),
        ("[galleries.visitors]\nunseen_days = 0\n", "galleries"),
        ("[galleries.'a b']\nunseen_days = 1\n", "the name must be"),
        ("[galleries.a]\nconfirm = 3\n", "galleries"),
        ("[galleries.a]\nconfirm = 2\n", "wants keys"),
    ):
        with pytest.raises(ConfigError, match=says):
            config.parse(text)


async def test_a_list_goes_on_with_those_who_lost_a_template(tmp_path: Path) -> None:
    async with opened(tmp_path / "gallery.db", tmp_path, [NOW]) as gallery:
        for name in ("ada", "bo"):
            await gallery.create_subject("staff", name, "", {})
        vector = np.ones(DIM, np.float32) / DIM**0.5
        new = NewTemplate("m@1", vector, 0.9)
        kept = await gallery.ask(lambda store: store.enroll("staff", "ada", new))
        listed, _ = await gallery.list_subjects("staff")
        assert [one.subject_id for one in listed] == ["ada", "bo"]
        await gallery.delete_template("staff", kept.template.template_id)
        await gallery.delete_subject("staff", "bo")
        listed, _ = await gallery.list_subjects("staff")
        assert [one.subject_id for one in listed] == ["ada"]
        assert [name for name, _ in gallery._store.listed._sorted["staff"]] == ["ada"]


# -- access ------------------------------------------------------------------------------------


def report(subject_id: str, *others: str, picture: str = "") -> TrackReport:
    near = tuple(Candidate(name, 0.5) for name in (subject_id, *others))
    identity = Identity(Decision.MATCH, subject_id, 0.8, candidates=near)
    return TrackReport(
        1,
        first_ns=0,
        last_ns=1,
        first_capture_ns=None,
        last_capture_ns=None,
        box=Box(0, 0, 1, 1),
        identity=identity,
        liveness=Liveness(LivenessVerdict.LIVE, 0.9),
        picture=picture,
    )


async def test_somebody_gets_all_that_is_held_of_them(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text(f'state_dir = "{tmp_path}/state"\n')
    now = [NOW]
    vector = np.random.default_rng(1).standard_normal(DIM).astype(np.float32)
    chip = np.random.default_rng(2).integers(0, 256, (8, 8, 3), np.uint8)
    async with opened(tmp_path / "state" / "gallery.db", tmp_path / "state", now) as gallery:

        def fill(store: object) -> None:
            from facelane_server.store.gallery import Store

            assert isinstance(store, Store)
            new = NewTemplate("m@1", vector, 0.8, 0.5, chip.tobytes())
            store.enroll("staff", "ada", new, create_subject=True, display_name="Ada Lovelace")
            not_her = NewTemplate("m@1", -vector, 0.8, 0.5, correction=Correction.NOT)
            store.enroll("staff", "ada", not_her)
            store.create_subject("staff", "bo", "", {})
            pictures = Pictures(store.database, store.vault)
            for name, who in zip("abc", ("ada", "ada", "bo"), strict=True):
                photo = Photo(b"JPEG " + name.encode(), b"chip" if name == "a" else b"")
                assert pictures.add(name * 32, photo, NOW, gallery_id="staff", subject_id=who)
            mine = report("ada", picture="a" * 32)
            records = [
                EventRecord(0, "SUBJECT_SEEN", NOW, "door", "s", "staff", mine),
                EventRecord(0, "SUBJECT_SEEN", NOW + 1, "door", "s", "staff", report("bo", "ada")),
                EventRecord(0, "SUBJECT_SEEN", NOW + 2, "door", "s", "staff", report("bo")),
                EventRecord(0, "STREAM_CLOSED", NOW + 3, "door", "s"),
            ]
            stored.append(store.database, store.vault, records, again=False)

        await gallery.ask(fill)
        # Beside a server that runs.
        command = [
            "subjects",
            "export",
            "ada",
            "--gallery",
            "staff",
            "--out",
            str(tmp_path / "out"),
        ]
        done = CliRunner().invoke(
            cli.whole(), [*command, "--config", str(tmp_path / "server.toml")]
        )
        assert done.exit_code == 0, done.output
        entries = await gallery.ask(_entries)
        assert entries[-1]["action"] == "EXPORTED"
    said = json.loads((tmp_path / "out" / "subject.json").read_text())
    assert (said["subject_id"], said["display_name"]) == ("ada", "Ada Lovelace")
    [template] = said["templates"]
    assert len(template["vector"]["data"]) > 100
    assert [(e["kind"], e["named"]) for e in said["events"]] == [
        ("SUBJECT_SEEN", True), ("SUBJECT_SEEN", False),
    ]  # fmt: skip
    assert [e["action"] for e in said["audit"]] == ["ENROLLED", "CORRECTED", "EXPORTED"]
    # What she is not, and the pictures of her; of nobody else.
    assert template["correction"] is None
    [not_her] = said["corrections"]
    assert not_her["correction"] == "NOT"
    assert len(not_her["vector"]["data"]) > 100
    of_her = [f"event-{'a' * 32}-face.jpg", f"event-{'a' * 32}.jpg"]
    assert [event["pictures"] for event in said["events"]] == [of_her, []]
    assert [one["files"] for one in said["event_pictures"]] == [
        of_her, [f"event-{'b' * 32}.jpg"],
    ]  # fmt: skip
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("event-*")}
    assert found == {
        f"event-{'a' * 32}.jpg": b"JPEG a",
        f"event-{'a' * 32}-face.jpg": b"chip",
        f"event-{'b' * 32}.jpg": b"JPEG b",
    }
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    import cv2

    picture = cv2.imread(str(tmp_path / "out" / template["picture"]))
    assert picture is not None
    assert (picture == chip).all()
    again = CliRunner().invoke(cli.app, [*command, "--config", str(tmp_path / "server.toml")])
    assert again.exit_code == exporting.EX_CONFIG, "the folder is there"
    command[2] = "nobody"
    missing = CliRunner().invoke(cli.app, [*command, "--config", str(tmp_path / "server.toml")])
    assert missing.exit_code == exporting.EX_NOT_FOUND
    assert "nobody" not in missing.stderr


async def test_an_export_that_cannot_be_written_down_is_not_made(tmp_path: Path) -> None:
    from facelane_server.store.export import export

    now = [NOW]
    async with opened(tmp_path / "g.db", tmp_path, now) as gallery:
        await gallery.create_subject("staff", "ada", "", {})

        def try_it(store: object) -> None:
            from facelane_server.store.gallery import Store

            assert isinstance(store, Store)
            with store.database.writing() as connection:
                connection.exec_driver_sql(
                    "CREATE TRIGGER full BEFORE INSERT ON audit "
                    "BEGIN SELECT RAISE(ABORT, 'no'); END"
                )
            export(store, "staff", "ada")

        with pytest.raises(FacelaneError) as refused:
            await gallery.ask(try_it)
        assert refused.value.reason is Reason.GALLERY_UNAVAILABLE
