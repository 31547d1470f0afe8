"""The gate: every call passes it before anything of it is read.

Whoever has no key that is good for a method is refused by a handler that reads nothing: no
message is received, decompressed or parsed. Whoever has one takes a place of its key's share, and
is given so many seconds for a request, and so many to take each message of the answer. A call whose
key goes away, or may less than before, ends.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Final

import grpc
import structlog
from google.protobuf.message import DecodeError

from facelane_server import limits, sampling
from facelane_server.domain import FacelaneError, Reason
from facelane_server.edge import errors, sizes, wire
from facelane_server.edge.auth import NO_PEER, Authenticator, Peer
from facelane_server.edge.awake import Awake
from facelane_server.edge.errors import Context
from facelane_server.edge.quotas import Kind, Quotas
from facelane_server.edge.receiving import Receiving
from facelane_server.edge.roles import METHODS, Caller
from facelane_server.edge.tls import peer_of
from facelane_server.gallery.trail import Trail
from facelane_server.lanes import Allowance
from facelane_server.store import audit
from facelane_server.store.audit import Action, Actor

log = structlog.get_logger(__name__)

EXPIRY_S: Final = 0.5
"""Keys that expire or are denied end their calls within this time."""

_caller: ContextVar[Caller] = ContextVar("caller")
_allowance: ContextVar[Allowance | None] = ContextVar("allowance")
_called: ContextVar[tuple[str, str]] = ContextVar("called")


def caller() -> Caller:
    """Who makes the call that this code answers; ``LookupError`` outside of one."""
    return _caller.get()


def allowance() -> Allowance | None:
    """The bytes that the caller's pictures may hold together; None = no bound of its own."""
    return _allowance.get()


def called() -> tuple[str, str]:
    """The method's name, and the ``traceparent`` that came with the call; empty = with none."""
    return _called.get()


HEALTH_WATCH: Final = "/grpc.health.v1.Health/Watch"
_WITHOUT_HEALTH: Final = (Reason.UNAUTHENTICATED, Reason.QUOTA_EXCEEDED, Reason.STREAM_LIMIT)
"""Why a client goes without watching health. gRPC's clients, which watch it by themselves where
they have several servers to choose from, take UNIMPLEMENTED for "not offered" and go on; with any
other status they would use the server no more."""
_STRANGERS: Final = (Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED)


