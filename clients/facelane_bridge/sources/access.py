"""The way to a camera: credentials, whom its certificate has to please, refusals in words."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import ssl
from collections.abc import Sequence
from typing import Any
from urllib.parse import SplitResult, quote

from facelane_bridge.camera import Outlook
from facelane_bridge.config import CameraSettings
from facelane_bridge.sources.api import SourceError, SourceReason
from facelane_bridge.sources.challenge import Credentials

MAX_CREDENTIALS_CHARS = 4096
LENT = "/run/credentials/"
NO_SUCH_HOST = "the camera's name is not known; check its address, and this machine's DNS"
_OLD = frozenset(
    {
        "TLSV1_ALERT_PROTOCOL_VERSION",
        "UNSUPPORTED_PROTOCOL",
        "DH_KEY_TOO_SMALL",
        "EE_KEY_TOO_SMALL",
        "CA_MD_TOO_WEAK",
    }
)
_UNSENDABLE = re.compile(r"[^!-~]+")
_BYTES = "surrogateescape"
"""How Python holds bytes of the command line that are no text."""
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


def host_of(parts: SplitResult, *, zone: bool = True) -> str:
    """The host of an address, as sockets take it: the zone of a link-local one is written
    ``%25eth0`` in addresses (RFC 6874), or plainly ``%eth0``. Without its ``zone``, which is this
    machine's alone, as others are told it."""
    host = (parts.hostname or "").replace("%25", "%")
    return host if zone else host.partition("%")[0]


def as_sent(text: str, encoding: str = "utf-8") -> str:
    """An address, or its path, as it can stand in a request: spaces and letters beyond ASCII, which
    people write there and cameras redirect to, are escaped, and what is escaped stays as it is."""
    return _UNSENDABLE.sub(lambda found: quote(found[0], encoding=encoding, errors=_BYTES), text)


def load_credentials(camera: CameraSettings) -> Credentials | None:
    """``user:password`` from the variable or the file that the settings name."""
    if camera.credentials_env:
        text = os.environ.get(camera.credentials_env)
        where = f"the environment variable {camera.credentials_env}"
        if text is None:
            raise _missing(f"{where} is not set; set it to user:password")
    elif camera.credentials_file:
        where = f"the file {camera.credentials_file}"
        try:
            with open(camera.credentials_file, encoding="utf-8-sig") as file:
                text = file.read(MAX_CREDENTIALS_CHARS)
        except (OSError, UnicodeDecodeError):
            told = "it has to hold user:password"
            if camera.credentials_file.startswith(LENT):
                told = "systemd lends it to the running service alone; its log says more"
            raise _missing(f"{where} cannot be read; {told}") from None
    else:
        return None
    user, colon, password = text.strip("\r\n").partition(":")
    if not colon or not user:
        raise _missing(f"{where} does not hold user:password")
    return Credentials(user, password)


def _missing(message: str) -> SourceError:
    return SourceError(SourceReason.CREDENTIALS_MISSING, message, Outlook.HOPELESS)


def refused(
    camera: CameraSettings, status: int, *, answered: bool, asked_for: Sequence[str] = ()
) -> SourceError:
    """What a 401 or 403 means. ``answered``: it came after the password was sent;
    ``asked_for``: the schemes of its challenges."""
    named = bool(camera.credentials_env or camera.credentials_file)
    if status == 403:
        message = "the camera refuses access (403): it starts, is busy, or bars this account"
        outlook = Outlook.SELDOM if answered else Outlook.PASSING
    elif answered:
        message, outlook = "the camera refuses the credentials; check them", Outlook.REFUSED
    elif not asked_for:
        message = "the camera refuses access (401) and asks for no password; it may still start"
        outlook = Outlook.PASSING
    elif not named:
        message = (
            "the camera asks for credentials; name them with credentials_env or credentials_file"
        )
        outlook = Outlook.UNPROVEN
    else:
        message = (
            f"the camera asks for an authentication that is not known here "
            f"({', '.join(asked_for)[:60]}); set it to digest or to basic"
        )
        outlook = Outlook.UNPROVEN
    return SourceError(SourceReason.AUTHENTICATION_FAILED, message, outlook)


