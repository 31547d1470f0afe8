"""Several processes at one address (``server.shards``): what they carry, and what an enrolment at
one of them costs until every other names the person.

Part ``null``: null models that do not look at the pictures, 10 kB frames, lossless, from client
processes on the same machine; frames a second through one address by number of shards. Part
``matched`` (and ``matched-1m``, where it is named): 100,000 templates (a million), four shards with
two streams each that recognise every picture, the next one when the last is answered; from the
answer to an enrolment until the name comes on the last of them, how long a picture's answer takes
meanwhile, and the bytes that the server's processes write for an enrolment. ``--shards N`` for one
number of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import psutil

import facelane
import facelane.aio
from bench import material
from bench.report import Report, Row
from bench.service import Service
from bench.settings import Settings
from bench.stats import percentile
from bench.vault import fill
from facelane_server.domain import Stage

FRAMES_PER_S: Final = 6_000
MATCHED_MS: Final = 250.0
TRAFFIC_MB: Final = 20.0
TEMPLATES: Final = 100_000
MANY_TEMPLATES: Final = 1_000_000
WINDOW: Final = 16
STREAMS_EACH: Final = 8
"""Of a shard."""
WARM_S: Final = 8.0
WARM_ANSWERS: Final = 20
"""Of a stream, which has been sent to its shard by then."""
LOOK_S: Final = 0.02
"""Between an answer and the next picture of a stream that waits for a name."""


@dataclass(frozen=True, slots=True)
class Job:
    """Of one client process. ``begin``, ``end``: ``time.monotonic`` seconds between which answers
    count."""

    target: str
    frames: str
    streams: int
    begin: float
    end: float


async def run(settings: Settings) -> Report:
    report = Report("shards", smoke=settings.smoke)
    if settings.wants("null"):
        await _null(settings, report)
    if settings.wants("matched"):
        await _matched(settings, report, settings.sized(TEMPLATES, 500))
    if "matched-1m" in settings.only:
        await _matched(settings, report, settings.sized(MANY_TEMPLATES, 1_000))
    return report


# -- frames a second ----------------------------------------------------------------------------


async def _null(settings: Settings, report: Report) -> None:
    cores = len(os.sched_getaffinity(0))
    numbers = [settings.shards] if settings.shards else [n for n in (1, 2, 4, 6) if n <= cores // 2]
    best = 0.0
    for shards in numbers or [1]:
        settings.say(f"{shards} shards")
        row = await _saturated(settings, shards, cores)
        report.add(row)
        best = max(best, row.throughput_per_s or 0.0)
    report.aim("frames a second of 10 kB through one address:", best, FRAMES_PER_S, at_most=False)


async def _saturated(settings: Settings, shards: int, cores: int) -> Row:
    seconds = settings.lasting(15.0, 1.0)
    # A client takes about as much of a processor for a frame as a front does.
    clients = min(max(2, shards * 3 // 2), max(2, cores - 2 * shards))
    streams = shards * STREAMS_EACH
    pools = material.null_models(decoding=False).pools_toml()
    with tempfile.TemporaryDirectory(prefix="facelane-bench-") as scratch:
        folder = Path(scratch)
        (folder / "frames").mkdir()
        for number, data in enumerate(material.frames_of_size(settings.sized(16, 4), 10_000)):
            (folder / "frames" / f"{number:02d}.jpg").write_bytes(data)
        async with Service(pools, shards=shards, start_s=300.0) as service:
            begin = time.monotonic() + WARM_S + 0.2 * clients
            jobs = [
                Job(
                    service.target,
                    str(folder / "frames"),
                    streams // clients + (index < streams % clients),
                    begin,
                    begin + seconds,
                )
                for index in range(clients)
            ]
            working = asyncio.create_task(_clients(jobs, folder))
            await asyncio.sleep(max(0.0, begin - time.monotonic()))
            fronts = service.fronts()
            async with facelane.aio.Client(service.target, timeout=10.0) as client:
                spread = [s.open_streams for s in (await client.server_info()).shards]
            before = [_loop_seconds(front.pid) for front in fronts]
            psutil.cpu_percent()
            at = time.monotonic()
            await asyncio.sleep(max(0.0, begin + seconds - time.monotonic()))
            elapsed = max(1e-3, time.monotonic() - at)
            machine = psutil.cpu_percent() / 100
            loops = [
                (_loop_seconds(front.pid) - spent) / elapsed
                for front, spent in zip(fronts, before, strict=True)
            ]
            memory = service.rss_mib()
            found = await working
    answered = sum(one["answered"] for one in found)
    trips = [trip for one in found for trip in one["trips"]]
    return Row(
        deployment=f"{shards} shard{'s' * (shards > 1)}",
        scenario=f"{streams} streams of {clients} client processes, 10 kB, null models",
        p50_ms=percentile(trips, 50) * 1e3,
        p99_ms=percentile(trips, 99) * 1e3,
        throughput_per_s=answered / seconds,
        memory_mib=memory,
        extra={
            "lost": sum(one["lost"] for one in found),
            "spread": " ".join(map(str, spread)),
            "busiest_loop": max(loops),
            "idlest_loop": min(loops),
            "client_cpu": max(one["cpu"] for one in found),
            "machine_cpu": machine,
        },
    )


def _loop_seconds(pid: int) -> float:
    """Processor time of a process's first thread, which runs the event loop."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


