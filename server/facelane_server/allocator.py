"""What a program asks of the C library's allocator before it holds anything (``wiping`` says why).

Imports next to nothing: a program that begins once again has lost what it had imported.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from typing import Final

M_ARENA_MAX: Final = -8
M_PERTURB: Final = -6
"""See mallopt(3)."""
_FREED: Final = 0xFF
"""What is freed is filled with this; what is taken with zeros then."""
_VARIABLE: Final = "GLIBC_TUNABLES"
_NO_CACHES: Final = "glibc.malloc.tcache_count=0"


def one_heap() -> None:
    """All threads share one heap of the C library, none keeps free places of its own, and what is
    freed is overwritten. At the start of a program, which may begin once again for it: the second
    of these is read from the environment when the library is loaded."""
    libc = ctypes.PyDLL(None)
    if not hasattr(libc, "mallinfo2"):  # musl, glibc before 2.33
        return
    tunables = os.environ.get(_VARIABLE, "")
    if "tcache_count" not in tunables:
        os.environ[_VARIABLE] = f"{tunables}:{_NO_CACHES}".lstrip(":")
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - this very program
    libc.mallopt(M_ARENA_MAX, 1)
    libc.mallopt(M_PERTURB, _FREED)


def as_others(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for programs that have no need of this: without what ``one_heap`` put into
    it."""
    tunables = environment.get(_VARIABLE, "").removesuffix(_NO_CACHES).rstrip(":")
    others = {name: value for name, value in environment.items() if name != _VARIABLE}
    return {**others, _VARIABLE: tunables} if tunables else others
