"""The service under a real systemd, in a container that boots one.

Takes minutes, root and Debian's `debootstrap` and `systemd-container`, so it runs only
when asked: FACELANE_BOOT_TEST=1 (and FACELANE_BOOT_ROOT=DIR to keep the unpacked system
between runs). What only a real systemd can show is checked here: readiness, the watchdog,
restarts and their limits by exit code, credentials, users, external workers, and that the
hardening leaves the service able to work.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
PACKAGES = "systemd,systemd-sysv,dbus,libgomp1,libglib2.0-0,procps,python3"
SERVER = "facelane-server.service"
NULL_MODELS = "".join(
    f'[pools.{stage}]\nmodel = "null-{stage}"\n{{extra_{stage}}}\n'
    for stage in ("detector", "recognizer", "liveness")
)

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not os.environ.get("FACELANE_BOOT_TEST"),
        reason="boots a whole system: set FACELANE_BOOT_TEST=1, as root, with Debian's "
        "debootstrap and systemd-container installed",
    ),
]


def config(**extra: str) -> str:
    """A server.toml on null models, with extra lines for a pool."""
    lines = {f"extra_{stage}": extra.get(stage, "") for stage in ("detector", "recognizer")}
    return '[log]\nformat = "json"\n' + NULL_MODELS.format(extra_liveness="", **lines)


class Machine:
    """A booted system. ``run`` executes in it; ``close`` shuts it down."""

    def __init__(self, root: Path) -> None:
        self.root = root
        dependencies = sysconfig.get_path("purelib")
        self.process = subprocess.Popen(
            [
                *("systemd-nspawn", "-D", str(root), "-b", "-q", "--register=no"),
                *("--keep-unit", "--private-network", "--console=pipe"),
                f"--bind-ro={dependencies}:/opt/facelane-dependencies",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self.leader = until(self._find_leader, what="the container's first process")
        until(self._is_booted, what="a booted system")

    def _find_leader(self) -> int:
        assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if child.name() == "systemd":
                return child.pid
        return 0

    def _is_booted(self) -> bool:
        state = self.run("systemctl", "is-system-running", check=False).strip()
        # `degraded`: a unit of the distribution that cannot work in a container.
        return state in ("running", "degraded")

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            ["nsenter", "-t", str(self.leader), "-m", "-u", "-i", "-n", "-p", "-C", "--", *command],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def show(self, unit: str, prop: str) -> str:
        return self.run("systemctl", "show", "-P", prop, unit).strip()

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "-u", unit, "-n", "200", "--no-pager", "-o", "cat")

    def start(self, unit: str) -> None:
        try:
            self.run("systemctl", "start", unit)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.journal(unit)}") from None

    def wait_active(self, unit: str, timeout: float = 60) -> None:
        try:
            until(lambda: self.show(unit, "ActiveState") == "active", timeout, f"{unit} active")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.journal(unit)}") from None

    def pids(self, unit: str) -> set[int]:
        """All processes of a unit, in the container's numbering."""
        shown = self.run("systemd-cgls", "--no-pager", "-u", unit)
        return {
            int(word)
            for line in shown.splitlines()[1:]
            for word in line.replace("├─", " ").replace("└─", " ").split()[:1]
            if word.isdigit()
        }

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)

    def close(self) -> None:
        if self.process.poll() is None:
            # SIGRTMIN+3 to the first process is "halt"; a killed nspawn leaves an orphan.
            os.kill(self.leader, signal.SIGRTMIN + 3)
            self.process.wait(60)
        if self.process.stderr is not None:
            self.process.stderr.close()


