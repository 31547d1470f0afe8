"""The short version of ``python -m tests.faults.erasures``."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.faults import erasures


@pytest.mark.slow
def test_nothing_is_left_of_those_who_were_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasures, "ROUND", 8)
    run, wrong = erasures.play(tmp_path, people=32, kills=2)
    assert wrong == []
    # Of the two rounds without a kill; of the others some are gone and nobody was told.
    assert run.deleted >= 16
    assert run.kills >= 2
