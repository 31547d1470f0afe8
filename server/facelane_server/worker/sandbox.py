"""What a worker may not do, because it reads pictures of strangers with parsers written in C.

Landlock lets it read its packages, its libraries and its devices, and write nothing;
seccomp denies it programs, processes, sockets and other processes' memory. Where root
started it, it becomes a user without rights. All of it is taken on by the first thread
before there is a second, for good, and costs nothing afterwards.

Kernels, containers and CUDA's drivers differ: what cannot be had is left out and said
(``auto``), or the worker does not start (``required``). Whether CUDA starts is tried out in a
child beforehand, because nobody can take a sandbox off again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import pwd
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

Mode = Literal["auto", "off", "required"]

USER: Final = "facelane-worker"
"""Whom a worker becomes that root started; ``nobody`` where there is no such user."""
_NOBODY: Final = 65534

_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_SECCOMP_FILTER: Final = 2
_SET_MODE_FILTER: Final = 1
_TSYNC: Final = 1
_SPEC_ALLOW: Final = 4
"""Kernels before 5.16 stop a confined process from speculating, which makes all that it computes
slower. That is for those who run others' code beside their own; a worker runs none."""

# Landlock: the same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_DIR, _IOCTL = 1 << 2, 1 << 3, 1 << 15
_WRITE_FILE: Final = 1 << 1 | 1 << 14
"""Its content, its length."""
_MAKE: Final = 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10
"""Remove and make files, sockets and pipes."""
_FS_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many rights a version knows; 16 since the fifth."""

_LIBRARIES: Final = (
    "/usr", "/lib", "/lib64", "/opt", "/sys", "/etc/ld.so.cache", "/etc/ld.so.conf",
    "/etc/ld.so.conf.d", "/etc/localtime", "/etc/passwd", "/etc/nsswitch.conf", "/nix/store",
)  # fmt: skip
_OF_THE_MACHINE: Final = tuple(
    f"/proc/{name}"
    for name in (
        "cpuinfo", "meminfo", "stat", "vmstat", "version", "uptime", "loadavg", "filesystems",
        "devices", "modules", "driver", "sys", "cgroups",
    )
)  # fmt: skip
"""What of /proc is nobody's: other processes' environments are not a worker's to read."""
_DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", "/dev/full")
_CARDS: Final = ("nvidia*", "dxg", "dri/*")

# (x86-64, arm64); -1 = not there.
_DENIED: Final = {
    # other programs and processes
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, -1), "vfork": (58, -1),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "kcmp": (312, 272), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    # what the kernel offers beside files and memory
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "syslog": (103, 116),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "quotactl": (179, 60),
    # the machine
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, -1), "ioperm": (173, -1),
}  # fmt: skip
_SOCKETS: Final = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242),
}  # fmt: skip
_OWN_ONLY: Final = {"kill": (62, 129), "tgkill": (234, 131)}
_CLONE, _CLONE3, _PRLIMIT, _SECCOMP, _SOCKET = (
    (56, 220),
    (435, 435),
    (302, 261),
    (317, 277),
    (41, 198),
)
_ARCHITECTURES: Final = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32: Final = 0x40000000
_CLONE_THREAD: Final = 0x10000
_AF_UNIX: Final = 1
_DATAGRAM: Final = 2
_CUDA_S: Final = 30
_NO_MEMORY, _NO_DEVICE = 2, 100


class SandboxError(Exception):
    """A sandbox was required and cannot be had; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """What holds. ``landlock``: the version, 0 = none; ``user``: whom root's worker became."""

    mode: Mode
    landlock: int = 0
    seccomp: bool = False
    user: str = ""
    files: bool = True
    """Only what was listed can be read."""
    sockets: bool = False
    """They can be opened."""

    def __str__(self) -> str:
        if self.mode == "off":
            return "off"
        said = [f"landlock {self.landlock}" if self.landlock else "no landlock"]
        said.append("seccomp" if self.seccomp else "no seccomp")
        if self.landlock and not self.files:
            said.append("every file readable")
        if self.seccomp and self.sockets:
            said.append("sockets open")
        if self.user:
            said.append(f"user {self.user}")
        return ", ".join(said)


