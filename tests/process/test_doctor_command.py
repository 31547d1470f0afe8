"""The doctor as an operator runs it: real workers, a real exit status."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from facelane_server import config
from facelane_server.doctor import installation
from facelane_server.doctor.report import Status
from facelane_server.domain import Stage
from facelane_server.served import ServedModels

CONFIG = """
state_dir = "{state}"
[server]
listen = "unix:{state}/server.sock"
[pools.detector]
model = "null-detector"
{detector}
[pools.recognizer]
model = "null-recognizer"
[pools.liveness]
model = "null-liveness"
"""


async def run(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "facelane_server",
        "doctor",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(50):
        out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


def written(folder: Path, detector: str = "") -> Path:
    path = folder / "config.toml"
    path.write_text(CONFIG.format(state=folder, detector=detector))
    return path


async def test_a_machine_that_serves(tmp_path: Path) -> None:
    code, out = await run("--json", "--config", str(written(tmp_path)))
    report = json.loads(out)
    assert report["schema"] == 1
    checks = {check["name"]: check for check in report["checks"]}
    for stage in Stage:
        inference = checks[f"inference {stage.value}"]
        assert inference["status"] == "ok", inference
        assert inference["facts"]["answer_ms"] > 0
    assert code == 0, report
    assert not (tmp_path / "gallery.db").exists()


@pytest.mark.slow
async def test_a_config_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[pools.detecttor]\n")
    code, out = await run("--no-infer", "--config", str(path))
    assert code == 69
    assert "detector" in out
    assert "fail" in out


@pytest.mark.parametrize(
    "fault", ["fail.load", pytest.param("fail.crash_load", marks=pytest.mark.slow)]
)
async def test_a_model_that_does_not_load(tmp_path: Path, fault: str) -> None:
    extra = f'backoff_initial_s = 0.01\noptions = {{ "{fault}" = "1" }}'
    text = written(tmp_path, extra).read_text()
    settings = config.parse(text)
    models = ServedModels.resolve(settings)
    check = await installation.check_inference(settings, models, Stage.DETECTOR)
    assert check.status is Status.FAIL
    assert "no worker was ready" in check.detail
    assert "models verify" in check.advice


async def test_the_doctor_itself_never_imports_torch() -> None:
    program = "import sys, facelane_server.doctor.examine; sys.exit('torch' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    async with asyncio.timeout(30):
        assert await process.wait() == 0
