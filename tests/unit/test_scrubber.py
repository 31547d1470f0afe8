"""When a server's memory is scrubbed."""

from __future__ import annotations

import pytest
from tests.waiting import auntil

from facelane_server import scrubber, wiping
from facelane_server.scrubber import Scrubber


async def test_what_fails_once_is_done_after_the_next_deletion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scrubber, "PAUSE_S", 0.001)
    done: list[str] = []
    failures = [OSError("no memory"), ValueError("a worker"), OSError("no memory")]

    def fails() -> None:
        done.append("tried")
        if failures:
            raise failures.pop()

    monkeypatch.setattr(wiping, "scrub", fails)
    one = Scrubber()
    for count in (2, 4, 6):
        one.note()
        await auntil(lambda count=count: len(done) == count and one._task is None)
    await one.close()
