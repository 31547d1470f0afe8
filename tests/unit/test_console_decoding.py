"""Video that the console decodes for browsers, in a child: the pictures are those it was given."""

from __future__ import annotations

import asyncio
import signal

import cv2
import numpy as np
import pytest
from tests.fakes import access_units

from facelane_console import decoding
from facelane_console.decoding import LIVES, CannotDecodeError, Decoder


async def shown(units: list[bytes], encoding: str, wanted: range) -> dict[int, np.ndarray]:
    found = {}
    async with Decoder(encoding) as decoder:
        for number, unit in enumerate(units):
            ready = await decoder.decode(number, unit, wanted=number in wanted)
            if ready is not None:
                found[ready[0]] = cv2.imdecode(np.frombuffer(ready[1], np.uint8), 1)
    return found


@pytest.mark.parametrize("encoding", ["h264", "h265"])
def test_each_picture_is_that_of_its_access_unit(encoding: str) -> None:
    units = access_units.clip(encoding, 12)
    found = asyncio.run(shown(units, encoding, range(0, 12, 3)))
    assert set(found) == {0, 3, 6, 9}
    for number, picture in found.items():
        difference = cv2.absdiff(picture, access_units.picture(number))
        assert float(difference.mean()) < 8, number


def test_what_cannot_be_decoded_is_not_shown_and_the_next_key_frame_is() -> None:
    units = access_units.clip("h264", 20)  # a key frame every ten
    broken = [units[0], b"\x00\x00\x01\x65" + bytes(200), b"nonsense", *units[10:]]
    found = asyncio.run(shown(broken, "h264", range(99)))
    assert 0 in found
    assert max(found) == len(broken) - 1


def test_a_large_picture_is_shown_smaller_and_there_are_so_many_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = access_units.clip("h264", 1, size=(1920, 1080))

    async def run() -> None:
        async with Decoder("h264") as decoder:
            _, picture = await decoder.decode(0, large[0], wanted=True) or (0, b"")
            assert cv2.imdecode(np.frombuffer(picture, np.uint8), 1).shape == (720, 1280, 3)
            monkeypatch.setattr(decoding, "MOST", 1)
            with pytest.raises(CannotDecodeError):
                async with Decoder("h264"):
                    pass
        async with Decoder("h264"):
            pass

    asyncio.run(run())


def test_another_child_follows_one_that_dies_and_not_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    units = access_units.clip("h264", 12)  # a key frame every ten

    async def run() -> None:
        async with Decoder("h264") as decoder:
            for left in reversed(range(LIVES)):
                assert await decoder.decode(0, units[0], wanted=True)
                process = decoder._process
                assert process is not None
                process.send_signal(signal.SIGKILL)
                await process.wait()
                if not left:
                    break
                assert await decoder.decode(1, units[1], wanted=True) is None, "that is lost"
                assert await decoder.decode(2, units[2], wanted=True) is None, "no key frame"
                assert process.returncode == -signal.SIGKILL
            with pytest.raises(CannotDecodeError):
                await decoder.decode(1, units[1], wanted=True)

    asyncio.run(run())
    told = [record.getMessage() for record in caplog.records]
    assert [f"anew {left} times" in line and "ended with -9" in line for line, left in
            zip(told, (2, 1, 0), strict=True)] == [True] * LIVES  # fmt: skip


def test_no_child_is_left_when_one_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    units = access_units.clip("h264", 1)

    async def run() -> None:
        async with Decoder("h264") as decoder:
            assert await decoder.decode(0, units[0], wanted=True)
            halted = decoder._process
            assert halted is not None
            halted.send_signal(signal.SIGSTOP)
            monkeypatch.setattr(decoding, "UNIT_S", 0.05)
            assert await decoder.decode(1, units[0], wanted=True) is None
            assert halted.returncode == -signal.SIGKILL
            monkeypatch.undo()
            assert await decoder.decode(2, units[0], wanted=True), "the next one shows it"

    asyncio.run(run())


def test_the_child_has_none_of_the_consoles_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELANE_TOKEN", "secret")

    async def run() -> bytes:
        async with Decoder("h264") as decoder:
            await decoder.decode(0, access_units.clip("h264", 1)[0], wanted=False)
            assert decoder._process is not None
            with open(f"/proc/{decoder._process.pid}/environ", "rb") as file:  # noqa: ASYNC230
                return file.read()

    assert b"secret" not in asyncio.run(run())
