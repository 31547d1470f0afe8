"""The door of ``examples/`` under faults; ``make door`` plays as many seeds as wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.faults import door

from facelane_server.models.catalog import SHIPPED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


async def test_it_opens_for_nobody_else_whatever_dies(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("skimage")
    if not (SHIPPED[0] / "facelane-recognizer").is_dir():
        pytest.skip("no starter models in this tree")
    # A busy machine may take its time: how long things take is for `make door` to tell.
    account = await door.play(tmp_path, range(3), latest_s=600, patience_s=100)
    told = account.told()
    assert account.seeds == 3
    assert account.wrong == [], told
    assert account.missed == [], told
    assert account.unexplained == [], told
    assert account.openings >= 3, told
