"""The configuration: one TOML file, a server and any number of sinks, nothing guessed.

Strict: an unknown key is refused, a value out of range with its range. No message repeats a
secret.
"""

from __future__ import annotations

import codecs
import re
import tomllib
from collections.abc import Mapping
from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from facelane.transport import default_target
from facelane.types import EventKind

MAX_SINKS: Final = 16
"""Each is a subscription of its own, and a server has places for so many watchers of one key."""
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Seconds = Annotated[float, Meta(gt=0, le=3600)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Fingerprint = Annotated[str, Meta(pattern=r"^$|^([0-9A-Fa-f]{2}:?){32}$")]
HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~A-Za-z0-9-]+\Z")
HEADER_VALUE: Final = re.compile(r"[\t -~]*\Z")
HOURS: Final = re.compile(r"^([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)$")


class ConfigError(Exception):
    """The configuration cannot be used; the message says where and what to write instead."""


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Server(_Table, frozen=True, kw_only=True):
    """The facelane server whose events are delivered; its key needs the verb ``events``, and
    ``gallery.read`` for names and labels."""

    target: Annotated[str, Meta(min_length=1, max_length=1024)] = msgspec.field(
        default_factory=default_target
    )
    token_file: str = ""
    """The key alone."""
    tls_ca: str = ""
    """PEM of the authority to trust. It, or any of the next three, switches TLS on."""
    tls_cert: str = ""
    tls_key: str = ""
    tls_server_name: str = ""
    proxy: bool = True


class _Sink(_Table, frozen=True, kw_only=True):
    """What every sink has."""

    name: Name
    kinds: tuple[EventKind, ...] = ()
    """Empty = all."""
    sources: tuple[str, ...] = ()
    """Source ids, or their beginnings with a star: ``"front-*"``. Events of no source (pools,
    devices) pass only where this is empty."""
    labels: dict[str, str] = {}
    """A watch list: the subject has these labels. Events that name nobody do not pass."""
    hours: str = ""
    """``"22:00-06:00"``, when it happened, in this machine's time zone; empty = always."""
    template: str = ""
    """What is sent instead of the event's JSON: ``${subject_id}``, ``${display_name}``,
    ``${source_id}``, ``${kind}``, ``${decision}``, ``${liveness}``, ``${time}``, ``${id}``, each as
    it stands inside of a JSON string; ``$$`` is a dollar."""
    attempt_timeout: Seconds = 10.0
    """One attempt at one event."""
    retry_max: Seconds = 60.0
    """The longest wait between two attempts."""
    dead_letter_max_mib: Annotated[int, Meta(ge=0, le=10_240)] = 64
    """Of the file with events that the sink refuses for good; 0 = none is kept."""

    def __post_init__(self) -> None:
        if self.hours and not HOURS.match(self.hours):
            raise ValueError('hours are written "22:00-06:00"')
        if EventKind.UNSPECIFIED in self.kinds:
            raise ValueError("kinds: no event is UNSPECIFIED; leave kinds out for all of them")

    def within_hours(self, moment: datetime) -> bool:
        """Whether ``moment``, in local time, lies in ``hours``."""
        found = HOURS.match(self.hours)
        if found is None:
            return True
        h1, m1, h2, m2 = map(int, found.groups())
        begin, end, now = time(h1, m1), time(h2, m2), moment.time()
        return begin <= now < end if begin <= end else now >= begin or now < end


class Mqtt(_Sink, frozen=True, kw_only=True, tag_field="type", tag="mqtt"):
    """MQTT 3.1.1, quality of service 1."""

    host: str
    port: Port = 1883
    tls: bool = False
    tls_ca: str = ""
    """PEM of the authority, with ``tls``; empty = the system's."""
    tls_fingerprint: Fingerprint = ""
    """SHA-256 of the broker's certificate, with ``tls``: it alone is trusted."""
    username: str = ""
    password_file: str = ""
    prefix: Annotated[str, Meta(pattern=r"^[^#+\x00]{1,128}$")] = "facelane"
    """Topics are ``<prefix>/<source>/event`` and ``.../<state>``; ONVIF's TopicPrefix, which
    names the producer."""
    payload: Literal["event", "onvif"] = "event"
    """``onvif``: topics and JSON of ONVIF's event broker (Profile M) instead of ours."""
    homeassistant: bool = False
    """Publish Home Assistant's discovery, one device a camera."""
    discovery_prefix: Annotated[str, Meta(pattern=r"^[^#+\x00]{1,128}$")] = "homeassistant"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.tls_ca or self.tls_fingerprint) and not self.tls:
            raise ValueError(
                "tls_ca and tls_fingerprint are for TLS: write tls = true, and most likely port = "
                "8883"
            )
        if self.password_file and not self.username:
            raise ValueError("password_file goes with a username")
        if self.payload == "onvif" and (self.homeassistant or self.template):
            raise ValueError(
                'payload = "onvif" has topics and bodies of its own: write homeassistant and '
                "template at a second sink"
            )


