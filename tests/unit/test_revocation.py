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
from facelane_server.store.audit import Action

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


async def test_a_key_that_goes_away_while_its_call_is_written_down_has_nothing_done(
    tmp_path: Path,
) -> None:
    """Of calls that wait for the audit log none is among those that are ended."""
    file = tmp_path / "keys.toml"
    secret, key = new_key("leaver", ("admin",))
    file.write_text(key.entry())
    settings = config.parse(f'[auth]\nmode = "keys"\nkeys_file = "{file}"\n')
    authenticator = Authenticator.of(settings)
    gate = Gate(authenticator, Quotas(settings), first_message_s=60.0, slow_reader_s=60.0)
    writing, kept, done = asyncio.Event(), asyncio.Event(), []

    class Trail:
        async def written(self, _action: Action) -> None:
            writing.set()
            await kept.wait()

        def note_repeated(self, *_action: Action, **_told: str) -> None:
            """Not looked at."""

    async def serves(_requests: Any, _context: Context) -> None:
        done.append("what it asked for")

    handler = SimpleNamespace(
        request_streaming=True,
        response_streaming=True,
        stream_stream=serves,
        request_deserializer=bytes,
        response_serializer=bytes,
    )
    gate.trail = Trail()  # type: ignore[assignment]
    enter = gate._guarded("/facelane.v1.AdminService/ReloadModel", handler).stream_stream
    for goes in (False, True):
        writing.clear()
        kept.clear()
        context = Context(secret)
        call = asyncio.create_task(enter(None, context))
        await writing.wait()
        if goes:
            file.write_text(new_key("other", ("admin",))[1].entry())
            authenticator.reload(settings)
            gate.recheck()
        kept.set()
        await asyncio.wait([call])
        assert context.code is (grpc.StatusCode.UNAUTHENTICATED if goes else None)
    assert done == ["what it asked for"], "of the first call alone"
