"""One server with the models that ship, a camera, a console and a browser, for all these tests."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib as mpl
import numpy as np
import pytest
from tests.running_server import RunningServer, free_port, toml
from tests.waiting import until

import facelane
from facelane_server.edge.auth import new_key
from facelane_server.models.catalog import SHIPPED

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
    return cv2.imread(str(Path(mpl.get_data_path()) / "sample_data/grace_hopper.jpg"))


def jpeg(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", pixels)[1].tobytes()


@dataclass(frozen=True)
class House:
    server: RunningServer
    url: str
    keys: dict[str, str]
    log: Path

    def client(self) -> facelane.Client:
        return self.server.client(token=self.keys["boss"])


@pytest.fixture(scope="session")
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
        f'[auth]\nmode = "keys"\nkeys_file = "{folder}/keys.toml"\n'
        '[events]\npictures = "all"\n[tracking]\nreinference_interval_s = 0.5\n'
    )
    port = free_port()
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
        log = stack.enter_context((folder / "console.log").open("w"))
        console = subprocess.Popen(
            [sys.executable, "-m", "facelane_console", "--target", server.target,
             "--listen", f"127.0.0.1:{port}"],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        stack.callback(console.wait, 30)
        stack.callback(console.terminate)
        stack.enter_context(camera(server, keys["boss"]))
        yield House(server, f"http://127.0.0.1:{port}/", keys, folder / "console.log")


@contextlib.contextmanager
def camera(server: RunningServer, key: str, source: str = "door") -> Iterator[None]:
    """Grace Hopper, who wanders a little, as JPEG."""
    over = threading.Event()
    face = cv2.resize(portrait(), (256, 300))
    frames = []
    for step in range(24):
        picture = np.full((360, 640, 3), 70, np.uint8)
        x = 60 + 8 * step
        picture[30:330, x : x + 256] = face
        frames.append(facelane.Picture.encoded(jpeg(picture)))

    def send() -> None:
        with server.client(token=key) as client, client.analyze_stream(source_id=source) as stream:
            number = 0
            while not over.wait(0.04):
                at = number % 46
                stream.try_send(frames[at if at < 24 else 46 - at])
                number += 1
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


@pytest.fixture(scope="session")
def chromium(house: House) -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()