def install(root: Path) -> None:
    """The service into an unpacked system, as docs/operations.md says, with the sources in
    place of a wheel and this interpreter's packages in place of a download."""
    shutil.rmtree(root / "opt", ignore_errors=True)
    shutil.rmtree(root / "etc/facelane", ignore_errors=True)
    venv = root / "opt/facelane"
    subprocess.run(
        ["chroot", str(root), "python3", "-m", "venv", "--without-pip", "/opt/facelane"],
        check=True,
        timeout=60,
    )
    (root / "opt/facelane-dependencies").mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for part in ("clients", "server"):
        shutil.copytree(ROOT / part, root / "opt/facelane-source" / part, ignore=ignore)
    packages = venv / f"lib/python3.{sys.version_info.minor}/site-packages"
    assert packages.is_dir(), "the container's Python is another minor version than this one"
    (packages / "facelane.pth").write_text(
        "/opt/facelane-source/clients\n/opt/facelane-source/server\n/opt/facelane-dependencies\n"
    )
    for script, module in {
        "facelane-server": "facelane_server",
        "facelane-bridge": "facelane_bridge",
        "facelane": "facelane",
    }.items():
        path = venv / "bin" / script
        path.write_text(
            "#!/opt/facelane/bin/python\n"
            f"import sys\nfrom {module}.cli import main\nsys.exit(main())\n"
        )
        path.chmod(0o755)
    subprocess.run(
        ["make", "-s", "-C", str(ROOT), "install-systemd", f"DESTDIR={root}", "VENV=/opt/facelane"],
        check=True,
        timeout=60,
    )
    (root / "etc/facelane/server.toml").write_text(config())


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    assert os.geteuid() == 0, "needs root"
    for tool in ("debootstrap", "systemd-nspawn", "nsenter"):
        assert shutil.which(tool), f"needs {tool}"
    assert importlib.util.find_spec("torch"), "needs the environment of `make test`"
    kept = os.environ.get("FACELANE_BOOT_ROOT")
    root = Path(kept) if kept else tmp_path_factory.mktemp("boot") / "root"
    if not (root / "usr/bin/systemctl").exists():
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root)],
            check=True,
            timeout=900,
            stdout=subprocess.DEVNULL,
        )
    install(root)
    # The limits that a test would wait long for.
    drop_in = root / f"etc/systemd/system/{SERVER}.d/test.conf"
    drop_in.parent.mkdir(parents=True, exist_ok=True)
    drop_in.write_text("[Service]\nWatchdogSec=4\nRestartSec=200ms\n")
    booted = Machine(root)
    try:
        yield booted
    finally:
        booted.close()


@pytest.fixture
def server(machine: Machine) -> Iterator[Machine]:
    machine.write("/etc/facelane/server.toml", config())
    machine.run("systemctl", "reset-failed", SERVER, check=False)
    machine.start(SERVER)
    yield machine
    machine.run("systemctl", "stop", SERVER, check=False)


def test_it_starts_ready_as_its_own_user(server: Machine) -> None:
    assert server.show(SERVER, "ActiveState") == "active"
    assert server.show(SERVER, "StatusText")
    main = server.show(SERVER, "MainPID")
    assert server.run("ps", "-o", "user=", "-p", main).strip() == "facelane"
    assert len(server.pids(SERVER)) == 4, "the server and three workers"
    assert server.run("stat", "-c", "%U %a", "/var/lib/facelane").split() == ["facelane", "700"]
    assert "No such file" not in server.journal(SERVER)


def test_it_answers_over_grpc(server: Machine) -> None:
    shown = server.run("/opt/facelane/bin/facelane", "server", "health")
    assert "SERVING" in shown
    assert "NOT_SERVING" not in shown


def test_a_killed_server_comes_back_and_leaves_no_worker(server: Machine) -> None:
    before = server.pids(SERVER)
    restarts = int(server.show(SERVER, "NRestarts"))
    server.run("kill", "-KILL", server.show(SERVER, "MainPID"))
    until(lambda: int(server.show(SERVER, "NRestarts")) > restarts, what="a restart")
    server.wait_active(SERVER)
    assert not before & server.pids(SERVER)


def test_a_hung_server_is_ended_by_the_watchdog(server: Machine) -> None:
    restarts = int(server.show(SERVER, "NRestarts"))
    server.run("kill", "-STOP", server.show(SERVER, "MainPID"))
    until(lambda: int(server.show(SERVER, "NRestarts")) > restarts, what="a restart")
    server.wait_active(SERVER)
    journal = server.journal(SERVER)
    assert "Watchdog timeout" in journal
    assert "Fatal Python error: Aborted" in journal, "the stacks of the hung server"


def test_a_killed_worker_is_the_servers_own_business(server: Machine) -> None:
    main = server.show(SERVER, "MainPID")
    before = server.pids(SERVER)
    victim = max(before - {int(main)})
    server.run("kill", "-KILL", str(victim))
    until(lambda: len(server.pids(SERVER) - {victim}) == 4, what="a new worker")
    assert server.show(SERVER, "MainPID") == main
    assert server.show(SERVER, "ActiveState") == "active"


def test_reload_keeps_it_running(server: Machine) -> None:
    main = server.show(SERVER, "MainPID")
    server.run("systemctl", "reload", SERVER)
    server.wait_active(SERVER)
    assert server.show(SERVER, "MainPID") == main


