"""A short history of each cell; ``histories`` says more, and runs long ones."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults.histories import ENGINES, cells, prepared
from tests.faults.places import UnavailableError

EVERY = [(cell, engine) for engine in ENGINES for cell in cells(engine)]
FIRST = {("keeper", "sqlite"), ("shard", "postgresql"), ("postgres", "postgresql")}
OPERATIONS, FAULTS = 300, 3


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a path that is short enough for the sockets of shards."""
    made = Path(tempfile.mkdtemp(prefix="facelane-history-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("cell", "engine"),
    [
        pytest.param(*one, marks=pytest.mark.slow if one in FIRST else pytest.mark.slow(last=True))
        for one in EVERY
    ],
)
def test_what_was_acknowledged_and_told_survives(cell: str, engine: str, folder: Path) -> None:
    try:
        with prepared(cell, engine, folder, 3 if cell == "enrolling" else 2) as history:
            history.run(OPERATIONS, 240.0, FAULTS)
    except UnavailableError as error:
        pytest.skip(str(error))
    found = history.report()
    assert not history.wrong, found
    assert history.operations >= OPERATIONS, found
    assert sum(history.faults.values()) == (0 if cell in ("writers", "enrolling") else FAULTS), (
        found
    )
