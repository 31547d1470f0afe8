"""The console behind nginx: the example of deploy/ carries all of it, and what nginx does as it
comes is said in words that lead to the mistake."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import connect
from websockets.typing import Origin

from tests.cases.test_24_behind_proxies import ROOT, needs, nginx, swap, tls  # noqa: F401
from tests.fakes import scripted_server as fake
from tests.running_server import free_port
from tests.waiting import until

NAME = "facelane.example"


@contextmanager
def console(*words: str) -> Iterator[int]:
    """Its port."""
    port = free_port()
    with fake.ScriptedServer() as server:
        start = [sys.executable, "-m", "facelane_console", "--target", server.target]
        process = subprocess.Popen([*start, "--listen", f"127.0.0.1:{port}", *words])

        def answers() -> bool:
            assert process.poll() is None
            try:
                return ask(http.client.HTTPConnection("127.0.0.1", port), "GET", "/")[0] == 200
            except OSError:
                return False

        try:
            until(answers, what="the console")
            yield port
        finally:
            process.kill()
            process.wait(60)


def ask(
    way: http.client.HTTPConnection, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, bytes, Any]:
    try:
        way.request(method, path, body or None, headers)
        answer = way.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        way.close()


@needs["nginx"]
@needs["openssl"]
def test_the_example_carries_all_of_it(tls: Path, tmp_path: Path) -> None:  # noqa: F811
    port = free_port()
    with console("--name", NAME, "--behind-tls") as inner:
        text = swap(
            (ROOT / "deploy/nginx/facelane-console.conf").read_text(),
            {
                "listen 443": f"listen 127.0.0.1:{port}",
                "console.example": NAME,
                ":9160;": f":{inner};",
                "/etc/facelane/tls": str(tls),
            },
        )
        trusting = ssl.create_default_context(cafile=str(tls / "server.pem"))
        trusting.check_hostname = False  # the name of the address is this machine's
        site = f"https://{NAME}:{port}"

        def browser(method: str, path: str, body: bytes = b"", **more: str) -> Any:
            way = http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=trusting)
            return ask(way, method, path, body, Host=f"{NAME}:{port}", Origin=site, **more)

        with nginx(text, port, tmp_path):
            status, _, headers = browser("GET", "/")
            assert status == 200
            assert f"wss://{NAME}:{port}" in headers["Content-Security-Policy"]
            assert "Strict-Transport-Security" in headers
            status, said, headers = browser("POST", "/api/login", b'{"key": ""}')
            assert status == 200, said
            cookie = headers["Set-Cookie"]
            assert cookie.startswith("__Host-")
            assert "Secure" in cookie
            known = {"Cookie": cookie.split(";")[0], "X-CSRF-Token": json.loads(said)["csrf"]}
            # A photo to enrol is larger than nginx lets through by itself.
            status, said, _ = browser("POST", "/api/people/ada/faces", bytes(3 << 20), **known)
            assert status != 413, said
            assert b"nginx" not in said
            with connect(
                f"wss://{NAME}:{port}/api/events/live",
                sock=socket.create_connection(("127.0.0.1", port), 60),
                ssl=trusting,
                server_hostname=NAME,
                origin=Origin(site),
                additional_headers={"Cookie": known["Cookie"]},
                open_timeout=60,
            ) as live:
                assert live.response is not None
                assert live.response.status_code == 101


@needs["nginx"]
def test_what_nginx_does_as_it_comes_is_said(tmp_path: Path) -> None:
    port = free_port()
    with console() as inner:
        passes = f"location / {{ proxy_pass http://127.0.0.1:{inner}; }}"
        block = f"server {{ listen 127.0.0.1:{port}; {passes} }}"
        with nginx(block, port, tmp_path):
            way = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            status, said, _ = ask(
                way, "POST", "/api/login", b'{"key": ""}', Origin=f"http://127.0.0.1:{port}"
            )
    assert status == 403
    told = json.loads(said)
    assert told["reason"] == "FOREIGN_ORIGIN"
    assert "pass the Host on" in told["message"]
    assert "--name" in told["message"]


def test_both_at_once_are_refused() -> None:
    words = ["--behind-tls", "--cert", "/x", "--key", "/x"]
    done = subprocess.run(
        [sys.executable, "-m", "facelane_console", *words],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "leave --cert and --key out" in done.stderr
