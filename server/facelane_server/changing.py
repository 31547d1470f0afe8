"""What becomes of the enrolled when another recogniser takes the place of the present one."""

from __future__ import annotations

import time

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.gallery import renewal
from facelane_server.gallery.gallery import Gallery
from facelane_server.models.package import Package
from facelane_server.pipeline import Origin, Pipeline


async def refuse_forgetting(gallery: Gallery, old: Package, package: Package) -> None:
    """Raises TEMPLATES_LOST when people are enrolled whom this recogniser would not find, nor
    could be shown."""
    lost = gallery.templates
    if not lost or package.model_id == gallery.model_id:
        return
    if package.crops == old.crops:
        lost = await gallery.without_chip()
    if lost:
        raise FacelaneError(
            Reason.TEMPLATES_LOST,
            f"{lost} templates are of the present recogniser, and no other finds anybody by "
            "them, nor were their chips kept (gallery.keep_chips); enrol the pictures again "
            "afterwards, and say --forget-templates (they stay in the store and are searched "
            "again with their model)",
            metadata={"templates": str(lost)},
        )


async def enroll_again(pipeline: Pipeline, gallery: Gallery, package: Package) -> None:
    """What was kept of templates of other recognisers is shown to this one, which serves; no
    other takes its place meanwhile."""

    async def embed(chip: bytes) -> renewal.Seen:
        deadline_ns = time.monotonic_ns() + limits.RENEWAL_S * 1_000_000_000
        answer = await pipeline.embed(chip, Origin(0, 1, deadline_ns))
        return renewal.Seen(answer.ood_score, answer.vector)

    side = package.crops[0].size
    await renewal.renew(
        gallery, embed, chip_bytes=side * side * 3, least_ood=pipeline.thresholds.enrolled_ood
    )
