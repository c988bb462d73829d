"""The page over a real run, in a real browser."""

import subprocess
import sys
from functools import partial

import av
import cv2
import numpy as np
import pytest

from tests.realtime.tracking.scenes import texture
from tests.realtime.web.page import PATIENCE_S, ROOT, Run, streaming, wait_for


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("fastapi", reason="the page needs: pip install '.[web]'")
    with streaming(tmp_path_factory.mktemp("page")) as found:
        wait_for(lambda: found.state()["all"]["frames"] > 3)
        yield found


@pytest.fixture
def page(run, browser):
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        opened, errors = context.new_page(), []
        opened.on("pageerror", lambda error: errors.append(error))  # noqa: PLW0108 - Playwright takes no built-in
        opened.set_default_timeout(PATIENCE_S * 1000)
        opened.goto(run.url)
        yield opened
        assert not errors


def wait_in(page, condition):
    page.wait_for_function(condition)


def test_the_picture_moves(page):
    wait_in(page, "() => Number(picture.dataset.number) > 0")
    before, first = (
        page.evaluate("picture.toDataURL()"),
        page.evaluate("Number(picture.dataset.number)"),
    )
    wait_in(page, f"() => Number(picture.dataset.number) > {first} + 5")
    assert page.evaluate("picture.toDataURL()") != before
    assert page.evaluate("[picture.width, picture.height]") == [854, 480]
    assert page.locator("#nothing").is_hidden()


def test_charts_fill_and_figures_come(page):
    wait_in(page, "() => Number(document.getElementById('stages').dataset.points) >= 4")
    red_pixels = (
        "() => { const c = document.getElementById('stages'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        " let n = 0; for (let i = 0; i < d.length; i += 4) n += d[i] === 239 && d[i + 1] === 91 && d[i + 2] === 91; return n; }"
    )
    assert page.evaluate(red_pixels) > 100, "the engine's share of the time is drawn"
    assert page.locator("#stage-legend li").count() >= 5
    assert page.locator("#rate-legend li").count() == 1
    assert float(page.locator("#fps").inner_text()) > 1
    assert float(page.locator("#age").inner_text()) > 0
    assert page.locator("#cameras .name").all_inner_texts() == ["demo"]
    assert page.locator("#link").inner_text() == "live"


def test_the_class_to_look_for_is_switched(page, run):
    page.locator("#class").fill("goldfish")
    page.get_by_role("button", name="Look", exact=True).click()
    wait_for(lambda: run.last_row()["class_name"] == "goldfish")
    page.locator("#class").fill("no such thing")
    page.get_by_role("button", name="Look", exact=True).click()
    page.get_by_text("class 'no such thing' is unknown").wait_for()
    page.get_by_role("button", name="Likeliest").click()
    wait_for(lambda: run.last_row()["class_name"] != "goldfish")
    assert run.state()["settings"]["wanted_class"] is None


def brightness(run):
    """Mean of the newest picture; the one after a switch may still be an older one, so wait for
    what is expected.
    """
    return cv2.imdecode(np.frombuffer(run.ask("/frame.jpg")[1], np.uint8), cv2.IMREAD_COLOR).mean()


def test_box_heat_map_alpha_and_smoothing_are_switched(page, run):
    wait_in(page, "() => box.checked")
    bright = brightness(run)
    page.locator("#box").uncheck()
    page.get_by_role("radio", name="Over").check()
    for name, value in (("alpha", 0.8), ("smoothing", 0.6)):
        page.locator(f"#{name}").fill(str(value))
    wait_for(
        lambda: (
            run.state()["settings"]
            == {
                "wanted_class": None,
                "min_score": None,
                "box": False,
                "heat_map": "over",
                "alpha": 0.8,
                "smoothing": 0.6,
            }
        )
    )
    wait_for(lambda: brightness(run) < 0.8 * bright)
    page.get_by_role("radio", name="Off").check()
    wait_for(lambda: run.state()["settings"]["heat_map"] == "off")
    wait_for(lambda: brightness(run) > 0.8 * bright)
    page.get_by_role("radio", name="Corner").check()
    page.locator("#box").check()
    wait_for(lambda: run.state()["settings"]["box"])


