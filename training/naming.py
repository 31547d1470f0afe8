"""What the promise of ``false_naming`` comes to: measured into a package, and put to the test.

``python -m training.naming --shared DIR --package DIR --write`` measures how similar different
people are to a recogniser, on identities that were kept out of training, and writes it into the
package (a minute or two on two cores). ``--test`` puts the promise to the test:
strangers and enrolled people of the one half of those identities are looked for in galleries
that training identities fill, with a measurement of the other half alone, and the reverse.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
from bench.report import RESULTS, Report, Row, command_line

from facelane_server.domain import Candidate, Decision
from facelane_server.gallery import decide
from facelane_server.gallery.decide import Thresholds
from facelane_server.models.api import DeviceOptions, Recognizer
from facelane_server.models.package import Impostors, Package, read_package
from facelane_server.models.promise import Promise
from facelane_server.modeltools import damage, impostors, measures, openset
from facelane_server.worker.networks.load import load
from training.data import U8, WRONG_LABELS, is_held_out

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

BATCH: Final = 32
UNDER_TWO_NAMES: Final = ("e038651d79ac811e", "a50235837b5d0f6b")
"""SHA-256 (first 16 digits) of crops of people whom the data has under another name as well, seen
by eye among the most similar pairs: one is the same photo twice, a known error of LFW."""
EACH: Final = 2
"""Pictures of each identity of the training that fill the galleries."""
SIZES: Final = (100, 1000, 2000)
SEEDS: Final = 5
PROMISE: Final = 0.001
TWICE: Final = 0.002
"""The aim: on people of whom nothing was measured, no more than twice the promise."""
MARGIN: Final = 0.05


@dataclass(frozen=True)
class Looks:
    """``vectors`` [N, D] of unit norm, ``trust`` [N], ``who`` [N]: people by number."""

    vectors: F32
    trust: F64
    who: I64

    def of(self, chosen: Flags | I64) -> Looks:
        return Looks(self.vectors[chosen], self.trust[chosen], self.who[chosen])

    def and_these(self, other: Looks) -> Looks:
        return Looks(
            np.concatenate((self.vectors, other.vectors)),
            np.concatenate((self.trust, other.trust)),
            np.concatenate((self.who, other.who)),
        )


def read_crops(data: Path) -> tuple[list[U8], I64, Flags]:
    """The crops of all identities kept out, and of the others ``EACH``; (chips, who, kept out)."""
    chips: list[U8] = []
    who: list[int] = []
    held: list[bool] = []
    seen: dict[int, int] = {}
    wrong = (*WRONG_LABELS, *UNDER_TWO_NAMES)
    for number, name in enumerate(("lfw_train", "celeba299")):
        with np.load(data / f"{name}.npz") as archive:
            offsets, blob = archive["offsets"], archive["jpeg"].tobytes()
            rows = zip(archive["identity"].tolist(), archive["names"].tolist(), strict=True)
            for i, (identity, file) in enumerate(rows):
                person = 2 * identity + number
                kept_out = name == "lfw_train" and is_held_out(file.split("/")[0])
                seen[person] = seen.get(person, 0) + 1
                encoded = blob[offsets[i] : offsets[i + 1]]
                if hashlib.sha256(encoded).hexdigest()[:16] in wrong:
                    continue
                if kept_out or seen[person] <= EACH:
                    chips.append(cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR))
                    who.append(person)
                    held.append(kept_out)
    return chips, np.array(who, np.int64), np.array(held)


def embed(model: Recognizer, chips: list[U8], who: I64) -> Looks:
    vectors: list[F32] = []
    trust: list[F32] = []
    for start in range(0, len(chips), BATCH):
        answer = model.begin(np.stack(chips[start : start + BATCH])).finish()
        vectors.append(np.array(answer.vectors, np.float32))
        trust.append(np.array(answer.ood, np.float32))
    return Looks(np.concatenate(vectors), np.concatenate(trust).astype(np.float64), who)


def spoilt(chips: list[U8]) -> list[U8]:
    """Each chip damaged in one way, the kinds in turns: looks of every OOD score."""
    rng = np.random.default_rng(1)
    kinds = [kind for name, kind in damage.KINDS.items() if name != "scrambled"]
    return [kinds[n % len(kinds)](chip, rng) for n, chip in enumerate(chips)]


def measured(probes: Looks, templates: Looks, least: float) -> tuple[Impostors, ...]:
    """The distribution, the templates being those that enrolment would take."""
    good = templates.of(templates.trust >= least)
    return impostors.measure(
        probes.vectors, probes.trust, probes.who, good.vectors, good.who, least
    )


# -- the test -----------------------------------------------------------------------------------


def named(
    probes: Looks, templates: Looks, thresholds: Thresholds
) -> tuple[list[bool], list[bool], list[bool]]:
    """For each probe: whether it is named at all, whether rightly, whether it is trusted."""
    any_name: list[bool] = []
    right: list[bool] = []
    trusted: list[bool] = []
    cosines = probes.vectors @ templates.vectors.T
    for row, trust, who in zip(cosines, probes.trust.tolist(), probes.who.tolist(), strict=True):
        nearest = np.argsort(-row)[: min(8, len(row))]
        candidates = [Candidate(str(templates.who[k]), float(row[k])) for k in nearest]
        found = decide.identify(trust, candidates, thresholds, searched=len(templates.who))
        any_name.append(found.decision is Decision.MATCH)
        right.append(found.decision is Decision.MATCH and found.subject_id == str(who))
        trusted.append(found.decision is not Decision.REJECTED_OOD)
    return any_name, right, trusted


def one_each(looks: Looks, rng: np.random.Generator) -> tuple[I64, I64]:
    """(rows of one look of each person, the other rows)."""
    order = rng.permutation(len(looks.who))
    _, first = np.unique(looks.who[order], return_index=True)
    chosen = order[first]
    return chosen, np.setdiff1d(np.arange(len(looks.who)), chosen)


def put_to_the_test(
    held: Looks, worse: Looks, others: Looks, thresholds: Thresholds
) -> dict[str, Any]:
    """Strangers and enrolled people against galleries of every size.

    Of the half that is tested every second person is a stranger; the others are enrolled with
    one picture and come back with the rest. The thresholds come from the other half.
    """
    half = held.who % 4 // 2 == 0
    out: dict[str, Any] = {}
    for size in SIZES:
        strangers: list[bool] = []
        worse_named: list[bool] = []
        enrolled: list[bool] = []
        wrong: list[bool] = []
        cosines: list[float] = []
        for side in (half, ~half):
            tested = held.of(side)
            spoilt_ones = worse.of(side)
            rows = measured(held.of(~side).and_these(worse.of(~side)),
                            others.and_these(held.of(~side)), thresholds.ood)  # fmt: skip
            promised = replace(thresholds, promise=Promise(PROMISE, rows))
            cosines.append(promised.match_at(1.0, size))
            for seed in range(SEEDS):
                rng = np.random.default_rng(seed)
                known = np.isin(tested.who, rng.permutation(np.unique(tested.who))[::2])
                first, rest = one_each(tested.of(known), rng)
                people = tested.of(known).of(first)
                people = people.of(people.trust >= thresholds.ood)
                people = people.of(np.arange(len(people.who)) < size // 2)
                fill, _ = one_each(others.of(others.trust >= thresholds.ood), rng)
                good = others.of(others.trust >= thresholds.ood).of(rng.permutation(fill))
                gallery = people.and_these(good.of(np.arange(size - len(people.who))))
                back = tested.of(known).of(rest)
                back = back.of(np.isin(back.who, people.who))
                any_name, _, _ = named(tested.of(~known), gallery, promised)
                strangers += any_name
                any_name, _, trusted = named(spoilt_ones.of(~known), gallery, promised)
                worse_named += [n for n, t in zip(any_name, trusted, strict=True) if t]
                any_name, right, _ = named(back, gallery, promised)
                enrolled += right
                wrong += [n and not r for n, r in zip(any_name, right, strict=True)]
        out[str(size)] = {
            "threshold_of_a_perfect_look": [round(c, 4) for c in cosines],
            "strangers_named": _share(strangers),
            "strangers_of_damaged_looks_named": _share(worse_named),
            "enrolled_named": _share(enrolled),
            "enrolled_named_as_somebody_else": _share(wrong),
        }
    return out


def _share(hits: list[bool]) -> dict[str, Any]:
    low, high = measures.wilson(sum(hits), len(hits))
    return {
        "share": round(sum(hits) / max(1, len(hits)), 5),
        "of": len(hits),
        "interval": [round(low, 5), round(high, 5)],
    }


SEARCH: Final = "## Measured: search among many"
"""The heading of the card's part that is written here."""
FAILS: Final = "## Where it fails"


