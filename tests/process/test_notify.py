"""systemd's notify protocol against real notify sockets: the parts, then the real server."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.running_server import NULL_POOLS, RunningServer, toml
from tests.waiting import until

from facelane_server import limits, notify
from facelane_server.notify import Notifier


class NotifySocket:
    """What systemd listens on: one datagram socket, read in order."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(0.05)
        self.address = address
        self.seen: list[dict[str, str]] = []

    def poll(self) -> list[dict[str, str]]:
        """All messages until now, as fields."""
        while True:
            try:
                data = self._socket.recv(8192)
            except TimeoutError:
                return self.seen
            lines = data.decode().splitlines()
            self.seen.append(dict(line.split("=", 1) for line in lines))

    def wait_for(self, key: str, timeout: float = 30.0) -> dict[str, str]:
        """The first message with ``key`` since the last ``forget``."""
        return until(
            lambda: next((found for found in self.poll() if key in found), None),
            timeout,
            f"a notification with {key}",
        )

    def forget(self) -> None:
        self.poll()
        self.seen.clear()

    def count(self, key: str) -> int:
        return sum(key in found for found in self.poll())

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[NotifySocket]:
    found = NotifySocket(str(tmp_path / "notify"))
    yield found
    found.close()


class TestEnvironment:
    def test_addresses(self) -> None:
        assert notify.socket_address("/run/systemd/notify") == "/run/systemd/notify"
        assert notify.socket_address("@facelane") == "\0facelane"
        for nobody in ("", "@", "relative", "vsock:2:1234"):
            assert notify.socket_address(nobody) is None

    def test_watchdog(self) -> None:
        assert notify.watchdog_seconds({"WATCHDOG_USEC": "30000000"}, 7) == 30.0
        both = {"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "7"}
        assert notify.watchdog_seconds(both, 7) == 1.5
        assert notify.watchdog_seconds(both, 8) is None
        for nonsense in ("", "0", "-1", "1e6", "\u0664", " 5"):
            assert notify.watchdog_seconds({"WATCHDOG_USEC": nonsense}, 7) is None

    @given(st.dictionaries(st.sampled_from(["WATCHDOG_USEC", "WATCHDOG_PID"]), st.text()))
    def test_any_environment_is_survived(self, environ: dict[str, str]) -> None:
        found = notify.watchdog_seconds(environ, 1)
        assert found is None or found > 0

    def test_no_worker_inherits_the_socket(self) -> None:
        environ = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "5", "WATCHDOG_PID": "1", "HOME": "/"}
        Notifier.from_environment(environ)
        assert environ == {"HOME": "/"}

    def test_without_systemd_nothing_happens(self) -> None:
        quiet = Notifier.from_environment({})
        assert not any([quiet.ready(), quiet.status("x"), quiet.stopping(), quiet.feed()])


