"""``facelane-events`` as a process: nothing is lost, whoever dies; receivers of every kind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socketserver
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiomqtt
import nats
import pytest
from standardwebhooks.webhooks import Webhook
from tests.event_deliveries import deliver as deliver_all
from tests.fakes import receivers
from tests.fakes.receivers import Broker, Deliverer
from tests.fakes.scripted_server import ScriptedServer
from tests.running_server import THREAD_POOLS, RunningServer, free_port
from tests.waiting import auntil, until

import facelane

SECRET = "whsec_" + "QUJD" * 8
KILLS = 3


def program(name: str) -> str:
    found = receivers.found(name)
    if found is None:
        pytest.skip(f"needs {name} (Debian packages in CONTRIBUTING.md)")
    return found


@pytest.fixture
def deliver(tmp_path: Path) -> Iterator[Callable[[str, str], Deliverer]]:
    made: list[Deliverer] = []

    def make(target: str, sinks: str) -> Deliverer:
        made.append(Deliverer(tmp_path, target, sinks))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """Tells ``events_end`` events, then waits; a subscription that comes back goes on."""
    made = ScriptedServer()
    made.events_stay_open, made.event_burst, made.events_end = True, 1 << 20, 0
    with made:
        yield made


class Receiver:
    """A webhook's receiver. ``answers``: statuses, taken one a request; then 204."""

    def __init__(self, port: int = 0) -> None:
        self.answers: list[int] = []
        self.hold = threading.Event()
        self.hold.set()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.raw: list[bytes] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                owner.hold.wait(100)
                status = owner.answers.pop(0) if owner.answers else 204
                if status < 300:
                    owner.raw.append(body)
                    owner.headers.append(dict(self.headers))
                    owner.bodies.append(json.loads(body))  # the last: it is what tests wait for
                with contextlib.suppress(ConnectionError):
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def log_message(self, *_args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(30)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


def numbers(bodies: list[dict[str, Any]]) -> list[int]:
    return [body["sequence"] for body in bodies]


def in_order(found: list[int]) -> bool:
    """Every number for the first time in its turn: what comes again is one that was there."""
    first = list(dict.fromkeys(found))
    return first == sorted(first)


def test_what_happens_reaches_a_signed_webhook(
    server: ScriptedServer, receiver: Receiver, deliver: Any, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    server.events_end = 20
    receiver.answers = [500, 503, 429, 400]
    one = deliver(
        server.target,
        f'[[sink]]\ntype = "webhook"\nname = "hook"\nurl = "{receiver.url}"\n'
        f'secret_file = "{tmp_path / "secret"}"\nretry_max = 0.1\n',
    )
    one.start()
    # The first was tried until it was refused for good: a dead letter. All others came.
    until(lambda: len(receiver.bodies) == 19, what=one.log())
    assert numbers(receiver.bodies) == list(range(2, 21))
    (line,) = (one.state / "hook.dead.jsonl").read_text().splitlines()
    assert json.loads(line)["why"] == "it answered 400"
    assert json.loads(json.loads(line)["body"])["sequence"] == 1
    for raw, headers in zip(receiver.raw, receiver.headers, strict=True):
        Webhook(SECRET).verify(raw, {k.lower(): v for k, v in headers.items()})
    assert one.end() == 0
    assert "grace" not in one.log(), "a log names nobody"


def test_a_receiver_that_is_gone_ends_its_own_sink_and_one_that_hangs_holds_up_nobody(
    server: ScriptedServer, receiver: Receiver, deliver: Any, tmp_path: Path
) -> None:
    gone, stuck = Receiver(), Receiver()
    # As many as would take all threads that a loop has by itself.
    many = "".join(
        f'[[sink]]\ntype = "webhook"\nname = "stuck-{n}"\nurl = "{stuck.url}"\n'
        "attempt_timeout = 600.0\n"
        for n in range(10)
    )
    try:
        gone.answers = [410]
        receiver.hold.clear()
        stuck.hold.clear()
        server.events_end = 50
        one = deliver(
            server.target,
            f'{many}[[sink]]\ntype = "webhook"\nname = "gone"\nurl = "{gone.url}"\n'
            f'[[sink]]\ntype = "webhook"\nname = "hangs"\nurl = "{receiver.url}"\n'
            f"attempt_timeout = 1.0\nretry_max = 0.1\n"
            f'[[sink]]\ntype = "jsonl"\nname = "file"\npath = "{tmp_path / "events.jsonl"}"\n',
        )
        one.start()
        path = tmp_path / "events.jsonl"
        until(lambda: path.exists() and path.read_bytes().count(b"\n") == 50, what=one.log())
        until(lambda: "gone for good" in one.log(), what=one.log())
        until(lambda: "trying again" in one.log(), what=one.log())
        receiver.hold.set()
        everything = list(range(1, 51))
        until(lambda: sorted(set(numbers(receiver.bodies))) == everything, what=one.log())
        assert in_order(numbers(receiver.bodies))
        assert gone.bodies == []
        stuck.hold.set()
        assert one.end() == 0
    finally:
        gone.close()
        stuck.close()


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_where_it_was(
    server: ScriptedServer, receiver: Receiver, deliver: Any, tmp_path: Path
) -> None:
    path = tmp_path / "events.jsonl"
    one = deliver(
        server.target,
        f'[[sink]]\ntype = "webhook"\nname = "hook"\nurl = "{receiver.url}"\n'
        f'[[sink]]\ntype = "jsonl"\nname = "file"\npath = "{path}"\n',
    )
    server.events_end = 100_000
    for kill in range(KILLS):
        before = len(receiver.bodies)
        one.start()
        until(lambda least=before + 20: len(receiver.bodies) >= least, what=one.log())
        if kill == KILLS - 1:
            break
        one.end(signal.SIGKILL)
        # What was cut short on disk.
        with path.open("ab") as file:
            file.write(b'{"type": "ev')
    one.end()
    for found in (
        numbers(receiver.bodies),
        [
            json.loads(line)["sequence"]
            for line in path.read_text().splitlines()
            if line.endswith("}")
        ],
    ):
        assert sorted(set(found)) == list(range(1, max(found) + 1)), "one is missing"
        assert in_order(found)
        # Told again: what was under way at each of the kills, no more.
        assert sum(n - 1 for n in Counter(found).values()) <= KILLS


def test_what_the_server_no_longer_has_is_said(
    server: ScriptedServer, receiver: Receiver, deliver: Any
) -> None:
    import grpc

    server.events_end = 3
    one = deliver(
        server.target, f'[[sink]]\ntype = "webhook"\nname = "x"\nurl = "{receiver.url}"\n'
    )
    one.start()
    until(lambda: len(receiver.bodies) == 3, what=one.log())
    one.end()
    server.failures.append((grpc.StatusCode.OUT_OF_RANGE, "HISTORY_LOST", "gone"))
    server.events_before, server.events_end = 10, 12
    one.start()
    until(lambda: len(receiver.bodies) == 6, what=one.log())
    assert [body["kind"] for body in receiver.bodies[3:]] == [
        "HISTORY_LOST", "SUBJECT_SEEN", "SUBJECT_SEEN",
    ]  # fmt: skip
    assert numbers(receiver.bodies[4:]) == [11, 12]


def test_a_server_that_refuses_for_good_is_told(deliver: Any, tmp_path: Path) -> None:
    with ScriptedServer(token="right") as server:
        (tmp_path / "token").write_text("wrong")
        one = deliver(
            server.target, f'[[sink]]\ntype = "jsonl"\nname = "f"\npath = "{tmp_path}/f"\n'
        )
        text = one.config.read_text().replace(
            "[[sink]]", f'token_file = "{tmp_path / "token"}"\n[[sink]]', 1
        )
        one.config.write_text(text)
        for command in ("run", "check"):
            code, said = one.ask(command)
            assert code == 4, said
            assert "UNAUTHENTICATED" in said
        one.config.write_text(text.replace("jsonl", "fax"))
        code, said = one.ask("run")
        assert (code, "fax" in said) == (2, True)


def test_syslog_over_tcp_comes_whole_and_in_order(server: ScriptedServer, deliver: Any) -> None:
    taken = bytearray()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(65536):
                taken.extend(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        port = listening.server_address[1]
        server.events_end = 30
        one = deliver(
            server.target,
            f'[[sink]]\ntype = "syslog"\nname = "log"\naddress = "tcp://127.0.0.1:{port}"\n',
        )
        one.start()

        def found() -> list[int]:
            rest, out = bytes(taken), []
            while b" " in rest:
                size, _, rest = rest.partition(b" ")
                if len(rest) < int(size):
                    break
                record, rest = rest[: int(size)], rest[int(size) :]
                out.append(json.loads(record.partition(b"\xef\xbb\xbf")[2])["sequence"])
            return out

        everything = list(range(1, 31))
        until(lambda: found() == everything, what=one.log())
        one.end()
        listening.shutdown()


# -- brokers ------------------------------------------------------------------------------------


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Broker]:
    broker = receivers.mosquitto(program("mosquitto"), free_port(), tmp_path / "mosquitto")
    broker.start()
    yield broker
    broker.kill()


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[Broker]:
    broker = receivers.nats_server(program("nats-server"), free_port(), tmp_path / "jetstream")
    broker.start()
    yield broker
    broker.kill()


async def test_mqtt_events_states_and_devices(
    server: ScriptedServer, deliver: Any, mosquitto: Broker
) -> None:
    one = deliver(
        server.target,
        f'[[sink]]\ntype = "mqtt"\nname = "home"\nhost = "127.0.0.1"\nport = {mosquitto.port}\n'
        "homeassistant = true\nretry_max = 0.2\n",
    )
    found: list[int] = []
    topics: dict[str, bytes] = {}

    async def listen() -> None:
        async with aiomqtt.Client("127.0.0.1", mosquitto.port) as client:
            await client.subscribe("facelane/#", qos=1)
            await client.subscribe("homeassistant/#", qos=1)
            async for got in client.messages:
                topics[got.topic.value] = got.payload
                if got.topic.value == "facelane/door/event":
                    found.append(json.loads(got.payload)["sequence"])

    listening = asyncio.create_task(listen())
    try:
        one.start()
        await auntil(lambda: topics.get("facelane/status/home") == b"online", what="online")
        server.say_event.set()
        await auntil(lambda: found, what="an event")
        # What is so now follows the event that said it.
        await auntil(lambda: topics.get("facelane/door/person") == b"grace", what="a person")
        device = json.loads(topics["homeassistant/device/facelane_door/config"])
        assert device["components"]["person"]["state_topic"] == "facelane/door/person"
        # Ours dies without a word: the broker says so.
        one.end(signal.SIGKILL)
        await auntil(lambda: topics["facelane/status/home"] == b"offline", what="offline")
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


@pytest.mark.slow
async def test_a_broker_that_forgot_is_told_who_is_there_though_nothing_happens(
    server: ScriptedServer, deliver: Any, mosquitto: Broker, tmp_path: Path
) -> None:
    one = deliver(
        server.target,
        f'[[sink]]\ntype = "mqtt"\nname = "home"\nhost = "127.0.0.1"\nport = {mosquitto.port}\n'
        "homeassistant = true\nretry_max = 0.2\n",
    )

    async def retained(*wanted: str) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        async with aiomqtt.Client("127.0.0.1", mosquitto.port) as client:
            await client.subscribe("#", qos=1)
            async for got in client.messages:
                found[got.topic.value] = got.payload
                if found.keys() >= set(wanted):
                    break
        return found

    topics = ("facelane/status/home", "facelane/door/person", "facelane/door/occupancy")
    device = "homeassistant/device/facelane_door/config"
    one.start()
    server.say_event.set()
    async with asyncio.timeout(100):
        before = await retained(*topics, device)
        mosquitto.kill()
        (tmp_path / "mosquitto" / "mosquitto.db").unlink(missing_ok=True)
        mosquitto.start()
        after = await retained(*topics, device)
    assert {where: after[where] for where in (*topics, device)} == {
        where: before[where] for where in (*topics, device)
    }
    assert after["facelane/status/home"] == b"online"
    assert one.end() == 0


async def test_mqtt_as_onvif_has_it(
    server: ScriptedServer, deliver: Any, mosquitto: Broker
) -> None:
    one = deliver(
        server.target,
        f'[[sink]]\ntype = "mqtt"\nname = "vms"\nhost = "127.0.0.1"\nport = {mosquitto.port}\n'
        'prefix = "lobby-box"\npayload = "onvif"\n',
    )
    server.events_end = 3
    topics: list[str] = []
    bodies: list[dict[str, Any]] = []
    async with aiomqtt.Client("127.0.0.1", mosquitto.port) as client:
        await client.subscribe("lobby-box/onvif-ej/#", qos=1)
        one.start()
        async for got in client.messages:
            topics.append(got.topic.value)
            bodies.append(json.loads(got.payload))
            assert not got.retain
            if len(bodies) == 3:
                break
    assert set(topics) == {"lobby-box/onvif-ej/RuleEngine/Recognition/Face/&door/FaceRecognition"}
    numbers = [body["Data"]["facelane:EventId"].partition("-")[0] for body in bodies]
    assert numbers == ["1", "2", "3"]
    assert {body["Data"]["EnrollmentID"] for body in bodies} == {"grace"}


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_nothing_is_missing_whoever_dies(tmp_path: Path) -> None:
    for name in ("mosquitto", "nats-server"):
        program(name)
    found = await deliver_all(tmp_path, events=1000, kills=1, seed=1)
    assert found["good"], found


async def test_a_broker_that_is_killed_misses_nothing_of_nats(
    server: ScriptedServer, deliver: Any, nats_server: Broker
) -> None:
    url = f"nats://127.0.0.1:{nats_server.port}"
    one = deliver(
        server.target,
        f'[[sink]]\ntype = "nats"\nname = "bus"\nservers = ["{url}"]\nretry_max = 0.2\n',
    )
    server.events_end = 300
    one.start()

    async def taken() -> int:
        with contextlib.suppress(Exception):
            client = await nats.connect(url, allow_reconnect=False, connect_timeout=5)
            try:
                info = await client.jetstream().stream_info("FACELANE")
                return info.state.messages
            finally:
                await client.close()
        return 0

    await auntil(lambda: _least(20, taken), what=one.log())
    nats_server.kill()
    one.end(signal.SIGKILL)
    one.start()
    nats_server.start()
    await auntil(lambda: _least(300, taken), what=one.log())
    one.end()
    client = await nats.connect(url)
    try:
        stream = client.jetstream()
        reading = await stream.pull_subscribe("facelane.door.SUBJECT_SEEN", "test")
        found = [json.loads(got.data)["sequence"] for got in await reading.fetch(300, timeout=60)]
        rest = (await stream.stream_info("FACELANE")).state.messages
    finally:
        await client.close()
    # Told twice at most to the broker, which keeps what it has once.
    assert found == list(range(1, 301))
    assert rest == 300


async def _least(least: int, count: Callable[[], Any]) -> bool:
    return bool(await count() >= least)


def test_a_real_server_tells_of_its_streams(start: Any, deliver: Any, tmp_path: Path) -> None:
    running: RunningServer = start(THREAD_POOLS)
    path = tmp_path / "events.jsonl"
    one = deliver(running.target, f'[[sink]]\ntype = "jsonl"\nname = "f"\npath = "{path}"\n')
    assert one.ask("check") == (0, "server               ok\nf                    ok\n")
    one.start()
    until((one.state / "f.position").exists, what=one.log())
    with facelane.Client(running.target) as client:

        def told() -> bool:
            with client.analyze_stream(source_id="lobby"):
                pass
            return "STREAM_CLOSED" in path.read_text()

        until(told, what=one.log())
    assert one.end() == 0
    first = json.loads(path.read_text().splitlines()[0])
    assert (first["type"], first["source_id"]) == ("event", "lobby")
