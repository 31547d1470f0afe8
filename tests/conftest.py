"""Fixtures for all tests, and the skips that depend on the machine."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tests import postgres as postgres_server
from tests.collecting import Collecting, Unswept
from tests.costs import Costs
from tests.measuring import Measuring
from tests.ordering import dealt, in_order, is_last
from tests.properties import Properties

ROOT = Path(__file__).resolve().parent.parent

# The same examples in every run, on a machine of any speed; new ones with
# ``--hypothesis-profile=explore``.
# A method that is asked twice (``Properties``) has another instance of its class each time.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
settings.register_profile(
    "explore", settings.get_profile("repeatable"), derandomize=False, max_examples=1000
)
settings.load_profile("repeatable")

# jsonschema would spend a second of each process on a grammar of identifiers that nobody asks for.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

# A shell's background job ignores interrupts, and so would every process started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def shared_folder() -> Path | None:
    """The folder with public models and media, or None on machines without it."""
    folder = Path(os.environ.get("FACELANE_SHARED", ROOT.parent / "shared"))
    return folder if (folder / "models").is_dir() else None


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """A command that a test runs in this process writes its log to a stream that ends with the
    test; whoever logs after it would fail."""
    yield
    structlog.reset_defaults()


END_VARIABLE = "FACELANE_TESTS_END"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--within",
        type=float,
        metavar="SECONDS",
        help="begin no test after that; what is left over is skipped, it does not fail",
    )
    parser.addoption(
        "--deal",
        type=int,
        metavar="TURN",
        help="with `--dist worksteal`: each process begins with what has its turn",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Collecting())
    config.pluginmanager.register(Costs())
    config.pluginmanager.register(Measuring())
    config.pluginmanager.register(Properties())
    config.pluginmanager.register(Unswept())
    seconds = config.getoption("--within")
    if seconds is not None:
        # The processes of xdist inherit it: all have one end.
        os.environ.setdefault(END_VARIABLE, str(time.monotonic() + seconds))


def pytest_report_header(config: pytest.Config) -> str | None:
    turn = config.getoption("--deal")
    return None if turn is None else f"turn: {turn} (make test-rest TURN={turn} repeats its order)"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() > float(os.environ.get(END_VARIABLE, "inf")):
        pytest.skip("the time was over")


# Behind those that choose (`-m`): what is dealt is what is run.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    workerinput = getattr(config, "workerinput", None)
    if workerinput is not None:
        in_order(items)
    items.sort(key=is_last)
    turn = config.getoption("--deal")
    if workerinput is not None and turn is not None:
        items[:] = dealt(items, workerinput["workercount"], turn)
    missing = {}
    if shared_folder() is None:
        missing["shared"] = "no public models here: set FACELANE_SHARED to a folder that has them"
    if not _has_cuda():
        missing["gpu"] = "no CUDA device here"
    for item in items:
        for marker, why in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=why))


def _has_cuda() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with public models and media; tests that use it are marked ``shared``."""
    folder = shared_folder()
    assert folder is not None
    return folder


@pytest.fixture(scope="session")
def _postgres() -> Iterator[postgres_server.Postgres]:
    with postgres_server.running() as server:
        yield server


@pytest.fixture
def postgres(request: pytest.FixtureRequest) -> postgres_server.Postgres:
    """A PostgreSQL server of this session; ``url`` gives a fresh database in it."""
    if not postgres_server.present():
        pytest.skip(postgres_server.WITHOUT)
    server: postgres_server.Postgres = request.getfixturevalue("_postgres")
    return server


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where a fresh store may be, on each engine; for ``store.opening.open_store``."""
    if request.param == "sqlite":
        return tmp_path / "state" / "gallery.db"
    server: postgres_server.Postgres = request.getfixturevalue("postgres")
    return server.url()
