"""The door of ``examples/`` before a camera, while everything that it hangs on is killed or cut.

    python -m tests.faults.door --seeds 200

A camera (HTTP-MJPEG, 10 pictures a second) is streamed by ``facelane-bridge`` to a server with the
models that ship, and ``examples/door.py`` listens to that server, each a process of its own, each
behind a connection that can be cut. One of the two people of the demo is enrolled. Before the
camera come, by a seed, she; a stranger; she as a photo on a screen; she out of focus, and in the
dark; nobody. Meanwhile the server, a worker or the bridge is killed, and connections are cut or
fall silent. Then, with all of it up again, one who must be kept out, and at last she.

``wrong``: openings for a picture in which she did not stand before the camera. ``missed``: seeds at
whose end the door stayed closed. ``unexplained``: of those who were kept out at the end, the ones
for whom the door did not say why, with what was analysed of them and what the door said instead.
``delay_ms``: from the camera's picture that showed who she is, and that she lives, to the door's
line; ``result_ms``: the part of it until the bridge had that picture's result, ``event_ms``: what
came after that; ``calm_delay_ms``: ``delay_ms`` of the openings at the end, with all of it up.
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
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Self

import cv2
import psutil
from tests.running_example import EXAMPLES
from tests.running_server import RunningServer, toml
from tests.waiting import auntil

import facelane
from facelane_bridge import demo_clip

FPS: Final = 10
SHE: Final = demo_clip.COLLINS
SHOTS: Final[dict[str, tuple[int, int]]] = {
    "she": (72, 138),
    "stranger": (4, 66),
    "spoof": (365, 399),
    "blurred": (171, 209),
    "dark": (241, 279),
    "nobody": (142, 146),
}
"""Frames of the demo's clip."""
KEPT_OUT: Final = ("stranger", "spoof", "blurred", "dark")
FAULTS: Final = (
    "server", "worker detector", "worker recognizer", "worker liveness", "bridge",
    "cut door", "cut camera", "silent door", "silent camera", "nothing",
)  # fmt: skip
UNREST_S: Final = 3.0
LINGERS_S: Final = 0.4
"""A picture that a cut scene, or a bridge, still had."""


@dataclass
class Pictures:
    """JPEG files by what they show."""

    by_kind: dict[str, list[bytes]]

    @classmethod
    def drawn(cls) -> Self:
        camera = demo_clip.Camera()
        by_kind: dict[str, list[bytes]] = {}
        for kind, (first, last) in SHOTS.items():
            step = demo_clip.FPS // FPS
            found = []
            for number in range(first, last, step):
                ok, data = cv2.imencode(".jpg", camera.frame(number))
                assert ok
                found.append(bytes(data))
            by_kind[kind] = found
        return cls(by_kind)


