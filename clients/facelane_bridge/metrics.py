"""Metrics of the bridge, for Prometheus: each camera's state, frames, drops, age, openings."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from facelane_bridge.camera import CameraState
from facelane_bridge.config import ConfigError, host_and_port
from facelane_bridge.output import CameraTotals

Snapshot = Callable[[], Awaitable[dict[str, CameraTotals]]]
SNAPSHOT_TIMEOUT = 5.0

_COUNTERS = {
    "frames": "Frames that the camera gave.",
    "results": "Frames that were analysed.",
    "faces": "Faces in results.",
    "skipped": "Frames passed over to keep to max_fps.",
    "openings": "How often the camera was opened.",
    "connections": "How often a stream to the server was opened.",
}


class _Cameras(Collector):
    """Every camera's counters as they are when they are asked for."""

    def __init__(self, snapshot: Snapshot, loop: asyncio.AbstractEventLoop) -> None:
        self._snapshot = snapshot
        self._loop = loop

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        async def ask() -> dict[str, CameraTotals]:
            return await self._snapshot()

        asked = asyncio.run_coroutine_threadsafe(ask(), self._loop)
        cameras = asked.result(SNAPSHOT_TIMEOUT)
        prefix = "facelane_bridge_camera"
        for field, text in _COUNTERS.items():
            counter = CounterMetricFamily(f"{prefix}_{field}", text, labels=["camera"])
            for name, totals in cameras.items():
                counter.add_metric([name], getattr(totals, field))
            yield counter
        for what in ("drops", "errors"):
            counter = CounterMetricFamily(
                f"{prefix}_{what}", f"Frames without a result: {what}.", labels=["camera", "reason"]
            )
            for name, totals in cameras.items():
                for reason, count in getattr(totals, f"{what}_by_reason").items():
                    counter.add_metric([name, reason], count)
            yield counter
        state = GaugeMetricFamily(
            f"{prefix}_state", "1 for the state that the camera is in.", labels=["camera", "state"]
        )
        age = GaugeMetricFamily(
            f"{prefix}_frame_age_seconds", "Since the newest frame.", labels=["camera"]
        )
        for name, totals in cameras.items():
            for known in CameraState:
                state.add_metric([name, known.value], float(totals.state == known.value))
            if totals.age_s is not None:
                age.add_metric([name], totals.age_s)
        yield state
        yield age


@contextlib.contextmanager
def serve_metrics(address: str, snapshot: Snapshot) -> Iterator[None]:
    """Serve ``/metrics`` at ``host:port`` while the block runs; nothing for no address.

    Raises ``ConfigError`` where nothing can be served there.
    """
    if not address:
        yield
        return
    host, port = host_and_port(address)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Cameras(snapshot, asyncio.get_running_loop()))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(f"metrics: {address} cannot be served ({error.strerror})") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(SNAPSHOT_TIMEOUT)
