"""The model cards: what each starter model is, how good it was measured to be, where it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from facelane_server.worker.networks.candidates import TURNED
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


def detector(
    report: Report, score: float, score_turned: float, parameters: int, aims: Report
) -> str:
    """The detector's card. ``score``, ``score_turned``: the thresholds that are shipped;
    ``aims``: what ``training.aims`` measured with both."""
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
            "A face detector with five landmarks: YuNet, gone on from its public weights and",
            f"grown wider, {parameters:,} parameters, any picture size. It serves video and",
            "photos, faces from about 12 pixels of width in the network's input, turned by up to",
            "60 degrees, in the dark too.",
            "",
            "## Measured",
            f"Against what YuNet detects at {YUNET_SCORE:g}, its package's threshold:",
            f"{rows[f'{score:g}']['faces']} faces of 24 pixels and more in photos of identities",
            "kept out, IoU 0.5:",
            "",
            *table,
            "",
            *clip,
            *_aims(aims, score, score_turned),
            "## Where it fails",
            "Faces under 10 pixels; profiles of which one eye is hidden, often; faces turned by a",
            "quarter or upside down; heavy occlusion. Round things lit from one side, headlights,",
            "lamps, wheels, craters of the moon, are taken for faces: nearly all finds in pictures",
            "without faces. Faces in the dark that YuNet does not see count as false in the clip:",
            "of nineteen such finds that were looked at, eighteen were faces. Whether faces of one",
            "group are missed more often than others was not measured: the data has no labels.",
            "",
            _DATA.format(
                teacher="YuNet (Apache-2.0), whose weights it goes on from, by its dense answers"
                " and by where its finds in upright photos come to lie when these are turned,"
                " shrunk and darkened"
            ),
            _REPLACE.format(more="YuNet itself is a good first choice."),
        )
    )


def _aims(aims: Report, score: float, score_turned: float) -> list[str]:
    """Sizes, turns, light and clips, of ``training.aims``, at the shipped scores."""
    at = f"{score:g}"

    def row(name: str, got: Report, beside: str = "") -> str:
        return (
            f"| {name} | {got['faces']} | {got['recall'][at]:.3f} | {beside} "
            f"| {got['landmark_error_of_width']:.3f} |"
        )

    lines = [
        "By size (pixels of the network's input), and by clip, of what YuNet finds at",
        f"{YUNET_SCORE:g}; of photos that were turned or darkened, of every face that is in them,",
        "with YuNet's share beside. Here, as where it serves, a face that is turned to the side",
        f"(the nose lies at least {TURNED:g} of the way from the eyes to the mouth beside it) is",
        f"taken from a score of {score_turned:g} on: turned faces score less, and what is none is",
        "mostly seen from before too.",
        "",
        "| | faces | recall | YuNet | landmark error / width |",
        "|---|---|---|---|---|",
    ]
    by_size = sorted(aims["sizes"].items(), key=lambda item: int(item[0].split("-")[0]))
    lines += [row(f"{name} pixels", got) for name, got in by_size]
    for name, got in aims["turned"].items():
        theirs = aims["turned, YuNet"][name]["recall"][f"{YUNET_SCORE:g}"]
        lines.append(row(name, got, f"{theirs:.3f}"))
    lines += [row(name, got) for name, got in aims["clips"].items()]
    none = aims["faceless"]
    return [
        *lines,
        "",
        f"In {none['pictures']} pictures without faces (kinds that a program draws, and",
        "the sample pictures of scikit-image and matplotlib) it makes",
        f"{none['finds'][at]} finds, YuNet {none['finds_of_yunet']}.",
        "",
    ]


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
            "three of its maps and says whether the recogniser can still tell who it is. Input: a",
            "112x112 crop aligned to the ArcFace template. Embeddings are compared by cosine.",
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
            *_open_set(got),
            "## Measured: OOD score",
            *_trust(got, ood),
            "",
            f"AUROC of clean faces against damaged ones ({got['damaged_pictures']} pictures). The",
            "score does not ask whether a picture is spoilt but whether the person can be told:",
            "damage that the recogniser bears lowers it little, by intent. *norm*: the length of",
            "the embedding.",
            "",
            *table,
            "",
            "It says nothing about whether the person is in the gallery.",
            "",
            "## Where it fails",
            "People unlike the training data, which is mostly adult public figures of the early",
            "2000s, more men than women, with few children and few dark-skinned faces: expect more",
            "false matches there, and measure before use. Profiles, sunglasses, masks and small",
            "faces (under 24 pixels) lower the similarity. Relatives may match. How much oftener",
            "people of one group are taken for each other was not measured: the data has no such",
            "labels. Its teacher is more even in this than the one before, and not free of it.",
            "",
            _DATA.format(
                teacher="mbf-512, a public MobileFaceNet whose provenance is unclear and which"
                " is treated as non-commercial"
            ),
            _REPLACE.format(more="Embeddings of different models are not comparable: enrol again."),
        )
    )


def _open_set(got: Report) -> list[str]:
    """The figures of NIST's FRTE 1:N, as far as so few people allow."""
    rows = got["open_set"]
    lines = [
        "## Measured: search among many",
        f"{rows['gallery']} people enrolled with one picture each, most of them from the training",
        f"({rows['mated']} mated probes, {rows['strangers']} of strangers, people kept out):",
        "",
        "| FPIR | threshold | FNIR |",
        "|---|---|---|",
    ]
    for fpir, row in rows["fnir_at_fpir"].items():
        lines.append(f"| {fpir} | {row['threshold']:.3f} | {row['fnir']:.3f} |")
    return [*lines, ""]


