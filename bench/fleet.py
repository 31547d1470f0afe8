"""A fleet on three nodes: how long cameras are without results when a node is lost, one comes, one
is drained, a camera is moved, the supervisor is killed; and whether every frame has its outcome.

Nodes are Ray's, as processes of this machine, begun by Ray's own tests' means or (part ``bare``) by
`ray start`, as on machines of their own; servers, workers, bridges and cameras (HTTP-MJPEG,
small pictures) are real, models compute nothing: what is measured is the fleet, not recognition.
Gaps are between results, as the bridges have them; over moves and losses, from the last result of
the one run to the first of the next.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Final

from bench.fleet_rig import Rig
from bench.material import MissingError
from bench.report import Report, Row
from bench.settings import Settings

CAMERAS: Final = 24
FPS: Final = 2.0
AIM_S: Final = 10.0
PATIENCE_S: Final = 120.0
QUIET_S: Final = 8.0


async def run(settings: Settings) -> Report:
    try:
        import ray  # noqa: F401
    except ImportError:
        raise MissingError("ray is not here: pip install 'facelane[fleet]'") from None
    report = Report("fleet", smoke=settings.smoke)
    _run(settings, report)  # Ray wants the main thread
    return report


def _run(settings: Settings, report: Report) -> None:
    import cv2
    import numpy as np

    done, picture = cv2.imencode(".jpg", np.full((96, 128, 3), 90, np.uint8))
    assert done
    cameras = settings.sized(CAMERAS, 4)
    with (
        tempfile.TemporaryDirectory(prefix="facelane-bench-") as folder,
        Rig(
            Path(folder), cameras=cameras, nodes=settings.sized(3, 2), fps=FPS,
            picture=picture.tobytes(), bare=settings.only == ("bare",),
        ) as rig,
    ):  # fmt: skip
        settings.say("the fleet begins")
        begun = time.time()
        rig.up()
        rig.wait(rig.streaming, PATIENCE_S, "every camera streams")
        _row(report, rig, "begin", begun, rig.names())
        rig.wait(lambda: _even(rig), PATIENCE_S, "an even spread")
        time.sleep(QUIET_S)
        _lose(settings, report, rig)
        settings.keep(report)
        _join(settings, report, rig)
        settings.keep(report)
        _drain(settings, report, rig)
        _move(settings, report, rig)
        settings.keep(report)
        _kill_supervisor(settings, report, rig)
        _books(report, rig)


def _even(rig: Rig) -> bool:
    """Whether all stream, and no node has more than one camera more than another."""
    status = rig.status()
    if status is None or not rig.streaming():
        return False
    spread = rig.spread()
    taking = [node.name for node in status.nodes if node.state == "UP" and node.servers]
    counts = [spread.get(name, 0) for name in taking]
    return bool(counts) and max(counts) - min(counts) <= 1


def _row(
    report: Report, rig: Rig, scenario: str, since: float, touched: list[str], **extra: object
) -> Row:
    """What a change did to the cameras that it touched, and to the others."""
    found = rig.look(window=time.time() - since)
    others = [found[name].gap_s for name in rig.names() if name not in touched]
    again = [(found[name].first_result_at or since) - since for name in touched]
    row = Row(
        deployment="fleet",
        scenario=scenario,
        rate_hz=FPS,
        extra={
            "cameras": len(touched),
            "results_again_s": max(again, default=None),
            "gap_touched_s": max((found[name].gap_s for name in touched), default=None),
            "gap_others_s": max(others, default=None),
            "frames_missed_by_others": (max(0, round(max(others) * FPS) - 1) if others else None),
            "total_s": time.time() - since,
            **extra,
        },
    )
    return report.add(row)


def _lose(settings: Settings, report: Report, rig: Rig) -> None:
    last = rig.names()  # cameras of the node that goes
    status = rig.status()
    assert status is not None
    node = status.nodes[-1].name
    last = [name for name, one in rig.look().items() if one.node == node]
    settings.say(f"{node} is killed, with {len(last)} cameras")
    begun = time.time()
    rig.kill_node(node)
    rig.wait(
        lambda: (
            rig.streaming(last, begun)
            and all(
                (one.first_result_at or 0) > begun for n, one in rig.look().items() if n in last
            )
        ),
        PATIENCE_S,
        "results of the lost node's cameras",
    )
    time.sleep(QUIET_S / 4)
    row = _row(report, rig, "a node is killed", begun, last)
    report.aim(
        "seconds until every camera of a killed node gives results again",
        float(row.extra["results_again_s"]), AIM_S, at_most=True,
    )  # fmt: skip
    if row.extra["frames_missed_by_others"] is not None:
        report.aim(
            "frames missed by the other nodes' cameras meanwhile",
            float(row.extra["frames_missed_by_others"]), 1, at_most=True,
        )  # fmt: skip


def _join(settings: Settings, report: Report, rig: Rig) -> None:
    time.sleep(QUIET_S)
    before = {name: one.term for name, one in rig.look().items()}
    begun = time.time()
    node = rig.add_node()
    settings.say(f"{node} comes")
    rig.wait(lambda: node in rig.spread() and _even(rig), PATIENCE_S, "an even spread")
    moved = [name for name, one in rig.look().items() if one.term != before[name]]
    time.sleep(QUIET_S / 4)
    _row(report, rig, "a node comes", begun, moved, spread=str(sorted(rig.spread().values())))


def _drain(settings: Settings, report: Report, rig: Rig) -> None:
    time.sleep(QUIET_S)
    node = max(rig.spread())
    there = [name for name, one in rig.look().items() if one.node == node]
    settings.say(f"{node} is drained of {len(there)} cameras")
    begun = time.time()
    rig.command("drain", node)
    rig.wait(lambda: node not in rig.spread() and rig.streaming(), PATIENCE_S, "an empty node")
    time.sleep(QUIET_S / 4)
    _row(report, rig, "a node is drained", begun, there)
    rig.command("drain", "--undo", node)
    rig.wait(lambda: _even(rig), PATIENCE_S, "an even spread")


def _move(settings: Settings, report: Report, rig: Rig) -> None:
    time.sleep(QUIET_S)
    name = rig.names()[0]
    before = rig.look()[name]
    settings.say(f"{name} is moved off {before.node}")
    begun = time.time()
    rig.command("move", name)
    rig.wait(
        lambda: rig.look()[name].node != before.node and rig.streaming([name], begun),
        PATIENCE_S, "the move",
    )  # fmt: skip
    time.sleep(QUIET_S / 4)
    changed = [one for one, now in rig.look().items() if (now.first_result_at or 0) > begun]
    _row(report, rig, "a camera is moved", begun, sorted({name, *changed}))


def _kill_supervisor(settings: Settings, report: Report, rig: Rig) -> None:
    time.sleep(QUIET_S)
    before = {name: one.term for name, one in rig.look().items()}
    settings.say("the supervisor is killed")
    begun = time.time()
    old = rig.kill_supervisor()

    def again() -> bool:
        status = rig.status()
        return status is not None and status.recovered and status.supervisor_pid != old

    seconds = rig.wait(again, PATIENCE_S, "another supervisor")
    rig.wait(rig.streaming, PATIENCE_S, "what it knows of the cameras")
    time.sleep(QUIET_S / 4)
    moved = [name for name, one in rig.look().items() if one.term != before[name]]
    _row(report, rig, "the supervisor is killed", begun, moved, supervisor_again_s=seconds)


def _books(report: Report, rig: Rig) -> None:
    found = rig.look()
    total = [one.total for one in found.values()]
    frames = sum(one.frames for one in total)
    report.note(
        f"{sum(one.balanced for one in found.values())} of {len(found)} cameras balance: {frames} "
        f"frames = {sum(one.results for one in total)} results + "
        f"{sum(one.drops for one in total)} drops + {sum(one.errors for one in total)} errors + "
        f"{sum(one.in_flight for one in total)} on their way, in "
        f"{sum(one.runs for one in found.values())} runs, "
        f"{sum(one.lost_runs for one in found.values())} of them lost with their node"
    )
    readers = max(rig.simulated.most_readers.values())
    report.aim("readers of a camera at one time", readers, 1, at_most=True)
