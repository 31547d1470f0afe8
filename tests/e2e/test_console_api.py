"""The console's server before a real one, without a browser: its API, its sockets, who may not."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pytest
from tests.e2e import wire
from tests.fakes import access_units
from tests.running_server import RunningServer, free_port
from tests.waiting import until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import facelane


@dataclass
class Browser:
    """What the page does: a cookie, a token, its own origin."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes, Any]:
        request = urllib.request.Request(
            self.url + path, method=method, data=body,
            headers={"origin": self.url.rstrip("/"), **self.headers},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return int(answer.status), answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    def told(self, path: str) -> Any:
        status, said, _ = self.ask("GET", path)
        assert status == 200, said
        return json.loads(said)

    def log_in(self) -> dict[str, bool]:
        status, said, headers = self.ask("POST", "api/login", b'{"key": ""}')
        assert status == 200, said
        self.headers["cookie"] = headers["set-cookie"].split(";")[0]
        answer = json.loads(said)
        self.headers["x-csrf-token"] = answer["csrf"]
        may: dict[str, bool] = answer["may"]
        return may

    @contextlib.contextmanager
    def looking(self, path: str) -> Iterator[Any]:
        with connect(
            self.url.replace("http", "ws") + path,
            origin=self.url.rstrip("/"),  # type: ignore[arg-type]
            additional_headers={"cookie": self.headers["cookie"]},
            open_timeout=60, max_size=None,
        ) as socket:  # fmt: skip
            yield socket


@pytest.fixture(scope="module")
def browser(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = tmp_path_factory.mktemp("console") / "log"
    port = free_port()
    with path.open("w") as log:
        console = subprocess.Popen(
            [sys.executable, "-m", "facelane_console", "--target", server.target,
             "--listen", f"127.0.0.1:{port}"],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        made = Browser(f"http://127.0.0.1:{port}/")
        until(lambda: _answers(made), 60, "the console")
        assert all(made.log_in().values())
        yield made
    finally:
        console.terminate()
        console.wait(30)
    assert "Traceback" not in path.read_text()


def _answers(browser: Browser) -> bool:
    try:
        return browser.ask("GET", "")[0] in (200, 503)
    except OSError:
        return False


@contextlib.contextmanager
def playing(
    client: facelane.Client, source: str, pictures: list[facelane.Picture]
) -> Iterator[None]:
    over = threading.Event()

    def send() -> None:
        with client.analyze_stream(source_id=source) as stream:
            number = 0
            while not over.wait(0.02):
                stream.send(pictures[number % len(pictures)], timeout=50.0)
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


def message(data: str | bytes) -> tuple[dict[str, Any], bytes]:
    assert isinstance(data, bytes)
    (size,) = struct.unpack_from(">I", data)
    return json.loads(data[4 : 4 + size]), data[4 + size :]


def test_pictures_come_with_what_was_found_in_them(
    browser: Browser, client: facelane.Client
) -> None:
    sent = [wire.picture(number) for number in range(3)]
    with playing(client, "console-door", sent):
        until(lambda: "console-door" in [one["source"] for one in browser.told("api/streams")])
        with browser.looking("api/live?source=console-door") as socket:
            # A browser asks for it, too; pictures grow by it, and it costs a core for a wall.
            assert socket.protocol.extensions == [], "nothing is compressed twice"
            for _ in range(3):
                told, picture = message(socket.recv(60))
                assert told["encoding"] == "jpeg"
                assert picture in [one.data for one in sent]
                assert told["faces"]
        assert "console-door" in [one["source"] for one in browser.told("api/system")["cameras"]]


def test_video_is_decoded_for_who_cannot(browser: Browser, client: facelane.Client) -> None:
    units = access_units.clip("h265", 20)
    video = [facelane.Picture.access_unit(unit, "h265") for unit in units]
    with playing(client, "console-yard", video):
        until(lambda: "console-yard" in [one["source"] for one in browser.told("api/streams")])
        with browser.looking("api/live?source=console-yard") as socket:
            told, unit = message(socket.recv(60))
            assert told["encoding"] == "h265"
            assert unit in units
        with browser.looking("api/live?source=console-yard&as=jpeg") as socket:
            told, picture = message(socket.recv(60))
            assert (told["encoding"], told["decoded"]) == ("jpeg", "h265")
            assert told["faces"]
            shown = cv2.imdecode(np.frombuffer(picture, np.uint8), 1)
            assert shown.shape == (240, 320, 3)


def test_people_are_enrolled_exported_and_erased(browser: Browser) -> None:
    picture = wire.picture(1).data
    path = "api/people/console-ann"
    status, said, _ = browser.ask("POST", f"{path}/faces?name=Ann", picture)
    assert status == 200, said
    assert json.loads(said)["display_name"] == "Ann"
    [face] = browser.told(path)["faces"]
    assert 0 <= face["quality"] <= 1
    found = browser.told("api/people?q=CONSOLE-a")
    assert ([one["id"] for one in found["people"]], found["more"]) == (["console-ann"], False)
    status, said, _ = browser.ask("POST", "api/people/console-bob/faces", wire.picture(2).data)
    assert status == 200, said
    found = browser.told("api/people?q=console-&most=1")
    assert ([one["id"] for one in found["people"]], found["more"]) == (["console-ann"], True)
    assert browser.ask("DELETE", "api/people/console-bob")[0] == 200
    status, made, headers = browser.ask("GET", f"{path}/copy")
    assert (status, headers["content-type"]) == (200, "application/zip")
    assert headers["cache-control"] == "no-store"
    with zipfile.ZipFile(io.BytesIO(made)) as archive:
        record = json.loads(archive.read("subject.json"))
        assert record["display_name"] == "Ann"
        assert [one["id"] for one in record["faces"]] == [face["id"]]
        assert record["left_out"] == []
        assert json.loads(archive.read("events.json")) == []
    status, said, _ = browser.ask("DELETE", path)
    assert status == 200
    assert json.loads(said)["templates"] == 1
    assert browser.ask("GET", path)[0] == 404
    assert browser.ask("GET", f"{path}/copy")[0] == 404


def test_events_are_heard_as_they_happen_and_acknowledged(
    browser: Browser, client: facelane.Client
) -> None:
    with browser.looking("api/events/live") as socket:
        assert json.loads(socket.recv(60)) == {}, "from here on none is missed"
        with client.analyze_stream(source_id="console-gate") as stream:
            stream.close_send()
            assert list(stream) == []
        while (told := json.loads(socket.recv(60)))["source"] != "console-gate":
            pass
    assert told["kind"] == "STREAM_OPENED"
    number = told["sequence"]
    assert browser.ask("POST", f"api/events/{number}/acknowledge", b"{}")[0] == 200
    page = browser.told("api/events?source=console-gate&kind=STREAM_OPENED")
    assert [(one["sequence"], one["known"]) for one in page["events"]] == [(number, True)]


def test_who_is_not_logged_in_or_asks_for_nonsense(browser: Browser) -> None:
    stranger = Browser(browser.url)
    assert stranger.ask("GET", "api/people")[0] == 401
    no_token = Browser(browser.url, {"cookie": browser.headers["cookie"]})
    assert no_token.ask("DELETE", "api/people/anybody")[0] == 403
    elsewhere = Browser(browser.url, {**browser.headers, "origin": "http://elsewhere.example"})
    assert elsewhere.ask("GET", "api/people")[0] == 403
    for path in ("api/events?before=x", "api/events?kind=NOTHING"):
        assert browser.ask("GET", path)[0] == 400
    with (
        browser.looking("api/live?source=nobody-sends-this") as socket,
        pytest.raises(ConnectionClosed, match="4404"),
    ):
        socket.recv(60)
