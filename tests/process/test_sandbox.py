"""What the code of a worker can do, tried from inside of one."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.real_pool import real_pool

from facelane_server import config
from facelane_server.domain import Stage
from facelane_server.ipc.channel import socket_pair
from facelane_server.pools import briefing
from facelane_server.pools.host import Launchers
from facelane_server.pools.process import Confined
from facelane_server.worker import exit_codes, sandbox

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="a sandbox is Linux's",
)

INSIDE = """
import ctypes, json, os, pathlib, signal, socket, subprocess, sys, threading
import facelane_server.worker.__main__ as worker

secret, weights, scratch, parent, victim = sys.argv[1:6]

def attempts():
    libc = ctypes.CDLL(None, use_errno=True)
    def call(*arguments):
        if libc.syscall(*arguments) < 0:
            raise OSError(ctypes.get_errno(), "denied")
    buffer = ctypes.create_string_buffer(8)
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
    arm = os.uname().machine == "aarch64"
    yield "read the gallery", lambda: open(secret).read()
    yield "list its folder", lambda: os.listdir(os.path.dirname(secret))
    yield "write", lambda: open(scratch + "/new", "w")
    yield "delete", lambda: os.unlink(secret)
    yield "the server's memory", lambda: open(f"/proc/{parent}/mem", "rb")
    yield "the server's environment", lambda: open(f"/proc/{parent}/environ", "rb").read()
    yield "a TCP socket", lambda: socket.socket()
    yield "a UDP socket", lambda: socket.socket(type=socket.SOCK_DGRAM)
    yield "a Unix socket", lambda: socket.socket(socket.AF_UNIX)
    yield "a datagram socket", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    yield "a connection", lambda: socket.socketpair()[0].connect("/run/any.sock")
    yield "a netlink socket", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
    yield "a program", lambda: subprocess.run(["/bin/true"])
    yield "a process", lambda: os._exit(9) if os.fork() == 0 else None
    yield "ptrace", lambda: call(117 if arm else 101, 16, int(victim), 0, 0)
    yield "others' memory", lambda: call(
        270 if arm else 310, int(victim), ctypes.byref(vector), 1, ctypes.byref(vector), 1, 0
    )
    yield "a signal", lambda: os.kill(int(victim), signal.SIGTERM)
    yield "a pidfd", lambda: os.pidfd_open(int(victim))
    yield "a namespace", lambda: call(97 if arm else 272, 0x10000000)
    yield "io_uring", lambda: call(425, 1, 0)
    yield "bpf", lambda: call(280 if arm else 321, 0, 0, 0)
    # And what it needs:
    yield "+ its weights", lambda: open(weights).read()
    yield "+ its memory", lambda: open("/proc/self/statm").read()
    yield "+ a thread", lambda: threading.Thread(target=int).start()
    yield "+ a signal to itself", lambda: os.kill(os.getpid(), 0)
    yield "+ random numbers", lambda: open("/dev/urandom", "rb").read(1)

def probe(*arguments):
    done = {}
    print(arguments[-1], file=sys.stderr)
    for name, attempt in attempts():
        try:
            attempt()
            done[name] = "done"
        except (OSError, RuntimeError) as error:
            done[name] = type(error).__name__
    done["in a thread"] = "done"
    def thread():
        try:
            open(secret)
        except OSError as error:
            done["in a thread"] = type(error).__name__
    running = threading.Thread(target=thread)
    running.start()
    running.join()
    print(json.dumps(done))
    sys.stdout.flush()
    return 0

worker._serve = probe
sys.exit(worker.main(sys.argv[6:]))
"""


UNDER_A_FILTER = """
import ctypes, os, platform
from facelane_server.worker import sandbox

