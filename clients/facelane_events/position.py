"""How far a sink has come, and what it would not take: on disk."""

from __future__ import annotations

import fcntl
import os
import time
import zlib
from pathlib import Path
from typing import Final

import msgspec

MAX_TOKEN_BYTES: Final = 3072
_SLOT: Final = 4096
_SYNC_S: Final = 1.0


class Position:
    """A resume token, in two slots of one file that are written in turns.

    Survives the death of this process at any moment; of the machine, too, within a second: an
    older token delivers again what was delivered, and loses nothing. Its size never changes, so
    that a full disk does not stop it. Owns the file, which nobody else may have: two programs that
    go on from one position would both deliver everything.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError: also for a file that holds something, and no position any more."""
        self._path = path
        self._file = self._opened()
        found = [slot for slot in map(self._read, (0, 1)) if slot is not None]
        if not found and self._is_damaged():
            os.close(self._file)
            raise OSError(
                f"{path} is damaged, and how far its sink had come is not known: restore it, or "
                "delete it to begin with what happens next"
            )
        self._number, self.token = max(found, default=(0, ""))
        self._synced = 0.0

    def _opened(self) -> int:
        path = self._path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._lock(file)
            self._size = os.fstat(file).st_size
            if self._size < 2 * _SLOT:
                os.posix_fallocate(file, 0, 2 * _SLOT)
        except OSError:
            os.close(file)
            raise
        return file

    def _is_damaged(self) -> bool:
        """Rather than one in which nothing was saved, or the first that was did not arrive."""
        empty = [not any(os.pread(self._file, _SLOT, slot * _SLOT)) for slot in (0, 1)]
        return not any(empty) or 0 < self._size < 2 * _SLOT

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(
                f"{self._path} is in use: another facelane-events delivers from this state folder; "
                "end it, or give this one a state_dir of its own"
            ) from None
        except OSError:
            pass  # some file systems know no locks

    def _read(self, slot: int) -> tuple[int, str] | None:
        raw = os.pread(self._file, _SLOT, slot * _SLOT)
        size, check = int.from_bytes(raw[:4], "big"), int.from_bytes(raw[4:8], "big")
        body = raw[8 : 8 + size]
        if not size or size > _SLOT - 8 or zlib.crc32(body) != check:
            return None
        number, token = msgspec.json.decode(body, type=tuple[int, str])
        return number, token

    @property
    def due(self) -> bool:
        """Whether the next token that is saved reaches the disk at once."""
        return time.monotonic() - self._synced >= _SYNC_S

    def save(self, token: str) -> None:
        """Raises OSError; ValueError of a token that is no token."""
        if len(token.encode()) > MAX_TOKEN_BYTES:
            raise ValueError("the server's resume token is too long to be kept")
        self._number += 1
        self.token = token
        self._write()
        if self.due:
            self.sync()
            self._synced = time.monotonic()

    def _write(self) -> None:
        body = msgspec.json.encode((self._number, self.token))
        raw = len(body).to_bytes(4, "big") + zlib.crc32(body).to_bytes(4, "big") + body
        os.pwrite(self._file, raw, self._number % 2 * _SLOT)

    def sync(self) -> None:
        """Raises OSError."""
        if self.token and not os.fstat(self._file).st_nlink:
            # Somebody has deleted it, or put another in its place: nobody would find this one.
            lost, self._file = self._file, self._opened()
            os.close(lost)
            there = (found[0] for slot in (0, 1) if (found := self._read(slot)) is not None)
            self._number = max(self._number, *there, 0) + 1
            self._write()
        os.fdatasync(self._file)

    def close(self) -> None:
        self.sync()
        os.close(self._file)


class DeadLetters:
    """A file of JSON lines with what a sink refuses for good; never more than ``max_bytes``."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max = max_bytes

    def add(self, number: str, why: str, body: bytes) -> bool:
        """Whether there was room. Raises OSError."""
        record = {"id": number, "why": why, "body": body.decode("utf-8", "replace")}
        line = msgspec.json.encode(record) + b"\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        file = os.open(self._path, flags, 0o600)
        try:
            size = os.fstat(file).st_size
            if size + len(line) > self._max:
                return False
            if os.write(file, line) < len(line):
                # The disk is full: no half of a line, behind which the next would be lost too.
                os.ftruncate(file, size)
                return False
            return True
        finally:
            os.close(file)
