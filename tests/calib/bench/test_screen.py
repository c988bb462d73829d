"""Glass to glass: codes are read back, only once, and a loop with a known delay is measured as
that.
"""

import io

import cv2
import numpy as np
import pytest
from rich.console import Console

from calib.bench.screen import CODES, Codes, WindowScreen, bench_screen
from engines.errors import SightlineError
from engines.options import EngineOptions

DELAY_MS = 150.0


def console():
    return Console(file=io.StringIO())


def test_every_code_is_read_back_as_its_own_and_none_twice():
    codes = Codes()
    for _ in range(40):
        before = codes.count
        picture = codes.next()
        shown_ns = codes._shown_ns[before]
        assert codes.seen(picture) == shown_ns
        assert codes.seen(picture) is None, "a second sighting is later than the event"


def test_a_code_is_read_as_a_camera_sees_it():
    codes = Codes()
    for _ in range(7):
        codes.next()
    picture = codes.next()
    shown_ns = codes._shown_ns[7]
    side = picture.shape[0]
    corners = np.float32([[0, 0], [side, 0], [side, side], [0, side]])
    seen_at = np.float32([[120, 60], [430, 100], [410, 400], [90, 330]])
    view = cv2.warpPerspective(
        picture, cv2.getPerspectiveTransform(corners, seen_at), (640, 480), borderValue=(60, 70, 80)
    )
    noisy = (
        cv2.GaussianBlur(view, (0, 0), 1.5).astype(float) * 0.6
        + 20
        + np.random.default_rng(0).normal(0, 8, view.shape)
    )
    assert codes.seen(np.clip(noisy, 0, 255).astype(np.uint8)) == shown_ns


def test_of_two_codes_in_view_the_newest_counts_and_older_ones_are_forgotten():
    codes = Codes()
    older, newer = codes.next(), codes.next()
    at_ns = codes._shown_ns[1]
    assert codes.seen(np.hstack([older, newer])) == at_ns
    assert codes.seen(older) is None


def test_a_torn_or_empty_picture_has_no_code():
    codes = Codes()
    picture = [codes.next() for _ in range(2)]
    half = picture[0].shape[0] // 2
    torn = np.vstack([picture[0][:half], picture[1][half:]])
    assert codes.seen(torn) is None
    assert codes.seen(np.zeros((240, 320, 3), np.uint8)) is None


def test_numbers_begin_again():
    codes = Codes()
    codes.count = CODES - 1
    codes.next()
    picture = codes.next()
    assert codes.seen(picture) is not None


def test_a_loop_of_known_delay_is_measured_as_that():
    result = bench_screen(f"loop:{DELAY_MS:g}", EngineOptions(), 4.0, console())
    elsewhere_ms = result["elsewhere_ms"]["p50"]
    assert elsewhere_ms >= DELAY_MS - 1, "never less than the truth; a busy machine may add to it"
    assert result["glass_to_glass_ms"]["p50"] >= max(elsewhere_ms, result["own_ms"]["p50"])
    assert 10 < result["codes_seen"] <= result["codes_shown"]


@pytest.mark.parametrize("source", ["loop:", "loop:x", "loop:-5", "loop:1e9"])
def test_a_loop_without_a_sensible_delay_is_refused(source):
    with pytest.raises(SightlineError, match="loop:100"):
        bench_screen(source, EngineOptions(), 1.0, console())


def test_without_a_display_it_says_what_to_do(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SightlineError, match="loop:100"):
        bench_screen("demo:", EngineOptions(), 1.0, console())


def test_the_window_shows_a_new_code_beside_each_picture(monkeypatch):
    shown = []
    for name in ("namedWindow", "waitKey"):
        monkeypatch.setattr(cv2, name, lambda *_: 0)
    monkeypatch.setattr(cv2, "imshow", lambda _, picture: shown.append(picture))
    codes = Codes()
    screen = WindowScreen(codes)
    screen.show(np.full((240, 320, 3), 128, np.uint8))
    assert codes.count == 2
    assert shown[1].shape == (480, 480 + 640, 3)
    at_ns = codes._shown_ns[1]
    assert codes.seen(shown[1]) == at_ns


def test_a_camera_that_sees_no_code_is_told(monkeypatch):
    monkeypatch.setattr("calib.bench.screen.PATIENCE_S", 0.2)
    monkeypatch.setattr("calib.bench.screen.has_display", lambda: True)
    monkeypatch.setattr(
        "calib.bench.screen.WindowScreen",
        lambda codes: type("Dark", (), {"show": lambda *_: None})(),
    )
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: None)
    with pytest.raises(SightlineError, match="sees no code"):
        bench_screen("demo:60", EngineOptions(), 1.0, console())
