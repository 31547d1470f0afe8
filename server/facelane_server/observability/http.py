"""The port that metrics are scraped from, and that probes ask for health."""

from __future__ import annotations

import asyncio
import os
import time
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

    At most ``limits.MAX_METRICS_CONNECTIONS`` at a time, each within ``REQUEST_TIMEOUT_S``: a
    scraper that hangs costs nothing but its own scrape. Of more, those that have kept the server
    waiting for longest give way, so that nobody keeps probes out by connecting and saying nothing.
    Metrics are collected for many at once, and take a tenth of the time at most, which is the
    streams'.
    """

    REQUEST_TIMEOUT_S: Final = 5.0
    REST: Final = 9.0
    """Times what collecting the metrics took that nobody's are collected for then; at most
    ``LONGEST_REST_S``."""
    LONGEST_REST_S: Final = 1.0

    def __init__(
        self,
        exposition: Callable[[], bytes | Awaitable[bytes]],
        serving: Callable[[str], bool | None],
    ) -> None:
        self._exposition = exposition
        self._serving = serving
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self._awaited: dict[asyncio.Task[None], None] = {}
        """Of the open ones those that something is to come from, or to be read by: the one that has
        kept us waiting for longest first."""
        self._collecting = asyncio.Lock()
        self._collected = b""
        self._begun_s = self._rested_s = 0.0

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
            self._awaited[task] = None
            if len(self._open) > limits.MAX_METRICS_CONNECTIONS and not self._make_room(task):
                return
            async with asyncio.timeout(self.REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                self._awaited.pop(task, None)
                answer = await self._answer(head)
                self._awaited[task] = None
                writer.write(answer)
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        except asyncio.CancelledError:
            # close() cancels, and who takes the place; asyncio's own callback would log it.
            pass
        except Exception as error:
            log.error("metrics request failed", error=type(error).__name__)
        finally:
            self._open.discard(task)
            self._awaited.pop(task, None)
            writer.transport.abort()

    def _make_room(self, newest: asyncio.Task[None]) -> bool:
        """Whether another one than the newest gives way."""
        oldest = next(iter(self._awaited))
        if oldest is newest:
            return False
        del self._awaited[oldest]
        self._open.discard(oldest)
        oldest.cancel()
        return True

    async def _metrics(self) -> bytes:
        """Collected after they were asked for."""
        asked_s = time.monotonic()
        async with self._collecting:
            if self._begun_s <= asked_s:
                await asyncio.sleep(max(0.0, self._rested_s - time.monotonic()))
                self._begun_s = time.monotonic()
                found = self._exposition()
                self._collected = found if isinstance(found, bytes) else await found
                now_s = time.monotonic()
                rest_s = min(self.REST * (now_s - self._begun_s), self.LONGEST_REST_S)
                self._rested_s = now_s + rest_s
            return self._collected

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
            body = await self._metrics()
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