step, which = sandbox._step, sandbox._ARCHITECTURES[platform.machine()][0]
program = sandbox._program(
    step(0x20, 0)
    + step(0x15, sandbox._SECCOMP[which], 0, 1)
    + step(0x06, 0x00050000 | 1)
    + step(0x06, 0x7FFF0000)
)
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0
"""
"""A container that denies seccomp(2), and forgot about prctl(2)."""


def inside(
    tmp_path: Path, mode: str, before: str = "", **changes: Any
) -> tuple[dict[str, str], int, str]:
    for folder in ("gallery", "models", "scratch"):
        (tmp_path / folder).mkdir()
    (tmp_path / "gallery" / "gallery.db").write_text("templates")
    (tmp_path / "models" / "weights").write_text("weights")
    tmp_path.chmod(0o755)
    confined = Confined(mode, read=(tmp_path / "models",), **changes)  # type: ignore[arg-type]
    ours, theirs = socket_pair()
    victim = subprocess.Popen(["sleep", "60"])
    try:
        run = subprocess.run(
            [
                *(sys.executable, "-P", "-c", before + INSIDE),
                str(tmp_path / "gallery" / "gallery.db"),
                str(tmp_path / "models" / "weights"),
                str(tmp_path / "scratch"),
                *(str(os.getpid()), str(victim.pid)),
                *(f"--channel={theirs.fileno()}", *confined.arguments()),
            ],
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert victim.poll() is None, "nobody ended it"
    finally:
        victim.kill()
        victim.wait()
        for sock in (ours, theirs):
            sock.close()
    return json.loads(run.stdout or "{}"), run.returncode, run.stderr


def test_from_inside_a_worker_all_that_it_does_not_need_is_denied(tmp_path: Path) -> None:
    found, code, errors = inside(tmp_path, "required")
    if code == exit_codes.NOT_CONFINED:
        pytest.skip(errors)
    assert code == 0, errors
    needed = {name: how for name, how in found.items() if name.startswith("+")}
    assert set(needed.values()) == {"done"}, needed
    denied = {name: how for name, how in found.items() if name not in needed}
    assert {name for name, how in denied.items() if how == "done"} == set()
    assert len(denied) >= 20


def test_without_a_sandbox_all_of_it_works(tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    found, code, errors = inside(tmp_path, "off")
    assert code == 0, errors
    assert found["read the gallery"] == found["a program"] == found["a TCP socket"] == "done"
    assert found["a pidfd"] == found["the server's environment"] == "done"


def test_for_a_card_it_may_listen_and_nothing_else(tmp_path: Path) -> None:
    found, code, errors = inside(tmp_path, "required", cards=True)
    if code == exit_codes.NOT_CONFINED:
        pytest.skip(errors)
    assert found["a Unix socket"] == found["+ a thread"] == "done"
    for name in ("a datagram socket", "a connection", "a TCP socket", "a UDP socket"):
        assert found[name] == "PermissionError", name


def test_where_sockets_cannot_be_denied_it_says_so_and_goes_on(tmp_path: Path) -> None:
    for mode in ("auto", "required"):
        folder = tmp_path / mode
        folder.mkdir()
        tmp_path.chmod(0o755)
        found, code, errors = inside(folder, mode, UNDER_A_FILTER)
        if mode == "required":
            assert (found, code) == ({}, exit_codes.NOT_CONFINED), errors
            assert "sandbox = 'required' cannot be had here" in errors
        elif found["a program"] == "done":
            pytest.skip("no seccomp here")
        else:
            assert code == 0, errors
            assert found["a TCP socket"] == found["+ its weights"] == "done"
            assert "sockets open" in errors


async def test_a_pool_says_what_its_workers_are_confined_by() -> None:
    async with real_pool(Stage.LIVENESS, sandbox="auto") as p:
        (worker,) = p.pool.info().workers
        status = Path(f"/proc/{worker.pid}/status").read_text()
        assert ("Seccomp:\t2" in status) is (", seccomp" in worker.sandbox)
        assert "NoNewPrivs:\t1" in status
    async with real_pool(Stage.LIVENESS, sandbox="off") as p:
        (worker,) = p.pool.info().workers
        assert worker.sandbox == "off"
        assert "Seccomp:\t0" in Path(f"/proc/{worker.pid}/status").read_text()


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (sandbox.Confinement("off"), "off"),
        (sandbox.Confinement("auto", 6, True, sockets=True), "landlock 6, seccomp, sockets open"),
        (sandbox.Confinement("auto"), "no landlock, no seccomp"),
        (sandbox.Confinement("auto", 6, True, "nobody"), "landlock 6, seccomp, user nobody"),
        (
            sandbox.Confinement("auto", 1, files=False),
            "landlock 1, no seccomp, every file readable",
        ),
    ],
)
def test_what_holds_in_words(held: sandbox.Confinement, said: str) -> None:
    assert str(held) == said


@pytest.mark.parametrize(
    ("held", "is_enough"),
    [
        (sandbox.Confinement("required", 6, True), True),
        (sandbox.Confinement("required", 12, True, "nobody"), True),
        (sandbox.Confinement("auto", 6, True, sockets=True), False),
        (sandbox.Confinement("auto", 6, True, files=False), False),
        (sandbox.Confinement("auto", 6), False),
        (sandbox.Confinement("auto", 0, True), False),
        (sandbox.Confinement("off"), False),
    ],
    ids=str,
)
def test_the_server_takes_no_less_than_it_requires(
    held: sandbox.Confinement, is_enough: bool
) -> None:
    assert (briefing._WHOLE.fullmatch(str(held)) is not None) is is_enough


@pytest.mark.parametrize("works", range(5))
def test_what_cuda_does_not_start_in_is_weakened_step_by_step(works: int) -> None:
    asked: list[sandbox.Strength] = []

    def try_out(strength: sandbox.Strength) -> bool:
        asked.append(strength)
        return len(asked) > works

    found = sandbox.strongest(try_out)
    assert asked == list(sandbox.STRENGTHS[: works + 1])
    assert found == (sandbox.STRENGTHS[works] if works < 4 else sandbox.STRENGTHS[0])


TRIES = """
import os, sys
from facelane_server.worker import sandbox
memory, tries, proven = map(int, sys.argv[1:])

