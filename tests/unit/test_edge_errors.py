"""How calls end with an error when the peer does not listen."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from facelane_server.domain import FacelaneError, Reason
from facelane_server.edge import errors

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
