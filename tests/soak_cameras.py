"""``python -m tests.soak_cameras --hours 24 --scale 30``: a fleet that misbehaves all day.

Twelve cameras, half RTSP and half HTTP, reboot (the port is gone, then it answers nonsense),
step their clocks, refuse everybody, fall silent, send garbage; the bridge runs as the command
that people run, with all its times divided by the scale. Whenever a camera begins to give
pictures, a result of it has to be there within 30 s of simulated time, and memory and
descriptors of the bridge have to be flat. Ends with one JSON line, exit code 1 when not.

Refusals here come without a question, so that no password is sent: a camera that refuses a
password is asked again minutes later, by intent.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fakes.cameras import jpeg
from tests.fakes.field_cameras import (
    CLOCK,
    MULTIPART,
    Camera,
    HttpCamera,
    Play,
    Reply,
    Request,
    RtspCamera,
    head,
    parts,
)
from tests.fakes.scripted_server import ScriptedServer

PROMISE_S = 30.0
FPS = 10.0
BAD = ("reboot", "reboot", "clock", "refusing", "silent", "garbage", "mute")
PICTURES = [jpeg(number) for number in range(8)]


class Moody:
    """One camera and its moods, on a simulated clock."""

    def __init__(self, number: int, scale: float, seed: int) -> None:
        self.name = f"cam-{number}"
        self.is_rtsp = number % 2 == 0
        self.mood = "good"
        self.given_since = time.monotonic()
        self.waits: list[float] = []
        """Seconds from the begin of each good spell to the first result in it."""
        self.late: collections.Counter[str] = collections.Counter()
        """Spells whose first result came too late, by the mood before and the kind of camera."""
        self.spells: collections.Counter[str] = collections.Counter()
        self._first_result: float | None = None
        self._scale = scale
        self._random = random.Random(seed * 1000 + number)
        self._step = 0
        self._camera = self._new(0)
        self._camera.__enter__()
        self.port = self._camera.port

    @property
    def url(self) -> str:
        return self._camera.url

    def result(self) -> None:
        """The bridge has a result of this camera."""
        if self._first_result is None and self.mood in ("good", "clock"):
            self._first_result = time.monotonic()

    def close(self) -> None:
        self._camera.__exit__()

    def run(self, over: threading.Event) -> None:
        """Moods come and go until it is over."""
        while not over.is_set():
            self._spell(over, "good", self._random.uniform(120, 600))
            bad = self._random.choice(BAD)
            if bad == "reboot":
                self._camera.__exit__()
                over.wait(self._random.uniform(5, 200) / self._scale)
                self.mood = "starting"
                self._camera = self._new(self.port)
                self._camera.__enter__()
                self._spell(over, "starting", self._random.uniform(5, 90))
            elif bad == "clock":
                self._step += self._random.choice((-1, 1)) * self._random.randrange(10**9)
                self._spell(over, "clock", 60)
            else:
                self._spell(over, bad, self._random.uniform(10, 400))

    def _spell(self, over: threading.Event, mood: str, seconds: float) -> None:
        gives = mood in ("good", "clock")
        before = self.mood
        gave = before in ("good", "clock")
        self.spells[mood] += 1
        self.mood = mood
        if gives and not gave:
            self._first_result = None
            self.given_since = time.monotonic()
        over.wait(seconds / self._scale)
        if gives and not gave and not over.is_set():
            first = self._first_result
            wait = (time.monotonic() if first is None else first) - self.given_since
            if first is not None or wait * self._scale > PROMISE_S:
                self.waits.append(wait * self._scale)
                if wait * self._scale > PROMISE_S:
                    self.late[f"{'rtsp' if self.is_rtsp else 'http'} {before}"] += 1

    def _new(self, port: int) -> Camera:
        if self.is_rtsp:
            return _MoodyRtsp(self, port)
        return HttpCamera(self._body, reply=self.reply, port=port)

    def stamp(self, index: int) -> int:
        return (index + 1) * int(CLOCK / FPS) + self._step

    def reply(self, request: Request) -> Reply | None:
        match self.mood:
            case "refusing":
                return self._random.choice((401, 403, 503)), []
            case "mute":
                while self.mood == "mute" and not self._camera.stopped.wait(0.02):
                    pass
                return None
            case "starting":
                return self._random.choice((None, (404, []), (503, []), (401, [])))
            case _:
                return None

    def sdp(self, _: Request) -> str | None:
        return "" if self.mood == "starting" else None

    def _body(self, _: Request) -> Iterator[bytes]:
        if self.mood == "starting":
            yield head("text/html") + b"<html>starting</html>"
            return
        yield head(MULTIPART)
        number = 0
        while not self._camera.stopped.wait(1 / FPS):
            number += 1
            match self.mood:
                case "garbage":
                    yield self._random.randbytes(2000)
                case "silent" | "mute" | "refusing":
                    pass
                case _:
                    yield from parts(iter([PICTURES[number % len(PICTURES)]]))


class _MoodyRtsp(RtspCamera):
    """An RTSP camera whose media follow its mood, too."""

    def __init__(self, moody: Moody, port: int) -> None:
        super().__init__(
            # A key frame every few seconds of simulated time: before one there is no picture.
            Play(fps=FPS, gop=2, stamp=moody.stamp),
            reply=moody.reply,
            sdp=moody.sdp,
            port=port,
        )
        self._moody = moody

    def _pump(self, send: Callable[[bytes], None], number: int, connection: socket.socket) -> None:
        def follow(data: bytes) -> None:
            if self._moody.mood == "garbage":
                data = data[:4] + random.randbytes(len(data) - 4)
            if self._moody.mood not in ("silent", "mute", "refusing"):
                send(data)

        super()._pump(follow, number, connection)


def configuration(target: str, cameras: list[Moody], scale: float) -> str:
    """The bridge's file: its defaults, divided by the scale."""
    times = {
        "open_timeout": 10.0, "read_timeout": 30.0, "stall_after": 5.0, "stall_limit": 15.0,
        "backoff_initial": 0.5, "backoff_max": 10.0, "credentials_backoff": 120.0,
    }  # fmt: skip
    lines = ["status_interval = 60", "[server]", f'target = "{target}"', "[defaults]"]
    lines += [f"{key} = {value / scale:.4f}" for key, value in times.items()]
    for camera in cameras:
        lines += ["[[camera]]", f'name = "{camera.name}"', f'source = "{camera.url}"']
    return "\n".join(lines) + "\n"


