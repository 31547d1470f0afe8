"""``python -m bench.camera_fuzz --inputs 5000000``: the splitter and the walk over markers.

Random streams made of what cameras write, and of damage: every input has to come to its end
without an exception but ``MjpegError``, hold no more than its bound, and take no step longer
than ``SLOW_MS``. Several processes; ends with one JSON line, exit code 1 when anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import sys
import time

from facelane_bridge.sources.jpeg import read_header, too_costly
from facelane_bridge.sources.mjpeg import MAX_HEADER_BYTES, MjpegError, MjpegSplitter

SLOW_MS = 50.0
PIECES = (
    b"--frame", b"----frame", b"frame", b"--other", b"--", b"\r\n", b"\n", b"\r\n\r\n", b"\n\n",
    b"Content-Length: ", b"7", b"100", b"99999999999999", b"-5", b"Content-Type: image/jpeg",
    b"Content-Type: text/plain", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd9", b"\xff", b"\xff" * 40,
    b"\xff\xda", b"\xff\xda\x00\x02", b"\xff\xc4\x00\x04ab", b"\xff\xe1\xff\xff",
    b"\xff\xfe\x00\x00", b"\xff\xfe\x00\x04ab", b"\xff\xd0", b"\xff\x00", b"\x00" * 30,
    b"-" * 50, b"abc",
    b"HTTP/1.1 200 OK",
    b"\xff\xc0\x00\x11\x08\x00\x10\x00\x10\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01",
    b"\xff\xc2\x00\x11\x08\xff\xff\xff\xff\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01",
)  # fmt: skip
BOUNDARIES = ("frame", "--frame", "", "--", "other", "f" * 200)


def feed(splitter: MjpegSplitter, data: bytes, step: int) -> list[bytes]:
    """All pictures of a stream that comes in pieces of ``step`` bytes."""
    pictures: list[bytes] = []
    for at in range(0, len(data), step):
        pictures += splitter.feed(data[at : at + step])
    return pictures + splitter.finish()


def stream(source: random.Random) -> bytes:
    """Some bytes that a camera might send, or somebody who means no good."""
    pieces = source.choices(PIECES, k=source.randint(1, 24))
    if source.random() < 0.3:
        pieces.insert(source.randrange(len(pieces)), source.randbytes(source.randint(1, 300)))
    if source.random() < 0.02:
        pieces *= source.randint(2, 200)
    data = bytearray(b"".join(pieces))
    for _ in range(source.randint(0, 3)):
        data[source.randrange(len(data))] = source.randrange(256)
    return bytes(data)


def one_input(source: random.Random) -> None:
    """One stream in random pieces; AssertionError or whatever the splitter breaks with."""
    bound = source.choice((64, 1000, 100_000))
    splitter = MjpegSplitter(source.choice(BOUNDARIES), max_part_bytes=bound)
    data = stream(source)
    step = source.choice((1, 3, 64, 4096)) if len(data) < 2000 else 4096
    with contextlib.suppress(MjpegError):
        for picture in feed(splitter, data, step):
            assert picture.startswith(b"\xff\xd8")
            assert len(picture) <= bound
            header = read_header(picture)
            if header is not None:
                too_costly(header)
    assert splitter.buffered <= max(bound, 2 * MAX_HEADER_BYTES) + step
    splitter.describe()


def _work(job: tuple[int, int]) -> tuple[int, float, list[str]]:
    seed, inputs = job
    source = random.Random(seed)
    failed: list[str] = []
    slowest = 0.0
    for _ in range(inputs):
        state = source.getstate()
        # Processor time: another process that takes the machine is no hang.
        begun = time.process_time()
        try:
            one_input(source)
        except Exception as error:
            if len(failed) < 3:
                source.setstate(state)
                failed.append(f"{type(error).__name__}: {error}")
        slowest = max(slowest, (time.process_time() - begun) * 1e3)
    return inputs, slowest, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=5_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    each = 10_000
    jobs = [(arguments.seed * 1_000_003 + n, each) for n in range(-(-arguments.inputs // each))]
    failed: list[str] = []
    done, slowest = 0, 0.0
    begun = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for count, slow, broken in pool.imap_unordered(_work, jobs):
            done += count
            slowest = max(slowest, slow)
            failed += broken
    report = {
        "inputs": done,
        "failed": failed[:5],
        "slowest_ms": round(slowest, 2),
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(report))
    return 1 if failed or slowest > SLOW_MS else 0


if __name__ == "__main__":
    sys.exit(main())
