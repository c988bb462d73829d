"""axe-core, which looks for what keeps people from using a page, finds nothing in any state of it."""

import pytest

from realtime.event_sinks import EventSink, Timeline
from realtime.events import EventRules
from realtime.web.server import PageServer
from tests.realtime.web.accessibility import found_by_axe
from tests.realtime.web.page import PATIENCE_S, streaming, wait_for
from tests.realtime.web.served import LOCAL, pictures_of

pytest.importorskip("fastapi", reason="the page needs: pip install '.[web]'")
pytest.importorskip("axe_playwright_python", reason="needs axe-core")


def opened(context, url):
    page = context.new_page()
    page.set_default_timeout(PATIENCE_S * 1000)
    page.goto(url)
    return page


def test_nothing_is_found_while_it_is_live_and_when_it_is_gone(session, browser):
    timeline = Timeline()
    events = EventSink(dict.fromkeys(("cam", "door"), EventRules()), live=True, timeline=timeline)
    for each in session.connections:
        each.state = "live"
    with (
        PageServer(session, lambda: "an engine", LOCAL, timeline=timeline) as server,
        browser.new_context(color_scheme="dark") as context,
        pictures_of(session, "cam", also=[events]),
    ):
        page = opened(context, server.url)
        page.locator("#events-list .now").wait_for()
        assert found_by_axe(page) == []
        context.set_offline(True)
        page.locator("body.lost").wait_for()
        assert found_by_axe(page) == []


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [1280, 390])
def test_nothing_is_found_in_any_state(width_px, scheme, tmp_path, browser):
    size = {"width": width_px, "height": 900}
    with (
        streaming(
            tmp_path, "demo:90000", "--web-token", "right", "--labels-dir", str(tmp_path)
        ) as run,
        browser.new_context(viewport=size, color_scheme=scheme) as context,
    ):
        page = opened(context, run.url.partition("?")[0])
        assert found_by_axe(page) == [], "where the token is missing"
        page.goto(run.url)
        wait_for(lambda: run_state(page)["events"] > 0)
        page.locator("#record").click()
        page.locator("#recording-mark").wait_for()
        assert found_by_axe(page) == [], "while it records"
        page.locator("#record").click()
        page.locator("#recordings button").click()
        assert found_by_axe(page) == [], "while a recording plays"
        page.keyboard.press("Escape")
        page.locator("#events-list button").first.click()
        assert found_by_axe(page) == [], "with the picture of an event"
        page.keyboard.press("Escape")
        page.locator("#why-open").click()
        page.locator("#teach-frame").wait_for()
        page.wait_for_function("() => document.getElementById('teach-words').textContent")
        assert found_by_axe(page) == [], "while it says why, and is taught"


def run_state(page):
    return page.evaluate("fetch('state').then((reply) => reply.json())")