class _Call:
    """A call that was let in; ``ended``: why it may not go on."""

    __slots__ = ("caller", "ended", "method", "peer", "task")

    def __init__(self, method: str, caller: Caller, peer: Peer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.method = method
        self.caller = caller
        self.peer = peer
        self.ended: FacelaneError | None = None


def unread(patience_s: float) -> FacelaneError:
    """What a peer is told that took nothing for so long."""
    return FacelaneError(
        Reason.SLOW_READER,
        f"nothing could be written for {patience_s:g} s; read the answers as they come",
    )


async def write(context: Context, message: object, patience_s: float) -> None:
    """Raises ``FacelaneError(SLOW_READER)`` when the peer does not take the message in time."""
    try:
        async with Awake(patience_s):
            await context.write(message)
    except TimeoutError:
        raise unread(patience_s) from None


class _Heard:
    """The context of a call whose peer must take what is written: a place is not held for ever by
    whoever reads nothing."""

    def __init__(self, context: Context, patience_s: float) -> None:
        self._context = context
        self._patience_s = patience_s

    async def write(self, message: object) -> None:
        await write(self._context, message, self._patience_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Lets calls in, and ends those that may not go on."""

    def __init__(
        self,
        authenticator: Authenticator,
        quotas: Quotas,
        *,
        first_message_s: float,
        slow_reader_s: float,
    ) -> None:
        self._authenticator = authenticator
        self._quotas = quotas
        self._first_message_s = first_message_s
        self._slow_reader_s = slow_reader_s
        self._receiving = Receiving()
        self._calls: set[_Call] = set()
        self._handlers: dict[str, Any] = {}
        self.trail: Trail | None = None
        """The audit log, once there is one: before a call is served."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method
        guarded = self._handlers.get(method)
        if guarded is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None  # no such method: gRPC says so, and reads nothing either
            guarded = self._handlers[method] = self._guarded(method, handler)
        return guarded

    async def _written_down(self, method: str, by: Caller, peer: Peer) -> None:
        """Who administers stands in the audit log before anything is done, or it is not. Raises
        ``FacelaneError`` too where the key went away meanwhile."""
        trail, rule = self.trail, METHODS.get(method)
        if trail is None or rule is None:
            return
        if rule.verb == "admin":
            await trail.written(Action.ADMINISTERED)
            self._authenticator.recheck(method, by, peer)
        elif rule.verb == "events":
            trail.note(Action.WATCHED)

    def recheck(self) -> None:
        """Ends the calls whose keys are gone, have expired or may less than before."""
        for call in list(self._calls):
            try:
                self._authenticator.recheck(call.method, call.caller, call.peer)
            except FacelaneError as error:
                call.ended = error
                call.task.cancel()

    def denied(self) -> None:
        """The list of those who are denied says something else now."""
        log.warning("others are denied than before")
        if self.trail is not None:
            self.trail.note(Action.KEYS_CHANGED, denied="changed")
        self.recheck()

    async def watch_expiry(self) -> None:
        """Ends calls as their keys expire or are denied, until it is cancelled; and looks at
        all of them every so often, whatever it was told."""
        due = time.monotonic() + limits.RECHECK_S
        while True:
            await asyncio.sleep(EXPIRY_S)
            denied = self._authenticator.reload_denied()
            if denied:
                self.denied()
            expired = any(call.caller.expired for call in self._calls)
            if expired or time.monotonic() >= due:
                due = time.monotonic() + limits.RECHECK_S
                self.recheck()

    def _guarded(self, method: str, handler: Any) -> Any:
        """A handler of streams, whatever the method's own kind: on the wire a single message is
        a stream of one, and only so can it be left unread."""
        if handler.request_streaming:
            serve, kind = _streamed(handler.stream_stream), Kind.STREAMS
        elif handler.response_streaming:
            serve, kind = self._single(_answered(handler.unary_stream)), Kind.WATCHERS
        else:
            serve, kind = self._single(_returned(handler.unary_unary)), Kind.CALLS
        if method.startswith("/grpc.reflection."):
            kind = Kind.WATCHERS
        elif method == "/facelane.v1.ViewService/WatchStream":
            kind = Kind.VIEWERS
        elif method == HEALTH_WATCH:
            kind = Kind.HEALTH
        name = method.rpartition("/")[2]
        # Streams have a patience of their own, which costs less an outcome.
        own_patience = kind is Kind.STREAMS

        async def enter(requests: AsyncIterator[Any], context: Context) -> None:
            try:
                metadata = {
                    key: value
                    for key, value in context.invocation_metadata() or ()
                    if isinstance(value, str)
                }
                peer = peer_of(context) if self._authenticator.wants_peers else NO_PEER
                let_in = self._authenticator.check(method, metadata, peer)
                audit.acting(Actor(let_in.name, method))
                await self._written_down(method, let_in, peer)
                with self._quotas.place(kind, let_in) as allowed:
                    _caller.set(let_in)
                    _allowance.set(allowed)
                    _called.set((name, metadata.get(sampling.HEADER, "")))
                    heard: Any = context if own_patience else _Heard(context, self._slow_reader_s)
                    await self._serve(_Call(method, let_in, peer), serve(requests, heard))
            except FacelaneError as error:
                if kind is Kind.HEALTH and error.reason in _WITHOUT_HEALTH:
                    log.debug("health is not watched", reason=error.reason.value)
                    await errors.not_offered(context, error)
                told = log.warning if error.reason in _STRANGERS else log.info
                if error.reason in _STRANGERS and self.trail is not None:
                    audit.acting(Actor(error.metadata.get("key", ""), method))
                    self.trail.note_repeated(Action.REFUSED, reason=error.reason.value)
                told("call refused or ended", method=method, reason=error.reason.value)
                await errors.abort(context, error)
            except grpc.aio.BaseError:
                raise  # gRPC's own: the call was aborted, or nobody is there
            except Exception:
                log.exception("call failed", method=method)
                await errors.abort(
                    context,
                    FacelaneError(Reason.INTERNAL, "the server failed on this call; see its log"),
                )

        return grpc.stream_stream_rpc_method_handler(
            enter,
            request_deserializer=_parser(
                wire.parse if method == sizes.STREAM else handler.request_deserializer,
                sizes.checked(method),
            ),
            response_serializer=handler.response_serializer,
        )

    async def _serve(self, call: _Call, served: Awaitable[None]) -> None:
        self._calls.add(call)
        try:
            await served
        except asyncio.CancelledError:
            if call.ended is None:
                raise
            call.task.uncancel()
            raise call.ended from None
        finally:
            self._calls.discard(call)

    def _single(
        self, serve: Callable[[Any, Context], Awaitable[None]]
    ) -> Callable[[Any, Context], Awaitable[None]]:
        """Reads the one request of a call, and no more of them at a time than memory is for."""

        async def single(_requests: Any, context: Context) -> None:
            try:
                async with Awake(self._first_message_s), self._receiving.turn(caller()):
                    request = await context.read()
            except TimeoutError:
                request = grpc.aio.EOF
            if request is grpc.aio.EOF:
                raise FacelaneError(
                    Reason.DEADLINE_EXCEEDED,
                    f"no request came within {self._first_message_s:g} s",
                    retryable=True,
                )
            await serve(request, context)

        return single


def _returned(behaviour: Any) -> Callable[[Any, Context], Awaitable[None]]:
    async def serve(request: Any, context: Context) -> None:
        await context.write(await behaviour(request, context))

    return serve


def _answered(behaviour: Any) -> Callable[[Any, Context], Awaitable[None]]:
    async def serve(request: Any, context: Context) -> None:
        await behaviour(request, context)

    return serve


def _streamed(behaviour: Any) -> Callable[[Any, Context], Awaitable[None]]:
    if not inspect.isasyncgenfunction(behaviour):
        return behaviour  # type: ignore[no-any-return]

    async def serve(requests: Any, context: Context) -> None:
        async for response in behaviour(requests, context):
            await context.write(response)

    return serve


def _parser(parse: Any, check: Callable[[bytes], None]) -> Callable[[bytes], Any]:
    """Protobuf's own error is a kilobyte of traceback in the log, for any stranger's bytes."""

    def parsed(data: bytes) -> Any:
        check(data)
        try:
            return parse(data)
        except DecodeError:
            raise FacelaneError(
                Reason.ARGUMENT_INVALID,
                "the message is not one of this method; is the client made from the same protocol?",
            ) from None

    return parsed
