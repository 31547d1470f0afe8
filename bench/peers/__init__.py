"""Other servers, each in a virtual environment of its own, serving the very same network.

A peer that cannot be installed or started here is reported as such; nothing about it is
assumed.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

_HERE: Final = Path(__file__).resolve().parent
INSTALL_S: Final = 900.0
START_S: Final = 120.0
REQUEST_S: Final = 5.0
CHIP_BYTES: Final = 112 * 112 * 3


class PeerError(Exception):
    """The peer cannot be measured here; the message says why."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a peer is spoken to. ``path``: of inference; ``health``: of its readiness.

    ``worker``: the name of the process that is killed; empty = the one that infers, by its
    own account. PyTriton infers inside of the very script that starts it, so killing that
    would end everything; the worker that its server keeps for the model is the backend's.
    """

    name: str
    title: str
    path: str
    health: str
    worker: str = ""

    def request(self, chip: bytes) -> tuple[bytes, dict[str, str]]:
        """Body and headers of one inference on one aligned chip."""
        if self.name == "litserve":
            body = json.dumps({"chip": base64.b64encode(chip).decode()}).encode()
            return body, {"Content-Type": "application/json"}
        if self.name == "pytriton":
            head = json.dumps(
                {
                    "inputs": [
                        {
                            "name": "chip",
                            "shape": [1, 112, 112, 3],
                            "datatype": "UINT8",
                            "parameters": {"binary_data_size": len(chip)},
                        }
                    ]
                }
            ).encode()
            headers = {
                "Content-Type": "application/octet-stream",
                "Inference-Header-Content-Length": str(len(head)),
            }
            return head + chip, headers
        return chip, {"Content-Type": "application/octet-stream"}


KINDS: Final = (
    Kind(
        "pytriton",
        "PyTriton 0.7.0",
        "/v2/models/recogniser/infer",
        "/v2/health/ready",
        worker="triton_python_b",  # the kernel cuts names to 15 characters
    ),
    Kind("litserve", "LitServe 0.2.19", "/predict", "/health"),
    Kind("rayserve", "Ray Serve 2.60.0", "/", "/-/healthz"),
)


def environment(kind: Kind, cache: Path) -> Path:
    """The interpreter of the peer's environment, made when it is not there yet.

    Raises PeerError when it cannot be made.
    """
    wanted = _HERE / kind.name / "requirements.txt"
    digest = hashlib.sha256(wanted.read_bytes() + sys.version.encode()).hexdigest()
    folder = cache / "peers" / kind.name
    python = folder / "bin" / "python"
    stamp = folder / "requirements.sha256"
    if stamp.is_file() and stamp.read_text() == digest:
        return python
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "-q", "-r", str(wanted)],
    ):
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=INSTALL_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise PeerError(f"not installed within {INSTALL_S:g} s") from None
        if done.returncode != 0:
            raise PeerError(f"cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    stamp.write_text(digest)
    return python


def _free_port() -> int:
    """The first of three ports in a row that nobody uses."""
    for _ in range(50):
        with contextlib.ExitStack() as stack:
            try:
                first = stack.enter_context(socket.socket())
                first.bind(("127.0.0.1", 0))
                port: int = first.getsockname()[1]
                for offset in (1, 2):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
            except OSError:
                continue
            return port
    raise PeerError("no free ports")


class Peer:
    """A running peer; an async context manager. Leaving it ends all of its processes."""

    def __init__(self, kind: Kind, python: Path, model: Path) -> None:
        self.kind = kind
        self.port = _free_port()
        self._scratch = tempfile.TemporaryDirectory(prefix="flb-", ignore_cleanup_errors=True)
        folder = Path(self._scratch.name)
        self._pids = folder / "pids"
        self._log = folder / "log"
        self._family: dict[int, psutil.Process] = {}
        script = _HERE / kind.name / "serve.py"
        arguments = [str(model), str(self.port), str(self._pids), str(folder / "work")]
        environ = dict(os.environ)
        # PyTriton's server process links the interpreter it was built with dynamically.
        environ["LD_LIBRARY_PATH"] = str(sysconfig.get_config_var("LIBDIR"))
        environ["RAY_USAGE_STATS_ENABLED"] = "0"
        environ["OMP_NUM_THREADS"] = "1"
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                [str(python), str(script), *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,
            )

    async def __aenter__(self) -> Self:
        chip = bytes(CHIP_BYTES)
        deadline = time.monotonic() + START_S
        while not await self.infer(chip):
            self._remember()
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = self._log.read_text(errors="replace").strip().splitlines()[-3:]
                await self.__aexit__(None, None, None)
                raise PeerError(f"did not start: {' | '.join(log)[-300:]}")
            await asyncio.sleep(0.2)
        self._remember()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remember()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self.process.wait, 15)
        for process in self._family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process.poll() is None:
            self.process.kill()
        await asyncio.to_thread(self.process.wait, 10)
        self._scratch.cleanup()

    def _remember(self) -> None:
        """All descendants, so that those whose parent dies can still be ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._family[child.pid] = child

    def kill_worker(self) -> int:
        """SIGKILL to the model's worker process; its pid."""
        self._remember()
        if self.kind.worker:
            pid: int = next(
                process.pid
                for process in self._family.values()
                if process.is_running() and process.name().startswith(self.kind.worker)
            )
        else:
            pid = int(self._pids.read_text().split()[-1])
        os.kill(pid, signal.SIGKILL)
        return pid

    async def infer(self, chip: bytes) -> bool:
        """One inference. Whether an embedding came back."""
        body, headers = self.kind.request(chip)
        status, answer = await self._http("POST", self.kind.path, body, headers)
        return status == 200 and b"embedding" in answer

    async def healthy(self) -> bool:
        """What the peer says of itself."""
        status, _ = await self._http("GET", self.kind.health, b"", {})
        return status == 200

    async def _http(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, bytes]:
        """(status, body); status 0 when there was no answer."""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
        try:
            async with asyncio.timeout(REQUEST_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                try:
                    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
                    answer = await reader.read()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return 0, b""
        head = answer.split(b"\r\n", 1)[0].split()
        return (int(head[1]) if len(head) > 1 and head[1].isdigit() else 0), answer
