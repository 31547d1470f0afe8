"""``facelane-bridge``: the command line.

Exit codes: 0 all cameras came to their end or were told to stop; 1 a fault of the bridge;
2 wrong usage or configuration; 3 a camera failed for good; 4 the server could not be
reached or refused; 5 whoever read standard output has gone, or read no further at the end;
130 interrupted before cameras ran, or while they were checked.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import facelane
from facelane.cli.streams import Unfailing, steady

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_CAMERA_FAILED = 3
EXIT_SERVER = 4
EXIT_OUTPUT_CLOSED = 5
EXIT_INTERRUPTED = 130

DESCRIPTION = """\
Streams cameras into a facelane server and writes what it sees to standard output, one
JSON object a line (docs/bridge.md describes them). Logs go to standard error."""

EPILOG = """\
exit codes:
  0  all cameras came to their end, or SIGTERM / SIGINT
  2  wrong usage or configuration
  3  a camera failed for good (wrong credentials, no such file)
  4  the server could not be reached or refused
  5  whoever read standard output has gone, or read no further at the end
  130  interrupted before cameras ran, or while they were checked
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit code."""
    steady()
    arguments = _parser().parse_args(argv)
    try:
        import av  # noqa: F401
        import msgspec  # noqa: F401
        import prometheus_client  # noqa: F401
        import structlog
    except ImportError as error:
        print(
            f"facelane-bridge: {error.name} is missing; install it with: "
            "pip install 'facelane[bridge]'",
            file=sys.stderr,
        )
        return EXIT_USAGE
    _configure_logging(arguments.log_format, arguments.log_level)
    from facelane_bridge.config import ConfigError

    if arguments.command == "host":
        return _host(arguments.lease)
    try:
        settings = _settings(arguments)
        for path in settings.exposed_files:
            structlog.get_logger("facelane_bridge").warning(
                "a secret can be read by every user of this machine", path=path, do="chmod 600"
            )
        if arguments.command == "run":
            return _run(arguments, settings)
        return _check(arguments, settings)
    except ConfigError as error:
        print(f"facelane-bridge: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="facelane-bridge",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=facelane.__version__)
    parser.add_argument(
        "--log-format",
        choices=("auto", "text", "json"),
        default="auto",
        help="auto: text on a terminal, JSON elsewhere",
    )
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="what is logged at least [info]",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="stream cameras until they end or SIGTERM",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("config", nargs="?", type=Path, help="TOML file with the cameras")
    run.add_argument(
        "--source", metavar="X", help="one source instead of a file: address, file, folder, device"
    )
    run.add_argument(
        "--results",
        choices=("off", "events", "all"),
        help="which lines: all, those in which something changed, or states and the summary; "
        "default: events under a service manager, else all",
    )
    run.add_argument("--table", action="store_true", help="a table for people, no JSON lines")
    _add_server_arguments(run)
    camera = run.add_argument_group("with --source")
    # Defaults are absent, so that only what was given overrides the configuration's own.
    absent: dict[str, Any] = {"default": argparse.SUPPRESS}
    camera.add_argument("--name", help="the camera's name in the results", **absent)
    camera.add_argument("--pace", choices=("realtime", "fast"), help="files and folders", **absent)
    camera.add_argument("--loop", action="store_true", help="files and folders", **absent)
    camera.add_argument("--transport", choices=("tcp", "udp"), help="RTSP", **absent)
    camera.add_argument("--credentials-env", metavar="VARIABLE", help="user:password", **absent)
    camera.add_argument("--credentials-file", metavar="PATH", help="user:password", **absent)
    camera.add_argument(
        "--max-fps",
        type=float,
        metavar="N",
        help="send so many pictures a second at most",
        **absent,
    )
    camera.add_argument(
        "--max-side", type=int, metavar="PIXELS", help="scale larger pictures down", **absent
    )
    camera.add_argument(
        "--video",
        choices=("auto", "pass", "decode"),
        help="H.264 and H.265: auto: as the camera sends them, where the server takes them so",
        **absent,
    )
    camera.add_argument(
        "--analysis-fps", type=float, metavar="N", help="pictures analysed a second", **absent
    )
    camera.add_argument(
        "--overload",
        choices=("latest_wins", "lossless"),
        help="when the server is slow: drop, or wait [cameras drop, files wait]",
        **absent,
    )
    camera.add_argument("--gallery", help="whose subjects are looked for", **absent)

    check = commands.add_parser("check", help="open each camera once and print what was found")
    check.add_argument("config", nargs="?", type=Path, help="TOML file with the cameras")
    check.add_argument("--source", metavar="X", help="one source instead of a file")
    check.add_argument("--cameras-only", action="store_true", help="do not ask the server")
    check.add_argument("--credentials-env", metavar="VARIABLE", help="user:password", **absent)
    check.add_argument("--credentials-file", metavar="PATH", help="user:password", **absent)
    check.add_argument("--transport", choices=("tcp", "udp"), help="RTSP", **absent)
    _add_server_arguments(check)

    host = commands.add_parser(
        "host", help="for facelane-fleet: cameras come and go by lines on standard input"
    )
    host.add_argument(
        "--lease",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="without a word for so long, the cameras are let go [10]",
    )
    return parser


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --source: the server")
    absent: dict[str, Any] = {"default": argparse.SUPPRESS}
    group.add_argument(
        "--target",
        help="host:port or unix:/path [$FACELANE_TARGET, else this machine's server]",
        **absent,
    )
    group.add_argument("--token-file", metavar="PATH", help="holds the key", **absent)
    group.add_argument("--tls-ca", metavar="PATH", help="PEM; turns TLS on", **absent)
    group.add_argument("--client-cert", metavar="PATH", help="PEM, with --client-key", **absent)
    group.add_argument("--client-key", metavar="PATH", help="PEM, of --client-cert", **absent)
    group.add_argument("--server-name", metavar="NAME", help="in its certificate", **absent)
    group.add_argument(
        "--no-proxy", dest="proxy", action="store_false", help="of the environment", **absent
    )
    group.add_argument(
        "--wait", type=float, metavar="SECONDS", help="for an absent server; 0 = for ever", **absent
    )


_SERVER_ARGUMENTS = {
    "target": "target",
    "token_file": "token_file",
    "tls_ca": "tls_ca",
    "client_cert": "tls_cert",
    "client_key": "tls_key",
    "server_name": "tls_server_name",
    "proxy": "proxy",
    "wait": "wait",
}
"""Arguments, and the settings of ``[server]`` that they are."""
_CAMERA_ARGUMENTS = (
    "name",
    "pace",
    "loop",
    "transport",
    "credentials_env",
    "credentials_file",
    "max_fps",
    "max_side",
    "video",
    "analysis_fps",
    "overload",
    "gallery",
)


def _settings(arguments: argparse.Namespace) -> Any:
    from facelane_bridge import config

    given = vars(arguments)
    server = {name: given[key] for key, name in _SERVER_ARGUMENTS.items() if key in given}
    camera = {key: given[key] for key in _CAMERA_ARGUMENTS if key in given}
    if (arguments.config is None) == (arguments.source is None):
        raise config.ConfigError("give either a configuration file or --source")
    if arguments.config is not None:
        if server or camera:
            names = ", ".join("--" + key.replace("_", "-") for key in (*server, *camera))
            raise config.ConfigError(f"{names}: with a configuration file, set this in the file")
        return config.load(arguments.config)
    return config.single(arguments.source, server=server, options=camera)


def _run(arguments: argparse.Namespace, settings: Any) -> int:
    import msgspec

    from facelane_bridge.config import Results
    from facelane_bridge.output import JsonLines, Table

    if arguments.table:
        settings = msgspec.structs.replace(settings, results=Results.ALL)
    elif arguments.results:
        settings = msgspec.structs.replace(settings, results=Results(arguments.results))
    output = Table() if arguments.table else JsonLines()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_run_bridge(settings, output))


def _host(lease: float) -> int:
    from facelane_bridge import hosting

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        loop = runner.get_loop()
        # Whoever started it closes its standard input; the terminal's signals are not meant for it.
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        return runner.run(hosting.run(lease))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """libuv's loop, where there is one: a frame wakes the bridge several times, and each costs
    half as much."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _run_bridge(settings: Any, output: Any) -> int:
    from facelane_bridge.bridge import RESTART_PAUSE, Bridge
    from facelane_bridge.config import is_service

    bridge = Bridge(settings, output, restart_pause=RESTART_PAUSE if is_service() else 0.0)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, bridge.stop)
    report = await bridge.run()
    if report.output_closed:
        return EXIT_OUTPUT_CLOSED
    if report.server_failed:
        return EXIT_SERVER
    if report.failed:
        return EXIT_CAMERA_FAILED
    return EXIT_OK


