"""Which engine a store has, and which key opens it: one place that knows all of them."""

from __future__ import annotations

from pathlib import Path

from facelane_server import config
from facelane_server.folders import gallery_path, state_dir, state_path
from facelane_server.store.database import Database
from facelane_server.store.masterkey import Source
from facelane_server.store.postgres import PostgresDatabase
from facelane_server.store.sqlite import SqliteFile
from facelane_server.store.vault import Vault, open_vault


def place_of(settings: config.Config, *, look: bool = False) -> Path | str:
    """Where the store is: a SQLite file, or the URL of a PostgreSQL database. ``look``: no folder
    is made for it."""
    url = settings.store.url
    return url if url.startswith("postgresql://") else gallery_path(settings, look=look)


def open_store(place: Path | str, *, look: bool = False) -> Database:
    """Opens what ``place_of`` says, makes it where it is not there, and brings it up to date;
    with ``look``, only reads what is there. Raises GALLERY_UNAVAILABLE."""
    if isinstance(place, Path):
        return SqliteFile(place, look=look)
    return PostgresDatabase(place, look=look)


def key_source(settings: config.Config, *, look: bool = False) -> Source | None:
    """Where the master key comes from. None: nowhere, since a store of several machines has no
    folder beside it that all of them see. ``look``: as in ``place_of``. Raises ``ConfigError``."""
    chosen = settings.store.master_key
    if not chosen and isinstance(place_of(settings, look=look), str):
        if settings.store.encryption == "on":
            raise config.ConfigError(
                "store.encryption = 'on' with PostgreSQL needs store.master_key, the same for "
                "every server of the store"
            )
        return None
    if chosen:
        return Source(chosen, Path())
    return Source(chosen, state_path(settings) if look else state_dir(settings))


def unlock(database: Database, settings: config.Config, *, look: bool = False) -> Vault:
    """The keys of a store that was opened; see ``open_vault``. Raises ``ConfigError`` and
    GALLERY_UNAVAILABLE."""
    source = key_source(settings, look=look)
    return open_vault(database, source, mode=settings.store.encryption, look=look)
