"""The bridge's configuration: one TOML file, several cameras, nothing guessed.

Strict: an unknown key is refused and the nearest right one named, a value out of range
is refused with its range, credentials inside an address are refused. Every message says
where in the file the fault is, and none repeats a secret.
"""

from __future__ import annotations

import difflib
import enum
import math
import os
import re
import stat
import tomllib
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from facelane.transport import default_target
from facelane_bridge.camera import Policy

MAX_CAMERAS = 256
MIN_ANALYSIS_FPS = 0.1
"""The least that a server takes."""
FINGERPRINT_PATTERN = r"^$|^(?i:sha-?256[:=/ ]?)?(?:[0-9A-Fa-f]{2}[: ]?){31}[0-9A-Fa-f]{2}$"
NAME_PATTERN = r"^[A-Za-z0-9_.-]{1,64}$"


class ConfigError(Exception):
    """The configuration cannot be used; the message says where and what to write instead."""


class SourceKind(enum.StrEnum):
    """What a source is. ``auto`` decides by the address."""

    AUTO = "auto"
    RTSP = "rtsp"
    FILE = "file"
    DEVICE = "device"
    MJPEG = "mjpeg"
    FOLDER = "folder"


class Transport(enum.StrEnum):
    """How RTSP carries its media. TCP loses nothing; UDP does not fall behind."""

    TCP = "tcp"
    UDP = "udp"


class Pace(enum.StrEnum):
    """How files are played: like a camera, or as fast as the server answers."""

    REALTIME = "realtime"
    FAST = "fast"


class VideoChoice(enum.StrEnum):
    """What is done with H.264 and H.265. ``auto``: passed on as the camera sends it where the
    server takes it so, else decoded here, as with ``decode``; ``pass``: or the camera fails."""

    AUTO = "auto"
    PASS = "pass"  # noqa: S105 - what is done
    DECODE = "decode"


class OverloadChoice(enum.StrEnum):
    """What happens to frames that come faster than they are served. ``auto``: lossless for
    ``pace = "fast"``, the newest wins for everything that is live."""

    AUTO = "auto"
    LATEST_WINS = "latest_wins"
    LOSSLESS = "lossless"


class Results(enum.StrEnum):
    """Which lines are told. ``events``: those in which something has changed."""

    ALL = "all"
    EVENTS = "events"
    OFF = "off"


Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
SecondsOrZero = Annotated[float, Meta(ge=0, le=86_400)]


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The facelane server that the frames go to."""

    target: Annotated[str, Meta(min_length=1, max_length=1024)] = msgspec.field(
        default_factory=default_target
    )
    """``host:port`` or ``unix:/path``."""
    token_env: str = ""
    token_file: str = ""
    tls_ca: str = ""
    """PEM of the authority to trust; setting it switches TLS on."""
    tls_cert: str = ""
    tls_key: str = ""
    tls_server_name: str = ""
    proxy: bool = True
    """Whether servers on other machines may be reached by the proxy that the environment names."""
    wait: SecondsOrZero = 0.0
    """How long to wait for a server that is not there at the start; 0 = for ever."""
    traces: Annotated[str, Meta(pattern=r"^(https?://[^\s/]+:\d+)?$")] = ""
    """Where traces of frames are sent, OTLP over gRPC: ``http://host:4317``; empty = nowhere."""
    trace_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.01
    """The share of frames that are traced."""


Point = tuple[Annotated[float, Meta(ge=0, le=1)], Annotated[float, Meta(ge=0, le=1)]]
"""In fractions of the picture, x to the right and y down."""


class ZoneSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a camera's picture; see the server's zones.md."""

    name: Name
    polygon: Annotated[tuple[Point, ...], Meta(min_length=3, max_length=64)]
    dwell_s: SecondsOrZero = 0.0
    unknown_s: SecondsOrZero = 0.0
    faces: Literal["all", "only", "ignored"] = "all"


class LineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line across which a camera's faces are counted."""

    name: Name
    start: Point
    end: Point


class CameraSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One camera. Durations in seconds, sizes in pixels."""

    name: Name
    source: Annotated[str, Meta(min_length=1, max_length=4096)]
    kind: SourceKind = SourceKind.AUTO
    transport: Transport = Transport.TCP
    credentials_env: str = ""
    """Name of an environment variable that holds ``user:password``."""
    credentials_file: str = ""
    """Path of a file that holds ``user:password``."""
    tls_ca_file: str = ""
    """rtsps and https: PEM of the authority that signed the camera's certificate, or of that
    certificate itself, which may then be made out to any name."""
    tls_server_name: str = ""
    """The name in the camera's certificate, where it is not that of the address."""
    tls_fingerprint: Annotated[str, Meta(pattern=FINGERPRINT_PATTERN)] = ""
    """SHA-256 of the camera's certificate; whatever else it says, it is trusted."""
    pace: Pace = Pace.REALTIME
    loop: bool = False
    folder_fps: Annotated[float, Meta(gt=0, le=1000)] = 5.0
    device_size: Annotated[str, Meta(pattern=r"^(\d{1,5}x\d{1,5})?$")] = ""
    device_fps: Annotated[int, Meta(ge=0, le=1000)] = 0
    device_format: Annotated[str, Meta(pattern=r"^[a-z0-9]{0,16}$")] = ""

    max_fps: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    """Frames a second to send at most; 0 = all. Video that is passed on has to be sent whole:
    there it is as ``analysis_fps``."""
    max_side: Annotated[int, Meta(ge=0, le=8192)] = 0
    """Frames with a longer side are scaled down; 0 = never."""
    jpeg_quality: Annotated[int, Meta(ge=1, le=100)] = 90
    video: VideoChoice = VideoChoice.AUTO
    analysis_fps: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    """Pictures a second that the server analyses at most; 0 = all that it has room for."""

    overload: OverloadChoice = OverloadChoice.AUTO
    max_frame_age: SecondsOrZero = 0.0
    """A frame that waited longer on the server is dropped; 0 = the server's default."""
    weight: Annotated[int, Meta(ge=0, le=100)] = 0
    reinference_interval: SecondsOrZero = 0.0
    disable_tracking: bool = False
    skip_recognition: bool = False
    skip_liveness: bool = False
    gallery: Annotated[str, Meta(min_length=1, max_length=128)] = "default"
    private: bool = False
    """Nobody may look at its stream on the server, and no event keeps a picture of it."""
    max_faces: Annotated[int, Meta(ge=0, le=1024)] = 0
    max_candidates: Annotated[int, Meta(ge=0, le=10)] = 0
    min_face_size: Annotated[int, Meta(ge=0, le=8192)] = 0
    false_naming: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """The share of strangers that may be named here, no higher than the server's."""
    match_threshold: Annotated[float, Meta(ge=0, le=1)] | None = None
    """Instead: the least cosine of a match."""
    zones: tuple[ZoneSettings, ...] = ()
    lines: tuple[LineSettings, ...] = ()

    open_timeout: Seconds = 10.0
    read_timeout: Seconds = 30.0
    stall_after: Seconds = 5.0
    stall_limit: Seconds = 15.0
    backoff_initial: Seconds = 0.5
    backoff_max: Seconds = 10.0
    credentials_backoff: Seconds = 120.0
    """After a password that has worked was refused twice; doubled up to five times this."""
    max_attempts: Annotated[int, Meta(ge=0)] = 0
    """Failed attempts in a row before the camera is given up; 0 = never."""

    @property
    def resolved_kind(self) -> SourceKind:
        """``kind``, decided by the address where it is ``auto``."""
        if self.kind is not SourceKind.AUTO:
            return self.kind
        scheme = _scheme(self.source)
        if scheme in ("rtsp", "rtsps"):
            return SourceKind.RTSP
        if scheme in ("http", "https"):
            return SourceKind.MJPEG
        if re.match(r"^/dev/video\d+$", self.source) or self.source.startswith("/dev/v4l/"):
            return SourceKind.DEVICE
        return SourceKind.FOLDER if Path(self.source).is_dir() else SourceKind.FILE

    @property
    def is_live(self) -> bool:
        """Whether time cannot be held: the source goes on whether it is read or not."""
        return self.resolved_kind not in (SourceKind.FILE, SourceKind.FOLDER)

    @property
    def is_lossless(self) -> bool:
        """Whether the source waits for the server instead of dropping frames."""
        if self.overload is OverloadChoice.AUTO:
            return not self.is_live and self.pace is Pace.FAST
        return self.overload is OverloadChoice.LOSSLESS

    @property
    def passes_video(self) -> bool:
        """Whether H.264 and H.265 are to go on as they are, where they can."""
        if self.resolved_kind in (SourceKind.MJPEG, SourceKind.FOLDER):
            return False
        too_slow = 0 < self.max_fps < MIN_ANALYSIS_FPS
        return self.video is not VideoChoice.DECODE and not self.max_side and not too_slow

    @property
    def analysed_fps(self) -> float:
        """The lower of the two rates; 0 = all."""
        return min((rate for rate in (self.max_fps, self.analysis_fps) if rate), default=0.0)

    @property
    def policy(self) -> Policy:
        """The camera's patience, for the state machine."""
        return Policy(
            open_timeout=self.open_timeout,
            # A file has no clock of its own that could stand still.
            stall_after=self.stall_after if self.is_live else math.inf,
            stall_limit=self.stall_limit,
            backoff_initial=self.backoff_initial,
            backoff_max=self.backoff_max,
            refused_backoff=self.credentials_backoff,
            max_attempts=self.max_attempts,
        )


class BridgeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything in the file, with the ``[defaults]`` merged into each camera."""

    server: ServerSettings = ServerSettings()
    cameras: tuple[CameraSettings, ...]
    status_interval: Seconds = 10.0
    """How often the counters of every camera are logged."""
    results: Results = Results.ALL
    metrics: str = ""
    """``host:port`` where Prometheus finds the cameras' metrics; empty = nowhere."""

    @property
    def exposed_files(self) -> tuple[str, ...]:
        """Files with secrets that every user of this machine can read."""
        named = {camera.credentials_file for camera in self.cameras}
        named |= {self.server.token_file, self.server.tls_key}
        return tuple(sorted(path for path in named if path and _is_readable_by_all(path)))


TOP_LEVEL_KEYS = ("server", "defaults", "camera", "status_interval", "results", "metrics")
_NOT_DEFAULTS = frozenset({"name", "source"})


def load(path: str | Path) -> BridgeSettings:
    """The settings in a TOML file. Raises ``ConfigError``."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the file is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(text: str) -> BridgeSettings:
    """The settings in TOML text. Raises ``ConfigError``."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError("not valid TOML: nested too deeply") from None
    except ValueError:
        raise ConfigError("not valid TOML: a number of too many digits") from None
    return from_mapping(document)


def from_mapping(document: Mapping[str, Any]) -> BridgeSettings:
    """The settings in a parsed document. Raises ``ConfigError``."""
    _refuse_unknown(document, TOP_LEVEL_KEYS, "at the top level")
    server = document.get("server", {})
    defaults = document.get("defaults", {})
    cameras = document.get("camera", [])
    for key, value in (("server", server), ("defaults", defaults)):
        if not isinstance(value, dict):
            raise ConfigError(f"{key} has to be a table: [{key}]")
    if not isinstance(cameras, list) or not all(isinstance(item, dict) for item in cameras):
        raise ConfigError("cameras are written as [[camera]] tables")
    if not cameras:
        raise ConfigError("no camera is configured; add a [[camera]] with a name and a source")
    if len(cameras) > MAX_CAMERAS:
        raise ConfigError(f"more than {MAX_CAMERAS} cameras; start a second bridge")
    camera_keys = CameraSettings.__struct_fields__
    _refuse_unknown(server, ServerSettings.__struct_fields__, "in [server]")
    default_keys = [key for key in camera_keys if key not in _NOT_DEFAULTS]
    _refuse_unknown(defaults, default_keys, "in [defaults]")
    merged = []
    for number, camera in enumerate(cameras, 1):
        where = f"in [[camera]] number {number}"
        _refuse_unknown(camera, camera_keys, where)
        merged.append(_camera(defaults | camera, where))
    names = [camera.name for camera in merged]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two cameras are called {name!r}; names have to differ")
    settings = {
        "server": _convert(server, ServerSettings, "in [server]"),
        "cameras": tuple(merged),
    }
    for key, kind in (("status_interval", Seconds), ("results", Results), ("metrics", str)):
        if key in document:
            settings[key] = _convert(document[key], kind, key)
    if "results" not in settings and is_service():
        settings["results"] = Results.EVENTS
    result = BridgeSettings(**settings)
    _check_server(result.server)
    if result.metrics:
        host_and_port(result.metrics)
    return result


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of ``host:port``. Raises ``ConfigError``."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"metrics: write host:port, for instance 127.0.0.1:9153, not {address!r}")
    return host.strip("[]"), int(port)


def is_service() -> bool:
    """Whether a service manager started us, whose journal keeps what we write."""
    return bool(os.environ.get("NOTIFY_SOCKET") or os.environ.get("SUPERVISOR_ENABLED"))


