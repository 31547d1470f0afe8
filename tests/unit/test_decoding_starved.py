"""A picture is not blamed for what its worker lacks."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import cv2, numpy as np
from facelane_server.domain import Encoding, FacelaneError
from facelane_server.worker.decoding import pictures

pictures.silence_opencv()
noise = np.random.default_rng(1).integers(0, 255, (900, 1600, 3), np.uint8)
data = memoryview(bytes(cv2.imencode(f".{sys.argv[1]}", noise)[1]))
encoding = Encoding(sys.argv[2])
pictures.decode(data, encoding)
pages = int(open("/proc/self/statm").read().split()[0])
most = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), most))
said = set()
for _ in range(20):
    try:
        pictures.decode(data, encoding)
        said.add("decoded")
    except MemoryError:
        said.add("no memory")
    except FacelaneError as error:
        said.add(str(error.reason))
resource.setrlimit(resource.RLIMIT_AS, (most, most))
pictures.decode(data, encoding)
print(*sorted(said))
"""


@pytest.mark.parametrize(
    ("suffix", "encoding"), [("jpg", "jpeg"), ("png", "png"), ("webp", "webp")]
)
def test_without_memory_no_picture_is_called_corrupt(suffix: str, encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, suffix, encoding],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] in ("no memory", "decoded", "decoded no memory")