class Camera:
    """HTTP-MJPEG of what is set, and a log of when it showed what."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures
        self._viewers: set[asyncio.StreamWriter] = set()
        self.kind = "nobody"
        self._at = 0
        self.log: list[tuple[float, str]] = []
        """Wall clock, and what was sent then."""
        self._server: asyncio.Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._view, "127.0.0.1", 0)
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._task is not None
        assert self._server is not None
        self._task.cancel()
        for viewer in self._viewers:
            viewer.close()
        self._server.close()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/"

    def show(self, kind: str, at: int = 0) -> None:
        self.kind, self._at = kind, at

    def showed(self, kind: str, moment: float) -> bool:
        """Whether it may have been what a picture of this moment shows."""
        return any(
            moment - LINGERS_S <= at <= moment + 0.05 and was == kind for at, was in self.log
        )

    async def _view(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n"
        )
        self._viewers.add(writer)

    async def _run(self) -> None:
        while True:
            of_kind = self._pictures.by_kind[self.kind]
            self._at += 1
            # To and fro: a jump from the last picture to the first would be a cut.
            there = self._at % (2 * len(of_kind) - 2) if len(of_kind) > 1 else 0
            data = of_kind[min(there, 2 * len(of_kind) - 2 - there)]
            self.log.append((time.time(), self.kind))
            for viewer in list(self._viewers):
                if viewer.is_closing():
                    self._viewers.discard(viewer)
                elif viewer.transport.get_write_buffer_size() < 1 << 20:
                    head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"
                    viewer.write(head % len(data) + data + b"\r\n")
            await asyncio.sleep(1 / FPS)  # the camera's pace


class Wire:
    """A Unix socket that leads to another, until it is cut or falls silent."""

    def __init__(self, path: Path, to: Path) -> None:
        self._path = path
        self._to = to
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._talks = asyncio.Event()
        self._talks.set()

    @property
    def target(self) -> str:
        return f"unix:{self._path}"

    async def join(self) -> None:
        self._server = await asyncio.start_unix_server(self._join, self._path)

    async def cut(self) -> None:
        """Every connection breaks, and there are no new ones."""
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._path.unlink(missing_ok=True)

    def silence(self, *, on: bool) -> None:
        """Connections stay, and nothing goes over them."""
        if on:
            self._talks.clear()
        else:
            self._talks.set()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_unix_connection(self._to)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._carry(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                await self._talks.wait()
                sink.write(data)
                await sink.drain()
        sink.close()

    async def close(self) -> None:
        await self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@dataclass
class Program:
    """A process that prints JSON lines, and when each came."""

    command: list[str]
    errors: Path
    lines: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    process: asyncio.subprocess.Process | None = None
    _reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        with self.errors.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                limit=1 << 24, env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        self._reader = asyncio.create_task(self._read(self.process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            if line.endswith(b"\n"):
                self.lines.append((time.time(), json.loads(line)))

    async def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        assert self._reader is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        async with asyncio.timeout(90):
            await self.process.wait()
            await self._reader


@dataclass
class Account:
    """What happened."""

    seeds: int = 0
    openings: int = 0
    wrong: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    delays_ms: list[float] = field(default_factory=list)
    calm_ms: list[float] = field(default_factory=list)
    """Those after the trouble: while a line is cut or silent nobody could be quicker than it."""
    results_ms: list[float] = field(default_factory=list)
    events_ms: list[float] = field(default_factory=list)

    def told(self) -> dict[str, object]:
        return {
            "seeds": self.seeds,
            "openings": self.openings,
            "wrong": self.wrong,
            "missed": self.missed,
            "unexplained": self.unexplained,
            "faults": dict(self.faults),
            "reasons": dict(self.reasons),
            "delay_ms": _ranks(self.delays_ms),
            "result_ms": _ranks(self.results_ms),
            "event_ms": _ranks(self.events_ms),
            "calm_delay_ms": _ranks(self.calm_ms),
            "calm_over_500_ms": sum(delay > 500 for delay in self.calm_ms),
        }


def _ranks(values: list[float]) -> dict[str, int]:
    ordered = sorted(values)
    ranks = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "worst": 1.0}
    return {
        name: round(ordered[min(len(ordered) - 1, int(rank * len(ordered)))])
        for name, rank in ranks.items()
        if ordered
    }


class Site:
    """All of it; an async context manager."""

    def __init__(self, folder: Path, latest_s: float, patience_s: float) -> None:
        """``latest_s``: the door's. ``patience_s``: how long it may take to say what it must."""
        self._folder = folder
        self._latest_s = latest_s
        self._patience_s = patience_s
        self.account = Account()
        self._judged = 0
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def __aenter__(self) -> Self:
        folder = self._folder
        pictures = await asyncio.to_thread(Pictures.drawn)
        self._server = RunningServer(folder, toml(folder, pools="\n"))
        await asyncio.to_thread(self._server.wait_serving, 120)
        with self._server.client() as client:
            photo = facelane.Picture.encoded(pictures.by_kind["she"][20])
            await asyncio.to_thread(client.enroll, SHE, photo)
        self.camera = await Camera(pictures).__aenter__()
        socket = folder / "grpc.sock"
        self._wires = {n: Wire(folder / f"{n}.sock", socket) for n in ("door", "camera")}
        for wire in self._wires.values():
            await wire.join()
        settings = folder / "bridge.toml"
        settings.write_text(
            f'results = "all"\n[server]\ntarget = "{self._wires["camera"].target}"\n[[camera]]\n'
            f'name = "front"\nkind = "mjpeg"\nsource = "{self.camera.url}"\nbackoff_max = 0.5\n'
        )
        python = sys.executable
        self._bridge = Program(
            [python, "-m", "facelane_bridge", "run", str(settings)],
            folder / "bridge.log",
        )
        self.door = Program(
            [python, str(EXAMPLES / "door.py"), "--source", "front",
             "--latest", str(self._latest_s), "--target", self._wires["door"].target],
            folder / "door.log",
        )  # fmt: skip
        await self._bridge.start()
        await self.door.start()
        await self._healthy()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.door.kill(signal.SIGINT)
        self._judge(-1)  # what came after the last seed
        await self._bridge.kill(signal.SIGTERM)
        for wire in self._wires.values():
            await wire.close()
        await self.camera.__aexit__()
        await asyncio.to_thread(self._server.stop)

    async def seed(self, seed: int) -> None:
        """One play: trouble, then one who is kept out, then she."""
        chance = random.Random(seed)
        account = self.account
        acts = [asyncio.create_task(self._act(chance.choice(FAULTS), chance.uniform(0, 2)))
                for _ in range(chance.randint(1, 2))]  # fmt: skip
        ends = time.monotonic() + UNREST_S
        while time.monotonic() < ends:
            kind = chance.choice([*SHOTS, "she"])
            self.camera.show(kind, chance.randrange(40))
            await asyncio.sleep(chance.uniform(0.4, 1.5))  # the play's own pace
        self.camera.show("nobody")
        await asyncio.gather(*acts)
        await self._healthy()
        await asyncio.sleep(1.3)  # tracks of before have ended
        kept_out, since = chance.choice(KEPT_OUT), time.time()
        self.camera.show(kept_out, chance.randrange(40))
        await asyncio.sleep(1.0)  # how long they stand there
        self.camera.show("nobody")
        await asyncio.sleep(1.2)  # as above
        at = time.time()
        self.camera.show("she", chance.randrange(40))
        if not await self._says(lambda line: line.get("open") == SHE, at):
            account.missed.append(f"seed {seed}")
        if not await self._says(lambda line: line.get("closed") and line.get("seen"), since, at):
            account.unexplained.append(f"seed {seed}: {kept_out}, {self._witnesses(since, at)}")
        self.camera.show("nobody")
        account.seeds += 1
        self._judge(seed, calm_since=at)

    def _witnesses(self, since: float, until: float) -> str:
        """What was known of a time in which the door said nothing of anybody."""
        results = [
            line for _, line in self._bridge.lines
            if line.get("type") == "result" and since <= _moment(line["captured"]) < until
        ]  # fmt: skip
        faces = sum(bool(line["faces"]) for line in results)
        said = [line for at, line in self.door.lines if since <= at < until + self._patience_s]
        return f"{len(results)} pictures analysed, {faces} with a face; the door said {said}"

    def _result_at(self, seen: float) -> float | None:
        """When the bridge had the result of the picture of that moment."""
        for at, line in reversed(self._bridge.lines):
            if line.get("type") == "result" and abs(_moment(line["captured"]) - seen) < 0.002:
                return at
        return None

    def _judge(self, seed: int, calm_since: float = float("inf")) -> None:
        """What the door has said since this was asked before."""
        account = self.account
        began, self._judged = self._judged, len(self.door.lines)
        for moment, line in self.door.lines[began : self._judged]:
            if "closed" in line:
                account.reasons[line["closed"]] += 1
            if "open" not in line:
                continue
            account.openings += 1
            seen = _moment(line["seen"])
            account.delays_ms.append((moment - seen) * 1e3)
            if seen >= calm_since:
                account.calm_ms.append(account.delays_ms[-1])
            if (answered := self._result_at(seen)) is not None:
                account.results_ms.append((answered - seen) * 1e3)
                account.events_ms.append((moment - answered) * 1e3)
            if line["open"] != SHE or not self.camera.showed("she", seen):
                account.wrong.append(f"seed {seed}: {line}")

    async def _says(self, wanted: Any, since: float, until: float = float("inf")) -> bool:
        """Whether the door says so of a picture that was taken then; waits for what may come."""

        def found() -> bool:
            return any(
                wanted(line) and line.get("seen")
                and since - 0.1 <= datetime.fromisoformat(line["seen"]).timestamp() < until
                for _, line in self.door.lines
            )  # fmt: skip

        try:
            await auntil(found, self._patience_s)
        except AssertionError:
            return False
        return True

    async def _act(self, fault: str, after: float) -> None:
        await asyncio.sleep(after)
        what, _, which = fault.partition(" ")
        # Two at once, but each of them about another thing.
        about = {"worker": "server", "cut": which, "silent": which}.get(what, what)
        async with self._locks[about]:
            await self._commit(fault, what, which)

    async def _commit(self, fault: str, what: str, which: str) -> None:
        self.account.faults[fault] += 1
        if what == "server":
            await self._kill_server()
        elif what == "worker":
            for worker in self._workers(which):
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
        elif what == "bridge":
            await self._bridge.kill()
            await self._bridge.start()
        elif what == "cut":
            await self._wires[which].cut()
            await asyncio.sleep(0.7)  # how long it lasts
            await self._wires[which].join()
        elif what == "silent":
            self._wires[which].silence(on=True)
            await asyncio.sleep(1.5)  # how long it lasts
            self._wires[which].silence(on=False)

    async def _kill_server(self) -> None:
        children = self._server.children()
        self._server.process.kill()
        await asyncio.to_thread(self._server.process.wait, 30)
        await asyncio.to_thread(psutil.wait_procs, children, 30)
        self._server = await asyncio.to_thread(
            RunningServer, self._folder, self._server.config.read_text()
        )

    def _workers(self, stage: str) -> list[psutil.Process]:
        return [p for p in self._server.children() if stage in " ".join([*p.cmdline(), p.name()])]

    async def _healthy(self) -> None:
        """Until the server serves, the camera's pictures have results, and the door listens."""
        await asyncio.to_thread(self._server.wait_serving, 120)
        now = time.time()

        def well() -> bool:
            # What was sent before has been answered when what was sent now is.
            fresh = [line for at, line in self._bridge.lines[-20:] if at > now + 0.3]
            results = [line for line in fresh if line.get("type") == "result"]
            states = [x for _, x in self.door.lines[-200:] if "listening" in x or self._lost(x)]
            missing = any(line.get("missing_stages") for line in results)
            return bool(results) and not missing and bool(states) and "listening" in states[-1]

        await auntil(well, what="health")

    @staticmethod
    def _lost(line: dict[str, Any]) -> bool:
        return "closed" in line and "seen" not in line


def _moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


async def play(
    folder: Path, seeds: range, *, latest_s: float, patience_s: float, say: bool = False
) -> Account:
    async with Site(folder, latest_s, patience_s) as site:
        for seed in seeds:
            await site.seed(seed)
            if say:
                told = site.account.told()
                names = (
                    "openings",
                    "wrong",
                    "missed",
                    "unexplained",
                    "calm_delay_ms",
                    "calm_over_500_ms",
                )
                line = {name: told[name] for name in names}
                print(f"seed {seed}: {json.dumps(line)}", file=sys.stderr, flush=True)
        return site.account


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    chosen = parser.parse_args()
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    # A job that a shell runs in the background ignores this, and so would the door, which is
    # ended with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="facelane-door-") as scratch:
        account = asyncio.run(play(Path(scratch), seeds, latest_s=2.0, patience_s=5.0, say=True))
    print(json.dumps(account.told(), indent=1))
    return 1 if account.wrong or account.missed or account.unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