def usage(pid: int) -> tuple[float, int, int]:
    """(MiB of memory, descriptors, threads) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return int(fields["VmRSS"].split()[0]) / 1024, descriptors, int(fields["Threads"])


def soak(hours: float, scale: float, seed: int, count: int = 12) -> dict[str, object]:
    """Run it; what came of it."""
    cameras = [Moody(number, scale, seed) for number in range(count)]
    over = threading.Event()
    moods = [threading.Thread(target=camera.run, args=(over,)) for camera in cameras]
    by_name = {camera.name: camera for camera in cameras}
    samples: list[tuple[float, int, int]] = []
    with tempfile.TemporaryDirectory() as folder, ScriptedServer() as server:
        file = Path(folder) / "bridge.toml"
        file.write_text(configuration(server.target, cameras, scale))
        process = subprocess.Popen(
            [sys.executable, "-m", "facelane_bridge", "--log-level", "error", "run", str(file)],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        summary: dict[str, object] = {}

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                told = json.loads(line)
                if told["type"] == "result":
                    by_name[told["camera"]].result()
                elif told["type"] == "summary":
                    summary.update(told)

        reader = threading.Thread(target=read)
        reader.start()
        for thread in moods:
            thread.start()
        end = time.monotonic() + hours * 3600 / scale
        while (left := end - time.monotonic()) > 0 and process.poll() is None:
            over.wait(min(left, hours * 3600 / scale / 40))
            with contextlib.suppress(OSError):
                samples.append(usage(process.pid))
            for stream in server.streams:
                stream.clear()
        over.set()
        for thread in moods:
            thread.join(60)
        process.terminate()
        process.wait(60)
        reader.join(60)
        process.stdout.close()
    for camera in cameras:
        camera.close()
    waits = sorted(wait for camera in cameras for wait in camera.waits)
    quarter = len(samples) // 4
    spells = sum((camera.spells for camera in cameras), collections.Counter())

    def most(index: int, part: list[tuple[float, int, int]]) -> float:
        return round(max((sample[index] for sample in part), default=0), 1)

    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    states = {name: totals["state"] for name, totals in summary.get("cameras", {}).items()}  # type: ignore[attr-defined]
    return {
        "hours": hours, "scale": scale, "seed": seed, "exit": process.returncode,
        "spells": dict(spells), "good_spells": len(waits),
        "late": sum(1 for wait in waits if wait > PROMISE_S),
        "late_after": dict(sum((camera.late for camera in cameras), collections.Counter())),
        "wait_s": {q: round(waits[int(q * (len(waits) - 1))], 1) for q in (0.5, 0.95, 1.0)}
        if waits else {},
        "states": dict(collections.Counter(states.values())), "results": summary.get("results"),
        "memory_mib": [most(0, early), most(0, late)],
        "descriptors": [most(1, early), most(1, late)],
        "threads": [most(2, early), most(2, late)],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--scale", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    report = soak(arguments.hours, arguments.scale, arguments.seed)
    print(json.dumps(report))
    memory, descriptors = report["memory_mib"], report["descriptors"]
    assert isinstance(memory, list)
    assert isinstance(descriptors, list)
    flat = memory[1] <= 1.1 * memory[0] + 5 and descriptors[1] <= descriptors[0] + 24
    return 0 if report["exit"] == 0 and not report["late"] and flat else 1


if __name__ == "__main__":
    sys.exit(main())
