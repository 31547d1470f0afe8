"""How calls end with an error when the peer does not listen."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from facelane_server import config
from facelane_server.domain import FacelaneError, Reason
from facelane_server.edge import errors
from facelane_server.edge.auth import Authenticator
from facelane_server.edge.gate import Gate
from facelane_server.edge.quotas import Quotas

REFUSAL = FacelaneError(Reason.SLOW_READER, "read the outcomes while sending frames")


class Context:
    """Stands for gRPC's context, whose ``abort`` does as told."""

    def __init__(self, what: Exception | None) -> None:
        self.what = what

    async def abort(self, *_status: Any) -> None:
        if self.what is None:
            await asyncio.Event().wait()
        else:
            raise self.what


async def test_a_peer_that_does_not_read_its_status_holds_no_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(errors, "ABORT_S", 0.01)
    with pytest.raises(asyncio.CancelledError):
        await errors.abort(Context(None), REFUSAL)  # type: ignore[arg-type]


async def test_a_peer_that_is_gone_is_no_error_of_ours() -> None:
    with pytest.raises(asyncio.CancelledError):
        await errors.abort(Context(grpc.aio.InternalError()), REFUSAL)  # type: ignore[arg-type]


async def test_the_status_is_grpcs_to_send() -> None:
    with pytest.raises(grpc.aio.AbortError):
        await errors.abort(Context(grpc.aio.AbortError()), REFUSAL)  # type: ignore[arg-type]


async def test_who_counts_errors_hears_of_each_call_once() -> None:
    heard: list[Reason] = []
    for end in (grpc.aio.AbortError(), grpc.aio.InternalError()):
        with (
            errors.observed(heard.append),
            pytest.raises((grpc.aio.AbortError, asyncio.CancelledError)),
        ):
            await errors.abort(Context(end), REFUSAL)  # type: ignore[arg-type]
    assert heard == [Reason.SLOW_READER] * 2
    with pytest.raises(grpc.aio.AbortError):
        await errors.abort(Context(grpc.aio.AbortError()), REFUSAL)  # type: ignore[arg-type]
    assert len(heard) == 2, "nobody listens any more"


def test_a_status_fits_into_what_clients_take() -> None:
    """An error may repeat what was asked for, or what a worker says."""
    told = errors.status(Reason.MODEL_INVALID, "x" * 200_000, {"model": "ü" * 200_000})
    assert len(told.SerializeToString()) < 6_000
    assert len(told.message) < 2_000
    short = errors.status(Reason.NO_FACE, "none", {"a": "b"})
    assert short.message == "none"


class Caller:
    """The context of a call that keeps how it was ended."""

    def __init__(self) -> None:
        self.ended: tuple[Any, ...] = ()

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return []

    async def abort(self, *told: Any) -> None:
        self.ended = told
        raise grpc.aio.AbortError


async def enter(raised: Exception, caller: Caller) -> None:
    """A call whose method raises."""
    settings = config.parse("")
    gate = Gate(
        Authenticator.of(settings), Quotas(settings), first_message_s=60.0, slow_reader_s=60.0
    )

    async def fails(_requests: Any, _context: Any) -> None:
        raise raised

    handler = SimpleNamespace(
        request_streaming=True,
        response_streaming=True,
        stream_stream=fails,
        request_deserializer=bytes,
        response_serializer=bytes,
    )
    await gate._guarded("/facelane.v1.AnalysisService/AnalyzeStream", handler).stream_stream(
        None, caller
    )


async def test_an_error_that_nobody_foresaw_ends_its_call_with_a_reason() -> None:
    caller, heard = Caller(), []
    with errors.observed(heard.append), pytest.raises(grpc.aio.AbortError):
        await enter(OverflowError("something of the caller's"), caller)
    assert heard == [Reason.INTERNAL]
    code, details, _ = caller.ended
    assert code is grpc.StatusCode.INTERNAL
    assert "caller's" not in details


async def test_grpcs_own_errors_are_its_own() -> None:
    caller = Caller()
    with pytest.raises(grpc.aio.AbortError):
        await enter(grpc.aio.AbortError(), caller)
    assert caller.ended == ()
