"""The owner of the MPS daemon, against a program that behaves as NVIDIA's does.

The program is a stand-in for a third party's, which runs on GPU machines alone; the
processes, their environment, their pipes and their ends are real.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.real_pool import alive
from tests.waiting import until

from facelane_server.domain import FacelaneError, Reason
from facelane_server.pools.mps import CONTROL, MpsDaemon

PROGRAM = """#!/bin/sh
# As nvidia-cuda-mps-control: -d starts a daemon behind the pipe directory, words on stdin ask it.
pid="$CUDA_MPS_PIPE_DIRECTORY/$(basename "$0").pid"
if [ "$1" = "-d" ]; then
    if [ -n "$BROKEN" ]; then echo "$BROKEN" >> "$CUDA_MPS_LOG_DIRECTORY/control.log"; exit 1; fi
    setsid sleep 300 > /dev/null 2>&1 < /dev/null &
    echo $! > "$pid"
    exit 0
fi
read words
[ -f "$pid" ] && kill -0 "$(cat "$pid")" || exit 1
case "$words" in quit*) kill "$(cat "$pid")"; rm "$pid";; esac
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / CONTROL
    program.write_text(PROGRAM)
    program.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_MPS")}
    return {**clean, "PATH": f"{folder}:{os.environ['PATH']}"}


def daemon_pid(daemon: MpsDaemon) -> int:
    return int((daemon.pipe_directory / f"{CONTROL}.pid").read_text())


async def test_it_is_started_in_a_folder_of_its_own_and_ended(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    daemon = await MpsDaemon.start(tmp_path / "mps", environ=environ)
    assert daemon.owned
    assert daemon.pipe_directory.stat().st_mode & 0o777 == 0o700
    pid = daemon_pid(daemon)
    assert alive(pid)
    held = os.open(tmp_path / "mps", os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        await daemon.close()
        await daemon.close()
        # Told to quit: now its folder may go.
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(held)
    until(lambda: not alive(pid), what="the daemon's end")


async def test_a_folder_that_the_guard_before_still_holds_can_be_used(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    first = await MpsDaemon.start(tmp_path / "mps", environ=environ)
    await (await MpsDaemon.start(tmp_path / "mps", environ=environ)).close()
    await first.close()


async def test_one_that_runs_already_is_used_and_left_alone(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    theirs = await MpsDaemon.start(tmp_path / "theirs", environ=environ)
    outside = {**environ, "CUDA_MPS_PIPE_DIRECTORY": str(theirs.pipe_directory)}
    ours = await MpsDaemon.start(tmp_path / "ours", environ=outside)
    assert not ours.owned
    assert ours.pipe_directory == theirs.pipe_directory
    await ours.close()
    assert alive(daemon_pid(theirs))
    await theirs.close()


async def test_a_named_daemon_that_is_gone_is_replaced_by_our_own(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    outside = {**environ, "CUDA_MPS_PIPE_DIRECTORY": str(tmp_path / "gone")}
    daemon = await MpsDaemon.start(tmp_path / "ours", environ=outside)
    assert daemon.owned
    await daemon.close()


async def test_without_the_program_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FacelaneError, match="is not installed") as caught:
        await MpsDaemon.start(tmp_path / "mps", environ={"PATH": str(tmp_path)})
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert "choose isolation = 'process'" in caught.value.message


async def test_a_daemon_that_fails_tells_its_last_words(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    environ["BROKEN"] = "Failed to start: insufficient privilege"
    with pytest.raises(FacelaneError, match="insufficient privilege"):
        await MpsDaemon.start(tmp_path / "mps", environ=environ)


def test_the_daemon_ends_with_a_server_that_is_killed(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    code = (
        "import asyncio, sys; from pathlib import Path\n"
        "from facelane_server.pools.mps import MpsDaemon\n"
        "async def main():\n"
        "    await MpsDaemon.start(Path(sys.argv[1]))\n"
        "    print('started', flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "mps")], env=environ, stdout=subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        lines = iter(server.stdout.readline, b"")
        assert any(line.strip() == b"started" for line in lines)
        pid = int((tmp_path / "mps" / "pipe" / f"{CONTROL}.pid").read_text())
        assert alive(pid)
        server.send_signal(signal.SIGKILL)
        server.wait(30)
        until(lambda: not alive(pid), what="the daemon's end")
    finally:
        server.kill()
        server.wait(30)
        server.stdout.close()
