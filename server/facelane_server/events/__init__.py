"""What happened, for those who watch: told by ``feed``, kept in the store by ``journal``."""

from __future__ import annotations

from facelane_server.events.feed import Event, EventFeed, EventKind, Watcher
from facelane_server.events.journal import EventJournal
from facelane_server.events.pictures import EventPictures

__all__ = ["Event", "EventFeed", "EventJournal", "EventKind", "EventPictures", "Watcher"]
