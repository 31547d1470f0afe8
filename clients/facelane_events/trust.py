"""Whom a broker's certificate has to please: an authority, or its fingerprint alone."""

from __future__ import annotations

import hashlib
import ssl
from typing import Any


def context(tls_ca: str, tls_fingerprint: str) -> ssl.SSLContext:
    """What to connect with. Raises OSError."""
    pinned = bytes.fromhex(tls_fingerprint.replace(":", ""))

    def check(shown: ssl.SSLSocket | ssl.SSLObject) -> None:
        certificate = shown.getpeercert(binary_form=True) or b""
        if pinned and hashlib.sha256(certificate).digest() != pinned:
            raise ssl.SSLCertVerificationError("another certificate than the one that is pinned")

    class Socket(ssl.SSLSocket):
        def do_handshake(self, *arguments: Any, **options: Any) -> None:
            try:
                super().do_handshake(*arguments, **options)
                check(self)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except OSError:
                self.close()  # which the MQTT library would leave to the garbage collection
                raise

    class Object(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            check(self)

    if pinned:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Nobody else can have the certificate with this sum, whatever it says.
        made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    else:
        made = ssl.create_default_context(cafile=tls_ca or None)
    made.sslsocket_class, made.sslobject_class = Socket, Object
    return made
