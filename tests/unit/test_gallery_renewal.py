"""After a change of recogniser: who was kept is enrolled again, by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facelane_server.domain import FacelaneError, Reason
from facelane_server.gallery.gallery import Gallery
from facelane_server.gallery.renewal import AT_ONCE, Renewed, Seen, renew

DIM = 4
CHIP = 300


def vector(seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    made = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return made / np.linalg.norm(made)


async def nobody(*_: Any) -> None:
    """No recogniser runs."""


async def embed(chip: bytes) -> Seen:
    return Seen(0.9, vector(100 + chip[0]).tobytes())


async def gallery_of(folder: Path, people: int) -> Gallery:
    gallery = await Gallery.open(folder / "gallery.db")
    await gallery.serve("old", DIM, nobody)
    for k in range(people):
        await gallery.enroll(
            "g", f"p{k}", vector=vector(k), ood_score=0.8, quality=0.4,
            chip=bytes([k]) * CHIP, create_subject=True,
        )  # fmt: skip
    await gallery.serve("new", DIM, nobody)
    assert gallery.templates == 0
    return gallery


async def test_everybody_is_found_by_the_new_model(tmp_path: Path) -> None:
    people = AT_ONCE + 3
    gallery = await gallery_of(tmp_path, people)
    try:
        done = await renew(gallery, embed, chip_bytes=CHIP, least_ood=0.2)
        assert done == Renewed(people, 0)
        assert gallery.templates == people
        for k in (0, people - 1):
            found = gallery.similarity("g", f"p{k}", vector(100 + k).tobytes())
            assert found == pytest.approx(1.0, abs=1e-3)
        [template] = await gallery.list_templates("g", "p0")
        assert template.model_id == "new"
        assert template.quality == pytest.approx(0.45), "as large as it was, and clearer"
        again = await renew(gallery, embed, chip_bytes=CHIP, least_ood=0.2)
        assert again == Renewed(0, 0)
    finally:
        await gallery.close()


async def test_what_cannot_be_shown_or_trusted_stays_as_it_is(tmp_path: Path) -> None:
    gallery = await gallery_of(tmp_path, 4)

    async def unsure(chip: bytes) -> Seen:
        if chip[0] == 1:
            raise FacelaneError(Reason.WORKER_LOST, "the worker is gone", retryable=True)
        return Seen(
            float("nan") if chip[0] == 2 else 0.1 if chip[0] == 3 else 0.9, b"\0\0\x80?" * 4
        )

    try:
        assert await renew(gallery, unsure, chip_bytes=CHIP + 3, least_ood=0.2) == Renewed(0, 4)
        assert await renew(gallery, unsure, chip_bytes=CHIP, least_ood=0.2) == Renewed(1, 3)
        assert gallery.templates == 1
        assert (await gallery.counts())[1] == 4
    finally:
        await gallery.close()
