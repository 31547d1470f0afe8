"""What the tests of a running bridge share."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.fakes.cameras import jpeg

from facelane_bridge import config
from facelane_bridge.bridge import Bridge, BridgeReport
from facelane_bridge.config import BridgeSettings
from facelane_bridge.output import (
    Callback,
    DropLine,
    ErrorLine,
    Line,
    ResultLine,
    StateLine,
)


def settings(target: str, *cameras: dict[str, Any], **server: Any) -> BridgeSettings:
    return config.from_mapping({"server": {"target": target} | server, "camera": list(cameras)})


async def run(
    given: BridgeSettings, timeout: float = 30.0, **options: Any
) -> tuple[BridgeReport, list[Line]]:
    lines: list[Line] = []
    bridge = Bridge(given, Callback(lines.append), **options)
    async with asyncio.timeout(timeout):
        report = await bridge.run()
    assert_balanced(report, lines)
    return report, lines


def assert_balanced(report: BridgeReport, lines: list[Line]) -> None:
    """Every frame has exactly one outcome, and the lines say the same as the counters."""
    for name, totals in report.summary.cameras.items():
        assert totals.balanced, (name, totals)
        mine = [line for line in lines if getattr(line, "camera", None) == name]
        ids: list[int] = []
        for line in mine:
            if isinstance(line, DropLine):
                ids += range(line.frame_id, line.frame_id + line.count)
            elif isinstance(line, ResultLine | ErrorLine):
                ids.append(line.frame_id)
        assert sorted(ids) == list(range(1, totals.frames + 1))
        results = [line.frame_id for line in mine if isinstance(line, ResultLine)]
        assert results == sorted(results)
        assert len(results) == totals.results


def states(lines: list[Line], camera: str = "a") -> list[str]:
    return [line.state for line in lines if isinstance(line, StateLine) and line.camera == camera]


PICTURE = jpeg(1)
