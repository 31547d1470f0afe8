"""Who may call what: bearer keys with scopes, checked before a handler sees a byte.

Only hashes of keys are stored. Health and reflection need any valid key off loopback;
``admin`` implies the other scopes.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import grpc
import msgspec
import structlog

from facelane_server.config import Config, ConfigError, lent_hint
from facelane_server.domain import FacelaneError, Reason
from facelane_server.edge import errors
from facelane_server.naming import NAME, is_name

log = structlog.get_logger(__name__)

Scope = Literal["analyze", "gallery", "admin"]

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


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One key. ``sha256``: hex digest of the secret."""

    name: Annotated[str, msgspec.Meta(pattern=NAME)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...]


class KeysFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[Key, ...] = ()


def new_key(name: str, scopes: tuple[Scope, ...]) -> tuple[str, str]:
    """A fresh secret and the TOML entry that admits it. Raises ``ValueError`` for a name that
    the file cannot hold."""
    if not is_name(name):
        raise ValueError("a name has 1-64 of the characters A-Z a-z 0-9 . _ -")
    secret = f"flk_{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(secret.encode()).hexdigest()
    listed = ", ".join(f'"{scope}"' for scope in scopes)
    return secret, f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\nscopes = [{listed}]\n'


def read_keys(path: Path, *, may_be_empty: bool = False) -> tuple[Key, ...]:
    """The keys of a file. Raises ``ConfigError``."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        keys = msgspec.convert(raw, KeysFile).keys
    except OSError as error:
        raise ConfigError(f"auth.keys_file {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"auth.keys_file {path}: {error}") from None
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

    def _named_by(self, secret: str) -> Key | None:
        digest = hashlib.sha256(secret.encode()).hexdigest()
        granted: Key | None = None
        for key in self._keys or ():  # all of them: the time tells nothing
            if hmac.compare_digest(key.sha256, digest):
                granted = key
        return granted

    def may_read_gallery(self, context: grpc.aio.ServicerContext[Any, Any]) -> bool:
        """Whether a call may be told what the gallery says of people besides their ids."""
        if self._keys is None:
            return True
        metadata = dict(context.invocation_metadata() or ())
        secret = str(metadata.get("authorization", "")).partition(" ")[2]
        key = self._named_by(secret)
        return key is not None and not {"gallery", "admin"}.isdisjoint(key.scopes)

    def check(self, method: str, metadata: dict[str, str]) -> None:
        """Raises ``FacelaneError`` unless the call may go on. Who administers is logged."""
        if self._keys is None:
            return
        scheme, _, secret = metadata.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise FacelaneError(
                Reason.UNAUTHENTICATED,
                "this server needs a key: send `authorization: Bearer <key>` metadata",
            )
        granted = self._named_by(secret)
        if granted is None:
            raise FacelaneError(Reason.UNAUTHENTICATED, "the key is not known to this server")
        service = method.strip("/").partition("/")[0]
        scope = _SCOPES.get(service, "admin")
        if scope is not None and scope not in granted.scopes and "admin" not in granted.scopes:
            raise FacelaneError(
                Reason.PERMISSION_DENIED,
                f"the key `{granted.name}` lacks the `{scope}` scope; ask for a key that has it",
                metadata={"scope": scope},
            )
        if scope == "admin":
            log.info("administered", method=method, key=granted.name)


def _keys_of(config: Config) -> tuple[Key, ...] | None:
    return read_keys(Path(config.auth.keys_file)) if config.wants_keys else None


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Refuses calls before their handlers run."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not self._authenticator.required:
            return handler
        metadata = {
            key: value
            for key, value in handler_call_details.invocation_metadata or ()
            if isinstance(value, str)
        }
        try:
            self._authenticator.check(handler_call_details.method, metadata)
        except FacelaneError as error:
            log.warning(
                "call refused", method=handler_call_details.method, reason=error.reason.value
            )
            return _refusing(handler, error)
        return handler


def _refusing(handler: Any, error: FacelaneError) -> Any:
    """A handler of the same kind that ends the call at once."""

    async def refuse(_request: Any, context: Any) -> None:
        await errors.abort(context, error)

    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = kinds[handler.request_streaming, handler.response_streaming]
    return make(
        refuse,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