class TestMessages:
    @given(st.text(), st.integers())
    def test_one_field_is_one_line(self, text: str, number: int) -> None:
        """No text from elsewhere can smuggle a second assignment into a message."""
        lines = notify.message(status=text, n=number).decode().splitlines()
        assert [line.split("=", 1)[0] for line in lines] == ["STATUS", "N"]

    @pytest.mark.parametrize("abstract", [False, True])
    def test_every_message(self, tmp_path: Path, abstract: bool) -> None:
        address = f"@facelane-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
        listener = NotifySocket(address)
        try:
            notifier = Notifier.from_environment({"NOTIFY_SOCKET": address})
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            assert notifier.status("loading")
            assert notifier.extend_timeout(2.5)
            assert notifier.ready("3 pools serve")
            assert notifier.feed()
            assert notifier.reloading()
            assert notifier.stopping()
            found = listener.poll()
        finally:
            listener.close()
        assert found[:4] == [
            {"STATUS": "loading"},
            {"EXTEND_TIMEOUT_USEC": "2500000"},
            {"READY": "1", "STATUS": "3 pools serve"},
            {"WATCHDOG": "1"},
        ]
        assert found[4]["RELOADING"] == "1"
        assert before <= int(found[4]["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        assert found[5]["STOPPING"] == "1"

    def test_a_long_status_is_cut(self, listener: NotifySocket) -> None:
        assert Notifier(listener.address).status("x" * 100_000)
        assert len(listener.poll()[0]["STATUS"]) == limits.MAX_STATUS_CHARS

    def test_nobody_listens(self, tmp_path: Path) -> None:
        assert Notifier(str(tmp_path / "absent")).ready() is False

    def test_a_full_socket_costs_a_message_and_no_time(self, listener: NotifySocket) -> None:
        notifier = Notifier(listener.address)
        until(lambda: not notifier.feed(), what="a full socket")
        assert notifier.feed() is False  # were it waited for, the test would never end


class TestKeepAlive:
    async def test_feeds_while_alive_and_starves_when_not(self, listener: NotifySocket) -> None:
        alive = True
        notifier = Notifier(listener.address, watchdog_s=0.15)
        task = asyncio.create_task(notifier.keep_alive(lambda: alive))
        try:
            await asyncio.sleep(0)
            assert await asyncio.to_thread(listener.wait_for, "WATCHDOG")
            first = listener.count("WATCHDOG")
            await asyncio.to_thread(until, lambda: listener.count("WATCHDOG") >= first + 3)
            alive = False
            await asyncio.sleep(0)
            listener.forget()
            # Longer than the whole interval: systemd would have ended it.
            await asyncio.sleep(0.3)  # the watchdog's interval, twice
            assert listener.count("WATCHDOG") == 0
            alive = True
            assert await asyncio.to_thread(listener.wait_for, "WATCHDOG")
        finally:
            task.cancel()

    async def test_no_watchdog_wanted(self, listener: NotifySocket) -> None:
        await asyncio.wait_for(Notifier(listener.address).keep_alive(lambda: True), 30)
        assert listener.poll() == []


@pytest.fixture(scope="class")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NotifySocket]:
    """What the class's server tells systemd."""
    found = NotifySocket(str(tmp_path_factory.mktemp("told") / "notify"))
    yield found
    found.close()


@pytest.fixture(scope="class")
def server(tmp_path_factory: pytest.TempPathFactory, told: NotifySocket) -> Iterator[RunningServer]:
    """A server that was READY, and served from that moment on."""
    folder = tmp_path_factory.mktemp("server")
    env = {"NOTIFY_SOCKET": told.address, "WATCHDOG_USEC": "1500000"}
    with RunningServer(folder, toml(folder, NULL_POOLS), env=env) as running:
        told.wait_for("READY")
        with running.client() as client:
            assert client.health() == "SERVING"
        yield running


class TestServer:
    def test_the_watchdog_is_fed(self, server: RunningServer, told: NotifySocket) -> None:
        told.forget()
        until(lambda: told.count("WATCHDOG") >= 4, what="four signs of life")

    def test_a_stopped_process_is_silent(self, server: RunningServer, told: NotifySocket) -> None:
        told.forget()
        told.wait_for("WATCHDOG")
        server.process.send_signal(signal.SIGSTOP)
        try:
            process = psutil.Process(server.process.pid)
            until(lambda: process.status() == psutil.STATUS_STOPPED, what="it stands still")
            told.forget()
            time.sleep(1.6)  # the watchdog's whole interval, which is what is tested
            assert told.count("WATCHDOG") == 0
        finally:
            server.process.send_signal(signal.SIGCONT)
        told.wait_for("WATCHDOG")

    def test_a_server_that_cannot_infer_starves_the_watchdog_and_ends_as_told(
        self, tmp_path: Path, listener: NotifySocket
    ) -> None:
        """It answers calls, it reads frames, its process is well: and it is of no use."""
        faults = tmp_path / "faults.toml"
        pools = NULL_POOLS.replace(
            "[pools.detector]",
            "[pools.detector]\nbackoff_max_s = 0.2\nrestart_limit = 1000\n"
            f'options = {{ "fail.from_file" = "{faults}" }}',
        )
        env = {"NOTIFY_SOCKET": listener.address, "WATCHDOG_USEC": "900000"}
        with RunningServer(tmp_path, toml(tmp_path, pools), env=env) as running:
            listener.wait_for("WATCHDOG")
            server_side = next(p for p in running.children() if "detector" in p.name())
            faults.write_text('crash_load = "1"\n')
            server_side.kill()
            with running.client() as client:
                until(lambda: client.health() == "NOT_SERVING", what="NOT_SERVING")
                assert client.health("facelane.process") == "SERVING"
                listener.forget()
                time.sleep(1.0)  # the watchdog's whole interval, which is what is tested
                assert listener.count("WATCHDOG") == 0
                faults.write_text("")
                until(lambda: client.health() == "SERVING", what="SERVING again")
            listener.wait_for("WATCHDOG")
            # And its end is told before it comes.
            running.process.send_signal(signal.SIGTERM)
            listener.wait_for("STOPPING")
            assert running.process.wait(30) == 0

    def test_reload_is_told_from_begin_to_end(
        self, server: RunningServer, told: NotifySocket
    ) -> None:
        told.forget()
        server.process.send_signal(signal.SIGHUP)
        begun = told.wait_for("RELOADING")
        assert int(begun["MONOTONIC_USEC"]) > 0
        told.wait_for("READY")
        order = [key for found in told.poll() for key in found]
        assert order.index("RELOADING") < order.index("READY")

    def test_workers_cannot_speak_for_it(self, server: RunningServer) -> None:
        workers = server.children()
        assert len(workers) == 3
        for worker in workers:
            environ = Path(f"/proc/{worker.pid}/environ").read_bytes()
            assert b"NOTIFY_SOCKET" not in environ
            assert b"WATCHDOG_USEC" not in environ
