"""The server's certificate: read and judged before anything is started.

gRPC answers every unusable certificate with "failed to bind". So the files are tried with
Python's own TLS first, which knows what is wrong with them.
"""

from __future__ import annotations

import contextlib
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

import grpc

from facelane_server.config import ConfigError, Tls, lent_hint

_EXPIRED: Final = 10
_NOT_YET_VALID: Final = 9
"""OpenSSL's X509_V_ERR_* numbers."""


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
        chain = _read("cert_file", section.cert_file, b"CERTIFICATE-----")
        key = _read("key_file", section.key_file, b"PRIVATE KEY-----")
        authority = None
        if section.client_ca_file:
            authority = _read("client_ca_file", section.client_ca_file, b"CERTIFICATE-----")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(section.cert_file, section.key_file, password=_passphrase)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                problem = "is not the key of the certificate in tls.cert_file"
            else:
                problem = f"and tls.cert_file cannot be used ({error.reason or 'damaged'})"
            raise ConfigError(f"tls.key_file {section.key_file} {problem}") from None
        except _PassphraseError:
            raise ConfigError(
                f"tls.key_file {section.key_file} is protected by a passphrase, which nobody is "
                "there to type: store it without one (openssl pkey -in OLD -out NEW), mode 0600"
            ) from None
        if section.client_ca_file:
            try:
                context.load_verify_locations(section.client_ca_file)
            except ssl.SSLError as error:
                raise ConfigError(
                    f"tls.client_ca_file {section.client_ca_file} holds no usable certificate "
                    f"({error.reason or 'damaged'})"
                ) from None
        return cls(chain, key, authority)

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(self.key, self.chain)], root_certificates=self.client_ca
        )


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


def validity(section: Tls) -> tuple[str, datetime | None]:
    """Whether clients can accept the certificate today, as far as the date goes: what is wrong
    (empty = nothing), and when it ends where that is known.

    ``section`` must be one that ``Certificates.read`` accepts.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(section.cert_file, section.key_file, password=_passphrase)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    # The certificate vouches for itself: only its dates are of interest here.
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(section.cert_file)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    try:
        for _ in range(4):  # flights of a handshake
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _EXPIRED:
            return "has expired: clients refuse it; renew it", None
        if error.verify_code == _NOT_YET_VALID:
            return "is not valid yet: is this machine's clock right?", None
        return "", None
    except ssl.SSLError:
        return "", None
    ends_at = (ends[0].getpeercert() or {}).get("notAfter")
    if not isinstance(ends_at, str):
        return "", None
    return "", datetime.fromtimestamp(ssl.cert_time_to_seconds(ends_at), UTC)


class _PassphraseError(Exception):
    pass


def _passphrase() -> str:
    raise _PassphraseError


def _read(name: str, path: str, marker: bytes) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"tls.{name} {path}: cannot be read: {error.strerror}") from None
    if marker not in content:
        kind = "private key" if b"KEY" in marker else "certificate"
        raise ConfigError(
            f"tls.{name} {path} holds no {kind} in PEM (-----BEGIN ...){lent_hint(path)}"
        )
    return content
