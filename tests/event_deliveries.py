"""``python -m tests.event_deliveries --events 10000``: every sink, while everything dies.

One ``facelane-events`` delivers to MQTT (our topics, and ONVIF's), NATS JetStream, a webhook,
syslog over TCP and a file of JSON lines, while mosquitto, nats-server, the receivers and it itself
are killed, and the file's disk is filled; two more webhooks hang and say 500 all the time. Nothing
may be missing anywhere, first deliveries have to come in order, and what comes again has to carry
the id of the first. Ends with one JSON line; exit code 1 when that does not hold.

As root the file lies on a disk of its own (a tmpfs) that is filled; else that fault is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nats
import paho.mqtt.client as paho

from tests.fakes import receivers
from tests.fakes.scripted_server import ScriptedServer
from tests.running_server import free_port
from tests.waiting import auntil

DOWN_S = 0.5
"""How long what was killed stays away."""
DISK_MIB = 48
PATIENCE_S = 900.0
SINKS = ("mqtt", "onvif", "nats", "webhook", "syslog", "jsonl")


def event_id(body: bytes) -> str:
    found = json.loads(body)
    return str(found["id"] if "id" in found else found["Data"]["facelane:EventId"])


@dataclass
class Tail:
    """Events of a file that grows, counted without reading them twice."""

    path: Path
    ids: set[str] = field(default_factory=set)
    _at: int = 0

    def count(self) -> int:
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._at)
                whole, _, _ = file.read().rpartition(b"\n")
            if whole:
                self._at += len(whole) + 1
                self.ids |= {event_id(line) for line in whole.split(b"\n")}
        return len(self.ids)


@dataclass
class Subscriber:
    """A persistent MQTT session that writes down what it is given, in its order."""

    port: int
    topics: str
    taken: list[bytes] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, f"reader-{self.topics[:8]}", clean_session=False
        )
        self.client.reconnect_delay_set(1, 1)
        self.client.on_message = lambda _c, _u, got: self._take(got.payload)
        self.client.on_connect = lambda client, *_rest: client.subscribe(self.topics, qos=1)
        self.client.connect("127.0.0.1", self.port)
        self.client.loop_start()

    def _take(self, body: bytes) -> None:
        self.taken.append(body)
        self.ids.add(event_id(body))

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Whether ``folder`` is a disk of its own."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)],
        check=False, capture_output=True,
    )  # fmt: skip
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        for block in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * block):
                    pass


@dataclass
class Fault:
    """``away`` and, after a while, ``back``; while ``sink`` is at work."""

    name: str
    sink: str
    away: Callable[[], object]
    back: Callable[[], object]


def judged(bodies: list[bytes], events: int) -> dict[str, Any]:
    """What one sink's receiver has, in its order."""
    ids = [event_id(body) for body in bodies]
    numbers = [int(one.partition("-")[0]) for one in ids]
    first = list(dict.fromkeys(numbers))
    return {
        "missing": events - len(set(numbers) & set(range(1, events + 1))),
        "in_order": first == sorted(first),
        "told_again": sum(n - 1 for n in Counter(numbers).values()),
        "recognisable": len(set(ids)) == len(set(numbers)),
    }


