"""One store into another, either way: everything arrives, and goes on where it was."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from facelane_server.cli import app
from facelane_server.domain import Box, Decision, Identity, Liveness, LivenessVerdict, TrackReport
from facelane_server.store import copying, events, schema
from facelane_server.store.database import Database
from facelane_server.store.events import EventRecord
from facelane_server.store.gallery import Store
from facelane_server.store.opening import open_store
from facelane_server.store.records import NewTemplate, RequestKey

MODEL, DIM = "m@1", 16
FACES = 70


def new(seed: int) -> NewTemplate:
    return NewTemplate(MODEL, np.random.default_rng(seed).standard_normal(DIM), 0.9, 0.5)


def filled(place: Path | str) -> None:
    with contextlib.closing(Store(open_store(place))) as store:
        for n in range(FACES):
            store.enroll(f"g{n % 3}", f"s{n}", new(n), create_subject=True, display_name="Ünï")
        store.enroll("g0", "s0", new(9), request=RequestKey("r", b"f"), answer={"score": 0.5})
        store.delete_subject("g1", "s1")
        identity = Identity(Decision.MATCH, "s0", 0.9)
        seen = TrackReport(
            1, 0, 1, None, None, Box(0, 0, 1, 1), identity, Liveness(LivenessVerdict.LIVE)
        )
        batch = [EventRecord(0, "SUBJECT_SEEN", n, "cam", "s", "g0", seen) for n in range(5)]
        events.append(store.database, store.vault, batch, again=False)
        with store.database.writing(schema.AUDIT) as connection:
            number = schema.next_revision(connection, schema.AUDIT)
            connection.execute(
                sa.insert(schema.audit).values(
                    sequence=number, time_ns=1, body=b"\0body", digest=b"\xff"
                )
            )
            connection.execute(
                sa.insert(schema.keys).values(
                    key_id="k",
                    kind="subject",
                    subject=1,
                    wrapped=bytes(40),
                    wrapped_by="e",
                    created_ns=1,
                )
            )
            # What is there with encryption, retention, confirmation and pictures on.
            template = connection.scalar(sa.select(schema.templates.c.template_id).limit(1))
            for table, row in (
                (schema.chips, {"template_id": template, "encoding": "jpeg", "chip": b"\0chip"}),
                (schema.last_seen, {"subject": 1, "seen_ns": 2**62}),
                (
                    schema.confirmations,
                    {"sequence": 3, "by": "guard", "agrees": True, "time_ns": 5},
                ),
                (
                    schema.pictures,
                    {
                        "picture_id": "p",
                        "subject": 1,
                        "owner": -4,
                        "time_ns": 6,
                        "sealed": bytes(range(256)) * 300,
                    },
                ),
            ):
                connection.execute(sa.insert(table).values(**row))
            connection.execute(
                sa.update(schema.templates)
                .where(schema.templates.c.template_id == template)
                .values(correction=1)
            )


def test_no_table_is_forgotten() -> None:
    left = set(schema.metadata.tables) - {table.name for table in schema.COPIED}
    assert left == {"schema_version", "shards"}


def content(database: Database) -> dict[str, list[tuple[object, ...]]]:
    with database.reading() as connection:
        return {
            table.name: [
                tuple(row)
                for row in connection.execute(sa.select(table).order_by(*table.primary_key.columns))
            ]
            for table in schema.COPIED
        }


@pytest.mark.parametrize("way", ["there", pytest.param("and back", marks=pytest.mark.slow)])
def test_everything_is_copied(
    way: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_ROWS", FACES // 2 + 1)  # not all rows at a time
    file, database = tmp_path / "gallery.db", request.getfixturevalue("postgres").url()
    source, target = (file, database) if way == "there" else (database, file)
    filled(source)
    done = CliRunner().invoke(app, ["store", "copy", str(source), str(target)])
    assert done.exit_code == 0, done.output
    assert f"templates: {FACES}" in done.output
    with (
        contextlib.closing(open_store(source)) as old,
        contextlib.closing(Store(open_store(target))) as made,
    ):
        assert content(made.database) == content(old)
        assert all(content(old).values()), "every table has something to copy"
        assert events.history_id(made.database) == events.history_id(old)
        assert made.check() == ""
        # Numbers go on where they were.
        seen = made.revision()
        made.enroll("g0", "new", new(1_000), create_subject=True)
        assert [c.revision for c in made.changes(seen, MODEL, DIM)] == [seen + 1, seen + 2]
    again = CliRunner().invoke(app, ["store", "copy", str(source), str(target)])
    assert again.exit_code == 69
    assert "not empty" in again.output
    with contextlib.closing(Store(open_store(target))) as made:
        assert made.counts() == (FACES, FACES + 1)


def test_a_store_is_looked_at(place: Path | str, tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    url = place if isinstance(place, str) else f"sqlite:///{place}"
    config.write_text(f'[store]\nurl = "{url}"\n')
    missing = CliRunner().invoke(app, ["store", "check", "-c", str(config)])
    assert missing.exit_code == 69
    with contextlib.closing(Store(open_store(place))) as store:
        store.enroll("g", "a", new(1), create_subject=True)
        done = CliRunner().invoke(app, ["store", "check", "-c", str(config)])
    assert (done.exit_code, "1 subjects, 1 templates, 0 events" in done.output) == (0, True)
