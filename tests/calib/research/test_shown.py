"""What is counted as shown on nothing, and as rightly named."""

import numpy as np
import pytest

from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.research import shown
from engines.dense_names import BoxName
from engines.localizer import Detection, Localization

MAP = np.zeros((4, 4), np.float32)
TABLE = (40.0, 40.0, 80.0, 90.0)


def test_an_interval_is_wilsons():
    """Newcombe 1998, table I, method 3: 81 of 263, and 0 of 20."""
    found = shown.share(81, 263)
    assert (found["low"], found["high"]) == (
        pytest.approx(0.2553, abs=1e-4),
        pytest.approx(0.3662, abs=1e-4),
    )
    assert shown.share(0, 20)["low"] == 0.0
    assert shown.share(0, 20)["high"] == pytest.approx(0.1611, abs=1e-4)
    assert shown.share(0, 0)["high"] == 1.0


def test_a_box_around_what_stands_there_is_not_on_nothing():
    far = Detection((0.0, 0.0, 20.0, 20.0), 0, "cat", 0.5, 0.6)
    near = Detection((42.0, 41.0, 79.0, 92.0), 0, "cat", 0.5, 0.9)
    answer = Localization(near.box_xyxy_px, 0, "cat", 0.5, MAP, (near, far), 0.9)
    assert list(shown.boxes_on_nothing(answer, (TABLE,))) == [0.6]
    assert list(shown.boxes_on_nothing(answer, ())) == [0.9, 0.6]
    assert list(shown.boxes_on_nothing(Localization(None, 0, "cat", 0.5, MAP), ())) == []


def test_a_name_is_right_where_it_is_the_class_of_the_object_in_the_box():
    truths = (Truth("tv", TABLE), Truth("cat", (0.0, 0.0, 20.0, 20.0)))
    sample = Sample("a.jpg", lambda: np.zeros((100, 100, 3), np.uint8), truths)

    def named(label, box=TABLE):
        box_name = BoxName(label, "", 0.9)
        return shown.named_rightly(Localization(box, 0, "x", 0.5, MAP, box_name=box_name), sample)

    assert named("screen") is True, "by the head's name for it"
    assert named("cat") is False
    assert named("cat", (1.0, 0.0, 20.0, 20.0)) is True
    assert named("object") is None


def test_the_list_of_empty_frames_is_of_frames_that_there_are(data):
    for part in (shown.TUNING, shown.REPORT):
        frames = list(shown.empty_frames(data, part))
        assert {each.video for each in frames} == {
            "car-detection.mp4",
            "one-by-one-person-detection.mp4",
        }
        assert {len(each.standing_xyxy_px) for each in frames} == {0, 2}
        assert 190 < len(frames) < 300


def test_every_scene_is_there(data):
    assert len(shown.SCENES) == 24
    for _, name in shown.SCENES:
        assert min(shown.scene(data, name).shape[:2]) > 100
