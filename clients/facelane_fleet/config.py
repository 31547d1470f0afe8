"""The fleet's configuration: one TOML file; what servers and bridges know of, they check.

Strict: an unknown key is refused and the nearest right one named. Secrets are not in it: it names
files that every node has, for the file itself travels by way of Ray.
"""

from __future__ import annotations

import difflib
import fnmatch
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from facelane_bridge.config import (
    CameraSettings,
    ConfigError,
    ServerSettings,
    from_mapping,
)
from facelane_fleet.placement import Policy, Wish

MAX_CAMERAS: Final = 4096
MAX_SERVERS_PER_NODE: Final = 64
_PLACEHOLDER: Final = "unix:/fleet"

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Pattern = Annotated[str, Meta(min_length=1, max_length=128)]
Seconds = Annotated[float, Meta(gt=0, le=3600)]


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Fleet(_Table, frozen=True, kw_only=True):
    """The fleet as a whole. Times in seconds."""

    name: Name = "default"
    """Several fleets may share a Ray cluster."""
    state_dir: str = ""
    """On every node: the gallery of a fleet on one machine, servers' state. Empty =
    $XDG_STATE_HOME/facelane-fleet/NAME, else ~/.local/state/facelane-fleet/NAME."""
    max_cameras: Annotated[int, Meta(ge=1, le=256)] = 64
    """The most that one server is given."""
    moves: Annotated[int, Meta(ge=1, le=256)] = 4
    """Cameras that are under way at one time because they would stand better elsewhere."""
    lease: Annotated[float, Meta(ge=2, le=600)] = 5.0
    """A node that does not hear from the cluster for so long lets its cameras go; those of a node
    that Ray has given up are placed elsewhere so long after."""
    silence: Annotated[float, Meta(ge=10, le=3600)] = 60.0
    """The same where the cluster is there and the supervisor is not heard."""
    patience: Seconds = 5.0
    """A server that does not serve for so long loses its cameras to others."""


class Servers(_Table, frozen=True, kw_only=True):
    """What every server of the fleet is started with."""

    config: str = ""
    """A server's configuration (docs/configuration.md), read by ``up``. The fleet sets its
    address, its folders and its card. Empty = the defaults."""
    listen: str = "unix"
    """``unix``: a socket of the node's own, for the bridges beside it. ``HOST:PORT``: the first
    server of each node there, the next on the ports behind it."""
    metrics: str = ""
    """``HOST:PORT`` of the first server's metrics, the next on the ports behind it; empty = off."""

    def __post_init__(self) -> None:
        for key in ("listen", "metrics"):
            value = getattr(self, key)
            if value and (key, value) != ("listen", "unix"):
                split_address(value, key)


class Bridges(_Table, frozen=True, kw_only=True):
    """How bridges, and the fleet itself, speak to servers: files on every node."""

    cameras: Annotated[int, Meta(ge=1, le=256)] = 16
    """How many one bridge reads, a process that fills one core at most; more take more bridges."""
    token_file: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_server_name: str = ""


class Node(_Table, frozen=True, kw_only=True):
    """Nodes of these names: the first table that fits one counts."""

    name: Pattern
    """A name or a pattern (``edge-*``), of ``ray start --node-name``."""
    servers: Annotated[int, Meta(ge=-1, le=MAX_SERVERS_PER_NODE)] = -1
    """-1: one a card, or one on the CPU where there is none."""
    bridges: bool = True
    """Whether cameras are read here."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything in the file."""

    fleet: Fleet
    servers: Servers
    bridges: Bridges
    nodes: tuple[Node, ...]
    cameras: dict[str, CameraSettings]
    reach: dict[str, tuple[str, ...]]
    """By camera: the nodes that can read it; absent = all."""
    server_config: dict[str, Any]
    """The content of ``servers.config``."""

    @property
    def wishes(self) -> list[Wish]:
        """The cameras, for placement."""
        return [Wish(name=name, nodes=self.reach.get(name, ())) for name in self.cameras]

    @property
    def policy(self) -> Policy:
        """How cameras are placed."""
        return Policy(moves=self.fleet.moves, per_server=self.fleet.max_cameras)

    def node(self, name: str) -> Node:
        """What is wanted of a node of this name."""
        found = (one for one in self.nodes if fnmatch.fnmatchcase(name, one.name))
        return next(found, Node(name=name))

    def server_for(self, target: str) -> ServerSettings:
        """What a bridge is told of the server at ``target``."""
        given = self.bridges
        return ServerSettings(
            target=target,
            token_file=given.token_file,
            tls_ca=given.tls_ca,
            tls_cert=given.tls_cert,
            tls_key=given.tls_key,
            tls_server_name=given.tls_server_name,
            proxy=False,
        )


_TABLES: Final[Mapping[str, type[_Table]]] = {
    "fleet": Fleet,
    "servers": Servers,
    "bridges": Bridges,
}


