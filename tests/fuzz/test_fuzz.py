"""The fuzzers' corpus replayed, and a moment of mutations of it: the same in every run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from facelane_server.worker.decoding.pictures import silence_opencv
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
ROUNDS = {
    "header": 6_000,
    "picture": 2_000,
    "ipc": 15_000,
    "toml": 3_000,
    "package": 400,
    "still": 6_000,
    "video": 600,
    "protobuf": 6_000,
}
_TOKENS = (b"\xff", b"\0", b"\xff\xd8", b"\xff\xda", b"\xff\xd9", b"IDAT", b"\x7f\xff\xff\xff")

silence_opencv()


def mutated(seeds: list[bytes], rng: random.Random) -> bytes:
    """One input, or the ends of two, with a few edits."""
    data = bytearray(rng.choice(seeds))
    if rng.random() < 0.2:
        other = rng.choice(seeds)
        data[rng.randrange(len(data) + 1) :] = other[rng.randrange(len(other) + 1) :]
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = bytes((rng.randrange(256),))
            case 1:
                data[at:at] = rng.choice(_TOKENS)
            case 2:
                del data[at : at + rng.randint(1, 16)]
            case 3:
                data[at:at] = data[at : at + rng.randint(1, 64)] * rng.randint(1, 8)
            case 4:
                del data[at:]
    return bytes(data)


def test_every_target_has_a_corpus() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS) == set(ROUNDS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < 1 << 20


@pytest.mark.parametrize("name", TARGETS)
def test_corpus_and_mutations(name: str) -> None:
    target = TARGETS[name]
    seeds = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    for seed in (b"", *seeds):
        target(seed)
    rng = random.Random(name)
    for number in range(ROUNDS[name]):
        data = mutated(seeds, rng)
        try:
            target(data)
        except Exception as error:
            raise AssertionError(f"{name} {number}: {data[:2_000].hex()}") from error
