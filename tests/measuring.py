"""What of a test run coverage measures.

A traced Python runs at a third of its speed, whatever it runs. So what cannot reach new lines is
not traced: collecting (our own packages are imported before it, traced), the hundreds of examples
of a property, and faults and load under traffic, whose every part has tests of its own. To start a
process traced costs half as much again, so it is done where a process runs what no other test
reaches.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
from collections.abc import Generator, Iterator
from typing import Any

import coverage
import pytest

UNTRACED = (
    "tests/browser/",
    "tests/cases/test_04_damaged_galleries.py",
    "tests/cases/test_20_closed_streams.py",
    "tests/cases/test_23_output_anywhere.py",
    "tests/contract/test_deploy.py",
    "tests/contract/test_generated.py",
    "tests/contract/test_markup.py",
    "tests/contract/test_systemd_units.py",
    "tests/contract/test_tidy.py",
    "tests/e2e/test_bad_clients.py",
    "tests/e2e/test_bridge_server.py",
    "tests/e2e/test_core.py",
    "tests/e2e/test_enrolment.py",
    "tests/e2e/test_examples.py",
    "tests/e2e/test_gate.py",
    "tests/e2e/test_guides.py",
    "tests/e2e/test_hygiene.py::test_the_front_does_not_grow",
    "tests/e2e/test_overload.py",
    "tests/e2e/test_roles.py",
    "tests/e2e/test_rules_e2e.py",
    "tests/e2e/test_video.py",
    "tests/faults/",
    "tests/fuzz/",
    "tests/process/test_doctor_command.py",
    "tests/process/test_gallery_publication.py",
    "tests/process/test_wrong_answers.py",
    "tests/unit/test_edge_receiving.py",
    "tests/unit/test_fair_queue.py",
    "tests/unit/test_heap.py",
    "tests/unit/test_lanes_degraded.py",
    "tests/unit/test_models_crops.py",
    "tests/unit/test_models_docs.py",
    "tests/unit/test_models_parity.py",
    "tests/unit/test_presence.py",
    "tests/unit/test_sdk_client.py",
    "tests/unit/test_standing.py",
    "tests/unit/test_starter_models.py",
    "tests/unit/test_training_parts.py",
    "tests/unit/test_wiping.py",
)
"""Found by asking which file reaches what no other does: these do not, but for a few lines."""
PROCESSES_UNTRACED = (
    "tests/cases/",
    "tests/contract/",
    "tests/e2e/",
    "tests/process/",
    "tests/unit/",
)
"""The programs that these start run what others reach too, or are killed before they could tell."""
PROCESSES_TRACED = (
    "tests/cases/test_19_gallery_removed.py",
    "tests/e2e/test_access.py",
    "tests/e2e/test_bad_input.py",
    "tests/e2e/test_confirmation.py",
    "tests/e2e/test_console_api.py",
    "tests/e2e/test_events_delivery.py",
    "tests/e2e/test_hygiene.py",
    "tests/e2e/test_naming.py",
    "tests/e2e/test_operations.py",
    "tests/e2e/test_pictures_kept.py",
    "tests/e2e/test_view.py",
    "tests/process/test_fleet_node.py",
    "tests/process/test_priority.py",
    "tests/process/test_sandbox.py",
    "tests/process/test_shards.py",
    "tests/unit/test_cli_commands.py",
)
"""But these."""
PACKAGES = (
    "facelane",
    "facelane_bridge",
    "facelane_console",
    "facelane_events",
    "facelane_fleet",
    "facelane_server",
)
HEAVY = (
    "av",
    "cryptography.x509",
    "cv2",
    "grpc.aio",
    "numpy",
    "onnxruntime",
    "lap",
    "sqlalchemy",
    "starlette.applications",
    "torch",
    "typer",
)
"""What our packages import is not ours."""
LEFT_OUT = ("__main__", "facelane_fleet.cluster")
"""Programs, and what takes seconds to import and no test needs (Ray)."""
_PROCESSES = "COVERAGE_PROCESS_CONFIG"
"""By which coverage reaches the processes of a test."""
_set_aside: list[str] = []
"""Its values, while processes are untraced."""


class Measuring:
    """A plugin; without coverage it does nothing."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> Generator[None, Any, Any]:
        collects = not session.config.pluginmanager.hasplugin("dsession")
        if not collects or coverage.Coverage.current() is None:
            return (yield)
        if getattr(session.config, "workerinput", {"workerid": "gw0"})["workerid"] != "gw0":
            with untraced():  # one process is enough for what imports execute
                return (yield)
        with untraced():
            for name in HEAVY:
                _import(name)
        for package in PACKAGES:
            for name in _modules(package):
                _import(name)
        with untraced():
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        if not is_traced(item):
            with untraced():
                return (yield)
        if not traces_processes(item):
            with processes_untraced():
                return (yield)
        return (yield)


def is_traced(item: pytest.Item) -> bool:
    test = getattr(item, "obj", None)
    return not (item.nodeid.startswith(UNTRACED) or getattr(test, "is_hypothesis_test", False))


def traces_processes(item: pytest.Item) -> bool:
    return item.nodeid.startswith(PROCESSES_TRACED) or not item.nodeid.startswith(
        PROCESSES_UNTRACED
    )


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Neither this process nor those that it starts."""
    measuring = coverage.Coverage.current()
    if measuring is None:
        yield
        return
    measuring.stop()
    try:
        with processes_untraced():
            yield
    finally:
        measuring.start()


@contextlib.contextmanager
def processes_untraced() -> Iterator[None]:
    """Those that are started meanwhile."""
    processes = os.environ.pop(_PROCESSES, None)
    if processes is not None:
        _set_aside.append(processes)
    try:
        yield
    finally:
        if processes is not None:
            os.environ[_PROCESSES] = _set_aside.pop()


@contextlib.contextmanager
def processes_traced() -> Iterator[None]:
    """Those that are started meanwhile, whichever test is the first that wants them: what tests of
    many files use is one process."""
    if _PROCESSES in os.environ or not _set_aside:
        yield
        return
    os.environ[_PROCESSES] = _set_aside[-1]
    try:
        yield
    finally:
        del os.environ[_PROCESSES]


def _modules(package: str) -> Iterator[str]:
    made = importlib.import_module(package)
    yield package
    for found in pkgutil.walk_packages(made.__path__, f"{package}."):
        if not found.name.endswith(LEFT_OUT):
            yield found.name


def _import(name: str) -> None:
    # An extra that is not installed has tests that skip.
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
