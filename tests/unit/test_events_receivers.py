"""Receivers that hang, drip, forget, throw and come back; what is in the way of nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

import aiomqtt
import nats.errors
import pytest
from tests.waiting import auntil

import facelane
from facelane.proxies import http_proxy
from facelane.types import BoundingBox, Event, EventKind, Identity, RuleReport, TrackReport
from facelane_events import config, delivery
from facelane_events.delivery import Delivery, RefusedError, UnavailableError
from facelane_events.message import Message, history_lost, message
from facelane_events.position import DeadLetters, Position
from facelane_events.sinks import mqtt as mqtt_module
from facelane_events.sinks import onvif
from facelane_events.sinks.jsonl import JsonLinesSink
from facelane_events.sinks.mqtt import MqttSink
from facelane_events.sinks.nats import NatsSink, message_id
from facelane_events.sinks.syslog import SyslogSink
from facelane_events.sinks.webhook import WebhookSink

NOON = datetime(2027, 3, 4, 12, 0, tzinfo=UTC)
TRACK = TrackReport("s-1/7", 0.0, 1.0, None, None, BoundingBox(1, 2, 3, 4))
SEEN = Event(
    5, EventKind.SUBJECT_SEEN, NOON, "token-5", "door", "s-1", 7, "default",
    identity=Identity(subject_id="grace"), track=TRACK,
)  # fmt: skip
PLAIN = config.JsonLines(name="file", path="/x", retry_max=0.01)


def numbered(number: int, **fields: Any) -> Event:
    return replace(SEEN, sequence=number, resume_token=f"token-{number}", **fields)


class Taker:
    """A receiver that keeps what it takes; ``throws``: one error an attempt, first."""

    def __init__(self, *throws: Exception) -> None:
        self.throws = list(throws)
        self.taken: list[Message] = []
        self.opened = 0

    async def open(self) -> None:
        self.opened += 1

    async def send(self, event: Message) -> None:
        if self.throws:
            raise self.throws.pop(0)
        self.taken.append(event)

    async def close(self) -> None:
        pass


class Telling:
    """A server: each watch tells of these events, or raises; the last goes on for ever."""

    def __init__(self, *watches: list[Event] | facelane.FacelaneError) -> None:
        self.watches = list(watches)
        self.tokens: list[str] = []
        self.resume_token = "begun"

    def watch_events(self, token: str, *_args: object, **_options: object) -> Self:
        self.tokens.append(token)
        return self

    async def __aenter__(self) -> Self:
        if self.watches and isinstance(self.watches[0], facelane.FacelaneError):
            raise self.watches.pop(0)  # type: ignore[misc]
        return self

    async def __aexit__(self, *_error: object) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[Event]:
        found = self.watches.pop(0) if self.watches else []
        assert isinstance(found, list)
        for event in found:
            self.resume_token = event.resume_token
            yield event
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def delivering(
    tmp_path: Path, sink: Any, server: Telling, settings: config.Sink = PLAIN, **more: Any
) -> AsyncIterator[tuple[Delivery, Position]]:
    position, dead = Position(tmp_path / "x.position"), DeadLetters(tmp_path / "dead", 1 << 20)
    one = Delivery(settings, sink, position, dead, **more)
    running = asyncio.create_task(one.run(server))  # type: ignore[arg-type]
    try:
        yield one, position
    finally:
        running.cancel()
        await asyncio.wait([running])
        position.close()


async def test_what_a_library_throws_is_its_own_sinks_and_comes_again(tmp_path: Path) -> None:
    sink = Taker(ZeroDivisionError("grace"), ModuleNotFoundError("nkeys"), ValueError("grace"))
    async with delivering(tmp_path, sink, Telling([SEEN])) as (one, _):
        await auntil(lambda: sink.taken, what="the event")
        assert (one.tally.attempts_failed, one.tally.delivered) == (3, 1)


class Unsettled(Taker):
    """Takes what comes, and cannot keep it for a while."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    async def settle(self) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("the disk")


