"""The chips of enrolled faces: what another recogniser is shown, so that a gallery outlives the one
that it was enrolled with.

They are pictures of people, kept only where ``[gallery] keep_chips`` says so, sealed with their
subject's key like vectors, and gone with their template. Nothing else writes or reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from facelane_server.store import following
from facelane_server.store.database import Database
from facelane_server.store.envelope import Lock
from facelane_server.store.following import ChangeKind
from facelane_server.store.records import NewTemplate, unit_float16
from facelane_server.store.schema import GALLERY, chips, keys, subjects, templates
from facelane_server.store.vault import KEY_COLUMNS, OF_SUBJECT, Vault

ENCODING: Final = "bgr24"
"""Rows of pixels, square, without a gap: the very bytes that the recogniser had."""


@dataclass(frozen=True, slots=True)
class KeptChip:
    """``chip``: size x size x 3 uint8 BGR. ``size_quality``: what of the template's quality is not
    its OOD score, [0, 1]."""

    template_id: str
    chip: bytes
    size_quality: float


def keep(
    connection: sa.Connection, vault: Vault, lock: Lock | None, template_id: str, chip: bytes
) -> None:
    """Within the transaction that adds the template, or for one that is there without a chip."""
    kept = chip if lock is None else vault.sealed_chip(lock, template_id, chip)
    connection.execute(sa.delete(chips).where(chips.c.template_id == template_id))
    connection.execute(
        sa.insert(chips).values(template_id=template_id, encoding=ENCODING, chip=kept)
    )


class Chips:
    """Of one store. Every method is one transaction; all raise GALLERY_UNAVAILABLE."""

    def __init__(self, database: Database, vault: Vault) -> None:
        self._database = database
        self._vault = vault

    def without(self, model_id: str) -> int:
        """Templates of a model that have no chip: no other recogniser can take them over."""
        query = (
            sa.select(sa.func.count())
            .select_from(templates)
            .join(chips, chips.c.template_id == templates.c.template_id, isouter=True)
            .where(templates.c.model_id == model_id, chips.c.template_id.is_(None))
        )
        with self._database.reading() as connection:
            return connection.scalar(query) or 0

    def behind(self, model_id: str, after: str, count: int) -> list[KeptChip]:
        """Of templates of other models, in the order of their ids behind ``after``."""
        query = (
            sa.select(
                templates.c.template_id,
                templates.c.ood_score,
                templates.c.quality,
                subjects.c.id.label("number"),
                chips.c.chip,
                *KEY_COLUMNS,
            )
            .join_from(chips, templates, chips.c.template_id == templates.c.template_id)
            .join(subjects, subjects.c.id == templates.c.subject)
            .join(keys, OF_SUBJECT, isouter=True)
            .where(templates.c.model_id != model_id, templates.c.template_id > after)
            .where(chips.c.encoding == ENCODING)
            .order_by(templates.c.template_id)
            .limit(count)
        )
        found = []
        with self._database.reading() as connection:
            for row in connection.execute(query).all():
                chip = row.chip
                if self._vault.encrypts:
                    lock = self._vault.lock(connection, row.number, row)
                    chip = self._vault.chip(lock, row.template_id, chip)
                share = min(1.0, row.quality / row.ood_score) if row.ood_score > 0.0 else 0.0
                found.append(KeptChip(row.template_id, chip, share))
        return found

    def renew(self, template_id: str, new: NewTemplate) -> bool:
        """The template is of another model from now on; whether it was still there."""
        vector = unit_float16(new.vector)
        with self._database.writing(GALLERY) as connection:
            number = connection.scalar(
                sa.select(templates.c.subject).where(templates.c.template_id == template_id)
            )
            if number is None:
                return False
            kept = vector.tobytes()
            if self._vault.encrypts:
                lock = self._vault.lock_of(connection, number)
                kept = self._vault.sealed_vector(lock, template_id, kept)
            connection.execute(
                sa.update(templates)
                .where(templates.c.template_id == template_id)
                .values(
                    model_id=new.model_id,
                    dim=len(vector),
                    vector=kept,
                    ood_score=new.ood_score,
                    quality=new.quality,
                )
            )
            # Who searches with the old model loses it, who searches with the new one has it.
            for kind in (ChangeKind.TEMPLATE_REMOVED, ChangeKind.TEMPLATE_ADDED):
                following.append(connection, kind, subject=number, template_id=template_id)
        return True
