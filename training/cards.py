"""The model cards: what each starter model is, how good it was measured to be, where it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.detector import SCORE
from training.evaluate import YUNET_SCORE

Report = Mapping[str, Any]

_DATA = """## Data and teachers
Trained on research data: 6,290 aligned crops of 299 people (a CelebA subset) and one half of
LFW, of which 15 % of the identities (by a hash of the name) were kept out of every training
and are what the figures above were measured on. Both sets are for non-commercial research.
The weights are therefore **for evaluation and development, not for sale or for decisions
about people**. Teacher: {teacher}.
"""

_REPLACE = """## Replace it
Import a model that you have the rights to, with `facelane-server models import`, and name it
in the configuration under `[[pools]]`. {more}
"""


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def detector(report: Report, score: float, parameters: int) -> str:
    """The detector's card. ``score``: the threshold that is shipped."""
    got = report["detector"]
    rows = got["by_score"]
    table = [
        "| score | recall | precision | landmark error / width | textures with a face, of 200 |",
        "|---|---|---|---|---|",
    ]
    for at, row in rows.items():
        table.append(
            f"| {at}{_mark(at, score)} | {row['recall']:.3f} | {row['precision']:.3f} "
            f"| {row['landmark_error_of_width']:.3f} | {row['textures_with_faces']} |"
        )
    table += ["", *_weaker(got, score)]
    clip: list[str] = []
    if "clip" in got:
        clip = [
            f"The same over the {got['clip']['frames']} frames of a television clip (640x360: a",
            "stage, an audience in the dark, profiles), none of which was trained on:",
            "",
            "| score | faces | recall | precision | landmark error / width |",
            "|---|---|---|---|---|",
        ]
        for at, row in got["clip"]["by_score"].items():
            clip.append(
                f"| {at}{_mark(at, score)} | {row['faces']} | {row['recall']:.3f} "
                f"| {row['precision']:.3f} | {row['landmark_error_of_width']:.3f} |"
            )
        clip += ["", *_weaker(got["clip"], score)]
    return "\n".join(
        (
            "# facelane-detector",
            "",
            "A face detector with five landmarks: the YuNet network with widths of its own,",
            f"{parameters:,} parameters, any picture size. It serves video and photos of people",
            "who face the camera, from about 16 pixels of face width in the network's input.",
            "",
            "## Measured",
            f"Against what YuNet detects at {YUNET_SCORE:g}, its package's threshold:",
            f"{rows[f'{score:g}']['faces']} faces of 24 pixels and more in photos of identities",
            "kept out, IoU 0.5:",
            "",
            *table,
            "",
            *clip,
            "## Where it fails",
            "Faces under 16 pixels; profiles beyond about 60 degrees; faces turned upside down;",
            "heavy occlusion; faces in the dark that YuNet does not see either: whatever YuNet",
            "misses it was taught to miss. Close-ups in profile are found late or with landmarks",
            "that are off by a tenth of the face's width.",
            "",
            _DATA.format(teacher="YuNet (Apache-2.0), by its dense answers"),
            _REPLACE.format(more="YuNet itself is a good first choice."),
        )
    )


def _mark(at: str, score: float) -> str:
    return " (shipped)" if abs(float(at) - score) < 1e-9 else ""


def _weaker(got: Report, score: float) -> list[str]:
    row = got["by_score_of_weaker_too"][f"{score:g}"]
    return [
        f"Counting also what YuNet gives {SCORE:g} to {YUNET_SCORE:g} ({row['faces']} faces):",
        f"recall {row['recall']:.3f}, precision {row['precision']:.3f} at the shipped score.",
        "",
    ]


