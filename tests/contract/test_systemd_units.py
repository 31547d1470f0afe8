"""The unit files: installed as a packager would, then judged by systemd's own tools."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from facelane_bridge import config as bridge_config
from facelane_events import config as events_config
from facelane_server import config as server_config
from facelane_server.capacity import Load
from facelane_server.domain import Stage
from facelane_server.edge import health
from facelane_server.keeper.exposition import merged
from facelane_server.monitor import DeviceReading
from facelane_server.observability.metrics import Metrics, Sources
from facelane_server.pools.report import PoolInfo, PoolState, WorkerInfo
from facelane_server.pools.restart import Life
from facelane_server.shards.messages import Standing
from facelane_server.worker import exit_codes

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SYSTEM = DEPLOY / "systemd" / "system"
UNITS = sorted(path.name for path in SYSTEM.iterdir())
SERVICES = [name for name in UNITS if name.endswith(".service")]
PROGRAMS = (
    "facelane-server", "facelane-bridge", "facelane-events", "facelane-console", "facelane-fleet",
    "ray",
)  # fmt: skip
MAX_EXPOSURE_TENTHS = 25

needs_systemd = [
    pytest.mark.systemd,
    pytest.mark.skipif(
        shutil.which("systemd-analyze") is None,
        reason="needs systemd-analyze: apt-get install systemd",
    ),
]


class Installed:
    """A tree made by install.sh, with stand-ins for the programs that the units start."""

    def __init__(self, folder: Path) -> None:
        self.destdir = folder / "dest"
        self.venv = folder / "venv"
        programs = [self.venv / "bin" / name for name in PROGRAMS]
        programs += [self.venv / "bin" / "python", folder / "nvidia-cuda-mps-control"]
        for program in programs:
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_text("#!/bin/sh\n")
            program.chmod(0o755)
        self.environment = os.environ | {
            "DESTDIR": str(self.destdir),
            "PREFIX": "/usr",
            "VENV": str(self.venv),
            "MPS_CONTROL": str(folder / "nvidia-cuda-mps-control"),
        }
        self.install()

    def install(self) -> None:
        subprocess.run(
            [DEPLOY / "systemd" / "install.sh"],
            env=self.environment,
            check=True,
            timeout=30,
            capture_output=True,
        )

    @property
    def units(self) -> Path:
        return self.destdir / "usr/lib/systemd/system"

    def unit(self, name: str) -> Path:
        return self.units / name


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("install"))


def settings(path: Path) -> dict[str, list[str]]:
    """All assignments of a unit file by key, in order; sections do not matter here."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if "=" in line and not line.startswith(("#", ";")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_everything_is_installed_and_nothing_left_to_fill_in(installed: Installed) -> None:
    assert sorted(path.name for path in installed.units.iterdir()) == UNITS
    for name in UNITS:
        text = installed.unit(name).read_text()
        assert not re.search(r"@[A-Z_]+@", text), name
        assert installed.unit(name).stat().st_mode & 0o777 == 0o644
    for page in ("operations", "configuration", "bridge"):
        assert (installed.destdir / f"usr/share/doc/facelane/{page}.md").is_file()
    etc = installed.destdir / "etc/facelane/server.toml"
    assert etc.read_text() == (DEPLOY / "systemd/examples/server.toml").read_text()
    assert (installed.destdir / "usr/lib/sysusers.d/facelane.conf").exists()
    assert (installed.destdir / "usr/lib/tmpfiles.d/facelane.conf").exists()


def test_installing_again_keeps_the_administrators_settings(installed: Installed) -> None:
    etc = installed.destdir / "etc/facelane/server.toml"
    before = etc.read_text()
    etc.write_text("# mine\n")
    try:
        installed.install()
        assert etc.read_text() == "# mine\n"
    finally:
        etc.write_text(before)


def test_a_relative_path_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [DEPLOY / "systemd" / "install.sh"],
        env=os.environ | {"DESTDIR": str(tmp_path), "VENV": "opt/facelane"},
        timeout=30,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 64
    assert "absolute" in done.stderr
    assert not list(tmp_path.iterdir())


