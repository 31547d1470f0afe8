"""The doctor's findings, each against a machine or a config that has the fault."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from facelane_server import config, plan
from facelane_server.doctor import installation, machine
from facelane_server.doctor.examine import examine
from facelane_server.doctor.report import Finding, Report, Status
from facelane_server.domain import Stage
from facelane_server.edge.auth import new_key
from facelane_server.monitor import DeviceReading, Nvml, NvmlMissingError
from facelane_server.store.gallery import Store
from facelane_server.store.opening import open_store, place_of, unlock

NULL = """
[pools.detector]
model = "null-detector"
[pools.recognizer]
model = "null-recognizer"
[pools.liveness]
model = "null-liveness"
"""
ON_CUDA = config.parse('[pools.detector]\ndevices = ["cuda:0"]\nworkers = 2')
GIB = 2**30


def no_nvml() -> Nvml:
    raise NvmlMissingError("NVML Shared Library Not Found")


def test_a_config_that_cannot_be_used_is_a_finding_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[server]\nlissten = 'x'\n")
    settings, check = installation.check_config(path)
    assert settings == config.Config()
    assert check.status is Status.FAIL
    assert "listen" in check.detail
    assert installation.check_config(None)[1].status is Status.OK


# -- devices ------------------------------------------------------------------------------------


def test_no_driver_matters_only_where_cuda_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Nvml, "load", no_nvml)
    [check] = machine.check_driver(config.Config())
    assert check.status is Status.SKIP
    [check] = machine.check_driver(ON_CUDA)
    assert check.status is Status.FAIL
    assert 'devices = ["cpu"]' in check.advice


@pytest.mark.parametrize(
    ("changes", "mode", "workers", "status", "advice"),
    [
        ({}, "default", 3, Status.OK, ""),
        ({}, "prohibited", 0, Status.FAIL, "DEFAULT"),
        ({}, "exclusive", 2, Status.FAIL, "mps"),
        ({}, "exclusive", 1, Status.OK, ""),
        ({"ecc_errors": 3}, "default", 1, Status.WARN, "3 uncorrected"),
        ({"throttle_reasons": ("power cap",)}, "default", 1, Status.WARN, "power cap"),
        ({"memory_used_bytes": 79 * GIB}, "default", 1, Status.WARN, "memory"),
    ],
)
def test_devices(
    changes: dict[str, Any], mode: str, workers: int, status: Status, advice: str
) -> None:
    facts = {"memory_used_bytes": GIB, "memory_total_bytes": 80 * GIB, **changes}
    check = machine._device_check(DeviceReading("0", "Card", "u", **facts), mode, workers)
    assert check.status is status
    assert advice in check.advice


def saying(text: str, code: int = 0) -> tuple[str, ...]:
    program = f"import sys; sys.stdout.write({text!r}); sys.exit({code})"
    return (sys.executable, "-c", program)


def torch_of(**changes: object) -> str:
    facts = {
        "version": "2.13.0",
        "cuda": "13.0",
        "available": True,
        "devices": ["H200"],
        "architectures": ["sm_80", "sm_90"],
        "capabilities": ["sm_90"],
    }
    return json.dumps({**facts, **changes})


@pytest.mark.parametrize(
    ("settings", "says", "code", "status"),
    [
        (config.Config(), torch_of(), 0, Status.OK),
        (ON_CUDA, torch_of(), 0, Status.OK),
        (config.Config(), torch_of(cuda=None, available=False), 0, Status.OK),
        (ON_CUDA, torch_of(cuda=None, available=False), 0, Status.FAIL),
        (ON_CUDA, torch_of(available=False), 0, Status.FAIL),
        (ON_CUDA, torch_of(capabilities=["sm_120"]), 0, Status.FAIL),
        (config.Config(), "", 1, Status.FAIL),
        (config.Config(), "no json", 0, Status.FAIL),
    ],
)
async def test_torch_is_asked_in_a_process_of_its_own(
    settings: config.Config, says: str, code: int, status: Status
) -> None:
    check = await machine.check_torch(settings, saying(says, code))
    assert check.status is status
    assert bool(check.advice) == (status is Status.FAIL)


async def test_a_torch_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "TORCH_TIMEOUT_S", 0.1)
    sleeping = (sys.executable, "-c", "import time; time.sleep(60)")
    check = await machine.check_torch(config.Config(), sleeping)
    assert check.status is Status.FAIL


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ("sm_90", ["sm_80", "sm_90"], True),
        ("sm_89", ["sm_80", "sm_86"], True),
        ("sm_80", ["sm_86"], False),
        ("sm_120", ["sm_90"], False),
        ("sm_120", ["sm_90", "compute_90"], True),
        ("sm_90", ["sm_90a", "weird"], False),
    ],
)
def test_which_code_runs_where(capability: str, architectures: list[str], runs: bool) -> None:
    assert machine._runs_on(capability, architectures) is runs


def test_mps_is_needed_only_where_it_is_configured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = config.parse('[pools.detector]\nisolation = "mps"\ndevices = ["cuda:0"]')
    assert machine.check_mps(config.Config()).status is Status.SKIP
    assert machine.check_mps(settings).status is Status.FAIL
    control = tmp_path / "nvidia-cuda-mps-control"
    control.write_text("#!/bin/sh\n")
    control.chmod(0o755)
    assert machine.check_mps(settings).status is Status.OK


@pytest.mark.parametrize(
    ("decode", "version", "status"),
    [
        ("cpu", "", Status.SKIP),
        ("cpu", "0.26.0", Status.SKIP),
        ("auto", "", Status.WARN),
        ("cuda", "", Status.FAIL),
        ("cuda", "0.26.0", Status.OK),
    ],
)
def test_nvjpeg_is_needed_only_where_it_is_configured(
    decode: str, version: str, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_version_of", lambda name: version)
    settings = config.parse(f'[pools.detector]\ndecode = "{decode}"\ndevices = ["cuda:0"]')
    check = machine.check_nvjpeg(settings)
    assert check.status is status
    assert bool(check.advice) is (status in (Status.WARN, Status.FAIL))
    assert version in check.detail


# -- the machine --------------------------------------------------------------------------------


@pytest.fixture
def cgroup(tmp_path: Path) -> Callable[..., Finding]:
    root = tmp_path / "cgroup"
    own = root / "system.slice" / "facelane.service"
    own.mkdir(parents=True)
    membership = tmp_path / "membership"
    membership.write_text("0::/system.slice/facelane.service\n")

    def examine(above: dict[str, str] | None = None, **files: str) -> Finding:
        for name, text in files.items():
            (own / name.replace("_", ".", 1)).write_text(text)
        for name, text in (above or {}).items():
            (own.parent / name).write_text(text)
        return machine.check_cgroup(root, membership)

    return examine


def test_no_limits(cgroup: Callable[..., Finding]) -> None:
    check = cgroup(memory_max="max\n", cpu_max="max 100000\n", pids_max="max\n")
    assert check.status is Status.OK
    assert check.facts["memory_bytes"] is None


def test_the_tightest_limit_on_the_way_up_counts(cgroup: Callable[..., Finding]) -> None:
    check = cgroup({"memory.max": str(8 * GIB)}, memory_max=str(16 * GIB), cpu_max="150000 100000")
    assert check.facts["memory_bytes"] == 8 * GIB
    assert check.facts["cpus"] == 1.5
    assert check.status is Status.OK


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        ({"memory_max": str(GIB)}, "2048 MiB"),
        ({"pids_max": "64"}, "TasksMax"),
        ({"memory_events": "oom 3\noom_kill 2\n"}, "MemoryMax"),
    ],
)
def test_limits_that_are_too_tight(
    cgroup: Callable[..., Finding], files: dict[str, str], advice: str
) -> None:
    check = cgroup(**files)
    assert check.status is Status.WARN
    assert advice in check.advice


def test_without_cgroups(tmp_path: Path) -> None:
    check = machine.check_cgroup(tmp_path, tmp_path / "missing")
    assert check.status is Status.SKIP


def test_ulimits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: (256, 4096), resource.RLIMIT_CORE: (-1, -1)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    files, core = machine.check_ulimits()
    assert (files.status, core.status) == (Status.WARN, Status.WARN)
    assert "embeddings" in core.advice
    limits.update({resource.RLIMIT_NOFILE: (-1, -1), resource.RLIMIT_CORE: (0, 0)})
    assert [c.status for c in machine.check_ulimits()] == [Status.OK, Status.OK]


# -- the installation -----------------------------------------------------------------------------


def test_listen(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = config.parse(f'[server]\nlisten = "127.0.0.1:{port}"\n[auth]\nmode = "none"')
        assert installation.check_listen(settings).status is Status.WARN
    assert installation.check_listen(settings).status is Status.OK
    unix = config.parse(f'[server]\nlisten = "unix:{tmp_path}/server.sock"')
    assert installation.check_listen(unix).status is Status.OK
    nowhere = config.parse('[server]\nlisten = "unix:/no/such/folder/server.sock"')
    assert installation.check_listen(nowhere).status is Status.FAIL


def test_the_address_of_the_metrics() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        check = installation.check_metrics(config.parse(f'[metrics]\nlisten = "127.0.0.1:{port}"'))
        assert check.status is Status.WARN
        assert "metrics.listen" in check.advice
    assert installation.check_metrics(config.parse('[metrics]\nlisten = ""')).status is Status.SKIP
    public = installation.check_metrics(config.parse(f'[metrics]\nlisten = "0.0.0.0:{port}"'))
    assert "whoever reaches it may read them" in public.detail


def test_keys(tmp_path: Path) -> None:
    def check(text: str) -> Finding:
        return installation.check_keys(config.parse(text))

    assert check("").status is Status.OK
    open_to_all = check('[server]\nlisten = "0.0.0.0:1"\n[auth]\nmode = "none"')
    assert open_to_all.status is Status.WARN
    file = tmp_path / "keys.toml"
    named = f'[auth]\nkeys_file = "{file}"'
    assert check(named).status is Status.FAIL
    file.write_text(new_key("door", ("analyze",))[1].entry())
    assert (check(named).status, check(named).detail) == (Status.OK, f"{file}: 1 key(s)")
    # It exists inside of the running service alone: here nothing can be said about it.
    lent = check('[auth]\nkeys_file = "/run/credentials/no.service/keys.toml"')
    assert lent.status is Status.SKIP


def gallery_settings(path: Path) -> config.Config:
    return config.parse(f'[gallery]\npath = "{path}"')


def test_the_gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gallery.db"
    settings = gallery_settings(path)
    assert installation.check_gallery(settings).status is Status.OK
    assert not path.exists(), "looking must not make it"
    beside = config.parse(f'state_dir = "{tmp_path}/state"')
    assert installation.check_gallery(beside).status is Status.OK
    assert not (tmp_path / "state").exists(), "nor its folder, which would be this user's"
    nowhere = config.parse('state_dir = "/dev/null/x"')
    assert installation.check_gallery(nowhere).status is Status.FAIL
    store = Store(path)
    store.create_subject("g", "a", "", {})
    running = installation.check_gallery(settings)
    assert running.status is Status.OK, "beside a server that runs"
    assert "1 subjects" in running.detail
    store.close()
    check = installation.check_gallery(settings)
    assert (check.status, check.facts) == (Status.OK, {"subjects": 1, "templates": 0})
    monkeypatch.setattr(installation, "MIN_DISK_MIB", 10**12)
    full = installation.check_gallery(settings)
    assert (full.status, full.advice) == (
        Status.WARN,
        "free some space: enrolments will fail",
    )
    path.write_bytes(b"nonsense" * 1000)
    broken = installation.check_gallery(settings)
    assert broken.status is Status.FAIL
    assert "damaged" in broken.detail


def test_a_gallery_that_cannot_be_looked_at_is_a_finding(tmp_path: Path) -> None:
    # Like a folder of another user, which root's tests could enter.
    check = installation.check_gallery(gallery_settings(tmp_path / ("x" * 300)))
    assert check.status is Status.FAIL
    assert "File name too long" in check.detail
    assert "sudo -u" in check.advice


def test_damage_inside_of_the_gallery_is_found(tmp_path: Path) -> None:
    path = tmp_path / "gallery.db"
    store = Store(path)
    for n in range(400):
        store.create_subject("g", f"subject-{n:04d}", "x" * 100, {})
    store.close()
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(8192))
    assert installation.check_gallery(gallery_settings(path)).status is Status.FAIL


def sealed(folder: Path, setting: str = "") -> config.Config:
    """A store with somebody in it, locked by the key that the setting names."""
    chosen = f'master_key = "{setting}"' if setting else ""
    settings = config.parse(f'state_dir = "{folder}"\n[store]\n{chosen}\n')
    database = open_store(place_of(settings))
    with contextlib.closing(Store(database, vault=unlock(database, settings))) as store:
        store.create_subject("g", "a", "", {})
    return settings


def test_the_master_key_is_there_and_opens_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = config.parse(f'state_dir = "{tmp_path}/none"')
    assert "will be made" in installation.check_master_key(fresh).detail
    assert not (tmp_path / "none").exists(), "looking must not make it"
    settings = sealed(tmp_path)
    check = installation.check_master_key(settings)
    assert (check.status, "1 key(s)" in check.detail) == (Status.OK, True)
    key = tmp_path / "master.key"
    kept = key.read_text()
    for content in (None, "f" * 64 + "\n", "no key\n"):
        key.unlink(missing_ok=True)
        if content is not None:
            key.write_text(content)
            key.chmod(0o600)
        assert installation.check_master_key(settings).status is Status.FAIL, content
    # Wherever it comes from; where it may be there for the service alone, nothing is said.
    monkeypatch.setenv("OF_THE_STORE", kept.strip())
    moved = config.parse(f'state_dir = "{tmp_path}"\n[store]\nmaster_key = "env:OF_THE_STORE"')
    assert installation.check_master_key(moved).status is Status.OK
    monkeypatch.delenv("OF_THE_STORE")
    assert installation.check_master_key(moved).status is Status.SKIP
    for setting in ("credential:master-key", "file:/run/credentials/no.service/key"):
        lent = config.parse(f'state_dir = "{tmp_path}"\n[store]\nmaster_key = "{setting}"')
        assert installation.check_master_key(lent).status is Status.SKIP


def test_a_store_that_lies_open_is_told_and_keeps_no_pictures(tmp_path: Path) -> None:
    text = f'state_dir = "{tmp_path}"\n[store]\nencryption = "off"\n'
    assert installation.check_master_key(config.parse(text)).status is Status.WARN
    keeping = config.parse(f'{text}[events]\npictures = "all"\n')
    check = installation.check_master_key(keeping)
    assert (check.status, "lies open" in check.detail) == (Status.FAIL, True)


def test_what_exports_traces_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installation.check_tracing(config.Config()).status is Status.SKIP
    traced = config.parse('[tracing]\nendpoint = "http://collector.example:4317"')
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    check = installation.check_tracing(traced)
    assert (check.status, "facelane[otel]" in check.detail) == (Status.FAIL, True)


def test_what_does_not_fit_its_card_is_refused_before_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rest = "[pools]\nrecognizer = false\nliveness = false\n"
    settings = config.parse(f'{rest}[pools.detector]\ndevices = ["cuda:0"]')
    models, _ = installation.check_models(settings)
    assert models is not None
    for total, status in ((80_000, Status.OK), (100, Status.FAIL)):
        card = plan.DeviceMemory("cuda:0", "Card", total, 0)
        monkeypatch.setattr(plan, "read_devices", lambda card=card: [card])
        assert installation.check_memory(settings, models).status is status
    models, _ = installation.check_models(config.parse(NULL))
    assert models is not None
    assert installation.check_memory(config.parse(NULL), models).status is Status.SKIP


def test_models(tmp_path: Path) -> None:
    models, checks = installation.check_models(config.parse(NULL))
    assert models is not None
    assert [c.status for c in checks] == [Status.OK] * 3
    models, [check] = installation.check_models(config.parse('[pools.detector]\nmodel = "no-such"'))
    assert models is None
    assert check.status is Status.FAIL
    assert "models list" in check.advice


# -- the report -----------------------------------------------------------------------------------


def test_the_worst_finding_decides() -> None:
    ok, skip = Finding("a", Status.OK, ""), Finding("b", Status.SKIP, "")
    warn, fail = Finding("c", Status.WARN, "", "do"), Finding("d", Status.FAIL, "", "do")
    assert Report((skip,)).status is Status.OK
    assert Report((ok, warn, skip)).status is Status.WARN
    assert Report((warn, fail, ok)).status is Status.FAIL
    text = Report((ok, fail)).as_text()
    assert "-> do" in text
    assert "cannot serve" in text
    assert json.loads(json.dumps(Report((warn,)).as_json()))["checks"][0]["advice"] == "do"


async def test_an_examination_goes_through_all_checks(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    without = NULL[: NULL.index("[pools.liveness]")]
    path.write_text(f'state_dir = "{tmp_path}"\n[pools]\nliveness = false\n{without}')
    report = await examine(path, infer=False)
    names = [check.name for check in report.checks]
    assert names[:2] == ["system", "config"]
    assert {"torch", "cgroup", "listen", "gallery", "model detector"} <= set(names)
    assert {"master key", "memory", "tracing"} <= set(names)
    assert "model liveness" not in names
    assert not any(name.startswith("inference") for name in names)


async def test_one_stage_is_asked_through_a_worker() -> None:
    settings = config.parse(NULL)
    models, _ = installation.check_models(settings)
    assert models is not None
    check = await installation.check_inference(settings, models, Stage.RECOGNIZER)
    assert check.status is Status.OK, check
    assert check.facts["answer_ms"] > 0
    text = NULL.replace('"null-detector"', '"null-detector"\nisolation = "external"')
    outside = config.parse(text)
    check = await installation.check_inference(outside, models, Stage.DETECTOR)
    assert check.status is Status.SKIP
