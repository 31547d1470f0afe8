"""The documentation's pictures of the console: ``make screenshots``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import facelane
from facelane_bridge import demo_clip
from tests.browser.conftest import House, camera, clip_picture, jpeg, view, visit

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        "FACELANE_FIGURES" not in os.environ, reason="run `make screenshots` to have them made"
    ),
]

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
PHONE = {"width": 390, "height": 780}
NAMES = {"grace_hopper": "Grace Hopper", "eileen_collins": "Eileen Collins"}
# Of the demo's clip: one of the two, the other, both in a blur, in the dark.
CAMERAS = {"entrance": (0, 70), "lobby": (70, 140), "corridor": (172, 236), "yard": (244, 290)}


def figure(page: Any, name: str) -> None:
    """A picture of a page, small enough to be kept with the sources."""
    page.evaluate("document.activeElement.blur()")
    pixels = cv2.imdecode(np.frombuffer(page.screenshot(), np.uint8), cv2.IMREAD_COLOR)
    made = cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, 82])[1].tobytes()
    assert len(made) < 120_000
    (FIGURES / f"console-{name}.webp").write_bytes(made)


@pytest.fixture
def watched(house: House) -> Iterator[None]:
    """People who are known, and cameras that see them."""
    with house.client() as client, contextlib.ExitStack() as stack:
        for subject, photo in demo_clip.photos().items():
            client.enroll(
                subject,
                facelane.Picture.from_file(photo.path),
                display_name=NAMES[subject],
                allow_multiple_faces=True,
            )
            stack.callback(client.delete_subject, subject)
        for name, (first, last) in CAMERAS.items():
            numbers = [*range(first, last, 2), *range(last - 2, first, -2)]
            shown = [facelane.Picture.encoded(jpeg(clip_picture(number))) for number in numbers]
            stack.enter_context(camera(house.server, house.keys["boss"], name, shown, every_s=0.5))
        yield


def named(page: Any) -> None:
    """All cameras are seen, those who are known by their names."""
    page.wait_for_function(
        """() => {
        const said = [...document.querySelectorAll('canvas')].map(one => one.dataset.names);
        return said.length >= 5 && said.every(one => one !== undefined)
            && said.some(one => one.includes('grace')) && said.some(one => one.includes('eileen'));
        }"""
    )


def best_shots(page: Any) -> None:
    """Those in view are there; the others are loaded when somebody scrolls to them."""
    page.locator("li.event img").nth(2).wait_for()
    page.wait_for_function(
        """() => [...document.images].filter(one => one.getBoundingClientRect().top < innerHeight)
        .every(one => one.complete && one.naturalWidth)"""
    )


def test_each_page(chromium: Any, house: House, watched: None) -> None:
    with visit(chromium, house, "boss") as page:
        view(page, "Live")
        page.get_by_label("Camera", exact=True).wait_for()
        named(page)
        figure(page, "live")
        view(page, "Events")
        best_shots(page)
        figure(page, "events")
        view(page, "People")
        card = page.locator("li[data-subject=grace_hopper]")
        card.get_by_role("button", name="Faces: 1").click()
        card.get_by_role("meter").wait_for()
        page.get_by_label("Id", exact=True).fill("grace_hopper")
        figure(page, "people")
        view(page, "System")
        # Until the plots have something to show.
        page.wait_for_function(
            """() => { const line = document.querySelector('.plot polyline');
            return line && line.getAttribute('points').split(' ').length > 8; }"""
        )
        figure(page, "system")


def test_dark_and_in_chinese(chromium: Any, house: House, watched: None) -> None:
    options = {"color_scheme": "dark", "locale": "zh-CN", "key": "Facelane 密钥"}
    with visit(chromium, house, "boss", **options) as page:
        view(page, "实时画面")
        named(page)
        figure(page, "live-dark-zh")
        view(page, "事件")
        page.get_by_label("筛选").select_option("SUBJECT_SEEN")
        best_shots(page)
        figure(page, "events-dark-zh")


def test_on_a_telephone(chromium: Any, house: House, watched: None) -> None:
    options = {"viewport": PHONE, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    with visit(chromium, house, "boss", **options) as page:
        view(page, "Live")
        named(page)
        figure(page, "telephone")