class Webhook(_Sink, frozen=True, kw_only=True, tag_field="type", tag="webhook"):
    """One POST an event, signed as Standard Webhooks has it."""

    url: Annotated[str, Meta(pattern=r"^https?://")]
    secret_file: str = ""
    """``whsec_...``; empty = unsigned."""
    headers: dict[str, str] = {}
    proxy: bool = True
    """Whether a receiver on another machine may be reached by the proxy that the environment names
    (``https_proxy``, ``http_proxy``, ``no_proxy``)."""
    tls_ca: str = ""
    tls_fingerprint: Fingerprint = ""
    """SHA-256 of the receiver's certificate: it alone is trusted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.tls_ca or self.tls_fingerprint) and not self.url.startswith("https:"):
            raise ValueError("tls_ca and tls_fingerprint are for a url that begins with https://")
        for name, value in self.headers.items():
            if not HEADER_NAME.match(name) or not HEADER_VALUE.match(value):
                raise ValueError(
                    f"headers: {name!r} cannot be sent; a name is letters, digits and dashes, a "
                    "value one line of ASCII"
                )


class Nats(_Sink, frozen=True, kw_only=True, tag_field="type", tag="nats"):
    """NATS JetStream, without duplicates by message id."""

    servers: Annotated[tuple[str, ...], Meta(min_length=1, max_length=16)]
    """``nats://host:4222``."""
    subject: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}$")] = "facelane"
    """Subjects are ``<subject>.<source>.<kind>``."""
    stream: Name = "FACELANE"
    """Made if there is none; of an existing one the settings stay."""
    credentials_file: str = ""
    tls_ca: str = ""
    """PEM of the authority; empty = the system's. It, or the next, switches TLS on."""
    tls_fingerprint: Fingerprint = ""
    """SHA-256 of the servers' certificate: it alone is trusted."""


class JsonLines(_Sink, frozen=True, kw_only=True, tag_field="type", tag="jsonl"):
    """A file of JSON lines."""

    path: Annotated[str, Meta(min_length=1)]
    rotate_mib: Annotated[int, Meta(ge=1, le=10_240)] = 100
    keep: Annotated[int, Meta(ge=1, le=1000)] = 5
    """Older files, ``path.1`` the newest."""


class Syslog(_Sink, frozen=True, kw_only=True, tag_field="type", tag="syslog"):
    """RFC 5424. Over UDP nothing tells whether it arrived."""

    address: Annotated[str, Meta(pattern=r"^(udp|tcp)://[^/]+:\d{1,5}$|^unix:/")]
    """``tcp://host:601``, ``udp://host:514`` or ``unix:/dev/log``."""
    facility: Annotated[int, Meta(ge=0, le=23)] = 16


Sink = Mqtt | Webhook | Nats | JsonLines | Syslog


class Config(_Table, frozen=True, kw_only=True):
    """A sink that has never run begins with what happens next."""

    server: Server = Server()
    state_dir: str = ""
    """Where each sink's position and dead letters are kept; empty = $STATE_DIRECTORY (systemd),
    else $XDG_STATE_HOME/facelane-events."""
    sink: Annotated[tuple[Sink, ...], Meta(min_length=1, max_length=MAX_SINKS)]

    def __post_init__(self) -> None:
        names = [sink.name for sink in self.sink]
        if len(set(names)) != len(names):
            raise ValueError("two sinks have one name; each needs a name of its own")


def parse(text: str) -> Config:
    """Raises ``ConfigError``."""
    try:
        raw: Mapping[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"this is no TOML: {error}") from None
    except RecursionError:
        raise ConfigError("this is no TOML: nested too deeply") from None
    except ValueError:
        raise ConfigError("this is no TOML: a number of too many digits") from None
    if not raw.get("sink"):
        raise ConfigError(
            'there is no sink: write [[sink]] with name and type = "mqtt", "webhook", "nats", '
            '"jsonl" or "syslog"'
        )
    try:
        return msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from None


def load(path: Path) -> Config:
    """Raises ``ConfigError``."""
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8: save it again as UTF-8") from None


def secret(path: str) -> str:
    """The content of a file that holds a secret alone; "" of no path. Raises ``ConfigError``."""
    if not path:
        return ""
    try:
        data = Path(path).read_bytes()
        # As editors of Windows save it.
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        found = data.decode("utf-16" if wide else "utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{path} cannot be read: it should hold the secret alone") from None
    if not found:
        raise ConfigError(f"{path} is empty: it should hold the secret alone")
    return found
