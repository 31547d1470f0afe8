"""``python -m tests.unit.stores.make``: files of the present schema, with people in them, for each
engine, beside this one. Made while a schema is the newest, and kept for good: the tests take the
files of every version over (``tests/unit/test_store_migrations.py``).
"""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from tests import postgres

from facelane_server.domain import (
    Box,
    Candidate,
    Decision,
    Identity,
    Liveness,
    LivenessVerdict,
    TrackReport,
)
from facelane_server.store import events, schema
from facelane_server.store.events import EventRecord
from facelane_server.store.gallery import Store
from facelane_server.store.masterkey import Source
from facelane_server.store.opening import open_store
from facelane_server.store.pictures import Photo, Pictures
from facelane_server.store.records import Correction, NewTemplate, RequestKey
from facelane_server.store.vault import open_vault

HERE = Path(__file__).parent
DIM, MODEL = 8, "m@1#aa"
SEEN_NS = 1_800_000_000_000_000_000
PICTURES = ("1" * 32, "2" * 32)
"""Of Ada, and of somebody whom nobody knows."""
PHOTO = Photo(b"\xff\xd8\xff a face", b"\xff\xd8\xff a chip")
CHIP = bytes(range(27))


def vector(seed: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    values = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return values / np.linalg.norm(values)


def report(name: str, picture: str = "") -> TrackReport:
    identity = Identity(Decision.MATCH, name, 0.8, candidates=(Candidate(name, 0.8),))
    live = Liveness(LivenessVerdict.LIVE, 0.9)
    return TrackReport(7, 0, 1, None, None, Box(0, 0, 1, 1), identity, live, picture=picture)


def fill(store: Store) -> None:
    """Two people with all that can be kept of them, and one who was deleted."""
    for number, (gallery, name) in enumerate(
        [("default", "ada"), ("staff", "bo"), ("staff", "gone")]
    ):
        store.enroll(
            gallery,
            name,
            NewTemplate(MODEL, vector(number), 0.9, 0.5, CHIP),
            create_subject=True,
            display_name=name.title(),
            request=RequestKey(f"enrol-{name}", b"f" * 32),
            answer={"said": name},
        )
        store.update_subject(gallery, name, labels={"k": "v"})
    not_her = NewTemplate(MODEL, vector(9), 0.9, 0.5, correction=Correction.NOT)
    store.enroll("default", "ada", not_her)
    kept = Pictures(store.database, store.vault)
    kept.add(PICTURES[0], PHOTO, SEEN_NS, gallery_id="default", subject_id="ada")
    kept.add(PICTURES[1], PHOTO, SEEN_NS, gallery_id="default", subject_id="")
    told = [
        EventRecord(0, "STREAM_OPENED", SEEN_NS, "door", "s"),
        EventRecord(0, "SUBJECT_SEEN", SEEN_NS, "door", "s", "default", report("ada", PICTURES[0])),
        EventRecord(0, "SUBJECT_SEEN", SEEN_NS + 1, "door", "s", "staff", report("gone")),
    ]
    events.append(store.database, store.vault, told, again=False)
    with store.database.writing(schema.GALLERY) as connection:
        number = connection.scalar(
            sa.select(sa.func.min(schema.subjects.c.id)).where(
                schema.subjects.c.gallery_id == "default"
            )
        )
        connection.execute(sa.insert(schema.last_seen).values(subject=number, seen_ns=SEEN_NS))
        connection.execute(
            sa.insert(schema.confirmations).values(
                sequence=2, by="guard", agrees=True, time_ns=SEEN_NS
            )
        )
    store.delete_subject("staff", "gone")
    list(store.erasing())


def make(place: Path | str, folder: Path) -> None:
    database = open_store(place)
    vault = open_vault(database, Source("", folder), mode="on")
    with contextlib.closing(Store(database, vault=vault)) as store:
        fill(store)


def main() -> int:
    version = len(schema.MIGRATIONS)
    with tempfile.TemporaryDirectory() as name, postgres.running() as server:
        folder = Path(name)
        key = "5a" * 32
        (folder / "master.key").write_text(key + "\n")
        (folder / "master.key").chmod(0o600)
        make(folder / "gallery.db", folder)
        with contextlib.closing(sqlite3.connect(folder / "gallery.db")) as raw:
            (HERE / f"{version}.sqlite.sql").write_text("\n".join(raw.iterdump()) + "\n")
        url = server.url()
        make(url, folder)
        found = postgres.programs()
        assert found is not None
        dumped = subprocess.run(
            [found / "pg_dump", "--inserts", "--no-owner", "--no-privileges", url],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        kept = [
            line
            for line in dumped.splitlines()
            if line.strip()
            and not line.startswith(("--", "SET ", "\\", "SELECT pg_catalog.set_config"))
        ]
        (HERE / f"{version}.postgresql.sql").write_text("\n".join(kept) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
