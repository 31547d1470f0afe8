"""The console in a real browser, before a real server: what people see and do, and who may not."""

from __future__ import annotations

import http.server
import json
import threading
import urllib.error
import urllib.request
import zipfile
from typing import Any

import cv2
import numpy as np
import pytest

import facelane
from tests.browser.conftest import (
    WAIT_MS,
    House,
    clip_picture,
    jpeg,
    log_in,
    portrait,
    view,
    visit,
)

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]


def names_say(page: Any, text: str) -> None:
    page.wait_for_function(
        "text => document.querySelector('canvas')?.dataset.names?.includes(text)", arg=text
    )


def api(page: Any, method: str, path: str, body: str = "undefined") -> tuple[int, str]:
    """As the page itself would ask. ``body``: an expression."""
    return tuple(
        page.evaluate(
            """async ([method, path]) => {
                const session = await (await fetch('/api/session')).json();
                const answer = await fetch(path, {method, body: BODY,
                    headers: {'x-csrf-token': session.csrf}});
                return [answer.status, await answer.text()];
            }""".replace("BODY", body),
            [method, path],
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
    page.get_by_label("Id", exact=True).fill("grace")
    page.get_by_label("Name", exact=True).fill("Grace Hopper")
    # Far less like the face before the camera than its best shot is, of which something is said.
    other = cv2.GaussianBlur(cv2.flip(portrait(), 1), (0, 0), 5.0)
    upload = {"name": "grace.jpg", "mimeType": "image/jpeg", "buffer": jpeg(other)}
    page.get_by_label("Picture", exact=True).set_input_files(upload)
    page.get_by_role("button", name="Enrol", exact=True).click()
    page.get_by_text("Enrolled: quality").wait_for()
    # A picture without a face is refused, and it is said why.
    nothing = {"name": "x.jpg", "mimeType": "image/jpeg", "buffer": jpeg(portrait()[:40, :40])}
    page.get_by_label("Picture", exact=True).set_input_files(nothing)
    page.get_by_role("button", name="Enrol", exact=True).click()
    page.get_by_text("No face was found").wait_for()

    view(page, "Live")
    names_say(page, "grace")

    view(page, "Events")
    page.get_by_label("Filter").select_option("SUBJECT_SEEN")
    newest = page.locator("li.event[data-kind=SUBJECT_SEEN]").first
    newest.wait_for()
    # The very one: others come before it.
    seen = page.locator(f"li.event[data-sequence='{newest.get_attribute('data-sequence')}']")
    assert (
        seen.locator("img").evaluate("async img => { await img.decode(); return img.naturalWidth }")
        == 224
    )
    seen.get_by_role("button", name="Acknowledge").click()
    seen.get_by_text("acknowledged").wait_for()
    # A typing error makes nobody new.
    seen.get_by_role("button", name="This is …").click()
    page.get_by_label("Who is it? (id)").fill("grase")
    page.keyboard.press("Enter")
    seen.get_by_text("Nobody has the id grase.").wait_for()
    seen.get_by_role("button", name="Enrol grase as somebody new").wait_for()
    seen.get_by_role("button", name="Cancel").click()
    seen.get_by_role("button", name="This is not Grace Hopper").click()
    seen.get_by_text("Corrected: not Grace Hopper.").wait_for()
    view(page, "Live")
    names_say(page, "unknown")
    page.wait_for_function(
        "() => !document.querySelector('canvas').dataset.names.includes('grace')"
    )

    view(page, "System")
    page.get_by_text("detector#0").wait_for()
    page.get_by_role("rowheader", name="door").wait_for()

    view(page, "People")
    card = page.locator("li[data-subject=grace]")
    # What was said holds, and can be taken back, also by who was not there.
    card.get_by_role("button", name="Faces: 1").click()
    card.get_by_text("“This is not …”").wait_for()
    card.get_by_role("button", name="Undo").click()
    card.get_by_text("“This is not …”").wait_for(state="detached")
    view(page, "Live")
    names_say(page, "grace")
    view(page, "People")
    # What is kept of her, before it is deleted.
    with page.expect_download() as download:
        card.get_by_role("link", name="Export").click()
    with zipfile.ZipFile(download.value.path()) as kept:
        record = json.loads(kept.read("subject.json"))
        assert (record["id"], record["templates"]) == ("grace", 1)
        told = [event["sequence"] for event in json.loads(kept.read("events.json"))]
        shown = [name for name in kept.namelist() if name.startswith("pictures/")]
        assert told
        assert shown
        assert cv2.imdecode(np.frombuffer(kept.read(shown[0]), np.uint8), 1).shape == (224, 224, 3)
    card.get_by_role("button", name="Delete").first.click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    receipt = page.get_by_role("dialog").locator(".receipt").text_content()
    assert '"signature"' in receipt or "sig" in receipt
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    card.wait_for(state="detached")


def test_enrol_by_webcam(page: Any, house: House) -> None:
    view(page, "People")
    page.get_by_label("Id", exact=True).fill("eileen")
    page.get_by_role("button", name="Use the webcam").click()
    page.get_by_role("button", name="Take picture").click()
    page.get_by_alt_text("The picture that is sent").wait_for()
    page.get_by_role("button", name="Enrol", exact=True).click()
    page.get_by_text("Enrolled: quality").wait_for()
    card = page.locator("li[data-subject=eileen]")
    card.get_by_role("button", name="Faces: 1").click()
    card.get_by_role("meter").wait_for()
    with house.client() as client:
        [face] = client.identify(facelane.Picture.encoded(jpeg(clip_picture(110))))
        assert face.identity.subject_id == "eileen"
        client.delete_subject("eileen")


def test_events_page_by_page_filtered_and_acknowledged(page: Any, house: House) -> None:
    with house.client() as client:
        for _ in range(70):  # two events each
            with client.analyze_stream(source_id="gate") as stream:
                stream.close_send()
                assert list(stream) == []
    view(page, "Events")
    page.get_by_label("Camera", exact=True).fill("gate")
    page.get_by_label("Filter").select_option("STREAM_CLOSED")
    rows = page.locator("li.event")
    settled = page.locator("ol.events[aria-busy=false]")
    # Scrolling brings what is older, each once and in its order, to the very first.
    settled.wait_for()
    while page.get_by_role("button", name="Older events").count():
        page.mouse.wheel(0, 4000)
        page.evaluate("() => new Promise(done => requestAnimationFrame(done))")
    # The last of them may be told only now.
    page.wait_for_function("() => document.querySelectorAll('li.event').length >= 70")
    assert rows.count() == 70
    told = [int(row.get_attribute("data-sequence")) for row in rows.all()]
    assert told == sorted(set(told), reverse=True)
    first = page.locator(f"li.event[data-sequence='{told[0]}']")
    first.get_by_role("button", name="Acknowledge").click()
    first.get_by_text("acknowledged").wait_for()
    page.get_by_label("Not acknowledged only").check()
    first.wait_for(state="detached")
    assert rows.count() == 69
    # As it happens: no reload.
    with house.client() as client, client.analyze_stream(source_id="gate") as stream:
        stream.close_send()
        assert list(stream) == []
    page.wait_for_function(
        "least => +document.querySelector('li.event').dataset.sequence > least", arg=told[0]
    )


_SOCKETS = """window.sockets = [];
    window.WebSocket = class extends WebSocket {
        constructor(...words) { super(...words); window.sockets.push(this); } };"""


def test_what_happened_while_nobody_listened_leaves_no_gap(chromium: Any, house: House) -> None:
    """More than a page of it."""

    def happen(count: int) -> None:
        for _ in range(count):
            with client.analyze_stream(source_id="dock") as stream:
                stream.close_send()
                assert list(stream) == []

    with visit(chromium, house, "boss", script=_SOCKETS) as page, house.client() as client:
        view(page, "Events")
        page.get_by_label("Camera", exact=True).fill("dock")
        page.get_by_label("Filter").select_option("STREAM_CLOSED")
        page.locator("ol.events[aria-busy=false]").wait_for(state="attached")
        happen(5)
        rows = "document.querySelectorAll('li.event').length"
        page.wait_for_function(f"() => {rows} === 5")
        page.context.set_offline(True)
        page.evaluate("window.sockets.forEach(one => one.close())")
        page.get_by_text("The connection is lost").wait_for()
        happen(65)
        page.context.set_offline(False)
        page.wait_for_function(f"() => {rows} >= 50")
        while page.get_by_role("button", name="Older events").count():
            page.mouse.wheel(0, 4000)
            page.evaluate("() => new Promise(done => requestAnimationFrame(done))")
        page.wait_for_function(f"() => {rows} >= 70")
        told = [int(row.get_attribute("data-sequence")) for row in page.locator("li.event").all()]
        assert len(told) == 70
        assert told == sorted(set(told), reverse=True)


def test_a_camera_that_stands_still_is_not_taken_for_a_live_one(page: Any, house: House) -> None:
    picture = facelane.Picture.encoded(jpeg(clip_picture(100)))
    with house.client() as client, client.analyze_stream(source_id="still") as stream:
        canvas = page.locator("canvas[data-source=still]")
        canvas.wait_for()
        while canvas.get_attribute("data-painted") is None:  # somebody looks only now
            stream.send(picture, timeout=50.0)
            assert stream.recv(timeout=50.0) is not None
        page.locator("canvas[data-source=still][data-old]").wait_for()
        page.get_by_text("No picture since").wait_for()
        stream.send(picture, timeout=50.0)
        page.locator("canvas[data-source=still]:not([data-old])").wait_for()


def test_a_console_that_does_not_answer_is_asked_again(page: Any) -> None:
    page.route("**/api/people*", lambda route: route.abort())
    view(page, "People")
    page.get_by_text("The console does not answer").wait_for()
    page.unroute("**/api/people*")
    page.get_by_text("Nobody.").wait_for()


@pytest.mark.parametrize("name", ["Live", "Events"])
def test_a_session_that_ends_is_told(page: Any, name: str) -> None:
    """Of what only listens too: it would go on looking live."""
    view(page, name)
    assert api(page, "POST", "/api/logout")[0] == 200
    page.get_by_text("The session has ended. Log in again.").wait_for()
    page.get_by_label("Facelane key").wait_for()


def test_who_may_not_sees_no_people_and_gets_403(chromium: Any, house: House) -> None:
    context = chromium.new_context(locale="en-GB")
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    log_in(page, house, "guard")
    links = page.get_by_role("navigation").get_by_role("link").all_text_contents()
    assert links == ["Live", "Events", "System"]
    assert api(page, "GET", "/api/people")[0] == 403
    assert api(page, "DELETE", "/api/people/grace")[0] == 403
    assert api(page, "GET", "/api/people/grace/copy")[0] == 403
    jpeg_begins = "new Uint8Array([255, 216, 255])"
    assert api(page, "POST", "/api/people/grace/faces", jpeg_begins)[0] == 403
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


class _Foreign(http.server.BaseHTTPRequestHandler):
    """A page of somebody else's, on this machine: cookies know no ports, so they are sent along."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>another</title>")

    def log_message(self, *_args: object) -> None:
        pass


def test_a_page_of_another_origin_cannot_use_the_session(page: Any, house: House) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Foreign) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            thief = page.context.new_page()
            thief.goto(f"http://127.0.0.1:{other.server_address[1]}/")
            told = thief.evaluate(_STEAL, house.url)
        finally:
            other.shutdown()
            thread.join(30)
    assert told == {"read": "failed", "socket": "closed", "framed": "nothing"}
    # The session itself is as it was.
    assert api(page, "GET", "/api/session")[0] == 200


_STEAL = """async url => {
    const told = {};
    told.read = await fetch(url + 'api/session', {credentials: 'include'})
        .then(answer => answer.text(), () => 'failed');
    // Sent without asking first, as a form is; the answer cannot be read, but it could log out.
    await fetch(url + 'api/logout', {method: 'POST', credentials: 'include', mode: 'no-cors'});
    told.socket = await new Promise(done => {
        const ws = new WebSocket(url.replace('http', 'ws') + 'api/live?source=door');
        ws.onmessage = () => done('heard'); ws.onclose = () => done('closed'); });
    told.framed = await new Promise(done => {
        const frame = document.createElement('iframe');
        frame.onload = () => { try { done(frame.contentDocument ? 'read' : 'nothing'); }
            catch { done('nothing'); } };
        frame.src = url; document.body.append(frame); });
    return told;
}"""
