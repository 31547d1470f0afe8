"""A key that goes away ends its calls in the same turn of the loop, whatever they wait for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
from tests.waiting import auntil

from facelane_server import config
from facelane_server.edge.auth import Authenticator, new_key
from facelane_server.edge.gate import Gate
from facelane_server.edge.quotas import Quotas

METHOD = "/facelane.v1.AnalysisService/AnalyzeStream"


class Context:
    """Of a call whose client neither sends nor reads."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self.code: grpc.StatusCode | None = None

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self._secret}")]

    async def abort(self, code: grpc.StatusCode, *_told: Any) -> None:
        self.code = code
        raise asyncio.CancelledError

    async def write(self, _message: Any) -> None:
        await asyncio.Event().wait()


async def test_all_calls_of_a_key_end_at_once_and_those_of_others_go_on(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    secrets, keys = zip(*(new_key(name, ("analyze",)) for name in ("leaver", "other")), strict=True)
    file.write_text("\n".join(key.entry() for key in keys))
    settings = config.parse(f'[auth]\nmode = "keys"\nkeys_file = "{file}"\n')
    authenticator = Authenticator.of(settings)
    gate = Gate(authenticator, Quotas(settings), first_message_s=60.0, slow_reader_s=60.0)
    waiting: list[str] = []

    async def waits(_requests: Any, context: Context) -> None:
        # For a frame, for a pool, for a reader: what does not matter, it comes never.
        waiting.append(context.invocation_metadata()[0][1])
        await asyncio.Event().wait()

    handler = SimpleNamespace(
        request_streaming=True,
        response_streaming=True,
        stream_stream=waits,
        request_deserializer=bytes,
        response_serializer=bytes,
    )
    enter = gate._guarded(METHOD, handler).stream_stream
    contexts = [Context(secrets[k % 2]) for k in range(20)]
    calls = [asyncio.create_task(enter(None, context)) for context in contexts]
    await auntil(lambda: len(waiting) == len(calls))
    file.write_text(keys[1].entry())
    authenticator.reload(settings)
    await asyncio.sleep(0)
    assert not any(call.done() for call in calls), "not before it is said"
    gate.recheck()
    for _ in range(10):
        await asyncio.sleep(0)
    ended = [call.done() for call in calls]
    assert ended == [k % 2 == 0 for k in range(20)], "within a few turns of the loop"
    assert {c.code for c in contexts[::2]} == {grpc.StatusCode.UNAUTHENTICATED}
    assert {c.code for c in contexts[1::2]} == {None}
    for call in calls[1::2]:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