def _trust(got: Report, ood: Mapping[str, float]) -> list[str]:
    trust = got["trust"]
    cells = trust["cells"]
    count = trust["probes"] * len(cells)
    named = sum(len(row["right"]) for row in cells.values())
    wrong = sum(len(row["wrong"]) for row in cells.values())
    passed = sum(sum(v >= ood["refusal_logit"] for v in row["wrong"]) for row in cells.values())
    return [
        f"Twenty kinds of damage at four strengths, {trust['probes']} probes each, against",
        f"{trust['gallery']} people at a threshold of {trust['match']:.2f}:",
        f"{_percent(named / count)} are named rightly, {wrong} of {count} wrongly (the person",
        "enrolled, or taken out of the gallery). Under 0.4 the score refuses",
        f"{_percent(ood['refused_of_right'])} of those named rightly,",
        f"{_percent(ood['clean_refused'])} of the good pictures, and all but {passed} of the wrong",
        f"names. AUROC of pictures told rightly against all others: {trust['auroc_of_told']:.3f}.",
    ]


def liveness(report: Report, live: float, spoof: float, aims: Report) -> str:
    """The liveness model's card. ``aims``: what ``training.aims`` measured."""
    got = report["liveness"]

    def at_least(row: Report, who: str, threshold: float) -> float:
        value: float = row["at_least"][who][f"{threshold:g}"]
        return value

    lives = [
        "| | faces | LIVE | SPOOF (BPCER) | the pair: LIVE at 0.9, SPOOF |",
        "|---|---|---|---|---|",
    ]
    for name, row in {"photos as they are": got["photos"], **got["live"]}.items():
        pair = f"{at_least(row, 'pair', 0.9):.3f}, {1 - at_least(row, 'pair', 0.5):.3f}"
        lives.append(
            f"| {name} | {row['faces']} | {at_least(row, 'this', live):.3f} "
            f"| {1 - at_least(row, 'this', spoof):.3f} | {pair} |"
        )
    attacks = [
        "| attack (simulated) | LIVE (APCER) | SPOOF | the pair: LIVE at 0.9 | in training |",
        "|---|---|---|---|---|",
    ]
    for name, row in got["attacks"].items():
        attacks.append(
            f"| {name} | {at_least(row, 'this', live):.3f} "
            f"| {1 - at_least(row, 'this', spoof):.3f} "
            f"| {at_least(row, 'pair', 0.9):.3f} | {'no' if row['held_out'] else 'yes'} |"
        )
    clips = ["| clip | faces | LIVE | SPOOF |", "|---|---|---|---|"]
    for name, row in aims["clips"].items():
        if row["faces"]:
            clips.append(f"| {name} | {row['faces']} | {row['LIVE']:.3f} | {row['SPOOF']:.3f} |")
    views = [
        "| example | views | lowest, highest | LIVE | the pair: lowest, highest, LIVE at 0.9 |",
        "|---|---|---|---|---|",
    ]
    for name, row in aims["proof's views"].items():
        mine, theirs = row["this"], row["pair"]
        views.append(
            f"| {name} | {mine['views']} | {mine['lowest']:.2f}, {mine['highest']:.2f} "
            f"| {mine['at_least'][f'{live:g}']:.3f} | {theirs['lowest']:.2f}, "
            f"{theirs['highest']:.2f}, {theirs['at_least']['0.9']:.3f} |"
        )
    proof = ", ".join(f"{name} {row['this']:.2f}" for name, row in aims["proof"].items())
    return "\n".join(
        (
            "# facelane-liveness",
            "",
            "Passive liveness from one picture: the two networks of MiniFASNet over 80x80 crops",
            "of the face and its surroundings, gone on from their public weights. LIVE from",
            f"{live}, SPOOF under {spoof}, UNDECIDED between: a face of which nothing tells",
            "whether it is live scores what share of its training was live (.62).",
            "",
            "## Measured",
            "Live faces of identities kept out, by how and how large (pixels) they are seen, in",
            "the terms of ISO/IEC 30107-3:",
            "",
            *lives,
            "",
            "Attacks, none of them real; *filmed*: then blurred, darkened, coded:",
            "",
            *attacks,
            "",
            "Living people of clips, faces from 60 pixels; the animated pictures have 256 colours:",
            "",
            *clips,
            "",
            f"The example pictures of its teachers' project, one live, a print, a tablet: {proof}.",
            "The same as a camera sees them from elsewhere, 60 to 200 pixels wide, turned by up to",
            "20 degrees, the picture's margins stretched:",
            "",
            *views,
            "",
            "## Where it fails",
            "**It was taught no real attack beyond what its public weights know.** What was added",
            "was drawn by a program: prints, screens, sheets held up. Treat its verdict as a hint",
            "among others, never as the only gate. Masks and well-made replays on good screens",
            "pass. The second example, a print, is UNDECIDED, no SPOOF. A screen whose rim is not",
            "seen, because the picture's edge cuts the face, is judged by the face alone: so cut",
            "and mirrored, the third example scores up to .92 (the pair: .97). Animated pictures",
            "of 256 colours look like prints to it. How often living people of one group are held",
            "up, beside others, was not measured: the data has no such labels.",
            "",
            _DATA.format(
                teacher="the MiniFASNet pair of Silent-Face-Anti-Spoofing (Apache-2.0), whose"
                " weights it goes on from"
            ),
            _REPLACE.format(
                more="Whoever needs presentation attack detection needs a certified one."
            ),
        )
    )
