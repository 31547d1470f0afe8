"""Stores of every released schema, with people in them, become the present one on each engine."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from tests.unit.stores import make as stores

from facelane_server.domain import FacelaneError
from facelane_server.store import audit, chain, events, schema
from facelane_server.store.gallery import Store
from facelane_server.store.masterkey import Source
from facelane_server.store.opening import open_store
from facelane_server.store.pictures import Pictures
from facelane_server.store.records import Correction, NewTemplate, RequestKey
from facelane_server.store.vault import open_vault

DIM = 8
MODEL = "m@1#aa"

# As the versions made them; nothing here is read from the present schema.
VERSION_1 = """
CREATE TABLE schema_version (version INTEGER);
CREATE TABLE subjects (
    id INTEGER NOT NULL, gallery_id VARCHAR(128) NOT NULL, subject_id VARCHAR(128) NOT NULL,
    display_name VARCHAR(256) NOT NULL, labels JSON NOT NULL, etag VARCHAR(32) NOT NULL,
    created_ns BIGINT NOT NULL, updated_ns BIGINT NOT NULL,
    PRIMARY KEY (id), UNIQUE (gallery_id, subject_id)
);
CREATE TABLE templates (
    id INTEGER NOT NULL, template_id VARCHAR(32) NOT NULL, subject INTEGER NOT NULL,
    model_id VARCHAR(256) NOT NULL, dim INTEGER NOT NULL, vector BLOB NOT NULL,
    ood_score FLOAT NOT NULL, created_ns BIGINT NOT NULL,
    PRIMARY KEY (id), UNIQUE (template_id),
    FOREIGN KEY(subject) REFERENCES subjects (id) ON DELETE CASCADE
);
CREATE INDEX ix_templates_subject ON templates (subject);
CREATE INDEX ix_templates_model_id ON templates (model_id);
CREATE TABLE requests (
    gallery_id VARCHAR(128) NOT NULL, request_id VARCHAR(128) NOT NULL, fingerprint BLOB NOT NULL,
    template_id VARCHAR(32) NOT NULL, answer JSON, created_ns BIGINT NOT NULL,
    PRIMARY KEY (gallery_id, request_id)
);
CREATE INDEX ix_requests_template_id ON requests (template_id);
CREATE INDEX ix_requests_created_ns ON requests (created_ns);
INSERT INTO schema_version VALUES (1);
"""
VERSION_2 = (
    VERSION_1.replace("created_ns BIGINT NOT NULL,\n    PRIMARY KEY (id), UNIQUE (template_id)",
    "created_ns BIGINT NOT NULL,\n    quality FLOAT DEFAULT '0' NOT NULL,\n"
    "    PRIMARY KEY (id), UNIQUE (template_id)").replace("VALUES (1)", "VALUES (2)")
)  # fmt: skip


def vector(seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return (values / np.linalg.norm(values)).astype(np.float16)


def filled(path: Path, ddl: str) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.executescript(ddl)
        for n, (gallery, name) in enumerate([("default", "ada"), ("staff", "bo"), ("staff", "cy")]):
            raw.execute(
                "INSERT INTO subjects VALUES (?, ?, ?, ?, ?, 'e', ?, ?)",
                (7 + n, gallery, name, name.title(), '{"k": "v"}', 100 + n, 200),
            )
            raw.execute(
                "INSERT INTO templates (id, template_id, subject, model_id, dim, vector, "
                "ood_score, created_ns) VALUES (?, ?, ?, ?, ?, ?, 0.9, 300)",
                (40 + n, f"{n:032x}", 7 + n, MODEL, DIM, vector(n).tobytes()),
            )
        raw.execute(
            "INSERT INTO requests VALUES ('default', 'd', x'00', ?, NULL, 1)", (f"{0:032x}",)
        )
        raw.commit()


@pytest.mark.parametrize("ddl", [VERSION_1, VERSION_2], ids=["1", "2"])
def test_a_file_of_an_earlier_version_is_taken_over_whole(tmp_path: Path, ddl: str) -> None:
    path = tmp_path / "state" / "gallery.db"
    filled(path, ddl)
    with contextlib.closing(Store(path)) as store:
        rows = list(store.vectors(MODEL, DIM))
        assert [(r.gallery_id, r.subject_id, r.subject) for r in rows] == [
            ("default", "ada", 7), ("staff", "bo", 8), ("staff", "cy", 9),
        ]  # fmt: skip
        assert all((r.vector == vector(n)).all() for n, r in enumerate(rows))
        assert store.get_subject("staff", "bo").labels == {"k": "v"}
        assert [t.quality for t in store.list_templates("staff", "cy")] == [0.0]
        # Whoever follows begins here, and no number is used twice.
        with store.loading(MODEL, DIM) as (seen, following):
            found = list(following)
        assert (seen, len(found)) == (9, 3)
        new = NewTemplate(MODEL, vector(9).astype(np.float32), 0.8, 0.5)
        store.enroll("staff", "dee", new, create_subject=True)
        changes = store.changes(seen, MODEL, DIM)
        assert [c.revision for c in changes] == [10, 11]
        assert changes[0].subject == changes[1].subject == 10
        with store.database.reading() as connection:
            known = connection.execute(
                sa.select(schema.galleries.c.gallery_id).order_by(schema.galleries.c.gallery_id)
            )
            assert known.scalars().all() == ["default", "staff"]
    with contextlib.closing(Store(path)) as again:
        assert again.check() == ""
        assert again.counts() == (4, 4)


def restored(place: Path | str, version: int, folder: Path) -> None:
    """A store as that version wrote it, and its master key in the folder."""
    if isinstance(place, Path):
        place.parent.mkdir(mode=0o700, exist_ok=True)
        with contextlib.closing(sqlite3.connect(place)) as raw:
            raw.executescript((stores.HERE / f"{version}.sqlite.sql").read_text())
    else:
        psycopg = pytest.importorskip("psycopg")
        with contextlib.closing(psycopg.connect(place, autocommit=True)) as raw:
            raw.execute((stores.HERE / f"{version}.postgresql.sql").read_text())
    key = folder / "master.key"
    key.write_text("5a" * 32 + "\n")
    key.chmod(0o600)


@pytest.mark.parametrize("version", range(3, len(schema.MIGRATIONS) + 1))
def test_a_store_of_every_version_is_taken_over_whole_on_each_engine(
    place: Path | str, version: int, tmp_path: Path
) -> None:
    """Of the newest too: a schema has its file from its first day (``stores.make``)."""
    restored(place, version, tmp_path)
    with contextlib.closing(open_store(place)) as database:
        # 3 knew no keys: it is sealed by what came later.
        vault = open_vault(database, Source("", tmp_path), mode="on")
        assert vault.encrypts
        # When it was written: answers are kept for a day.
        with database.reading() as connection:
            written_ns = connection.scalar(sa.select(sa.func.max(schema.requests.c.created_ns)))
        store = Store(database, vault=vault, clock_ns=lambda: written_ns or time.time_ns())
        assert store.check() == ""
        rows = {
            row.subject_id: row
            for row in store.vectors(stores.MODEL, stores.DIM)
            if not row.negative
        }
        assert set(rows) == {"ada", "bo"}
        for number, name in enumerate(("ada", "bo")):
            gallery = "staff" if number else "default"
            subject = store.get_subject(gallery, name)
            assert (subject.display_name, subject.labels) == (name.title(), {"k": "v"})
            assert np.allclose(rows[name].vector, stores.vector(number), atol=1e-3)
            [template] = store.list_templates(gallery, name)
            assert template.quality == 0.5
            if version > 3:  # at the sealing, answers that are kept for a day are forgotten
                again = store.recall(gallery, RequestKey(f"enrol-{name}", b"f" * 32))
                assert again is not None
                assert again.answer == {"said": name}
        corrections = store.list_templates("default", "ada", corrections=True)
        assert [one.correction for one in corrections] == ([Correction.NOT] if version > 5 else [])
        kept = Pictures(database, vault)
        for picture_id in stores.PICTURES:
            assert kept.get(picture_id) == (stores.PHOTO if version > 5 else None)
        told = events.after(database, vault, 0)
        named = [e.track.identity.subject_id for e in told if e.track is not None]
        assert named == (["ada", ""] if version > 3 else [])
        # Numbers that no store has, as anybody may ask for them.
        for beyond in (1 << 63, (1 << 64) - 1):
            assert events.one(database, vault, beyond) is None
            assert len(events.before(database, vault, beyond, 9)) == len(told)
        with database.reading() as connection:
            seen = connection.scalars(sa.select(schema.last_seen.c.seen_ns)).all()
            said = connection.scalars(sa.select(schema.confirmations.c.by)).all()
            assert (seen, said) == (([stores.SEEN_NS], ["guard"]) if version > 4 else ([], []))
            head, _ = audit.heads(connection)
            if version > 3:
                public = store.audit.public(connection)
                assert chain.verify(audit.links(connection), head, public=public) is None
        # It goes on: nobody gets a number again, and what is deleted is gone whole.
        new = NewTemplate(stores.MODEL, stores.vector(5), 0.8, 0.5)
        store.enroll("staff", "dee", new, create_subject=True)
        numbers = {row.subject_id: row.subject for row in store.vectors(stores.MODEL, stores.DIM)}
        assert numbers["dee"] > max(numbers["ada"], numbers["bo"]) + 1
        gone = store.delete_subject("default", "ada")
        list(store.erasing())
        with database.reading() as connection:
            assert not audit.has_rows(connection, gone.number)
        assert kept.get(stores.PICTURES[0]) is None
        assert kept.get(stores.PICTURES[1]) == (stores.PHOTO if version > 5 else None)
        assert not any(
            e.track.identity.subjects
            for e in events.after(database, vault, 0)
            if e.track is not None
        )


def test_a_fresh_store_of_each_engine_has_every_table(place: Path | str) -> None:
    with contextlib.closing(open_store(place)) as database, database.reading() as connection:
        assert set(sa.inspect(connection).get_table_names()) == set(schema.metadata.tables)
        for table in schema.metadata.tables.values():
            have = {column["name"] for column in sa.inspect(connection).get_columns(table.name)}
            assert have == set(table.columns.keys()), table.name
        for name in schema.COUNTERS:
            assert schema.revision(connection, name) == 0
    with contextlib.closing(open_store(place)) as again, again.reading() as connection:
        assert connection.scalar(sa.select(schema.schema_version.c.version)) == len(
            schema.MIGRATIONS
        )


def test_steps_run_once_on_each_engine(place: Path | str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(place).close()
    ran: list[int] = []

    def step(connection: sa.Connection) -> None:
        ran.append(1)
        connection.execute(sa.text("ALTER TABLE subjects ADD COLUMN note TEXT"))

    def broken(connection: sa.Connection) -> None:
        connection.execute(sa.text("CREATE TABLE half_done (x INTEGER)"))
        connection.execute(sa.text("THIS IS NOT SQL"))

    present = schema.MIGRATIONS
    monkeypatch.setattr(schema, "MIGRATIONS", (*present, step))
    open_store(place).close()
    open_store(place).close()
    assert ran == [1]
    monkeypatch.setattr(schema, "MIGRATIONS", (*present, step, broken))
    with pytest.raises(FacelaneError):
        open_store(place)
    monkeypatch.setattr(schema, "MIGRATIONS", (*present, step))
    with contextlib.closing(open_store(place)) as again, again.reading() as connection:
        assert "half_done" not in sa.inspect(connection).get_table_names()
    monkeypatch.setattr(schema, "MIGRATIONS", present)
    with pytest.raises(FacelaneError, match="newer facelane"):
        open_store(place)
