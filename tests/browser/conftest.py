"""One server with the models that ship, a camera, a console and a browser, for all these tests."""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import facelane
from facelane_bridge import demo_clip
from facelane_server.edge.auth import new_key
from facelane_server.models.catalog import SHIPPED
from tests.portraits import HOPPER
from tests.running_server import RunningServer, free_port, toml
from tests.waiting import until

VIEWPORT = {"width": 1280, "height": 800}
CHROMIUM = Path("/usr/bin/chromium")
POOLS = """
[pools.detector]
model = "facelane-detector"
[pools.recognizer]
model = "facelane-recognizer"
[pools]
liveness = false
"""


def portrait() -> np.ndarray:
    return cv2.imread(str(HOPPER))


def jpeg(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", pixels)[1].tobytes()


@functools.cache
def _clip() -> demo_clip.Camera:
    return demo_clip.Camera()


def clip_picture(number: int) -> np.ndarray:
    """Of the demo's clip, which is rendered: 0-69 Grace Hopper, 70-139 Eileen Collins."""
    return _clip().frame(number)


@dataclass(frozen=True)
class House:
    server: RunningServer
    url: str
    keys: dict[str, str]
    log: Path

    def client(self) -> facelane.Client:
        return self.server.client(token=self.keys["boss"])


# Until the last of these tests, no longer: as long as Playwright drives a browser, its event loop
# is this thread's, and no test of asyncio's can follow.
@pytest.fixture(scope="package")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    if not CHROMIUM.exists():
        pytest.skip("no Chromium here: apt-get install chromium")
    pytest.importorskip("playwright", reason="no playwright here: pip install playwright")
    if not (SHIPPED[0] / "facelane-recognizer").is_dir():
        pytest.skip("no starter models in this tree")
    folder = tmp_path_factory.mktemp("console")
    keys, entries = {}, []
    for name, scopes in (("boss", ("analyze", "gallery", "admin", "reassign")), ("guard", ())):
        roles = () if scopes else ("guard",)
        keys[name], key = new_key(name, scopes, roles=roles)  # type: ignore[arg-type]
        entries.append(key.entry())
    entries.append('[[roles]]\nname = "guard"\nverbs = ["view", "events", "identify"]\n')
    (folder / "keys.toml").write_text("\n".join(entries))
    extra = (
        f'[limits]\nmin_fps = 0.0\n[auth]\nmode = "keys"\nkeys_file = "{folder}/keys.toml"\n'
        '[events]\npictures = "all"\n[tracking]\nreinference_interval_s = 0.5\n'
    )
    with (
        RunningServer(folder, toml(folder, POOLS, extra)) as server,
        contextlib.ExitStack() as stack,
    ):

        def serving() -> bool:
            with server.client(token=keys["boss"], timeout=2.0) as client:
                try:
                    return client.health() == "SERVING"
                except facelane.FacelaneError:
                    return False

        until(serving, 120, "SERVING")
        url = stack.enter_context(serving_console(folder, server.target))
        # To the right and back: without a leap, she is one track.
        numbers = [*range(0, 70, 2), *range(68, 0, -2)]
        shown = [facelane.Picture.encoded(jpeg(clip_picture(number))) for number in numbers]
        stack.enter_context(camera(server, keys["boss"], "door", shown, every_s=0.1))
        yield House(server, url, keys, folder / "console.log")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def serving_console(folder: Path, target: str) -> Iterator[str]:
    """A console of a server; its address. What it says is in ``console.log``."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "console.log").open("w"))
        console = subprocess.Popen(
            [sys.executable, "-m", "facelane_console", "--target", target,
             "--listen", f"127.0.0.1:{port}"],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        stack.callback(console.wait, 30)
        stack.callback(console.terminate)
        until(lambda: listens(port), what="the console")
        yield f"http://127.0.0.1:{port}/"


@contextlib.contextmanager
def camera(
    server: RunningServer,
    key: str,
    source: str,
    pictures: Sequence[facelane.Picture],
    *,
    every_s: float = 0.04,
) -> Iterator[None]:
    """A camera that shows the pictures over and over, until the block is left. Pictures that a
    stream has no room for are left out."""
    over = threading.Event()

    def send() -> None:
        with (
            server.client(token=key or None) as client,
            client.analyze_stream(source_id=source) as stream,
        ):
            for picture in itertools.cycle(pictures):
                if over.wait(every_s):
                    return
                stream.try_send(picture)
                with contextlib.suppress(facelane.DeadlineExceededError):
                    while stream.recv(timeout=0.0) is not None:
                        pass

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(60)


@pytest.fixture(scope="package")
def webcam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Chromium's own camera sees: Eileen Collins, as motion JPEG."""
    still = jpeg(clip_picture(100))
    path = tmp_path_factory.mktemp("webcam") / "collins.mjpeg"
    path.write_bytes(still * 4)
    return path


@pytest.fixture(scope="package")
def chromium(house: House, webcam: Path) -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=str(CHROMIUM),
            args=["--no-sandbox", "--disable-gpu", "--use-fake-device-for-media-stream",
                  "--use-fake-ui-for-media-stream", f"--use-file-for-fake-video-capture={webcam}"],
        )  # fmt: skip
        yield browser
        browser.close()


WAIT_MS = 90_000


@pytest.fixture
def page(chromium: Any, house: House) -> Iterator[Any]:
    """Logged in as who may all. What the page's Content-Security-Policy forbids fails the test."""
    with visit(chromium, house, "boss") as made:
        yield made


@contextlib.contextmanager
def visit(
    chromium: Any,
    house: House,
    who: str,
    *,
    script: str = "",
    key: str = "Facelane key",
    **options: Any,
) -> Iterator[Any]:
    """A page of a browser that nobody has used before. ``script``: runs before the page's own;
    ``key``: as the field is called in the browser's language."""
    context = chromium.new_context(**{"viewport": VIEWPORT, "locale": "en-GB"} | options)
    if script:
        context.add_init_script(script)
    made = context.new_page()
    made.set_default_timeout(WAIT_MS)
    problems: list[str] = []
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on(
        "console",
        lambda said: problems.append(said.text) if "Content Security" in said.text else None,
    )
    log_in(made, house, who, key)
    yield made
    context.close()
    assert problems == []


def log_in(page: Any, house: House, who: str, key: str = "Facelane key") -> None:
    page.goto(house.url)
    page.get_by_label(key).fill(house.keys[who])
    page.keyboard.press("Enter")
    page.get_by_role("navigation").wait_for()


def view(page: Any, name: str) -> None:
    page.get_by_role("navigation").get_by_role("link", name=name).click()
    page.get_by_role("heading", name=name, exact=True).wait_for()