def _check(arguments: argparse.Namespace, settings: Any) -> int:
    from facelane_bridge.bridge import check_server
    from facelane_bridge.reader import CheckResult, check_camera

    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="check") as pool:
        try:
            results: list[CheckResult] = list(pool.map(check_camera, settings.cameras))
        except KeyboardInterrupt:
            # A driver that waits for a camera cannot be told to stop, and every other way
            # out waits for the pool's threads. They hold sockets, which the kernel closes.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_INTERRUPTED)
    for result in results:
        print(describe_check(result), flush=True)
    code = EXIT_CAMERA_FAILED if any(result.error for result in results) else EXIT_OK
    if not arguments.cameras_only:
        health = asyncio.run(check_server(settings.server))
        print(f"server {settings.server.target}: {health}", flush=True)
        if health != "SERVING":
            code = EXIT_SERVER
    return code


def describe_check(result: Any) -> str:
    """One camera's check in a line."""
    if result.error is not None:
        return f"{result.camera}: FAILED {result.error.reason}: {result.error.message}"
    info = result.info
    parts = [f"{info.kind.value}, {info.codec}"]
    if info.width:
        parts.append(f"{info.width}x{info.height}")
    if info.fps:
        parts.append(f"{info.fps:.4g} fps")
    if info.duration is not None:
        parts.append(f"{info.duration:.1f} s")
    parts.append("encoded as JPEG" if info.reencodes else "passed on as it is")
    parts.append(f"first frame {result.first_frame_bytes} bytes after {result.seconds:.2f} s")
    return f"{result.camera}: ok, " + ", ".join(parts)


def _configure_logging(log_format: str, level: str) -> None:
    import structlog

    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(Unfailing(sys.stderr)),
    )


if __name__ == "__main__":
    sys.exit(main())