@dataclass(frozen=True, slots=True)
class Strength:
    """How much of a sandbox is put up."""

    files: bool = True
    calls: bool = True
    sockets_denied: bool = True


STRENGTHS: Final = (
    Strength(),
    Strength(sockets_denied=False),
    Strength(files=False, sockets_denied=False),
    Strength(files=False, calls=False, sockets_denied=False),
)
"""From the strongest on; what CUDA does not start in is passed over."""


def strongest(works: Callable[[Strength], bool]) -> Strength:
    """The strongest that ``works``; where none does, it is not the sandbox's doing."""
    return next((strength for strength in STRENGTHS if works(strength)), STRENGTHS[0])


def remembered(fd: int | None, try_out: Callable[[], tuple[Strength, bool]]) -> Strength:
    """``try_out``'s answer, which one process finds for all that have ``fd``, a file of theirs
    alone; the others wait for it, as long as their server waits for them. None = nobody remembers.
    ``try_out``: with whether it may be remembered."""
    if fd is None:
        return try_out()[0]
    with contextlib.suppress(OSError):  # else two of them try at once
        fcntl.lockf(fd, fcntl.LOCK_EX)
    known = os.pread(fd, 1, 0)
    if known and known[0] < len(STRENGTHS):
        return STRENGTHS[known[0]]
    strength, proven = try_out()
    if proven:
        os.pwrite(fd, bytes([STRENGTHS.index(strength)]), 0)
    return strength


def confine(
    mode: Mode,
    read: Sequence[str] | None,
    write: Sequence[str] = (),
    *,
    keep_user: bool = False,
    cards: bool = False,
    mps: bool = False,
    tried: int | None = None,
) -> Confinement:
    """``enter``, as strong as CUDA bears where ``cards`` are to be computed on. ``tried``: where
    that is ``remembered``, which takes CUDA's start to find out; closed."""
    strength, started = STRENGTHS[0], False

    def cuda_starts(strength: Strength) -> bool:
        nonlocal started
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(_CUDA_S)
                held = enter("auto", read, write, keep_user=keep_user, strength=strength)
                close_doors(held, cards=True, mps=mps)
                cuda = ctypes.CDLL("libcuda.so.1")
                code = cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(
                    ctypes.byref(ctypes.c_void_p()), ctypes.c_int(0)
                )
            finally:
                os._exit(min(code, 255))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        started = code == 0
        return code in (0, _NO_MEMORY, _NO_DEVICE)

    def try_out() -> tuple[Strength, bool]:
        return strongest(cuda_starts), started

    try:
        if cards and mode != "off" and any(Path("/dev").glob("nvidia[0-9]*")):
            strength = remembered(tried, try_out)
    finally:
        if tried is not None:
            os.close(tried)  # before anything is looked at that could make this process say so
    if mode == "required" and strength != STRENGTHS[0]:
        raise SandboxError("CUDA does not start in the sandbox")
    return enter(mode, read, write, keep_user=keep_user, strength=strength)


def enter(
    mode: Mode,
    read: Sequence[str] | None,
    write: Sequence[str] = (),
    *,
    keep_user: bool = False,
    strength: Strength = STRENGTHS[0],
) -> Confinement:
    """Confine this process, which has one thread, and all that it will have.

    ``read``: files and folders beside Python's, the libraries' and the devices'; None =
    everything. ``write``: folders in which files may be made and changed. ``keep_user``:
    root stays root. Sockets can still be opened until ``close_doors``.

    Raises SandboxError.
    """
    if mode == "off":
        return Confinement(mode)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    cards = [str(node) for pattern in _CARDS for node in Path("/dev").glob(pattern)]
    readable = None if read is None else [*_own_files(), *_LIBRARIES, *read]
    user = "" if keep_user or os.getuid() else _become_nobody([*(readable or ()), *write], cards)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return _without(Confinement(mode, user=user))
    version = 0
    if strength.files:
        devices = [*_DEVICES, *cards]
        version = _landlock(libc, ["/"] if readable is None else readable, devices, write)
    program = _filter(sockets=False) if strength.calls else None
    # Some containers deny the one call and have forgotten about the other.
    seccomp = program is not None and (
        _filtered(libc, program, 0)
        or not libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(_program(program)), 0, 0)
    )
    files, sockets = readable is not None, not strength.sockets_denied
    return _without(Confinement(mode, version, seccomp, user, files, sockets))


