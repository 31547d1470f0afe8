"""A program of ``examples/`` in a process of its own, and the lines that it prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from tests.waiting import until

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

Line = dict[str, Any]


class RunningExample:
    """Started on entering, interrupted on leaving, which it must survive with the code 0."""

    def __init__(self, name: str | Path, *arguments: str, env: Mapping[str, str] = {}) -> None:
        """``name``: of ``examples/``, or the path of a program of node's."""
        node = isinstance(name, Path)
        self._command = ["node" if node else sys.executable, str(EXAMPLES / name), *arguments]
        self._env = env

    def __enter__(self) -> Self:
        self._out = tempfile.TemporaryFile()
        self._err = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self._env},
        )
        return self

    @property
    def lines(self) -> list[Line]:
        return [
            json.loads(line) for line in _read(self._out).splitlines(keepends=True) if "\n" in line
        ]

    @property
    def complaints(self) -> str:
        return _read(self._err)

    def wait_for(self, wanted: Callable[[Line], object]) -> Line:
        """The first line that is wanted."""

        def found() -> list[Line]:
            assert self._process.poll() is None, self.complaints
            return [line for line in self.lines if wanted(line)]

        return until(found, what=f"a line of {self._command[1]}")[0]

    def __exit__(self, *_exc: object) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait(10)
            complaints = self.complaints
            self._out.close()
            self._err.close()
        assert code == 0, complaints


def _read(file: Any) -> str:
    return os.pread(file.fileno(), 1 << 24, 0).decode()