def verify(units: Path, name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=yes", "--man=no", name],
        # The empty entry keeps systemd's own units in the search.
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{units}:"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class TestVerify:
    pytestmark = needs_systemd

    @pytest.mark.parametrize("name", UNITS)
    def test_clean(self, installed: Installed, name: str) -> None:
        done = verify(installed.units, name.replace("@.", "@front-door."))
        assert (done.returncode, done.stdout + done.stderr) == (0, "")

    def test_it_would_see_a_typo(self, installed: Installed, tmp_path: Path) -> None:
        """The check above can fail: systemd ignores unknown keys unless it is told not to."""
        broken = tmp_path / "broken.service"
        text = installed.unit("facelane-server.service").read_text()
        broken.write_text(text.replace("WatchdogSec=", "WatchdogSecs="))
        done = verify(installed.units, str(broken))
        assert done.returncode != 0
        assert "WatchdogSecs" in done.stderr


class TestExposure:
    pytestmark = needs_systemd

    @pytest.mark.parametrize("name", SERVICES)
    def test_at_most_2_5(self, installed: Installed, name: str) -> None:
        done = subprocess.run(
            [
                "systemd-analyze",
                "security",
                "--offline=true",
                f"--threshold={MAX_EXPOSURE_TENTHS}",
                "--no-pager",
                str(installed.unit(name)),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        level = re.search(r"Overall exposure level.*: (\d+\.\d)", done.stdout)
        assert level is not None
        assert float(level[1]) * 10 <= MAX_EXPOSURE_TENTHS


class TestWhatTheUnitsPromise:
    """Settings that the server's own promises rest on; a change here breaks one of them."""

    def test_server(self) -> None:
        unit = settings(SYSTEM / "facelane-server.service")
        assert unit["Type"] == ["notify"]
        assert unit["NotifyAccess"] == ["main"]
        assert int(unit["WatchdogSec"][0]) > 0
        # Workers confine themselves, and the socket is given to its group: @system-service and
        # ~@privileged alone deny both.
        calls = " ".join(unit["SystemCallFilter"]).split()
        assert {"seccomp", "landlock_restrict_self", "@chown"} <= set(calls)
        worker = settings(SYSTEM / "facelane-worker@.service")
        calls = " ".join(worker["SystemCallFilter"]).split()
        assert {"seccomp", "landlock_restrict_self"} <= set(calls)
        # A drain in order: the workers must not get SIGTERM beside the server.
        assert unit["KillMode"] == ["mixed"]
        # A worker that the kernel kills is the server's to replace, not the service's end.
        assert unit["OOMPolicy"] == ["continue"]
        assert {"64", "78"} <= set(unit["RestartPreventExitStatus"][0].split())
        grace = server_config.Server().drain_grace_s
        assert float(unit["TimeoutStopSec"][0]) > grace

    def test_a_worker_comes_back_whenever_the_server_does(self) -> None:
        unit = settings(SYSTEM / "facelane-worker@.service")
        assert unit["Restart"] == ["always"]
        assert unit["StartLimitIntervalSec"] == ["0"]
        assert unit["PrivateNetwork"] == ["yes"]
        # The server checks the peer's user.
        assert unit["User"] == settings(SYSTEM / "facelane-server.service")["User"]

    @pytest.mark.parametrize("name", SERVICES)
    def test_no_core_dumps_of_faces(self, name: str) -> None:
        assert settings(SYSTEM / name)["LimitCORE"] == ["0"]

    @pytest.mark.parametrize("name", SERVICES)
    def test_memory_tasks_and_stops_are_bounded(self, name: str) -> None:
        unit = settings(SYSTEM / name)
        assert unit["Slice"] == ["facelane.slice"]
        assert int(unit["TasksMax"][0]) > 0
        assert int(unit["TimeoutStopSec"][0]) > 0

    def test_users_exist(self) -> None:
        text = (DEPLOY / "systemd/sysusers.d/facelane.conf").read_text()
        known = {line.split()[1] for line in text.splitlines() if line.startswith("u ")}
        used = {settings(SYSTEM / name)["User"][0] for name in SERVICES}
        assert used == known


class TestExamples:
    def test_server_config_is_accepted(self) -> None:
        path = DEPLOY / "systemd/examples/server.toml"
        found = server_config.load(path)
        assert found.log.format == "json"
        # "shown with its default unless said otherwise" is said of these keys.
        defaults = server_config.Config()
        assert found.server.drain_grace_s == defaults.server.drain_grace_s
        assert found.listen == "unix:/run/facelane/grpc.sock"
        assert not found.wants_keys, "the kernel asks who connects"
        assert found.limits == defaults.limits
        assert found.pools == defaults.pools

    def test_commented_server_settings_are_accepted_too(self) -> None:
        """Every commented example, alone on top of the defaults."""
        text = (DEPLOY / "systemd/examples/server.toml").read_text()
        blocks = re.findall(r"(?:^#(?! ).*\n)+", text, flags=re.MULTILINE)
        assert len(blocks) >= 4
        for block in blocks:
            server_config.parse(re.sub(r"(?m)^#", "", block))

    def test_bridge_config_is_accepted(self) -> None:
        path = DEPLOY / "systemd/examples/bridge-front-door.toml"
        text = path.read_text()
        assert bridge_config.parse(text).cameras[0].name == "front-door"
        full = re.sub(r"(?m)^#(?! )", "", text)
        assert full != text
        assert "/run/credentials/" in bridge_config.parse(full).cameras[0].credentials_file

    def test_events_config_is_accepted(self) -> None:
        text = (DEPLOY / "systemd/examples/events.toml").read_text()
        assert len(events_config.parse(text).sink) == 1
        full = events_config.parse(re.sub(r"(?m)^#(?! )", "", text))
        assert len(full.sink) == 3
        assert "/run/credentials/facelane-events.service/" in full.server.token_file

    @pytest.mark.parametrize("name", ["unattended.conf", "cpu-only.conf"])
    @pytest.mark.systemd
    @pytest.mark.skipif(
        shutil.which("systemd-analyze") is None,
        reason="needs systemd-analyze: apt-get install systemd",
    )
    def test_drop_ins_verify(self, installed: Installed, tmp_path: Path, name: str) -> None:
        shutil.copytree(installed.units, tmp_path / "units")
        folder = tmp_path / "units/facelane-server.service.d"
        folder.mkdir()
        shutil.copy(DEPLOY / "systemd/examples" / name, folder / name)
        done = verify(tmp_path / "units", "facelane-server.service")
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


class TestOtherSupervisors:
    def test_supervisord(self) -> None:
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string((DEPLOY / "supervisord/facelane.conf").read_text())
        server = parser["program:facelane-server"]
        assert "facelane-server run --config" in server["command"]
        # The same codes that systemd does not restart on: here the ones to restart on are
        # "unexpected", and these are listed as expected.
        assert {"0", "2", "64", "78"} == set(server["exitcodes"].split(","))
        assert server["autorestart"] == "unexpected"
        assert int(server["stopwaitsecs"]) > server_config.Server().drain_grace_s
        # SIGTERM to the server alone; SIGKILL to what is left of the group.
        assert server["stopasgroup"] == "false"
        assert server["killasgroup"] == "true"
        # The bridge itself waits before it is started again after a refused password.
        bridge = parser["program:facelane-bridge-front-door"]
        never_again = settings(SYSTEM / "facelane-bridge@.service")["RestartPreventExitStatus"]
        assert set(bridge["exitcodes"].split(",")) == {"0", *never_again[0].split()}
        assert bridge["startretries"] == "0", "an early end is retried whatever its code"

    def test_all_toml_under_deploy_parses(self) -> None:
        files = sorted(DEPLOY.rglob("*.toml"))
        assert files
        for path in files:
            tomllib.loads(path.read_text())


class TestOperationsPage:
    """docs/operations.md names things that exist."""

    page = (ROOT / "docs/operations.md").read_text()

    def test_metrics(self) -> None:
        worker = WorkerInfo("detector#0", 7, Life.READY, "cuda:0", 2, "", 600, 5.0, False)
        pool = PoolInfo(
            "detector",
            Stage.DETECTOR,
            PoolState.SERVING,
            "m",
            "process",
            0,
            0,
            0,
            0,
            0,
            0,
            (worker,),
        )
        device = DeviceReading("0", "card", "GPU-1", 1, 2)
        metrics = Metrics(
            Sources(
                pools=lambda: [pool], devices=lambda: [device], load=lambda: Load(1.0, 2.0, 1, 0)
            )
        )
        shards = merged({}, [Standing(shard=0, pid=1, life="READY", takes=True, restarts=0)])
        text = metrics.exposition().decode() + shards.decode()
        exposed = set(re.findall(r"(?m)^# TYPE (\w+)", text))
        named = set(re.findall(r"\bfacelane_\w+", self.page)) - {"facelane_server"}
        assert len(named) >= 8
        assert named <= exposed

    def test_units_examples_and_repository_files(self) -> None:
        for name in (*UNITS, *(p.name for p in (DEPLOY / "systemd/examples").iterdir())):
            stem = name.replace("@.service", "@").removesuffix(".toml")
            assert stem in self.page.replace("bridge-NAME", "bridge-front-door"), name
        for path in re.findall(r"`((?:tests|deploy)/[\w/.]+)`", self.page):
            assert (ROOT / path).exists(), path

    def test_health_names(self) -> None:
        names = {"", "facelane.process", "facelane.v1.AnalysisService"}
        known = set(health.derive(dict.fromkeys(Stage, True), draining=False))
        assert names <= known
        assert "facelane.pool.detector" in known
        for name in filter(None, names):
            assert name in self.page

    def test_exit_codes(self) -> None:
        for code, name in exit_codes.NAMES.items():
            assert re.search(rf"\b{code}\b", self.page), name
        from facelane_server import running

        assert f"| {running.EX_UNAVAILABLE} |" in self.page
        assert f"| {running.EX_CONFIG} |" in self.page
        unit = settings(SYSTEM / "facelane-server.service")
        assert str(running.EX_CONFIG) in unit["RestartPreventExitStatus"][0].split()
        assert str(running.EX_UNAVAILABLE) not in unit["RestartPreventExitStatus"][0].split()

    def test_limits_that_it_states(self) -> None:
        unit = settings(SYSTEM / "facelane-server.service")
        assert f"WatchdogSec={unit['WatchdogSec'][0]}" in self.page
        assert unit["StartLimitBurst"] == ["20"]
        assert unit["StartLimitIntervalSec"] == ["600"]
        assert "20 failed starts in 10 minutes" in self.page
