"""The Debian package: built, installed in a clean system that boots, removed, purged.

Takes minutes, root, a network and Debian's `debootstrap` and `systemd-container`, so it runs only
when asked, as the tests of a booted system do: FACELANE_BOOT_TEST=1. FACELANE_DEB=FILE takes a
package that was built before; FACELANE_DEB_ROOT=DIR keeps the unpacked system between runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.test_systemd_boot import ROOT, SUITE, Machine

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.slow(last=True),
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not os.environ.get("FACELANE_BOOT_TEST"),
        reason="boots a whole system: set FACELANE_BOOT_TEST=1, as root, with Debian's "
        "debootstrap and systemd-container installed",
    ),
]
SERVER = "facelane-server.service"
CONSOLE = "facelane-console.service"
FLEET = "facelane-fleet.service"
# What the package depends on, so that dpkg alone installs it.
PACKAGES = "systemd,systemd-sysv,dbus,libgomp1,libglib2.0-0,procps,python3"
# Written by running at all.
RUNS = ("var/log", "var/cache", "var/lib/dpkg", "var/lib/systemd", "var/tmp", "run", "tmp", "proc",
        "sys", "dev", "etc/machine-id", "etc/.pwd.lock", "root", "var/lib/dbus", "etc/resolv.conf",
        "var/lib/private", "etc/passwd-", "etc/group-", "etc/shadow-", "etc/gshadow-",
        "etc/.updated", "var/.updated", "usr/lib/python3", "usr/share/python3")  # fmt: skip


def tree(root: Path) -> set[str]:
    """Every path of the system, but those that running it writes."""
    found: set[str] = set()
    for folder, folders, files in os.walk(root):
        inside = Path(folder).relative_to(root)
        if str(inside).startswith(RUNS):
            folders.clear()
            continue
        found |= {str(inside / name) for name in (*folders, *files)}
    return {path for path in found if not path.startswith(RUNS)}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("FACELANE_DEB")
    if given:
        return Path(given)
    out = tmp_path_factory.mktemp("deb")
    environment = os.environ | {"DIST": str(out), "COMPRESSION": "none", "TORCH_INDEX": ""}
    subprocess.run([ROOT / "deploy/debian/build.sh"], env=environment, check=True, timeout=1500)
    (made,) = out.glob("*.deb")
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert os.geteuid() == 0, "needs root"
    for tool in ("debootstrap", "systemd-nspawn", "nsenter"):
        assert shutil.which(tool), f"needs {tool}"
    kept = os.environ.get("FACELANE_DEB_ROOT")
    made = Path(kept) if kept else tmp_path_factory.mktemp("deb") / "root"
    if not (made / "usr/bin/systemctl").exists():
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(made)],
            check=True,
            timeout=900,
            stdout=subprocess.DEVNULL,
        )
    return made


@pytest.fixture(scope="module")
def machine(root: Path) -> Iterator[Machine]:
    booted = Machine(root)
    try:
        yield booted
    finally:
        booted.close()


def test_installed_it_serves_removed_it_leaves_state_purged_nothing(
    package: Path, root: Path, machine: Machine
) -> None:
    before = tree(root)
    users = (root / "etc/passwd").read_text(), (root / "etc/group").read_text()

    # A folder that the system does not see afterwards.
    shutil.copy(package, root / "var/tmp/facelane.deb")
    machine.run("dpkg", "-i", "/var/tmp/facelane.deb")
    (root / "var/tmp/facelane.deb").unlink()
    assert machine.show(SERVER, "UnitFileState") == "disabled"
    assert machine.show(SERVER, "ActiveState") == "inactive"
    added = tree(root) - before
    for path in (
        "usr/share/man/man1/facelane-server.1.gz",
        "usr/share/bash-completion/completions/facelane-events",
        "usr/share/zsh/vendor-completions/_facelane",
        "usr/share/fish/vendor_completions.d/facelane-bridge.fish",
        "usr/share/man/man1/facelane-console.1.gz",
        "usr/share/man/man1/facelane-fleet.1.gz",
        "usr/share/zsh/vendor-completions/_facelane-fleet",
        "usr/lib/systemd/system/facelane-console.service",
        "usr/lib/systemd/system/facelane-fleet.service",
        "etc/facelane/console.env",
        "usr/share/doc/facelane/changelog.gz",
        "etc/facelane/server.toml",
    ):
        assert path in added, path
    for program in (
        "facelane", "facelane-server", "facelane-bridge", "facelane-events", "facelane-fleet",
    ):  # fmt: skip
        assert machine.run(program, "--version").strip()

    # What a user gets: the settings that came with it, and its own models.
    machine.run("systemctl", "enable", "--now", SERVER)
    machine.wait_active(SERVER)
    shown = machine.run("facelane", "server", "health")
    assert "SERVING" in shown
    assert "NOT_SERVING" not in shown
    # The console beside it; a fleet's node does not start before it is told how to join.
    assert "facelane-console" in machine.run("facelane-console", "--help")
    machine.run("systemctl", "enable", "--now", CONSOLE)
    machine.wait_active(CONSOLE)
    machine.run("systemctl", "start", FLEET)
    assert machine.show(FLEET, "ActiveState") == "inactive"
    assert machine.show(FLEET, "ConditionResult") == "no"
    assert machine.run("stat", "-c", "%U %a", "/var/lib/facelane").split() == ["facelane", "700"]
    machine.write("/etc/facelane/keys.toml", "# mine\n")

    machine.run("dpkg", "-r", "facelane")
    assert machine.show(SERVER, "LoadState") == "not-found"
    left = tree(root) - before
    kept = ("etc/facelane", "var/lib/facelane")
    assert {path for path in left if not path.startswith(kept)} == set()
    assert any(path.startswith("var/lib/facelane/") for path in left), "its state"
    assert "etc/facelane/keys.toml" in left

    machine.run("dpkg", "-P", "facelane")
    assert tree(root) - before == set()
    assert before - tree(root) == set()
    assert ((root / "etc/passwd").read_text(), (root / "etc/group").read_text()) == users
