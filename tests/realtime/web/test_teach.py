"""Labelling on the page, over a real run in a real browser."""

import csv
import json

import pytest

from calib.data.datasets import load_dataset
from tests.realtime.web.page import PATIENCE_S, streaming, wait_for


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("fastapi", reason="the page needs: pip install '.[web]'")
    folder = tmp_path_factory.mktemp("teach")
    with streaming(folder, "--labels-dir", str(folder / "labels")) as found:
        found.labels = folder / "labels"
        yield found


def at_page(browser, run, **context):
    opened = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | context)
    page, errors = opened.new_page(), []
    page.on("pageerror", lambda error: errors.append(error))  # noqa: PLW0108 - Playwright takes no built-in
    page.errors = errors
    page.set_default_timeout(PATIENCE_S * 1000)
    page.goto(run.url)
    page.get_by_role("button", name="Teach", exact=True).click()
    page.wait_for_function("() => Number(picture.dataset.number) > 2")
    return page


@pytest.fixture(scope="module")
def page(run, browser):
    found = at_page(browser, run)
    yield found
    assert not found.errors
    found.context.close()


def rows(run):
    with (run.labels / "labels.csv").open(encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def drag(page, x0, y0, x1, y1):
    """In shares of the frozen frame."""
    frame = page.locator("#easel").bounding_box()
    left, top, width, height = (frame[side] for side in ("x", "y", "width", "height"))
    page.mouse.move(left + x0 * width, top + y0 * height)
    page.mouse.down()
    page.mouse.move(left + (x0 + x1) / 2 * width, top + (y0 + y1) / 2 * height)
    page.mouse.move(left + x1 * width, top + y1 * height)
    page.mouse.up()


def told(page, words):
    page.locator("#teach-told").get_by_text(words).wait_for()


def test_a_box_is_drawn_named_and_on_the_disk_at_once(page, run):
    page.get_by_role("button", name="Freeze frame").click()
    page.locator("#easel").wait_for()
    frame = page.locator("#easel").bounding_box()
    page.mouse.click(frame["x"] + 3, frame["y"] + frame["height"] - 3)
    told(page, "A click makes no box")
    drag(page, 0.2, 0.2, 0.5, 0.6)
    told(page, "What is it? Type its name")
    page.keyboard.type("my mug")
    page.keyboard.press("Enter")
    page.locator("#teach-count").get_by_text("1 frame · 1 box", exact=True).wait_for()
    ((_, name, *edges),) = rows(run)
    width, height = page.evaluate("boxes.viewBox.baseVal.width"), 480
    wanted = [0.2 * width, 0.2 * height, 0.5 * width, 0.6 * height]
    assert name == "my mug"
    assert list(map(float, edges)) == pytest.approx(wanted, abs=6)


def test_a_box_is_moved_by_mouse_and_keys_and_named_anew(page, run):
    before = list(map(float, rows(run)[0][2:]))
    drag(page, 0.3, 0.3, 0.4, 0.3)
    wait_for(lambda: float(rows(run)[0][2]) > before[0] + 50)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Shift+ArrowRight")
    wait_for(lambda: float(rows(run)[0][4]) - float(rows(run)[0][2]) > before[2] - before[0] + 10)
    assert float(rows(run)[0][3]) == pytest.approx(before[1] + 0.02 * 480, abs=0.3)
    page.locator("#teach-name").fill("My  CUP")
    page.get_by_role("button", name="Name it").click()
    wait_for(lambda: rows(run)[0][1] == "My CUP")


def test_boxes_come_by_keyboard_alone_and_go_and_come_back(page, run):
    page.locator("#easel").focus()
    page.keyboard.press("Enter")
    wait_for(lambda: len(rows(run)) == 2)
    page.keyboard.press("Delete")
    wait_for(lambda: len(rows(run)) == 1)
    page.get_by_role("button", name="Undo").click()
    wait_for(lambda: len(rows(run)) == 2)
    assert {name for _, name, *_ in rows(run)} == {"My CUP"}


def test_drafts_are_used_and_frames_are_empty(page, run):
    page.locator("#easel").focus()
    page.keyboard.press("0")
    told(page, "This frame has boxes: remove them first")
    page.locator("#teach-suggested button").first.click()
    page.wait_for_function(
        "() => document.querySelectorAll('#teach-boxes li:not(.draft)').length === 0"
    )
    page.get_by_role("button", name="Nothing here").click()
    wait_for(lambda: any(not name for _, name, *_ in rows(run)))
    page.wait_for_function("() => /empty/.test(document.getElementById('teach-count').textContent)")


def test_a_box_is_asked_about_and_added_to_the_labels(page, run):
    page.get_by_role("button", name="Live picture").click()
    page.locator("#least").fill("0")
    page.wait_for_function("() => Number(least.value) === 0")
    page.locator("#why-open").click()
    page.locator("#teach-words li").first.wait_for()
    page.wait_for_function("() => /map.jpg/.test(frozen.src) && frozen.naturalWidth === 854")
    assert "is right with a probability of" in page.locator("#teach-words").inner_text()
    assert page.locator("#teach-cues tbody tr").count() >= 7
    assert "%" in page.locator("#teach-rivals").inner_text()
    assert "The network saw the whole frame" in page.locator("#teach-input").inner_text()
    page.locator("#teach-nearest button").first.wait_for()
    before = state(run)["boxes"]
    page.locator("#teach-name").fill("my car")
    page.get_by_role("button", name="Right: add it to my labels").click()
    wait_for(lambda: state(run)["boxes"] == before + 1)
    assert any(name == "my car" for _, name, *_ in rows(run))
    middle = (
        "(() => { const r = document.querySelector('#boxes .asked rect').getBoundingClientRect();"
    )
    x, y = page.evaluate(f"{middle} return [r.x + r.width / 2, r.y + r.height / 2]; }})()")
    with page.expect_response(lambda reply: "teach/why" in reply.url and "x0=" in reply.url):
        page.mouse.click(x, y)
    assert state(run)["boxes"] == before + 1, "while it explains, a click asks"
    page.locator("#teach-why").click()
    page.wait_for_function("() => /frame.jpg/.test(frozen.src)")
    page.get_by_role("button", name="Undo").click()
    wait_for(lambda: state(run)["boxes"] == before)


def state(run):
    return json.loads(run.ask("/teach")[1])


def test_the_first_boxes_are_too_few_to_learn_from(page):
    page.get_by_role("button", name="Learn from").click()
    told(page, "Draw 3 more boxes: it learns from 5 on")


def test_what_other_programs_would_be_given_is_what_is_there(run):
    samples = load_dataset(run.labels / "labels.csv", None, None, [], None)
    coco = json.loads(run.ask("/teach/coco.json")[1])
    assert len(coco["images"]) == len(samples) == state(run)["images"]
    assert len(coco["annotations"]) == sum(len(each.truths) for each in samples)


def test_a_finger_draws_on_a_phone_and_a_second_viewer_sees_it(run, browser, page):
    phone = at_page(
        browser, run, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    )
    count = state(run)["boxes"]
    phone.locator("#teach-labelled button").last.tap()
    phone.locator("#easel").wait_for()
    frame = phone.locator("#easel").bounding_box()
    assert frame["width"] == 390
    phone.locator("#teach-name").fill("lid")
    touch = phone.context.new_cdp_session(phone)
    for kind, x, y in (
        ("touchStart", 40, 20),
        ("touchMove", 70, 40),
        ("touchMove", 110, 60),
        ("touchEnd", None, None),
    ):
        points = [] if x is None else [{"x": frame["x"] + x, "y": frame["y"] + y}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    wait_for(lambda: state(run)["boxes"] == count + 1)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#teach-count").get_by_text(f"{count + 1} boxes").wait_for()
    phone.context.close()
