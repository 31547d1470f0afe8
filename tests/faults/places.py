"""What a fault needs of a machine: a small disk, a network of its own. Made by root alone."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

_numbers = itertools.count()


class UnavailableError(Exception):
    """This machine does not let us; says why."""


def _command(*words: str) -> None:
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        raise UnavailableError(f"`{' '.join(words)}`: {done.stderr.strip() or done.returncode}")


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """Raises ``UnavailableError`` where this user may not mount anything."""
    if os.geteuid() != 0:
        raise UnavailableError("a small disk is mounted by root alone")
    folder.mkdir()
    _command("mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0700", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, timeout=30)


def fill(filler: Path) -> None:
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        for block in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * block):
                    pass


class Cable:
    """A network namespace with two cables to this one: by ``clients`` come its server's clients, by
    ``store`` it reaches its store."""

    def __init__(self, links: Sequence[str]) -> None:
        """``links``: those that are cut."""
        self.links = links
        self.name = f"facelane-{os.getpid()}-{next(_numbers)}"
        # Of 198.18/15, which is for tests of networks.
        third = os.getpid() % 200 + next(_numbers)
        self.far = f"198.18.{third % 250}.2"
        self.near = f"198.19.{third % 250}.1"
        """Where this machine's store is, for who is there."""
        self.prefix = ("ip", "netns", "exec", self.name)
        self._ends = {"clients": f"flc{os.getpid()}", "store": f"fls{os.getpid()}"}

    def __enter__(self) -> Self:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise UnavailableError("networks are made by root alone, with ip (iproute2)")
        _command("ip", "netns", "add", self.name)
        try:
            _command(*self.prefix, "ip", "link", "set", "lo", "up")
            for kind, near, far in (
                ("clients", self.far[:-1] + "1", self.far),
                ("store", self.near, self.near[:-1] + "2"),
            ):
                end = self._ends[kind]
                _command("ip", "link", "add", end, "type", "veth", "peer", "name", f"{end}p")
                _command("ip", "link", "set", f"{end}p", "netns", self.name)
                _command("ip", "addr", "add", f"{near}/24", "dev", end)
                _command("ip", "link", "set", end, "up")
                _command(*self.prefix, "ip", "addr", "add", f"{far}/24", "dev", f"{end}p")
                _command(*self.prefix, "ip", "link", "set", f"{end}p", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)
        for end in self._ends.values():
            subprocess.run(["ip", "link", "del", end], check=False, capture_output=True)

    @contextlib.contextmanager
    def cut(self, link: str) -> Iterator[None]:
        """What is sent is lost, and nobody is told."""
        end = f"{self._ends[link]}p"
        _command(*self.prefix, "ip", "link", "set", end, "down")
        try:
            yield
        finally:
            _command(*self.prefix, "ip", "link", "set", end, "up")
