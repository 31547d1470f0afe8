"""Who calls: bearer keys and client certificates, their roles, and those who are denied.

The keys file holds ``[[roles]]`` (``edge/roles.py``), ``[[keys]]`` and ``[[certificates]]``. Of
keys only hashes are stored. A second file, one word a line, names who is denied whatever the
first one says; it is looked at even while nothing else can be read.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import re
import secrets
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import msgspec
import structlog

from facelane_server.addresses import lent_hint
from facelane_server.config import Config, ConfigError
from facelane_server.domain import FacelaneError, Reason
from facelane_server.edge.roles import (
    ANYBODY,
    DEFAULT_WEIGHT,
    METHODS,
    Caller,
    Grant,
    Pattern,
    Role,
    Scope,
)
from facelane_server.naming import NAME, hint, is_name

log = structlog.get_logger(__name__)

MIN_HASH_CHARS: Final = 12
"""So many digits of a key's hash name it in the list of those who are denied."""

Name = Annotated[str, msgspec.Meta(pattern=NAME)]
Weight = Annotated[int, msgspec.Meta(ge=1, le=100)]
Streams = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One key. ``sha256``: hex digest of the secret. ``roles``: of the file's ``[[roles]]``;
    ``scopes``: what keys had before there were roles. ``sources``, ``galleries``: where it counts,
    whatever its roles say, shell patterns such as ``door-*``; empty = as the roles say.
    ``weight``: its share of the pools beside other keys. ``streams``: how many it may have open,
    instead of ``quotas.streams``."""

    name: Name
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...] = ()
    sources: tuple[Pattern, ...] = ()
    galleries: tuple[Pattern, ...] = ()
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    weight: Weight = DEFAULT_WEIGHT
    streams: Streams | None = None
    roles: tuple[Name, ...] = ()

    @property
    def expired(self) -> bool:
        return self.expires is not None and datetime.now(UTC) >= self.expires

    def caller(self, roles: Mapping[str, Role] | None = None) -> Caller:
        """Whoever shows it. ``roles`` by name; all that it has must be among them."""
        own = {"galleries": self.galleries, "sources": self.sources}
        grants = [Grant.of((roles or {})[name], **own) for name in self.roles]
        if self.scopes:
            grants.append(Grant.of_scopes(self.scopes, **own))
        return Caller(
            self.name, tuple(grants), self.weight, self.streams, self.expires, self.sha256
        )

    def entry(self) -> str:
        """As the keys file has it."""

        def listed(values: tuple[str, ...]) -> str:
            return "[" + ", ".join(f'"{value}"' for value in values) + "]"

        lines = [f'name = "{self.name}"', f'sha256 = "{self.sha256}"']
        fields = ("roles", "scopes", "sources", "galleries")
        lines += [f"{n} = {listed(v)}" for n in fields if (v := getattr(self, n))]
        if self.expires is not None:
            lines.append(f"expires = {self.expires:%Y-%m-%dT%H:%M:%SZ}")
        if self.weight != DEFAULT_WEIGHT:
            lines.append(f"weight = {self.weight}")
        if self.streams is not None:
            lines.append(f"streams = {self.streams}")
        return "\n".join(["[[keys]]", *lines, ""])


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Client certificates that count as identities. ``san``: one of the alternative names in
    the certificate (DNS name, address, URI or e-mail), or a pattern of them. What the
    certificate's authority is worth, its names are."""

    name: Name
    san: Pattern
    roles: tuple[Name, ...]
    weight: Weight = DEFAULT_WEIGHT
    streams: Streams | None = None


class KeysFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    roles: tuple[Role, ...] = ()
    keys: tuple[Key, ...] = ()
    certificates: tuple[Certificate, ...] = ()

    @property
    def by_name(self) -> dict[str, Role]:
        return {role.name: role for role in self.roles}

    def problem(self) -> str:
        """What does not fit together; empty = nothing."""
        names = [role.name for role in self.roles]
        for name in names:
            if names.count(name) > 1:
                return f"there are two roles `{name}`"
        holders: tuple[Key | Certificate, ...] = (*self.keys, *self.certificates)
        for holder in holders:
            for name in holder.roles:
                if name not in names:
                    return (
                        f"`{holder.name}` has the role `{name}`, which is not among [[roles]]: "
                        f"{hint(name, names, label='there are')}"
                    )
        return ""


@dataclass(frozen=True, slots=True)
class Peer:
    """What a connection showed. ``names``: the alternative names of a client certificate that
    the TLS layer has verified. ``until``: when it ends."""

    names: tuple[str, ...] = ()
    until: datetime | None = None


NO_PEER: Final = Peer()


