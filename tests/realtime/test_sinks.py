"""Files appear whole or not at all, and carry the source's timestamps."""

import signal
import time
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from engines.errors import OutputError, SourceError
from engines.localizer import Detection, Localization
from realtime.annotate import PREDICTED_BGR, TRUTH_BGR, Look, draw, heat_map
from realtime.file_sinks import JsonlSink, VideoSink, fitted, interrupts_held
from realtime.frames import Frame, FrameRecord
from tests.realtime.media import picture, timestamps_s

MAP = np.zeros((16, 16), np.float32)


def record(index, pts_s):
    found = Localization((10.0, 10.0, 50.0, 60.0), 3, "cat", 0.75, MAP)
    return FrameRecord(
        Frame(picture(index), "clip", index, pts_s, time.monotonic_ns(), 0.0), found=found
    )


@pytest.mark.parametrize(("width", "height"), [(128, 96), (127, 95), (1, 1), (3, 240)])
def test_video_keeps_timestamps_for_any_size(tmp_path, width, height):
    pts = [0, 0.04, 0.1, 0.7, 2.5]
    with VideoSink(tmp_path / "a" / "out.mp4", Fraction(1, 1000), 25) as sink:
        for index, pts_s in enumerate(pts):
            sink.write(
                record(index, pts_s), picture(index, max(width, 30), height)[:height, :width]
            )
    assert timestamps_s(tmp_path / "a" / "out.mp4") == pytest.approx(pts, abs=1e-3)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("kind", ["video", "log"])
def test_an_error_leaves_nothing_and_an_earlier_file_stays(tmp_path, kind):
    path = tmp_path / "result"
    path.write_text("earlier")

    def broken():
        with VideoSink(path, Fraction(1, 25), 25) if kind == "video" else JsonlSink(path) as sink:
            sink.write(record(0, 0.0), picture(0))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        broken()
    assert path.read_text() == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


def test_what_a_camera_recorded_before_it_failed_is_kept(tmp_path):
    def failing():
        with VideoSink(tmp_path / "out.mp4", Fraction(1, 25), 25, live=True) as sink:
            sink.write(record(0, 0.0), picture(0))
            raise SourceError("the cable came loose")

    with pytest.raises(SourceError, match="cable"):
        failing()
    assert timestamps_s(tmp_path / "out.mp4") == [0.0]


def test_ctrl_c_keeps_what_was_written(tmp_path):
    def interrupted():
        with VideoSink(tmp_path / "out.mp4", Fraction(1, 25), 25) as sink:
            sink.write(record(0, 0.0), picture(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert timestamps_s(tmp_path / "out.mp4") == [0.0]


def test_ctrl_c_waits_until_a_frame_is_wholly_written():
    done = []

    def write():
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            done.append("after the signal")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert done == ["after the signal"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("sink", [JsonlSink, lambda path: VideoSink(path, Fraction(1, 25), 25)])
def test_an_unwritable_place_is_named(tmp_path, sink):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        sink(tmp_path / "file" / "out")


def test_pictures_of_another_size_are_fitted_with_bars():
    wide = np.full((50, 100, 3), 200, np.uint8)
    result = fitted(wide, 100, 100)
    assert result.shape == (100, 100, 3)
    assert result[:24].max() == 0
    assert result[30:70].min() == 200


@pytest.mark.parametrize("size", [(240, 320), (1, 1), (2, 500), (2160, 3840)])
def test_drawing_fits_any_frame(size):
    image = np.full((*size, 3), 128, np.uint8)
    box = (0.1 * size[1], 0.1 * size[0], 0.6 * size[1], 0.6 * size[0])
    found = Localization(
        box, 0, "Egyptian cat", 0.5, np.random.default_rng(0).random((32, 32), np.float32)
    )
    result = draw(
        image,
        found,
        truth_xyxy_px=(0.0, 0.0, size[1] * 0.5, size[0] * 0.5),
        status="clip 7   8.1 ms",
    )
    assert result.shape == image.shape
    assert (image == 128).all(), "the frame itself is left alone"
    if min(size) >= 240:
        for colour in (PREDICTED_BGR, TRUTH_BGR):
            assert (result == colour).all(axis=2).any()


def test_every_detection_is_drawn_the_first_one_thicker():
    """At 480 px a unit is 2 px: the main box is 4 px thick, another one 2 px."""
    image = np.full((480, 480, 3), 128, np.uint8)
    boxes = ((20.0, 100.0, 120.0, 300.0), (200.0, 100.0, 300.0, 300.0))
    detections = tuple(Detection(box, i, f"class {i}", 0.5) for i, box in enumerate(boxes))
    found = Localization(boxes[0], 0, "class 0", 0.5, np.zeros((4, 4), np.float32), detections)
    row = draw(image, found, look=Look(heat_map="off"))[200]
    red = np.flatnonzero((row == PREDICTED_BGR).all(axis=1))
    assert {20, 119, 200, 299} <= set(red)
    assert (red < 60).sum() > ((red >= 190) & (red < 240)).sum() >= 2


def test_the_log_lists_detections_only_where_they_are_several():
    found = Localization((1.0, 2.0, 3.0, 4.0), 0, "a", 0.5, np.zeros((4, 4), np.float32))
    frame = Frame(np.zeros((8, 8, 3), np.uint8), "s", 0, 0.0, 0, 0.0)
    assert "detections" not in FrameRecord(frame, found=found).row()
    one = Detection((1.0, 2.0, 3.0, 4.0), 0, "a", 0.25)
    assert "detections" not in FrameRecord(frame, found=replace(found, detections=(one,))).row()
    two = FrameRecord(
        frame, found=replace(found, detections=(one, replace(one, class_index=1, class_name="b")))
    ).row()
    assert [each["class_name"] for each in two["detections"]] == ["a", "b"]
    assert two["detections"][0] == {
        "class_id": 0,
        "class_name": "a",
        "score": 0.25,
        "label": "a",
        "sure": None,
        "x0": 1.0,
        "y0": 2.0,
        "x1": 3.0,
        "y1": 4.0,
    }
    assert (two["x0"], two["score"]) == (1.0, 0.5)


def test_the_heat_map_is_brightest_where_the_map_is():
    values = np.zeros((64, 64), np.float32)
    values[40:48, 8:16] = 1
    colours = heat_map(values, 128, 96).sum(axis=2)
    y, x = np.unravel_index(colours.argmax(), colours.shape)
    assert 60 <= y <= 72
    assert 16 <= x <= 32
    assert heat_map(np.zeros((8, 8), np.float32), 16, 16).shape == (16, 16, 3)
