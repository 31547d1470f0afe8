"""Log lines that cannot be written cost lines, and are counted; never an error, never a wait."""

from __future__ import annotations

import io
import json
import logging
import os
import select
from pathlib import Path

import pytest
import structlog

from facelane_server import config, limits
from facelane_server.observability.logs import LOG_STALL_MS, LogSink, Ration, configure_logging


def test_a_full_disk_and_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = True
    write = os.write

    def failing(descriptor: int, data: bytes) -> int:
        if full:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", failing)
    with (tmp_path / "log").open("w") as stream:
        sink = LogSink(stream)
        sink.write("lost\n")
        sink.write("lost\nas well\n")
        assert sink.lost == 3
        full = False
        sink.write("kept\n")
    told, kept = (tmp_path / "log").read_text().splitlines()
    assert json.loads(told) == {"event": "log lines were lost", "lines": 3}
    assert (kept, sink.lost) == ("kept", 0)


def test_a_pipe_that_nobody_reads_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    polling = select.poll

    class Counted:
        def __init__(self) -> None:
            self._poll = polling()

        def register(self, *given: int) -> None:
            self._poll.register(*given)

        def poll(self, milliseconds: int) -> list[tuple[int, int]]:
            found = self._poll.poll(milliseconds)
            if not found:
                waits.append(milliseconds)
            return found

    monkeypatch.setattr(select, "poll", Counted)
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as unread, os.fdopen(writer, "w") as stream:
        sink = LogSink(stream)
        for _ in range(2_000):
            sink.write("x" * 200 + "\n")
        assert sink.lost > 1_000
        assert waits[0] == LOG_STALL_MS
        assert set(waits[1:]) == {0}, "not once a lost line"
        os.set_blocking(unread.fileno(), False)
        before = sink.lost
        while unread.read(1 << 16):
            pass
        sink.write("read again\n")
        told, line = unread.read(1 << 16).splitlines()[-2:]
        assert json.loads(told)["lines"] == before
        assert (line, sink.lost) == (b"read again", 0)


def test_a_reader_that_left_and_a_closed_stream() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        sink = LogSink(stream)
        sink.write("into the void\n")
        assert sink.lost == 1
    memory = io.StringIO()
    memory.close()
    sink = LogSink(memory)
    sink.write("nobody\n")
    assert sink.lost == 1


def test_one_event_does_not_fill_the_log() -> None:
    now = 100.0
    ration = Ration(lambda: now)
    most = limits.MAX_LOG_LINES_PER_S
    told = [ration.left_out("call refused") for _ in range(1_000)]
    assert told == [0] * most + [None] * (1_000 - most)
    assert ration.left_out("worker lost") == 0, "others are told"
    now += 1
    assert ration.left_out("call refused") == 1_000 - most
    assert ration.left_out("call refused") == 0
    for number in range(100_000):
        ration.left_out(f"made up {number}")
    assert len(ration._counts) <= limits.MAX_LOG_EVENTS + 1
    assert len(ration._left_out) <= limits.MAX_LOG_EVENTS + 1


def test_lines_are_rationed_whoever_writes_them() -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    try:
        configure_logging(config.Log(format="json"), stream=stream, environ={})
        for _ in range(500):
            structlog.get_logger().info("call refused")
            logging.getLogger("asyncio").error("socket.accept() out of system resource")
        lines = stream.getvalue().splitlines()
        assert 2 * limits.MAX_LOG_LINES_PER_S <= len(lines) < 500
        assert sum("call refused" in line for line in lines) < 250
    finally:
        root.handlers, root.level = before
        structlog.reset_defaults()