async def test_a_position_says_nothing_of_what_may_still_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("facelane_events.position._SYNC_S", 0.0)
    sink = Unsettled(failures=1)
    async with delivering(tmp_path, sink, Telling([SEEN])) as (_, position):
        await auntil(lambda: sink.taken and not sink.failures, what="the event")
        assert position.token in ("", "begun")
    sink = Unsettled(failures=1)
    async with delivering(tmp_path, sink, Telling([SEEN, numbered(6)])) as (_, position):
        await auntil(lambda: position.token == "token-6", what="both are kept")


async def test_nor_does_one_that_is_noted_while_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("facelane_events.position._SYNC_S", 0.0)
    monkeypatch.setattr(delivery, "NOTED_S", 0.001)
    sink, kept = Unsettled(failures=20), []
    real = Position.save

    def save(position: Position, token: str) -> None:
        kept.append((token, sink.failures))
        real(position, token)

    monkeypatch.setattr(Position, "save", save)
    server = Telling([SEEN])
    async with delivering(tmp_path, sink, server) as (_, position):
        await auntil(lambda: position.token == "begun", what="the beginning")
        server.resume_token = "token-5"
        await auntil(lambda: position.token == "token-5", what="what is kept by then")
    assert next(failures for token, failures in kept if token == "token-5") == 0


async def test_the_hour_is_that_of_what_happened(tmp_path: Path) -> None:
    """A receiver that was away over night gets what happened by night, and by day what did not."""
    sink = Taker()
    late = numbered(6, event_time=datetime(2027, 3, 5, 3, 0, tzinfo=UTC))
    settings = config.JsonLines(name="file", path="/x", hours="22:00-06:00")
    server = Telling([SEEN, late])
    async with delivering(
        tmp_path, sink, server, settings, local=lambda moment: moment or NOON
    ) as (one, _):
        await auntil(lambda: sink.taken, what="the event of the night")
        assert [told.event for told in sink.taken] == [late]
        assert one.tally.held_back == 1


async def test_what_the_server_still_has_is_delivered_behind_what_it_has_lost(
    tmp_path: Path,
) -> None:
    lost = facelane.HistoryLostError("HISTORY_LOST", "gone", metadata={"resume_token": "kept"})
    server, sink = Telling(lost, [SEEN]), Taker()
    async with delivering(tmp_path, sink, server) as (_, position):
        await auntil(lambda: position.token == "token-5", what="the event")
    assert [told.kind for told in sink.taken] == ["HISTORY_LOST", "SUBJECT_SEEN"]
    assert server.tokens == ["", "kept"]


async def test_how_far_a_quiet_watch_has_come_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a server's history ends before a sink for which nothing happened for weeks."""
    monkeypatch.setattr(delivery, "NOTED_S", 0.01)
    server = Telling([])
    async with delivering(tmp_path, Taker(), server) as (_, position):
        await auntil(lambda: position.token == "begun", what="the beginning")
        server.resume_token = "far"
        await auntil(lambda: position.token == "far", what="the position")
    again = Position(tmp_path / "x.position")
    assert again.token == "far"
    again.close()


class Shown(Taker):
    """A receiver that is kept open."""

    def __init__(self, refusals: int = 0) -> None:
        super().__init__()
        self.refusals = refusals
        self.gone = asyncio.Event()

    async def open(self) -> None:
        await super().open()
        if self.opened <= self.refusals:
            raise UnavailableError("not there yet")
        self.gone = asyncio.Event()

    async def broken(self) -> None:
        await self.gone.wait()


async def test_a_receiver_that_shows_who_is_there_is_kept_open(tmp_path: Path) -> None:
    """One that was not there at first, and one that went while nothing happened."""
    sink = Shown(refusals=2)
    async with delivering(tmp_path, sink, Telling([])) as (one, _):
        await auntil(lambda: sink.opened == 3 and not one.tally.waiting, what="the third try")
        sink.gone.set()
        await auntil(lambda: sink.opened == 4, what="another")
        assert one.tally.delivered == 0


