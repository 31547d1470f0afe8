"""A file of JSON lines, turned over by size."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from facelane_events import config
from facelane_events.delivery import UnavailableError
from facelane_events.message import Message


class JsonLinesSink:
    """Writes in a thread of its own, one thing after the other: a disk that hangs holds up this
    sink alone, and what was given up does not come behind what follows it."""

    def __init__(self, settings: config.JsonLines) -> None:
        self._settings = settings
        self._path = Path(settings.path)
        self._thread = ThreadPoolExecutor(1, f"jsonl {settings.name}")
        self._file = -1

    async def _do(self, what: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, what)

    async def open(self) -> None:
        await self._do(self._open)

    def _open(self) -> None:
        self._shut()
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(self._path, flags, 0o600)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                # A line that this process or its disk did not end: it comes again, whole.
                os.write(self._file, b"\n")
        except OSError as error:
            raise UnavailableError(f"{self._path}: {error.strerror}") from None

    async def send(self, event: Message) -> None:
        line = event.body.replace(b"\n", b" ") + b"\n"
        await self._do(lambda: self._send(line))

    def _send(self, line: bytes) -> None:
        try:
            size = self._size_of_ours()
            if size and size + len(line) > self._settings.rotate_mib << 20:
                self._turn_over()
                size = 0
            written = os.write(self._file, line)
            if written < len(line):
                # No half of a line for those who read meanwhile; pipes cannot take it back.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, size)
                raise UnavailableError(f"{self._path}: the disk is full")
        except OSError as error:
            raise UnavailableError(f"{self._path}: {error.strerror}") from None

    def _size_of_ours(self) -> int:
        """The file's size; it is opened again where somebody else has turned it over or deleted
        it, and emptied where it lies."""
        ours = os.fstat(self._file)
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            self._open()
            ours = os.fstat(self._file)
        return ours.st_size

    def _turn_over(self) -> None:
        for number in range(self._settings.keep - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            if older.exists():
                older.replace(self._path.with_name(f"{self._path.name}.{number + 1}"))
        self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        self._settle()
        self._open()

    async def settle(self) -> None:
        await self._do(self._settle)

    def _settle(self) -> None:
        # What is no file on a disk has nothing to settle.
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.fdatasync(self._file)

    async def close(self) -> None:
        await self._do(self._shut)

    def _shut(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)
