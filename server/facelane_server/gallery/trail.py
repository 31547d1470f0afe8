"""What the server writes into the audit log, beside changes of galleries, which write themselves.

What must not happen unless it is written down (administration) waits for ``written``; what is
frequent (look-ups, refusals) is noted, and written together within ``limits.AUDIT_FLUSH_S``. While
nothing can be written, streams and look-ups go on, what they did is kept within a bound, changes
and administration are refused, and ``trouble`` says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import syslog
import time
from collections.abc import Callable

import structlog

from facelane_server import __version__, limits
from facelane_server.config import Audit
from facelane_server.domain import FacelaneError
from facelane_server.gallery.gallery import Gallery
from facelane_server.gallery_rules import DAY_NS, Expiry
from facelane_server.store import audit
from facelane_server.store.audit import Action, Deed, Pending
from facelane_server.store.chain import Head
from facelane_server.store.gallery import Store

log = structlog.get_logger(__name__)


class Trail:
    """One server's writing into the audit log of its store; ``run`` until it is cancelled, then
    ``close``."""

    def __init__(self, gallery: Gallery, settings: Audit) -> None:
        self._gallery = gallery
        self._settings = settings
        self._pending = Pending()
        self._expiry = Expiry(settings.keep_days * DAY_NS)
        self._newest: Head | None = None
        self._told = 0
        self._writing: asyncio.Task[None] | None = None
        self._has_begun = False
        self.trouble = False
        """Whether entries wait that could not be written."""

    def note(
        self, action: Action, *, gallery: str = "", subject: str = "", **told: str | int
    ) -> None:
        """Something that was done by whoever acts here."""
        self._pending.add(Deed(action, audit.actor(), gallery, subject, tuple(told.items())))

    def note_repeated(self, action: Action, **told: str) -> None:
        """What anybody can make as many of as he likes: one entry, with how many."""
        self._pending.repeat(Deed(action, audit.actor(), told=tuple(told.items())))

    async def written(self, action: Action, **told: str | int) -> None:
        """Returns when it is kept. Raises GALLERY_UNAVAILABLE when it cannot be."""
        deed = Deed(action, audit.actor(), told=tuple(told.items()))
        try:
            self._newest = await self._gallery.write_down([deed])
        except FacelaneError:
            self.trouble = True
            raise

    async def run(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self.note(Action.STARTED, version=__version__)
        checkpoint_s = prune_s = time.monotonic()
        while True:
            await self._flush()
            now = time.monotonic()
            if now >= checkpoint_s:
                checkpoint_s = now + self._settings.checkpoint_every_s
                await self._checkpoint()
            if now >= prune_s:
                prune_s = now + limits.AUDIT_PRUNE_S
                before_ns = self._expiry.before_ns()
                with contextlib.suppress(FacelaneError):  # the next time, then
                    await self._gallery.ask(self._prune(before_ns))
            await asyncio.sleep(limits.AUDIT_FLUSH_S)

    def _prune(self, before_ns: int) -> Callable[[Store], int]:
        return lambda store: store.audit.prune(before_ns=before_ns, most=self._settings.max_entries)

    async def close(self) -> None:
        """Writes what waits, and a last checkpoint."""
        if self._writing is not None:
            # Entries that were on their way as ``run`` was cancelled.
            await asyncio.wait([self._writing])
        await self._flush()
        await self._checkpoint()

    async def _flush(self) -> None:
        # Not half: what was taken to be written is written, or waits again, whoever is cancelled.
        self._writing = asyncio.create_task(self._write(), name="audit-write")
        await asyncio.shield(self._writing)

    async def _write(self) -> None:
        deeds = self._pending.take()
        if not (deeds or self.trouble):
            return
        resumed = [Deed(Action.RESUMED)] if self.trouble else []
        try:
            self._newest = await self._gallery.write_down([*deeds, *resumed])
        except Exception as error:
            # Whatever it is: what was done waits to be written, and health says so.
            self._pending.put_back(deeds)
            if not self.trouble:
                reason = getattr(error, "reason", type(error).__name__)
                log.error("the audit log cannot be written", reason=str(reason))
            self.trouble = True
        else:
            if self.trouble:
                log.info("the audit log is written again")
            self.trouble = False

    async def _checkpoint(self) -> None:
        """Puts the newest head where whoever rewrites the store does not reach."""
        head = self._newest
        if head is None or head.number == self._told:
            return
        self._told = head.number
        text = head.text()
        log.info("audit checkpoint", checkpoint=text)
        where = self._settings.checkpoint
        if where == "syslog":
            syslog.syslog(syslog.LOG_NOTICE | syslog.LOG_AUTHPRIV, f"facelane audit {text}")
        elif where:
            try:
                await asyncio.to_thread(_append, where, text)
            except OSError as error:
                log.error("an audit checkpoint was not kept", problem=error.strerror)


def _append(path: str, text: str) -> None:
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(text + "\n")
