"""Liveness is calibrated from what a real server has told of a source's tracks."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tests.e2e import wire
from tests.running_server import RunningServer, toml
from tests.waiting import until
from typer.testing import CliRunner

from facelane_server import calibrating
from facelane_server.liveness import records

TRACKS = 60


@pytest.mark.slow
def test_from_a_server_s_own_tracks_to_its_next_reload(tmp_path: Path) -> None:
    with RunningServer(tmp_path, toml(tmp_path)) as server:
        server.wait_serving()
        with server.client() as client:
            for _ in range(TRACKS):
                list(client.analyze([wire.picture()], source_id="door"))

            def ended() -> int:
                asked = {"kinds": ["TRACK_ENDED"], "source_ids": ["door"], "page_size": 200}
                return len(client.list_events(**asked)[0])

            until(lambda: ended() >= TRACKS, what="the tracks' ends in the store")
        command = ["calibrate", "door", "--config", str(server.config)]
        told = CliRunner().invoke(calibrating.app, command)
        assert told.exit_code == 0, told.output
        # The null model is sure of everybody: the threshold rises, half of the way to 1.
        assert records.read(tmp_path / "state")["door"].band.live == 0.95
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "config reloaded" in server.text(), what="the reload")
        assert '"liveness"' in server.text()
        (tmp_path / "state" / records.NAME).write_text("{")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "config not reloaded" in server.text(), what="a refused reload")
        assert "Traceback" not in server.text()
