"""What events are delivered to, and the program that delivers them, as processes that die.

``python -m tests.fakes.receivers webhook|syslog|hang|fail PORT FILE`` writes each body that it
takes to FILE, a line each, before it answers.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.waiting import until


def found(name: str) -> str | None:
    """A broker's program, where Debian puts it."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


class Deliverer:
    """``facelane-events run`` on a configuration; killed and started as often as wanted."""

    def __init__(self, folder: Path, target: str, sinks: str) -> None:
        self.state = folder / "state"
        self.config = folder / "events.toml"
        self.config.write_text(
            f'state_dir = "{self.state}"\n[server]\ntarget = "{target}"\n{sinks}'
        )
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "facelane_events", "run", str(self.config)], stderr=log
            )

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        code = self._process.wait(60)
        self._process = None
        return code

    def ask(self, command: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "facelane_events", command, str(self.config)],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def log(self) -> str:
        return self._log.read_text()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(60)


class Broker:
    """A receiver's process, on a port of its own; killed and started again."""

    def __init__(self, command: list[str], port: int) -> None:
        self._command, self.port = command, port
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until(self._answers, what=f"{self._command[0]} on port {self.port}")

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(60)
            self._process = None


def mosquitto(program: str, port: int, folder: Path) -> Broker:
    """It keeps what it has at every change."""
    folder.mkdir(exist_ok=True)
    config = folder / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nuser root\n"
        f"persistence true\npersistence_location {folder}/\n"
        "autosave_interval 1\nautosave_on_changes true\nmax_queued_messages 0\n"
    )
    return Broker([program, "-c", str(config)], port)


def nats_server(program: str, port: int, folder: Path) -> Broker:
    command = [program, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(folder)]
    return Broker(command, port)


def receiver(kind: str, port: int, path: Path) -> Broker:
    """One of this module's own."""
    return Broker([sys.executable, "-m", "tests.fakes.receivers", kind, str(port), str(path)], port)


def _serve(kind: str, port: int, path: Path) -> None:
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    class Web(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            body = self.rfile.read(size)
            if len(body) < size:  # who sent it died in the middle
                self.close_connection = True
                return
            if kind == "hang":
                threading.Event().wait()
            if kind == "webhook":
                os.write(out, body + b"\n")
            self.send_response(204 if kind == "webhook" else 500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            pass

    class Syslog(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while size := self._size():
                record = self.rfile.read(size)
                if len(record) < size:
                    return
                os.write(out, record.partition(b"\xef\xbb\xbf")[2] + b"\n")

        def _size(self) -> int:
            digits = b""
            while (one := self.rfile.read(1)) not in (b"", b" "):
                digits += one
            return int(digits or b"0") if one else 0

    class Threads(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    if kind == "syslog":
        with Threads(("127.0.0.1", port), Syslog) as listening:
            listening.serve_forever()
    else:
        ThreadingHTTPServer.daemon_threads = True
        with ThreadingHTTPServer(("127.0.0.1", port), Web) as web:
            web.serve_forever()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