def single(
    source: str, *, server: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> BridgeSettings:
    """Settings for one source, as ``facelane-bridge run --source`` uses them."""
    where = "in the arguments"
    camera = _camera({"name": "camera", "source": source} | dict(options or {}), where)
    # Somebody waits at a terminal: an absent server is told after half a minute.
    settings = _convert({"wait": 30.0} | dict(server), ServerSettings, where)
    return BridgeSettings(server=settings, cameras=(camera,))


def _camera(values: Mapping[str, Any], where: str) -> CameraSettings:
    camera: CameraSettings = _convert(values, CameraSettings, where)
    scheme = _scheme(camera.source)
    authority = re.match(r"^[^:]+://([^/?#]*)", camera.source)
    if authority is not None and "@" in authority.group(1):
        raise ConfigError(
            f"{where}: the address holds credentials, which end up in process lists and logs; "
            "put user:password into an environment variable or a file and name it with "
            "credentials_env or credentials_file"
        )
    if camera.credentials_env and camera.credentials_file:
        raise ConfigError(f"{where}: credentials_env and credentials_file exclude each other")
    kind = camera.resolved_kind
    allowed = {SourceKind.RTSP: ("rtsp", "rtsps"), SourceKind.MJPEG: ("http", "https")}.get(kind)
    if allowed is not None and scheme not in allowed:
        raise ConfigError(
            f"{where}: a source of kind {kind.value!r} is an address that begins with "
            f"{allowed[0]}:// or {allowed[1]}://"
        )
    if allowed is not None:
        try:
            parts = urllib.parse.urlsplit(camera.source)
            _ = parts.port
        except ValueError:
            # Python's text repeats the part that it stumbled over: of a password, say.
            raise ConfigError(
                f"{where}: source is no usable address; write {scheme}://HOST:PORT/PATH with a "
                "port below 65536"
            ) from None
        if not parts.hostname:
            raise ConfigError(f"{where}: source names no host; write {scheme}://HOST/PATH")
    if kind in (SourceKind.FILE, SourceKind.FOLDER, SourceKind.DEVICE) and scheme:
        raise ConfigError(
            f"{where}: {scheme}:// addresses are not supported; use rtsp://, rtsps://, http://, "
            "https:// or the path of a file, a folder or a device"
        )
    if camera.tls_fingerprint and (camera.tls_ca_file or camera.tls_server_name):
        raise ConfigError(
            f"{where}: tls_fingerprint says it all; leave tls_ca_file and tls_server_name out"
        )
    if camera.video is VideoChoice.PASS and camera.max_side:
        raise ConfigError(
            f'{where}: max_side scales pictures, and video = "pass" leaves them as they are; '
            "leave one of them out"
        )
    if camera.false_naming is not None and camera.match_threshold is not None:
        raise ConfigError(f"{where}: give one of false_naming and match_threshold")
    if 0 < camera.analysis_fps < MIN_ANALYSIS_FPS:
        raise ConfigError(f"{where}: analysis_fps is 0 (all) or at least {MIN_ANALYSIS_FPS:g}")
    if camera.is_live and camera.loop:
        raise ConfigError(f"{where}: loop is for files and folders")
    try:
        _ = camera.policy
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    return camera


def _check_server(server: ServerSettings) -> None:
    if server.token_env and server.token_file:
        raise ConfigError("in [server]: token_env and token_file exclude each other")
    if bool(server.tls_cert) != bool(server.tls_key):
        raise ConfigError("in [server]: tls_cert and tls_key go together")
    if (server.tls_cert or server.tls_server_name) and not server.tls_ca:
        raise ConfigError("in [server]: tls_ca is needed for TLS")


def _convert(value: Any, type_: Any, where: str) -> Any:
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        # "Expected `int` <= 100 - at `$.jpeg_quality`" -> "jpeg_quality: expected int <= 100"
        text, _, path = str(error).partition(" - at `$")
        key = path.strip("`").lstrip(".")
        text = text.replace("`", "")
        text = f"{key}: {text[:1].lower()}{text[1:]}" if key else text[:1].lower() + text[1:]
        if key == "name":
            text += " (1-64 letters, digits, '-', '_', '.')"
        raise ConfigError(f"{where}: {text}") from None


def _refuse_unknown(table: Mapping[str, Any], known: Any, where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {key!r} {where}; {hint}")


def _is_readable_by_all(path: str) -> bool:
    try:
        return bool(os.stat(path).st_mode & stat.S_IROTH)
    except OSError:
        return False


def _scheme(source: str) -> str:
    match = re.match(r"^([A-Za-z][A-Za-z0-9+.-]*)://", source)
    return match.group(1).lower() if match else ""
