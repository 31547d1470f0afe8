"""``make demo WEB=1``: the console on the demo's clip, as the README shows it."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import VIEWPORT, WAIT_MS
from tests.e2e.test_demo import servers_in
from tests.waiting import until

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(400)]

_NAMED = """() => { const canvas = document.querySelector('canvas');
    return canvas?.dataset.how === 'webcodecs' && canvas.dataset.names.includes('_'); }"""


def address(said: Path, demo: subprocess.Popen[bytes]) -> str:
    text = said.read_text()
    assert demo.poll() is None, text
    return next((line for line in text.splitlines() if "console: http" in line), "")


def test_the_demo_in_the_console(chromium: Any, tmp_path: Path) -> None:
    said = tmp_path / "said"
    # Short enough for the address of a socket, however long the tests' own folders are called.
    folder = Path(tempfile.mkdtemp(prefix="demo-", dir="/tmp"))
    with said.open("w") as out:
        demo = subprocess.Popen(
            [sys.executable, "-m", "facelane_bridge.demo", "--web"],
            stdout=out, stderr=subprocess.STDOUT,
            # No browser is opened here.
            env={**os.environ, "TMPDIR": str(folder), "BROWSER": "true"},
        )  # fmt: skip
    try:
        line = until(functools.partial(address, said, demo), 200, "the console's address")
        context = chromium.new_context(viewport=VIEWPORT, locale="en-GB")
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(line.split()[1])
        page.get_by_role("button", name="Log in").click()
        # H.264 as the bridge passes it on, and a name of the two.
        page.wait_for_function(_NAMED)
        until(lambda: "The camera goes on" in said.read_text(), 120, "the clip's end")
        assert '"frames": 400' in said.read_text()
        before = int(page.locator("canvas").get_attribute("data-painted"))
        page.wait_for_function(
            "least => +document.querySelector('canvas').dataset.painted > least", arg=before + 5
        )
        context.close()
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 0, said.read_text()[-4000:]
    finally:
        if demo.poll() is None:
            demo.kill()
            demo.wait(30)
    assert servers_in(folder) == []
    assert list(folder.iterdir()) == []
    folder.rmdir()
