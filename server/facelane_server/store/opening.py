"""Which engine a store has: one place that knows all of them."""

from __future__ import annotations

from pathlib import Path

from facelane_server import config
from facelane_server.folders import gallery_path
from facelane_server.store.database import Database
from facelane_server.store.postgres import PostgresDatabase
from facelane_server.store.sqlite import SqliteFile


def place_of(settings: config.Config) -> Path | str:
    """Where the store is: a SQLite file, or the URL of a PostgreSQL database."""
    url = settings.store.url
    return url if url.startswith("postgresql://") else gallery_path(settings)


def open_store(place: Path | str, *, look: bool = False) -> Database:
    """Opens what ``place_of`` says, makes it where it is not there, and brings it up to date;
    with ``look``, only reads what is there. Raises GALLERY_UNAVAILABLE."""
    if isinstance(place, Path):
        return SqliteFile(place, look=look)
    return PostgresDatabase(place, look=look)
