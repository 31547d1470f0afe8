"""Who calls, and what they may: bearer keys with scopes, bound to sources and galleries.

Only hashes of keys are stored. Health and reflection need any valid key off loopback;
``admin`` implies the other scopes but ``waive-liveness``.

====================  ======================================================================
scope                 lets its key
====================  ======================================================================
``analyze``           send pictures and streams, watch events
``gallery``           enrol, verify, identify, list and delete
``admin``             restart, reload, drain; and all of the others but the last
``scores``            see similarities as they are, and candidates below the match threshold:
                      enough of them rebuild somebody's template
``reassign``          enrol a face that matches another subject
``waive-liveness``    have faces verified without the liveness check
====================  ======================================================================
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal, get_args

import msgspec
import structlog

from facelane_server.config import Config, ConfigError, lent_hint
from facelane_server.domain import FacelaneError, Reason
from facelane_server.naming import NAME, is_name

log = structlog.get_logger(__name__)

Scope = Literal["analyze", "gallery", "admin", "scores", "reassign", "waive-liveness"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
DEFAULT_WEIGHT: Final = 10

_SCOPES: Final[dict[str, Scope | None]] = {
    "facelane.v1.AnalysisService": "analyze",
    "facelane.v1.EventService": "analyze",
    "facelane.v1.GalleryService": "gallery",
    "facelane.v1.AdminService": "admin",
    # Any valid key:
    "facelane.v1.ServerService": None,
    "grpc.health.v1.Health": None,
    "grpc.reflection.v1alpha.ServerReflection": None,
}

Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One key. ``sha256``: hex digest of the secret. ``sources``, ``galleries``: what it may
    name, shell patterns such as ``door-*``; empty = any. ``weight``: its share of the pools
    beside other keys. ``streams``: how many it may have open, instead of ``quotas.streams``."""

    name: Annotated[str, msgspec.Meta(pattern=NAME)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...]
    sources: tuple[Pattern, ...] = ()
    galleries: tuple[Pattern, ...] = ()
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    weight: Annotated[int, msgspec.Meta(ge=1, le=100)] = DEFAULT_WEIGHT
    streams: Annotated[int, msgspec.Meta(ge=1)] | None = None

    @property
    def expired(self) -> bool:
        return self.expires is not None and datetime.now(UTC) >= self.expires

    def entry(self) -> str:
        """As the keys file has it."""

        def listed(values: tuple[str, ...]) -> str:
            return "[" + ", ".join(f'"{value}"' for value in values) + "]"

        lines = [f'name = "{self.name}"', f'sha256 = "{self.sha256}"']
        lines.append(f"scopes = {listed(self.scopes)}")
        lines += [f"{n} = {listed(v)}" for n in ("sources", "galleries") if (v := getattr(self, n))]
        if self.expires is not None:
            lines.append(f"expires = {self.expires:%Y-%m-%dT%H:%M:%SZ}")
        if self.weight != DEFAULT_WEIGHT:
            lines.append(f"weight = {self.weight}")
        if self.streams is not None:
            lines.append(f"streams = {self.streams}")
        return "\n".join(["[[keys]]", *lines, ""])


class KeysFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call. ``key`` None: nobody has to show one here, and everybody may all."""

    key: Key | None = None

    @property
    def name(self) -> str:
        return "" if self.key is None else self.key.name

    @property
    def weight(self) -> int:
        return DEFAULT_WEIGHT if self.key is None else self.key.weight

    def may(self, scope: Scope) -> bool:
        return self.key is None or scope in self.key.scopes or "admin" in self.key.scopes

    @property
    def waives_liveness(self) -> bool:
        """By name alone: ``admin`` does not imply it."""
        return self.key is not None and "waive-liveness" in self.key.scopes

    def source(self, source_id: str) -> str:
        """The source meant; a key for one source need not name it. Raises PERMISSION_DENIED."""
        patterns = () if self.key is None else self.key.sources
        return _bound("source_id", source_id, source_id, patterns)

    def gallery(self, gallery_id: str, default: str) -> str:
        """The gallery meant, the same way; ``default``: of those who name none."""
        patterns = () if self.key is None else self.key.galleries
        return _bound("gallery_id", gallery_id, gallery_id or default, patterns)

    def may_hear(self, source_id: str, gallery_id: str) -> bool:
        """Whether an event of this source and gallery is for this caller; what belongs to
        neither is for those who are bound to nothing."""
        key = self.key
        if key is None or not (key.sources or key.galleries):
            return True
        if key.sources and not _among(key.sources, source_id):
            return False
        if key.galleries and gallery_id:
            return _among(key.galleries, gallery_id)
        return bool(key.sources)


ANYBODY: Final = Caller()


def _among(patterns: tuple[str, ...], value: str) -> bool:
    return any(fnmatch.fnmatchcase(value, pattern) for pattern in patterns)


def _bound(field: str, given: str, meant: str, patterns: tuple[str, ...]) -> str:
    if not patterns or _among(patterns, meant):
        return meant
    if not given and len(patterns) == 1 and not set("*?[") & set(patterns[0]):
        return patterns[0]
    raise FacelaneError(
        Reason.PERMISSION_DENIED,
        f"the key is not for this {field}; name one that it is for, or ask for another key",
        metadata={"field": field},
    )


def new_key(
    name: str,
    scopes: tuple[Scope, ...],
    *,
    sources: tuple[str, ...] = (),
    galleries: tuple[str, ...] = (),
    expires: datetime | None = None,
) -> tuple[str, Key]:
    """A fresh secret and the key that admits it. Raises ``ValueError`` for what the keys file
    cannot hold."""
    if not is_name(name):
        raise ValueError("a name has 1-64 of the characters A-Z a-z 0-9 . _ -")
    for pattern in (*sources, *galleries):
        if not pattern.isprintable() or set('"\\') & set(pattern) or not 1 <= len(pattern) <= 128:
            raise ValueError("a source or gallery has 1-128 characters; * stands for any of them")
    secret = f"flk_{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return secret, Key(name, digest, scopes, sources, galleries, expires)


def read_keys(path: Path, *, may_be_empty: bool = False) -> tuple[Key, ...]:
    """The keys of a file. Raises ``ConfigError``."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        keys = msgspec.convert(raw, KeysFile).keys
    except OSError as error:
        raise ConfigError(f"auth.keys_file {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"auth.keys_file {path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"auth.keys_file {path}: nested too deeply") from None
    if not keys and not may_be_empty:
        raise ConfigError(
            f"auth.keys_file {path} holds no keys{lent_hint(str(path))}; add one with "
            "`facelane-server keys new`"
        )
    return keys


class Authenticator:
    """Keys in force. ``reload`` swaps them while the server runs."""

    def __init__(self, keys: tuple[Key, ...] | None) -> None:
        self._keys = keys

    @classmethod
    def of(cls, config: Config) -> Authenticator:
        return cls(_keys_of(config))

    def reload(self, config: Config) -> None:
        self._keys = _keys_of(config)

    @property
    def required(self) -> bool:
        return self._keys is not None

    def check(self, method: str, metadata: Mapping[str, str]) -> Caller:
        """Who calls. Raises ``FacelaneError`` unless the call may go on. Who administers is
        logged."""
        if self._keys is None:
            return ANYBODY
        scheme, _, secret = metadata.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise FacelaneError(
                Reason.UNAUTHENTICATED,
                "this server needs a key: send `authorization: Bearer <key>` metadata",
            )
        caller = self._granted(method, hashlib.sha256(secret.encode()).hexdigest())
        if _SCOPES.get(_service(method), "admin") == "admin":
            log.info("administered", method=method, key=caller.name)
        return caller

    def recheck(self, method: str, caller: Caller) -> None:
        """Raises ``FacelaneError`` when a call that was let in would not be let in as it is:
        its key is gone, has expired, or may less."""
        if self._keys is None:
            return
        if caller.key is None:
            raise FacelaneError(Reason.UNAUTHENTICATED, "this server needs a key now")
        now = self._granted(method, caller.key.sha256).key
        assert now is not None
        lost = any(caller.may(scope) and not Caller(now).may(scope) for scope in SCOPES)
        was = caller.key
        if lost or (now.sources, now.galleries) != (was.sources, was.galleries):
            raise FacelaneError(
                Reason.PERMISSION_DENIED, "the key was changed; call again with what it may now"
            )

    def _granted(self, method: str, digest: str) -> Caller:
        granted: Key | None = None
        for key in self._keys or ():  # all of them: the time tells nothing
            if hmac.compare_digest(key.sha256, digest):
                granted = key
        if granted is None:
            raise FacelaneError(Reason.UNAUTHENTICATED, "the key is not known to this server")
        if granted.expired:
            raise FacelaneError(
                Reason.UNAUTHENTICATED, f"the key `{granted.name}` has expired; ask for a new one"
            )
        caller = Caller(granted)
        scope = _SCOPES.get(_service(method), "admin")
        if scope is not None and not caller.may(scope):
            raise FacelaneError(
                Reason.PERMISSION_DENIED,
                f"the key `{granted.name}` lacks the `{scope}` scope; ask for a key that has it",
                metadata={"scope": scope},
            )
        return caller


def _service(method: str) -> str:
    return method.strip("/").partition("/")[0]


def _keys_of(config: Config) -> tuple[Key, ...] | None:
    return read_keys(Path(config.auth.keys_file)) if config.wants_keys else None
