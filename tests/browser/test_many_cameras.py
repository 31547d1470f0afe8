"""A wall of sixteen cameras, for a minute's pictures: the page does not grow."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

import facelane
from tests.browser.conftest import House, camera, jpeg, serving_console, visit
from tests.browser.test_wall import numbered
from tests.fakes import access_units
from tests.running_server import RunningServer, toml

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(580)]

CAMERAS, RATE = 16, 3
WARM_UP, MINUTE = 20, 60 * RATE
"""Pictures of each camera."""

_PAINTED = """least => { const all = [...document.querySelectorAll('canvas')];
    return all.length === 16 && all.every(one => +one.dataset.painted >= least); }"""


def heap(session: Any) -> int:
    """Bytes of JavaScript's heap, once what nobody holds is gone."""
    for _ in range(3):
        session.send("HeapProfiler.collectGarbage")
    return int(session.send("Runtime.getHeapUsage")["usedSize"])


def test_sixteen_cameras_for_a_minute_do_not_grow_the_heap(
    chromium: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("many")
    stills = [facelane.Picture.encoded(jpeg(numbered(number))) for number in range(16)]
    units = access_units.encode(map(numbered, range(20)), "h264", g="20", bf="0")
    video = [facelane.Picture.access_unit(unit, "h264") for unit in units]
    with (
        RunningServer(folder, toml(folder, extra="[limits]\nmin_fps = 0.0\n")) as server,
        contextlib.ExitStack() as stack,
    ):
        server.wait_serving()
        url = stack.enter_context(serving_console(folder, server.target))
        for number in range(CAMERAS):
            shown = video if number % 4 == 0 else stills
            stack.enter_context(camera(server, "", f"camera-{number:02}", shown, every_s=1 / RATE))
        house = House(server, url, {"anybody": ""}, folder / "console.log")
        with visit(chromium, house, "anybody", viewport={"width": 1920, "height": 1080}) as page:
            page.set_default_timeout(480_000)
            session = page.context.new_cdp_session(page)
            page.wait_for_function(_PAINTED, arg=WARM_UP)
            before = heap(session)
            page.wait_for_function(_PAINTED, arg=WARM_UP + MINUTE)
            after = heap(session)
    assert after <= 1.2 * before, f"{before} -> {after} bytes"
