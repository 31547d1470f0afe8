"""Whoever connects asks for something, or makes room: uvicorn waits for a request without an end,
and a thousand connections that say nothing would keep everybody else out."""

from __future__ import annotations

import asyncio
from typing import Final

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_S: Final = 10.0
"""In which the head of a request must have come, from the connection's beginning or from the first
byte after the answer before."""


class Patient(H11Protocol):
    """A connection of a browser. What is under way is the console's to bound; so is a WebSocket."""

    _awaited: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._awaited is not None:
            self._awaited.cancel()
        super().connection_lost(exc)

    def _await_request(self) -> None:
        if self._under_way():
            if self._awaited is not None:
                self._awaited.cancel()
            self._awaited = None
        elif self._awaited is None:
            self._awaited = self.loop.call_later(REQUEST_S, self._give_up)

    def _give_up(self) -> None:
        self._awaited = None
        if not self._under_way():
            self.transport.close()

    def _under_way(self) -> bool:
        """Whether a request is being answered, or the connection is a WebSocket's by now."""
        if self.transport.get_protocol() is not self:
            return True
        return self.cycle is not None and not self.cycle.response_complete
