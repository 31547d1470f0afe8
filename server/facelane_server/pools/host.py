"""Operating-system processes that host workers: how they start, are watched and end.

A worker, to the rest of ``pools``, is a ``Link``: a socket to it, its pid, a future that
resolves when it is gone, and signals. Three launchers make links:

- ``ProcessLauncher``: a process each (``process``, ``mps``), started with ``python -m
  facelane_server.worker --channel FD``;
- ``GroupLauncher``: one process whose threads are the workers of a group (``thread``);
- ``ExternalLauncher``: processes that somebody else starts and that attach to a Unix
  socket (``external``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

import structlog

from facelane_server import config, limits
from facelane_server.pools.process import BY_DEFAULT, TERM_S, Confined, Process, is_halted, within

log = structlog.get_logger(__name__)

_DUMP_S: Final = 0.2
"""From asking for a stack dump to SIGKILL: faulthandler writes it within milliseconds."""
_REAP_S: Final = 10.0
_OWN: Final = Path(__file__).resolve().parents[1]
"""This package with its models, which every worker may read."""


class Link(Protocol):
    """One worker's process, or thread of one. ``exited`` resolves with the exit code
    (negative = signal, None = unknown) when nothing of the worker runs any more."""

    sock: socket.socket
    pid: int
    exited: asyncio.Future[int | None]
    polite: bool
    """SIGTERM concerns this worker alone."""

    def signal(self, number: signal.Signals) -> None:
        """Does nothing when the process is gone."""

    def halted(self) -> bool:
        """Somebody has stopped the process (SIGSTOP), as far as the kernel tells."""

    def release(self) -> None:
        """The worker was drained, or its channel is closed: nothing more is asked of it."""


class Launcher(Protocol):
    """Makes links, and owns what they need."""

    def register(self, worker_id: str) -> None:
        """A worker of this id will be launched; said before the first launch."""

    async def launch(self, worker_id: str, nice: int = 0, folder: Path | None = None) -> Link:
        """A new worker, not yet spoken to, at that priority until it is ready, which may read
        the ``folder`` of its package. Raises OSError when none can be started."""

    def may_read(self, folder: Path) -> bool:
        """Whether a worker that is launched now could read a package there."""

    async def close(self) -> None:
        """After all links are gone."""


async def end(link: Link, *, grace_s: float, dump: bool) -> None:
    """See to a worker's end: wait ``grace_s`` for it to leave by itself, then SIGTERM, then a
    stack dump (when ``dump``), then SIGKILL, each bounded. Returns when it was reaped, or
    when the kernel does not let go of it (logged)."""
    if grace_s > 0 and await within(link.exited, grace_s):
        return
    if grace_s > 0 and link.polite:
        link.signal(signal.SIGTERM)
        if await within(link.exited, TERM_S):
            return
        dump = True
    if dump and not link.exited.done():
        link.signal(signal.SIGUSR1)
        if await within(link.exited, _DUMP_S):
            return
    link.signal(signal.SIGKILL)
    if not await within(link.exited, _REAP_S):
        log.error("worker cannot be killed, the kernel holds it", pid=link.pid)
        await asyncio.shield(link.exited)


# -- process and mps --------------------------------------------------------------------


class _ProcessLink:
    polite = True

    def __init__(self, process: Process) -> None:
        self._process = process
        self.sock = process.sockets[0]
        self.pid = process.pid
        self.exited = process.exited

    def signal(self, number: signal.Signals) -> None:
        self._process.signal(number)

    def halted(self) -> bool:
        return is_halted(self.pid)

    def release(self) -> None:
        pass


class ProcessLauncher:
    """A process for every worker."""

    def __init__(
        self,
        *,
        threads: int,
        environment: Mapping[str, str] | None = None,
        confined: Confined = BY_DEFAULT,
    ) -> None:
        self._threads = threads
        self._environment = dict(environment or {})
        self._confined = confined

    def register(self, worker_id: str) -> None:
        pass

    async def launch(self, worker_id: str, nice: int = 0, folder: Path | None = None) -> Link:
        confined = self._confined.with_folder(folder)
        return _ProcessLink(Process(worker_id, 1, self._threads, self._environment, nice, confined))

    def may_read(self, folder: Path) -> bool:  # noqa: ARG002 - its process is made for it
        return True

    async def close(self) -> None:
        pass


def mps_environment(
    *,
    pipe_directory: Path,
    devices: Sequence[str],
    sm_share: int,
    memory_mib: int,
    stream_priority: int = 0,
) -> dict[str, str]:
    """What makes a worker a client of the MPS daemon behind ``pipe_directory``, with its
    share of the multiprocessors (percent) and its device memory limit (0 = none).

    Stream priorities order the work of one process; between clients MPS knows two levels, so
    that pools with a raised ``stream_priority`` go before those without.
    """
    environment = {
        "CUDA_MPS_PIPE_DIRECTORY": str(pipe_directory),
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(sm_share),
        "CUDA_MPS_CLIENT_PRIORITY": "0" if stream_priority < 0 else "1",
    }
    if memory_mib:
        indices = sorted({device.partition(":")[2] or "0" for device in devices})
        environment["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = ",".join(
            f"{index}={memory_mib}M" for index in indices
        )
    return environment


# -- thread -------------------------------------------------------------------------------


class _GroupLink:
    polite = False

    def __init__(self, process: Process, sock: socket.socket) -> None:
        self._process = process
        # A copy: the group keeps the original open, so that the thread outlives this life.
        self.sock = sock.dup()
        self.pid = process.pid
        self.exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        process.exited.add_done_callback(self._process_gone)

    def signal(self, number: signal.Signals) -> None:
        if not self.exited.done():
            self._process.signal(number)

    def halted(self) -> bool:
        return is_halted(self.pid)

    def release(self) -> None:
        """Drained: the thread waits for the next Load on the same channel."""
        if not self.exited.done():
            self.exited.set_result(0)
            self._process.exited.remove_done_callback(self._process_gone)

    def _process_gone(self, process: asyncio.Future[int | None]) -> None:
        if not self.exited.done():
            self.exited.set_result(process.result())


class GroupLauncher:
    """One process for the workers of a group, a thread each. They share one fate: what ends
    the process ends them all, and the first that is launched again starts the next one.

    ``register`` every worker before the first ``launch``.
    """

    def __init__(self, name: str, *, threads: int, confined: Confined = BY_DEFAULT) -> None:
        self._name = name
        self._threads = threads
        self.confined = confined
        self._channels: dict[str, int] = {}
        self._process: Process | None = None
        self._readable: list[Path] = []
        """Folders with models that the process may read."""

    def register(self, worker_id: str) -> None:
        """Give a worker its channel. Raises RuntimeError once the process runs."""
        if self._process is not None:
            raise RuntimeError("the group's process is running already")
        self._channels[worker_id] = len(self._channels)

    async def launch(
        self,
        worker_id: str,
        nice: int = 0,  # noqa: ARG002 - one process, of which others serve
        folder: Path | None = None,
    ) -> Link:
        process = self._process
        if process is None or process.exited.done():
            self._drop()
            confined = self.confined.with_folder(folder)
            process = Process(
                f"group {self._name}", len(self._channels), self._threads, {}, confined=confined
            )
            self._readable = [path.resolve() for path in confined.read]
            self._process = process
        return _GroupLink(process, process.sockets[self._channels[worker_id]])

    def may_read(self, folder: Path) -> bool:
        """A process that runs keeps to what it was begun with."""
        process = self._process
        if process is None or process.exited.done() or self.confined.sandbox == "off":
            return True
        found = folder.resolve()
        return any(found.is_relative_to(path) for path in (_OWN, *self._readable))

    async def close(self) -> None:
        process = self._process
        if process is None:
            return
        self._drop()  # end of file on every channel
        if not await within(process.exited, TERM_S):
            process.signal(signal.SIGKILL)
            await within(process.exited, _REAP_S)

    def _drop(self) -> None:
        if self._process is not None:
            for sock in self._process.sockets:
                sock.close()
            self._process = None


# -- external -----------------------------------------------------------------------------


class _ExternalLink:
    """``pidfd`` < 0: the process cannot be watched (another namespace's or user's); it
    counts as gone when its channel is closed."""

    polite = True

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self._loop = asyncio.get_running_loop()
        self.sock = sock
        self.pid = pid
        self.exited: asyncio.Future[int | None] = self._loop.create_future()
        self._pidfd = -1
        if pid > 0:
            with contextlib.suppress(OSError):
                self._pidfd = os.pidfd_open(pid)
                self._loop.add_reader(self._pidfd, self._gone)

    def signal(self, number: signal.Signals) -> None:
        if self._pidfd < 0:
            if number is signal.SIGKILL:
                self._gone()
            return
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            pass
        except PermissionError:
            # Somebody else's process: closing the channel is all that we can do.
            if number is signal.SIGKILL:
                self._gone()

    def halted(self) -> bool:
        return self._pidfd >= 0 and is_halted(self.pid)

    def release(self) -> None:
        if self._pidfd < 0:
            self._gone()

    def _gone(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if not self.exited.done():
            self.exited.set_result(None)


class ExternalLauncher:
    """Accepts workers on a Unix socket of mode 0600 whose peers must run as ``uids``
    (default: our own). Workers beyond those wanted wait, not accepted, as cold spares."""

    def __init__(self, path: Path, *, uids: Sequence[int] = ()) -> None:
        self.path = path
        self._uids = frozenset(uids or (os.getuid(),))
        self._listener: socket.socket | None = None
        self._turn = asyncio.Lock()

    def register(self, worker_id: str) -> None:
        pass

    async def launch(
        self,
        worker_id: str,
        nice: int = 0,  # noqa: ARG002 - whoever starts it sees to that
        folder: Path | None = None,  # noqa: ARG002 - and to this
    ) -> Link:
        loop = asyncio.get_running_loop()
        async with self._turn:
            listener = self._listen()
            while True:
                sock, _ = await loop.sock_accept(listener)
                raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                pid, uid, _gid = struct.unpack("3i", raw)
                if uid in self._uids:
                    return _ExternalLink(sock, pid)
                sock.close()
                log.warning("worker refused, it runs as another user", worker=worker_id, uid=uid)

    def may_read(self, folder: Path) -> bool:  # noqa: ARG002 - how they are confined is theirs
        return True

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self.path.unlink(missing_ok=True)

    def _listen(self) -> socket.socket:
        if self._listener is None:
            self.path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                old = os.umask(0o177)
                try:
                    listener.bind(str(self.path))
                finally:
                    os.umask(old)
                listener.listen(limits.MAX_ATTACHING)
                listener.setblocking(False)
            except BaseException:
                listener.close()
                raise
            self._listener = listener
        return self._listener


class Launchers:
    """The launchers of all pools, by their isolation. Owns them.

    ``runtime_dir``: where the sockets of external pools are made; None where there are none.
    ``mps_pipe_directory``: of the MPS control daemon, for pools with ``isolation = "mps"``.
    ``models``: folders with packages, which workers may read beside the one that they serve.
    """

    def __init__(
        self,
        runtime_dir: Path | None,
        *,
        mps_pipe_directory: Path | None = None,
        models: Sequence[str] = (),
    ) -> None:
        self._runtime_dir = runtime_dir
        self._models = tuple(Path(path).expanduser() for path in models)
        if mps_pipe_directory is None and runtime_dir is not None:
            mps_pipe_directory = runtime_dir / "mps"
        self._mps_pipe_directory = mps_pipe_directory
        self._tried: dict[bool, int] = {}
        """Of those that talk to an MPS daemon, and of the others."""
        self._groups: dict[str, GroupLauncher] = {}
        self._launchers: list[Launcher] = []

    def for_pool(self, name: str, settings: config.Pool) -> Launcher:
        """The launcher for a pool; pools of one thread group share theirs."""
        launcher: Launcher
        hosting = settings.hosting
        confined = self._confined(settings)
        if hosting.shares_process:
            group = self._groups.get(settings.group)
            if group is None:
                group = GroupLauncher(settings.group, threads=settings.threads, confined=confined)
                self._groups[settings.group] = group
                self._launchers.append(group)
            group.confined = group.confined.with_member(confined)
            return group
        if hosting.attaches:
            if settings.socket:
                path = Path(settings.socket)
            else:
                assert self._runtime_dir is not None
                path = self._runtime_dir / f"{name}.sock"
            launcher = ExternalLauncher(path)
        elif hosting.needs_mps:
            assert self._mps_pipe_directory is not None
            environment = mps_environment(
                pipe_directory=self._mps_pipe_directory,
                devices=settings.devices,
                sm_share=settings.sm_share,
                memory_mib=settings.memory_mib,
                stream_priority=settings.stream_priority,
            )
            tried = self._memory(mps=True) if confined.cards else None
            confined = replace(confined, mps=self._mps_pipe_directory, tried=tried)
            launcher = ProcessLauncher(
                threads=settings.threads, environment=environment, confined=confined
            )
        else:
            launcher = ProcessLauncher(threads=settings.threads, confined=confined)
        self._launchers.append(launcher)
        return launcher

    def _confined(self, settings: config.Pool) -> Confined:
        own = [Path(settings.model).expanduser()] if os.sep in settings.model else []
        faults = [
            Path(settings.options[name]).parent
            for name in ("fail.only_file", "fail.from_file")
            if name in settings.options
        ]
        cards = any(device != "cpu" for device in settings.devices)
        tried = self._memory(mps=False) if cards else None
        read = (*self._models, *own)
        return Confined(settings.sandbox, read, tuple(faults), cards, tried=tried)

    def _memory(self, *, mps: bool) -> int:
        if mps not in self._tried:
            self._tried[mps] = os.memfd_create("facelane-sandbox", os.MFD_CLOEXEC)
        return self._tried[mps]

    async def close(self) -> None:
        """After all pools have stopped."""
        for launcher in self._launchers:
            await launcher.close()
        self._launchers.clear()
        self._groups.clear()
        while self._tried:
            os.close(self._tried.popitem()[1])
