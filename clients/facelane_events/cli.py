"""``facelane-events``: the command line.

Exit codes: 0 told to stop, or every receiver is gone for good; 1 a fault; 2 wrong usage or
configuration; 4 the server refused.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path

import facelane
from facelane.cli.streams import Unfailing, settle, steady, tell

EXIT_OK, EXIT_FAULT, EXIT_USAGE, EXIT_SERVER = 0, 1, 2, 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit code."""
    steady()
    try:
        return _main(argv)
    finally:
        settle()


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        import msgspec  # noqa: F401
        import structlog
    except ImportError as error:
        tell(
            f"facelane-events: {error.name} is missing; install it with: "
            "pip install 'facelane[events]'",
        )
        return EXIT_USAGE
    level = logging.getLevelNamesMapping()[arguments.log_level.upper()]
    tidy: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer()
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[*tidy, last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(Unfailing(sys.stderr)),
    )
    from facelane_events import config, service

    try:
        settings = config.load(arguments.config)
        if arguments.command == "check":
            return asyncio.run(service.check(settings))
        return asyncio.run(_until_told(service.run(settings, state_folder(settings.state_dir))))
    except config.ConfigError as error:
        tell(f"facelane-events: {error}")
        return EXIT_USAGE
    except facelane.FacelaneError as error:
        tell(f"facelane-events: {error.reason}: {error}")
        return EXIT_SERVER
    except OSError as error:
        tell(f"facelane-events: {error}")
        return EXIT_FAULT


async def _until_told(work: Coroutine[object, object, None]) -> int:
    """Runs until it ends, or SIGTERM or SIGINT."""
    task = asyncio.create_task(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return EXIT_OK


def state_folder(chosen: str) -> Path:
    """Where positions are kept. Raises ``ConfigError``."""
    given = chosen or os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if given:
        return Path(given)
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        return Path(base, "facelane-events").expanduser()
    except RuntimeError:  # as in containers that run as any user
        from facelane_events.config import ConfigError

        raise ConfigError(
            "there is no place for positions, since $HOME is not set and this user has no account: "
            "set state_dir to a path that begins with /"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="facelane-events",
        description="Delivers a facelane server's events to MQTT, webhooks, NATS JetStream, files "
        "and syslog (docs/events.md).",
        epilog="exit codes: 0 told to stop; 2 wrong usage or configuration; 4 the server refused",
    )
    parser.add_argument("--version", action="version", version=facelane.__version__)
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="what is logged at least [info]",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="deliver until SIGTERM")
    check = commands.add_parser("check", help="ask the server, open every sink once, send nothing")
    for command in (run, check):
        command.add_argument("config", type=Path, help="TOML file with the server and the sinks")
    return parser
