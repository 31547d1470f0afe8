"""A short history of a gallery's changes on each engine; ``histories`` says more, and runs long
ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import postgres as postgres_server
from tests.faults.histories import History


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("engine", ["sqlite", "postgresql"])
def test_what_was_acknowledged_survives_every_death(
    engine: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    database: postgres_server.Postgres | None = None
    if engine == "postgresql":
        database = request.getfixturevalue("postgres")
    history = History(tmp_path, shards=2, database=database)
    history.run(300, 240.0)
    found = history.report()
    assert not history.wrong, found
    assert history.operations >= 300, found
    assert len(history.faults) == (3 if database else 2), found
