"""The console's own server: log-in, an API of JSON for the page, and sockets for what is live.

The facelane key stays here. What is shown to a browser is what that key may see; what changes
something carries the session's token, and comes from the console's own page (``guard``).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

import facelane
from facelane_console import copying, shown
from facelane_console.decoding import CannotDecodeError
from facelane_console.guard import Guard
from facelane_console.looking import messages
from facelane_console.sessions import Session, Sessions

STATIC: Final = Path(__file__).with_name("static")
_NOTHING: Final = facelane.Picture(facelane.Encoding.JPEG, b"\xff\xd8\xff")
MAX_PICTURE: Final = 16 << 20
MAX_SAID: Final = 64 << 10
"""A body of JSON."""
MAX_KEY: Final = 4 << 10
"""The body of a log-in, which anybody sends."""
LOG_IN_S: Final = 10.0
UPLOAD_S: Final = 60.0
"""In which a body must have come."""
FAILED: Final = 1011
"""How a socket closes when the console has failed (RFC 6455, 7.4.1)."""
_DIGITS: Final = 19
MAX_PEOPLE: Final = 2000
"""Who are told of at once; whoever wants others searches."""
MAX_KNOWN: Final = 10_000
"""Acknowledged events that are remembered, until the console ends."""

log = logging.getLogger(__name__)

Client = facelane.aio.Client
Handler = Callable[[Request, Session[Client]], Awaitable[Any]]

_STATUS: Final = (
    (facelane.AuthenticationError, 401),
    (facelane.PermissionDeniedError, 403),
    (facelane.NotFoundError, 404),
    (facelane.AlreadyExistsError, 409),
    (facelane.ConflictError, 409),
    (facelane.ArgumentError, 400),
    (facelane.PictureError, 400),
    (facelane.EnrollmentRefusedError, 422),
    (facelane.RefusedError, 422),
    (facelane.OverloadedError, 429),
    (facelane.UnavailableError, 503),
    (facelane.DeadlineExceededError, 504),
)


def refusal(error: facelane.FacelaneError) -> JSONResponse:
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 502)
    told = {"reason": error.reason, "message": error.message, "metadata": dict(error.metadata)}
    return JSONResponse(told, status)


class TooLargeError(ValueError):
    """A body is larger than it may be."""


class Site:
    """The console. ``connect``: a client for a key."""

    def __init__(
        self, connect: Callable[[str], Client], *, hosts: frozenset[str], tls: bool
    ) -> None:
        self._connect = connect
        self._tls = tls
        self._cookie = "__Host-facelane" if tls else "facelane"
        self.sessions: Sessions[Client] = Sessions()
        self._known: OrderedDict[int, None] = OrderedDict()
        api = [
            ("/session", "GET", self._session),
            ("/streams", "GET", self._streams),
            ("/events", "GET", self._events),
            ("/events/{sequence}/picture", "GET", self._picture),
            ("/events/{sequence}/correct", "POST", self._correct),
            ("/events/{sequence}/acknowledge", "POST", self._acknowledge),
            ("/corrections/{correction}", "DELETE", self._undo),
            ("/people", "GET", self._people),
            ("/people/{subject}", "GET", self._person),
            ("/people/{subject}", "DELETE", self._erase),
            ("/people/{subject}/faces", "POST", self._enroll),
            ("/people/{subject}/copy", "GET", self._copy),
            ("/templates/{template}", "DELETE", self._forget),
            ("/system", "GET", self._system),
        ]
        routes = [
            Route("/api/login", self._login, methods=["POST"]),
            Route("/api/logout", self._logout, methods=["POST"]),
            *(Route(f"/api{path}", self._api(do), methods=[how]) for path, how, do in api),
            WebSocketRoute("/api/live", self._live),
            WebSocketRoute("/api/events/live", self._news),
            Route("/api/{path:path}", _no_such_thing),
            Mount("/assets", StaticFiles(directory=STATIC / "assets", check_dir=False)),
            Route("/{path:path}", self._page),
        ]
        self.app = Starlette(
            routes=routes,
            middleware=[Middleware(Guard, hosts=hosts, tls=tls)],
            lifespan=self._life,
        )

    @contextlib.asynccontextmanager
    async def _life(self, _app: Starlette) -> AsyncIterator[None]:
        async def sweep() -> None:
            while True:
                await asyncio.sleep(30.0)
                for session in self.sessions.over():
                    await session.client.close()

        sweeper = asyncio.create_task(sweep(), name="sessions")
        try:
            yield
        finally:
            sweeper.cancel()
            for session in self.sessions.all():
                await session.client.close()

    # -- log-in --------------------------------------------------------------------------------

    async def _login(self, request: Request) -> Response:
        address = request.client.host if request.client else ""
        try:
            key = str((await _body(request, MAX_KEY, LOG_IN_S))["key"])
        except (KeyError, ValueError):
            return JSONResponse({"reason": "ARGUMENT_INVALID", "message": "key is missing"}, 400)
        if not self.sessions.may_try(address):
            told = {"reason": "TOO_MANY_TRIES", "message": "wait a minute, then try again"}
            return JSONResponse(told, 429)
        try:
            client = self._connect(key)
        except facelane.FacelaneError as error:  # such a key cannot be
            return refusal(error)
        try:
            may = await _may(client)
        except facelane.FacelaneError as error:
            await client.close()
            if not isinstance(error, facelane.AuthenticationError):
                self.sessions.succeeded(address)
            return refusal(error)
        self.sessions.succeeded(address)
        owner = hashlib.sha256(key.encode(errors="replace")).hexdigest()
        for old in self.sessions.crowded(owner):
            await old.client.close()
        begun = self.sessions.begin(client, may, owner)
        if begun is None:
            await client.close()
            return JSONResponse({"reason": "FULL", "message": "too many are logged in"}, 503)
        word, session = begun
        response = JSONResponse({"csrf": session.csrf, "may": may})
        response.set_cookie(
            self._cookie, word, httponly=True, samesite="strict", secure=self._tls, path="/"
        )
        return response

    async def _logout(self, request: Request) -> Response:
        word = request.cookies.get(self._cookie, "")
        session = self.sessions.find(word)
        if session is None or not session.accepts(request.headers.get("x-csrf-token", "")):
            return JSONResponse({"reason": "NO_SESSION", "message": "log in first"}, 401)
        self.sessions.end(word)
        await session.client.close()
        response = JSONResponse({})
        response.delete_cookie(self._cookie, path="/")
        return response

    def _who(self, connection: HTTPConnection) -> Session[Client] | None:
        return self.sessions.find(connection.cookies.get(self._cookie, ""))

    def _api(self, do: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            session = self._who(request)
            if session is None:
                return JSONResponse({"reason": "NO_SESSION", "message": "log in first"}, 401)
            changes = request.method not in ("GET", "HEAD")
            if changes and not session.accepts(request.headers.get("x-csrf-token", "")):
                told = {"reason": "CSRF", "message": "the page is of another session: reload it"}
                return JSONResponse(told, 403)
            try:
                answer = await do(request, session)
            except facelane.FacelaneError as error:
                if isinstance(error, facelane.AuthenticationError):
                    await self._forgotten(request)
                return refusal(error)
            except TooLargeError:
                told = {"reason": "PICTURE_TOO_LARGE", "message": f"at most {MAX_PICTURE} bytes"}
                return JSONResponse(told, 413)
            except (KeyError, ValueError):
                told = {"reason": "ARGUMENT_INVALID", "message": "the request says too little"}
                return JSONResponse(told, 400)
            return answer if isinstance(answer, Response) else JSONResponse(answer)

        return handle

    async def _page(self, _request: Request) -> Response:
        page = STATIC / "index.html"
        if not page.is_file():
            return Response("the page is not built: run `make console`", 503)
        return FileResponse(page)

    # -- the API -------------------------------------------------------------------------------

    async def _session(self, _request: Request, session: Session[Client]) -> Any:
        return {"csrf": session.csrf, "may": session.may}

    async def _streams(self, _request: Request, session: Session[Client]) -> Any:
        return [shown.stream(one) for one in await session.client.list_streams()]

    async def _events(self, request: Request, session: Session[Client]) -> Any:
        asked = request.query_params
        page, older = await session.client.list_events(
            before=int(asked.get("before", 0)),
            kinds=asked.getlist("kind"),
            source_ids=asked.getlist("source"),
            page_size=50,
        )
        found = [{**shown.event(one), "known": one.sequence in self._known} for one in page]
        return {"events": found, "before": older}

    async def _picture(self, request: Request, session: Session[Client]) -> Response:
        kept = await session.client.event_picture(_sequence(request))
        chip = request.query_params.get("chip") == "1"
        return Response(kept.chip if chip else kept.picture, media_type="image/jpeg")

    async def _correct(self, request: Request, session: Session[Client]) -> Any:
        said = await _body(request)
        subject_id = str(said.get("subject", ""))
        done = await session.client.correct_identity(
            _sequence(request),
            is_not=not subject_id,
            subject_id=subject_id,
            create_subject=bool(said.get("create", False)),
            timeout=20.0,
        )
        return shown.correction(done)

    async def _undo(self, request: Request, session: Session[Client]) -> Any:
        gallery = request.query_params.get("gallery", "")
        await session.client.undo_correction(request.path_params["correction"], gallery=gallery)
        return {}

    async def _acknowledge(self, request: Request, session: Session[Client]) -> Any:
        if not session.may["events"]:  # it is the same for all who see it
            told = {"reason": "PERMISSION_DENIED", "message": "the key may not watch events"}
            return JSONResponse(told, 403)
        self._known[_sequence(request)] = None
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return {}

    async def _people(self, request: Request, session: Session[Client]) -> Any:
        """``most`` of those whose id or name has ``q`` in it, and whether there are ``more``."""
        asked = request.query_params
        wanted = asked.get("q", "").lower()
        most = min(MAX_PEOPLE, max(1, int(asked.get("most", 100))))
        found: list[dict[str, Any]] = []
        # Whoever searches looks through all of them.
        looking = session.client.list_subjects(
            gallery=asked.get("gallery", ""), page_size=1000 if wanted else min(1000, most + 1)
        )
        async with contextlib.aclosing(looking) as people:  # type: ignore[type-var]
            async for one in people:
                if wanted not in f"{one.subject_id} {one.display_name}".lower():
                    continue
                if len(found) == most:
                    return {"people": found, "more": True}
                found.append(shown.subject(one))
        return {"people": found, "more": False}

    async def _person(self, request: Request, session: Session[Client]) -> Any:
        subject, gallery = request.path_params["subject"], request.query_params.get("gallery", "")
        kept = await session.client.get_subject(subject, gallery=gallery)
        faces = await session.client.list_templates(subject, gallery=gallery)
        said: list[facelane.Correction] = []
        if session.may["correct"]:
            said = await session.client.list_corrections(subject, gallery=gallery)
        return {
            **shown.subject(kept),
            "faces": [shown.template(one) for one in faces],
            "corrections": [shown.correction(one) for one in said],
        }

    async def _copy(self, request: Request, session: Session[Client]) -> Response:
        subject, gallery = request.path_params["subject"], request.query_params.get("gallery", "")
        made = await copying.copy_of(session.client, subject, gallery)
        name = {"Content-Disposition": 'attachment; filename="subject.zip"'}
        return Response(made, media_type="application/zip", headers=name)

    async def _erase(self, request: Request, session: Session[Client]) -> Any:
        subject, gallery = request.path_params["subject"], request.query_params.get("gallery", "")
        gone = await session.client.erase_subject(subject, gallery=gallery, timeout=20.0)
        return {"templates": gone.templates, "receipt": gone.receipt}

    async def _enroll(self, request: Request, session: Session[Client]) -> Any:
        data = await _bytes(request)
        asked = request.query_params
        done = await session.client.enroll(
            request.path_params["subject"],
            facelane.Picture.encoded(data),
            gallery=asked.get("gallery", ""),
            display_name=asked.get("name", ""),
            require_live=asked.get("live") == "1",
            timeout=20.0,
        )
        return {
            **shown.subject(done.subject),
            "face": shown.template(done.template),
            "warnings": [warning.value for warning in done.warnings],
        }

    async def _forget(self, request: Request, session: Session[Client]) -> Any:
        gallery = request.query_params.get("gallery", "")
        await session.client.delete_template(request.path_params["template"], gallery=gallery)
        return {}

    async def _system(self, _request: Request, session: Session[Client]) -> Any:
        client = session.client
        info, pools, health = await asyncio.gather(
            client.server_info(), client.pools(), client.health()
        )
        streams: list[facelane.OpenStream] = []
        if session.may["view"]:
            streams = await client.list_streams()
        told = shown.system(info, pools, health)
        return {**told, "cameras": [shown.stream(one) for one in streams]}

    # -- what is live --------------------------------------------------------------------------

    async def _live(self, socket: WebSocket) -> None:
        """Pictures of one source, as ``looking.messages`` says."""
        session = self._who(socket)
        if session is None:
            await socket.close(4401)
            return
        asked = socket.query_params
        try:
            fps = min(30.0, max(0.5, float(asked.get("fps", "25"))))
        except ValueError:
            await socket.close(4400)
            return
        await socket.accept()
        looking = messages(
            session.client,
            source=asked.get("source", ""),
            stream=asked.get("stream", ""),
            fps=fps,
            as_jpeg=asked.get("as") == "jpeg",
        )

        async def send() -> None:
            async with contextlib.aclosing(looking) as pictures:  # type: ignore[type-var]
                async for picture in pictures:
                    await _sent(socket.send_bytes(picture))

        await self._until_left(socket, send())

    async def _news(self, socket: WebSocket) -> None:
        """Events as they happen, as JSON; first an empty object, from which on none is missed: what
        was before is in the history."""
        session = self._who(socket)
        if session is None:
            await socket.close(4401)
            return
        await socket.accept()

        async def send() -> None:
            async with session.client.watch_events() as events:
                await _sent(socket.send_text("{}"))
                async for event in events:
                    await _sent(socket.send_text(json.dumps(shown.event(event))))

        await self._until_left(socket, send())

    async def _until_left(self, socket: WebSocket, work: Any) -> None:
        """Does the work until the browser leaves, its session ends, or it is done."""
        sender = asyncio.create_task(work)

        async def left() -> None:
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                while True:
                    await socket.receive_text()

        async def ended() -> None:
            while self._who(socket) is not None:
                await asyncio.sleep(1.0)

        others = [asyncio.create_task(left()), asyncio.create_task(ended())]
        code = FAILED  # until it is known how it ended: nothing unforeseen looks like a good end
        try:
            await asyncio.wait([sender, *others], return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
            code = 4401 if others[1].done() else 1000
        except CannotDecodeError:
            code = 4415
        except facelane.AuthenticationError:
            # The key is denied or has expired, and with it what was logged in by it.
            await self._forgotten(socket)
            code = 4401
        except facelane.FacelaneError as error:
            code = 4403 if isinstance(error, facelane.PermissionDeniedError) else 4404
        except WebSocketDisconnect:
            code = 1000
        finally:
            for task in (sender, *others):
                task.cancel()
            await asyncio.gather(sender, *others, return_exceptions=True)
            # It may have left meanwhile.
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await socket.close(code)

    async def _forgotten(self, connection: HTTPConnection) -> None:
        """Ends the session that a request came with."""
        session = self.sessions.end(connection.cookies.get(self._cookie, ""))
        if session is not None:
            await session.client.close()


async def _sent(sending: Awaitable[None]) -> None:
    """Raises ``WebSocketDisconnect`` when nobody is there any more: a connection that was given up
    because its browser was silent calls that a RuntimeError."""
    try:
        await sending
    except RuntimeError:
        raise WebSocketDisconnect(1006) from None


async def _no_such_thing(_request: Request) -> Response:
    return JSONResponse({"reason": "NOT_FOUND", "message": "there is no such address"}, 404)


async def _may(client: Client) -> dict[str, bool]:
    """What the key may, by trying: raises AuthenticationError for one that is not known."""

    async def try_(call: Awaitable[Any]) -> bool:
        try:
            await call
        except facelane.PermissionDeniedError:
            return False
        except facelane.AuthenticationError:
            raise
        except facelane.FacelaneError:
            return True
        return True

    async def first_subject() -> None:
        async with contextlib.aclosing(
            client.list_subjects(gallery="", page_size=1)  # type: ignore[type-var]
        ) as people:
            async for _ in people:
                return

    await client.server_info()
    view, people, events, correct, enroll, delete = await asyncio.gather(
        try_(client.list_streams()),
        try_(first_subject()),
        try_(client.list_events(page_size=1)),
        try_(client.correct_identity(0, is_not=True)),
        # Refused before the picture is looked at: there is no such subject.
        try_(client.enroll(secrets.token_hex(16), _NOTHING, create_subject=False, gallery="")),
        # Nor is there that one.
        try_(client.update_subject(secrets.token_hex(16), display_name="nobody", gallery="")),
    )
    return {
        "view": view, "people": people, "events": events, "correct": correct, "enroll": enroll,
        "delete": delete,
    }  # fmt: skip


def _sequence(request: Request) -> int:
    """An event's number. Raises ``ValueError``."""
    text = request.path_params["sequence"]
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS):
        raise ValueError("no number of an event")
    return int(text)


async def _body(
    request: Request, most: int = MAX_SAID, within_s: float = UPLOAD_S
) -> dict[str, Any]:
    """An object of JSON. Raises ``ValueError``."""
    try:
        data = await _bytes(request, most, within_s)
    except TooLargeError:
        raise ValueError("too much is said") from None
    try:
        found = json.loads(data or b"{}")
    except RecursionError:
        raise ValueError("too deep") from None
    if not isinstance(found, dict):
        raise ValueError("no object")  # noqa: TRY004 - of what was sent
    return found


async def _bytes(request: Request, most: int = MAX_PICTURE, within_s: float = UPLOAD_S) -> bytes:
    """The body, bounded in size and time. Raises ``TooLargeError`` and ``ValueError``."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(within_s):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise TooLargeError("too large")
                parts.append(part)
    except TimeoutError:
        raise ValueError("too slow") from None
    except ClientDisconnect:
        raise ValueError("nobody is there any more") from None
    return b"".join(parts)