def test_a_position_has_one_owner(tmp_path: Path) -> None:
    one = Position(tmp_path / "x.position")
    with pytest.raises(OSError, match="another facelane-events"):
        Position(tmp_path / "x.position")
    one.close()
    Position(tmp_path / "x.position").close()


def halved(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The disk has room for half of what is written next; gives the way back."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data)[: len(data) // 2]))
    return lambda: monkeypatch.setattr(os, "write", write)


def test_a_full_disk_keeps_no_half_of_a_dead_letter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = DeadLetters(tmp_path / "dead", 1 << 20)
    assert dead.add("1", "no", b"{}")
    again = halved(monkeypatch)
    assert not dead.add("2", "no", b"{}")
    again()
    assert dead.add("3", "no", b"{}")
    ids = [json.loads(line)["id"] for line in (tmp_path / "dead").read_text().splitlines()]
    assert ids == ["1", "3"]


async def test_lines_are_whole_and_follow_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a disk that was full, and whoever turns the file over, deletes or empties it."""
    path = tmp_path / "events.jsonl"
    sink = JsonLinesSink(config.JsonLines(name="f", path=str(path), rotate_mib=1))

    def found(at: Path) -> list[int]:
        return [json.loads(line)["sequence"] for line in at.read_text().splitlines()]

    async def send(number: int) -> None:
        await sink.send(message(PLAIN, numbered(number)))

    await sink.open()
    await send(1)
    again = halved(monkeypatch)
    with pytest.raises(UnavailableError, match="full"):
        await send(2)
    again()
    assert found(path) == [1]
    await sink.open()
    await send(2)
    path.rename(tmp_path / "old")
    await send(3)
    assert (found(tmp_path / "old"), found(path)) == ([1, 2], [3])
    path.unlink()
    await send(4)
    assert found(path) == [4]
    os.truncate(path, 0)
    await send(5)
    assert found(path) == [5]
    await sink.settle()
    await sink.close()


async def test_a_receiver_that_drips_holds_no_thread(tmp_path: Path) -> None:
    """A byte now and then is an answer to every time-out of a socket."""
    there: set[asyncio.StreamWriter] = set()
    seen = 0

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        seen += 1
        there.add(writer)
        with contextlib.suppress(ConnectionError):
            writer.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not reader.at_eof():
                writer.write(b"x")
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await reader.read(1 << 16)
        there.discard(writer)
        writer.close()

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}/"
        settings = config.Webhook(name="hook", url=url, attempt_timeout=0.2, retry_max=0.01)
        sink = WebhookSink(settings)
        async with delivering(tmp_path, sink, Telling([SEEN]), settings) as (one, _):
            await auntil(lambda: one.tally.attempts_failed >= 3, what="three attempts")
            assert seen >= 2
        # It ends while an attempt is under way, and leaves none behind.
        await auntil(lambda: not there, what="the connections' ends")


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, "https://hooks.test/x", ""),
        ({"https_proxy": "http://p:1"}, "https://hooks.test/x", "http://p:1"),
        ({"HTTPS_PROXY": "p:1"}, "https://hooks.test/x", "http://p:1"),
        ({"https_proxy": "http://p:1"}, "http://hooks.test/x", ""),
        ({"http_proxy": "http://p:1"}, "http://hooks.test/x", "http://p:1"),
        ({"HTTP_PROXY": "http://p:1"}, "http://hooks.test/x", ""),
        ({"ALL_PROXY": "http://p:1"}, "http://hooks.test/x", "http://p:1"),
        ({"http_proxy": "http://p:1"}, "http://localhost/x", ""),
        ({"http_proxy": "http://p:1"}, "http://[::1]/x", ""),
        ({"http_proxy": "http://p:1", "no_proxy": "a.test, .test"}, "http://hooks.test/x", ""),
        ({"http_proxy": "http://p:1", "NO_PROXY": "10.0.0.0/8"}, "http://10.1.2.3/x", ""),
        ({"http_proxy": "http://p:1"}, "http://[::1/x", ""),
        ({"http_proxy": "http://p:1", "no_proxy": "10.0.0.0/8"}, "http://11.1.2.3/x", "http://p:1"),
    ],
)
def test_which_proxy_an_address_is_reached_by(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str, proxy: str
) -> None:
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name}_proxy".upper(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert http_proxy(url) == proxy


async def test_a_receiver_behind_the_proxy_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            refused = asked[-1].startswith(b"CONNECT")
            status = b"403 Forbidden" if refused else b"204 No Content"
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
        writer.close()

    async def sent(url: str, **settings: Any) -> None:
        hook = config.Webhook(name="hook", url=url, attempt_timeout=20.0, **settings)
        sink = WebhookSink(hook)
        await sink.open()
        try:
            await sink.send(message(hook, SEEN))
        finally:
            await sink.close()

    async with await asyncio.start_server(proxy, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("https_proxy", f"http://ada:s%40fe@127.0.0.1:{port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        await sent("http://me:secret@hooks.invalid/take?it=1#here")
        line, *headers = asked[-1].split(b"\r\n")
        assert line == b"POST http://hooks.invalid/take?it=1 HTTP/1.1"
        assert b"Host: hooks.invalid" in headers
        with pytest.raises(UnavailableError):
            await sent("https://hooks.invalid/take")
        line, *headers = asked[-1].split(b"\r\n")
        assert line.startswith(b"CONNECT hooks.invalid:443 ")
        assert b"proxy-authorization: basic ywrhonnazmu=" in [one.lower() for one in headers]
        count = len(asked)
        with pytest.raises(UnavailableError):
            await sent("http://hooks.invalid/take", proxy=False)
        assert len(asked) == count


async def test_a_message_that_is_too_large_is_a_dead_letter_and_ids_are_a_sinks_own() -> None:
    settings = config.Nats(name="bus", servers=("nats://127.0.0.1:1",))
    sink = NatsSink(settings)

    class Small:
        def jetstream(self) -> Self:
            return self

        async def publish(self, *_args: object, **_more: object) -> None:
            raise nats.errors.MaxPayloadError

        async def close(self) -> None:
            pass

    sink._client = Small()  # type: ignore[assignment]
    with pytest.raises(RefusedError, match="larger"):
        await sink.send(message(settings, SEEN))
    other = config.Nats(name="watch", servers=("nats://127.0.0.1:1",), subject="facelane.watch")
    ids = {message_id(one, message(one, SEEN)) for one in (settings, other)}
    assert len(ids) == 2, "what one sink has sent is no duplicate of another's"


async def test_nats_credentials_are_read_by_what_is_installed(tmp_path: Path) -> None:
    (tmp_path / "creds").write_text("no credentials")
    settings = config.Nats(
        name="bus", servers=("nats://127.0.0.1:1",), credentials_file=str(tmp_path / "creds")
    )
    # Whatever it says of such a file, or of a server that is not there.
    with pytest.raises(Exception) as caught:  # noqa: PT011
        async with asyncio.timeout(0.2):
            await NatsSink(settings).open()
    assert not isinstance(caught.value, ImportError)


async def test_syslog_reaches_whichever_address_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """``localhost`` is two addresses, and a receiver has one of them."""
    got: list[bytes] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read(1 << 16))
        writer.close()

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = closed.getsockname()
        async with await asyncio.start_server(take, "127.0.0.1", 0) as server:
            somebody = server.sockets[0].getsockname()

            async def both(*_args: object, **_more: object) -> list[Any]:
                inet = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
                return [(*inet, nobody), (*inet, somebody)]

            monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", both)
            sink = SyslogSink(config.Syslog(name="log", address=f"tcp://localhost:{somebody[1]}"))
            await sink.open()
            await sink.send(message(PLAIN, SEEN))
            await auntil(lambda: got, what="the event")
            await sink.close()


async def test_a_datagram_that_was_refused_comes_again() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sink = SyslogSink(config.Syslog(name="log", address=f"udp://127.0.0.1:{port}"))
    await sink.open()
    await sink.send(message(PLAIN, numbered(1)))  # nobody is told that nobody listens
    with pytest.raises(UnavailableError):
        await sink.send(message(PLAIN, numbered(2)))
    await sink.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", port))
        receiver.setblocking(False)
        await sink.open()
        await sink.send(message(PLAIN, numbered(2)))
        found = [receiver.recv(1 << 16) for _ in range(2)]
    bodies = [json.loads(line.partition(b"\xef\xbb\xbf")[2])["sequence"] for line in found]
    assert bodies == [1, 2]
    await sink.close()


class FakeBroker:
    """What ``aiomqtt.Client`` is to a sink; ``room``: how much it takes before it breaks."""

    kept: ClassVar[dict[str, bytes]] = {}
    told: ClassVar[list[str]] = []
    room: ClassVar[int] = 1 << 30

    def __init__(self, *_args: object, **_options: object) -> None:
        pass

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        pass

    async def publish(self, where: str, body: bytes, *, qos: int, retain: bool) -> None:
        await asyncio.sleep(0)
        if not FakeBroker.room:
            raise aiomqtt.MqttError("broken")
        FakeBroker.room -= 1
        FakeBroker.told.append(where)
        if retain and body:
            FakeBroker.kept[where] = body
        elif retain:
            FakeBroker.kept.pop(where, None)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> type[FakeBroker]:
    monkeypatch.setattr(mqtt_module.aiomqtt, "Client", FakeBroker)
    FakeBroker.kept, FakeBroker.told, FakeBroker.room = {}, [], 1 << 30
    return FakeBroker


async def test_a_broker_that_forgot_is_told_again_over_any_number_of_attempts(
    broker: type[FakeBroker],
) -> None:
    settings = config.Mqtt(name="home", host="h", homeassistant=True)
    sink = MqttSink(settings)
    await sink.open()
    for number in range(30):
        started = numbered(number + 1, kind=EventKind.TRACK_STARTED, source_id=f"cam-{number}")
        await sink.send(message(settings, started))
    everything = dict(broker.kept)
    assert len(everything) == 1 + 30 * 4, "status; three states and a device each"
    broker.kept = {}
    attempts = 0
    while True:
        await sink.close()
        broker.room, attempts = 60, attempts + 1
        with contextlib.suppress(UnavailableError):
            await sink.open()
            break
        assert attempts < 30, "each attempt begins anew"
    broker.room = 1 << 30
    assert broker.kept == everything


async def test_who_was_there_when_history_was_lost_is_not_there_for_ever(
    broker: type[FakeBroker],
) -> None:
    settings = config.Mqtt(name="home", host="h")
    sink = MqttSink(settings)
    await sink.open()
    await sink.send(message(settings, numbered(1, kind=EventKind.TRACK_STARTED)))
    zone = numbered(2, kind=EventKind.ZONE_ENTERED, rule=RuleReport("vault", inside=1))
    await sink.send(message(settings, zone))
    assert broker.kept["facelane/door/occupancy"] == b"ON"
    await sink.send(history_lost(NOON))
    assert broker.kept["facelane/door/occupancy"] == b"OFF"
    assert broker.kept["facelane/door/zone_vault"] == b"OFF"
    await sink.close()
    broker.kept = {}
    await sink.open()
    assert broker.kept["facelane/door/occupancy"] == b"OFF"


async def test_onvif_properties_are_told_again_to_a_broker_that_forgot(
    broker: type[FakeBroker],
) -> None:
    settings = config.Mqtt(name="vms", host="h", prefix="site", payload="onvif")
    sink = MqttSink(settings)
    await sink.open()
    for number in range(300):  # more than what is in doubt
        zone = f"z{number}"
        told = numbered(number, kind=EventKind.ZONE_ENTERED, rule=RuleReport(zone, inside=1))
        await sink.send(message(settings, told))
    everything = dict(broker.kept)
    await sink.close()
    broker.kept = {}
    await sink.open()
    assert broker.kept == everything
    assert len(everything) == 301


def test_onvif_who_loiters_is_a_list_that_ends_with_its_last() -> None:
    """Whoever else is in the zone; as the specification has it (LoiteringDetector)."""
    zones = onvif.Zones()
    kept: dict[str, bytes] = {}

    def told(kind: EventKind, track: str = "", inside: int = 0, dwell: float = 0.0) -> None:
        report = replace(TRACK, global_track_id=track) if track else None
        rule = RuleReport("vault", dwell=dwell, inside=inside) if track else None
        event = numbered(1, kind=kind, track=report, rule=rule)
        for one in onvif.messages("site", message(PLAIN, event), zones):
            if one.retain:
                kept[one.topic.removeprefix("site/onvif-ej/RuleEngine/")] = one.body

    at = "&door/default/vault"
    loitering = f"LoiteringDetector/ObjectIsLoitering/{at}"
    told(EventKind.ZONE_ENTERED, "s/1", 1)
    told(EventKind.ZONE_ENTERED, "s/2", 2)
    told(EventKind.ZONE_ENTERED, "s/3", 3)
    told(EventKind.ZONE_DWELL, "s/1", 3, 60.0)
    told(EventKind.ZONE_DWELL, "s/2", 3, 30.0)
    data = json.loads(kept[loitering])["Data"]
    assert (data["ObjectId"], data["Since"]) == ("s/1 s/2", "2027-03-04T11:59:00.000Z")
    told(EventKind.ZONE_LEFT, "s/1", 2)
    data = json.loads(kept[loitering])["Data"]
    assert (data["ObjectId"], data["Since"]) == ("s/2", "2027-03-04T11:59:30.000Z")
    # The last who loiters leaves; somebody who does not is still there.
    told(EventKind.ZONE_LEFT, "s/2", 1)
    assert kept[loitering] == b""
    # A server that died says nothing of who was there.
    told(EventKind.ZONE_DWELL, "s/3", 1, 30.0)
    assert kept[loitering]
    told(EventKind.STREAM_OPENED)
    assert kept[loitering] == b""
    assert json.loads(kept[f"FieldDetector/ObjectsInside/{at}"])["Data"]["IsInside"] is False


@pytest.mark.parametrize(
    ("sink", "says"),
    [
        ('type = "mqtt"\nhost = "h"\ntls_ca = "/ca"', "tls = true"),
        ('type = "mqtt"\nhost = "h"\npassword_file = "/p"', "username"),
        ('type = "webhook"\nurl = "http://h/"\ntls_ca = "/ca"', "https://"),
        ('type = "webhook"\nurl = "http://h/"\ntls_fingerprint = "' + "ab" * 32 + '"', "https://"),
        ('type = "webhook"\nurl = "http://h/"\nheaders = { "X\\n" = "y" }', "headers"),
        ('type = "webhook"\nurl = "http://h/"\nheaders = { "X" = "a\\r\\nY: b" }', "headers"),
        ('type = "webhook"\nurl = "http://h/"\nheaders = { "X" = "\u00fc" }', "headers"),
        ('type = "jsonl"\npath = "/x"\nkinds = ["UNSPECIFIED"]', "kinds"),
    ],
)
def test_what_would_be_ignored_or_break_later_is_refused_at_once(sink: str, says: str) -> None:
    with pytest.raises(config.ConfigError, match=says):
        config.parse(f'[[sink]]\nname = "x"\n{sink}\n')