def recognizer(
    report: Report, match: float, far: float, ood: Mapping[str, float], parameters: int
) -> str:
    """The recogniser's card, the OOD score included. ``parameters``: of the network."""
    got = report["recognizer"]
    lines = ["| | accuracy | TAR@FAR 1e-2 | 1e-3 | 1e-4 | 1e-5 |", "|---|---|---|---|---|---|"]
    for name, key in (
        ("this model", "verification"),
        ("this model, two pictures with wrong labels left out", "verification_of_right_labels"),
        ("its teacher", "teacher_verification"),
    ):
        if key in got:
            v = got[key]
            cells = [v["accuracy"], *(v[f"tar_at_far_1e-{k}"] for k in (2, 3, 4, 5))]
            lines.append(f"| {name} | " + " | ".join(f"{c:.4f}" for c in cells) + " |")
    v = got["verification"]
    scores = list(got["ood_mean"])
    table = ["| damage | " + " | ".join(scores) + " |", "|---" * (len(scores) + 1) + "|"]
    rows = {
        **got["ood_auroc"],
        "**mean**": got["ood_mean"],
        "**mean of kinds in no training** (motion_blur, jpeg_blocks, colour_cast)": got[
            "ood_mean_held_out_kinds"
        ],
    }
    for kind, row in rows.items():
        table.append(f"| {kind} | " + " | ".join(f"{row[s]:.3f}" for s in scores) + " |")
    return "\n".join(
        (
            "# facelane-recognizer",
            "",
            "A face recogniser with an out-of-distribution (OOD) score: a MobileFaceNet of",
            f"{parameters / 1e6:.1f} million parameters, 512 outputs, and a small head that reads",
            "three of its maps and says how far the face can be trusted. Input: a 112x112 crop",
            "aligned to the ArcFace template. Embeddings are compared by cosine.",
            "",
            "## Measured: verification",
            f"{v['pictures']} pictures of {v['identities']} identities never trained on;",
            f"{v['genuine_pairs']} genuine pairs (at most 20 of an identity),",
            f"{v['impostor_pairs']:,} impostor pairs; accuracy over ten folds.",
            "",
            *lines,
            "",
            f"`match` = {match} is the threshold that {far:.0e} of the impostor pairs reach. One",
            "false match in ten thousand comparisons is one in ten for a gallery of a thousand",
            "people: raise it for large galleries.",
            "",
            "## Measured: OOD score",
            "AUROC of clean faces against damaged ones. *consistency* is the score that is",
            "shipped: a head trained to predict how far the embedding of a damaged face stays at",
            "the clean one's, over every degree of damage: harmless damage is meant to pass, and",
            "what AUROC it loses by that is lost on purpose. *rts*: Random Temperature Scaling",
            "(arXiv 2212.01015) trained jointly with the last stage. *norm*: the length of the",
            "embedding.",
            "",
            *table,
            "",
            "Calibrated on the kept-out identities' clean faces:",
            f"{_percent(ood['clean_refused_in_sample'])} of them fall under 0.4; with a mapping",
            f"fitted on one half of the identities, {_percent(ood['clean_refused'])} of the other",
            "half do.",
            "",
            *_refusals(got),
            "The consistency head was trained on most of these kinds of damage, the norm was not:",
            "the fair comparison is the last row. It tells a spoilt picture from a clean one; it",
            "says nothing about whether the person is in the gallery.",
            "",
            "## Where it fails",
            "People unlike the training data, which is mostly adult public figures of the early",
            "2000s, more men than women, with few children and few dark-skinned faces: expect more",
            "false matches there, and measure before use. Profiles, sunglasses, masks and small",
            "faces (under 40 pixels) lower the similarity. Relatives may match.",
            "",
            _DATA.format(teacher="face-reidentification-retail-0095 (Apache-2.0)"),
            _REPLACE.format(more="Embeddings of different models are not comparable: enrol again."),
        )
    )


def _refusals(got: Report) -> list[str]:
    if "mild" not in got:
        return []
    mild = got["mild"]
    lost, kept = mild["refused_of_recognisable"], mild["recognisable"]
    return [
        "Of clean faces with the slight faults of video (blur, noise, compression, low",
        f"resolution, exposure; {mild['faces']} pictures), it refuses {_percent(mild['refused'])}:",
        f"{_percent(lost)} of those whose embedding stayed at 0.9 or more of the clean one's",
        f"({kept} of them) and {_percent(mild['refused_of_others'])} of the others. Faces in the",
        "dark, in profile or smeared by motion, as any video has them, are mostly refused: the",
        "tracker names such a person by the frames in between.",
        "",
    ]


def liveness(report: Report, live: float, spoof: float) -> str:
    """The liveness model's card."""
    got = report["liveness"]
    rows = [
        f"| attack (simulated) | under 0.5 | under {live:g} | the pair, under 0.5 | in training |",
        "|---|---|---|---|---|",
    ]
    for name, row in got["attacks"].items():
        rows.append(
            f"| {name} | {row['rejected_at']['0.5']:.3f} "
            f"| {row['rejected_at'][f'{live:g}']:.3f} | {row['pair_rejected']:.3f} "
            f"| {'no' if row['held_out'] else 'yes'} |"
        )
    return "\n".join(
        (
            "# facelane-liveness",
            "",
            "Passive liveness from one picture: a small network over an 80x80 crop of the face",
            f"and its surroundings. LIVE from {live}, SPOOF under {spoof}, UNDECIDED between.",
            "",
            "## Measured",
            f"{got['crops']} crops of identities kept out: agreement with the pair of teachers",
            f"{got['agreement']['0.5']:.3f} (they call {got['pair_live_share']:.3f} of them live),",
            f"correlation {got['correlation']:.2f}. Of these crops",
            f"{_percent(got['live_at'][f'{live:g}'])} are called LIVE and",
            f"{_percent(got['live_at']['0.5'])} are at 0.5 or above. Attacks, none of them real:",
            "",
            *rows,
            "",
            "## Where it fails",
            "**It has never seen a real attack.** What it knows of attacks was drawn by a program:",
            "prints, screens, sheets held up. Treat its verdict as a hint among others, never as",
            "the only gate. Of the three example pictures of its teachers' project it tells the",
            "live face (.80) from the print (.78) by little, and from the screen (.11) clearly.",
            "Masks and well-made replays on good screens pass. Strong compression,",
            "night pictures and faces that fill the frame are often UNDECIDED or wrongly SPOOF.",
            "",
            _DATA.format(teacher="the MiniFASNet pair of Silent-Face-Anti-Spoofing (Apache-2.0)"),
            _REPLACE.format(
                more="Whoever needs presentation attack detection needs a certified one."
            ),
        )
    )
