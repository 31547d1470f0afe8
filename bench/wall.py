"""How many pictures a second of a camera's video does the console's live wall show?

The demo's clip (H.264, 20 pictures a second, B-frames) is played over and over in real time by
``facelane-bridge`` into a server with the models that ship; ``facelane-console`` shows it in a real
Chromium, which decodes it (WebCodecs) and draws over each picture what was found in that very one.
Counted in the browser are the pictures that were drawn, each frame once; the browser's own clock
says how long that took. Everything runs on this one machine, the browser without a graphics card.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from bench.material import MissingError
from bench.report import Report, Row
from bench.service import Service, ServiceError
from bench.settings import Settings
from bench.stats import median, percentile

CHROMIUM: Final = Path("/usr/bin/chromium")
AIM: Final = 15.0
"""Pictures a second."""
POOLS: Final = "\n".join(
    f'[pools.{stage}]\nmodel = "facelane-{stage}"'
    for stage in ("detector", "recognizer", "liveness")
)
START_S: Final = 60.0
WARM_S: Final = 3.0
# Every drawing of the first camera: its frame's number, and the browser's clock in milliseconds.
_COUNT: Final = """() => {
    const canvas = document.querySelector('canvas');
    window.drawn = [];
    new MutationObserver(() => window.drawn.push([+canvas.dataset.frame, performance.now()]))
        .observe(canvas, {attributes: true, attributeFilter: ['data-painted']});
}"""


async def run(settings: Settings) -> Report:
    report = Report("wall", smoke=settings.smoke)
    if not CHROMIUM.exists():
        raise MissingError(f"no browser at {CHROMIUM}: apt-get install chromium")
    try:
        import playwright.async_api  # noqa: F401
    except ImportError:
        raise MissingError("the browser is driven by playwright: pip install playwright") from None
    rounds, seconds = settings.sized(6, 1), settings.lasting(10.0, 2.0)
    with tempfile.TemporaryDirectory(prefix="facelane-bench-") as folder:
        clip = await _clip(Path(folder), settings)
        async with (
            Service(POOLS) as service,
            _bridge(service.target, clip),
            _console(service.target) as address,
            _page(address) as page,
        ):
            found = []
            for number in range(rounds):
                settings.say(f"round {number + 1} of {rounds}")
                found.append(await _watch(page, seconds))
    rates = [rate for rate, _, _ in found]
    report.add(
        Row(
            "bridge, server, console, Chromium",
            "the demo's clip, H.264 with B-frames, one camera",
            "those that ship",
            rate_hz=20.0,
            throughput_per_s=median(rates),
            p50_ms=median([p50 for _, p50, _ in found]),
            p99_ms=median([p99 for _, _, p99 in found]),
            extra={"lowest_per_s": min(rates), "rounds": rounds, "seconds": seconds},
        )
    )
    report.note("p50 and p99: milliseconds from one picture that is drawn to the next")
    report.aim("pictures a second in the slowest round", min(rates), AIM, at_most=False)
    return report


async def _clip(folder: Path, settings: Settings) -> Path:
    from facelane_bridge import demo_clip

    settings.say("rendering the demo's clip")
    return await asyncio.to_thread(demo_clip.render, folder, threading.Event())


async def _watch(page: Any, seconds: float) -> tuple[float, float, float]:
    """Pictures a second, and the gaps between them in milliseconds: median, 99th percentile."""
    await page.evaluate("() => { window.drawn.length = 0; window.begun = performance.now(); }")
    await asyncio.sleep(seconds)
    drawn, lasted = await page.evaluate("() => [window.drawn, performance.now() - window.begun]")
    first: dict[int, float] = {}
    for frame, at in drawn:
        first.setdefault(frame, at)
    if len(first) < 2:
        raise ServiceError("the wall stands still")
    times = sorted(first.values())
    gaps = [later - before for before, later in itertools.pairwise(times)]
    return len(first) / lasted * 1e3, percentile(gaps, 50), percentile(gaps, 99)


@contextlib.asynccontextmanager
async def _program(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program of facelane's; leaving ends it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(30.0):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def _bridge(target: str, clip: Path) -> AsyncIterator[None]:
    arguments = ("--log-level", "error", "run", "--source", str(clip), "--loop", "--pace")
    async with _program(
        "facelane_bridge", *arguments, "realtime", "--results", "off", "--target", target
    ):
        yield


@contextlib.asynccontextmanager
async def _console(target: str) -> AsyncIterator[str]:
    """Its address."""
    async with _program(
        "facelane_console", "--target", target, "--listen", f"127.0.0.1:{_free_port()}"
    ) as process:
        assert process.stderr is not None
        async with asyncio.timeout(START_S):
            said = (await process.stderr.readline()).decode()
        if (found := re.search(r"http://\S+", said)) is None:
            raise ServiceError(f"the console says {json.dumps(said)}")
        yield found[0]


@contextlib.asynccontextmanager
async def _page(address: str) -> AsyncIterator[Any]:
    """The wall in a browser, from when its first picture is there."""
    from playwright.async_api import async_playwright

    async with async_playwright() as play:
        browser = await play.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            page = await browser.new_page(viewport={"width": 1280, "height": 800}, locale="en-GB")
            page.set_default_timeout(START_S * 1e3)
            await _open(page, address)
            await page.get_by_role("button", name="Log in").click()
            await page.locator("canvas[data-how=webcodecs]").wait_for()
            await page.evaluate(_COUNT)
            await asyncio.sleep(WARM_S)
            yield page
        finally:
            await browser.close()


async def _open(page: Any, address: str) -> None:
    """The console says where it is before it listens."""
    async with asyncio.timeout(START_S):
        while True:
            with contextlib.suppress(Exception):
                await page.goto(address)
                return
            await asyncio.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
