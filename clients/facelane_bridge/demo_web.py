"""``make demo WEB=1``: the web console beside the demo, on the same server and clip."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import re
import socket
import subprocess
import sys
import webbrowser
from pathlib import Path
from types import TracebackType
from typing import Self

from facelane_bridge.tether import tethered

PORT = 9160
START_S = 60.0
STOP_S = 15.0
_ADDRESS = re.compile(r"http://\S+")


class NoConsoleError(Exception):
    """The console cannot be shown; the message says why."""


class WebConsole:
    """``facelane-console`` on this machine's own address. Leaving the context stops it."""

    def __init__(self, target: str, folder: Path) -> None:
        if importlib.util.find_spec("starlette") is None:
            raise NoConsoleError("the console is not installed: pip install 'facelane[console]'")
        self._target = target
        self._log = folder / "console.log"
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._start)
        assert self._process is not None
        try:
            async with asyncio.timeout(START_S):
                while not await asyncio.to_thread(self._answers):
                    if self._process.poll() is not None:
                        raise NoConsoleError(f"the console ended at its start:\n{self._said()}")
                    await asyncio.sleep(0.1)
        except BaseException as error:
            self._stop()
            if isinstance(error, TimeoutError):
                raise NoConsoleError(f"the console does not answer:\n{self._said()}") from None
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _start(self) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                tethered(
                    sys.executable, "-m", "facelane_console", "--target", self._target,
                    "--listen", f"127.0.0.1:{_port()}",
                ),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                # Ctrl-C is for the demo, which stops it in order.
                start_new_session=True,
            )  # fmt: skip

    @property
    def address(self) -> str:
        """Where browsers find it; empty = not yet."""
        found = _ADDRESS.search(self._said())
        return found[0] if found else ""

    def open(self) -> bool:
        """In this machine's browser, where there is one."""
        with contextlib.suppress(webbrowser.Error, OSError):
            return webbrowser.open(self.address)
        return False

    def _answers(self) -> bool:
        found = re.fullmatch(r"http://(.*):(\d+)/", self.address)
        if found is None:
            return False
        with contextlib.suppress(OSError), socket.create_connection((found[1], int(found[2])), 1.0):
            return True
        return False

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def _stop(self) -> None:
        process = self._process
        assert process is not None
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_S)


def _port() -> int:
    """The console's usual one, or one that is free."""
    for port in (PORT, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise NoConsoleError("no port is free on 127.0.0.1")