def new_key(
    name: str,
    scopes: tuple[Scope, ...],
    *,
    roles: tuple[str, ...] = (),
    sources: tuple[str, ...] = (),
    galleries: tuple[str, ...] = (),
    expires: datetime | None = None,
) -> tuple[str, Key]:
    """A fresh secret and the key that admits it. Raises ``ValueError`` for what the keys file
    cannot hold."""
    if not all(is_name(word) for word in (name, *roles)):
        raise ValueError("a name has 1-64 of the characters A-Z a-z 0-9 . _ -")
    for pattern in (*sources, *galleries):
        if not pattern.isprintable() or set('"\\') & set(pattern) or not 1 <= len(pattern) <= 128:
            raise ValueError("a source or gallery has 1-128 characters; * stands for any of them")
    secret = f"flk_{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return secret, Key(name, digest, scopes, sources, galleries, expires, roles=roles)


def read_file(path: Path, *, may_be_empty: bool = False) -> KeysFile:
    """Keys, certificates and roles of a file. Raises ``ConfigError``."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        found = msgspec.convert(raw, KeysFile)
    except OSError as error:
        raise ConfigError(f"auth.keys_file {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"auth.keys_file {path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"auth.keys_file {path}: nested too deeply") from None
    except ValueError:
        raise ConfigError(f"auth.keys_file {path}: a number of too many digits") from None
    if problem := found.problem():
        raise ConfigError(f"auth.keys_file {path}: {problem}")
    if not (found.keys or found.certificates or may_be_empty):
        raise ConfigError(
            f"auth.keys_file {path} holds no keys{lent_hint(str(path))}; add one with "
            "`facelane-server keys new`"
        )
    return found


def read_keys(path: Path, *, may_be_empty: bool = False) -> tuple[Key, ...]:
    """The keys of a file. Raises ``ConfigError``."""
    return read_file(path, may_be_empty=may_be_empty).keys


def denied_file(config: Config) -> Path | None:
    """Where those who are denied are listed; None = nobody has to show anything."""
    named = config.auth.denied_file or (config.auth.keys_file and f"{config.auth.keys_file}.denied")
    return Path(named) if named else None


class Denied:
    """Who is let in nowhere: names, hashes of keys (or their first twelve digits) and names in
    certificates, one a line; ``#`` begins a remark.

    Nothing in the file can be wrong in a way that would hide its other lines.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._words: frozenset[str] = frozenset()
        self._seen: tuple[int, ...] | None = None
        self.reload()

    def reload(self) -> bool:
        """Reads the list again; whether it says something else now. One that cannot be read
        leaves the words that were known; one that is absent is empty."""
        before = self._words
        if self._path is None:
            return False
        try:
            status = self._path.stat()
            seen = (status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns)
            if seen == self._seen:
                return False
            text = self._path.read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            seen, text = None, ""
        except OSError as error:
            if self._seen != ():
                log.error("the list of denied keys cannot be read", problem=error.strerror)
            self._seen = ()
            return False
        self._seen = seen
        lines = (
            line.partition("#")[0].strip(" \t\f\v\ufeff\0\"',")
            for line in re.split(r"[\r\n]", text)
        )
        self._words = frozenset(line.casefold() for line in lines if line)
        return self._words != before

    def has(self, name: str, proof: str, others: Sequence[str] = ()) -> bool:
        if not self._words:
            return False
        if any(word.casefold() in self._words for word in (name, proof, *others) if word):
            return True
        return any(
            len(word) >= MIN_HASH_CHARS and proof.startswith(word)
            for word in self._words
            if re.fullmatch(r"[0-9a-f]+", word)
        )


