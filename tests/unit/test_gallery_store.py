"""The gallery at rest: transactions, idempotency, bounds, damage, and forgetting."""

from __future__ import annotations

import fcntl
import itertools
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.store import remembered, schema, sqlite
from facelane_server.store.database import patiently, unavailable
from facelane_server.store.gallery import Store
from facelane_server.store.masterkey import Source
from facelane_server.store.opening import open_store
from facelane_server.store.records import NewTemplate, RequestKey, unit_float16
from facelane_server.store.vault import Mode, open_vault

DIM = 64
MODEL = "m@1#aa"


class Clock:
    """Nanoseconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_000_000_000

    def __call__(self) -> int:
        self.now += 1
        return self.now


def vector(seed: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    values = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return values / np.linalg.norm(values)


def new(seed: int, model: str = MODEL) -> NewTemplate:
    return NewTemplate(model, vector(seed), 0.8)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "gallery.db"


STORES = {
    "sqlite": ("sqlite", "plain"),
    "sqlite-sealed": ("sqlite", "sealed"),
    "postgresql": ("postgresql", "plain"),
    "postgresql-sealed": ("postgresql", "sealed"),
}
"""Each engine, as it is and encrypted."""


def on(*names: str) -> list[Any]:
    """The last beside the slow tests: engine and encryption do not know of each other."""
    return [
        pytest.param(
            STORES[name], id=name, marks=[pytest.mark.slow] * (name == "postgresql-sealed")
        )
        for name in names
    ]


@pytest.fixture(params=on(*STORES))
def store(
    request: pytest.FixtureRequest, path: Path, tmp_path: Path, clock: Clock
) -> Iterator[Store]:
    engine, kept = request.param
    place = path if engine == "sqlite" else request.getfixturevalue("postgres").url()
    database = open_store(place)
    mode: Mode = "on" if kept == "sealed" else "off"
    vault = open_vault(database, Source("", tmp_path), mode=mode)
    opened = Store(database, vault=vault, max_templates=100, clock_ns=clock)
    yield opened
    opened.close()


in_a_file = pytest.mark.parametrize("store", on("sqlite", "sqlite-sealed"), indirect=True)
"""What a file alone has, at ``path``."""
in_an_open_file = pytest.mark.parametrize("store", on("sqlite"), indirect=True)
"""What a store that is encrypted does not show, or does not open without its keys."""


def test_what_no_store_can_hold_is_the_callers_fault_and_no_trouble_of_the_store(
    store: Store,
) -> None:
    with pytest.raises(FacelaneError) as refused:
        store.delete_template("staff", "a\0b")
    assert refused.value.reason in (Reason.TEMPLATE_NOT_FOUND, Reason.ARGUMENT_INVALID)
    assert store.database.trouble() == ""


def reason_of(call: object, *args: object, **kwargs: object) -> FacelaneError:
    with pytest.raises(FacelaneError) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    return caught.value


# -- subjects ---------------------------------------------------------------------------------


def test_a_subject_is_kept_over_a_restart(path: Path, clock: Clock) -> None:
    first = Store(path, clock_ns=clock)
    made = first.create_subject("", "ada", "Ada L.", {"team": "engine"})
    first.enroll("default", "ada", new(1))
    first.close()
    second = Store(path, clock_ns=clock)
    found = second.get_subject("default", "ada")
    assert (found.gallery_id, found.display_name, found.labels) == (
        "default",
        "Ada L.",
        {"team": "engine"},
    )
    assert found.created_ns == made.created_ns
    assert found.template_count == 1
    [kept] = list(second.vectors(MODEL, DIM))
    assert np.allclose(kept.vector.astype(np.float32), vector(1), atol=1e-3)
    second.close()


def test_subject_errors(store: Store) -> None:
    store.create_subject("g", "a", "", {})
    assert reason_of(store.create_subject, "g", "a", "", {}).reason is Reason.SUBJECT_EXISTS
    assert reason_of(store.get_subject, "g", "b").reason is Reason.SUBJECT_NOT_FOUND
    assert reason_of(store.delete_subject, "g", "b").reason is Reason.SUBJECT_NOT_FOUND
    assert reason_of(store.list_templates, "g", "b").reason is Reason.SUBJECT_NOT_FOUND
    assert reason_of(store.update_subject, "g", "b").reason is Reason.SUBJECT_NOT_FOUND
    # The same id in another gallery is somebody else.
    store.create_subject("h", "a", "", {})


@pytest.mark.parametrize(
    ("gallery", "subject", "name", "labels"),
    [
        ("g", "", "", {}),
        ("g", "with space", "", {}),
        ("g", "x" * 129, "", {}),
        ("g", "line\n", "", {}),
        ("g/h", "a", "", {}),
        ("g", "a", "n" * 257, {}),
        ("g", "a", "é" * 129, {}),
        ("g", "a", "", {"": "v"}),
        ("g", "a", "", {"k" * 65: "v"}),
        ("g", "a", "", {"k": "v" * 513}),
        ("g", "a", "", {str(n): "" for n in range(33)}),
    ],
)
def test_arguments_outside_of_the_limits(
    store: Store, gallery: str, subject: str, name: str, labels: dict[str, str]
) -> None:
    error = reason_of(store.create_subject, gallery, subject, name, labels)
    assert error.reason is Reason.ARGUMENT_INVALID
    assert error.metadata["field"] in ("gallery_id", "subject_id", "display_name", "labels")
    assert store.counts() == (0, 0)


def test_etag_guards_an_update(store: Store) -> None:
    made = store.create_subject("g", "a", "old", {"k": "v"})
    changed = store.update_subject("g", "a", display_name="new", etag=made.etag)
    assert (changed.display_name, changed.labels) == ("new", {"k": "v"})
    assert changed.etag != made.etag
    assert changed.updated_ns > made.updated_ns
    error = reason_of(store.update_subject, "g", "a", labels={}, etag=made.etag)
    assert error.reason is Reason.ETAG_MISMATCH
    assert store.get_subject("g", "a").labels == {"k": "v"}
    # Without an etag the last write wins; a template is a change too.
    assert store.update_subject("g", "a", labels={}).labels == {}
    before = store.get_subject("g", "a").etag
    store.enroll("g", "a", new(1))
    assert store.get_subject("g", "a").etag != before


def test_pages_hold_every_subject_once(store: Store) -> None:
    names = sorted(f"s{n:02d}" for n in range(25))
    for name in reversed(names):
        store.create_subject("g", name, "", {})
    store.create_subject("other", "zz", "", {})
    seen: list[str] = []
    token = ""
    while True:
        page, token = store.list_subjects("g", page_size=10, page_token=token)
        seen += [subject.subject_id for subject in page]
        if not token:
            break
    assert seen == names
    assert store.list_subjects("empty") == ((), "")
    for foreign in ("!!!", "AA", "/w"):
        error = reason_of(store.list_subjects, "g", page_token=foreign)
        assert error.reason is Reason.ARGUMENT_INVALID


# -- templates --------------------------------------------------------------------------------


def test_the_same_picture_twice_is_one_template(store: Store) -> None:
    store.create_subject("g", "a", "", {})
    first = store.enroll("g", "a", new(1))
    again = store.enroll("g", "a", NewTemplate(MODEL, vector(1) * 3 + 1e-4, 0.7))
    assert first.created
    assert not again.created
    assert again.template == first.template
    assert store.enroll("g", "a", new(2)).created
    # Another model's embedding says nothing about this one's.
    assert store.enroll("g", "a", new(1, "n@1#bb")).created
    assert store.get_subject("g", "a").template_count == 3
    assert len(list(store.vectors(MODEL, DIM))) == 2


def test_enrolment_creates_a_subject_only_when_asked(store: Store) -> None:
    assert reason_of(store.enroll, "g", "a", new(1)).reason is Reason.SUBJECT_NOT_FOUND
    made = store.enroll("g", "a", new(1), create_subject=True, display_name="A")
    assert made.subject.display_name == "A"
    assert made.subject.template_count == 1


def test_bounds_on_templates(tmp_path: Path, clock: Clock) -> None:
    store = Store(tmp_path / "g.db", max_templates=limits.MAX_TEMPLATES_PER_SUBJECT + 1)
    for seed in range(limits.MAX_TEMPLATES_PER_SUBJECT):
        store.enroll("g", "a", new(seed), create_subject=True)
    error = reason_of(store.enroll, "g", "a", new(1000))
    assert (error.reason, error.metadata["scope"]) == (Reason.GALLERY_FULL, "subject")
    store.enroll("g", "b", new(1000), create_subject=True)
    error = reason_of(store.enroll, "g", "c", new(1001), create_subject=True)
    assert (error.reason, error.metadata["scope"]) == (Reason.GALLERY_FULL, "server")
    # The refused enrolment left nothing behind, the subject included.
    assert reason_of(store.get_subject, "g", "c").reason is Reason.SUBJECT_NOT_FOUND
    store.close()


def test_deleting_templates(store: Store) -> None:
    made = store.enroll("g", "a", new(1), create_subject=True)
    assert store.list_templates("g", "a") == (made.template,)
    missing = reason_of(store.delete_template, "h", made.template.template_id)
    assert missing.reason is Reason.TEMPLATE_NOT_FOUND
    assert store.delete_template("g", made.template.template_id) == made.template
    assert store.list_templates("g", "a") == ()
    assert store.get_subject("g", "a").template_count == 0
    store.enroll("g", "a", new(2))
    store.enroll("g", "a", new(3))
    assert store.delete_subject("g", "a").templates == 2
    assert store.counts() == (0, 0)


def test_an_embedding_without_a_direction_is_refused(store: Store) -> None:
    for broken in (np.zeros(DIM, np.float32), np.full(DIM, np.nan, np.float32)):
        error = reason_of(
            store.enroll, "g", "a", NewTemplate(MODEL, broken, 0.9), create_subject=True
        )
        assert error.reason is Reason.INTERNAL
    assert store.counts() == (0, 0)


@in_an_open_file
def test_a_deleted_vector_is_in_none_of_the_files(store: Store, path: Path) -> None:
    kept = store.enroll("g", "a", new(1), create_subject=True)
    store.enroll("g", "b", new(2), create_subject=True)
    needle = unit_float16(vector(2)).tobytes()

    def on_disk(bytes_: bytes) -> bool:
        return any(bytes_ in file.read_bytes() for file in path.parent.iterdir())

    assert on_disk(needle), "the test looks in the wrong place"
    store.delete_subject("g", "b")
    assert not on_disk(needle)
    assert on_disk(unit_float16(vector(1)).tobytes())
    store.delete_template("g", kept.template.template_id)
    assert not on_disk(unit_float16(vector(1)).tobytes())


@in_an_open_file
def test_a_log_that_somebody_reads_is_emptied_as_soon_as_it_can_be(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup is being taken while somebody is deleted."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_MS", 50)
    store.enroll("g", "a", new(1), create_subject=True)
    needle = unit_float16(vector(1)).tobytes()
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM templates").fetchone() == (1,)
    with capture_logs() as logged:
        assert store.delete_subject("g", "a").templates == 1
        store.counts()
    assert [line["event"] for line in logged] == ["write-ahead log not emptied; trying again"]
    log = path.with_name(f"{path.name}-wal")
    assert needle in path.read_bytes() + log.read_bytes(), "the test looks in the wrong place"
    reader.execute("COMMIT")
    reader.close()
    store.counts()
    assert needle not in path.read_bytes() + log.read_bytes()


@in_a_file
def test_a_deletion_stands_whatever_becomes_of_the_log(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index must hear of it: it would go on naming who was deleted."""
    store.enroll("g", "a", new(1), create_subject=True)
    broken = sa.exc.OperationalError("", {}, sqlite3.OperationalError("unable to open"))

    connect, calls = store.database._engine.raw_connection, itertools.count()

    def refuse() -> sa.PoolProxiedConnection:
        if next(calls) > 0:  # the deletion itself has one
            raise broken
        return connect()

    monkeypatch.setattr(store.database._engine, "raw_connection", refuse)
    assert store.delete_subject("g", "a").templates == 1
    monkeypatch.undo()
    assert store.counts() == (0, 0)


