"""HTTP authentication as cameras ask for it (RFC 7616, RFC 7617), free of sockets.

One room for HTTP and RTSP: an RTSP camera's digest covers the whole address, which no HTTP
client can be asked for. Of several challenges the strongest known one is answered, digest
before basic; a nonce that the camera calls stale is no refusal.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MAX_CHALLENGE_CHARS = 4096
MAX_STALE_NONCES = 2
"""How often a camera may call a nonce stale that it gave a moment ago."""
# The strongest first. Without a name it is MD5 (RFC 2069).
_ALGORITHMS = {"SHA-512-256": "sha512_256", "SHA-256": "sha256", "MD5": "md5"}
_PIECE = re.compile(r'[\s,]*([^\s=,"]+)(?:\s*=\s*("(?:[^"\\]|\\.)*"|[^\s,"]*))?')


@dataclass(frozen=True, slots=True)
class Credentials:
    """User and password; the text form gives neither away."""

    user: str
    password: str

    def __repr__(self) -> str:
        return "Credentials(…)"


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate that a camera offers. Names are lower-case."""

    scheme: str
    parameters: Mapping[str, str]

    @property
    def algorithm(self) -> str:
        return self.parameters.get("algorithm", "MD5").upper()

    @property
    def strength(self) -> int:
        """Greater is better; 0 is not known here."""
        if self.scheme == "basic":
            return 1
        known = list(reversed(_ALGORITHMS))
        plain = self.algorithm.removesuffix("-SESS")
        if self.scheme != "digest" or plain not in known or not self.parameters.get("nonce"):
            return 0
        return 2 + known.index(plain) if self.quality is not None else 0

    @property
    def quality(self) -> str | None:
        """``auth``, the empty text of RFC 2069, or ``None``: it wants what is not known here."""
        offered = self.parameters.get("qop", "").lower().replace(",", " ").split()
        return "auth" if "auth" in offered else None if offered else ""

    @property
    def is_stale(self) -> bool:
        return self.parameters.get("stale", "").lower() == "true"


def challenges(headers: Iterable[str]) -> list[Challenge]:
    """What ``WWW-Authenticate`` headers offer: one or several a header, in their order."""
    found: list[Challenge] = []
    for header in headers:
        parameters: dict[str, str] | None = None
        for piece in _PIECE.finditer(header[:MAX_CHALLENGE_CHARS]):
            name, value = piece.group(1).lower(), piece.group(2)
            if value is None:
                parameters = {}
                found.append(Challenge(name, parameters))
            elif parameters is not None:
                if value.startswith('"'):
                    value = re.sub(r"\\(.)", r"\1", value[1:-1])
                parameters.setdefault(name, value)
    return found


class Authenticator:
    """Answers one camera's challenges. One for each connection to it.

    Cameras lock accounts after a few wrong passwords, so a password is sent once for each
    algorithm that the camera offers, and again only when the camera calls the nonce stale.
    (Some firmware offers SHA-256 and computes MD5.)
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._challenge: Challenge | None = None
        self._tried: set[tuple[str, str]] = set()
        self._stale = 0
        self._proven = False
        self._count = 0

    def accepted(self) -> None:
        """The camera has taken the password: what it refuses from now on is the nonce."""
        self._proven, self._stale = True, 0

    def take(self, offered: Iterable[Challenge]) -> bool:
        """After a 401: choose the challenge to answer from now on. False: there is no more
        to be said."""
        known = [challenge for challenge in offered if challenge.strength]
        if any(challenge.is_stale for challenge in known) or self._proven:
            self._stale += 1
            if self._stale > MAX_STALE_NONCES:
                return False
        else:
            known = [c for c in known if (c.scheme, c.algorithm) not in self._tried]
            if self._tried:  # never in clear after it went as a digest
                known = [c for c in known if c.scheme == "digest"]
        best = max(known, key=lambda challenge: challenge.strength, default=None)
        if best is None:
            return False
        self._tried.add((best.scheme, best.algorithm))
        self._challenge, self._count = best, 0
        return True

    def answer(self, method: str, uri: str) -> str | None:
        """The ``Authorization`` header for a request; ``None`` before any challenge."""
        challenge = self._challenge
        if challenge is None:
            return None
        user, password = self._credentials.user, self._credentials.password
        if challenge.scheme == "basic":
            return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self._count += 1
        return self._digest(challenge, method, uri, secrets.token_hex(8))

    def _digest(self, challenge: Challenge, method: str, uri: str, cnonce: str) -> str:
        given, count = challenge.parameters, f"{self._count:08x}"
        algorithm = _ALGORITHMS[challenge.algorithm.removesuffix("-SESS")]

        def digest(*parts: str) -> str:
            text = ":".join(parts).encode()
            return hashlib.new(algorithm, text, usedforsecurity=False).hexdigest()

        user, realm, nonce = self._credentials.user, given.get("realm", ""), given["nonce"]
        secret = digest(user, realm, self._credentials.password)
        if challenge.algorithm.endswith("-SESS"):
            secret = digest(secret, nonce, cnonce)
        request = digest(method, uri)
        fields = {"username": user, "realm": realm, "nonce": nonce, "uri": uri}
        plain: dict[str, str] = {}
        if challenge.quality:
            response = digest(secret, nonce, count, cnonce, "auth", request)
            plain = {"qop": "auth", "nc": count}
            fields["cnonce"] = cnonce
        else:
            response = digest(secret, nonce, request)
        fields["response"] = response
        if "opaque" in given:
            fields["opaque"] = given["opaque"]
        if "algorithm" in given:
            plain["algorithm"] = given["algorithm"]
        quoted = [f'{key}="{_escaped(value)}"' for key, value in fields.items()]
        header = ", ".join(quoted + [f"{key}={value}" for key, value in plain.items()])
        # Headers travel as Latin-1; the bytes are those of UTF-8, as everywhere above.
        return "Digest " + header.encode().decode("latin-1")


def _escaped(text: str) -> str:
    return re.sub(r'(["\\])', r"\\\1", text)
