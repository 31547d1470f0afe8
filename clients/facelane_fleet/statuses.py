"""How a fleet fares, for people: pure. A table, or JSON."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

import msgspec

from facelane_bridge.hosting import added
from facelane_bridge.output import CameraTotals
from facelane_fleet.accounts import accounted
from facelane_fleet.config import Settings
from facelane_fleet.messages import Books, CameraStatus, Memo, NodeStatus, Status
from facelane_fleet.placement import WHAT_TO_DO, Why
from facelane_fleet.sightings import Known, Seen

GAP_WINDOW_S: Final = 60.0


def build(
    memo: Memo,
    settings: Settings,
    known: Mapping[str, Known],
    seen: Mapping[str, Seen],
    unplaced: Mapping[str, Why],
    changes: list[str],
    *,
    since: datetime,
    pid: int,
    recovered: bool,
    window: float = GAP_WINDOW_S,
) -> Status:
    """The whole fleet."""
    counts = Counter(held.node for held in memo.state.held.values())
    return Status(
        fleet=settings.fleet.name,
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        supervisor_pid=pid,
        supervisor_since=since.isoformat(timespec="milliseconds"),
        revision=memo.state.revision,
        recovered=recovered,
        nodes=[
            _node(one, memo, counts)
            for one in sorted(known.values(), key=lambda one: (one.info.name, one.info.id))
        ],
        cameras=[
            _camera(name, memo, known, seen, unplaced, window) for name in sorted(settings.cameras)
        ],
        changes=changes,
    )


def _node(one: Known, memo: Memo, counts: Counter[str]) -> NodeStatus:
    report, name = one.report, one.info.name
    message = ""
    if not one.alive:
        state, message = "LOST", "its cameras are placed elsewhere as soon as it cannot run them"
    elif report is None:
        state = "STARTING"
        message = "waits for its agent: are its cards free (`ray status`), facelane[fleet] there?"
    elif not one.answered:
        state, message = "SILENT", "it did not answer in time"
    else:
        state = "DRAINING" if name in memo.state.draining else "UP"
    return NodeStatus(
        id=one.info.id,
        name=name,
        address=one.info.address,
        state=state,
        cards=one.info.cards,
        cameras=counts[one.info.id],
        message=message,
        bridge=report.bridge if report is not None else "",
        servers=report.servers if report is not None else [],
    )


def _camera(
    name: str,
    memo: Memo,
    known: Mapping[str, Known],
    seen: Mapping[str, Seen],
    unplaced: Mapping[str, Why],
    window: float,
) -> CameraStatus:
    held = memo.state.held.get(name)
    books = memo.books.get(name) or Books(totals=CameraTotals())
    made = CameraStatus(
        name=name,
        state="UNPLACED",
        pinned=memo.state.pins.get(name, ""),
        total=msgspec.structs.replace(books.totals),
        runs=books.runs,
        lost_runs=books.lost_runs,
    )
    if held is not None:
        one = known.get(held.node)
        made.node = memo.names.get(held.node, held.node)
        at, _, slot = held.server.rpartition("/")
        made.server = f"{memo.names.get(at, at)}/{slot}"
        made.term = held.term
        report = one.report.reports.get(name) if one is not None and one.report else None
        made.state = "MOVING" if held.leaving else "PLACED"
        if report is not None and report.term == held.term:
            made.stream = report.totals
            made.first_result_at = report.first_result_at
            made.total = added(books.totals, report.totals)
            made.runs += 1
            if not held.leaving:
                made.state, made.reason = report.totals.state, report.totals.reason
        if not held.leaving and made.node in memo.state.draining:
            made.reason = made.reason or "its node drains, and it has no other place yet"
    elif name in unplaced:
        made.reason = f"{unplaced[name].value}: {WHAT_TO_DO[unplaced[name]]}"
    made.balanced = accounted(made.total) and accounted(made.stream)
    times = seen.get(name)
    now = time.time()
    if times is not None and times.last_result_at is not None:
        made.last_result_at = times.last_result_at
        made.age_s = round(max(0.0, now - times.last_result_at), 3)
        made.gap_s = round(
            max((gap for at, gap in times.gaps if now - at <= window), default=0.0), 3
        )
    return made


def well(status: Status) -> bool:
    """Whether every camera has a place, streams, and its books balance."""
    return status.recovered and all(
        camera.state == "STREAMING" and camera.balanced and camera.age_s is not None
        for camera in status.cameras
    )


def table(status: Status) -> str:
    """The same as text, of lines of 120 characters at most where names are short."""
    lines = [f"fleet {status.fleet}, {len(status.cameras)} cameras, {len(status.nodes)} nodes"]
    if not status.recovered:
        lines.append("the supervisor waits for every node to tell what it has; nothing is placed")
    rows: list[tuple[str, ...]] = [
        ("node", "state", "cameras", "server", "", "restarts", "load", "room", "")
    ]
    for node in status.nodes:
        first = (node.name, node.state, str(node.cameras))
        if not node.servers:
            rows.append((*first, "-", "", "", "", "", node.message))
        for server in node.servers:
            load = (
                f"{server.offered_fps:.0f}/{server.capacity_fps:.0f}/s"
                if server.capacity_fps and server.offered_fps is not None
                else "-"
            )
            room = "-" if server.room is None else str(server.room)
            card = f"card {server.card}" if server.card else "cpu"
            told = server.message or node.message
            rows.append(
                (*first, f"{server.slot} {card}", server.state, str(server.restarts), load, room,
                 told)
            )  # fmt: skip
            first = ("", "", "")
    lines += [*_aligned(rows), ""]
    rows = [
        ("camera", "state", "node", "server", "runs", "frames", "results", "drops", "errors",
         "age s", "gap s", "")
    ]  # fmt: skip
    for camera in status.cameras:
        total = camera.total
        notes = [camera.reason]
        if camera.pinned:
            notes.append(f"pinned to {camera.pinned}")
        if camera.lost_runs:
            notes.append(f"{camera.lost_runs} runs lost")
        if not camera.balanced:
            notes.append("BOOKS DO NOT BALANCE")
        rows.append(
            (
                camera.name, camera.state, camera.node or "-", camera.server or "-",
                str(camera.runs), str(total.frames), str(total.results), str(total.drops),
                str(total.errors), "-" if camera.age_s is None else f"{camera.age_s:.1f}",
                f"{camera.gap_s:.1f}", ", ".join(filter(None, notes)),
            )
        )  # fmt: skip
    return "\n".join([*lines, *_aligned(rows)])


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