# -- idempotency ------------------------------------------------------------------------------


def test_a_repeated_request_gives_the_first_answer(store: Store) -> None:
    key = RequestKey("r1", b"digest")
    first = store.enroll("g", "a", new(1), create_subject=True, request=key, answer={"score": 0.9})
    assert store.recall("g", key) == store.enroll("g", "a", new(2), request=key)
    known = store.recall("g", key)
    assert known is not None
    assert (known.template, known.created, known.answer) == (
        first.template,
        False,
        {"score": 0.9},
    )
    assert store.counts() == (1, 1)
    assert store.recall("g", RequestKey("r2", b"digest")) is None
    assert store.recall("h", key) is None
    other = RequestKey("r1", b"another")
    assert reason_of(store.recall, "g", other).reason is Reason.REQUEST_ID_REUSED
    assert reason_of(store.enroll, "g", "a", new(3), request=other).reason is (
        Reason.REQUEST_ID_REUSED
    )


def test_a_late_repetition_does_not_bring_a_deleted_face_back(store: Store) -> None:
    key = RequestKey("r1", b"digest")
    store.enroll("g", "a", new(1), create_subject=True, request=key, answer={})
    store.delete_subject("g", "a")
    error = reason_of(store.enroll, "g", "a", new(1), create_subject=True, request=key)
    assert error.reason is Reason.TEMPLATE_NOT_FOUND
    assert store.counts() == (0, 0)


