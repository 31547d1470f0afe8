"""The console without a browser: sessions, origins, its command, and what was built of its page."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from facelane_console import cli, sessions
from facelane_console.guard import same_origin
from facelane_console.sessions import Sessions

ROOT = Path(__file__).resolve().parents[2]
PORT = "port"
EVERYWHERE = f"0.0.0.0:{443}"
WEB = ROOT / "clients/facelane_console/web"


def test_the_page_is_built_of_the_sources_that_are_here() -> None:
    """No node is needed for that: `make console` writes down what it has made of what."""
    spec = importlib.util.spec_from_file_location("console_hash", WEB / "hash.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = json.loads(module.MANIFEST.read_text())
    assert written == module.described(), "run `make console`"
    size = sum(path.stat().st_size for path in module.MANIFEST.parent.rglob("*"))
    assert size <= 1_500_000


def test_the_page_asks_nobody_else() -> None:
    page = (ROOT / "clients/facelane_console/static/index.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "<style" not in page
    assert "<script>" not in page
    assert "onload=" not in page


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_session_ends_when_it_is_not_used_and_in_any_case() -> None:
    clock = Clock()
    held: Sessions[str] = Sessions(clock)
    begun = held.begin("client", {})
    assert begun is not None
    word, session = begun
    assert held.find("another") is None
    assert session.accepts(session.csrf)
    assert not session.accepts("")
    clock.now += sessions.IDLE_S - 1
    assert held.find(word) is session
    clock.now += sessions.IDLE_S + 1
    assert held.find(word) is None
    assert [one.client for one in held.over()] == ["client"]
    assert len(held) == 0
    word, session = held.begin("again", {}) or ("", session)
    while clock.now - session.began <= sessions.LONGEST_S:
        assert held.find(word) is session
        clock.now += sessions.IDLE_S / 2
    assert held.find(word) is None


def test_there_are_no_more_than_there_is_room_for_and_no_guessing() -> None:
    clock = Clock()
    held: Sessions[int] = Sessions(clock)
    words = {(held.begin(n, {}) or ("",))[0] for n in range(sessions.MOST)}
    assert len(words) == sessions.MOST
    assert held.begin(0, {}) is None
    for _ in range(sessions.TRIES):
        assert held.may_try
        held.failed()
    assert not held.may_try
    clock.now += sessions.TRIES_S
    assert held.may_try


@pytest.mark.parametrize(
    ("host", "origin", "ours"),
    [
        ("localhost:{port}", "http://localhost:{port}", True),
        ("localhost:{port}", None, True),
        ("localhost:{port}", "http://evil.example", False),
        ("localhost:{port}", "http://localhost", False),
        ("localhost:{port}", "null", False),
        ("evil.example:{port}", "http://evil.example:{port}", False),
        ("", None, False),
    ],
)
def test_requests_come_from_the_page_itself(host: str, origin: str | None, ours: bool) -> None:
    host = host.format(port=PORT)
    origin = origin and origin.format(port=PORT)
    headers = {"host": host} if origin is None else {"host": host, "origin": origin}
    assert same_origin(Headers(headers), frozenset({"localhost"})) is ours


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--listen", EVERYWHERE], "unencrypted"),
        (["--listen", "nowhere"], "HOST:PORT"),
        (["--listen", EVERYWHERE, "--cert", "c.pem"], "go together"),
    ],
)
def test_off_loopback_there_is_tls_or_nothing(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        cli.build(cli.parser().parse_args(arguments))


def test_nobody_acts_with_a_key_of_the_consoles_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELANE_TOKEN", "secret")
    console, host, port = cli.build(cli.parser().parse_args(["--target", "unix:/nowhere"]))
    assert cli.is_loopback(host)
    assert port
    assert console._connect("")._endpoint.bearer.held == ()
