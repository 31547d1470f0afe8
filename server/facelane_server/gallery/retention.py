"""Nobody is kept longer than their gallery says (``[galleries.NAME]``): by itself.

Whoever is due is deleted as by ``DeleteSubject``, with an entry of the audit log that says why. A
clock that has leapt is not believed at once (``gallery_rules.SteadyClock``), and whoever was
changed, seen or enrolled again between the look and the deletion stays for the next round.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import structlog

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.gallery.gallery import Gallery
from facelane_server.gallery_rules import (
    LEAP_S,
    SETTLE_S,
    GalleryRules,
    SteadyClock,
    why_not_kept,
)
from facelane_server.store import audit
from facelane_server.store.audit import Actor
from facelane_server.store.held import held, note_seen, set_right

ROUND_S: Final = 600.0
LOOK_S: Final = 5.0
PAGE: Final = 500
BY: Final = Actor("", "Retention")

log = structlog.get_logger(__name__)


class Retention:
    """Of one server. ``seen`` from the event loop; ``run`` until it is cancelled."""

    def __init__(
        self,
        gallery: Gallery,
        rules: Mapping[str, GalleryRules],
        *,
        settle_s: float = SETTLE_S,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gallery = gallery
        self._rules = {name: one for name, one in rules.items() if one.ends}
        self._noted = {name for name, one in rules.items() if one.unseen_days}
        self._seen: dict[tuple[str, str], int] = {}
        self._clock = SteadyClock(settle_s=settle_s, tolerance_s=LEAP_S)
        self._wall_ns = wall_ns
        self._monotonic = monotonic

    def seen(self, gallery_id: str, subject_id: str) -> None:
        """Somebody was named or verified. Never waits."""
        if gallery_id in self._noted and subject_id:
            key = (gallery_id, subject_id)
            if key in self._seen or len(self._seen) < limits.MAX_SEEN_WAITING:
                self._seen[key] = self._wall_ns()

    async def run(self) -> None:
        """Returns at once where no gallery has rules."""
        if not self._rules:
            return
        audit.acting(BY)
        due_s = self._monotonic()
        while True:
            try:
                believed = self._clock.look(self._wall_ns() / 1e9, self._monotonic())
                if self._clock.leapt:
                    log.warning("the clock has leapt: nobody is deleted by retention for a while")
                if believed and self._monotonic() >= due_s:
                    due_s = self._monotonic() + ROUND_S
                    await self.round()
            except FacelaneError as error:
                log.warning("retention waits for the store", reason=error.reason.value)
            await asyncio.sleep(LOOK_S)

    async def flush(self) -> None:
        """Notes who was seen. Raises GALLERY_UNAVAILABLE; they wait then."""
        while self._seen:
            keys = list(self._seen)[:PAGE]
            some = {key: self._seen.pop(key) for key in keys}
            try:
                await self._gallery.ask(partial(note_seen, seen=some))
            except FacelaneError:
                self._seen = {**some, **self._seen}
                raise

    async def round(self) -> int:
        """Looks at everybody once; how many were deleted. Raises GALLERY_UNAVAILABLE."""
        await self.flush()
        now_ns = self._wall_ns()
        set_right_now = partial(set_right, gallery_ids=tuple(self._rules), now_ns=now_ns)
        wrong = await self._gallery.ask(set_right_now)
        if wrong is None:
            log.error(
                "the clock is behind what has been done here for longer than it has said so: set "
                "it; nobody is deleted by retention until then"
            )
            return 0
        if wrong:
            log.warning("times that lay ahead of the clock were set to now", subjects=wrong)
        gone = 0
        for gallery_id, rules in self._rules.items():
            deleted = await self._round_of(gallery_id, rules, now_ns)
            if deleted:
                log.info("retention has deleted subjects", gallery=gallery_id, subjects=deleted)
            gone += deleted
        return gone

    async def _round_of(self, gallery_id: str, rules: GalleryRules, now_ns: int) -> int:
        after = gone = 0
        while page := await self._gallery.ask(
            partial(held, gallery_id=gallery_id, after=after, count=PAGE)
        ):
            after = page[-1].number
            for one in page:
                why = why_not_kept(
                    rules,
                    made_ns=one.made_ns,
                    seen_ns=max(one.seen_ns, self._seen.get((gallery_id, one.subject_id), 0)),
                    labels=one.labels,
                    now_ns=now_ns,
                )
                if why is None:
                    continue
                try:
                    await self._gallery.delete_subject(
                        gallery_id, one.subject_id, etag=one.etag, why=why.value
                    )
                except FacelaneError as error:
                    if error.metadata.get("cause") == "NOT_CONFIRMED":
                        gone += 1  # deleted; another server is slow
                    elif error.reason not in (Reason.SUBJECT_NOT_FOUND, Reason.ETAG_MISMATCH):
                        raise
                else:
                    gone += 1
        return gone
