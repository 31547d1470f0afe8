"""After an erasure: nothing of a face is left in the memory of any process of the server."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from tests.portraits import COLLINS, HOPPER
from tests.running_server import NULL_POOLS, RunningServer, toml

from facelane_server.auditing import opened
from facelane_server.store import schema
from facelane_server.store.opening import unlock
from facelane_server.store.vault import KEY_COLUMNS, OF_SUBJECT

ERASED_WITHIN_S = 1.0

ENROL = f"""
    grace = facelane.Picture.encoded(open({str(HOPPER)!r}, "rb").read())
    eileen = facelane.Picture.encoded(open({str(COLLINS)!r}, "rb").read())
    client.create_subject("grace", display_name="Grace Brewster HOPPERNAME")
    client.enroll("grace", grace)
    client.enroll("eileen", eileen, create_subject=True)
    assert client.identify(grace)[0].identity.subject_id == "grace"
    client.verify("grace", grace)
    list(client.analyze([grace] * 4, source_id="door"))
    client.identify(eileen)
"""


def call(server: RunningServer, code: str) -> None:
    """As another program would: what it knows is not in this one's memory."""
    begin = f"import facelane\nwith facelane.Client({server.target!r}, timeout=100) as client:\n"
    subprocess.run([sys.executable, "-c", begin + code], check=True, timeout=200)


def vector_of(server: RunningServer, wanted: str) -> np.ndarray:  # type: ignore[type-arg]
    query = (
        sa.select(
            schema.templates.c.vector,
            schema.templates.c.template_id,
            schema.subjects.c.id,
            schema.subjects.c.sealed,
            *KEY_COLUMNS,
        )
        .join_from(schema.templates, schema.subjects)
        .join(schema.keys, OF_SUBJECT, isouter=True)
    )
    with opened(server.config) as (settings, database):
        vault = unlock(database, settings, look=True)
        with database.reading() as connection:
            for row in connection.execute(query).all():
                lock = vault.lock(connection, row.id, row)
                if vault.person(lock, row.id, row.sealed).subject_id == wanted:
                    kept = vault.vector(lock, row.template_id, row.vector)
                    return np.frombuffer(kept, np.float16)
    raise AssertionError("nobody of that name")


def found(server: RunningServer, vector: np.ndarray, picture: bytes) -> dict[str, int]:  # type: ignore[type-arg]
    """By process and kind, how often something of the face is in memory."""
    counts: dict[str, int] = {}
    few = vector[100:108]
    wide = few.astype(np.float32)
    for pid in (server.process.pid, *(child.pid for child in server.children())):
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        with open(f"/proc/{pid}/mem", "rb", 0) as memory:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                where, rights = line.split()[:2]
                if not rights.startswith("r") or "[v" in line:
                    continue
                first, last = (int(part, 16) for part in where.split("-"))
                for begin in range(first, last, 16 << 20):
                    try:
                        memory.seek(begin)
                        part = memory.read(min(16 << 20, last - begin))
                    except OSError:
                        break
                    values = np.frombuffer(part, np.float32, len(part) // 4)
                    with np.errstate(all="ignore"):
                        near = np.flatnonzero(np.abs(values - wide[0]) < 1e-3 * abs(wide[0]))
                    hits = {
                        "picture": part.count(picture),
                        "float16": part.count(few.tobytes()),
                        "float32": sum(
                            np.allclose(values[i : i + 8], wide, rtol=2e-3, atol=1e-5)
                            for i in near
                            if i + 8 <= len(values)
                        ),
                    }
                    for kind, count in hits.items():
                        if count:
                            key = f"{name} {kind}"
                            counts[key] = counts.get(key, 0) + int(count)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("pools", [NULL_POOLS, ""], ids=["null", "starter"])
def test_no_process_has_anything_of_a_face_that_was_erased(pools: str, tmp_path: Path) -> None:
    # By its command, which begins itself again with a heap that overwrites what is freed.
    with RunningServer(tmp_path, toml(tmp_path, pools), forked=False) as server:
        server.wait_serving(120)
        call(server, ENROL)
        vector = vector_of(server, "grace")
        picture = HOPPER.read_bytes()[5000:5064]
        assert any("float16" in key for key in found(server, vector, picture)), "it is searched"
        call(server, '    client.delete_subject("grace")\n')
        returned = time.monotonic()
        # It is what the receipt promises: by then, and not at some time.
        time.sleep(max(0.0, returned + ERASED_WITHIN_S - time.monotonic()))
        assert found(server, vector, picture) == {}
        call(server, '    assert client.get_subject("eileen").template_count == 1\n')