def test_a_snapshot_is_downloaded(page):
    wait_in(page, "() => Number(picture.dataset.number) > 0")
    with page.expect_download() as download:
        page.get_by_role("button", name="Snapshot").click()
    image = cv2.imread(str(download.value.path()))
    assert image.shape == (480, 854, 3)
    assert download.value.suggested_filename.startswith("demo-")


def test_a_recording_is_begun_and_ended(page, run):
    wait_in(page, "() => Number(picture.dataset.number) > 0")
    page.get_by_role("button", name="Record").click()
    page.locator("#recording-mark").wait_for()
    frames = run.state()["all"]["frames"]
    wait_for(lambda: run.state()["all"]["frames"] > frames + 30)
    page.get_by_role("button", name="Stop").click()
    page.locator("#recording-mark").wait_for(state="hidden")
    wait_for(lambda: list(run.recordings.glob("sightline-*.mp4")))
    (path,) = run.recordings.glob("sightline-*.mp4")
    page.get_by_role("button", name=f"Play {path.name}").click()
    page.wait_for_function("() => document.getElementById('player-video').currentTime > 0.2")
    page.keyboard.press("Escape")
    with page.expect_download() as download:
        page.get_by_role("link", name=f"Download {path.name}").click()
    assert download.value.path().read_bytes() == path.read_bytes()
    with av.open(str(path)) as video:
        assert sum(1 for _ in video.decode(video=0)) >= 20


def test_the_slider_says_from_where_on_boxes_are_shown_and_the_page_says_where_there_is_none(
    page, run
):
    limits = run.state()["limits"]
    wait_in(
        page, "() => /of 100 boxes that say 93 %, about 93 are right/.test(meaning.textContent)"
    )
    assert float(page.locator("#least").input_value()) == pytest.approx(
        limits["shown_from"], abs=0.01
    )
    assert page.locator("#least-default").is_hidden()
    page.locator("#least").fill("1")
    wait_for(lambda: run.state()["settings"]["min_score"] == 1.0)
    wait_in(page, "() => seen.textContent === 'nothing sure in view'")
    wait_for(lambda: run.last_row()["boxes"] == 0)
    assert run.last_row()["label"] is None
    page.locator("#least").fill("0")
    wait_in(page, "() => / %/.test(seen.textContent)")
    wait_for(lambda: run.last_row()["boxes"] == 1)
    page.get_by_role("button", name="Use the default").click()
    wait_for(lambda: run.state()["settings"]["min_score"] is None)


def test_it_fits_a_phone(run, browser):
    with browser.new_context(
        viewport={"width": 360, "height": 740}, device_scale_factor=2, has_touch=True
    ) as context:
        page = context.new_page()
        page.goto(run.url)
        page.wait_for_function("() => Number(picture.dataset.number) > 0")
        assert "OpenVINO int8" in page.locator("#engine").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for button in page.get_by_role("button").all():
            assert button.bounding_box()["height"] >= 36, "large enough for a thumb"
        assert page.locator("#picture").bounding_box()["width"] == 360


TWO_PX, THING_PX = (240, 160), (56, 40)
MIDDLES_PX = (58, 50), (182, 110)


