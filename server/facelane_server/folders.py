"""Where state and sockets lie: folders that are given, or made and held."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from facelane_server import config

RUN_PREFIX: Final = "facelane-run-"


def state_path(settings: config.Config) -> Path:
    """Where the gallery lives, whether it is there or not. Raises ``ConfigError``."""
    chosen = settings.state_dir or os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if not chosen:
        chosen = f"{os.environ.get('XDG_STATE_HOME') or '~/.local/state'}/facelane"
    return _expanded("state_dir", chosen)


def state_dir(settings: config.Config) -> Path:
    """The same folder; made when it is missing (mode 0700)."""
    return _made(
        "state_dir", state_path(settings), "set state_dir to a folder that it may write to"
    )


def gallery_path(settings: config.Config, *, look: bool = False) -> Path:
    """The store's SQLite file; its folder is made when nothing else is said, but not to ``look``
    whether it is there."""
    chosen = settings.store.url.removeprefix("sqlite:///") or settings.gallery.path
    if chosen:
        return _expanded("gallery.path" if settings.gallery.path else "store.url", chosen)
    return (state_path(settings) if look else state_dir(settings)) / "gallery.db"


def _expanded(name: str, path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # as in containers that run as any user
        raise config.ConfigError(
            f"{name}: there is no {path}, since $HOME is not set and this user has no account; set "
            f"{name} to a path that begins with /"
        ) from None


def _made(name: str, folder: Path, otherwise: str) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise config.ConfigError(
            f"{name} {folder} cannot be made: {error.strerror}; make it for this user, or "
            f"{otherwise}"
        ) from None
    return folder


@contextlib.contextmanager
def runtime_dir(settings: config.Config) -> Iterator[Path]:
    """Where sockets are made. A fresh private folder is removed at the end.

    Raises ``ConfigError`` for a folder that is named, and ``AddressError`` where there is no room
    for a fresh one now.
    """
    chosen = settings.runtime_dir or os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if chosen:
        yield _made("runtime_dir", _expanded("runtime_dir", chosen), "leave runtime_dir empty")
        return
    with _private_folder() as folder:
        yield folder


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """A fresh folder of mode 0700, removed at the end.

    A server that is killed cannot remove its own: the next one does. A lock on the folder,
    which the kernel gives up together with the process, tells that nobody lives there; one on
    ``mps`` inside of it, that a daemon has still to be told to quit.
    """
    for left in _fresh_folders():
        with contextlib.ExitStack() as stack:
            for needed in (left, left / "mps"):
                if not os.path.lexists(needed):
                    continue
                if (lock := _lock(needed)) is None:
                    break
                stack.callback(os.close, lock)
            else:
                shutil.rmtree(left, ignore_errors=True)
    # A server that starts at the same moment may find ours before we hold it, and remove it.
    while (lock := _lock(folder := _fresh_folder())) is None:
        continue
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _fresh_folders() -> list[Path]:
    """All that are there, whoever made them."""
    try:
        return list(Path(tempfile.gettempdir()).glob(f"{RUN_PREFIX}*"))
    except OSError:
        return []  # no temporary folder at all: ``_fresh_folder`` says what to do


def _fresh_folder() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=RUN_PREFIX))
    except OSError as error:
        raise config.AddressError(
            f"no folder for sockets can be made among the temporary files: {error.strerror}; set "
            "runtime_dir (or $RUNTIME_DIRECTORY) to a folder that can be written to"
        ) from None


def _lock(folder: Path) -> int | None:
    """A descriptor that holds a folder of this user; None where it is held, or gone."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.ExitStack() as stack:
        try:
            lock = os.open(folder, flags)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(lock)
            if held.st_uid != os.geteuid() or not os.path.samestat(held, os.lstat(folder)):
                return None
        except OSError:
            return None
        stack.pop_all()
        return lock
