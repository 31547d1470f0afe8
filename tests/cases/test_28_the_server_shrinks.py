"""A photo larger than a server decodes is shrunk while it is decoded; results are in its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from facelane_server import limits
from facelane_server.domain import Encoding, FacelaneError, Reason, Stage
from facelane_server.ipc.arena import Arena
from facelane_server.ipc.messages import DetectDone, DetectItem, Infer, Load
from facelane_server.models import api
from facelane_server.worker.decoding.headers import check_bounds, examine
from facelane_server.worker.decoding.pictures import read
from facelane_server.worker.work import DetectWork

WIDTH, HEIGHT = 1_210, 906
BOX = (300, 200, 400, 240)
"""Of the bright part: x, y, width, height."""


def photo(*options: int, suffix: str = ".jpg", grey_end: bool = False) -> bytes:
    picture = np.full((HEIGHT, WIDTH, 3), 20, np.uint8)
    x, y, w, h = BOX
    picture[y : y + h, x : x + w] = (40, 160, 240)
    if grey_end:
        picture[-100:] = 128
    done, data = cv2.imencode(suffix, picture, list(options))
    assert done
    return data.tobytes()


@pytest.mark.parametrize(
    ("max_pixels", "shrink"), [(0, 1), (1_096_260, 1), (1_096_259, 2), (200_000, 4), (18_000, 8)]
)
@pytest.mark.parametrize("progressive", [0, 1])
def test_by_as_little_as_needed(max_pixels: int, shrink: int, progressive: int) -> None:
    data = memoryview(photo(cv2.IMWRITE_JPEG_PROGRESSIVE, progressive))
    pixels, stored = read(data, Encoding.JPEG, max_pixels=max_pixels)
    assert stored == (WIDTH, HEIGHT)
    assert pixels.shape == (-(-HEIGHT // shrink), -(-WIDTH // shrink), 3)
    header = examine(data, Encoding.JPEG, max_pixels)
    assert header.plain is (not progressive and shrink == 1), "a card's decoder does not shrink"


@pytest.mark.parametrize("grey_end", [False, True])
def test_what_is_cut_off_is_still_seen(grey_end: bool) -> None:
    data = photo(grey_end=grey_end)
    assert read(memoryview(data), Encoding.JPEG, max_pixels=300_000)[0].shape == (453, 605, 3)
    with pytest.raises(FacelaneError) as caught:
        read(memoryview(data[: len(data) // 2]), Encoding.JPEG, max_pixels=300_000)
    assert caught.value.reason is Reason.PICTURE_CORRUPT


@pytest.mark.parametrize(
    ("width", "height", "shrinks", "shrink"),
    [
        (8_192, 6_144, True, 2),
        (9_248, 6_936, True, 4),
        (4_000, 4_000, True, 1),
        (4_001, 4_000, True, 2),
        (4_001, 4_000, False, 0),
        (10_000, 10_000, True, 0),
        (16_385, 100, True, 0),
    ],
)
def test_up_to_a_bound(width: int, height: int, shrinks: bool, shrink: int) -> None:
    if shrink:
        assert check_bounds(width, height, 16_000_000, shrinks=shrinks) == shrink
        return
    with pytest.raises(FacelaneError) as caught:
        check_bounds(width, height, 16_000_000, shrinks=shrinks)
    assert caught.value.reason is Reason.PICTURE_TOO_LARGE


def test_other_formats_are_refused() -> None:
    for suffix, encoding in ((".png", Encoding.PNG), (".webp", Encoding.WEBP)):
        with pytest.raises(FacelaneError) as caught:
            read(memoryview(photo(suffix=suffix)), encoding, max_pixels=300_000)
        assert caught.value.reason is Reason.PICTURE_TOO_LARGE


class Bright(api.Detector):
    """Finds what is bright."""

    crops = ()
    batch_max = 4

    def warm_up(self) -> None:
        pass

    def begin(
        self, pictures: Sequence[api.U8 | api.DevicePicture], max_faces: Sequence[int]
    ) -> api.Pending[list[api.Detections]]:
        found = []
        for picture in pictures:
            assert isinstance(picture, np.ndarray)
            x, y, w, h = cv2.boundingRect((picture[..., 2] > 130).astype(np.uint8))
            corners = [(x, y), (x + w, y), (x + w / 2, y + h / 2), (x, y + h), (x + w, y + h)]
            found.append(
                api.Detections(
                    np.array([(x, y, w, h)], np.float32),
                    np.ones(1, np.float32),
                    np.array([corners], np.float32),
                    (),
                )
            )
        return api.Immediate(found)


@pytest.mark.parametrize("max_pixels", [0, 300_000, 70_000])
def test_faces_are_where_the_photo_has_them(max_pixels: int, tmp_path: Path) -> None:
    data = photo()
    size = 1 << 20
    request, response = (Arena.create(name, 1, size) for name in ("request", "response"))
    request.slot(0)[: len(data)] = data
    load = Load("w", Stage.DETECTOR, str(tmp_path), "cpu", 8, 1, size, size)
    work = DetectWork(Bright(), load, request, response)
    item = DetectItem(0, len(data), Encoding.JPEG.value, 0, 0, 0, 4, max_pixels)
    finish, _ = work.begin(Infer(1, 0, [item]))
    [done] = finish()
    assert isinstance(done, DetectDone)
    assert (done.width, done.height) == (WIDTH, HEIGHT)
    record = np.frombuffer(response.slot(0), np.float32, 15, done.offset)
    assert np.abs(record[:4] - BOX).max() <= 8
    x, y, w, h = BOX
    assert np.abs(record[[5, 6, 13, 14]] - (x, y, x + w, y + h)).max() <= 8


def test_no_picture_decodes_to_more_than_its_bound() -> None:
    assert limits.MAX_SHRUNK_PIXELS <= limits.MAX_PIXELS * limits.MAX_SHRINK**2
