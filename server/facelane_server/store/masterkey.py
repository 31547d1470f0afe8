"""Where the master key is: a file, a systemd credential, an environment variable, a command.

It is the one secret that the store does not hold: without it nothing in the store can be read.
A key is 64 hexadecimal digits. The source may give several, one a line: the first one locks, the
others only open, which is how a key is rotated while every process goes on.
"""

from __future__ import annotations

import binascii
import codecs
import contextlib
import os
import re
import shlex
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Final

import structlog

from facelane_server.addresses import LENT
from facelane_server.config import ConfigError
from facelane_server.store import envelope
from facelane_server.store.envelope import Lock
from facelane_server.wiping import Fleeting, wipe

COMMAND_TIMEOUT_S: Final = 20.0
FILE_NAME: Final = "master.key"
"""Beside the store, where ``store.master_key`` says nothing."""

_WORD: Final = re.compile(rb"\S+")

log = structlog.get_logger(__name__)


class Source:
    """``store.master_key``: ``file:PATH``, ``credential:NAME`` (of systemd, in
    $CREDENTIALS_DIRECTORY), ``env:NAME``, ``command:PROGRAM ARGUMENTS``, or empty: a file
    beside the store, which is made when it is needed first."""

    def __init__(self, setting: str, beside: Path) -> None:
        """Raises ``ConfigError`` for a setting of no such form."""
        self._kind, _, self._what = setting.partition(":")
        self.made_here = not setting
        if self.made_here:
            self._kind, self._what = "file", str(beside / FILE_NAME)
        if self._kind not in ("file", "credential", "env", "command") or not self._what:
            raise ConfigError(
                "store.master_key: write file:PATH, credential:NAME, env:NAME or "
                "command:PROGRAM ARGUMENTS"
            )

    @property
    def name(self) -> str:
        """As it is called in messages."""
        return f"{self._kind} {self._what.split()[0] if self._kind == 'command' else self._what}"

    @property
    def path(self) -> Path | None:
        """The file, where it is one."""
        if self._kind == "file":
            return Path(self._what)
        folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
        return Path(folder) / self._what if self._kind == "credential" and folder else None

    @property
    def elsewhere(self) -> str:
        """Why a service may have it and this process has it not; "" where that cannot be."""
        if self._kind == "env" and self._what not in os.environ:
            return f"${self._what} is not set here: the running service needs it in its environment"
        path = self.path
        lent = self._kind == "credential" and path is None
        if path is not None and str(path).startswith(LENT):
            lent = not os.access(path, os.R_OK)
        if lent:
            return "systemd lends it to the running service alone: not looked at"
        return ""

    def read(self) -> tuple[Lock, ...]:
        """The keys, the one that locks first; empty where the file is absent that facelane makes
        itself. Raises ``ConfigError``, which never holds what was read."""
        if self.made_here and not Path(self._what).exists():
            return ()
        words = _words(self._content())
        if not words or not all(re.fullmatch(rb"[0-9A-Fa-f]{64}", word) for word in words):
            raise ConfigError(
                f"store.master_key: {self.name} does not hold 64 hexadecimal digits a line; make "
                "a key with `openssl rand -hex 32`"
            )
        return tuple(Lock.taking(binascii.unhexlify(word)) for word in words)

    def make(self) -> tuple[Lock, ...]:
        """A first key, in the file beside the store (mode 0600)."""
        path = Path(self._what)
        key = envelope.new_key()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with open(path, "xb", buffering=0, opener=_private) as stream:
                stream.write(_hexadecimal(key))
                stream.write(b"\n")
                os.fsync(stream.fileno())
        except FileExistsError:  # another shard was first
            return self.read()
        except OSError as error:
            raise ConfigError(f"store.master_key: {path}: {error.strerror}") from None
        log.warning(
            "a master key was made, without which nothing in the store can be read: keep a copy "
            "of it away from the store's backups, and better move it to where a thief of this "
            "disk has it not (store.master_key: a systemd credential, which a TPM can seal, "
            "an environment variable, a command); see docs/privacy.md",
            file=str(path),
        )
        return (Lock.taking(key),)

    def rotate(self, in_use: Collection[str]) -> bool:
        """One step of a rotation, in the file: a fresh key before the one that is there (True);
        or, where ``in_use`` (names of the keys that lock the store) is the first one alone, the
        others out of it (False). Raises ``ConfigError`` where it is no file, and where the
        store has not taken the first one over."""
        if self._kind != "file":
            raise ConfigError(
                f"store.master_key is {self.name}, which is not facelane's to write: have it give "
                "a fresh key (`openssl rand -hex 32`) and the old one below it, reload the "
                "server, then take the old one away"
            )
        path, locks = Path(self._what), self.read()
        words = _words(self._content())
        fresh = len(words) == 1
        if not fresh and set(in_use) != {locks[0].name}:
            raise ConfigError(
                "the store is still locked by an older key: reload the server (SIGHUP) or start "
                "it once, then call this again"
            )
        kept = [_hexadecimal(envelope.new_key()), *words] if fresh else words[:1]
        new = path.with_name(f".{path.name}.new")
        try:
            status = path.stat()
            with open(new, "wb", buffering=0, opener=_private) as stream:
                for word in kept:
                    stream.write(word)
                    stream.write(b"\n")
                if os.geteuid() == 0:
                    os.fchown(stream.fileno(), status.st_uid, status.st_gid)
                os.fsync(stream.fileno())
            # Its blocks are overwritten once the new file stands in its place, not before.
            with contextlib.ExitStack() as stack:
                old = stack.enter_context(open(path, "r+b"))
                new.replace(path)
                if not fresh:
                    old.write(bytes(status.st_size))
                    old.flush()
                    os.fsync(old.fileno())
        except OSError as error:
            new.unlink(missing_ok=True)
            raise ConfigError(f"store.master_key: {path}: {error.strerror}") from None
        return fresh

    def _content(self) -> bytes:
        """The caller's alone."""
        if self._kind == "env":
            return os.environ.get(self._what, "").encode("ascii", "replace")
        if self._kind == "command":
            return self._ask()
        path = self.path
        if path is None:
            raise ConfigError(
                "store.master_key: $CREDENTIALS_DIRECTORY is not set: systemd sets it for services "
                "with LoadCredential= or LoadCredentialEncrypted="
            )
        try:
            if self._kind == "file" and path.stat().st_mode & 0o077:
                raise ConfigError(f"store.master_key: {path} is readable by others: chmod 600")
            return path.read_bytes()
        except OSError as error:
            raise ConfigError(f"store.master_key: {path}: {error.strerror}") from None

    def _ask(self) -> bytes:
        try:
            done = subprocess.run(
                shlex.split(self._what),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=COMMAND_TIMEOUT_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise ConfigError(
                f"store.master_key: {self.name} gave no key ({type(error).__name__}); it has "
                f"{COMMAND_TIMEOUT_S:g} s to print one and to end with status 0"
            ) from None
        return done.stdout


def _words(content: bytes) -> list[Fleeting]:
    """What is in it, which is overwritten."""
    try:
        return [
            Fleeting(memoryview(content)[slice(*at.span())])
            for at in _WORD.finditer(content, 3 if content.startswith(codecs.BOM_UTF8) else 0)
        ]
    finally:
        wipe(content)


def _hexadecimal(key: bytes) -> Fleeting:
    digits = binascii.hexlify(key)
    try:
        return Fleeting(digits)
    finally:
        wipe(digits)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
