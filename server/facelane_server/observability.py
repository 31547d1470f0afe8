"""Logs and metrics of the server, and the rule about what must never be in them.

Faces are personal data. A log message is a constant; values go into fields; and a field
that could hold an embedding, a picture or somebody's name is withheld by ``withhold``, the
last processor before the renderer. Bytes and arrays are withheld whatever the field's
name. Tracebacks show no local variables, for the same reason.

Metrics are Prometheus text, served by ``MetricsServer`` on the event loop. Nothing in them
has a label that grows with clients: no stream, no track, no subject.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import errno
import itertools
import json
import logging
import os
import select
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TextIO, cast

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from facelane_server import __version__, config, limits
from facelane_server.domain import (
    Decision,
    DropReason,
    FrameDrop,
    FrameError,
    FrameResult,
    LivenessVerdict,
    Outcome,
    Reason,
    Stage,
)
from facelane_server.monitor import DeviceReading
from facelane_server.pools.pool import PoolInfo, PoolState

log = structlog.get_logger(__name__)

# -- logs ---------------------------------------------------------------------------------

WITHHELD: Final = "<withheld>"
PERSONAL: Final = frozenset(
    {
        "candidate", "candidates", "chip", "chips", "crop", "crops", "display_name",
        "embedding", "embeddings", "face", "faces_found", "frame_data", "identity", "image",
        "images", "labels", "landmarks", "person", "picture", "pictures", "pixels", "probe",
        "subject", "subject_id", "subject_ids", "subjects", "template", "vector", "vectors",
    }
)  # fmt: skip
SECRET: Final = frozenset(
    {"api_key", "authorization", "credentials", "key_hash", "password", "secret", "token"}
)
MAX_VALUE_CHARS: Final = 2_000
_MAX_TRACEBACK_CHARS: Final = 20_000
_CONTAINERS: Final = (list, tuple, set, frozenset)

Event = structlog.typing.EventDict


def withhold(_logger: object, _method: str, event: Event) -> Event:
    """Replaces what must not be logged, at any depth. Counts (numbers) stay: a field
    ``subjects=3`` says how many there are."""
    return {key: _clean(key, value) for key, value in event.items()}


def _clean(key: str, value: object, depth: int = 0) -> object:
    if isinstance(value, bool | int | float | None):
        return WITHHELD if key.lower() in SECRET and value is not None else value
    if key.lower() in PERSONAL or key.lower() in SECRET:
        return WITHHELD
    if isinstance(value, bytes | bytearray | memoryview) or hasattr(value, "__array__"):
        return WITHHELD
    if isinstance(value, Mapping):
        if depth >= 4:
            return WITHHELD
        return {str(k): _clean(str(k), v, depth + 1) for k, v in value.items()}
    if isinstance(value, _CONTAINERS):
        return WITHHELD if depth >= 4 else [_clean("", v, depth + 1) for v in list(value)[:64]]
    bound = _MAX_TRACEBACK_CHARS if key == "exception" else MAX_VALUE_CHARS
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= bound else text[:bound] + "…"


class _Journal:
    """Puts the syslog priority before a line, which journald takes off again."""

    PRIORITY: Final[Mapping[str, str]] = {
        "debug": "<7>",
        "info": "<6>",
        "warning": "<4>",
        "error": "<3>",
        "critical": "<2>",
    }

    def __init__(self, renderer: structlog.typing.Processor) -> None:
        self._renderer = renderer

    def __call__(self, logger: Any, method: str, event: Event) -> str:
        priority = self.PRIORITY.get(str(event.get("level", "info")), "<6>")
        return priority + str(self._renderer(logger, method, event)).replace("\n", "\n" + priority)


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether the stream goes to systemd's journal (systemd.exec(5), JOURNAL_STREAM)."""
    named = environ.get("JOURNAL_STREAM", "")
    with contextlib.suppress(OSError, ValueError):
        status = os.fstat(stream.fileno())
        return named == f"{status.st_dev}:{status.st_ino}"
    return False


LOG_STALL_MS: Final = 100


