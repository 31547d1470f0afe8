"""What a frame costs at least: gRPC's asyncio server and a worker's socket there and back, with
nothing of the service between them. ``python -m bench.bare ADDRESS`` serves until it is killed."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import grpc
import uvloop

from facelane.v1 import analysis_service_pb2 as pb
from facelane_server.edge.server import OPTIONS
from facelane_server.running import GRPC_SWITCHES

_NAME: Final = "bare"
_WINDOW: Final = 8
_PACKET: Final = 100
"""Bytes of a message between the front and its workers, about."""


@asynccontextmanager
async def bare() -> AsyncIterator[tuple[str, int]]:
    """The address of such a server in a process of its own, and that process's id."""
    with tempfile.TemporaryDirectory(prefix="facelane-bench-") as folder:
        target = f"unix:{folder}/grpc.sock"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.bare", target),
            env={**os.environ, "GRPC_EXPERIMENTS": GRPC_SWITCHES},
            stdout=subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n", "the bare server does not start"
            yield target, process.pid
        finally:
            process.kill()
            await process.wait()


class _Worker:
    """Gives back what it is given, by way of another process."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if not os.fork():
            self._sock.close()
            while packet := theirs.recv(_PACKET):
                theirs.send(packet)
            os._exit(0)
        theirs.close()
        self._asked: deque[tuple[asyncio.Queue[Any], object]] = deque()

    def begin(self) -> None:
        self._sock.setblocking(False)
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._answered)

    def ask(self, who: asyncio.Queue[Any], what: object) -> None:
        self._asked.append((who, what))
        self._sock.send(bytes(_PACKET))

    def _answered(self) -> None:
        self._sock.recv(_PACKET)
        who, what = self._asked.popleft()
        who.put_nowait(what)


async def _stream(worker: _Worker, _requests: Any, context: Any) -> None:
    await context.read()
    limits = pb.StreamLimits(window=_WINDOW, max_frame_bytes=2**24, max_pixels=2**26, max_faces=16)
    opened = pb.StreamOpened(stream_id=_NAME, limits=limits)
    await context.write(pb.AnalyzeStreamResponse(opened=opened))
    answers: asyncio.Queue[pb.Frame | None] = asyncio.Queue()
    reader = asyncio.create_task(_read(worker, context, answers))
    written = 0
    while (frame := await answers.get()) is not None:
        response = pb.AnalyzeStreamResponse()
        outcome = response.outcome
        outcome.frame_id, outcome.stream_id = frame.frame_id, _NAME
        outcome.stream_offset.CopyFrom(frame.stream_offset)
        outcome.result.width, outcome.result.height = 640, 480
        await context.write(response)
        written += 1
    await reader
    summary = pb.StreamSummary(received=written, results=written)
    await context.write(pb.AnalyzeStreamResponse(summary=summary))


async def _read(worker: _Worker, context: Any, answers: asyncio.Queue[pb.Frame | None]) -> None:
    while (request := await context.read()) is not grpc.aio.EOF:
        worker.ask(answers, request.frame)
    worker.ask(answers, None)


async def _serve(target: str, worker: _Worker) -> None:
    worker.begin()
    server = grpc.aio.server(options=OPTIONS)
    method = grpc.stream_stream_rpc_method_handler(
        partial(_stream, worker),
        request_deserializer=pb.AnalyzeStreamRequest.FromString,
        response_serializer=pb.AnalyzeStreamResponse.SerializeToString,
    )
    service = pb.DESCRIPTOR.services_by_name["AnalysisService"].full_name
    handler = grpc.method_handlers_generic_handler(service, {"AnalyzeStream": method})
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(target)
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    forked = _Worker()  # before gRPC has threads
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(sys.argv[1], forked))
