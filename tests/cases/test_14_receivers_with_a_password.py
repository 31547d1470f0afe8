"""User and password in a webhook's address reach its receiver, whatever they are made of."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from facelane_events import config
from facelane_events.message import Message
from facelane_events.sinks.webhook import WebhookSink


@pytest.fixture
def receiver() -> Iterator[tuple[int, list[tuple[str, Any]]]]:
    """Its port, and the path and the headers of what it was sent."""
    asked: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, self.headers))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield server.server_port, asked
    server.shutdown()
    serving.join(60)
    server.server_close()


async def send(url: str, **headers: str) -> None:
    sink = WebhookSink(config.Webhook(name="w", url=url, headers=headers))
    await sink.open()
    try:
        await sink.send(Message("1", "SUBJECT_SEEN", "door", None, b"{}"))
    finally:
        await sink.close()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("ada:secret", "ada:secret"),
        ("ada%40home:p%3Aw%2F%20%25", "ada@home:p:w/ %"),
        ("josé:pä", "josé:pä"),
        ("ada", "ada:"),
    ],
)
async def test_what_is_in_the_address(receiver: Any, written: str, meant: str) -> None:
    port, asked = receiver
    await send(f"http://{written}@127.0.0.1:{port}/a b?c=ü")
    [(path, headers)] = asked
    assert path == "/a%20b?c=%C3%BC"
    assert headers["Authorization"] == "Basic " + base64.b64encode(meant.encode()).decode()


@pytest.mark.parametrize("name", ["Authorization", "authorization"])
async def test_a_header_that_is_given_counts_instead(receiver: Any, name: str) -> None:
    port, asked = receiver
    await send(f"http://ada:x@127.0.0.1:{port}/", **{name: "Bearer y"})
    assert asked[0][1].get_all("Authorization") == ["Bearer y"]


async def test_without_any_nothing_is_sent(receiver: Any) -> None:
    port, asked = receiver
    await send(f"http://127.0.0.1:{port}/")
    assert "Authorization" not in asked[0][1]
