"""Logs, and the rule about what must never be in them.

Faces are personal data. A log message is a constant; values go into fields; and a field
that could hold an embedding, a picture or somebody's name is withheld by ``withhold``, the
last processor before the renderer. Bytes and arrays are withheld whatever the field's
name. Tracebacks show no local variables, for the same reason.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import select
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final, TextIO, cast

import structlog

from facelane_server import config, limits

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
    bound = limits.MAX_TRACEBACK_CHARS if key == "exception" else limits.MAX_LOG_VALUE_CHARS
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


class Ration:
    """So many lines of one event a second, and no more: strangers can make a server write as
    fast as they can knock. The next line that is let through says how many were left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = 0.0
        self._counts: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()

    def left_out(self, event: str) -> int | None:
        """How many lines like this were left out before it; None = leave this one out too."""
        now = self._clock()
        if now - self._begun >= 1.0:
            self._begun = now
            self._counts.clear()
        # Messages are constants; those of other libraries are cut, and few enough.
        event = event[:64]
        if len(self._counts) >= limits.MAX_LOG_EVENTS:
            event = ""
        self._counts[event] += 1
        if self._counts[event] > limits.MAX_LOG_LINES_PER_S:
            if len(self._left_out) < limits.MAX_LOG_EVENTS or event in self._left_out:
                self._left_out[event] += 1
            return None
        return self._left_out.pop(event, 0)

    def process(self, _logger: object, _method: str, event: Event) -> Event:
        """For structlog."""
        missing = self.left_out(str(event.get("event", "")))
        if missing is None:
            raise structlog.DropEvent
        if missing:
            event["left_out"] = missing
        return event

    def filter(self, record: logging.LogRecord) -> bool:
        """For the standard library's handlers."""
        return self.left_out(str(record.msg)) is not None


def configure_logging(
    section: config.Log,
    *,
    stream: TextIO | None = None,
    environ: Mapping[str, str] = os.environ,
    shard: int | None = None,
) -> None:
    """Sets up structlog and the standard library's root logger, once a process.

    ``auto``: lines for people on a terminal, JSON lines anywhere else (no escape codes in
    files, pipes and the journal). Lines of other libraries get the same form and the same
    rules; below WARNING they are left out. ``shard``: which of several this process is; every
    line says so, now and when logging is set up again.
    """
    global _shard
    _shard = _shard if shard is None else shard
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
        _name_shard,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *traceback,
    ]
    sink = LogSink(stream)
    ration = Ration()
    structlog.configure(
        processors=[ration.process, *shared, _withhold_all, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", sink)),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(cast("TextIO", sink))
    handler.addFilter(ration.filter)
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


_shard: int | None = None


def _name_shard(_logger: object, _method: str, event: Event) -> Event:
    if _shard is not None:
        # ``shard`` is what a line is about, where it is about another one.
        event.setdefault("shard", _shard)
    return event


def _withhold_all(logger: Any, method: str, event: Event) -> Event:
    exc_info = event.pop("exc_info", None)  # rendered by the console renderer itself
    cleaned = withhold(logger, method, event)
    if exc_info:
        cleaned["exc_info"] = exc_info
    return cleaned