async def _clients(jobs: Sequence[Job], folder: Path) -> list[dict[str, Any]]:
    processes = []
    try:
        for number, job in enumerate(jobs):
            path = folder / f"{number}.json"
            path.write_text(json.dumps(asdict(job)))
            processes.append(
                await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "bench.shards", str(path)),
                    stdout=asyncio.subprocess.PIPE,
                    limit=2**26,
                )
            )
        outputs = await asyncio.wait_for(
            asyncio.gather(*(process.communicate() for process in processes)), 180
        )
    finally:
        for process in processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
    return [json.loads(output) for output, _ in outputs]


async def _load(job: Job) -> dict[str, Any]:
    """Streams that keep their windows full until the end."""
    pictures = [
        facelane.Picture.encoded(file.read_bytes()) for file in sorted(Path(job.frames).iterdir())
    ]
    answered, lost = 0, 0
    trips: list[float] = []

    async def stream(client: facelane.aio.Client, number: int) -> None:
        nonlocal answered, lost
        room = asyncio.Semaphore(WINDOW)
        async with client.analyze_stream(overload="lossless", max_frame_age=60.0) as open_stream:

            async def pump() -> None:
                index = number
                while time.monotonic() < job.end:
                    await room.acquire()
                    await open_stream.send(pictures[index % len(pictures)], timeout=60.0)
                    index += 1
                open_stream.close_send()

            sender = asyncio.create_task(pump())
            async for outcome in open_stream:
                room.release()
                if job.begin <= time.monotonic() < job.end:
                    answered += outcome.result is not None
                    if answered % 16 == 0:
                        trips.append(round(outcome.round_trip, 6))
                lost += outcome.result is None
            await sender

    async with facelane.aio.Client(job.target) as client:
        work = asyncio.gather(*(stream(client, number) for number in range(job.streams)))
        await asyncio.sleep(max(0.0, job.begin - time.monotonic()))
        used, at = time.process_time(), time.monotonic()
        await asyncio.sleep(max(0.0, job.end - time.monotonic()))
        cpu = (time.process_time() - used) / max(1e-3, time.monotonic() - at)
        await work
    return {"answered": answered, "lost": lost, "trips": trips, "cpu": cpu}


# -- an enrolment at every shard ------------------------------------------------------------------


