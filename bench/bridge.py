"""What one camera's video costs, bridge and server together: decoded by the bridge and sent as
JPEG, or passed on and decoded where it is looked at.

A clip of 720p H.264 at 25 pictures a second is played in real time, as a camera would, by
``facelane-bridge`` as people run it, into a server of its own. Counted is the processor time of
the bridge, the server and its workers over some seconds in the middle. The two ways take turns;
ratios are of medians over the rounds. Models that compute nothing, behind a decoder, leave what
the way costs; with real models their own time is added to both.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psutil

from bench import material
from bench.report import Report, Row
from bench.service import Service, ServiceError
from bench.settings import Settings
from bench.stats import median, percentile, ratio

RATIO: Final = 0.6
FPS: Final = 25
SIZE: Final = (1280, 720)
BIT_RATE: Final = 2_000_000
_WAYS: Final = ("decode", "pass")
_WARM_S: Final = 3.0
_START_S: Final = 60.0


async def run(settings: Settings) -> Report:
    report = Report("bridge", smoke=settings.smoke)
    with tempfile.TemporaryDirectory(prefix="facelane-bench-") as folder:
        clip = Path(folder) / "camera.mp4"
        _write(clip, settings)
        if settings.wants("null"):
            await _compare(settings, report, clip, material.null_models(decoding=True))
        if settings.wants("real"):
            await _compare(settings, report, clip, material.real_models(settings.cache))
    return report


def _write(path: Path, settings: Settings) -> None:
    """A camera's stream: no B-frames, a key frame every two seconds, 2 Mbit a second."""
    import av
    import cv2
    import numpy as np

    settings.say("encoding a clip")
    options = {"bf": "0", "g": str(2 * FPS), "preset": "veryfast"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height = SIZE
        stream.pix_fmt, stream.bit_rate = "yuv420p", BIT_RATE
        for data in material.make_frames(settings.sized(8 * FPS, FPS), *SIZE, [1]):
            decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            pixels = np.asarray(decoded, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="bgr24")))
        container.mux(stream.encode(None))


async def _compare(settings: Settings, report: Report, clip: Path, models: material.Models) -> None:
    rounds = settings.sized(3, 1)
    seconds = settings.lasting(10.0, 1.0)
    runs: dict[str, list[_Run]] = {way: [] for way in _WAYS}
    for number in range(rounds):
        for way in _WAYS:
            settings.say(f"{models.name}: round {number + 1} of {rounds}: {way}")
            runs[way].append(await _measure(clip, models, way, seconds))
    for way, found in runs.items():
        report.add(
            Row(
                deployment="bridge decodes, JPEG" if way == "decode" else "video passed on",
                scenario=f"720p H.264, {FPS} pictures a second, {models.name}",
                model=models.name,
                rate_hz=FPS,
                p50_ms=median([run.p50_ms for run in found]),
                throughput_per_s=median([run.results / run.seconds for run in found]),
                extra={
                    "cpu_ms_a_picture": median([run.cost_ms for run in found]),
                    "bridge_ms": median([run.ms(run.bridge_s) for run in found]),
                    "front_ms": median([run.ms(run.front_s) for run in found]),
                    "workers_ms": median([run.ms(run.workers_s) for run in found]),
                    "kilobytes_a_picture": median([run.kilobytes for run in found]),
                },
            )
        )
    before, after = (median([run.cost_ms for run in runs[way]]) for way in _WAYS)
    what = "processor time, passed on / decoded by the bridge"
    if models.origin == "null":
        report.aim(
            f"{what}, models that compute nothing:", ratio(after, before), RATIO, at_most=True
        )
    else:
        report.note(f"{what}, {models.name} and all: {ratio(after, before):.4g}; {models.listed}")


class _Run:
    """Of one way, over ``seconds``: results, and processor seconds of each."""

    def __init__(self, seconds: float, results: int) -> None:
        self.seconds = seconds
        self.results = results
        self.bridge_s = self.front_s = self.workers_s = self.p50_ms = self.kilobytes = 0.0

    def ms(self, seconds: float) -> float:
        """A picture that the camera gave."""
        return seconds * 1e3 / (self.seconds * FPS)

    @property
    def cost_ms(self) -> float:
        return self.ms(self.bridge_s + self.front_s + self.workers_s)


async def _measure(clip: Path, models: material.Models, way: str, seconds: float) -> _Run:
    async with Service(models.pools_toml()) as service:
        bridge = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "facelane_bridge", "--log-level", "error", "run"),
            *("--source", str(clip), "--loop", "--video", way, "--target", service.target),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=DEVNULL,
        )
        try:
            lines = _Lines(bridge)
            async with asyncio.timeout(_START_S):
                while not lines.latencies:
                    if bridge.returncode is not None:
                        raise ServiceError(f"the bridge ended with {bridge.returncode}")
                    await asyncio.sleep(0.05)
            await asyncio.sleep(_WARM_S)
            lines.latencies.clear()
            before, begun = _used(service, bridge), asyncio.get_running_loop().time()
            await asyncio.sleep(seconds)
            lasted = asyncio.get_running_loop().time() - begun
            after = _used(service, bridge)
            if lines.refused:
                raise ServiceError(f"the server refused {lines.refused} pictures")
            run = _Run(lasted, len(lines.latencies))
            run.p50_ms = percentile(lines.latencies, 50)
            run.bridge_s = after["bridge"] - before["bridge"]
            run.front_s = after["front"] - before["front"]
            run.workers_s = after["workers"] - before["workers"]
            run.kilobytes = _kilobytes(clip, way)
            return run
        finally:
            if bridge.returncode is None:
                bridge.terminate()
            await bridge.wait()
            lines.task.cancel()


class _Lines:
    """The bridge's results as they come."""

    def __init__(self, bridge: Process) -> None:
        self.latencies: list[float] = []
        self.refused = 0
        self._bridge = bridge
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._bridge.stdout is not None
        async for line in self._bridge.stdout:
            told = json.loads(line)
            if told["type"] == "result":
                self.latencies.append(told["latency_ms"])
            elif told["type"] == "error":
                self.refused += 1


def _used(service: Service, bridge: Process) -> Mapping[str, float]:
    """Processor seconds so far."""

    def of(process: psutil.Process) -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    return {
        "bridge": of(psutil.Process(bridge.pid)),
        "front": of(service.front()),
        "workers": sum(of(worker) for worker in service.workers()),
    }


def _kilobytes(clip: Path, way: str) -> float:
    """What goes to the server, a picture; of JPEG by the bridge's own encoder."""
    from facelane_bridge.config import single
    from facelane_bridge.sources import open_source

    source = open_source(
        single(str(clip), server={}, options={"pace": "fast", "video": way}).cameras[0]
    )
    sizes: list[int] = []
    try:
        source.open()
        while (frame := source.read()) is not None and len(sizes) < 2 * FPS:
            sizes.append(len(frame.data))
    finally:
        source.close()
    return sum(sizes) / len(sizes) / 1e3
