"""What a gallery gets of the promise, and who in it is too alike: for ``gallery check``. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from facelane_server.gallery.decide import Thresholds
from facelane_server.store.records import StoredVector

SHOWN: Final = 20
"""Pairs of subjects that are told, the most alike first."""
_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class Alike:
    """Two subjects with templates so similar that one may be taken for the other."""

    first: str
    second: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Weak:
    """A subject none of whose templates promises enough: a better picture is wanted.
    ``quality``: of the best, (0, OOD threshold)."""

    subject: str
    quality: float


@dataclass(frozen=True, slots=True)
class Examined:
    """One gallery. ``threshold`` and ``worst_threshold``: least cosine of a match for a perfect
    look, and for one that is just trusted. ``false_naming``: None with a bare cosine."""

    gallery_id: str
    subjects: int
    templates: int
    false_naming: float | None
    threshold: float
    worst_threshold: float
    alike: int
    pairs: tuple[Alike, ...]
    weak: int = 0
    weakest: tuple[Weak, ...] = ()

    def as_json(self) -> dict[str, Any]:
        pairs = [[p.first, p.second, round(p.similarity, 4)] for p in self.pairs]
        return {
            "gallery_id": self.gallery_id,
            "subjects": self.subjects,
            "templates": self.templates,
            "false_naming": self.false_naming,
            "threshold": round(self.threshold, 4),
            "worst_threshold": round(self.worst_threshold, 4),
            "alike": self.alike,
            "most_alike": pairs,
            "weak": self.weak,
            "weakest": [[one.subject, round(one.quality, 4)] for one in self.weakest],
        }


def examine(rows: Iterable[StoredVector], thresholds: Thresholds) -> list[Examined]:
    """Every gallery of the rows, which come in the order of galleries and subjects."""
    by_gallery: dict[str, tuple[list[str], list[npt.NDArray[np.float16]]]] = {}
    best: dict[str, dict[str, float]] = {}
    for row in rows:
        names, vectors = by_gallery.setdefault(row.gallery_id, ([], []))
        names.append(row.subject_id)
        vectors.append(row.vector)
        known = best.setdefault(row.gallery_id, {})
        known[row.subject_id] = max(known.get(row.subject_id, 0.0), row.quality)
    found = []
    for gallery_id, (names, vectors) in by_gallery.items():
        own = thresholds.at(gallery_id)
        searched = len(names)
        threshold = own.match_at(1.0, searched)
        # 0: enrolled before this was measured; nothing is known of it.
        weak = sorted(
            (Weak(name, quality) for name, quality in best[gallery_id].items() if quality),
            key=lambda one: (one.quality, one.subject),
        )
        weak = [one for one in weak if one.quality < own.ood]
        pairs = alike(np.stack(vectors).astype(np.float32), names, threshold)
        found.append(
            Examined(
                gallery_id,
                len(set(names)),
                searched,
                None if own.promise is None else own.promise.false_naming,
                threshold,
                own.match_at(own.ood, searched),
                len(pairs),
                tuple(pairs[:SHOWN]),
                len(weak),
                tuple(weak[:SHOWN]),
            )
        )
    return found


def alike(vectors: npt.NDArray[np.float32], names: Sequence[str], threshold: float) -> list[Alike]:
    """The pairs of subjects with templates at least ``threshold`` similar, the most alike first.

    ``vectors`` [N, D] of unit norm, ``names`` [N] the subjects that they are of.
    """
    subjects = sorted(set(names))
    number = {name: at for at, name in enumerate(subjects)}
    owner = np.array([number[name] for name in names])
    best: dict[tuple[int, int], float] = {}
    for start in range(0, len(vectors), _ROWS):
        cosines = vectors[start : start + _ROWS] @ vectors[start:].T
        mine, theirs = owner[start : start + _ROWS], owner[start:]
        near = (cosines >= threshold) & (mine[:, None] != theirs[None, :])
        for row, column in np.argwhere(near).tolist():
            low, high = sorted((int(mine[row]), int(theirs[column])))
            best[low, high] = max(best.get((low, high), -1.0), float(cosines[row, column]))
    found = [Alike(subjects[a], subjects[b], cosine) for (a, b), cosine in best.items()]
    return sorted(found, key=lambda pair: (-pair.similarity, pair.first, pair.second))
