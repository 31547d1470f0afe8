"""Which bridge of a node has which camera; no bridge is begun here."""

from __future__ import annotations

import threading

import pytest

from facelane_bridge.config import CameraSettings, ServerSettings
from facelane_bridge.hosting import HostedCamera
from facelane_fleet.messages import Order, ServersOrder
from facelane_fleet.processes import Backoff
from facelane_fleet.readers import Reader, Readers


def order(*cameras: str) -> Order:
    return Order(
        revision=1,
        cameras=tuple(
            HostedCamera(
                term=1,
                camera=CameraSettings(name=name, source=f"http://192.0.2.1/{name}"),
                server=ServerSettings(target="unix:/x"),
            )
            for name in cameras
        ),
        servers=ServersOrder(count=0, config={}, listen="unix", metrics="", state_dir="", ask={}),
        cameras_per_bridge=1,
        lease=5.0,
        silence=60.0,
    )


def test_a_camera_that_comes_back_finds_a_bridge_though_its_own_ended_in_that_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Backoff, "due", lambda _self, _now: False)
    readers = Readers(-1, threading.Lock())
    readers.step(order("door", "yard"), ours=True)
    ending = readers._all[1]
    ending.out = {"yard": 1}  # until its bridge says, or ends, while the next order is followed
    step = Reader.step

    def told(self: Reader, lease: float, now: float) -> None:
        self.out.clear()
        step(self, lease, now)

    monkeypatch.setattr(Reader, "step", told)
    readers.step(order("door"), ours=True)
    assert len(readers._all) == 1
    for _ in range(2):
        readers.step(order("door", "yard"), ours=True)
    assert [[one.camera.name for one in reader.wanted] for reader in readers._all] == [
        ["door"],
        ["yard"],
    ]
