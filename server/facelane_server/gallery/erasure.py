"""Keys of the deleted are opened by none that is left: done by itself, again and again."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from facelane_server import limits
from facelane_server.config import ConfigError
from facelane_server.domain import FacelaneError
from facelane_server.gallery.gallery import Gallery
from facelane_server.store.gallery import Store

_END: Final = object()

log = structlog.get_logger(__name__)


async def keep_erased(gallery: Gallery) -> None:
    """Until it is cancelled."""
    while True:
        try:
            await erase(gallery)
        except (FacelaneError, ConfigError) as error:
            log.warning("what was deleted keeps its old epoch for now", problem=str(error))
        await asyncio.sleep(limits.ERASE_WITHIN_S)


async def erase(gallery: Gallery) -> None:
    """Once, where it is due. In steps, so that other calls come between them. Raises
    GALLERY_UNAVAILABLE, ``ConfigError``."""
    if not await gallery.ask(_is_due):
        return
    # What gives the master key may take its time, in which the gallery goes on.
    offered = await asyncio.to_thread(gallery.vault.offered)
    steps = gallery.vault.turning(gallery.database, offered)

    def step(_store: Store) -> object:
        return next(steps, _END)

    # A step that is given up would have to begin all over again.
    while await gallery.ask(step, bounded=False) is not _END:
        await asyncio.sleep(0)


def _is_due(store: Store) -> bool:
    with store.database.reading() as connection:
        return store.vault.is_erasure_due(connection)
