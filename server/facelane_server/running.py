"""A server as a process: what it begins with, whether it has shards, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import resource
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from facelane_server import config, seclusion
from facelane_server.domain import FacelaneError, Reason
from facelane_server.shards.dealing import cards, count

EX_UNAVAILABLE: Final = 69
EX_CONFIG: Final = 78
GRPC_SWITCHES: Final = "-event_engine_listener"


def prepare() -> None:
    """What every process that serves begins with."""
    # The watchdog ends a hung server with SIGABRT: its stacks belong into the journal.
    faulthandler.enable()
    seclusion.no_cores()
    seclusion.seclude()
    # A connection is a descriptor; what the limit allows is used.
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    # Else gRPC writes lines of its own among ours, for every stranger who knocks at a TLS port.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # The newer engine of its listener hands what comes from thread to thread before it is here: a
    # sixth of a frame's cost to this process. A gRPC that has no other any more says so, in a line.
    os.environ.setdefault("GRPC_EXPERIMENTS", GRPC_SWITCHES)


def shards_of(settings: config.Config) -> int:
    """As many as the server will have on this machine."""
    return count(settings, cores=len(os.sched_getaffinity(0)), cards=cards())


def run_server(settings: config.Config, path: Path | None) -> int:
    """Until it is told to end; the exit code."""
    shards = shards_of(settings)
    if shards > 1:
        # Without the modules of a front: it has its own memory to keep small.
        from facelane_server.keeper.keeper import keep

        return _ended(lambda: asyncio.run(keep(settings, path, shards)))
    from facelane_server.app import serve

    return _ended(lambda: _on_uvloop(serve(settings, path)))


def run_shard(launch: str) -> int:
    """The same for one of several processes; ``launch``: see ``shards.messages.Launch``."""
    from facelane_server.app import serve
    from facelane_server.seat import Seat

    async def take_part() -> int:
        seat = await Seat.take(launch)
        return await serve(seat.settings, seat=seat)

    return _ended(lambda: _on_uvloop(take_part()))


def _on_uvloop(work: Coroutine[Any, Any, int]) -> int:
    import uvloop

    # libuv's loop: a frame wakes the front about four times, and each costs half as much.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def _ended(serve: Callable[[], int]) -> int:
    """The exit code of what was served, or of why it could not be."""
    try:
        return serve()
    except config.AddressError as error:
        sys.stderr.write(f"facelane-server: {error}\n")
        return EX_UNAVAILABLE
    except config.ConfigError as error:
        sys.stderr.write(f"facelane-server: {error}\n")
        return EX_CONFIG
    except FacelaneError as error:
        sys.stderr.write(f"facelane-server: {error.reason.value}: {error.message}\n")
        # Neither a package nor a damaged gallery is mended by another try.
        final = error.reason is Reason.MODEL_INVALID or (
            error.reason is Reason.GALLERY_UNAVAILABLE and not error.retryable
        )
        return EX_CONFIG if final else EX_UNAVAILABLE
