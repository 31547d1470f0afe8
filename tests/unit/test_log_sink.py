"""Log lines that cannot be written cost lines, and are counted; never an error, never a wait."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest

from facelane_server.observability.logs import LOG_STALL_MS, LogSink


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


def test_a_pipe_that_nobody_reads_is_waited_for_once() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as unread, os.fdopen(writer, "w") as stream:
        sink = LogSink(stream)
        began = time.monotonic()
        for _ in range(2_000):
            sink.write("x" * 200 + "\n")
        assert sink.lost > 1_000
        # Not once a lost line, which would take a thousand times as long.
        assert time.monotonic() - began < 200 * LOG_STALL_MS / 1000
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
