"""The console without a browser: sessions, origins, its command, and what was built of its page."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.datastructures import Headers
from uvicorn.server import ServerState

import facelane
from facelane_console import app, cli, patience, sessions, shown
from facelane_console.app import Site
from facelane_console.decoding import CannotDecodeError
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
        assert held.may_try("here")
    assert not held.may_try("here"), "also while nobody knows yet how they end"
    assert held.may_try("there")
    held.succeeded("here")
    assert held.may_try("here")
    clock.now += sessions.TRIES_S
    assert held.may_try("here")
    for n in range(sessions.ALL_TRIES - 1):
        assert held.may_try(f"address {n}")
    assert not held.may_try("one more address")


def test_a_key_does_not_take_the_room_of_others() -> None:
    held: Sessions[int] = Sessions(Clock())
    gone = []
    for n in range(sessions.MOST):
        gone += [session.client for session in held.crowded("a camera's")]
        assert held.begin(n, {}, "a camera's") is not None
    assert gone == list(range(sessions.MOST - sessions.PER_KEY)), "the oldest first"
    assert len(held) == sessions.PER_KEY
    assert held.crowded("an operator's") == []
    assert held.begin(0, {}, "an operator's") is not None


class Asked:
    """An ASGI call of the console, without a network."""

    def __init__(self, console: Site) -> None:
        self._console = console
        self.sent: list[MutableMapping[str, Any]] = []
        """Messages of the last answer."""

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    async def call(
        self,
        method: str,
        path: str,
        *body: bytes | None,
        kind: str = "http",
        cookie: str = "",
        query: str = "",
        csrf: str = "",
    ) -> tuple[int, bytes]:
        """``body``: None = the browser leaves."""
        sent = self.sent = []
        parts = iter(body or (b"",))
        last = object()
        begun = iter([True])

        async def receive() -> MutableMapping[str, Any]:
            if kind == "websocket" and next(begun, False):
                return {"type": "websocket.connect"}
            if kind == "websocket":
                await asyncio.Event().wait()  # the browser stays, and says nothing
            part = next(parts, last)
            if part is last:
                await asyncio.Event().wait()  # nothing more comes
            if part is None:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": part, "more_body": len(body) > 1}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"origin", b"http://localhost")]
        headers += [(b"cookie", f"facelane={cookie}".encode()), (b"x-csrf-token", csrf.encode())]
        scope = {
            "type": kind, "method": method, "path": path, "raw_path": path.encode(),
            "root_path": "", "scheme": "http" if kind == "http" else "ws", "headers": headers,
            "query_string": query.encode(), "client": ("10.0.0.9", 1), "server": ("localhost", 80),
            "http_version": "1.1", "subprotocols": [],
        }  # fmt: skip
        await self._console.app(scope, receive, send)  # raises what the console lets out
        if kind == "websocket":
            return int(sent[-1].get("code", 0)), b""
        return int(sent[0]["status"]), b"".join(m.get("body", b"") for m in sent[1:])


class Nobody:
    """A client that is never asked."""

    async def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        def asked(*_arguments: Any, **_options: Any) -> Any:
            raise AssertionError(f"asked for {name}")

        return asked


def test_a_worker_is_shown_beside_its_budget() -> None:
    ready = facelane.WorkerState.READY
    worker = facelane.WorkerInfo("detector#0", 7, ready, "cuda:0", memory_bytes=400 << 20)
    pool = facelane.PoolInfo(
        "detector",
        facelane.Stage.DETECTOR,
        facelane.PoolState.SERVING,
        workers=(worker,),
        memory_budget_bytes=1 << 30,
    )
    info = facelane.ServerInfo("1.0", None, (), facelane.ServerLimits())
    [told] = shown.system(info, [pool], facelane.HealthStatus.SERVING)["pools"]
    assert (told["workers"][0]["mib"], told["budget"]) == (400, 1024)


@pytest.fixture
def console() -> Site:
    def connect(_key: str) -> Any:
        raise AssertionError("nobody gets so far")

    return Site(connect, hosts=frozenset({"localhost"}), tls=False)


@pytest.mark.parametrize(
    "body",
    [
        (b'{"key": "' + b"x" * 5000 + b'"}',),
        (b"[" * 4000,),
        (b'{"a":' * 800,),
        (b"",),
        (b"null",),
        (b'"key"',),
        (b"\xff\xfe",),
        (b'{"key": ', None),
        (b"x" * 3000, b"x" * 3000),
    ],
    ids=range(9),
)
async def test_a_log_in_is_small_and_says_a_key(console: Site, body: tuple[bytes | None]) -> None:
    status, said = await Asked(console).call("POST", "/api/login", *body)
    assert status == 400
    assert json.loads(said)["reason"] == "ARGUMENT_INVALID"


async def test_a_log_in_that_does_not_come_to_its_end_is_not_waited_for(
    console: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "LOG_IN_S", 0.01)
    asked = Asked(console)
    status, _ = await asked.call("POST", "/api/login", b'{"key":', b"", b"", b"")
    assert status == 400


async def test_what_a_session_asks_for_is_a_refusal_and_no_traceback(console: Site) -> None:
    may = {"view": True, "people": True, "events": False, "correct": True, "enroll": True}
    begun = console.sessions.begin(Nobody(), may)  # type: ignore[arg-type]
    assert begun is not None
    word, session = begun
    asked = Asked(console)
    many = "9" * 5000
    for method, path, body, status in (
        ("GET", f"/api/events/{many}/picture", b"", 400),
        ("GET", "/api/events/-1/picture", b"", 400),
        ("GET", "/api/events/x/picture", b"", 400),
        ("POST", f"/api/events/{many}/correct", b"{}", 400),
        ("POST", "/api/events/1/correct", b"[" * 20_000, 400),
        ("POST", "/api/events/1/correct", b"{}" + b" " * (64 << 10), 400),
        ("POST", "/api/events/1/acknowledge", b"", 403),
        ("POST", "/api/people/a/faces", b"x" * (app.MAX_PICTURE + 1), 413),
        ("GET", "/assets/../app.py", b"", 404),
        ("GET", "/assets/%2e%2e/app.py", b"", 404),
    ):
        got, _ = await asked.call(method, path, body, cookie=word, csrf=session.csrf)
        assert got == status, (method, path[:40])
    got, _ = await asked.call("GET", "/api/events", cookie=word, query=f"before={many}")
    assert got == 400
    got, _ = await asked.call("GET", "/api/people", cookie=word, query="most=all")
    assert got == 400
    code, _ = await asked.call(
        "GET", "/api/live", kind="websocket", cookie=word, query="source=a&fps=fast"
    )
    assert code == 4400
    code, _ = await asked.call("GET", "/api/live", kind="websocket", query="source=a")
    assert code == 4401
    got, said = await asked.call("GET", "/api/nothing", cookie=word)
    assert (got, json.loads(said)["reason"]) == (404, "NOT_FOUND"), "and not the page"
    got, _ = await asked.call("DELETE", "/api/people/a", cookie=word, csrf="another's")
    assert got == 403


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
        ("[", None, False),
        ("localhost:{port}", "http://[", False),
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
        (["--listen", "127.0.0.1:99999"], "HOST:PORT"),
        (["--listen", EVERYWHERE, "--cert", "c.pem"], "go together"),
    ],
)
def test_off_loopback_there_is_tls_or_nothing(arguments: list[str], said: str) -> None:
    with pytest.raises(cli.UsageError, match=said):
        cli.build(cli.parser().parse_args(arguments))
    assert cli.main(arguments) == 2, "another start would not mend it"


def test_files_that_cannot_be_used_are_told_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.pem").write_text("garbage")
    for arguments, said in (
        (["--cert", "c.pem", "--key", "none.pem"], "--cert"),
        (["--tls-ca", "none.pem"], "--tls-ca"),
        (["--tls-ca", "c.pem"], "--tls-ca"),
    ):
        paths = [str(tmp_path / word) if word.endswith(".pem") else word for word in arguments]
        assert cli.main(paths) == 2
        assert f"facelane-console: {said} {tmp_path}" in capsys.readouterr().err


def test_nobody_acts_with_a_key_of_the_consoles_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELANE_TOKEN", "secret")
    console, host, port = cli.build(cli.parser().parse_args(["--target", "unix:/nowhere"]))
    assert cli.is_loopback(host)
    assert port
    assert console._connect("")._endpoint.bearer.held == ()


class Ends(Nobody):
    """A client whose looks and events end at once, as they are told."""

    def __init__(self, how: Exception | None) -> None:
        self._how = how
        self.closed = False

    async def close(self) -> None:
        self.closed = True

    async def watch_stream(self, *_arguments: Any, **_options: Any) -> Any:
        if self._how is not None:
            raise self._how
        return
        yield


DENIED = facelane.AuthenticationError(facelane.Reason.UNAUTHENTICATED, "denied")


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (None, 1000),
        (facelane.NotFoundError(facelane.Reason.STREAM_NOT_FOUND, "gone"), 4404),
        (facelane.PermissionDeniedError(facelane.Reason.PERMISSION_DENIED, "no"), 4403),
        (CannotDecodeError(), 4415),
        (DENIED, 4401),
    ],
    ids=repr,
)
async def test_a_look_says_how_it_ended(console: Site, how: Exception | None, code: int) -> None:
    client = Ends(how)
    word, _ = console.sessions.begin(client, {}) or ("", None)  # type: ignore[arg-type]
    asked = Asked(console)
    got, _ = await asked.call("GET", "/api/live", kind="websocket", cookie=word, query="source=a")
    assert got == code
    # With its key a session ends: the page would go on asking, and show what it has.
    assert (console.sessions.find(word) is None) is client.closed is (how is DENIED)


@pytest.mark.parametrize("how", [RuntimeError("the handler is closed"), KeyError("no word")])
async def test_what_nobody_foresaw_does_not_end_as_if_the_camera_had(
    console: Site, how: Exception
) -> None:
    word, _ = console.sessions.begin(Ends(how), {}) or ("", None)  # type: ignore[arg-type]
    asked = Asked(console)
    with pytest.raises(type(how)):
        await asked.call("GET", "/api/live", kind="websocket", cookie=word, query="source=a")
    assert asked.sent[-1]["code"] == app.FAILED


async def test_only_files_that_are_there_are_kept_by_browsers(console: Site) -> None:
    asked = Asked(console)
    built = next((ROOT / "clients/facelane_console/static/assets").iterdir()).name
    assert (await asked.call("GET", f"/assets/{built}"))[0] == 200
    assert "immutable" in asked.headers["cache-control"]
    assert (await asked.call("GET", "/assets/of-the-next-version.js"))[0] == 404
    assert asked.headers["cache-control"] == "no-store"


async def test_who_asks_for_nothing_makes_room_and_who_asked_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patience, "REQUEST_S", 0.05)
    done = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await done.wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    settings = uvicorn.Config(slow, http=patience.Patient, lifespan="off", log_level="critical")
    settings.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: patience.Patient(settings, state, {}), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with asyncio.timeout(60), server:
        asking, answers = await asyncio.open_connection("127.0.0.1", port)
        answers.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        for beginning in (b"", b"GET / HT"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(beginning)
            assert await reader.read() == b"", "let go"
            writer.close()
        # All that time the first one was under way.
        done.set()
        assert (await asking.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        answers.write(b"GET /ag")
        assert await asking.read() == b"", "and its second half does not come"
        answers.close()
