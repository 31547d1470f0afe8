"""A fleet on nodes that `ray start` has begun, as docs/fleet.md has it: real processes of Ray."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from bench.fleet_rig import Rig
from tests.fakes.cameras import jpeg

if find_spec("ray") is None:  # which takes seconds to import
    pytest.skip("needs facelane[fleet]", allow_module_level=True)

WAIT_S = 200.0


@pytest.mark.slow(last=True)
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_lost_machines_cameras_go_elsewhere_and_come_back_to_a_new_one(tmp_path: Path) -> None:
    with Rig(tmp_path, cameras=6, nodes=2, fps=2.0, picture=jpeg(), bare=True) as rig:
        rig.up()
        rig.wait(lambda: rig.spread() == {"n0": 3, "n1": 3}, WAIT_S, "an even spread")
        killed = time.time()
        rig.kill_node("n1")
        rig.wait(lambda: rig.streaming(since=killed), WAIT_S, "results of all")
        rig.wait(lambda: rig.spread() == {"n0": 6}, WAIT_S, "the node to be gone")
        rig.add_node()
        rig.wait(lambda: rig.spread() == {"n0": 3, "n1": 3}, WAIT_S, "an even spread")
        for camera in rig.look().values():
            assert camera.balanced, camera
            assert 0 < camera.total.results <= camera.total.frames
        assert set(rig.simulated.most_readers.values()) == {1}