class Run:
    """Everything of one run; ``close`` ends all processes."""

    def __init__(self, folder: Path, events: int, server: ScriptedServer) -> None:
        self.events = events
        self.disk = folder / "disk"
        ports = {name: free_port() for name in ("mqtt", "nats", "web", "log", "hang", "fail")}
        mqtt, jetstream = receivers.found("mosquitto"), receivers.found("nats-server")
        if mqtt is None or jetstream is None:
            sys.exit("needs mosquitto and nats-server (Debian packages in CONTRIBUTING.md)")
        self.brokers = {
            "mqtt": receivers.mosquitto(mqtt, ports["mqtt"], folder / "mosquitto"),
            "nats": receivers.nats_server(jetstream, ports["nats"], folder / "jetstream"),
            "webhook": receivers.receiver("webhook", ports["web"], folder / "webhook"),
            "syslog": receivers.receiver("syslog", ports["log"], folder / "syslog"),
            "hang": receivers.receiver("hang", ports["hang"], folder / "hang"),
            "fail": receivers.receiver("fail", ports["fail"], folder / "fail"),
        }
        self.deliverer = receivers.Deliverer(folder, server.target, self._sinks(ports))
        self.url = f"nats://127.0.0.1:{ports['nats']}"
        self.tails = {name: Tail(folder / name) for name in ("webhook", "syslog")}
        self.subscribers: dict[str, Subscriber] = {}
        self.in_stream = 0

    def _sinks(self, ports: dict[str, int]) -> str:
        def sink(name: str, kind: str, **more: object) -> str:
            lines = {"type": kind, "name": name, "retry_max": 0.5, "attempt_timeout": 5.0, **more}
            return "[[sink]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in lines.items())

        local, port = "127.0.0.1", ports["mqtt"]
        web = "http://127.0.0.1:{}/hook"
        return "".join((
            sink("mqtt", "mqtt", host=local, port=port, homeassistant=True),
            sink("onvif", "mqtt", host=local, port=port, prefix="site", payload="onvif"),
            sink("nats", "nats", servers=[f"nats://{local}:{ports['nats']}"]),
            sink("webhook", "webhook", url=web.format(ports["web"])),
            sink("syslog", "syslog", address=f"tcp://{local}:{ports['log']}"),
            sink("jsonl", "jsonl", path=str(self.disk / "events.jsonl"), rotate_mib=2, keep=100),
            sink("hang", "webhook", url=web.format(ports["hang"])),
            sink("fail", "webhook", url=web.format(ports["fail"])),
        ))  # fmt: skip

    def start(self) -> None:
        for broker in self.brokers.values():
            broker.start()
        port = self.brokers["mqtt"].port
        self.subscribers["mqtt"] = Subscriber(port, "facelane/door/event")
        self.subscribers["onvif"] = Subscriber(port, "site/onvif-ej/#")
        self.deliverer.start()

    def files(self) -> list[bytes]:
        """The file's lines, older files first."""
        older = sorted(
            self.disk.glob("events.jsonl.*"), key=lambda path: -int(path.suffix.lstrip("."))
        )
        now = self.disk / "events.jsonl"
        lines: list[bytes] = []
        for path in [*older, *([now] if now.exists() else [])]:
            # What a kill or the disk cut short was ended, and came again.
            lines += [one for one in path.read_bytes().split(b"\n") if one.endswith(b"}")]
        return lines

    async def has(self, name: str) -> int:
        """Events that a sink's receiver has; one that is away has its last."""
        if name in self.subscribers:
            return len(self.subscribers[name].ids)
        if name == "nats":
            with contextlib.suppress(Exception):
                client = await nats.connect(self.url, allow_reconnect=False, connect_timeout=2)
                try:
                    info = await client.jetstream().stream_info("FACELANE")
                    self.in_stream = info.state.messages
                finally:
                    await client.close()
            return self.in_stream
        if name in self.tails:
            return self.tails[name].count()
        return len({event_id(line) for line in self.files()})

    async def all_have(self, least: int) -> bool:
        return all([await self.has(name) >= least for name in SINKS])

    async def stream(self) -> list[bytes]:
        client = await nats.connect(self.url)
        try:
            reading = await client.jetstream().pull_subscribe("facelane.>", "judge")
            bodies: list[bytes] = []
            while len(bodies) < self.in_stream:
                for got in await reading.fetch(500, timeout=20):
                    bodies.append(got.data)
                    await got.ack()
            return bodies
        finally:
            await client.close()

    def close(self) -> None:
        self.deliverer.close()
        for one in self.subscribers.values():
            one.close()
        for broker in self.brokers.values():
            broker.kill()


def faults(run: Run, own_disk: bool) -> list[Fault]:
    """One of each kind."""
    found = [
        Fault(name, name, run.brokers[name].kill, run.brokers[name].start)
        for name in ("mqtt", "nats", "webhook", "syslog")
    ]
    found.append(
        Fault(
            "ours",
            "webhook",
            lambda: run.deliverer.end(signal.SIGKILL),
            run.deliverer.start,
        )
    )
    if own_disk:
        filler = run.disk / "filler"
        found.append(
            Fault("disk", "jsonl", lambda: fill(run.disk), lambda: filler.unlink(missing_ok=True))
        )
    return found


async def deliver(folder: Path, events: int, kills: int, seed: int) -> dict[str, Any]:
    """``kills`` of each kind, spread over the run at random."""
    server = ScriptedServer()
    server.events_stay_open, server.event_burst, server.events_end = True, 1 << 30, 0
    chance = random.Random(seed)
    with server, small_disk(folder / "disk") as own_disk:
        run = Run(folder, events, server)
        begun = time.monotonic()
        try:
            run.start()
            plan = [one for one in faults(run, own_disk) for _ in range(kills)]
            chance.shuffle(plan)
            told: Counter[str] = Counter()
            for number, fault in enumerate(plan):
                # A part of the events is told; somewhere in it the sink loses its receiver.
                begin, end = (events * n // len(plan) for n in (number, number + 1))
                least = chance.randint(begin, max(begin, (begin + end) // 2))
                server.events_end = end

                async def so_far(name: str = fault.sink, least: int = least) -> bool:
                    return await run.has(name) >= least

                await auntil(so_far, PATIENCE_S, what=f"{least} at {fault.sink}")
                fault.away()
                told[fault.name] += 1
                await asyncio.sleep(DOWN_S * (0.5 + chance.random()))
                fault.back()
                await auntil(
                    lambda end=end: run.all_have(end), PATIENCE_S, what=f"{end} everywhere"
                )
            took = time.monotonic() - begun
            run.deliverer.end()
            bodies = {
                **{name: one.taken for name, one in run.subscribers.items()},
                "nats": await run.stream(),
                "webhook": run.tails["webhook"].path.read_bytes().splitlines(),
                "syslog": run.tails["syslog"].path.read_bytes().splitlines(),
                "jsonl": run.files(),
            }
        finally:
            run.close()
    sinks = {name: judged(found, events) for name, found in bodies.items()}
    good = all(
        one["missing"] == 0 and one["in_order"] and one["recognisable"] for one in sinks.values()
    )
    return {"events": events, "seed": seed, "faults": dict(told), "took_s": round(took, 1),
            "sinks": sinks, "good": good}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=4, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        found = asyncio.run(
            deliver(Path(folder), arguments.events, arguments.kills, arguments.seed)
        )
    print(json.dumps(found))
    return 0 if found["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
