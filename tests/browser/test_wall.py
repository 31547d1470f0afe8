"""The wall of live pictures: they are shown as they were sent, with what was found in them."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import av
import cv2
import numpy as np
import pytest

import facelane
from tests.browser.conftest import House, jpeg, portrait, visit
from tests.fakes import access_units

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(400)]

STEPS, STEP, SIDE, FACE = 32, 10, 32, (256, 300)
NO_DECODER = "delete window.VideoDecoder;"

# Of each picture as it is painted: its frame's number, as the boxes have it; its own number, as it
# is written into its lower edge; how it came here; the boxes.
_WATCH = """source => {
    const canvas = document.querySelector(`canvas[data-source=${source}]`);
    window.seen = [];
    new MutationObserver(() => {
        const pen = canvas.getContext('2d');
        let number = 0;
        for (let bit = 0; bit < 5; bit++) {
            const x = bit * SIDE + SIDE / 2, y = canvas.height - SIDE / 2;
            number |= (pen.getImageData(x, y, 1, 1).data[1] > 128) << bit;
        }
        const { frame, how, boxes } = canvas.dataset;
        window.seen.push({frame: +frame, number, how, boxes: JSON.parse(boxes)});
    }).observe(canvas, {attributes: true, attributeFilter: ['data-painted']});
}""".replace("SIDE", str(SIDE))


def numbered(number: int) -> np.ndarray:
    """A face that stands elsewhere in every picture, and the picture's number below it."""
    picture = np.full((384, 640, 3), 70, np.uint8)
    x = 30 + STEP * number
    picture[20:320, x : x + FACE[0]] = cv2.resize(portrait(), FACE)
    picture[-SIDE:] = 0
    for bit in range(5):
        if number >> bit & 1:
            picture[-SIDE:, bit * SIDE : (bit + 1) * SIDE] = 255
    return picture


def encoded(codec: str) -> list[facelane.Picture]:
    shown = [numbered(number) for number in range(STEPS)]
    if codec == "jpeg":
        return [facelane.Picture.encoded(jpeg(picture)) for picture in shown]
    units = access_units.encode(shown, codec, g=str(STEPS), bf="0")
    assert len(units) == STEPS
    return [facelane.Picture.access_unit(unit, codec) for unit in units]  # type: ignore[arg-type]


class Sender:
    """A stream from whose pictures none is dropped. ``results``: frames that were analysed."""

    def __init__(self, stream: facelane.AnalyzeStream) -> None:
        self._stream = stream
        self._under_way = 0
        self.results: list[int] = []

    def send(self, picture: facelane.Picture) -> int:
        # With B-frames a picture is known some access units later.
        self.wait(15)
        self._under_way += 1
        return self._stream.send(picture, timeout=90.0)

    def wait(self, most: int = 0) -> None:
        while self._under_way > most:
            outcome = self._stream.recv(timeout=90.0)
            assert outcome is not None
            self._under_way -= 1
            if outcome.result is not None:
                self.results.append(outcome.frame_id)


@contextlib.contextmanager
def showing(house: House, source: str, pictures: Sequence[facelane.Picture]) -> Iterator[None]:
    """A camera from whose pictures none is dropped, over and over until the block is left."""
    over = threading.Event()

    def send() -> None:
        with (
            house.client() as client,
            client.analyze_stream(source_id=source, overload="lossless") as stream,
        ):
            sender = Sender(stream)
            for picture in itertools.cycle(pictures):
                if over.is_set():
                    return
                sender.send(picture)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(100)


@pytest.mark.parametrize(
    ("codec", "script", "how", "said"),
    [
        ("jpeg", "", "picture", ""),
        ("h264", "", "webcodecs", ""),
        ("h264", NO_DECODER, "console", "no decoder for H.264"),
        # Debian's Chromium has none.
        ("h265", "", "console", "no decoder for H.265"),
    ],
)
def test_boxes_belong_to_the_picture_that_is_shown(
    chromium: Any, house: House, codec: str, script: str, how: str, said: str
) -> None:
    source = f"{codec}-{how}"
    pictures = encoded(codec)
    with house.client() as client:
        # Where the face is found in the first one.
        [face] = client.analyze_image(facelane.Picture.encoded(jpeg(numbered(0)))).faces
    with (
        showing(house, source, pictures),
        visit(chromium, house, "boss", script=script) as page,
    ):
        page.locator(f"canvas[data-source={source}][data-how={how}]").wait_for()
        page.evaluate(_WATCH, source)
        page.wait_for_function("() => window.seen.length >= 40")
        seen = page.evaluate("window.seen")
        note = page.locator(f"figure:has(canvas[data-source={source}]) [role=status]")
        assert said in (note.text_content() or "")
    assert {one["how"] for one in seen} == {how}
    assert len({one["number"] for one in seen}) > 10, "the pictures are different ones"
    begun = (seen[0]["frame"] - seen[0]["number"]) % STEPS
    for one in seen:
        assert (one["frame"] - begun) % STEPS == one["number"], "the frame is the one that is seen"
        [[x, y, width, height]] = one["boxes"]
        assert abs(x - (face.box.x + STEP * one["number"])) < STEP / 2 + 3
        assert abs(y - face.box.y) < 12
        assert width > 60
        assert height > 60
    # In their order, none twice.
    frames = [one["frame"] for one in seen]
    assert frames == sorted(set(frames))


def test_the_demo_clip_plays_at_fifteen_pictures_of_its_twenty(
    chromium: Any, house: House, demo_units: list[bytes]
) -> None:
    """H.264 with B-frames, as files have it, looked at from its middle on. Counted, not timed."""
    units = [facelane.Picture.access_unit(unit, "h264") for unit in demo_units[:120]]
    with (
        house.client() as client,
        client.analyze_stream(source_id="clip", overload="lossless") as stream,
        visit(chromium, house, "boss") as page,
    ):
        sender = Sender(stream)
        for unit in units[:30]:
            sender.send(unit)
        page.locator("canvas[data-source=clip]").wait_for()
        page.evaluate(_WATCH, "clip")
        sender.wait(10)
        page.evaluate(_ONE_LOOKS, "clip")
        [begun, *_] = [sender.send(unit) for unit in units[30:]]
        stream.close_send()
        sender.wait()
        expected = [frame for frame in sender.results if frame >= begun]
        assert len(expected) == 90
        page.wait_for_function(
            "last => window.seen.some(one => one.frame >= last)", arg=expected[-3]
        )
        shown = {one["frame"] for one in page.evaluate("window.seen")}
        assert {one["how"] for one in page.evaluate("window.seen")} == {"webcodecs"}
    assert len(shown & set(expected)) >= 15 / 20 * len(expected)


_ONE_LOOKS = """async source => {
    for (;;) {
        const streams = await (await fetch('/api/streams')).json();
        if (streams.some(one => one.source === source && one.watchers)) return;
        await new Promise(done => setTimeout(done, 100));
    }
}"""


@pytest.fixture(scope="module")
def demo_units(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    from facelane_bridge import demo_clip

    path = demo_clip.render(tmp_path_factory.mktemp("clip"))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        filtered = av.BitStreamFilterContext("h264_mp4toannexb", stream)
        return [
            bytes(unit)
            for packet in container.demux(stream)
            if packet.size
            for unit in filtered.filter(packet)
        ]
