"""A look at one camera, as the page gets it: for each picture the length of what is told (4 bytes),
that as JSON, and the picture's bytes."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from collections.abc import AsyncIterator
from typing import Any, Final

import facelane
from facelane_console import shown
from facelane_console.decoding import CODECS, Decoder

JPEG_FPS: Final = 10.0
"""Of video that is decoded here: so many pictures a second."""
_UNTOLD: Final = 64
"""With B-frames a picture is shown some access units later."""


def message(told: dict[str, Any], picture: bytes) -> bytes:
    head = json.dumps(told).encode()
    return struct.pack(">I", len(head)) + head + picture


async def messages(
    client: facelane.aio.Client, *, source: str, stream: str, fps: float, as_jpeg: bool
) -> AsyncIterator[bytes]:
    """The pictures of a stream that were analysed, and what was found in them; of video all that a
    decoder needs. ``as_jpeg``: video is decoded here, for a browser that has no decoder for it.

    Whoever takes them too slowly is waited for, and the server then leaves pictures out. Raises
    ``CannotDecodeError``."""
    looking = client.watch_stream(source, stream_id=stream, max_fps=fps, results_only=True)
    async with contextlib.aclosing(looking) as pictures, contextlib.AsyncExitStack() as stack:
        decoder: Decoder | None = None
        number, due = 0, 0.0
        untold: dict[int, dict[str, Any]] = {}
        async for seen in pictures:
            told = shown.picture(seen)
            if not (as_jpeg and seen.picture.encoding.value in CODECS):
                yield message(told, seen.picture.data)
                continue
            if decoder is None:
                decoder = Decoder(seen.picture.encoding.value)
                await stack.enter_async_context(decoder)
            number += 1
            now = time.monotonic()
            wanted = "faces" in told and now >= due
            if wanted:
                due = max(due + 1 / JPEG_FPS, now - 1 / JPEG_FPS)
                untold[number] = told
                untold.pop(number - _UNTOLD, None)
            ready = await decoder.decode(number, seen.picture.data, wanted=wanted)
            if ready is not None and (about := untold.pop(ready[0], None)) is not None:
                made_here = {"encoding": "jpeg", "decoded": about["encoding"]}
                yield message({**about, **made_here}, ready[1])