class Authenticator:
    """Keys, certificates and roles in force. ``reload`` swaps them while the server runs.

    ``counts``: calls by (name, verb, whether it was let in).
    """

    def __init__(
        self,
        keys: tuple[Key, ...] | None,
        *,
        roles: Sequence[Role] = (),
        certificates: Sequence[Certificate] = (),
        denied: Path | None = None,
    ) -> None:
        self._denied = Denied(denied)
        self.counts: Counter[tuple[str, str, bool]] = Counter()
        self._take(None if keys is None else KeysFile(tuple(roles), keys, tuple(certificates)))

    @classmethod
    def of(cls, config: Config) -> Authenticator:
        found = _file_of(config)
        if found is None:
            return cls(None)
        made = cls(
            found.keys,
            roles=found.roles,
            certificates=found.certificates,
            denied=denied_file(config),
        )
        if old := sorted({key.name for key in found.keys if key.scopes}):
            log.warning(
                "keys with scopes of before there were roles; docs/roles.md says which verbs "
                "they stand for, and `facelane-server keys list` for each key",
                keys=old,
            )
        return made

    def reload(self, config: Config) -> None:
        self._take(_file_of(config))

    def reload_denied(self) -> bool:
        """Whether others are denied now than before."""
        return self._denied.reload()

    def _take(self, found: KeysFile | None) -> None:
        self._keys: dict[str, Caller] | None = None
        self._certificates: tuple[tuple[str, Caller], ...] = ()
        if found is not None:
            roles = found.by_name
            self._keys = {key.sha256: key.caller(roles) for key in found.keys}
            self._certificates = tuple(
                (
                    one.san,
                    Caller(
                        one.name,
                        tuple(Grant.of(roles[name]) for name in one.roles),
                        one.weight,
                        one.streams,
                    ),
                )
                for one in found.certificates
            )

    @property
    def required(self) -> bool:
        return self._keys is not None

    @property
    def callers(self) -> frozenset[Caller]:
        """All whom it knows, by key or certificate."""
        certified = (caller for _, caller in self._certificates)
        return frozenset((*(self._keys or {}).values(), *certified))

    @property
    def wants_peers(self) -> bool:
        """Whether it matters which certificate a client has."""
        return bool(self._certificates)

    def check(self, method: str, metadata: Mapping[str, str], peer: Peer = NO_PEER) -> Caller:
        """Who calls: by its key, or, where none is sent, by its certificate. Raises
        ``FacelaneError`` unless the call may go on. Who administers is logged."""
        if self._keys is None:
            return ANYBODY
        name, verb = "", _verb(method)
        try:
            caller = self._known(metadata, peer)
            name = caller.name
            _let_in(method, caller)
        except FacelaneError:
            self.counts[name, verb, False] += 1
            raise
        self.counts[name, verb, True] += 1
        if verb == "admin":
            log.info("administered", method=method, key=caller.name)
        return caller

    def recheck(self, method: str, caller: Caller, peer: Peer = NO_PEER) -> None:
        """Whether a call that was let in may go on. Raises ``FacelaneError`` unless it may."""
        if self._keys is None:
            return
        if not caller.known:
            raise FacelaneError(Reason.UNAUTHENTICATED, "this server needs a key now")
        if caller.proof in self._keys:
            now = self._by_key(caller.proof, peer.names)
        else:
            now = self._by_certificate(peer)
        _let_in(method, now)
        if not now.at_least(caller):
            raise FacelaneError(
                Reason.PERMISSION_DENIED, "the key was changed; call again with what it may now"
            )

    def _known(self, metadata: Mapping[str, str], peer: Peer) -> Caller:
        scheme, _, secret = metadata.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and secret:
            return self._by_key(hashlib.sha256(secret.encode()).hexdigest(), peer.names)
        if scheme or not self._certificates:
            raise FacelaneError(
                Reason.UNAUTHENTICATED,
                "this server needs a key: send `authorization: Bearer <key>` metadata",
            )
        return self._by_certificate(peer)

    def _by_key(self, digest: str, also: Sequence[str] = ()) -> Caller:
        granted: Caller | None = None
        for known, caller in (self._keys or {}).items():  # all of them: the time tells nothing
            if hmac.compare_digest(known, digest):
                granted = caller
        if granted is None:
            raise FacelaneError(Reason.UNAUTHENTICATED, "the key is not known to this server")
        return self._good(granted, "key", also)

    def _by_certificate(self, peer: Peer) -> Caller:
        """By the first entry of the file that one of its names fits."""
        for pattern, caller in self._certificates:
            for name in peer.names:
                if fnmatch.fnmatchcase(name, pattern):
                    return self._good(
                        replace(caller, proof=name, expires=peer.until), "certificate", peer.names
                    )
        raise FacelaneError(
            Reason.UNAUTHENTICATED,
            "this server needs a key (`authorization: Bearer <key>` metadata) or a client "
            "certificate that it knows",
        )

    def _good(self, caller: Caller, what: str, also: Sequence[str]) -> Caller:
        if self._denied.has(caller.name, caller.proof, also):
            raise FacelaneError(
                Reason.UNAUTHENTICATED, f"the {what} `{caller.name}` is denied; ask for a new one"
            )
        if caller.expired:
            raise FacelaneError(
                Reason.UNAUTHENTICATED,
                f"the {what} `{caller.name}` has expired; ask for a new one",
            )
        return caller


def _verb(method: str) -> str:
    rule = METHODS.get(method)
    return "none" if rule is None else rule.verb or "any"


def _let_in(method: str, caller: Caller) -> None:
    rule = METHODS.get(method)
    if rule is None:
        raise FacelaneError(Reason.PERMISSION_DENIED, "this method is for nobody")
    if rule.verb is not None and not caller.may(rule.verb):
        raise FacelaneError(
            Reason.PERMISSION_DENIED,
            f"the key `{caller.name}` lacks `{rule.verb}`; ask for a key with a role that has it",
            metadata={"scope": rule.verb, "key": caller.name},
        )


def _file_of(config: Config) -> KeysFile | None:
    if not config.wants_keys:
        return None
    found = read_file(Path(config.auth.keys_file))
    if found.certificates and not config.tls.client_ca_file:
        raise ConfigError(
            f"auth.keys_file {config.auth.keys_file} has [[certificates]], for which "
            "tls.client_ca_file must name the authority that they are of"
        )
    return found
