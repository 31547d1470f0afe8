"""The fleet's configuration, its books, and how it is shown."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from facelane_bridge.config import ConfigError
from facelane_bridge.hosting import CameraReport
from facelane_bridge.output import CameraTotals
from facelane_fleet import accounts, cli, config, statuses
from facelane_fleet.messages import (
    Books,
    CameraStatus,
    EndedRun,
    Memo,
    NodeStatus,
    ServerReport,
    ServersOrder,
    Status,
)
from facelane_fleet.placement import State
from facelane_fleet.processes import ServerProcess
from facelane_server import config as server_config

FLEET = """
[fleet]
name = "site"
moves = 2

[servers]
config = "server.toml"
listen = "0.0.0.0:50151"

[bridges]
token_file = "/etc/facelane/token"
tls_ca = "/etc/facelane/ca.pem"

[[node]]
name = "yard-*"
servers = 0

[defaults]
max_fps = 5

[[camera]]
name = "door"
source = "rtsp://192.0.2.1/1"

[[camera]]
name = "yard"
source = "rtsp://192.0.2.2/1"
nodes = ["yard-*"]
"""


def parsed(text: str, server: dict[str, Any] | None = None) -> config.Settings:
    return config.from_tables(tomllib.loads(text), server or {})


def test_a_whole_file(tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(FLEET)
    (tmp_path / "server.toml").write_text('[store]\nurl = "postgresql://db/facelane"\n')
    made = config.load(tmp_path / "fleet.toml")
    assert (made.fleet.name, made.policy.moves, made.policy.per_server) == ("site", 2, 64)
    assert made.server_config["store"]["url"].startswith("postgresql://")
    assert made.cameras["door"].max_fps == 5
    assert [(wish.name, wish.nodes) for wish in made.wishes] == [
        ("door", ()), ("yard", ("yard-*",))
    ]  # fmt: skip
    assert (made.node("yard-1").servers, made.node("hall").servers) == (0, -1)
    server = made.server_for("192.0.2.9:50151")
    assert (server.target, server.tls_ca) == ("192.0.2.9:50151", "/etc/facelane/ca.pem")


@pytest.mark.parametrize(
    ("text", "server", "told"),
    [
        ("[flet]", {}, "did you mean 'fleet'"),
        ("[fleet]\nmove = 3", {}, "did you mean 'moves'"),
        ("[fleet]\nmoves = 0", {}, "moves"),
        ('[servers]\nlisten = "0.0.0.0"', {}, "HOST:PORT"),
        ('[[node]]\nname = "a"\nservers = 0', {}, "others reach"),
        ("camera = 3", {}, r"\[\[camera\]\]"),
        ('[[camera]]\nname = "a"\nsource = "x"\n' * 2, {}, "two cameras"),
        ('[[camera]]\nname = "a"\nsource = "rtsp://u:secret@h/1"', {}, "holds credentials"),
        ('[[camera]]\nname = "a"\nsource = "x"\n[[camera]]\nnam = "b"', {}, "number 2"),
        ('[[camera]]\nname = "a"\nsource = "x"\nnodes = "n"', {}, "nodes"),
        ("", {"server": {"listen": "unix:/x"}, "state_dir": "/x"}, "state_dir, server.listen"),
    ],
)
def test_what_is_wrong_is_told_with_what_to_write(
    text: str, server: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        parsed(text, server)
    assert "secret" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "none.toml")
    (tmp_path / "fleet.toml").write_text('[servers]\nconfig = "none.toml"')
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        config.load(tmp_path / "fleet.toml")


def test_the_command_checks_without_a_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="needs facelane[fleet]")
    (tmp_path / "fleet.toml").write_text(FLEET)
    (tmp_path / "server.toml").write_text("")
    assert cli.main(["check", str(tmp_path / "fleet.toml")]) == 0
    assert "2 cameras" in capsys.readouterr().out
    (tmp_path / "fleet.toml").write_text("[flet]")
    assert cli.main(["check", str(tmp_path / "fleet.toml")]) == cli.EXIT_USAGE
    assert "did you mean" in capsys.readouterr().err


# -- books ------------------------------------------------------------------------------------


def run(term: int = 1, *, frames: int = 10, results: int = 7, flying: int = 3) -> CameraReport:
    totals = CameraTotals(frames=frames, results=results, in_flight=flying)
    return CameraReport(term=term, totals=totals, last_result_at=5.0)


def test_frames_of_a_lost_run_that_were_on_their_way_are_errors() -> None:
    report = run()
    closed = accounts.closed(report, "NODE_LOST")
    assert closed.totals.balanced
    assert closed.totals.errors_by_reason == {"NODE_LOST": 3}
    assert report.totals.in_flight == 3  # as it was told
    assert accounts.accounted(report.totals)
    assert not accounts.accounted(CameraTotals(frames=3, results=1, in_flight=1))


def test_books_of_several_runs_add_up_and_none_is_taken_twice() -> None:
    memo = Memo(number=1, document={}, server_config={}, state=State())
    ended = [
        EndedRun(number=n, camera="a", report=run(n, frames=4, results=4, flying=0)) for n in (1, 2)
    ]
    assert accounts.take_over(memo, "node-x", ended)
    assert not accounts.take_over(memo, "node-x", ended)
    more = [*ended, EndedRun(number=3, camera="a", report=accounts.closed(run(3), "BRIDGE_LOST"))]
    assert accounts.take_over(memo, "node-x", more)
    books = memo.books["a"]
    assert (books.runs, books.lost_runs) == (3, 1)
    assert books.totals.balanced
    assert (books.totals.frames, books.totals.results, books.totals.errors) == (18, 15, 3)
    # Numbers are a node's own: another's, or its next incarnation's, begin anew.
    assert accounts.take_over(memo, "node-y", ended)
    assert isinstance(books, Books)


# -- what people see ---------------------------------------------------------------------------


def test_the_table_shows_what_is_wrong() -> None:
    good = CameraStatus(name="door", state="STREAMING", node="hall", server="hall/0", age_s=0.2)
    status = Status(
        fleet="site", time="", supervisor_pid=1, supervisor_since="", revision=1, recovered=True,
        nodes=[
            NodeStatus(id="1", name="hall", address="192.0.2.1", state="UP", servers=[
                ServerReport(slot=0, state="SERVING", target="unix:/x", card="0",
                             capacity_fps=100.0, offered_fps=40.0, room=12)]),
            NodeStatus(id="2", name="yard", address="192.0.2.2", state="LOST", message="gone"),
        ],
        cameras=[good],
    )  # fmt: skip
    assert statuses.well(status)
    text = statuses.table(status)
    assert "40/100/s" in text
    assert "LOST" in text
    ill = CameraStatus(
        name="yard", state="UNPLACED", reason="NO_NODE: start one", lost_runs=1, balanced=False,
        pinned="yard",
    )  # fmt: skip
    status.cameras.append(ill)
    status.recovered = False
    assert not statuses.well(status)
    text = statuses.table(status)
    for word in ("NO_NODE", "pinned to yard", "1 runs lost", "DO NOT BALANCE", "waits for every"):
        assert word in text


def test_the_example_of_the_page_is_a_fleet() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "fleet.md").read_text()
    (text,) = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    made = parsed(text)
    assert made.reach == {"yard-north": ("yard-*",)}
    # Every key is in its table, with its default.
    for kind in (config.Fleet, config.Servers, config.Bridges, config.Node):
        for key in kind.__struct_fields__:
            assert f"`{key}`" in page, key
    fleet = config.Fleet()
    for key in ("max_cameras", "moves", "lease", "silence", "patience"):
        assert f"| `{key}` | {getattr(fleet, key):g} |" in page


# -- what a server is started with ---------------------------------------------------------------


def written(
    folder: Path, slot: int, server: dict[str, Any], listen: str = "unix", metrics: str = ""
) -> tuple[dict[str, Any], str]:
    order = ServersOrder(
        count=2, config=server, listen=listen, metrics=metrics,
        state_dir=str(folder / "state"), ask={},
    )  # fmt: skip
    (folder / "run").mkdir(exist_ok=True)
    made = ServerProcess(slot, order, folder / "run", "192.0.2.7", "", 0)
    return tomllib.loads(made._write().read_text()), made.target


def test_servers_of_one_machine_share_a_gallery_and_its_key(tmp_path: Path) -> None:
    (one, first), (two, second) = (written(tmp_path, slot, {}) for slot in (0, 1))
    assert one["gallery"]["path"] == two["gallery"]["path"] == str(tmp_path / "state/gallery.db")
    assert one["store"]["master_key"] == two["store"]["master_key"]
    key = Path(one["store"]["master_key"].removeprefix("file:"))
    assert key.stat().st_mode & 0o777 == 0o600
    assert re.fullmatch(r"[0-9a-f]{64}\n", key.read_text())
    assert one["state_dir"] != two["state_dir"]
    assert first != second
    assert one["metrics"]["listen"] == ""
    for text in (one, two):
        server_config.parse(tomli_w.dumps(text), source="written")


def test_servers_of_several_machines_keep_to_their_store(tmp_path: Path) -> None:
    store = {"url": "postgresql://db/facelane", "master_key": "env:KEY"}
    made, target = written(
        tmp_path, 1, {"store": store, "server": {"reflection": False}}, "0.0.0.0:50151",
        "192.0.2.7:9161",
    )  # fmt: skip
    assert made["store"] == store
    assert "gallery" not in made
    assert made["server"] == {"reflection": False, "listen": f"0.0.0.0:{50152}"}
    assert (target, made["metrics"]["listen"]) == ("192.0.2.7:50152", "192.0.2.7:9162")
    assert not (tmp_path / "state/master.key").exists()