def test_requests_are_forgotten_after_a_day(store: Store, clock: Clock) -> None:
    key = RequestKey("r1", b"digest")
    store.enroll("g", "a", new(1), create_subject=True, request=key)
    clock.now += remembered.REQUEST_MEMORY_NS
    assert store.recall("g", key) is None
    # The row is pruned by then, so the same id can be used again.
    store.enroll("g", "a", new(2), request=key)
    assert store.recall("g", key) is not None


def test_the_memory_of_requests_is_bounded(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_REQUEST_IDS", 5)
    for n in range(12):
        store.enroll("g", "a", new(n), create_subject=True, request=RequestKey(f"r{n}", b""))
    remembered = [n for n in range(12) if store.recall("g", RequestKey(f"r{n}", b"")) is not None]
    assert remembered == [7, 8, 9, 10, 11]


# -- the file ---------------------------------------------------------------------------------


@in_a_file
def test_the_file_is_private(store: Store, path: Path) -> None:
    store.create_subject("g", "a", "", {})
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name


def test_a_file_readable_by_others_is_tightened(path: Path) -> None:
    Store(path).close()
    path.chmod(0o644)
    Store(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_several_servers_share_a_store(place: Path | str, clock: Clock) -> None:
    with (
        closing(Store(open_store(place), clock_ns=clock)) as first,
        closing(Store(open_store(place), clock_ns=clock)) as second,
    ):
        first.enroll("g", "a", new(1), create_subject=True)
        assert second.get_subject("g", "a").template_count == 1
        second.delete_subject("g", "a")
        assert first.counts() == (0, 0)


def test_a_server_of_before_is_not_joined(path: Path) -> None:
    """Up to schema 2 a server held the file alone, and overwrote its log whenever it liked."""
    Store(path).close()
    with path.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        error = reason_of(Store, path)
    assert (error.reason, error.retryable) == (Reason.GALLERY_UNAVAILABLE, True)
    assert "earlier version" in error.message
    Store(path).close()


@pytest.mark.parametrize("content", [b"not a database at all" * 100, None])
def test_a_damaged_file_is_told_at_the_start(path: Path, content: bytes | None) -> None:
    first = Store(path)
    for seed in range(40):
        first.enroll("g", f"s{seed}", new(seed), create_subject=True)
    first.close()
    if content is None:
        with path.open("r+b") as file:
            file.seek(200)
            file.write(os.urandom(path.stat().st_size - 200))
    else:
        path.write_bytes(content)
    error = reason_of(Store, path)
    assert error.reason is Reason.GALLERY_UNAVAILABLE
    assert "damaged" in error.message
    assert not error.retryable


def test_a_vector_of_the_wrong_length_is_damage(store: Store) -> None:
    store.enroll("g", "a", new(1), create_subject=True)
    with pytest.raises(FacelaneError) as caught:
        list(store.vectors(MODEL, DIM * 2))
    assert caught.value.reason is Reason.GALLERY_UNAVAILABLE


def test_a_foreign_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE bookmarks (url TEXT)")
    other.close()
    error = reason_of(Store, path)
    assert "another program" in error.message
    with sqlite3.connect(path) as other:
        tables = [row[0] for row in other.execute("SELECT name FROM sqlite_master")]
    other.close()
    assert tables == ["bookmarks"]


def test_a_newer_schema_is_refused(path: Path) -> None:
    Store(path).close()
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE schema_version SET version = 99")
    raw.close()
    assert "newer facelane" in reason_of(Store, path).message


def test_migrations_run_forward_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlalchemy as sa

    Store(path).close()
    ran: list[int] = []

    def step(connection: sa.Connection) -> None:
        ran.append(1)
        connection.execute(sa.text("ALTER TABLE subjects ADD COLUMN note TEXT"))

    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, step))
    Store(path).close()
    Store(path).close()
    assert ran == [1]


