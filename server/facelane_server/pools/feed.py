"""The newest gallery of a pool, on its way to every worker: a snapshot, and what came after it.

A worker that cannot load it within a bound is late, and to be replaced, because it would
go on naming people by a gallery that is no more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from facelane_server.ipc import gallery_table
from facelane_server.ipc.channel import close_all
from facelane_server.ipc.messages import GalleryDelta, GallerySnapshot
from facelane_server.pools.clock import Changes
from facelane_server.pools.handle import ReadyHandle

_TIMEOUT_NS: Final = 30_000_000_000
_LOADED_S: Final = 60.0
"""A worker that is late is lost well before."""


class GalleryFeed:
    """Owns copies of the descriptors."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._snapshot: tuple[GallerySnapshot, list[int]] | None = None
        self._delta: tuple[GalleryDelta, list[int]] | None = None

    @property
    def version(self) -> int:
        """0 = there is none yet."""
        if self._delta is not None:
            return self._delta[0].version
        return 0 if self._snapshot is None else self._snapshot[0].version

    def renew(
        self, snapshot: GallerySnapshot, fd: int, delta: GalleryDelta | None = None, log: int = -1
    ) -> bool:
        """Whether it is newer than what there was: then it is to be sent to the workers.
        The descriptors stay the caller's. Raises ValueError when versions go back."""
        version = snapshot.version if delta is None else delta.version
        if version < self.version:
            raise ValueError("gallery versions must not go back")
        if delta is not None and delta.base != snapshot.version:
            raise ValueError("a delta of another snapshot")
        if version == self.version:
            return False
        if self._snapshot is None or self._snapshot[0].version != snapshot.version:
            matrix_fd = os.dup(fd)
            try:
                message, table_fd = gallery_table.detach(snapshot)
            except BaseException:
                os.close(matrix_fd)
                raise
            self.close()
            self._snapshot = (message, [matrix_fd, table_fd])
        if delta is not None:
            held = [os.dup(log)] if self._delta is None else self._delta[1]
            self._delta = (delta, held)
        return True

    def is_current(self, handle: ReadyHandle) -> bool:
        return handle.gallery_version >= self.version

    def is_late(self, handle: ReadyHandle, now_ns: int) -> bool:
        return not self.is_current(handle) and now_ns - handle.gallery_sent_ns >= _TIMEOUT_NS

    def send(self, handle: ReadyHandle, now_ns: int) -> None:
        """What the worker lacks. Raises ChannelError."""
        assert self._snapshot is not None
        if handle.gallery_base != self._snapshot[0].version:
            handle.publish(*self._snapshot, now_ns)
        if self._delta is not None:
            handle.publish(*self._delta, now_ns)

    async def loaded(self, handles: Sequence[ReadyHandle], version: int) -> None:
        """Until each of the workers has loaded ``version`` or is gone; whoever watches them
        sees to it that one of both happens."""
        await self._changes.until(
            lambda: all(h.closed or h.gallery_version >= version for h in handles), _LOADED_S
        )

    def close(self) -> None:
        """Idempotent."""
        for held in (self._snapshot, self._delta):
            if held is not None:
                close_all(held[1])
        self._snapshot = self._delta = None