def load(path: str | Path) -> Settings:
    """The settings in a file, with the server configuration that it names. Raises
    ``ConfigError``."""
    text = _read(Path(path))
    try:
        document = _parsed(text)
        named = document.get("servers", {}).get("config", "")
        config = (
            _parsed(_read(Path(path).parent / named)) if isinstance(named, str) and named else {}
        )
        return from_tables(document, config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def document(path: str | Path) -> dict[str, Any]:
    """The content of a file that ``load`` has found good."""
    return _parsed(_read(Path(path)))


def from_tables(document: Mapping[str, Any], server_config: dict[str, Any]) -> Settings:
    """The settings in a parsed document. Raises ``ConfigError``."""
    _known(document, (*_TABLES, "node", "defaults", "camera"), "at the top level")
    tables = {}
    for key, kind in _TABLES.items():
        tables[key] = _converted(document.get(key, {}), kind, f"in [{key}]")
    found = document.get("node", [])
    if not isinstance(found, list):
        raise ConfigError("nodes are written as [[node]] tables")
    nodes = tuple(
        _converted(one, Node, f"in [[node]] number {number}") for number, one in enumerate(found, 1)
    )
    reach: dict[str, tuple[str, ...]] = {}
    cameras = _cameras(document, reach)
    _check_server_config(server_config)
    made = Settings(
        fleet=tables["fleet"],
        servers=tables["servers"],
        bridges=tables["bridges"],
        nodes=nodes,
        cameras=cameras,
        reach=reach,
        server_config=server_config,
    )
    if made.servers.listen == "unix" and any(not one.servers or not one.bridges for one in nodes):
        raise ConfigError(
            "a node without servers or without bridges needs servers that others reach: set "
            'listen = "0.0.0.0:50151" in [servers], with TLS and keys (docs/fleet.md)'
        )
    return made


def _cameras(
    document: Mapping[str, Any], reach: dict[str, tuple[str, ...]]
) -> dict[str, CameraSettings]:
    """The bridge reads them, and says what is wrong; ``nodes`` is ours."""
    defaults = document.get("defaults", {})
    given = document.get("camera", [])
    if not isinstance(defaults, dict):
        raise ConfigError("defaults has to be a table: [defaults]")
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise ConfigError("cameras are written as [[camera]] tables")
    if len(given) > MAX_CAMERAS:
        raise ConfigError(f"more than {MAX_CAMERAS} cameras; make two fleets of them")
    found: dict[str, CameraSettings] = {}
    usual = defaults.get("nodes", [])
    defaults = {key: value for key, value in defaults.items() if key != "nodes"}
    for number, one in enumerate(given, 1):
        where = f"in [[camera]] number {number}"
        nodes = _converted(one.get("nodes", usual), tuple[Pattern, ...], f"{where}: nodes")
        plain = {key: value for key, value in one.items() if key != "nodes"}
        try:
            read = from_mapping(
                {"server": {"target": _PLACEHOLDER}, "defaults": defaults, "camera": [plain]}
            )
        except ConfigError as error:
            raise ConfigError(str(error).replace("in [[camera]] number 1", where)) from None
        camera = read.cameras[0]
        if camera.name in found:
            raise ConfigError(f"two cameras are called {camera.name!r}; names have to differ")
        found[camera.name] = camera
        if nodes:
            reach[camera.name] = nodes
    return found


def _check_server_config(config: Mapping[str, Any]) -> None:
    """What the fleet sets itself must not stand there."""
    server = config.get("server", {})
    taken = [
        where
        for where, there in (
            ("state_dir", "state_dir" in config),
            ("runtime_dir", "runtime_dir" in config),
            ("server.listen", isinstance(server, dict) and "listen" in server),
            ("metrics", "metrics" in config),
        )
        if there
    ]
    if taken:
        raise ConfigError(
            f"the server configuration has {', '.join(taken)}, which a fleet sets for each server "
            "itself: leave it out, and use listen and metrics in [servers]"
        )


def split_address(address: str, key: str) -> tuple[str, int]:
    """The parts of ``host:port``. Raises ``ValueError``."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 - MAX_SERVERS_PER_NODE:
        raise ValueError(f"{key}: write HOST:PORT, for instance 0.0.0.0:50151")
    return host, int(port)


def _known(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    names = list(known)
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(names))}"
            raise ConfigError(f"unknown key {key!r} {where}; {hint}")


def _converted(value: Any, kind: Any, where: str) -> Any:
    if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, _Table):
        _known(value, kind.__struct_fields__, where)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        key = path.strip("`").lstrip(".")
        text = text.replace("`", "")
        raise ConfigError(f"{where}: {f'{key}: ' if key else ''}{text}") from None


def _parsed(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError("not valid TOML: nested too deeply") from None
    except ValueError:
        raise ConfigError("not valid TOML: a number of too many digits") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8: save it again as UTF-8") from None
