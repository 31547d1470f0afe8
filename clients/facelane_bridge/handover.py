"""Frames from a camera's reader thread to the event loop, bounded and counted.

Every frame offered gets the next frame id and is either taken, replaced by a newer one
(and then told as dropped with the next take) or discarded at the end (likewise told):
nothing disappears between camera and server without being counted.

Live sources have room for one picture, the newest. Video that is passed on cannot be thinned
so: of its access units none may be missing before the next key frame, so there is room for
seconds of them, and what is given up is given up as far as a key frame. Lossless sources have
room for a few frames, and ``offer`` waits; the reader's waiting is visible (``is_holding``),
so that a slow server is not mistaken for a stalled camera.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass

from facelane_bridge.sources import CapturedFrame

LOSSLESS_ROOM = 4
VIDEO_ROOM = 256
"""Access units: ten seconds of a camera, and a group of pictures of most of them."""
VIDEO_ROOM_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class NumberedFrame:
    """A captured frame with the id and the stream offset that it is sent with."""

    frame_id: int
    offset: float
    """Seconds; never decreases over all openings of the camera."""
    arrived: float
    """Monotonic clock."""
    frame: CapturedFrame


@dataclass(frozen=True, slots=True)
class Taken:
    """What ``take`` gives: the frame, ``None`` at the end, and how many came between it
    and the one before and were replaced. Their ids begin at ``first_replaced``."""

    frame: NumberedFrame | None
    first_replaced: int
    replaced: int


class Handover:
    """One per camera; it outlives the readers, of which one at a time has its say."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, lossless: bool) -> None:
        self._loop = loop
        self._room = LOSSLESS_ROOM if lossless else 1
        self._lossless = lossless
        self._frames: deque[NumberedFrame] = deque()
        self._bytes = 0
        self._group: list[NumberedFrame] = []
        self._group_bytes = 0
        """Of live video the newest key frame and what came behind it; none where that is more
        than there is room for."""
        self._gap = False
        """Of video that is passed on, what comes before the next key frame is worth nothing."""
        self._changed = threading.Condition()
        self._reader: object | None = None
        self._offset_base = 0.0
        self._last_offset = 0.0
        self._next_id = 1
        self._next_taken_id = 1
        self._closed = False
        self._holding = False
        self._progress: tuple[float, float] | None = None
        self._wake_scheduled = False
        self._woken = asyncio.Event()
        self._on_wake: asyncio.Event | None = None

    # --- the event loop's side ---

    @property
    def offered(self) -> int:
        """Frames offered since the start."""
        with self._changed:
            return self._next_id - 1

    @property
    def is_holding(self) -> bool:
        """The reader has a frame and waits for room."""
        return self._holding

    def watch(self, event: asyncio.Event) -> None:
        """Also set ``event`` whenever a frame arrives."""
        self._on_wake = event

    def admit(self, reader: object, offset_base: float) -> None:
        """From now on frames of ``reader`` alone count; its media time 0 is this offset."""
        with self._changed:
            self._reader = reader
            self._offset_base = max(offset_base, self._last_offset)
            self._progress = None
            self._changed.notify_all()

    def fence(self) -> None:
        """Nobody's frames count until the next ``admit``; a waiting reader goes free."""
        with self._changed:
            self._reader = None
            self._changed.notify_all()

    def close(self) -> None:
        """No more frames. Those in here can still be taken."""
        with self._changed:
            self._reader = None
            self._closed = True
            self._changed.notify_all()
        self._woken.set()

    def progress(self) -> tuple[float, float] | None:
        """(arrival, media time) of the newest frame since the last call, if there is one."""
        with self._changed:
            progress, self._progress = self._progress, None
            return progress

    def _pop(self) -> Taken | None:
        with self._changed:
            if self._frames:
                numbered = self._popleft()
                first, self._next_taken_id = self._next_taken_id, numbered.frame_id + 1
                self._changed.notify_all()
                return Taken(numbered, first, numbered.frame_id - first)
            if self._closed:
                first, self._next_taken_id = self._next_taken_id, self._next_id
                return Taken(None, first, self._next_id - first)
            return None

    def _popleft(self) -> NumberedFrame:
        numbered = self._frames.popleft()
        self._bytes -= len(numbered.frame.data)
        return numbered

    def skip_to_key_frame(self) -> None:
        """An access unit could not be sent: those that build on it are given up."""
        with self._changed:
            while self._frames and not self._frames[0].frame.is_key:
                self._popleft()
            self._gap = self._gap or not self._frames
            self._changed.notify_all()

    def replay(self) -> None:
        """Whoever took what is in here has lost it: the newest key frame and what followed it
        are given once more, as frames of their own. None where they are not kept."""
        with self._changed:
            if not self._group or self._gap:
                return
            self._clear()
            for before in self._group:
                frame = NumberedFrame(
                    self._next_id, self._last_offset, before.arrived, before.frame
                )
                self._frames.append(frame)
                self._bytes += len(frame.frame.data)
                self._next_id += 1
            self._wake()

    async def take(self) -> Taken:
        """The next frame; waits for one. A frame of ``None``: closed and empty."""
        while True:
            self._woken.clear()
            taken = self._pop()
            if taken is not None:
                return taken
            await self._woken.wait()

    def discard(self) -> tuple[int, int]:
        """Throw away what is in here: (first id, count), those replaced before included."""
        with self._changed:
            self._clear()
            first, self._next_taken_id = self._next_taken_id, self._next_id
            self._changed.notify_all()
            return first, self._next_id - first

    # --- the reader thread's side ---

    def offer(self, reader: object, frame: CapturedFrame) -> bool:
        """Hand a frame over. False: this reader does not count any more and shall end."""
        with self._changed:
            arrived = time.monotonic()
            if reader is self._reader:
                self._progress = (arrived, frame.media_time)
                self._wake()
            self._holding = self._lossless and len(self._frames) >= self._room
            while self._lossless and len(self._frames) >= self._room and reader is self._reader:
                # Woken by take, fence, admit and close; the timeout is a safety net only.
                self._changed.wait(1.0)
            self._holding = False
            if reader is not self._reader:
                return False
            self._make_room(frame)
            offset = max(self._last_offset, self._offset_base + frame.media_time)
            self._last_offset = offset
            if not self._gap:
                numbered = NumberedFrame(self._next_id, offset, arrived, frame)
                self._frames.append(numbered)
                self._bytes += len(frame.data)
                self._keep(numbered)
            self._next_id += 1
            self._wake()
            return True

    def _keep(self, numbered: NumberedFrame) -> None:
        """For a ``replay``."""
        frame = numbered.frame
        size = self._group_bytes + len(frame.data)
        fits = len(self._group) < VIDEO_ROOM and size <= VIDEO_ROOM_BYTES
        if frame.video is None or self._lossless or frame.is_key or not fits:
            self._group.clear()
            self._group_bytes = 0
        if frame.video is not None and not self._lossless and (frame.is_key or self._group):
            self._group.append(numbered)
            self._group_bytes += len(frame.data)

    def _make_room(self, frame: CapturedFrame) -> None:
        """For the next frame of a live source; ``_gap`` says whether it is taken at all."""
        self._gap = self._gap and not frame.is_key
        if self._lossless or self._gap:
            return
        if frame.video is None:
            self._clear()
        elif len(self._frames) >= VIDEO_ROOM or self._bytes + len(frame.data) > VIDEO_ROOM_BYTES:
            keys = [n for n, waiting in enumerate(self._frames) if n and waiting.frame.is_key]
            for _ in range(keys[-1] if keys else len(self._frames)):
                self._popleft()
            self._gap = not keys and not frame.is_key

    def _clear(self) -> None:
        self._frames.clear()
        self._bytes = 0

    def _wake(self) -> None:
        # One callback at a time: a loop that is busy is not flooded with them.
        if self._wake_scheduled:
            return
        self._wake_scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._woken_in_loop)
        except RuntimeError:  # the loop is closed: the process ends
            self._wake_scheduled = False

    def _woken_in_loop(self) -> None:
        with self._changed:
            self._wake_scheduled = False
        self._woken.set()
        if self._on_wake is not None:
            self._on_wake.set()
