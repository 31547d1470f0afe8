"""The way to a camera: credentials, and whom its certificate has to please."""

from __future__ import annotations

import os
import socket
import ssl
import urllib.parse

from facelane_bridge.config import CameraSettings
from facelane_bridge.sources.api import SourceError, SourceReason
from facelane_bridge.sources.challenge import Credentials


def load_credentials(camera: CameraSettings) -> Credentials | None:
    """``user:password`` from the variable or the file that the settings name."""
    if camera.credentials_env:
        text = os.environ.get(camera.credentials_env)
        where = f"the environment variable {camera.credentials_env}"
        if text is None:
            raise SourceError(
                SourceReason.CREDENTIALS_MISSING,
                f"{where} is not set; set it to user:password",
                permanent=True,
            )
    elif camera.credentials_file:
        where = f"the file {camera.credentials_file}"
        try:
            with open(camera.credentials_file, encoding="utf-8-sig") as file:
                text = file.read(4096)
        except (OSError, UnicodeDecodeError):
            raise SourceError(
                SourceReason.CREDENTIALS_MISSING,
                f"{where} cannot be read; it has to hold user:password",
                permanent=True,
            ) from None
    else:
        return None
    user, colon, password = text.strip("\r\n").partition(":")
    if not colon or not user:
        raise SourceError(
            SourceReason.CREDENTIALS_MISSING,
            f"{where} does not hold user:password",
            permanent=True,
        )
    return Credentials(user, password)


def trusting(camera: CameraSettings) -> ssl.SSLContext:
    """What a camera's certificate is checked against."""
    try:
        return ssl.create_default_context(cafile=camera.tls_ca_file or None)
    except (OSError, ssl.SSLError) as error:
        what = error.strerror if not isinstance(error, ssl.SSLError) else "no PEM certificate in it"
        raise SourceError(
            SourceReason.TLS_FAILED,
            f"tls_ca_file {camera.tls_ca_file} cannot be used ({what}); name a PEM file",
            permanent=True,
        ) from None


NO_SUCH_HOST = "the camera's name is not known; check its address, and this machine's DNS"


def is_known(url: str) -> bool:
    """Whether the host of an address can be looked up."""
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None)
    except (OSError, UnicodeError):
        return False
    return True


def with_userinfo(url: str, credentials: Credentials | None) -> str:
    """The address with credentials, for the library that opens it and for nobody else."""
    if credentials is None:
        return url
    scheme, rest = url.split("://", 1)
    user = urllib.parse.quote(credentials.user, safe="")
    password = urllib.parse.quote(credentials.password, safe="")
    return f"{scheme}://{user}:{password}@{rest}"
