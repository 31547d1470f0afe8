"""What all fault tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def processes_unmeasured() -> Iterator[None]:
    """Coverage stays out of the processes that faults are done to.

    It writes its file when a process ends, which makes dying slow: a worker that is taken
    down looks like one that hangs.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
            patch.delenv(name, raising=False)
        yield
