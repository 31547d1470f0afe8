"""Every camera's books over its runs: pure.

A run is what one bridge made of a camera in one term. Its books balance when it has ended: frames =
results + drops + errors. Of a run whose node or bridge was lost the last that was told counts, and
frames that were on their way then are errors (``BRIDGE_LOST``, ``NODE_LOST``).
"""

from __future__ import annotations

import msgspec

from facelane_bridge.hosting import CameraReport, added
from facelane_bridge.output import CameraTotals
from facelane_fleet.messages import Books, EndedRun, Memo


def closed(report: CameraReport, reason: str) -> CameraReport:
    """The books of a run that nobody can go on with."""
    totals = msgspec.structs.replace(report.totals)
    if totals.in_flight:
        reasons = dict(totals.errors_by_reason)
        reasons[reason] = reasons.get(reason, 0) + totals.in_flight
        totals.errors += totals.in_flight
        totals.errors_by_reason = reasons
        totals.in_flight = 0
    totals.state, totals.reason = "STOPPED", reason
    return CameraReport(
        term=report.term,
        totals=totals,
        ended=True,
        first_result_at=report.first_result_at,
        last_result_at=report.last_result_at,
        gap_s=report.gap_s,
    )


def accounted(totals: CameraTotals) -> bool:
    """Whether every frame has one outcome, or is on its way."""
    done = totals.results + totals.drops + totals.errors
    return totals.in_flight >= 0 and totals.frames == done + totals.in_flight


def book(
    books: dict[str, Books],
    camera: str,
    report: CameraReport,
    *,
    lost: bool,
    given_up: bool = False,
) -> None:
    """Adds a run that is over. ``given_up``: with its node, which may tell of it all the same."""
    before = books.get(camera) or Books(totals=CameraTotals())
    total = added(before.totals, report.totals)
    total.in_flight = 0
    books[camera] = Books(
        totals=total,
        runs=before.runs + 1,
        lost_runs=before.lost_runs + int(lost),
        closed_term=report.term if given_up else before.closed_term,
    )


def take_over(memo: Memo, incarnation: str, ended: list[EndedRun]) -> bool:
    """Adds what a node tells of runs that are over, each once; whether anything was new."""
    last = memo.taken.get(incarnation, 0)
    fresh = [run for run in ended if run.number > last]
    for run in fresh:
        known = memo.books.get(run.camera)
        if known is None or run.report.term > known.closed_term:
            lost = run.report.totals.reason == "BRIDGE_LOST"
            book(memo.books, run.camera, run.report, lost=lost)
    if fresh:
        memo.taken[incarnation] = max(run.number for run in fresh)
    return bool(fresh)
