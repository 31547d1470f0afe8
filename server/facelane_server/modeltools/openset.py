"""Open-set identification, and how alike the people of a group are.

In the terms of NIST's FRTE 1:N: a *mated* probe shows somebody who is enrolled, a *non-mated*
one does not. FPIR is the share of non-mated probes that are given a name, FNIR the share of
mated ones that are not given theirs. Everything is numpy; vectors are of unit norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from facelane_server.models.api import F32
from facelane_server.modeltools import measures

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

FPIRS: Final = (0.01, 0.003, 0.001)
GALLERIES: Final = (100, 1_000, 10_000)
TEMPLATES: Final = (1, 3)
SPLITS: Final = 5
"""Draws of who is enrolled, pooled."""
LEAST_MATED: Final = 30
"""People who come back, and strangers, that a gallery takes to be measured."""
LEAST_GROUP: Final = 40
"""People that a group must have to be measured."""
_CHUNK: Final = 1024


@dataclass(frozen=True)
class Rates:
    """Of galleries of ``enrolled`` people with ``templates`` each, all splits together.

    ``fnir``: FPIR -> (threshold, share of mated probes not named rightly), None where the
    non-mated probes are too few to tell.
    """

    enrolled: int
    templates: int
    mated: int
    non_mated: int
    fnir: dict[float, tuple[float, float] | None]


def identification(
    vectors: F32,
    subject: I64,
    enrolled: int,
    templates: int,
    seed: int,
    *,
    known: npt.NDArray[np.bool_] | None = None,
) -> Rates | None:
    """Of ``enrolled`` people those who have a picture beside ``templates`` come back as mated
    probes; where they are too few for the gallery others fill it, with as many of their pictures.
    The pictures of whoever is not enrolled are non-mated probes. None where the people are too few.

    ``vectors`` [N, D]; ``subject`` [N]. ``known`` [N]: pictures of people whom the model was
    trained on, who fill galleries and are nobody's probes. Probes are one picture of each person
    and split, so that nobody with many pictures counts more.
    """
    people, counts = np.unique(subject, return_counts=True)
    taught = people[:0] if known is None else np.unique(subject[known])
    able = people[(counts > templates) & ~np.isin(people, taught)]
    fillers = people[~np.isin(people, able)] if known is None else taught
    strangers = len(people) - len(taught)
    # Half of those who could come back stay strangers where that leaves enough, so that pictures of
    # both are of the same kind.
    back = max(min(enrolled, len(able) // 2), min(enrolled, len(able), LEAST_MATED))
    back = max(back, enrolled - len(fillers))
    missing = enrolled - back
    strangers -= back if known is not None else enrolled
    if back < LEAST_MATED or back > len(able) or strangers < LEAST_MATED:
        return None
    right: list[F64] = []
    best: list[F64] = []
    for split in range(SPLITS):
        rng = np.random.default_rng([seed, split])
        chosen = rng.permutation(able)[:back]
        chosen = np.concatenate((chosen, rng.permutation(fillers)[:missing]))
        rows, owner, probes = _dealt(rng, subject, chosen, templates)
        probes = probes[~np.isin(subject[probes], taught)]
        own, other = _nearest(vectors[probes], subject[probes], vectors[rows], owner)
        mated = np.isin(subject[probes], chosen)
        # Named rightly: from the lowest threshold at which nobody else is nearer.
        right.append(np.where(own > other, own, -np.inf)[mated])
        best.append(other[~mated])
    mated_scores, nobody = np.concatenate(right), np.concatenate(best)
    fnir: dict[float, tuple[float, float] | None] = {}
    for fpir in FPIRS:
        fnir[fpir] = None
        if fpir * len(nobody) >= 1:
            threshold = measures.threshold_at_far(nobody, fpir)
            fnir[fpir] = threshold, float((mated_scores < threshold).mean())
    return Rates(enrolled, templates, len(mated_scores), len(nobody), fnir)


def _dealt(
    rng: np.random.Generator, subject: I64, chosen: I64, templates: int
) -> tuple[I64, I64, I64]:
    """Rows of the gallery, whose they are, and rows of the probes: one of each person."""
    order = rng.permutation(len(subject))
    rows: list[int] = []
    owner: list[int] = []
    probes: list[int] = []
    wanted = set(chosen.tolist())
    had: dict[int, int] = {}
    for row, who in zip(order.tolist(), subject[order].tolist(), strict=True):
        seen = had[who] = had.get(who, -1) + 1
        if who in wanted and seen < templates:
            rows.append(row)
            owner.append(who)
        elif seen == (templates if who in wanted else 0):
            probes.append(row)
    return np.array(rows, np.int64), np.array(owner, np.int64), np.array(probes, np.int64)


def _nearest(probes: F32, who: I64, gallery: F32, owner: I64) -> tuple[F64, F64]:
    """[P], [P]: the best cosine with the probe's own templates (-inf without), with others'."""
    own, other = np.empty(len(probes)), np.empty(len(probes))
    for start in range(0, len(probes), _CHUNK):
        end = start + _CHUNK
        cosines = probes[start:end] @ gallery.T
        same = who[start:end, None] == owner[None, :]
        own[start:end] = np.where(same, cosines, -np.inf).max(1, initial=-np.inf)
        other[start:end] = np.where(same, -np.inf, cosines).max(1, initial=-np.inf)
    return own, other


@dataclass(frozen=True)
class Group:
    """``far``: overall false accept rate -> that within the group at the same threshold."""

    name: str
    people: int
    pairs: int
    far: dict[float, float]


def within_groups(
    vectors: F32, subject: I64, group: Sequence[str], fars: Sequence[float], seed: int
) -> list[Group]:
    """How often two people of one group pass for one another, at thresholds that hold overall.

    ``group`` [N]: of each picture's person; "" = unknown. Groups of fewer than ``LEAST_GROUP``
    people are left out; rates that the pairs of everybody cannot tell, too.
    """
    _, impostor = measures.pairs(subject, seed)
    overall = measures.similarities(vectors, impostor)
    bars = {
        far: measures.threshold_at_far(overall, far) for far in fars if far * len(overall) >= 10
    }
    out: list[Group] = []
    labels = np.array(group)
    for name in sorted(set(group) - {""}):
        rows = np.flatnonzero(labels == name)
        people = len(np.unique(subject[rows]))
        if people < LEAST_GROUP:
            continue
        _, pairs = measures.pairs(subject[rows], seed)
        cosines = measures.similarities(vectors[rows], pairs)
        far = {far: float((cosines >= bar).mean()) for far, bar in bars.items()}
        out.append(Group(name, people, len(pairs), far))
    return out


def tellable(own: F64, other: F64, match: float) -> npt.NDArray[np.bool_]:
    """[P]: whether a probe would be named rightly if its OOD score had no say."""
    return (own >= match) & (own > other)


def leave_one_out(probes: F32, rows: I64, vectors: F32, subject: I64) -> tuple[F64, F64]:
    """[P], [P]: the best cosine of ``probes`` with other pictures of the same person, and with
    those of other people. Probe i is a picture (spoilt, perhaps) of ``vectors[rows[i]]``."""
    own, other = np.empty(len(probes)), np.empty(len(probes))
    everything = np.arange(len(vectors))
    for start in range(0, len(probes), _CHUNK):
        part = rows[start : start + _CHUNK]
        cosines = probes[start : start + _CHUNK] @ vectors.T
        same = subject[part, None] == subject[None, :]
        itself = part[:, None] == everything[None, :]
        own[start : start + _CHUNK] = np.where(same & ~itself, cosines, -np.inf).max(1)
        other[start : start + _CHUNK] = np.where(same, -np.inf, cosines).max(1)
    return own, other
