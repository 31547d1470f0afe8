"""The port that metrics are scraped from, and that probes ask for health."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Final, Self

import structlog
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from facelane_server import config, limits

log = structlog.get_logger(__name__)


class MetricsServer:
    """``GET /metrics`` and ``/health`` over HTTP/1.1, one request a connection. Owns its socket.

    ``/health`` is of the server as a whole, ``/health/NAME`` of a name of ``grpc.health.v1``: 200
    where it is SERVING, 503 where not, 404 where there is no such name. For probes that speak no
    gRPC, or have no key and no certificate.

    At most ``limits.MAX_METRICS_CONNECTIONS`` at a time, each within ``REQUEST_TIMEOUT_S``:
    a scraper that hangs costs nothing but its own scrape.
    """

    REQUEST_TIMEOUT_S: Final = 5.0

    def __init__(
        self,
        exposition: Callable[[], bytes | Awaitable[bytes]],
        serving: Callable[[str], bool | None],
    ) -> None:
        self._exposition = exposition
        self._serving = serving
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(
        cls,
        section: config.Metrics,
        exposition: Callable[[], bytes | Awaitable[bytes]],
        serving: Callable[[str], bool | None],
    ) -> Self | None:
        """Listens on ``section.listen``; ``None`` when that is empty. ``serving``: of a name of
        ``grpc.health.v1``, None where there is none. Raises ``AddressError``."""
        if not section.listen:
            return None
        host, _, port = section.listen.rpartition(":")
        made = cls(exposition, serving)
        try:
            made._server = await asyncio.start_server(
                made._accept, host.strip("[]"), int(port), limit=limits.MAX_METRICS_HEADER_BYTES
            )
        except OSError as error:
            # asyncio's own text names the address once more.
            number = error.errno or 0
            why = os.strerror(number) if number > 0 else error.strerror
            raise config.AddressError(
                f"metrics.listen: cannot listen on {section.listen}: {why or 'unknown'}; choose "
                'another port, or write listen = "" to switch metrics off'
            ) from None
        return made

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stops listening and ends what is open; idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        # So that drain waits until all is with the kernel: nothing is left for close to wait
        # for, which it would do for as long as the peer does not read.
        writer.transport.set_write_buffer_limits(high=0)
        try:
            if len(self._open) > limits.MAX_METRICS_CONNECTIONS:
                return
            async with asyncio.timeout(self.REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await self._answer(head))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        except asyncio.CancelledError:
            # Only close() cancels; asyncio's own callback would log a cancelled handler.
            pass
        except Exception as error:
            log.error("metrics request failed", error=type(error).__name__)
        finally:
            self._open.discard(task)
            writer.transport.abort()

    async def _answer(self, head: bytes) -> bytes:
        request = head.split(b"\r\n", 1)[0].split(b" ")
        if len(request) != 3 or not request[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"")
        method, target = request[0], request[1].split(b"?", 1)[0]
        path, _, name = target[1:].partition(b"/")
        if path not in (b"metrics", b"health") or (path == b"metrics" and name):
            return _response("404 Not Found", b"there are /metrics and /health\n")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"")
        head_only = method == b"HEAD"
        if path == b"metrics":
            found = self._exposition()
            body = found if isinstance(found, bytes) else await found
            return _response("200 OK", body, CONTENT_TYPE_PLAIN_0_0_4, head_only=head_only)
        serving = self._serving(name.decode("ascii", "replace"))
        status, body = {
            True: ("200 OK", b"SERVING\n"),
            False: ("503 Service Unavailable", b"NOT_SERVING\n"),
            None: ("404 Not Found", b"health knows no such name\n"),
        }[serving]
        return _response(status, body, head_only=head_only)


def _response(
    status: str, body: bytes, kind: str = "text/plain; charset=utf-8", *, head_only: bool = False
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    ).encode()
    return head if head_only else head + body