def test_a_failed_migration_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlalchemy as sa

    Store(path).close()

    def step(connection: sa.Connection) -> None:
        connection.execute(sa.text("CREATE TABLE half_done (x INTEGER)"))
        connection.execute(sa.text("THIS IS NOT SQL"))

    with monkeypatch.context() as patched:
        patched.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, step))
        assert reason_of(Store, path).reason is Reason.GALLERY_UNAVAILABLE
    Store(path).close()
    with sqlite3.connect(path) as raw:
        tables = {row[0] for row in raw.execute("SELECT name FROM sqlite_master")}
    raw.close()
    assert "half_done" not in tables


@in_a_file
def test_a_locked_file_is_retryable(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create_subject("g", "a", "", {})
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    try:
        error = reason_of(store.create_subject, "g", "b", "", {})
    finally:
        blocker.execute("ROLLBACK")
        blocker.close()
    assert (error.reason, error.retryable) == (Reason.GALLERY_UNAVAILABLE, True)
    store.create_subject("g", "b", "", {})


@in_a_file
def test_a_full_disk_is_retryable_and_loses_nothing(store: Store) -> None:
    store.enroll("g", "a", new(1), create_subject=True)
    with store.database._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        connection.rollback()

    def fill() -> None:
        for seed in range(2, 90):
            store.enroll("g", f"s{seed}", new(seed), create_subject=True)

    with pytest.raises(FacelaneError) as caught:
        fill()
    assert (caught.value.reason, caught.value.retryable) == (Reason.GALLERY_UNAVAILABLE, True)
    assert "disk is full" in caught.value.message
    subjects, templates = store.counts()
    assert subjects == templates, "an enrolment was half done"
    assert store.get_subject("g", "a").template_count == 1


@in_a_file
def test_errors_hold_no_names_and_no_vectors(store: Store, path: Path) -> None:
    store.create_subject("g", "secret-name", "Secret Person", {})
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    try:
        errors = [reason_of(store.enroll, "g", "secret-name", new(1))]
    finally:
        blocker.execute("ROLLBACK")
        blocker.close()
    errors += [
        reason_of(store.create_subject, "g", "secret-name", "Secret Person", {}),
        reason_of(store.create_subject, "g", "Secret Person", "", {}),
        reason_of(store.get_subject, "g", "secret-other"),
    ]
    for error in errors:
        chain: BaseException | None = error
        while chain is not None:
            assert "ecret" not in str(chain)
            chain = chain.__cause__
        assert "ecret" not in str(error.metadata)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = reason_of(Store, tmp_path / "file" / "gallery.db")
    assert error.reason is Reason.GALLERY_UNAVAILABLE
    assert "gallery.path" in error.message


def test_a_full_disk_is_told_before_it_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gallery.db"
    store = Store(path)
    try:
        assert store.trouble() == ""
        monkeypatch.setattr(limits, "MIN_DISK_BYTES", 1 << 62)
        assert store.trouble() == "DISK_FULL"
    finally:
        store.close()
    with pytest.raises(FacelaneError, match="No space left") as refused:
        Store(path)
    assert refused.value.retryable, "systemd tries again"


def test_what_was_deleted_is_in_no_file(tmp_path: Path) -> None:
    path = tmp_path / "gallery.db"
    store = Store(path)
    try:
        store.create_subject("g", "MARIE-CURIE", "Maria Sklodowska", {"k": "Radium"})
        store.delete_subject("g", "MARIE-CURIE")
        left = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        for word in (b"MARIE-CURIE", b"Sklodowska", b"Radium"):
            assert word not in left
        store.create_subject("g", "bo", "", {})
        assert store.counts() == (1, 0)
    finally:
        store.close()


# -- chips ------------------------------------------------------------------------------------

OTHER = "n@1#bb"


def with_chip(seed: int, model: str = MODEL) -> NewTemplate:
    return NewTemplate(model, vector(seed), 0.8, 0.4, bytes([seed]) * 300)


def test_a_kept_chip_makes_its_template_another_model_s(store: Store) -> None:
    store.enroll("g", "a", new(1), create_subject=True)
    kept = store.enroll("g", "b", with_chip(2), create_subject=True).template
    assert store.chips.without(MODEL) == 1
    assert store.chips.behind(MODEL, "", 9) == []
    [chip] = store.chips.behind(OTHER, "", 9)
    assert (chip.template_id, chip.chip) == (kept.template_id, bytes([2]) * 300)
    assert chip.size_quality == pytest.approx(0.5)
    assert store.chips.behind(OTHER, kept.template_id, 9) == []
    seen = store.revision()
    assert store.chips.renew(kept.template_id, NewTemplate(OTHER, vector(3), 0.6, 0.3))
    assert not store.chips.renew("nobody", NewTemplate(OTHER, vector(3), 0.6, 0.3))
    [row] = store.vectors(OTHER, DIM)
    assert (row.subject_id, row.template_id) == ("b", kept.template_id)
    assert np.array_equal(row.vector, unit_float16(vector(3)))
    assert [row.subject_id for row in store.vectors(MODEL, DIM)] == ["a"]
    assert store.get_subject("g", "b").template_count == 1
    [template] = store.list_templates("g", "b")
    assert (template.model_id, template.ood_score, template.quality) == (OTHER, 0.6, 0.3)
    # Whoever searches with the old model is told that it is gone, with the new one that it came.
    for model, added in ((MODEL, False), (OTHER, True)):
        gone, came = store.changes(seen, model, DIM)
        assert gone.kind == "TEMPLATE_REMOVED"
        assert (came.added is not None) is added
    # And back again.
    assert [k.template_id for k in store.chips.behind(MODEL, "", 9)] == [kept.template_id]


def test_chips_go_with_their_templates_and_subjects(store: Store) -> None:
    for seed in (1, 2, 3):
        store.enroll("g", "a" if seed < 3 else "b", with_chip(seed), create_subject=True)
    first, second, _ = store.chips.behind(OTHER, "", 9)
    owners = {t.template_id: t.subject_id for who in "ab" for t in store.list_templates("g", who)}
    assert owners.keys() >= {first.template_id, second.template_id}
    gone = next(t for t, who in owners.items() if who == "b")
    store.delete_template("g", gone)
    assert len(store.chips.behind(OTHER, "", 9)) == 2
    store.delete_subject("g", "a")
    assert store.chips.behind(OTHER, "", 9) == []


def test_the_same_picture_again_brings_its_chip(store: Store) -> None:
    template = store.enroll("g", "a", new(1), create_subject=True).template
    assert not store.enroll("g", "a", with_chip(1)).created
    assert [k.template_id for k in store.chips.behind(OTHER, "", 9)] == [template.template_id]
    assert store.chips.without(MODEL) == 0


@in_a_file
def test_a_chip_lies_open_only_where_all_does(
    store: Store, path: Path, request: pytest.FixtureRequest
) -> None:
    store.enroll("g", "a", with_chip(7), create_subject=True)
    found = any(bytes([7]) * 300 in file.read_bytes() for file in path.parent.iterdir())
    assert found is ("sealed" not in request.node.callspec.id)


def test_a_store_that_is_sealed_later_seals_its_chips(path: Path, tmp_path: Path) -> None:
    plain = Store(path)
    plain.enroll("g", "a", with_chip(7), create_subject=True)
    plain.close()
    database = open_store(path)
    sealed = Store(database, vault=open_vault(database, Source("", tmp_path), mode="on"))
    try:
        assert [k.chip for k in sealed.chips.behind(OTHER, "", 9)] == [bytes([7]) * 300]
    finally:
        sealed.close()
    assert not any(bytes([7]) * 300 in file.read_bytes() for file in path.parent.iterdir())


def test_a_process_that_begins_waits_for_a_busy_store_and_for_nothing_else() -> None:
    tried = []

    def begin(*errors: FacelaneError) -> Callable[[], str]:
        waiting = list(errors)

        def once() -> str:
            tried.append(1)
            if waiting:
                raise waiting.pop(0)
            return "open"

        return once

    busy = unavailable("busy", cause="BUSY", retryable=True)
    assert patiently(begin(busy, busy)) == "open"
    assert len(tried) == 3
    with pytest.raises(FacelaneError, match="busy"):
        patiently(begin(busy), patience_s=0.0)
    away = unavailable("away", cause="08006", trouble="UNREACHABLE", retryable=True)
    damaged = unavailable("damaged", cause="CORRUPT")
    full = unavailable("full", cause="SQLITE_FULL", retryable=True)
    for error in (away, damaged, full):
        tried.clear()
        with pytest.raises(FacelaneError) as caught:
            patiently(begin(error))
        assert caught.value is error
        assert len(tried) == 1