def _without(found: Confinement) -> Confinement:
    if found.mode == "required" and not (found.landlock and found.seccomp and found.files):
        raise SandboxError(f"sandbox = 'required' cannot be had here ({found})")
    return found


def close_doors(held: Confinement, *, cards: bool = False, mps: bool = False) -> Confinement:
    """No more sockets, for all threads: the channel is there. ``cards``: but CUDA may listen on
    an abstract Unix socket, without which it does not start. ``mps``: and connect to a daemon.

    What holds then: sockets stay open where the system call for it is denied, by a container's
    own filter for instance (prctl, which ``enter`` may take, speaks for one thread alone). Raises
    SandboxError where all of it is required.
    """
    if not held.seccomp or held.sockets:
        return held
    program = _filter(sockets=True, cards=cards or mps, mps=mps)
    assert program is not None
    libc = ctypes.CDLL(None, use_errno=True)
    if not _filtered(libc, program, _TSYNC):
        why = os.strerror(ctypes.get_errno())
        held = replace(held, sockets=True)
        if held.mode == "required":
            raise SandboxError(
                f"sandbox = 'required' cannot be had here ({held}): seccomp(2) for all threads "
                f"says {why}; let the container or the unit allow the system call seccomp"
            )
    return held


def name_temporary_folder(held: Confinement, write: Sequence[str] = ()) -> None:
    """Libraries ask for one when they are imported (torchvision does, by way of torch's compiler),
    and where none can be written to that is an error. So it has a name, and who writes to it
    is told then."""
    if held.landlock:
        tempfile.tempdir = write[0] if write else "/tmp"  # noqa: S108 - nothing is written


def _own_files() -> list[str]:
    """Python and what is installed in it, this package with its models included."""
    found = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.executable, *sys.path}
    found |= set(os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    found.add(str(Path(__file__).resolve().parents[1]))
    found |= {os.path.realpath(path) for path in found if path}
    return sorted(path for path in found if path not in ("", "/", ".") and Path(path).exists())


# -- the user ---------------------------------------------------------------------------


def _become_nobody(files: Iterable[str], devices: Iterable[str]) -> str:
    """Root no more; the new name. Empty where the files or devices could not be reached then,
    or the container does not let go."""
    try:
        entry = pwd.getpwnam(USER)
        uid, gid, name = entry.pw_uid, entry.pw_gid, USER
    except KeyError:
        uid, gid, name = _NOBODY, _NOBODY, "nobody"
    wanted = [(path, os.R_OK) for path in files if Path(path).exists()]
    wanted += [(node, os.R_OK | os.W_OK) for node in devices]
    groups = os.getgroups()
    try:
        os.setgroups([])
        os.setegid(gid)
        os.seteuid(uid)
        reached = all(os.access(path, how, effective_ids=True) for path, how in wanted)
    except OSError:
        reached = False
    finally:
        os.seteuid(0)
        os.setegid(0)
    if not reached:
        with contextlib.suppress(OSError):
            os.setgroups(groups)
        return ""
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    return name


# -- Landlock ---------------------------------------------------------------------------


def _landlock(
    libc: ctypes.CDLL, read: Sequence[str], devices: Sequence[str], write: Sequence[str]
) -> int:
    """The version that holds; 0 where the kernel, or the container, has none."""
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return 0
    rights = (1 << _FS_RIGHTS.get(version, 16)) - 1
    # TCP (bind, connect) since 4; abstract sockets and signals to others since 6.
    attributes = struct.pack("QQQ", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        return 0
    try:
        # Its own part of /proc, to be written to as well (threads' names). Held open for good:
        # the rule is the inode's, which a fresh look-up would not find again.
        os.open("/proc/self", os.O_PATH | os.O_CLOEXEC)
        _allow(libc, ruleset, "/proc/self", _READ_FILE | _WRITE_FILE | _READ_DIR, rights)
        for path in (*_OF_THE_MACHINE, *read):
            _allow(libc, ruleset, path, _READ_FILE | _READ_DIR, rights)
        for path in devices:
            _allow(libc, ruleset, path, _READ_FILE | _WRITE_FILE | _READ_DIR | _IOCTL, rights)
        for path in write:
            _allow(libc, ruleset, path, _READ_FILE | _READ_DIR | _WRITE_FILE | _MAKE, rights)
        return 0 if libc.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)) else int(version)
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, access: int, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # not on this machine
        return
    try:
        if not Path(path).is_dir():
            access &= ~(_READ_DIR | _MAKE)
        rule = struct.pack("=Qi", access & rights, fd)
        libc.syscall(_ADD_RULE, ruleset, 1, rule, ctypes.c_uint32(0))
    finally:
        os.close(fd)


