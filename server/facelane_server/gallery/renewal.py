"""Enrolment again, by itself, after a change of recogniser: the chips that were kept are shown to
the new one, and each template becomes one of its own. Until its turn has come, a template is not
searched: its people are late, and not wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import structlog

from facelane_server.domain import FacelaneError
from facelane_server.gallery.gallery import Gallery
from facelane_server.store.chips import KeptChip
from facelane_server.store.records import NewTemplate

AT_ONCE: Final = 16
"""Chips that are under way together: frames of cameras come between them."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the new recogniser says of a chip. ``vector``: float32 bytes of unit norm."""

    ood_score: float
    vector: bytes | bytearray


Embed = Callable[[bytes], Awaitable[Seen]]
"""Raises ``FacelaneError``."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """``left``: chips that the new recogniser does not trust, cannot take, or had no answer to;
    they stay as they are, and are tried again after the next start."""

    renewed: int
    left: int


async def renew(gallery: Gallery, embed: Embed, *, chip_bytes: int, least_ood: float) -> Renewed:
    """All templates of other models that have a chip become templates of the serving one.

    The caller sees to it that the serving model, which ``embed`` asks, is not changed meanwhile.
    ``chip_bytes``: the size that it takes. ``least_ood``: what an enrolment takes.
    """
    renewed = left = 0
    after = ""
    while batch := await gallery.behind(after, AT_ONCE):
        after = batch[-1].template_id
        done = await asyncio.gather(
            *(_renew_one(gallery, embed, kept, chip_bytes, least_ood) for kept in batch)
        )
        renewed += sum(done)
        left += len(done) - sum(done)
    if renewed or left:
        log.info("enrolled again from what was kept", renewed=renewed, left=left)
    return Renewed(renewed, left)


async def _renew_one(
    gallery: Gallery, embed: Embed, kept: KeptChip, chip_bytes: int, least_ood: float
) -> bool:
    if len(kept.chip) != chip_bytes:
        return False
    try:
        seen = await embed(kept.chip)
        if not seen.ood_score >= least_ood:
            return False
        new = NewTemplate(
            gallery.model_id,
            np.frombuffer(seen.vector, np.float32),
            seen.ood_score,
            seen.ood_score * kept.size_quality,
        )
        return await gallery.renew(kept.template_id, new)
    except FacelaneError as error:
        log.warning("a template was not enrolled again", reason=error.reason.value)
        return False
