"""Logs without faces and names, metrics with a queue stage, and a socket with an owner."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families
from tests.waiting import auntil

from facelane_server import config, limits
from facelane_server.capacity import Load
from facelane_server.config import AddressError
from facelane_server.domain import (
    Box,
    Decision,
    DropReason,
    Face,
    FrameDrop,
    FrameError,
    FrameResult,
    Identity,
    Liveness,
    LivenessVerdict,
    Outcome,
    Overload,
    Reason,
    Stage,
    StageTiming,
)
from facelane_server.monitor import DeviceReading
from facelane_server.observability import logs
from facelane_server.observability.http import MetricsServer
from facelane_server.observability.logs import WITHHELD, configure_logging, withhold
from facelane_server.observability.metrics import GalleryReading, Metrics, Sources
from facelane_server.pools.report import PoolInfo, PoolState, WorkerInfo
from facelane_server.pools.restart import Life

JSON = config.Log(format="json")
CONSOLE = config.Log(format="console")
SECRET_TEXT = "MARIE-CURIE"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The process's logging as it was before."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


# -- logs -------------------------------------------------------------------------------------


def test_a_line_is_json_with_level_time_and_fields() -> None:
    stream = io.StringIO()
    configure_logging(JSON, stream=stream)
    structlog.get_logger("x").info("worker ready", pool="detector", pid=7)
    [line] = lines(stream)
    assert line.pop("timestamp")
    assert line == {"event": "worker ready", "level": "info", "pool": "detector", "pid": 7}


@pytest.mark.parametrize(
    "field",
    ["embedding", "chip", "picture", "subject_id", "display_name", "Vector", "password", "labels"],
)
@pytest.mark.parametrize("section", [JSON, CONSOLE])
def test_forbidden_fields_are_withheld(field: str, section: config.Log) -> None:
    stream = io.StringIO()
    configure_logging(section, stream=stream)
    log = structlog.get_logger()
    log.info("event", **{field: SECRET_TEXT})
    log.info("event", nested={"inner": [{field: SECRET_TEXT}]})
    logging.getLogger("library").warning("message", extra={field: SECRET_TEXT})
    assert SECRET_TEXT not in stream.getvalue()
    assert stream.getvalue().count(WITHHELD) >= 2


@pytest.mark.parametrize(
    "value",
    [
        b"\xff\xd8raw",
        bytearray(b"raw"),
        memoryview(b"raw"),
        np.arange(4.0),
        [b"raw"],
        {"a": b"raw"},
    ],
)
def test_bytes_and_arrays_are_withheld_under_any_name(value: object) -> None:
    out = json.dumps(withhold(None, "info", {"event": "e", "harmless": value}))
    assert WITHHELD in out
    assert "raw" not in out
    assert "1.0" not in out


def test_counts_and_plain_fields_stay() -> None:
    event = {"event": "e", "subjects": 3, "faces": 2, "pool": "liveness", "ok": True, "none": None}
    assert withhold(None, "info", event) == event
    assert withhold(None, "info", {"token": 5}) == {"token": WITHHELD}


def test_values_are_bounded() -> None:
    deep: dict[str, object] = {}
    inner = deep
    for _ in range(50):
        inner["d"] = {}
        inner = inner["d"]  # type: ignore[assignment]
    event = withhold(None, "info", {"event": "x" * 10_000, "many": list(range(1000)), "deep": deep})
    assert len(json.dumps(event)) < 3_000


@pytest.mark.parametrize("section", [JSON, CONSOLE])
def test_tracebacks_show_no_local_variables(section: config.Log) -> None:
    stream = io.StringIO()
    configure_logging(section, stream=stream)

    def fails() -> None:
        name_of_somebody = SECRET_TEXT.lower().title()
        assert name_of_somebody
        raise RuntimeError("it broke")

    for log in (structlog.get_logger(), logging.getLogger("library")):
        try:
            fails()
        except RuntimeError:
            log.exception("failed")
    assert stream.getvalue().count("RuntimeError: it broke") == 2
    assert stream.getvalue().count("in fails") == 2
    assert "Marie" not in stream.getvalue()


def test_no_escape_codes_off_a_terminal() -> None:
    for section in (config.Log(), CONSOLE):
        stream = io.StringIO()
        configure_logging(section, stream=stream)
        structlog.get_logger().warning("event", pool="x")
        assert "\x1b" not in stream.getvalue()
    # `auto` off a terminal is JSON.
    stream = io.StringIO()
    configure_logging(config.Log(), stream=stream)
    structlog.get_logger().info("event")
    assert lines(stream)


def test_a_terminal_gets_lines_for_people() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    configure_logging(config.Log(), stream=stream)
    structlog.get_logger().info("worker ready", pool="detector")
    assert "worker ready" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_the_level_is_kept() -> None:
    stream = io.StringIO()
    configure_logging(config.Log(level="warning", format="json"), stream=stream)
    structlog.get_logger().info("quiet")
    structlog.get_logger().error("loud")
    logging.getLogger("library").info("quiet")
    assert [line["event"] for line in lines(stream)] == ["loud"]


def test_the_journal_gets_priorities(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with path.open("w") as stream:
        status = os.fstat(stream.fileno())
        environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        configure_logging(JSON, stream=stream, environ=environ)
        structlog.get_logger().warning("warned")
        structlog.get_logger().error("failed")
        configure_logging(JSON, stream=stream, environ={"JOURNAL_STREAM": "1:1"})
        structlog.get_logger().error("plain")
    written = path.read_text().splitlines()
    assert [line[:3] for line in written] == ["<4>", "<3>", '{"e']
    assert json.loads(written[0][3:])["event"] == "warned"


def test_messages_in_the_server_are_constants_and_fields_are_allowed() -> None:
    """Every logging call of the server: no f-string, no forbidden field."""
    import ast

    package = Path(config.__file__).parent
    calls = 0
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in ("log", "logger")
                and node.func.attr in ("debug", "info", "warning", "error", "exception")
            ):
                continue
            calls += 1
            where = f"{file.name}:{node.lineno}"
            assert node.args, where
            assert isinstance(node.args[0], ast.Constant), f"{where}: the message must be constant"
            fields = {keyword.arg for keyword in node.keywords}
            personal = logs.PERSONAL - {"subjects", "faces", "templates"}
            assert not fields & (personal | logs.SECRET), where
    assert calls >= 5, "the test looks in the wrong place"


# -- metrics --------------------------------------------------------------------------------


def face(decision: Decision, verdict: LivenessVerdict = LivenessVerdict.LIVE) -> Face:
    identity = Identity(decision, SECRET_TEXT if decision is Decision.MATCH else "")
    return Face(1, Box(0, 0, 9, 9), 0.9, (), identity, Liveness(verdict, 0.9))


def outcome(body: FrameResult | FrameDrop | FrameError) -> Outcome:
    return Outcome(1, 0, None, body, age_ns=12_000_000)


def values(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def test_outcomes_are_counted_with_their_stages() -> None:
    metrics = Metrics()
    timings = (
        StageTiming(Stage.DETECTOR, 1_000_000, 8_000_000),
        StageTiming(Stage.RECOGNIZER, 400_000, 2_000_000),
    )
    faces = (face(Decision.MATCH), face(Decision.REJECTED_OOD, LivenessVerdict.SPOOF))
    for _ in range(3):
        metrics.outcome(outcome(FrameResult(9, 9, faces, timings, (Stage.LIVENESS,))))
    metrics.outcome(outcome(FrameDrop(DropReason.SUPERSEDED)))
    metrics.outcome(outcome(FrameError(Reason.PICTURE_CORRUPT, "broken")))
    metrics.refused(Reason.STREAM_LIMIT)
    got = values(metrics)

    def frames(outcome: str, reason: str = "") -> float:
        return got["facelane_frames_total", (("outcome", outcome), ("reason", reason))]

    assert frames("result") == 3
    assert frames("drop", "SUPERSEDED") == 1
    assert frames("error", "PICTURE_CORRUPT") == 1
    assert sum(v for (name, _), v in got.items() if name == "facelane_frames_total") == 5
    live = (("overload", "latest_wins"),)
    assert got["facelane_frame_age_seconds_count", live] == 3
    assert got["facelane_frame_age_seconds_sum", live] == pytest.approx(0.036)
    for stage, queue, service in (("detector", 0.001, 0.008), ("recognizer", 0.0004, 0.002)):
        label = (("stage", stage),)
        assert got["facelane_stage_queue_seconds_sum", label] == pytest.approx(3 * queue)
        assert got["facelane_stage_service_seconds_sum", label] == pytest.approx(3 * service)
    assert got["facelane_stage_missing_total", (("stage", "liveness"),)] == 3
    assert got["facelane_faces_total", (("decision", "REJECTED_OOD"),)] == 3
    assert got["facelane_liveness_total", (("verdict", "SPOOF"),)] == 3
    assert got["facelane_calls_refused_total", (("reason", "STREAM_LIMIT"),)] == 1
    assert SECRET_TEXT not in metrics.exposition().decode()


def test_a_histogram_counts_each_value_in_every_bucket_above_it() -> None:
    metrics = Metrics()
    for age_ms in (0.2, 0.5, 4, 4, 120, 60_000):
        body = FrameResult(9, 9, ())
        metrics.outcome(Outcome(1, 0, None, body, age_ns=int(age_ms * 1e6)))
    got = values(metrics)

    def upto(bound: str) -> float:
        live = (("le", bound), ("overload", "latest_wins"))
        return got["facelane_frame_age_seconds_bucket", live]

    counts = [upto(b) for b in ("0.0005", "0.003", "0.005", "0.1", "0.15", "10.0", "+Inf")]
    assert counts == [2, 2, 4, 4, 5, 5, 6]
    live = (("overload", "latest_wins"),)
    assert got["facelane_frame_age_seconds_count", live] == 6
    assert got["facelane_frame_age_seconds_sum", live] == pytest.approx(60.1287)


def test_files_that_wait_in_their_windows_do_not_hide_the_ages_of_cameras() -> None:
    metrics = Metrics()
    for overload, age_ms in ((Overload.LATEST_WINS, 20), (Overload.LOSSLESS, 4_000)):
        body = FrameResult(9, 9, ())
        metrics.outcome(Outcome(1, 0, None, body, age_ns=age_ms * 1_000_000), overload)
    got = values(metrics)
    for overload, age_s in (("latest_wins", 0.02), ("lossless", 4.0)):
        label = (("overload", overload),)
        assert got["facelane_frame_age_seconds_count", label] == 1
        assert got["facelane_frame_age_seconds_sum", label] == age_s


def test_values_that_are_read_at_the_scrape() -> None:
    workers = (
        WorkerInfo("detector#0", 7, Life.READY, "cuda:0", 2, "", 600, 5.0, False),
        WorkerInfo("detector#1", 0, Life.QUARANTINED, "cuda:0", 5, "CRASHED", 0, 0.0, False),
    )
    state = PoolState.DEGRADED
    pool = PoolInfo(
        "detector", Stage.DETECTOR, state, "m@1", "process", 4, 2, 100, 3, 1, 2, workers
    )
    device = DeviceReading(
        "0", "card", "GPU-1", 900, 1000, 0.5, None, 250.0, 60.0, None, ("power cap",)
    )
    streams = [0]
    metrics = Metrics(
        Sources(
            pools=lambda: [pool],
            devices=lambda: [device],
            gallery=lambda: GalleryReading(12, 3),
            streams=lambda: streams[0],
            load=lambda: Load(50.0, 200.0, 6, 0),
        )
    )
    streams[0] = 5
    got = values(metrics)
    assert got["facelane_streams_open", ()] == 5
    assert got["facelane_gallery_templates", ()] == 12
    assert got["facelane_load_ratio", ()] == 0.25
    assert got["facelane_load_headroom_streams", ()] == 6
    assert got["facelane_load_thinned_streams", ()] == 0
    assert got["facelane_pool_queued", (("pool", "detector"),)] == 4
    assert got["facelane_pool_serving", (("pool", "detector"),)] == 1
    assert got["facelane_pool_worker_losses_total", (("pool", "detector"),)] == 2
    assert got["facelane_pool_state", (("pool", "detector"), ("state", "DEGRADED"))] == 1
    named = (("pool", "detector"), ("worker", "detector#0"))
    assert got["facelane_worker_restarts_total", named] == 2
    assert got["facelane_worker_memory_bytes", named] == 600 << 20
    card = (("device", "0"), ("name", "card"))
    assert got["facelane_device_memory_used_bytes", card] == 900
    assert got["facelane_device_power_watts", card] == 250
    assert got["facelane_device_throttled", (("device", "0"), ("reason", "power cap"))] == 1
    assert ("facelane_device_ecc_errors_total", card) not in got, "what is unknown is not 0"


async def test_a_blocked_event_loop_is_seen() -> None:
    import time

    metrics = Metrics()
    task = asyncio.create_task(metrics.watch_loop(0.01))
    try:
        async with asyncio.timeout(30):
            while values(metrics)["facelane_event_loop_lag_seconds", ()] < 0.05:
                await asyncio.sleep(0)
                time.sleep(0.1)  # noqa: ASYNC251 - the loop is blocked on purpose
                await asyncio.sleep(0.002)  # the watcher's turn
    finally:
        task.cancel()


# -- exposition --------------------------------------------------------------------------------


@pytest.fixture
async def server() -> AsyncIterator[MetricsServer]:
    section = config.Metrics(listen="127.0.0.1:0")
    serving = {"": False, "facelane.process": True}
    started = await MetricsServer.start(section, Metrics().exposition, serving.get)
    assert started is not None
    yield started
    await started.close()


async def ask(port: int, request: bytes) -> tuple[str, bytes]:
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            answer = await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    if length and not request.startswith(b"HEAD"):
        assert int(length[1]) == len(body)
    return head.split(b"\r\n")[0].decode(), body


async def test_a_scrape(server: MetricsServer) -> None:
    status, body = await ask(server.port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"
    assert b"facelane_build_info" in body
    assert list(text_string_to_metric_families(body.decode()))
    status, body = await ask(server.port, b"HEAD /metrics HTTP/1.0\r\n\r\n")
    assert (status, body) == ("HTTP/1.1 200 OK", b"")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "404"),
        (b"GET /metrics?x=1 HTTP/1.1\r\n\r\n", "200"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"GET /metrics/x HTTP/1.1\r\n\r\n", "404"),
        (b"GET /health HTTP/1.1\r\n\r\n", "503"),
        (b"GET /health/facelane.process HTTP/1.1\r\n\r\n", "200"),
        (b"HEAD /health/facelane.process HTTP/1.1\r\n\r\n", "200"),
        (b"GET /health/nothing HTTP/1.1\r\n\r\n", "404"),
        (b"GET /health/\xff HTTP/1.1\r\n\r\n", "404"),
        (b"POST /health HTTP/1.1\r\n\r\n", "405"),
        (b"nonsense\r\n\r\n", "400"),
        (b"\x16\x03\x01 \r\n\r\n", "400"),
    ],
)
async def test_other_requests(server: MetricsServer, request_: bytes, status: str) -> None:
    answered, _ = await ask(server.port, request_)
    assert answered.split()[1] == status


async def test_an_endless_header_is_cut(server: MetricsServer) -> None:
    try:
        answered, _ = await ask(server.port, b"GET /metrics HTTP/1.1\r\nX: " + b"y" * 200_000)
    except ConnectionError:  # reset, or a broken pipe, by which is met first
        answered = ""
    assert answered == ""
    assert (await ask(server.port, b"GET /metrics HTTP/1.1\r\n\r\n"))[0].endswith("200 OK")


async def test_scrapes_that_hang_are_bounded(server: MetricsServer) -> None:
    hanging = [
        await asyncio.open_connection("127.0.0.1", server.port)
        for _ in range(limits.MAX_METRICS_CONNECTIONS)
    ]

    # Whoever connects and says nothing keeps no probe out: the oldest of them gives way.
    answered, _ = await ask(server.port, b"GET /health HTTP/1.1\r\n\r\n")
    assert answered.split()[1] == "503"
    assert await asyncio.wait_for(hanging[0][0].read(), 30) == b""
    others = [
        await asyncio.open_connection("127.0.0.1", server.port)
        for _ in range(3 * limits.MAX_METRICS_CONNECTIONS)
    ]
    answered, _ = await ask(server.port, b"GET /metrics HTTP/1.1\r\n\r\n")
    assert answered == "HTTP/1.1 200 OK"
    assert len(server._open) <= limits.MAX_METRICS_CONNECTIONS
    for _, writer in (*hanging, *others):
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_many_scrapes_at_once_are_collected_for_together() -> None:
    collected: list[int] = []
    may = asyncio.Event()

    async def collect() -> bytes:
        collected.append(1)
        await may.wait()
        return b"x 1\n"

    started = await MetricsServer.start(config.Metrics(listen="127.0.0.1:0"), collect, {}.get)
    assert started is not None
    scrapes = [
        asyncio.create_task(ask(started.port, b"GET /metrics HTTP/1.1\r\n\r\n"))
        for _ in range(limits.MAX_METRICS_CONNECTIONS)
    ]
    await auntil(lambda: collected and len(started._open) == len(scrapes))
    may.set()
    answers = await asyncio.gather(*scrapes)
    assert all(body == b"x 1\n" for _, body in answers)
    assert len(collected) <= 2, "those that came meanwhile were each collected for"
    await started.close()


async def test_a_scrape_that_hangs_has_a_deadline(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MetricsServer, "REQUEST_TIMEOUT_S", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /met")
    assert await asyncio.wait_for(reader.read(), 30) == b""
    writer.close()
    await writer.wait_closed()


async def test_a_scraper_that_does_not_read_keeps_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MetricsServer, "REQUEST_TIMEOUT_S", 0.2)
    big = b"x" * (32 << 20)  # more than the kernel keeps for a peer
    section = config.Metrics(listen="127.0.0.1:0")
    started = await MetricsServer.start(section, lambda: big, {}.get)
    assert started is not None
    with socket.create_connection(("127.0.0.1", started.port)) as scraper:
        scraper.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        theirs = scraper.getsockname()

        def held() -> bool:
            return any(c.raddr == theirs for c in psutil.Process().net_connections("tcp"))

        await auntil(held)
        await auntil(lambda: not held(), what="the connection to be given up")
    async with asyncio.timeout(30):
        await started.close()


async def test_close_frees_the_port_and_ends_what_is_open(server: MetricsServer) -> None:
    port = server.port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await server.close()
    await server.close()
    assert await asyncio.wait_for(reader.read(), 30) == b""
    writer.close()
    await writer.wait_closed()
    again = await MetricsServer.start(config.Metrics(listen=f"127.0.0.1:{port}"), bytes, {}.get)
    assert again is not None
    await again.close()


async def test_a_taken_port_is_told(server: MetricsServer) -> None:
    # It may be free later: the service manager tries again.
    with pytest.raises(AddressError, match=r"metrics\.listen.*already in use.*another port"):
        await MetricsServer.start(config.Metrics(listen=f"127.0.0.1:{server.port}"), bytes, {}.get)
    assert await MetricsServer.start(config.Metrics(listen=""), bytes, {}.get) is None


def test_calls_are_counted_by_key() -> None:
    sources = Sources(
        calls=lambda: {("desk", "identify", True): 7, ("", "admin", False): 2},
        lookups=lambda: {"desk": 5},
    )
    text = Metrics(sources).exposition().decode()
    assert 'facelane_key_calls_total{answer="admitted",key="desk",verb="identify"} 7.0' in text
    assert 'facelane_key_calls_total{answer="refused",key="",verb="admin"} 2.0' in text
    assert 'facelane_key_lookups_total{key="desk"} 5.0' in text
