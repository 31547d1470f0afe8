"""What is counted, and what is read when a scrape comes: Prometheus text.

Nothing in it has a label that grows with clients: no stream, no track, no subject. Keys are the
operator's, as many as the keys file has.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from facelane_server import __version__, limits
from facelane_server.capacity import Load
from facelane_server.domain import (
    Decision,
    DropReason,
    FrameDrop,
    FrameError,
    FrameResult,
    LivenessVerdict,
    Outcome,
    Overload,
    Reason,
    Stage,
)
from facelane_server.monitor import DeviceReading
from facelane_server.pools.report import PoolInfo, PoolState

_LATENCY_BUCKETS: Final = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1,
    0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GalleryReading:
    """``templates``: of the serving model. ``version``: of the newest snapshot."""

    templates: int
    version: int


@dataclass(frozen=True, slots=True)
class Sources:
    """Where values come from that are read at the time of a scrape, not counted here."""

    pools: Callable[[], Iterable[PoolInfo]] = tuple
    devices: Callable[[], Iterable[DeviceReading]] = tuple
    gallery: Callable[[], GalleryReading | None] = lambda: None
    streams: Callable[[], int] = lambda: 0
    watchers: Callable[[], int] = lambda: 0
    load: Callable[[], Load | None] = lambda: None
    calls: Callable[[], Mapping[tuple[str, str, bool], int]] = dict
    """By key, verb, and whether they were let in."""
    lookups: Callable[[], Mapping[str, int]] = dict
    """By key."""


class _Count:
    """A counter of one thread, the event loop's, until somebody asks for it: the library's takes
    a lock for every frame."""

    __slots__ = ("counter", "new")

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.new = 0

    def tell(self) -> None:
        new, self.new = self.new, 0
        if new:
            self.counter.inc(new)


class _Counts(Collector):
    """Tells what was counted to the library's counters, before these are read: it has to be
    registered first."""

    def __init__(self) -> None:
        self._all: list[_Count] = []

    def of(self, counter: Counter) -> _Count:
        count = _Count(counter)
        self._all.append(count)
        return count

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        for count in self._all:
            count.tell()
        return ()


class _Latencies:
    """A histogram of one thread, the event loop's: a tenth of the cost of the library's, which
    takes a lock and walks its buckets at every observation of every frame."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_LATENCY_BUCKETS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(_LATENCY_BUCKETS, seconds)] += 1
        self._sum += seconds

    def into(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        totals = itertools.accumulate(self._counts)
        bounds = (*map(str, _LATENCY_BUCKETS), "+Inf")
        family.add_metric(labels, list(zip(bounds, totals, strict=True)), self._sum)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, sources: Sources | None = None) -> None:
        self.registry = CollectorRegistry()
        counts = _Counts()
        self.registry.register(counts)
        ProcessCollector(registry=self.registry)
        self._frames = Counter(
            "facelane_frames",
            "Frames received, by outcome: result, drop or error, and why.",
            ["outcome", "reason"],
            registry=self.registry,
        )
        # Apart, because a file fills its window on purpose: its frames wait in it, and their ages
        # would hide those of the cameras.
        self._age = {o: _Latencies() for o in Overload}
        self._queue = {s: _Latencies() for s in Stage}
        self._service = {s: _Latencies() for s in Stage}
        missing = Counter(
            "facelane_stage_missing",
            "Results in which a stage that was asked for could not answer.",
            ["stage"],
            registry=self.registry,
        )
        faces = Counter("facelane_faces", "Faces in results.", ["decision"], registry=self.registry)
        verdicts = Counter(
            "facelane_liveness", "Faces in results.", ["verdict"], registry=self.registry
        )
        self.tracks_ended = Counter(
            "facelane_tracks_ended", "Tracks that ended.", registry=self.registry
        )
        self.streams_opened = Counter(
            "facelane_streams_opened", "Streams that were accepted.", registry=self.registry
        )
        self._refused = Counter(
            "facelane_calls_refused",
            "Calls that ended with an error, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self._loop_lag = Gauge(
            "facelane_event_loop_lag_seconds",
            "How late the front process's event loop was when it was last measured.",
            registry=self.registry,
        )
        build = Gauge("facelane_build_info", "Always 1.", ["version"], registry=self.registry)
        build.labels(__version__).set(1)
        # Children are looked up once: `labels` takes a lock and builds a key at every call.
        self._results = counts.of(self._frames.labels("result", ""))
        self._drops = {r: counts.of(self._frames.labels("drop", r.value)) for r in DropReason}
        self._errors = {r: self._frames.labels("error", r.value) for r in Reason}
        self._missing = {s: missing.labels(s.value) for s in Stage}
        self._faces = {d: counts.of(faces.labels(d.value)) for d in Decision}
        self._verdicts = {v: counts.of(verdicts.labels(v.value)) for v in LivenessVerdict}
        self.registry.register(_SourceCollector(sources or Sources(), self._histograms))

    def outcome(self, outcome: Outcome, overload: Overload = Overload.LATEST_WINS) -> None:
        """Counts a frame's outcome; ``overload``: its stream's."""
        body = outcome.body
        if isinstance(body, FrameResult):
            self._results.new += 1
            self._age[overload].observe(outcome.age_ns / 1e9)
            for timing in body.timings:
                self._queue[timing.stage].observe(timing.queue_ns / 1e9)
                self._service[timing.stage].observe(timing.service_ns / 1e9)
            for stage in body.missing_stages:
                self._missing[stage].inc()
            for face in body.faces:
                self._faces[face.identity.decision].new += 1
                self._verdicts[face.liveness.verdict].new += 1
        elif isinstance(body, FrameDrop):
            self._drops[body.reason].new += 1
        else:
            assert isinstance(body, FrameError)
            self._errors[body.reason].inc()

    def _histograms(self) -> Iterator[Metric]:
        age = HistogramMetricFamily(
            "facelane_frame_age_seconds",
            "From the receipt of a frame to its result, by the stream's overload policy.",
            labels=["overload"],
        )
        for overload, ages in self._age.items():
            ages.into(age, (overload.value,))
        yield age
        for name, text, stages in (
            ("queue", "Waiting for a worker", self._queue),
            ("service", "From dispatch to the answer", self._service),
        ):
            family = HistogramMetricFamily(
                f"facelane_stage_{name}_seconds",
                f"{text}, the slowest task of a stage of a frame.",
                labels=["stage"],
            )
            for stage, latencies in stages.items():
                latencies.into(family, (stage.value,))
            yield family

    def refused(self, reason: Reason) -> None:
        """Counts a call that ended with an error."""
        self._refused.labels(reason.value).inc()

    async def watch_loop(self, interval_s: float = 1.0) -> None:
        """Measures how late the event loop is, until it is cancelled."""
        while True:
            due = time.monotonic() + interval_s
            await asyncio.sleep(interval_s)
            self._loop_lag.set(max(0.0, time.monotonic() - due))

    def exposition(self) -> bytes:
        """All metrics as Prometheus text, format 0.0.4."""
        return bytes(generate_latest(self.registry))


