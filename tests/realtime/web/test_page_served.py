"""The page in a real browser over a session without a run: what it shows of cameras that live or
die.
"""

from pathlib import Path

import pytest

from realtime.event_sinks import EventSink, Timeline
from realtime.events import EventRules
from realtime.web.server import PageServer
from tests.realtime.web.page import PATIENCE_S
from tests.realtime.web.served import LOCAL, pictures_of

pytest.importorskip("fastapi", reason="the page needs: pip install '.[web]'")


@pytest.fixture
def server(session):
    for each in session.connections:
        each.state = "live"
    with PageServer(session, lambda: "an engine", LOCAL) as found:
        yield found


@pytest.fixture
def page(browser):
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        opened, errors = context.new_page(), []
        opened.on("pageerror", lambda error: errors.append(error))  # noqa: PLW0108 - Playwright takes no built-in
        opened.set_default_timeout(PATIENCE_S * 1000)
        yield opened
        assert not errors


def test_no_control_is_seen_before_it_is_true(session, server, page):
    session.change(box=True, heat_map="over", alpha=0.3)
    answers, held = [], []
    page.route("**/state", lambda route: route.continue_() if answers else held.append(route))
    page.goto(server.url)
    page.wait_for_function("() => document.readyState === 'complete'")
    page.wait_for_timeout(200)
    assert page.locator("#box").is_hidden()
    assert page.locator("#record").is_hidden()
    answers.append(True)
    for each in held:
        each.continue_()
    page.locator("#box").wait_for()
    assert page.locator("#box").is_checked()
    assert page.get_by_role("radio", name="Over").is_checked()
    assert page.locator("#alpha").input_value() == "0.3"


def test_a_run_that_is_gone_looks_gone_and_comes_back(session, server, page):
    session.change(record=Path("x.mp4"))
    session.recording_begun(session.settings.recording, "cam", Path("x_cam.mp4"))
    with pictures_of(session, "cam"):
        page.goto(server.url)
        page.locator("#recording-mark").wait_for()
        page.locator("#seen", has_text="cat, score 0.50").wait_for()
        assert page.locator("#picture").get_attribute("aria-label") == (
            "Live picture of cam: cat, score 0.50"
        )
        page.context.set_offline(True)
        page.get_by_text("No connection to Sightline").wait_for()
        assert page.locator("#link").inner_text() == "no connection"
        assert page.locator("#recording-mark").is_hidden()
        assert "grayscale" in page.evaluate("getComputedStyle(picture).filter")
        assert page.locator("#seen").inner_text().startswith("Last seen at ")
        assert page.locator("#fps").inner_text() == "–"
        assert page.evaluate("document.querySelector('.controls').inert")
        label = page.locator("#picture").get_attribute("aria-label")
        assert label.startswith("cam: No connection to Sightline")
        page.context.set_offline(False)
        page.locator("#recording-mark").wait_for()
        assert page.evaluate("getComputedStyle(picture).filter") == "none"
        assert not page.evaluate("document.querySelector('.controls').inert")


def test_a_camera_that_is_gone_looks_gone(session, server, page):
    cam = session.connections[0]
    with pictures_of(session, "cam"):
        page.goto(server.url)
        page.locator("#link", has_text="live").wait_for()
    cam.state, cam.trouble = "waiting", "cannot open 0: No such device"
    page.locator("#nothing", has_text="No such device").wait_for()
    assert "grayscale" in page.evaluate("getComputedStyle(picture).filter")
    assert page.locator("#link").inner_text() == "no picture"
    cam.state, cam.trouble = "live", ""
    page.locator("#nothing", has_text="No picture for").wait_for()
    with pictures_of(session, "cam"):
        page.locator("#nothing").wait_for(state="hidden")
        assert page.evaluate("getComputedStyle(picture).filter") == "none"


def test_what_came_into_view_has_a_tile_and_a_picture(session, page):
    timeline = Timeline()
    events = EventSink(dict.fromkeys(("cam", "door"), EventRules()), live=True, timeline=timeline)
    with PageServer(session, str, LOCAL, timeline=timeline) as server:
        page.goto(server.url)
        page.get_by_text("Nothing yet").wait_for()
        with pictures_of(session, "cam", also=[events]):
            tile = page.get_by_role("button", name="cat, since ")
            tile.wait_for()
            page.wait_for_function("() => document.querySelector('#events-list img').naturalWidth")
            page.locator("#events-bars i.now").wait_for()
        events.__exit__(None, None, None)
        ended = page.get_by_role("button", name="for ")
        ended.click()
        page.wait_for_function("() => document.getElementById('event-picture').naturalWidth === 64")
        assert page.locator("#event-title").inner_text() == "cat"
        assert page.get_by_role("button", name="Older").is_disabled()
        page.keyboard.press("Escape")
        assert page.locator("#event").is_hidden()
        page.get_by_role("button", name="door").click()
        page.get_by_text("Nothing yet").wait_for()


def test_a_reload_keeps_the_camera(session, server, page):
    with pictures_of(session, "cam", "door"):
        page.goto(server.url)
        page.get_by_role("button", name="door").click()
        page.reload()
        page.locator("#cameras [aria-current=true] .name", has_text="door").wait_for()
        assert page.url.endswith("#door")
        page.goto(f"{server.url}#cam")
        page.locator("#cameras [aria-current=true] .name", has_text="cam").wait_for()
