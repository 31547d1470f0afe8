"""A key is removed from the keys file: how long do its open calls live after SIGHUP?

Null models. Each round gives a fresh key a stream that waits for its client, one with a full
window, and one that watches events; beside them a key that stays keeps a stream busy. Measured
from the signal to the moment at which the client has the error. gRPC's asyncio client loses the
status of a call that ends while it writes; ``without_reason`` counts those.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import facelane
import facelane.aio
from bench import material
from bench.report import Report, Row
from bench.service import Service, ServiceError
from bench.settings import Settings
from bench.stats import percentile
from facelane_server.edge.auth import Key, new_key

ENDS_WITHIN_S = 1.0
WAIT_S = 30.0
CALLS = ("idle stream", "busy stream", "event watcher")


async def run(settings: Settings) -> Report:
    report = Report("revocation", smoke=settings.smoke)
    rounds = settings.sized(30, 2)
    frame = facelane.Picture.encoded(material.frames_of_size(1, 20_000)[0])
    taken: dict[str, list[float]] = {name: [] for name in CALLS}
    untold = dict.fromkeys(CALLS, 0)
    with tempfile.TemporaryDirectory(prefix="facelane-bench-") as scratch:
        file = Path(scratch) / "keys.toml"
        secret, kept = new_key("kept", ("analyze", "admin"))
        _write(file, kept)
        tables = f'[auth]\nmode = "keys"\nkeys_file = "{file}"\n'
        models = material.null_models()
        async with Service(models.pools_toml(), tables=tables, token=secret) as service:
            ended = asyncio.Event()
            async with facelane.aio.Client(service.target, token=secret) as client:
                neighbour = asyncio.create_task(_stream(client, frame, ended, asyncio.Event()))
                for number in range(rounds):
                    settings.say(f"round {number + 1} of {rounds}")
                    ends = await _round(service, file, kept, frame)
                    for name, (lived, told) in ends.items():
                        taken[name].append(lived)
                        untold[name] += not told
                if neighbour.done():
                    raise ServiceError("the key that stays lost its stream")
                ended.set()
                await neighbour
    for name, seconds in taken.items():
        report.add(
            Row(
                name,
                "key removed, SIGHUP",
                models.name,
                p50_ms=percentile(seconds, 50) * 1e3,
                p99_ms=percentile(seconds, 99) * 1e3,
                extra={
                    "rounds": rounds,
                    "worst_ms": max(seconds) * 1e3,
                    "without_reason": untold[name],
                },
            )
        )
    worst = max(max(seconds) for seconds in taken.values())
    report.aim("the longest that a call lived, in seconds", worst, ENDS_WITHIN_S, at_most=True)
    return report


async def _round(
    service: Service, file: Path, kept: Key, frame: facelane.Picture
) -> dict[str, tuple[float, bool]]:
    """For each kind of call: seconds that it lived after the signal, whether it was told why."""
    secret, leaver = new_key("leaver", ("analyze",))
    _write(file, kept, leaver)
    service.process.send_signal(signal.SIGHUP)
    async with facelane.aio.Client(service.target, token=secret) as client:
        async with asyncio.timeout(WAIT_S):
            await _let_in(client)
        never, opened = asyncio.Event(), [asyncio.Event() for _ in CALLS]
        calls = [
            asyncio.create_task(_stream(client, frame, never, opened[0], busy=False)),
            asyncio.create_task(_stream(client, frame, never, opened[1])),
            asyncio.create_task(_watch(client, opened[2])),
        ]
        try:
            async with asyncio.timeout(WAIT_S):
                for event in opened:
                    await event.wait()
                _write(file, kept)
                begun = time.perf_counter()
                service.process.send_signal(signal.SIGHUP)
                ends = await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
    lived = ((at - begun, told) for at, told in ends)
    return dict(zip(CALLS, lived, strict=True))


def _write(file: Path, *keys: Key) -> None:
    fresh = file.with_suffix(".new")
    fresh.write_text("\n".join(key.entry() for key in keys))
    os.replace(fresh, file)


async def _let_in(client: facelane.aio.Client) -> None:
    while True:
        try:
            await client.health()
            return
        except facelane.AuthenticationError:
            await asyncio.sleep(0.01)


async def _stream(
    client: facelane.aio.Client,
    picture: facelane.Picture,
    ended: asyncio.Event,
    opened: asyncio.Event,
    *,
    busy: bool = True,
) -> tuple[float, bool]:
    """Sends a picture again and again, or once; when it ended, and whether it was told why."""

    async def frames() -> AsyncIterator[facelane.Frame]:
        number = 0
        while not ended.is_set():
            if busy or number == 0:
                number += 1
                yield facelane.Frame(picture, stream_offset=number / 25)
            else:
                await asyncio.sleep(0.05)

    told = True
    try:
        async for _ in client.analyze(frames()):
            opened.set()
    except facelane.AuthenticationError:
        pass
    except facelane.ConnectionLostError:
        told = False
    return time.perf_counter(), told


async def _watch(client: facelane.aio.Client, opened: asyncio.Event) -> tuple[float, bool]:
    with contextlib.suppress(facelane.AuthenticationError):
        async with client.watch_events() as events:
            opened.set()
            async for _ in events:
                pass
    return time.perf_counter(), True