class _SourceCollector(Collector):
    """Reads the sources when a scrape comes."""

    def __init__(self, sources: Sources, counted: Callable[[], Iterator[Metric]]) -> None:
        self._sources = sources
        self._counted = counted

    def describe(self) -> Iterable[Metric]:
        return ()  # registration must not read the sources

    def collect(self) -> Iterator[Metric]:
        yield from self._counted()
        sources = self._sources
        yield _gauge(
            "facelane_streams_open", "Streams that are open.", (), [((), sources.streams())]
        )
        yield _gauge(
            "facelane_event_watchers", "Calls that watch events.", (), [((), sources.watchers())]
        )
        load = sources.load()
        if load is not None:
            yield from _load_metrics(load)
        yield _counter(
            "facelane_key_calls",
            "Calls by key or certificate and by verb, and whether they were let in.",
            ("key", "verb", "answer"),
            (
                ((key, verb, "admitted" if let_in else "refused"), count)
                for (key, verb, let_in), count in sorted(sources.calls().items())
            ),
        )
        yield _counter(
            "facelane_key_lookups",
            "Faces that were looked up in a gallery, by key.",
            ("key",),
            (((key,), count) for key, count in sorted(sources.lookups().items())),
        )
        gallery = sources.gallery()
        if gallery is not None:
            yield _gauge(
                "facelane_gallery_templates",
                "Templates that are searched.",
                (),
                [((), gallery.templates)],
            )
            yield _gauge(
                "facelane_gallery_snapshot_version",
                "Newest published state of the gallery.",
                (),
                [((), gallery.version)],
            )
        yield from _pool_metrics(tuple(sources.pools()))
        yield from _device_metrics(tuple(sources.devices()))


