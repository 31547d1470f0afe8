"""``facelane-fleet``: the command line.

Exit codes: 0 done; 1 a fault; 2 wrong usage or configuration; 3 not all cameras are well
(``status --check``); 4 no cluster, or no fleet in it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import facelane
from facelane.cli.streams import settle, steady, tell

EXIT_OK, EXIT_FAULT, EXIT_USAGE, EXIT_NOT_WELL, EXIT_CLUSTER = 0, 1, 2, 3, 4

DESCRIPTION = """\
Runs facelane on the machines of a Ray cluster: one server a card, cameras where
there is room, placed anew when a machine is lost or comes (docs/fleet.md)."""

EPILOG = """\
exit codes:
  0  done
  1  an order that cannot be followed now; it says why
  2  wrong usage or configuration
  3  with status --check: a camera has no place, or gives no results
  4  no cluster answers, or no such fleet runs in it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit code."""
    steady()
    try:
        return _main(argv)
    finally:
        settle()


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    # Asked of nobody here: a cluster's own start decides about statistics.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import msgspec  # noqa: F401
        import ray  # noqa: F401
        import tomli_w  # noqa: F401
    except ImportError as error:
        tell(
            f"facelane-fleet: {error.name} is missing; install it on every node with: "
            "pip install 'facelane[fleet,server]'",
        )
        return EXIT_USAGE
    from facelane_bridge.config import ConfigError
    from facelane_fleet.cluster import FleetError

    try:
        return _run(arguments)
    except ConfigError as error:
        tell(f"facelane-fleet: {error}")
        return EXIT_USAGE
    except FleetError as error:
        tell(f"facelane-fleet: {error}")
        return EXIT_CLUSTER
    except KeyboardInterrupt:
        return 130


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "check":
        return _check(arguments)
    from facelane_fleet import cluster

    with cluster.connected(arguments.address, getattr(arguments, "wait", 0.0)):
        match arguments.command:
            case "up":
                return _up(arguments)
            case "status":
                return _status(arguments)
            case "down":
                return _down(arguments)
            case "drain":
                remote = cluster.supervisor(arguments.fleet).drain
                return _told(remote.remote(arguments.node, not arguments.undo))
            case _:
                remote = cluster.supervisor(arguments.fleet).move
                return _told(
                    remote.remote(arguments.camera, arguments.node or "", arguments.anywhere)
                )


def _check(arguments: argparse.Namespace) -> int:
    from facelane_fleet import config

    settings = config.load(arguments.config)
    print(
        f"{arguments.config}: fleet {settings.fleet.name}, {len(settings.cameras)} cameras, "
        f"{len(settings.nodes)} kinds of nodes"
    )
    return EXIT_OK


def _up(arguments: argparse.Namespace) -> int:
    import msgspec

    from facelane_fleet import cluster, config

    settings = config.load(arguments.config)
    document = config.document(arguments.config)
    _one_gallery(settings, cluster.ray_nodes())
    words = (msgspec.json.encode(document), msgspec.json.encode(settings.server_config))
    actor = cluster.begin(settings.fleet.name, *words)
    code = _told(actor.apply.remote(*words), quiet=True)
    if code:
        return code
    print(
        f"fleet {settings.fleet.name} is up: {len(settings.cameras)} cameras; "
        "`facelane-fleet status` shows where they are"
    )
    return EXIT_OK


def _one_gallery(settings: Any, nodes: Sequence[dict[str, Any]]) -> None:
    """Servers of several machines must share a store. Raises ``ConfigError``."""
    from facelane_bridge.config import ConfigError

    machines = {
        one["NodeManagerAddress"]
        for one in nodes
        if one["Alive"] and settings.node(one["NodeName"]).servers
    }
    if len(machines) > 1 and not settings.server_config.get("store", {}).get("url"):
        raise ConfigError(
            f"servers on {len(machines)} machines need one gallery: set [store] url = "
            '"postgresql://..." in the server configuration that [servers] config names'
        )


def _status(arguments: argparse.Namespace) -> int:
    import msgspec

    from facelane_fleet import cluster, statuses
    from facelane_fleet.messages import Status

    data = cluster.asked(cluster.supervisor(arguments.fleet).status.remote())
    status = msgspec.json.decode(data, type=Status)
    if arguments.json:
        print(msgspec.json.format(data, indent=1).decode())
    else:
        print(statuses.table(status))
    if arguments.check and not statuses.well(status):
        return EXIT_NOT_WELL
    return EXIT_OK


def _down(arguments: argparse.Namespace) -> int:
    return _end(arguments.fleet)


def _end(fleet: str) -> int:
    import ray

    from facelane_fleet import cluster

    actor = cluster.supervisor(fleet)
    code = _told(actor.close.remote(), seconds=2 * cluster.CLOSE_S)
    ray.kill(actor)
    return code


def _told(reference: Any, *, quiet: bool = False, seconds: float = 30.0) -> int:
    """Says what the supervisor answered."""
    import msgspec

    from facelane_fleet.cluster import Answer, asked

    answer = msgspec.json.decode(asked(reference, seconds), type=Answer)
    if answer.error:
        tell(f"facelane-fleet: {answer.error}")
        return EXIT_USAGE if answer.usage else EXIT_FAULT
    if not quiet:
        print(answer.text)
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="facelane-fleet",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=facelane.__version__)
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS") or "auto",
        help="of the Ray cluster [$RAY_ADDRESS, else the one of this machine]",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="read a configuration and say what it holds")
    check.add_argument("config", type=Path, help="TOML file with cameras and nodes")
    up = commands.add_parser("up", help="begin a fleet, or give it another configuration")
    up.add_argument("config", type=Path, help="TOML file with cameras and nodes")
    up.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="for a cluster that is to come"
    )
    status = commands.add_parser("status", help="where cameras are, and how servers fare")
    status.add_argument("--json", action="store_true", help="for programs")
    status.add_argument(
        "--check", action="store_true", help="exit code 3 when a camera is not well"
    )
    drain = commands.add_parser("drain", help="move all cameras off a node, and give it none")
    drain.add_argument("node", help="as `status` calls it")
    drain.add_argument("--undo", action="store_true", help="it takes cameras again")
    move = commands.add_parser("move", help="move a camera, to stay where it is moved to")
    move.add_argument("camera", help="as the configuration calls it")
    move.add_argument("node", nargs="?", help="the emptiest other one, if none is given")
    move.add_argument("--anywhere", action="store_true", help="let it be placed by load again")
    down = commands.add_parser("down", help="end every server and bridge of the fleet")
    for command in (status, drain, move, down):
        command.add_argument(
            "--fleet", default="default", metavar="NAME", help="which fleet [default]"
        )
    return parser