# --- certificates ---------------------------------------------------------------------


class _PinnedContext(ssl.SSLContext):
    """Trusts certificates by their SHA-256 alone, whatever they say and whoever signed them."""

    pins: frozenset[bytes] = frozenset()

    def wrap_socket(self, sock: socket.socket, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        wrapped = super().wrap_socket(sock, *arguments, **options)
        certificate = wrapped.getpeercert(binary_form=True) or b""
        if hashlib.sha256(certificate).digest() not in self.pins:
            wrapped.close()
            raise ssl.SSLCertVerificationError("another certificate than the one that is pinned")
        return wrapped


class Trust:
    """Whom a camera's certificate has to please: one opening's way through the settings.

    A pinned fingerprint alone, or an authority and the name. Where the name does not match,
    the very certificate in ``tls_ca_file`` is enough: ``fall_back``, and connect again.
    """

    def __init__(self, camera: CameraSettings, *, verify: bool = True) -> None:
        self._camera = camera
        self._verify = verify
        self._pins = frozenset[bytes]()
        if camera.tls_fingerprint:
            self._pins = frozenset([bytes.fromhex(fingerprint_digits(camera.tls_fingerprint))])

    def fall_back(self) -> bool:
        """After the certificate was not trusted: whether there is another way."""
        if self._pins or not self._camera.tls_ca_file:
            return False
        with open(self._camera.tls_ca_file, encoding="utf-8-sig", errors="replace") as file:
            found = _PEM.findall(file.read())
        self._pins = frozenset(
            hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).digest() for pem in found
        )
        return bool(self._pins)

    def context(self) -> ssl.SSLContext:
        """What to connect with. Raises ``SourceError``."""
        if self._pins or not self._verify:
            context = _PinnedContext(ssl.PROTOCOL_TLS_CLIENT) if self._pins else _anything()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            # Who the camera is does not hang on it: firmware of 2012 speaks TLS 1.0, if any.
            context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
            context.set_ciphers("DEFAULT:@SECLEVEL=0")
            if isinstance(context, _PinnedContext):
                context.pins = self._pins
            return context
        try:
            return ssl.create_default_context(cafile=self._camera.tls_ca_file or None)
        except (OSError, ssl.SSLError) as error:
            what = "no PEM certificate in it" if isinstance(error, ssl.SSLError) else error.strerror
            raise SourceError(
                SourceReason.TLS_FAILED,
                f"tls_ca_file {self._camera.tls_ca_file} cannot be used ({what}); name a PEM file",
                Outlook.HOPELESS,
            ) from None


def _anything() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def fingerprint_digits(text: str) -> str:
    """The hexadecimal digits of a fingerprint as people write it."""
    return re.sub(r"[^0-9a-f]", "", re.sub(r"^sha-?256", "", text.lower()))


def untrusted(camera: CameraSettings, error: BaseException) -> SourceError:
    """Why there is no TLS with the camera: its name, its signer or something else."""
    code = getattr(error, "verify_code", None)
    if camera.tls_fingerprint:
        message = "the camera's certificate is not the one that tls_fingerprint names"
    elif code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
        message = (
            "the camera's certificate is made out to another name than its address; set "
            "tls_server_name to that name, or tls_fingerprint to its SHA-256 fingerprint"
        )
    elif code in (9, 10):  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
        message = (
            "the camera's certificate has expired or is not valid yet; check the clocks of the "
            "camera and of this machine, or set tls_fingerprint"
        )
    elif isinstance(error, ssl.SSLCertVerificationError):
        message = (
            "the camera's certificate is not trusted; name its authority, or the certificate "
            "itself, in tls_ca_file, or its SHA-256 in tls_fingerprint"
        )
    elif getattr(error, "reason", None) in _OLD:
        message = (
            "the camera speaks TLS older than 1.2, or with keys that are too short: update its "
            "firmware, or set tls_fingerprint, which takes it all the same"
        )
    else:
        message = "the camera and this machine find no common TLS; is it a TLS port?"
    return SourceError(SourceReason.TLS_FAILED, message)
