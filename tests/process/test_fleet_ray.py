"""A fleet on three nodes of Ray with real servers, bridges and cameras: what becomes of cameras and
their frames when nodes and the supervisor come and go. Figures are `python -m bench fleet`'s."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from bench.fleet_rig import Rig
from tests.fakes.cameras import jpeg

if find_spec("ray") is None:  # which takes seconds to import
    pytest.skip("needs facelane[fleet]", allow_module_level=True)

CAMERAS = 12
WAIT_S = 150.0
"""Without a step of the fleet towards what is waited for."""
# A process beside each server instead of three: three nodes share what this machine has.
SERVER = {
    "pools": {
        stage: {"model": f"null-{stage}", "isolation": "thread"}
        for stage in ("detector", "recognizer", "liveness")
    },
    "log": {"level": "warning"},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    # Ray's own.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder: Path = tmp_path_factory.mktemp("fleet")
    made = Rig(folder, cameras=CAMERAS, nodes=3, fps=1.0, picture=jpeg(), server=SERVER)
    with made:
        made.up()
        made.wait(lambda: even(made), WAIT_S, "an even spread")
        yield made
    gc.collect()


def even(rig: Rig) -> bool:
    """Whether all stream, and no node has more than one camera more than another."""
    status = rig.status()
    if status is None or not rig.streaming():
        return False
    spread = rig.spread()
    counts = [spread.get(one.name, 0) for one in status.nodes if one.state == "UP"]
    return bool(counts) and max(counts) - min(counts) <= 1


def check_books(rig: Rig) -> None:
    """No camera had two readers; every frame that was told of has one outcome or is under way."""
    rig.wait(rig.streaming, WAIT_S, "results of all")
    for camera in rig.look().values():
        assert camera.balanced, camera
        assert 0 < camera.total.frames <= rig.simulated.given[camera.name]
        assert camera.total.results > 0
    assert set(rig.simulated.most_readers.values()) == {1}


def test_a_lost_nodes_cameras_give_results_elsewhere_and_one_that_comes_takes_its_share(
    rig: Rig,
) -> None:
    before = rig.look()
    lost = [name for name, one in before.items() if one.node == "n2"]
    assert len(lost) == CAMERAS // 3
    killed = time.time()
    rig.kill_node("n2")
    rig.wait(lambda: rig.streaming(since=killed), WAIT_S, "results of all")
    rig.wait(lambda: "n2" not in rig.spread(), WAIT_S, "the node to be gone")
    after = rig.look()
    assert {after[name].node for name in lost} <= {"n0", "n1"}
    for name, one in after.items():
        assert one.lost_runs == (name in lost)
        if name not in lost:
            # The others are where they were, in the same stream.
            assert (one.node, one.term) == (before[name].node, before[name].term)
    check_books(rig)

    there = rig.look()
    rig.add_node()
    rig.wait(lambda: even(rig) and len(rig.spread()) == 3, WAIT_S, "an even spread")
    moved = {name for name, one in rig.look().items() if one.term != there[name].term}
    assert moved == {name for name, one in rig.look().items() if one.node == "n2"}
    check_books(rig)


def test_a_drained_node_is_empty_until_it_takes_cameras_again(rig: Rig) -> None:
    done = rig.command("drain", "n1")
    assert done.returncode == 0, done.stderr
    rig.wait(lambda: "n1" not in rig.spread() and rig.streaming(), WAIT_S, "an empty node")
    states = {node["name"]: node["state"] for node in rig.as_json()["nodes"]}
    assert states["n1"] == "DRAINING"
    check_books(rig)
    assert rig.command("drain", "--undo", "n1").returncode == 0
    rig.wait(lambda: even(rig), WAIT_S, "an even spread")


def test_a_camera_is_moved_and_stays(rig: Rig) -> None:
    before = rig.look()["cam-03"]
    target = next(name for name in ("n0", "n1", "n2") if name != before.node)
    assert rig.command("move", "cam-03", target).returncode == 0

    def there() -> bool:
        camera = rig.look()["cam-03"]
        return camera.node == target and camera.stream.results > 0

    rig.wait(there, WAIT_S, "the move")
    camera = rig.look()["cam-03"]
    assert (camera.pinned, camera.runs) == (target, before.runs + 1)
    refused = rig.command("move", "cam-03", "nowhere")
    assert refused.returncode == 1
    assert "n0, n1, n2" in refused.stderr
    assert rig.command("move", "--anywhere", "cam-03").returncode == 0
    check_books(rig)


def test_the_fleet_goes_on_when_its_supervisor_is_killed(rig: Rig) -> None:
    rig.wait(lambda: even(rig), WAIT_S, "an even spread")
    before = rig.look()
    old, killed = rig.kill_supervisor(), time.time()

    def again() -> bool:
        status = rig.status()
        return status is not None and status.recovered and status.supervisor_pid != old

    rig.wait(again, WAIT_S, "another supervisor")
    rig.wait(lambda: rig.streaming(since=killed), WAIT_S, "results of all")
    after = rig.look()
    assert {name: one.term for name, one in after.items()} == {
        name: one.term for name, one in before.items()
    }
    # Their books are those of before, and more.
    assert all(one.total.frames >= before[name].total.frames for name, one in after.items())
    check_books(rig)


def test_another_configuration_and_what_people_see(rig: Rig) -> None:
    names = rig.names()
    rig.write(names[:6])
    rig.up()
    rig.wait(lambda: sorted(rig.look()) == names[:6], WAIT_S, "fewer cameras")
    rig.wait(
        lambda: not any(rig.simulated.readers(name) for name in names[6:]), WAIT_S, "their ends"
    )
    rig.write()
    rig.up()
    rig.wait(lambda: even(rig), WAIT_S, "all of them again")
    done = rig.command("status", "--check")
    assert done.returncode == 0, done.stdout
    assert f"{CAMERAS} cameras, 3 nodes" in done.stdout
    shown = json.loads(rig.command("status", "--json").stdout)
    assert {one["name"] for one in shown["cameras"]} == set(names)
    nobody = rig.command("status", "--fleet", "other")
    assert nobody.returncode == 4
    assert "facelane-fleet up" in nobody.stderr
    rig.config.write_text("[flet]")
    wrong = rig.command("up", str(rig.config))
    assert wrong.returncode == 2
    assert "did you mean" in wrong.stderr
    # A node with two cards has two servers, which see one each.
    name = rig.add_node(cards=2)

    def servers() -> list[tuple[str, str]]:
        status = rig.status()
        nodes = [one for one in status.nodes if one.name == name] if status is not None else []
        return [(one.card, one.state) for node in nodes for one in node.servers]

    rig.wait(lambda: servers() == [("0", "SERVING"), ("1", "SERVING")], WAIT_S, "two servers")
    done = rig.command("down")
    assert done.returncode == 0, done.stderr
    assert rig.status() is None
    assert not any(rig.simulated.readers(name) for name in names)
