"""The console in a real browser, before a real server: what people see and do, and who may not."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
from tests.browser.conftest import House, jpeg, portrait

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
WAIT_MS = 60_000


@pytest.fixture
def page(chromium: Any, house: House) -> Iterator[Any]:
    """Logged in as who may all."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, locale="en-GB")
    made = context.new_page()
    made.set_default_timeout(WAIT_MS)
    problems: list[str] = []
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on(
        "console",
        lambda said: problems.append(said.text) if "Content Security" in said.text else None,
    )
    log_in(made, house, "boss")
    yield made
    context.close()
    assert problems == []


def log_in(page: Any, house: House, who: str) -> None:
    page.goto(house.url)
    page.get_by_label("Facelane key").fill(house.keys[who])
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("navigation").wait_for()


def view(page: Any, name: str) -> None:
    page.get_by_role("navigation").get_by_role("link", name=name).click()
    page.get_by_role("heading", name=name, exact=True).wait_for()


def figure(page: Any, name: str) -> None:
    """For the documentation, where it is asked for: FACELANE_FIGURES=1."""
    if os.environ.get("FACELANE_FIGURES"):
        page.screenshot(path=str(FIGURES / f"console-{name}.png"))


def names_say(page: Any, text: str) -> None:
    page.wait_for_function(
        "text => document.querySelector('canvas')?.dataset.names?.includes(text)", arg=text
    )


def api(page: Any, method: str, path: str, body: str = "") -> tuple[int, str]:
    """As the page itself would ask."""
    return tuple(
        page.evaluate(
            """async ([method, path, body]) => {
                const session = await (await fetch('/api/session')).json();
                const answer = await fetch(path, {method, body: body || undefined,
                    headers: {'x-csrf-token': session.csrf}});
                return [answer.status, await answer.text()];
            }""",
            [method, path, body],
        )
    )


def test_enrol_see_the_name_correct_it_and_delete_with_a_receipt(page: Any, house: House) -> None:
    view(page, "Live")
    names_say(page, "unknown")
    # Pictures are shown as they come, each with what was found in it.
    first = int(page.locator("canvas").get_attribute("data-painted"))
    page.wait_for_function(
        "least => +document.querySelector('canvas').dataset.painted > least", arg=first + 20
    )
    view(page, "People")
    page.get_by_label("Id").fill("grace")
    page.get_by_label("Name").fill("Grace Hopper")
    # Not quite the face before the camera: what is said of that one can be nearer to it.
    other = cv2.GaussianBlur(cv2.flip(portrait(), 1), (0, 0), 2.0)
    upload = {"name": "grace.jpg", "mimeType": "image/jpeg", "buffer": jpeg(other)}
    page.get_by_label("Picture").set_input_files(upload)
    page.get_by_role("button", name="Enrol", exact=True).click()
    page.get_by_text("Enrolled: quality").wait_for()
    figure(page, "people")
    # A picture without a face is refused, and it is said why.
    nothing = {"name": "x.jpg", "mimeType": "image/jpeg", "buffer": jpeg(portrait()[:40, :40])}
    page.get_by_label("Picture").set_input_files(nothing)
    page.get_by_role("button", name="Enrol", exact=True).click()
    page.get_by_text("No face was found").wait_for()

    view(page, "Live")
    names_say(page, "grace")
    figure(page, "live")

    view(page, "Events")
    newest = page.locator("li.event[data-kind=SUBJECT_SEEN]").first
    newest.wait_for()
    # The very one: others come before it.
    seen = page.locator(f"li.event[data-sequence='{newest.get_attribute('data-sequence')}']")
    assert (
        seen.locator("img").evaluate("async img => { await img.decode(); return img.naturalWidth }")
        == 224
    )
    figure(page, "events")
    seen.get_by_role("button", name="Acknowledge").click()
    seen.get_by_text("acknowledged").wait_for()
    seen.get_by_role("button", name="This is not grace").click()
    seen.get_by_text("Corrected: not grace.").wait_for()
    view(page, "Live")
    names_say(page, "unknown")
    page.wait_for_function(
        "() => !document.querySelector('canvas').dataset.names.includes('grace')"
    )

    view(page, "System")
    page.get_by_text("detector#0").wait_for()
    page.get_by_role("rowheader", name="door").wait_for()
    figure(page, "system")

    view(page, "People")
    card = page.locator("li[data-subject=grace]")
    card.get_by_role("button", name="Delete").first.click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    receipt = page.get_by_role("dialog").locator(".receipt").text_content()
    assert '"signature"' in receipt or "sig" in receipt
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    card.wait_for(state="detached")


def test_who_may_not_sees_no_people_and_gets_403(chromium: Any, house: House) -> None:
    context = chromium.new_context(locale="en-GB")
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    log_in(page, house, "guard")
    links = page.get_by_role("navigation").get_by_role("link").all_text_contents()
    assert links == ["Live", "Events", "System"]
    assert api(page, "GET", "/api/people")[0] == 403
    assert api(page, "DELETE", "/api/people/grace")[0] == 403
    # Another word for another session is nobody's.
    [cookie] = context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert page.evaluate("document.cookie") == ""
    assert house.keys["guard"] not in page.content()
    page.get_by_role("button", name="Log out").click()
    page.get_by_label("Facelane key").wait_for()
    context.add_cookies([cookie])
    page.reload()
    page.get_by_label("Facelane key").wait_for()
    context.close()


def test_another_origin_gets_nothing(page: Any, house: House) -> None:
    [cookie] = page.context.cookies()
    session = f"{cookie['name']}={cookie['value']}"

    def ask(method: str, path: str, **headers: str) -> int:
        request = urllib.request.Request(
            house.url + path, method=method, data=b"{}" if method == "POST" else None,
            headers={"cookie": session, **headers},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert answer.headers["cache-control"] == "no-store"
                assert "unsafe" not in answer.headers["content-security-policy"]
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    origin = house.url.rstrip("/")
    assert ask("GET", "api/session") == 200
    assert ask("GET", "api/session", Origin="http://evil.example") == 403
    assert ask("GET", "api/session", Host="evil.example") == 403
    assert ask("POST", "api/events/1/acknowledge") == 403, "no origin"
    assert ask("POST", "api/events/1/acknowledge", Origin=origin) == 403, "no token"
    assert ask("POST", "api/login", Origin="http://evil.example") == 403
    # A page of another origin opens no socket with this browser's session.
    other = page.context.new_page()
    other.goto("about:blank")
    socket = house.url.replace("http", "ws") + "api/live?source=door"
    state = other.evaluate(
        """url => new Promise(done => { const ws = new WebSocket(url);
            ws.onmessage = () => done('heard'); ws.onclose = () => done('closed'); })""",
        socket,
    )
    assert state == "closed"
    other.close()


def test_by_keyboard_in_chinese_dark_and_on_a_telephone(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.get_by_role("button", name="中文").click()
    page.get_by_role("link", name="系统").click()
    page.get_by_role("heading", name="系统").wait_for()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.get_by_role("button", name="主题").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    wide = page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")
    assert wide, "nothing sticks out on a telephone"