def search_among_many(held: Looks, others: Looks) -> list[str]:
    """The figures of NIST's FRTE 1:N for the card: people who were kept out come back, or are
    strangers; others fill the galleries."""
    both = held.and_these(others)
    known = np.arange(len(both.who)) >= len(held.who)
    lines = [
        "| enrolled | templates | probes: mated, others | FNIR at FPIR 0.01 | 0.003 | 0.001 |",
        "|---|---|---|---|---|---|",
    ]
    for size in openset.GALLERIES:
        for templates in openset.TEMPLATES:
            rates = openset.identification(both.vectors, both.who, size, templates, 1, known=known)
            if rates is None:
                lines.append(f"| {size:,} | {templates} | too few people | - | - | - |")
                continue
            cells = [
                "too few strangers" if found is None else f"{found[1]:.3f} (from {found[0]:.3f})"
                for found in (rates.fnir[fpir] for fpir in openset.FPIRS)
            ]
            probes = f"{rates.mated}, {rates.non_mated}"
            lines.append(f"| {size:,} | {templates} | {probes} | {' | '.join(cells)} |")
    return [
        "Open-set identification in the terms of NIST's FRTE 1:N: the share of mated probes that",
        "are not given their name (FNIR) where the threshold lets through that share of strangers",
        f"(FPIR). People kept out come back or are strangers, over {openset.SPLITS} draws; people",
        "of the training fill the galleries, each with as many of the templates as there are, two",
        "at most. The OOD score has no say here.",
        "",
        *lines,
    ]


