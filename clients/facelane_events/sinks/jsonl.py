"""A file of JSON lines, turned over by size."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from facelane_events import config
from facelane_events.delivery import UnavailableError
from facelane_events.message import Message


class JsonLinesSink:
    def __init__(self, settings: config.JsonLines) -> None:
        self._settings = settings
        self._path = Path(settings.path)
        self._file = -1
        self._size = 0

    async def open(self) -> None:
        await asyncio.to_thread(self._open)

    def _open(self) -> None:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(self._path, flags, 0o600)
            self._size = os.fstat(self._file).st_size
            if self._size and os.pread(self._file, 1, self._size - 1) != b"\n":
                # A line that this process or its disk did not end: it comes again, whole.
                self._size += os.write(self._file, b"\n")
        except OSError as error:
            raise UnavailableError(f"{self._path}: {error.strerror}") from None

    async def send(self, event: Message) -> None:
        await asyncio.to_thread(self._send, event.body.replace(b"\n", b" ") + b"\n")

    def _send(self, line: bytes) -> None:
        try:
            if self._size and self._size + len(line) > self._settings.rotate_mib << 20:
                self._turn_over()
            written = os.write(self._file, line)
            self._size += written
        except OSError as error:
            raise UnavailableError(f"{self._path}: {error.strerror}") from None
        if written < len(line):
            raise UnavailableError(f"{self._path}: the disk is full")

    def _turn_over(self) -> None:
        for number in range(self._settings.keep - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            if older.exists():
                older.replace(self._path.with_name(f"{self._path.name}.{number + 1}"))
        self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        os.close(self._file)
        self._file = -1
        self._open()

    async def close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)
