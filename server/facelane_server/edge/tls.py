"""The server's certificate: read and judged before anything is started.

gRPC answers every unusable certificate with "failed to bind". So the files are read here first,
in words that say what is wrong with them.
"""

from __future__ import annotations

import codecs
import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import grpc

from facelane_server.addresses import lent_hint
from facelane_server.config import ConfigError, Tls
from facelane_server.edge.auth import NO_PEER, Peer
from facelane_server.edge.errors import Context

if TYPE_CHECKING:
    from cryptography import x509


@dataclass(frozen=True, slots=True)
class Certificates:
    """What the server shows, and whom it believes. PEM; equal when nothing has changed."""

    chain: bytes
    key: bytes
    client_ca: bytes | None = None

    @classmethod
    def read(cls, section: Tls) -> Self | None:
        """Those that the configuration names; None = no TLS. Raises ``ConfigError``."""
        if not section.cert_file:
            return None
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        chain = _read("cert_file", section.cert_file, b"CERTIFICATE-----")
        key = _read("key_file", section.key_file, b"PRIVATE KEY-----")
        own = _parse("cert_file", section.cert_file, chain)
        try:
            private = load_pem_private_key(key, password=None)
        except TypeError:
            raise ConfigError(
                f"tls.key_file {section.key_file} is protected by a passphrase, which nobody is "
                "there to type: store it without one (openssl pkey -in OLD -out NEW), mode 0600"
            ) from None
        except Exception as error:  # the library raises several kinds, its own among them
            raise ConfigError(f"tls.key_file {section.key_file} cannot be used ({error})") from None
        if private.public_key() != own.public_key():
            raise ConfigError(
                f"tls.key_file {section.key_file} is not the key of the certificate in "
                "tls.cert_file"
            )
        authority = None
        if section.client_ca_file:
            authority = _read("client_ca_file", section.client_ca_file, b"CERTIFICATE-----")
            _parse("client_ca_file", section.client_ca_file, authority)
        return cls(chain, key, authority)

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(self.key, self.chain)], root_certificates=self.client_ca
        )

    def facts(self) -> Facts:
        """What clients will judge the certificate by."""
        return Facts.of(_parse("cert_file", "", self.chain))


@dataclass(frozen=True, slots=True)
class Facts:
    """``names``: DNS names and addresses that the certificate is for; clients of today look at
    no other place (RFC 9525)."""

    begins: datetime
    ends: datetime
    names: tuple[str, ...]

    @classmethod
    def of(cls, certificate: x509.Certificate) -> Self:
        from cryptography import x509

        names: tuple[str, ...] = ()
        try:
            found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except x509.ExtensionNotFound:
            pass
        else:
            addresses = found.value.get_values_for_type(x509.IPAddress)
            names = (*found.value.get_values_for_type(x509.DNSName), *map(str, addresses))
        return cls(certificate.not_valid_before_utc, certificate.not_valid_after_utc, names)

    @property
    def problem(self) -> str:
        """Why no client can accept it today; empty = nothing."""
        now = datetime.now(UTC)
        if now > self.ends:
            return "has expired: clients refuse it; renew it"
        if now < self.begins:
            return "is not valid yet: is this machine's clock right?"
        return ""

    def covers(self, host: str) -> bool:
        """Whether a client that connects to ``host`` (a name or an address) finds it here."""
        try:
            return str(ipaddress.ip_address(host)) in self.names
        except ValueError:
            pass
        host = host.lower().rstrip(".")
        wild = "*." + host.partition(".")[2]
        return any(name.lower() in (host, wild) for name in self.names)


class Presented:
    """The certificates that a running server presents; renewed ones can take their place.

    Connections that are open go on with those that they were opened with.
    """

    def __init__(self, first: Certificates) -> None:
        self.current = first
        self._told = first

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self.current.configuration(),
            self._renewed,  # type: ignore[arg-type]  # None is allowed, says gRPC's documentation
            require_client_authentication=self.current.client_ca is not None,
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        # gRPC asks at every handshake, on a thread of its own; None = the same as before.
        current = self.current
        if current is self._told:
            return None
        self._told = current
        return current.configuration()


def peer_of(context: Context) -> Peer:
    """What the client's certificate says, which gRPC has verified against ``client_ca_file``;
    nothing where it showed none."""
    shown = context.auth_context()
    pem = next(iter(shown.get("x509_pem_cert", ())), b"")
    if not pem:
        return NO_PEER
    names = tuple(n.decode("utf-8", "replace") for n in shown.get(_SAN, ()))
    try:
        return Peer(names, _ends(pem))
    except ValueError:  # gRPC's library takes more than ours can read: when it ends is not known
        return NO_PEER


_SAN: Final = "x509_subject_alternative_name"


@lru_cache(maxsize=256)
def _ends(pem: bytes) -> datetime:
    from cryptography import x509

    return x509.load_pem_x509_certificate(pem).not_valid_after_utc


def _parse(name: str, path: str, content: bytes) -> x509.Certificate:
    """The first certificate of a file."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(content)[0]
    except ValueError:
        raise ConfigError(f"tls.{name} {path} holds no usable certificate (damaged)") from None


def _read(name: str, path: str, marker: bytes) -> bytes:
    try:
        # A byte order mark would hide the first line from gRPC.
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ConfigError(f"tls.{name} {path}: cannot be read: {error.strerror}") from None
    if marker not in content:
        kind = "private key" if b"KEY" in marker else "certificate"
        raise ConfigError(
            f"tls.{name} {path} holds no {kind} in PEM (-----BEGIN ...){lent_hint(path)}"
        )
    return content
