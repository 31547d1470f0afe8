"""Who uses the console: by eye or ear, by mouse or keyboard, in both languages, on any screen."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser.conftest import House, view, visit

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(400)]

NAMES = {
    "en": ("Live", "Events", "People", "System"),
    "zh": ("实时画面", "事件", "人员", "系统"),
}
PHONE = {"width": 360, "height": 740}
# A telephone makes room for what sticks out, so it is held against the screen that there is. Tables
# scroll in boxes of their own.
_STICKS_OUT = """width => [...document.querySelectorAll('body *')]
    .filter(one => !one.closest('.scroll') && !one.closest('.skip'))
    .filter(one => one.getBoundingClientRect().right > width + 0.5)
    .map(one => one.outerHTML.slice(0, 120))"""


def shown(page: Any, name: str) -> None:
    """A view, with what it has to show."""
    view(page, name)
    wanted = {0: "canvas[data-painted]", 1: "li.event", 2: "form", 3: "tbody tr"}
    number = next(names.index(name) for names in NAMES.values() if name in names)
    page.locator(wanted[number]).first.wait_for()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_axe_finds_nothing_serious_on_any_view(
    chromium: Any, house: House, theme: str, language: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    locale = {"en": "en-GB", "zh": "zh-CN"}[language]
    key = {"en": "Facelane key", "zh": "Facelane 密钥"}[language]
    with visit(chromium, house, "boss", color_scheme=theme, locale=locale, key=key) as page:
        found: dict[str, list[str]] = {}

        def look(where: str) -> None:
            told = axe.run(page).response
            assert len(told["passes"]) > 5, "it has looked"
            found[where] = [
                f"{one['id']}: {one['nodes'][0]['html'][:160]}"
                for one in told["violations"]
                if one["impact"] in ("serious", "critical")
            ]

        for name in NAMES[language]:
            shown(page, name)
            look(name)
        page.get_by_role("button", name={"en": "Log out", "zh": "退出"}[language]).click()
        page.get_by_label(key).wait_for()
        look("log-in")
    assert found == {where: [] for where in found}


def test_nothing_sticks_out_on_a_telephone(chromium: Any, house: House) -> None:
    with visit(chromium, house, "boss", viewport=PHONE, has_touch=True, is_mobile=True) as page:
        for name in NAMES["en"]:
            shown(page, name)
            assert page.evaluate(_STICKS_OUT, PHONE["width"]) == []
            small = page.evaluate(
                """() => [...document.querySelectorAll('main button, main a.button')]
                    .filter(one => one.offsetHeight < 24 || one.offsetWidth < 24)
                    .map(one => one.outerHTML)"""
            )
            assert small == [], "a finger finds it"


def test_by_keyboard_alone(page: Any) -> None:
    """From the log-in on nothing but keys: to what is to be done, and back."""

    def focused(by: str) -> str:
        return str(page.evaluate(f"document.activeElement.{by}"))

    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Tab")
    assert focused("className") == "skip"
    page.keyboard.press("Enter")
    assert focused("id") == "content"
    page.keyboard.press("Shift+Tab")
    for _ in range(20):
        if focused("textContent") == "People":
            break
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="People", exact=True).wait_for()
    page.wait_for_function("() => document.activeElement.id === 'head'")
    assert page.title() == "People · facelane"
    visited = []
    while page.keyboard.press("Tab") or focused("tagName") != "BODY":
        visited.append(focused("textContent") or focused("name") or focused("type"))
        ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert ring != "none", f"where one is is seen: {visited[-1]}"
    assert "Use the webcam" in visited
    assert "id" in visited


def test_in_chinese_and_dark_by_its_own_buttons(page: Any) -> None:
    page.get_by_role("button", name="中文").click()
    page.get_by_role("link", name="系统").click()
    page.get_by_role("heading", name="系统").wait_for()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.get_by_role("button", name="主题").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    page.get_by_role("heading", name="系统").wait_for()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