def _load_metrics(load: Load) -> Iterator[Metric]:
    for name, text, value in (
        (
            "load_ratio",
            "Frames that streams send, over those that can be served in time.",
            load.ratio,
        ),
        (
            "load_capacity_frames_per_second",
            "Frames of the present kind that can be served in time.",
            load.capacity,
        ),
        (
            "load_headroom_streams",
            "Streams more that fit, at the rate of those that are open.",
            load.headroom,
        ),
        ("load_thinned_streams", "Streams of which frames are dropped as THINNED.", load.thinned),
    ):
        yield _gauge(f"facelane_{name}", text, (), [((), value)])


_SERVING: Final = (PoolState.SERVING, PoolState.DEGRADED)

Rows = Iterable[tuple[Sequence[str], float]]


def _gauge(name: str, text: str, labels: Sequence[str], rows: Rows) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def _counter(name: str, text: str, labels: Sequence[str], rows: Rows) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def _pool_metrics(pools: tuple[PoolInfo, ...]) -> Iterator[Metric]:
    one = ["pool"]
    yield _gauge(
        "facelane_pool_serving",
        "1 while the pool can infer.",
        one,
        (([p.pool], float(p.state in _SERVING)) for p in pools),
    )
    yield _gauge(
        "facelane_pool_state",
        "1 for the state that the pool is in.",
        ["pool", "state"],
        (([p.pool, p.state.value], 1.0) for p in pools),
    )
    yield _gauge(
        "facelane_pool_queued",
        "Tasks that wait for a worker.",
        one,
        (([p.pool], p.queued) for p in pools),
    )
    yield _gauge(
        "facelane_pool_in_flight",
        "Tasks that a worker has.",
        one,
        (([p.pool], p.in_flight) for p in pools),
    )
    totals: tuple[tuple[str, str, Callable[[PoolInfo], int]], ...] = (
        ("completed", "Tasks answered.", lambda p: p.completed),
        ("failed", "Tasks failed.", lambda p: p.failed),
        ("retried", "Tasks tried again after their worker was lost.", lambda p: p.retried),
        ("worker_losses", "Workers lost: crash, hang, kill.", lambda p: p.losses),
        (
            "video_replays",
            "Groups of pictures that were decoded again: after a loss, or in another worker.",
            lambda p: p.replayed,
        ),
    )
    for name, text, read in totals:
        yield _counter(f"facelane_pool_{name}", text, one, [([p.pool], read(p)) for p in pools])
    two = ["pool", "worker"]
    workers = [(p.pool, w) for p in pools for w in p.workers]
    yield _counter(
        "facelane_worker_restarts",
        "Starts of a worker after its first.",
        two,
        (([pool, w.worker_id], w.restarts) for pool, w in workers),
    )
    yield _gauge(
        "facelane_worker_memory_bytes",
        "Memory of a worker: on its GPU, the CUDA context counted in; on a CPU, its own.",
        two,
        (([pool, w.worker_id], w.memory_mib * limits.MIB) for pool, w in workers),
    )
    yield _gauge(
        "facelane_worker_video_decoders",
        "Streams of video that a worker decodes.",
        two,
        (([pool, w.worker_id], w.decoders) for pool, w in workers),
    )
    yield _gauge(
        "facelane_worker_state",
        "1 for the state that the worker is in.",
        [*two, "state"],
        (([pool, w.worker_id, w.life.value], 1.0) for pool, w in workers),
    )


def _device_metrics(devices: tuple[DeviceReading, ...]) -> Iterator[Metric]:
    def rows(read: Callable[[DeviceReading], float | None]) -> Rows:
        for device in devices:
            value = read(device)
            if value is not None:
                yield [device.device, device.name], value

    labels = ["device", "name"]
    readings: tuple[tuple[str, str, Callable[[DeviceReading], float | None]], ...] = (
        ("memory_used_bytes", "Memory in use.", lambda d: d.memory_used_bytes),
        ("memory_total_bytes", "Memory.", lambda d: d.memory_total_bytes),
        ("utilization_ratio", "Share of time a kernel ran.", lambda d: d.utilization),
        ("memory_utilization_ratio", "Share of time memory moved.", lambda d: d.memory_utilization),
        ("power_watts", "Power draw.", lambda d: d.power_watts),
        ("temperature_celsius", "Temperature.", lambda d: d.temperature_celsius),
    )
    for name, text, read in readings:
        yield _gauge(f"facelane_device_{name}", text, labels, rows(read))
    yield _counter(
        "facelane_device_ecc_errors",
        "Uncorrected memory errors since the driver was loaded.",
        labels,
        rows(lambda d: d.ecc_errors),
    )
    yield _gauge(
        "facelane_device_throttled",
        "1 for each reason that the clocks are held down for.",
        ["device", "reason"],
        (([d.device, r], 1.0) for d in devices for r in d.throttle_reasons),
    )