def with_section(card: str, heading: str, lines: list[str]) -> str:
    """The card with these lines under a heading, in the place of what stands there; a new part
    comes before what the model fails at."""
    before, there, rest = card.partition(f"{heading}\n")
    if not there:
        before, there, rest = card.partition(f"{FAILS}\n")
        if not there:
            raise SystemExit(f"the card has neither {heading!r} nor {FAILS!r}")
        return "\n".join((before + heading, *lines, "", FAILS, "")) + rest
    _, following, rest = rest.partition("\n## ")
    return "\n".join((before + heading, *lines, "")) + following + rest


def look_at(package: Package, data: Path) -> tuple[Looks, Looks, Looks]:
    """(those kept out, the same damaged, the others) by the package's model."""
    chips, who, held = read_crops(data)
    model = load(package, DeviceOptions(), batch_max=BATCH)
    assert isinstance(model, Recognizer)
    model.warm_up()
    try:
        kept_out = [chip for chip, out in zip(chips, held, strict=True) if out]
        looks = embed(model, chips, who)
        worse = embed(model, spoilt(kept_out), who[held])
    finally:
        model.close()
    return looks.of(held), worse, looks.of(~held)


def rows_of(model_id: str, told: dict[str, Any], report: Report) -> None:
    """A row for each size of the gallery, and whether the promise was kept."""
    for size, found in told.items():
        figures: dict[str, Any] = {
            "thresholds": " ".join(f"{t:.3f}" for t in found["threshold_of_a_perfect_look"])
        }
        for name, share in found.items():
            if isinstance(share, dict):
                low, high = share["interval"]
                figures[name] = share["share"]
                figures[f"{name}_of"] = f"{share['of']} ({low:.4f} to {high:.4f})"
        report.add(Row(model_id, f"{size} enrolled", extra=figures))
        named = found["strangers_named"]["share"]
        report.aim(f"{model_id}, {size} enrolled: strangers named", named, TWICE, at_most=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--package", type=Path, action="append", required=True)
    parser.add_argument("--write", action="store_true", help="into the packages")
    parser.add_argument("--test", action="store_true", help="put the promise to the test")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    report = Report("naming")
    for folder in arguments.package:
        package = read_package(folder)
        held, worse, others = look_at(package, arguments.shared / "data")
        least = package.thresholds.ood or 0.0
        rows = measured(held.and_these(worse), others.and_these(held), least)
        for row in rows:
            print(package.name, row)
        if arguments.write:
            impostors.write(package, rows)
            card = folder / "CARD.md"
            lines = search_among_many(held, others)
            card.write_text(with_section(card.read_text("utf-8"), SEARCH, lines), "utf-8")
        if arguments.test:
            plain = Thresholds(match=1.0, margin=package.thresholds.margin or MARGIN, ood=least)
            told = put_to_the_test(held, worse, others, plain)
            print(json.dumps(told, indent=2))
            rows_of(package.model_id, told, report)
    if arguments.test:
        left_out = len(WRONG_LABELS) + len(UNDER_TWO_NAMES)
        report.note(f"false_naming = {PROMISE}, {SEEDS} seeds, one picture a person enrolled")
        report.note(f"{left_out} crops are left out: they show somebody under another name")
        report.complete = True
        print(report.write(arguments.out, command_line()))


if __name__ == "__main__":
    main()
