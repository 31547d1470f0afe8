"""Video for browsers that cannot decode it: access units in, JPEG out.

A decoder of C reads what cameras send. It runs in a process of its own, which holds no key and has
nothing but a pipe: the console's keys are not where a picture could reach them.

To the child: whether a picture is wanted of this unit (1 byte), its number (8), its length (4), the
unit. Back, for each unit: the number of the unit that is shown (8), a length (4; 0 = nothing to
show), a JPEG.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any, BinaryIO, Final, Self

CODECS: Final = {"h264": "h264", "h265": "hevc"}
MOST: Final = 16
"""Children at a time; each has a core's worth of work at most."""
MAX_SIDE: Final = 1280
"""Larger pictures are shown smaller."""
MAX_PIXELS: Final = 8192 * 8192
MAX_UNIT: Final = 32 << 20
UNIT_S: Final = 20.0
"""A child that needs longer for a unit is ended."""
LIVES: Final = 3
"""Children that a look may have, one after the other: a camera whose video ends each of them is not
tried for ever."""
WOULD_NOT: Final = 3
"""How a child ends that a picture was too large for."""
_TO: Final = struct.Struct(">?QI")
_BACK: Final = struct.Struct(">QI")


log = logging.getLogger(__name__)


class CannotDecodeError(Exception):
    """There is no decoder here, or it has given up."""


class Decoder:
    """A child for one look, begun anew when it dies. Use it as an async context manager."""

    _running = 0

    def __init__(self, encoding: str) -> None:
        """``encoding``: of ``CODECS``."""
        self._codec = CODECS[encoding]
        self._process: asyncio.subprocess.Process | None = None
        self._lives = LIVES

    async def __aenter__(self) -> Self:
        if Decoder._running >= MOST:
            raise CannotDecodeError
        Decoder._running += 1
        try:
            await self._begin()
        except BaseException:
            Decoder._running -= 1
            raise
        return self

    async def __aexit__(self, *_exc: object) -> None:
        Decoder._running -= 1
        await self._end()

    async def _begin(self) -> None:
        self._lives -= 1
        # Of this process's surroundings only where Python's packages are.
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "facelane_console.decoding", self._codec,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL, env=kept, limit=1 << 20,
            )  # fmt: skip
        except OSError as error:  # no process, no memory, no descriptor is left
            log.warning("no decoder for %s could be started: %s", self._codec, error.strerror)
            raise CannotDecodeError from None

    async def _end(self) -> int:
        """How it ended, as ``returncode``."""
        process = self._process
        assert process is not None
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        return await process.wait()

    async def decode(self, number: int, unit: bytes, *, wanted: bool) -> tuple[int, bytes] | None:
        """The next access unit, and what can be shown now: the number of the unit that it is of,
        and a JPEG. A child that has died is followed by another, which shows the next key frame.
        Raises ``CannotDecodeError`` when the last has died."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(UNIT_S):
                process.stdin.write(_TO.pack(wanted, number, len(unit)) + unit)
                await process.stdin.drain()
                shown, size = _BACK.unpack(await process.stdout.readexactly(_BACK.size))
                picture = await process.stdout.readexactly(size)
        except (OSError, RuntimeError, TimeoutError, asyncio.IncompleteReadError) as error:
            # uvloop calls a pipe whose reader has died a RuntimeError.
            slow = isinstance(error, TimeoutError)
            code = await self._end()
            log.warning(
                "the decoder for %s %s at a unit of %d bytes; it may begin anew %d times",
                self._codec, f"took over {UNIT_S:g} s" if slow else f"ended with {code}",
                len(unit), self._lives,
            )  # fmt: skip
            if not self._lives:
                raise CannotDecodeError from None
            await self._begin()
            return None
        return (shown, picture) if picture else None


class _Shower:
    """The child's decoder and its encoder, which is made anew when the picture's size changes."""

    def __init__(self, codec: str) -> None:
        import av

        self._av = av
        self._decoder: Any = av.CodecContext.create(codec, "r")
        self._decoder.thread_count = 1
        self._encoder: Any = None
        self._wanted: set[int] = set()

    def take(self, unit: bytes, number: int, *, wanted: bool) -> tuple[int, bytes]:
        packet = self._av.Packet(unit)
        packet.pts = packet.dts = number
        if wanted:
            self._wanted.add(number)
        shown = (0, b"")
        try:
            frames = self._decoder.decode(packet)
        except self._av.FFmpegError:
            frames = []  # of a picture that is broken; the next key frame will do
        for frame in frames:
            if frame.width * frame.height > MAX_PIXELS:
                raise ValueError("too large")
            if frame.pts in self._wanted:
                shown = (frame.pts, self._jpeg(frame))
        # With B-frames a picture comes some units later, never so many.
        self._wanted = {known for known in self._wanted if number - known < 64 and known > shown[0]}
        return shown

    def _jpeg(self, frame: Any) -> bytes:
        shrink = min(1.0, MAX_SIDE / max(frame.width, frame.height))
        width, height = (
            max(2, int(side * shrink) // 2 * 2) for side in (frame.width, frame.height)
        )
        frame = frame.reformat(width, height, format="yuvj420p")
        if self._encoder is None or (self._encoder.width, self._encoder.height) != (width, height):
            made: Any = self._av.CodecContext.create("mjpeg", "w")
            made.width, made.height, made.pix_fmt = width, height, "yuvj420p"
            made.time_base = Fraction(1, 25)
            made.options = {"qmin": "4", "qmax": "6"}
            self._encoder = made
        frame.pts = None
        return b"".join(bytes(packet) for packet in self._encoder.encode(frame))


def _serve(codec: str, read: Callable[[int], bytes], out: BinaryIO) -> None:
    shower = _Shower(codec)
    while len(head := read(_TO.size)) == _TO.size:
        wanted, number, size = _TO.unpack(head)
        if size > MAX_UNIT:
            return
        shown, picture = shower.take(read(size), number, wanted=wanted)
        out.write(_BACK.pack(shown, len(picture)) + picture)
        out.flush()


def main() -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    try:
        _serve(sys.argv[1], sys.stdin.buffer.read, sys.stdout.buffer)
    except (BrokenPipeError, KeyboardInterrupt):  # the look is over
        return 0
    except (MemoryError, ValueError):
        return WOULD_NOT
    return 0


if __name__ == "__main__":
    sys.exit(main())