# -- seccomp ----------------------------------------------------------------------------


def _filtered(libc: ctypes.CDLL, program: bytes, flags: int) -> bool:
    """Whether seccomp(2) has taken the program; ``errno`` says why not."""
    number = _SECCOMP[_ARCHITECTURES[platform.machine()][0]]
    return any(
        not libc.syscall(number, _SET_MODE_FILTER, these, ctypes.byref(_program(program)))
        for these in (flags | _SPEC_ALLOW, flags)  # kernels before 4.17 know no such flag
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _program(code: bytes) -> _Program:
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    program.kept = buffer
    return program


def _step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    """One instruction of the kernel's packet filter."""
    return struct.pack("=HBBI", code, then, otherwise, value)


def _filter(*, sockets: bool, cards: bool = False, mps: bool = False) -> bytes | None:
    """The program; None for an architecture whose calls are not known here."""
    if platform.machine() not in _ARCHITECTURES:
        return None
    which, architecture = _ARCHITECTURES[platform.machine()]
    load, equal, at_least, any_bit, mask, answer = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    number, arch, first, second = 0, 4, 16, 24  # offsets of what is looked at
    allow = _step(answer, 0x7FFF0000)
    deny, unknown = (_step(answer, 0x00050000 | code) for code in (errno.EPERM, errno.ENOSYS))
    code = [
        _step(load, arch),
        _step(equal, architecture, 1, 0),
        deny,
        _step(load, number),
        _step(at_least, _X32, 0, 1),
        deny,
    ]

    def on(call: int, *steps: bytes) -> None:
        if call >= 0:
            code.extend((_step(equal, call, 0, len(steps)), *steps))

    def unless(value: int) -> tuple[bytes, ...]:
        """Denied unless the first argument is ``value``."""
        return _step(load, first), _step(equal, value, 1, 0), deny, allow

    if sockets:
        if cards:
            # Streams alone: a datagram would reach a listener without being connected.
            family = (_step(load, first), _step(equal, _AF_UNIX, 1, 0), deny)
            kind = (_step(load, second), _step(mask, 0xF), _step(equal, _DATAGRAM, 0, 1), deny)
            on(_SOCKETS["socket"][which], *family, *kind, allow)
        for name, calls in _SOCKETS.items():
            if not cards or (name == "connect" and not mps):
                on(calls[which], deny)
    else:
        for calls in _DENIED.values():
            on(calls[which], deny)
        for calls in _OWN_ONLY.values():
            on(calls[which], *unless(os.getpid()))
        own = (
            _step(load, first),
            _step(equal, 0, 2, 0),
            _step(equal, os.getpid(), 1, 0),
            deny,
            allow,
        )
        on(_PRLIMIT[which], *own)
        # Threads, but no processes. What clone3 is told lies in memory, so it is not there,
        # and libraries take clone.
        on(_CLONE3[which], unknown)
        on(_CLONE[which], _step(load, first), _step(any_bit, _CLONE_THREAD, 1, 0), deny, allow)
    code.append(allow)
    return b"".join(code)
