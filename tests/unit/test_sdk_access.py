"""How a client gets in: tokens that change, and the way past a proxy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from tests.fakes import scripted_server as fake
from tests.waiting import until

import facelane
from facelane import transport

PICTURE = facelane.Picture.encoded(b"\xff\xd8\xff\xe0" + b"x" * 60)


@pytest.fixture
def server() -> Iterator[fake.ScriptedServer]:
    with fake.ScriptedServer(token="first") as made:
        yield made


class Vault:
    """Gives the tokens it was given, and counts how often it was asked."""

    def __init__(self, *tokens: str) -> None:
        self._tokens = list(tokens)
        self.asked = 0

    def __call__(self) -> str:
        self.asked += 1
        return self._tokens.pop(0) if len(self._tokens) > 1 else self._tokens[0]


def test_a_function_is_asked_once_and_again_when_its_token_is_refused(
    server: fake.ScriptedServer,
) -> None:
    vault = Vault("first", "second")
    with facelane.Client(server.target, token=vault) as client:
        assert vault.asked == 0
        for _ in range(3):
            client.server_info()
        assert vault.asked == 1
        server.token = "second"
        client.server_info()
        assert list(client.list_subjects()) == []
        assert vault.asked == 2
        server.token = "third"
        with pytest.raises(facelane.AuthenticationError):
            client.server_info()
        # Once a call, and no more.
        assert vault.asked == 3


async def test_the_asyncio_client_takes_functions_that_are_awaited(
    server: fake.ScriptedServer,
) -> None:
    vault = Vault("stale", "first")

    async def ask() -> str:
        await asyncio.sleep(0)
        return vault()

    async with facelane.aio.Client(server.target, token=ask) as client:
        assert (await client.server_info()).version == "1.2.3"
        assert vault.asked == 2
        outcomes = [o async for o in client.analyze([PICTURE])]
        assert [o.frame_id for o in outcomes] == [1]
        async with client.watch_events() as events:
            await anext(events)
    async with facelane.aio.Client(server.target, token=lambda: "first") as plain:
        await plain.server_info()


def test_streams_and_events_open_with_the_token_of_the_day(server: fake.ScriptedServer) -> None:
    vault = Vault("stale", "first", "second")
    with facelane.Client(server.target, token=vault) as client:
        assert len(list(client.analyze([PICTURE]))) == 1
        assert vault.asked == 2
        server.token = "second"
        with client.watch_events() as events:
            next(events)
        assert vault.asked == 3
        server.token = "third"
        with pytest.raises(facelane.AuthenticationError), client.watch_events():
            pass
        with pytest.raises(facelane.AuthenticationError), client.analyze_stream():
            pass


@pytest.mark.parametrize("reconnect", [None, facelane.Reconnect(initial_delay=0.01)])
def test_a_key_that_ends_under_a_stream(
    server: fake.ScriptedServer, reconnect: facelane.Reconnect | None
) -> None:
    def until_the_key_ends(
        requests: Iterator[fake.Request], context: fake.Context
    ) -> Iterator[fake.Response]:
        next(requests)
        yield fake.opened()
        yield fake.outcome(next(requests).frame)
        server.token = "second"
        fake.abort(context, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "the key ended")

    server.scripts.append(until_the_key_ends)
    vault = Vault("first", "second")
    with (
        facelane.Client(server.target, token=vault, timeout=30) as client,
        client.analyze_stream(reconnect=reconnect) as stream,
    ):
        stream.send(PICTURE)
        assert stream.recv(30) is not None
        if reconnect is None:
            with pytest.raises(facelane.AuthenticationError, match="the key ended"):
                stream.recv(30)
            return
        stream.send(PICTURE)
        stream.close_send()
        outcomes = list(stream)
        assert stream.summary.connections == 2
        assert outcomes[-1].frame_id == 2
        assert vault.asked == 2


def test_the_file_of_the_environment_is_read_again(
    server: fake.ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    path.write_text("first\n")
    monkeypatch.setenv("FACELANE_TOKEN_FILE", str(path))
    with facelane.Client(server.target) as client:
        client.server_info()
        path.write_text("second\n")
        server.token = "second"
        client.server_info()
        path.unlink()
        server.token = "third"
        with pytest.raises(facelane.AuthenticationError, match="FileNotFoundError") as caught:
            client.server_info()
        # Whoever writes a file anew removes the old one first.
        assert caught.value.retryable


def _raises() -> str:
    raise ValueError("hunter2")


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (_raises, facelane.AuthenticationError),
        (lambda: None, facelane.ArgumentError),
        (lambda: "two words", facelane.ArgumentError),
    ],
)
async def test_a_function_that_gives_no_token(
    server: fake.ScriptedServer, function: Callable[[], str], error: type[facelane.FacelaneError]
) -> None:
    with facelane.Client(server.target, token=function) as client:
        with pytest.raises(error) as caught:
            client.server_info()
        assert "hunter2" not in str(caught.value)
        with pytest.raises(error), client.analyze_stream():
            pass
        with pytest.raises(error), client.watch_events():
            pass
    async with facelane.aio.Client(server.target, token=function) as awaited:
        with pytest.raises(error):
            await awaited.server_info()
        with pytest.raises(error):
            await awaited.analyze_stream().__aenter__()
        with pytest.raises(error):
            await awaited.watch_events().__aenter__()


# Proxies.

LOCAL = [
    "localhost:1", "LOCALHOST:1", "dns:///localhost:1", "dns://9.9.9.9/localhost.:1", "127.0.0.1:1",
    "127.8.8.8:1", "ipv4:127.0.0.1:1", "[::1]:1", "ipv6:[::1]:1", "::1", "[::ffff:127.0.0.1]:1",
    "0.0.0.0:1", "unix:/run/x", "unix:///run/x", "unix-abstract:x", "door.localhost:1", "localhost",
]  # fmt: skip
ELSEWHERE = ["cameras:1", "10.0.0.8:1", "dns:///cameras:1", "[2001:db8::1]:1", "localhost.cam:1"]


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_what_stays_on_this_machine_goes_by_no_proxy(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://user:secret@127.0.0.1:9")
    for target in LOCAL:
        made = transport.endpoint(target, None, None)
        assert (made.proxy, ("grpc.enable_http_proxy", 0) in made.options) == ("", True), target
    for target in ELSEWHERE:
        made = transport.endpoint(target, None, None)
        assert made.proxy == variable, target
        assert "grpc.enable_http_proxy" not in dict(made.options)
        off = transport.endpoint(target, None, None, proxy=False)
        assert ("grpc.enable_http_proxy", 0) in off.options
    monkeypatch.setenv("no_proxy", "cameras, 10.0.0.8")
    assert transport.endpoint("cameras:1", None, None).proxy == ""
    assert transport.endpoint("other:1", None, None).proxy == variable


def test_a_failure_names_the_proxy_and_not_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://user:secret@127.0.0.1:9")
    with facelane.Client("192.0.2.1:1", timeout=20) as client:
        for call in (client.server_info, client.analyze_stream().__enter__):
            with pytest.raises(facelane.UnavailableError, match="https_proxy names") as caught:
                call()
            assert "secret" not in str(caught.value)
            assert "--no-proxy" in str(caught.value)


def test_streams_are_spread_over_several_servers_and_go_on_at_those_that_are_left() -> None:
    with fake.ScriptedServer() as one, fake.ScriptedServer() as two:
        target = f"ipv4:{one.target},{two.target}"
        with facelane.Client(target) as client:
            until(lambda: client.analyze_image(PICTURE) and one.images and two.images)
            for _ in range(4):
                assert len(list(client.analyze([PICTURE]))) == 1
            assert (len(one.streams), len(two.streams)) == (2, 2)
            one.stop()
            for _ in range(4):
                assert len(list(client.analyze([PICTURE], reconnect=facelane.Reconnect()))) == 1
            assert len(two.streams) == 6


def test_a_list_of_this_machines_servers_stays_on_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert not transport.endpoint("ipv4:127.0.0.1:1,127.0.0.2:1", None, None).proxy
    assert transport.endpoint("ipv4:127.0.0.1:1,192.0.2.1:1", None, None).proxy == "https_proxy"


def test_streams_and_watches_share_connections_as_far_as_those_go() -> None:
    channels = transport.Channels(transport.endpoint("unix:/nowhere", None, None))
    full = transport.CALLS_PER_CHANNEL
    taken = [channels.take(grpc, None) for _ in range(2 * full)]
    assert taken[:full] == [None] * full
    (other,) = set(taken[full:])
    assert other is not None
    # One that was sent elsewhere is alone there.
    alone = channels.take(grpc, "")
    assert alone not in (None, other)
    assert channels.leave(alone)
    # There is room again; the client's own is not closed, and others with their last stream.
    assert not channels.leave(None)
    assert not channels.leave(other)
    assert channels.take(grpc, None) is None
    assert [channels.leave(other) for _ in range(full - 1)] == [False] * (full - 2) + [True]
    third = channels.take(grpc, None)
    assert third not in (None, other)
    for channel in (alone, other, third):
        channel.close()
