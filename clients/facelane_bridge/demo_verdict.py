"""What was recognised in the demo, held against the script of its clip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class StretchCount:
    """What was recognised in one stretch of the clip."""

    results: int = 0
    faces: int = 0
    named: Counter[str] = field(default_factory=Counter)
    """Frames in which a subject was named."""
    decisions: Counter[str] = field(default_factory=Counter)
    liveness: Counter[str] = field(default_factory=Counter)


class Verdict:
    """Holds the results against the clip's script."""

    NAMED_SHARE = 0.5
    """Of the results of a clear stretch, so many must name who is in view."""

    def __init__(self) -> None:
        from facelane_bridge.demo_clip import SCRIPT

        self._script = SCRIPT
        self.counts = [StretchCount() for _ in SCRIPT]

    def take(self, offset: float, faces: Sequence[Any]) -> int:
        """Count one result (``output.FaceLine`` each); gives the number of its stretch."""
        from facelane_bridge.demo_clip import stretch_at

        # Media times are rounded by the container: a millisecond decides nothing.
        number = self._script.index(stretch_at(offset + 0.002))
        count = self.counts[number]
        count.results += 1
        count.faces += len(faces)
        count.named.update({face.subject_id for face in faces if face.decision == "MATCH"})
        count.decisions.update(face.decision for face in faces)
        count.liveness.update(face.liveness for face in faces)
        return number

    def problems(self, report: Any) -> list[str]:
        """What is not as it has to be, in sentences; empty = all is well."""
        from facelane_bridge.demo_clip import StretchKind

        summary = report.summary
        found = []
        if summary.frames == 0:
            found.append("the camera gave no frame")
        if summary.frames != summary.results + summary.drops + summary.errors:
            found.append("frames without an outcome")
        if summary.errors:
            found.append(f"{summary.errors} frames ended in errors")
        if report.failed:
            reasons = {camera.reason for camera in summary.cameras.values()}
            found.append(f"the camera failed: {', '.join(sorted(reasons))}")
        for stretch, count in zip(self._script, self.counts, strict=True):
            where = f"the {stretch.kind.value} stretch at {stretch.start:g} s"
            strangers = sorted(count.named.keys() - set(stretch.subjects))
            found += [f"{subject} was named in {where}, where she is not" for subject in strangers]
            if stretch.kind in (StretchKind.BLURRED, StretchKind.DARK) and count.named:
                found.append(f"somebody was named in {where}")
            if stretch.kind is StretchKind.CLEAR:
                if count.results == 0:
                    found.append(f"no result came from {where}: is the machine overloaded?")
                found += [
                    f"{subject} was named in {count.named[subject]} of the {count.results} "
                    f"results of {where}"
                    for subject in stretch.subjects
                    if count.named[subject] < self.NAMED_SHARE * count.results
                ]
        return found

    def line(self, report: Any) -> dict[str, Any]:
        """The demo's last line."""
        summary = report.summary
        named: Counter[str] = Counter()
        rejected = 0
        for count in self.counts:
            named.update(count.named)
            rejected += count.decisions["REJECTED_OOD"]
        latency = next(iter(summary.cameras.values()))
        return {
            "frames": summary.frames,
            "results": summary.results,
            "drops": summary.drops,
            "errors": summary.errors,
            "faces": summary.faces,
            "subjects": dict(sorted(named.items())),
            "rejected_ood": rejected,
            "p50_ms": latency.p50_ms,
            "p99_ms": latency.p99_ms,
        }

    def tell(self, console: Any) -> None:
        """A table of the stretches."""
        from rich.table import Table

        table = Table(title="what the camera saw, and what was recognised", title_justify="left")
        for column in ("from", "stretch", "in view", "results", "faces", "named", "live"):
            table.add_column(column, overflow="fold")
        for stretch, count in zip(self._script, self.counts, strict=True):
            decisions = [f"{subject} {frames}x" for subject, frames in sorted(count.named.items())]
            decisions += [
                f"{decision.lower().replace('_', ' ')} {faces}x"
                for decision, faces in sorted(count.decisions.items())
                if decision != "MATCH"
            ]
            liveness = [f"{verdict.lower()} {n}x" for verdict, n in sorted(count.liveness.items())]
            table.add_row(
                f"{stretch.start:g} s",
                stretch.kind.value,
                "\n".join(stretch.subjects),
                str(count.results),
                str(count.faces),
                "\n".join(decisions),
                "\n".join(liveness),
            )
        console.print(table)