@pytest.fixture(scope="module")
def two_things(tmp_path_factory):
    """A minute of two things that swing, one on the left and one on the right; each is over its
    middle all the time.
    """
    path = tmp_path_factory.mktemp("two") / "two.mp4"
    (width, height), (wide, high) = TWO_PX, THING_PX
    field, things = (
        texture(height, width, 1),
        [texture(high, wide, seed, mean=mean) for seed, mean in ((2, 180.0), (3, 70.0))],
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(1500):
            image, swing = field.copy(), round(22 * np.sin(index / 8))
            for (x, y), thing, way in zip(MIDDLES_PX, things, (swing, -swing), strict=True):
                image[y - high // 2 : y + high // 2, x - wide // 2 + way : x + wide // 2 + way] = (
                    thing
                )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
        container.mux(stream.encode(None))
    return path


def followed_by(row):
    """(its number, whether it is on the right) of what a row's box is about."""
    return row.get("track_id") or 0, row["x0"] is not None and row["x0"] + row["x1"] > TWO_PX[0]


def follows(run, right):
    """Whether the newest row is about an object on that side."""
    number, is_right = followed_by(run.last_row())
    return number > 0 and is_right is right


def test_what_is_clicked_on_is_followed(two_things, tmp_path, browser):
    """In a low window, where the picture has black bars at its sides."""
    with (
        streaming(tmp_path, "--follow", "--min-score", "0", source=str(two_things)) as run,
        browser.new_context() as context,
    ):
        page = context.new_page()
        page.set_viewport_size({"width": 1280, "height": 560})
        page.goto(run.url)
        page.get_by_text("Click on what to follow").wait_for()
        wait_in(page, "() => Number(picture.dataset.number) > 0")
        frame = page.locator("#picture").bounding_box()
        scale = frame["height"] / TWO_PX[1]
        bar_px = (frame["width"] - TWO_PX[0] * scale) / 2
        assert bar_px > 50
        page.mouse.click(frame["x"] + bar_px / 2, frame["y"] + frame["height"] / 2)
        assert page.locator("#click-mark").is_hidden(), "beside the picture is nothing to follow"
        for right in (True, False, True):
            middle = MIDDLES_PX[right]
            x, y = frame["x"] + bar_px + middle[0] * scale, frame["y"] + middle[1] * scale
            with page.expect_request("**/settings") as asked:
                page.mouse.click(x, y)
            assert asked.value.post_data_json["point"] == pytest.approx(
                np.divide(middle, TWO_PX), abs=0.01
            )
            mark = page.locator("#click-mark").bounding_box()
            assert (mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2) == pytest.approx(
                (x, y), abs=2
            )
            page.get_by_text("Following what you clicked").wait_for()
            wait_for(partial(follows, run, right))


def test_a_wrong_token_is_refused_and_the_right_one_is_kept_out_of_the_address(tmp_path, browser):
    with (
        streaming(tmp_path, "--web-token", "right and long") as run,
        browser.new_context() as context,
    ):
        base = run.url.partition("?")[0]
        page = context.new_page()
        for wrong in (
            "",
            "?token=",
            "?token=right+and+lon",
            "?token=right+and+long+",
            "?token=%C3%A9",
        ):
            assert page.goto(base + wrong).status == 401
        page.get_by_label("Or type the token").fill("right and long")
        page.get_by_role("button", name="Open the page").click()
        page.wait_for_url(base)
        context.clear_cookies()
        assert page.goto(f"{base}?token=right+and+long").status == 200
        assert page.url == base
        page.wait_for_function("() => Number(picture.dataset.number) > 0")
        for path in ("/state", "/frame.jpg", "/live.mjpg", "/snapshot.jpg", "/page.js", "/classes"):
            assert run.ask(path)[0].status == 401
        assert run.ask("/settings", "POST", {"box": False})[0].status == 401
        assert (
            run.ask("/state", headers={"Authorization": "Bearer right and long"})[0].status == 200
        )


def test_a_recording_that_was_killed_plays_in_a_browser(tmp_path, browser):
    video, log = tmp_path / "cam.mp4", tmp_path / "log.jsonl"
    command = [
        sys.executable,
        "-m",
        "cli",
        "stream",
        "demo:100000",
        "--no-window",
        "--record",
        str(video),
        "--log",
        str(log),
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        recorded = Run("", log, tmp_path)
        wait_for(
            lambda: (
                any(path.stat().st_size for path in tmp_path.glob("*log.jsonl*"))
                and recorded.last_row()["pts_s"] > 3
            )
        )
        process.kill()
    (killed,) = (path for path in tmp_path.iterdir() if "cam" in path.name)
    last_s = recorded.last_row()["pts_s"]
    playable = killed.rename(tmp_path / "killed.mp4")
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(playable.as_uri())
        page.wait_for_function("() => document.querySelector('video')?.readyState >= 2")
        page.evaluate(f"document.querySelector('video').currentTime = {last_s - 1.1}")
        page.wait_for_function(
            "() => !document.querySelector('video').seeking && document.querySelector('video').readyState >= 2"
        )
        assert page.evaluate("document.querySelector('video').error") is None
        assert page.evaluate("document.querySelector('video').currentTime") >= last_s - 1.2, (
            "all but the last second"
        )
