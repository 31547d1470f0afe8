"""What an evaluation writes: ``report.json``, ``report.md``, ``left_out.csv`` and plots.

Plots need matplotlib (``pip install 'facelane[evaluate]'``); the rest needs nothing.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from facelane_server.domain import FacelaneError, Reason

Report = dict[str, Any]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A line of a plot."""

    label: str
    x: F64
    y: F64


@dataclass(frozen=True)
class Plot:
    """Lines over two axes; ``log``: which of them are logarithmic (``x``, ``xy`` or none).

    ``marks``: (label, x, y) of single points, such as the package's own threshold.
    """

    name: str
    x: str
    y: str
    curves: Sequence[Curve]
    log: str = ""
    marks: Sequence[tuple[str, float, float]] = ()


@dataclass(frozen=True)
class Bars:
    """One bar for each key, all values in [0, 1]."""

    name: str
    x: str
    values: Mapping[str, float]


def require_matplotlib() -> None:
    """Raises FacelaneError(ARGUMENT_INVALID) when plots cannot be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise FacelaneError(
            Reason.ARGUMENT_INVALID,
            "plots need matplotlib: pip install 'facelane[evaluate]', or take --no-plots",
        )


def require_folder(out: Path) -> None:
    """Raises FacelaneError(ARGUMENT_INVALID) when nothing could be written into ``out``, which need
    not be there yet: to be told before an hour of measuring, not after."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise FacelaneError(
            Reason.ARGUMENT_INVALID,
            f"the report cannot be written into {out}: {there} is no folder that one may write "
            "into; name another with --out",
        )


def write(
    report: Report, left_out: Sequence[tuple[str, str]], out: Path, plots: Sequence[Plot | Bars]
) -> None:
    """All files of one evaluation into ``out``. ``left_out``: (path, reason) of pictures."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    # Names of files need not be text.
    with (out / "left_out.csv").open(
        "w", newline="", encoding="utf-8", errors="backslashreplace"
    ) as stream:
        writer = csv.writer(stream)
        writer.writerow(("picture", "reason"))
        writer.writerows(left_out)
    for plot in plots:
        _draw(plot, out)
    text = markdown(report, [plot.name for plot in plots])
    (out / "report.md").write_text(text, encoding="utf-8", errors="backslashreplace")


def _draw(plot: Plot | Bars, out: Path) -> None:
    # Without pyplot there is no global state, and no display is looked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="tight")
    axes = figure.add_subplot()
    if isinstance(plot, Bars):
        names = list(plot.values)[::-1]
        axes.barh(names, [plot.values[name] for name in names])
        axes.set_xlim(0, 1)
        axes.set_xlabel(plot.x)
    else:
        for curve in plot.curves:
            axes.plot(curve.x, curve.y, label=curve.label or None)
        for label, x, y in plot.marks:
            axes.plot([x], [y], "o", label=label)
        axes.set_xlabel(plot.x)
        axes.set_ylabel(plot.y)
        if "x" in plot.log:
            axes.set_xscale("log")
        if "y" in plot.log:
            axes.set_yscale("log")
        if plot.marks or any(curve.label for curve in plot.curves):
            axes.legend()
    axes.grid(visible=True, alpha=0.3)
    for suffix in ("png", "svg"):
        figure.savefig(out / f"{plot.name}.{suffix}", dpi=120)


# -- markdown ---------------------------------------------------------------------------

_TITLES = {
    "at_false_accept_rate": "At chosen false accept rates",
    "at_attack_accept_rate": "At chosen attack accept rates (APCER, worst kind)",
    "attacks": "Attacks, by kind",
    "live": "Bona fide",
    "at_score": "At other score thresholds",
    "recall_by_side": "Recall by the face's size, in pixels",
    "ood": "OOD score",
    "open_set": "Open-set identification: FNIR at FPIR, by people enrolled",
    "groups": "False accepts within groups, at thresholds that hold overall",
    "tellable": "Faces that would be named rightly, and what the OOD score does to them",
    "naming": "Match thresholds for false_naming = 0.001, by the number of templates searched",
    "impostors": "How similar different people are (report.json), by the least OOD score",
    "suggested": "Suggested for model.toml",
    "left_out": "Left out (left_out.csv names the pictures)",
    "damage": "Clean faces against damaged ones",
}


def markdown(report: Report, plots: Sequence[str] = ()) -> str:
    """The report for people: scalars first, then a table for each group."""
    scalars = {k: v for k, v in report.items() if not isinstance(v, dict)}
    lines = [f"# {report['model_id']}", ""]
    lines += _table({k: v for k, v in scalars.items() if k != "model_id"})
    for key, value in report.items():
        if isinstance(value, dict) and value:
            lines += _section(key, value, 2)
    for name in plots:
        lines += [f"![{name}]({name}.svg)", ""]
    return "\n".join(lines)


def _section(key: str, value: Mapping[str, Any], level: int) -> list[str]:
    lines = [f"{'#' * level} {_TITLES.get(key, _words(key))}", ""]
    groups = {k: v for k, v in value.items() if isinstance(v, dict)}
    # A curve belongs into the plot and the JSON.
    groups = {k: v for k, v in groups.items() if not _is_curve(v)}
    flat = {k: v for k, v in value.items() if not isinstance(v, dict)}
    if flat:
        lines += _table(flat)
    if groups and not any(isinstance(v, dict) for row in groups.values() for v in row.values()):
        columns = list(dict.fromkeys(column for row in groups.values() for column in row))
        if all(set(row) <= set(columns) and len(row) > 1 for row in groups.values()) and not flat:
            lines += _rows(["", *map(_words, columns)], groups, columns)
            return lines
    for name, group in groups.items():
        lines += _section(name, group, level + 1)
    return lines


def _is_curve(value: Mapping[str, Any]) -> bool:
    return any(isinstance(v, list) and len(v) > 4 for v in value.values())


def _rows(
    head: Sequence[str], rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]
) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        cells = [_value(row.get(column)) for column in columns]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return [*lines, ""]


def _table(values: Mapping[str, Any]) -> list[str]:
    lines = ["| | |", "|---|---|"]
    lines += [f"| {_words(key)} | {_value(value)} |" for key, value in values.items()]
    return [*lines, ""]


def _words(key: str) -> str:
    return key.replace("_", " ")


def _value(value: Any) -> str:
    if value is None:
        return "not enough data"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " to ".join(_value(v) for v in value)
    return str(value)
