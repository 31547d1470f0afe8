"""Processes that collect the same tests compile each of them once.

pytest keeps what it makes of a test's file beside it. In a fresh checkout nothing is kept yet, and
processes that go through the same files in the same order would each make all of it: ten seconds
of a processor. So each begins at another place, and finds beside the rest what others have made.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent


class Collecting:
    """A plugin for xdist's processes that collect all tests; for others it does nothing."""

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self, session: pytest.Session) -> Generator[None, Any, Any]:
        workerinput = getattr(session.config, "workerinput", None)
        if workerinput and any(Path(given).resolve() == TESTS for given in session.config.args):
            number = int(workerinput["workerid"].removeprefix("gw"))
            for path in rotated(
                sorted(TESTS.rglob("test_*.py")), number, workerinput["workercount"]
            ):
                folder, name = importable(path)
                if str(folder) not in sys.path:
                    sys.path.insert(0, str(folder))
                # Whatever is wrong with it, collecting tells.
                with contextlib.suppress(Exception, pytest.skip.Exception):
                    importlib.import_module(name)
        return (yield)


class Unswept:
    """What is there once all is collected stays until the end: half a million objects, which Python
    would go through again and again to find that out, a third of a second each time."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection(self) -> Generator[None, Any, Any]:
        gc.disable()
        try:
            return (yield)
        finally:
            gc.collect()
            gc.freeze()
            gc.enable()


def rotated(paths: list[Path], number: int, processes: int) -> list[Path]:
    first = len(paths) * number // processes
    return paths[first:] + paths[:first]


def importable(path: Path) -> tuple[Path, str]:
    """As pytest imports a test: below the first folder that is no package."""
    folder, name = path.parent, path.stem
    while (folder / "__init__.py").exists():
        folder, name = folder.parent, f"{folder.name}.{name}"
    return folder, name