async def _matched(settings: Settings, report: Report, templates: int) -> None:
    shards, rounds = settings.shards or 4, settings.sized(10, 2)
    models = material.null_models()
    recogniser = models.packages[Stage.RECOGNIZER]
    people = [facelane.Picture.encoded(data) for data in material.frames_of_size(rounds, 10_000)]
    waits: list[float] = []
    written: list[float] = []
    trips: list[float] = []
    with tempfile.TemporaryDirectory(prefix="facelane-bench-") as scratch:
        path = Path(scratch) / "gallery.db"
        settings.say(f"{templates} templates")
        fill(path, templates, recogniser.model_id, recogniser.embedding_dim)
        tables = (
            f'[gallery]\npath = "{path}"\nmax_templates = {templates + 1_000}\n'
            '[store]\nencryption = "off"\n'
        )
        settings.say(f"{shards} shards begin")
        service = Service(models.pools_toml(), tables=tables, shards=shards, start_s=600.0)
        async with service, facelane.aio.Client(service.target, timeout=60.0) as client:
            async with asyncio.timeout(600.0):  # a server serves before its last shard does
                while {one.state for one in (await client.server_info()).shards} != {"READY"}:
                    await asyncio.sleep(0.2)
            for number, picture in enumerate(people):
                settings.say(f"enrolment {number + 1} of {rounds}")
                written.append(await _traffic(service, client, picture, f"person-{number}"))
                waits.append(await _until_named(client, picture, f"person-{number}", shards, trips))
    report.add(
        Row(
            deployment=f"{shards} shards, {templates} templates",
            scenario="an enrolment until every shard names the person",
            model=recogniser.model_id,
            p50_ms=percentile(waits, 50) * 1e3,
            p99_ms=max(waits, default=math.nan) * 1e3,
            extra={
                "written_mb": percentile(written, 50),
                "written_most_mb": max(written),
                "picture_p50_ms": percentile(trips, 50) * 1e3,
                "picture_p99_ms": percentile(trips, 99) * 1e3,
            },
        )
    )
    report.aim("slowest shard, ms behind the answer:", max(waits) * 1e3, MATCHED_MS, at_most=True)
    report.aim("written for one enrolment, MB:", max(written), TRAFFIC_MB, at_most=True)


async def _traffic(
    service: Service, client: facelane.aio.Client, picture: facelane.Picture, subject: str
) -> float:
    """MB that all processes of the server wrote for an enrolment, beyond what they write in the
    same time without one: files, memory files and pipes, as the kernel counts them."""
    everything = [*service.fronts(), *service.workers(), service.front()]

    def total() -> int:
        return sum(int(process.io_counters().write_chars) for process in everything)

    begun = total()
    await asyncio.sleep(1.0)
    before = total()
    at = time.monotonic()
    await client.enroll(subject, picture)
    await asyncio.sleep(max(0.0, at + 1.0 - time.monotonic()))
    found = total() - before - (before - begun)
    await client.delete_subject(subject)
    return max(0.0, found / 1e6)


async def _until_named(
    client: facelane.aio.Client,
    picture: facelane.Picture,
    subject: str,
    shards: int,
    trips: list[float],
) -> float:
    """Seconds from the answer to an enrolment until the name has come on streams of each shard,
    which send the next picture when they have the answer to the last one. ``trips``: how long each
    answer took is added to it."""
    named: dict[int, float] = {}
    answers = [0] * 2 * shards  # so many streams that each shard has one
    stop = asyncio.Event()

    async def look(number: int) -> None:
        async with client.analyze_stream(overload="lossless", disable_tracking=True) as stream:
            while not stop.is_set():
                await stream.send(picture, timeout=30.0)
                outcome = await anext(stream)
                faces = outcome.result.faces if outcome.result else ()
                if number not in named and any(f.identity.subject_id == subject for f in faces):
                    named[number] = time.monotonic()
                answers[number] += 1
                if answers[number] > WARM_ANSWERS:
                    trips.append(outcome.round_trip)
                await asyncio.sleep(LOOK_S)
            stream.close_send()

    looking = [asyncio.create_task(look(number)) for number in range(len(answers))]
    try:
        async with asyncio.timeout(60.0):
            while min(answers) < 2 * WARM_ANSWERS:
                await asyncio.sleep(0.05)
            spread = [s.open_streams for s in (await client.server_info()).shards]
            assert min(spread) > 0, spread
            await client.enroll(subject, picture)
            answered = time.monotonic()
            while len(named) < len(answers):
                await asyncio.sleep(0.005)
    finally:
        stop.set()
        await asyncio.gather(*looking, return_exceptions=True)
    await client.delete_subject(subject)
    return max(0.0, max(named.values()) - answered)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_load(Job(**json.loads(Path(sys.argv[1]).read_text()))))))
