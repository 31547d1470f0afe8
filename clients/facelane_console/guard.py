"""What every request passes before anything is done, and what every answer says to browsers."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SAFE: Final = ("GET", "HEAD")
_CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "media-src 'self' blob:; connect-src 'self' {sockets}; font-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def same_origin(headers: Headers, hosts: frozenset[str]) -> bool:
    """Whether a request comes from the console's own page: its Host is one of ours (else the name
    was rebound to this address), and its Origin, where it has one, is the same."""
    host = headers.get("host", "")
    try:
        if _name(host) not in hosts:
            return False
        origin = headers.get("origin")
        return origin is None or urlsplit(origin).netloc == host
    except ValueError:  # half of an address in brackets: nobody's page is called so
        return False


def _name(host: str) -> str:
    """Raises ``ValueError``."""
    return (urlsplit(f"//{host}").hostname or "").lower()


class Guard:
    """ASGI middleware. ``hosts``: names by which the console may be called."""

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str], tls: bool) -> None:
        self._app = app
        self._hosts = hosts
        self._tls = tls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        # Whatever changes something, and every socket, says where it comes from.
        wants_origin = scope["type"] == "websocket" or scope["method"] not in SAFE
        if not same_origin(headers, self._hosts) or (wants_origin and "origin" not in headers):
            await self._refuse(scope, receive, send)
            return
        host = headers["host"]

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._harden(message, host, scope["path"])
            await send(message)

        await self._app(scope, receive, told)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 4403})
            return
        answer = JSONResponse(
            {
                "reason": "FOREIGN_ORIGIN",
                "message": "the request comes from another page, or by another name than the "
                "console knows: a proxy has to pass the Host on, and --name to say what it is",
            },
            403,
        )
        await answer(scope, receive, send)

    def _harden(self, message: MutableMapping[str, Any], host: str, path: str) -> None:
        headers = MutableHeaders(scope=message)
        sockets = f"{'wss' if self._tls else 'ws'}://{host}"
        headers["Content-Security-Policy"] = _CSP.format(sockets=sockets)
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "no-referrer"
        headers["Cross-Origin-Opener-Policy"] = "same-origin"
        headers["Cross-Origin-Resource-Policy"] = "same-origin"
        headers["Permissions-Policy"] = "camera=(self), microphone=(), geolocation=()"
        if self._tls:
            headers["Strict-Transport-Security"] = "max-age=31536000"
        # Names of the built files change with what is in them; all else is never kept, nor that a
        # file is not there: it may be with the next version.
        kept = path.startswith("/assets/") and message["status"] in (200, 304)
        headers["Cache-Control"] = "public, max-age=31536000, immutable" if kept else "no-store"