class LogSink:
    """Where log lines go; outlives the disk or the reader behind it.

    What cannot be written is lost and counted: a full disk under the log must cost lines,
    never frames. The first line that can be written again says how many were lost. Lines
    go to the descriptor itself where there is one, because a buffered stream that failed
    once keeps its buffer and fails again at exit. A pipe that nobody reads is waited for
    once, for ``LOG_STALL_MS``: the event loop must not stand still behind a log.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._descriptor = -1
        self._poll: select.poll | None = None
        with contextlib.suppress(OSError, ValueError):
            self._descriptor = stream.fileno()
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                self._poll = select.poll()
                self._poll.register(self._descriptor, select.POLLOUT)
        self.lost = 0

    def write(self, text: str) -> int:
        try:
            if self.lost:
                self._put(json.dumps({"event": "log lines were lost", "lines": self.lost}) + "\n")
                self.lost = 0
            self._put(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            self.lost += text.count("\n")
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def _put(self, text: str) -> None:
        if self._descriptor < 0:
            self._stream.write(text)
            self._stream.flush()
            return
        data = text.encode("utf-8", "backslashreplace")
        while data:
            # A pipe that can be written to takes this much without blocking.
            if self._poll is not None and not self._poll.poll(0 if self.lost else LOG_STALL_MS):
                raise BlockingIOError(errno.EAGAIN, "nobody reads the log")
            data = data[os.write(self._descriptor, data[: select.PIPE_BUF]) :]


def configure_logging(
    section: config.Log,
    *,
    stream: TextIO | None = None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Sets up structlog and the standard library's root logger, once a process.

    ``auto``: lines for people on a terminal, JSON lines anywhere else (no escape codes in
    files, pipes and the journal). Lines of other libraries get the same form and the same
    rules; below WARNING they are left out.
    """
    stream = sys.stderr if stream is None else stream
    level = getattr(logging, section.level.upper())
    terminal = stream.isatty()
    renderer: structlog.typing.Processor
    if section.format == "console" or (section.format == "auto" and terminal):
        # The default traceback formatter would show local variables.
        renderer = structlog.dev.ConsoleRenderer(
            colors=terminal, exception_formatter=structlog.dev.plain_traceback
        )
        traceback: list[structlog.typing.Processor] = []
    else:
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
        traceback = [structlog.processors.format_exc_info]
    if _is_journal(stream, environ):
        renderer = _Journal(renderer)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *traceback,
    ]
    sink = LogSink(stream)
    structlog.configure(
        processors=[*shared, _withhold_all, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", sink)),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(cast("TextIO", sink))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _withhold_all,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(level, logging.WARNING))


def _withhold_all(logger: Any, method: str, event: Event) -> Event:
    exc_info = event.pop("exc_info", None)  # rendered by the console renderer itself
    cleaned = withhold(logger, method, event)
    if exc_info:
        cleaned["exc_info"] = exc_info
    return cleaned


# -- metrics --------------------------------------------------------------------------------

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
        ProcessCollector(registry=self.registry)
        self._frames = Counter(
            "facelane_frames",
            "Frames received, by outcome: result, drop or error, and why.",
            ["outcome", "reason"],
            registry=self.registry,
        )
        self._age = _Latencies()
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
        self._results = self._frames.labels("result", "")
        self._drops = {r: self._frames.labels("drop", r.value) for r in DropReason}
        self._errors = {r: self._frames.labels("error", r.value) for r in Reason}
        self._missing = {s: missing.labels(s.value) for s in Stage}
        self._faces = {d: faces.labels(d.value) for d in Decision}
        self._verdicts = {v: verdicts.labels(v.value) for v in LivenessVerdict}
        self.registry.register(_SourceCollector(sources or Sources(), self._histograms))

    def outcome(self, outcome: Outcome) -> None:
        """Counts a frame's outcome."""
        body = outcome.body
        if isinstance(body, FrameResult):
            self._results.inc()
            self._age.observe(outcome.age_ns / 1e9)
            for timing in body.timings:
                self._queue[timing.stage].observe(timing.queue_ns / 1e9)
                self._service[timing.stage].observe(timing.service_ns / 1e9)
            for stage in body.missing_stages:
                self._missing[stage].inc()
            for face in body.faces:
                self._faces[face.identity.decision].inc()
                self._verdicts[face.liveness.verdict].inc()
        elif isinstance(body, FrameDrop):
            self._drops[body.reason].inc()
        else:
            assert isinstance(body, FrameError)
            self._errors[body.reason].inc()

    def _histograms(self) -> Iterator[Metric]:
        age = HistogramMetricFamily(
            "facelane_frame_age_seconds", "From the receipt of a frame to its result."
        )
        self._age.into(age, ())
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


# -- exposition -------------------------------------------------------------------------------


class MetricsServer:
    """``GET /metrics`` over HTTP/1.1, one request a connection. Owns its socket.

    At most ``limits.MAX_METRICS_CONNECTIONS`` at a time, each within ``REQUEST_TIMEOUT_S``:
    a scraper that hangs costs nothing but its own scrape.
    """

    REQUEST_TIMEOUT_S: Final = 5.0
    MAX_HEADER_BYTES: Final = 8 * limits.KIB

    def __init__(self, exposition: Callable[[], bytes]) -> None:
        self._exposition = exposition
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(cls, section: config.Metrics, exposition: Callable[[], bytes]) -> Self | None:
        """Listens on ``section.listen``; ``None`` when that is empty. Raises ``AddressError``."""
        if not section.listen:
            return None
        host, _, port = section.listen.rpartition(":")
        made = cls(exposition)
        try:
            made._server = await asyncio.start_server(
                made._accept, host.strip("[]"), int(port), limit=cls.MAX_HEADER_BYTES
            )
        except OSError as error:
            # asyncio's own text names the address once more.
            number = error.errno or 0
            why = os.strerror(number) if number > 0 else error.strerror
            raise config.AddressError(
                f"metrics.listen: cannot listen on {section.listen}: {why or 'unknown'}; choose "
                'another port, or write listen = "" to switch metrics off'
            ) from None
        return made

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stops listening and ends what is open; idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        # So that drain waits until all is with the kernel: nothing is left for close to wait
        # for, which it would do for as long as the peer does not read.
        writer.transport.set_write_buffer_limits(high=0)
        try:
            if len(self._open) > limits.MAX_METRICS_CONNECTIONS:
                return
            async with asyncio.timeout(self.REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        except asyncio.CancelledError:
            # Only close() cancels; asyncio's own callback would log a cancelled handler.
            pass
        except Exception as error:
            log.error("metrics request failed", error=type(error).__name__)
        finally:
            self._open.discard(task)
            writer.transport.abort()

    def _answer(self, head: bytes) -> bytes:
        request = head.split(b"\r\n", 1)[0].split(b" ")
        if len(request) != 3 or not request[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"")
        method, target = request[0], request[1].split(b"?", 1)[0]
        if target != b"/metrics":
            return _response("404 Not Found", b"the metrics are at /metrics\n")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"")
        body = self._exposition()
        return _response("200 OK", body, CONTENT_TYPE_PLAIN_0_0_4, head_only=method == b"HEAD")


def _response(
    status: str, body: bytes, kind: str = "text/plain; charset=utf-8", *, head_only: bool = False
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    ).encode()
    return head if head_only else head + body