def test_stop_is_clean_and_quick(server: Machine) -> None:
    server.run("systemctl", "stop", SERVER)
    assert server.show(SERVER, "ActiveState") == "inactive"
    assert server.show(SERVER, "Result") == "success"
    assert server.show(SERVER, "ExecMainStatus") == "0"


def test_a_wrong_config_is_not_tried_again(machine: Machine) -> None:
    machine.write("/etc/facelane/server.toml", "[serverr]\n")
    machine.run("systemctl", "start", SERVER, check=False)
    until(lambda: machine.show(SERVER, "ActiveState") == "failed", what="failed")
    assert machine.show(SERVER, "ExecMainStatus") == "78"
    assert machine.show(SERVER, "NRestarts") == "0"
    assert "did you mean `server`" in machine.journal(SERVER)
    machine.run("systemctl", "reset-failed", SERVER)


def test_keys_reach_it_as_credentials(machine: Machine) -> None:
    key = machine.run(
        *("/opt/facelane/bin/facelane-server", "keys", "new", "door"),
        *("--scope", "analyze", "--file", "/etc/facelane/keys.toml"),
    ).strip()
    path = f"/run/credentials/{SERVER}/keys.toml"
    machine.write(
        "/etc/facelane/server.toml",
        config() + f'[auth]\nmode = "keys"\nkeys_file = "{path}"\n',
    )
    try:
        machine.start(SERVER)
        machine.write("/run-token", key, 0o600)
        ok = machine.run(
            *("/opt/facelane/bin/facelane", "--token-file", "/run-token", "server", "pools"),
        )
        assert "detector" in ok
        refused = machine.run("/opt/facelane/bin/facelane", "server", "pools", check=False)
        assert "detector" not in refused
    finally:
        machine.run("systemctl", "stop", SERVER, check=False)


def test_an_external_worker_attaches_dies_and_comes_back(machine: Machine) -> None:
    worker = "facelane-worker@recognizer.service"
    machine.write("/etc/facelane/server.toml", config(recognizer='isolation = "external"'))
    machine.run("systemctl", "start", "--no-block", SERVER)
    machine.run("systemctl", "start", "--no-block", worker)
    try:
        machine.wait_active(SERVER)

        def serving() -> bool:
            shown = machine.run(
                "/opt/facelane/bin/facelane",
                *("server", "health", "facelane.pool.recognizer"),
                check=False,
            )
            return "SERVING" in shown and "NOT_SERVING" not in shown

        until(serving, what="the external recogniser serving")
        first = machine.show(worker, "MainPID")
        machine.run("kill", "-KILL", first)
        until(lambda: machine.show(worker, "MainPID") not in ("0", first), what="a new worker")
        until(serving, what="the external recogniser serving again")
        # The end of the server is no failure of the worker: it waits for the next one.
        machine.run("systemctl", "restart", SERVER)
        until(serving, what="serving after a restart of the server")
    finally:
        machine.run("systemctl", "stop", worker, SERVER, check=False)


def test_the_bridge_streams_and_its_results_reach_the_journal(server: Machine) -> None:
    import cv2
    import numpy as np

    bridge = "facelane-bridge@front-door.service"
    picture = np.random.default_rng(1).integers(0, 255, (240, 320, 3), dtype=np.uint8)
    ok, data = cv2.imencode(".jpg", picture)
    assert ok
    frames = server.root / "srv/frames"
    frames.mkdir(parents=True, exist_ok=True)
    (frames / "0.jpg").write_bytes(data.tobytes())
    server.write(
        "/etc/facelane/bridge-front-door.toml",
        'results = "all"\n'
        '[[camera]]\nname = "front-door"\nsource = "/srv/frames"\nkind = "folder"\nloop = true\n',
    )
    try:
        server.start(bridge)
        server.wait_active(bridge)
        main = server.show(bridge, "MainPID")
        assert server.run("ps", "-o", "user:32=", "-p", main).strip() == "facelane-bridge"
        until(lambda: '"type":"result"' in server.journal(bridge), what="results in the journal")
        # It must not be able to read the gallery.
        denied = server.run(
            *("setpriv", "--reuid=facelane-bridge", "--clear-groups"),
            *("ls", "/var/lib/facelane/gallery.db"),
            check=False,
        )
        assert denied == ""
        # A bridge without its server goes on trying.
        server.run("systemctl", "restart", SERVER)
        assert server.show(bridge, "ActiveState") == "active"
    finally:
        server.run("systemctl", "stop", bridge, check=False)
