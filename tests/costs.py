"""What each file of the tests costs: the seconds that its tests took, and of a processor, with the
processes that they ended. ``make test`` shows the dearest at its end: it has six minutes in all.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Generator
from typing import Any

import pytest

from tests import forked

SHOWN = 15
_COST = "facelane_processor_seconds"


class Costs:
    """A plugin: measures where the tests run, adds up where the results are told."""

    def __init__(self) -> None:
        self._before = processor_seconds()
        self._wall: defaultdict[str, float] = defaultdict(float)
        self._processor: defaultdict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        """Attributes of a report travel from xdist's workers."""
        report = yield
        now = processor_seconds()
        setattr(report, _COST, now - self._before)
        self._before = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0]
        self._wall[file] += report.duration
        self._processor[file] += getattr(report, _COST, 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if len(self._wall) < 2:
            return
        write = terminalreporter.write_line
        terminalreporter.section("the dearest files")
        write("   wall  processor")
        for file in sorted(self._wall, key=self._cost, reverse=True)[:SHOWN]:
            write(f"{self._wall[file]:6.1f} s {self._processor[file]:6.1f} s  {file}")
        walls, processors = sum(self._wall.values()), sum(self._processor.values())
        write(f"{walls:6.0f} s {processors:6.0f} s  all {len(self._wall)} files")

    def _cost(self, file: str) -> float:
        return max(self._wall[file], self._processor[file])


def processor_seconds() -> float:
    """Of this process, of those that it has waited for, and of servers that were forked for it."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return own + forked.processor_seconds()
