"""``python -m facelane_server.worker``: one worker process.

``--channel FD`` (started by the server): one inherited SOCK_SEQPACKET socket; given
several times, each is served by a thread with its own model and stream (``thread``
isolation). ``--attach PATH`` (started by systemd or in a container): connect to the
server's Unix socket and serve that. Exit codes are in ``exit_codes``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, get_args

from facelane_server import seclusion
from facelane_server.worker import exit_codes, sandbox
from facelane_server.worker.priority import step_back

_PR_SET_PDEATHSIG: Final = 1
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_KEPT_BYTES: Final = 128 << 20
"""Free memory at the heap's end that stays ours."""
_HEAP_BLOCK_BYTES: Final = 32 << 20
"""The largest block that comes from the heap; glibc allows no more."""
_THREAD_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def main(arguments: list[str] | None = None) -> int:
    """Parse, do the start ritual, serve. The exit code."""
    parser = argparse.ArgumentParser(prog="python -m facelane_server.worker")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--channel", type=int, action="append", metavar="FD")
    where.add_argument("--attach", metavar="PATH")
    parser.add_argument("--attach-timeout", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one operator")
    parser.add_argument("--nice", type=int, default=0, help="until ready, for others' sake")
    parser.add_argument("--sandbox", choices=get_args(sandbox.Mode), default="auto")
    parser.add_argument("--read", action="append", metavar="PATH", help="none: everything")
    parser.add_argument("--write", action="append", default=[], metavar="FOLDER")
    parser.add_argument("--cards", action="store_true", help="it may compute on a CUDA device")
    parser.add_argument("--tried", type=int, metavar="FD", help="what CUDA starts in, once known")
    parser.add_argument("--mps", default="", metavar="FOLDER", help="of the daemon's pipes")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as leave:
        return exit_codes.USAGE if leave.code else exit_codes.OK

    # Before anything imports numpy or torch, which read these once.
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(max(1, options.threads))
    _keep_heap()
    _close_stdin()
    seclusion.no_cores()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    stopping, wake = _stop_on_sigterm()

    _import_first()
    try:
        held = _confine(options)
        sandbox.name_temporary_folder(held, options.write)
    except sandbox.SandboxError as error:
        sys.stderr.write(f"{error}; set sandbox = 'auto' to go without\n")
        return exit_codes.NOT_CONFINED
    if not options.attach:
        _die_with_parent()  # after the change of user, which forgets it
    step_forward = step_back(options.nice) if options.nice else _nothing
    on_cards = options.cards or bool(options.attach)

    def ready() -> None:
        step_forward()  # writes to /proc what cannot be written to afterwards
        # CUDA maps what it likes, and has a limit of its own for what is locked.
        seclusion.seclude(lock=not on_cards)

    # Now, and not after an attach: from there on the server is waiting.
    from facelane_server.worker import loop  # noqa: F401

    if options.attach:
        try:
            sock = _attach(options.attach, options.attach_timeout)
        except OSError as error:
            sys.stderr.write(
                f"cannot attach to {options.attach}: {error.strerror or error}; the server must "
                "run, as this user, with a pool that has this socket\n"
            )
            return exit_codes.CANNOT_ATTACH
        sockets = [sock]
    else:
        sockets = [socket.socket(fileno=fd) for fd in options.channel]
        for sock in sockets:
            os.set_inheritable(sock.fileno(), False)
    try:
        held = sandbox.close_doors(
            held, cards=options.cards or bool(options.attach), mps=bool(options.mps)
        )
    except sandbox.SandboxError as error:
        sys.stderr.write(f"{error}; or set sandbox = 'auto' to go without\n")
        return exit_codes.NOT_CONFINED
    return _serve(sockets, stopping, wake, ready, str(held))


def _import_first() -> None:
    """What cannot be imported inside of a sandbox: the finder of CUDA's libraries, which torch
    and our kernels use, asks a compiler where the C library lies."""
    with contextlib.suppress(ImportError):
        importlib.import_module("cuda.pathfinder")


def _confine(options: argparse.Namespace) -> sandbox.Confinement:
    mps = [options.mps, "/dev/shm"] if options.mps else []  # noqa: S108 - CUDA's own place
    read = None if options.read is None else [path for path in options.read if path]
    # A daemon serves one user, the server's; a worker of another user could not attach.
    keep_user = bool(options.mps or options.attach)
    return sandbox.confine(
        options.sandbox,
        read,
        [*options.write, *mps],
        keep_user=keep_user,
        cards=options.cards or bool(options.attach),
        mps=bool(options.mps),
        tried=options.tried,
    )


def _nothing() -> None:
    pass


def _serve(
    sockets: list[socket.socket],
    stopping: threading.Event,
    wake: int,
    ready: Callable[[], None],
    held: str,
) -> int:
    from facelane_server.ipc.channel import WorkerChannel
    from facelane_server.worker.journal import log_exception
    from facelane_server.worker.loop import Loop

    def run(sock: socket.socket, *, again: bool) -> int:
        """``again``: when drained, wait for the next model on the same channel."""
        try:
            channel = WorkerChannel(sock, wake_fd=wake)
            while True:
                loop = Loop(channel, stopping.is_set, ready, sandbox=held)
                code = loop.run()
                if not (again and loop.drained) or stopping.is_set():
                    return code
        except Exception as error:
            log_exception("worker failed", error)
            return exit_codes.INTERNAL

    if len(sockets) == 1:
        return run(sockets[0], again=False)

    def run_in_thread(sock: socket.socket) -> None:
        code = run(sock, again=True)
        if code != exit_codes.OK:
            # The models of a group share one fate: half a process would be worse.
            os._exit(code)
        sock.close()

    threads = [
        threading.Thread(target=run_in_thread, args=(sock,), name=f"channel-{i}")
        for i, sock in enumerate(sockets)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return exit_codes.OK


def _keep_heap() -> None:
    """Activations come and go with every job. By default glibc gives blocks of their size back
    to the kernel each time, and the page faults were a quarter of a detector's time on a CPU
    (mallopt(3))."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _HEAP_BLOCK_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_ARENA_MAX, 1)  # what is free of it can be overwritten (``wiping``)


def _close_stdin() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def _die_with_parent() -> None:
    """SIGKILL when the server's process ends, for a worker that hangs and cannot see end of
    file on its channel. (A server that ended before this call closed the channel.)"""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _stop_on_sigterm() -> tuple[threading.Event, int]:
    """An event that SIGTERM sets, and a descriptor that becomes readable with it."""
    stopping = threading.Event()
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def stop(_signal: int, _frame: object) -> None:
        stopping.set()
        with contextlib.suppress(BlockingIOError):
            os.write(wake_write, b"\0")

    signal.signal(signal.SIGTERM, stop)
    return stopping, wake_read


def _attach(path: str, timeout_s: float) -> socket.socket:
    """Raises OSError, that of the last try."""
    deadline = time.monotonic() + timeout_s
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            sock.connect(path)
            return sock
        except OSError:
            sock.close()
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.2)


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    # Not sys.exit: a device library that hangs while it is torn down must not keep a
    # worker from ending.
    os._exit(code)
