"""What the cases of cameras share: settings, an opening, a whole bridge beside the test."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any, Self

import pytest

from facelane_bridge import config
from facelane_bridge.bridge import Bridge
from facelane_bridge.config import CameraSettings
from facelane_bridge.output import Callback, Line, ResultLine, StateLine
from facelane_bridge.sources import CapturedFrame, SourceError, open_source
from tests.fakes.scripted_server import ScriptedServer


def settings(source: str, **options: Any) -> CameraSettings:
    return config.single(source, server={}, options=options).cameras[0]


def frames(source: str, count: int, **options: Any) -> list[CapturedFrame]:
    """The first frames of a source. Raises ``SourceError``."""
    opened = open_source(settings(source, **options))
    found: list[CapturedFrame] = []
    try:
        opened.open()
        while len(found) < count and (frame := opened.read()) is not None:
            found.append(frame)
    finally:
        opened.close()
    return found


def failure(source: str, **options: Any) -> SourceError:
    """Why a source gives nothing."""
    with pytest.raises(SourceError) as caught:
        frames(source, 1, **options)
    return caught.value


class Watched:
    """A bridge with one camera and a server that answers everything, beside the test."""

    def __init__(self, source: str, **options: Any) -> None:
        self.lines: list[Line] = []
        self._source, self._options = source, options

    @property
    def states(self) -> list[str]:
        return [line.state for line in self.lines if isinstance(line, StateLine)]

    @property
    def reasons(self) -> list[str]:
        return [line.reason for line in self.lines if isinstance(line, StateLine)]

    @property
    def results(self) -> int:
        return sum(1 for line in self.lines if isinstance(line, ResultLine))

    @property
    def openings(self) -> int:
        return self.bridge.totals["door"].openings

    async def __aenter__(self) -> Self:
        self._server = ScriptedServer()
        camera = {"name": "door", "source": self._source, "backoff_initial": 0.05}
        given = {"server": {"target": self._server.target}, "camera": [camera | self._options]}
        self.bridge = Bridge(config.from_mapping(given), Callback(self.lines.append))
        self._task = asyncio.create_task(self.bridge.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.bridge.stop()
        try:
            report = await asyncio.wait_for(self._task, 30)
        finally:
            self._server.stop()
        assert report.summary.cameras["door"].balanced


def certificate(folder: Path, name: str, *extra: str) -> tuple[Path, Path]:
    """A self-signed certificate made out to ``name``, and its key."""
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", key, "-out", cert, "-days", "30", "-subj", f"/CN={name}", *extra],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return cert, key
