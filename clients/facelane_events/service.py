"""All sinks of a configuration, side by side."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import structlog

import facelane
import facelane.aio
from facelane_events import config, sinks
from facelane_events.delivery import Delivery, GoneError, RefusedError, UnavailableError
from facelane_events.position import DeadLetters, Position

log = structlog.get_logger(__name__)

TALLY_S: Final = 60.0
THREADS: Final = 32
"""A sink, at most: a try that is given up leaves its own behind until the broker's side ends."""


def client_for(server: config.Server) -> facelane.aio.Client:
    """Raises ``ConfigError``."""
    tls = None
    if server.tls_ca or server.tls_cert or server.tls_key or server.tls_server_name:
        tls = facelane.Tls(
            ca_file=server.tls_ca or None,
            cert_file=server.tls_cert or None,
            key_file=server.tls_key or None,
            server_name=server.tls_server_name or None,
        )
    path = server.token_file
    # Read again when the server no longer takes it.
    token = (lambda: config.secret(path)) if path else None
    config.secret(path)
    try:
        return facelane.aio.Client(server.target, token=token, tls=tls, proxy=server.proxy)
    except facelane.ArgumentError as error:
        raise config.ConfigError(f"in [server]: {error.message}") from None
    except OSError as error:
        raise config.ConfigError(f"{error.filename} cannot be read: {error.strerror}") from None


async def run(settings: config.Config, folder: Path) -> None:
    """Delivers until it is cancelled, or every sink has ended.

    Raises ``ConfigError``, FacelaneError where the server refuses for good, OSError where the
    state folder takes nothing.
    """
    deliveries: list[Delivery] = []
    # For names that are looked up and brokers that are connected to; sinks that write or post have
    # threads of their own. A few hang for a minute each: there are more than that.
    threads = ThreadPoolExecutor(THREADS * len(settings.sink), "sink")
    asyncio.get_running_loop().set_default_executor(threads)
    with ExitStack() as stack:
        for sink in settings.sink:
            position = Position(folder / f"{sink.name}.position")
            stack.callback(position.close)
            dead = DeadLetters(folder / f"{sink.name}.dead.jsonl", sink.dead_letter_max_mib << 20)
            deliveries.append(Delivery(sink, sinks.make(sink), position, dead))
        async with client_for(settings.server) as client:
            telling = asyncio.create_task(_tell(deliveries))
            try:
                async with asyncio.TaskGroup() as group:
                    for delivery in deliveries:
                        group.create_task(delivery.run(client), name=delivery.name)
            except* facelane.FacelaneError as errors:
                raise errors.exceptions[0] from None
            except* OSError as errors:
                raise errors.exceptions[0] from None
            finally:
                telling.cancel()


async def _tell(deliveries: list[Delivery]) -> None:
    while True:
        await asyncio.sleep(TALLY_S)
        for delivery in deliveries:
            tally = delivery.tally
            log.info(
                "deliveries",
                sink=delivery.name,
                delivered=tally.delivered,
                held_back=tally.held_back,
                dead_letters=tally.dead_letters,
                attempts_failed=tally.attempts_failed,
                waiting=tally.waiting,
                ended=tally.ended,
            )


async def check(settings: config.Config) -> int:
    """Says of the server and of every sink whether it is there; 0 if all are."""
    worst = 0
    async with client_for(settings.server) as client:
        try:
            async with client.watch_events():
                _say("server", "ok")
        except facelane.FacelaneError as error:
            _say("server", f"{error.reason}: {error}")
            worst = 4
    for sink in settings.sink:
        made = sinks.make(sink)
        try:
            async with asyncio.timeout(sink.attempt_timeout):
                await made.open()
            _say(sink.name, "ok")
        except (UnavailableError, RefusedError, GoneError, TimeoutError, OSError) as error:
            _say(sink.name, str(error) or "no answer in time")
            worst = worst or 1
        finally:
            await made.close()
    return worst


def _say(name: str, what: str) -> None:
    print(f"{name:20} {what}", file=sys.stdout)