def try_out():
    os.write(tries, b"x")
    return sandbox.STRENGTHS[2], bool(proven)

print(sandbox.STRENGTHS.index(sandbox.remembered(memory, try_out)))
"""


@pytest.mark.parametrize("proven", [True, False])
def test_one_worker_tries_out_for_all_what_cuda_starts_in(proven: bool) -> None:
    """What is not proven is tried by each: the card may have had no room, or not been there."""
    memory = os.memfd_create("memory")
    reader, tries = os.pipe()
    workers = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", TRIES, str(memory), str(tries), str(int(proven))],
            pass_fds=[memory, tries],
            stdout=subprocess.PIPE,
        )
        for _ in range(4)
    ]
    try:
        found = [worker.communicate(timeout=60)[0] for worker in workers]
        assert found == [b"2\n"] * 4
        os.close(tries)
        assert os.read(reader, 100) == b"x" * (1 if proven else 4)
    finally:
        for fd in (memory, reader):
            os.close(fd)


def test_what_is_remembered_of_cuda_is_out_of_reach_before_anything_is_loaded() -> None:
    memory = os.memfd_create("memory")
    assert sandbox.confine("off", None, cards=True, tried=memory) == sandbox.Confinement("off")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(memory)


async def test_workers_that_differ_in_models_alone_share_what_they_remember(
    tmp_path: Path,
) -> None:
    launchers = Launchers(tmp_path, mps_pipe_directory=tmp_path)

    def memory(name: str, isolation: str, device: str) -> int | None:
        pool = config.Pool(model=name, isolation=isolation, devices=(device,), group="one")  # type: ignore[arg-type]
        launcher = launchers.for_pool(name, pool)
        confined = launcher.confined if isolation == "thread" else launcher._confined  # type: ignore[attr-defined]
        assert (f"--tried={confined.tried}" in confined.arguments()) == (device != "cpu")
        found: int | None = confined.tried
        return found

    one, two = memory("a", "process", "cuda:0"), memory("b", "process", "cuda:1")
    assert one == two is not None
    by_mps = memory("c", "mps", "cuda:0")
    assert by_mps is not None
    assert by_mps != one
    assert memory("d", "process", "cpu") is None
    assert memory("e", "thread", "cpu") is None
    assert memory("f", "thread", "cuda:0") == one, "whoever joined the group first"
    await launchers.close()
    for fd in (one, by_mps):
        assert fd is not None
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_members_of_a_group_are_confined_as_the_strictest_says() -> None:
    merged = Confined("off", (Path("/a"),)).with_member(Confined("required", (Path("/b"),)))
    assert merged.arguments() == ["--sandbox=required", "--read=", "--read=/a", "--read=/b"]
    assert Confined("auto").with_member(Confined("off")).sandbox == "auto"


def test_libraries_that_ask_for_a_temporary_folder_can_be_imported() -> None:
    """Two that the card's workers import late: torch's compiler, for torchvision, and the finder
    of CUDA's libraries, where it is installed."""
    code = """
import importlib, importlib.util, tempfile
from facelane_server.worker import __main__ as worker, sandbox
worker._import_first()
held = sandbox.enter("auto", [], [], keep_user=True)
sandbox.name_temporary_folder(held)
if importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.pathfinder"):
    importlib.import_module("cuda.pathfinder")
assert tempfile.gettempdir() == "/tmp" or not held.landlock
try:
    tempfile.NamedTemporaryFile()
except OSError:
    pass
else:
    assert not held.landlock
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
